"""Every short cut of a forward gives what its definition gives, whoever is watching."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.network.component import Component
from hooked_hybrid.network.elementwise import activate, gelu_tanh_, inverse_rms
from hooked_hybrid.network.layers import BlockDiagonalLinear, CausalConv1d, Linear
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.plan import may_overwrite, piece_length
from hooked_hybrid.network.weights.layout import empty_weight, laid_out
from tests.models import CONFIGS, D_VOCAB, layouts, random_tokens, relative, tiny_model
from tests.tolerances import FLOAT64_ONE_STEP, FP32_PARITY

ROUNDING = 1e-6
"""One operation in fp32 against the same in another order."""
N_POS = 12
PIECE = 7

models = pytest.mark.parametrize("name", list(CONFIGS))
unchecked = pytest.mark.usefixtures("unchecked")


model_of = cache(tiny_model)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every cut so small that short inputs are cut; return the piece lengths chosen."""
    chosen: list[int] = []

    def length(n_pos: int, points: Any) -> int:
        chosen.append(piece_length(n_pos, points, piece=PIECE))
        return chosen[-1]

    monkeypatch.setattr("hooked_hybrid.model.language_model.piece_length", length)
    monkeypatch.setattr("hooked_hybrid.network.attention.attend.BLOCK", 3)
    monkeypatch.setattr("hooked_hybrid.network.elementwise.WORTH_SPLITTING", 1)
    monkeypatch.setattr("hooked_hybrid.network.elementwise.GELU_ROWS", 4)
    return chosen


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# --- one operation --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 7), (31, 7), (32, 7), (33, 1), (3, 50, 5)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1, 6])
def test_gelu_by_a_sigmoid_is_gelu_by_a_tanh(shape: tuple[int, ...], scale: float):
    x = scale * randn(*shape)
    exact = gelu(x.double(), approximate="tanh")
    y = gelu_tanh_(x)
    assert y.data_ptr() == x.data_ptr()
    assert relative(y.double(), exact) < ROUNDING
    wide = scale * randn(*shape, dtype=torch.float64)
    assert relative(gelu_tanh_(wide.clone()), gelu(wide, approximate="tanh")) < FLOAT64_ONE_STEP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_of_large_values_is_the_value_or_zero(dtype: torch.dtype):
    large = torch.tensor([20.0, 300.0, 6e4] + ([1e12, 1e20, 3e38] if dtype != torch.half else []))
    large = large.to(dtype)[None]
    assert torch.equal(gelu_tanh_(large.clone()), large)
    assert torch.equal(gelu_tanh_(-large), torch.zeros_like(large))
    assert torch.equal(gelu_tanh_(torch.zeros(1, 3, dtype=dtype)), torch.zeros(1, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_in_half_precision_is_within_a_rounding_of_the_largest(dtype: torch.dtype):
    x = (2 * randn(100, 64)).to(dtype)
    exact = gelu(x.double(), approximate="tanh")
    assert relative(gelu_tanh_(x.clone()).double(), exact) < torch.finfo(dtype).eps


@torch.no_grad()
def test_an_activation_overwrites_only_on_request(small: list[int]):
    for name in ("gelu_tanh", "silu"):
        x = randn(2, 7, 5)
        exact, before = activate(x.double(), name), x.clone()
        assert relative(activate(x, name).double(), exact) < ROUNDING
        assert torch.equal(x, before)
        y = activate(x, name, overwrite=True)
        assert y.data_ptr() == x.data_ptr()
        assert relative(y.double(), exact) < ROUNDING


@pytest.mark.parametrize("width", [1, 24, 2560])
@pytest.mark.parametrize("scale", [0, 1e-6, 1, 1e4])
def test_a_norm_without_autograd_is_the_one_with(width: int, scale: float):
    for dtype, bound in ((torch.float32, ROUNDING), (torch.float64, 1e-14)):
        x = scale * randn(2, 5, width, dtype=dtype)
        with_grad = inverse_rms(x, 1e-6)
        exact = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        with torch.no_grad():
            without = inverse_rms(x, 1e-6)
        assert relative(with_grad.double(), exact) < bound
        assert relative(without.double(), exact) < bound


@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_at_one_position_is_the_last_of_all(d_conv: int, bias: bool):
    conv = CausalConv1d(d_conv, 6, bias).requires_grad_(False)
    for i, p in enumerate(conv.parameters()):
        p.copy_(randn(*p.shape, seed=i))
    u, old = randn(3, 9, 6, seed=3), randn(3, d_conv - 1, 6, seed=4)
    inputs = torch.cat([old, u], dim=1)
    exact = sum(inputs[:, tap : tap + 9].double() * conv.weight[tap] for tap in range(d_conv))
    exact = exact + (conv.bias if bias else 0)
    with torch.no_grad():
        state, outs = old, []
        for t in range(9):
            tokens = torch.zeros(3, 1).long()
            out, state = conv(u[:, t : t + 1], state, lay_out(tokens, None, None, None))
            outs.append(out)
            last = conv._one(inputs[:, t : t + d_conv])
            assert torch.equal(out, last)
            assert relative(last, conv._taps(inputs[:, t : t + d_conv], None)) < ROUNDING
        whole, end = conv(u, old, lay_out(torch.zeros(3, 9).long(), None, None, None))
    assert relative(torch.cat(outs, dim=1).double(), exact) < ROUNDING
    assert relative(whole.double(), exact) < ROUNDING
    assert torch.equal(state, end)


def test_a_convolution_changes_nothing_it_was_given():
    conv = CausalConv1d(4, 6).requires_grad_(False)
    conv.reset_parameters()
    u, old = randn(3, 9, 6, seed=3), randn(3, 3, 6, seed=4)
    kept = [t.clone() for t in (u, old, conv.weight, conv.bias)]
    with torch.no_grad():
        conv(u, old, lay_out(torch.zeros(3, 9).long(), None, None, None))
    assert all(
        torch.equal(a, b) for a, b in zip((u, old, conv.weight, conv.bias), kept, strict=True)
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 7)], ids=str)
def test_blocks_of_channels_are_multiplied_by_their_own_matrices(shape: tuple[int, int]):
    layer = BlockDiagonalLinear(4, 24).requires_grad_(False)
    for i, p in enumerate(layer.parameters()):
        p.copy_(randn(*p.shape, seed=i))
    x = randn(*shape, 24, seed=5)
    blocks = x.double().unflatten(-1, (4, 6))
    exact = torch.einsum("bski,kio->bsko", blocks, layer.weight.double()) + layer.bias
    assert relative(layer(x).double(), exact.flatten(-2)) < ROUNDING


# --- weights and how they lie ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 5, 3), (2, 3, 5), (5, 1), (1, 5)])
def test_the_longer_axis_of_a_weight_lies_side_by_side(shape: tuple[int, ...]):
    weight = empty_weight(*shape)
    assert weight.shape == shape
    longer = -2 if shape[-2] > shape[-1] else -1
    assert weight.stride(longer) == 1
    assert laid_out(weight).data_ptr() == weight.data_ptr()


@models
def test_in_16_bits_weights_lie_along_their_inputs_however_they_came_to_it(name: str):
    model = model_of(name)
    values = {n: p.bfloat16() for n, p in model.named_parameters()}
    narrow, fresh = copy.deepcopy(model).bfloat16(), HookedHybrid(model.cfg, dtype=torch.float16)
    assert wide_weights(model) and not wide_weights(narrow) and not wide_weights(fresh)
    assert all(torch.equal(p, values[n]) for n, p in narrow.named_parameters())
    assert layouts(narrow.float()) == layouts(model)
    assert layouts(HookedHybrid.meta(model.cfg)) == layouts(model)


def wide_weights(model: HookedHybrid) -> list[str]:
    """Return the parameters whose memory is laid out along their outputs."""
    return [n for n, p in model.named_parameters() if p.ndim > 1 and not p.is_contiguous()]


def contiguous_twin(model: HookedHybrid) -> HookedHybrid:
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data = p.data.contiguous()
    return twin


@models
def test_the_layout_of_weights_moves_logits_by_a_rounding(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    twin = contiguous_twin(model)
    assert len(wide_weights(model)) > 3 and not wide_weights(twin)
    assert relative(model(tokens), twin(tokens)) < FP32_PARITY
    with torch.no_grad():
        assert relative(model(tokens), twin(tokens)) < FP32_PARITY
        assert relative(model(tokens[:, :1]), twin(tokens[:, :1])) < FP32_PARITY


@models
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, N_POS)], ids=str)
def test_an_embedding_is_read_alike_along_the_vocabulary(name: str, shape: tuple[int, int]):
    model, tokens = model_of(name), random_tokens(*shape)
    embed, W_E = model.embed, model.W_E
    assert (W_E.stride(0) == 1) == model.cfg.tied_embedding
    exact = torch.stack([torch.stack([W_E[t] for t in row]) for row in tokens])
    exact = exact if embed.scale is None else exact * embed.scale
    assert torch.equal(embed(tokens), exact)
    with torch.no_grad():
        assert torch.equal(embed(tokens), exact) and embed(tokens).is_contiguous()


COPIES: dict[str, Callable[[HookedHybrid, Path], HookedHybrid]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "state_dict": lambda model, path: with_state_dict(model, model.state_dict()),
    "state_dict in a file": lambda model, path: with_state_dict(model, reloaded(model)),
    "checkpoint": lambda model, path: through_checkpoint(model, path),
    "to and back": lambda model, path: copy.deepcopy(model).double().float(),
    "to_empty": lambda model, path: with_state_dict(model, model.state_dict(), to_empty=True),
}


def with_state_dict(model: HookedHybrid, weights: Any, to_empty: bool = False) -> HookedHybrid:
    twin = HookedHybrid(model.cfg, device="meta" if to_empty else "cpu")
    twin = twin.to_empty(device="cpu") if to_empty else twin
    twin.load_state_dict(weights, strict=True)
    return twin


def reloaded(model: HookedHybrid) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()))


def through_checkpoint(model: HookedHybrid, path: Path) -> HookedHybrid:
    model.save_pretrained(path / "model")
    return HookedHybrid.from_pretrained(path / "model")


@models
@pytest.mark.parametrize("how", list(COPIES))
def test_copies_of_a_model_keep_every_value_and_layout(name: str, how: str, tmp_path: Path):
    model = model_of(name)
    twin = COPIES[how](model, tmp_path).requires_grad_(False)
    weights, copies = dict(model.named_parameters()), dict(twin.named_parameters())
    assert weights.keys() == copies.keys()
    for n, p in weights.items():
        assert p.shape == copies[n].shape
        assert (
            torch.equal(p, copies[n]) if how != "checkpoint" else relative(copies[n], p) < ROUNDING
        )
    assert wide_weights(twin) == wide_weights(model)
    with torch.no_grad():
        tokens = random_tokens(2, N_POS)
        assert relative(twin(tokens), model(tokens)) < FP32_PARITY


# --- torch's own hooks ----------------------------------------------------------------------------


def components(model: HookedHybrid) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, Component)]


@models
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
def test_hooks_of_torch_run_on_every_part_they_are_registered_on(name: str, kind: str):
    model, tokens = tiny_model(name), random_tokens(2, 5)
    called: dict[str, int] = {}
    register = {
        "forward": "register_forward_hook",
        "pre": "register_forward_pre_hook",
        "backward": "register_full_backward_hook",
        "backward pre": "register_full_backward_pre_hook",
    }[kind]
    assert len(components(model)) > 10
    for n in components(model):

        def count(*_: Any, n: str = n) -> None:
            called[n] = called.get(n, 0) + 1

        getattr(model.get_submodule(n), register)(count)
    if "backward" in kind:
        # Of a block, torch's backward hooks need tensors as inputs: the embedding gives none.
        resid = model.embed(tokens).requires_grad_()
        model(resid, start_at_layer=0).sum().backward()
        called["embed"] = 1
    else:
        with torch.no_grad():
            model(tokens)
    assert called == dict.fromkeys(components(model), 1)


@torch.no_grad()
def test_what_a_hook_of_torch_returns_is_used():
    model, tokens = tiny_model("griffin"), random_tokens(2, 5)
    plain = model(tokens)
    mlp = model.blocks[1].mlp
    handle = mlp.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = model(tokens)
    handle.remove()
    edit = [("blocks.1.hook_mlp_out", lambda value, hook: 2 * value)]
    assert relative(doubled, model.run_with_hooks(tokens, fwd_hooks=edit)) < FP32_PARITY
    assert relative(doubled, plain) > 100 * FP32_PARITY
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize(
    "register",
    [
        register_module_forward_hook,
        register_module_forward_pre_hook,
        register_module_full_backward_hook,
    ],
)
def test_global_hooks_of_torch_see_every_part(register: Callable):
    model, seen = tiny_model("griffin"), []
    handle = register(lambda module, *_: seen.append(module))
    try:
        resid = model.embed(random_tokens(2, 5)).requires_grad_()
        model(resid, start_at_layer=0).sum().backward()
    finally:
        handle.remove()
    parts = [m for m in model.modules() if isinstance(m, Component) and m is not model.embed]
    assert {id(m) for m in parts} <= {id(m) for m in seen}


@torch.no_grad()
def test_a_part_without_hooks_is_its_forward():
    layer = Linear(3, 5, bias=True).requires_grad_(False)
    nn.init.normal_(layer.bias)
    layer.reset_parameters()
    x = randn(2, 3)
    assert torch.equal(layer(x), layer.forward(x))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


# --- what may be overwritten ----------------------------------------------------------------------


def test_a_value_may_be_overwritten_only_without_autograd_and_unseen():
    seen, unseen = HookPoint(), HookPoint()
    handle = seen.add_hook(lambda value, hook: None)
    assert not may_overwrite() and not may_overwrite(unseen)
    with torch.no_grad():
        assert may_overwrite() and may_overwrite(unseen, unseen)
        assert not may_overwrite(seen) and not may_overwrite(unseen, seen)
        handle.remove()
        assert may_overwrite(seen)
    with torch.inference_mode():
        assert may_overwrite(seen)


def starts_of(model: HookedHybrid) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Return tokens and options of a long forward and of one step after another."""
    with torch.no_grad():
        _, state = model(random_tokens(2, 9, seed=3), return_state=True)
        _, state = model(random_tokens(2, 1, seed=4), state=state, return_state=True)
    return {
        "forward": (random_tokens(2, N_POS), {}),
        "step": (random_tokens(2, 1, seed=5), {"state": state}),
    }


@models
@unchecked
@torch.no_grad()
def test_a_value_that_somebody_kept_is_not_changed_later(name: str, small: list[int]):
    model = model_of(name)
    names = [n for n, point in model.hook_dict.items() if not point.is_large]
    for tokens, options in starts_of(model).values():
        _, everything = model.run_with_cache(tokens, **options)
        assert set(everything.keys()) == set(names)
        for n in names:
            kept: list[tuple[Tensor, Tensor]] = []

            @watcher
            def keep(value: Tensor, hook: HookPoint, kept: list = kept) -> None:
                kept.append((value, value.clone()))

            model.run_with_hooks(tokens, fwd_hooks=[(n, keep)], **options)
            assert len(kept) == 1 and torch.equal(*kept[0]), n
            lowest = torch.finfo(torch.float32).min
            value, wanted = (t.float() for t in (kept[0][0], everything[n]))
            assert torch.equal(value == lowest, wanted == lowest), n
            seen = value != lowest
            assert relative(value[seen], wanted[seen]) < FP32_PARITY, n


@models
@unchecked
@torch.no_grad()
def test_a_donor_that_a_hook_puts_in_place_is_not_changed(name: str, small: list[int]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    logits, donors = model.run_with_cache(tokens)
    kept = {n: t.clone() for n, t in donors.items()}
    for n, donor in kept.items():
        if n.endswith("hook_ssm_state"):
            continue  # edited one position at a time

        def put(value: Tensor, hook: HookPoint, donor: Tensor = donor) -> Tensor:
            return donor

        patched = model.run_with_hooks(tokens, fwd_hooks=[(n, put)])
        assert torch.equal(donor, donors[n]), n
        assert relative(patched, logits) < FP32_PARITY, n


@torch.no_grad()
def test_a_hook_may_return_a_value_of_any_layout(small: list[int]):
    model, tokens = model_of("griffin"), random_tokens(2, N_POS)

    def turned(value: Tensor, hook: HookPoint) -> Tensor:
        return value.transpose(1, 2).contiguous().transpose(1, 2)

    plain = model(tokens)
    for n, point in model.hook_dict.items():
        if len(point.axes) > 2 and not n.endswith("hook_ssm_state"):
            out = model.run_with_hooks(tokens, fwd_hooks=[(n, turned)])
            assert relative(out, plain) < FP32_PARITY, n


@models
@torch.no_grad()
def test_a_value_that_a_hook_of_torch_kept_is_not_changed_later(name: str, small: list[int]):
    model, kept = tiny_model(name), {}
    for n in components(model):

        def keep(module: nn.Module, args: Any, out: Any, n: str = n) -> None:
            if isinstance(out, Tensor):
                kept[n] = (out, out.clone())

        model.get_submodule(n).register_forward_hook(keep)
    model(random_tokens(2, N_POS), logits_to_keep=1)
    assert [n for n, pair in kept.items() if not torch.equal(*pair)] == []


# --- pieces ---------------------------------------------------------------------------------------


@models
@unchecked
@torch.no_grad()
def test_pieces_return_the_logits_and_losses_of_the_whole(name: str, small: list[int]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    whole_hook = [("hook_embed", lambda value, hook: None)]
    for options in ({}, {"attention_mask": mask}):
        real = mask.bool() if options else mask >= 0
        logits, loss = model.run_with_hooks(tokens, "both", fwd_hooks=whole_hook, **options)
        per_token = model.loss_fn(logits, tokens, per_token=True, **options)
        assert small[-1] == N_POS
        for keep in (1, N_POS - PIECE - 1, N_POS - PIECE, N_POS - PIECE + 1, N_POS - 1, N_POS):
            kept = model(tokens, logits_to_keep=keep, **options)
            assert small[-1] == PIECE and kept.shape == (2, keep, D_VOCAB)
            at = real[:, -keep:]
            assert relative(kept[at], logits[:, -keep:][at]) < FP32_PARITY
        assert model(tokens, None, **options) is None
        assert relative(model(tokens, "loss", **options), loss) < FP32_PARITY
        both = model(tokens, "both", loss_per_token=True, **options)
        assert relative(both[0][real], logits[real]) < FP32_PARITY
        assert relative(both[1], per_token) < FP32_PARITY
        assert small[-1] == PIECE


@models
@torch.no_grad()
def test_a_state_after_pieces_is_the_same_whatever_was_returned(name: str, small: list[int]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    _, wanted = model(tokens, return_state=True)
    for options in ({"return_type": None}, {"return_type": "loss"}, {"logits_to_keep": 1}):
        _, state = model(tokens, return_state=True, **options)
        assert state == wanted
    assert small == [PIECE] * 4


@models
@torch.no_grad()
def test_hooks_on_the_last_norm_and_on_logits_see_the_positions_in_hook_run(
    name: str, small: list[int]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    _, cached = model.run_with_cache(tokens)
    seen: dict[str, list[Tensor]] = {
        n: [] for n in ("ln_final.hook_normalized", "unembed.hook_logits")
    }
    where: dict[str, list[Tensor]] = {n: [] for n in seen}

    @per_position
    def look(value: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)].append(value)
        where[str(hook.name)].append(hook.run.query_pos)

    keep = N_POS - 2
    model.run_with_hooks(tokens, logits_to_keep=keep, fwd_hooks=[(list(seen), look)])
    assert small[-1] == PIECE
    for n, first in (("ln_final.hook_normalized", 0), ("unembed.hook_logits", N_POS - keep)):
        values, positions = torch.cat(seen[n], dim=1), torch.cat(where[n], dim=1)
        assert positions.tolist() == [list(range(first, N_POS))] * 2
        assert relative(values, cached[n][:, first:]) < FP32_PARITY


# --- watching -------------------------------------------------------------------------------------


@models
@unchecked
@torch.no_grad()
@pytest.mark.parametrize("kind", ["watcher", "unmarked", "per_position"])
def test_watching_any_one_point_moves_logits_by_no_more_than_rounding(
    name: str, kind: str, small: list[int]
):
    model = model_of(name)
    starts = starts_of(model)
    if kind == "per_position":  # at one position, a watcher like any other
        del starts["step"]
    for tokens, options in starts.values():
        plain = model(tokens, **options)
        n_pos = tokens.shape[1]
        assert small[-1] == min(PIECE, n_pos)
        for n in model.hook_dict:
            calls: list[int] = []

            def look(value: Tensor, hook: HookPoint, calls: list = calls) -> None:
                calls.append(value.shape[hook.pos_dim])

            mark = {"watcher": watcher, "per_position": per_position}.get(kind, lambda fn: fn)
            watched = model.run_with_hooks(tokens, fwd_hooks=[(n, mark(look))], **options)
            assert sum(calls) == n_pos, n
            assert small[-1] == (min(PIECE, n_pos) if kind == "per_position" else n_pos), n
            assert relative(watched, plain) < FP32_PARITY, n


@models
@torch.no_grad()
def test_what_a_step_returns_is_an_ordinary_tensor(name: str):
    model = model_of(name)
    tokens, options = starts_of(model)["step"]
    logits, state = model(tokens, return_state=True, **options)
    tensors = [logits, *(t for t in state.tensors().values() if t.is_floating_point())]
    with torch.enable_grad():
        leaves = [t.requires_grad_() for t in tensors]
        total = torch.stack([t.square().sum() for t in leaves]).sum()
        for t, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
            assert torch.equal(grad, 2 * t)
