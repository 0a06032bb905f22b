"""The configs of mixers: a frozen dataclass for each kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hooked_hybrid.config.fields import OPTION, require_one_of, require_positive, require_scale
from hooked_hybrid.config.norms import QKNormConfig


@dataclass(frozen=True)
class PartConfig:
    """The common base of configs of mixers and MLPs.

    `write_scale` multiplies what it adds to the residual stream, its output bias included.

    Examples:
        >>> from hooked_hybrid.config import MixerConfig, MLPConfig, PartConfig
        >>> issubclass(MixerConfig, PartConfig), issubclass(MLPConfig, PartConfig)
        (True, True)
    """

    write_scale: float = field(default=1.0, kw_only=True, metadata=OPTION)

    def __post_init__(self) -> None:
        require_scale(self, "write_scale")


@dataclass(frozen=True)
class MixerConfig(PartConfig):
    """The config of a mixer; each kind has its own class, see `network.mixers.register_mixer`.

    Examples:
        >>> from hooked_hybrid.config import MixerConfig
        >>> isinstance(model.cfg.layers[0].mixer, MixerConfig)
        True
    """

    is_recurrence: ClassVar[bool] = True
    """Whether it carries a state from token to token by a recurrence, rather than keys."""


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions on the first `d_rotary` channels of a head, in the halves-swapped layout.

    Examples:
        >>> from hooked_hybrid.config import AttentionConfig, RotaryConfig
        >>> AttentionConfig(4, 1, 32, rotary=RotaryConfig(8)).rotary.theta
        10000.0
    """

    d_rotary: int
    theta: float = 10_000.0


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Softmax attention: MHA, MQA or GQA, optionally windowed, optionally rotary.

    `n_keys` counts the keys a query may see, itself included; None means all earlier ones.
    `qk_norm` puts norms on queries and keys; None does not.

    Examples:
        >>> from hooked_hybrid.config import AttentionConfig
        >>> cfg = AttentionConfig(n_heads=8, n_kv_heads=2, d_head=16, n_keys=256)
        >>> cfg.n_heads * cfg.d_head
        128
    """

    is_recurrence = False

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_keys: int | None = None
    rotary: RotaryConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNormConfig | None = field(default=None, kw_only=True, metadata=OPTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_heads", "n_kv_heads", "d_head")
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
    """Griffin's recurrent block: two branches, a short convolution, and the RG-LRU.

    Examples:
        >>> from hooked_hybrid.config import RGLRUConfig
        >>> RGLRUConfig(d_rnn=128, n_gate_blocks=8).d_conv
        4
    """

    d_rnn: int
    n_gate_blocks: int
    d_conv: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "d_rnn", "n_gate_blocks", "d_conv")
        if self.d_rnn % self.n_gate_blocks:
            raise ValueError(
                f"d_rnn={self.d_rnn} is not a multiple of n_gate_blocks={self.n_gate_blocks}"
            )


@dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """Jamba's Mamba-1 block: selective scan, with norms on dt, B and C of `norm_eps`.

    Examples:
        >>> from hooked_hybrid.config import MambaConfig
        >>> MambaConfig(d_inner=256, d_state=16, dt_rank=8).d_conv
        4
    """

    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-6
    inner_norm: Literal["weight", "plain"] | None = field(
        default="weight", kw_only=True, metadata=OPTION
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "d_inner", "d_state", "dt_rank", "d_conv")
        require_one_of(self, "inner_norm", "weight", "plain", None)


GateOrder = Literal["gate_first", "norm_first"]


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """The Mamba-2 block: one decay a head, and a scan that equals a matrix of each head.

    B and C are shared by the heads of a group. Step sizes are limited to `dt_min` up to `dt_max`;
    None is no upper limit. `norm` says whether the output is multiplied by its gate before it is
    normalised ("gate_first") or after ("norm_first"), each of `n_groups` groups of channels by its
    own scale; None is no norm. `in_scale` multiplies the block's input, `section_scales` the
    sections z, x, B, C and dt of its projection.

    Examples:
        >>> from hooked_hybrid.config import Mamba2Config
        >>> cfg = Mamba2Config(n_heads=4, d_head=16, d_state=32, n_groups=2)
        >>> cfg.d_conv, cfg.norm
        (4, 'gate_first')
    """

    n_heads: int
    d_head: int
    d_state: int
    n_groups: int = 1
    d_conv: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    norm: GateOrder | None = "gate_first"
    norm_eps: float = 1e-5
    in_scale: float = 1.0
    section_scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_heads", "d_head", "d_state", "n_groups", "d_conv")
        require_scale(self, "in_scale")
        require_one_of(self, "norm", "gate_first", "norm_first", None)
        if self.n_heads % self.n_groups:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_groups={self.n_groups}"
            )
        largest = math.inf if self.dt_max is None else self.dt_max
        if not 0 <= self.dt_min <= largest or self.dt_min == math.inf:
            raise ValueError(
                f"dt_min={self.dt_min!r} and dt_max={self.dt_max!r}: give 0 or more, and no less"
            )
        if len(self.section_scales) != 5 or not all(0 < s < math.inf for s in self.section_scales):
            raise ValueError(
                f"section_scales={self.section_scales!r}: give five positive numbers, of z, x, B, "
                "C and dt"
            )

    @property
    def d_inner(self) -> int:
        """Channels of all heads."""
        return self.n_heads * self.d_head

    @property
    def sections(self) -> tuple[int, int, int, int, int]:
        """The widths of z, x, B, C and dt in the input projection."""
        shared = self.n_groups * self.d_state
        return self.d_inner, self.d_inner, shared, shared, self.n_heads

    @property
    def d_convolved(self) -> int:
        """Channels of x, B and C, which pass the convolution."""
        return sum(self.sections[1:4])
