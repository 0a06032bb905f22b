"""Give a CPU build of torch a guard and hooks of CUDA, which autograd asks for.

They must be loaded before torch is imported: this module imports nothing of it. `torch`'s headers
and a C++ compiler make them, once for each version of torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent / "guard.cpp"


def compiler() -> str | None:
    """Return a C++ compiler, or None if there is none."""
    return next(
        (found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None
    )


def why_not() -> str | None:
    """Return what keeps the guard from being compiled here, or None."""
    if sys.platform != "linux":
        return "the guard of a pretended GPU is compiled on Linux alone"
    if compiler() is None:
        return "no C++ compiler: the guard of a pretended GPU cannot be compiled"
    return None


def load() -> None:
    """Compile the guard where it was not yet, and load it.

    Raises:
        ImportError: torch is imported already.
    """
    if "torch" in sys.modules:
        raise ImportError("load the guard before torch, in a process of its own")
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    found = re.search(r"__version__ = '(.*)'", (torch / "version.py").read_text())
    assert found is not None
    name = hashlib.sha256(SOURCE.read_bytes() + f"{found[1]} {torch}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretended-gpu-{os.getuid()}-{name}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = [str(compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE)]
        command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, f"-Wl,-rpath,{torch}/lib", "-o", str(made)], check=True)
        made.replace(library)
    ctypes.CDLL(str(library))
