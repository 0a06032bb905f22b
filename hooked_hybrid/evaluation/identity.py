"""What tells two models apart, so that results of one are never taken for the other's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.niah.settings import described
from hooked_hybrid.niah.sweep import fingerprint

_SENTENCE = 'What is the best thing to do in Zürich? 1, 23 or 456: it\'s "tea".\n'
"""Read by a tokenizer, it tells it apart from others."""


def identity(model: HookedHybrid) -> dict[str, Any]:
    """Return what tells models apart: short hashes of what scores depend on.

    Of a tokenizer the tokens of a sentence and its chat template count; of the config all but the
    model's name and settings that do not touch the maths.
    """
    cfg = replace(model.cfg, model_name="", extra={}, default_prepend_bos=True)  # in `reads`
    text = model.text
    reads = (text.encode(_SENTENCE, prepend_bos=False), text.prepends_bos, text.bos, text.eos)
    template = str(getattr(text.tokenizer, "chat_template", None))
    return {
        "weights": fingerprint(model),
        "config": _short_hash(repr(cfg)),
        "tokenizer": _short_hash(repr((reads, template))),
        "hooks": [
            [str(handle.point.name), described(handle.user_hook)] for handle in model.list_hooks()
        ],
        "dtype": str(model.dtype),
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


__all__ = ["identity"]
