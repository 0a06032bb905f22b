"""Figures without a window, and their files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of a size in inches, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write a figure as PNG and PDF, each under a temporary name first, and return the paths.

    The PDF has the layout of the PNG: constrained layout takes half of the time of a picture.
    """
    base, paths, layout = Path(path_without_suffix), [], figure.get_layout_engine()
    try:
        for kind in ("png", "pdf"):
            paths.append(_save(figure, base, kind))
            figure.set_layout_engine("none")
    finally:
        figure.set_layout_engine(layout)
    return paths


def _save(figure: Figure, base: Path, kind: str) -> Path:
    path = base.with_name(f"{base.name}.{kind}")
    stamp = {"CreationDate": None} if kind == "pdf" else None
    drawn = io.BytesIO()  # on a full disk matplotlib would raise a misleading error
    figure.savefig(drawn, format=kind, dpi=150, metadata=stamp)
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getvalue())
    return path


def file_name(setting: str) -> str:
    """Return a setting's name as part of a file name: "both k=2" gives "both_k2"."""
    return re.sub(r"[^\w.-]+", "_", setting.replace("=", "")).strip("_.") or "setting"
