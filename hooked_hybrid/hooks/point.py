"""`HookPoint`: a named identity on which functions read, replace and differentiate a value.

Nothing here depends on a model. A function attached to a point is called `fn(tensor, hook=point)`
and returns a replacement or None, as in TransformerLens. What `hook.run` holds is in `run.py`, the
marks that a function may carry in `marks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.marks import HookFn, is_per_position, is_watcher
from hooked_hybrid.hooks.one_position import ONCE_A_POSITION, OnePosition
from hooked_hybrid.hooks.run import Run, RunHolder

Direction = Literal["fwd", "bwd"]
"""Whether a hook is called in the forward or in the backward pass."""


@dataclass(eq=False)
class LensHandle:
    """One function on one hook point. A watcher only reads, and is given whole tensors.

    Examples:
        >>> (handle,) = model.add_hook("hook_embed", lambda value, hook: None)
        >>> handle.point.name, handle.direction
        ('hook_embed', 'fwd')
        >>> model.reset_hooks()
    """

    point: HookPoint
    hook: HookFn
    direction: Direction
    is_permanent: bool = False
    level: int | None = None
    is_watcher: bool = False

    @property
    def user_hook(self) -> HookFn:
        """The function as it was given."""
        return self.hook

    def remove(self) -> None:
        """Detach the function; a second call does nothing."""
        handles = self.point._handles(self.direction)
        if self in handles:
            handles.remove(self)


class HookPoint(nn.Module):
    """An identity with a name, on which hooks are called.

    The hooks attached when a value arrives are all called, in order, even if one of them removes
    another. A hook that a hook attaches here is called from the next value on.

    Args:
        axes: names of the value's axes, for example `"batch pos d_model"`.
        large: whether `run_with_cache` keeps the value only when it is named.
        lazy: whether the value is computed only when something is attached here.
        integer: whether the value is an index, without a gradient.
        stepwise: whether hooks are called once a position, with one entry on the position axis;
            watchers are given all positions at once. A hook that is not marked `per_position`
            may not index the position axis: it would act at every position.
        whole: whether the forward does not run in pieces while anything is attached here.

    Examples:
        >>> point = model.hook_dict["blocks.2.attn.hook_pattern"]
        >>> point.axes, point.layer()
        (('batch', 'head', 'query', 'key'), 2)
        >>> handle = point.add_hook(lambda value, hook: 0 * value)
        >>> point.has_hooks()
        True
        >>> point.remove_hooks()
    """

    def __init__(
        self,
        axes: str = "",
        *,
        large: bool = False,
        lazy: bool = False,
        integer: bool = False,
        stepwise: bool = False,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.axes = tuple(axes.split())
        self.is_large = large
        self.is_lazy = lazy
        self.is_integer = integer
        self.is_stepwise, self.is_whole = stepwise, whole
        self.name: str | None = None
        self.owner: type | None = None  # the class of the module that has it
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.run_holder = RunHolder()

    def __call__(
        self,
        x: Tensor,
        constrain: Callable[[Tensor], Tensor] | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """Return `x` after every hook attached here; with none, return `x` itself.

        Args:
            x: the value, with the axes this point was made with.
            constrain: applied after each hook that may have edited `x` (a mask, say).
            run: what `hook.run` is during the call; None keeps the model's current one.
        """
        if not self.fwd_hooks and not self.bwd_hooks:  # bypasses nn.Module.__call__: 30x cheaper
            return x
        return self.apply_hooks(x, self.fwd_hooks, self.bwd_hooks, constrain, run)

    forward = __call__

    def branch(self, x: Tensor) -> Tensor:
        """Hook one of several uses of `x`; an edit in place does not change the others."""
        if not self.fwd_hooks and not self.bwd_hooks:
            return x
        return self(x.clone() if self.has_editors else x)

    def apply_hooks(
        self,
        x: Tensor,
        fwd: Sequence[LensHandle],
        bwd: Sequence[LensHandle],
        constrain: Callable[[Tensor], Tensor] | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """Return `x` after the given handles of this point; see `__call__`."""
        with nullcontext() if run is None else self.seeing(run):
            for handle in tuple(fwd):
                result = self._called(handle, x)
                if result is not None and not handle.is_watcher:
                    x = self._checked(result, x, handle.hook)
                if constrain is not None and not handle.is_watcher:
                    x = constrain(x)
            if bwd and torch.is_grad_enabled():
                x = self._listen(x, tuple(bwd))
                # Where an edit has no effect, the gradient is zero too.
                x = x if constrain is None else constrain(x)
            return x

    # --- what is attached -------------------------------------------------------------------

    @property
    def is_hooked(self) -> bool:
        """Whether anything is attached, in either direction."""
        return bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def has_editors(self) -> bool:
        """Whether anything but a watcher is attached, in either direction."""
        return any(not h.is_watcher for h in (*self.fwd_hooks, *self.bwd_hooks))

    @property
    def takes_pieces(self) -> bool:
        """Whether everything attached may be called on pieces along the position axis."""
        handles = (*self.fwd_hooks, *self.bwd_hooks)
        return not (self.is_whole and handles) and all(is_per_position(h.hook) for h in handles)

    @property
    def run(self) -> Run:
        """Where the model is in its run. Only inside a hook.

        Raises:
            RuntimeError: no forward of the model is running.
        """
        if self.run_holder.run is None:
            raise RuntimeError(f"hook.run of {self.name!r} exists only while the model runs")
        return self.run_holder.run

    @property
    def run_or_none(self) -> Run | None:
        """`run`, or None in a root module that lays out no positions."""
        return self.run_holder.run

    @property
    def pos_dim(self) -> int:
        """Index of the position axis: queries, in scores and patterns.

        Raises:
            ValueError: the point was made without a position axis.
        """
        for name in ("pos", "query"):
            if name in self.axes:
                return self.axes.index(name)
        raise ValueError(f"{self.name!r} has axes {self.axes}, none of them a position")

    def seeing(self, run: Run) -> AbstractContextManager[None]:
        """Set `hook.run` to another run for the length of a `with` block."""
        return self.run_holder.holding(run)

    def has_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether hooks of this direction, and of this context level if given, are attached."""
        return any(
            (including_permanent or not h.is_permanent) and (level is None or h.level == level)
            for direction in _directions(dir)
            for h in self._handles(direction)
        )

    def layer(self) -> int:
        """Index of the residual block this point lies in, read from its name.

        Raises:
            ValueError: the point lies outside the blocks.
        """
        parts = (self.name or "").split(".")
        if len(parts) < 2 or parts[0] != "blocks":
            raise ValueError(f"{self.name!r} lies in no block, so it has no layer")
        return int(parts[1])

    # --- attaching and removing -------------------------------------------------------------

    def add_hook(
        self,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> LensHandle:
        """Attach `hook`; it is called as `hook(tensor, hook=self)`.

        Args:
            hook: returns a replacement of the same shape, dtype and device, or None. With
                `dir="bwd"` it is given the gradient.
            dir: "fwd" for the value, "bwd" for its gradient.
            is_permanent: survives `remove_hooks` by default.
            level: context depth, for `remove_hooks(level=...)`.
            prepend: run before those attached already, instead of after.

        Raises:
            ValueError: `dir` is neither.
            TypeError: `hook` is not callable.
        """
        if not callable(hook):
            raise TypeError(f"a hook on {self.name!r} must be callable, not {hook!r}")
        handle = LensHandle(self, hook, dir, is_permanent, level, is_watcher=is_watcher(hook))
        handles = self._handles(dir)
        handles.insert(0 if prepend else len(handles), handle)
        return handle

    def add_perma_hook(self, hook: HookFn, dir: Direction = "fwd") -> LensHandle:
        """Attach a hook that survives `reset_hooks`."""
        return self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach hooks of a direction, permanent ones only if asked.

        Raises:
            ValueError: `dir` is none of "fwd", "bwd", "both".
        """
        for direction in _directions(dir):
            handles = self._handles(direction)
            handles[:] = [
                h
                for h in handles
                if (h.is_permanent and not including_permanent)
                or (level is not None and h.level != level)
            ]

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx = {}

    def register_forward_hook(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a torch hook here would be skipped by the idle guard; use `add_hook`."""
        raise TypeError(f"use add_hook on {self.name!r}: torch's own hooks would not be called")

    register_forward_pre_hook = register_forward_hook
    register_full_backward_hook = register_forward_hook
    register_full_backward_pre_hook = register_forward_hook
    register_backward_hook = register_forward_hook

    def extra_repr(self) -> str:
        """Show the axes, and how many functions are attached, in the model's printout."""
        counts = ((len(self.fwd_hooks), "fwd"), (len(self.bwd_hooks), "bwd"))
        attached = [f"{n} {direction}" for n, direction in counts if n]
        once = ["hooks are called once a position, on pos of length 1"] if self.is_stepwise else []
        return ", ".join([" ".join(self.axes), *once, *attached])

    def __repr__(self) -> str:
        """Return the name, the axes and how many functions are attached."""
        name = "" if self.name is None else f"{self.name!r}, "
        return f"HookPoint({name}{self.extra_repr()})"

    # --- inside -----------------------------------------------------------------------------

    def _handles(self, direction: str) -> list[LensHandle]:
        if direction not in ("fwd", "bwd"):
            raise ValueError(f"direction {direction!r}: give 'fwd' or 'bwd'")
        return self.fwd_hooks if direction == "fwd" else self.bwd_hooks

    def _called(self, handle: LensHandle, value: Tensor) -> Any:
        """Call a hook and return its result; an error gets a note with the hook and the point."""
        here = None
        is_plain = type(value) is Tensor  # fake tensors, say, are passed unchanged
        if (
            self.is_stepwise
            and is_plain
            and not (handle.is_watcher or is_per_position(handle.hook))
        ):
            value = here = OnePosition.of(value, str(self.name))
        try:
            result = handle.hook(value, hook=self)
        except BaseException as error:
            error.add_note(f"in the hook {_name_of(handle.hook)} on {self.name!r}")
            if self.is_stepwise and isinstance(error, IndexError):
                error.add_note(ONCE_A_POSITION)
            raise
        else:
            return result
        finally:
            if here is not None:
                here.close()

    def _checked(self, result: object, x: Tensor, hook: HookFn) -> Tensor:
        """Refuse a replacement that the rest of the forward could not use."""
        name = _name_of(hook)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"the hook {name} on {self.name!r} returned {type(result).__name__}; "
                "return a tensor, or None to leave the value as it is"
            )
        for what in ("shape", "dtype", "device"):
            got, wanted = getattr(result, what), getattr(x, what)
            if got != wanted:
                shown = (tuple(got), tuple(wanted)) if what == "shape" else (got, wanted)
                raise ValueError(
                    f"the hook {name} on {self.name!r} returned {what} {shown[0]}; "
                    f"the value it replaces has {what} {shown[1]}"
                    + ("" if what == "shape" else " (use .to(tensor))")
                )
        return result

    def _listen(self, x: Tensor, handles: tuple[LensHandle, ...]) -> Tensor:
        """Return `x` as a new node of the graph; the handles are called on its gradient."""
        transforms.refuse(f"hooks on gradients, such as those on {self.name!r}, cannot be called")
        if not x.is_floating_point():
            raise ValueError(f"{self.name!r} holds {x.dtype} values, which have no gradient")
        # A frozen model still has activations to differentiate: start the graph here.
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        run = self.run_holder.run

        def backward(grad: Tensor) -> Tensor:
            with nullcontext() if run is None else self.seeing(run):
                for handle in handles:
                    result = self._called(handle, grad)
                    result = result[0] if isinstance(result, tuple) else result
                    if result is not None and not handle.is_watcher:
                        grad = self._checked(result, grad, handle.hook)
                return grad

        x.register_hook(backward)
        return x


def changed_meanwhile(point: HookPoint) -> str:
    """Return the error of a forward whose hooks changed between its pieces.

    Examples:
        >>> from hooked_hybrid.hooks import changed_meanwhile
        >>> changed_meanwhile(model.hook_dict["hook_embed"])[:40]
        "hooks were attached to 'hook_embed' or r"
    """
    return (
        f"hooks were attached to {point.name!r} or removed while the forward ran in pieces, some "
        "of which they would miss: do that before the forward, or do not mark the hook that does "
        "it as per_position"
    )


def _name_of(hook: HookFn) -> str:
    return getattr(hook, "__qualname__", None) or repr(hook)


def _directions(dir: str) -> Iterable[str]:
    if dir not in ("fwd", "bwd", "both"):
        raise ValueError(f"direction {dir!r}: give 'fwd', 'bwd' or 'both'")
    return ("fwd", "bwd") if dir == "both" else (dir,)
