"""The model that an evaluation runs, from its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.text.text import as_tokenizer


def load_with_tokenizer(
    pretrained: str | Path | HookedHybrid, tokenizer: Any, overrides: dict[str, Any], **loading: Any
) -> HookedHybrid:
    """Return a model that has a tokenizer.

    Args:
        pretrained: a model, or what `HookedHybrid.from_pretrained` loads.
        tokenizer: a tokenizer, or a folder that holds one, instead of the checkpoint's own.
        overrides, loading: further arguments of `from_pretrained`; dtype None is float32, device
            None is the GPU, or the CPU without one.

    Raises:
        ValueError: a folder without a tokenizer, or a model in memory that is to be changed.
    """
    tokenizer = as_tokenizer(tokenizer)
    if isinstance(pretrained, HookedHybrid):
        given = {"tokenizer": tokenizer, **loading}
        names = [name for name, value in given.items() if value is not None]
        if names := [f"{name}=" for name in (*names, *overrides)]:  # None may override
            raise ValueError(
                f"{', '.join(names)} with a model in memory, which is used unchanged: set it on "
                f"the model"
            )
        return pretrained
    device, dtype = loading.pop("device", None) or "cuda", loading.pop("dtype", None)
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"  # lm-eval's program gives cuda:0 by default
    return HookedHybrid.from_pretrained(
        pretrained,
        tokenizer=tokenizer,
        device=device,
        dtype=torch.float32 if dtype is None else dtype,
        **loading,
        **overrides,
    )
