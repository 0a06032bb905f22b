"""Hooks that remove, attach and raise while they run, at every point: nothing is read too late.

What a point asks of its hooks (may the value be overwritten, is it edited, must it be checked) it
asks before they run, as a hook may remove itself meanwhile. The definition is the same hook that
stays attached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.interventions import hook_at
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FLOAT64, FP32_PARITY

FAMILIES = {"griffin": griffin_config("RA"), "jamba": jamba_config("MA")}  # one layer of each kind
pytestmark = pytest.mark.usefixtures("plainly")
every_family = pytest.mark.parametrize("family", FAMILIES)
Fn = Callable[[Tensor, HookPoint], Any]


@cache
def model_of(family: str) -> HookedHybrid:
    return random_model(FAMILIES[family])


@cache
def plain_logits(family: str, n_pos: int) -> Tensor:
    with torch.no_grad():
        return model_of(family)(random_tokens(2, n_pos))


class Kept:
    """Tensors, and what was in them when they were kept."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def keep(self, value: Tensor) -> Tensor:
        self.pairs.append((value, value.clone()))
        return value

    def assert_untouched(self, where: str) -> None:
        assert self.pairs, where
        for value, then in self.pairs:
            assert torch.equal(value, then), where


def edited(value: Tensor, hook: HookPoint) -> Tensor:
    """Return a legal other value, in memory of its own."""
    if hook.is_integer:
        return value.flip(-1)
    return 0.5 * value


def run(family: str, name: str, fn: Fn, n_pos: int = 5) -> Tensor:
    """Return the logits with a hook that stays attached."""
    return model_of(family).run_with_hooks(random_tokens(2, n_pos), fwd_hooks=[(name, fn)])


def returns_the_input(kept: Kept) -> Fn:
    return lambda value, hook: kept.keep(value)


def returns_a_new_tensor(kept: Kept) -> Fn:
    return lambda value, hook: kept.keep(edited(kept.keep(value), hook))


def returns_none(kept: Kept) -> Fn:
    def look(value: Tensor, hook: HookPoint) -> None:
        kept.keep(value)

    return look


def edits_in_place(kept: Kept) -> Fn:
    def edit(value: Tensor, hook: HookPoint) -> None:
        value.copy_(edited(value, hook))
        kept.keep(value)

    return edit


def raises(kept: Kept) -> Fn:
    def fail(value: Tensor, hook: HookPoint) -> None:
        kept.keep(value)
        raise LookupError("a mistake")

    return fail


EDITS = [returns_the_input, returns_a_new_tensor, returns_none, edits_in_place]


@every_family
@pytest.mark.parametrize("edit", EDITS)
def test_a_hook_that_removes_itself_or_is_removed_acts_as_one_that_stays(
    family: str, edit: Callable[[Kept], Fn]
):
    model, tokens = model_of(family), random_tokens(2, 5)
    for name, point in model.hook_dict.items():
        stays = run(family, name, edit(Kept()))
        kept = Kept()
        act = edit(kept)

        def once(value: Tensor, hook: HookPoint, act: Fn = act) -> Any:
            hook.remove_hooks()
            return act(value, hook)

        point.add_hook(once)
        assert torch.equal(model(tokens), stays), name
        kept.assert_untouched(name)

        other = point.add_hook(act)
        point.add_hook(lambda value, hook, other=other: other.remove(), prepend=True)
        assert torch.equal(model(tokens), stays), name
        kept.assert_untouched(name)
        point.remove_hooks()
        assert torch.equal(model(tokens), plain_logits(family, 5)), name
        kept.assert_untouched(name)


@every_family
def test_a_hook_that_attaches_another_has_it_called_from_the_next_value_on(family: str):
    model, tokens, kept = model_of(family), random_tokens(2, 5), Kept()
    calls: list[str] = []

    def note(value: Tensor, hook: HookPoint) -> None:
        calls.append(str(hook.name))
        kept.keep(value)

    last = "unembed.hook_logits"

    def attach(value: Tensor, hook: HookPoint) -> None:
        hook.remove_hooks()
        for name in {str(hook.name), last}:
            model.hook_dict[name].add_hook(note)

    for name, point in model.hook_dict.items():
        calls.clear()
        point.add_hook(attach)
        model(tokens)
        assert set(calls) == (set() if name == last else {last}), name
        model(tokens)
        assert set(calls) == {name, last}
        kept.assert_untouched(name)
        model.reset_hooks()
        assert torch.equal(model(tokens), plain_logits(family, 5)), name


@every_family
def test_after_a_hook_that_raised_the_next_forward_is_clean(family: str):
    model = model_of(family)
    for name in model.hook_dict:
        kept = Kept()
        with pytest.raises(LookupError, match="a mistake"):
            run(family, name, raises(kept))
        assert torch.equal(model(random_tokens(2, 5)), plain_logits(family, 5)), name
        kept.assert_untouched(name)
        assert not model.list_hooks() and model.run_holder.run is None


@every_family
def test_every_value_is_kept_where_all_hooks_remove_themselves(family: str):
    model, kept = model_of(family), Kept()

    def once(value: Tensor, hook: HookPoint) -> Tensor:
        hook.remove_hooks()
        return kept.keep(value)

    for name in model.hook_dict:
        model.add_hook(name, once)
    logits = model(random_tokens(2, 5))
    assert not model.list_hooks()
    kept.assert_untouched("all points")
    assert relative(logits, plain_logits(family, 5)) < FP32_PARITY


# --- attention in blocks, sequences in pieces -----------------------------------------------------

SCORES = "blocks.1.attn.hook_attn_scores"
PATTERN = "blocks.1.attn.hook_pattern"
Z = "blocks.1.attn.hook_z"
LONG = 150  # three blocks of queries


@every_family
@pytest.mark.parametrize("mark", [per_position, lambda fn: fn])
@pytest.mark.parametrize("name", [SCORES, PATTERN, Z])
def test_a_row_that_is_hidden_once_stays_hidden(family: str, mark: Any, name: str):
    """In every block of queries, though the hook is gone after the first."""
    model, tokens = model_of(family), random_tokens(2, LONG)
    nothing = torch.finfo(torch.float32).min if name == SCORES else 0.0

    def hide(value: Tensor, hook: HookPoint) -> Tensor:
        return torch.full_like(value, nothing)

    def hide_once(value: Tensor, hook: HookPoint) -> Tensor:
        hook.remove_hooks()
        return hide(value, hook)

    with model.hooks([(name, mark(hide_once))]):
        _, cache = model.run_with_cache(tokens, names_filter=Z)
    assert not cache[Z].any()


@pytest.mark.parametrize(("first", "later"), [(SCORES, PATTERN), (SCORES, Z), (PATTERN, Z)])
@pytest.mark.parametrize("mark", [per_position, lambda fn: watcher(per_position(fn))])
def test_attaching_to_what_runs_in_blocks_is_refused_or_acts_on_all(
    first: str, later: str, mark: Any
):
    model, tokens = model_of("griffin"), random_tokens(2, LONG)
    zero = run("griffin", later, lambda value, hook: torch.zeros_like(value), LONG)

    def attach(value: Tensor, hook: HookPoint) -> None:
        hook.remove_hooks()
        model.add_hook(later, lambda value, hook: torch.zeros_like(value))

    try:
        with model.hooks([(first, mark(attach))]):
            found = model(tokens)
        assert torch.equal(found, zero)
    except RuntimeError as error:
        assert f"attached to {later!r}" in str(error) and "per_position" in str(error)
    finally:
        model.reset_hooks()


def test_hooks_that_change_between_pieces_of_a_long_sequence_are_refused():
    model, tokens = model_of("griffin"), random_tokens(1, 600)
    expected = model(tokens)

    @per_position
    def once(value: Tensor, hook: HookPoint) -> Tensor:
        hook.remove_hooks()
        return 0 * value

    with (
        model.hooks([("blocks.0.hook_resid_mid", once)]),
        pytest.raises(RuntimeError, match=r"'blocks\.0\.hook_resid_mid' or removed .* in pieces"),
    ):
        model(tokens)
    assert torch.equal(model(tokens), expected)


# --- checks of what an edit may be ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        ("griffin", "blocks.0.mixer.hook_log_decay", 1.0, "a log decay must be 0"),
        ("griffin", "blocks.0.mixer.hook_rec_gate", -1.0, "a log decay must be 0"),
        ("jamba", "blocks.1.mlp.hook_expert_indices", 99, "chose experts 99 to 99"),
    ],
)
def test_a_bad_edit_by_a_hook_that_removes_itself_is_refused(
    family: str, name: str, value: float, message: str
):
    def once(x: Tensor, hook: HookPoint) -> Tensor:
        hook.remove_hooks()
        return torch.full_like(x, value)

    with pytest.raises(ValueError, match=message):
        run(family, name, once)


# --- gradients at the recurrent state -------------------------------------------------------------


@every_family
@pytest.mark.parametrize("name", ["mixer.hook_ssm_state", "mixer.hook_ssm_y", "hook_resid_mid"])
def test_a_cached_gradient_is_what_the_backward_hooks_before_it_left(family: str, name: str):
    """At the state as elsewhere: in float64, three times the gradient by finite differences."""
    model = random_model(FAMILIES[family], dtype=torch.float64)
    point, tokens = f"blocks.0.{name}", random_tokens(1, 5)
    torch.manual_seed(0)
    weight = torch.randn(5, model.cfg.d_vocab, dtype=torch.float64)

    def metric(logits: Tensor) -> Tensor:
        return (logits[0] * weight).sum()

    def gradients(**hooks: Any) -> Tensor:
        with torch.enable_grad(), model.hooks(**hooks):
            _, cache = model.run_with_cache(
                tokens, names_filter=point, incl_bwd=True, metric=metric
            )
        return cache[f"{point}_grad"]

    plain = gradients()
    triple = (point, lambda grad, hook: 3 * grad)
    assert relative(gradients(bwd_hooks=[triple])[:, -1], 3 * plain[:, -1]) < FLOAT64
    if name.endswith("ssm_state"):
        # Each earlier state's total gradient passes the edits of all later ones.
        at_2 = hook_at(lambda grad, hook: 3 * grad, 2)
        found = gradients(bwd_hooks=[(point, at_2)])
        assert relative(found[:, 2:], plain[:, 2:] * _three_at_first(plain[:, 2:])) < FLOAT64
    before_it: dict[str, Tensor] = {}
    look = watcher(lambda grad, hook: before_it.__setitem__("grad", grad))
    gradients(bwd_hooks=[(point, look), triple])
    assert relative(before_it["grad"][:, -1], plain[:, -1]) < FLOAT64


def _three_at_first(value: Tensor) -> Tensor:
    factor = torch.ones_like(value)
    factor[:, 0] = 3
    return factor


# --- hooks that are called once a position --------------------------------------------------------

STATE = "blocks.0.mixer.hook_ssm_state"


def last_to_zero(h: Tensor, hook: HookPoint) -> None:
    h[:, -1] = 0


def far_to_zero(h: Tensor, hook: HookPoint) -> None:
    h[:, 100] = 0


def middle_to_zero(h: Tensor, hook: HookPoint) -> None:
    h[:, 1:3] = 0  # of one position nothing: it would pass in silence


def read_the_last(h: Tensor, hook: HookPoint) -> None:
    h[0, -1].sum()


@every_family
@pytest.mark.parametrize("fn", [last_to_zero, far_to_zero, middle_to_zero, read_the_last])
def test_selecting_positions_where_only_one_comes_is_refused_with_the_remedies(
    family: str, fn: Any
):
    with pytest.raises(IndexError) as caught:
        run(family, STATE, fn)
    notes = "\n".join(caught.value.__notes__)
    assert "interventions.hook_at(fn, positions)" in notes and "edit_state(fn, positions)" in notes
    if fn is far_to_zero:  # a marked one raises torch's own error, with the same notes
        with pytest.raises(IndexError) as caught:
            run(family, STATE, per_position(lambda h, hook: far_to_zero(h, hook)))
        assert "edit_state" in "\n".join(caught.value.__notes__)


@every_family
def test_what_is_the_same_at_every_position_may_be_selected(family: str):
    channel = run(
        family,
        STATE,
        lambda h, hook: h * (torch.arange(h.shape[2]) != 3).view(-1, *[1] * (h.ndim - 3)),
    )

    def by_index(h: Tensor, hook: HookPoint) -> None:
        h[:, :, 3] = 0

    assert torch.equal(run(family, STATE, by_index), channel)
    kept: list[Tensor] = []
    run(family, STATE, lambda h, hook: kept.append(h))
    assert len(kept) == 5 and all(type(h) is Tensor for h in kept)
    assert kept[0][:, -1].shape == kept[0][:, 0].shape  # kept, it is a tensor like any other
    marked = per_position(lambda h, hook: torch.zeros_like(h[:, 0])[:, None])
    assert not torch.equal(run(family, STATE, marked), plain_logits(family, 5))


def test_a_point_says_its_name_its_axes_and_that_it_comes_by_position():
    point = model_of("griffin").hook_dict[STATE]
    assert repr(point).startswith(f"HookPoint('{STATE}', batch pos d_rnn, hooks are called once a")
    point.add_hook(lambda h, hook: None)
    assert repr(point).endswith(", 1 fwd)")
    point.remove_hooks()


# --- one intervention, attached twice -------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: interventions.keep_top_heads(1),
        lambda: interventions.boost_span(1, (0, 2), 2.0),
        lambda: interventions.manipulate_span("binary", (0, 2)),
        lambda: interventions.follow_span((0, 2), 2),
    ],
)
def test_an_intervention_attached_twice_is_an_error_that_says_to_make_it_twice(make: Any):
    model, tokens, hooks = model_of("griffin"), random_tokens(2, 5), make()
    with pytest.raises(RuntimeError, match="to attach an intervention twice, make it twice"):
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *hooks])
    once = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=make()), once)
