"""`LanguageModel`: the forward from tokens or text to logits or loss, with hooks.

Input is checked and laid out first; then `run_layout` runs the network's loop on all of it, or on
one piece after another, from one state to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.hooks.point import HookPoint, LensHandle, changed_meanwhile
from hooked_hybrid.hooks.run import Stage
from hooked_hybrid.model.checks import (
    check_layers,
    check_read_out,
    check_resid,
    check_return_type,
    check_run,
    check_state,
    refuse_text_options,
)
from hooked_hybrid.model.memory import require_memory
from hooked_hybrid.model.text_model import Input, TextModel, check_batch, check_tokens, is_texts
from hooked_hybrid.network.block_state import BlockState
from hooked_hybrid.network.layout import Layout, lay_out
from hooked_hybrid.network.loss import next_token_loss
from hooked_hybrid.network.plan import dispatch, piece_length
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.options import UNSET, UnsetType
from hooked_hybrid.shapes import Resid, Tokens
from hooked_hybrid.text.text import PaddingSide

ReturnType = Literal["logits", "loss", "both"]


class LanguageModel(TextModel):
    """A model that runs tokens, text or a residual stream; the base of `HookedHybrid`."""

    def forward(
        self,
        input: Input,
        return_type: ReturnType | UnsetType | None = UNSET,
        *,
        loss_per_token: bool = False,
        logits_to_keep: int | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        segment_ids: Int[Tensor, "batch pos"] | None = None,
        state: HybridState | None = None,
        return_state: bool = False,
        stage: Stage = "forward",
        step: int = 0,
        rows: Int[Tensor, " batch"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: tokens [batch pos] or [pos], a text or several; with `start_at_layer`, the
                residual stream [batch pos d_model] entering that layer.
            return_type: "logits" [batch pos d_vocab], the default;
                "loss", the mean next-token loss in nats; "both", the two in a tuple; None computes
                neither.
            loss_per_token: return the loss of each token [batch pos-1], 0 where none is predicted.
            logits_to_keep: compute logits of only this many last positions.
            attention_mask: 1 at tokens, 0 at padding on the left or right of a row. Without it
                and `segment_ids`, the padding tokens at the beginning or end of a row of two or
                more tokens are padding, see `get_attention_mask`; a model without a tokenizer
                treats all as tokens.
            segment_ids: document of each token, 0 at padding; documents do not affect each other.
            state: the state that the rows continue; it is not changed.
            return_state: return `(result, state after the last token of each row)`.
            stage, step, rows: for `hook.run` in this forward.
            start_at_layer, stop_at_layer: run these blocks only, as a slice; with `stop_at_layer`
                the residual stream entering that layer is returned.
            prepend_bos, padding_side: for text; see `to_tokens`. A text of more than `cfg.n_ctx`
                tokens is an error.

        Raises:
            ValueError: an input that would be misread, or an option without effect; the message
                states the remedy.

        Examples:
            >>> model(tokens).shape
            torch.Size([1, 16, 583])
            >>> model(tokens, return_type="loss").shape
            torch.Size([])
            >>> model(tokens, stop_at_layer=2).shape  # the stream that enters block 2
            torch.Size([1, 16, 128])
        """
        wanted: ReturnType | None = check_return_type(
            return_type, loss_per_token, logits_to_keep, stop_at_layer
        )
        if isinstance(input, str) or is_texts(input):
            if attention_mask is not None or segment_ids is not None:
                raise ValueError(
                    "text brings its own mask: leave attention_mask and segment_ids out, or pass "
                    "tokens with them"
                )
            input, attention_mask = self.encode_texts(
                input, prepend_bos, padding_side or "right", continues=state is not None
            )
            x = check_tokens(self, input)
        else:
            refuse_text_options(prepend_bos, padding_side)
            if start_at_layer is None:
                x, attention_mask = check_batch(self, input, attention_mask, segment_ids)
            else:
                x = check_resid(self, input)
        is_part = start_at_layer is not None or stop_at_layer is not None
        if is_part and (state is not None or return_state):
            raise ValueError(
                "a state holds every layer: leave start_at_layer and stop_at_layer out, or state "
                "and return_state"
            )
        check_read_out(wanted, logits_to_keep, x.shape[1], start_at_layer is not None)
        check_state(self, state, x.shape[0])
        rows = check_run(stage, step, rows, x.shape[0])
        layout = lay_out(x, state, attention_mask, segment_ids, stage, step, rows)
        layers = check_layers(self.cfg.n_layers, start_at_layer, stop_at_layer)
        out, after = self.run_layout(
            x,
            layout,
            state,
            "resid" if stop_at_layer is not None else wanted,
            loss_per_token,
            logits_to_keep,
            layers if is_part else None,
        )
        if out is x:  # the residual stream, after no layer
            out = x.clone()
        return (out, after) if return_state else out

    def run_layout(
        self,
        x: Tokens | Resid,
        layout: Layout,
        state: HybridState | None = None,
        return_type: ReturnType | Literal["resid"] | None = "logits",
        loss_per_token: bool = False,
        logits_to_keep: int | None = None,
        layers: range | None = None,
    ) -> tuple[Any, HybridState | None]:
        """Run input that is already checked and laid out, as `forward` does.

        Args:
            x: tokens, or the residual stream that enters the first of `layers`.
            layout, state, loss_per_token, logits_to_keep: as in `forward`.
            return_type: as in `forward`; "resid" is the residual stream after `layers`.
            layers: a part of the model, run in one piece; None runs all of it.

        Returns:
            The result for `return_type`, and the state after the last token of each row; None
            instead of a state for a part of the model.
        """
        n_logits = 0 if return_type in (None, "resid") else logits_to_keep or layout.length
        first = layout.length - n_logits
        piece = (
            layout.length if layers is not None else piece_length(layout.length, self.hook_points())
        )
        require_memory(self, layout, state, n_logits, piece, layers)
        states: list[BlockState | None] = [None] * len(self.blocks)
        if state is not None:
            states[:] = state.blocks
        attached = self._attached() if piece < layout.length else []
        kept, resid, streams = [], x, None
        with self.running(layout), dispatch(layout.length, self.hook_points()):
            if layers is None and self.placement is not None and self.placement.brings_weights:
                streams, states[:] = self.placement.run_pieces(self, x, layout, states, piece)
            for start in range(0, layout.length, piece):
                part = layout.piece(start, start + piece)
                self.run_holder.run = part.run
                if streams is None:
                    own = x if piece == layout.length else x[:, start : start + piece]
                    resid = self._run_piece(own, part, states, layers)
                else:
                    resid = next(streams)
                if return_type not in (None, "resid"):
                    kept.append(self.run_ln_final(resid, max(first - start, 0)))
                self._require_attached(attached)
            self.run_holder.run = layout.run
            if return_type == "resid":
                out = resid if resid is x else resid.to(self.device)
            else:
                out = self._read_out(kept, x, layout, return_type, loss_per_token, first)
        if layers is not None:
            return out, None
        n_seen = None if layout.n_before is None else layout.n_before + layout.length
        return out, HybridState(tuple(states), layout.next_pos, layout.segment, n_seen)  # type: ignore[arg-type]

    def _run_piece(
        self,
        x: Tokens | Resid,
        layout: Layout,
        states: list[BlockState | None],
        layers: range | None,
    ) -> Resid:
        """Return the residual stream after the layers, and put the new states into `states`."""
        resid = x if x.is_floating_point() else self.run_embed(x)
        every = range(len(states))
        resid, states[:] = self.run_blocks(
            resid, states, layout, every if layers is None else layers
        )
        return resid

    def _attached(self) -> list[tuple[HookPoint, tuple[LensHandle, ...]]]:
        """Return every point with the hooks now attached to it."""
        return [(p, (*p.fwd_hooks, *p.bwd_hooks)) for p in self.hook_points()]

    def _require_attached(self, before: Sequence[tuple[HookPoint, tuple[LensHandle, ...]]]) -> None:
        """Raise if the hooks differ from those of the previous pieces."""
        for point, handles in before:
            if handles != (*point.fwd_hooks, *point.bwd_hooks):
                raise RuntimeError(changed_meanwhile(point))

    def _read_out(
        self,
        normalized: list[Tensor],
        x: Tokens | Resid,
        layout: Layout,
        return_type: ReturnType | None,
        loss_per_token: bool,
        first: int,
    ) -> Any:
        """Return logits, loss, both or nothing from the final norm of all pieces."""
        if return_type is None:
            return None
        whole = normalized[0] if len(normalized) == 1 else torch.cat(normalized, dim=1)
        logits = self.run_unembed(whole, layout.run.at(first, layout.length))
        if return_type == "logits":
            return logits
        loss = next_token_loss(logits, x, layout, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Tokens,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return the next-token loss, in nats, of given logits.

        Without a mask, padding is recognised as in the forward.

        Examples:
            >>> model.loss_fn(logits, tokens, per_token=True).shape
            torch.Size([1, 15])
        """
        tokens, attention_mask = check_batch(self, tokens, attention_mask)
        layout = lay_out(tokens, None, attention_mask, None)
        return next_token_loss(logits, tokens, layout, per_token)

    def _target(
        self,
        out: Any,
        metric: Callable[[Any], Tensor] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return `metric(logits)`, or the loss without a metric."""
        if kwargs.get("return_state"):
            out = out[0]
        if isinstance(out, tuple):  # return_type="both"
            out = out[0] if metric else out[1]
        is_partial = any(kwargs.get(f"{end}_at_layer") is not None for end in ("start", "stop"))
        if metric is not None or is_partial or out is None or out.ndim != 3:
            return super()._target(out, metric, args, kwargs)
        input, mask = args[0] if args else kwargs["input"], kwargs.get("attention_mask")
        if isinstance(input, str) or is_texts(input):
            input, mask = self.encode_texts(
                input,
                kwargs.get("prepend_bos"),
                kwargs.get("padding_side") or "right",
                continues=kwargs.get("state") is not None,
            )
            tokens = check_tokens(self, input)
        else:
            tokens, mask = check_batch(self, input, mask, kwargs.get("segment_ids"))
        layout = lay_out(tokens, None, mask, kwargs.get("segment_ids"))
        return next_token_loss(out, tokens, layout)

    def _may_cache_pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ARG002
        uneven = ("segment_ids", "state", "stop_at_layer", "start_at_layer")
        return all(kwargs.get(name) is None for name in uneven)
