"""One cell of a sweep: a prompt, a setting and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hooked_hybrid.niah.needles import AnyNeedle
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.scores import FULL, binary, graded, released
from hooked_hybrid.niah.settings.setting import Setting

if TYPE_CHECKING:
    import pandas as pd


def cell_of(
    prompt: Prompt,
    setting: Setting,
    output: str,
    n_new: int,
    margin: float,
    seconds: float,
    window: int | None,
) -> dict[str, Any]:
    """Return a row of `hooked_hybrid.niah.store.COLUMNS`.

    Args:
        prompt, setting: of the cell.
        output: the generated text, of `n_new` tokens.
        margin: smallest difference of the two largest logits at any step.
        seconds: duration of the cell.
        window: keys that the last prompt token sees; None for all.
    """
    needle, spans = prompt.needle, prompt.needle_spans
    seen = window is None or (bool(spans) and spans[-1][0] >= prompt.length - window)
    score = graded(output, needle) if needle else None
    return {
        "prompt_id": prompt.id,
        "setting": setting.name,
        "stage": setting.spec.get("stage", "both" if setting.prefill else "generation"),
        "k": setting.spec.get("k"),
        "needle_id": prompt.needle_id,
        "city": needle.city if needle else None,
        "template": prompt.template,
        "read_twice": prompt.read_twice,
        "n_distractors": prompt.n_distractors,
        "length": prompt.length,
        "depth": prompt.depth,
        "needle_start": spans[0][0] if spans else None,
        "needle_stop": spans[0][1] if spans else None,
        "in_window": seen if needle else None,
        "output": output,
        "graded": score,
        "accuracy": None if score is None else score / FULL,
        "binary": binary(output, needle) if needle else None,
        "released": released(output, needle) if needle else None,
        "n_new_tokens": n_new,
        "min_margin": margin,
        "seconds": seconds,
        "real_depth": prompt.real_depth,
        "placed_between": prompt.placed_between,
    }


def scored(
    cells: Iterable[dict[str, Any]],
    prompts: Mapping[str, Prompt],
    score: Callable[[str, AnyNeedle], float] | None,
) -> list[dict[str, Any]]:
    """Return cells with the accuracy by a score; None leaves them as they are."""
    needles = {id: prompt.needle for id, prompt in prompts.items()}
    if score is None:
        return list(cells)
    return [
        {**cell, "accuracy": None if needle is None else score(cell["output"], needle)}
        for cell in cells
        for needle in [needles[cell["prompt_id"]]]
    ]


def with_places(table: pd.DataFrame, prompts: Iterable[Prompt]) -> pd.DataFrame:
    """Return a table with columns for the real place of needles, for a store without them."""
    unknown = table["placed_between"].isna()
    if not unknown.any():
        return table
    by_id = {prompt.id: prompt for prompt in prompts}
    found = [by_id[i] for i in table["prompt_id"]]
    real, placed = [p.real_depth for p in found], [p.placed_between for p in found]
    return table.assign(real_depth=real, placed_between=placed)
