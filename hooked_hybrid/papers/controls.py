"""Controls of the claims: other heads, other layers, other tokens, and ordinary language."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hooked_hybrid.papers.evidence import Evidence, estimate
from hooked_hybrid.papers.figures import VALUES, value_rows


class Control(NamedTuple):
    """A control: its sentence under an item, and the table at the end of the report."""

    title: str
    runs: tuple[str, ...]
    line: Callable[[Evidence], str]
    rows: Callable[[Evidence], tuple[list[str], list[list[str]]]]


def _text_line(evidence: Evidence) -> str:
    losses = evidence.losses["top-k"].set_index("setting")
    none, both = (losses.loc[evidence.k_setting(0, stage)] for stage in ("generation", "both"))
    return (
        f"text loss at k = 0 {none['more']:+.3f} nats a token ({none['more_low']:+.3f} to "
        f"{none['more_high']:+.3f}) with heads silenced in the second half of a text, "
        f"{both['more']:+.3f} ({both['more_low']:+.3f} to {both['more_high']:+.3f}) in all of it"
    )


def _text_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(row["setting"]),
            f"{row['loss']:.3f}",
            f"{row['more']:+.3f} ({row['more_low']:+.3f} to {row['more_high']:+.3f})",
        ]
        for row in evidence.losses["top-k"].to_dict("records")
    ]
    return ["setting", "loss of text, nats a token", "above all heads (95% interval)"], rows


def _layers_line(evidence: Evidence) -> str:
    losses = evidence.losses["layers"].set_index("setting")["more"]
    kinds = [name for name in losses.index if name != "whole" and not re.search(r"\d", name)]
    return "whole kinds of layer silenced in both stages: " + "; ".join(
        f"{name} {100 * evidence.accuracy('layers', name).mean:.1f}%, text {losses[name]:+.3f} nats"
        for name in ("whole", *kinds)
    )


def _layers_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    losses = evidence.losses["layers"].set_index("setting")
    names = list(losses.index)
    rows = [
        [*values, f"{losses.loc[name, 'more']:+.3f}"]
        for name, values in zip(names, value_rows(evidence, "layers", names), strict=True)
    ]
    return [*VALUES, "text, nats a token above the whole model"], rows


def _ks(evidence: Evidence) -> list[int]:
    names = evidence.tables["controls"]["setting"].unique()
    return sorted({int(name.split("k=")[1]) for name in names if name.startswith("peaked k=")})


def _heads_line(evidence: Evidence) -> str:
    parts = []
    for k in _ks(evidence):
        ways = {
            way: estimate(evidence.cells("controls", f"{way} k={k}", True)).mean
            for way in ("peaked", "reversed", "by lot", "needle")
        }
        drawn = _draw(evidence, k)
        said = ", ".join(f"{way} {100 * mean:.1f}%" for way, mean in ways.items())
        parts.append(
            f"k = {k}: {said}, {len(drawn)} sets drawn once {100 * np.mean(drawn):.1f}% "
            f"({100 * min(drawn):.1f} to {100 * max(drawn):.1f})"
        )
    return (
        "other ways to choose as many heads, in both stages, needles inside the window: "
        + "; ".join(parts)
    )


def _draw(evidence: Evidence, k: int) -> list[float]:
    """Return the accuracy inside the window of each set of heads that was drawn once."""
    names = evidence.tables["controls"]["setting"].unique()
    own = [name for name in names if name.startswith((f"drawn k={k} #", f"every k={k} #"))]
    return [estimate(evidence.cells("controls", name, True)).mean for name in own]


def _heads_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    names = list(evidence.tables["controls"]["setting"].unique())
    return [*VALUES], value_rows(evidence, "controls", names)


def _elsewhere_line(evidence: Evidence) -> str:
    table = evidence.tables["elsewhere"]
    names = [name for name in table["setting"].unique() if name != "whole"]
    return "the same manipulations on as many tokens of haystack beside the needle: " + "; ".join(
        f"{name} {100 * evidence.accuracy('elsewhere', name).mean:.1f}%"
        for name in ("whole", *names)
    )


def _elsewhere_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    names = list(evidence.tables["elsewhere"]["setting"].unique())
    return [*VALUES], value_rows(evidence, "elsewhere", names)


CONTROLS: dict[str, Control] = {
    "text": Control("What silencing heads costs language", ("top-k",), _text_line, _text_rows),
    "layers": Control("Other layers silenced", ("layers",), _layers_line, _layers_rows),
    "heads": Control(
        "Other heads, and as many recurrent layers", ("controls",), _heads_line, _heads_rows
    ),
    "elsewhere": Control(
        "Weights beside the needle", ("elsewhere",), _elsewhere_line, _elsewhere_rows
    ),
}
"""Every control by its name; its runs are made with the items that list it."""
