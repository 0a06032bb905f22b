"""The interface of a kind of recurrence for analysis: linear form, decays and maps.

For each channel, with as many states n as the kind has:

    h_t = decay_t h_{t-1} + write_t      write_t = gain_t x_t
    y_t = read_t . h_t + skip x_t
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.part import NotSupported
from hooked_hybrid.network.scans.scan import scan

PerChannel = Float[Tensor, "batch pos channel"]
PerState = Float[Tensor, "batch pos channel n"]
Index = Int[Tensor, " channel"]
Decays = Float[Tensor, "channel *d_state"]


class Terms(NamedTuple):
    """The terms of the module's equations, for some channels, in fp32 or wider.

    `write` is the value used, with edits of hooks, and so may differ from `gain` times `x`.

    Examples:
        >>> from hooked_hybrid.analysis.forms import Terms
        >>> Terms._fields
        ('x', 'decay', 'gain', 'write', 'read', 'skip', 'h0')
    """

    x: PerChannel
    decay: PerState
    gain: PerState
    write: PerState
    read: Float[Tensor, "batch pos #channel n"]
    skip: Float[Tensor, " channel"]
    h0: Float[Tensor, "batch channel n"]

    def outputs(self, write: PerState, x: PerChannel, h0: Tensor) -> PerChannel:
        """Return y for some writes, inputs and first state."""
        states = scan(self.decay, write, h0)
        return (states * self.read).sum(-1) + self.skip * x


class DecayRange(NamedTuple):
    """The range of decays of a recurrence, within 0 and 1, for each channel (and state).

    `typical` is the decay if the input of the gate, or of the step, is zero, so only the bias
    counts.

    Examples:
        >>> fastest, typical, slowest = analysis.decay_range(model, 0)
        >>> bool((fastest <= typical).all() and (typical <= slowest).all())
        True
    """

    fastest: Decays
    typical: Decays
    slowest: Decays


@runtime_checkable
class Ran(Protocol):
    """One recurrent layer's values in the cache of a run.

    Examples:
        >>> from hooked_hybrid.analysis.forms import Ran
        >>> from hooked_hybrid.analysis.linear_form import Recurrence
        >>> isinstance(Recurrence(cache, 0), Ran)
        True
    """

    layout: Layout
    mixer: Any

    def __getitem__(self, name: str) -> Tensor:
        """Return a cached value of the layer [batch pos ...], by its name after `hook_`."""

    def __contains__(self, name: str) -> bool:
        """Whether the cache holds a value of the layer."""

    def h0(self, channels: Index) -> Float[Tensor, "batch channel n"]:
        """Return the state that the run began from."""


class LinearForm:
    """The facts of one kind; those that it does not state raise `NotSupported`.

    Examples:
        >>> from hooked_hybrid.analysis.forms import form_of
        >>> form_of(model.cfg.layers[0].mixer).kind
        'rglru'
    """

    kind: ClassVar[str]
    """Of the mixer."""
    has_states: ClassVar[bool] = False
    """Whether a channel has several states; figures then have an axis of them."""

    def n_states(self, cfg: Any) -> int:  # noqa: ARG002
        """Return the states of each channel."""
        return 1

    def terms(self, ran: Ran, channels: Index) -> Terms:  # noqa: ARG002
        """Return the terms of some channels, in the order and dtypes of the forward."""
        raise self._not_stated("terms", "its terms")

    def log_decay(self, ran: Ran, channels: Index) -> PerState:  # noqa: ARG002
        """Return log decays of some channels in fp64, without the resets of documents."""
        raise self._not_stated("log_decay", "its log decays")

    def moves(self, ran: Ran) -> Bool[Tensor, "batch pos"] | None:  # noqa: ARG002
        """Return True where the state is updated; None for everywhere."""
        return None

    def decay_range(self, mixer: Any) -> DecayRange:  # noqa: ARG002
        """Return the range of decays that its weights allow, for any input."""
        raise self._not_stated("decay_range", "the range of its decays")

    def taps(self, mixer: Any) -> Float[Tensor, "tap channel"]:  # noqa: ARG002
        """Return the weights of its convolution, the current token's last; ones if it has none."""
        raise self._not_stated("taps", "its convolution")

    def slope(self, ran: Ran, channels: Index) -> PerChannel:  # noqa: ARG002
        """Return the factor from the convolution's output to x, in fp32 or wider."""
        raise self._not_stated("slope", "the activation after its convolution")

    def gate(self, ran: Ran, channels: Index) -> PerChannel:
        """Return the factor of the output before the output projection."""
        return ran["gate"][..., channels]

    def maps(self, mixer: Any) -> dict[str, Float[Tensor, "a b"]]:  # noqa: ARG002
        """Return its linear maps.

        "in" [d_model channel] is the recurrent branch, "gate" the gate branch, and "out" [channel
        d_model] the output projection.
        """
        raise self._not_stated("maps", "its linear maps")

    def _not_stated(self, name: str, what: str) -> NotSupported:
        of = type(self)
        return NotSupported(
            f"the linear form of the kind {self.kind!r} does not state {what}: define `{name}` in "
            f"{of.__module__}.{of.__qualname__}"
        )


FORMS: dict[str, LinearForm] = {}
"""The linear form of each kind of recurrence."""


def register_form(*forms: LinearForm) -> None:
    """Register the linear forms of kinds of mixers.

    Raises:
        ValueError: a kind already has a form.

    Examples:
        >>> from hooked_hybrid.analysis.forms import FORMS, MambaForm, register_form
        >>> register_form(MambaForm())  # as the library does for its own
        >>> type(FORMS["mamba"]).__name__
        'MambaForm'
    """
    for form in forms:
        if form.kind in FORMS and type(FORMS[form.kind]) is not type(form):
            raise ValueError(f"the kind {form.kind!r} has a linear form already")
        FORMS[form.kind] = form


def form_of(cfg: object) -> LinearForm:
    """Return the linear form of the mixer that a config is for.

    Raises:
        NotSupported: it has none.

    Examples:
        >>> from hooked_hybrid.analysis.forms import form_of
        >>> type(form_of(model.cfg.layers[0].mixer)).__name__
        'RGLRUForm'
        >>> form_of(model.cfg.layers[2].mixer)
        Traceback (most recent call last):
            ...
        hooked_hybrid.network.part.NotSupported: the kind 'attention' has no linear form; ...
    """
    kind = mixer_of(cfg).kind
    if kind not in FORMS:
        raise NotSupported(
            f"the kind {kind!r} has no linear form; there are some for {', '.join(FORMS)}: call "
            "hooked_hybrid.analysis.forms.register_form(one)"
        )
    return FORMS[kind]
