"""What a hybrid model is, as data: frozen dataclasses, one per kind of mixer and MLP."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

NormStyle = Literal["one_plus_weight", "weight"]
Activation = Literal["gelu_tanh", "silu"]


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions on the first `d_rotary` channels of a head, in the halves-swapped layout."""

    d_rotary: int
    theta: float = 10_000.0


@dataclass(frozen=True)
class MixerConfig:
    """What a mixer is; each kind has a class of its own, see `network.mixers.register_mixer`."""


@dataclass(frozen=True)
class MLPConfig:
    """What an MLP is; each kind has a class of its own, see `network.mlps.register_mlp`."""


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Softmax attention: MHA, MQA or GQA, optionally windowed, optionally rotary.

    `n_keys` counts the keys a query may see, itself included; None means all earlier ones.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_keys: int | None = None
    rotary: RotaryConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "n_heads", "n_kv_heads", "d_head")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.n_keys is not None and not (isinstance(self.n_keys, int) and self.n_keys >= 1):
            raise ValueError(f"n_keys={self.n_keys!r}: a token sees at least itself, so 1 or more")
        if self.rotary and (self.rotary.d_rotary % 2 or self.rotary.d_rotary > self.d_head):
            raise ValueError(
                f"d_rotary={self.rotary.d_rotary} must be even and at most d_head={self.d_head}"
            )


@dataclass(frozen=True)
class RGLRUConfig(MixerConfig):
    """Griffin's recurrent block: two branches, a short convolution, and the RG-LRU."""

    d_rnn: int
    n_gate_blocks: int
    d_conv: int = 4

    def __post_init__(self) -> None:
        _require_positive(self, "d_rnn", "n_gate_blocks", "d_conv")
        if self.d_rnn % self.n_gate_blocks:
            raise ValueError(
                f"d_rnn={self.d_rnn} is not a multiple of n_gate_blocks={self.n_gate_blocks}"
            )


@dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """Jamba's Mamba-1 block: selective scan, with norms on dt, B and C of `norm_eps`."""

    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(self, "d_inner", "d_state", "dt_rank", "d_conv")


@dataclass(frozen=True)
class GatedMLPConfig(MLPConfig):
    """`down(act(gate(x)) * up(x))`; `d_mlp` is the width of gate and of up, each."""

    d_mlp: int
    act: Activation = "gelu_tanh"
    bias: bool = True

    def __post_init__(self) -> None:
        _require_positive(self, "d_mlp")


@dataclass(frozen=True)
class MoEConfig(MLPConfig):
    """A mixture of `n_experts` gated MLPs, of which a router chooses `n_chosen` for each token.

    The weights of the chosen ones are their shares of a softmax over all experts, not renormalised.
    """

    n_experts: int
    n_chosen: int
    d_mlp: int
    act: Activation = "silu"

    def __post_init__(self) -> None:
        _require_positive(self, "n_experts", "n_chosen", "d_mlp")
        if self.n_chosen > self.n_experts:
            raise ValueError(f"n_chosen={self.n_chosen} of n_experts={self.n_experts}")


@dataclass(frozen=True)
class LayerConfig:
    """One residual block: a mixer over positions, then an MLP over channels."""

    mixer: MixerConfig
    mlp: MLPConfig


@dataclass(frozen=True)
class NormConfig:
    """RMSNorm: `x / sqrt(mean(x^2) + eps)` times `weight`, or times `1 + weight` in fp32."""

    eps: float = 1e-6
    style: NormStyle = "weight"


@dataclass(frozen=True)
class HybridConfig:
    """A whole model. `layers` says what each residual block is; everything else is shared.

    `scale_embedding` multiplies embeddings by sqrt(d_model) rounded to bfloat16.
    `extra` keeps source settings that do not touch the maths, so that saving returns them;
    `generation_config` keeps the checkpoint's own, of which `eos_token_id` alone is used.
    `device` and `dtype` are None but in `model.cfg`, where they are the model's.
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

    attn_only = False  # this and the next are for TransformerLens's functions, which ask
    normalization_type = "RMS"

    def __post_init__(self) -> None:
        _require_positive(self, "d_model", "d_vocab")
        if not self.layers:
            raise ValueError("layers is empty: a model has at least one layer")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap={self.logits_soft_cap}: give a positive cap or None")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], revision: str | None = None, **overrides: Any
    ) -> HybridConfig:
        """Read the config of a checkpoint alone; arguments as `HookedHybrid.from_pretrained`."""
        from weights_conversion import load_config

        return load_config(name_or_path, revision=revision, **overrides)

    @property
    def n_layers(self) -> int:
        """Residual blocks."""
        return len(self.layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose mixer is attention."""
        return tuple(
            i for i, layer in enumerate(self.layers) if isinstance(layer.mixer, AttentionConfig)
        )

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose mixer is a recurrence."""
        return tuple(i for i in range(self.n_layers) if i not in self.attention_layers)

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
        """Width of an MLP or expert; an error where layers differ."""
        mlps: list[Any] = [layer.mlp for layer in self.layers]
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
        values = {getattr(self.layers[i].mixer, name) for i in self.attention_layers}
        return _one_value(name, "attention layers", values)


_SETTABLE = (
    "logits_soft_cap",
    "scale_embedding",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "default_prepend_bos",
    "n_ctx",
    "model_name",
)


def _with_n_keys(layer: LayerConfig, n_keys: int | None) -> LayerConfig:
    if not isinstance(layer.mixer, AttentionConfig):
        return layer
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, n_keys=n_keys))


def _one_value(name: str, where: str, values: set[int]) -> int:
    if len(values) != 1:
        raise AttributeError(f"{where} have {name} in {sorted(values)}: not one value")
    return int(next(iter(values)))


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value!r}: give a positive integer")
