"""What needs a package that the base install lacks, and the extra that brings it."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "accelerate": "offload",
    "lm_eval": "eval",
    "matplotlib": "analysis",
    "pandas": "analysis",
    "ray": "ray",
    "rich": "niah",
    "torchao": "quantized",
    "typer": "niah",
}
"""Packages, and the extra of hooked-hybrid that each comes with."""


def require(*packages: str) -> None:
    """Refuse, before any work, what needs packages that are not installed.

    Raises:
        ModuleNotFoundError: names them and what to install.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS[name] for name in missing))
        raise ModuleNotFoundError(
            f"this needs {' and '.join(missing)}: pip install 'hooked-hybrid[{extras}]'",
            name=missing[0],
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was put in place of the package, without a spec
        return True


__all__ = ["EXTRAS", "require"]
