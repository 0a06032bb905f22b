"""The model that users hold: forward, caches, generation, folding."""

from hooked_hybrid.model.hybrid import (
    HookedHybrid,
    LayerStack,
)

__all__ = [
    "HookedHybrid",
    "LayerStack",
]
