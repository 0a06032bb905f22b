"""What was skipped for lack of a package, a GPU or another version, and how it is run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

REMEDIES = (
    (r"make install", "mamba-ssm's own scan is not installed: `make test` has it"),
    (r"could not import '(\w+)", r"\1 is not installed: `make test` has it"),
    (r"needs (?:a|two) (?:\w+ )?GPU", "there is no GPU for them"),
    (r"root only", "only root may run them"),
    (r"transformers", "for another version of transformers: `make transformers` has it"),
)
"""A pattern of reasons to skip, and what is said of all that match it."""


def lines_of(skipped: Iterable[Any]) -> list[str]:
    """Return how many tests did not run, for each thing that is missing.

    Args:
        skipped: pytest's reports; that of a whole file counts once, for its tests are not known.
    """
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found = ((re.search(pattern, reason), said) for pattern, said in REMEDIES)
        why = next((m.expand(said) for m, said in found if m), reason.removeprefix("Skipped: "))
        (files if report.when == "collect" else tests)[why] += 1
    counted = [(n, "whole file", why) for why, n in files.items()]
    counted += [(n, "test", why) for why, n in tests.items()]
    return [f"NOT RUN: {n} {what}{'s' * (n > 1)}: {why}" for n, what, why in counted]
