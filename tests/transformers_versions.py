"""What tests say in other words to another version of transformers."""

from typing import Any

import pytest
import transformers  # noqa: TID251

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
"""The keyword of a forward that takes keys, values and states."""
EAGER_EXPERTS: dict[str, Any] = {"experts_implementation": "eager"} if VERSION >= (5,) else {}
"""The plain loop over experts, the only one before 5.0."""
SLOW_MAMBA: dict[str, Any] = {} if VERSION >= (5,) else {"use_mamba_kernels": False}
"""Before 5.0 a Jamba without this asks for a GPU."""
WINDOWED = VERSION >= (5, 4)
"""Whether a RecurrentGemma hides the keys that have left its window, where it runs without a cache.

Before 5.4 it sees them all, and its cache loses a key when it is full.
"""

since_5 = lambda why: pytest.mark.skipif(VERSION < (5,), reason=f"transformers 4: {why}")  # noqa: E731
"""Marks a test of what transformers 4 has not."""
needs_window = pytest.mark.skipif(
    not WINDOWED, reason="transformers before 5.4: RecurrentGemma has no window without a cache"
)
"""Marks a test of RecurrentGemma's window."""
