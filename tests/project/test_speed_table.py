"""The table of speeds in docs/speed.md says what the benchmarks recorded, misses included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDED = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
TABLE = {
    line.split(" | ")[0].strip("| "): line.split(" | ")[1:]
    for line in PAGE.split("| | ratio | aimed at |")[1].split("\n\n")[0].splitlines()
    if line.startswith("| ") and not line.startswith("|---")
}
ROWS = [
    ("RecurrentGemma prefill, 512", "rg-prefill", "512 tokens", "transformers", "1.29x"),
    ("RecurrentGemma prefill, 512", "rg-prefill", "512 tokens", "recurrentgemma", "1.19x*"),
    ("same, 4,096 tokens", "rg-prefill", "4096 tokens", "transformers", "1.64x"),
    ("same, 4,096 tokens", "rg-prefill", "4096 tokens", "recurrentgemma", "3.56x"),
    ("same, 4,096 tokens", "rg-prefill", "4096 tokens", "GEMM floor", "1.29x"),
    ("Jamba prefill, 2,048", "jamba-prefill", "2048 tokens", "transformers", "2.31x"),
    ("Jamba prefill, 2,048", "jamba-prefill", "2048 tokens", "GEMM floor", "1.36x"),
    ("decode, one row", "decode", "RG, one row", "transformers", "**1.26x**"),
    ("decode, one row", "decode", "RG, one row", "recurrentgemma", "1.68x"),
    ("Mamba scan", "mamba-scan", "8192 positions", "transformers", "**11.2x**"),
    ("Mamba scan", "mamba-scan", "4096 positions", "transformers", "9.3x"),
    ("Mamba scan", "mamba-scan", "2048 positions", "transformers", "8.4"),
    ("attention, 4,096", "attention", "4096 tokens, window 1024", "SDPA, full mask", "2.9x*"),
    ("`run_with_cache`", "run-with-cache", "everything, first time", "plain forward", "**1.51x**"),
    ("loading 1 GB", "loading", "1 GB, seconds", "read and copy", "1.24x*"),
    ("loading 1 GB", "loading", "100 MB, seconds", "read and copy", "**1.42x**"),
    ("peak of loading", "loading", "1 GB, peak", "weights and largest tensor", "0.86"),
    ("one state edit", "state-edit", "one position of 4096", "plain forward", "0.99x"),
    ("one state edit", "top-k", "2 of 4 heads, prefill of 4096", "plain forward", "1.09x"),
]


@pytest.mark.parametrize(
    ("row", "section", "what", "peer", "shown"), ROWS, ids=lambda value: str(value)
)
def test_a_ratio_of_the_page_is_the_recorded_one_with_its_mark(
    row: str, section: str, what: str, peer: str, shown: str
):
    """Bold is a miss, a star below the bar and held: by the recorded ratio and bar."""
    (values,) = [cells for name, cells in TABLE.items() if name.startswith(row)]
    assert shown in [value.strip(",;") for value in values[0].split()]
    part = RECORDED.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()]
    (found,) = [c for c in lines if c[0] == what and len(c) > 4 and c[2] == peer]
    ratio = float(found[4].split(" x ")[0])
    number = re.sub(r"[*x]", "", shown)
    assert f"{ratio:.{len(number.partition('.')[2])}f}" == number
    assert ("**missed**" in found) == shown.startswith("**")
    if bar := re.fullmatch(r"([≥≤]) ([\d.]+)", found[6]):
        is_below = ratio < float(bar[2]) if bar[1] == "≥" else ratio > float(bar[2])
        assert is_below == ("*" in shown)


def test_every_miss_that_was_recorded_stands_in_the_page():
    missed = RECORDED.count("**missed**")
    assert f"{missed} missed" in RECORDED
    assert sum(shown.startswith("**") for *_, shown in ROWS) == missed
    parts = {section: RECORDED.split(f"\n## {section}\n")[1] for _, section, *_ in ROWS}
    notes = "".join(part.split("\n## ")[0] for part in parts.values())
    commits = set(re.findall(r"rounds, ([0-9a-f]{7})\+?\.", notes))
    assert commits and all(commit in PAGE for commit in commits)
