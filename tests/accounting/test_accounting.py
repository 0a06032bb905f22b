"""Accounting from a config alone: what the published models count, and what real forwards do."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.accounting import (
    PUBLISHED,
    Flops,
    configs,
    count_pairs,
    count_parameters,
    flops_table,
    memory_table,
    prefill_flops,
    recurrence_over_attention,
    state_bytes,
    step_flops,
    tokens_where_attention_is_larger,
)
from hooked_hybrid.accounting.configs import ALIASES, config_of
from hooked_hybrid.accounting.parameters import BESIDE_LAYERS, order_of_rows
from hooked_hybrid.accounting.plots import compute_figure
from hooked_hybrid.commands import accounting as commands
from hooked_hybrid.commands import program as cli
from hooked_hybrid.commands.accounting import lengths_up_to, windows_of
from hooked_hybrid.config import AttentionConfig
from tests.models import CONFIGS, griffin_config, jamba_config, random_model, random_tokens
from tests.parity import test_jamba_loading, test_loading
from weights_conversion import jamba, recurrentgemma

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = {
    **CONFIGS,
    "two kinds of attention": HybridConfig(
        d_model=24,
        d_vocab=61,
        layers=(*griffin_config("AR").layers, *griffin_config("A", n_keys=None).layers),
    ),
    "all keys and no convolution bias": jamba_config("AM", n_heads=2, n_kv_heads=1, d_conv=2),
}
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def model_of(name: str) -> HookedHybrid:
    return random_model(MODELS[name])


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_those_of_the_published_files(name: str):
    if name == "jamba-mini":
        theirs = jamba.config_from_dict(test_jamba_loading.MINI)
    else:
        own = test_loading.PUBLISHED[name.removeprefix("recurrentgemma-")]
        theirs = recurrentgemma.config_from_dict({**test_loading.OF_BOTH, **own})
    ours = PUBLISHED[name]
    assert (ours.layers, ours.norm) == (theirs.layers, theirs.norm)
    for field in ("d_model", "d_vocab", "tied_embedding", "scale_embedding", "logits_soft_cap"):
        assert getattr(ours, field) == getattr(theirs, field)


def test_a_config_is_found_by_name_folder_or_file_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "_fetched", lambda name: pytest.fail(f"asked the hub for {name}"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(test_jamba_loading.MINI))
    assert config_of(path).layers == PUBLISHED["jamba-mini"].layers
    path.rename(tmp_path / "config.json")
    assert config_of(tmp_path).layers == PUBLISHED["jamba-mini"].layers
    assert config_of("tiny-griffin") == HybridConfig.from_pretrained("tiny-griffin")
    assert config_of("google/recurrentgemma-2b-it") is PUBLISHED["recurrentgemma-2b"]
    assert config_of("ai21labs/AI21-Jamba-Mini-1.6") is PUBLISHED["jamba-mini"]
    assert set(ALIASES.values()) == set(PUBLISHED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "contains a list, not the settings of a model"),
        ('{"model_type": "llama"}', "'llama'"),
    ],
)
def test_a_bad_config_file_is_a_clear_error(tmp_path: Path, content: str, message: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["tiny-griffon", "./none/here", "no/such/config.json"])
def test_the_error_of_an_unknown_name_lists_the_names(name: str):
    with pytest.raises(ValueError, match=r"no such file or folder.*tiny-griffin.*jamba-mini"):
        config_of(name)


# --- parameters -----------------------------------------------------------------------------------


def test_2b_has_the_counts_and_percentages_of_table_1():
    counted = count_parameters(PUBLISHED["recurrentgemma-2b"])
    table = counted.table().set_index("kind")
    published = {
        "MLP": (1_534_008_320, 74.8),
        "recurrent block": (377_994_240, 18.4),
        "RG-LRU": (23_731_200, 1.2),
        "attention": (115_363_840, 5.6),
    }
    for kind, (n, percent) in published.items():
        assert table["parameters"][kind] == n
        assert round(100 * table["share_of_column"][kind], 1) == percent
    assert table["parameters"]["norms"] == 135_680
    assert (counted.without_embeddings, counted.total) == (2_027_502_080, 2_682_862_080)
    # Of what there is, the RG-LRU counted once:
    assert round(100 * table["share"]["MLP"], 1) == 75.7


def test_9b_and_mini_have_their_published_counts():
    nine = count_parameters(PUBLISHED["recurrentgemma-9b"])
    assert (nine.without_embeddings, nine.total) == (7_531_401_216, 8_579_977_216)
    assert [nine.of(kind) for kind in ("MLP", "recurrent block", "RG-LRU", "attention")] == [
        5_738_897_408,
        1_364_320_256,
        54_845_440,
        427_868_160,
    ]
    mini = count_parameters(PUBLISHED["jamba-mini"])
    assert (mini.total, mini.active) == (51_570_323_328, 12_110_311_296)
    assert mini.without_embeddings == 51_033_452_416
    assert (mini.of("experts"), mini.of("router")) == (45_097_156_608, 16 * 65_536)
    assert mini.of("Mamba block") == 28 * 105_308_448


@pytest.mark.parametrize(
    ("name", "file", "mine"),
    [
        ("recurrentgemma-2b", "google_rg_2b", {"attention": r"attention_block", "MLP": r"mlp_bl"}),
        ("recurrentgemma-9b", "hf_rg_9b", {"recurrent block": r"(linear_[xy]|out\.|conv_1d|rg_l)"}),
        ("recurrentgemma-2b", "hf_rg_2b", {"RG-LRU": r"rg_lru", "norms": r"norm\.weight"}),
        (
            "jamba-mini",
            "hub_jamba_mini_perexpert",
            {
                "experts": r"\.experts\.",
                "router": r"router",
                "Mamba block": r"\.mamba\.",
                "selective SSM": r"mamba\.(A_log|D$|x_proj|dt_|b_lay|c_lay)",
                "read-out": r"lm_head",
            },
        ),
    ],
)
def test_counts_are_those_of_the_published_tensors(name: str, file: str, mine: dict[str, str]):
    lines = (GOLDEN / "keys" / f"keys_{file}.txt").read_text().splitlines()
    shapes = dict(line.split("\t") for line in lines)
    if "jamba" not in name:
        shapes.pop("lm_head.weight", None)  # the embedding again
    sizes = {key: math.prod(ast.literal_eval(shape)) for key, shape in shapes.items()}
    counted = count_parameters(PUBLISHED[name])
    assert counted.total == sum(sizes.values())
    for kind, pattern in mine.items():
        assert counted.of(kind) == sum(n for key, n in sizes.items() if re.search(pattern, key))


@every_model
def test_counts_add_up_to_the_model(name: str):
    cfg, counted = MODELS[name], count_parameters(MODELS[name])
    assert counted.total == sum(p.numel() for p in model_of(name).parameters())
    tokens = cfg.d_model * cfg.d_vocab * (1 if cfg.tied_embedding else 2)
    assert counted.total - counted.without_embeddings == tokens
    assert counted.active - counted.active_without_embeddings == tokens
    table = counted.table()
    assert table.loc[table["part_of"] == "", "share"].sum() == pytest.approx(1)
    assert table["share_of_column"].sum() == pytest.approx(1)


def test_active_parameters_are_those_that_a_token_touches():
    """With one expert of four chosen, the others' gradients are zero."""
    model = random_model(jamba_config("MA", n_chosen=1)).requires_grad_(True)
    model(random_tokens(1, 1), return_type="logits").sum().backward()
    touched = 0
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None and ".mlp." in name and grad.ndim == 3:
            touched += int((grad.abs().amax((1, 2)) > 0).sum()) * grad[0].numel()
    rows = {row.kind: row for row in count_parameters(model.cfg).rows}
    assert rows["experts"].active == touched > 0
    assert rows["experts"].parameters == 4 * touched


def test_a_module_without_a_kind_is_an_error(monkeypatch: pytest.MonkeyPatch):
    without = {kind: name for kind, name in BESIDE_LAYERS.items() if name != "norms"}
    monkeypatch.setattr("hooked_hybrid.accounting.parameters.BESIDE_LAYERS", without)
    with pytest.raises(LookupError, match="parameters are in modules without a kind"):
        count_parameters(CONFIGS["griffin"])


def test_rows_stand_in_the_order_of_the_papers_tables():
    known = ["MLP", "router", "experts", "recurrent block", "Mamba block", "attention"]
    rows = [row for row in order_of_rows() if row in {*known, *BESIDE_LAYERS.values()}]
    assert rows == [*known, "norms", "embedding", "read-out"]


# --- floating-point operations --------------------------------------------------------------------


def total(by_kind: dict[str, Flops], sort: str = "products") -> int:
    return sum(getattr(flops, sort) for flops in by_kind.values())


def counted(run: Callable[[], Any]) -> int:
    """What torch's counter sees of matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@every_model
def test_products_of_a_prefill_are_those_that_torch_counts(name: str, length: int = 530):
    """The definition of attention computes all pairs, blocks the executed ones: equal, not near."""
    model, cfg, tokens = model_of(name), MODELS[name], random_tokens(2, length)
    with torch.no_grad():
        in_blocks = counted(lambda: model(tokens))
        whole = counted(
            lambda: model.run_with_hooks(
                tokens,
                return_type="logits",
                logits_to_keep=1,
                fwd_hooks=[(lambda hook: hook.endswith("pattern"), lambda p, hook: p * 1)],
            )
        )
    assert in_blocks == total(prefill_flops(cfg, length, 2, None, "executed"))
    assert whole == total(prefill_flops(cfg, length, 2, 1, "dense"))


@every_model
@pytest.mark.parametrize("n_before", [6, 70])
def test_products_of_a_step_are_those_that_torch_counts(name: str, n_before: int):
    """Torch counts nothing inside its fused attention, so that the pattern is watched here."""
    model, cfg, tokens = model_of(name), MODELS[name], random_tokens(3, n_before + 1)
    with torch.no_grad():
        _, state = model(tokens[:, :-1], return_state=True)
        seen = counted(
            lambda: model.run_with_cache(
                tokens[:, -1:], state=state, names_filter=lambda hook: hook.endswith("pattern")
            )
        )
    assert seen == total(step_flops(cfg, n_before, 3))


@pytest.mark.parametrize("n_keys", [None, 1, 7, 64, 65, 200, 1000])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300, 1200])
def test_useful_pairs_are_those_of_the_mask_and_never_more_than_executed(length, n_keys):
    query, key = torch.arange(length)[:, None], torch.arange(length)
    mask = (key <= query) & (query - key < (n_keys or length))
    useful, executed, dense = (
        count_pairs(length, n_keys, pairs) for pairs in ("useful", "executed", "dense")
    )
    assert useful == int(mask.sum())
    assert useful <= executed <= dense == length**2
    assert executed - useful <= length * 2 * 64  # two corners of each block


def test_attention_is_quadratic_up_to_the_window_and_linear_after():
    cfg = PUBLISHED["recurrentgemma-2b"]

    def attention(length: int) -> int:
        return prefill_flops(cfg, length)["attention"].total

    second = [
        attention(n + 256) - 2 * attention(n) + attention(n - 256)
        for n in (512, 1024, 1792, 2304, 3072, 8192)
    ]
    assert second[0] == second[1] == second[2] > 0
    assert second[3:] == [0, 0, 0]
    others = [kind for kind in prefill_flops(cfg, 1) if kind not in ("attention", "read-out")]
    one, many = prefill_flops(cfg, 1000, n_logits=0), prefill_flops(cfg, 3000, n_logits=0)
    assert all(many[kind].total == 3 * one[kind].total for kind in others)


# Of a forward under autograd only the question whether keys and values are finite sums anything.
CHECKS = {"sum"}

A_VALUE = {
    "add": 1,
    "mul": 1,
    "div": 1,
    "sub": 1,
    "rsub": 1,
    "neg": 1,
    "square": 1,
    "pow": 1,
    "sqrt": 1,
    "rsqrt": 1,
    "exp": 1,
    "exp2": 1,
    "tanh": 1,
    "cos": 1,
    "sin": 1,
    "reciprocal": 1,
    "addcmul": 2,
    "sigmoid": 4,
    "silu": 4,
    "gelu": 9,
    "softplus": 3,
    "_softmax": 5,
    "addmm": 1,  # the bias
    "baddbmm": 1,
}

FREE = set(
    """
    view _unsafe_view expand permute transpose t unsqueeze squeeze slice select split
    split_with_sizes unbind detach clone alias empty empty_like zeros zeros_like ones ones_like
    new_zeros new_empty full full_like new_ones arange stack unfold repeat copy_
    _to_copy masked_fill where index index_select clamp_min mm bmm cat embedding lift_fresh
    scalar_tensor constant_pad_nd flip
    zero_ fill_ as_strided new_empty_strided empty_strided masked_fill_ set_data
    """.split()
)


class Elementwise(TorchDispatchMode):
    """Counts what torch's own counter does not: every floating-point operation but products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        plain = name if name.startswith("_") else name.rstrip("_")
        value = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return out
        if name == "topk":
            self.total += args[1] * args[0].numel()
        elif name == "mean":
            self.total += args[0].numel() + value.numel()
        elif name == "index_add":
            self.total += args[3].numel()
        elif plain in A_VALUE:
            self.total += A_VALUE[plain] * value.numel()
        elif name not in FREE | CHECKS and plain not in FREE:
            raise LookupError(f"{func} is counted nowhere")
        return out


@pytest.mark.parametrize("name", list(CONFIGS))
def test_operations_that_are_no_products_are_those_of_a_forward(name: str):
    """The equations as modules run them under autograd, where nothing is fused.

    Between two lengths, so that what depends on weights alone cancels. Not counted, see
    `operations`: cosines and sines of the positions (2 d_rotary of each), and the sum in `n + n w`,
    which is how a norm with `1 + w` runs.
    """
    model, cfg = model_of(name), CONFIGS[name]

    def elementwise(length: int) -> int:
        tokens = random_tokens(2, length)
        hooks = [(lambda hook: hook.endswith("pattern"), lambda p, hook: p.clone())]
        with Elementwise() as counter:
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        return counter.total

    def expected(length: int) -> int:
        by_kind = prefill_flops(cfg, length, 2, None, "dense")
        return total(by_kind, "scan") + total(by_kind, "elementwise")

    rotary = [
        layer.mixer.rotary for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)
    ]
    more = 2 * rotary[0].d_rotary if rotary[0] else 0
    if cfg.norm.style == "one_plus_weight":
        more += (2 * cfg.n_layers + 1) * cfg.d_model
    assert elementwise(40) - elementwise(20) == expected(40) - expected(20) + 2 * 20 * more


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (0, {}, "length=0: give 1 or more"),
        (5, {"batch": 0}, "batch=0: give 1 or more"),
        (5, {"n_logits": -1}, "n_logits=-1: give 0 or more"),
    ],
)
def test_impossible_lengths_are_refused(length: int, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        prefill_flops(CONFIGS["griffin"], length, **options)


def test_the_table_holds_what_the_functions_return():
    cfg = CONFIGS["jamba"]
    table = flops_table(cfg, [9, 3, 3], batch=2, n_logits=None)
    assert list(table["length"].unique()) == [3, 9]
    line = table.set_index(["stage", "length", "kind"]).loc[("prefill", 9, "attention")]
    ways = {p: prefill_flops(cfg, 9, 2, None, p)["attention"] for p in ("useful", "dense")}
    assert (line["total"], line["products"]) == (ways["useful"].total, ways["useful"].products)
    assert line["dense_products"] == ways["dense"].products > line["products"]
    step = table[(table["stage"] == "step") & (table["length"] == 3)].set_index("kind")["total"]
    assert step.to_dict() == {k: f.total for k, f in step_flops(cfg, 3, 2).items()}
    layers = table.set_index("kind")["layers"].to_dict()
    assert (layers["attention"], layers["Mamba block"], layers["experts"]) == (1, 3, 2)
    assert (layers["norms"], layers["read-out"]) == (9, 1)


def test_figure_2s_ratio_holds_over_all_layers_of_short_prompts_and_never_layer_by_layer():
    cfg = PUBLISHED["recurrentgemma-2b"]
    ratios = {n: recurrence_over_attention(cfg, n) for n in (1, 521, 522, 2048, 8192)}
    assert ratios[521].all_layers > 3 > ratios[522].all_layers
    assert all(ratio.a_layer < 1.5 for ratio in ratios.values())
    assert ratios[8192].a_layer < 1 < ratios[2048].a_layer
    assert ratios[1].all_layers == pytest.approx(ratios[1].a_layer * 18 / 8)
    long = [recurrence_over_attention(cfg, n, stage="step") for n in (2047, 9000)]
    assert long[0][1:] == long[1][1:]  # the window is full
    counts = count_parameters(cfg)
    by_parameters = counts.of("recurrent block") / counts.of("attention")
    assert ratios[1].all_layers == pytest.approx(by_parameters, rel=2e-3)


def test_a_ratio_needs_both_kinds_and_a_known_stage():
    with pytest.raises(ValueError, match="not have both attention and recurrent layers"):
        recurrence_over_attention(griffin_config("AA"), 5)
    with pytest.raises(ValueError, match="stage='decode': give 'prefill' or 'step'"):
        recurrence_over_attention(griffin_config("RA"), 5, stage="decode")


# --- memory ---------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bytes_are_those_of_a_real_state(name: str, dtype: torch.dtype):
    model = random_model(MODELS[name], dtype=dtype)
    state = None
    for n_tokens, more in ((1, 1), (5, 4), (9, 4), (30, 21)):
        with torch.no_grad():
            _, state = model(random_tokens(3, more), state=state, return_state=True)
        size = state_bytes(MODELS[name], n_tokens, dtype, batch=3)
        assert size.total == state.n_bytes
        ssm = [t for key, t in state.tensors().items() if key.endswith(("ssm", "conv"))]
        assert size.of_recurrence == sum(t.numel() * t.element_size() for t in ssm)


def test_where_keys_and_values_outgrow_the_recurrences():
    for cfg, expected in (
        (PUBLISHED["recurrentgemma-2b"], 56),
        (PUBLISHED["jamba-mini"], 979),
        (griffin_config("RRA", n_keys=3), None),
        (griffin_config("RR"), None),
    ):
        crossing = tokens_where_attention_is_larger(cfg)
        assert crossing == expected
        if crossing is not None:
            before, after = (state_bytes(cfg, n) for n in (crossing - 1, crossing))
            assert before.of_attention <= before.of_recurrence
            assert after.of_attention > after.of_recurrence


def test_the_memory_table_is_level_behind_the_window():
    table = memory_table(PUBLISHED["recurrentgemma-2b"], [8192, 1, 2047, 2048], [torch.bfloat16])
    assert list(table["length"]) == [1, 2047, 2048, 8192]
    assert table["of_attention"].iloc[1:].nunique() == 1
    assert table["of_attention"][0] * 2047 == table["of_attention"][1]
    assert table["of_recurrence"].nunique() == 1
    assert (table["of_attention"] + table["of_recurrence"] + 16 == table["total"]).all()
    with pytest.raises(ValueError, match="n_tokens=0"):
        state_bytes(CONFIGS["griffin"], 0)


# --- commands -------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    """Run one of the two commands, without importing the others."""
    app = typer.Typer()
    for name in ("parameters", "compute"):
        app.command(name)(getattr(commands, name))
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140"})


def test_the_program_has_the_commands():
    assert {cli.COMMANDS["parameters"], cli.COMMANDS["compute"]} == {commands.__name__}


def test_parameters_are_shown_and_written(tmp_path: Path):
    result = run("parameters", "--model", "jamba-mini", "--out", str(tmp_path))
    assert result.exit_code == 0
    for text in ("45,097,156,608", "5,637,144,576", "51,033,452,416", "12,110,311,296"):
        assert text in result.output
    table = pd.read_csv(tmp_path / "parameters.csv", keep_default_na=False).set_index("kind")
    assert table["parameters"]["router"] == 16 * 65_536
    assert table["part_of"]["selective SSM"] == "Mamba block"
    again = run("parameters", "--model", "jamba-mini", "--out", str(tmp_path))
    assert again.exit_code == 1
    assert "already exists: give another folder with --out" in " ".join(again.output.split())


def test_compute_writes_its_tables_and_its_picture(tmp_path: Path):
    out = tmp_path / "new"
    result = run("compute", "--model", "tiny-griffin", "--max-length", "300", "--out", str(out))
    assert result.exit_code == 0, result.output
    names = {"flops.csv", "state.csv", "compute.png", "compute.pdf"}
    assert {path.name for path in out.iterdir()} == names
    flops, state = pd.read_csv(out / "flops.csv"), pd.read_csv(out / "state.csv")
    cfg = config_of("tiny-griffin")
    assert {1, 128, 256, 300} <= set(flops["length"]) <= set(range(1, 301))
    of_prompt = flops[(flops["stage"] == "prefill") & (flops["length"] == 300)]
    assert of_prompt["total"].sum() == total(prefill_flops(cfg, 300), "total")
    last = state[(state["length"] == 300) & (state["dtype"] == "float32")]
    assert last["total"].item() == state_bytes(cfg, 300, torch.float32).total
    assert run("compute", "--model", "tiny-griffin", "--out", str(out)).exit_code == 1


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands make the picture and not write it."""
    monkeypatch.setattr(commands, "save_figure", lambda figure, path: [])


def test_logits_of_all_positions_cost_the_read_out_of_each(tmp_path: Path, undrawn: None):
    costs = {}
    for which in ("last", "all"):
        out = tmp_path / which
        options = ["--model", "tiny-jamba", "--max-length", "4", "--batch", "2"]
        assert run("compute", *options, "--logits", which, "--out", str(out)).exit_code == 0
        flops = pd.read_csv(out / "flops.csv").set_index(["stage", "length", "kind"])
        costs[which] = flops["products"]["prefill", 4, "read-out"]
    assert costs["all"] == 4 * costs["last"] > 0


@pytest.mark.parametrize("pattern", ["RR", "AA"])
def test_models_with_one_kind_of_mixer_are_drawn_too(tmp_path: Path, pattern: str, undrawn: None):
    cfg = griffin_config(pattern)
    figure = compute_figure(flops_table(cfg, [1, 9]), memory_table(cfg, [1, 9]), [7], "one kind")
    labels = [str(line.get_label()) for axes in figure.axes for line in axes.get_lines()]
    assert any("recurrent" in label for label in labels) == (pattern == "RR")
    assert any("attention" in label for label in labels) == (pattern == "AA")
    (tmp_path / "config.json").write_text(json.dumps(recurrentgemma.config_to_dict(cfg)))
    options = ["--model", str(tmp_path), "--max-length", "9", "--out", str(tmp_path / "out")]
    result = run("compute", *options)
    assert result.exit_code == 0, result.output
    assert "recurrence :" not in result.output


def test_an_empty_table_is_not_drawn():
    empty = flops_table(CONFIGS["griffin"], [])
    with pytest.raises(ValueError, match="the table is empty"):
        compute_figure(empty, memory_table(CONFIGS["griffin"], [1]))


def test_lengths_of_the_picture():
    cfg = PUBLISHED["recurrentgemma-2b"]
    lengths = lengths_up_to(8192, cfg)
    assert lengths == sorted(set(lengths))
    assert (lengths[0], lengths[-1]) == (1, 8192)
    assert 2048 in lengths and 2048 not in lengths_up_to(2000, cfg)
    assert lengths_up_to(1, cfg) == [1]
    assert windows_of(PUBLISHED["jamba-mini"], 10**6) == []


def test_a_wrong_model_is_one_line():
    result = run("compute", "--model", "nothing-like-it")
    assert result.exit_code == 1
    assert "error: 'nothing-like-it': no such file or folder" in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["parameters", "compute"])
def test_help_explains_every_option_with_an_example(command: str):
    text = " ".join(run(command, "--help").output.split())
    assert f"Example: hooked-hybrid {command}" in text
    for option in {"parameters": ["model", "out"], "compute": ["max-length", "batch"]}[command]:
        assert text.count(f"--{option}") > 1
