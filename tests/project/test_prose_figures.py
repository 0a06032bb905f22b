"""Sentences of four pages say what the tables of the same page hold."""

from __future__ import annotations

import re
from io import StringIO

import pandas as pd
import pytest

from experiments.pages.results import DOCS
from experiments.pages.writing import BLOCK


def page(name: str) -> str:
    """Return the words of a page outside its tables, a blank between any two."""
    text = BLOCK.sub("", (DOCS / f"{name}.md").read_text(encoding="utf-8"))
    text = re.sub("<!--=.*?-->", "", text)
    return " ".join(text.replace("**", "").split())


def table(name: str, what: str) -> pd.DataFrame:
    """Return a marked table of a page; an empty first cell is that of the row above."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    (body,) = (m["body"] for m in BLOCK.finditer(text) if m["what"] == f"elsewhere {what}")
    lines = [line.strip().strip("|") for line in body.splitlines() if line.startswith("|")]
    rows = "\n".join([lines[0], *lines[2:]])
    found = pd.read_csv(StringIO(rows), sep=r"\s*\|\s*", engine="python", dtype=str, header=None)
    head, found = found.iloc[0].fillna("").tolist(), found.iloc[1:].reset_index(drop=True)
    found.columns = [
        f"{h.strip()} #{i}" if head.count(h) > 1 else h.strip() for i, h in enumerate(head)
    ]
    first = found.columns[0]
    found[first] = found[first].str.strip().replace("", None).ffill()
    return found


def numbers(cell: str) -> list[float]:
    """Return the figures of a cell, without those of its interval."""
    cell = re.sub(r"\[[^\]]*\]|±.*", "", cell)
    return [float(x) for x in re.findall(r"[+-]?\d[\d,]*\.?\d*(?:e-\d+)?", cell)]


def spread(cells: pd.Series) -> str:
    """Return the least and the greatest figure of a column, such as "93 to 100"."""
    found = [x for cell in cells for x in numbers(cell)]
    return f"{min(found):.0f} to {max(found):.0f}"


def test_what_recall_lives_in_is_said_as_the_map_has_it():
    words, cells = page("where_recall_lives"), table("where_recall_lives", "map")
    size, facts, start, seed = (
        cells[c].astype(int) for c in ("state", "facts", "head start", "seed")
    )
    is_learned = cells["lean"] != "not learned"
    assert f"{len(cells)} trainings" in words
    assert f"All {(seed == 0).sum()} cells with one seed, and two more seeds" in words
    assert f"for the {(seed == 1).sum()} that" in words and (seed == 1).sum() == (seed == 2).sum()
    small = cells[(start == 0) & (size <= 256)]
    assert (
        f"{spread(small['no memory'])}% without the recurrences' memory, "
        f"{spread(small['no attention'])}% without attention." in words
    )
    four = (start == 0) & (size == 1024) & (facts == 4)
    one, others = cells[four & (seed == 0)], cells[four & (seed > 0)]
    assert (
        f"(without it {spread(one['no attention'])}%, without memory {spread(one['no memory'])}%)"
        in words
    )
    assert f"({spread(others['no attention'])}% and {spread(others['no memory'])}%)" in words
    late = cells[(start > 0) & (size >= 256) & (facts <= 4) & is_learned]
    assert (
        f"{spread(late['no attention'])}% without attention, {spread(late['no memory'])}% "
        "without memory." in words
    )
    never = cells[(start > 0) & ((size == 64) | (facts == 8))]
    assert not (never["lean"] != "not learned").any() and "nothing passes 80%" in words
    from_the_start = cells[(start == 0) & ((size == 64) | (facts == 8))]
    assert f"the same model reaches {spread(from_the_start['whole'])}% when attention" in words


def test_quantised_weights_are_said_as_their_tables_have_them():
    words = page("quantized")
    found = table("quantized", "differences")
    found["model and variant"] = found["model"] + " " + found["variant"]
    rows = found.set_index("model and variant")

    def ends(key: str) -> tuple[float, float]:
        low, high = re.findall(r"[\d.e-]+", rows.loc[key, "KL"].partition("[")[2])
        return float(low), float(high)

    for model in ("tiny-griffin", "tiny-jamba"):
        assert ends(f"{model} int8 in fp32")[1] < ends(f"{model} bf16")[0]
        assert rows.loc[f"{model} nf4 in fp32", "loss"].endswith("]")
        assert "+" not in rows.loc[f"{model} nf4 in fp32", "loss"]  # the whole interval is below 0
    assert "int8 in fp32 moves the distribution less (KL) than bf16 does" in words
    assert "It *lowers* the loss of this text on both" in words
    ratio = {
        key: numbers(rows.loc[key, "KL"])[0] / numbers(rows.loc[f"{key.split()[0]} bf16", "KL"])[0]
        for key in rows.index
        if key.startswith("tiny")
    }
    griffin, jamba = (ratio[f"{m} int8 in bf16"] for m in ("tiny-griffin", "tiny-jamba"))
    assert f"lies {griffin:.1f} and {jamba:.1f} times as far from fp32 as bf16 does" in words
    far = re.search(r"NF4 lies (\d+) and (\d+) times as far", words)
    for said, model in zip(far.groups(), ("tiny-griffin", "tiny-jamba"), strict=True):
        assert int(said) == pytest.approx(ratio[f"{model} nf4 in fp32"], rel=0.02)  # two digits
    wide = "random jamba 1024"
    of = numbers(rows.loc[f"{wide} int8 in fp32", "KL"])[0]
    of /= numbers(rows.loc[f"{wide} bf16", "KL"])[0]
    assert f"int8 in fp32 lies {of:.1f} times as far from fp32 as bf16 does" in words
    assert ends(f"{wide} int8 in fp32")[0] < ends(f"{wide} bf16")[1]  # "the intervals overlap"


def test_twins_are_said_as_their_tables_have_them():
    words = page("twins")
    ways = table("twins", "ways").set_index("accuracy at the last step, seeds 0, 1, 2")
    long, free = (numbers(ways.loc[t, "whole"]) for t in ("long-start hybrid", "attention-free"))
    cut = {c: numbers(ways.loc["long-start hybrid", c]) for c in ways.columns[1:]}
    attention, recurrences = (sum(x) / 3 for x in cut.values())
    assert (
        f"costs more ({sum(long) / 3:.2f} to {recurrences:.2f}) than cutting attention "
        f"(to {attention:.2f})" in words
    )
    assert f"gets to {min(free):.2f} to {max(free):.2f} and has" in words
    kept = table("twins", "kept")
    of = kept[kept["layer"] == "0"].set_index(kept.columns[0])["value of the key"]
    hybrid, alone, began_long = (
        numbers(of[t]) for t in ("hybrid", "attention-free", "long-start hybrid")
    )
    assert (
        f"{min(hybrid):.2f} to {max(hybrid):.2f} against {min(alone):.2f} to {max(alone):.2f}"
        in words
        and max(hybrid) < min(alone)
    )
    assert f"holds more ({min(began_long):.2f} to {max(began_long):.2f})" in words


def test_needles_outside_the_window_are_said_as_their_tables_have_them():
    words = page("outside_window")
    found = table("outside_window", "griffin").set_index("window in prefill / generation")
    off = found["off / off"]
    far = {row.split()[0]: numbers(cell)[0] for row, cell in off.items()}
    generation = {row.split()[0]: numbers(c)[0] for row, c in found["on / off"].items()}
    assert far["316"] == far["388"] == 100 and "comes back that is 316 or 388 tokens away" in words
    assert far["508"] == generation["508"]
    assert f"{far['508']:.0f}% at 508, {generation['1,020']:.0f}% at 1,020" in words
    relay = table("outside_window", "relay")
    relay = relay.set_index(relay.columns[0])
    cell = numbers(relay.loc["edges from the fact cut: attention 2", "beyond 2"])[0]
    whole = numbers(relay.loc["nothing cut", "beyond 2"])
    assert f"cut in layer 2: {cell:.0f} of {whole[0]:.0f})" in words
    prefill = relay.loc["window off in prefill alone"]
    near = numbers(relay.loc["nothing cut", "1 to 2 windows back"])
    less = [a - b for a, b in zip(near, numbers(prefill["1 to 2 windows back"]), strict=True)]
    more = [b - a for a, b in zip(whole, numbers(prefill["beyond 2"]), strict=True)]
    assert f"by {less[0]:.0f} and {less[1]:.0f} points) or leaves it as it is" in words
    assert f"it adds {more[0]:.0f}, {more[1]:.0f} and {more[2]:.0f} points" in words
