"""Refusing, by an estimate, a forward that cannot fit in memory, before it starts."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch

from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.state import HybridState

WORTH_CHECKING = 2**28
"""Estimates below this many bytes are not compared with free memory."""


def available_bytes(device: torch.device) -> int:
    """Return the bytes a new tensor on this device could take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    return int(psutil.virtual_memory().available)


def logits_bytes(model: Network, layout: Layout, n_logits: int) -> int:
    """Return the bytes of the logits, twice if they are capped."""
    copies = 2 if model.cfg.logits_soft_cap is not None else 1
    return copies * layout.pos.shape[0] * n_logits * model.cfg.d_vocab * model.dtype.itemsize


def large_bytes(
    model: Network,
    layout: Layout,
    state: HybridState | None,
    piece: int,
    layers: Iterable[int] | None = None,
) -> dict[str, int]:
    """Return the bytes of each score, pattern and state tensor that the attached hooks need.

    Args:
        model: with its hooks attached.
        layout: of the whole forward.
        state: the state that it continues.
        piece: positions run at a time.
        layers: the layers to run; None means all.
    """
    sizes = {}
    batch, width = layout.pos.shape[0], model.dtype.itemsize
    every = range(model.cfg.n_layers) if layers is None else layers
    for i, mixer in ((at, mixer) for at in every for mixer in model.blocks[at].mixers):
        n_keys = 0
        if mixer.grows:
            window = mixer.window(mixer.cfg)
            window = layout.length if window is None else window
            n_keys = layout.length if piece == layout.length else piece + window
            n_keys += _n_keys(state, i)
        for leaf, n in mixer.hooked_numbers(mixer.cfg, piece, n_keys).items():
            point = getattr(mixer, leaf)
            # A recurrence computes in fp32 or wider.
            if point.is_hooked:
                sizes[str(point.name)] = batch * n * (width if mixer.grows else max(width, 4))
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
    devices = model.layer_devices
    return {
        i: mixer.kernel_bytes(layout, _n_keys(state, i), piece, model.dtype, devices[i])
        for i in (range(model.cfg.n_layers) if layers is None else layers)
        for mixer in model.blocks[i].mixers
        if mixer.grows
    }


def require_memory(
    model: Network,
    layout: Layout,
    state: HybridState | None,
    n_logits: int,
    piece: int,
    layers: Iterable[int] | None = None,
) -> None:
    """Refuse a forward whose largest tensors would not fit.

    Counted are the logits; scores, patterns and Mamba states that hooks need; and the masks and
    unfused scores inside torch's attention kernel. Of hooked values, all cached ones count, and
    with gradients all; of the others two at a time; each on its layer's device. Kernels count in
    all layers with gradients, else in one. Everything else is small compared with these.

    Raises:
        MemoryError: states the memory needed, the free memory, and an option that avoids it.
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
    """Refuse a forward that would not fit on one of the model's devices."""
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


def _n_keys(state: HybridState | None, layer: int) -> int:
    return 0 if state is None else state.blocks[layer].n_keys
