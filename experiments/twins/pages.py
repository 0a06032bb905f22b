"""The figures of the page on the twins, and its three tables."""

from __future__ import annotations

import pandas as pd

from experiments.pages.results import kept
from experiments.twins.models import LONG, TASK, TWINS

ORDER = ("hybrid", "attention-free", LONG)
"""Twins with a recurrence, in the order of the page."""
EARLIER = {
    ("accuracy", "whole"), ("crossing", "attention"), ("crossing", "recurrences"),
    ("value", "0"), ("value", "1"), ("value", "2"), ("value", "all"),
    ("presence", "0"), ("presence", "2"), ("presence", "1"),
    ("median horizon", "0"), ("median horizon", "1"), ("median horizon", "2"),
}  # fmt: skip
"""Measures stored for steps before the last one too."""


def settings(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each figure: `setting`, each seed's value and control, mean and range.

    A setting is the measure, its argument, and the twin ("crossing attention hybrid"), with the
    step if it is not the last one ("accuracy whole hybrid, step 300"). `average`, `least` and
    `most` are over seeds, `control` the average of their controls. Of the horizons of a layer's
    channels: the median, and the share beyond a sequence.
    """
    channels = found[found["measure"] == "horizon"].groupby(["at", "twin", "step", "seed"])
    channels = channels["value"]
    medians = channels.median().reset_index().assign(measure="median horizon")
    beyond = channels.agg(lambda x: (x > TASK.length).mean()).reset_index()
    beyond = beyond.assign(measure="share beyond a sequence")
    rows = pd.concat([found[found["measure"] != "horizon"], medians, beyond])
    last, made = rows["step"].max(), []
    for (measure, at, twin, step), own in rows.groupby(["measure", "at", "twin", "step"]):
        if step != last and (measure, at) not in EARLIER:
            continue
        name = f"{measure} {at} {twin}" + ("" if step == last else f", step {step}")
        own = own.sort_values("seed")
        seeds = {f"seed {s}": v for s, v in zip(own["seed"], own["value"], strict=True)}
        controls = {}
        if own["control"].notna().any():
            controls = {f"control {s}": v for s, v in zip(own["seed"], own["control"], strict=True)}
        spans = {"least": own["value"].min(), "most": own["value"].max()}
        means = {"average": own["value"].mean(), "control": own["control"].mean()}
        made.append({"setting": name, **seeds, **means, **spans, **controls})
    return pd.DataFrame(made)


def _cell(name: str, setting: str, form: str = ".2f") -> str:
    """Return the values of all seeds, empty if there are none."""
    table = kept(name).table
    own = table[table["setting"] == setting]
    seeds = [c for c in table if c.startswith("seed ")]
    return ", ".join(f"{x:{form}}" for x in own[seeds].to_numpy().ravel())


def ways(name: str) -> str:
    """Return accuracy at the last step: whole, and with attention or recurrences restarted."""
    lines = [
        "| accuracy at the last step, seeds 0, 1, 2 | whole | attention begins anew at the "
        "questions | recurrences do |",
        "|---|---|---|---|",
    ]
    for twin in TWINS:
        of = ("accuracy whole", "crossing attention", "crossing recurrences")
        lines.append(f"| {twin} | " + " | ".join(_cell(name, f"{m} {twin}") for m in of) + " |")
    return _tidy(lines)


def probed(name: str) -> str:
    """Return the accuracy of probes on each recurrence at the last step, and untrained."""
    lines = [
        "| last step, seeds 0, 1, 2 | layer | value of the key | of a given other fact | untrained "
        "| a value that was there | untrained |",
        "|---|---|---|---|---|---|---|",
    ]
    for twin in ORDER:
        layers = [i for i in range(3) if _cell(name, f"value {i} {twin}")]
        for i in layers:
            of = (
                f"value {i} {twin}",
                f"value of another {i} {twin}",
                f"value {i} {twin}, step 0",
                f"presence {i} {twin}",
                f"presence {i} {twin}, step 0",
            )
            cells = " | ".join(_cell(name, setting) for setting in of)
            lines.append(f"| {twin if i == layers[0] else ''} | {i} | {cells} |")
    return _tidy(lines)


def horizons(name: str) -> str:
    """Return the median channel's tokens until 1% of a write is left, by layer and step."""
    heads = [f"layer {i}: step 0 | step 800" for i in range(3)]
    lines = [f"| seeds 0, 1, 2 | {' | '.join(heads)} |", "|---" * 7 + "|"]
    for twin in ORDER:
        of = [f"median horizon {i} {twin}{step}" for i in range(3) for step in (", step 0", "")]
        lines.append(f"| {twin} | " + " | ".join(_cell(name, s, "g") for s in of) + " |")
    return _tidy(lines)


def _tidy(lines: list[str]) -> str:
    """Return lines of a table, with one space for an empty cell."""
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")
