"""A mixer or an MLP, and what the rest of the library may ask of it.

Everything that is known of a kind of mixer or MLP stands in its class, and is read from there. A
fact without a default that a class does not state raises `NotSupported` where it is asked for.
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
    """A mixer or an MLP does not state what a function needs to know of it."""


class Unstated:
    """A fact without a default: reading it raises `NotSupported`.

    Args:
        what: what the fact is, as the message says it.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type[Part]) -> NoReturn:
        raise not_stated(owner, self.name, self.what)


class FoldedNorm(NamedTuple):
    """A norm inside a mixer or MLP, by paths below it."""

    norm: str
    reader: str
    """The parameter that reads what the norm gives, and nothing else does."""
    hook: str
    """The hook point between the two."""


class Part(Component):
    """What a mixer and an MLP have in common: how they are called, what they read and write."""

    config: ClassVar[type] = Unstated("its config class")  # type: ignore[assignment]
    """The class of the configs that this class is made from."""
    kind: ClassVar[str] = Unstated("what it is called")  # type: ignore[assignment]
    """What it is called in arguments and columns; no two classes have the same."""
    title: ClassVar[str] = ""
    """What it is called in text; `kind` where nothing else is given."""
    row: ClassVar[str] = ""
    """Its row in tables of parameters and operations; `title` where nothing else is given."""
    label: ClassVar[str] = ""
    """What its write is called in labels; `kind` where nothing else is given."""

    reads: ClassVar[tuple[str, ...]] = Unstated(  # type: ignore[assignment]
        "the parameters that read the residual stream"
    )
    """Parameters [... d_model], by name, that read what the block's norm gives, and are all that
    does."""
    writes: ClassVar[tuple[str, ...]] = Unstated(  # type: ignore[assignment]
        "the parameters that write to the residual stream"
    )
    """Parameters [... d_model d_in], by name, whose products are added to the stream."""
    kept_plain: ClassVar[tuple[str, ...]] = ()
    """Those of `reads` and `writes` that are never quantised."""
    hooks_after_norm: ClassVar[tuple[str, ...]] = ()
    """Hook points between the block's norm and `reads`."""
    inner_norms: ClassVar[tuple[FoldedNorm, ...]] = ()
    """Norms inside that are folded into what reads them."""

    hook_meanings: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What each of its hook points holds, by name, for the page of hook points."""

    part_letter: ClassVar[str | None] = None
    """What a part of its write is called in labels ("L2H0"); None where it acts as one."""

    rows_apart: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Children whose parameters are a row of their own, with its name."""
    rows_within: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Children whose parameters are also counted alone, inside `row`, with the name of that."""

    cfg: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class that states its kind the names that follow from it."""
        super().__init_subclass__(**kwargs)
        if "kind" not in vars(cls):
            return
        cls.title = vars(cls).get("title", cls.kind)
        cls.row = vars(cls).get("row", cls.title)
        cls.label = vars(cls).get("label", cls.kind)

    def split(self, norm: RMSNorm) -> Split:  # noqa: ARG002
        """Return its write as parts that act apart.

        Args:
            norm: what it reads through, before it in the block.

        Raises:
            NotSupported: it states no such parts.
        """
        raise not_stated(type(self), "split", "parts of its write that act apart")

    @classmethod
    def operations(cls, cfg: Any, d_model: int) -> dict[str, Flops]:  # noqa: ARG003
        """Return the operations of one token, by row of the tables.

        What a mixer does with each pair of a query and a key is apart: `pair_operations`.
        """
        raise not_stated(cls, "operations", "its floating-point operations")

    @classmethod
    def working_bytes(cls, cfg: Any, d_model: int, piece: Piece) -> int:  # noqa: ARG003
        """Return the bytes that its own values take at their most while a piece is run.

        What it writes is among them, what it is given is not. Without hooks and gradients.
        """
        raise not_stated(cls, "working_bytes", "the bytes of its values in a forward")

    @classmethod
    def active_parameters(cls, cfg: Any, child: str, n: int) -> int:  # noqa: ARG003
        """Return how many of the `n` parameters of a child act on one token: all, as a rule."""
        return n

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """Return its rows in the tables of parameters and operations, in their order."""
        return (*cls.rows_apart.values(), cls.row)

    @classmethod
    def large(cls) -> tuple[str, ...]:
        """Return the parameters that may be quantised: all that reads or writes the stream."""
        return tuple(name for name in (*cls.reads, *cls.writes) if name not in cls.kept_plain)


def not_stated(part: type[Part], name: str, what: str) -> NotSupported:
    """Return the error that a class does not state a fact."""
    stated = next((vars(c)["kind"] for c in part.__mro__ if "kind" in vars(c)), None)
    called = f"the kind {stated!r} ({part.__name__})" if isinstance(stated, str) else part.__name__
    return NotSupported(
        f"{called} does not state {what}: define `{name}` in {part.__module__}.{part.__qualname__}"
    )


def register(known: dict[type, type[Any]], part: type[Part], names: tuple[str, ...]) -> None:
    """Let a class be found by its config, where it states `names` and its kind is new.

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
