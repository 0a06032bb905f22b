"""Path patching against two layers written out with matrices, and what must hold of any path."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from hooked_hybrid import HookedHybrid, interventions
from hooked_hybrid.analysis.metrics import normalised
from hooked_hybrid.analysis.path_patching import path_patch, path_patch_each, path_patch_heads
from hooked_hybrid.analysis.planted import planted_retrieval
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.hooks.names import HookNameError
from tests.models import CONFIGS, griffin_config, jamba_config, random_model, random_tokens
from tests.models import relative as difference
from tests.tolerances import BF16, FP32_PARITY

TWO_LAYERS = {
    "griffin": griffin_config("AA", n_kv_heads=2),
    "griffin-hybrid": griffin_config("RA", n_kv_heads=2),
    "jamba": jamba_config("AA", n_experts=1),
    "jamba-hybrid": jamba_config("MA", n_experts=1),
}
HYBRIDS = {"griffin": griffin_config("ARRA", n_kv_heads=2), "jamba": jamba_config("AMMA")}
two_layers = pytest.mark.parametrize("name", list(TWO_LAYERS))
hybrids = pytest.mark.parametrize("name", list(HYBRIDS))
CLEAN, CORRUPTED = random_tokens(seed=1), random_tokens(seed=2)


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> HookedHybrid:
    return random_model({**CONFIGS, **HYBRIDS}[name], dtype=dtype)


@cache
def two_layer_model(name: str) -> HookedHybrid:
    return random_model(TWO_LAYERS[name])


def run(model: HookedHybrid, tokens: Tensor, **options: Any) -> Any:
    return model.run_with_cache(tokens, **options)[1]


@cache
def corrupted_run(model: HookedHybrid) -> Any:
    return run(model, CORRUPTED)


def logits_of(logits: Tensor) -> Tensor:
    """A metric that sees everything: weights of every logit drawn once, a number for each row."""
    weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(3))
    return (logits.float() * weights).flatten(1).sum(1)


# --- two layers by hand -------------------------------------------------------------------------


def rms(x: Tensor, norm: Any, scale_of: Tensor | None = None) -> Tensor:
    of = x if scale_of is None else scale_of
    return x / (of.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w


def turned(x: Tensor, rotary: Any) -> Tensor:
    """Rotate pairs of channels (i, i + d_rotary / 2) of [batch pos d_head] by position."""
    if rotary is None:
        return x
    half, x = rotary.d_rotary // 2, x.clone()
    for i in range(half):
        angle = torch.arange(x.shape[1]) * rotary.theta ** (-i / half)
        a, b = x[..., i].clone(), x[..., i + half].clone()
        x[..., i] = a * angle.cos() - b * angle.sin()
        x[..., i + half] = b * angle.cos() + a * angle.sin()
    return x


def heads_by_hand(block: Any, q_in: list[Tensor], k_in: list[Tensor], v_in: list[Tensor]) -> Tensor:
    """z [head batch pos d_head] from each head's own inputs [batch pos d_model]."""
    attn, cfg = block.attn, block.attn.cfg
    t = torch.arange(q_in[0].shape[1])
    gap = t[:, None] - t
    unseen = (gap < 0) | (gap >= (cfg.n_keys or 10**9))
    found = []
    for head in range(cfg.n_heads):
        kv = head // (cfg.n_heads // cfg.n_kv_heads)
        q = turned(q_in[head] @ attn.W_Q[head], cfg.rotary)
        k = turned(k_in[kv] @ attn.W_K[kv], cfg.rotary)
        scores = (q @ k.mT / cfg.d_head**0.5).masked_fill(unseen, -torch.inf)
        found.append(scores.softmax(-1) @ (v_in[kv] @ attn.W_V[kv]))
    return torch.stack(found)


def mixer_by_hand(block: Any, z: Tensor) -> Tensor:
    out = sum(z[h] @ block.attn.W_O[h] for h in range(len(z)))
    return out if block.attn.b_O is None else out + block.attn.b_O


def mlp_by_hand(block: Any, resid: Tensor) -> Tensor:
    mlp, x = block.mlp, rms(resid, block.ln2)
    act = (lambda y: gelu(y, approximate="tanh")) if mlp.cfg.act == "gelu_tanh" else silu
    pre, up = x @ mlp.W_gate, x @ mlp.W_in
    if mlp.cfg.__class__.__name__ == "GatedMLPConfig" and mlp.cfg.bias:
        return (act(pre + mlp.gate.bias) * (up + mlp.up.bias)) @ mlp.W_out + mlp.down.bias
    return (act(pre) * up) @ mlp.W_out


def logits_by_hand(model: HookedHybrid, resid: Tensor) -> Tensor:
    logits, cap = rms(resid, model.ln_final) @ model.W_U, model.cfg.logits_soft_cap
    return logits if cap is None else cap * (logits / cap).tanh()


@cache
def first_layer(model: HookedHybrid, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The embedding, each part's write [part batch pos d_model] (heads, or gate blocks), the rest.

    Attention is written out; of a recurrence only its last product is.
    """
    block = model.blocks[0]
    resid = model.W_E[tokens] * (model.embed.scale or 1)
    if hasattr(block, "attn"):
        x = rms(resid, block.ln1)
        z = heads_by_hand(block, *([x] * n for n in (block.attn.cfg.n_heads,) * 3))
        writes = torch.stack([z[h] @ block.attn.W_O[h] for h in range(len(z))])
        bias = block.attn.b_O
    else:
        out = getattr(block.mixer, "linear_out", None) or block.mixer.out_proj
        gated = run(model, tokens)["gated", 0]
        parts = zip(gated.split(8, dim=-1), out.W.split(8), strict=True)
        writes, bias = torch.stack([g @ W for g, W in parts]), out.bias
    mid = resid + writes.sum(0) + (0 if bias is None else bias)
    return resid, writes, mid + mlp_by_hand(block, mid)


def second_layer(
    model: HookedHybrid, resid: Tensor, heard: dict[str, tuple[int, Tensor]], frozen: bool
) -> Tensor:
    """The logits, where `heard` says what one head's q, k or v reads instead of the stream."""
    block = model.blocks[1]
    inputs = []
    for kind in "qkv":
        n = block.attn.cfg.n_heads if kind == "q" else block.attn.cfg.n_kv_heads
        copies = [rms(resid, block.ln1)] * n
        if kind in heard:
            head, stream = heard[kind]
            copies[head] = rms(stream, block.ln1, resid if frozen else None)
        inputs.append(copies)
    mid = resid + mixer_by_hand(block, heads_by_hand(block, *inputs))
    return logits_by_hand(model, mid + mlp_by_hand(block, mid))


def as_sender(model: HookedHybrid, part: int) -> tuple[Any, ...]:
    """Part `part` of layer 0 as `first_layer` counts them: a head, or eight channels."""
    if hasattr(model.blocks[0], "attn"):
        return ("z", 0, part)
    return ("gated", 0, slice(8 * part, 8 * part + 8))


@two_layers
@pytest.mark.parametrize(("kind", "frozen"), [("q", False), ("k", True), ("v", False)])
def test_the_path_from_a_head_or_channels_to_a_head_is_that_of_the_matrices(
    name: str, kind: str, frozen: bool
):
    model = two_layer_model(name)
    _, clean, resid = first_layer(model, CLEAN)
    _, corrupted, _ = first_layer(model, CORRUPTED)
    stream = resid + corrupted[1] - clean[1]
    wanted = second_layer(model, resid, {kind: (1, stream)}, frozen)
    assert difference(second_layer(model, resid, {}, False), model(CLEAN)) < FP32_PARITY
    assert difference(wanted, model(CLEAN)) > 1e-4

    seen: list[Tensor] = []
    path_patch(
        model,
        CLEAN,
        corrupted_run(model),
        as_sender(model, 1),
        (f"{kind}_input", 1, 1),
        lambda logits: (seen.append(logits), logits_of(logits))[1],
        freeze_norm=frozen,
    )
    assert difference(seen[-1], wanted) < FP32_PARITY


@two_layers
def test_the_path_through_the_mlp_is_that_of_the_matrices(name: str):
    """The sender reaches the receiver directly, and by the MLP that reads it."""
    model = two_layer_model(name)
    _, clean, resid = first_layer(model, CLEAN)
    _, corrupted, _ = first_layer(model, CORRUPTED)
    delta = corrupted[1] - clean[1]
    block = model.blocks[0]
    mid = run(model, CLEAN)["resid_mid", 0]
    stream = mid + delta + mlp_by_hand(block, mid + delta)
    wanted = second_layer(model, resid, {"q": (1, stream)}, False)
    ends = (as_sender(model, 1), ("q_input", 1, 1))
    effects = [
        path_patch(model, CLEAN, corrupted_run(model), *ends, logits_of, through=through)
        for through in ([("mlp", 0)], "mlps", ())
    ]
    assert torch.equal(effects[0], effects[1])
    assert difference(effects[0], logits_of(wanted)) < FP32_PARITY
    assert difference(effects[2], logits_of(wanted)) > FP32_PARITY


@two_layers
def test_the_direct_effect_on_the_logits_is_that_of_the_matrices(name: str):
    model = two_layer_model(name)
    clean, corrupted = first_layer(model, CLEAN)[1], first_layer(model, CORRUPTED)[1]
    final = run(model, CLEAN)["resid_post", -1]
    for frozen in (False, True):
        stream = final + corrupted[1] - clean[1]
        normed = rms(stream, model.ln_final, final if frozen else None)
        logits, cap = normed @ model.W_U, model.cfg.logits_soft_cap
        logits = logits if cap is None else cap * (logits / cap).tanh()
        got = path_patch(
            model,
            CLEAN,
            corrupted_run(model),
            as_sender(model, 1),
            ("final",),
            logits_of,
            freeze_norm=frozen,
        )
        assert difference(got, logits_of(logits)) < FP32_PARITY


# --- what holds of any path ---------------------------------------------------------------------


def all_senders(model: HookedHybrid, layer: int) -> list[tuple[Any, ...]]:
    parts = [(leaf, i) for i in range(layer) for leaf in ("mixer_out", "mlp_out")]
    return [("embed",), *parts]


@hybrids
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leaf", ["mixer_in", "mlp_in", "final"])
def test_all_senders_together_are_the_corrupted_stream(name: str, dtype: torch.dtype, leaf: str):
    model = model_of(name, dtype)
    cache, last = corrupted_run(model), model.cfg.n_layers - 1
    senders = all_senders(model, last)
    receiver: tuple[Any, ...] = (leaf, last)
    full = f"blocks.{last}.hook_{leaf}"
    if leaf == "mlp_in":
        senders.append(("mixer_out", last))
    elif leaf == "final":
        senders += [("mixer_out", last), ("mlp_out", last)]
        receiver, full = ("final",), f"blocks.{last}.hook_resid_post"
    got = path_patch(model, CLEAN, cache, senders, receiver, logits_of)
    hooks = interventions.patch(cache, full)
    wanted = logits_of(model.run_with_hooks(CLEAN, fwd_hooks=hooks))
    assert difference(got, wanted) < (FP32_PARITY if dtype == torch.float32 else BF16)


@hybrids
def test_parts_of_a_mixer_together_are_the_mixer(name: str):
    model, cache = model_of(name), corrupted_run(model_of(name))
    attn, recurrent = model.blocks[0].attn.cfg, model.blocks[1].mixer
    width = recurrent.hook_gated and cache["gated", 1].shape[-1]
    groups = {
        0: [[("z", 0, h) for h in range(attn.n_heads)], [("z", 0)], [("attn_out", 0)]],
        1: [[("gated", 1, slice(0, 5)), ("gated", 1, list(range(5, width)))], [("gated", 1)]],
    }
    for layer, ways in groups.items():
        whole = path_patch(model, CLEAN, cache, ("mixer_out", layer), ("mixer_in", 3), logits_of)
        for senders in ways:
            got = path_patch(model, CLEAN, cache, senders, ("mixer_in", 3), logits_of)
            assert difference(got, whole) < FP32_PARITY
    result = path_patch(model, CLEAN, cache, ("result", 0, 1), ("mixer_in", 3), logits_of)
    z = path_patch(model, CLEAN, cache, ("z", 0, 1), ("mixer_in", 3), logits_of)
    assert torch.equal(result, z)


def test_a_gate_block_is_its_channels():
    model, cache = model_of("griffin"), corrupted_run(model_of("griffin"))
    cfg = model.blocks[1].mixer.cfg
    size = cfg.d_rnn // cfg.n_gate_blocks
    block, channels = [
        path_patch(model, CLEAN, cache, ("gated", 1, part), ("k_input", 3, 0), logits_of)
        for part in (2, slice(2 * size, 3 * size))
    ]
    assert torch.equal(block, channels)


@hybrids
@pytest.mark.parametrize("sender", [("z", 0, 2), ("gated", 1, slice(3, 9)), ("mlp_out", 0)])
def test_through_everything_a_path_is_the_whole_effect(name: str, sender: tuple[Any, ...]):
    """Nothing held clean, and all the stream at the end received: plain activation patching."""
    model, cache = model_of(name), corrupted_run(model_of(name))
    got = path_patch(model, CLEAN, cache, sender, ("final",), logits_of, through="all")
    if sender[0] == "gated":
        donor = run(model, CLEAN)["gated", 1].clone()
        donor[..., sender[2]] = cache["gated", 1][..., sender[2]]
        hooks = interventions.patch(
            {"blocks.1.mixer.hook_gated": donor}, "blocks.1.mixer.hook_gated"
        )
    else:
        hooks = interventions.patch(cache, sender[:2], heads=sender[2] if sender[2:] else None)
    wanted = logits_of(model.run_with_hooks(CLEAN, fwd_hooks=hooks))
    assert difference(got, wanted) < FP32_PARITY


@hybrids
def test_the_embedding_through_everything_is_the_corrupted_input(name: str):
    model, cache = model_of(name), run(model_of(name), CORRUPTED, names_filter=lambda n: True)
    for leaf in ("q_input", "k_input", "v_input"):
        got = path_patch(model, CLEAN, cache, ("embed",), (leaf, -1, 1), logits_of, through="all")
        hooks = interventions.patch(cache, (leaf, -1), heads=1)
        wanted = logits_of(model.run_with_hooks(CLEAN, fwd_hooks=hooks))
        assert difference(got, wanted) < FP32_PARITY


@hybrids
def test_through_mixers_holds_mlps_clean(name: str):
    model, cache = model_of(name), corrupted_run(model_of(name))
    ends = (("z", 0, 2), ("q_input", 3, 1))
    got = path_patch(model, CLEAN, cache, *ends, logits_of, through="mixers")
    # By hooks: the sender's head corrupted, MLPs held, and the receiver's input of that run.
    held = [f"blocks.{i}.hook_mlp_out" for i in range(4)]
    hooks = interventions.freeze(run(model, CLEAN), held) + interventions.patch(
        cache, ("z", 0), heads=2
    )
    with model.hooks(hooks):
        heard = run(model, CLEAN, names_filter="blocks.3.attn.hook_q_input")
    hooks = interventions.patch(heard, ("q_input", 3), heads=1)
    wanted = logits_of(model.run_with_hooks(CLEAN, fwd_hooks=hooks))
    assert difference(got, wanted) < FP32_PARITY
    direct = path_patch(model, CLEAN, cache, *ends, logits_of)
    assert difference(direct, wanted) > FP32_PARITY


@hybrids
def test_padded_rows_and_positions_are_those_of_single_runs(name: str):
    model, lengths = model_of(name), (20, 13)
    cache = corrupted_run(model)
    ends = (("gated", 1, slice(0, 9)), [("k_input", 3, 0), ("mlp_in", 3)])
    alone = [
        path_patch(
            model,
            CLEAN[i : i + 1, :n],
            run(model, CORRUPTED[i : i + 1, :n]),
            *ends,
            lambda logits: logits[:, -1, 7],
            positions=(2, 5),
            through="mlps",
        )
        for i, n in enumerate(lengths)
    ]
    mask = torch.zeros(2, 20, dtype=torch.long)
    tokens, other = CLEAN.clone(), CORRUPTED.clone()
    for i, n in enumerate(lengths):
        mask[i, 20 - n :] = 1
        tokens[i, 20 - n :], other[i, 20 - n :] = CLEAN[i, :n], CORRUPTED[i, :n]
    cache = run(model, other, attention_mask=mask)
    got = path_patch(
        model,
        tokens,
        cache,
        *ends,
        lambda logits: logits[:, -1, 7],
        positions=(2, 5),
        through="mlps",
        attention_mask=mask,
    )
    assert difference(got, torch.cat(alone)) < FP32_PARITY
    everywhere = path_patch(
        model, tokens, cache, *ends, lambda logits: logits[:, -1, 7], attention_mask=mask
    )
    assert difference(got, everywhere) > FP32_PARITY


@hybrids
def test_a_sweep_is_its_single_paths_and_later_heads_have_none(name: str):
    model, cache = model_of(name), corrupted_run(model_of(name))
    clean = logits_of(model(CLEAN))
    scores = path_patch_heads(model, CLEAN, cache, ("mlp_in", 0), logits_of, verbose=False)
    assert scores.layers == (0, 3)
    for head in range(4):
        value = path_patch(model, CLEAN, cache, ("z", 0, head), ("mlp_in", 0), logits_of)
        assert abs(scores[0, head] - float((value - clean).mean())) < 1e-4 * float(
            clean.abs().max()
        )
        assert scores[3, head] == 0
    senders = [("embed",), ("mixer_out", 1)]
    each = path_patch_each(model, CLEAN, cache, senders, ("mixer_in", 3), logits_of, verbose=False)
    assert [e.shape for e in each] == [clean.shape] * 2


def test_nothing_stays_attached_and_gradients_are_not_asked_for():
    model = model_of("griffin")
    path_patch(model, CLEAN, corrupted_run(model), ("embed",), ("final",), lambda y: y.sum())
    assert not model.list_hooks()


@pytest.mark.parametrize(
    ("sender", "receiver", "options", "message"),
    [
        (("z", 3, 0), ("q_input", 3, 0), {}, "no path"),
        (("pattern", 0), ("final",), {}, "begins with one of"),
        (("z", 0, 9), ("final",), {}, "there are 4 here"),
        (("embed",), ("k_input", 3, 2), {}, "there are 2 here"),
        (("embed", 1), ("final",), {}, "give nothing"),
        (("mlp_out", 0, 1), ("final",), {}, "give a layer"),
        (("z", 0.5, 1), ("final",), {}, "whole number"),
        (("gated", 1, slice(99, 120)), ("final",), {}, "whole numbers"),
        (("embed",), ("final",), {"through": "heads"}, "through='heads'"),
        (("embed",), ("final",), {"through": [("mlp", 7)]}, "layers from 0 to 3"),
        (("embed",), ("final",), {"positions": 99}, "last position is 19"),
        ([], ("final",), {}, "no senders"),
    ],
)
def test_ends_that_are_none_are_refused(
    unchecked: None, sender: Any, receiver: Any, options: Any, message: str
):
    model = model_of("griffin")
    with pytest.raises(ValueError, match=message):
        path_patch(model, CLEAN, corrupted_run(model), sender, receiver, logits_of, **options)


def test_other_mistakes_are_refused(unchecked: None):
    model, jamba = model_of("griffin"), model_of("jamba")
    cache = corrupted_run(model)
    with pytest.raises(HookNameError, match="blocks.1"):
        path_patch(model, CLEAN, cache, ("z", 1, 0), ("final",), logits_of)
    with pytest.raises(ValueError, match="no gate blocks"):
        path_patch(jamba, CLEAN, run(jamba, CLEAN), ("gated", 1, 0), ("final",), logits_of)
    with pytest.raises(ValueError, match="same shape"):
        path_patch(model, CLEAN[:, :9], cache, ("embed",), ("final",), logits_of)
    with pytest.raises(ValueError, match="the metric gave"):
        path_patch(model, CLEAN, cache, ("embed",), ("final",), lambda logits: logits)
    with pytest.raises(TypeError, match="unknown options"):
        path_patch(model, CLEAN, cache, ("embed",), ("final",), logits_of, frozen=True)


# --- a planted circuit --------------------------------------------------------------------------


def test_the_planted_circuit_is_found_by_its_paths():
    """Direct effects name the head; paths to its keys name the group of channels it reads."""
    planted = planted_retrieval(noise=0.1)
    prompts = planted.prompts(batch=6)
    model, answers = planted.model, prompts.answers[:, 0]

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        right = last.gather(1, answers[:, None])[:, 0]
        return right - (last.sum(1) - right) / (last.shape[1] - 1)

    tokens = prompts.tokens
    for kind in ("value", "key"):
        cache = run(model, prompts.corrupted(kind))
        direct = path_patch_heads(model, tokens, cache, ("final",), metric, verbose=False)
        effects = direct.values.abs().flatten().sort(descending=True).values
        assert HeadScores(direct.layers, -direct.values).top(1) == [planted.head]
        assert effects[0] > 100 * effects[1]

    blocks = [("gated", i, b) for i in (0, 1) for b in range(4)]
    receiver = ("k_input", planted.head[0], planted.kv_head)
    cache = run(model, prompts.corrupted("key"))
    paths = path_patch_each(model, tokens, cache, blocks, receiver, metric, verbose=False)
    found = torch.stack([-p.mean() for p in paths])
    assert blocks[int(found.argmax())] == ("gated", *planted.carrier)
    assert found.max() > 1000 * found.abs().sort(descending=True).values[1]


def test_a_metric_is_put_on_the_scale_of_two_runs():
    model = model_of("griffin")
    clean, corrupted = model(CLEAN), model(CORRUPTED)
    scale = normalised(logits_of, clean, corrupted)
    assert torch.equal(scale(clean), torch.ones(2))
    assert torch.equal(scale(corrupted), torch.zeros(2))
    assert difference(scale((clean + corrupted) / 2), torch.full((2,), 0.5)) < FP32_PARITY
    with pytest.raises(ValueError, match="no scale between"):
        normalised(logits_of, clean, clean)
