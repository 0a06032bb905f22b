"""LoRA adapters saved by peft, merged into the weights of their base model while reading.

A matrix of the base becomes `W + scale * B @ A` (Hu et al. 2021), in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weights_conversion.errors import CheckpointError
from weights_conversion.json_files import LARGEST_CONFIG, read_json
from weights_conversion.names import BASE, PREFIX
from weights_conversion.sources import ADAPTER_CONFIG as CONFIG
from weights_conversion.sources import SafetensorsSource, TensorSource, open_torch_file

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

READ = frozenset("peft_type r lora_alpha rank_pattern alpha_pattern use_rslora".split())
NO_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform lora_dropout
    lora_ga_config loftq_config megatron_core modules_to_save peft_version qalora_group_size
    revision runtime_config target_modules task_type
    """.split()
)
"""Settings of the adapter's training, or that repeat information in its tensors' names."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that do not change the base's weights."""

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(\.default)?")
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")
_PLAIN_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class Update:
    """The two factors that are added to one matrix, and their scale."""

    A: str
    B: str
    scale: float
    of_embedding: bool


class AdaptedSource:
    """The tensors of a base model with an adapter merged into them.

    Args:
        base: by its publisher's names.
        adapter: the tensors of the adapter's file.
        updates: by the base's name of the matrix.
        replaced: name in the adapter of each whole tensor, by the base's name.
    """

    def __init__(
        self,
        base: TensorSource,
        adapter: TensorSource,
        updates: Mapping[str, Update],
        replaced: Mapping[str, str],
    ) -> None:
        self.base, self.adapter, self.updates, self.replaced = base, adapter, updates, replaced
        self.shapes = base.shapes
        of_base = {n: dtype for n, dtype in base.unfit.items() if n not in replaced}
        parts = [(name, part) for name, u in updates.items() for part in (u.A, u.B)]
        of_adapter = {
            name: f"{adapter.unfit[part]} in the adapter"
            for name, part in (*replaced.items(), *parts)
            if part in adapter.unfit
        }
        self.unfit = of_base | of_adapter

    def read(self, name: str) -> Tensor:
        """Return one tensor of the merged model."""
        of_adapter = self.replaced.get(name)
        weight = self.base.read(name) if of_adapter is None else self.adapter.read(of_adapter)
        if (update := self.updates.get(name)) is None:
            return weight
        a, b = (self.adapter.read(factor).float() for factor in (update.A, update.B))
        change = (b @ a) * update.scale
        return weight.float() + (change.mT if update.of_embedding else change)


def with_adapter(base: TensorSource, folder: Path, is_tied: bool) -> AdaptedSource:
    """Return the tensors of a model with the adapter of a folder merged into them.

    Args:
        base: by transformers' names.
        folder: holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        is_tied: whether embedding and head are one matrix.

    Raises:
        CheckpointError: not a plain LoRA, or one of another model.
    """
    settings = _settings(folder)
    adapter = _tensors(folder)
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in adapter.shapes:
        found = _LORA.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if found is None:
            if ".lora_" in name:
                raise _unsupported_error(folder, f"the tensor {name!a}")
            target = _in_base(folder, name, base, is_tied)
            if (other := replaced.setdefault(target, name)) != name:
                raise CheckpointError(
                    f"{folder}: {other!a} and {name!a} both replace {target}: save the adapter "
                    "with peft's save_pretrained, which writes one"
                )
            continue
        of_embedding = "lora_embedding" in name
        factors.setdefault((found["module"], of_embedding), {})[found["part"]] = name
    updates: dict[str, Update] = {}
    for (module, of_embedding), parts in factors.items():
        if parts.keys() != {"A", "B"}:
            raise CheckpointError(f"{folder}: {next(iter(parts.values()))!a} has no other factor")
        target = _in_base(folder, f"{module}.weight", base, is_tied)
        rank = _rank(folder, adapter, parts, base.shapes[target], of_embedding)
        scale = _scale(folder, settings, module, rank)
        updates[target] = Update(parts["A"], parts["B"], scale, of_embedding)
    _refuse_tied(folder, is_tied, {*updates, *replaced})
    for target, name in replaced.items():
        if adapter.shapes[name] != base.shapes[target]:
            raise CheckpointError(
                f"{folder}: {name} has shape {adapter.shapes[name]}, the base model's "
                f"{base.shapes[target]}: it is an adapter of another model or vocabulary"
            )
    return AdaptedSource(base, adapter, updates, replaced)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files that identify an adapter."""
    return [path for name in (CONFIG, *WEIGHTS) if (path := folder / name).is_file()]


def _settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's config, after checking every key."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it holds no adapter")
    settings = read_json(path, LARGEST_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise _unsupported_error(folder, f"peft_type={settings.get('peft_type')!a}")
    if (start := settings.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise _unsupported_error(folder, f"init_lora_weights={start!a}")
    for key in sorted(settings.keys() - READ - NO_EFFECT - {"init_lora_weights"}):
        if settings[key] not in (None, False, [], {}):
            raise _unsupported_error(folder, f"{key}={str(settings[key])[:60]!a}")
    return settings


def _tensors(folder: Path) -> TensorSource:
    for name in WEIGHTS:
        if (path := folder / name).is_file():
            is_torch = name.endswith(".bin")
            return open_torch_file(path) if is_torch else SafetensorsSource({path: None})
    raise CheckpointError(f"{folder} has {CONFIG} and neither of {', '.join(WEIGHTS)}")


def _in_base(folder: Path, name: str, base: TensorSource, is_tied: bool) -> str:
    """Return the base's name of a tensor that the adapter changes."""
    plain = _WRAPPERS.sub("", name.removeprefix(PREFIX))
    _refuse_tied(folder, is_tied, {plain})  # a head that is the embedding is not in the file
    for candidate in (plain, f"{BASE}{plain}"):
        if candidate in base.shapes:
            return candidate
    raise CheckpointError(
        f"{folder}: the adapter changes {name.removeprefix(PREFIX)!a}, which the base model has "
        "not: it is an adapter of another model"
    )


def _rank(
    folder: Path,
    adapter: TensorSource,
    parts: Mapping[str, str],
    shape: tuple[int, ...],
    of_embedding: bool,
) -> int:
    """Return the rank of two factors whose product has the shape of a matrix."""
    a, b = adapter.shapes[parts["A"]], adapter.shapes[parts["B"]]
    wanted = shape[::-1] if of_embedding else shape
    if not (len(a) == len(b) == len(shape) == 2 and a[0] == b[1] and (b[0], a[1]) == wanted):
        raise CheckpointError(
            f"{folder}: {parts['A']!a} {a} and {parts['B']!a} {b} do not update a matrix of "
            f"{shape}: it is an adapter of another model, or of a convolution, which is not merged"
        )
    return a[0]


def _scale(folder: Path, settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) of a rank-stabilised adapter."""
    said = _for_module(folder, settings, "rank_pattern", "r", module)
    alpha = _for_module(folder, settings, "alpha_pattern", "lora_alpha", module)
    if said != rank:
        raise CheckpointError(f"{folder}: {module!a} has rank {rank}, and {CONFIG} says {said:g}")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") is True else alpha / rank


def _for_module(
    folder: Path, settings: Mapping[str, Any], patterns: str, default: str, module: str
) -> float:
    by_name = settings.get(patterns) or {}
    if not isinstance(by_name, dict) or not all(_PLAIN_NAME.fullmatch(key) for key in by_name):
        raise _unsupported_error(folder, f"{patterns}={str(by_name)[:60]!a}")
    hits = {k: v for k, v in by_name.items() if f".{module}".endswith(f".{k}")}
    if patterns == "alpha_pattern" and len(set(map(str, hits.values()))) > 1:
        raise CheckpointError(
            f"{folder}: {patterns} has {', '.join(hits)} for {module!a}: peft takes the first, and "
            "has put them in another order when it saved them; leave the one that is meant"
        )
    value = next(iter(hits.values()), settings.get(default))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise CheckpointError(f"{folder}: {CONFIG}: {default}={str(value)[:60]!a} is not a number")
    return value


def _refuse_tied(folder: Path, is_tied: bool, changed: set[str]) -> None:
    ends = ("embed_tokens.weight", "lm_head.weight")
    if is_tied and (both := sorted(name for name in changed if name.endswith(ends))):
        raise CheckpointError(
            f"{folder}: the adapter changes {both[0]}, which embedding and head share here: peft "
            "gives other logits before a merge than after it, merge it with peft as you mean it"
        )


def _unsupported_error(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds an adapter with {what}, which is not merged here: merge it with peft "
        "(PeftModel.from_pretrained(...).merge_and_unload()) and save or pass on the merged model"
    )
