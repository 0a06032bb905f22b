"""Properties of HookedRootModule, on a small module that is not a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooked_hybrid import HookedRootModule, HookPoint
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.names import HookNameError

D = 4
EMBED, INDEX, LARGE = "hook_embed", "hook_index", "hook_large"
NAMES = [
    EMBED,
    "blocks.0.hook_in",
    "blocks.0.hook_out",
    "blocks.1.hook_in",
    "blocks.1.hook_out",
    INDEX,
    LARGE,
]


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.hook_in = HookPoint("batch pos d_model")
        self.hook_out = HookPoint("batch pos d_model")

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(torch.tanh(self.linear(self.hook_in(x))))


class Toy(HookedRootModule):
    """Two layers, an index and a large value; `fail` raises after all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_embed = HookPoint("batch pos d_model")
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.hook_index = HookPoint("batch pos", integer=True)
        self.hook_large = HookPoint("batch pos d_model", large=True)
        self.setup()

    def forward(self, x: Tensor, factor: float = 1.0, fail: bool = False) -> Tensor:
        x = self.hook_embed(x * factor)
        for block in self.blocks:
            x = block(x)
        self.hook_index(x.argmax(-1))
        x = self.hook_large(x)
        if fail:
            raise ZeroDivisionError("the forward")
        return x


@pytest.fixture
def model() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy()


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, D, generator=generator, dtype=torch.float64)


def total(out: Tensor) -> Tensor:
    return (out**3).sum()


def leave(value: Tensor, hook: HookPoint) -> None:
    return None


def doubled(value: Tensor, hook: HookPoint) -> Tensor:
    return 2 * value


def collector() -> tuple[list[str], Callable[..., None]]:
    """Return a list, and a hook that appends the name of its point to it."""
    names: list[str] = []
    return names, lambda value, hook: names.append(hook.name)


def attached(model: HookedRootModule) -> list[tuple[str | None, str]]:
    return [(h.point.name, h.direction) for h in model.attached()]


def values_of(model: Toy, x: Tensor) -> dict[str, Tensor]:
    """Return every value of a forward, by a watcher of the test's own."""
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        values[str(hook.name)] = value

    with model.hooks([(lambda name: True, watcher(keep))]):
        model(x)
    return values


# --- names ------------------------------------------------------------------------------------


def test_setup_names_every_hook_point_by_its_path(model):
    assert list(model.hook_dict) == NAMES
    assert [p.name for p in model.hook_points()] == NAMES
    assert model.hook_dict["blocks.1.hook_in"] is model.blocks[1].hook_in


def test_mod_dict_holds_every_submodule_and_not_the_root(model):
    assert model.mod_dict == {n: m for n, m in model.named_modules() if n}
    assert model.mod_dict["blocks.0.linear"] is model.blocks[0].linear
    assert set(model.hook_dict) <= set(model.mod_dict)


def test_a_name_selects_one_point_and_the_handle_is_returned(model, x):
    (handle,) = model.add_hook("blocks.1.hook_in", leave)
    assert handle.point is model.blocks[1].hook_in and handle.hook is leave
    assert attached(model) == [("blocks.1.hook_in", "fwd")]


@pytest.mark.parametrize(
    "selector",
    [
        ["blocks.1.hook_out", "blocks.0.hook_out"],
        {"blocks.1.hook_out", "blocks.0.hook_out"},
        ("blocks.0.hook_out", "blocks.1.hook_out", "blocks.0.hook_out"),
        lambda name: name.endswith("hook_out"),
    ],
    ids=["list", "set", "tuple_with_a_repeat", "predicate"],
)
def test_several_names_or_a_predicate_select_each_point_once_in_model_order(model, x, selector):
    names, note = collector()
    handles = model.add_hook(selector, note)
    assert [h.point.name for h in handles] == ["blocks.0.hook_out", "blocks.1.hook_out"]
    model(x)
    assert names == ["blocks.0.hook_out", "blocks.1.hook_out"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("blocks.0.hook_inn", "blocks.0.hook_in"),
        ("hook_embd", EMBED),
        ("blocks.7.hook_out", "blocks.1.hook_out"),
    ],
)
def test_an_unknown_name_is_a_key_error_that_lists_the_nearest(model, wrong, nearest):
    with pytest.raises(KeyError) as error:
        model.add_hook(wrong, leave)
    assert isinstance(error.value, HookNameError)
    assert repr(wrong) in str(error.value) and nearest in str(error.value)
    assert not model.attached()


def test_one_unknown_name_in_a_list_attaches_nothing(model):
    with pytest.raises(HookNameError, match="hook_nowhere"):
        model.add_hook([EMBED, "hook_nowhere"], leave)
    assert not model.attached()


def test_a_predicate_true_of_nothing_is_an_error_that_shows_names(model):
    def is_nowhere(name: str) -> bool:
        return False

    with pytest.raises(HookNameError, match="is_nowhere.*hook_embed"):
        model.add_hook(is_nowhere, leave)


def test_an_empty_list_selects_nothing_and_is_an_error(model, x):
    with pytest.raises(HookNameError, match="empty"):
        model.add_hook([], leave)
    with pytest.raises(HookNameError, match="empty"):
        model.run_with_cache(x, names_filter=[])


@pytest.mark.parametrize("selector", [3, [1, 2], None], ids=repr)
def test_what_is_no_selector_is_a_type_error(model, unchecked, selector):
    with pytest.raises(TypeError, match="name.*predicate"):
        model.add_hook(selector, leave)


def test_options_of_add_hook_reach_the_point(model, x):
    model.add_hook(EMBED, doubled)
    (first,) = model.add_hook(EMBED, leave, prepend=True, level=5, is_permanent=True)
    assert model.hook_dict[EMBED].fwd_hooks[0] is first
    assert (first.level, first.is_permanent) == (5, True)
    (back,) = model.add_hook(EMBED, leave, dir="bwd")
    assert model.hook_dict[EMBED].bwd_hooks == [back]


# --- hooks(): the context ---------------------------------------------------------------------


def test_hooks_are_live_inside_the_block_and_gone_after_it(model, x):
    plain = model(x)
    with model.hooks([(EMBED, doubled)]) as entered:
        assert entered is model
        inside = model(x)
    assert not model.attached()
    assert torch.equal(inside, model(2 * x))
    assert torch.equal(model(x), plain)


def test_hooks_on_one_point_run_in_order_of_registration(model, x):
    specs = [(EMBED, doubled), (lambda n: n == EMBED, lambda v, hook: v + 1), (EMBED, doubled)]
    out = model.run_with_hooks(x, fwd_hooks=specs)
    assert torch.equal(out, model(2 * (2 * x + 1)))


def test_blocks_nest_and_the_inner_one_removes_only_its_own(model, x):
    with model.hooks([(EMBED, doubled)]):
        with model.hooks([(EMBED, lambda v, hook: v + 1)]):
            inner = model(x)
        outer = model(x)
    assert torch.equal(inner, model(2 * x + 1))
    assert torch.equal(outer, model(2 * x))
    assert not model.attached()


def test_nested_blocks_have_their_own_levels(model):
    with model.hooks([(EMBED, leave)]), model.hooks([(EMBED, doubled)]):
        assert [h.level for h in model.attached()] == [1, 2]
        model.reset_hooks(level=2)
        assert [h.hook for h in model.attached()] == [leave]
    assert model.context_level == 0


@pytest.mark.parametrize("where", ["body", "hook", "forward"])
def test_an_exception_anywhere_removes_the_hooks_and_passes_through(model, x, where):
    def broken(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError("the hook")

    def body() -> None:
        raise ZeroDivisionError("the body")

    specs = [(EMBED, doubled), (LARGE, broken if where == "hook" else leave)]
    with pytest.raises(ZeroDivisionError, match=f"the {where}"), model.hooks(specs, specs[:1]):
        if where == "body":
            body()
        model(x, fail=where == "forward")
    assert not model.attached() and model.context_level == 0


def test_hooks_attached_by_others_survive_a_block(model):
    before = model.add_hook(EMBED, leave)
    with model.hooks([(EMBED, doubled)]):
        within = model.add_hook(EMBED, leave)
    assert model.attached() == before + within


def test_the_same_function_attached_before_a_block_survives_it(model):
    before = model.add_hook(EMBED, doubled)
    with model.hooks([(EMBED, doubled)]):
        assert len(model.attached()) == 2
    assert model.attached() == before


def test_permanent_hooks_survive_blocks_and_resets_unless_named(model, x):
    permanent = model.add_perma_hook(EMBED, doubled)
    with model.hooks([(EMBED, leave)]):
        model(x)
    model.reset_hooks()
    assert model.attached() == permanent
    model.reset_hooks(including_permanent=True)
    assert not model.attached()


def test_a_reset_inside_a_block_does_not_upset_its_end(model, x):
    with model.hooks([(EMBED, doubled)]):
        model.reset_hooks()
        assert not model.attached()
        later = model.add_hook(EMBED, leave)
    assert model.attached() == later


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_no_hook_is_attached_when_one_of_several_names_is_wrong(model, x, direction):
    right, wrong = [(EMBED, doubled)], [("hook_nowhere", doubled)]
    specs = (right + wrong, []) if direction == "fwd" else (right, wrong)
    with pytest.raises(HookNameError, match="hook_nowhere"), model.hooks(*specs):
        pytest.fail("the block was entered")
    with pytest.raises(HookNameError, match="hook_nowhere"):
        model.run_with_hooks(x, fwd_hooks=specs[0], bwd_hooks=specs[1])
    assert not model.attached() and model.context_level == 0


@pytest.mark.parametrize(
    "spec",
    [EMBED, (EMBED,), (EMBED, 3), (EMBED, leave, 1), (leave, EMBED)],
    ids=["name", "single", "number", "three", "swapped"],
)
def test_what_is_no_pair_of_name_and_function_is_a_type_error(model, x, unchecked, spec):
    with pytest.raises(TypeError, match="pair"):
        model.run_with_hooks(x, fwd_hooks=[(LARGE, leave), spec])
    assert not model.attached()


def test_reset_hooks_end_false_leaves_the_hooks(model, x):
    with model.hooks([(EMBED, leave)], reset_hooks_end=False):
        pass
    model.run_with_hooks(x, fwd_hooks=[(LARGE, leave)], reset_hooks_end=False)
    model.run_with_cache(x, names_filter=INDEX, reset_hooks_end=False)
    assert [h.point.name for h in model.attached()] == [EMBED, INDEX, LARGE]


def test_contexts_are_kept_unless_clearing_is_asked_for(model, x):
    def note(value: Tensor, hook: HookPoint) -> None:
        hook.ctx["seen"] = True

    specs = [(EMBED, note)]
    model.run_with_hooks(x, fwd_hooks=specs)
    assert model.hook_dict[EMBED].ctx == {"seen": True}
    model.run_with_hooks(x, fwd_hooks=specs, clear_contexts=True)
    assert model.hook_dict[EMBED].ctx == {}
    model.run_with_hooks(x, fwd_hooks=specs)
    model.run_with_cache(x, clear_contexts=True)
    assert model.hook_dict[EMBED].ctx == {}


# --- run_with_hooks ---------------------------------------------------------------------------


def test_run_with_hooks_hands_arguments_on_and_returns_the_output(model, x):
    out = model.run_with_hooks(x, factor=3.0, fwd_hooks=[(EMBED, doubled)])
    torch.testing.assert_close(out, model(6 * x), rtol=1e-14, atol=0)
    assert not model.attached()


def test_backward_hooks_of_run_with_hooks_act_in_a_later_backward(model, x):
    x.requires_grad_()
    total(model(x)).backward()
    plain, x.grad = x.grad.clone(), None
    out = model.run_with_hooks(x, bwd_hooks=[(EMBED, doubled)])
    total(out).backward()
    assert torch.allclose(x.grad, 2 * plain, rtol=1e-12)


# --- run_with_cache: what is kept -------------------------------------------------------------


def test_without_a_filter_everything_but_large_values_is_kept(model, x):
    out, cache = model.run_with_cache(x)
    assert list(cache) == [n for n in NAMES if n != LARGE]
    assert torch.equal(out, model(x))


@pytest.mark.parametrize(
    ("names_filter", "kept"),
    [
        (EMBED, [EMBED]),
        (LARGE, [LARGE]),
        ([LARGE, "blocks.0.hook_in"], ["blocks.0.hook_in", LARGE]),
        (lambda n: n.startswith("blocks.1"), ["blocks.1.hook_in", "blocks.1.hook_out"]),
    ],
    ids=["name", "large_when_named", "list", "predicate"],
)
def test_the_filter_says_what_is_kept(model, x, names_filter, kept):
    _, cache = model.run_with_cache(x, names_filter=names_filter)
    assert list(cache) == kept


@pytest.mark.parametrize("wrong", ["hook_nowhere", [EMBED, "hook_nowhere"], lambda name: False])
def test_a_filter_that_matches_nothing_is_an_error_before_the_forward(model, x, wrong):
    names, note = collector()
    model.add_hook(EMBED, note)
    with pytest.raises(HookNameError):
        model.run_with_cache(x, names_filter=wrong)
    assert not names and len(model.attached()) == 1


def test_cached_values_are_those_of_the_forward_without_a_graph(model, x):
    expected = values_of(model, x)
    _, cache = model.run_with_cache(x, names_filter=lambda name: True)
    assert set(cache) == set(NAMES)
    for name, value in cache.items():
        assert torch.equal(value, expected[name]) and not value.requires_grad


def test_the_cache_holds_what_hooks_attached_before_have_left(model, x):
    with model.hooks([("blocks.0.hook_out", doubled)]):
        _, cache = model.run_with_cache(x)
    plain = values_of(model, x)
    assert torch.equal(cache["blocks.0.hook_out"], 2 * plain["blocks.0.hook_out"])
    assert torch.equal(cache["blocks.1.hook_in"], 2 * plain["blocks.0.hook_out"])


def test_a_later_run_leaves_a_cache_as_it_was(model, x):
    _, cache = model.run_with_cache(x)
    before = {name: value.clone() for name, value in cache.items()}
    model.run_with_cache(3 * x)
    assert all(torch.equal(cache[name], before[name]) for name in before)
    assert not model.attached()


def test_device_says_where_the_cache_lies(model, x):
    out, cache = model.run_with_cache(x, device="meta", incl_bwd=True, metric=total)
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert out.device.type == "cpu"


def test_remove_batch_dim_drops_the_only_row(model, x):
    _, whole = model.run_with_cache(x[:1])
    _, cache = model.run_with_cache(x[:1], remove_batch_dim=True)
    assert {name: value.shape for name, value in cache.items()} == {
        name: value.shape[1:] for name, value in whole.items()
    }
    assert all(torch.equal(cache[name], whole[name][0]) for name in whole)


def test_remove_batch_dim_of_two_rows_is_an_error_and_leaves_no_hook(model, x):
    with pytest.raises(ValueError, match="hook_embed.* 2"):
        model.run_with_cache(x, remove_batch_dim=True)
    assert not model.attached()


@pytest.mark.parametrize(
    ("pos_slice", "index"),
    [
        (2, [2]),
        (-1, [-1]),
        ("last", [-1]),
        (torch.tensor(2), [2]),
        (np.int64(2), [2]),
        (np.array([3, 1]), [3, 1]),
        (range(1, 3), [1, 2]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        ([True, False, False, True, False], [0, 3]),
        (np.array([True, False, False, True, False]), [0, 3]),
        (slice(1, 4), slice(1, 4)),
        (slice(None, None, 2), slice(None, None, 2)),
        ((1, 3), slice(1, 3)),
        ((0, 5, 2), slice(0, 5, 2)),
        ([0, 3], [0, 3]),
        ([-1, 0], [4, 0]),
        (torch.tensor([1, 1]), [1, 1]),
        (None, slice(None)),
    ],
    ids=str,
)
def test_pos_slice_keeps_these_positions_of_every_value(model, x, pos_slice, index):
    _, whole = model.run_with_cache(x, incl_bwd=True, metric=total)
    _, cache = model.run_with_cache(x, pos_slice=pos_slice, incl_bwd=True, metric=total)
    assert set(cache) == set(whole)
    for name, value in cache.items():
        assert torch.equal(value, whole[name][:, index])


def test_an_int_pos_slice_keeps_an_axis_of_one_position_as_transformer_lens_does(model, x):
    _, cache = model.run_with_cache(x[:1], pos_slice=-1, remove_batch_dim=True)
    assert cache[EMBED].shape == (1, D) and cache[INDEX].shape == (1,)


@pytest.mark.parametrize(
    "pos_slice",
    [
        1.0,
        "first",
        True,
        np.bool_(True),
        torch.tensor(True),
        [0, 1.5],
        [True, 2],
        torch.tensor([0.0]),
        torch.ones(2, 5, dtype=torch.bool),
        (0, 1, 2, 3),
        slice(0, 4, -1),
        slice(0.0, 2),
    ],
    ids=str,
)
def test_a_pos_slice_that_would_be_misread_is_an_error_before_anything_runs(model, x, pos_slice):
    seen = []
    model.add_hook(EMBED, lambda value, hook: seen.append(1))
    with pytest.raises(TypeError, match="positions"):
        model.run_with_cache(x, pos_slice=pos_slice)
    assert not seen and len(model.attached()) == 1


@pytest.mark.parametrize("n", [4, 6])
def test_a_mask_of_another_length_is_an_error_that_gives_both(model, x, n):
    with pytest.raises(IndexError, match=rf"{n} positions for the 5"):
        model.run_with_cache(x, pos_slice=[True] * n)


@pytest.mark.parametrize("pos_slice", [[], slice(5, 9), [False] * 5], ids=str)
def test_a_pos_slice_of_nothing_is_an_error(model, x, pos_slice):
    with pytest.raises(IndexError, match="none of the 5"):
        model.run_with_cache(x, pos_slice=pos_slice)


def test_positions_left_out_do_not_stay_in_memory(model, x):
    _, cache = model.run_with_cache(x, names_filter=EMBED, pos_slice=slice(0, 1))
    value = cache[EMBED]
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("pos_slice", [5, -6, [0, 5], [-6]], ids=str)
def test_a_position_outside_is_an_index_error_that_says_how_many_there_are(model, x, pos_slice):
    with pytest.raises(IndexError, match=r"\b5\b"):
        model.run_with_cache(x, pos_slice=pos_slice)
    assert not model.attached()


def test_pos_slice_of_a_point_without_positions_is_an_error_that_names_it(x):
    class Flat(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_sum = HookPoint("batch d_model")
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_sum(x.sum(1))

    with pytest.raises(ValueError, match="hook_sum"):
        Flat().run_with_cache(x, pos_slice=0)


# --- run_with_cache: gradients ----------------------------------------------------------------


def gradients_of(model: Toy, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient of `total` at every floating value, by autograd alone."""
    with torch.enable_grad():
        # The first value must be part of the graph.
        values = values_of(model, x.detach().requires_grad_())
        floating = {n: v for n, v in values.items() if v.is_floating_point()}
        grads = torch.autograd.grad(total(values[LARGE]), list(floating.values()))
    return dict(zip(floating, grads, strict=True))


def assert_gradients(cache: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = {n.removesuffix("_grad"): v for n, v in cache.items() if n.endswith("_grad")}
    assert set(found) == set(expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-15)
        assert not grad.requires_grad


def everything(name: str) -> bool:
    return True


def test_gradients_of_the_metric_are_cached_at_every_floating_point(model, x):
    out, cache = model.run_with_cache(x, names_filter=everything, incl_bwd=True, metric=total)
    assert_gradients(cache, gradients_of(model, x))
    assert torch.equal(out, model(x)) and not out.requires_grad


def test_gradients_are_the_same_under_no_grad_and_on_a_frozen_model(model, x):
    expected = gradients_of(model, x)
    with torch.no_grad():
        _, cache = model.run_with_cache(x, names_filter=everything, incl_bwd=True, metric=total)
        assert not torch.is_grad_enabled()
    assert_gradients(cache, expected)
    model.requires_grad_(False)
    with torch.no_grad():
        _, cache = model.run_with_cache(x, names_filter=everything, incl_bwd=True, metric=total)
    assert_gradients(cache, expected)


def test_the_gradient_at_one_point_does_not_depend_on_what_else_is_cached(model, x):
    expected = gradients_of(model, x)
    for name in expected:
        _, cache = model.run_with_cache(x, names_filter=name, incl_bwd=True, metric=total)
        assert list(cache) == [name, name + "_grad"]
        torch.testing.assert_close(cache[name + "_grad"], expected[name], rtol=1e-12, atol=1e-15)


def test_gradients_are_of_the_values_that_hooks_have_left(model, x):
    with model.hooks([(EMBED, doubled)]):
        _, cache = model.run_with_cache(x, names_filter=EMBED, incl_bwd=True, metric=total)
    expected = gradients_of(model, 2 * x)
    torch.testing.assert_close(cache[EMBED + "_grad"], expected[EMBED], rtol=1e-12, atol=1e-15)


def test_a_scalar_output_needs_no_metric_and_any_other_does(model, x):
    class Scalar(Toy):
        def forward(self, x: Tensor, factor: float = 1.0, fail: bool = False) -> Tensor:
            return total(super().forward(x, factor, fail))

    scalar = Scalar()
    scalar.load_state_dict(model.state_dict())
    _, cache = scalar.run_with_cache(x, names_filter=everything, incl_bwd=True)
    assert_gradients(cache, gradients_of(model, x))
    with pytest.raises(ValueError, match="metric"):
        model.run_with_cache(x, incl_bwd=True)
    with pytest.raises(ValueError, match="scalar"):
        model.run_with_cache(x, incl_bwd=True, metric=lambda out: out.sum(0))
    assert not model.attached()


def with_mixed_parameters(model: Toy) -> dict[str, tuple[bool, Tensor | None]]:
    """Freeze one parameter, give another a `.grad`, and return what each has."""
    model.blocks[0].linear.weight.requires_grad_(False)
    model.blocks[1].linear.bias.grad = torch.full((D,), 7.0, dtype=torch.float64)
    return state_of_parameters(model)


def state_of_parameters(model: Toy) -> dict[str, tuple[bool, Tensor | None]]:
    return {
        n: (p.requires_grad, None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }


def test_parameters_keep_their_grad_and_requires_grad(model, x):
    before = with_mixed_parameters(model)
    model.run_with_cache(x, incl_bwd=True, metric=total)
    torch.testing.assert_close(state_of_parameters(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["forward", "metric", "hook", "backward hook"])
def test_parameters_keep_them_after_an_exception_too_and_no_hook_stays(model, x, where):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("the forward")

    before = with_mixed_parameters(model)
    fwd = [(LARGE, broken)] if where == "hook" else []
    bwd = [("blocks.0.hook_out", broken)] if where == "backward hook" else []
    with (
        pytest.raises(ZeroDivisionError),
        torch.no_grad(),
        model.hooks(fwd, bwd),
    ):
        model.run_with_cache(
            x,
            fail=where == "forward",
            incl_bwd=True,
            metric=broken if where == "metric" else total,
        )
    torch.testing.assert_close(state_of_parameters(model), before, rtol=0, atol=0)
    assert not model.attached()


# --- the lower-level pieces -------------------------------------------------------------------


def test_get_caching_hooks_attaches_nothing_and_its_hooks_fill_the_dict(model, x):
    names_filter = ["blocks.0.hook_out", EMBED]
    cache, fwd, bwd = model.get_caching_hooks(names_filter, incl_bwd=True)
    assert cache == {} and not model.attached()
    with model.hooks(fwd, bwd):
        total(model(x)).backward()
    expected, grads = values_of(model, x), gradients_of(model, x)
    assert set(cache) == {n + s for n in names_filter for s in ("", "_grad")}
    for name in names_filter:
        assert torch.equal(cache[name], expected[name])
        torch.testing.assert_close(cache[name + "_grad"], grads[name], rtol=1e-12, atol=1e-15)


def test_get_caching_hooks_leaves_integers_without_a_gradient_as_run_with_cache_does(model, x):
    cache, fwd, bwd = model.get_caching_hooks(incl_bwd=True)
    with model.hooks(fwd, bwd):
        total(model(x)).backward()
    _, expected = model.run_with_cache(x, incl_bwd=True, metric=total)
    assert set(cache) == set(expected)


def test_caching_hooks_take_the_options_of_run_with_cache(model, x):
    mine = {"mine": torch.zeros(1)}
    cache, fwd, _ = model.get_caching_hooks(
        EMBED, device="meta", remove_batch_dim=True, cache=mine, pos_slice=(1, 3)
    )
    model.run_with_hooks(x[:1], fwd_hooks=fwd)
    assert cache is mine and set(mine) == {"mine", EMBED}
    assert mine[EMBED].shape == (2, D) and mine[EMBED].device.type == "meta"


def test_add_caching_hooks_attaches_them_until_reset(model, x):
    cache = model.add_caching_hooks(lambda name: name.endswith("hook_in"))
    assert cache == {} and len(model.attached()) == 2
    model(x)
    assert list(cache) == ["blocks.0.hook_in", "blocks.1.hook_in"]
    first = cache["blocks.0.hook_in"]
    model(2 * x)
    assert torch.equal(cache["blocks.0.hook_in"], 2 * first)
    model.reset_hooks()
    cache.clear()
    model(x)
    assert not cache


def test_attached_tells_every_function_with_its_point_and_direction(model):
    model.add_hook("blocks.0.hook_in", leave)
    model.add_hook(EMBED, doubled, dir="bwd")
    model.add_perma_hook("blocks.0.hook_in", doubled)
    assert [(h.point.name, h.direction, h.user_hook) for h in model.attached()] == [
        (EMBED, "bwd", doubled),
        ("blocks.0.hook_in", "fwd", leave),
        ("blocks.0.hook_in", "fwd", doubled),
    ]


def test_list_hooks_groups_what_is_attached_by_point_as_transformer_lens_does(model, unchecked):
    fwd = model.add_hook("blocks.0.hook_in", leave)
    bwd = model.add_hook("blocks.0.hook_in", doubled, dir="bwd")
    forever = model.add_perma_hook(EMBED, doubled)
    assert model.list_hooks() == {EMBED: forever, "blocks.0.hook_in": [*fwd, *bwd]}
    assert model.list_hooks(EMBED) == {EMBED: forever}
    assert model.list_hooks(["blocks.0.hook_in", INDEX]) == {"blocks.0.hook_in": [*fwd, *bwd]}
    assert model.list_hooks(lambda name: "blocks" in name, dir="bwd") == {"blocks.0.hook_in": bwd}
    assert model.list_hooks(dir="fwd", including_permanent=False) == {"blocks.0.hook_in": fwd}
    with pytest.raises(HookNameError, match="nearest"):
        model.list_hooks("hook_embd")
    with pytest.raises(ValueError, match="'up'"):
        model.list_hooks(dir="up")


@pytest.mark.parametrize(("direction", "left"), [("fwd", ["bwd"]), ("bwd", ["fwd"]), ("both", [])])
def test_reset_hooks_is_by_direction_on_every_point(model, direction, left):
    for name in (EMBED, LARGE):
        model.add_hook(name, leave)
        model.add_hook(name, leave, dir="bwd")
    model.reset_hooks(direction=direction)
    assert attached(model) == [(name, d) for name in (EMBED, LARGE) for d in left]


def test_reset_hooks_empties_contexts_and_remove_all_hook_fns_does_not(model):
    for point in model.hook_points():
        point.ctx["kept"] = 1
    model.add_hook(EMBED, leave)
    model.remove_all_hook_fns()
    assert not model.attached() and all(p.ctx == {"kept": 1} for p in model.hook_points())
    model.reset_hooks(clear_contexts=False)
    assert all(p.ctx == {"kept": 1} for p in model.hook_points())
    model.reset_hooks()
    assert all(p.ctx == {} for p in model.hook_points())


def test_clear_contexts_leaves_the_hooks(model):
    model.add_hook(EMBED, per_position(leave))
    model.hook_dict[EMBED].ctx["x"] = 1
    model.clear_contexts()
    assert model.hook_dict[EMBED].ctx == {} and len(model.attached()) == 1
