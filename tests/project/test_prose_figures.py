"""Every figure of a page's sentences is written by its command, or held here, or known."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from experiments.pages.figures import figure_of
from experiments.pages.results import DOCS, kept
from experiments.pages.writing import BLOCK
from experiments.twins.models import TASK, configs, n_parameters
from experiments.window_relay import case
from hooked_hybrid.accounting.configs import PUBLISHED
from hooked_hybrid.accounting.flops import recurrence_over_attention
from hooked_hybrid.accounting.parameters import count_parameters
from hooked_hybrid.runs.intervals import SHARE, mean_interval
from tests.project.prose import Words, page
from tests.project.test_how_to import OTHERS


def table(name: str, what: str) -> pd.DataFrame:
    """Return a marked table of a page; an empty first cell is that of the row above."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    (body,) = (m["body"] for m in BLOCK.finditer(text) if m["what"] in (f"elsewhere {what}", what))
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


def where_recall_lives(words: Words) -> None:
    """Sentences of the map."""
    cells = table("where_recall_lives", "map")
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
    assert not (never["lean"] != "not learned").any() and "no cell exceeds 80%" in words
    from_the_start = cells[(start == 0) & ((size == 64) | (facts == 8))]
    assert f"the same model reaches {spread(from_the_start['whole'])}% with attention" in words


def quantized(words: Words) -> None:
    """Sentences of the differences, of retrieval."""
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
    assert "int8 in fp32 changes the distribution less (KL) than bf16 does" in words
    assert "It *lowers* the loss of this text on both" in words
    ratio = {
        key: numbers(rows.loc[key, "KL"])[0] / numbers(rows.loc[f"{key.split()[0]} bf16", "KL"])[0]
        for key in rows.index
        if key.startswith("tiny")
    }
    griffin, jamba = (ratio[f"{m} int8 in bf16"] for m in ("tiny-griffin", "tiny-jamba"))
    assert f"is {griffin:.1f} and {jamba:.1f} times as far from fp32 as bf16 is" in words
    far = re.search(r"NF4 is (\d+) and (\d+) times as far", words.text)
    assert far and far[0] in words
    for said, model in zip(far.groups(), ("tiny-griffin", "tiny-jamba"), strict=True):
        assert int(said) == pytest.approx(ratio[f"{model} nf4 in fp32"], rel=0.02)  # two digits
    wide = "random jamba 1024"
    of = numbers(rows.loc[f"{wide} int8 in fp32", "KL"])[0]
    of /= numbers(rows.loc[f"{wide} bf16", "KL"])[0]
    assert f"int8 in fp32 is {of:.1f} times as far from fp32 as bf16 is" in words
    assert ends(f"{wide} int8 in fp32")[0] < ends(f"{wide} bf16")[1]  # "the intervals overlap"
    retrieved = kept("quantized").table.dropna(subset="accuracy").set_index("setting")
    assert "in every variant" in words and set(retrieved["n"]) == {124}
    assert "two depths: 124 prompts a model" in words
    for model in ("tiny-griffin", "tiny-jamba"):
        assert retrieved[retrieved.index.str.startswith(model)]["accuracy"].nunique() == 1


def twins(words: Words) -> None:
    """Sentences of the ways and of the probes."""
    ways = table("twins", "ways twins").set_index("accuracy at the last step, seeds 0, 1, 2")
    long, free = (numbers(ways.loc[t, "whole"]) for t in ("long-start hybrid", "attention-free"))
    cut = {c: numbers(ways.loc["long-start hybrid", c]) for c in ways.columns[1:]}
    attention, recurrences = (sum(x) / 3 for x in cut.values())
    assert (
        f"costs more ({sum(long) / 3:.2f} to {recurrences:.2f}) than cutting attention "
        f"(to {attention:.2f})" in words
    )
    assert f"gets to {min(free):.2f} to {max(free):.2f} and has" in words
    probed = table("twins", "probed twins")
    of = probed[probed["layer"] == "0"].set_index(probed.columns[0])["value of the key"]
    hybrid, alone, began_long = (
        numbers(of[t]) for t in ("hybrid", "attention-free", "long-start hybrid")
    )
    assert (
        f"{min(hybrid):.2f} to {max(hybrid):.2f} against {min(alone):.2f} to {max(alone):.2f}"
        in words
        and max(hybrid) < min(alone)
    )
    assert f"hybrid's layer 0 ({min(began_long):.2f} to {max(began_long):.2f})" in words
    rows = kept("twins").table.set_index("setting")
    ends = rows[~rows.index.str.contains("step")]
    controls = ["control 0", "control 1", "control 2"]
    spreads = []
    for measure in ("value", "presence"):
        of = ends[ends.index.str.fullmatch(rf"{measure} (\d|all) .*")][controls].to_numpy()
        spreads.append(f"{of.min():.2f} to {of.max():.2f}")
    assert f"Shuffled: {spreads[0]}, and {spreads[1]}." in words
    harm = [
        rows.loc[f"accuracy whole {twin}", f"seed {s}"]
        - rows.loc[f"crossing {way} {twin}", f"control {s}"]
        for twin in ("hybrid", "long-start hybrid", "attention-free", "attention-only")
        for way in ("attention", "recurrences")
        if f"crossing {way} {twin}" in rows.index
        for s in range(3)
    ]
    assert f"leaves each model within {100 * max(harm):.0f} points of whole" in words
    began = rows[rows.index.str.contains("median horizon . long-start hybrid, step 0")]
    span = f"{began['least'].min():.0f} to {began['most'].max():.0f} tokens"
    assert f"1% is left after {span}." in words
    short = rows[rows.index.str.fullmatch(r"median horizon . (hybrid|attention-free), step 0")]
    span = f"{short['least'].min():.0f} to {short['most'].max():.0f} tokens"
    assert f"1% of a write is left after {span} (a layer's median channel)" in words
    assert f"models of {round(n_parameters(configs(TASK)['hybrid']), -3):,} parameters" in words
    half = {n: 1.96 * (0.5 * 0.5 / n) ** 0.5 for n in (4 * 256, 2400)}
    assert f"over 256 sequences) is about {half[1024]:.2f}" in words
    assert f"(some 2,400 facts) {half[2400]:.2f}" in words


def outside_window(words: Words) -> None:
    """Sentences of the two tables."""
    found = table("outside_window", "griffin").set_index("window in prefill / generation")
    off = found["off / off"]
    far = {row.split()[0]: numbers(cell)[0] for row, cell in off.items()}
    generation = {row.split()[0]: numbers(c)[0] for row, c in found["on / off"].items()}
    assert far["316"] == far["388"] == 100 and "every needle 316 or 388 tokens away is" in words
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
    assert f"by {less[0]:.0f} and {less[1]:.0f} points) or is unchanged" in words
    assert f"it adds {more[0]:.0f}, {more[1]:.0f} and {more[2]:.0f} points" in words
    inside, one, two = (Counter(case(400).bin)[b] for b in ("inside", "1 to 2 windows", "beyond 2"))
    assert f"{inside}, {one} and {two} sequences" in words
    good = []
    for n in (inside, one, two):
        right = [float(i < 0.8 * n) for i in range(n)]
        good.append(100 * max(abs(end - 0.8) for end in mean_interval(right, range(n), SHARE)))
    assert (
        f"80 has a 95% interval of {good[0]:.0f}, {good[1]:.0f} and {good[2]:.0f} points" in words
    )
    assert f"fact is up to {int(case(400).distance.max())} tokens" in words
    low, high = alike(31)
    assert f"up to {low}% of all needles may be; if all are, at least {high}% are (95%)" in words


def alike(n: int) -> tuple[str, str]:
    """Return what n needles that are all alike leave open of others, and bound of their kind."""
    low = mean_interval([1.0] * n, range(n), SHARE)[0]
    high = mean_interval([0.0] * n, range(n), SHARE)[1]
    assert low + high == pytest.approx(1)
    return f"{100 * high:.1f}", f"{100 * low:.1f}"


def findings(words: Words) -> None:
    """Sentences of four needles, and of what is counted from the published configs."""
    open_, bound = alike(4)
    assert f"retrieved, at least {bound}% of all needles of the form are (95%)" in words
    assert f"none of four is, at most {open_}% are" in words
    all_right = [figure_of(f"griffin-static@{s}").value == 1 for s in (
        "retrieval, overall 5", "copying, overall 5", "run time, entropy 10",
        "retrieval, overall 4", "copying, overall 4", "run time, entropy 8",
    )]  # fmt: skip
    assert all_right == [True] * 3 + [False] * 3
    assert "either choice from all heads needs 5 where the choice at run time" in words
    assert "with as many in every layer, needs 10." in words
    card = files("hooked_hybrid.presets") / "tiny-griffin" / "README.md"
    made = card.read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| tiny-griffin-0 \|(.*)\|$", made, re.MULTILINE)
    beyond = row.split("|")[3].strip()
    assert f"Beyond the window nothing is retrieved: {beyond}% on the" in words
    assert "of the 1,830 of the card" in words and "of 1,830 and 390 prompts" in made
    cfg = PUBLISHED["recurrentgemma-2b"]
    share = count_parameters(cfg).table().set_index("kind")["share"]
    mlp, recurrent, attention = (
        f"{100 * share[kind]:.1f}%" for kind in ("MLP", "recurrent block", "attention")
    )
    assert f"(once: MLP {mlp}, recurrent {recurrent}, attention {attention})" in words
    ratio = {n: recurrence_over_attention(cfg, n) for n in (1, 521, 522, 8192)}
    assert ratio[521].all_layers > 3 > ratio[522].all_layers
    kinds = f"all {len(cfg.recurrent_layers)} recurrent against all {len(cfg.attention_layers)}"
    assert kinds in words
    assert f"in prompts up to 521 tokens ({ratio[8192].all_layers:.1f} at 8,192)" in words
    most = max(recurrence_over_attention(cfg, n).a_layer for n in range(1, 8193, 64))
    assert f"({most:.2f} at most, {ratio[8192].a_layer:.2f} at 8,192)" in words


def beside_other_results(words: Words) -> None:
    """Sentences of six needles, and of the windows in training."""
    open_, bound = alike(6)
    assert f"if all are at 100% the interval is [{bound}, 100]" in words
    assert f"if all are at 0% [0, {open_}]" in words


def next_questions(words: Words) -> None:
    """Sentences of eight and of six needles."""
    assert f"if 8 needles are all alike, up to {alike(8)[0]}% of others may differ" in words
    assert f"if 6 are, up to {alike(6)[0]}%" in words


def findings_tables(words: Words) -> None:
    """Sentences of four needles."""
    open_, bound = alike(4)
    assert f"four that are all alike leave open what {float(open_):.0f}% of others do" in words
    assert f"100 comes with [{bound}, 100.0]" in words


def experiments(words: Words) -> None:
    """Sentences of the packaged models' cards, of seven needles, and of quantised bytes."""
    rows = {}
    for model in ("tiny-griffin", "tiny-jamba"):
        card = (files("hooked_hybrid.presets") / model / "README.md").read_text(encoding="utf-8")
        for line in re.findall(r"^\|(.*)\|$", card, re.MULTILINE):
            run, *cells = (cell.strip() for cell in line.split("|"))
            rows[run if run.startswith("tiny") else f"{model} {run}"] = cells
    griffin, jamba = rows["tiny-griffin-0"], rows["tiny-jamba-0"]
    all_of_it, part = rows["tiny-jamba 512"][1], rows["tiny-griffin 512"][1]
    assert f"tiny-jamba {float(all_of_it):.0f}% of them" in words
    assert f"whose window is 256, {part}%" in words
    without = max(float(cell) for row in (griffin, jamba) for cell in row[4:6])
    assert f"Without attention neither retrieves ({without}% at most)" in words
    assert f"tiny-griffin keeps {griffin[6]}% and tiny-jamba {jamba[6]}%" in words
    others = rows["tiny-griffin-1"][6], rows["tiny-jamba-1"][6]
    assert f"with another seed {others[0]} and {others[1]}%" in words
    assert f"Seven bound it at {100 * (1 - 0.05 ** (1 / 7)):.0f}% (one-sided)" in words
    assert 1 - 0.05 ** (1 / 61) < 0.05 < 1 - 0.05 ** (1 / 58)
    assert '"at most 5%" is also tested on 61 needles' in words
    sizes = table("quantized", "bytes")
    (row,) = sizes[sizes[sizes.columns[0]] == "Jamba-Mini"].to_dict("records")
    assert f"{float(row['int8']):.0f} GB instead of {float(row['bf16']):.0f}" in words


HELD: dict[str, Callable[[Words], None]] = {
    f.__name__: f
    for f in (
        where_recall_lives, quantized, twins, outside_window, findings, beside_other_results,
        next_questions, findings_tables, experiments,
    )
}  # fmt: skip
KNOWN = tomllib.loads((Path(__file__).parent / "known_figures.toml").read_text(encoding="utf-8"))
"""Of each page phrases whose figures nothing here measures: chosen, published, or a bound."""
ELSEWHERE = {
    "hooks": "written by docs/generate_hooks.py",
    "benchmarks": "written by python -m experiments.benchmarks",
}
GUIDES = {path.stem for path in OTHERS if path.parent == DOCS}
"""Pages that teach, whose code and its output the tests run."""
PAGES = sorted({path.stem for path in DOCS.glob("*.md")} - set(ELSEWHERE) - GUIDES)


@pytest.mark.parametrize("name", HELD)
def test_sentences_say_what_their_tables_and_results_hold(name: str):
    HELD[name](page(name))


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_of_a_page_is_written_by_its_command_or_held_by_a_test_or_known(name: str):
    words = page(name)
    if name in HELD:
        HELD[name](words)
    phrases = [phrase for kind in KNOWN.get(name, {}).values() for phrase in kind]
    assert [phrase for phrase in phrases if phrase not in words.text] == []
    assert words.open_figures(phrases) == [], "give it a mark, a test, or a phrase and its kind"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_page_that_is_left_out_is_written_by_a_program_whole(name: str):
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    program = ELSEWHERE[name].removeprefix("written by ")
    assert re.search(rf"[Ww]ritten by `(python )?{re.escape(program)}`", text)


def test_a_figure_that_nothing_holds_is_found():
    words = Words(
        "It gains 40% in 7 of 9 cases, 3.5 [1, 4]<!--=a@b--> by `8`, in layers 2 and 3.\n\n"
        "| 5 |\n|---|\n| 6 |\n\n```\n10\n```\n\n"
        "- Once 11.\n  (Measured once, at commit 1a2b3c4 of 2026-01-01; not run since.)\n"
        "- Twice 1,200 and -2e-5.\n\n"
        "<!-- measured: elsewhere x | y | 1a2b3c4 -->\n12\n<!-- end -->\n"
    )
    assert "It gains 40% in" in words and "It gains 41% in" not in words
    assert [found.figure for found in words.open_figures([])] == ["7", "9", "1,200", "-2e-5"]
    assert [found.figure for found in words.open_figures(["7 of 9", "Twice 1,200"])] == ["-2e-5"]


def test_pages_of_known_figures_exist_and_their_kinds_have_a_meaning():
    assert set(KNOWN) <= set(PAGES)
    assert {kind for page_ in KNOWN.values() for kind in page_} <= {
        "chosen",
        "published",
        "recorded",
        "bound",
    }
