"""Whether the C allocator keeps freed memory for later tensors."""

from __future__ import annotations

import ctypes
import functools
import os
from contextlib import suppress

KEPT_FREE = 2**29
"""Bytes of freed memory that the C allocator keeps, see `keep_freed_memory`."""
NEVER_SET = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc's allocator keep up to 512 MiB of freed memory for later tensors.

    By default it returns freed memory to the system, and the next forward has a page fault for each
    4 KiB of its activations and caches: up to a quarter of a prefill's time. This acts once a
    process, and not under another allocator or if the environment configures glibc's.
    """
    if any(name in os.environ for name in NEVER_SET) or "LD_PRELOAD" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def give_back_freed_memory() -> None:
    """Make glibc's allocator return freed memory (see `keep_freed_memory`) to the system."""
    with suppress(AttributeError, OSError, TypeError):  # another allocator
        ctypes.CDLL(None).malloc_trim(0)
