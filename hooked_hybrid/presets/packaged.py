"""Trained models that come with the package: ordinary checkpoints in folders next to this file."""

from __future__ import annotations

from pathlib import Path


def packaged_models() -> dict[str, Path]:
    """Return the folder of each packaged model, by its name for `from_pretrained`."""
    beside = Path(__file__).parent
    return {config.parent.name: config.parent for config in sorted(beside.glob("*/config.json"))}
