"""Notes for readers of a report: the rules of verdicts and intervals, and the runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hooked_hybrid.niah.report.report import CAUTION, SMALL_MARGIN, versions
from hooked_hybrid.outputs.checkout import commit
from hooked_hybrid.papers.evidence import Evidence
from hooked_hybrid.papers.shares import TOLERANCE

_HOW_TO_READ = """\
- **Verdicts.** "{subject} shows it" or "does not show it" is said of this model and these prompts
  and of nothing else. A claim is shown only where the 95% bound of its figure is on the claimed
  side, so that "does not show it" may mean undecided; then the table says so. An item shows it
  where each of its tested claims is shown. "Untested on real weights": nothing here could test it.
  {caution}
- **Accuracy** is the mean graded score / 5 (thesis, Table 2.1), here over {n_needles} needles. "By
  seed": each seed has a haystack and held-out needles of its own, and the paper's needle too.
- **Intervals** are over needles (`hooked_hybrid.runs.intervals`): each end is the quantile of the
  mean under random weights of the needles and of one more that is as far off as possible. They
  hold the mean over all such needles in 95% of samples or more, however few there are. Where all n
  are alike, up to 1 - 0.025^(1/n) of all needles ({others} here) may be anything possible. A
  claim asks of one side alone ("at most", "at least"), and is judged by the one-sided 95% bound
  there, which is nearer: 1 - 0.05^(1/n) of needles that are alike.
- **Every needle once.** So few needles cannot bound a rare success. Settings without any head, and
  those of weights, are therefore run over {n_many} needles too, at the shortest length and the
  middle depth ("of {n_many} needles at ..."). A claim must then hold by both bounds; where the few
  needles are all alike, by their mean and the bound of the many (at 0%, at most {one_sided}; the
  interval reaches to {others_many}).
- **Without such an interval** are: maps called empty, by the mean of each length and depth; whether
  the whole model retrieves at all, by its mean accuracy (20%), without which a claim about losses
  is untested. Losses of text have Student's interval over texts; language benchmarks one over
  documents, task by task.
- **Heads.** A claim about k of a published model's heads is asked of as large a share here, where
  that is within {tolerance} of a whole number of heads, 1 or more; else it is untested. A range of
  k is every k here within it.
- **Predictions** are for the published weights run with this code, written before anyone ran them.
"""
_QUICK = (
    "**Run with --quick: so few prompts that it only shows that all runs. Nothing can be concluded "
    "from it, and every claim that rests on prompts is untested.**"
)


def how_to_read(evidence: Evidence) -> str:
    """Return the rules of verdicts and intervals, with a warning for a quick run."""
    recipe = evidence.recipe
    n, n_many = recipe.n_needles, recipe.n_many
    rules = _HOW_TO_READ.format(
        subject=_upper(evidence.subject),
        caution=CAUTION,
        n_needles=n,
        others=f"{100 * (1 - 0.025 ** (1 / n)):.0f}%",
        n_many=n_many,
        others_many=f"{100 * (1 - 0.025 ** (1 / n_many)):.1f}%",
        one_sided=f"{100 * (1 - 0.05 ** (1 / n_many)):.1f}%",
        tolerance=TOLERANCE,
    )
    return f"{_QUICK}\n\n{rules}" if recipe.is_quick else rules


def facts_of(evidence: Evidence, card: Mapping[str, str]) -> dict[str, str]:
    """Return facts about the runs by name: model card, prompts, needles, cells and versions."""
    recipe = evidence.recipe
    close = sum(int((t["min_margin"] < SMALL_MARGIN).sum()) for t in evidence.tables.values())
    return {
        **card,
        "prompts": f"{len(recipe.lengths)} lengths ({_list(recipe.lengths)} tokens) x "
        f"{len(recipe.depths)} depths ({_list(round(100 * d) for d in recipe.depths)}%) x "
        f"{1 + recipe.n_held_out} needles (the paper's and {recipe.n_held_out} held-out ones) x "
        f"{len(recipe.seeds)} seeds; for controls every second length and depth, of four or more",
        "needles in all": f"{recipe.n_needles}; {recipe.n_many} in runs named -many",
        **({"documents of each task": _documents(evidence)} if evidence.language else {}),
        "template, haystack": f"{recipe.template}, {recipe.haystack}",
        "first new token": f"chosen in the {recipe.first_token} stage",
        "cells": "; ".join(f"{run} {len(table):,}" for run, table in evidence.tables.items()),
        "close calls": f"{close:,} cells chose a token by less than {SMALL_MARGIN:g} in its logit: "
        "there a rounding may decide",
        "code": f"commit {commit()} wrote this report",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _documents(evidence: Evidence) -> str:
    n = evidence.recipe.n_documents
    forms = (cells for scores in evidence.language.values() for cells in scores.cells.values())
    read = [cell.n_documents for cells in forms for cell in cells.values()]
    said = f"{min(read):,} to {max(read):,} read" if read else "none could be read"
    return f"{'all' if n is None else f'the first {n}'}; {said}"


def _list(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
