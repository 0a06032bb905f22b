"""Models go through what torch and its neighbours do with any module: saved, copied, converted."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from hooked_hybrid import HookedHybrid
from hooked_hybrid import interventions as edits
from hooked_hybrid.interventions import pickling
from tests.models import (
    CONFIGS,
    jamba_config,
    layouts,
    random_model,
    random_tokens,
    relative,
    tiny_model,
)
from tests.tolerances import FLOAT64, FP32_PARITY

models = pytest.mark.parametrize("name", list(CONFIGS))
families = pytest.mark.parametrize("name", ["griffin", "jamba"])


def wide_model(tied: bool) -> HookedHybrid:
    """Return a model whose embedding, too, lies along its outputs."""
    return random_model(jamba_config("MA", tied_embedding=tied))


def other_model(model: HookedHybrid) -> HookedHybrid:
    """Return another model of the same config."""
    return random_model(model._cfg, seed=7)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_saved_by_safetensors_and_loaded_strictly(tied: bool, tmp_path: Path):
    model, tokens = wide_model(tied), random_tokens()
    assert not all(weight.is_contiguous() for weight in model.parameters())
    wanted = model(tokens)

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for assign in (False, True):
        loaded = other_model(model)
        loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=assign)
        assert torch.equal(loaded(tokens), wanted)
        assert layouts(loaded) == layouts(model)

    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = other_model(model)
    load_model(loaded, tmp_path / "model.safetensors", strict=True)
    assert torch.equal(loaded(tokens), wanted)

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(loaded(tokens), wanted)


@models
def test_a_state_dict_is_the_weights_and_no_write_to_it_is_lost(name: str):
    """A write reaches the model, or is an error."""
    model = tiny_model(name)
    kept = model.state_dict()
    assert kept.keys() == dict(model.named_parameters()).keys()
    n_refused = 0
    for key, weight in model.named_parameters():
        assert torch.equal(kept[key], weight)
        assert kept[key].is_contiguous()
        try:
            kept[key].fill_(0.5)
        except RuntimeError as error:
            assert "Inplace update to inference tensor" in str(error)
            n_refused += 1
        else:
            assert bool((weight == 0.5).all())
    assert 0 < n_refused < len(kept)
    copied = copy.deepcopy(kept)
    for key, t in model.state_dict(keep_vars=True).items():
        assert t is model.get_parameter(key)
        copied[key].zero_()  # a copy is the caller's own
        assert bool((t != 0).any())


@models
def test_a_model_that_was_given_a_state_dict_can_be_trained(name: str):
    model, tokens = tiny_model(name), random_tokens()
    model.load_state_dict(other_model(model).state_dict(), assign=True)
    model.requires_grad_(True)
    model(tokens, return_type="loss").backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


# --- hooks ----------------------------------------------------------------------------------------


def halved(value: Tensor, hook: Any) -> Tensor:
    return value / 2


model_of = cache(tiny_model)


@cache
def donor_of(name: str) -> dict[str, Tensor]:
    _, kept = model_of(name).run_with_cache(random_tokens(2, 9, seed=5))
    return dict(kept)


def made(name: str) -> dict[str, list[Any]]:
    """Return hooks of every factory, with arguments under which each of them does something."""
    model, values = model_of(name), donor_of(name)
    layer = model.cfg.attention_layers[0]
    heads, span = {layer: [0]}, (1, 4)
    z = f"blocks.{layer}.attn.hook_z"
    return {
        "attention_to": edits.keep_top_heads(1, edits.attention_to(span)),
        "random_score": edits.keep_top_heads(1, edits.random_score(3)),
        "reversed_score": edits.keep_top_heads(1, edits.reversed_score("l2"), "lowest"),
        "keep_top_heads": edits.keep_top_heads(torch.tensor([1, 2])),
        "ablate_heads": edits.ablate_heads(heads, "mean", values),
        "resampled": edits.ablate_heads(heads, "resample", values, seed=1),
        "norm": edits.ablate_heads(heads, "norm"),
        "cut_heads": edits.cut_heads(heads),
        "keep_heads": edits.keep_heads(heads),
        "ablate_layers": edits.ablate_layers([0], "mlp", "mean", values),
        "ablate_mixers": edits.ablate_mixers(model.cfg, "attention", None, "mean", values),
        "patch": edits.patch(values, z, positions=[2], heads=[1]),
        "freeze": edits.freeze(values, z),
        "knock_out_edges": edits.knock_out_edges([5], [1]),
        "edit_state": edits.edit_state(halved, [2]),
        "freeze_state": edits.freeze_state(3, 5),
        "knock_out_state_edges": edits.knock_out_state_edges([5], [1, 2]),
        "limit_window": edits.limit_window(3),
        "knock_out_crossings": edits.knock_out_crossings(model.cfg, 4),
        "follow_span": edits.follow_span(span, 5),
        "boost_span": edits.boost_span(1, span, 1.5),
        "hook_at": [("blocks.0.hook_resid_mid", edits.hook_at(halved, [1, 3]))],
        "on_rows": [("blocks.0.hook_resid_mid", edits.on_rows(halved, [1]))],
        **{
            f"manipulate_span {mode}": edits.manipulate_span(mode, span)
            for mode in ("null", "only", "omit", "binary", "permute")
        },
    }


@families
def test_every_built_in_hook_is_pickled_and_copied(name: str):
    model, tokens = model_of(name), random_tokens(2, 7)
    plain, hooks = model(tokens), made(name)
    for what, own in hooks.items():
        wanted = model.run_with_hooks(tokens, fwd_hooks=own)
        assert not torch.equal(wanted, plain), what
        read = pickle.loads(pickle.dumps(own))
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=read), wanted), what
        for (_, fn), (_, again) in zip(own, read, strict=True):
            for mark in ("per_position", "is_watcher", "positions"):
                assert getattr(fn, mark, None) == getattr(again, mark, None), what
    copied = copy.deepcopy(hooks)
    for what, own in copied.items():
        wanted = model.run_with_hooks(tokens, fwd_hooks=hooks[what])
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=own), wanted), what


def test_every_factory_is_among_those_that_are_pickled():
    factories = {n for n in edits.__all__ if hasattr(getattr(edits, n), "__wrapped__")}
    tried = {what.split()[0] for what in made("griffin")}
    others = {"best_heads", "check_heads", "check_spans", "l2_norm", "layers_of", "masks_of_rows"}
    others |= {"mean_over_tokens", "negative_entropy", "per_position"}
    assert set(edits.__all__) - tried == others
    assert {"keep_top_heads", "patch", "hook_at"} <= factories


def test_what_a_hook_of_the_callers_holds_is_pickled_as_python_does():
    kept = edits.hook_at(lambda value, hook: value, 1)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(kept)
    marked = edits.per_position(edits.on_rows(halved, 0))
    assert pickle.loads(pickle.dumps(marked)).per_position


def test_a_hook_of_another_version_is_refused():
    fn = edits.limit_window(3)[0][1]
    _, (module, name, index, held, *others) = fn.__reduce__()
    with pytest.raises(ValueError, match=r"limit_window.<locals>.hide.*make the hook anew"):
        pickling._rebuilt(module, name, index, {**held, "more": 1}, *others)
    with pytest.raises(ValueError, match="make the hook anew"):
        pickling._rebuilt(module, name, index + 1, held, *others)


class Logits(Dataset):
    """A data set whose items a hooked model computes, in workers."""

    def __init__(self, model: HookedHybrid, hooks: list[Any], tokens: Tensor) -> None:
        self.model, self.hooks, self.tokens = model, hooks, tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> Tensor:
        return self.model.run_with_hooks(self.tokens[row : row + 1], fwd_hooks=self.hooks)[0]


@families
def test_a_hooked_model_is_saved_and_copied_whole(name: str):
    model, tokens = tiny_model(name), random_tokens(2, 9)
    hooks = edits.keep_top_heads(1)
    model.add_perma_hook(*hooks[0])
    model.add_perma_hook(*hooks[1])
    wanted = model(tokens)
    assert not torch.equal(wanted, tiny_model(name)(tokens))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ]
    for other in others:
        assert torch.equal(other(tokens), wanted)
        assert layouts(other) == layouts(model)
        other.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens), wanted)


def test_workers_of_a_data_loader_run_a_hooked_model():
    model, tokens = tiny_model("jamba"), random_tokens(2, 9)
    data = Logits(model, edits.cut_heads({2: [0]}), tokens)
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    (got,) = list(loader)
    assert relative(got, torch.stack([data[0], data[1]])) < FP32_PARITY


# --- what torch does with any module --------------------------------------------------------------


@families
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_run_under_gradient_checkpoints(name: str, reentrant: bool):
    model, tokens = tiny_model(name).double().requires_grad_(True), random_tokens(2, 9)
    model(tokens, return_type="loss").backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    x = model(tokens, stop_at_layer=0)
    for i in range(model.cfg.n_layers):

        def run(x: Tensor, i: int = i) -> Tensor:
            return model(x, start_at_layer=i, stop_at_layer=i + 1)

        x = checkpoint(run, x, use_reentrant=reentrant)
    model.loss_fn(model(x, start_at_layer=model.cfg.n_layers), tokens).backward()
    for n, p in model.named_parameters():
        assert relative(p.grad, wanted[n]) < FLOAT64


@families
def test_states_made_without_gradients_continue_with_them_and_are_unchanged(name: str):
    model, tokens = tiny_model(name).requires_grad_(True), random_tokens(2, 12)
    with torch.no_grad():
        _, state = model(tokens[:, :6], return_state=True)
        before = {key: t.clone() for key, t in state.tensors().items()}
    loss = model(tokens[:, 6:], state=state, return_type="loss")
    with torch.no_grad():  # a step that may write behind the state's keys
        _, after = model(tokens[:, 6:7], state=state, return_state=True)
        model(tokens[:, 7:8], state=after)
    loss.backward()
    assert all(torch.equal(t, before[key]) for key, t in state.tensors().items())
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        _, inferred = model(tokens[:, :6], return_state=True)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, 6:], state=inferred), model(tokens[:, 6:], state=state))


@families
def test_defaults_of_torch_do_not_reach_a_model(name: str):
    model, tokens = tiny_model(name), random_tokens(2, 9)
    hooks = edits.keep_top_heads(1)
    wanted = model.run_with_hooks(tokens, fwd_hooks=hooks)
    try:
        torch.set_default_dtype(torch.float64)
        got = model.run_with_hooks(tokens, fwd_hooks=edits.keep_top_heads(1))
        model.run_with_cache(tokens, names_filter=lambda n: True, incl_bwd=True)
        made = HookedHybrid(model._cfg)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)
    assert made.dtype == torch.float32
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    padded = model(tokens, attention_mask=mask)
    with torch.device("meta"):
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), wanted)
        assert torch.equal(model(tokens, attention_mask=mask), padded)
        new = HookedHybrid(model._cfg)
    assert {p.device.type for p in new.parameters()} == {"cpu"}
    assert bool(new(tokens).isfinite().all())


@families
def test_conversions_of_a_module_convert_a_model(name: str):
    model, tokens = tiny_model(name), random_tokens(2, 9)
    wanted = model(tokens)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        for convert in (lambda m, d=dtype: m.to(d), lambda m, d=dtype: m.type(d)):
            other = convert(copy.deepcopy(model))
            assert other(tokens).dtype == other.dtype == other.cfg.dtype == dtype
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(tokens), wanted)
    assert torch.equal(torch.nn.DataParallel(model)(tokens), wanted)
