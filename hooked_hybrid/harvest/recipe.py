"""What the bytes of a harvest depend on: kept in its folder, so that no two harvests are mixed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hooked_hybrid.evaluation.identity import identity
from hooked_hybrid.harvest.contexts import Plan
from hooked_hybrid.harvest.documents import Documents
from hooked_hybrid.harvest.shards import FORMAT, RECIPE, shard_paths, short_hash, write_json
from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.niah.settings import described
from hooked_hybrid.niah.sweep import fingerprint


@dataclass(frozen=True)
class Recipe:
    """What decides which bytes a harvest writes.

    `bos` is what is put in front of each context, `left_out` the tokens of which nothing is kept.
    `documents`, `encoding`, `model` and `interventions` are hashes.
    """

    names: list[str]
    dtype: str
    context_length: int
    batch_size: int
    shard_tokens: int
    bos: int | None
    left_out: list[int]
    seed: int | None
    documents: str
    encoding: str
    model: dict[str, Any]
    interventions: str
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """A hash of all of it."""
        return short_hash(asdict(self))

    def plan(self, documents: Documents) -> Plan:
        """Return which tokens are read where."""
        return Plan(
            documents,
            self.context_length,
            self.shard_tokens,
            self.batch_size * self.context_length,
            self.bos,
            tuple(self.left_out),
            self.seed,
        )

    def keep(self, folder: Path) -> None:
        """Write it to a folder that has none, or no shard yet; else compare.

        Raises:
            ValueError: the folder holds the shards of another recipe, or of a newer version.
        """
        path, now = folder / RECIPE, asdict(self)
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): give another folder") from error
        if before == now:
            return
        if not before or not shard_paths(folder):
            write_json(path, now)
            return
        if before.get("format", 0) > FORMAT:
            raise ValueError(f"{path} was written by a newer version of this library")
        raise ValueError(
            f"{folder} holds another harvest: {', '.join(changed)} differ; give another folder, "
            "nothing is overwritten"
        )


def model_identity(model: HookedHybrid) -> dict[str, Any]:
    """Return what tells models apart: hashes of weights and config, and the hooks on them."""
    return {
        "weights": fingerprint(model),
        "config": short_hash(repr(replace(model.cfg, model_name="", extra={}))),
        "hooks": [[str(h.point.name), described(h.user_hook)] for h in model.list_hooks()],
        "dtype": str(model.dtype),
    }


def encoding_identity(model: HookedHybrid, is_text: bool, bos: int | None) -> str:
    """Return what tells apart how documents were made tokens."""
    reads = identity(model)["tokenizer"] if is_text else "tokens"
    return f"{reads}, BOS {bos}"


def interventions_identity(interventions: Sequence[HookSpec]) -> str:
    """Return a hash of hooks and of where they go."""
    return described([list(spec) for spec in interventions])


def special_tokens(model: HookedHybrid) -> list[int]:
    """Return the ids of BOS, EOS and padding, as the tokenizer and the config name them."""
    cfg = model.cfg
    found = [cfg.bos_token_id, cfg.pad_token_id, *cfg.eos_token_ids]
    if model.tokenizer is not None:
        found += [model.text.bos, model.text.pad, *model.text.eos]
    return sorted({token for token in found if token is not None})
