"""The commit of the code that runs, where it runs from a checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

UNKNOWN = "unknown"
"""Of installed code, which its version identifies."""
_PACKAGES = (":/hooked_hybrid", ":/weights_conversion")


@cache
def commit() -> str:
    """Return the commit at the first call, with a plus where the packages' files differ from it.

    A run goes on with the code it began with. `UNKNOWN` without git, or where these files are not
    its own: a package that is installed inside another project's checkout is of no commit of that.
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
