"""TransformerLens's functions on our models: those that work, by their definitions, and the rest.

Nothing stands between: each function is given the model itself and the cache that `run_with_cache`
returned, or TransformerLens's `ActivationCache` around that cache's values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, head_detector, patching
from transformer_lens.model_protocol import TransformerLensModel

from hooked_hybrid import ActivationCache as OurCache
from hooked_hybrid import HookedHybrid
from hooked_hybrid.model.folding import fold_ln

MODELS = ("tiny-griffin", "tiny-jamba")
ANSWER = 11


class Case(NamedTuple):
    """A model, a clean and a corrupted batch, and what the clean run left."""

    model: HookedHybrid
    tokens: Tensor
    corrupted: Tensor
    ours: OurCache

    @property
    def theirs(self) -> ActivationCache:
        """TransformerLens's cache around our values."""
        return ActivationCache(dict(self.ours.items()), self.model)


@cache
def case(name: str) -> Case:
    """Return a packaged model with prompts of 12 tokens, one of which is corrupted."""
    model = HookedHybrid.from_pretrained(name, n_ctx=512).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 500, (2, 12), generator=generator)
    corrupted = tokens.clone()
    corrupted[:, 4] += 1
    return Case(model, tokens, corrupted, model.run_with_cache(tokens)[1])


def metric(logits: Tensor) -> Tensor:
    """Return a logit at the last position, averaged over the rows."""
    return logits[:, -1, ANSWER].mean()


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Fail unless two tensors are alike to a part of the largest entry."""
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.fixture(params=MODELS)
def it(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def test_the_model_satisfies_the_protocol(it):
    assert isinstance(it.model, TransformerLensModel)
    assert it.model.cfg.device == it.model.device
    assert it.model.cfg.dtype is it.model.dtype


# --- ActivationCache ------------------------------------------------------------------------------


def test_shorthand_finds_the_values(it):
    attention = it.model.cfg.attention_layers[0]
    assert it.theirs["pattern", attention] is it.ours["pattern", attention]
    assert it.theirs["ssm_y", 0, "mixer"] is it.ours["ssm_y", 0]
    assert it.theirs["resid_post", -1] is it.ours["resid_post", -1]


def test_rows_can_be_sliced_and_the_batch_removed(it):
    row = it.theirs.apply_slice_to_batch_dim(1)
    assert torch.equal(row["resid_mid", 2], it.ours["resid_mid", 2][1])
    _, one = it.model.run_with_cache(it.tokens[:1])
    removed = ActivationCache(dict(one.items()), it.model).remove_batch_dim()
    assert torch.equal(removed["resid_mid", 2], one["resid_mid", 2][0])
    assert it.theirs.to("cpu")["hook_embed"].device.type == "cpu"


def test_accumulated_resid(it):
    stack, labels = it.theirs.accumulated_resid(incl_mid=True, return_labels=True)
    layers = range(it.model.cfg.n_layers)
    names = [(f"resid_{part}", i) for i in layers for part in ("pre", "mid")]
    assert torch.equal(stack[:-1], torch.stack([it.ours[name] for name in names]))
    assert torch.equal(stack[-1], it.ours["resid_post", -1])
    assert labels == [f"{i}_{part}" for i in layers for part in ("pre", "mid")] + ["final_post"]


def test_accumulated_resid_with_the_final_norm_ends_in_the_logits(it):
    stack = it.theirs.accumulated_resid(apply_ln=True)
    assert_same(stack[-1] @ it.model.W_U, it.ours["logits"])


def test_decompose_resid_of_mlps(it):
    stack, labels = it.theirs.decompose_resid(mode="mlp", return_labels=True)
    layers = range(it.model.cfg.n_layers)
    assert labels == ["embed", *(f"{i}_mlp_out" for i in layers)]
    mixers = torch.stack([it.ours["mixer_out", i] for i in layers]).sum(0)
    assert_same(stack.sum(0) + mixers, it.ours["resid_post", -1])


def test_apply_ln_to_stack_divides_by_the_scale(it):
    stack = it.theirs.decompose_resid(mode="mlp")
    assert_same(it.theirs.apply_ln_to_stack(stack), stack / it.ours["scale"])
    middle = it.theirs.apply_ln_to_stack(stack, layer=2, mlp_input=True)
    assert_same(middle, stack / it.ours["scale", 2, "ln2"])


def test_logit_attrs(it):
    stack = it.theirs.accumulated_resid()
    got = it.theirs.logit_attrs(stack, tokens=ANSWER, incorrect_tokens=12)
    direction = it.model.W_U[:, ANSWER] - it.model.W_U[:, 12]
    assert_same(got, stack / it.ours["scale"] @ direction)
    by_name = it.theirs.logit_attrs(stack, tokens=it.model.to_single_str_token(ANSWER))
    assert_same(by_name, stack / it.ours["scale"] @ it.model.W_U[:, ANSWER])


def test_logit_attrs_of_a_folded_model_are_exact(it):
    """They take the norm's weight for folded into the unembedding."""
    folded, _ = fold_ln(it.model)
    _, left = folded.run_with_cache(it.tokens)
    theirs = ActivationCache(dict(left.items()), folded)
    parts = theirs.decompose_resid(mode="mlp").sum(0) + theirs.stack_activation("mixer_out").sum(0)
    assert_same(theirs.logit_attrs(parts[None], tokens=ANSWER)[0], it.ours["logits"][..., ANSWER])


def test_our_caches_methods_of_the_same_names_agree(it):
    assert_same(it.theirs.accumulated_resid(), it.ours.accumulated_resid())
    stack = it.ours.decompose_resid(mode="mlp")
    assert_same(it.theirs.decompose_resid(mode="mlp"), stack)
    weighted = it.theirs.apply_ln_to_stack(stack) * it.model.ln_final.w
    assert_same(weighted, it.ours.apply_ln_to_stack(stack))


def test_stack_activation_of_what_every_layer_has(it):
    for name in ("resid_pre", "mixer_out", "mlp_out"):
        wanted = torch.stack([it.ours[name, i] for i in range(it.model.cfg.n_layers)])
        assert torch.equal(it.theirs.stack_activation(name), wanted)


def test_neuron_results_sum_to_the_mlps_write(it):
    results = it.theirs.get_neuron_results(0)
    bias = it.model.blocks[0].mlp.down.bias
    wanted = it.ours["mlp_out", 0] - (0 if bias is None else bias)
    assert_same(results.sum(-2), wanted)


def test_stack_neuron_results_where_every_mlp_is_dense():
    it = case("tiny-griffin")
    stack, labels = it.theirs.stack_neuron_results(
        it.model.cfg.n_layers, incl_remainder=True, return_labels=True
    )
    assert len(labels) == it.model.cfg.n_layers * it.model.cfg.d_mlp + 1
    assert_same(stack.sum(0), it.ours["resid_post", -1])
    d_mlp = it.model.cfg.d_mlp
    assert torch.equal(stack[d_mlp : 2 * d_mlp].movedim(0, -2), it.theirs.get_neuron_results(1))


# --- patching -------------------------------------------------------------------------------------


def by_hand(it: Case, name: str, index: Any) -> Tensor:
    """Return the metric of the corrupted run with `value[index]` from the clean one."""

    def patch(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[index] = it.ours[hook.name][index]
        return value

    return metric(it.model.run_with_hooks(it.corrupted, fwd_hooks=[(name, patch)]))


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "mlp_out", "mixer_out"])
@pytest.mark.parametrize("mine", [True, False], ids=["our cache", "their cache"])
def test_patching_what_every_layer_has(it, name, mine):
    clean = it.ours if mine else it.theirs
    own = getattr(patching, f"get_act_patch_{name}", None)
    if own is not None:
        got = own(it.model, it.corrupted, clean, metric)
    else:
        setter, axes = patching.layer_pos_patch_setter, ("layer", "pos")
        got = patching.generic_activation_patch(
            it.model, it.corrupted, clean, metric, setter, name, index_axis_names=axes
        )
    assert got.shape == (it.model.cfg.n_layers, 12)
    for layer, pos in ((0, 3), (0, 4), (2, 4), (it.model.cfg.n_layers - 1, 11)):
        wanted = by_hand(it, f"blocks.{layer}.hook_{name}", (slice(None), pos))
        assert got[layer, pos] == pytest.approx(float(wanted), rel=1e-5)


def heads_of(it: Case, name: str) -> int:
    """Return the heads of a hook point of attention."""
    return it.ours[name, it.model.cfg.attention_layers[0]].shape[1 if name == "pattern" else 2]


@pytest.mark.parametrize("name", ["z", "q", "k", "v", "pattern"])
def test_patching_heads_of_the_attention_layers(it, name):
    """With `index_df` the layers and heads are those it lists."""
    layers, n_heads = it.model.cfg.attention_layers, heads_of(it, name)
    frame = pd.DataFrame(
        [(i, h) for i in layers for h in range(n_heads)], columns=["layer", "head"]
    )
    is_pattern = name == "pattern"
    setter = (
        patching.layer_head_pattern_patch_setter
        if is_pattern
        else patching.layer_head_vector_patch_setter
    )
    got = patching.generic_activation_patch(
        it.model, it.corrupted, it.ours, metric, setter, name, index_df=frame
    )
    for value, (layer, head) in zip(got, frame.itertuples(index=False), strict=True):
        index = (slice(None), head) if is_pattern else (slice(None), slice(None), head)
        wanted = by_hand(it, f"blocks.{layer}.attn.hook_{name}", index)
        assert value == pytest.approx(float(wanted), rel=1e-5)


def test_a_patching_result_of_each_row(it):
    def each(logits: Tensor) -> Tensor:
        return logits[:, -1, ANSWER]

    result = patching.get_act_patch_resid_pre(
        it.model, it.corrupted, it.ours, each, reduce="none", baseline=True
    )
    corrupted = each(it.model(it.corrupted))
    assert_same(result.baseline, corrupted)
    assert_same(result.effect()[0, 4], each(it.model(it.tokens)) - corrupted, 1e-4)


# --- head detector --------------------------------------------------------------------------------


def test_detect_head_among_the_attention_layers(it):
    layers, text = it.model.cfg.attention_layers, it.model.to_string(it.tokens[0])
    heads = {i: list(range(it.model.cfg.n_heads)) for i in layers}
    got = head_detector.detect_head(it.model, text, "previous_token_head", heads=heads)
    _, read = it.model.run_with_cache(text)
    for layer in range(it.model.cfg.n_layers):
        if layer not in layers:
            assert torch.equal(got[layer], -torch.ones(it.model.cfg.n_heads))
            continue
        pattern = read["pattern", layer][0]
        previous = pattern.diagonal(offset=-1, dim1=1, dim2=2).sum(-1)
        assert_same(got[layer], previous / pattern.sum((1, 2)))
    several = head_detector.detect_head(
        it.model, [text, text], "previous_token_head", heads=[(layers[0], 1)]
    )
    assert several[layers[0], 1] == pytest.approx(float(got[layers[0], 1]), rel=1e-5)


# --- what does not work ---------------------------------------------------------------------------

HEADS_EVERYWHERE: dict[str, Callable[[Case], Any]] = {
    "decompose_resid": lambda it: it.theirs.decompose_resid(),
    "decompose_resid, attention": lambda it: it.theirs.decompose_resid(mode="attn"),
    "compute_head_results": lambda it: it.theirs.compute_head_results(),
    "stack_head_results": lambda it: it.theirs.stack_head_results(),
    "get_full_resid_decomposition": lambda it: it.theirs.get_full_resid_decomposition(),
    "stack_activation, patterns": lambda it: it.theirs.stack_activation("pattern"),
    "detect_head, all heads": lambda it: head_detector.detect_head(
        it.model, it.model.to_string(it.tokens[0]), "induction_head"
    ),
} | {
    name: lambda it, name=name: getattr(patching, name)(it.model, it.corrupted, it.ours, metric)
    for name in dir(patching)
    if name.startswith(("get_act_patch_attn", "get_act_patch_block_every"))
}
"""Functions that read every layer's heads, or its attention's write."""


@pytest.mark.parametrize("name", HEADS_EVERYWHERE)
def test_functions_that_walk_every_layer_for_heads_stop_at_a_recurrence(it, name):
    with pytest.raises(KeyError, match=r"blocks\.0\.(hook_attn_out|attn\.)"):
        HEADS_EVERYWHERE[name](it)


OF_THEIR_OWN_CLASSES: dict[str, tuple[Callable[[Case], Any], type[Exception], str]] = {
    "get_act_patch_direct_path": (
        lambda it: patching.get_act_patch_direct_path(
            it.model, it.corrupted, it.theirs, it.theirs, metric, 0, 0, "q"
        ),
        ValueError,
        "no `attn` component",
    ),
    "get_act_patch_direct_path_all_sources": (
        lambda it: patching.get_act_patch_direct_path_all_sources(
            it.model, it.corrupted, it.theirs, it.theirs, metric, "q"
        ),
        ValueError,
        "no `attn` component",
    ),
    "logit_lens": (lambda it: it.theirs.logit_lens(), ValueError, "single-stream"),
    "compute_ssm_effective_attention": (
        lambda it: it.theirs.compute_ssm_effective_attention(layer=0),
        TypeError,
        "no SSM mixer",
    ),
    "compute_ssm_state": (
        lambda it: it.theirs.compute_ssm_state(layer=0),
        TypeError,
        "no state-reconstructing SSM mixer",
    ),
}
"""Functions that ask for attributes of TransformerLens's own classes."""


@pytest.mark.parametrize("name", OF_THEIR_OWN_CLASSES)
def test_functions_for_their_own_classes_refuse(it, name):
    call, error, message = OF_THEIR_OWN_CLASSES[name]
    with pytest.raises(error, match=message):
        call(it)


def test_neurons_of_a_mixture_are_not_stacked():
    with pytest.raises(KeyError, match=r"blocks\.1\.mlp\.hook_post"):
        case("tiny-jamba").theirs.stack_neuron_results(4)
