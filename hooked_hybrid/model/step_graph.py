"""One step of decoding as a CUDA graph: captured once, then replayed for every token.

A step of a small batch is about a thousand small kernels, and a GPU waits for the launch of each;
a graph launches them all at once. It needs buffers that never move and shapes that never change,
so each attention layer holds a fixed number of keys, with absent ones at position -1, and masks are
computed from positions. The eager step is the definition; results differ by the rounding of sums.

`capture_steps` decides whether to use a graph: without hooks or autograd, for few rows, and if the
host
reads nothing between kernels. The way to capture is an argument: calling the step again on the same
buffers is a stand-in for a capture that works on any machine.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence, Sized
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.host_waits import AsksNothing
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.state import HybridState

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

MAX_BATCH = 32
"""Up to this many rows, launches take most of a step's time, not arithmetic."""
WORTH_CAPTURING = 16
"""From this many steps on, a capture, which takes as long as a few steps, saves time."""
MAX_STEPS = 1024
"""Steps that one graph has space for, in layers without a window."""
KEYS_MULTIPLE = 64
"""Multiple for the number of keys in layers without a window, so that masks are aligned."""

TORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
REPLAYED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference of a replay from the eager step, relative to the largest entry.

Integers must be equal. The kernels are the same, but a product may be summed in another order. An
empty graph would differ by the whole value.
"""
Step = Callable[[], None]
Capture = Callable[[Step, torch.device], Step]
_one_capture = threading.Lock()  # torch allows only one at a time


# --- whether ----------------------------------------------------------------------------------

_failed: WeakSet[nn.Module] = WeakSet()
"""Models for which a capture failed; it is not tried again."""


def capture_steps(model: LanguageModel, state: HybridState, n_steps: int) -> StepGraph | None:
    """Return a graph for the steps that continue a state, or None if they run eagerly.

    A graph has space for `n_steps` more steps, up to a limit.
    """
    if n_steps < WORTH_CAPTURING or model in _failed or not usable(model, state):
        return None
    try:
        return StepGraph(model, state, min(n_steps, MAX_STEPS))
    except RuntimeError as error:
        _failed.add(model)
        warnings.warn(
            f"steps of this model cannot be captured, and run one kernel at a time: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def usable(model: LanguageModel, state: HybridState) -> bool:
    """Return whether a step from this state can be captured, as far as known beforehand."""
    device = model.device
    return (
        device.type in CAPTURES
        and model.placement is None  # moved weights would not outlive a capture
        and 0 < state.batch_size <= MAX_BATCH
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device.type)  # its cached weights would not outlive it
        and all(t.device == device for t in state.tensors().values())
        and not is_watched(attachments(model))
        and not _asks_for_counts(model)
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def attachments(model: LanguageModel) -> list[Sized]:
    """Return every list of functions that a replay would not call, as live lists."""
    points = chain(*((p.fwd_hooks, p.bwd_hooks) for p in model.hook_points()))
    modules = (m for m in model.modules() if not isinstance(m, HookPoint))
    return [*points, *(vars(m)[name] for m in modules for name in TORCH_HOOKS)]


def _asks_for_counts(model: LanguageModel) -> bool:
    """Return whether an MLP has the host read how many tokens each of its experts got."""
    mlps = (block.mlp for block in model.blocks if block.mlp is not None)
    return any(mlp.asks_for_counts(model.W_E[:1]) for mlp in mlps)


def is_watched(attached: list[Sized]) -> bool:
    """Return whether any of a model's `attachments`, or any global hook of torch, exists."""
    return any(attached) or bool(torch_module._has_any_global_hook())


# --- how --------------------------------------------------------------------------------------


def record(step: Step, device: torch.device) -> Step:
    """Return a function that replays a step, captured in a CUDA graph after two runs.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with _one_capture, torch.cuda.device(device):
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        try:
            with torch.cuda.stream(side):
                step()
                with AsksNothing():
                    step()
            stream.wait_stream(side)
            # Without `stream`, torch captures on one made for the first capture of the process,
            # which may be of another GPU: the graph would be empty.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(stream)  # a failed capture leaves another stream
            stream.wait_stream(side)
    return graph.replay  # holds no reference to the step, so the buffers are freed with it


CAPTURES: dict[str, Capture] = {"cuda": record}
"""How each type of device captures; others have no graphs."""


# --- what -------------------------------------------------------------------------------------


class StepGraph:
    """A decoding step on fixed buffers, from tokens to logits, with the state inside.

    Keys are in a ring buffer, in which a new key replaces the oldest; absent keys come first.
    Attention uses the positions of keys, not their order.

    Args:
        model: reads the tokens; its weights may change in place, but not move.
        state: the state that the first step continues; it is copied.
        n_steps: steps to allocate space for, in layers without a window.
        capture: the function that captures; None uses that of the model's device.

    Raises:
        RuntimeError: the capture failed.
    """

    @torch.no_grad()
    def __init__(
        self, model: LanguageModel, state: HybridState, n_steps: int, capture: Capture | None = None
    ) -> None:
        self.model, device, batch = model, model.device, state.batch_size
        self._attached = attachments(model)
        self._windows = {
            f"blocks.{i}.{name}": window
            for i, block in enumerate(model.blocks)
            for name, window in block.windows().items()
        }
        self._buffers = {
            name: t.new_zeros(self._room_for(name, t.shape, n_steps))
            for name, t in state.tensors().items()
        }
        self._rows = torch.arange(batch, device=device)
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._logits = torch.zeros(batch, model.cfg.d_vocab, dtype=model.dtype, device=device)
        self.load(state)
        self._replay = (capture or CAPTURES[device.type])(self._step, device)
        self._require_the_step(state)
        self.load(state)  # warm-up and compared steps have changed it

    @torch.no_grad()
    def load(self, state: HybridState) -> None:
        """Continue from another state with the same number of rows.

        Raises:
            ValueError: another number of rows, or more keys than there is space for.
        """
        if state.batch_size != len(self._rows):
            raise ValueError(f"{state.batch_size} rows for a graph of {len(self._rows)}")
        new = state.tensors()
        self._n_keys = {name: new[name].shape[1] for name in self._windows}
        unbounded = (name for name, window in self._windows.items() if window is None)
        free = (self._buffers[name].shape[1] - self._n_keys[name] for name in unbounded)
        self.n_left = min(free, default=float("inf"))
        if self.n_left < 0:
            raise ValueError(f"{-self.n_left} keys more than this graph has room for")
        for name, mine in self._buffers.items():
            if name not in self._windows:
                mine.copy_(new[name])
                continue
            n = min(self._n_keys[name], mine.shape[1])
            absent = mine.shape[1] - n
            mine[:, :absent] = -1 if name.endswith("pos") else 0  # zero: a mask does not hide NaN
            mine[:, absent:] = new[name][:, self._n_keys[name] - n :]
        self._count.zero_()
        self._live, self._n_seen, self._n_steps = self._rows, state.n_seen, 0

    @property
    def is_valid(self) -> bool:
        """Whether the next step can be replayed: there is space, and still no hook."""
        return self.n_left > 0 and not is_watched(self._attached)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "row 1"]) -> Float[Tensor, "row d_vocab"]:
        """Read one token of each row that is kept; return the logits of the next.

        Raises:
            ValueError: there is no space for it.
        """
        if self.n_left < 1:
            raise ValueError(f"no room for a token after {self._n_steps}: go on from state()")
        self._tokens.index_copy_(0, self._live, tokens)
        self._replay()
        self._n_steps += 1
        self.n_left -= 1
        return self._logits.index_select(0, self._live)

    @torch.no_grad()
    def keep(self, rows: Bool[Tensor, " row"]) -> None:
        """Continue with some of the kept rows; results of the others are ignored."""
        self._live = self._live[rows]

    @torch.no_grad()
    def state(self) -> HybridState:
        """Return a copy of the state of the rows that are kept, as eager steps would leave it."""
        rows, values = self._live, {}
        for name, t in self._buffers.items():
            if name in self._windows:
                n = min(self._n_keys[name] + self._n_steps, t.shape[1])
                places = torch.arange(t.shape[1] - n, t.shape[1], device=t.device) + self._n_steps
                values[name] = t[rows[:, None], places % max(t.shape[1], 1)]  # oldest first
            else:
                values[name] = t[rows]
        n_seen = None if self._n_seen is None else self._n_seen + self._n_steps
        return HybridState.from_tensors(values, n_seen, self.model.cfg.n_layers)

    def _step(self) -> None:
        """Read the tokens into the logits and the buffers: what a replay repeats."""
        # n_seen is None: masks are made from positions.
        state = HybridState.from_tensors(self._buffers, None, self.model.cfg.n_layers)
        layout = lay_out(self._tokens, state, None, None, "generation", 1, self._rows)
        logits, after = self.model.run_layout(self._tokens, layout, state, logits_to_keep=1)
        assert after is not None  # it is None only for a part of a model
        self._logits.copy_(logits[:, -1])
        for name, new in after.tensors().items():
            mine = self._buffers[name]
            if name not in self._windows:
                mine.copy_(new)
            elif mine.shape[1]:
                mine.index_copy_(1, self._count % mine.shape[1], new[:, -1:])
        self._count.add_(1)

    def _require_the_step(self, state: HybridState) -> None:
        """Raise if a replay differs from the step, as that of an empty graph does."""
        expected, found = (self._changes(state, run) for run in (self._step, self._replay))
        for name, wanted in expected.items():
            bound = REPLAYED.get(wanted.dtype, 0.0)
            most = float(wanted.nan_to_num(0, 0, 0).abs().max()) if wanted.numel() else 0.0
            if not torch.allclose(found[name], wanted, 0, bound * most, equal_nan=True):
                raise RuntimeError(f"a replay of the captured step gives another {name}")

    def _changes(self, state: HybridState, run: Step) -> dict[str, Tensor]:
        """Return the results of one step from a state: logits, and the buffers that it writes."""
        self.load(state)
        self._logits.fill_(torch.finfo(self._logits.dtype).max)  # a value that no step leaves
        run()
        first = {n: t[:, :1] if n in self._windows else t for n, t in self._buffers.items()}
        now = {"logits": self._logits, "count of steps": self._count, **first}
        return {name: t.clone() for name, t in now.items()}

    def _room_for(self, name: str, shape: Sequence[int], n_steps: int) -> list[int]:
        """Return the shape of a buffer, with space for all keys that a step sees except its own."""
        if name not in self._windows:
            return list(shape)
        in_step = self._windows[name]
        if in_step is None:
            in_step = -(-(shape[1] + n_steps + 1) // KEYS_MULTIPLE) * KEYS_MULTIPLE
        return [shape[0], in_step - 1, *shape[2:]]
