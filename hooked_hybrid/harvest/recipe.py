"""The recipe of a harvest, on which its bytes depend; it is kept in the folder of the harvest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.harvest.contexts import PackingPlan
from hooked_hybrid.harvest.documents import Documents
from hooked_hybrid.harvest.shards import FORMAT, RECIPE, shard_paths, short_hash, write_json
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.outputs.foreign import LARGEST_RESULTS, one_line, read_json
from hooked_hybrid.runs.identity.comparing import changes, refusal
from hooked_hybrid.runs.identity.model import (
    identify,
    known_of,
    model_identity,
    without_tokenizer,
)
from hooked_hybrid.runs.identity.tokenizers import tokenizer_identity

_TOKENIZER = "tokenizer"
_NONE_BEFORE = hashlib.sha256(b"list()").hexdigest()[:16]
"""The entry of an older version for no interventions."""


@dataclass(frozen=True)
class HarvestRecipe:
    """Everything that the bytes of a harvest depend on.

    `bos` is what is put in front of each context, `left_out` the tokens of which nothing is kept.
    `documents` and `encoding` are hashes, `model` and `interventions` what tells them from others
    (older versions wrote a hash of these).
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
    interventions: list[dict[str, str]] | str
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """A hash of all of it."""
        return short_hash(asdict(self))

    def plan(self, documents: Documents) -> PackingPlan:
        """Return which tokens are read where."""
        return PackingPlan(
            documents,
            self.context_length,
            self.shard_tokens,
            self.batch_size * self.context_length,
            self.bos,
            tuple(self.left_out),
            self.seed,
        )

    def keep(self, folder: Path, cfg: HybridConfig) -> HarvestRecipe:
        """Write it to a folder that has none, or no shard yet; else compare.

        Args:
            folder: of the harvest.
            cfg: of the model.

        Returns:
            This one; or the same as an older version of this library wrote it, whose hash is in
            the shards that are there.

        Raises:
            ValueError: the folder holds the shards of another recipe, or of a newer version.
        """
        path, now = folder / RECIPE, asdict(self)
        try:
            before = read_json(path, LARGEST_RESULTS) if path.exists() else {}
            is_newer = before.get("format", 0) > FORMAT
            changed = [] if is_newer or not before else _changes(before, now, cfg)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({one_line(error)}): give another folder"
            ) from error
        if before == now:
            return self
        if not before or not shard_paths(folder):
            write_json(path, now)
            return self
        if is_newer:
            raise ValueError(f"{path} was written by a newer version of this library")
        if changed:
            raise ValueError(refusal(folder, "harvest", changed))
        return replace(self, model=before["model"], interventions=before["interventions"])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], cfg: HybridConfig) -> list[str]:
    """Return what differs between the recipe of a folder and that of now."""
    wanted = {"identity" if key == "model" else key: value for key, value in now.items()}
    if isinstance(before["model"].get("config"), str):
        return changes(_of_older(before, now, cfg), wanted)
    return changes(
        {"identity" if key == "model" else key: value for key, value in before.items()}, wanted
    )


def recipe_identity(model: HookedHybrid, interventions: Sequence[HookSpec]) -> dict[str, Any]:
    """Return what a harvest depends on of the model and of what acts meanwhile.

    Raises:
        UntoldError: a hook that holds something whose content cannot be identified.
    """
    known = known_of(model)
    return {
        "model": without_tokenizer(model_identity(model)),
        "interventions": [
            identify(f"fwd_hooks[{i}]", spec, known) for i, spec in enumerate(interventions)
        ],
    }


def encoding_identity(model: HookedHybrid, is_text: bool, bos: int | None) -> str:
    """Return what tells apart how documents were made tokens."""
    reads = "tokens"
    if is_text:
        reads = f"{_TOKENIZER} {short_hash(tokenizer_identity(model.text))}"
    return f"{reads}, BOS {bos}"


def is_recorded(encoding: str) -> bool:
    """Whether it says of texts by which tokenizer they were read, as older versions did not."""
    return encoding.startswith(("tokens,", _TOKENIZER))


def _of_older(before: Mapping[str, Any], now: Mapping[str, Any], cfg: HybridConfig) -> Any:
    """Return the recipe of an older version in the form of now, as far as it proves anything."""
    old, new = before["model"], now["model"]
    identity = {"weights": old["weights"], "dtype": old["dtype"], "changes": {}}
    identity["quantization"] = new["quantization"]  # it is in the hash of the weights
    if old["hooks"] == []:
        identity["hooks"] = []
    # Whether BOS is put in front is the recipe's own; the field of a config for it has changed.
    plain = replace(cfg, model_name="", extra={})
    same = [replace(plain, default_prepend_bos=b) for b in (cfg.default_prepend_bos, True, False)]
    if old["config"] in [short_hash(repr(one)) for one in same]:
        identity["config"] = new["config"]
    kept = {k: v for k, v in before.items() if k not in ("model", "interventions")}
    if before["interventions"] == _NONE_BEFORE:
        kept["interventions"] = []
    return {**kept, "identity": identity}


def special_tokens(model: HookedHybrid) -> list[int]:
    """Return the ids of BOS, EOS and padding, as the tokenizer and the config name them."""
    cfg = model.cfg
    found = [cfg.bos_token_id, cfg.pad_token_id, *cfg.eos_token_ids]
    if model.tokenizer is not None:
        found += [model.text.bos, model.text.pad, *model.text.eos]
    return sorted({token for token in found if token is not None})
