"""Properties of HookPoint: what an attached function is given, may return, and how it goes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_hybrid import HookPoint
from hooked_hybrid.hooks.marks import is_per_position, per_position, positions_of, watcher
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.interventions import hook_at

TORCH_HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
]


@pytest.fixture
def point() -> HookPoint:
    return named("blocks.3.attn.hook_q")


@pytest.fixture
def x() -> Tensor:
    return torch.arange(12.0).view(2, 3, 2)


def named(name: str, axes: str = "batch pos d_head", **options: bool) -> HookPoint:
    hook_point = HookPoint(axes, **options)
    hook_point.name = name
    return hook_point


def doubled(value: Tensor, hook: HookPoint) -> Tensor:
    return 2 * value


def plus_one(value: Tensor, hook: HookPoint) -> Tensor:
    return value + 1


def leave(value: Tensor, hook: HookPoint) -> None:
    return None


def a_run(n_pos: int = 3, step: int = 0) -> Run:
    return Run("generation", step, torch.arange(n_pos).repeat(2, 1), torch.arange(2))


# --- calling ----------------------------------------------------------------------------------


def test_an_idle_point_returns_the_very_tensor(point, x):
    assert point(x) is x


def test_a_point_has_no_parameters_and_leaves_no_trace_in_a_checkpoint(point):
    point.add_hook(doubled, is_permanent=True)
    assert not list(point.parameters()) and not nn.Sequential(point).state_dict()


def test_a_hook_is_called_once_with_the_tensor_and_the_point_as_keyword(point, x):
    calls: list[Any] = []

    def hook_fn(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    point.add_hook(hook_fn)
    point(x)
    assert len(calls) == 1
    (args, kwargs) = calls[0]
    assert len(args) == 1 and args[0] is x and kwargs == {"hook": point}


def test_none_keeps_the_value(point, x):
    point.add_hook(leave)
    assert point(x) is x


def test_a_returned_tensor_replaces_the_value_and_leaves_the_input_alone(point, x):
    before = x.clone()
    point.add_hook(doubled)
    assert torch.equal(point(x), 2 * before)
    assert torch.equal(x, before)


def test_an_edit_in_place_counts_without_a_return(point, x):
    def zero_first(value: Tensor, hook: HookPoint) -> None:
        value[:, 0] = 0

    expected = x.clone()
    expected[:, 0] = 0
    point.add_hook(zero_first)
    assert torch.equal(point(x), expected)


def test_hooks_run_in_order_each_on_what_the_one_before_left(point, x):
    point.add_hook(doubled)
    point.add_hook(leave)
    point.add_hook(plus_one)
    assert torch.equal(point(x), 2 * x + 1)


def test_prepend_runs_before_those_attached_already(point, x):
    point.add_hook(doubled)
    point.add_hook(plus_one, prepend=True)
    assert torch.equal(point(x), 2 * (x + 1))


def test_a_hook_that_detaches_itself_does_not_make_the_next_one_skip(point, x):
    def once(value: Tensor, hook: HookPoint) -> Tensor:
        handle.remove()
        return value + 1

    handle = point.add_hook(once)
    point.add_hook(doubled)
    assert torch.equal(point(x), 2 * (x + 1))
    assert torch.equal(point(x), 2 * x)


def test_an_error_in_a_hook_reaches_the_caller_and_the_point_still_works(point, x):
    def broken(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError("mine")

    handle = point.add_hook(broken)
    with pytest.raises(ZeroDivisionError, match="mine"):
        point(x)
    handle.remove()
    point.add_hook(doubled)
    assert torch.equal(point(x), 2 * x)


def test_the_constraint_is_applied_after_every_editor_also_after_an_edit_in_place(point, x):
    seen: list[Tensor] = []

    def no_first(value: Tensor) -> Tensor:
        return value.index_fill(1, torch.tensor([0]), -1)

    def fill(value: Tensor, hook: HookPoint) -> None:
        value.fill_(5)

    point.add_hook(fill)
    point.add_hook(watcher(lambda value, hook: seen.append(value.clone())))
    point.add_hook(doubled)
    out = point(x, no_first)
    assert (seen[0][:, 0] == -1).all() and (seen[0][:, 1:] == 5).all()
    assert (out[:, 0] == -1).all() and (out[:, 1:] == 10).all()


# --- attaching and removing -------------------------------------------------------------------


def test_add_hook_returns_a_handle_that_keeps_the_function_as_given(point):
    handle = point.add_hook(doubled, dir="bwd", level=4)
    assert handle.user_hook is doubled
    assert (handle.point, handle.direction, handle.level) == (point, "bwd", 4)


def test_a_handle_removes_its_own_attachment_only_and_twice_does_no_harm(point, x):
    first, _ = point.add_hook(plus_one), point.add_hook(plus_one)
    assert torch.equal(point(x), x + 2)
    first.remove()
    first.remove()
    assert torch.equal(point(x), x + 1)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_permanent_hooks_survive_removal_unless_named(point, direction):
    point.add_hook(leave, dir=direction)
    kept = [
        point.add_hook(leave, dir=direction, is_permanent=True),
        point.add_perma_hook(leave, dir=direction),
    ]
    point.remove_hooks(direction)
    assert point.fwd_hooks + point.bwd_hooks == kept
    point.remove_hooks(direction, including_permanent=True)
    assert not point.is_hooked


@pytest.mark.parametrize(("direction", "left"), [("fwd", ["bwd"]), ("bwd", ["fwd"]), ("both", [])])
def test_removal_is_by_direction(point, direction, left):
    point.add_hook(leave)
    point.add_hook(leave, dir="bwd")
    point.remove_hooks(direction)
    assert [h.direction for h in (*point.fwd_hooks, *point.bwd_hooks)] == left


def test_removal_without_a_direction_is_of_forward_hooks(point):
    point.add_hook(leave)
    point.add_hook(leave, dir="bwd")
    point.remove_hooks()
    assert not point.has_hooks("fwd") and point.has_hooks("bwd")


def test_removal_by_level_leaves_other_levels_and_permanent_hooks(point):
    point.add_hook(leave)
    point.add_hook(leave, level=1)
    point.add_hook(leave, level=2)
    point.add_hook(leave, level=2, is_permanent=True)
    point.remove_hooks(level=2)
    assert [(h.level, h.is_permanent) for h in point.fwd_hooks] == [
        (None, False),
        (1, False),
        (2, True),
    ]
    point.remove_hooks(level=2, including_permanent=True)
    assert [h.level for h in point.fwd_hooks] == [None, 1]


def test_has_hooks_tells_direction_permanence_and_level(point):
    assert not point.has_hooks()
    point.add_hook(leave, dir="bwd", is_permanent=True, level=1)
    assert point.has_hooks() and point.has_hooks("bwd") and not point.has_hooks("fwd")
    assert not point.has_hooks(including_permanent=False)
    assert point.has_hooks(level=1) and not point.has_hooks(level=2)
    point.add_hook(leave, dir="fwd")
    assert point.has_hooks("fwd", including_permanent=False)
    assert not point.has_hooks("fwd", level=1)


@pytest.mark.parametrize("direction", ["sideways", "", "FWD", None])
def test_an_unknown_direction_is_a_value_error_and_changes_nothing(point, unchecked, direction):
    point.add_hook(leave)
    with pytest.raises(ValueError, match="'fwd'.*'bwd'"):
        point.add_hook(doubled, dir=direction)
    with pytest.raises(ValueError, match="'fwd'.*'bwd'"):
        point.remove_hooks(direction)
    with pytest.raises(ValueError, match="'fwd'.*'bwd'"):
        point.has_hooks(direction)
    assert [h.hook for h in point.fwd_hooks] == [leave] and not point.bwd_hooks


def test_both_is_no_direction_to_attach_in(point, unchecked):
    with pytest.raises(ValueError, match="'fwd' or 'bwd'"):
        point.add_hook(leave, dir="both")


def test_what_cannot_be_called_is_refused_by_name_when_attached(point, unchecked):
    with pytest.raises(TypeError, match=r"blocks\.3\.attn\.hook_q.*callable"):
        point.add_hook(3.5)
    assert not point.is_hooked


@pytest.mark.parametrize("register", TORCH_HOOKS)
def test_hooks_of_torch_are_refused_as_they_would_never_be_called(point, x, register):
    with pytest.raises(TypeError, match=r"add_hook.*blocks\.3\.attn\.hook_q"):
        getattr(point, register)(lambda *_: None)
    assert point(x) is x


# --- what is returned -------------------------------------------------------------------------


def test_another_shape_is_refused_with_both_shapes_and_names(point, x):
    def drops_a_position(value: Tensor, hook: HookPoint) -> Tensor:
        return value[:, 1:]

    point.add_hook(drops_a_position)
    with pytest.raises(ValueError) as error:
        point(x)
    for part in ("drops_a_position", "blocks.3.attn.hook_q", "(2, 2, 2)", "(2, 3, 2)"):
        assert part in str(error.value)


def test_a_shape_that_would_broadcast_is_refused(point, x):
    point.add_hook(lambda value, hook: value.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="shape"):
        point(x)


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda v: v.double(), "dtype torch.float64"), (lambda v: v.to("meta"), "device meta")],
    ids=["dtype", "device"],
)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_another_dtype_or_device_is_refused_with_the_remedy(point, x, change, what, direction):
    point.add_hook(lambda value, hook: change(value), dir=direction)
    with pytest.raises(ValueError) as error:
        point(x.requires_grad_()).sum().backward()
    for part in ("blocks.3.attn.hook_q", what, ".to(tensor)"):
        assert part in str(error.value)


@pytest.mark.parametrize("result", [3.0, [1, 2], "x", True], ids=repr)
def test_what_is_no_tensor_is_refused_with_the_remedy(point, x, result):
    point.add_hook(lambda value, hook: result)
    with pytest.raises(TypeError) as error:
        point(x)
    for part in ("blocks.3.attn.hook_q", type(result).__name__, "return a tensor, or None"):
        assert part in str(error.value)


def test_a_gradient_of_another_shape_is_refused_by_name(point, x):
    point.add_hook(lambda grad, hook: grad[:1], dir="bwd")
    with pytest.raises(ValueError, match=r"blocks\.3\.attn\.hook_q.*\(1, 3, 2\)"):
        point(x.requires_grad_()).sum().backward()


# --- gradients --------------------------------------------------------------------------------


def test_a_backward_hook_is_given_the_gradient_as_a_tensor_and_the_point(point, x):
    calls: list[Any] = []

    def look(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    point.add_hook(look, dir="bwd")
    x.requires_grad_()
    (3 * point(x) ** 2).sum().backward()
    (((grad,), kwargs),) = calls
    assert torch.equal(grad, 6 * x) and kwargs == {"hook": point}
    assert torch.equal(x.grad, 6 * x)


@pytest.mark.parametrize(
    ("result", "factor"),
    [
        (lambda grad: None, 1),
        (lambda grad: 5 * grad, 5),
        (lambda grad: (5 * grad,), 5),
        (lambda grad: (None,), 1),
    ],
    ids=["none", "tensor", "tuple_of_tensor", "tuple_of_none"],
)
def test_a_backward_hook_may_return_none_a_tensor_or_a_tuple_of_one(point, x, result, factor):
    point.add_hook(lambda grad, hook: result(grad), dir="bwd")
    x.requires_grad_()
    point(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, factor))


def test_backward_hooks_run_in_order_each_on_what_the_one_before_left(point, x):
    point.add_hook(doubled, dir="bwd")
    point.add_hook(plus_one, dir="bwd")
    x.requires_grad_()
    point(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_a_backward_hook_leaves_the_value_alone(point, x):
    point.add_hook(doubled, dir="bwd")
    assert torch.equal(point(x), x)


def test_the_gradient_is_of_the_value_after_the_edits_at_the_point(point, x):
    grads: list[Tensor] = []
    point.add_hook(doubled)
    point.add_hook(lambda grad, hook: grads.append(grad), dir="bwd")
    x.requires_grad_()
    (point(x) ** 2).sum().backward()
    assert torch.equal(grads[0], 2 * (2 * x))
    assert torch.equal(x.grad, 8 * x)


def test_a_backward_hook_starts_the_graph_where_nothing_upstream_needs_one(point, x):
    grads: list[Tensor] = []
    point.add_hook(lambda grad, hook: grads.append(grad), dir="bwd")
    (point(x) * 3).sum().backward()
    assert torch.equal(grads[0], torch.full_like(x, 3))
    assert not x.requires_grad


def test_a_backward_hook_without_autograd_is_silent(point, x):
    point.add_hook(doubled, dir="bwd")
    with torch.no_grad():
        assert torch.equal(point(x), x)


def test_the_graph_remembers_the_backward_hooks_of_its_forward(point, x):
    handle = point.add_hook(doubled, dir="bwd")
    x.requires_grad_()
    out = point(x).sum()
    handle.remove()
    point.add_hook(lambda grad, hook: 100 * grad, dir="bwd")
    out.backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_integers_have_no_gradient_to_hook(x):
    point = named("blocks.1.mlp.hook_expert_indices", integer=True)
    point.add_hook(leave, dir="bwd")
    with pytest.raises(ValueError, match=r"hook_expert_indices.*int64.*gradient"):
        point(x.long())


# --- watchers and branches --------------------------------------------------------------------


@pytest.mark.parametrize("result", [torch.zeros(1), "nothing"], ids=["tensor", "text"])
def test_what_a_watcher_returns_is_ignored(point, x, result):
    point.add_hook(watcher(lambda value, hook: result))
    point.add_hook(watcher(lambda grad, hook: result), dir="bwd")
    x.requires_grad_()
    out = point(x)
    out.sum().backward()
    assert torch.equal(out, x) and torch.equal(x.grad, torch.ones_like(x))


def test_a_watcher_is_hooked_but_no_editor(point):
    point.add_hook(watcher(leave_too := (lambda value, hook: None)))
    assert point.is_hooked and not point.has_editors
    assert leave_too.is_watcher
    point.add_hook(leave, dir="bwd")
    assert point.has_editors


def test_an_edit_in_place_on_a_branch_stays_out_of_the_other_uses(point, x):
    before = x.clone()
    point.add_hook(lambda value, hook: value.zero_())
    assert torch.equal(point.branch(x), torch.zeros_like(x))
    assert torch.equal(x, before)


def test_a_branch_is_copied_only_for_editors(point, x):
    assert point.branch(x) is x
    seen: list[Tensor] = []
    point.add_hook(watcher(lambda value, hook: seen.append(value)))
    assert point.branch(x) is x and seen[0] is x


# --- context, names, axes ---------------------------------------------------------------------


def test_ctx_lasts_between_calls_until_cleared_and_is_each_points_own(point, x):
    def count(value: Tensor, hook: HookPoint) -> None:
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    other = named("blocks.4.attn.hook_q")
    point.add_hook(count)
    point(x)
    point(x)
    assert point.ctx == {"calls": 2} and other.ctx == {}
    point.clear_context()
    assert point.ctx == {}
    assert point.has_hooks()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blocks.0.hook_resid_pre", 0), ("blocks.3.attn.hook_q", 3), ("blocks.17.mlp.hook_post", 17)],
)
def test_layer_is_read_from_the_name(name, layer):
    assert named(name).layer() == layer


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_scale", "my.blocks.3.hook_q", None])
def test_layer_outside_the_blocks_is_a_value_error(name):
    point = HookPoint()
    point.name = name
    with pytest.raises(ValueError, match="no layer"):
        point.layer()


@pytest.mark.parametrize(
    ("axes", "dim"), [("batch pos d_model", 1), ("batch head query key", 2), ("pos", 0)]
)
def test_pos_dim_is_the_position_or_query_axis(axes, dim):
    assert HookPoint(axes).pos_dim == dim


def test_pos_dim_without_such_an_axis_is_an_error_that_shows_the_axes():
    with pytest.raises(ValueError, match=r"hook_bias.*d_model"):
        _ = named("hook_bias", "d_model").pos_dim


# --- hook.run ---------------------------------------------------------------------------------


def test_run_outside_a_forward_is_an_error_that_names_the_point(point):
    with pytest.raises(RuntimeError, match=r"blocks\.3\.attn\.hook_q.*only while"):
        _ = point.run


def test_run_is_seen_inside_the_hook_and_gone_after_it(point, x):
    run, seen = a_run(), []
    point.add_hook(lambda value, hook: seen.append(hook.run))
    point(x, run=run)
    assert seen == [run]
    with pytest.raises(RuntimeError):
        _ = point.run


def test_run_is_gone_after_an_error_too(point, x):
    def broken(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    point.add_hook(broken)
    with pytest.raises(ZeroDivisionError):
        point(x, run=a_run())
    with pytest.raises(RuntimeError):
        _ = point.run


def test_a_backward_hook_sees_the_run_of_its_forward(point, x):
    steps: list[int] = []
    point.add_hook(lambda grad, hook: steps.append(hook.run.step), dir="bwd")
    x.requires_grad_()
    first, second = point(x, run=a_run(step=1)), point(x, run=a_run(step=2))
    second.sum().backward()
    first.sum().backward()
    assert steps == [2, 1]
    with pytest.raises(RuntimeError):
        _ = point.run


def test_a_piece_of_a_run_has_its_own_positions_and_the_same_rows(x):
    piece = a_run(n_pos=5, step=2).at(1, 4)
    assert piece.query_pos.tolist() == [[1, 2, 3]] * 2
    assert (piece.stage, piece.step, piece.rows.tolist(), piece.key_pos) == (
        "generation",
        2,
        [0, 1],
        None,
    )


def test_a_run_with_keys_keeps_the_rest():
    keys = torch.tensor([[-1, 0], [0, 1]])
    run = a_run().with_keys(keys)
    assert run.key_pos is keys and torch.equal(run.query_pos, a_run().query_pos)


# --- marks ------------------------------------------------------------------------------------


def test_nothing_is_marked_by_itself():
    assert not is_per_position(leave) and positions_of(leave) is None


def test_marks_look_through_partial():
    @per_position
    def scale(value: Tensor, hook: HookPoint, factor: float) -> Tensor:
        return factor * value

    assert is_per_position(partial(partial(scale, factor=2), factor=3))
    assert positions_of(partial(hook_at(leave, [4, 2]))) == (4, 2)
    point = HookPoint()
    point.add_hook(partial(watcher(lambda value, hook, sink: sink.append(1)), sink=[]))
    assert not point.has_editors


def test_marking_a_partial_does_not_mark_the_function_inside():
    marked = per_position(partial(doubled))
    assert is_per_position(marked) and not is_per_position(doubled)


def test_bound_methods_and_builtins_can_be_marked(point, x):
    class Scaler:
        def scale(self, value: Tensor, hook: HookPoint) -> Tensor:
            return 7 * value

    marked = per_position(Scaler().scale)
    assert is_per_position(marked) and not is_per_position(Scaler().scale)
    point.add_hook(marked)
    assert torch.equal(point(x), 7 * x)
    assert is_per_position(per_position(print))


def test_a_mark_on_a_method_in_its_class_is_seen_on_the_bound_method():
    class Scaler:
        @per_position
        def scale(self, value: Tensor, hook: HookPoint) -> Tensor:
            return value

    assert is_per_position(Scaler().scale)


def test_a_point_takes_pieces_only_if_all_attached_in_both_directions_do(point):
    assert point.takes_pieces
    point.add_hook(per_position(lambda value, hook: None))
    assert point.takes_pieces
    handle = point.add_hook(leave, dir="bwd")
    assert not point.takes_pieces
    handle.remove()
    point.add_hook(leave)
    assert not point.takes_pieces
