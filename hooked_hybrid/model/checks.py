"""Checks of a forward's input, before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.network.block_state import kept_dtype
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.network.weights.products import autocast_dtype
from hooked_hybrid.options import (
    UNSET,
    check_choice,
    check_count,
    refuse_ignored,
)


def check_resid(model: Network, resid: Any) -> Tensor:
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
    """Refuse options for text if tokens are given, as tokens are read unchanged.

    `prepend_bos=False` is accepted, as nothing is prepended to tokens.
    """
    refuse_ignored(
        "tokens are read unchanged: pass text, or make the tokens with to_tokens(text, ...)",
        prepend_bos=prepend_bos,
        padding_side=padding_side,
    )


def check_return_type(
    return_type: Any,
    loss_per_token: bool,
    logits_to_keep: int | None,
    stop_at_layer: int | None,
) -> Any:
    """Return the return type, "logits" by default, after checking that the options fit it.

    Raises:
        ValueError: an unknown type, one that is not available with `stop_at_layer`, an option of
            the loss without a loss, or of the logits without logits.
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
    """Refuse requests for logits or losses that cannot be computed.

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


def check_run(
    stage: str, step: int, rows: Tensor | None, batch: int
) -> Int[Tensor, " batch"] | None:
    """Return the rows, after checking the stage, step and rows for `hook.run`.

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


def check_state(model: Network, state: HybridState | None, batch: int) -> None:
    """Refuse a state that is not of this model, this batch and these devices.

    Raises:
        ValueError: names the part that does not fit.
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
        wanted, windows, tensors = block.state_shapes(), block.windows(), kept.tensors()
        # Without the batch, and the keys if there are any.
        got = {n: tuple(t.shape[2 if n in windows else 1 :]) for n, t in tensors.items()}
        if got != wanted:
            raise ValueError(
                f"block {i} of the state has shapes {got}, this model {wanted}: it is another "
                "model's"
            )
        for name, t in tensors.items():
            if t.device != devices[i]:
                remedy = "device" if model.placement is None else "model.layer_devices"
                raise ValueError(
                    f"block {i} of the state lies on {t.device}, the model's on {devices[i]}: use "
                    f"state.to({remedy})"
                )
            follows = kept_dtype(name, model.dtype) == model.dtype
            if follows and t.dtype not in (model.dtype, autocast):
                raise ValueError(
                    f"block {i} of the state is {t.dtype}, the model {model.dtype}: use "
                    "state.to(dtype=...), or go on under the autocast that it was made under"
                )


def check_layers(n: int, start: int | None, stop: int | None) -> range:
    """Return the layers of a part of a model of `n`, as a slice.

    Raises:
        ValueError: a layer that does not exist.
    """
    for name, value in (("start_at_layer", start), ("stop_at_layer", stop)):
        if value is not None and not -n <= value <= n:
            raise ValueError(f"{name}={value}: there are {n} layers")
    return range(n)[start:stop]
