"""Figures without a window, and their files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
"""Points of an inch of a PNG."""


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of a size in inches, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write a figure as PNG and PDF, each under a temporary name first, and return the paths.

    It is laid out once, as the PNG, and then drawn once for each file: matplotlib alone would lay
    out both, which is half of the time of a picture, and draw each twice.
    """
    from matplotlib import rc_context

    base, layout = Path(path_without_suffix), figure.get_layout_engine()
    with rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        _lay_out(figure)
        figure.set_layout_engine(None)  # "none" is an engine, for which each file is drawn twice
        try:
            return [_save(figure, base, kind) for kind in ("png", "pdf")]
        finally:
            figure.set_layout_engine(layout)


def _lay_out(figure: Figure) -> None:
    """Place axes, legends and labels as they are placed in a PNG."""
    layout, dpi = figure.get_layout_engine(), figure.get_dpi()
    if layout is None:
        return
    figure.set_dpi(DPI)
    try:
        layout.execute(figure)
    finally:
        figure.set_dpi(dpi)


def _save(figure: Figure, base: Path, kind: str) -> Path:
    path = base.with_name(f"{base.name}.{kind}")
    stamp = {"CreationDate": None} if kind == "pdf" else None
    drawn = io.BytesIO()  # on a full disk matplotlib would raise a misleading error
    figure.savefig(drawn, format=kind, dpi=DPI, metadata=stamp)
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getvalue())
    return path


def file_name(setting: str) -> str:
    """Return a setting's name as part of a file name: "both k=2" gives "both_k2"."""
    return re.sub(r"[^\w.-]+", "_", setting.replace("=", "")).strip("_.") or "setting"
