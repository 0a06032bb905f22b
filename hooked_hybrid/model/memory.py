"""Refusing a forward that cannot fit in memory, before it starts, on an estimate."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch

from hooked_hybrid.config import AttentionConfig, MambaConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.kernels.fused_attention import Call, block_length
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.state import AttentionState, HybridState

WORTH_CHECKING = 2**28
"""Bytes below which no estimate is compared with what is free."""


def available_bytes(device: torch.device) -> int:
    """Return the bytes a new tensor on this device could take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    return int(psutil.virtual_memory().available)


def logits_bytes(model: Network, layout: Layout, n_logits: int) -> int:
    """Return the bytes of the logits, with a second copy where they are capped."""
    copies = 2 if model.cfg.logits_soft_cap is not None else 1
    return copies * layout.pos.shape[0] * n_logits * model.cfg.d_vocab * model.dtype.itemsize


def large_bytes(
    model: Network,
    layout: Layout,
    state: HybridState | None,
    piece: int,
    layers: Iterable[int] | None = None,
) -> dict[str, int]:
    """Return the bytes of each score, pattern and state tensor that the attached hooks ask for.

    Args:
        model: with its hooks attached.
        layout: of the whole forward.
        state: what it continues from.
        piece: positions run at a time.
        layers: those that run; None means all.
    """
    sizes = {}
    batch, width = layout.pos.shape[0], model.dtype.itemsize
    for i in range(model.cfg.n_layers) if layers is None else layers:
        layer = model.cfg.layers[i]
        block = model.blocks[i].any_mixer
        if isinstance(layer.mixer, AttentionConfig):
            cached = 0 if state is None else _n_keys(state, i)
            window = layout.length if layer.mixer.n_keys is None else layer.mixer.n_keys
            n_keys = cached + (layout.length if piece == layout.length else piece + window)
            size = batch * layer.mixer.n_heads * piece * n_keys * width
            points = [block.hook_attn_scores, block.hook_pattern]
        elif isinstance(layer.mixer, MambaConfig):
            size = batch * piece * layer.mixer.d_inner * layer.mixer.d_state * max(width, 4)
            points = [block.hook_ssm_decay, block.hook_ssm_write, block.hook_ssm_state]
        else:
            continue
        sizes.update({str(p.name): size for p in points if p.is_hooked})
    return sizes


def attention_bytes(
    model: Network,
    layout: Layout,
    state: HybridState | None,
    piece: int,
    layers: Iterable[int] | None = None,
) -> dict[int, int]:
    """Return the bytes of masks and unfused scores of each layer's attention inside torch's kernel.

    Args:
        model, layout, state, piece, layers: as in `large_bytes`.
    """
    sizes, grad, devices = {}, torch.is_grad_enabled(), model.layer_devices
    for i in range(model.cfg.n_layers) if layers is None else layers:
        cfg, device = model.cfg.layers[i].mixer, devices[i]
        if not isinstance(cfg, AttentionConfig) or not (grad or device.type == "cuda"):
            continue
        block = model.blocks[i].any_mixer
        if block.hook_attn_scores.is_hooked or block.hook_pattern.is_hooked:
            continue  # not inside the kernel: `large_bytes` counts them
        cached, on_gpu = 0 if state is None else _n_keys(state, i), device.type == "cuda"
        queries = min(piece, block_length(piece, cfg.n_keys, on_gpu))
        keys = cached + (layout.length if grad or cfg.n_keys is None else piece)
        if cfg.n_keys is not None and queries < piece and layout.is_plain:
            keys = min(keys, cfg.n_keys - 1 + queries)
        call = Call(
            rows=layout.pos.shape[0],
            mask_rows=1 if layout.is_plain else layout.pos.shape[0],
            queries=piece if grad else queries,  # the masks of all blocks are kept for gradients
            keys=keys,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_kv_heads,
            d_head=cfg.d_head,
            dtype=model.dtype,
            on_gpu=on_gpu,
        )
        sees_all_before = layout.is_plain and cached == 0 and piece == layout.length
        is_causal = sees_all_before and (cfg.n_keys is None or piece <= cfg.n_keys)
        sizes[i] = call.n_bytes(is_causal)
    return sizes


def require_memory(
    model: Network,
    layout: Layout,
    state: HybridState | None,
    n_logits: int,
    piece: int,
    layers: Iterable[int] | None = None,
) -> None:
    """Refuse a forward whose largest tensors would not fit.

    Counts logits, and the scores, patterns and Mamba states that hooks ask for: those that are
    cached, and with gradients all, together, others two at a time, each on its layer's device; and
    what attention keeps inside torch's kernel, masks and the scores of which no kernel of the
    device takes care: with gradients in all layers, else in one. Everything else is small compared
    with them.

    Raises:
        MemoryError: says what it would need, what there is, and which option avoids it.
    """
    if layout.length == 1:  # a step is small compared with the state it continues
        return
    sizes = large_bytes(model, layout, state, piece, layers)
    inside = attention_bytes(model, layout, state, piece, layers)
    for device in dict.fromkeys((model.device, *model.layer_devices)):
        here = {n: s for n, s in sizes.items() if model.layer_devices[_layer(n)] == device}
        fused = [s for i, s in inside.items() if model.layer_devices[i] == device]
        n_here = n_logits if device == model.device else 0
        _require_on(device, model, here, fused, logits_bytes(model, layout, n_here), n_here)


def _require_on(
    device: torch.device,
    model: Network,
    sizes: dict[str, int],
    fused: list[int],
    logits: int,
    n_logits: int,
) -> None:
    """Refuse what would not fit on one of the model's devices."""
    if device.type == "meta" or logits + 3 * sum(sizes.values()) + sum(fused) < WORTH_CHECKING:
        return
    graph = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    kept = sum(n for name, n in sizes.items() if graph or _is_kept(model.hook_dict[name]))
    hooked = kept + 2 * max(sizes.values(), default=0)
    attention = sum(fused) if graph else max(fused, default=0)
    needed = logits + hooked + attention
    if needed < WORTH_CHECKING:
        return
    free = available_bytes(device)
    if needed <= free:
        return
    if logits >= max(hooked, attention):
        what = f"logits of {n_logits} positions and {model.cfg.d_vocab} tokens"
        remedy = "ask for fewer with logits_to_keep=1, or for none with return_type=None"
    elif hooked >= attention:
        what = f"{len(sizes)} hooked values such as {max(sizes, key=lambda n: sizes[n])}"
        remedy = "name fewer with names_filter, or mark your hooks @interventions.per_position"
    else:
        what = "masks and scores of attention"
        remedy = "run fewer rows or shorter ones" + (", or under torch.no_grad()" if graph else "")
    raise MemoryError(
        f"this forward needs about {needed / 1e9:.1f} GB, most of it for {what}, and "
        f"{free / 1e9:.1f} GB are free on {device}: {remedy}"
    )


def _is_kept(point: HookPoint) -> bool:
    return any(handle.is_watcher for handle in point.fwd_hooks)


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _n_keys(state: HybridState, layer: int) -> int:
    block = state.blocks[layer]
    return block.k.shape[1] if isinstance(block, AttentionState) else 0
