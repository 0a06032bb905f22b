"""Refusing input that a forward would misread, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.network import transforms
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.network.weights.products import autocast_dtype
from hooked_hybrid.options import (
    UNSET,
    check_choice,
    check_count,
    refuse_ignored,
)
from hooked_hybrid.text.padding import mask_of, may_hold_padding

if TYPE_CHECKING:
    from hooked_hybrid.model.hybrid import HookedHybrid


def checked_tokens(model: HookedHybrid, tokens: Any) -> Tensor:
    """Return token ids [batch pos] on the model's device, whatever is padding among them.

    Raises:
        ValueError: not integers, not one or two axes, empty, or outside the vocabulary.
    """
    return _checked(model, tokens, knows_padding=True)[0]


def checked_batch(
    model: HookedHybrid,
    tokens: Any,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return token ids [batch pos] on the model's device and their mask.

    Where neither mask nor segments are given, and the model's tokenizer has a padding token,
    rows that begin or end with it are padded there; see `padding.mask_of`.

    Raises:
        ValueError: as `checked_tokens`, and padding that cannot be distinguished from text.
    """
    given = attention_mask is not None or segment_ids is not None
    checked, is_padded = _checked(model, tokens, knows_padding=given)
    return checked, mask_of(checked, model.text) if is_padded else attention_mask


def _checked(model: HookedHybrid, tokens: Any, knows_padding: bool) -> tuple[Tensor, bool]:
    """Return token ids on the model's device, and whether rows seem to be padded."""
    if isinstance(tokens, list | tuple) and any(isinstance(entry, str) for entry in tokens):
        raise ValueError("the input holds texts and others: give texts, or tokens [batch pos]")
    try:
        if not isinstance(tokens, Tensor):  # which a default device of torch's would move
            tokens = torch.as_tensor(tokens, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the input is a {type(tokens).__name__}; give tokens [batch pos], or text"
        ) from error
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, not {tokens.dtype}")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give [batch pos] or [pos]")
    rows = transforms.plain_rows(tokens)
    found = list(torch.aminmax(rows))
    if not knows_padding and model.tokenizer is not None:
        padded = may_hold_padding(rows, model.text)
        found += [] if padded is None else [padded.to(rows.dtype)]
    low, high, *is_padded = torch.stack(found).tolist()  # the host waits once
    if low < 0 or high >= model.cfg.d_vocab:
        raise ValueError(
            f"token ids from {low} to {high}; this model has 0 to {model.cfg.d_vocab - 1}"
        )
    return tokens.to(model.device, torch.long), any(is_padded)


def checked_resid(model: HookedHybrid, resid: Any) -> Tensor:
    """Return a residual stream [batch pos d_model] for `start_at_layer`.

    Raises:
        ValueError: not floating point, or of another shape.
    """
    d_model = model.cfg.d_model
    if (
        not isinstance(resid, Tensor)
        or not resid.is_floating_point()
        or resid.ndim != 3
        or resid.shape[2] != d_model
    ):
        shown = tuple(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
        raise ValueError(
            f"start_at_layer takes the residual stream [batch pos {d_model}], not {shown}"
        )
    if resid.dtype != model.dtype:
        raise ValueError(f"the residual stream is {resid.dtype}, the model {model.dtype}")
    return resid.to(model.device)


def refuse_text_options(prepend_bos: bool | None, padding_side: str | None) -> None:
    """Refuse options of text where tokens are given: they are read as they are.

    `prepend_bos=False` says what happens to tokens, and passes.
    """
    refuse_ignored(
        "tokens are read as they are: pass text, or make the tokens with to_tokens(text, ...)",
        prepend_bos=prepend_bos,
        padding_side=padding_side,
    )


def checked_return_type(
    return_type: Any,
    loss_per_token: bool,
    logits_to_keep: int | None,
    stop_at_layer: int | None,
) -> Any:
    """Return the return type, "logits" where none was given, if all that is asked for is there.

    Raises:
        ValueError: an unknown one, one that `stop_at_layer` leaves no place for, a form of the
            loss without a loss, or of the logits without logits.
    """
    if stop_at_layer is not None:
        if return_type is not UNSET:
            check_choice("return_type", return_type, ("logits", "loss", "both", None))
        stopped = "with stop_at_layer the residual stream is returned; leave one of them out"
        options = {"loss_per_token": loss_per_token, "logits_to_keep": logits_to_keep}
        refuse_ignored(stopped, return_type=return_type, **options)
        return None
    return_type = "logits" if return_type is UNSET else return_type
    check_choice("return_type", return_type, ("logits", "loss", "both", None))
    if return_type not in ("loss", "both"):
        refuse_ignored("give return_type='loss' or 'both'", loss_per_token=loss_per_token)
    if return_type is None:
        refuse_ignored(
            "return_type=None computes no logits; give 'logits'", logits_to_keep=logits_to_keep
        )
    return return_type


def check_read_out(
    return_type: str | None, logits_to_keep: int | None, n_pos: int, is_resid: bool
) -> None:
    """Refuse what could not be returned.

    Raises:
        ValueError: more logits than positions, or a loss without all logits, without tokens, or of
            a single token.
    """
    if logits_to_keep is not None:
        check_count("logits_to_keep", logits_to_keep, 1, n_pos, f"there are {n_pos} positions")
    if return_type not in ("loss", "both"):
        return
    if is_resid:
        raise ValueError("a loss needs tokens: with start_at_layer ask for logits")
    if n_pos < 2:
        raise ValueError("a loss needs two tokens or more: the first is not predicted")
    if logits_to_keep is not None:
        raise ValueError("a loss needs the logits of all positions: leave logits_to_keep out")


def checked_run(
    stage: str, step: int, rows: Tensor | None, batch: int
) -> Int[Tensor, " batch"] | None:
    """Return the rows, if what `hook.run` is to say of a forward can be.

    Raises:
        ValueError: a step outside generation, or rows that are not one index for each row.
    """
    check_choice("stage", stage, ("forward", "prefill", "generation"))
    check_count("step", step, 0)
    if stage != "generation":
        refuse_ignored(f"stage={stage!r} is step 0; give stage='generation'", step=step or None)
    if rows is None:
        return None
    rows = torch.as_tensor(rows)
    if rows.is_floating_point() or rows.dtype == torch.bool or tuple(rows.shape) != (batch,):
        raise ValueError(
            f"rows is {rows.dtype} of shape {tuple(rows.shape)}; give an index of the original "
            f"batch for each of the {batch} rows"
        )
    if int(rows.min()) < 0:
        raise ValueError(f"rows={rows.tolist()}: indices of the original batch count from 0")
    return rows


def checked_state(model: HookedHybrid, state: HybridState | None, batch: int) -> None:
    """Refuse a state that is not of this model, this batch and these devices.

    Raises:
        ValueError: saying which part does not fit.
    """
    if state is None:
        return
    if not isinstance(state, HybridState):
        raise ValueError(f"state is a {type(state).__name__}; give a HybridState or None")
    if state.batch_size != batch:
        raise ValueError(
            f"the state has {state.batch_size} rows and the input {batch}: use state.fork(n) or "
            "state[rows]"
        )
    if len(state.blocks) != model.cfg.n_layers:
        raise ValueError(
            f"the state has {len(state.blocks)} blocks, this model {model.cfg.n_layers}: it is "
            "another model's"
        )
    devices, autocast = model.layer_devices, autocast_dtype(model.device)
    for i, (block, kept) in enumerate(zip(model.blocks, state.blocks, strict=True)):
        parameter = block.ln1.weight
        mixer = block.any_mixer
        wanted, grows = mixer.state_shapes(mixer.cfg), mixer.grows
        # Without the batch, and the keys where there are any.
        got = {n: tuple(t.shape[2 if n in grows else 1 :]) for n, t in vars(kept).items()}
        if got != wanted:
            raise ValueError(
                f"block {i} of the state has shapes {got}, this model {wanted}: it is another "
                "model's"
            )
        for name, t in vars(kept).items():
            if t.device != devices[i]:
                remedy = "device" if model.placement is None else "model.layer_devices"
                raise ValueError(
                    f"block {i} of the state lies on {t.device}, the model's on {devices[i]}: use "
                    f"state.to({remedy})"
                )
            if name in ("k", "v", "conv") and t.dtype not in (parameter.dtype, autocast):
                raise ValueError(
                    f"block {i} of the state is {t.dtype}, the model {parameter.dtype}: use "
                    "state.to(dtype=...), or go on under the autocast that it was made under"
                )
