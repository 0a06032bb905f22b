"""The packaged models through the doors that a user takes: sweep, harvest, placement, int8."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hooked_hybrid import HookedHybrid
from hooked_hybrid.harvest import harvest
from hooked_hybrid.network.placement.homes import place
from hooked_hybrid.network.weights.quantized import quantize_weights
from hooked_hybrid.niah.language import text_loss
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import grid
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from tests.harvests import rows_of
from tests.models import random_tokens
from tests.pretended_gpu.device import PretendedGPU, real
from tests.pretended_gpu.kernels import pretended_kernels
from tests.pretended_gpu.stages import QUIET

PACKAGED = "tiny-griffin", "tiny-jamba"
Way = Callable[[HookedHybrid], Any]
Door = Callable[[], tuple[Any, Any]]
_WAYS: dict[str, Way] = {}


def door(fn: Way) -> Way:
    _WAYS[fn.__name__] = fn
    return fn


@door
def sweep(m: HookedHybrid) -> Any:
    prompts = grid(m, [PAPER], (96,), (0.5,))
    settings = [Setting("none"), *top_k_settings([1])]
    table = niah(m, prompts, settings, max_new_tokens=3, verbose=False)
    return table[["setting", "output"]].values.tolist()


@door
def losses_of_text(m: HookedHybrid) -> Any:
    settings = [Setting("none"), *top_k_settings([1])]
    table = text_loss(m, settings, 96, 2, verbose=False)
    return torch.tensor(table["loss"].to_numpy())


@door
def harvested(m: HookedHybrid) -> Any:
    documents = list(random_tokens(2, 11))
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"context_length": 8, "batch_size": 2, "seed": 0}
        name = "blocks.1.hook_resid_post"
        return rows_of(harvest(m, documents, name, out=folder, verbose=False, **options))


@door
def texts(m: HookedHybrid) -> Any:
    out = m.generate("the old man", 4, verbose=False)
    return out, m("the old man can see the river"), m.to_tokens(["the man", "a river and a man"])


@door
def in_int8(m: HookedHybrid) -> Any:
    quantize_weights(m, "int8")
    return m(random_tokens(1, 12)), m.generate(random_tokens(1, 12), 3, **QUIET)


@door
def placed(m: HookedHybrid) -> Any:
    if m.device.type == "cuda":
        where = {f"blocks.{i}": "cpu" if i % 2 else "cuda:0" for i in range(m.cfg.n_layers)}
        m = place(m, {**where, "": "cuda:0"})
    return m(random_tokens(1, 12)), m.generate(random_tokens(1, 12), 3, **QUIET)


CHANGES_THE_MODEL = {"in_int8", "placed"}
loaded = cache(HookedHybrid.from_pretrained)


def _through(way: Way, name: str) -> Door:
    load = HookedHybrid.from_pretrained if way.__name__ in CHANGES_THE_MODEL else loaded

    def run() -> tuple[Any, Any]:
        """Return the result on the pretended GPU, and on a CPU."""
        with torch.no_grad():
            wanted = way(load(name))
            with PretendedGPU(), pretended_kernels():
                return real(way(load(name, device="cuda"))), wanted

    return run


DOORS: dict[str, Door] = {
    f"{key}, {name}": _through(way, name) for key, way in _WAYS.items() for name in PACKAGED
}
