"""Our selective scans are mamba-ssm's own `selective_scan_ref`, and a float64 loop where it stops.

That function is the definition behind the CUDA kernels the published Jambas were trained with. Its
module cannot be imported without those kernels, so the function alone is read from its source,
which `make install` puts where only this test looks. It begins at a state of zero and has no
resets; there the loop below takes over, in float64.
"""

import ast
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from hooked_hybrid.network.scans.loops import selective_scan_loop
from hooked_hybrid.network.scans.selective_scan import CHUNK, selective_scan
from tests.models import relative
from tests.tolerances import FAST_SCAN, SLOW_SCAN_NEAR_ONE

SOURCE = Path(sys.prefix) / "reference" / "mamba_ssm" / "ops" / "selective_scan_interface.py"
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 65, 300]
BATCH, D_INNER, D_STATE = 3, 6, 4

every_length = pytest.mark.parametrize("n_pos", LENGTHS)
every_scan = pytest.mark.parametrize("scan", [selective_scan, selective_scan_loop])
with_and_without_d = pytest.mark.parametrize("has_d", [False, True])


class Inputs(NamedTuple):
    """What a scan reads, in our layout: positions before channels."""

    u: Tensor  # [b s e]
    dt: Tensor  # [b s e]
    A: Tensor  # [e n]
    B: Tensor  # [b s n]
    C: Tensor  # [b s n]
    h0: Tensor  # [b e n]


class Scanned(NamedTuple):
    """C h at every position [b s e], and the last state [b e n]."""

    y: Tensor
    last: Tensor


@cache
def selective_scan_ref() -> Callable[..., Any]:
    """The function of mamba-ssm, and nothing else of its module."""
    if not SOURCE.is_file():
        pytest.skip(f"{SOURCE} is not there: `make install` puts it there")
    [function] = [
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "selective_scan_ref"
    ]
    scope = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module([function], []), str(SOURCE), "exec"), scope)
    return scope["selective_scan_ref"]


def reference(x: Inputs, D: Tensor | None = None) -> Scanned:
    """What mamba-ssm gives, in our layout."""
    assert not x.h0.any()
    parts = [t.transpose(1, 2) for t in (x.u, x.dt, x.B, x.C)]
    u, dt, B, C = parts
    y, last = selective_scan_ref()(u, dt, x.A, B, C, D, return_last_state=True)
    return Scanned(y.transpose(1, 2), last)


def exact(x: Inputs, resets: Tensor | None = None, D: Tensor | None = None) -> Scanned:
    """Mamba's algorithm 2, one position after another, in float64."""
    u, dt, A, B, C, h = (t.double() for t in x)
    ys = []
    for t in range(u.shape[1]):
        if resets is not None:
            h = torch.where(resets[:, t, None, None], 0.0, h)
        write = dt[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
        h = torch.exp(dt[:, t, :, None] * A) * h + write
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, dim=1)
    return Scanned(y if D is None else y + u * D.double(), h)


def inputs(n_pos: int, kind: str = "mixed", starts_at_zero: bool = True) -> Inputs:
    """Random inputs; decays of 0.03 to 0.9999 (mixed), above 0.9997 (slow) or below 0.05 (fast)."""
    g = torch.Generator().manual_seed(n_pos)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    low, high = {"mixed": (-7.0, -1.2), "slow": (-9.0, -8.0), "fast": (0.0, 2.0)}[kind]
    dt = torch.exp(low + (high - low) * torch.rand(BATCH, n_pos, D_INNER, generator=g))
    rates = {"mixed": (0.1, 16.0), "slow": (0.1, 1.0), "fast": (3.0, 16.0)}[kind]
    A = -rates[0] * (rates[1] / rates[0]) ** torch.rand(D_INNER, D_STATE, generator=g)
    u, B, C = (normal(BATCH, n_pos, n) for n in (D_INNER, D_STATE, D_STATE))
    h0 = normal(BATCH, D_INNER, D_STATE)
    return Inputs(u, dt, A, B, C, torch.zeros_like(h0) if starts_at_zero else h0)


def some_resets(n_pos: int) -> Tensor:
    """Starts of documents at different places in each row, the first and the last among them."""
    resets = torch.rand(BATCH, n_pos, generator=torch.Generator().manual_seed(n_pos)) < 0.05
    resets[0, 0] = resets[1, n_pos // 2] = resets[2, -1] = True
    return resets


def skip_added(scanned: tuple[Tensor, Tensor], x: Inputs, D: Tensor | None) -> Scanned:
    """Add D u, which our scans leave to the layer."""
    y, last = scanned
    return Scanned(y if D is None else y + x.u * D, last)


def assert_close(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = FAST_SCAN
) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert relative(got.double(), wanted.double()) < tolerance


def d_of(has_d: bool) -> Tensor | None:
    return torch.linspace(-1, 2, D_INNER) if has_d else None


# --- against mamba-ssm ----------------------------------------------------------------------------


@every_length
@every_scan
@with_and_without_d
@torch.no_grad()
def test_values_equal_mamba_ssm(n_pos: int, scan: Callable, has_d: bool):
    x, D = inputs(n_pos), d_of(has_d)
    assert_close(skip_added(scan(*x), x, D), reference(x, D))


@pytest.mark.parametrize("n_pos", [1, 2, CHUNK, 65, 300])
@every_scan
@with_and_without_d
def test_values_and_gradients_equal_mamba_ssm(n_pos: int, scan: Callable, has_d: bool):
    x, D = inputs(n_pos), d_of(has_d)
    actual = with_gradients(lambda leaves, d: skip_added(scan(*leaves), leaves, d), x, D)
    expected = with_gradients(reference, x, D)
    assert_close(actual[:2], expected[:2])
    assert_close(actual[2:], expected[2:], 2 * FAST_SCAN)  # each may be FAST_SCAN from the truth


@every_length
@with_and_without_d
def test_mamba_ssm_equals_the_float64_loop(n_pos: int, has_d: bool):
    """So that agreement with the one is agreement with the other."""
    x, D = inputs(n_pos), d_of(has_d)
    assert_close(reference(x, D), exact(x, D=D))


def with_gradients(
    scan: Callable[[Inputs, Tensor | None], Scanned], x: Inputs, D: Tensor | None
) -> tuple[Tensor, ...]:
    """Return y and the last state, then the gradients of a function of both.

    By every input but h0, which mamba-ssm has none of.
    """
    wide = x.u.dtype
    leaves = Inputs(*(t.detach().clone().requires_grad_() for t in x[:-1]), x.h0)
    d = None if D is None else D.detach().clone().requires_grad_()
    y, last = scan(leaves, d)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(wide)
    wanted = [t for t in (*leaves[:-1], d) if t is not None]
    grads = torch.autograd.grad((y * weights).sum() + last.square().sum(), wanted)
    return (y.detach(), last.detach(), *grads)


# --- where mamba-ssm stops: a state before, documents in one row, any decay -----------------------


@every_length
@every_scan
@pytest.mark.parametrize("kind", ["mixed", "fast"])
@torch.no_grad()
def test_scans_from_a_state_with_resets_equal_the_float64_loop(
    n_pos: int, scan: Callable, kind: str
):
    x, resets = inputs(n_pos, kind, starts_at_zero=False), some_resets(n_pos)
    assert_close(scan(*x), exact(x))
    assert_close(scan(*x, resets), exact(x, resets))


@every_scan
@pytest.mark.parametrize("n_pos", [300, 2000, 4000])
@pytest.mark.parametrize("with_autograd", [False, True])
def test_scans_that_hardly_forget_equal_the_float64_loop(
    n_pos: int, scan: Callable, with_autograd: bool
):
    """Decays are up to 1 - 1e-5, so that their rounding is what is left after long sequences."""
    x = inputs(n_pos, "slow", starts_at_zero=False)
    given = Inputs(*(t.clone().requires_grad_(with_autograd) for t in x))
    assert_close(scan(*given), exact(x), SLOW_SCAN_NEAR_ONE)


@pytest.mark.parametrize("n_pos", [1, 2, CHUNK + 1, 300])
@every_scan
@pytest.mark.parametrize("has_resets", [False, True])
def test_gradients_from_a_state_equal_those_of_the_float64_loop(
    n_pos: int, scan: Callable, has_resets: bool
):
    x = inputs(n_pos, starts_at_zero=False)
    resets = some_resets(n_pos) if has_resets else None
    results = []
    for fn, given in ((scan, x), (exact, Inputs(*(t.double() for t in x)))):
        leaves = Inputs(*(t.clone().requires_grad_() for t in given))
        y, last = fn(*leaves, resets) if fn is scan else fn(leaves, resets)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        loss = (y * weights).sum() + last.square().sum()
        results.append((y.detach(), last.detach(), *torch.autograd.grad(loss, leaves)))
    assert_close(*results)


@every_scan
def test_a_reset_at_the_start_of_a_row_forgets_the_state(scan: Callable):
    x = inputs(CHUNK + 1, starts_at_zero=False)
    resets = torch.zeros(BATCH, CHUNK + 1, dtype=torch.bool)
    resets[:, 0] = True
    expected = scan(*x._replace(h0=torch.zeros_like(x.h0)))
    assert_close(scan(*x, resets), expected)
    assert relative(scan(*x)[0], expected[0]) > 1e-2


@pytest.mark.parametrize("cut", [1, CHUNK, 100])
@every_scan
@torch.no_grad()
def test_two_scans_one_from_the_state_of_the_other_equal_one(cut: int, scan: Callable):
    x, resets = inputs(300, starts_at_zero=False), some_resets(300)
    first = Inputs(*(t[:, :cut] if t.ndim == 3 and t is not x.h0 else t for t in x))
    second = Inputs(*(t[:, cut:] if t.ndim == 3 and t is not x.h0 else t for t in x))
    y1, h = scan(*first, resets[:, :cut])
    y2, last = scan(*second._replace(h0=h), resets[:, cut:])
    assert_close((torch.cat([y1, y2], dim=1), last), exact(x, resets))


@every_scan
@torch.no_grad()
def test_inputs_are_not_changed(scan: Callable):
    x, resets = inputs(65, starts_at_zero=False), some_resets(65)
    before = [t.clone() for t in (*x, resets)]
    y, last = scan(*x, resets)
    y.zero_()
    last.zero_()
    assert all(t.equal(b) for t, b in zip((*x, resets), before, strict=True))


@pytest.mark.parametrize("n_pos", [1, 5, CHUNK + 1])
def test_the_scan_passes_gradcheck(n_pos: int):
    x = inputs(n_pos, starts_at_zero=False)
    small = Inputs(*(t[:1] if t.ndim == 3 else t for t in x))
    leaves = [t.double().requires_grad_() for t in small]
    resets = some_resets(n_pos)[1:2]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, resets), leaves)


def test_our_scan_takes_what_this_test_gives_it():
    """The order of the inputs, which the tests above pass by position."""
    names = list(inspect.signature(selective_scan).parameters)
    assert names == [*Inputs._fields, "resets", "begins"]
    assert names[:-1] == list(inspect.signature(selective_scan_loop).parameters)
