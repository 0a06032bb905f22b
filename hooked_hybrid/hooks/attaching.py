"""`AttachingModule`: a module whose hook points are found by name, to attach hooks to and run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import nn

from hooked_hybrid.hooks.marks import HookFn
from hooked_hybrid.hooks.names import NameFilter, matching
from hooked_hybrid.hooks.point import Direction, HookPoint, LensHandle
from hooked_hybrid.hooks.run import RunHolder
from hooked_hybrid.options import refuse_ignored

HookSpec = tuple[NameFilter, HookFn]
"""A hook and where it goes: `(names, fn)`, with one or several names in any spelling of
`hooks.names`, or a predicate."""


class AttachingModule(nn.Module):
    """A module whose hook points are found by name.

    Call `setup()` at the end of the constructor.
    """

    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

    def setup(self) -> None:
        """Name every hook point by its path and collect them in `hook_dict`.

        Examples:
            >>> from hooked_hybrid import HookedRootModule, HookPoint
            >>> module = HookedRootModule()
            >>> module.hook_out = HookPoint("batch d")
            >>> module.setup()
            >>> list(module.hook_dict)
            ['hook_out']
        """
        self.mod_dict = {name: module for name, module in self.named_modules() if name}
        self.hook_dict = {n: m for n, m in self.mod_dict.items() if isinstance(m, HookPoint)}
        self.run_holder = RunHolder()
        self._contexts: list[object] = []
        for name, point in self.hook_dict.items():
            point.name = name
            point.run_holder = self.run_holder
        for module in self.modules():
            for part in module.children():
                if isinstance(part, HookPoint):
                    part.owner = type(module)
            # Reading a child from the instance's own dict takes a tenth of nn.Module's lookup.
            module.__dict__.update({n: m for n, m in module._modules.items() if n.isidentifier()})

    @property
    def context_level(self) -> int:
        """How many `hooks` blocks are open."""
        return len(self._contexts)

    # --- attaching --------------------------------------------------------------------------

    def hook_points(self) -> Iterable[HookPoint]:
        """Every hook point, in the order of the modules.

        Examples:
            >>> len(list(model.hook_points())) == len(model.hook_dict)
            True
        """
        return self.hook_dict.values()

    def list_hooks(
        self,
        name_filter: NameFilter | None = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[LensHandle]]:
        """Return the attached functions by the names of their points; other points are left out.

        Args:
            name_filter: names in any spelling, or a predicate; None means every point.
            dir: forward hooks, backward hooks, or both, forward ones first.
            including_permanent: False leaves permanent hooks out.

        Raises:
            HookNameError: a name that does not exist, or a pattern or predicate that selects no
                point.
            ValueError: `dir` is not one of the three.

        Examples:
            >>> with model.hooks(fwd_hooks=interventions.cut_heads({2: [0]})):
            ...     list(model.list_hooks())
            ['blocks.2.attn.hook_z']
        """
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"direction {dir!r}: give 'fwd', 'bwd' or 'both'")
        names = self.hook_dict if name_filter is None else matching(name_filter, self.hook_dict)
        found = {}
        for name in names:
            fwd, bwd = self.hook_dict[name].fwd_hooks, self.hook_dict[name].bwd_hooks
            both = (*(fwd if dir != "bwd" else ()), *(bwd if dir != "fwd" else ()))
            if chosen := [h for h in both if including_permanent or not h.is_permanent]:
                found[name] = chosen
        return found

    def attached(self) -> list[LensHandle]:
        """Every attached function, with its point (`.point.name`) and direction, in one list.

        Examples:
            >>> with model.hooks(fwd_hooks=interventions.cut_heads({2: [0], 5: [0]})):
            ...     [handle.point.name for handle in model.attached()]
            ['blocks.2.attn.hook_z', 'blocks.5.attn.hook_z']
        """
        return [h for p in self.hook_points() for h in (*p.fwd_hooks, *p.bwd_hooks)]

    def add_hook(
        self,
        name: NameFilter,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> list[LensHandle]:
        """Attach `hook` to every point that `name` selects; see `HookPoint.add_hook`.

        Raises:
            HookNameError: nothing is selected; the message lists the nearest names.

        Examples:
            >>> handles = model.add_hook("hook_embed", lambda value, hook: 0 * value)
            >>> torch.equal(model(tokens), logits)
            False
            >>> model.reset_hooks()
        """
        return [
            self.hook_dict[n].add_hook(hook, dir, is_permanent, level, prepend)
            for n in matching(name, self.hook_dict)
        ]

    def add_perma_hook(
        self, name: NameFilter, hook: HookFn, dir: Direction = "fwd"
    ) -> list[LensHandle]:
        """Attach a hook that survives `reset_hooks`.

        Examples:
            >>> handles = model.add_perma_hook("hook_embed", lambda value, hook: None)
            >>> model.reset_hooks()
            >>> list(model.list_hooks())
            ['hook_embed']
            >>> model.reset_hooks(including_permanent=True)
        """
        return self.add_hook(name, hook, dir, is_permanent=True)

    def check_hooks_to_add(
        self, fwd_hooks: Iterable[HookSpec] = (), bwd_hooks: Sequence[HookSpec] = ()
    ) -> None:
        """Raise the errors that attaching these hooks would raise, without attaching any.

        Raises:
            HookNameError: a name that does not exist, or a pattern or predicate that selects no
                point.
            TypeError: an entry that is not a pair of a selector and a function.

        Examples:
            >>> model.check_hooks_to_add(interventions.cut_heads({3: [0]}))  # a layer without heads
            Traceback (most recent call last):
                ...
            hooked_hybrid.hooks.names.HookNameError: no hook point is named ...
        """
        for spec in (*fwd_hooks, *bwd_hooks):
            if not isinstance(spec, Sequence) or len(spec) != 2 or not callable(spec[1]):
                raise TypeError(
                    f"a hook is a pair (name | names | predicate, function), not {spec!r}"
                )
            matching(spec[0], self.hook_dict)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[HookSpec] = (),
        bwd_hooks: Iterable[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Attach hooks for the length of a `with` block, then remove these and no others.

        Hooks belong to the model: a forward of it in another thread calls them too. Each thread
        that needs its own hooks, or gradients, needs its own model (`copy.deepcopy`).

        Args:
            fwd_hooks: pairs (names, fn), called in this order; names in any spelling
                ("blocks.2.attn.hook_z", ("z", 2), "blocks.*.attn.hook_z"), one or several, or a
                predicate on names.
            bwd_hooks: the same, for gradients.
            reset_hooks_end: False leaves them attached.
            clear_contexts: also empty every point's `ctx` at the end.

        Raises:
            HookNameError: a selector that matches nothing; no hook is attached then.

        Examples:
            >>> with model.hooks(fwd_hooks=interventions.keep_top_heads(1)):
            ...     one_head = model(tokens)
            >>> one_head.shape, model.attached()
            (torch.Size([1, 16, 583]), [])
        """
        fwd_hooks, bwd_hooks = tuple(fwd_hooks), tuple(bwd_hooks)  # an iterator is read once
        self.check_hooks_to_add(fwd_hooks, bwd_hooks)
        self._contexts.append(context := object())  # a count would be wrong with threads
        added: list[LensHandle] = []
        try:
            for specs, direction in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
                for name, hook in specs:
                    added += self.add_hook(name, hook, direction, level=self.context_level)  # type: ignore[arg-type]
            yield self
        finally:
            self._contexts.remove(context)
            if reset_hooks_end:
                for handle in added:
                    handle.remove()
            if clear_contexts:
                self.clear_contexts()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach every hook; permanent ones only with `including_permanent`.

        Examples:
            >>> handles = model.add_hook("hook_embed", lambda value, hook: 0 * value)
            >>> model.reset_hooks()
            >>> model.list_hooks()
            {}
        """
        self.remove_all_hook_fns(direction, including_permanent, level)
        if clear_contexts:
            self.clear_contexts()

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach every hook and leave every `ctx` as it is.

        Examples:
            >>> handles = model.add_hook("hook_embed", lambda value, hook: 0 * value)
            >>> model.remove_all_hook_fns()
            >>> model.attached()
            []
        """
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty `ctx` of every hook point.

        Examples:
            >>> model.hook_dict["hook_embed"].ctx["seen"] = 1
            >>> model.clear_contexts()
            >>> model.hook_dict["hook_embed"].ctx
            {}
        """
        for point in self.hook_points():
            point.clear_context()

    # --- running ----------------------------------------------------------------------------

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Iterable[HookSpec] = (),
        bwd_hooks: Iterable[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the forward once with hooks attached; see `hooks` and the forward's own arguments.

        Backward hooks act in the backward pass. To remove them only after it, use `hooks`, or
        `reset_hooks_end=False`; otherwise the graph of this forward still calls them.

        Raises:
            ValueError: backward hooks where no graph is recorded.

        Examples:
            >>> def raise_answer(value, hook):
            ...     value[..., answer] += 100
            >>> hooks = [("unembed.hook_logits", raise_answer)]
            >>> hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
            >>> (hooked.argmax(-1) == answer).all().item()
            True
        """
        if not torch.is_grad_enabled():
            why = "this runs under torch.no_grad() or inference_mode, where no graph is recorded"
            bwd_hooks = tuple(bwd_hooks)
            refuse_ignored(why, bwd_hooks=bwd_hooks)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)
