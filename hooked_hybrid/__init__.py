"""Hybrid language models with a named, editable hook point on everything they compute.

Examples in this reference use the names that are made here. `tiny-griffin` (6 layers, attention
in 2 and 5, 8 heads) and `tiny-jamba` (4 layers, attention in 2, experts in 1 and 3) come with the
package; both read the same 583 words.

Examples:
    >>> import torch
    >>> from hooked_hybrid import HookedHybrid, analysis, interventions, presets
    >>> model = HookedHybrid.from_pretrained("tiny-griffin")
    >>> jamba = HookedHybrid.from_pretrained("tiny-jamba")
    >>> text = "eat a sandwich and sit in Dolores Park . eat a sandwich and sit in"
    >>> tokens = model.to_tokens(text)
    >>> logits, cache = model.run_with_cache(tokens)
    >>> answer = model.to_single_token("Dolores")
    >>> metric = lambda logits: logits[0, -1, answer]
    >>> riga = model.to_tokens(text.replace("Dolores", "Riga"))  # a corrupted prompt
    >>> logits.shape, (logits[0, -1].argmax() == answer).item()
    (torch.Size([1, 16, 583]), True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.names import HookNameError, get_act_name
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.root import HookedRootModule
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.decoding import GenerationOutput
from hooked_hybrid.model.folding import FoldRecord, fold_ln, unfold_ln
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.part import NotSupported
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.network.weights.factored import FactoredMatrix
from hooked_hybrid.presets import configs as presets

if TYPE_CHECKING:
    from hooked_hybrid import analysis, interventions

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "FoldRecord",
    "GenerationOutput",
    "HookNameError",
    "HookPoint",
    "HookedHybrid",
    "HookedRootModule",
    "HybridConfig",
    "HybridState",
    "NotSupported",
    "__version__",
    "analysis",
    "fold_ln",
    "get_act_name",
    "interventions",
    "presets",
    "unfold_ln",
]


def __getattr__(name: str) -> Any:
    """Import the two large parts, half of all modules, when they are first asked for."""
    if name in ("analysis", "interventions"):
        return importlib.import_module(f"hooked_hybrid.{name}")
    raise AttributeError(f"module 'hooked_hybrid' has no attribute {name!r}")
