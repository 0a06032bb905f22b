"""The sweeps shared by the papers' tables and figures: each is run once, in its own folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import manipulate_span
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.language import text_loss, texts_of
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.papers import (
    WHOLE,
    control_settings,
    heads_of,
    layer_settings,
    weight_matrix,
)
from hooked_hybrid.niah.settings.setting import Hooks, Setting, settings_identity, top_k_settings
from hooked_hybrid.niah.sweep import niah
from hooked_hybrid.outputs.foreign import LARGEST_RESULTS, read_json, require_plain_file
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.papers.recipe import PaperRecipe, prompts_of
from hooked_hybrid.papers.shares import few_heads
from hooked_hybrid.runs.identity.comparing import changes, refusal
from hooked_hybrid.runs.identity.model import model_identity
from hooked_hybrid.runs.identity.values import describe

if TYPE_CHECKING:
    import pandas as pd

    from hooked_hybrid.runs.ray_workers import RayWorkers

_CLEAR = 8
"""Most tokens of the template before the haystack, on which no control acts."""


@dataclass(frozen=True)
class Run:
    """A sweep: its settings, its part of the recipe's prompts, and whether text is read too.

    `read_twice`, `thinned` and `many` are those of `recipe.prompts_of`.
    """

    settings: Callable[[HookedHybrid, PaperRecipe], list[Setting]]
    read_twice: bool = False
    thinned: bool = False
    many: bool = False
    text: bool = False

    def prompts(
        self, model: HookedHybrid, recipe: PaperRecipe, documents: Sequence[str]
    ) -> dict[int, list[Prompt]]:
        """Return the prompts of each seed; see `recipe.prompts_of`."""
        return prompts_of(
            model,
            recipe,
            documents,
            read_twice=self.read_twice,
            thinned=self.thinned,
            many=self.many,
        )


def _top_k(model: HookedHybrid, recipe: PaperRecipe) -> list[Setting]:  # noqa: ARG001
    most = min(heads_of(model.cfg).values())
    return top_k_settings(
        range(most, -1, -1)
    )  # all heads first: the loss of text is compared with it


def _top_k_twice(model: HookedHybrid, recipe: PaperRecipe) -> list[Setting]:  # noqa: ARG001
    most = min(heads_of(model.cfg).values())
    return top_k_settings([most, *few_heads(most)])


def _controls(model: HookedHybrid, recipe: PaperRecipe) -> list[Setting]:
    most = min(heads_of(model.cfg).values())
    ks = sorted({k for k in (round(0.2 * most), (most + 1) // 2) if 0 < k < most})
    return control_settings(model.cfg, ks, recipe.n_draws)


def _elsewhere(model: HookedHybrid, recipe: PaperRecipe) -> list[Setting]:  # noqa: ARG001
    return [WHOLE, *elsewhere_settings()]


def _none(model: HookedHybrid, recipe: PaperRecipe) -> list[Setting]:  # noqa: ARG001
    return top_k_settings([min(heads_of(model.cfg).values()), 0], ["generation"])


RUNS: dict[str, Run] = {
    "top-k": Run(_top_k, text=True),
    "top-k-twice": Run(_top_k_twice, read_twice=True),
    "weights": Run(lambda *_: weight_matrix()),
    "layers": Run(lambda model, _: layer_settings(model.cfg), thinned=True, text=True),
    "controls": Run(_controls, thinned=True),
    "elsewhere": Run(_elsewhere, thinned=True),
    "top-k-many": Run(_none, many=True),
    "top-k-twice-many": Run(_none, read_twice=True, many=True),
    "weights-many": Run(lambda *_: weight_matrix(), many=True),
}
"""Every sweep by its name, which is that of its folder."""


def elsewhere_settings() -> list[Setting]:
    """Return omissions of weights as in `weight_matrix`, of other tokens than the needle's.

    As many tokens of haystack, next to the needle: the control of an effect of the needle.
    "Only" and "binary" silence all other tokens, so that they have no such control.
    """
    pairs = [("keep", "omit"), ("omit", "keep"), ("omit", "omit")]
    return [
        Setting(
            f"{prefill}-{generation}",
            _beside_needle(prefill),
            _beside_needle(generation),
            {
                "kind": "weights beside the needle",
                "prefill": prefill,
                "generation": generation,
                "stage": "generation" if prefill == "keep" else "both",
            },
        )
        for prefill, generation in pairs
    ]


def span_beside(prompt: Prompt) -> tuple[int, int]:
    """Return [start, stop) of as much haystack next to the needle: before it, or after it.

    Raises:
        ValueError: the prompt contains no needle.
    """
    if not prompt.needle_spans:
        raise ValueError(f"prompt {prompt.id} contains no needle, so that nothing is next to it")
    start, stop = prompt.needle_spans[0]
    n = stop - start
    return (start - n, start) if start - n >= _CLEAR else (stop, stop + n)


def _beside_needle(mode: str) -> Hooks:
    if mode == "keep":
        return ()

    def hooks(prompt: Prompt) -> Sequence[HookSpec]:
        return manipulate_span(mode, [span_beside(prompt)])  # type: ignore[arg-type]

    return hooks


def check(
    names: Sequence[str], model: HookedHybrid, recipe: PaperRecipe, documents: Sequence[str] = ()
) -> None:
    """Raise an error if a run lacks heads, or its prompts or texts are too short; run nothing.

    Raises:
        ValueError: a model without attention, prompts that cannot be made, texts too short.
    """
    for run in (RUNS[name] for name in dict.fromkeys(names)):
        run.settings(model, recipe)
        run.prompts(model, recipe, documents)
        if run.text:
            texts_of(model, max(recipe.lengths), recipe.n_texts, documents)


def perform(
    name: str,
    model: HookedHybrid,
    recipe: PaperRecipe,
    folder: Path,
    documents: Sequence[str] = (),
    *,
    workers: RayWorkers | None = None,
    verbose: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Return the cells of a run with their `seed`, and its losses of text where it has them.

    Cells in the folder are not run again; a stopped run is continued.

    Args:
        name: in `RUNS`.
        model: with a tokenizer.
        recipe: prompts, needles, seeds.
        folder: in which a folder of the run's name is made.
        documents: of haystack and texts; empty means generated.
        workers: that run the sweep and the texts instead of this process.
        verbose: show progress bars.

    Raises:
        ValueError: the folder contains another experiment, or prompts cannot be made.
        OSError: the results cannot be written.
    """
    run, own = RUNS[name], folder / name
    by_seed = run.prompts(model, recipe, documents)
    settings = run.settings(model, recipe)
    table = niah(
        model,
        [prompt for prompts in by_seed.values() for prompt in prompts],
        settings,
        out=own,
        resume=True,
        max_new_tokens=recipe.max_new_tokens,
        first_token_stage=recipe.first_token,
        workers=workers,
        verbose=verbose,
    )
    seed_of = {p.id: seed for seed, prompts in by_seed.items() for p in prompts}
    table["seed"] = table["prompt_id"].map(seed_of)
    losses = None
    if run.text:
        losses = text_losses(
            model, settings, recipe, own, documents, workers=workers, verbose=verbose
        )
    return table, losses


def text_losses(
    model: HookedHybrid,
    settings: Sequence[Setting],
    recipe: PaperRecipe,
    folder: Path,
    documents: Sequence[str] = (),
    *,
    workers: RayWorkers | None = None,
    verbose: bool = False,
) -> pd.DataFrame:
    """Return the losses of text in a folder, after measuring them if it has none.

    Raises:
        ValueError: the file is damaged, or of another model, hooks, recipe or documents.
    """
    import pandas as pd

    path, length = folder / "text_loss.csv", max(recipe.lengths)
    beside, said = path.with_suffix(".json"), _describe_losses(model, settings, recipe, documents)
    if not (path.exists() and beside.exists()):  # or without its experiment
        losses = text_loss(
            model, settings, length, recipe.n_texts, documents, workers=workers, verbose=verbose
        )
        with replacing(path) as temporary:
            losses.to_csv(temporary, index=False)
        with replacing(beside) as temporary:
            temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    before: dict[str, Any] = {}
    try:
        before = dict(read_json(beside))
        require_plain_file(path, LARGEST_RESULTS)
        losses = pd.read_csv(path)
        is_whole = list(losses["setting"]) == [s.name for s in settings] and _are_losses(losses)
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged: remove it, to have it made anew")
    if changed := changes(before, said):
        raise ValueError(refusal(path, "loss of text", changed))
    return losses


def _are_losses(table: pd.DataFrame) -> bool:
    """Return whether a table has the columns of `text_loss`, and numbers in them."""
    import numpy as np

    figures = ["loss", "low", "high", "more", "more_low", "more_high"]
    if list(table) != ["setting", *figures]:
        return False
    if not all(kind.kind in "if" for kind in table[figures].dtypes):
        return False
    return bool(np.isfinite(table[["loss", "more"]].to_numpy()).all())


def _describe_losses(
    model: HookedHybrid, settings: Sequence[Setting], recipe: PaperRecipe, documents: Sequence[str]
) -> dict[str, Any]:
    """Return what the loss of text depends on."""
    return {
        "identity": model_identity(model),
        "settings": settings_identity(model, settings),
        "length": max(recipe.lengths),
        "n_texts": recipe.n_texts,
        "documents": describe(list(documents))["hash"],
    }
