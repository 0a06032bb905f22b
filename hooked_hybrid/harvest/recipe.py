"""The recipe of a harvest, on which its bytes depend; it is stored in the harvest's folder."""

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

    `bos` is the token prepended to each context, `left_out` the tokens whose activations are not
    kept. `documents` and `encoding` are hashes, `model` and `interventions` identify the model and
    the interventions (older versions wrote a hash of these).
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
        """A hash of all fields."""
        return short_hash(asdict(self))

    def plan(self, documents: Documents) -> PackingPlan:
        """Return the contexts, batches and shards of the tokens."""
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
        """Write the recipe to a folder that has none, or no shard yet; else compare the two.

        Args:
            folder: of the harvest.
            cfg: of the model.

        Returns:
            This recipe; or the same recipe as written by an older version of this library, whose
            hash is in the existing shards.

        Raises:
            ValueError: the folder contains shards of another recipe, or of a newer version.
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
    """Return the differences between the recipe of a folder and the current one."""
    wanted = {"identity" if key == "model" else key: value for key, value in now.items()}
    if isinstance(before["model"].get("config"), str):
        return changes(_of_older(before, now, cfg), wanted)
    return changes(
        {"identity" if key == "model" else key: value for key, value in before.items()}, wanted
    )


def recipe_identity(model: HookedHybrid, interventions: Sequence[HookSpec]) -> dict[str, Any]:
    """Return the identity of the model and of the interventions of a harvest.

    Raises:
        UntoldError: a hook refers to an object whose content cannot be identified.
    """
    known = known_of(model)
    return {
        "model": without_tokenizer(model_identity(model)),
        "interventions": [
            identify(f"fwd_hooks[{i}]", spec, known) for i, spec in enumerate(interventions)
        ],
    }


def encoding_identity(model: HookedHybrid, is_text: bool, bos: int | None) -> str:
    """Return a text that identifies how documents were tokenized."""
    reads = "tokens"
    if is_text:
        reads = f"{_TOKENIZER} {short_hash(tokenizer_identity(model.text))}"
    return f"{reads}, BOS {bos}"


def is_recorded(encoding: str) -> bool:
    """Whether an encoding of texts identifies the tokenizer; those of older versions do not."""
    return encoding.startswith(("tokens,", _TOKENIZER))


def _of_older(before: Mapping[str, Any], now: Mapping[str, Any], cfg: HybridConfig) -> Any:
    """Return the recipe of an older version in the current form, as far as it can be compared."""
    old, new = before["model"], now["model"]
    identity = {"weights": old["weights"], "dtype": old["dtype"], "changes": {}}
    identity["quantization"] = new["quantization"]  # the hash of the weights covers it
    if old["hooks"] == []:
        identity["hooks"] = []
    # The recipe itself records whether BOS is prepended; the config's field for it has changed.
    plain = replace(cfg, model_name="", extra={})
    same = [replace(plain, default_prepend_bos=b) for b in (cfg.default_prepend_bos, True, False)]
    if old["config"] in [short_hash(repr(one)) for one in same]:
        identity["config"] = new["config"]
    kept = {k: v for k, v in before.items() if k not in ("model", "interventions")}
    if before["interventions"] == _NONE_BEFORE:
        kept["interventions"] = []
    return {**kept, "identity": identity}


def special_tokens(model: HookedHybrid) -> list[int]:
    """Return the ids of BOS, EOS and padding, from the tokenizer and the config."""
    cfg = model.cfg
    found = [cfg.bos_token_id, cfg.pad_token_id, *cfg.eos_token_ids]
    if model.tokenizer is not None:
        found += [model.text.bos, model.text.pad, *model.text.eos]
    return sorted({token for token in found if token is not None})
