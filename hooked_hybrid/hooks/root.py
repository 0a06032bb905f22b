"""`HookedRootModule`: running any module with hooks on its `HookPoint`s, and caching them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.names import NameFilter, matching
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import Direction, HookFn, HookPoint, LensHandle, RunHolder
from hooked_hybrid.hooks.savers import CopyingSaver, KeptValues, PieceSaver, Saver
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.options import refuse_ignored

HookSpec = tuple[NameFilter, HookFn]
"""A hook and where it goes: `(name | names | predicate, fn)`."""


class HookedRootModule(nn.Module):
    """A module whose hook points are found by name.

    Call `setup()` at the end of the constructor.
    """

    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

    def setup(self) -> None:
        """Name every hook point by its path and collect them in `hook_dict`."""
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
            # Found in the instance's own dict, a part costs a tenth of nn.Module's lookup.
            module.__dict__.update({n: m for n, m in module._modules.items() if n.isidentifier()})

    @property
    def context_level(self) -> int:
        """How many `hooks` blocks are open."""
        return len(self._contexts)

    # --- attaching --------------------------------------------------------------------------

    def hook_points(self) -> Iterable[HookPoint]:
        """Every hook point, in the order of the modules."""
        return self.hook_dict.values()

    def list_hooks(
        self,
        name_filter: NameFilter | None = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[LensHandle]]:
        """Return what is attached, by the names of the points that have something.

        Args:
            name_filter: a name, several, or a predicate; None means every point.
            dir: forward hooks, backward hooks, or both, forward ones first.
            including_permanent: False leaves permanent hooks out.

        Raises:
            HookNameError: a name that does not exist, or a predicate that is true of none.
            ValueError: `dir` is none of the three.
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
        """Every attached function, with its point (`.point.name`) and direction, in one list."""
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
        """
        return [
            self.hook_dict[n].add_hook(hook, dir, is_permanent, level, prepend)
            for n in matching(name, self.hook_dict)
        ]

    def add_perma_hook(
        self, name: NameFilter, hook: HookFn, dir: Direction = "fwd"
    ) -> list[LensHandle]:
        """Attach a hook that survives `reset_hooks`."""
        return self.add_hook(name, hook, dir, is_permanent=True)

    def check_hooks_to_add(
        self, fwd_hooks: Iterable[HookSpec] = (), bwd_hooks: Sequence[HookSpec] = ()
    ) -> None:
        """Raise what attaching these would raise, and attach none.

        Raises:
            HookNameError: a name that does not exist, or a predicate that is true of none.
            TypeError: an entry that is not a pair of a selector and a function.
        """
        for spec in (*fwd_hooks, *bwd_hooks):
            if not isinstance(spec, Sequence) or len(spec) != 2 or not callable(spec[1]):
                raise TypeError(f"a hook is a pair (name | predicate, function), not {spec!r}")
            matching(spec[0], self.hook_dict)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[HookSpec] = (),
        bwd_hooks: Iterable[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRootModule]:
        """Attach hooks for the length of a `with` block, then remove these and no others.

        Hooks belong to the model: a forward of it in another thread calls them too. Threads that
        need hooks of their own, or gradients, need a model each (`copy.deepcopy`).

        Args:
            fwd_hooks: pairs (name | names | predicate, fn), called in this order.
            bwd_hooks: the same, for gradients.
            reset_hooks_end: False leaves them attached.
            clear_contexts: also empty every point's `ctx` at the end.

        Raises:
            HookNameError: a selector that matches nothing; then none is attached.
        """
        fwd_hooks, bwd_hooks = tuple(fwd_hooks), tuple(bwd_hooks)  # an iterator is read once
        self.check_hooks_to_add(fwd_hooks, bwd_hooks)
        self._contexts.append(context := object())  # a count would lose some if threads run at once
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
        """Detach every hook, permanent ones only if asked."""
        self.remove_all_hook_fns(direction, including_permanent, level)
        if clear_contexts:
            self.clear_contexts()

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach every hook and leave every `ctx` as it is."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty `ctx` of every hook point."""
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

        Backward hooks need the backward pass inside the same scope: use `hooks` for those, or
        `reset_hooks_end=False`. They are attached all the same, as the graph of this forward
        remembers them.

        Raises:
            ValueError: backward hooks where no graph is recorded.
        """
        if not torch.is_grad_enabled():
            why = "this runs under torch.no_grad() or inference_mode, where no graph is recorded"
            bwd_hooks = tuple(bwd_hooks)
            refuse_ignored(why, bwd_hooks=bwd_hooks)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: NameFilter | None = None,
        pos_slice: PosSlice = None,
        device: torch.device | str | None = None,
        incl_bwd: bool = False,
        metric: Callable[[Any], Tensor] | None = None,
        remove_batch_dim: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the forward once and keep what passes the hook points.

        Args:
            args: positional arguments of the forward.
            names_filter: one name, several, or a predicate. None keeps every point but the large
                ones, which are kept when named.
            pos_slice: positions to keep, on the position (query) axis: an int, a slice, a tuple
                `(start, stop)`, indices in a list, array or tensor, or a mask [pos] of True and
                False, counted in the whole input; or "last", each row's last token. The axis stays,
                of length 1 for an int, as in TransformerLens. Others are never held: a long input
                runs in pieces as without a cache.
            device: where the cache is put; None leaves each value where it is.
            incl_bwd: also keep the gradient of the target at each point, as name + "_grad".
                The `.grad` of parameters is not touched.
            metric: target of the gradients, a scalar function of the forward's output.
            remove_batch_dim: drop the batch axis, which must have length 1.
            reset_hooks_end: False leaves the caching hooks attached.
            clear_contexts: also empty every point's `ctx` at the end.
            kwargs: keyword arguments of the forward.

        Returns:
            The forward's output and the cache. Gradients are those of the hooked values as used
            downstream.

        Raises:
            HookNameError: the filter matches nothing.
            IndexError: a position outside the input, or a mask of another length.
            TypeError: a `pos_slice` that is none of these, or hooks among the keywords.
            ValueError: `incl_bwd` without a metric on an output that is not a scalar, a metric
                without `incl_bwd`, points that did not run, or a single position that is padding
                in some row.
        """
        if misplaced := [name for name in ("fwd_hooks", "bwd_hooks") if name in kwargs]:
            raise TypeError(
                f"run_with_cache takes no {misplaced[0]}: write `with model.hooks({misplaced[0]}="
                "[...]): out, cache = model.run_with_cache(...)`"
            )
        if incl_bwd:
            transforms.refuse("incl_bwd cannot run a backward pass")
        else:
            refuse_ignored("give incl_bwd=True to cache its gradients", metric=metric)
        cache: dict[str, Tensor] = {}
        in_pieces = pos_slice is not None and not incl_bwd and self._may_cache_pieces(args, kwargs)
        make = PieceSaver if in_pieces else Saver
        saver = make(cache, pos_slice, device, remove_batch_dim)
        added = self._watch(names_filter, saver, incl_bwd)
        try:
            if not incl_bwd:
                out = self(*args, **kwargs)
            else:
                with torch.inference_mode(False), torch.enable_grad(), _frozen(self):
                    out = self(*args, **kwargs)
                    self._target(out, metric, args, kwargs).backward()
                out = _detached(out)
            saver.finish()
            saver.own(out, args, kwargs)
        finally:
            if reset_hooks_end:
                for handle in added:
                    handle.remove()
            if clear_contexts:
                self.clear_contexts()
        if names_filter is not None and not cache:
            raise ValueError(
                f"names_filter={names_filter!r} keeps nothing of what ran: start_at_layer or "
                "stop_at_layer leaves those points out"
            )
        return out, self._wrap_cache(cache, not remove_batch_dim, pos_slice, saver.places)

    def add_caching_hooks(
        self,
        names_filter: NameFilter | None = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
    ) -> MutableMapping[str, Tensor]:
        """Attach caching hooks and return the dict they fill; `reset_hooks` detaches them.

        Values are copies: what later hooks edit in place stays out of them.
        """
        cache = KeptValues() if cache is None else cache
        saver = CopyingSaver(cache, pos_slice, device, remove_batch_dim)
        self._watch(names_filter, saver, incl_bwd)
        return cache

    def get_caching_hooks(
        self,
        names_filter: NameFilter | None = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
    ) -> tuple[MutableMapping[str, Tensor], list[HookSpec], list[HookSpec]]:
        """Return a dict, and the forward and backward hooks that would fill it."""
        cache = KeptValues() if cache is None else cache
        saver = CopyingSaver(cache, pos_slice, device, remove_batch_dim)
        return cache, *self._caching_hooks(names_filter, saver, incl_bwd)

    # --- inside -----------------------------------------------------------------------------

    def cached_names(self, names_filter: NameFilter | None) -> list[str]:
        """Return the names that a filter keeps; None keeps all points but the large ones."""
        if names_filter is None:
            return [name for name, point in self.hook_dict.items() if not point.is_large]
        return matching(names_filter, self.hook_dict)

    def _caching_hooks(
        self, names_filter: NameFilter | None, saver: Saver, incl_bwd: bool
    ) -> tuple[list[HookSpec], list[HookSpec]]:
        """Return the watchers that fill a cache; integers have no gradient to keep."""
        names = self.cached_names(names_filter)
        floating = [name for name in names if incl_bwd and not self.hook_dict[name].is_integer]
        return [(n, saver.save) for n in names], [(n, saver.save_grad) for n in floating]

    def _watch(
        self, names_filter: NameFilter | None, saver: Saver, incl_bwd: bool
    ) -> list[LensHandle]:
        fwd, bwd = self._caching_hooks(names_filter, saver, incl_bwd)
        added = [self.hook_dict[str(name)].add_hook(hook, "fwd") for name, hook in fwd]
        return added + [self.hook_dict[str(name)].add_hook(hook, "bwd") for name, hook in bwd]

    def _may_cache_pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ARG002
        """Whether this forward tells `PieceSaver` where its pieces belong."""
        return False

    def _target(
        self,
        out: Any,
        metric: Callable[[Any], Tensor] | None,
        args: tuple[Any, ...],  # noqa: ARG002  (a model's default target is a function of these)
        kwargs: dict[str, Any],  # noqa: ARG002
    ) -> Tensor:
        """Return the scalar whose gradients are cached; a model may have a default."""
        target = out if metric is None else metric(out)
        if not isinstance(target, Tensor) or target.numel() != 1:
            raise ValueError("incl_bwd needs a scalar to differentiate: give metric=fn(output)")
        return target

    def _wrap_cache(
        self,
        cache: dict[str, Tensor],
        has_batch_dim: bool,  # noqa: ARG002  (a plain dict does not say)
        pos_slice: PosSlice = None,  # noqa: ARG002
        places: dict[str, Places] | None = None,  # noqa: ARG002
    ) -> Any:
        """Return the cache in the form the model hands out."""
        return cache


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Keep parameters out of the graph: hook points start it, and no `.grad` is filled."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def _detached(out: Any) -> Any:
    if type(out) is tuple:
        return tuple(_detached(o) for o in out)
    return out.detach() if hasattr(out, "detach") else out
