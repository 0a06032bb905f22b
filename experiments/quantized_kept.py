"""The figures of retrieval and time on the page on quantized weights, and its table of times.

Part of `python -m experiments.quantized_difference`; kept by

    python -m experiments.pages keep quantized results/quantized/pages --command "..." --commit ...
"""

from __future__ import annotations

import pandas as pd

from experiments.pages.results import kept

GRIFFIN = "random griffin 1024"


def settings(retrieval: list[pd.DataFrame], times: list[pd.DataFrame]) -> pd.DataFrame:
    """Return a row for each model and variant, `setting`: retrieval, or times.

    `accuracy`, `low` and `high`; `other_output`, the share of prompts for which the generated text
    differs from fp32's; the seconds and ratios of `times`.
    """
    asked = pd.concat(retrieval)
    asked = asked.assign(other_output=1 - asked["same_output"])
    asked = asked[["model", "variant", "n", "accuracy", "low", "high", "other_output"]]
    both = pd.concat([asked, *times], ignore_index=True)
    both.insert(0, "setting", both["model"] + " " + both["variant"])
    return both.drop(columns=["model", "variant"])


def times(name: str) -> str:
    """Return seconds and ratios of a prefill and a step on the random model of Griffin's layers."""
    table = kept(name).table
    columns = ["prefill_s", "prefill/fp32", "prefill/bf16", "step_s", "step/fp32", "step/bf16"]
    lines = [
        "| variant | prefill of 64, s | over fp32 | over bf16 | step, s | over fp32 | over bf16 |",
        "|---" + "|--:" * 6 + "|",
    ]
    for _, row in table[table["setting"].str.startswith(GRIFFIN)].iterrows():
        cells = " | ".join(f"{row[c]:.2g}" for c in columns)
        lines.append(f"| {row['setting'].removeprefix(GRIFFIN).strip()} | {cells} |")
    return "\n".join(lines)
