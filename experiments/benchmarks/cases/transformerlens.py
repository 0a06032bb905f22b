"""The same models through TransformerLens's bridge, if it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.models import Family, jamba_peer, random_tokens, rg_peer
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import Work, check_equal, interleaved
from hooked_hybrid import HookedHybrid
from hooked_hybrid.presets.packaged import packaged_models

LENS = "TransformerLens"
HOW = (
    "TransformerLens is not installed. In an environment of its own: python -m venv .venv-lens && "
    '.venv-lens/bin/pip install -e ".[test]" "transformer-lens>=4.3,<5" && '
    ".venv-lens/bin/python -m experiments.benchmarks --only transformerlens"
)


class NotInstalledError(Exception):
    """A peer that is not part of the project's own environment is not installed."""


def transformerlens(options: Options) -> Iterator[Measurement]:
    """Measure a forward with logits: plain, with the residual stream kept, with everything kept.

    The bridge runs transformers' modules with eager attention, as its hooks need.

    Raises:
        NotInstalledError: the message says how to install it.
    """
    if importlib.util.find_spec("transformer_lens") is None:
        raise NotInstalledError(HOW)
    tokens = random_tokens(options.size(1024, 64))
    for name, make, tokenizer in (
        ("Jamba", jamba_peer, "tiny-jamba"),
        ("RG", rg_peer, "tiny-griffin"),
    ):
        hf = make()
        ours = HookedHybrid.from_hf(hf)
        yield from _measured(Family(name, ours, bridge(hf, tokenizer)), tokens, options)


def bridge(hf: Any, tokenizer: str) -> Any:
    """Return TransformerLens's bridge of a transformers model, which it changes."""
    from transformers import AutoTokenizer  # noqa: TID251

    folder = str(packaged_models()[tokenizer])
    hf.config.architectures = [type(hf).__name__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
        return lens.boot_transformers(
            folder,
            hf_model=hf,
            dtype=torch.float32,
            device="cpu",
            tokenizer=AutoTokenizer.from_pretrained(folder),
        )


def _measured(family: Family, tokens: Tensor, options: Options) -> Iterator[Measurement]:
    n_layers = family.ours.cfg.n_layers
    resid = [f"blocks.{i}.hook_resid_post" for i in range(n_layers)]
    kinds: dict[str, Callable[[Any], Work]] = {
        "plain": lambda model: partial(model, tokens),
        "residual stream kept": lambda model: partial(_kept, model, tokens, resid),
        "everything kept": lambda model: partial(_kept, model, tokens, None),
    }
    for what, work in kinds.items():
        works = {OURS: work(family.ours), LENS: work(family.hf)}
        what = f"{family.name}, {tokens.shape[1]} tokens, {what}"
        values = interleaved(works, options.n_rounds(5), f"transformerlens {what}", check_equal)
        note = "forwards with all logits"
        if "everything" in what:
            note += f"; {_contents(family, tokens)}, each its own names"
        yield Measurement("transformerlens", what, values, note=note)


def _kept(model: Any, tokens: Tensor, names: list[str] | None) -> Tensor:
    """Return the logits of a forward that keeps values by name, or everything."""
    logits, _ = model.run_with_cache(tokens, names_filter=names)
    return logits


def _contents(family: Family, tokens: Tensor) -> str:
    """Return the number and size of the values that each keeps in a full cache."""
    said = []
    for who, model in ((OURS, family.ours), (LENS, family.hf)):
        _, cache = model.run_with_cache(tokens, names_filter=None)
        mb = sum(value.nbytes for value in cache.values() if isinstance(value, Tensor)) / 1e6
        said.append(f"{who} keeps {len(cache)} values, {mb:.0f} MB")
    return ", ".join(said)
