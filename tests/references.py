"""The reference models: small random RecurrentGemmas as Hugging Face and Google compute them.

`RGSpec` describes one model; `SPECS` names the ones the tests run on. `hf_recurrentgemma(spec)` and
`google_griffin(spec)` build it with the same weights; the `hf_*` and `google_*` functions run it.
All of it is fp32, on the CPU, greedy, and no token ends a sequence. Shapes: b batch, s positions,
n new tokens, v vocabulary, h heads, q queries, k keys.

The two count the window differently: `n_keys` keys including self is `attention_window_size =
n_keys` in transformers, `n_keys - 1` in Google's code.
"""

import importlib
import importlib.util
import itertools
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (  # noqa: TID251
    DynamicCache,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from tests.transformers_versions import CACHE, VERSION, WINDOWED

BlockType = Literal["recurrent", "attention"]

# Minus the log of the decay where the recurrence gate is 1/2: 4 softplus(recurrent_param).
SLOWEST, FASTEST = 1e-3, 0.7


@dataclass(frozen=True)
class RGSpec:
    """A small RecurrentGemma. `block_types` is cycled to `n_layers`; `n_keys` includes self."""

    d_model: int = 32
    d_rnn: int = 32
    n_heads: int = 4
    n_kv_heads: int = 1
    d_head: int = 8
    d_mlp: int = 48
    n_layers: int = 5
    block_types: tuple[BlockType, ...] = ("recurrent", "recurrent", "attention")
    n_keys: int = 16
    d_conv: int = 4
    d_vocab: int = 101
    seed: int = 0
    soft_cap: float = 30.0

    def __post_init__(self) -> None:
        if self.d_rnn % self.n_heads or self.n_heads % self.n_kv_heads or self.d_head % 4:
            raise ValueError(
                f"heads must divide d_rnn, kv heads must divide heads, 4 d_head: {self}"
            )

    @property
    def layers(self) -> tuple[BlockType, ...]:
        """The kind of each layer."""
        return tuple(itertools.islice(itertools.cycle(self.block_types), self.n_layers))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers."""
        return tuple(i for i, kind in enumerate(self.layers) if kind == "attention")

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the recurrent layers."""
        return tuple(i for i, kind in enumerate(self.layers) if kind == "recurrent")


# Seeds chosen on `random_tokens(spec, 2, 40)`: the greedy continuations of the first 20 wander (9
# tokens or more among 24, 5 with one layer), the best token is 2e-3 ahead of the next everywhere,
# and the paths that should agree do so within 8e-6.
SPECS: dict[str, RGSpec] = {
    # Google's code can build these too.
    "as_published": RGSpec(d_mlp=96, seed=119),
    "wide_recurrence": RGSpec(d_model=48, d_rnn=64, d_head=12, d_mlp=56, d_vocab=97, seed=132),
    "long_window": RGSpec(n_keys=64, d_rnn=40, d_mlp=36, d_vocab=257, seed=46),
    "window_of_3": RGSpec(
        n_heads=2, d_head=16, n_keys=3, block_types=("recurrent", "attention"), seed=52
    ),
    "window_of_2": RGSpec(n_heads=2, d_head=16, n_keys=2, n_layers=3, d_vocab=61, seed=38),
    "one_head": RGSpec(
        d_model=24, d_rnn=20, n_heads=1, d_head=24, n_layers=4, d_vocab=61, seed=117
    ),
    "attention_last": RGSpec(n_heads=2, d_head=16, n_layers=6, d_vocab=127, seed=53),
    "attention_only": RGSpec(n_layers=3, block_types=("attention",), seed=74),
    "recurrence_only": RGSpec(d_rnn=48, n_layers=3, block_types=("recurrent",), seed=37),
    "one_attention_layer": RGSpec(n_layers=1, block_types=("attention",), d_vocab=61, seed=71),
    "one_recurrent_layer": RGSpec(n_layers=1, block_types=("recurrent",), d_vocab=61, seed=121),
    # Hugging Face only.
    "grouped_queries": RGSpec(d_model=40, n_kv_heads=2, d_head=12, d_mlp=44, d_vocab=257, seed=40),
    "multi_head": RGSpec(n_heads=2, n_kv_heads=2, d_head=16, d_rnn=24, n_layers=3, seed=128),
    "wide_heads": RGSpec(d_model=36, d_rnn=52, n_kv_heads=4, d_head=16, n_layers=3, seed=43),
    "uneven_layers": RGSpec(
        n_heads=2,
        d_head=12,
        block_types=("attention", "recurrent", "recurrent", "attention", "attention"),
        n_layers=7,
        n_keys=5,
        seed=99,
    ),
    "window_of_1": RGSpec(n_heads=2, d_head=16, n_keys=1, n_layers=3, d_vocab=61, seed=10),
    "short_convolution": RGSpec(n_heads=2, d_head=16, d_conv=2, d_rnn=40, d_vocab=97, seed=80),
}
if not WINDOWED:  # with no window to see, every window is wider than what the tests read
    SPECS = {name: replace(spec, n_keys=128) for name, spec in SPECS.items()}
if VERSION < (5,):  # whose attention runs only with heads that fill the width
    SPECS = {
        name: replace(spec, d_model=spec.n_heads * spec.d_head) if spec.attention_layers else spec
        for name, spec in SPECS.items()
    }


def google_supports(spec: RGSpec) -> bool:
    """Whether Google's code can build the model and decode with it.

    Its attention has one key-value head and heads that fill the width, its Griffin has no option
    for the convolution's width, and its ring buffer of `n_keys - 1` keys cannot be empty.
    """
    attention = spec.n_kv_heads == 1 and spec.n_heads * spec.d_head == spec.d_model
    attention = attention and spec.n_keys > 1
    return (attention or not spec.attention_layers) and (
        spec.d_conv == 4 or not spec.recurrent_layers
    )


def hf_breaks_one_key(spec: RGSpec) -> bool:
    """Whether cached decoding sees keys outside the window: a window of 1 drops none."""
    return spec.n_keys == 1 and bool(spec.attention_layers)


def hf_breaks_no_attention(spec: RGSpec) -> bool:
    """Whether `generate` raises, as any forward that makes its own cache: that has no length."""
    return not spec.attention_layers


def hf_breaks_one_token_prompt(spec: RGSpec) -> bool:
    """Whether `generate` raises on a 1-token prompt, with a convolution state of the wrong width.

    Where it does not, it continues from the module's last run, unless cleared as in `hf_greedy`.
    """
    return spec.d_rnn != spec.d_model and bool(spec.recurrent_layers)


def hf_can_decode(spec: RGSpec, n_prompt: int) -> bool:
    """Whether `hf_greedy` is right with its cache; where not, compare with `uncached=True`."""
    broken = hf_breaks_one_key(spec) or hf_breaks_no_attention(spec)
    if n_prompt == 1:  # transformers 4 goes on from the model's last run
        broken = broken or hf_breaks_one_token_prompt(spec) or VERSION < (5,)
    return not broken


def random_tokens(spec: RGSpec, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [b s]; a shorter length gives a prefix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(spec.d_vocab, (length, batch), generator=generator).T.contiguous()


class Greedy(NamedTuple):
    """Greedily chosen tokens [b n] and the logits [b n v] that chose them."""

    tokens: Tensor
    logits: Tensor


class RecurrentStates(NamedTuple):
    """What a recurrent layer keeps: the last inputs of its convolution, oldest first, and h."""

    conv: Tensor  # [b d_rnn d_conv-1]
    ssm: Tensor  # [b d_rnn]


class Decode(NamedTuple):
    """Teacher-forced decoding, n steps.

    Logits [b n v]; for each step, attention layer -> pattern [b h 1 k], the oldest key first.
    """

    logits: Tensor
    patterns: list[dict[int, Tensor]]


# --- Hugging Face ---------------------------------------------------------------------------------


def hf_recurrentgemma(spec: RGSpec) -> RecurrentGemmaForCausalLM:
    """The model with random weights, the same ones every time: eager attention, fp32, eval."""
    config = RecurrentGemmaConfig(
        vocab_size=spec.d_vocab,
        hidden_size=spec.d_model,
        lru_width=spec.d_rnn,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.d_head,
        intermediate_size=2 * spec.d_mlp,  # halved by the model
        num_hidden_layers=spec.n_layers,
        block_types=spec.block_types,
        attention_window_size=spec.n_keys,
        conv1d_width=spec.d_conv,
        logits_soft_cap=spec.soft_cap,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        model = RecurrentGemmaForCausalLM(config).float().eval()
    model.generation_config.eos_token_id = None
    randomise(model, spec.seed)
    return model


@torch.no_grad()
def randomise(model: RecurrentGemmaForCausalLM, seed: int) -> None:
    """Draw every parameter anew, so that none is zero and every part of the model matters.

    The blocks write more to the residual stream than the embedding does: else, the unembedding
    being tied, each token would predict itself. Decays run from about 0.3 to 0.9999.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if kind == "recurrent_param":
            uniform = torch.rand(parameter.shape, generator=generator)
            log_decay = SLOWEST * (FASTEST / SLOWEST) ** uniform
            parameter.copy_(torch.log(torch.expm1(log_decay / 4)))
            continue
        if kind in ("input_gate_weight", "recurrent_gate_weight"):
            std = 0.6 / math.sqrt(parameter.shape[1])
        elif kind in ("input_gate_bias", "recurrent_gate_bias"):
            std = 0.5
        elif kind.endswith("norm"):
            std = 0.3
        elif name.endswith(".bias"):
            std = 0.2
        elif kind == "embed_tokens":
            std = 1.5 / math.sqrt(parameter.shape[1])
        elif kind == "conv_1d":
            std = 1 / math.sqrt(parameter.shape[2])
        else:
            gain = {"linear_out": 3.0, "o_proj": 3.0, "down_proj": 3.0}.get(kind, 1.3)
            std = gain / math.sqrt(parameter.shape[1])
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def hf_logits_uncached(model: RecurrentGemmaForCausalLM, tokens: Tensor) -> Tensor:
    """Logits [b s v] of one forward without a cache: the path that is right for every spec."""
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def hf_greedy(
    model: RecurrentGemmaForCausalLM, tokens: Tensor, n: int, *, uncached: bool = False
) -> Greedy:
    """`n` greedy tokens after the prompts [b s], by `generate` or by a whole forward for each."""
    if uncached:
        logits = []
        for _ in range(n):
            logits.append(hf_logits_uncached(model, tokens)[:, -1])
            tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
        return Greedy(tokens[:, -n:], torch.stack(logits, dim=1))
    for _, block in _recurrent_blocks(model):  # else a 1-token prompt continues the last run
        block.conv1d_state = block.rg_lru.recurrent_states = None
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=n,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Greedy(out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, dim=1))


def hf_greedy_guessed(model: Any, tokens: Tensor, guess: Tensor) -> Greedy:
    """What `hf_greedy(uncached=True)` gives, in fewer forwards where the new tokens are guessed.

    One forward tells whether each token [b n] is the best after those before it, which are all
    that its logits depend on; from the first that is not, the guess becomes what it says instead.
    """
    while True:
        whole = torch.cat([tokens, guess[:, :-1]], dim=1)
        logits = hf_logits_uncached(model, whole)[:, tokens.shape[1] - 1 :]
        best = logits.argmax(-1)
        is_right = (best == guess).all(0).int().cumprod(0).bool()
        if is_right.all():
            return Greedy(best, logits)
        guess = torch.where(is_right, guess, best)


@torch.no_grad()
def hf_patterns(model: RecurrentGemmaForCausalLM, tokens: Tensor) -> dict[int, Tensor]:
    """Attention layer -> pattern [b h q k] of one forward without a cache."""
    return _hf_watched(model, tokens, use_cache=False)[1]


@torch.no_grad()
def hf_decode(model: RecurrentGemmaForCausalLM, tokens: Tensor, n_prefill: int) -> Decode:
    """Prefill the first `n_prefill` of the tokens [b s], then read the others one at a time.

    Right for every spec but those of `hf_breaks_one_key`.
    """
    past = _hf_prefill(model, tokens[:, :n_prefill])
    logits, patterns = [], []
    for position in range(n_prefill, tokens.shape[1]):
        token, at = tokens[:, position : position + 1], torch.tensor([position])
        out, seen = _hf_watched(model, token, **_cached(at, past))
        logits.append(out.logits)
        if VERSION < (5,):  # its cache has the window's width from the start, masked
            seen = {layer: pattern[..., : position + 1] for layer, pattern in seen.items()}
        patterns.append(seen)
    return Decode(torch.cat(logits, dim=1), patterns)


def _cached(positions: Tensor, past: DynamicCache | None) -> dict[str, Any]:
    """Options of a forward at positions [s] with a cache: transformers 4 holds it in the model."""
    if VERSION < (5,):
        given: dict[str, Any] = {"cache_position": positions}
    else:
        given = {CACHE: past}
    return {"position_ids": positions[None], "use_cache": True, **given}


def _hf_watched(
    model: RecurrentGemmaForCausalLM, tokens: Tensor, **options: Any
) -> tuple[Any, dict[int, Tensor]]:
    """Return what a forward gives and attention layer -> pattern [b h q k].

    Those of transformers 4, which gives none out, are made of what its attention multiplies.
    """
    if VERSION >= (5,):
        out = model(tokens, output_attentions=True, **options)
        return out, _by_layer(model, out.attentions)
    seen: list[Tensor] = []
    product = nn.functional.scaled_dot_product_attention

    def watch(
        q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float, **other: Any
    ) -> Tensor:
        seen.append((q @ k.mT * scale + attn_mask).softmax(-1))
        return product(q, k, v, attn_mask=attn_mask, scale=scale, **other)

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", watch):
        out = model(tokens, **options)
    return out, _by_layer(model, tuple(seen))


def hf_decode_patterns(
    model: RecurrentGemmaForCausalLM, tokens: Tensor, n_prefill: int
) -> list[dict[int, Tensor]]:
    """The patterns of `hf_decode`, one dict for each position from `n_prefill` on."""
    return hf_decode(model, tokens, n_prefill).patterns


@torch.no_grad()
def hf_states(model: RecurrentGemmaForCausalLM, tokens: Tensor) -> dict[int, RecurrentStates]:
    """Recurrent layer -> its states after the tokens [b s], read in one prefill."""
    _hf_prefill(model, tokens)
    return {
        layer: RecurrentStates(block.conv1d_state.clone(), block.rg_lru.recurrent_states.clone())
        for layer, block in _recurrent_blocks(model)
    }


def _hf_prefill(model: RecurrentGemmaForCausalLM, tokens: Tensor) -> DynamicCache | None:
    """Read the tokens from a clean state, which the model holds; returns its key-value cache.

    In transformers 4 the model holds that too.

    With the positions, a cache and recurrent states of the right width given, what
    `hf_breaks_no_attention` and `hf_breaks_one_token_prompt` name does not come up.
    """
    if VERSION < (5,):
        model.model._setup_cache(model.config, len(tokens), model.device, model.dtype)
    blocks = _recurrent_blocks(model)
    for _, block in blocks:
        shape = len(tokens), block.lru_width
        block.conv1d_state = torch.zeros(*shape, block.conv1d_width - 1)
        block.rg_lru.recurrent_states = torch.zeros(shape)
    only_recurrent = len(blocks) == len(model.model.layers)
    if VERSION < (5,):
        past = None
    else:
        past = DynamicCache() if only_recurrent else DynamicCache(config=model.config)
    model(tokens, **_cached(torch.arange(tokens.shape[1]), past))
    return past


def _recurrent_blocks(model: RecurrentGemmaForCausalLM) -> list[tuple[int, Any]]:
    blocks: list[tuple[int, Any]] = [
        (i, layer.temporal_block) for i, layer in enumerate(model.model.layers)
    ]
    return [(i, block) for i, block in blocks if hasattr(block, "rg_lru")]


def _by_layer(model: RecurrentGemmaForCausalLM, patterns: tuple[Tensor, ...]) -> dict[int, Tensor]:
    recurrent = {i for i, _ in _recurrent_blocks(model)}
    layers = [i for i in range(len(model.model.layers)) if i not in recurrent]
    return dict(zip(layers, patterns, strict=True))


# --- Google ---------------------------------------------------------------------------------------


@cache
def google() -> ModuleType:
    """The module `recurrentgemma.torch`: Griffin, GriffinConfig, TemporalBlockType, Sampler, ...

    The package's own `__init__` imports its JAX half, so it is not run: an empty package with its
    path stands in, and neither jax nor flax need be installed.
    """
    if "recurrentgemma" not in sys.modules:
        found = importlib.util.find_spec("recurrentgemma")
        if found is None:
            raise ModuleNotFoundError("recurrentgemma is a test dependency: pip install '.[test]'")
        sys.modules["recurrentgemma"] = importlib.util.module_from_spec(found)  # not executed
    with warnings.catch_warnings():  # of sentencepiece's bindings, on import
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("recurrentgemma.torch")


def google_griffin(spec: RGSpec) -> nn.Module:
    """The model of `hf_recurrentgemma(spec)`, weights included, as Google's Griffin."""
    if not google_supports(spec):
        raise ValueError(f"not a model Google's code can build: {spec}")
    kinds = google().TemporalBlockType
    config = google().GriffinConfig(
        vocab_size=spec.d_vocab,
        width=spec.d_model,
        mlp_expanded_width=spec.d_mlp,
        num_heads=spec.n_heads,
        block_types=tuple(kinds[kind.upper()] for kind in spec.layers),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=spec.n_keys - 1,
        logits_soft_cap=spec.soft_cap,
        lru_width=spec.d_rnn,
    )
    with torch.random.fork_rng(devices=[]):
        griffin = google().Griffin(config, gradient_checkpointing=False, dtype=torch.float32).eval()
    share_weights_hf_to_google(hf_recurrentgemma(spec), griffin)
    return griffin


def share_weights_hf_to_google(hf: RecurrentGemmaForCausalLM, griffin: nn.Module) -> None:
    """Copy every parameter of the one into the other."""
    griffin.load_state_dict(dict(_google_weights(hf.state_dict())), strict=True)


def _google_weights(hf: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Google's names and layouts for the tensors of a Hugging Face state dict."""
    renamed = (
        ("temporal_block.rg_lru.recurrent_param", "recurrent_block.rg_lru.a_param"),
        ("temporal_block.rg_lru.input_gate_weight", "recurrent_block.rg_lru.input_gate.w"),
        ("temporal_block.rg_lru.input_gate_bias", "recurrent_block.rg_lru.input_gate.b"),
        ("temporal_block.rg_lru.recurrent_gate_weight", "recurrent_block.rg_lru.a_gate.w"),
        ("temporal_block.rg_lru.recurrent_gate_bias", "recurrent_block.rg_lru.a_gate.b"),
        ("temporal_block.conv_1d.bias", "recurrent_block.conv_1d.b"),
        ("temporal_block.conv_1d.weight", "recurrent_block.conv_1d.w"),
        ("temporal_block.linear_", "recurrent_block.linear_"),
        ("temporal_block.q_proj", "attention_block.proj_q"),
        ("temporal_block.k_proj", "attention_block.proj_k"),
        ("temporal_block.v_proj", "attention_block.proj_v"),
        ("temporal_block.o_proj", "attention_block.proj_final"),
        ("mlp_block.down_proj", "mlp_block.ffw_down"),
        ("norm.weight", "norm.scale"),
    )
    for name, value in hf.items():
        if name == "lm_head.weight":  # tied
            continue
        if name == "model.embed_tokens.weight":
            yield "embedder.input_embedding", value
            continue
        if ".gate_proj." in name:
            up = hf[name.replace("gate_proj", "up_proj")]
            both = torch.stack([value, up])  # [2 d_mlp d_model] or [2 d_mlp]
            is_weight = name.endswith("weight")
            both = both.transpose(1, 2) if is_weight else both[:, None, None]
            stem = name.removeprefix("model.layers.").partition(".mlp_block")[0]
            yield f"blocks.{stem}.mlp_block.ffw_up.{'w' if is_weight else 'b'}", both
            continue
        if ".up_proj." in name:
            continue
        target = name.replace("model.layers.", "blocks.").removeprefix("model.")
        for old, new in renamed:
            target = target.replace(old, new)
        # [d_rnn 1 d_conv] -> [d_conv d_rnn]
        yield target, value[:, 0].T if name.endswith("conv_1d.weight") else value


@torch.no_grad()
def google_logits(griffin: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [b s v] of one forward. Positions [b s]: from 0 in each document, -1 on padding."""
    if positions is None:
        positions = _positions(tokens)
    return griffin(tokens, positions, return_cache=False)[0]


@torch.no_grad()
def google_greedy_sampler_style(
    griffin: nn.Module, tokens: Tensor, n: int, n_pad: Tensor | None = None
) -> Greedy:
    """`n` greedy tokens after prompts [b s], in the steps of Google's `Sampler`.

    All of the prompt but its last token is one forward, and that last token the first decoding
    step; a 1-token prompt is a forward of its own. `n_pad` [b]: padding at the left of each row.
    A padded row with a single real token comes out wrong, as it does from the Sampler: that token
    is a decoding step, and its convolution reads the padding.
    """
    positions = _positions(tokens, n_pad)
    state = None
    if tokens.shape[1] > 1:
        _, state = griffin(tokens[:, :-1], positions[:, :-1], return_logits=False)
    token, position = tokens[:, -1:], positions[:, -1:]
    new_tokens, all_logits = [], []
    for _ in range(n):
        logits, state = griffin(token, position, state)
        token, position = logits[:, -1:].argmax(-1), position + 1
        new_tokens.append(token)
        all_logits.append(logits)
    return Greedy(torch.cat(new_tokens, dim=1), torch.cat(all_logits, dim=1))


def google_left_padded_logits(griffin: nn.Module, tokens: Tensor, n_pad: Tensor) -> Tensor:
    """Logits [b s v] of rows [b s] that begin with `n_pad` [b] tokens of padding."""
    return google_logits(griffin, tokens, _positions(tokens, n_pad))


def _positions(tokens: Tensor, n_pad: Tensor | None = None) -> Tensor:
    start = torch.zeros(len(tokens), dtype=torch.long) if n_pad is None else n_pad
    return (torch.arange(tokens.shape[1]) - start[:, None]).clip(min=-1)
