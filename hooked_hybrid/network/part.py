"""The base class of mixers and MLPs, with the facts that the rest of the library reads.

All that the library knows of a kind of mixer or MLP is in its class. Reading a fact that has no
default and that the class does not state raises `NotSupported`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, NoReturn

from hooked_hybrid.network.component import Component
from hooked_hybrid.network.costs import Flops, Piece
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.written import Split


class NotSupported(ValueError):
    """A mixer or an MLP does not state a fact that a function needs.

    Examples:
        >>> from hooked_hybrid.network.mixers import Mixer
        >>> class Unfinished(Mixer):
        ...     pass
        >>> Unfinished.kind
        Traceback (most recent call last):
            ...
        hooked_hybrid.network.part.NotSupported: Unfinished does not state what it is ...
    """


class Unstated:
    """A fact without a default: reading it raises `NotSupported`.

    Args:
        what: a description of the fact, for the message.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type[Part]) -> NoReturn:
        raise not_stated(owner, self.name, self.what)


class FoldedNorm(NamedTuple):
    """A norm inside a mixer or MLP; paths are relative to it."""

    norm: str
    reader: str
    """The only parameter that reads the norm's output."""
    hook: str
    """The hook point between the two."""


class Part(Component):
    """The common base of mixers and MLPs: their names, inputs and outputs."""

    config: ClassVar[type] = Unstated("its config class")  # type: ignore[assignment]
    """The class of its configs."""
    kind: ClassVar[str] = Unstated("what it is called")  # type: ignore[assignment]
    """Its name in arguments and columns, which is unique."""
    title: ClassVar[str] = ""
    """Its name in text; by default `kind`."""
    row: ClassVar[str] = ""
    """Its row in tables of parameters and operations; by default `title`."""
    label: ClassVar[str] = ""
    """The name of its output in labels; by default `kind`."""

    reads: ClassVar[tuple[str, ...]] = Unstated(  # type: ignore[assignment]
        "the parameters that read the residual stream"
    )
    """Names of the parameters [... d_model] that read the output of the block's norm; nothing else
    reads it."""
    writes: ClassVar[tuple[str, ...]] = Unstated(  # type: ignore[assignment]
        "the parameters that write to the residual stream"
    )
    """Names of the parameters [... d_model d_in] whose products are added to the stream."""
    kept_plain: ClassVar[tuple[str, ...]] = ()
    """Those of `reads` and `writes` that are never quantised."""
    scales_write: ClassVar[bool] = False
    """Whether it multiplies what it writes by `cfg.write_scale`: its output bias too, and the
    values at hook points on parts of the write."""
    hooks_after_norm: ClassVar[tuple[str, ...]] = ()
    """Hook points between the block's norm and `reads`."""
    inner_norms: ClassVar[tuple[FoldedNorm, ...]] = ()
    """Inner norms that can be folded into the parameters that read them."""

    hook_meanings: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The meaning of each of its hook points, by name, for the page of hook points."""

    part_letter: ClassVar[str | None] = None
    """Letter of the parts of its output in labels ("L2H0"); None if it has no parts."""

    rows_apart: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Children whose parameters have a separate row, with the name of the row."""
    rows_within: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Children whose parameters are also listed as a part of `row`, with the name of that part."""

    cfg: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Fill in the names that follow from the kind."""
        super().__init_subclass__(**kwargs)
        if "kind" not in vars(cls):
            return
        cls.title = vars(cls).get("title", cls.kind)
        cls.row = vars(cls).get("row", cls.title)
        cls.label = vars(cls).get("label", cls.kind)

    def split(self, norm: RMSNorm | None) -> Split:  # noqa: ARG002
        """Return its output as a sum of separate parts.

        Args:
            norm: the norm before it in the block; None if there is none.

        Raises:
            NotSupported: it states no parts.
        """
        raise not_stated(type(self), "split", "parts of its write that act apart")

    @classmethod
    def operations(cls, cfg: Any, d_model: int) -> dict[str, Flops]:  # noqa: ARG003
        """Return the operations of one token, by row of the tables.

        The operations of a mixer for each pair of a query and a key are in `pair_operations`.
        """
        raise not_stated(cls, "operations", "its floating-point operations")

    @classmethod
    def working_bytes(cls, cfg: Any, d_model: int, piece: Piece) -> int:  # noqa: ARG003
        """Return the largest number of bytes that its values take while a piece is run.

        Its output is included, its input is not. Without hooks and gradients.
        """
        raise not_stated(cls, "working_bytes", "the bytes of its values in a forward")

    @classmethod
    def active_parameters(cls, cfg: Any, child: str, n: int) -> int:  # noqa: ARG003
        """Return how many of the `n` parameters of a child act on one token; by default all."""
        return n

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """Return its rows in the tables of parameters and operations, in their order."""
        return (*cls.rows_apart.values(), cls.row)

    @classmethod
    def large(cls) -> tuple[str, ...]:
        """Return the parameters that may be quantised: those that read or write the stream."""
        return tuple(name for name in (*cls.reads, *cls.writes) if name not in cls.kept_plain)


def not_stated(part: type[Part], name: str, what: str) -> NotSupported:
    """Return the error for a fact that a class does not state."""
    stated = next((vars(c)["kind"] for c in part.__mro__ if "kind" in vars(c)), None)
    called = f"the kind {stated!r} ({part.__name__})" if isinstance(stated, str) else part.__name__
    return NotSupported(
        f"{called} does not state {what}: define `{name}` in {part.__module__}.{part.__qualname__}"
    )


def register(known: dict[type, type[Any]], part: type[Part], names: tuple[str, ...]) -> None:
    """Register a class under its config class, after checking that it states `names`.

    Raises:
        NotSupported: one of `names` is not stated.
        ValueError: another class has its config or its kind.
    """
    for name in names:
        getattr(part, name)
    for other in known.values():
        same = [n for n in ("config", "kind") if getattr(other, n) == getattr(part, n)]
        if same and other is not part:
            raise ValueError(
                f"{part.__name__} has the {same[0]} of {other.__name__}, "
                f"{getattr(part, same[0])!r}: give it one of its own"
            )
    known[part.config] = part


def look_up(known: Mapping[type, type[Any]], cfg: object, what: str) -> type[Any]:
    """Return the class that a config is for.

    Raises:
        NotSupported: none is registered for it.
    """
    try:
        return known[type(cfg)]
    except KeyError:
        have = ", ".join(c.__name__ for c in known)
        raise NotSupported(
            f"no {what} is registered for a {type(cfg).__name__}; there are some for {have}: "
            f"call hooked_hybrid.network.{what}s.register_{what}(its class)"
        ) from None
