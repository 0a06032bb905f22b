"""Pictures of analyses show the values they are given, each where its names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_hybrid import ActivationCache
from hooked_hybrid.analysis import plots
from hooked_hybrid.analysis.activation_patching import (
    generic_activation_patch,
    patch_heads,
    patch_resid_pre,
)
from hooked_hybrid.analysis.attribution import Attribution, attribution_patching
from hooked_hybrid.analysis.channels import GroupScores
from hooked_hybrid.analysis.drawing import MOST_NAMED, visible
from hooked_hybrid.analysis.lens import lens_ranks
from hooked_hybrid.analysis.plots import (
    attribution_bars,
    effective_attention_map,
    head_grid,
    lens_map,
    pattern_map,
    residual_curves,
)
from hooked_hybrid.analysis.scores import HeadScores
from tests.models import random_tokens, tiny_model

SCORES = HeadScores((2, 5), torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.9, torch.nan]]), "copied")


def drawn(axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array().filled(np.nan))


def limits(axes) -> tuple[float, float]:
    return axes.images[0].norm.vmin, axes.images[0].norm.vmax


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def rendered(figure):
    """The figure after everything in it was laid out, warnings being errors."""
    figure.draw_without_rendering()
    return figure


def test_a_head_grid_has_a_row_a_layer_and_a_column_a_head():
    figure = rendered(head_grid(SCORES, "title", marked=[(5, 1)]))
    axes, bar = figure.axes
    assert np.array_equal(drawn(axes), SCORES.values.numpy(), equal_nan=True)
    assert ticks(axes.yaxis) == ["2", "5"] and ticks(axes.xaxis) == ["0", "1", "2"]
    assert limits(axes) == (0, pytest.approx(0.9)) and bar.get_ylabel() == "copied"
    written = {t.get_position(): t.get_text() for t in axes.texts}
    assert written[(1, 1)] == "0.90" and (2, 1) not in written
    assert axes.patches[0].get_xy() == (0.5, 0.5) and axes.get_title() == "title"


def test_signed_maps_are_white_at_zero():
    signed = HeadScores((0,), torch.tensor([[-0.2, 0.1, -0.001]]))
    axes = rendered(head_grid(signed)).axes[0]
    image = axes.images[0]
    assert limits(axes) == (pytest.approx(-0.2), pytest.approx(0.2))
    assert np.allclose(image.cmap(image.norm(0.0))[:3], 1, atol=0.04)
    assert [t.get_text() for t in axes.texts] == ["-0.20", "0.10", "0.00"]
    positive = torch.rand(4, 4)
    low, high = limits(effective_attention_map(positive).axes[0])
    assert low == -high == pytest.approx(-float(positive.max()))
    assert limits(pattern_map(positive).axes[0]) == (0, pytest.approx(float(positive.max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patterns_share_a_scale_and_have_their_tokens(dtype):
    pattern = torch.rand(5, 3, 3).tril().to(dtype).requires_grad_()
    tokens = ["a", " b$x^2$", "\n"]
    figure = rendered(pattern_map(pattern, tokens, [f"L2H{h}" for h in range(5)], n_columns=3))
    maps = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    shown = pattern.detach().float().numpy()
    assert len(maps) == 5 and len({limits(axes) for axes in maps}) == 1
    for i, axes in enumerate(maps):
        assert np.array_equal(drawn(axes), shown[i]) and axes.get_title() == f"L2H{i}"
    names = ["a", "·b$x^2$", "\\n"]
    assert ticks(maps[0].yaxis) == names and ticks(maps[1].yaxis) == []
    assert [ticks(axes.xaxis) for axes in maps] == [[], [], names, names, names]


def test_queries_can_have_tokens_of_their_own_and_long_patterns_have_numbers():
    axes = rendered(pattern_map(torch.rand(2, 4), list("abcd"), query_tokens=["x", "y"])).axes[0]
    assert ticks(axes.xaxis) == list("abcd") and ticks(axes.yaxis) == ["x", "y"]
    n = MOST_NAMED + 1
    axes = rendered(pattern_map(torch.rand(n, n), ["t"] * n)).axes[0]
    assert "20" in ticks(axes.xaxis) and "t" not in ticks(axes.xaxis)


@pytest.mark.parametrize("by_size", [False, True])
def test_bars_are_the_parts_and_still_add_up(by_size):
    values = torch.tensor([1.0, -3.0, 0.25, 2.0, -0.5])
    figure = rendered(attribution_bars(values, list("abc$e"), most=4, by_size=by_size))
    axes = figure.axes[0]
    sizes = [bar.get_width() for bar in axes.patches]
    order = ["b", "$", "a"] if by_size else ["a", "b", "$"]
    assert ticks(axes.yaxis) == [*order, "2 others"]
    by_name = dict(zip("abc$e", values.tolist(), strict=True))
    assert sizes == [*(by_name[x] for x in order), -0.25]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(float(values.sum()))
    up, down = (axes.patches[sizes.index(x)].get_facecolor() for x in (2.0, -3.0))
    assert up != down and axes.get_xlabel() == "attribution (logits)"
    assert len(rendered(attribution_bars(values, list("abcde"))).axes[0].patches) == 5


def test_curves_are_the_values_over_depth():
    values = torch.rand(4, 2, 3)
    labels = ["0_pre", "1_pre", "2_pre", "final_post"]
    figure = rendered(residual_curves(values, labels, list("abcdef"), ylabel="nats"))
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == list("abcdef")
    assert np.array_equal(lines[4].get_ydata(), values[:, 1, 1].numpy())
    assert ticks(figure.axes[0].xaxis) == labels and figure.axes[0].get_ylabel() == "nats"
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == 6
    many = rendered(residual_curves(torch.rand(4, 9), labels)).axes[0].lines
    assert len(many) == 10 and many[-1].get_label() == "mean of 9"
    one = rendered(residual_curves([1.0, 2.0], ["a", "b"])).axes[0].lines
    assert list(one[0].get_ydata()) == [1, 2]


def test_a_lens_has_the_output_on_top_and_ranks_a_log_scale():
    values, labels = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]]), ["0_pre", "final_post"]
    texts = [["u", " v"], ["w", "x"]]
    figure = rendered(lens_map(values, labels, ["a", "b"], texts, label="nats"))
    axes, bar = figure.axes
    assert np.array_equal(drawn(axes), values.numpy()) and limits(axes) == (-2, 0)
    assert ticks(axes.yaxis) == labels and not axes.yaxis_inverted()
    assert {t.get_position(): t.get_text() for t in axes.texts}[(1, 0)] == "·v"
    assert bar.get_ylabel() == "nats" and ticks(axes.xaxis) == ["a", "b"]
    axes, bar = rendered(lens_map(torch.tensor([[0, 99]]), ["final_post"])).axes
    assert drawn(axes).tolist() == [[1, 100]] and limits(axes) == (1, 100)
    assert bar.get_yscale() == "log" and bar.get_ylabel() == "rank + 1 (1 is the most likely)"


def test_tokens_are_shown_with_their_blanks():
    assert [visible(t) for t in (" a", "a b ", "  ", "\n\t", "x" * 20)] == [
        "·a",
        "a b·",
        "··",
        "\\n\\t",
        "x" * 11 + "…",
    ]


def test_figures_are_none_of_pyplots():
    assert head_grid(SCORES).canvas.manager is None


def test_errors_name_the_value_and_the_remedy():
    square = torch.rand(2, 2)
    for message, draw in {
        r"no head \(3, 0\) to mark: layers \(2, 5\)": lambda: head_grid(SCORES, marked=[(3, 0)]),
        r"not \[2\]": lambda: pattern_map([1.0, 2.0]),
        "3 tokens for 2": lambda: pattern_map(square, list("abc")),
        "1 query_tokens for 2": lambda: pattern_map(square, query_tokens=["a"]),
        "1 titles for 3": lambda: pattern_map(torch.rand(3, 2, 2), titles=["a"]),
        "2 labels for values": lambda: attribution_bars([1.0], ["a", "b"]),
        "most=0": lambda: attribution_bars([1.0], ["a"], most=0),
        "1 labels and 0 names for 2 depths": lambda: residual_curves(square, ["a"]),
        "1 labels for a lens": lambda: lens_map(square, ["a"]),
        "1 tokens for 2 positions": lambda: lens_map(square, ["a", "b"], ["x"]),
        "1 texts of a depth for 2": lambda: lens_map(square, ["a", "b"], None, [["x"], ["y"]]),
        "texts of 1 depths for 2": lambda: lens_map(square, ["a", "b"], None, [["x", "y"]]),
    }.items():
        with pytest.raises(ValueError, match=message):
            draw()


def test_a_mean_of_curves_leaves_out_what_is_not_there():
    values = torch.rand(7, 9)
    values[:, 0] = torch.nan
    ranks = torch.randint(0, 50, (7, 9))
    ranks[:, 0] = -1
    for given, known in ((values, values[:, 1:]), (ranks, ranks[:, 1:].float())):
        figure = plots.residual_curves(given, [str(i) for i in range(7)])
        drawn = torch.as_tensor(figure.axes[0].lines[-1].get_ydata(), dtype=torch.float)
        assert torch.allclose(drawn, known.mean(1), rtol=1e-4)
    assert plots.pattern_map([torch.rand(3, 3), torch.rand(3, 3)])


# --- whole results ------------------------------------------------------------------------------

MODEL = tiny_model("griffin")
CLEAN, CORRUPTED = random_tokens(n_pos=5), random_tokens(n_pos=5, seed=1)


def metric(logits: Tensor) -> Tensor:
    """One value a row."""
    return logits[:, -1, 3]


@pytest.fixture(scope="module")
def cache() -> ActivationCache:
    return MODEL.run_with_cache(CLEAN)[1]


def attributed(names: Any, reduce: Any) -> Attribution:
    return attribution_patching(MODEL, CLEAN, CORRUPTED, metric, names, reduce, verbose=False)


def test_patching_by_head_is_a_head_grid_bars_and_curves(cache: ActivationCache):
    grid = patch_heads(MODEL, CORRUPTED, cache, metric, verbose=False)
    values = grid.values.mean(-1).numpy()  # over rows
    axes, bar = rendered(head_grid(grid, marked=[(2, 1)])).axes
    assert np.allclose(drawn(axes), values) and ticks(axes.yaxis) == ["2"]
    assert bar.get_ylabel() == "change of the metric by patching"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "attention layer")
    axes = rendered(attribution_bars(grid)).axes[0]
    assert ticks(axes.yaxis) == grid.head_scores().labels() and len(axes.lines) == 1  # no sum
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(values.flatten().tolist())
    axes = rendered(attribution_bars(grid, most=1)).axes[0]
    assert len(axes.patches) == 1
    assert "without the" in axes.get_legend_handles_labels()[1][0]
    axes = rendered(residual_curves(grid)).axes[0]
    assert [line.get_label() for line in axes.lines][:2] == ["head 0", "head 1"]
    assert axes.get_xlabel() == "layer"
    named = generic_activation_patch(
        MODEL, CORRUPTED, cache, metric, "blocks.*.attn.hook_z", ("head",), verbose=False
    )
    axes = rendered(head_grid(named, marked=[("2_z", 0)])).axes[0]
    assert ticks(axes.yaxis) == ["2_z"] and axes.get_ylabel() == "hook point"


def test_patching_by_position_is_a_map_and_curves(cache: ActivationCache):
    grid = patch_resid_pre(MODEL, CORRUPTED, cache, metric, verbose=False)
    axes = rendered(lens_map(grid, tokens=list("abcde"))).axes[0]
    assert np.allclose(drawn(axes), grid.values.mean(-1).numpy())
    assert ticks(axes.yaxis) == ["0", "1", "2", "3"] and axes.get_ylabel() == "layer"
    assert ticks(axes.xaxis) == list("abcde")
    lines = rendered(residual_curves(grid)).axes[0].lines
    assert [line.get_label() for line in lines] == [f"pos {i}" for i in range(5)]
    assert "layer 3 pos 4" in ticks(rendered(attribution_bars(grid)).axes[0].yaxis)


def test_attribution_goes_into_every_plot_with_its_axes():
    by_head = attributed("blocks.*.attn.hook_z", "head")
    axes, bar = rendered(head_grid(by_head)).axes
    assert np.allclose(drawn(axes)[0], by_head["z", 2].mean(0).numpy())
    assert bar.get_ylabel() == "attributed change of the metric"
    by_position = attributed("blocks.*.hook_resid_pre", "position")
    axes = rendered(lens_map(by_position)).axes[0]
    assert ticks(axes.yaxis) == [f"{i}_resid_pre" for i in range(4)]
    assert np.allclose(drawn(axes)[3], by_position["resid_pre", 3].mean(0).numpy(), rtol=1e-5)
    whole = attributed(["blocks.*.hook_m*_out", "hook_embed"], "hook")
    axes = rendered(attribution_bars(whole)).axes[0]
    assert ticks(axes.yaxis)[:3] == ["embed", "0_mixer_out", "0_mlp_out"]
    assert axes.lines[0].get_label().startswith("sum")
    assert axes.get_xlabel() == "attributed change of the metric"
    unlike = attributed(["blocks.2.attn.hook_z", "blocks.2.hook_resid_pre"], ("position", "head"))
    assert "2_z pos 4 head 0" in ticks(rendered(attribution_bars(unlike, most=60)).axes[0].yaxis)
    of_pattern = attributed("blocks.*.attn.hook_pattern", None)
    maps = [axes for axes in rendered(pattern_map(of_pattern)).axes if axes.images]
    assert [axes.get_title() for axes in maps] == [f"L2H{h}" for h in range(len(maps))]
    assert np.allclose(drawn(maps[1]), of_pattern["pattern", 2].mean(0)[1].numpy())
    assert effective_attention_map(of_pattern).axes
    for match, draw in (
        ("give attribution..blocks", lambda: pattern_map(by_head)),
        ("a HeadScores has no queries", lambda: pattern_map(SCORES)),
        (r"by head, and these have axes \('name', 'pos'\)", lambda: head_grid(by_position)),
        (r"by pos, and these have axes \('name', 'head'\)", lambda: lens_map(by_head)),
        ("2_resid_pre has axes .*choose points of one kind", lambda: lens_map(unlike)),
        ("head_grid shows", lambda: head_grid(whole)),
    ):
        with pytest.raises(ValueError, match=match):
            draw()


def test_scores_and_lenses_are_drawn_whole(cache: ActivationCache):
    axes = rendered(attribution_bars(SCORES, most=2, by_size=True)).axes[0]
    assert axes.get_xlabel() == "copied"
    groups = GroupScores((0, 1), torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.9, 0.5]]), "lost")
    axes = rendered(head_grid(groups)).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("group", "recurrent layer")
    assert ticks(rendered(attribution_bars(groups)).axes[0].yaxis)[4] == "L1G1"
    lens = lens_ranks(MODEL, cache.apply_slice_to_batch_dim([0]), CLEAN[:1])
    axes = rendered(lens_map(lens)).axes[0]
    assert ticks(axes.yaxis) == lens.labels
    assert drawn(axes).tolist() == (lens.values[:, 0] + 1).tolist()
    lines = rendered(residual_curves(lens)).axes[0].lines
    assert len(lines) == 5 and lines[0].get_label() == "pos 0"
    with pytest.raises(ValueError, match=r"axes \('depth', 'batch', 'pos'\)"):
        lens_map(lens_ranks(MODEL, cache, CLEAN))
    for plot in (attribution_bars, residual_curves, lens_map):
        with pytest.raises(ValueError, match="needs their labels"):
            plot(torch.rand(2, 2))
