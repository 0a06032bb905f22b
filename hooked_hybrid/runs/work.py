"""Work consisting of items, run by this process or by workers, with the same results.

A job is called with a model and some items and yields the result of each, in order. A unit is a
list of items that are cheaper together, such as prompts with a common beginning. It may be cut
anywhere, at the cost of computing the common part again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from hooked_hybrid.model.hybrid import HookedHybrid

if TYPE_CHECKING:
    import pandas

Item = TypeVar("Item")
Result = TypeVar("Result")


class Job(ABC, Generic[Item, Result]):
    """The work on each item. It is pickled and sent to workers once."""

    @abstractmethod
    def __call__(self, model: HookedHybrid, items: Sequence[Item]) -> Iterator[Result]:
        """Yield the result of each item, in order."""

    def cost(self, item: Item) -> float:  # noqa: ARG002
        """Return how long an item takes relative to others, in any unit."""
        return 1.0

    def describe(self, items: Sequence[Item]) -> str:
        """Return a description of these items."""
        return ", ".join(map(str, items))


@runtime_checkable
class Workers(Protocol):
    """Processes that run a job's items, each with its own model; see `ray_workers`."""

    def results(
        self, model: HookedHybrid, job: Job[Any, Any], units: Sequence[Sequence[Any]]
    ) -> Generator[tuple[Any, Any], None, None]:
        """Yield every item with its result, as they come."""
        ...


def results(
    model: HookedHybrid,
    job: Job[Item, Result],
    units: Iterable[Sequence[Item]],
    workers: Workers | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yield every item with its result: in order, or as workers complete them.

    Close it if it is not read to the end, so that workers stop (`contextlib.closing`).

    Args:
        model: the model of the work; workers have an equal one.
        job: the work.
        units: items that are cheaper together; without workers, each item is run separately.
        workers: None for this process.
    """
    if workers is not None:
        yield from workers.results(model, job, list(units))
        return
    for unit in units:
        yield from zip(unit, job(model, unit), strict=True)


def spread(
    job: Job[Item, Any], units: Iterable[Sequence[Item]], n_pieces: int
) -> list[Sequence[Item]]:
    """Cut units into about this many pieces of consecutive items, the costliest first.

    The costliest unit is cut into most pieces, so that no piece is much longer than the others; a
    long piece that starts last would delay the end.
    """
    units = [unit for unit in units if unit]
    costs = [[job.cost(item) for item in unit] for unit in units]
    target = sum(map(sum, costs)) / n_pieces
    pieces: list[tuple[float, Sequence[Item]]] = []
    for unit, cost in zip(units, costs, strict=True):
        n = min(len(unit), max(1, round(sum(cost) / target)))
        cuts = [len(unit) * i // n for i in range(n + 1)]
        pieces += [(sum(cost[a:b]), unit[a:b]) for a, b in pairwise(cuts)]
    return [piece for _, piece in sorted(pieces, key=lambda p: -p[0])]


def order_cells(
    table: pandas.DataFrame, prompt_ids: Sequence[str], settings: Sequence[str]
) -> pandas.DataFrame:
    """Return cells in the order of prompts and settings, in whatever order they were written."""
    ranks = {
        "prompt_id": {name: i for i, name in enumerate(prompt_ids)},
        "setting": {name: i for i, name in enumerate(settings)},
    }
    return table.sort_values(
        list(ranks), key=lambda column: column.map(ranks[str(column.name)]), ignore_index=True
    )
