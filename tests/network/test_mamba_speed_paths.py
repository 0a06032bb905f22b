"""Mamba's and the experts' fast paths are their definitions: values, last state and gradients.

`tests.parity.test_selective_scan` compares the scans with a float64 loop and with mamba-ssm; here
are the paths chosen by length, autograd and hooks, and what they keep in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.interventions import hook_at, on_rows
from hooked_hybrid.network.mixers.mamba import Mamba
from hooked_hybrid.network.mlps.moe import MoE
from hooked_hybrid.network.scans import selective_scan
from tests.models import jamba_config, random_model, random_tokens, relative
from tests.tolerances import FAST_SCAN, FLOAT64_LONG, FP32_PARITY

INPUTS = ("u", "dt", "A", "B", "C", "h0")


def inputs(n_pos: int, batch: int = 2, d_inner: int = 6, d_state: int = 4) -> list[Tensor]:
    """Return u, dt, A, B, C, h0 with decays of 0.03 to 0.9999."""
    g = torch.Generator().manual_seed(n_pos)
    normal = partial(torch.randn, generator=g)
    dt = torch.exp(6 * torch.rand(batch, n_pos, d_inner, generator=g) - 7)
    A = -torch.exp(5 * torch.rand(d_inner, d_state, generator=g) - 2.3)
    B, C = normal(batch, n_pos, d_state), normal(batch, n_pos, d_state)
    return [normal(batch, n_pos, d_inner), dt, A, B, C, normal(batch, d_inner, d_state)]


def resets_at(n_pos: int, *positions: int) -> Tensor:
    resets = torch.zeros(2, n_pos, dtype=torch.bool)
    resets[0, 0] = resets[1, -1] = True
    resets[:, list(positions)] = True
    return resets


def scanned(scan: Callable, x: list[Tensor], resets: Tensor | None) -> dict[str, Tensor]:
    """Return y, the last state, and gradients of a function of both."""
    leaves = [t.clone().requires_grad_() for t in x]
    y, last = scan(*leaves, resets)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grads = torch.autograd.grad((y * weights).sum() + last.square().sum(), leaves)
    names = ("y", "last", *INPUTS)
    return dict(zip(names, (y.detach(), last.detach(), *grads), strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape
        assert relative(actual[name], expected[name]) < tolerance, name


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2 positions, as where states are large, and of 4 with autograd."""
    monkeypatch.setattr(selective_scan, "CHUNK_NUMBERS", 1)
    monkeypatch.setattr(selective_scan, "CHUNK", 4)


# --- the scan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_resets", [False, True])
@pytest.mark.parametrize("n_pos", [1, 2, 31, 32, 33, 100])
def test_fast_scan_equals_the_loop_with_and_without_autograd(n_pos: int, has_resets: bool):
    x, resets = inputs(n_pos), resets_at(n_pos, n_pos // 2) if has_resets else None
    expected = scanned(selective_scan.selective_scan_loop, x, resets)
    assert_same(scanned(selective_scan.selective_scan, x, resets), expected, FP32_PARITY)
    y, last = selective_scan.selective_scan(*x, resets)
    assert_same({"y": y, "last": last}, {k: expected[k] for k in ("y", "last")}, FAST_SCAN)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("n_pos", [3, 4, 9, 40])
def test_the_length_of_chunks_changes_nothing(n_pos: int):
    x, resets = inputs(n_pos), resets_at(n_pos, n_pos // 2)
    expected = scanned(selective_scan.selective_scan_loop, x, resets)
    assert_same(scanned(selective_scan.selective_scan, x, resets), expected, FP32_PARITY)
    y, last = selective_scan.selective_scan(*x, resets)
    assert_same({"y": y, "last": last}, {k: expected[k] for k in ("y", "last")}, FAST_SCAN)


@pytest.mark.usefixtures("short_chunks")
def test_gradients_through_several_chunks_pass_gradcheck():
    x = [t.double().requires_grad_() for t in inputs(10, batch=2, d_inner=2, d_state=2)]
    resets = resets_at(10, 5)
    assert torch.autograd.gradcheck(lambda *t: selective_scan.selective_scan(*t, resets), x)


@torch.no_grad()
def test_single_steps_equal_a_chunk():
    u, dt, A, B, C, h = inputs(20)
    y, last = selective_scan.selective_scan(u, dt, A, B, C, h)
    ys = []
    for t in range(20):
        at = slice(t, t + 1)
        one, h = selective_scan.selective_scan(u[:, at], dt[:, at], A, B[:, at], C[:, at], h)
        ys.append(one)
    assert relative(torch.cat(ys, dim=1), y) < FAST_SCAN
    assert relative(h, last) < FAST_SCAN
    assert h.is_contiguous()


@pytest.mark.parametrize("wanted", INPUTS)
def test_the_gradient_by_one_input_alone(wanted: str):
    x = inputs(40)
    expected = scanned(selective_scan.selective_scan_loop, x, None)[wanted]
    x[INPUTS.index(wanted)].requires_grad_()
    y, last = selective_scan.selective_scan(*x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    ((y * weights).sum() + last.square().sum()).backward()
    assert relative(x[INPUTS.index(wanted)].grad, expected) < FP32_PARITY
    assert all(t.grad is None for i, t in enumerate(x) if i != INPUTS.index(wanted))


def test_the_gradient_by_the_last_state_alone():
    x = inputs(40)
    grads = []
    for scan in (selective_scan.selective_scan, selective_scan.selective_scan_loop):
        leaves = [t.clone().requires_grad_() for t in x]
        del leaves[4]  # C, which the state does not depend on
        last = scan(*leaves[:4], x[4], leaves[4])[1]
        by = torch.autograd.grad(last.sum(), leaves)
        grads.append(dict(zip("u dt A B h0".split(), by, strict=True)))
    assert_same(*grads, FP32_PARITY)


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_the_definitions(power: int):
    """Also where inputs depend on each other, and where another way leads to what they are by."""
    found = []
    for scan in (selective_scan.selective_scan, selective_scan.selective_scan_loop):
        u, dt, A, B, C, h0 = (t.double() for t in inputs(40))
        w = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        u = u * w
        y, last = scan(u, dt * w + 0.1 * u.square(), A * w, B * w, C, h0 * w)
        total = (y**power).sum() + (last**3).sum() + w**3
        [grad] = torch.autograd.grad(total, w, create_graph=True)
        found.append((grad.detach(), torch.autograd.grad(grad, w)[0]))
    (first, second), (exact_first, exact_second) = found
    assert relative(first, exact_first) < FLOAT64_LONG
    assert relative(second, exact_second) < FLOAT64_LONG


def test_autograd_keeps_inputs_and_the_states_between_chunks_only():
    x = [t.requires_grad_() for t in inputs(320)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_scan.selective_scan(*x)
    states = [t for t in kept if t.ndim == 4]
    assert [tuple(t.shape) for t in states] == [(10, 2, 4, 6)]
    assert sum(t.numel() for t in kept) <= sum(t.numel() for t in x) + states[0].numel()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation gives."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, list | tuple) else (out,)
        sizes = [t.untyped_storage().nbytes() // 4 for t in several if isinstance(t, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


@pytest.mark.parametrize("with_autograd", [False, True])
def test_scratch_does_not_grow_with_the_sequence(with_autograd: bool):
    x = [t.requires_grad_(with_autograd) for t in inputs(1000, d_inner=64, d_state=16)]
    with Largest() as largest:
        y, last = selective_scan.selective_scan(*x)
        if with_autograd:
            torch.autograd.grad(y.sum() + last.sum(), x)
    assert largest.numbers <= max(y.numel(), 32 * 2 * 64 * 16)  # all states are 2 million


# --- edits of the state at some positions ---------------------------------------------------------


def small_model() -> HookedHybrid:
    return random_model(jamba_config("MMA"))


@contextmanager
def by_definition(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(Mamba, "_scan", lambda *x, begins: Mamba._scan_hooked(*x))
        yield


def halve(h: Tensor, hook: HookPoint) -> Tensor:
    assert h.shape[1:] == (1, 48, 5)
    assert hook.run.query_pos.shape == h.shape[:2]
    return 0.5 * h + 0.1 * hook.run.query_pos[..., None, None]


def flip_in_place(h: Tensor, hook: HookPoint) -> None:
    h[:, :, ::2] *= -1


LEFT_PADDED = torch.ones(2, 40, dtype=torch.long)
LEFT_PADDED[0, :7] = 0
RIGHT_PADDED = LEFT_PADDED.flip(1)
DOCUMENTS = torch.tensor([[1] * 17 + [2] * 23, [1] * 3 + [2] * 30 + [0] * 7])
LAYOUTS = {
    "plain": {},
    "left": {"attention_mask": LEFT_PADDED},
    "right": {"attention_mask": RIGHT_PADDED},
    "documents": {"segment_ids": DOCUMENTS},
}
EDITS = {
    "first": [hook_at(halve, 0)],
    "last": [hook_at(halve, 39)],
    "neighbours": [hook_at(halve, (4, 5, 6, 12))],
    "several hooks": [hook_at(halve, 5), hook_at(flip_in_place, (5, 30))],
    "of one row": [hook_at(on_rows(flip_in_place, 1), (2, 20))],
    "nowhere": [hook_at(halve, 1000)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edit", EDITS)
def test_edits_at_positions_equal_the_definition(
    layout: str, edit: str, monkeypatch: pytest.MonkeyPatch
):
    model, tokens = small_model(), random_tokens(2, 40)
    hooks = [("blocks.0.mixer.hook_ssm_state", fn) for fn in EDITS[edit]]
    hooks += [("blocks.1.mixer.hook_ssm_state", hook_at(halve, 7))]
    run = partial(
        model.run_with_hooks, tokens, fwd_hooks=hooks, return_state=True, **LAYOUTS[layout]
    )
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.delattr(Mamba, "_scan_hooked")  # not asked
        logits, state = run()
    with by_definition(monkeypatch):
        expected_logits, expected = run()
    assert relative(logits, expected_logits) < FP32_PARITY
    for got, wanted in zip(state.blocks[:2], expected.blocks[:2], strict=True):
        assert relative(got.ssm, wanted.ssm) < FP32_PARITY
    plain = model(tokens, **LAYOUTS[layout])
    assert relative(logits, plain) > 1e-3


def test_gradients_through_edits_at_positions_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch,
):
    model, tokens = small_model(), random_tokens(2, 40)
    hooks = [("blocks.0.mixer.hook_ssm_state", fn) for fn in EDITS["neighbours"]]

    def gradients() -> dict[str, Tensor]:
        wanted = {"W_E": model.embed.W_E, "A_log": model.blocks[0].mixer.A_log}
        for parameter in wanted.values():
            parameter.requires_grad_()
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
        grads = torch.autograd.grad(loss, list(wanted.values()))
        return dict(zip(wanted, grads, strict=True))

    fast = gradients()
    with by_definition(monkeypatch):
        assert_same(fast, gradients(), FP32_PARITY)


@torch.no_grad()
def test_edits_while_generating_equal_the_definition(monkeypatch: pytest.MonkeyPatch):
    model, tokens = small_model(), random_tokens(2, 10)
    hooks = [("blocks.0.mixer.hook_ssm_state", hook_at(halve, (9, 10, 13)))]

    def logits() -> Tensor:
        with model.hooks(fwd_hooks=hooks):
            out, state = model(tokens[:, :6], return_state=True)
            outs = [out]
            for t in range(6, 10):
                out, state = model(tokens[:, t : t + 1], state=state, return_state=True)
                outs.append(out)
        return torch.cat(outs, dim=1)

    fast = logits()
    with by_definition(monkeypatch):
        assert relative(fast, logits()) < FP32_PARITY


@torch.no_grad()
def test_states_of_the_sequence_are_not_kept_for_an_edit_at_one_position():
    model, tokens = small_model(), random_tokens(1, 400)
    name = "blocks.0.mixer.hook_ssm_state"
    sizes = []
    for fn in (hook_at(halve, 200), lambda h, hook: None):
        with Largest() as largest:
            model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=[(name, fn)])
        sizes.append(largest.numbers)
    assert sizes[0] < 400 * 48 * 5 / 2 < sizes[1]


# --- what a step overwrites -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_a_cache_holds_are_not_overwritten(dtype: torch.dtype):
    model, tokens = random_model(jamba_config("MMA"), dtype=dtype), random_tokens(2, 20)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=lambda _: True)
        alone = {
            name: model.run_with_cache(tokens, names_filter=name)[1][name]
            for name in cache
            if ".mixer." in name or ".mlp." in name
        }
    expected, kept = model.run_with_cache(tokens, names_filter=lambda _: True)  # autograd is on
    tolerance = FP32_PARITY if dtype == torch.float32 else 0.1
    assert relative(logits.float(), expected.float()) < tolerance
    for name, value in alone.items():
        assert relative(cache[name].float(), kept[name].float()) < tolerance, name
        assert relative(value.float(), kept[name].float()) < tolerance, name


# --- experts --------------------------------------------------------------------------------------


def experts_and_inputs(n_pos: int) -> tuple[MoE, Tensor]:
    moe = random_model(jamba_config("MM")).blocks[1].mlp
    assert isinstance(moe, MoE)
    g = torch.Generator().manual_seed(n_pos)
    return moe.requires_grad_(), torch.randn(1, n_pos, 24, generator=g)


@pytest.mark.parametrize("with_autograd", [False, True])
@pytest.mark.parametrize("n_pos", [1, 2, 50])
def test_each_way_to_run_experts_equals_the_definition(n_pos: int, with_autograd: bool):
    moe, x = experts_and_inputs(n_pos)
    ways = [moe._run_hooked, moe._run_sorted] + ([moe._run_one] if n_pos == 1 else [])
    results: list[dict[str, Tensor]] = []
    for way in ways:
        leaf = x.clone().requires_grad_()
        with torch.set_grad_enabled(with_autograd):
            out = way(leaf, *moe._route(leaf))
        results.append({"out": out.detach()})
        if with_autograd:
            wanted = {"x": leaf, **dict(moe.named_parameters())}
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
            grads = torch.autograd.grad((out * weights).sum(), list(wanted.values()))
            results[-1] |= dict(zip(wanted, grads, strict=True))
        assert leaf.equal(x)
    for result in results[1:]:
        assert_same(result, results[0], FP32_PARITY)


@torch.no_grad()
@pytest.mark.parametrize("n_pos", [1, 50])
def test_experts_without_tokens_do_not_matter(n_pos: int):
    moe, x = experts_and_inputs(n_pos)
    weights, indices = moe._route(x)
    run = moe._run_one if n_pos == 1 else moe._run_sorted
    same = torch.zeros_like(indices)
    out = run(x, weights, same)
    moe.gate[1:] = moe.up[1:] = moe.down[1:] = float("nan")
    assert out.equal(run(x, weights, same))
    assert relative(out, moe._run_hooked(x, weights, same)) < FP32_PARITY
