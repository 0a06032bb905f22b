"""When does retrieval move from the recurrence to attention? A map over tiny hybrids.

    python -m experiments.recall.map --out results/recall-map --hours 1
    python -m experiments.recall.map --out results/recall-map --page docs/where_recall_lives.md

Each cell is a hybrid of one attention layer between two Mamba layers, trained from scratch on
key-value recall, and scored whole, with attention cut, and with the recurrences' memory cut. Cells
differ in the state's size, the facts of a sequence, its length, and in the number of steps that the
recurrences learn before attention does. Every place is run with one seed first, then with two more
if retrieval is neither all in attention nor all in the recurrences, or if a neighbor is on the
other side. A finished cell is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.recall.score import Score, scores
from experiments.recall.task import Task
from experiments.recall.train import TrainingRecipe, small_config, train
from hooked_hybrid.outputs.whole_files import replacing

PATTERN = "MAM"
D_INNER = 64
D_STATES = (1, 4, 16)
FACTS = (2, 4, 8)
LENGTHS = (64, 256)
HEAD_STARTS = (0, 200, 400)
SEEDS = (0, 1, 2)
Place = tuple[int, int, int, int]
STEPS = 800
"""Steps after the head start: equal in every cell, with attention."""
LEARNED = 0.8
"""Accuracy from which a cell counts as having learned to retrieve."""
CLEAR = 0.9
"""|share in attention| from which a cell is clearly on one side."""


@dataclass(frozen=True)
class Cell:
    """One training: states of a channel, facts and tokens of a sequence, head start, seed."""

    d_state: int
    n_facts: int
    length: int
    head_start: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        sizes = f"state{self.d_state}-facts{self.n_facts}-length{self.length}"
        return f"{sizes}-start{self.head_start}-seed{self.seed}"

    @property
    def place(self) -> Place:
        """The cell without its seed."""
        return self.d_state, self.n_facts, self.length, self.head_start


@dataclass(frozen=True)
class Found:
    """The scores of a trained cell: "whole", "no attention", "no memory"."""

    cell: Cell
    scores: dict[str, Score]
    seconds: float

    @property
    def learned(self) -> bool:
        """Whether the whole model retrieves."""
        return self.scores["whole"].accuracy >= LEARNED

    @property
    def lean(self) -> float:
        """1 if attention alone carries retrieval, -1 if the recurrences' memory alone does.

        The loss without attention less the loss without memory, over the larger of the two, each at
        least 0. Near 0 both are needed, or either suffices, which the two scores distinguish.
        """
        whole = self.scores["whole"].accuracy
        lost = [max(whole - self.scores[f"no {x}"].accuracy, 0) for x in ("attention", "memory")]
        return (lost[0] - lost[1]) / max(*lost, 1e-9)


def task_of(cell: Cell) -> Task:
    """Return the task of a cell."""
    return Task(cell.length, cell.n_facts)


def recipe_of(cell: Cell) -> TrainingRecipe:
    """Return how a cell is trained."""
    return TrainingRecipe(steps=cell.head_start + STEPS, head_start=cell.head_start, seed=cell.seed)


def check_folder(out: Path) -> None:
    """Record what all cells of a folder share; raise an error for a folder of another map.

    Raises:
        ValueError: the folder's cells were trained in another way.
    """
    every = recipe_of(Cell(D_STATES[0], FACTS[0], LENGTHS[0], 0, 0))
    mine = {"pattern": PATTERN, "d_inner": D_INNER, "after the head start": asdict(every)}
    kept = out / "map.json"
    if not kept.exists():
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(mine, indent=2))
    elif json.loads(kept.read_text()) != mine:
        raise ValueError(f"{out} contains cells of another training: give another folder")


def run_cell(cell: Cell, out: Path) -> Found:
    """Train and score a cell, or return its stored scores."""
    file = out / f"{cell.name}.json"
    if file.exists():
        return _read(cell, file)
    began, task = time.process_time(), task_of(cell)
    cfg = small_config(PATTERN, task, d_inner=D_INNER, d_state=cell.d_state)
    folder = out / cell.name
    model = train(cfg, task, recipe_of(cell), folder)
    found = Found(cell, scores(model, task), time.process_time() - began)
    with replacing(file) as temporary:
        kept = {"scores": {name: asdict(s) for name, s in found.scores.items()}}
        temporary.write_text(json.dumps({**asdict(cell), **kept, "seconds": found.seconds}))
    shutil.rmtree(folder)  # a checkpoint of half a megabyte, which its seed reproduces
    return found


def _read(cell: Cell, file: Path) -> Found:
    kept = json.loads(file.read_text())
    return Found(cell, {n: Score(**s) for n, s in kept["scores"].items()}, kept["seconds"])


def read_all(out: Path) -> list[Found]:
    """Return every finished cell."""
    found = []
    for file in sorted(out.glob("state*.json")):
        kept = json.loads(file.read_text())
        cell = Cell(*(kept[name] for name in Cell.__dataclass_fields__))
        found.append(_read(cell, file))
    return found


def grid() -> list[Place]:
    """Return the places of the map, without and with the longest head start first.

    In this order a stopped map is most informative.
    """
    places = list(itertools.product(D_STATES, FACTS, LENGTHS, HEAD_STARTS))
    return sorted(places, key=lambda p: (p[3] not in (HEAD_STARTS[0], HEAD_STARTS[-1]), p[2]))


def boundary(found: list[Found]) -> list[Place]:
    """Return the places that are not clearly on one side, or have a neighbor on the other."""
    lean = {f.cell.place: f.lean for f in found if f.learned and f.cell.seed == SEEDS[0]}
    return [
        place
        for place in grid()
        if place in lean
        and (
            abs(lean[place]) < CLEAR
            or any(lean[p] * lean[place] < 0 for p in _neighbours(place) if p in lean)
        )
    ]


def _neighbours(place: Place) -> Iterator[Place]:
    """Yield the places one step away along one axis."""
    d_state, n_facts, length, start = place
    yield from ((d, n_facts, length, start) for d in _beside(d_state, D_STATES))
    yield from ((d_state, n, length, start) for n in _beside(n_facts, FACTS))
    yield from ((d_state, n_facts, n, start) for n in _beside(length, LENGTHS))
    yield from ((d_state, n_facts, length, s) for s in _beside(start, HEAD_STARTS))


def _beside(value: int, values: Sequence[int]) -> list[int]:
    at = values.index(value)
    return [v for v in values[max(at - 1, 0) : at + 2] if v != value]


def todo(found: list[Found]) -> list[Cell]:
    """Return the remaining cells, in the order to run them."""
    done = {astuple(f.cell) for f in found}
    first = [Cell(*place, SEEDS[0]) for place in grid()]
    left = [cell for cell in first if astuple(cell) not in done]
    if left:
        return left
    more = [Cell(*place, seed) for place in boundary(found) for seed in SEEDS[1:]]
    return [cell for cell in more if astuple(cell) not in done]


def run(out: Path, hours: float, jobs: int) -> None:
    """Run cells until none is left or the time is over; cells already begun are finished."""
    check_folder(out)
    stop = time.monotonic() + 3600 * hours
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future[Found], Cell] = {}
        with tqdm(desc="cells", unit="cell") as bar:
            while True:
                left = [c for c in todo(read_all(out)) if c not in running.values()]
                while left and len(running) < jobs and time.monotonic() < stop:
                    cell = left.pop(0)
                    running[pool.submit(run_cell, cell, out)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    _tell(future.result())
                    bar.update()


def _tell(found: Found) -> None:
    each = ", ".join(f"{name} {s.accuracy:.3f}" for name, s in found.scores.items())
    tqdm.write(f"{found.cell.name}: {each}; {found.seconds:.0f} s")


def main() -> None:
    """Run cells, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0, help="after which no cell is begun")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--page", type=Path, help="write the map into this page instead")
    args = parser.parse_args()
    if args.page is None:
        run(args.out, args.hours, args.jobs)
        return
    from experiments.recall.map_page import write

    if not (found := read_all(args.out)):
        raise SystemExit(f"{args.out} has no finished cell: run the map first, without --page")
    write(found, args.page)


if __name__ == "__main__":
    main()
