"""The commit of the running code, if it runs from a checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

UNKNOWN = "unknown"
"""The commit of installed code, which is identified by its version."""
_PACKAGES = (":/hooked_hybrid", ":/weights_conversion")


@cache
def commit() -> str:
    """Return the commit at the first call, with a plus if the packages' files differ from it.

    A run keeps the code that it began with. `UNKNOWN` without git, or if these files do not belong
    to the repository, as for a package that is installed inside another project's checkout.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--", *_PACKAGES)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
