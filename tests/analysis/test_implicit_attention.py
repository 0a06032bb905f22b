"""A recurrence's effective attention is what its definition says, and gives the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import ActivationCache, HookedHybrid, HookPoint
from hooked_hybrid.analysis.implicit_attention import (
    effective_attention,
    effective_offset,
    effective_pattern,
)
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.interventions.patching import freeze
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import BF16, FP32_PARITY

N_POS = 75  # more than one block of queries
READS = {"griffin": "conv", "jamba": "ssm_input"}
models = pytest.mark.parametrize("name", list(CONFIGS))
families = pytest.mark.parametrize("name", ["griffin", "jamba"])


model_of = cache(tiny_model)


def reads(name: str) -> str:
    return READS[name.partition("-")[0]]


def applied(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("bcqk,bkc->bqc", matrix, x)


def assert_reproduces(name: str, kept: Any, tolerance: float = FP32_PARITY, **run: Any) -> None:
    """Check both products against the layer's own outputs at every token."""
    given = run.get("attention_mask", run.get("segment_ids"))
    real = torch.ones_like(kept["ssm_y", 0][..., :1]) if given is None else (given > 0)[..., None]
    for layer in model_of(name).cfg.recurrent_layers:
        for through, x, y in (("scan", reads(name), "ssm_y"), ("block", "in_proj", "gated")):
            matrix = effective_attention(kept, layer, through=through, **run)
            offset = effective_offset(kept, layer, through=through, **run)
            found = applied(matrix, kept[x, layer].float()) + offset
            expected = kept[y, layer].float()
            assert relative(found * real, expected * real) < tolerance, (layer, through)


# --- against the layer ----------------------------------------------------------------------------


@models
def test_the_matrix_times_the_inputs_is_the_layers_output(name: str):
    _, kept = model_of(name).run_with_cache(random_tokens(3, N_POS))
    assert_reproduces(name, kept)
    for layer in model_of(name).cfg.recurrent_layers:
        y, x = kept["ssm_y", layer], kept[reads(name), layer]
        assert relative(applied(effective_attention(kept, layer), x), y) < FP32_PARITY
        largest_offset = float(effective_offset(kept, layer).abs().max())
        assert largest_offset < FP32_PARITY * float(y.abs().max())


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(name: str, side: str):
    tokens = random_tokens(3, N_POS)
    mask = torch.ones_like(tokens)
    for row, n in enumerate([0, 9, 40]):
        mask[row, slice(n) if side == "left" else slice(N_POS - n, None)] = 0
    _, kept = model_of(name).run_with_cache(tokens, attention_mask=mask)
    assert_reproduces(name, kept, attention_mask=mask)
    single = tokens[2, mask[2] > 0][None]
    _, alone = model_of(name).run_with_cache(single)
    for through in ("scan", "block"):
        matrix = effective_attention(kept, 0, through=through, attention_mask=mask)
        is_real = mask[2] > 0
        assert not bool(matrix[2][:, ~is_real].any() or matrix[2][:, :, ~is_real].any())
        part = matrix[2, None][:, :, is_real][..., is_real]
        assert relative(part, effective_attention(alone, 0, through=through)) < FP32_PARITY


@models
def test_nothing_is_read_across_documents(name: str):
    tokens = random_tokens(2, N_POS)
    ids = torch.zeros_like(tokens)
    ids[0, :20], ids[0, 20:22], ids[0, 22:] = 1, 2, 3
    ids[1, 4:67], ids[1, 67:70] = 5, 9
    _, kept = model_of(name).run_with_cache(tokens, segment_ids=ids)
    assert_reproduces(name, kept, segment_ids=ids)
    matrix = effective_attention(kept, 0, through="block", segment_ids=ids)
    other = (ids[:, :, None] != ids[:, None, :]) | (ids == 0)[:, :, None]
    assert not bool(matrix.masked_select(other[:, None]).any())
    with pytest.raises(ValueError, match="Give attention_mask, segment_ids and state"):
        effective_attention(kept, 0)


@models
def test_a_carried_state_is_in_the_offset(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    _, state = model(tokens[:, :30], return_state=True)
    _, kept = model.run_with_cache(tokens[:, 30:], state=state)
    assert_reproduces(name, kept, state=state)
    _, whole = model.run_with_cache(tokens)
    part = effective_attention(whole, 0)[:, :, 30:, 30:]
    assert relative(effective_attention(kept, 0, state=state), part) < FP32_PARITY
    with pytest.raises(ValueError, match="state"):
        effective_attention(kept, 0)


@models
def test_a_generations_cache_is_one_run(name: str):
    model, tokens = model_of(name), random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    options: Any = {"stop_at_eos": False, "return_type": "output", "verbose": False}
    out = model.generate(tokens, 5, attention_mask=mask, names_filter=True, **options)
    mask = torch.cat([mask, mask.new_ones(2, 4)], dim=1)
    assert_reproduces(name, out.cache, attention_mask=mask)


def edits(name: str) -> list[tuple[str, Callable[..., Tensor]]]:
    """Return hooks that change gates and decays, to 0 and to 1 among others."""

    def log_decay(a: Tensor, hook: HookPoint) -> Tensor:
        a = 0.3 * a
        a[:, 7, ::2], a[:, 11:14], a[:, 40] = -torch.inf, 0.0, -60.0
        return a

    def dt(value: Tensor, hook: HookPoint) -> Tensor:
        value = 2 * value
        value[:, 7], value[:, 11:14] = 300.0, 0.0
        return value

    def squashed(value: Tensor, hook: HookPoint) -> Tensor:
        return 1.5 * value.tanh()

    def half(value: Tensor, hook: HookPoint) -> Tensor:
        value[:, ::3] *= -0.5
        return value

    leaves: dict[str, Any] = {"gate": half}
    if reads(name) == "conv":
        leaves |= {"log_decay": log_decay, "input_gate": half}
    else:
        leaves |= {"ssm_dt": dt, "ssm_B": squashed, "ssm_C": half}
    return [(lambda n, e=e: n.endswith(f".mixer.hook_{e}"), fn) for e, fn in leaves.items()]


@models
def test_edited_gates_and_decays_are_taken_as_used(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    with model.hooks(edits(name)):
        _, kept = model.run_with_cache(tokens)
    assert relative(kept["ssm_y", 0], model.run_with_cache(tokens)[1]["ssm_y", 0]) > 1e-2
    assert_reproduces(name, kept)


@models
def test_edited_writes_and_convolutions_are_in_the_offset(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)

    def edit(value: Tensor, hook: HookPoint) -> Tensor:
        return value + 0.3

    points = lambda n: n.endswith(("hook_ssm_write", "mixer.hook_conv"))  # noqa: E731
    with model.hooks([(points, edit)]):
        _, kept = model.run_with_cache(tokens, names_filter=lambda n: ".mixer." in n)
    assert_reproduces(name, kept)
    assert float(effective_offset(kept, 0).abs().max()) > 1e-2


def test_edited_decays_of_mamba_need_to_be_in_the_cache():
    model, tokens = model_of("jamba"), random_tokens(2, 20)
    hooks = [("blocks.0.mixer.hook_ssm_decay", lambda a, hook: -0.5 * a)]
    with model.hooks(hooks):
        _, kept = model.run_with_cache(tokens, names_filter=lambda n: ".mixer." in n)
        _, less = model.run_with_cache(tokens)
    assert_reproduces("jamba", kept)
    with pytest.raises(ValueError, match="hook_ssm_decay"):
        effective_attention(less, 0)


@families
def test_an_edited_state_is_refused(name: str):
    model, tokens = model_of(name), random_tokens(2, 20)
    with model.hooks([("blocks.0.mixer.hook_ssm_state", lambda h, hook: 0.5 * h)]):
        _, kept = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match="no matrix gives that output"):
        effective_attention(kept, 0)
    assert effective_attention(kept, 0, check=False).shape[-2:] == (20, 20)


@families
def test_bfloat16(name: str):
    model, tokens = tiny_model(name, dtype=torch.bfloat16), random_tokens(2, N_POS)
    _, kept = model.run_with_cache(tokens)
    assert_reproduces(name, kept, tolerance=BF16)
    assert effective_attention(kept, 0).dtype == torch.float32


# --- against the definition -----------------------------------------------------------------------


@families
def test_a_column_is_the_response_to_one_input_with_the_gates_held(name: str):
    """The model itself is asked: one input is moved while what depends on it stays frozen."""
    model, tokens = model_of(name), random_tokens(2, 30)
    _, kept = model.run_with_cache(tokens)
    leaves = ["input_gate", "rec_gate"] if reads(name) == "conv" else ["ssm_dt", "ssm_B", "ssm_C"]
    held = freeze(kept, [(leaf, 0) for leaf in leaves])
    matrix = effective_attention(kept, 0)
    for key in (0, 11, 29):

        def move(x: Tensor, hook: HookPoint, key: int = key) -> Tensor:
            x = x.clone()
            x[:, key] += 1.0
            return x

        with model.hooks([*held, (f"blocks.0.mixer.hook_{reads(name)}", move)]):
            _, moved = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_ssm_y")
        response = (moved["ssm_y", 0] - kept["ssm_y", 0]).transpose(1, 2)
        assert relative(matrix[..., key], response) < 10 * FP32_PARITY  # a small difference of two


def by_hand(decay: Tensor, gain: Tensor, read: Tensor, skip: Tensor, starts: list[int]) -> Tensor:
    """Return the matrix of one row [channel query key] by loops in float64."""
    decay, gain, read = decay.double(), gain.double(), read.double()
    n_pos, channels = decay.shape[:2]
    matrix = torch.zeros(channels, n_pos, n_pos, dtype=torch.float64)
    for s in range(n_pos):
        state = gain[s]
        matrix[:, s, s] = (state * read[s]).sum(-1) + skip
        for t in range(s + 1, n_pos):
            if t in starts:
                break
            state = decay[t] * state
            matrix[:, t, s] = (state * read[t]).sum(-1)
    return matrix


def terms_by_hand(model: HookedHybrid, kept: Any, layer: int, starts: list[int]) -> list[Tensor]:
    """Return decay, gain, read and skip of the first row, from the published equations."""
    mixer = model.blocks[layer].mixer
    if "griffin" in model.cfg.model_name or hasattr(mixer, "a_param"):
        log_a = kept["log_decay", layer][0].double()
        scale = (1 - (2 * log_a).exp()).sqrt()
        scale[starts] = 1.0
        gain = kept["input_gate", layer][0] * scale
        one = torch.ones(len(gain), 1, 1)
        return [log_a.exp()[..., None], gain[..., None], one, torch.zeros(gain.shape[1])]
    dt, B, C = (kept[n, layer][0].double() for n in ("ssm_dt", "ssm_B", "ssm_C"))
    A = -mixer.A_log.double().exp()
    return [(dt[..., None] * A).exp(), dt[..., None] * B[:, None], C[:, None], mixer.D.double()]


@families
@pytest.mark.parametrize("edited", [False, True])
def test_the_matrix_is_that_of_a_float64_loop(name: str, edited: bool):
    model, tokens = model_of(name), random_tokens(1, N_POS)
    ids = torch.ones_like(tokens)
    ids[0, 25:] = 2
    with model.hooks(edits(name) if edited else []):
        _, kept = model.run_with_cache(tokens, segment_ids=ids)
    terms = terms_by_hand(model, kept, 1, [0, 25])
    expected = by_hand(*terms, starts=[0, 25])
    assert relative(effective_attention(kept, 1, segment_ids=ids)[0], expected) < FP32_PARITY

    weight = model.blocks[1].mixer.conv.weight.double().flip(0)
    act = torch.ones(N_POS, weight.shape[1], dtype=torch.float64)
    if name == "jamba":
        act = kept["conv", 1][0].double().sigmoid()
    mixed = torch.zeros_like(expected)
    for s in range(N_POS):
        for back, w in enumerate(weight):
            if s - back >= 0 and ids[0, s - back] == ids[0, s]:
                mixed[:, :, s - back] += expected[:, :, s] * (act[s] * w)[:, None]
    mixed *= kept["gate", 1][0].T[:, :, None]
    block = effective_attention(kept, 1, through="block", segment_ids=ids)[0]
    assert relative(block, mixed) < FP32_PARITY


def test_long_products_neither_drift_nor_overflow():
    """Decays near 1, near 0 and exactly 0 over a thousand positions, against a float64 loop."""
    model, n_pos = model_of("griffin"), 1000
    tokens = random_tokens(1, n_pos)

    def decays(a: Tensor, hook: HookPoint) -> Tensor:
        a = a.clone()
        a[..., :4], a[..., 4:8] = -1e-6, -90.0
        a[:, 500, 8:12] = -torch.inf
        return a

    with model.hooks([("blocks.1.mixer.hook_log_decay", decays)]):
        _, kept = model.run_with_cache(tokens)
    keys = [0, 3, 499, 500, 501, 990]
    found = effective_attention(kept, 1, keys=keys)
    log_a = kept["log_decay", 1][0]
    decay, scale = log_a.exp().double(), (1 - (2 * log_a).exp()).sqrt()  # fp32, as the layer
    scale[0] = 1.0
    gain = (kept["input_gate", 1][0] * scale).double()
    for i, key in enumerate(keys):
        factors = torch.cat([torch.ones(1, decay.shape[1]), decay[key + 1 :]]).cumprod(0)
        expected = torch.zeros(n_pos, decay.shape[1], dtype=torch.float64)
        expected[key:] = factors * gain[key]
        assert bool(torch.isfinite(found).all())
        assert relative(found[0, :, :, i].T, expected) < FP32_PARITY


# --- summaries, selections, memory ----------------------------------------------------------------


@families
@pytest.mark.parametrize("through", ["scan", "block"])
def test_summaries_and_selections_are_of_the_matrix_by_channel(
    name: str, through: Any, monkeypatch: pytest.MonkeyPatch
):
    _, kept = model_of(name).run_with_cache(random_tokens(2, N_POS))
    whole = effective_attention(kept, 0, through=through)
    x = kept["in_proj" if through == "block" else reads(name), 0]
    given = whole * x.mT[:, :, None]
    n = whole.shape[1]
    for scratch in (2**26, 2**22):  # all channels at once, and some
        monkeypatch.setattr("hooked_hybrid.analysis.implicit_attention.SCRATCH", scratch)
        for summary, groups in (("layer", 1), (4, 4), ("gate_block", 4)):
            if summary == "gate_block" and name == "jamba":
                continue
            mean = whole.abs().unflatten(1, (groups, n // groups)).mean(2)
            norm = given.unflatten(1, (groups, n // groups)).square().sum(2).sqrt()
            a = effective_attention(kept, 0, through=through, summary=summary)
            b = effective_attention(kept, 0, through=through, summary=summary, measure="norm")
            assert relative(a, mean) < FP32_PARITY and relative(b, norm) < FP32_PARITY
            part = effective_attention(kept, 0, through=through, summary=summary, which=groups - 1)
            assert relative(part, mean[:, -1:]) < FP32_PARITY
        few = {"which": [5, 3], "queries": [70, 2, 9], "keys": [69, 0, 2, 8]}
        part = effective_attention(kept, -4, through=through, **few)
        expected = whole[:, few["which"]][:, :, few["queries"]][..., few["keys"]]
        assert relative(part, expected) < FP32_PARITY


@models
def test_a_pattern_is_non_negative_and_sums_to_one(name: str):
    tokens = random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    _, kept = model_of(name).run_with_cache(tokens, attention_mask=mask)
    options: Any = {"summary": 4, "through": "block", "attention_mask": mask}
    pattern = effective_pattern(kept, 0, **options)
    expected = effective_attention(kept, 0, **options)
    assert relative(pattern * expected.sum(-1, keepdim=True), expected) < FP32_PARITY
    assert relative(pattern.sum(-1), mask[:, None].expand(2, 4, -1).float()) < FP32_PARITY
    assert torch.equal(effective_pattern(kept, 0, keys=[3, 1], **options), pattern[..., [3, 1]])
    assert float(effective_pattern(kept, 0, attention_mask=mask).min()) == 0


def test_a_cache_without_a_batch_axis_is_one_row():
    model, tokens = model_of("griffin"), random_tokens(1, 12)
    _, kept = model.run_with_cache(tokens)
    expected = effective_attention(kept, 0)
    _, single = model.run_with_cache(tokens, remove_batch_dim=True)
    assert torch.equal(effective_attention(single, 0), expected)


def test_memory_is_estimated_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch):
    _, kept = model_of("jamba").run_with_cache(random_tokens(2, 20))
    needed = 2 * 48 * 20 * 20 * 4 + 2**26

    def never(*args: Any) -> None:
        raise AssertionError("computed")

    with monkeypatch.context() as patched:
        patched.setattr("hooked_hybrid.analysis.implicit_attention.blocks_of_rows", never)
        with pytest.raises(MemoryError, match=f"about {needed:,} bytes.*which=, queries= or keys="):
            effective_attention(kept, 0, max_bytes=needed - 1)
    assert effective_attention(kept, 0, max_bytes=needed).shape == (2, 48, 20, 20)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "layer 2 has no recurrence; those that have: \\(0, 1, 3\\)"),
        ({"layer": 9}, "layer 9 has no recurrence"),
        ({"through": "out"}, "through='out'"),
        ({"measure": "max"}, "measure='max'"),
        ({"measure": "norm"}, "give another summary"),
        ({"summary": "head"}, "summary='head'"),
        ({"summary": 5}, "32 channels make no groups"),
        ({"summary": 0}, "summary=0"),
        ({"which": 32}, "which 32: .* there are 32"),
        ({"queries": -1}, "counted from 0"),
        ({"keys": [20]}, "there are 20, from 0"),
        ({"attention_mask": torch.ones(2, 19)}, "attention_mask has shape"),
    ],
)
def test_bad_arguments_are_refused(options: Any, message: str):
    _, kept = model_of("griffin").run_with_cache(random_tokens(2, 20))
    with pytest.raises(ValueError, match=message):
        effective_attention(kept, **{"layer": 0, **options})


def test_other_refusals():
    _, kept = model_of("jamba").run_with_cache(random_tokens(2, 20))
    with pytest.raises(ValueError, match="no gate blocks"):
        effective_attention(kept, 0, summary="gate_block")
    model = model_of("griffin")
    _, kept = model.run_with_cache(random_tokens(2, 20), names_filter="blocks.0.mixer.hook_ssm_y")
    assert isinstance(kept, ActivationCache)
    with pytest.raises(HookNameError, match="hook_log_decay', which this needs"):
        effective_attention(kept, 0)
    _, state = model(random_tokens(3, 20), return_state=True)
    with pytest.raises(ValueError, match="2 rows, the state 3"):
        effective_attention(model.run_with_cache(random_tokens(2, 20))[1], 0, state=state)


@pytest.mark.parametrize("through", ["scan", "block"])
def test_documents_of_a_packed_run_must_be_given_where_decays_are_cached(through: str):
    """Cached decays of Mamba have the resets, so that its scan agrees without the documents."""
    model, tokens = tiny_model("jamba"), random_tokens(2, 12)
    documents = torch.tensor([[1] * 12, [1] * 5 + [2] * 7])
    _, cache = model.run_with_cache(tokens, segment_ids=documents, names_filter="*")
    with pytest.raises(ValueError, match="give segment_ids"):
        effective_attention(cache, 0, through=through)
    given = effective_attention(cache, 0, through=through, segment_ids=documents)
    assert not given[1, :, 5:, :5].any()
