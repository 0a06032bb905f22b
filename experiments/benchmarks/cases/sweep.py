"""The needle sweep, against one prompt and one setting at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from experiments.benchmarks.bars import HF
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.models import rg_mid
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import interleaved
from hooked_hybrid import HookedHybrid, interventions
from hooked_hybrid.niah.lengths import longest_prompt
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Prompt, default_depths, grid
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from hooked_hybrid.presets.packaged import packaged_models

N_NEW, N_DEPTHS, N_SETTINGS = 40, 10, 11


def niah_sweep(options: Options) -> Iterator[Measurement]:
    """Measure a cell, a prompt under one setting, in a sweep of 10 depths and 11 settings.

    The peer is `transformers`, greedy, with its own prefill for every cell and no intervention
    (which would only cost it time); it decodes as many tokens as the sweep did. All its cells of a
    length cost the same, so only a few are timed.
    """
    for name in options.models:
        model, hf = contestants(name)
        usual = [512, 4096] if name == "mid" else [longest_prompt(model.cfg)]
        for length in options.sizes(usual, [128]):
            yield _measured(name, model, hf, length, options)


def _measured(
    name: str, model: HookedHybrid, hf: Any, length: int, options: Options
) -> Measurement:
    n_depths = 2 if options.quick else N_DEPTHS
    n_new = options.size(N_NEW, 4)
    prompts = grid(model, [PAPER], [length], default_depths(n_depths))
    settings = eleven_settings(model)

    def sweep(of: list[Prompt]) -> Any:
        return niah(model, of, settings, max_new_tokens=n_new, verbose=False)

    table = sweep(prompts[:1])
    each = [int(n) for n in table["n_new_tokens"][:2]]

    def one_by_one() -> None:
        for n, prompt in zip(each, prompts, strict=False):
            tokens = torch.tensor([prompt.tokens])
            hf.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    works = {OURS: lambda: sweep(prompts), HF: one_by_one}
    what = f"{name}, {length} tokens, a cell"
    rounds = options.n_rounds(2 if length > 2048 else 3)
    seconds = interleaved(works, rounds, f"niah-sweep {what}")
    n_cells = {OURS: n_depths * len(settings), HF: len(each)}
    values = {who: [s / n_cells[who] for s in them] for who, them in seconds.items()}
    note = f"{n_depths} depths, {len(settings)} settings, {max(each)} tokens, generation only"
    return Measurement("niah-sweep", what, values, note=note)


def eleven_settings(model: HookedHybrid) -> list[Setting]:
    """Return the top-k settings of both scores, and as many random ones as make eleven."""
    n_heads = max(layer.attention.n_heads for layer in model.cfg.layers if layer.attention)
    ks = range(n_heads + 1)
    settings = []
    for score in ("entropy", "l2"):
        for setting in top_k_settings(ks, ["generation"], score):
            settings.append(_renamed(setting, f"{setting.name} {score}"))
    for seed in range(max(0, N_SETTINGS - len(settings))):
        hooks = tuple(interventions.keep_top_heads(2, interventions.random_score(seed)))
        settings.append(Setting(f"random {seed}", generation=hooks, spec={"seed": seed}))
    return settings[:N_SETTINGS]


def _renamed(setting: Setting, name: str) -> Setting:
    return Setting(name, setting.prefill, setting.generation, setting.spec, setting.per_row)


@cache
def contestants(name: str) -> tuple[HookedHybrid, Any]:
    """Return our model, with a tokenizer, and the peer; `name` is "mid" or a packaged model."""
    if name == "mid":
        family, tiny = rg_mid(), HookedHybrid.from_pretrained("tiny-griffin")
        family.ours.tokenizer = tiny.tokenizer  # its words are the first of the vocabulary
        return family.ours, family.hf
    from transformers import AutoModelForCausalLM  # noqa: TID251

    hf = AutoModelForCausalLM.from_pretrained(packaged_models()[name]).float().eval()
    hf.generation_config.eos_token_id = None
    return HookedHybrid.from_pretrained(name, dtype=torch.float32), hf
