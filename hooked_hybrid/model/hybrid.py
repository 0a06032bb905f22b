"""`HookedHybrid`: embed -> blocks -> ln_final -> unembed, with a hook point on everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import HookPoint, LensHandle, Stage, changed_meanwhile
from hooked_hybrid.hooks.root import HookedRootModule
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.generate import generate
from hooked_hybrid.network.block import Block
from hooked_hybrid.network.checks import (
    check_read_out,
    checked_batch,
    checked_resid,
    checked_return_type,
    checked_run,
    checked_state,
    checked_tokens,
    refuse_text_options,
)
from hooked_hybrid.network.layers import Embed, RMSNorm, Unembed
from hooked_hybrid.network.layout import Layout, lay_out
from hooked_hybrid.network.loss import next_token_loss
from hooked_hybrid.network.memory import keep_freed_memory, require_memory
from hooked_hybrid.network.plan import dispatch, piece_length
from hooked_hybrid.network.state import BlockState, HybridState
from hooked_hybrid.network.weights.plain import as_matrix, exact_copy, is_quantized
from hooked_hybrid.options import UNSET, UnsetType
from hooked_hybrid.shapes import Resid, Tokens
from hooked_hybrid.text.methods import Input, TextMethods, is_texts
from hooked_hybrid.text.text import PaddingSide, as_tokenizer

if TYPE_CHECKING:
    from hooked_hybrid.network.placement.doors import Placement
    from hooked_hybrid.network.placement.homes import MaxMemory
    from hooked_hybrid.network.placement.places import DeviceMap
    from hooked_hybrid.network.weights.quantized import Only, Quantization

ReturnType = Literal["logits", "loss", "both"]


class LayerStack(NamedTuple):
    """Weights of several layers in one tensor, with the layers they come from."""

    layers: tuple[int, ...]
    weight: Float[Tensor, "layer ..."]


class HookedHybrid(TextMethods, HookedRootModule):
    """A hybrid language model whose every intermediate value has a name and can be edited.

    `HookedHybrid(cfg)` draws random weights; `from_pretrained`, `from_hf` and `meta` do not.

    Args:
        cfg: what the model is.
        tokenizer: a Hugging Face tokenizer, or a folder that holds one; None for a model that takes
            tokens only.
        device, dtype: of the parameters.
    """

    placement: Placement | None = None
    """Where the parts of the model are; None for a model on one device."""
    quantization: Quantization | None = None
    """How the weights are quantised; None for plain ones."""

    def __init__(
        self,
        cfg: HybridConfig,
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        keep_freed_memory()
        self._cfg = cfg
        self.tokenizer = as_tokenizer(tokenizer)
        with torch.device("meta"):
            self.embed = Embed(cfg)
            self.hook_embed = HookPoint("batch pos d_model")
            self.blocks: Any = nn.ModuleList(Block(cfg, layer) for layer in cfg.layers)
            self.ln_final = RMSNorm(cfg.d_model, cfg.norm)
            self.unembed = Unembed(cfg)
        self.to(dtype)
        self.setup()
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @classmethod
    def meta(cls, cfg: HybridConfig, dtype: torch.dtype = torch.float32) -> HookedHybrid:
        """Return the model without any memory for its weights: shapes, names and counts."""
        return cls(cfg, device="meta", dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Any = None,
        revision: str | None = None,
        device_map: DeviceMap | Literal["auto"] | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        quantize: str | Any | None = None,
        quantize_only: Only | None = None,
        adapter: str | os.PathLike[str] | Literal[False] | None = None,
        ignore_config_keys: Collection[str] = (),
        **config_overrides: Any,
    ) -> HookedHybrid:
        """Load a checkpoint.

        Args:
            name_or_path: a Hugging Face hub id, a `save_pretrained` directory (safetensors or
                `pytorch_model.bin`, sharded or not), or one of Google's `.pt` files, or a
                directory that holds one.
            dtype: of the parameters; the files may hold another.
            device: where the parameters go.
            tokenizer: a Hugging Face tokenizer, or a folder that holds one, used instead of the
                checkpoint's own.
            revision: branch, tag or commit on the hub.
            device_map: for a model larger than a device: where each part goes, by name (`"embed"`,
                `"blocks.3"`, ...; `"blocks"` means all blocks, `""` everything), on a device,
                "cpu" or "disk"; or "auto". See `placement.resolve`; instead of `device`.
            max_memory: for "auto": bytes, or such as "20GB", by number of a GPU and for "cpu";
                None takes what is free.
            offload_folder: of what goes to the disk. It is kept, and used again for the same
                checkpoint and dtype.
            quantize: "int8", "nf4" (4 bits) or a weight-only config of torchao: large weights are
                quantised as they are read, see `quantized`.
            quantize_only: names of weights (`quantized.quantizable`), or a predicate on them.
            adapter: directory or hub id of a LoRA adapter that peft saved, merged into the weights
                as they are read; False leaves out one in the same folder.
            ignore_config_keys: settings of `config.json` to be taken as not there, where you know
                that they change nothing.
            config_overrides: `n_keys`, `logits_soft_cap`, ...; see `HybridConfig.with_overrides`.

        Raises:
            weights_conversion.CheckpointError: what is wrong with the checkpoint, by name.
            ValueError: a device map that cannot be, or weights that cannot be quantised so.
            MemoryError: "auto", and no room; it says what is missing.
            OSError: `offload_folder` cannot be written, or its disk is full.

        Warns:
            UserWarning: settings that are not used (of `generation_config.json`, of programs that
                add their own to `config.json`), or weights of an earlier saving in the same folder.
        """
        from weights_conversion import load

        return load(
            name_or_path,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer,
            revision=revision,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            quantize=quantize,
            quantize_only=quantize_only,
            adapter=adapter,
            ignore_config_keys=ignore_config_keys,
            **config_overrides,
        )

    @classmethod
    def from_hf(
        cls,
        hf_model: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: Any = None,
        ignore_config_keys: Collection[str] = (),
        **config_overrides: Any,
    ) -> HookedHybrid:
        """Copy a `transformers` model that is in memory; dtype and device default to its own.

        A compiled or parallel model is taken as the one inside. A model with an adapter must be
        merged first (`merge_and_unload()`). Its `generation_config` gives the end tokens.

        Args:
            hf_model: a causal model, or one without its head where that is the embedding.
            dtype, device: of the copy.
            tokenizer: for text.
            ignore_config_keys, config_overrides: as `from_pretrained` takes them.

        Raises:
            weights_conversion.CheckpointError: what is wrong with the model, by name.
        """
        from weights_conversion import from_hf

        return from_hf(hf_model, dtype, device, tokenizer, ignore_config_keys, **config_overrides)

    def save_pretrained(
        self, directory: str | os.PathLike[str], max_shard_size: int = 5_000_000_000
    ) -> None:
        """Write a directory that `transformers` and `from_pretrained` load.

        Args:
            directory: must not hold a checkpoint yet.
            max_shard_size: bytes in one file; a larger model is sharded.

        Raises:
            FileExistsError: the directory holds a checkpoint.
        """
        from weights_conversion import save

        save(self, directory, max_shard_size)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    # --- what there is --------------------------------------------------------------------------

    @property
    def cfg(self) -> HybridConfig:
        """What the model is, and the device and dtype it has now."""
        config, weight = self._cfg, self.embed.W_E
        if config.dtype is not weight.dtype or config.device != weight.device:
            self._cfg = config = config.on(weight.device, weight.dtype)
        return config

    @cfg.setter
    def cfg(self, cfg: HybridConfig) -> None:
        self._cfg = cfg

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.embed.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding."""
        return self.embed.W_E.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding, before its scale."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, after the final norm."""
        return (self.W_E if self.unembed.weight is None else self.unembed.weight).T

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each block runs, and its state is."""
        if self.placement is not None:
            return self.placement.layer_devices
        return (self.device,) * self._cfg.n_layers

    def stack(self, name: str) -> LayerStack:
        """Return one weight of every layer that has it, stacked, with the list of these layers.

        Args:
            name: below the block, such as `"attn.W_Q"`, `"mlp.W_in"` or `"mixer.a_param"`.

        Raises:
            LookupError: no layer has it, or its shape differs between layers.
        """
        found = {i: w for i, b in enumerate(self.blocks) if (w := _reach(b, name)) is not None}
        if len(shapes := {tuple(w.shape) for w in found.values()}) != 1:
            raise LookupError(
                f"no layer has {name!r}" if not shapes else f"{name!r} has shapes {sorted(shapes)}"
            )
        weights = list(found.values())
        return LayerStack(tuple(found), torch.stack([w.to(weights[0].device) for w in weights]))

    @property
    def W_Q(self) -> LayerStack:
        """[layer head d_model d_head] of the attention layers."""
        return self.stack("attn.W_Q")

    @property
    def W_K(self) -> LayerStack:
        """[layer kv_head d_model d_head] of the attention layers."""
        return self.stack("attn.W_K")

    @property
    def W_V(self) -> LayerStack:
        """[layer kv_head d_model d_head] of the attention layers."""
        return self.stack("attn.W_V")

    @property
    def W_O(self) -> LayerStack:
        """[layer head d_head d_model] of the attention layers."""
        return self.stack("attn.W_O")

    # --- the forward ----------------------------------------------------------------------------

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
            loss_per_token: the loss of each token [batch pos-1], 0 where nothing is predicted.
            logits_to_keep: logits of the last so many positions only.
            attention_mask: 1 at tokens, 0 at padding on the left or right of a row. Where neither
                it nor `segment_ids` is given, the padding tokens that a row of two tokens or more
                begins or ends with are padding, see `get_attention_mask`; a model without a
                tokenizer takes tokens as they are.
            segment_ids: document of each token, 0 at padding; nothing crosses a boundary.
            state: what the rows continue from; it is not changed.
            return_state: return `(that, state after the last token of each row)`.
            stage, step, rows: what `hook.run` says of this forward.
            start_at_layer, stop_at_layer: run these blocks only, as a slice; with `stop_at_layer`
                the residual stream entering that layer is returned.
            prepend_bos, padding_side: for text; see `to_tokens`. A text of more than `cfg.n_ctx`
                tokens is an error.

        Raises:
            ValueError: an input that would be misread, or an option that would have no effect; the
                message says what to give instead.
        """
        wanted: ReturnType | None = checked_return_type(
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
            x = checked_tokens(self, input)
        else:
            refuse_text_options(prepend_bos, padding_side)
            if start_at_layer is None:
                x, attention_mask = checked_batch(self, input, attention_mask, segment_ids)
            else:
                x = checked_resid(self, input)
        partial = start_at_layer is not None or stop_at_layer is not None
        if partial and (state is not None or return_state):
            raise ValueError(
                "a state holds every layer: leave start_at_layer and stop_at_layer out, or state "
                "and return_state"
            )
        check_read_out(wanted, logits_to_keep, x.shape[1], start_at_layer is not None)
        checked_state(self, state, x.shape[0])
        rows = checked_run(stage, step, rows, x.shape[0])
        layout = lay_out(x, state, attention_mask, segment_ids, stage, step, rows)
        if partial:
            layers = self._layers(start_at_layer, stop_at_layer)
            n_logits = 0 if stop_at_layer is not None or wanted is None else layout.length
            require_memory(self, layout, None, logits_to_keep or n_logits, layout.length, layers)
            tokens = x if start_at_layer is None else None
            with self._running(layout):
                resid = x if tokens is None else self.hook_embed(self.embed(tokens))
                resid, _ = self._run_blocks(resid, (None,) * self.cfg.n_layers, layout, layers)
                if stop_at_layer is not None:
                    return resid.clone() if resid is input else resid.to(self.device)
                first = layout.length - (logits_to_keep or layout.length)
                kept = [] if wanted is None else [self._normalized(resid, first)]
                return self._read_out(kept, tokens, layout, wanted, loss_per_token, first)
        out, after = self.run_layout(x, layout, state, wanted, loss_per_token, logits_to_keep)
        return (out, after) if return_state else out

    def run_layout(
        self,
        tokens: Tokens,
        layout: Layout,
        state: HybridState | None = None,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        logits_to_keep: int | None = None,
    ) -> tuple[Any, HybridState]:
        """Run tokens that are checked and laid out already; `forward` does both first.

        Returns:
            What `return_type` asks for, and the state after the last token of each row.
        """
        n_logits = 0 if return_type is None else logits_to_keep or layout.length
        piece = piece_length(layout.length, self.hook_points())
        require_memory(self, layout, state, n_logits, piece)
        first = layout.length - n_logits
        blocks: Sequence[BlockState | None] = (None,) * self._cfg.n_layers
        blocks = blocks if state is None else state.blocks
        kept, streams = [], None
        attached = self._attached() if piece < layout.length else []
        with self._running(layout), dispatch(layout.length, self.hook_points()):
            if self.placement is not None and self.placement.brings_weights:
                streams, blocks = self.placement.run_pieces(self, tokens, layout, blocks, piece)
            for start in range(0, layout.length, piece):
                part = layout.piece(start, start + piece)
                self.run_holder.run = part.run
                if streams is not None:
                    resid = next(streams)
                else:
                    resid = self.hook_embed(self.embed(tokens[:, start : start + piece]))
                    resid, blocks = self._run_blocks(resid, blocks, part, range(self._cfg.n_layers))
                if return_type is not None:
                    kept.append(self._normalized(resid, max(first - start, 0)))
                self._require_attached(attached)
            self.run_holder.run = layout.run
            out = self._read_out(kept, tokens, layout, return_type, loss_per_token, first)
        n_seen = None if layout.n_before is None else layout.n_before + layout.length
        return out, HybridState(tuple(blocks), layout.next_pos, layout.segment, n_seen)  # type: ignore[arg-type]

    def _attached(self) -> list[tuple[HookPoint, tuple[LensHandle, ...]]]:
        """Return every point with what is attached to it now."""
        return [(p, (*p.fwd_hooks, *p.bwd_hooks)) for p in self.hook_points()]

    def _require_attached(self, before: Sequence[tuple[HookPoint, tuple[LensHandle, ...]]]) -> None:
        """Refuse to go on with other hooks than those that the pieces before had.

        Raises:
            RuntimeError: naming the point where they changed.
        """
        for point, handles in before:
            if handles != (*point.fwd_hooks, *point.bwd_hooks):
                raise RuntimeError(changed_meanwhile(point))

    def _layers(self, start: int | None, stop: int | None) -> range:
        """Return the layers of a part of the model, as a slice; a layer that is not is an error."""
        n = self.cfg.n_layers
        for name, value in (("start_at_layer", start), ("stop_at_layer", stop)):
            if value is not None and not -n <= value <= n:
                raise ValueError(f"{name}={value}: there are {n} layers")
        return range(n)[start:stop]

    @contextmanager
    def _running(self, layout: Layout) -> Iterator[None]:
        """Let hooks see this layout's run, and the outer one again afterwards."""
        outer, self.run_holder.run = self.run_holder.run, layout.run
        try:
            yield
        finally:
            self.run_holder.run = outer

    def _run_blocks(
        self, resid: Resid, states: Sequence[BlockState | None], layout: Layout, layers: range
    ) -> tuple[Resid, tuple[BlockState, ...]]:
        """Return the residual stream after some blocks, and their new states."""
        after = []
        for i in layers:
            if self.placement is None:
                resid, state = self.blocks[i](resid, states[i], layout)
            else:
                resid, state = self.placement.run_block(self, i, resid, states[i], layout)
            after.append(state)
        return resid, tuple(after)

    def _normalized(self, resid: Resid, first: int) -> Float[Tensor, "batch kept d_model"]:
        """Return the final norm from position `first` on; hooks on it see every position."""
        if self.placement is not None:
            resid = resid.to(self.device)
        if self.ln_final.is_hooked:
            return self.ln_final(resid)[:, first:]
        return self.ln_final(resid[:, first:])

    def _read_out(
        self,
        normalized: list[Tensor],
        tokens: Tokens | None,
        layout: Layout,
        return_type: ReturnType | None,
        loss_per_token: bool,
        first: int,
    ) -> Any:
        """Return logits, loss, both or nothing from what pieces left of the final norm."""
        if return_type is None:
            return None
        whole = normalized[0] if len(normalized) == 1 else torch.cat(normalized, dim=1)
        logits = self.unembed(whole, self.embed.W_E, layout.run.at(first, layout.length))
        if return_type == "logits":
            return logits
        assert tokens is not None
        loss = next_token_loss(logits, tokens, layout, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    generate = generate

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Tokens,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return the next-token loss, in nats, of logits computed before.

        Padding is known as in the forward, where no mask is given.
        """
        tokens, attention_mask = checked_batch(self, tokens, attention_mask)
        layout = lay_out(tokens, None, attention_mask, None)
        return next_token_loss(logits, tokens, layout, per_token)

    # --- inside ---------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> HookedHybrid:
        """Refuse to move or convert a placed model, or to convert quantised weights."""
        if self.placement is not None:
            raise RuntimeError(
                "this model is placed by a device_map, and is not moved or converted as one: load "
                "it with another device_map, device or dtype"
            )
        if self.quantization is not None and fn(self.W_E[:0]).dtype != self.dtype:
            raise RuntimeError(
                "this model is quantised, and is not converted to another dtype: load it with that "
                "dtype, or call quantized.dequantize_weights first"
            )
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedHybrid:
        """Return a copy that shares nothing; quantised weights are the same numbers."""
        memo |= {id(p): exact_copy(p) for p in self.parameters() if is_quantized(p)}
        memo[id(self)] = copy = type(self).__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _target(
        self,
        out: Any,
        metric: Callable[[Any], Tensor] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return `metric(logits)`, or the loss where no metric is given."""
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
            tokens = checked_tokens(self, input)
        else:
            tokens, mask = checked_batch(self, input, mask, kwargs.get("segment_ids"))
        layout = lay_out(tokens, None, mask, kwargs.get("segment_ids"))
        return next_token_loss(out, tokens, layout)

    def _may_cache_pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ARG002
        uneven = ("segment_ids", "state", "stop_at_layer", "start_at_layer")
        return all(kwargs.get(name) is None for name in uneven)

    def _wrap_cache(
        self,
        cache: dict[str, Tensor],
        has_batch_dim: bool,
        pos_slice: PosSlice = None,
        places: dict[str, Places] | None = None,
    ) -> ActivationCache:
        return ActivationCache(cache, self, has_batch_dim, pos_slice, places)


def _reach(block: nn.Module, path: str) -> Tensor | None:
    """Return the tensor below a block at a dotted path, or None."""
    found: Any = block
    for part in path.split("."):
        found = getattr(found, part, None)
    return as_matrix(found) if isinstance(found, Tensor | nn.ParameterList) else None


__all__ = ["HookedHybrid", "LayerStack"]
