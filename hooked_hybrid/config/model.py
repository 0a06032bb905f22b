"""The config of a model."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hooked_hybrid.config.fields import OPTION, require_positive, require_scale
from hooked_hybrid.config.layer import LayerConfig
from hooked_hybrid.config.mixers import AttentionConfig
from hooked_hybrid.config.norms import NormConfig


@dataclass(frozen=True)
class HybridConfig:
    """A whole model. `layers` says what each residual block is; everything else is shared.

    `scale_embedding` multiplies embeddings by sqrt(d_model) rounded to bfloat16, `embedding_scale`
    by a number, and `logits_scale` multiplies logits, before their soft cap.
    `extra` keeps source settings that do not touch the maths, so that saving returns them;
    `generation_config` keeps the checkpoint's own, of which `eos_token_id` alone is used.
    `device` and `dtype` are None but in `model.cfg`, where they are the model's.

    Examples:
        >>> cfg = presets.griffin("RRARRA", n_heads=4)
        >>> cfg.n_layers, cfg.attention_layers, cfg.recurrent_layers
        (6, (2, 5), (0, 1, 3, 4))
        >>> type(cfg.layers[0].mixer).__name__, cfg.layers[2].mixer.n_keys
        ('RGLRUConfig', 256)
    """

    d_model: int
    d_vocab: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig = NormConfig()
    scale_embedding: bool = False
    tied_embedding: bool = True
    logits_soft_cap: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    default_prepend_bos: bool | None = None
    n_ctx: int | None = None
    model_name: str = "random"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    generation_config: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    device: torch.device | None = field(default=None, init=False, compare=False, repr=False)
    dtype: torch.dtype | None = field(default=None, init=False, compare=False, repr=False)
    embedding_scale: float = field(default=1.0, kw_only=True, metadata=OPTION)
    logits_scale: float = field(default=1.0, kw_only=True, metadata=OPTION)

    attn_only = False  # this and the next are for TransformerLens's functions, which ask
    normalization_type = "RMS"

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "d_vocab")
        if not self.layers:
            raise ValueError("layers is empty: a model has at least one layer")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap={self.logits_soft_cap}: give a positive cap or None")
        require_scale(self, "embedding_scale", "logits_scale")
        if self.scale_embedding and self.embedding_scale != 1:
            raise ValueError(
                f"scale_embedding and embedding_scale={self.embedding_scale!r}: give one of the two"
            )

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], revision: str | None = None, **overrides: Any
    ) -> HybridConfig:
        """Read the config of a checkpoint alone; arguments as `HookedHybrid.from_pretrained`.

        Examples:
            >>> from hooked_hybrid import HybridConfig
            >>> HybridConfig.from_pretrained("tiny-jamba").attention_layers
            (2,)
        """
        from weights_conversion import load_config

        return load_config(name_or_path, revision=revision, **overrides)

    @property
    def n_layers(self) -> int:
        """Residual blocks."""
        return len(self.layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have attention, alone or beside a recurrence."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.attention is not None)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a recurrence, alone or beside attention."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.recurrence is not None)

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have an MLP or a mixture of experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mlp is not None)

    @property
    def n_heads(self) -> int:
        """Query heads of an attention layer; an error where layers differ or none has heads."""
        return self._of_all_attention("n_heads")

    @property
    def d_head(self) -> int:
        """Channels of an attention head; an error where layers differ or none has heads."""
        return self._of_all_attention("d_head")

    @property
    def n_key_value_heads(self) -> int:
        """Key-value heads of an attention layer; an error where layers differ or none has heads."""
        return self._of_all_attention("n_kv_heads")

    @property
    def d_mlp(self) -> int:
        """Width of an MLP or expert; an error where layers differ or none has one."""
        mlps: list[Any] = [self.layers[i].mlp for i in self.mlp_layers]
        return _one_value("d_mlp", "layers", {mlp.d_mlp for mlp in mlps})

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence tokens, as a tuple that may be empty."""
        if self.eos_token_id is None:
            return ()
        return (
            (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)
        )

    def with_overrides(self, **overrides: Any) -> HybridConfig:
        """Return this config with other settings that need no other weights.

        Args:
            overrides: `n_keys` (every attention layer), or a scalar field of this class.

        Raises:
            TypeError: a name that is not such a setting.

        Examples:
            >>> model.cfg.with_overrides(n_keys=64).layers[2].mixer.n_keys
            64
        """
        allowed = {"n_keys", *_SETTABLE}
        if unknown := sorted(set(overrides) - allowed):
            raise TypeError(
                f"no setting named {', '.join(unknown)}; a checkpoint can be loaded with other "
                f"{', '.join(sorted(allowed))}"
            )
        config = self
        if "n_keys" in overrides:
            n_keys = overrides.pop("n_keys")
            if not self.attention_layers:
                raise TypeError("n_keys: this model has no attention layer")
            config = dataclasses.replace(
                config, layers=tuple(_with_n_keys(layer, n_keys) for layer in config.layers)
            )
        return dataclasses.replace(config, **overrides) if overrides else config

    def on(self, device: torch.device, dtype: torch.dtype) -> HybridConfig:
        """Return this config as that of a model with these parameters."""
        config = copy.copy(self)
        object.__setattr__(config, "device", device)
        object.__setattr__(config, "dtype", dtype)
        return config

    def _of_all_attention(self, name: str) -> int:
        values = {getattr(self.layers[i].attention, name) for i in self.attention_layers}
        return _one_value(name, "attention layers", values)


_SETTABLE = (
    "logits_soft_cap",
    "logits_scale",
    "embedding_scale",
    "scale_embedding",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "default_prepend_bos",
    "n_ctx",
    "model_name",
)


def _with_n_keys(layer: LayerConfig, n_keys: int | None) -> LayerConfig:
    mixers = tuple(
        dataclasses.replace(mixer, n_keys=n_keys) if isinstance(mixer, AttentionConfig) else mixer
        for mixer in layer.mixers
    )
    return dataclasses.replace(layer, mixer=mixers)


def _one_value(name: str, where: str, values: set[int]) -> int:
    if len(values) != 1:
        raise AttributeError(f"{where} have {name} in {sorted(values)}: not one value")
    return int(next(iter(values)))
