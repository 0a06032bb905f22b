"""The GPU kernels against their definitions.

`TestTriton` runs where Triton can: on a GPU, or in its interpreter. The standard functions of
Triton are made for the one or the other when it is first imported, which another test may have
done already; so without a GPU the class runs in a process of its own, started by the first test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d

from hooked_hybrid.config import MoEConfig
from hooked_hybrid.network import kernels
from hooked_hybrid.network.kernels import causal_conv1d, grouped_experts, mamba_ssm
from hooked_hybrid.network.kernels.grouped_experts import run_experts
from hooked_hybrid.network.kernels.linear_scan import BLOCK, CHUNK, OPTIONS, STAGES, linear_scan
from hooked_hybrid.network.kernels.linear_scan import usable as usable_linear
from hooked_hybrid.network.kernels.selective_scan import BLOCK_D, blocks, selective_scan
from hooked_hybrid.network.kernels.selective_scan import usable as usable_selective
from hooked_hybrid.network.layers import CausalConv1d
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.mlps.moe import MoE
from hooked_hybrid.network.scans.loops import scan_loop, selective_scan_loop
from tests.models import relative
from tests.parity.test_selective_scan import SOURCE, selective_scan_ref
from tests.tolerances import BF16, FAST_SCAN, FP32_PARITY

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
RUNS_HERE = HAS_GPU or kernels.interpreting()
ROUNDED_ONCE = 2**-24  # fp32 states of a scan in fp64
N_TRITON_TESTS = 40  # at least so many run in the process of their own


@pytest.mark.skipif(RUNS_HERE, reason="they run in this process")
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*command, "-k", "TestTriton"],
        env={**env, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= N_TRITON_TESTS, run.stdout


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def recurrence(
    kind: str, batch: int, n_pos: int, channels: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Decays of a kind, what is written, and a state before."""
    a = uniform(batch, n_pos, *channels)
    if kind == "near one":
        a = 1 - torch.exp(-3.4 * a - 8.1)  # 0.9997 to 0.99999
    if kind == "zeros and ones":
        a = torch.where(a < 0.1, 0.0, torch.where(a > 0.5, 1.0, a))
    return a, normal(batch, n_pos, *channels), normal(batch, *channels, seed=2)


def exact_scan(a: Tensor, x: Tensor, h0: Tensor, reverse: bool = False) -> Tensor:
    a, x = (t.flip(1) if reverse else t for t in (a.double(), x.double()))
    states = scan_loop(a, x, h0.double())
    return states.flip(1) if reverse else states


def ssm_inputs(
    batch: int, n_pos: int, d_inner: int, d_state: int, slow: bool = False
) -> tuple[Tensor, ...]:
    """u, dt, A, B, C and a state before; slow decays are above 0.9997."""
    low, high = (-9.0, -8.0) if slow else (-7.0, -1.2)
    dt = torch.exp(low + (high - low) * uniform(batch, n_pos, d_inner, seed=3))
    A = -(0.1 + (0.9 if slow else 16.0) * uniform(d_inner, d_state, seed=4))
    B, C = (normal(batch, n_pos, d_state, seed=seed) for seed in (5, 6))
    return normal(batch, n_pos, d_inner), dt, A, B, C, normal(batch, d_inner, d_state, seed=7)


def some_resets(batch: int, n_pos: int) -> Tensor:
    resets = uniform(batch, n_pos, seed=8) < 0.1
    resets[0, 0] = resets[-1, n_pos // 2] = True
    return resets


def assert_close(actual: Any, expected: Any, tolerance: float = FAST_SCAN) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert relative(got.double(), wanted.double()) <= tolerance


class TestTriton:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("scan", ["linear", "selective"])
    def test_the_kernels_are_what_runs(self, scan: str):
        from hooked_hybrid.network.kernels import triton_kernels

        kernel = getattr(triton_kernels, f"{scan}_scan", triton_kernels.write_states)
        assert type(kernel).__name__ == ("JITFunction" if HAS_GPU else "InterpretedFunction")
        runs: list[str] = []
        kernel.add_pre_run_hook(lambda *args, **kwargs: runs.append(scan))
        if scan == "linear":
            linear_scan(*recurrence("mixed", 1, 3, (2,)))
        else:
            selective_scan(*ssm_inputs(1, 3, 2, 2))
        kernel.pre_run_hooks.clear()
        assert runs

    @pytest.mark.parametrize("kind", ["mixed", "near one", "zeros and ones"])
    @pytest.mark.parametrize(
        ("batch", "n_pos", "channels"),
        [
            (1, 1, (3,)),
            (3, CHUNK - 1, ()),
            (1, CHUNK, (2, 3)),
            (3, CHUNK + 1, (1,)),
            (1, CHUNK + 6, (130,)),
            (1, 2 * CHUNK + 9, (70,)),
        ],
    )
    def test_linear_scan_equals_the_float64_loop(
        self, kind: str, batch: int, n_pos: int, channels: tuple[int, ...]
    ):
        inputs = recurrence(kind, batch, n_pos, channels)
        before = [t.clone() for t in inputs]
        assert_close([linear_scan(*inputs)], [exact_scan(*inputs)], ROUNDED_ONCE)
        backwards = linear_scan(*inputs, reverse=True)
        assert_close([backwards], [exact_scan(*inputs, reverse=True)], ROUNDED_ONCE)
        assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))

    def test_products_of_decays_do_not_drift_over_long_sequences(self):
        inputs = recurrence("near one", 1, 1000, (2,))
        assert_close([linear_scan(*inputs)], [exact_scan(*inputs)], ROUNDED_ONCE)

    def test_a_decay_of_one_keeps_and_one_of_zero_forgets_exactly(self):
        a, x, h0 = recurrence("mixed", 1, 3 * CHUNK, (4,))
        x[:, 1:] = 0
        kept = linear_scan(torch.ones_like(a), x, h0)
        assert torch.equal(kept, (h0 + x[:, 0])[:, None].expand_as(kept))
        assert torch.equal(linear_scan(torch.zeros_like(a), x, h0 * 1e30), x)

    @pytest.mark.parametrize("n_pos", [5, CHUNK + 3])
    def test_linear_scans_both_ways_give_the_gradients(self, n_pos: int):
        """What `scan._Scan` does in its backward pass, by `reverse` instead of flips."""
        inputs = [t.double().requires_grad_() for t in recurrence("zeros and ones", 2, n_pos, (3,))]
        weights = normal(2, n_pos, 3, seed=9)
        expected = torch.autograd.grad((scan_loop(*inputs) * weights).sum(), inputs)
        a, x, h0 = (t.detach().float() for t in inputs)
        states = linear_scan(a, x, h0)
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
        total = linear_scan(later, weights, torch.zeros_like(h0), reverse=True)
        before = torch.cat([h0[:, None], states[:, :-1]], dim=1)
        assert_close([total * before, total, total[:, 0] * a[:, 0]], expected)

    def test_linear_scan_takes_float64_and_any_strides(self):
        a, x, h0 = (t.double() for t in recurrence("mixed", 2, CHUNK + 6, (4, 3)))
        assert_close([linear_scan(a, x, h0)], [exact_scan(a, x, h0)], 1e-14)
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
        a = a[:1, :, :, :1].expand_as(x)
        assert_close([linear_scan(a, x, h0.mT.contiguous().mT)], [exact_scan(a, x, h0)], 1e-14)
        a, x = a[:, ::2], x[:, ::2]
        assert_close([linear_scan(a, x, h0)], [exact_scan(a, x, h0)], 1e-14)

    @pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
    def test_scans_of_nothing_are_empty(self, shape: tuple[int, int, int]):
        x, h0 = normal(*shape), normal(shape[0], shape[2])
        assert linear_scan(x, x, h0).shape == shape
        inputs = ssm_inputs(*shape, 2)
        y, last = selective_scan(*inputs)
        assert y.shape == shape and torch.equal(last, inputs[-1])

    @pytest.mark.parametrize("has_resets", [False, True])
    @pytest.mark.parametrize(
        ("batch", "n_pos", "d_inner", "d_state"),
        [
            (1, 1, 3, 1),
            (3, 20, 6, 4),
            (2, 17, BLOCK_D + 1, 5),
            (1, 30, BLOCK_D, 16),
            (1, 4, 5, 130),
        ],
    )
    def test_selective_scan_equals_its_definition(
        self, batch: int, n_pos: int, d_inner: int, d_state: int, has_resets: bool
    ):
        inputs = ssm_inputs(batch, n_pos, d_inner, d_state)
        resets = some_resets(batch, n_pos) if has_resets else None
        before = [t.clone() for t in inputs]
        scanned = selective_scan(*inputs, resets)
        assert_close(scanned, selective_scan_loop(*(t.double() for t in inputs), resets))
        assert_close(scanned, selective_scan_loop(*inputs, resets), 2 * FAST_SCAN)
        assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))

    def test_selective_scan_keeps_long_memories(self):
        inputs = ssm_inputs(1, 300, 3, 2, slow=True)
        assert_close(selective_scan(*inputs), selective_scan_loop(*(t.double() for t in inputs)))

    def test_selective_scan_forgets_and_keeps_what_it_must(self):
        u, dt, A, B, C, h0 = ssm_inputs(1, 9, 3, 4)
        _, kept = selective_scan(u, torch.zeros_like(dt), A, B, C, h0)
        assert torch.equal(kept, h0)  # as at padding
        dt, A = torch.ones_like(dt), torch.full_like(A, -150)
        y, last = selective_scan(u, dt, A, B, C, h0 * 1e20)
        assert_close([y, last], selective_scan_loop(u, dt, A, B, C, 0 * h0))

    def test_selective_scans_one_from_the_state_of_the_other_equal_one(self):
        u, dt, A, B, C, h0 = ssm_inputs(2, 20, 5, 3)
        y, last = selective_scan(u, dt, A, B, C, h0)
        parts, h = [], h0
        for part in (slice(0, 7), slice(7, 20)):  # views, whose strides are those of the whole
            piece, h = selective_scan(*(t[:, part] for t in (u, dt)), A, B[:, part], C[:, part], h)
            parts.append(piece)
        assert torch.equal(torch.cat(parts, dim=1), y) and torch.equal(h, last)

    def test_what_the_kernels_cannot_take_is_refused(self, unchecked: None):
        a, x, h0 = recurrence("mixed", 2, 5, (3,))
        for bad, message in [
            ((a.bfloat16(), x.bfloat16(), h0.bfloat16()), "float32 or all in float64"),
            ((a.double(), x, h0), "float32 or all in float64"),
            ((a[:, 1:], x, h0), "give a and x as"),
            ((a, x, h0[:1]), "give a and x as"),
            ((a, x.clone().requires_grad_(), h0), "has no gradient"),
            ((a.to("meta"), x, h0), "cannot run on"),
        ]:
            with pytest.raises(ValueError, match=message):
                linear_scan(*bad)
        u, dt, A, B, C, h0 = ssm_inputs(2, 5, 3, 4)
        for bad, message in [
            ((u.bfloat16(), dt, A, B, C, h0), "all in float32"),
            ((u.double(), *(t.double() for t in (dt, A, B, C, h0))), "all in float32"),
            ((u, dt, A, B[:, 1:], C, h0), "they must be"),
            ((u[0], dt, A, B, C, h0), "give u as"),
            ((u, dt, A, B, C, h0, torch.zeros(2, 5, device=DEVICE)), "give booleans"),
            ((u, dt, A.clone().requires_grad_(), B, C, h0), "has no gradient"),
        ]:
            with pytest.raises(ValueError, match=message):
                selective_scan(*bad)


# --- what runs where ------------------------------------------------------------------------------


def compile_for(capability: int, kernel: Any, **arguments: Any) -> str:
    """Return the PTX of a kernel; arguments are types, or else values known when compiling."""
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {n: t if isinstance(t, str) else "constexpr" for n, t in arguments.items()}
    values = {
        (kernel.arg_names.index(n),): v for n, v in arguments.items() if not isinstance(v, str)
    }
    source = ASTSource(kernel, {n: types[n] for n in kernel.arg_names}, values)
    target = GPUTarget("cuda", capability, 32)
    return compile_triton(source, target=target, options=OPTIONS).asm["ptx"]


@pytest.mark.skipif(kernels.interpreting(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_compile_for_a_gpu_and_read_ahead(monkeypatch, tmp_path, reverse: bool):
    """The interpreter has no types; the compiler does, and it needs no GPU."""
    pytest.importorskip("triton")
    from hooked_hybrid.network.kernels import triton_kernels as triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    inputs = dict.fromkeys(("a_ptr", "x_ptr", "h0_ptr", "states_ptr"), "*fp32")
    carried = dict.fromkeys(("decay_ptr", "written_ptr", "start_ptr"), "*fp64")
    sizes = dict.fromkeys(("n_pos", "n_channels", "n_full", "n_chunks"), "i32")
    known = {"REVERSE": reverse, "CHUNK": CHUNK, "BLOCK": BLOCK, "STAGES": STAGES}
    linear = {**inputs, **carried, **sizes, **known}
    floats = "u_ptr dt_ptr A_ptr B_ptr C_ptr h0_ptr y_ptr last_ptr".split()
    selective = {
        **dict.fromkeys(floats, "*fp32"),
        **{"resets_ptr": "*i32" if reverse else None, "HAS_RESETS": reverse},
        **{"n_pos": "i32", "d_inner": "i32", "d_state": "i32"},
        **{"BLOCK_D": BLOCK_D, "BLOCK_N": 16, "STAGES": STAGES},
    }
    for name, given in [
        ("summarise_chunks", linear),
        ("carry_over_chunks", linear),
        ("write_states", linear),
        ("selective_scan", selective),
    ]:
        kernel = getattr(triton, name)
        ptx = compile_for(90, kernel, **{n: given[n] for n in kernel.arg_names})
        assert "cp.async" in ptx, name


@pytest.mark.skipif(kernels.interpreting(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("d_state", [16, 256])
def test_states_of_the_selective_scan_stay_in_registers(monkeypatch, tmp_path, d_state: int):
    triton = pytest.importorskip("triton")
    from hooked_hybrid.network.kernels import triton_kernels

    assemblers = [*Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas-*")]
    if not assemblers:
        pytest.skip("this Triton brings no assembler of its PTX")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block_d, block_n = blocks(d_state)
    floats = "u_ptr dt_ptr A_ptr B_ptr C_ptr h0_ptr y_ptr last_ptr".split()
    ptx = compile_for(
        90,
        triton_kernels.selective_scan,
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(("n_pos", "d_inner", "d_state"), "i32"),
        **{"resets_ptr": "*i32", "HAS_RESETS": True},
        **{"BLOCK_D": block_d, "BLOCK_N": block_n, "STAGES": STAGES},
    )
    source = tmp_path / "scan.ptx"
    source.write_text(ptx)
    command = [assemblers[0], "--verbose", "--gpu-name=sm_90a", source, "-o", tmp_path / "scan"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and " 0 bytes stack frame, 0 bytes spill" in run.stderr, run.stderr


def test_nothing_is_imported_before_it_is_needed_nor_needed():
    code = """
import sys
import hooked_hybrid
from hooked_hybrid.network import kernels
from hooked_hybrid.network.kernels import causal_conv1d, grouped_experts, mamba_ssm
from hooked_hybrid.network.kernels import linear_scan, selective_scan
packages = {"triton", "mamba_ssm", "causal_conv1d"}
assert not packages & set(sys.modules), packages & set(sys.modules)
sys.modules.update(dict.fromkeys(packages))  # as if none were installed
import torch
x, A = torch.ones(1, 2, 8), torch.ones(8, 4)
B, h = torch.ones(1, 2, 4), torch.ones(1, 8, 4)
assert not kernels.has_triton() and not linear_scan.usable(x, x, x[:, 0])
assert not selective_scan.usable(x, x, A, B, B, h) and not mamba_ssm.usable(x, x, A, B, B)
assert not causal_conv1d.usable(x, x, A[:4], None)
try: linear_scan.linear_scan(x, x, x[:, 0])
except ValueError as error: assert "use `scan`" in str(error)
else: raise AssertionError
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_triton_is_there_on_a_gpu_or_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    x = torch.ones(1, 2, 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.has_triton() is HAS_GPU
    assert not kernels.triton_reads(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.has_triton() and kernels.triton_reads(x)
    assert not kernels.triton_reads(x, x.to("meta"))
    assert usable_linear(x, x, x[:, 0]) and usable_linear(*(t.double() for t in (x, x, x[:, 0])))
    assert not usable_linear(x, x.double(), x[:, 0])
    assert not usable_linear(*(t.bfloat16() for t in (x, x, x[:, 0])))
    assert not usable_linear(x, x.clone().requires_grad_(), x[:, 0])
    inputs = [t.cpu() for t in ssm_inputs(1, 2, 3, 4)]
    assert usable_selective(*inputs) and not usable_selective(*(t.double() for t in inputs))


def test_a_broken_package_is_not_used_and_warns(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="broken_package is installed but .* undefined symbol"):
        assert not kernels.importable("broken_package")
    assert not kernels.importable("no_such_package.module")


# --- compiled packages, by stand-ins --------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Callable) -> None:
    """Put a module of this name where imports find it, its parents too."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []
        vars(module).update(contents if depth == len(parts) else {})
        monkeypatch.setitem(sys.modules, module.__name__, module)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type != "meta"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for module in (mamba_ssm, causal_conv1d):
        monkeypatch.setattr(module, "importable", lambda name: True)


def scan_of_mamba_ssm(u, delta, A, B, C, *, return_last_state: bool = False) -> Any:
    """`selective_scan_fn`: its reference, or the same by our definition; the state is detached."""
    assert u.shape == delta.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
    if SOURCE.is_file():
        y, last = selective_scan_ref()(u, delta, A, B, C, return_last_state=True)
    else:
        inputs = [t.transpose(1, 2) for t in (u, delta, B, C)]
        h0 = A.new_zeros(u.shape[0], *A.shape)
        y, last = selective_scan_loop(*inputs[:2], A, *inputs[2:], h0)
        y = y.transpose(1, 2)
    return (y, last.detach()) if return_last_state else y


@pytest.mark.parametrize("n_pos", [1, 2, 30])
def test_mamba_ssm_gives_the_scan_and_its_gradients(monkeypatch, n_pos: int):
    install(monkeypatch, mamba_ssm.MODULE, selective_scan_fn=scan_of_mamba_ssm)
    *inputs, h0 = ssm_inputs(2, n_pos, 5, 3)
    expected = selective_scan_loop(*inputs, torch.zeros_like(h0))
    assert_close(mamba_ssm.selective_scan(*inputs), expected)

    leaves = [t.requires_grad_() for t in inputs]
    results = []
    for scan in (mamba_ssm.selective_scan, lambda *t: selective_scan_loop(*t, 0 * h0)):
        y, last = scan(*leaves)
        loss = (y * normal(2, n_pos, 5, seed=9)).sum() + last.square().sum()
        results.append((y, last, *torch.autograd.grad(loss, leaves)))
    assert_close(*results)


def convolution_of_causal_conv1d(
    x, weight, bias, *, initial_states, return_final_states: bool, activation
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_fn`, with what its kernels ask of their inputs."""
    n_channels, width = weight.shape
    assert return_final_states and activation is None and width in (2, 3, 4)
    assert n_channels % 8 == 0
    for t in (x, initial_states):
        assert t.shape[:2] == (x.shape[0], n_channels) and t.data_ptr() % 16 == 0
        assert t.stride(1) == 1 and t.stride(2) > 1 and t.stride(0) % 8 == t.stride(2) % 8 == 0
    inputs = torch.cat([initial_states, x], dim=2)
    return conv1d(inputs, weight[:, None], bias, groups=n_channels), inputs[..., 1 - width :]


@pytest.mark.parametrize("n_pos", [1, 2, 9])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_causal_conv1d_gives_the_convolution(monkeypatch, n_pos: int, width: int, has_bias: bool):
    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=convolution_of_causal_conv1d)
    layer = CausalConv1d(width, 8, bias=has_bias).to(DEVICE)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=i)
    wide = normal(2, n_pos, 16).requires_grad_()
    state = normal(2, width - 1, 8, seed=1).requires_grad_()
    leaves = [wide, state, *layer.parameters()]
    layout = lay_out(wide, None, None, None)
    for u in (wide[..., :8], wide[..., 8:], wide[..., 3:11], wide[..., ::2], wide.flip(0)[..., 8:]):
        results = []
        for y, after in (
            causal_conv1d.convolve(u, state, layer.weight, layer.bias),
            layer(u, state, layout),
        ):
            loss = (y * normal(2, n_pos, 8, seed=9)).sum() + after.square().sum()
            results.append((y, after, *torch.autograd.grad(loss, leaves, retain_graph=True)))
        assert_close(*results)


def test_compiled_packages_are_used_only_for_what_they_take(monkeypatch):
    u, state, weight, bias = normal(1, 3, 8), normal(1, 3, 8), normal(4, 8), normal(8)
    *ssm, h0 = ssm_inputs(1, 3, 5, 2)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    assert not causal_conv1d.usable(u, state, weight, bias) and not mamba_ssm.usable(*ssm)
    pretend_cuda(monkeypatch)
    assert causal_conv1d.usable(u, state, weight, bias)
    assert causal_conv1d.usable(*(t.bfloat16() for t in (u, state, weight, bias)))
    for bad in [
        (u, state, weight.bfloat16(), None),
        (*(t.double() for t in (u, state, weight)), None),
        (u[..., :6], state[..., :6], weight[:, :6], None),
        (u, normal(1, 4, 8), normal(5, 8), None),
        (u[:, :0], state, weight, None),
        (u, state.to("meta"), weight, None),
    ]:
        assert not causal_conv1d.usable(*bad)
    assert mamba_ssm.usable(*ssm) and not mamba_ssm.usable(*ssm, h0)
    assert not mamba_ssm.usable(*ssm, None, torch.zeros(1, 3, dtype=torch.bool))
    assert not mamba_ssm.usable(*(t.double() for t in ssm))
    assert not mamba_ssm.usable(*ssm_inputs(1, 0, 5, 2)[:-1])
    assert not mamba_ssm.usable(*ssm_inputs(1, 3, 5, 300)[:-1])


# --- experts --------------------------------------------------------------------------------------


def mixture(n_chosen: int = 2, dtype: torch.dtype = torch.float32, act: Any = "silu") -> MoE:
    moe = MoE(MoEConfig(n_experts=5, n_chosen=n_chosen, d_mlp=16, act=act), d_model=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in (moe, moe.router):
            part.reset_parameters()
    return moe.to(DEVICE, dtype)


def grouped(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    cfg = moe.cfg
    return run_experts(x, weights, indices, moe.gate, moe.up, moe.down, cfg.act)


@pytest.mark.parametrize("n_chosen", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (1, 64)])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_grouped_experts_equal_their_definition(n_chosen: int, shape: tuple[int, int], act: str):
    moe = mixture(n_chosen, act=act)
    x = normal(*shape, 8).requires_grad_()
    weights, indices = moe._route(x)
    leaves = [x, *moe.parameters()]
    results = []
    for run in (lambda *t: grouped(moe, *t), moe._run_hooked, moe._run_sorted):
        y = run(x, weights, indices)
        loss = (y * normal(*shape, 8, seed=9)).sum()
        results.append((y, *torch.autograd.grad(loss, leaves, retain_graph=True)))
    assert_close(results[0], results[1], FP32_PARITY)
    assert_close(results[0], results[2], FP32_PARITY)


@torch.no_grad()
def test_experts_may_be_idle_stored_either_way_and_in_bfloat16():
    moe, x = mixture(), normal(2, 9, 8)
    weights, indices = uniform(2, 9, 2), torch.tensor([4, 1], device=DEVICE).expand(2, 9, 2)
    expected = moe._run_hooked(x, weights, indices)
    assert_close([grouped(moe, x, weights, indices)], [expected], FP32_PARITY)
    for name in ("gate", "up", "down"):
        getattr(moe, name).data = getattr(moe, name).data.mT.contiguous().mT
    assert_close([grouped(moe, x, weights, indices)], [expected], FP32_PARITY)
    rounded = grouped(moe.bfloat16(), x.bfloat16(), weights.bfloat16(), indices)
    assert rounded.dtype == torch.bfloat16
    assert_close([rounded], [expected], BF16)


def test_grouped_experts_ask_the_device_nothing():
    """On the meta device there are no values, so that reading one back fails."""
    moe, x = mixture(dtype=torch.bfloat16).to("meta"), torch.ones(2, 9, 8, device="meta").bfloat16()
    indices = torch.zeros(2, 9, 2, device="meta", dtype=torch.long)
    assert grouped(moe, x, x[..., :2], indices).shape == x.shape


def test_grouped_experts_are_used_on_hopper_and_blackwell_in_bfloat16(monkeypatch):
    def usable(moe: MoE, x: Tensor) -> bool:
        return grouped_experts.usable(x, moe.gate, moe.up, moe.down)

    moe, x = mixture(dtype=torch.bfloat16), normal(2, 3, 8).bfloat16()
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    assert not usable(moe, x)
    for capability, is_fast in [((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]:
        pretend_cuda(monkeypatch, capability)
        assert usable(moe, x) is is_fast
    pretend_cuda(monkeypatch)
    assert not usable(moe, x[:, :0]) and not usable(mixture(), x.float())
    moe.up.data = moe.up.data.mT.contiguous().mT
    assert usable(moe, x)
    moe.up.data = normal(5, 16, 9).bfloat16()[..., :8]
    assert not usable(moe, x)
