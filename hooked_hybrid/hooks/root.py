"""`HookedRootModule`: running any module with hooks on its `HookPoint`s, and caching them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.attaching import AttachingModule, HookSpec
from hooked_hybrid.hooks.names import CacheFilter, matching
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import LensHandle
from hooked_hybrid.hooks.savers import CopyingSaver, KeptValues, PieceSaver, Saver
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.options import refuse_ignored


class HookedRootModule(AttachingModule):
    """A module whose hook points are found by name, run with hooks and cached.

    Call `setup()` at the end of the constructor.

    Examples:
        >>> from hooked_hybrid import HookedRootModule, HookPoint
        >>> class Double(HookedRootModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hook_out = HookPoint("batch d")
        ...         self.setup()
        ...     def forward(self, x):
        ...         return self.hook_out(2 * x)
        >>> module, hooks = Double(), [("hook_out", lambda value, hook: value + 1)]
        >>> module.run_with_hooks(torch.ones(1, 2), fwd_hooks=hooks)
        tensor([[3., 3.]])
    """

    def run_with_cache(
        self,
        *args: Any,
        names_filter: CacheFilter | None = None,
        pos_slice: PosSlice = None,
        device: torch.device | str | None = None,
        incl_bwd: bool = False,
        metric: Callable[[Any], Tensor] | None = None,
        remove_batch_dim: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the forward once and cache the values at the hook points.

        Args:
            args: positional arguments of the forward.
            names_filter: names in any spelling ("blocks.2.attn.hook_z", ("z", 2),
                "blocks.*.attn.hook_z"), one or several, or a predicate on names. None and True
                keep every point except the large ones, which are kept only when named: "*" names
                them too.
            pos_slice: positions to keep, on the position (query) axis: an int, a slice, a tuple
                `(start, stop)`, indices in a list, array or tensor, or a mask [pos] of True and
                False, counted in the whole input; or "last", each row's last token. The axis is
                kept, with length 1 for an int, as in TransformerLens. Other positions are never
                stored: a long input runs in pieces as without a cache.
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
            TypeError: a `pos_slice` of another kind, or hooks among the keywords.
            ValueError: `incl_bwd` without a metric on an output that is not a scalar, a metric
                without `incl_bwd`, points that did not run, or a single position that is padding
                in some row.

        Examples:
            >>> logits, cache = model.run_with_cache(tokens, names_filter="blocks.*.hook_pattern")
            >>> list(cache)
            ['blocks.2.attn.hook_pattern', 'blocks.5.attn.hook_pattern']
            >>> cache["pattern", 5].shape
            torch.Size([1, 8, 16, 16])
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
        names_filter: CacheFilter | None = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
    ) -> MutableMapping[str, Tensor]:
        """Attach caching hooks and return the dict they fill; `reset_hooks` detaches them.

        Values are copies: edits in place by later hooks do not change them.

        Examples:
            >>> values = model.add_caching_hooks("hook_embed")
            >>> logits = model(tokens)
            >>> model.reset_hooks()
            >>> values["hook_embed"].shape
            torch.Size([1, 16, 128])
        """
        cache = KeptValues() if cache is None else cache
        saver = CopyingSaver(cache, pos_slice, device, remove_batch_dim)
        self._watch(names_filter, saver, incl_bwd)
        return cache

    def get_caching_hooks(
        self,
        names_filter: CacheFilter | None = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
    ) -> tuple[MutableMapping[str, Tensor], list[HookSpec], list[HookSpec]]:
        """Return a dict, and the forward and backward hooks that would fill it.

        Examples:
            >>> values, fwd_hooks, _ = model.get_caching_hooks("hook_embed")
            >>> logits = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks)
            >>> values["hook_embed"].shape
            torch.Size([1, 16, 128])
        """
        cache = KeptValues() if cache is None else cache
        saver = CopyingSaver(cache, pos_slice, device, remove_batch_dim)
        return cache, *self._caching_hooks(names_filter, saver, incl_bwd)

    # --- inside -----------------------------------------------------------------------------

    def cached_names(self, names_filter: CacheFilter | None) -> list[str]:
        """Return the names that a filter keeps; None and True leave out the large ones.

        Examples:
            >>> model.cached_names("blocks.*.attn.hook_pattern")
            ['blocks.2.attn.hook_pattern', 'blocks.5.attn.hook_pattern']
        """
        if names_filter is None or names_filter is True:
            return [name for name, point in self.hook_dict.items() if not point.is_large]
        return matching(names_filter, self.hook_dict)

    def _caching_hooks(
        self, names_filter: CacheFilter | None, saver: Saver, incl_bwd: bool
    ) -> tuple[list[HookSpec], list[HookSpec]]:
        """Return the watchers that fill a cache; integer points have no gradient."""
        names = self.cached_names(names_filter)
        floating = [name for name in names if incl_bwd and not self.hook_dict[name].is_integer]
        return [(n, saver.save) for n in names], [(n, saver.save_grad) for n in floating]

    def _watch(
        self, names_filter: CacheFilter | None, saver: Saver, incl_bwd: bool
    ) -> list[LensHandle]:
        fwd, bwd = self._caching_hooks(names_filter, saver, incl_bwd)
        added = [self.hook_dict[str(name)].add_hook(hook, "fwd") for name, hook in fwd]
        return added + [self.hook_dict[str(name)].add_hook(hook, "bwd") for name, hook in bwd]

    def _may_cache_pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ARG002
        """Whether this forward passes `PieceSaver` the positions of its pieces."""
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
        """Return the cache in the form that the model returns."""
        return cache


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Exclude parameters from the graph: it starts at hook points, and no `.grad` is filled."""
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
