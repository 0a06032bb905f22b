"""Properties of the pictures: what is drawn where, and that it can be read."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from hooked_hybrid.niah.report.plots import accuracy_by_k, retrieval_map, retrieval_maps
from hooked_hybrid.outputs.figures import file_name, save_figure
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.runs.statistics import interval_of
from tests.niah.test_summary import sweep_table

NEEDLES = ("paper", "held-out-00", "held-out-01")
GRID: dict[str, Any] = {
    "lengths": [round(250 + 3846 * i / 9) for i in range(10)],
    "depths": [i / 9 for i in range(10)],
    "window": 2048,
}


def panels(figure: Figure) -> dict[str, Any]:
    """Return the panels that hold a map, by title."""
    return {a.get_title(): a for a in figure.axes if a.images and a.get_visible()}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_a_cell_shows_the_mean_accuracy_of_its_length_and_depth_with_the_beginning_on_top():
    table = sweep_table(needles=NEEDLES)
    drawn = panels(retrieval_maps(table))
    assert list(drawn) == list(table.setting.unique())
    for setting, axes in drawn.items():
        shown = axes.images[0].get_array()
        for i, depth in enumerate((0.0, 0.5, 1.0)):
            for j, length in enumerate((100, 200, 400)):
                at = (table.setting == setting) & (table.length == length) & (table.depth == depth)
                assert at.sum() == len(NEEDLES)
                assert shown[i, j] == pytest.approx(table[at].accuracy.mean())
        bottom, top = axes.get_ylim()
        assert bottom > top  # row 0 is drawn on top


def test_every_map_has_the_papers_colours_on_one_scale_from_0_to_1():
    for axes in panels(retrieval_maps(sweep_table())).values():
        image = axes.images[0]
        assert image.get_clim() == (0, 1)
        found = [to_hex(image.to_rgba(np.array([[v]]))[0, 0]) for v in (0, 0.5, 1)]
        assert found[::2] == ["#f0496e", "#0cd79f"]
        assert found[1] == to_hex(image.cmap(0.5)) != found[0]
        middle = tuple(int(found[1][i : i + 2], 16) for i in (1, 3, 5))
        assert np.abs(np.subtract(middle, (0xEB, 0xB8, 0x39))).max() <= 2


def test_axes_are_labelled_in_tokens_and_depth_and_say_which_end_is_zero():
    figure = retrieval_maps(sweep_table())
    first = panels(figure)["both k=0"]  # in the last row
    assert [t.get_text() for t in first.get_xticklabels()] == ["100", "200", "400"]
    assert [t.get_text() for t in first.get_yticklabels()] == ["0", "50", "100"]
    assert figure.get_supxlabel() == "prompt length (tokens)"
    assert "0% = beginning of the haystack" in figure.get_supylabel()


def test_thesis_depth_turns_the_numbers_and_leaves_the_map():
    table = sweep_table(depths=(0.0, 0.25, 1.0))
    ours, theirs = (retrieval_map(table, "both k=4", thesis_depth=t) for t in (False, True))
    a, b = ours.axes[0], theirs.axes[0]
    np.testing.assert_array_equal(a.images[0].get_array(), b.images[0].get_array())
    assert [t.get_text() for t in a.get_yticklabels()] == ["0", "25", "100"]
    assert [t.get_text() for t in b.get_yticklabels()] == ["100", "75", "0"]
    assert "0% = end of the haystack" in b.get_ylabel()
    assert "end" not in a.get_ylabel()


def test_the_window_is_outlined_where_it_ends_and_only_if_it_does():
    table = sweep_table(ks=(2,), **GRID)
    cells = table[table.setting == "both k=2"]
    seen = cells.pivot(index="depth", columns="length", values="in_window").to_numpy(dtype=bool)
    expected = set()
    for i in range(10):
        for j in range(10):
            if j < 9 and seen[i, j] != seen[i, j + 1]:
                expected.add(((j + 0.5, i - 0.5), (j + 0.5, i + 0.5)))
            if i < 9 and seen[i, j] != seen[i + 1, j]:
                expected.add(((j - 0.5, i + 0.5), (j + 0.5, i + 0.5)))
    assert len(expected) > 8
    axes = panels(retrieval_maps(table))["both k=2"]
    drawn = [edge for lines in axes.collections for edge in lines.get_segments()]
    assert {tuple(map(tuple, edge.tolist())) for edge in drawn} == expected
    (dotted,) = (line for line in axes.lines if line.get_linestyle() == ":")
    assert set(dotted.get_xdata()) == {4.5}  # 1,959 tokens are within the window, 2,387 are not
    figure = retrieval_maps(sweep_table(window=None))
    assert not any(axes.lines or axes.collections for axes in panels(figure).values())
    assert not figure.legends


def test_a_cell_that_was_not_run_is_left_empty():
    table = sweep_table()
    gone = (table.setting == "both k=4") & (table.length == 200) & (table.depth == 0.5)
    drawn = panels(retrieval_maps(table[~gone]))
    shown = np.ma.filled(drawn["both k=4"].images[0].get_array(), np.nan)
    assert np.isnan(shown[1, 1]) and np.isnan(shown).sum() == 1
    written = texts(retrieval_map(table[~gone], "both k=4"))
    assert "nan" not in " ".join(written)


def test_one_map_has_its_accuracies_written_in():
    table = sweep_table()
    cells = table[table.setting == "generation k=2"].sort_values(["depth", "length"])
    axes = retrieval_map(table, "generation k=2").axes[0]
    assert [t.get_text() for t in axes.texts] == [f"{100 * a:.0f}" for a in cells.accuracy]
    with pytest.raises(ValueError, match="no setting 'generation k=3'"):
        retrieval_map(table, "generation k=3")


@pytest.mark.parametrize("by_window", [False, True])
@pytest.mark.parametrize("needles", [NEEDLES, NEEDLES[:1]])
def test_curves_go_through_the_means_with_the_clustered_interval(by_window: bool, needles: Any):
    table = sweep_table((4, 0, 2), needles=needles, depths=(0.0, 0.1, 0.5, 1.0))
    figure = accuracy_by_k(table, by_window)
    inside = table.in_window.astype(bool)
    parts = [table[inside], table[~inside]] if by_window else [table]
    assert len(figure.axes) == len(parts)
    for axes, part in zip(figure.axes, parts, strict=True):
        assert len(axes.lines) == 2
        for line, stage in zip(axes.lines, ("generation", "both"), strict=True):
            cells = part[part.stage == stage]
            assert list(line.get_xdata()) == [0, 2, 4]
            means = cells.groupby("k").accuracy.mean()
            np.testing.assert_allclose(line.get_ydata(), means)
        paths = axes.collections[0].get_paths()  # the band of the first stage
        if len(needles) > 1:
            band = paths[0].vertices
            last = part[(part.stage == "generation") & (part.k == 4)]
            ends = band[band[:, 0] == 4][:, 1]
            assert (ends.min(), ends.max()) == pytest.approx(interval_of(last))
        else:
            assert not paths


def test_the_legend_says_of_how_many_needles_the_intervals_are():
    (one,) = accuracy_by_k(sweep_table()).legends
    (several,) = accuracy_by_k(sweep_table(needles=NEEDLES)).legends
    assert "one needle: no intervals" in one.get_title().get_text()
    assert "95% intervals over 3 needles" in several.get_title().get_text()
    assert len(one.get_texts()) == 2


def test_a_setting_without_k_is_a_level_line_and_without_any_k_there_is_no_curve():
    axes = accuracy_by_k(sweep_table(ks=(0, 2, None))).axes[0]
    level = [line for line in axes.lines if line.get_label() == "no hooks"]
    assert len(level) == 1 and len(set(level[0].get_ydata())) == 1
    with pytest.raises(ValueError, match="no setting has a k"):
        accuracy_by_k(sweep_table(ks=(None,)))


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(lambda: retrieval_maps(sweep_table(ks=range(9), **GRID)), id="nine-k"),
        pytest.param(lambda: retrieval_maps(sweep_table(ks=(2,), stages=("both",))), id="one"),
        pytest.param(lambda: retrieval_map(sweep_table(**GRID), "both k=2", True), id="single"),
        pytest.param(lambda: accuracy_by_k(sweep_table()), id="curves"),
        pytest.param(lambda: accuracy_by_k(sweep_table(needles=NEEDLES), True), id="by-window"),
    ],
)
def test_no_text_is_cut_off_and_no_labels_touch(figure: Any):
    drawn: Figure = figure()
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    renderer = canvas.get_renderer()
    ticks = {axis: drawn_labels(axis) for a in drawn.axes for axis in (a.xaxis, a.yaxis)}
    all_ticks = {
        t for axis in ticks for tick in axis.get_major_ticks() for t in tick.get_children()
    }
    others = [text for text in drawn.findobj(Text) if text not in all_ticks and text.get_text()]
    for text in [*others, *(label for labels in ticks.values() for label in labels)]:
        if text.get_visible() and (text.axes is None or text.axes.get_visible()):
            box = text.get_window_extent(renderer)
            assert box.x0 >= 0 and box.y0 >= 0, text
            assert box.x1 <= drawn.bbox.width and box.y1 <= drawn.bbox.height, text
    assert len(others) >= 3
    for axis, labels in ticks.items():
        boxes = [label.get_window_extent(renderer).get_points() for label in labels]
        spans = sorted(box[:, 0 if axis.axis_name == "x" else 1].tolist() for box in boxes)
        assert all(first[1] <= second[0] for first, second in pairwise(spans)), axis


def drawn_labels(axis: Any) -> list[Text]:
    """Return the labels of the ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [t.label1 for t in ticks if t.label1.get_visible() and t.label1.get_text()]


def test_figures_are_written_as_png_and_pdf_and_the_same_each_time(tmp_path: Path):
    figure = accuracy_by_k(sweep_table())
    png, pdf = save_figure(figure, tmp_path / "k=0.5")
    assert (png.name, pdf.name) == ("k=0.5.png", "k=0.5.pdf")
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
    before = [png.read_bytes(), pdf.read_bytes()]
    save_figure(accuracy_by_k(sweep_table()), tmp_path / "k=0.5")
    assert [png.read_bytes(), pdf.read_bytes()] == before


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_file_names_hold_letters_digits_and_no_path():
    assert file_name("both k=2") == "both_k2"
    assert "/" not in file_name("../a/b") and not file_name("../a").startswith(".")
    assert file_name("///") == "setting"


def test_importing_the_library_imports_none_of_the_extra():
    code = (
        "import sys, hooked_hybrid.niah.report.plots, hooked_hybrid.runs.statistics\n"
        "print([m for m in ('matplotlib', 'pandas', 'typer', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("thesis_depth", [False, True])
def test_maps_show_the_asked_depth_and_where_the_needles_stand(thesis_depth: bool):
    table = sweep_table(depths=(0.0, 0.5, 1.0)).assign(real_depth=lambda t: t.depth)
    table.loc[table.depth == 0.5, "real_depth"] = 0.4
    table.loc[(table.depth == 0.5) & (table.length == 400), "real_depth"] = 0.48
    axes = retrieval_map(table, "generation k=2", thesis_depth).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == (
        ["100", "50 (52 to 60)", "0"] if thesis_depth else ["0", "50 (40 to 48)", "100"]
    )
    old = retrieval_map(table.drop(columns="real_depth"), "generation k=2").axes[0]
    assert [label.get_text() for label in old.get_yticklabels()] == ["0", "50", "100"]
