"""What may not be seen is not read: a NaN or an infinity there changes nothing.

0 times NaN is NaN, so that a weight of 0, a decay of 0 and a step of 0 are not enough. Left by a
hook at each point: at padding, at the last token, in an earlier document.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.model.sampling import Sampling
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

FAMILIES = {"griffin": griffin_config("RAR"), "jamba": jamba_config("MAM")}
pytestmark = pytest.mark.usefixtures("plainly")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_value = pytest.mark.parametrize("bad", [torch.nan, torch.inf])
LONG = 70  # more than a block of queries, and than two chunks of a scan


@cache
def model_of(family: str) -> HookedHybrid:
    return random_model(FAMILIES[family])


def leaving(bad: float, where: Callable[[Tensor], Tensor]) -> Callable[[Tensor, HookPoint], Tensor]:
    """Return a hook that leaves a value where a function of positions [batch pos] is True."""

    @per_position
    def leave(value: Tensor, hook: HookPoint) -> Tensor:
        if hook.is_integer:
            return value
        at = where(hook.run.query_pos)
        shape = [1] * value.ndim
        shape[0], shape[hook.pos_dim] = at.shape
        # A log decay above 0 is refused at tokens, not at padding.
        is_decay = str(hook.name).endswith("hook_log_decay") and not (hook.run.query_pos < 0).any()
        value = value.masked_fill(at.view(shape), -bad if is_decay else bad)
        if "key" in hook.axes:
            assert hook.run.key_pos is not None
            value = value.masked_fill(where(hook.run.key_pos)[:, None, None], bad)
        return value

    return leave


def floating_points(family: str) -> list[str]:
    return [name for name, point in model_of(family).hook_dict.items() if not point.is_integer]


def unmarked(fn: Any) -> Any:
    return lambda value, hook: fn(value, hook)


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@every_family
@every_value
def test_padding_reaches_no_token_of_its_row(family: str, bad: float):
    model, tokens = model_of(family), random_tokens(3, 6)
    mask, real = {"attention_mask": PADDED}, PADDED > 0
    (logits, loss), state = model(tokens, return_type="both", return_state=True, **mask)
    following = model(random_tokens(3, 2, seed=1), state=state)
    leave = leaving(bad, lambda pos: pos < 0)
    for name in floating_points(family):
        with model.hooks([(name, leave)]):
            found, found_loss = model(tokens, return_type="both", **mask)
            _, after = model(tokens, return_state=True, **mask)
        assert relative(found[real], logits[real]) < FP32_PARITY, name
        assert relative(found_loss, loss) < FP32_PARITY, name
        going_on = model(random_tokens(3, 2, seed=1), state=after)
        assert relative(going_on, following) < FP32_PARITY, name


@every_family
def test_padding_reaches_no_gradient_of_a_token(family: str):
    model, tokens = model_of(family), random_tokens(3, 6)
    real = PADDED > 0
    wanted = {"names_filter": "hook_embed", "incl_bwd": True, "attention_mask": PADDED}
    _, plain = model.run_with_cache(tokens, **wanted)
    leave = leaving(torch.nan, lambda pos: pos < 0)
    for leaf in ("hook_resid_mid", "hook_mixer_in", "hook_mlp_out"):
        with model.hooks([(f"blocks.0.{leaf}", leave)]):
            _, found = model.run_with_cache(tokens, **wanted)
        assert (
            relative(found["hook_embed_grad"][real], plain["hook_embed_grad"][real]) < FP32_PARITY
        ), leaf


@every_family
@every_value
@pytest.mark.parametrize("mark", [per_position, unmarked])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_later_token_reaches_no_earlier_one(family: str, bad: float, mark: Any, with_grad: bool):
    n_pos = LONG if mark is per_position and not with_grad else 6
    model, tokens = model_of(family), random_tokens(2, n_pos)
    logits = model(tokens)
    leave = mark(leaving(bad, lambda pos: pos == n_pos - 1))
    for name in floating_points(family):
        if with_grad and bad == torch.inf:
            continue
        with torch.set_grad_enabled(with_grad):
            found = model.run_with_hooks(tokens, fwd_hooks=[(name, leave)])
        assert relative(found[:, :-1], logits[:, :-1]) < FP32_PARITY, name


@every_family
@every_value
def test_a_document_reaches_no_later_one_of_its_row(family: str, bad: float):
    model, tokens = model_of(family), random_tokens(2, LONG)
    segments = torch.ones(2, LONG, dtype=torch.long)
    segments[0, 30:], segments[1, 41:] = 2, 3
    second = segments > 1
    logits, state = model(tokens, segment_ids=segments, return_state=True)
    third = torch.full((2, 3), 9)
    following = model(third, segment_ids=third, state=state)
    first_tokens = leaving(bad, lambda pos: pos == 2)
    for name in floating_points(family):

        @per_position
        def once(value: Tensor, hook: HookPoint) -> Tensor:
            """Leave it in the first document alone: positions restart."""
            at = segments[:, hook.run.first : hook.run.first + hook.run.query_pos.shape[1]] == 1
            pos = hook.run.query_pos
            inside = leaving(bad, lambda p: (p == 2) & at if p.shape == pos.shape else p < -1)
            return inside(value, hook)

        with model.hooks([(name, once)]):
            found = model(tokens, segment_ids=segments)
        assert relative(found[second], logits[second]) < FP32_PARITY, name
    with model.hooks([("blocks.0.hook_resid_mid", first_tokens)]):
        _, bad_state = model(tokens[:, :30], segment_ids=segments[:, :30], return_state=True)
    assert not torch.isfinite(bad_state.blocks[2].ssm).all()
    found = model(third, segment_ids=third, state=bad_state)
    assert relative(found, following) < FP32_PARITY


# --- choosing among what is not a number
# -------------------------------------------------------------


def nan_in_row_1(value: Tensor, hook: HookPoint) -> Tensor:
    return value.masked_fill((hook.run.rows == 1)[:, None, None], torch.nan)


@every_family
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.5}])
def test_generation_from_nan_is_an_error_that_names_row_and_step(family: str, options: Any):
    model, tokens = model_of(family), random_tokens(3, 5)

    def at_step_2(value: Tensor, hook: HookPoint) -> Tensor | None:
        return nan_in_row_1(value, hook) if hook.run.step == 2 else None

    hooks = [("blocks.1.hook_resid_mid", at_step_2)]
    with pytest.raises(ValueError, match=r"new token 2 of row 1 \(step 2\): the logits are NaN"):
        model.generate(tokens, 5, fwd_hooks=hooks, stop_at_eos=False, verbose=False, **options)


def test_a_token_forced_by_an_infinite_logit_is_chosen_greedily_and_not_drawn():
    logits = torch.zeros(1, 5)
    logits[0, 3] = torch.inf
    assert int(Sampling().choose(logits)[0]) == 3
    with pytest.raises(ValueError, match="NaN or infinite"):
        Sampling(do_sample=True).choose(logits, torch.zeros(1))


@every_family
def test_heads_without_a_score_are_refused_by_layer_and_head(family: str):
    model, tokens = model_of(family), random_tokens(2, 5)

    def no_number(value: Tensor, hook: HookPoint) -> Tensor:
        value[1, 2, 3] = torch.nan
        return value

    hooks = [("blocks.1.attn.hook_pattern", no_number), *interventions.keep_top_heads(1)]
    with pytest.raises(ValueError, match="head 2 is NaN at query 3 of row 1") as caught:
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert any("'blocks.1.attn.hook_pattern'" in note for note in caught.value.__notes__)
