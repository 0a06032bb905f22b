"""The PDF of a picture has the layout of its PNG, and the figure keeps its layout engine."""

from __future__ import annotations

from pathlib import Path

from matplotlib.layout_engine import ConstrainedLayoutEngine

from hooked_hybrid.outputs.figures import new_figure, save_figure


def test_a_pdf_has_the_layout_of_the_png_and_a_later_change_is_laid_out_again(tmp_path: Path):
    figure = new_figure(4.0, 3.0)
    axes = figure.subplots(1, 2)
    figure.colorbar(axes[0].imshow([[0.0, 1.0]]), ax=axes[0])
    saved: list[list[tuple[float, ...]]] = []
    plain = figure.savefig

    def savefig(*args: object, **options: object) -> None:
        plain(*args, **options)  # type: ignore[arg-type]
        saved.append([ax.get_position().bounds for ax in figure.axes])

    figure.savefig = savefig  # type: ignore[method-assign,assignment]
    paths = save_figure(figure, tmp_path / "picture")
    assert [path.suffix for path in paths] == [".png", ".pdf"] and saved[0] == saved[1]
    assert paths[0].read_bytes()[:4] == b"\x89PNG" and paths[1].read_bytes()[:4] == b"%PDF"
    assert isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine)
    axes[1].set_ylabel("a\nlong\nlabel")
    save_figure(figure, tmp_path / "again")
    assert saved[2] != saved[1] and saved[2] == saved[3]
