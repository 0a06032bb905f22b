"""The notebooks run as they are, on the models of the package, and say what they stored.

All of them run in one kernel, which imports torch once; each begins with an empty namespace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS_A_CELL = 300
NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")
RELATIVE, ABSOLUTE = 0.02, 0.02
"""How far a number may be from the stored one: other machines round otherwise."""
VARIES = "varies"
"""The tag of a cell whose numbers another machine changes by more, such as those of a training."""
PARAMETERS = "parameters"
"""The tag of the cell after which `SMALL` is put in, as papermill does."""
SMALL = {"published_2b_on_a_gpu": 'MODEL, DEVICE = "tiny-griffin", "cpu"'}
"""Notebooks for a machine that is not at hand, and what makes them run here; no output is kept."""


@pytest.fixture(scope="module")
def client() -> Iterator[NotebookClient]:
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=SECONDS_A_CELL, kernel_name="python3"
    )
    client.reset_execution_trackers()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # other tests run at the same time
        with client.setup_kernel(cwd=str(FOLDER)):
            yield client


def run_all(client: NotebookClient, notebook: NotebookNode) -> None:
    """Run a notebook's cells in an empty namespace of the kernel, keeping their outputs."""
    reset = nbformat.v4.new_code_cell("%reset -f")
    for part in (nbformat.v4.new_notebook(cells=[reset]), notebook):
        client.nb = part
        client.reset_execution_trackers()
        for i, cell in enumerate(part.cells):
            client.execute_cell(cell, i)


def said(cell: NotebookNode) -> str:
    """Return a cell's printed text, its value as text, and a word for each picture."""
    parts = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":  # which comes in several pieces
            parts.append(output.text if output.name == "stdout" else "")
        elif "data" in output:
            is_picture = "image/png" in output.data
            value = "[picture]" if is_picture else output.data.get("text/plain", "")
            parts.append(f" {value} ")
    return " ".join("".join(parts).split())


def numbers_of(text: str) -> list[float]:
    """Return the numbers of a text."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def is_like(new: str, stored: str) -> bool:
    """Whether two outputs have the same words, and numbers within the tolerance."""
    words, stored_words = (NUMBER.sub("#", text) for text in (new, stored))
    close = pytest.approx(numbers_of(stored), rel=RELATIVE, abs=ABSOLUTE)
    return words == stored_words and numbers_of(new) == close


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert set(SMALL) <= {path.stem for path in NOTEBOOKS}


def test_an_output_is_compared_by_words_and_numbers():
    assert is_like("loss 1.2341, 1,115,184 of 50%", "loss 1.2345, 1,115,184 of 50%")
    assert not is_like("loss 1.3", "loss 1.2")
    assert not is_like("gain 1.2", "loss 1.2")
    assert not is_like("1.2 [picture]", "1.2")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of what runs the cells, not of the cells
def test_a_notebook_runs_and_says_what_it_stored(path: Path, client: NotebookClient):
    notebook, stored = (nbformat.read(path, as_version=4) for _ in range(2))
    if path.stem in SMALL:
        at = [PARAMETERS in cell.metadata.get("tags", ()) for cell in notebook.cells].index(True)
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
    run_all(client, notebook)
    assert all(cell.execution_count for cell in code_cells(notebook))
    if path.stem in SMALL:
        assert not any(cell.outputs for cell in code_cells(stored)), "of another model"
        return
    different = {
        new.source: f"stored: {said(old)}\nnow: {said(new)}"
        for new, old in zip(code_cells(notebook), code_cells(stored), strict=True)
        if VARIES not in old.metadata.get("tags", ()) and not is_like(said(new), said(old))
    }
    assert not different, "run the notebook again and read what it says: " + str(different)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_warning(path: Path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.source
