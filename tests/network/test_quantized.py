"""Quantised weights: every hook as before, and the model is the one of the values they stand for.

That model, with plain weights (`dequantize_weights`), is the definition.
"""

from __future__ import annotations

import sys
import weakref
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_hybrid import HookedHybrid, HookPoint, fold_ln, interventions, unfold_ln
from hooked_hybrid.analysis import all_composition_scores
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.mlps import MLPS, MoE
from hooked_hybrid.network.weights.plain import as_matrix, is_quantized, stored_bytes
from hooked_hybrid.network.weights.quantized import (
    Quantizer,
    dequantize_weights,
    quantizable,
    quantize_weights,
)
from hooked_hybrid.runs.identity.model import weights_hash
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.test_every_hook_is_live import documented_shape, nudged
from tests.tolerances import FP32_PARITY, INT8, QUANTIZED_BF16

torchao = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "griffin": griffin_config("RA", d_model=64, d_rnn=64, d_head=16, d_mlp=128),
    "jamba": jamba_config("MA", d_model=64, d_inner=128, d_mlp=64),
}
SCHEMES = ("int8", "nf4")
ERRORS = {"int8": (0.003, 0.012), "nf4": (0.07, 0.12)}
"""Relative errors of normally distributed weights: uniform steps of 1/127 of a row's largest, about
3 sigma, give 0.007; the 16 levels of NF4 0.09 to 0.1."""
BY_HEAD = ("_input", "hook_result")
"""Hooked, heads are computed one by one, by `W_Q` and the like in the dtype they are stored in."""
N_POS = 10

both = pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for name in CONFIGS for scheme in SCHEMES]
)


@cache
def plain(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name])


@cache
def quantized(name: str, scheme: str) -> HookedHybrid:
    model = deepcopy(plain(name))
    quantize_weights(model, scheme)
    return model


@cache
def twin(name: str, scheme: str) -> HookedHybrid:
    """Return the plain model of the values that the quantised weights stand for."""
    model = deepcopy(quantized(name, scheme))
    dequantize_weights(model)
    return model


@both
def test_it_computes_what_its_values_compute_and_not_what_the_original_does(name: str, scheme: str):
    model, tokens = quantized(name, scheme), random_tokens(n_pos=N_POS)
    assert relative(model(tokens), twin(name, scheme)(tokens)) < FP32_PARITY
    assert relative(model(tokens), plain(name)(tokens)) > 1e-3


@both
def test_every_hook_is_live_with_its_documented_shape(name: str, scheme: str):
    model, tokens = quantized(name, scheme), random_tokens(n_pos=N_POS)
    assert model.hook_dict.keys() == plain(name).hook_dict.keys()
    before = model(tokens)
    for hook_name, point in model.hook_dict.items():
        seen: list[tuple[int, ...]] = []

        def edit(value: Tensor, hook: HookPoint, seen: list[tuple[int, ...]] = seen) -> Tensor:
            seen.append(tuple(value.shape))
            return value if hook.is_integer else nudged(value, hook)

        edited = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, edit)])
        n_pos = 1 if hook_name.endswith("ssm_state") else N_POS
        assert set(seen) == {documented_shape(model, point, n_pos, N_POS)}, hook_name
        if not point.is_integer:
            assert torch.isfinite(edited).all() and relative(edited, before) > 1e-3, hook_name
    assert torch.equal(model(tokens), before)


@both
def test_watched_and_unwatched_values_are_those_of_the_twin(name: str, scheme: str):
    tokens = random_tokens(n_pos=N_POS)
    _, ours = quantized(name, scheme).run_with_cache(tokens, names_filter=lambda _: True)
    _, theirs = twin(name, scheme).run_with_cache(tokens, names_filter=lambda _: True)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert relative(ours[key].double(), theirs[key].double()) < 2 * FP32_PARITY, key


@both
def test_gradients_reach_every_hook_and_are_those_of_the_twin(name: str, scheme: str):
    model, other = deepcopy(quantized(name, scheme)), deepcopy(twin(name, scheme)).double()
    model.quantization = None  # converting is refused: in torchao not every scheme survives it
    model.double()
    tokens, caches = random_tokens(n_pos=N_POS), []
    for each in (model, other):
        points = each.hook_dict.items()
        names = [n for n, point in points if not (point.is_integer or n.endswith(BY_HEAD))]
        caches.append(each.run_with_cache(tokens, names_filter=names, incl_bwd=True)[1])
    ours, theirs = caches
    gradients = [key for key in theirs if key.endswith("_grad")]
    assert len(gradients) == len(names)
    for key in gradients:
        assert float(theirs[key].abs().max()) > 0
        assert relative(ours[key], theirs[key]) < FP32_PARITY, key


@both
def test_steps_and_batches_are_the_whole(name: str, scheme: str):
    model, tokens = quantized(name, scheme), random_tokens(n_pos=N_POS)
    whole = model(tokens)
    out, state = model(tokens[:, :6], return_state=True, stage="prefill")
    logits = [out]
    for t in range(6, N_POS):
        out, state = model(tokens[:, t : t + 1], state=state, return_state=True, stage="generation")
        logits.append(out)
    assert relative(torch.cat(logits, dim=1), whole) < FP32_PARITY
    assert relative(torch.cat([model(row[None]) for row in tokens]), whole) < FP32_PARITY


@both
def test_an_intervention_does_what_it_does_to_the_twin(name: str, scheme: str):
    tokens, hooks = random_tokens(n_pos=N_POS), interventions.keep_top_heads(1, "l2", ties="lowest")
    ours, theirs = (
        model.generate(tokens, 4, fwd_hooks=hooks, stop_at_eos=False, verbose=False)
        for model in (quantized(name, scheme), twin(name, scheme))
    )
    assert torch.equal(ours, theirs)
    model = quantized(name, scheme)
    assert relative(model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens)) > 1e-3


@both
def test_large_weights_are_quantised_and_all_others_are_the_same_bits(name: str, scheme: str):
    model, before = quantized(name, scheme), dict(plain(name).named_parameters())
    assert model.quantization is not None
    low, high = ERRORS[scheme]
    assert [w.name for w in model.quantization.weights] == quantizable(model.cfg)
    for weight in model.quantization.weights:
        path, _, leaf = weight.name.rpartition(".")
        stored = getattr(model.get_submodule(path), leaf)
        assert is_quantized(stored)
        assert low < weight.error < high
        distance = (as_matrix(stored) - before[weight.name]).norm() / before[weight.name].norm()
        assert float(distance) == pytest.approx(weight.error, rel=1e-4)
    kept = {n: p for n, p in model.named_parameters() if not is_quantized(p)}
    assert kept.keys() == before.keys() - set(quantizable(model.cfg))
    assert all(torch.equal(p, before[n]) for n, p in kept.items())


def test_every_kind_of_layer_says_what_is_large_in_it():
    mixers, mlps = list(MIXERS.values())[:3], list(MLPS.values())[:2]  # a test may add more
    known = [*mixers, *mlps]
    assert [part.large() for part in known] == [
        ("q.weight", "k.weight", "v.weight", "o.weight"),
        ("linear_x.weight", "linear_y.weight", "linear_out.weight"),
        ("in_proj.weight", "out_proj.weight"),
        ("gate.weight", "up.weight", "down.weight"),
        ("gate", "up", "down"),
    ]


@both
def test_bytes_are_those_of_the_tensors_and_known_without_them(name: str, scheme: str):
    model, meta = quantized(name, scheme), HookedHybrid.meta(CONFIGS[name])
    weights = model.quantization.weights  # type: ignore[union-attr]
    for weight in weights:
        n, rows = torch.Size(weight.shape).numel(), torch.Size(weight.shape[:-1]).numel()
        if scheme == "int8":  # an integer a weight; a scale and a zero point a row
            assert weight.bytes == n + 5 * rows
        else:  # half a byte a weight, one a block, the levels and a few scales a matrix
            assert n / 2 + n / 64 < weight.bytes < n / 2 + n / 64 + (n / 64 + 100) * len(weights)
        assert weight.plain_bytes == 4 * n
    saved = model.quantization.plain_bytes - model.quantization.bytes  # type: ignore[union-attr]
    assert stored_bytes(model.parameters()) == stored_bytes(plain(name).parameters()) - saved
    assert quantize_weights(meta, scheme).bytes == model.quantization.bytes  # type: ignore[union-attr]
    assert stored_bytes(meta.parameters()) == stored_bytes(model.parameters())
    numbers = sum(p.numel() for p in plain(name).parameters())
    assert sum(p.numel() for p in model.parameters()) == numbers


@both
def test_whatever_reads_weights_as_matrices_reads_their_values(name: str, scheme: str):
    model, other = quantized(name, scheme), twin(name, scheme)
    names = ["attn.W_Q", "attn.W_O", "attn.q.weight"]
    names += ["mlp.W_in"] if name == "griffin" else ["mixer.in_proj.W"]
    for stacked in names:
        assert torch.equal(model.stack(stacked).weight, other.stack(stacked).weight)
    for block, theirs in zip(model.blocks, other.blocks, strict=True):
        assert torch.equal(block.mlp.W_out, theirs.mlp.W_out)
    ours, theirs = (all_composition_scores(m, "Q").values for m in (model, other))
    assert torch.equal(ours, theirs)
    assert len({weights_hash(m) for m in (model, other, plain(name))}) == 3


@both
def test_a_copy_has_the_same_numbers_and_shares_none(name: str, scheme: str):
    model = deepcopy(quantized(name, scheme))
    copy, tokens = deepcopy(model), random_tokens(n_pos=N_POS)
    assert torch.equal(copy(tokens), model(tokens))
    assert copy.quantization == model.quantization
    before = model(tokens)
    for parameter in copy.parameters():
        names = parameter.__tensor_flatten__()[0] if is_quantized(parameter) else []
        for part in [getattr(parameter, n) for n in names] or [parameter.data]:
            part.zero_()
    assert torch.equal(model(tokens), before) and not torch.equal(copy(tokens), before)


def test_dequantised_it_can_be_folded_and_saved(tmp_path: Path):
    for name in CONFIGS:
        model, tokens = deepcopy(twin(name, "int8")), random_tokens(n_pos=N_POS)
        assert model.quantization is None
        layouts = {n: p.stride() for n, p in model.named_parameters()}
        assert layouts == {n: p.stride() for n, p in plain(name).named_parameters()}
        model.save_pretrained(tmp_path / name)
        loaded = HookedHybrid.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(tokens), model(tokens))
        assert relative(fold_ln(model)[0](tokens), model(tokens)) < FP32_PARITY


@both
def test_loading_quantises_each_tensor_before_the_next(
    name: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain(name).save_pretrained(tmp_path / "model")
    seen: list[weakref.ref[Tensor]] = []
    waiting: list[int] = []
    quantize = Quantizer.quantize

    def counted(self: Quantizer, name: str, weight: Tensor) -> Any:
        seen.append(weakref.ref(weight))
        waiting.append(sum(of_weight() is not None for of_weight in seen))
        return quantize(self, name, weight)

    monkeypatch.setattr(Quantizer, "quantize", counted)
    model = HookedHybrid.from_pretrained(tmp_path / "model", quantize=scheme)
    assert len(waiting) == len(quantizable(model.cfg)) and max(waiting) == 1
    assert torch.equal(
        model(random_tokens(n_pos=N_POS)), quantized(name, scheme)(random_tokens(n_pos=N_POS))
    )
    assert model.quantization == quantized(name, scheme).quantization


def test_only_some_weights():
    def is_mlp(name: str) -> bool:
        return ".mlp." in name

    model = deepcopy(plain("jamba"))
    chosen = [w.name for w in quantize_weights(model, "int8", only=is_mlp).weights]
    assert chosen == [n for n in quantizable(model.cfg) if ".mlp." in n]
    assert not is_quantized(model.blocks[0].mixer.in_proj.weight)
    experts = [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
    assert experts and all(mlp.stacks is None for mlp in experts)
    assert all(isinstance(mlp.gate, nn.ParameterList) for mlp in experts)
    one = deepcopy(plain("griffin"))
    assert len(quantize_weights(one, "int8", only=["blocks.0.mlp.up.weight"]).weights) == 1
    assert weights_hash(one) != weights_hash(plain("griffin"))


def test_a_config_of_torchao_leaves_the_settings_of_the_process_alone():
    precision = torch.get_float32_matmul_precision()
    model, tokens = deepcopy(plain("griffin")), random_tokens(n_pos=N_POS)
    quantize_weights(model, torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32)))
    assert torch.get_float32_matmul_precision() == precision
    other = deepcopy(model)
    dequantize_weights(other)
    assert relative(model(tokens), other(tokens)) < FP32_PARITY
    assert relative(model(tokens), plain("griffin")(tokens)) < INT8


def refused(model: HookedHybrid, scheme: Any, says: str, **options: Any) -> None:
    before = weights_hash(model)
    with pytest.raises(ValueError, match=says):
        quantize_weights(model, scheme, **options)
    assert weights_hash(model) == before and model.quantization is None


def test_what_cannot_be_is_refused_before_anything_changes():
    model = deepcopy(plain("griffin"))
    refused(model, "int4", "give 'int8', 'nf4'")
    refused(model, "int8", "none of the 13 weights", only=["embed.W_E"])
    refused(model, "int8", "chooses no weight", only=lambda _: False)
    refused(random_model(CONFIGS["griffin"], dtype=torch.float16), "int8", "torch.bfloat16")
    refused(random_model(griffin_config()), "nf4", "not a multiple of 64")
    plain_format = torchao.Int4WeightOnlyConfig(group_size=32)
    refused(model, plain_format, "cannot be quantised with .* on cpu: .*'nf4'")
    refused(model, torchao.Int4WeightOnlyConfig(group_size=256), "group size")


def test_what_a_quantised_model_cannot_do_says_what_to_do(tmp_path: Path):
    model = deepcopy(quantized("griffin", "int8"))
    with pytest.raises(ValueError, match=r"save_pretrained: .*dequantize_weights"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"fold_ln: .*fold before quantising"):
        fold_ln(model)
    _, record = fold_ln(plain("griffin"))
    with pytest.raises(ValueError, match="unfold_ln"):
        unfold_ln(model, record)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_weights(model, "nf4")
    for convert in (lambda: model.to(torch.bfloat16), model.double):
        with pytest.raises(RuntimeError, match="load it with that dtype"):
            convert()
    assert torch.equal(
        model.to("cpu")(random_tokens(n_pos=N_POS)),
        quantized("griffin", "int8")(random_tokens(n_pos=N_POS)),
    )


def test_loading_with_inconsistent_options_is_an_error():
    for options, says in (
        ({"quantize_only": ["x"]}, "needs quantize"),
        ({"quantize": "int8", "dtype": "float16"}, "take torch.bfloat16"),
        ({"quantize": "int3"}, "give 'int8', 'nf4'"),
    ):
        with pytest.raises(ValueError, match=says):
            HookedHybrid.from_pretrained("tiny-griffin", **options)


def test_without_torchao_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    with pytest.raises(ImportError, match=r"hooked-hybrid\[quantized\]"):
        quantize_weights(deepcopy(plain("griffin")), "int8")


def test_bf16_stays_close_to_its_twin():
    for name in CONFIGS:
        for scheme in SCHEMES:
            model = random_model(CONFIGS[name], dtype=torch.bfloat16)
            quantize_weights(model, scheme)
            other, tokens = deepcopy(model), random_tokens(n_pos=N_POS)
            dequantize_weights(other)
            assert model(tokens).dtype == torch.bfloat16
            assert relative(model(tokens).float(), other(tokens).float()) < QUANTIZED_BF16


def test_a_weight_that_is_not_finite_is_refused_before_any_is_quantised():
    model = deepcopy(plain("griffin"))
    last = quantizable(model.cfg)[-1]
    with torch.no_grad():
        model.get_parameter(last)[0, 0] = torch.inf
    before = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=f"{last} holds NaN or infinity"):
        quantize_weights(model, "int8")
    assert [id(p) for p in model.parameters()] == before and model.quantization is None
