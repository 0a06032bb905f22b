"""What the README's table says of other tools, each sentence seen on the packaged models.

A test that fails here after an update of the other tool means that its row has to be written again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens.factories.architecture_adapter_factory as adapters
from nnsight import TransformersModel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM  # noqa: TID251

import hooked_hybrid
from hooked_hybrid import HookedHybrid, interventions

PRESETS = Path(hooked_hybrid.__file__).parent / "presets"
GRIFFIN, JAMBA = (str(PRESETS / name) for name in ("tiny-griffin", "tiny-jamba"))
TOKENS = torch.randint(3, 580, (1, 40), generator=torch.Generator().manual_seed(0))
LAYER = 2  # attention, in both
POSITION = 20


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ours(folder: str, hooks: Any = ()) -> Tensor:
    return HookedHybrid.from_pretrained(folder).run_with_hooks(TOKENS, fwd_hooks=hooks)


def assert_close(value: Tensor, expected: Tensor) -> None:
    assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


def zero(value: Tensor, hook: Any = None) -> Tensor:
    return value * 0


# --- TransformerLens 4.3.0 --------------------------------------------------------------------


def bridge(folder: str) -> Any:
    return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)


def test_transformerlens_names_162_architectures():
    assert len(adapters.SUPPORTED_ARCHITECTURES) == 162
    assert {"RecurrentGemmaForCausalLM", "JambaForCausalLM"} <= set(
        adapters.SUPPORTED_ARCHITECTURES
    )


def test_transformerlens_hooks_the_stream_of_recurrentgemma_and_nothing_in_its_layers():
    names = {name for name in bridge(GRIFFIN).hook_dict if name.startswith("blocks")}
    assert {name.rsplit(".", 1)[1] for name in names} == {
        *("hook_in", "hook_mlp_in", "hook_out", "hook_resid_post", "hook_resid_pre")
    }


def test_transformerlens_reads_jambas_pattern_and_discards_edits_of_it():
    model = bridge(JAMBA)
    plain, cache = model.run_with_cache(TOKENS)
    pattern = cache[f"blocks.{LAYER}.attn.hook_pattern"]
    _, own = HookedHybrid.from_pretrained(JAMBA).run_with_cache(TOKENS)
    assert_close(own["pattern", LAYER], pattern)
    assert torch.equal(cache[f"blocks.{LAYER}.attn.hook_attn_scores"], pattern)
    with pytest.warns(UserWarning, match="discarded"):
        edited = model.run_with_hooks(
            TOKENS, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_pattern", zero)]
        )
    assert torch.equal(edited, plain)


def test_transformerlens_shows_jambas_states_without_a_cache_and_not_in_generation():
    model = bridge(JAMBA)
    model.blocks[0].mixer.eager_scan = True
    calls: list[int] = []
    hooks = [("blocks.0.mixer.hook_ssm_state", lambda x, hook: calls.append(x.shape[1]))]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert not calls
    model.run_with_hooks(TOKENS, fwd_hooks=hooks, use_cache=False)
    assert len(calls) == 1
    with model.hooks(fwd_hooks=hooks):
        model.generate(TOKENS, max_new_tokens=3, verbose=False)
    assert len(calls) == 1


def test_transformerlens_does_not_decompose_the_stream_of_a_hybrid():
    _, cache = bridge(JAMBA).run_with_cache(TOKENS)
    with pytest.raises(KeyError):
        cache.decompose_resid()
    with pytest.raises(KeyError):
        cache.stack_head_results()


# --- nnsight 0.8.1 ----------------------------------------------------------------------------


def traced(folder: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformersModel(
            folder,
            task="text-generation",
            device_map="cpu",
            dispatch=True,
            attn_implementation="eager",
            dtype=torch.float32,
        )


@pytest.mark.parametrize(("folder", "name"), [(GRIFFIN, "temporal_block"), (JAMBA, "self_attn")])
def test_nnsight_edits_the_pattern_by_a_line_of_transformers_source(folder: str, name: str):
    model = traced(folder)
    with model.trace(TOKENS):
        source = getattr(model.model.layers[LAYER], name).source.attention_interface_1.source
        source.nn_functional_softmax_0.output = source.nn_functional_softmax_0.output * 0
        logits = model.output.logits.save()
    assert_close(ours(folder, [(f"blocks.{LAYER}.attn.hook_pattern", zero)]), logits)


def test_nnsight_edits_a_state_of_recurrentgemma_step_by_step_of_transformers_loop():
    model = traced(GRIFFIN)
    with model.trace(TOKENS) as tracer:
        source = model.model.layers[0].temporal_block.rg_lru.source.self__rnn_scan_0.source
        for i in tracer.iter[0 : POSITION + 1]:
            state = source.recurrent_states_2.output
            if i == POSITION:
                source.recurrent_states_2.output = state * 0
        logits = model.output.logits.save()
    edit = interventions.edit_state(zero, [POSITION], layers=[0])
    assert_close(ours(GRIFFIN, edit), logits)


# --- transformers 5.23.0 ----------------------------------------------------------------------


def reference(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def attention(model: Any) -> torch.nn.Module:
    layer = model.model.layers[LAYER]
    return layer.self_attn if hasattr(layer, "self_attn") else layer.temporal_block


@pytest.mark.parametrize("folder", [GRIFFIN, JAMBA])
def test_a_module_hook_sees_the_pattern_and_cannot_change_what_it_gave(folder: str):
    model = reference(folder)
    plain = model(TOKENS).logits
    seen: list[Tensor] = []

    def edit(module: torch.nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> Any:
        seen.append(out[1])
        return out[0], out[1] * 0

    attention(model).register_forward_hook(edit)
    assert torch.equal(model(TOKENS).logits, plain)
    _, own = HookedHybrid.from_pretrained(folder).run_with_cache(TOKENS)
    assert_close(own["pattern", LAYER], seen[0])


# --- a batch padded on the left ---------------------------------------------------------------


def of_transformers(tokens: Tensor, mask: Tensor) -> Tensor:
    return reference(GRIFFIN)(tokens, attention_mask=mask).logits


def of_transformerlens(tokens: Tensor, mask: Tensor) -> Tensor:
    return bridge(GRIFFIN)(tokens, attention_mask=mask)


def of_nnsight(tokens: Tensor, mask: Tensor) -> Tensor:
    model = traced(GRIFFIN)
    with model.trace({"input_ids": tokens, "attention_mask": mask}):
        logits = model.output.logits.save()
    return logits  # noqa: RET504  (nnsight runs the block, and reads what it assigns)


def of_ours(tokens: Tensor, mask: Tensor) -> Tensor:
    return HookedHybrid.from_pretrained(GRIFFIN)(tokens, attention_mask=mask)


@pytest.mark.parametrize(
    ("read", "is_exact"),
    [(of_transformers, False), (of_transformerlens, False), (of_nnsight, False), (of_ours, True)],
)
def test_recurrentgemma_padded_on_the_left(read: Callable[..., Tensor], is_exact: bool):
    tokens = torch.cat([torch.zeros(1, 6, dtype=torch.long), TOKENS], dim=1)
    mask = (torch.arange(46) >= 6).long()[None]
    plain = ours(GRIFFIN)
    difference = (read(tokens, mask)[:, 6:] - plain).abs().max() / plain.abs().max()
    assert (difference < 1e-5) == is_exact, difference
    assert is_exact or difference > 1e-3
