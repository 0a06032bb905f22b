"""Random programs that attach, detach and raise, compared with a ledger of what must be attached.

A hook may remove itself or another, attach another, or raise while it is called. The ledger says
lists alone: which hooks stand on which point, in which order. What a forward must give is worked
out from it: which hooks are called, and the product of their factors at each point, applied by one
plain hook a point on a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from tests.models import random_tokens
from tests.seams.calls import assert_close


class Boom(Exception):
    """What a hook of a program raises."""


@dataclass(eq=False)
class Entry:
    """A hook in the ledger: where it is, what it multiplies by, what else it does."""

    point: str
    factor: float
    act: str = "nothing"
    target: Entry | None = None
    is_permanent: bool = False
    fn: Any = None
    in_place: bool = False


class Open(NamedTuple):
    """A `hooks` block that is open, and its entries."""

    block: AbstractContextManager[Any]
    entries: list[Entry]


@dataclass
class Ledger:
    """Lists of entries by point, the blocks that are open, and the calls of a forward."""

    model: HookedHybrid
    order: list[str]
    lists: dict[str, list[Entry]] = field(default_factory=dict)
    blocks: list[Open] = field(default_factory=list)
    calls: list[Entry] = field(default_factory=list)
    kept: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def on(self, point: str) -> list[Entry]:
        """Return what stands on a point."""
        return self.lists.setdefault(point, [])

    @property
    def entries(self) -> list[Entry]:
        """Everything attached."""
        return [entry for point in self.order for entry in self.on(point)]

    def drop(self, entry: Entry) -> None:
        """Take an entry off its list, if it is there."""
        if entry in self.on(entry.point):
            self.on(entry.point).remove(entry)

    def function(self, entry: Entry) -> Any:
        """Return the hook that an entry stands for; it does to the model what `expect` foresees."""

        if entry.fn is not None:
            return entry.fn

        def fn(value: Tensor, hook: HookPoint) -> Tensor:
            self.calls.append(entry)
            if entry.act == "remove" and entry.target is not None:
                self.remove(entry.target)
            if entry.act == "attach" and entry.target is not None:
                self.model.hook_dict[entry.target.point].add_hook(self.function(entry.target))
            if entry.act == "raise":
                raise Boom
            result = value.mul_(entry.factor) if entry.in_place else value * entry.factor
            self.kept += [(entry.point, t, t.clone()) for t in (value, result)]
            return result

        entry.fn = fn
        return fn

    def remove(self, entry: Entry) -> None:
        """Remove one handle of an entry from the model, twice, if it is attached."""
        point = self.model.hook_dict[entry.point]
        handle = next((h for h in point.fwd_hooks if h.user_hook is entry.fn), None)
        if handle is not None:
            handle.remove()
            handle.remove()

    def expect(self) -> tuple[list[Entry], dict[str, list[float]], bool]:
        """Return the calls, the factors by point, and whether the forward raises; lists change."""
        calls: list[Entry] = []
        factors: dict[str, list[float]] = {}
        for point in self.order:
            for entry in tuple(self.on(point)):
                calls.append(entry)
                if entry.act == "remove" and entry.target is not None:
                    self.drop(entry.target)
                if entry.act == "attach" and entry.target is not None:
                    self.on(entry.target.point).append(entry.target)
                if entry.act == "raise":
                    return calls, factors, True
                factors.setdefault(point, []).append(entry.factor)
        return calls, factors, False


def once_a_forward(model: HookedHybrid) -> list[str]:
    """Return the points that are called once a forward, in the order in which they are."""
    seen: list[str] = []
    names = [n for n, p in model.hook_dict.items() if not p.is_integer]

    def note(_: Tensor, hook: HookPoint) -> None:
        seen.append(str(hook.name))

    with model.hooks([(names, note)]):
        model(random_tokens(2, 6))
    return [name for name in seen if seen.count(name) == 1]


def draw_entry(random: Random, ledger: Ledger, may_act: bool = True) -> Entry:
    """Draw a hook; one in three does something else too."""
    entry = Entry(
        random.choice(ledger.order),
        random.choice([0.5, 0.75, 0.875, 1.0]),
        in_place=random.random() < 0.2,
    )
    if may_act and random.random() < 0.35:
        entry.act = random.choice(["remove", "remove", "attach", "raise"])
        others = ledger.entries
        if entry.act == "remove":
            entry.target = random.choice([entry, *others])
        if entry.act == "attach":
            entry.target = draw_entry(random, ledger, may_act=False)
    return entry


def check_program(random: Random, model: HookedHybrid) -> None:
    """Run a random program and compare lists, calls and logits with the ledger after each step."""
    clean = deepcopy(model)
    ledger = Ledger(model, once_a_forward(model))
    for _ in range(random.randint(4, 14)):
        step = random.choice([attach, attach, detach, enter, leave, reset, run, run])
        step(random, ledger, clean)
        for point in ledger.order:
            got = [handle.user_hook for handle in model.hook_dict[point].fwd_hooks]
            assert len(got) == len(ledger.on(point)), f"{step.__name__}: {point} holds {len(got)}"
    while ledger.blocks:
        leave(random, ledger, clean)
    model.reset_hooks(including_permanent=True)
    tokens = random_tokens(2, 6)
    assert torch.equal(model(tokens), clean(tokens))
    assert model.context_level == 0


def attach(random: Random, ledger: Ledger, _: HookedHybrid) -> None:
    """Attach a hook at either end of a point's list."""
    entry = draw_entry(random, ledger)
    entry.is_permanent, prepend = random.random() < 0.3, random.random() < 0.3
    point = ledger.model.hook_dict[entry.point]
    point.add_hook(ledger.function(entry), is_permanent=entry.is_permanent, prepend=prepend)
    standing = ledger.on(entry.point)
    standing.insert(0 if prepend else len(standing), entry)


def detach(random: Random, ledger: Ledger, _: HookedHybrid) -> None:
    """Remove one hook by its handle, twice."""
    if ledger.entries:
        entry = random.choice(ledger.entries)
        ledger.remove(entry)
        ledger.drop(entry)


def enter(random: Random, ledger: Ledger, _: HookedHybrid) -> None:
    """Open a `hooks` block."""
    entries = [draw_entry(random, ledger) for _ in range(random.randint(1, 3))]
    block = ledger.model.hooks([(entry.point, ledger.function(entry)) for entry in entries])
    block.__enter__()
    for entry in entries:
        ledger.on(entry.point).append(entry)
    ledger.blocks.append(Open(block, entries))


def leave(random: Random, ledger: Ledger, _: HookedHybrid) -> None:
    """Close any open block, with or without an exception."""
    if not ledger.blocks:
        return
    block, entries = ledger.blocks.pop(random.randrange(len(ledger.blocks)))
    if random.random() < 0.3:
        with suppress(Boom):
            block.__exit__(Boom, Boom(), None)
    else:
        block.__exit__(None, None, None)
    for entry in entries:
        ledger.drop(entry)


def reset(random: Random, ledger: Ledger, _: HookedHybrid) -> None:
    """Remove all hooks, or all but the permanent ones."""
    if random.random() < 0.5:
        return
    everything = random.random() < 0.5
    ledger.model.reset_hooks(including_permanent=everything)
    for entry in ledger.entries:
        if everything or not entry.is_permanent:
            ledger.drop(entry)


def run(random: Random, ledger: Ledger, clean: HookedHybrid) -> None:
    """Run a forward by a random entry and compare calls and logits."""
    tokens = random_tokens(2, random.choice([1, 6, 20]), seed=random.randrange(100))
    ledger.calls.clear()
    ledger.kept.clear()
    with _extra(random, ledger) as call:
        calls, factors, raises = ledger.expect()
        try:
            logits = call(tokens)
            assert not raises, "a hook's error was lost"
        except Boom:
            assert raises, "an error of a hook that was not to be called"
    called, foreseen = (
        [(e.point, e.act, e.factor, e.target and e.target.point) for e in listed]
        for listed in (ledger.calls, calls)
    )
    assert called == foreseen, f"called {called}, not {foreseen}"
    if not any(entry.in_place for entry in calls):  # else a hook may write over another's
        for point, value, before in ledger.kept:
            assert torch.equal(value, before), f"what a hook kept of {point} was written over"
    if not raises:
        hooks = [(point, _multiplier(values)) for point, values in factors.items()]
        assert_close(logits, clean.run_with_hooks(tokens, fwd_hooks=hooks), "logits of a program")


@contextmanager
def _extra(random: Random, ledger: Ledger) -> Iterator[Any]:
    """Yield a way to run the model: plain, with hooks of its own, or with a cache."""
    way = random.choice(["plain", "hooks", "cache"])
    model = ledger.model
    if way == "plain":
        yield model
    elif way == "cache":
        name = random.choice(ledger.order)
        yield lambda tokens: model.run_with_cache(tokens, names_filter=name)[0]
    else:
        entries = [draw_entry(random, ledger) for _ in range(2)]
        hooks = [(entry.point, ledger.function(entry)) for entry in entries]
        for entry in entries:
            ledger.on(entry.point).append(entry)
        yield lambda tokens: model.run_with_hooks(tokens, fwd_hooks=hooks)
        for entry in entries:
            ledger.drop(entry)


def _multiplier(factors: list[float]) -> Any:
    def multiply(value: Tensor, hook: HookPoint) -> Tensor:
        for factor in factors:
            value = value * factor
        return value

    return multiply
