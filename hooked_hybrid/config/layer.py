"""The config of a residual block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hooked_hybrid.config.fields import OPTION, require_one_of
from hooked_hybrid.config.mixers import AttentionConfig, MixerConfig
from hooked_hybrid.config.mlps import MLPConfig

NormPlace = Literal["pre", "post", "both"]
"""Where the norms of a block are."""


@dataclass(frozen=True)
class LayerConfig:
    """One residual block: a mixer over positions, then an MLP over channels.

    Either may be None, but not both. `mixer` may be a tuple of mixers side by side: each
    reads the same normalised stream, and the sum of what they write is added to it. At most one of
    them is attention, and at most one a recurrence.

    `norm` says where the norms of the block are: "pre", before its mixers and before its MLP;
    "post", on what these write; or "both".

    Examples:
        >>> from hooked_hybrid.config import AttentionConfig, GatedMLPConfig, LayerConfig
        >>> layer = LayerConfig(AttentionConfig(4, 1, 32), GatedMLPConfig(256))
        >>> layer.attention.n_heads, len(layer.mixers)
        (4, 1)
    """

    mixer: MixerConfig | tuple[MixerConfig, ...] | None
    mlp: MLPConfig | None
    norm: NormPlace = field(default="pre", kw_only=True, metadata=OPTION)

    def __post_init__(self) -> None:
        require_one_of(self, "norm", "pre", "post", "both")
        if isinstance(self.mixer, list | tuple) and len(self.mixer) < 2:
            object.__setattr__(self, "mixer", next(iter(self.mixer), None))
        if self.mixer is None and self.mlp is None:
            raise ValueError("a layer with neither a mixer nor an MLP does nothing: give one")
        for what, found in (("attention", self._attention), ("recurrences", self._recurrences)):
            if len(found) > 1:
                kinds = ", ".join(type(mixer).__name__ for mixer in found)
                raise ValueError(f"a layer has one at most of {what}, not {kinds}")

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """Its mixers, side by side: none, one or several."""
        if self.mixer is None:
            return ()
        return self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)

    @property
    def attention(self) -> AttentionConfig | None:
        """That of its mixers which is attention; None where none is."""
        return next(iter(self._attention), None)

    @property
    def recurrence(self) -> MixerConfig | None:
        """That of its mixers which is a recurrence; None where none is."""
        return next(iter(self._recurrences), None)

    @property
    def n_norms(self) -> int:
        """Norms on what its mixers and its MLP read from the stream and write to it."""
        of_half = 2 if self.norm == "both" else 1
        return of_half * (bool(self.mixers) + (self.mlp is not None))

    @property
    def _attention(self) -> list[AttentionConfig]:
        return [mixer for mixer in self.mixers if isinstance(mixer, AttentionConfig)]

    @property
    def _recurrences(self) -> list[MixerConfig]:
        return [mixer for mixer in self.mixers if mixer.is_recurrence]
