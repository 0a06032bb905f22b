"""The interface of a mixer, for its block and for the rest of the library."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.block_state import BlockState
from hooked_hybrid.network.costs import Flops
from hooked_hybrid.network.layers import Linear
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.part import Part, Unstated, look_up, not_stated, register
from hooked_hybrid.shapes import Resid

S = TypeVar("S", bound=BlockState)

MIXERS: dict[type, type[Mixer[Any]]] = {}
"""The class of each kind of mixer, by the class of its config."""


class ScanTerms(NamedTuple):
    """The terms of y_t = read_t . h_t + skip x_t, h_t = decay_t h_{t-1} + write_t in a run.

    Decays are those without the resets of documents.
    """

    decay: Float[Tensor, "batch pos channel n"]
    write: Float[Tensor, "batch pos channel n"]
    states: Float[Tensor, "batch pos channel n"]
    read: Float[Tensor, "batch pos #channel n"]


class Mixer(Part, Generic[S]):
    """A map over positions that carries a state: `(x, state) -> (y, state)`.

    A recurrence is at `mixer`, has its states at `hook_ssm_state`, and the values read from them,
    before any gate, at `hook_ssm_y`.

    Examples:
        >>> from hooked_hybrid.network.mixers import Mixer
        >>> all(isinstance(mixer, Mixer) for block in model.blocks for mixer in block.mixers)
        True
    """

    path: ClassVar[str] = "mixer"
    """Its path in its block, and so in its hook names."""
    out_hooks: ClassVar[tuple[str, ...]] = ()
    """Further hook points of the block, in series after `hook_mixer_out`, where it is the only
    mixer."""
    write_hook: ClassVar[str] = "hook_ssm_out"
    """The hook point of the block on its own output, if there are other mixers beside it."""
    holds: ClassVar[Mapping[str, float]] = Unstated(  # type: ignore[assignment]
        "how its state is held"
    )
    """Of a recurrence: hook points, and the value of each that keeps the state unchanged."""
    forgets: ClassVar[Mapping[str, float]] = Unstated(  # type: ignore[assignment]
        "how its state is dropped"
    )
    """Of a recurrence: hook points, and the value of each that drops the previous state."""
    scan_hooks: ClassVar[tuple[str, ...]] = Unstated(  # type: ignore[assignment]
        "what its scan computes with"
    )
    """Of a recurrence: the hook points that `scan_terms` needs."""
    grows: ClassVar[tuple[str, ...]] = ()
    """Those tensors of the state that have an axis of keys, after the batch: one a token. They are
    the `growing` of its class of states."""

    def __init__(self, cfg: Any, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.d_model = d_model

    @abstractmethod
    def forward(self, x: Resid, state: S | None, layout: Layout) -> tuple[Resid, S]:
        """Return what the mixer writes, and its state after the last token of each row.

        No state means that every row begins here. The state passed in is not changed.
        """

    @property
    def out_projection(self) -> Linear:
        """The linear map that gives all of its output.

        Raises:
            NotSupported: its output is not that of one linear map.
        """
        path, _, leaf = self.writes[0].rpartition(".")
        module = self.get_submodule(path)
        if len(self.writes) > 1 or leaf != "weight" or not isinstance(module, Linear):
            raise not_stated(type(self), "writes", "one linear map through which it writes")
        return module

    @classmethod
    def state_shapes(cls, cfg: Any) -> dict[str, tuple[int, ...]]:  # noqa: ARG003
        """Return the shapes of the state's tensors, without the batch and the key axis."""
        raise not_stated(cls, "state_shapes", "the shapes of its state")

    @classmethod
    def window(cls, cfg: Any) -> int | None:  # noqa: ARG003
        """Return how many keys a query sees, itself included; None for all before it."""
        raise not_stated(cls, "window", "how many keys a query sees")

    @classmethod
    def pair_operations(cls, cfg: Any) -> Flops:  # noqa: ARG003
        """Return the operations of one query and one key that it sees."""
        raise not_stated(cls, "pair_operations", "what a query and a key cost")

    @classmethod
    def n_taps(cls, cfg: Any) -> int:
        """Return how many tokens, the current one among them, its convolution reads."""
        return getattr(cfg, "d_conv", 1)

    @classmethod
    def scan_terms(cls, seen: Mapping[str, Tensor]) -> ScanTerms:  # noqa: ARG003
        """Return the terms of its scan.

        Args:
            seen: the values at `scan_hooks`.
        """
        raise not_stated(cls, "scan_terms", "what its scan computes with")

    @classmethod
    def channel_groups(cls, cfg: Any) -> int | None:  # noqa: ARG003
        """Return the number of separate groups of neighbouring channels; None without groups."""
        return None

    @classmethod
    def hooked_numbers(cls, cfg: Any, n_pos: int, n_keys: int) -> dict[str, int]:  # noqa: ARG003
        """Return the number of values of a row at hook points that are far larger than the stream.

        Only these are compared with free memory before a forward; by default there are none.

        Args:
            cfg: of the mixer.
            n_pos: positions run at a time.
            n_keys: keys that these see, for attention.
        """
        return {}

    def kernel_bytes(
        self,
        layout: Layout,  # noqa: ARG002
        n_cached: int,  # noqa: ARG002
        piece: int,  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
    ) -> int:
        """Return the bytes that kernels use internally in a forward; by default 0.

        Args:
            layout: of the whole forward.
            n_cached: keys of the state that it continues.
            piece: positions run at a time.
            dtype: of the model.
            device: of the layer.
        """
        return 0

    @classmethod
    def position_width(cls, cfg: Any) -> int:  # noqa: ARG003
        """Return the number of values made of a position for all such layers; by default 0."""
        return 0

    @classmethod
    def n_kept(cls, cfg: Any, n_tokens: int) -> int:
        """Return how many keys the state has after `n_tokens`; 0 if it has no axis of keys.

        A window of n keys, the query itself included, leaves n - 1 to remember.
        """
        window = cls.window(cfg) if cls.grows else 1
        return n_tokens if window is None else min(n_tokens, window - 1)


def register_mixer(*mixers: type[Mixer[Any]]) -> None:
    """Register mixer classes, by their config classes.

    Raises:
        NotSupported: a class does not state its config or its kind.
        ValueError: another class has its config or its kind.

    Examples:
        >>> from hooked_hybrid.network.mixers import MIXERS, Mamba, register_mixer
        >>> register_mixer(Mamba)  # as the library does for its own
        >>> MIXERS[Mamba.config].kind
        'mamba'
    """
    for mixer in mixers:
        register(MIXERS, mixer, ("config", "kind"))


def windows_of(cfg: HybridConfig) -> list[int]:
    """Return the keys that each mixer with a window sees, in the order of the layers.

    Examples:
        >>> from hooked_hybrid.network.mixers import windows_of
        >>> windows_of(model.cfg), windows_of(jamba.cfg)
        ([256, 256], [])
    """
    mixers = [(mixer_of(of), of) for layer in cfg.layers for of in layer.mixers]
    windows = [mixer.window(of) for mixer, of in mixers if mixer.grows]
    return [n_keys for n_keys in windows if n_keys is not None]


def mixer_of(cfg: object) -> type[Mixer[Any]]:
    """Return the class of the mixer that a config is for.

    Raises:
        NotSupported: none is registered for it.

    Examples:
        >>> from hooked_hybrid.network.mixers import mixer_of
        >>> mixer_of(jamba.cfg.layers[0].mixer).__name__
        'Mamba'
    """
    return look_up(MIXERS, cfg, "mixer")
