"""Comparison of attribution patching with true patching, by kind of hook point."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.analysis.activation_patching import PatchedRuns
from hooked_hybrid.analysis.attribution import Attribution, attribution_patching, check_pair
from hooked_hybrid.analysis.metrics import Metric, measure
from hooked_hybrid.hooks.names import CacheFilter
from hooked_hybrid.interventions.patching import patch
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.shapes import Tokens

Points = Float[Tensor, " cell"]


@dataclass(frozen=True)
class KindAgreement:
    """Agreement of attribution and patching at the hook points of one kind.

    Attributes:
        kind: the hook's name without its block: "attn.z", "mixer.ssm_state", "resid_pre", ...
        attributed, patched: the change of the metric by gradient, and the true one, at each cell.
    """

    kind: str
    attributed: Points
    patched: Points

    @property
    def n_cells(self) -> int:
        """Number of compared cells."""
        return len(self.patched)

    @property
    def spearman(self) -> float:
        """The rank correlation; NaN if either is constant."""
        return rank_correlation(self.attributed, self.patched)

    @property
    def error(self) -> float:
        """The mean distance of the two, as a fraction of the mean size of the true effects."""
        size = self.patched.abs().mean()
        return float((self.attributed - self.patched).abs().mean() / size)


@dataclass(frozen=True)
class Agreement:
    """Comparison of attribution and true patching, with a row for each kind of hook point.

    Attributes:
        rows: by kind, in the order of the model.
        excluded: hook points that were not compared, with the reason.

    Examples:
        >>> found = analysis.compare_with_patching(
        ...     model, tokens, riga, metric, "blocks.*.hook_mixer_out", n_cells=4, verbose=False
        ... )
        >>> [row.kind for row in found.rows]
        ['mixer_out']
    """

    rows: tuple[KindAgreement, ...]
    excluded: dict[str, str]

    def __getitem__(self, kind: str) -> KindAgreement:
        """Return the row of a kind.

        Raises:
            KeyError: no hook point of this kind was compared.
        """
        found = {row.kind: row for row in self.rows}
        if kind not in found:
            raise KeyError(f"no row {kind!r}: there are {', '.join(found)}")
        return found[kind]

    def __str__(self) -> str:
        """Return the table in Markdown."""
        lines = ["| kind | cells | Spearman | mean size | error |", "|---|--:|--:|--:|--:|"]
        for row in self.rows:
            numbers = f"{row.spearman:.3f} | {row.patched.abs().mean():.2g} | {row.error:.2g}"
            lines.append(f"| {row.kind} | {row.n_cells} | {numbers} |")
        return "\n".join(lines)


def compare_with_patching(
    model: HookedHybrid,
    clean_tokens: Tokens,
    corrupted_tokens: Tokens,
    metric: Metric,
    names_filter: CacheFilter | None = None,
    *,
    n_cells: int = 50,
    seed: int = 0,
    qk_fix: bool = False,
    max_bytes: int = 2**30,
    verbose: bool = True,
) -> Agreement:
    """Compare attributions with true effects of patching, by kind of hook point.

    A cell is a position, or a position of one head, in one layer; at patterns, of one query. For
    each kind, the cells with the largest attributions and equally many random others are patched
    with the clean value in the corrupted run. A metric with one value a row gives one cell for each
    row. Positions before the first difference of the tokens, and cells with an attribution of
    exactly
    0, are left out, as both runs are equal there. Most effects are tiny: in fp32 the random half of
    some kinds is rounding, so the comparison is better with a model in float64.

    Args:
        model, clean_tokens, corrupted_tokens, metric, names_filter, qk_fix, max_bytes: as
            in `attribution_patching`.
        n_cells: at most this many runs for each kind: half the largest, half random.
        seed: of the random cells.
        verbose: show progress bars.

    Raises:
        ValueError, HookNameError: as `attribution_patching`; also tokens that do not differ.

    Source: the comparison of Nanda 2023 and of Kramár et al. 2024, by ranks.

    Examples:
        >>> found = analysis.compare_with_patching(
        ...     model, tokens, riga, metric, "blocks.*.hook_mlp_out", n_cells=4, verbose=False
        ... )
        >>> len(found.rows)
        1
    """
    clean_tokens, corrupted_tokens, _ = check_pair(model, clean_tokens, corrupted_tokens)
    pair = (clean_tokens, corrupted_tokens)
    if not (parted := (clean_tokens != corrupted_tokens).any(0).nonzero()).numel():
        raise ValueError("clean and corrupted tokens are the same: there is nothing to compare")
    found = attribution_patching(
        model,
        *pair,
        metric,
        names_filter,
        reduce=("position", "head"),
        qk_fix=qk_fix,
        max_bytes=max_bytes,
        verbose=verbose,
    )
    drawn = _drawn(found, int(parted[0]), n_cells, random.Random(seed))
    rows = []
    with tqdm(total=sum(map(len, drawn.values())), unit="run", disable=not verbose) as bar:
        for kind, cells in drawn.items():
            bar.set_description(kind)
            patched = _patched(model, *pair, metric, cells, bar)
            rows.append(
                KindAgreement(kind, torch.cat([cell.attributed for cell in cells]), patched)
            )
    return Agreement(tuple(rows), found.excluded)


def rank_correlation(x: Points, y: Points) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; nan for a constant."""
    x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _ranks(x: Points) -> Points:
    _, which, counts = x.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which]


@dataclass(frozen=True)
class _Cell:
    """One patch: its location, and its attribution in each row."""

    name: str
    position: int
    head: int | None
    attributed: Points


def kind_of(name: str) -> str:
    """Return a hook's name without its block and `hook_`: "attn.z", "resid_pre", "embed"."""
    parts = name.split(".")[2:] if name.startswith("blocks.") else name.split(".")
    return ".".join(part.removeprefix("hook_") for part in parts)


def _drawn(
    attribution: Attribution, first: int, n: int, rng: random.Random
) -> dict[str, list[_Cell]]:
    """Return cells of each kind from a position on: the largest, and random others."""
    found: dict[str, list[_Cell]] = {}
    for name, value in attribution.values.items():
        axes = attribution.axes[name]
        has_rows = axes[0] == "batch"
        by_cell = value.movedim(0, -1) if has_rows else value[..., None]
        for index in by_cell.abs().amax(-1).nonzero().tolist():
            at = dict(zip(axes[has_rows:], index, strict=True))
            position = at["query"] if "query" in at else at["pos"]
            if position < first:
                continue
            head = at.get("head", at.get("kv_head"))
            cell = _Cell(name, position, head, by_cell[tuple(index)])
            found.setdefault(kind_of(name), []).append(cell)
    for kind, cells in found.items():
        cells.sort(key=lambda cell: float(cell.attributed.abs().sum()), reverse=True)
        largest, rest = cells[: n - n // 2], cells[n - n // 2 :]
        found[kind] = largest + rng.sample(rest, min(n // 2, len(rest)))
    return found


@torch.no_grad()
def _patched(
    model: HookedHybrid,
    clean: Tokens,
    corrupted: Tokens,
    metric: Metric,
    cells: list[_Cell],
    bar: Any,
) -> Points:
    """Return the change of the metric by each patch."""
    names = sorted({cell.name for cell in cells})
    _, cache = model.run_with_cache(clean, names_filter=names)
    runs, found = PatchedRuns(model, corrupted, cache, names, None), []
    before = measure(metric, runs.corrupted)
    for cell in cells:
        hooks = patch(cache, cell.name, positions=cell.position, heads=cell.head)
        found.append((measure(metric, runs.run(cell.name, hooks)) - before).view(-1))
        bar.update()
    return torch.cat(found)
