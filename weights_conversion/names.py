"""Names of tensors as published, without the prefixes of wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from weights_conversion.errors import CheckpointError
from weights_conversion.rules import Shapes
from weights_conversion.sources import TensorSource

BASE = "model."
"""The prefix of a causal model's names, which a model without its head does not have."""
PREFIX = "base_model.model."
"""The prefix of peft's names."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Of torch.compile, FSDP and activation checkpointing, at any depth."""
_PARALLEL = "module."
"""Of DataParallel and DistributedDataParallel."""
_OF_ADAPTERS = re.compile(r"\.(lora_\w+|base_layer|ia3_l|modules_to_save|original_module)(\.|$)")


class RenamedSource:
    """The tensors of a source under other names.

    Args:
        source: the tensors to read.
        names: the source's name by each new one.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.source, self.names = source, names
        self.shapes: Shapes = {new: source.shapes[old] for new, old in names.items()}
        self.unfit = {new: source.unfit[old] for new, old in names.items() if old in source.unfit}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.source.read(self.names[name])


class TiedSource:
    """The tensors of a source with both head and embedding, which must be equal.

    They are compared when the embedding is read.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source, self.shapes, self.unfit = source, source.shapes, source.unfit

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: the head differs from the embedding.
        """
        tensor = self.source.read(name)
        if name == EMBEDDING and not torch.equal(self.source.read(HEAD), tensor):
            raise CheckpointError(
                f"{HEAD} differs from {EMBEDDING}, but the config ties them (tie_word_embeddings): "
                "one of the two is wrong"
            )
        return tensor


def strip_wrappers(source: TensorSource) -> TensorSource:
    """Return a source by its publisher's names, without the prefixes of wrappers.

    Raises:
        CheckpointError: an unmerged adapter, a prefix of an unknown wrapper, or two tensors with
            the same resulting name.
    """
    plain = {old: name for old, name in zip(source.shapes, _plain(source.shapes), strict=True)}
    _refuse_adapter(plain.values())
    _refuse_other_prefix(plain.values())
    names = {new: old for old, new in plain.items()}
    if len(names) < len(plain):
        twice = next(old for old, new in plain.items() if names[new] != old)
        raise CheckpointError(
            f"{twice!a} and {names[plain[twice]]!a} are both {plain[twice]!a} once wrappers' "
            "prefixes are left out: save the unwrapped model"
        )
    return source if all(new == old for new, old in names.items()) else RenamedSource(source, names)


def with_head(source: TensorSource, is_tied: bool) -> TensorSource:
    """Return a source with a head, which may be the embedding.

    Raises:
        CheckpointError: a model without a head, whose embedding is not tied.
    """
    if is_tied:
        return TiedSource(source) if {EMBEDDING, HEAD} <= source.shapes.keys() else source
    if EMBEDDING in source.shapes and HEAD not in source.shapes:
        raise CheckpointError(
            f"missing: {HEAD}; these are the tensors of a base model, and its head is not its "
            "embedding (tie_word_embeddings is false): save or pass the causal model"
        )
    return source


def _plain(names: Iterable[str]) -> list[str]:
    plain = [_WRAPPERS.sub("", name) for name in names]
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = [name.removeprefix(_PARALLEL) for name in plain]
    if EMBEDDING.removeprefix(BASE) in plain and not any(n.startswith(BASE) for n in plain):
        plain = [name if name == HEAD else f"{BASE}{name}" for name in plain]
    return plain


def _refuse_adapter(names: Iterable[str]) -> None:
    for name in names:
        if name.startswith(PREFIX) or _OF_ADAPTERS.search(name):
            raise CheckpointError(
                f"{name!a} belongs to an adapter that is not merged: give "
                "model.merge_and_unload() of peft's model, or load the base model with "
                "from_pretrained(base, adapter=folder)"
            )


def _refuse_other_prefix(names: Iterable[str]) -> None:
    names = set(names)
    ends = [name for name in names if name.endswith(f".{EMBEDDING}")]
    if EMBEDDING not in names and len(ends) == 1:
        prefix = ends[0].removesuffix(EMBEDDING)
        raise CheckpointError(
            f"the tensors' names begin with the prefix {prefix!a} ({ends[0]!a} is here, and no "
            f"{EMBEDDING}): save or pass the inner model, without the prefix"
        )
