"""What `forward` takes: TransformerLens's options, each from its line, and what it refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookNameError
from hooked_hybrid.model import memory
from hooked_hybrid.network.layout import lay_out
from tests.models import (
    CONFIGS,
    D_VOCAB,
    griffin_config,
    random_model,
    random_tokens,
    relative,
    tiny_model,
)
from tests.tolerances import FP32_PARITY

models = pytest.mark.parametrize("name", list(CONFIGS))


model_of = cache(tiny_model)


@models
def test_loss_is_the_mean_cross_entropy_of_the_next_tokens_in_nats(name: str):
    model, tokens = model_of(name), random_tokens()
    logits, loss = model(tokens, return_type="both")
    assert torch.equal(logits, model(tokens))
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert relative(loss, -log_probs.mean()) < FP32_PARITY
    assert torch.equal(loss, model(tokens, return_type="loss"))
    assert torch.equal(loss, model.loss_fn(logits, tokens))
    each = model(tokens, return_type="loss", loss_per_token=True)
    assert relative(each, -log_probs) < FP32_PARITY
    assert model(tokens, return_type=None) is None


def test_loss_counts_neither_padding_nor_the_first_token_of_a_document():
    model, tokens = model_of("griffin"), random_tokens(2, 12)
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1] * 9 + [0] * 3])
    each = model(tokens, return_type="loss", segment_ids=ids, loss_per_token=True)
    predicted = (ids[:, 1:] > 0) & (ids[:, :-1] == ids[:, 1:])
    assert bool((each[~predicted] == 0).all()) and bool((each[predicted] > 0).all())
    mean = model(tokens, return_type="loss", segment_ids=ids)
    assert relative(mean, each.sum() / predicted.sum()) < FP32_PARITY
    alone = model(tokens[:1, 6:], return_type="loss", loss_per_token=True)
    assert relative(each[0, 6:], alone[0]) < FP32_PARITY


@models
def test_logits_to_keep_are_the_last_ones(name: str):
    model, tokens = model_of(name), random_tokens()
    seen: list[int] = []
    hook = ("unembed.hook_logits", lambda x, hook: seen.append(x.shape[1]))
    kept = model.run_with_hooks(tokens, logits_to_keep=3, fwd_hooks=[hook])
    assert seen == [3]
    assert relative(kept, model(tokens)[:, -3:]) < FP32_PARITY


@models
def test_stopping_at_a_layer_and_starting_there_is_the_forward(name: str):
    model, tokens = model_of(name), random_tokens()
    _, kept = model.run_with_cache(tokens)
    for layer in range(model.cfg.n_layers):
        resid = model(tokens, stop_at_layer=layer)
        assert relative(resid, kept["resid_pre", layer]) < FP32_PARITY
        assert relative(model(resid, start_at_layer=layer), model(tokens)) < FP32_PARITY
    assert torch.equal(model(tokens, stop_at_layer=-1), resid)
    middle = model(kept["resid_pre", 1], start_at_layer=1, stop_at_layer=2)
    assert relative(middle, kept["resid_post", 1]) < FP32_PARITY


@models
def test_only_the_layers_that_run_fire_their_hooks(name: str):
    model, tokens = model_of(name), random_tokens()
    _, kept = model.run_with_cache(tokens, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in kept and not any(n.startswith("blocks.1") for n in kept)


def test_one_row_of_tokens_is_a_batch_of_one():
    model, tokens = model_of("griffin"), random_tokens(1)
    for given in (tokens[0], tokens[0].tolist(), tokens.int()):
        assert torch.equal(model(given), model(tokens))


def test_a_state_with_return_type_none_is_a_prefill_without_logits():
    model, tokens = model_of("griffin"), random_tokens()
    fired: list[str] = []
    with model.hooks(
        [(lambda n: n.startswith(("unembed", "ln_final")), lambda x, hook: fired.append(hook.name))]
    ):
        out, state = model(tokens[:, :-1], return_type=None, return_state=True)
    assert out is None and not fired
    assert relative(model(tokens[:, -1:], state=state), model(tokens)[:, -1:]) < FP32_PARITY


def test_weights_are_the_ones_the_forward_uses():
    model, tokens = model_of("griffin-gqa-ends-in-attention"), random_tokens()
    _, kept = model.run_with_cache(tokens)
    attn, block = model.blocks[1].attn, model.blocks[1]
    x = kept["normalized", 1, "ln1"] * block.ln1.w
    rows = model.W_E[tokens] * (model.embed.scale or 1)
    assert relative(kept["hook_embed"], rows) < FP32_PARITY
    for W, leaf in ((attn.W_Q, "q"), (attn.W_K, "k"), (attn.W_V, "v")):
        assert relative(torch.einsum("bsd,hde->bshe", x, W), kept[leaf, 1]) < FP32_PARITY
    written = torch.einsum("bshe,hed->bsd", kept["z", 1], attn.W_O) + attn.b_O
    assert relative(written, kept["mixer_out", 1]) < FP32_PARITY
    per_query = attn.W_K.repeat_interleave(2, dim=0)
    assert relative(attn.QK.AB, attn.W_Q @ per_query.mT) < FP32_PARITY
    assert relative(attn.OV.AB, attn.W_V.repeat_interleave(2, dim=0) @ attn.W_O) < FP32_PARITY
    layers, W_Q = model.W_Q
    assert layers == (1,) and torch.equal(W_Q[0], attn.W_Q)
    final = kept["ln_final.hook_normalized"] * model.ln_final.w
    capped = 30 * torch.tanh(final @ model.W_U / 30)
    assert relative(capped, model(tokens)) < FP32_PARITY
    assert model.stack("mixer.a_param").layers == (0,)
    with pytest.raises(LookupError, match="W_X"):
        model.stack("attn.W_X")


# --- what is refused, before anything runs --------------------------------------------------------

TOKENS = torch.tensor([[3, 4, 5, 6]])
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a token too large": (torch.tensor([[3, D_VOCAB]]), {}, f"0 to {D_VOCAB - 1}"),
    "a negative token": (torch.tensor([[3, -1]]), {}, "from -1"),
    "floating tokens": (torch.tensor([[0.5, 1.0]]), {}, "must be integers"),
    "boolean tokens": (torch.tensor([[True]]), {}, "must be integers"),
    "an empty prompt": (torch.empty(1, 0, dtype=torch.long), {}, "empty"),
    "three axes": (TOKENS[None], {}, r"give \[batch pos\]"),
    "a mask with holes": (TOKENS, {"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "rows \\[0\\]"),
    "a mask too short": (TOKENS, {"attention_mask": torch.ones(1, 3).long()}, r"\(1, 4\)"),
    "a mask of twos": (TOKENS, {"attention_mask": 2 * torch.ones(1, 4).long()}, "0 and 1"),
    "a mask of nothing": (TOKENS, {"attention_mask": torch.zeros(1, 4).long()}, "without a token"),
    "ids with holes": (TOKENS, {"segment_ids": torch.tensor([[1, 0, 2, 2]])}, "rows \\[0\\]"),
    "negative ids": (TOKENS, {"segment_ids": -torch.ones(1, 4).long()}, "positive ids"),
    "mask and ids": (
        TOKENS,
        {"attention_mask": torch.ones(1, 4).long(), "segment_ids": torch.ones(1, 4).long()},
        "not both",
    ),
    "an unknown return type": (TOKENS, {"return_type": "probs"}, "'logits', 'loss'"),
    "too many logits": (TOKENS, {"logits_to_keep": 5}, "there are 4"),
    "no logits": (TOKENS, {"logits_to_keep": 0}, "there are 4"),
    "a loss of some logits": (
        TOKENS,
        {"logits_to_keep": 2, "return_type": "loss"},
        "logits_to_keep",
    ),
    "a loss of one token": (TOKENS[:, :1], {"return_type": "loss"}, "two tokens"),
    "a state and a part": (TOKENS, {"stop_at_layer": 1, "return_state": True}, "every layer"),
    "tokens as residual": (TOKENS, {"start_at_layer": 1}, "residual stream"),
    "a narrow residual": (torch.zeros(1, 4, 5), {"start_at_layer": 1}, "residual stream"),
    "text without tokenizer": ("text", {}, "no tokenizer"),
    "a state of something": (TOKENS, {"state": (1, 2)}, "HybridState"),
}


@pytest.mark.usefixtures("unchecked")
@models
@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused_before_anything_runs(name: str, case: str):
    model = model_of(name)
    given, options, message = BAD[case]
    fired: list[int] = []
    with (
        model.hooks([(lambda n: "blocks" in n, lambda x, hook: fired.append(1))]),
        pytest.raises(ValueError, match=message),
    ):
        model(given, **options)
    assert not fired
    assert not model.list_hooks()


@models
def test_a_hook_that_returns_something_else_is_named_and_none_is_left(name: str):
    model = model_of(name)
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda x, hook: x[:, :1], ValueError, "returned shape"),
        (lambda x, hook: x.double(), ValueError, "returned dtype"),
        (lambda x, hook: x.to("meta"), ValueError, "returned device"),
        (lambda x, hook: "x", TypeError, "returned str"),
    ]
    for fn, error, message in bad:
        with pytest.raises(error, match=message) as raised:
            model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_mlp_out", fn)])
        assert "blocks.0.hook_mlp_out" in str(raised.value)
    assert not model.list_hooks()
    assert torch.isfinite(model(TOKENS)).all()


def test_names_that_do_not_exist_list_the_nearest():
    model = model_of("jamba")
    with pytest.raises(HookNameError, match=r"blocks.2.attn.hook_pattern"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.attn.hook_patern", print)])
    with pytest.raises(HookNameError, match=r"blocks.2.attn.hook_pattern"):
        model.run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_pattern")
    with pytest.raises(HookNameError, match="true of none"):
        model.run_with_cache(TOKENS, names_filter=lambda name: False)
    assert not model.list_hooks()


@models
def test_a_state_of_another_model_batch_dtype_is_refused(name: str):
    model = model_of(name)
    _, state = model(TOKENS, return_state=True)
    with pytest.raises(ValueError, match="fork"):
        model(TOKENS.repeat(2, 1), state=state)
    with pytest.raises(ValueError, match="state.to"):
        model(TOKENS, state=state.to(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="state.to\\(device\\)"):
        model(TOKENS, state=state.to("meta"))
    other = model_of(next(n for n in CONFIGS if n != name))
    with pytest.raises(ValueError, match="another model's"):
        other(TOKENS, state=state)


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WORTH_CHECKING", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 20_000)


@pytest.mark.usefixtures("little_memory")
def test_logits_that_do_not_fit_are_refused_with_the_option_that_avoids_them():
    model, tokens = model_of("griffin"), random_tokens(1, 60)
    fired: list[int] = []
    with (
        model.hooks([("hook_embed", lambda x, hook: fired.append(1))]),
        pytest.raises(MemoryError, match="logits of 60 positions.*logits_to_keep=1"),
    ):
        model(tokens)
    assert not fired
    model(tokens, logits_to_keep=1)
    model(tokens, return_type=None)
    model.generate(tokens, 2, verbose=False)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("griffin", "blocks.2.attn.hook_pattern"),
        ("jamba", "blocks.2.attn.hook_attn_scores"),
        ("jamba", "blocks.0.mixer.hook_ssm_state"),
    ],
)
def test_hooked_values_that_do_not_fit_are_refused_with_the_option_that_avoids_them(
    name: str, point: str
):
    model, tokens = model_of(name), random_tokens(1, 60)
    with pytest.raises(MemoryError, match=f"{point}.*names_filter"):
        model.run_with_cache(tokens, names_filter=point, logits_to_keep=1)
    assert not model.list_hooks()
    model.run_with_cache(tokens, names_filter="hook_embed", logits_to_keep=1)


@pytest.fixture
def trained() -> HookedHybrid:
    return random_model(griffin_config("RARA", n_keys=None)).requires_grad_()


def test_masks_that_attention_keeps_for_gradients_are_counted(trained, monkeypatch):
    """By hand, in units of one mask: booleans and fp32 numbers, 60 x 60."""
    mask = 60 * 60 * (1 + 4)
    monkeypatch.setattr(memory, "WORTH_CHECKING", 0)
    padded = torch.ones(2, 60)
    padded[0, :3] = 0
    sizes = {}
    for name, options in (("plain", {}), ("padded", {"attention_mask": padded})):
        layout = lay_out(random_tokens(2, 60), None, options.get("attention_mask"), None)
        sizes[name] = memory.attention_bytes(trained, layout, None, 60)
    assert sizes == {"plain": {1: mask, 3: mask}, "padded": {1: 2 * mask, 3: 2 * mask}}
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * mask + 2 * 2 * 61 * 4)
    trained(random_tokens(2, 60), logits_to_keep=1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * mask + 2 * 2 * 61 * 4 - 1)
    with pytest.raises(MemoryError, match="masks and scores of attention.*no_grad"):
        trained(random_tokens(2, 60), logits_to_keep=1)
    with torch.no_grad():  # in blocks on a CPU: nothing is kept
        trained(random_tokens(2, 60), logits_to_keep=1)


def test_on_a_gpu_scores_count_where_no_kernel_keeps_them_away(trained, monkeypatch):
    """By hand: 60 x 60 pairs of 3 heads of 8 numbers, one of 2 layers; fp64 is never fused."""
    pairs, gpu = 60 * 60, torch.device("cuda")
    monkeypatch.setattr(HookedHybrid, "layer_devices", (gpu,) * 4)

    def sizes(dtype: torch.dtype, **options: Any) -> dict[int, int]:
        layout = lay_out(random_tokens(2, 60), None, options.get("mask"), None)
        return memory.attention_bytes(trained.to(dtype), layout, None, 60)

    n_heads = trained.cfg.layers[1].mixer.n_heads
    with torch.no_grad():
        assert sizes(torch.float32) == sizes(torch.bfloat16) == {1: 0, 3: 0}  # causal: no mask
        mask = torch.ones(2, 60)
        mask[0, :3] = 0
        masks = 2 * n_heads * pairs * (1 + 2)  # of both rows, for each head of the one group
        assert sizes(torch.bfloat16, mask=mask) == {1: masks, 3: masks}
        scores = 2 * 2 * n_heads * pairs * 8  # scores and patterns of both rows
        assert sizes(torch.float64) == {1: scores, 3: scores}


def test_the_estimate_is_what_the_tensors_take():
    model, tokens = model_of("griffin"), random_tokens(2, 50)
    sizes: dict[str, int] = {}

    def weigh(x: Tensor, hook: Any) -> None:
        sizes[hook.name] = x.numel() * x.element_size()

    points = ["blocks.2.attn.hook_pattern", "blocks.2.attn.hook_attn_scores"]
    with model.hooks([(points, weigh)]):
        layout = lay_out(tokens, None, None, None)
        estimate = memory.large_bytes(model, layout, None, piece=50)
        logits = model(tokens)
    assert estimate == sizes
    capped = 2 * logits.numel() * logits.element_size()
    assert memory.logits_bytes(model, layout, 50) == capped
