"""Intact checkpoints to damage: every supported layout, small, of both families."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.presets import configs as presets
from hooked_hybrid.presets.packaged import packaged_models
from weights_conversion import google
from weights_conversion.rules import revert

LARGE_WIDTH = 640


@dataclass(frozen=True)
class Base:
    """An intact checkpoint: the argument of `from_pretrained`, and the dtype it is stored in."""

    name: str
    folder: Path
    dtype: torch.dtype


def make_bases(folder: Path) -> list[Base]:
    """Write every base below a folder and return them.

    The packaged models, sharded saves of a random Griffin and a random Jamba with their tokenizer,
    Google's `.pt` in both of torch's formats, and a model of 40 MB, large enough to show memory.
    """
    bases = []
    for name, packaged in packaged_models().items():
        shutil.copytree(packaged, folder / name, ignore=shutil.ignore_patterns("*.png", "*.md"))
        bases.append(Base(name, folder / name, torch.bfloat16))
    tokenizer = next(iter(packaged_models().values()))
    small = {
        "griffin-sharded": presets.griffin("RRA", d_model=32, d_vocab=583, n_heads=4, n_keys=16),
        "jamba-sharded": presets.jamba("MAM", d_model=32, d_vocab=583, n_heads=4),
    }
    for name, cfg in small.items():
        _random_model(cfg).save_pretrained(folder / name, max_shard_size=60_000)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder / name)
    griffin = _random_model(small["griffin-sharded"])
    for name, is_zip in (("google", True), ("google-old-format", False)):
        (folder / name).mkdir()
        tensors = dict(revert(google.rules(griffin.cfg), griffin.state_dict()))
        torch.save(
            {n: t.contiguous().clone() for n, t in tensors.items()},
            folder / name / "2b.pt",
            _use_new_zipfile_serialization=is_zip,
        )
    width = presets.griffin("RA", d_model=LARGE_WIDTH, d_vocab=583, n_heads=4, n_keys=16)
    _random_model(width).save_pretrained(folder / "large")
    made = (*small, "google", "google-old-format", "large")
    return bases + [Base(name, folder / name, torch.float32) for name in made]


def _random_model(cfg: HybridConfig) -> HookedHybrid:
    """Return a model whose random weights are equal in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HookedHybrid(cfg)
