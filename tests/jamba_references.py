"""The reference models: small random Jambas as Hugging Face computes them.

`JambaSpec` describes one model; `SPECS` names the ones the tests run on. `hf_jamba(spec)` builds it
and the `hf_*` functions run it. All of it is fp32, on the CPU, greedy, and no token ends a
sequence. Attention and experts run as transformers defines them (eager), not through the kernels it
picks by itself. Shapes: b batch, s positions, n new tokens, v vocabulary, h heads, q queries, k
keys, e experts.

transformers reads several tokens with a cache only at the start of a sequence: later its scan
starts at zero again. So the prompt is one forward here, and each later token its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, JambaConfig, JambaForCausalLM  # noqa: TID251

from tests.references import Decode, Greedy, RecurrentStates
from tests.transformers_versions import CACHE, EAGER_EXPERTS, SLOW_MAMBA, VERSION

# Step sizes that the biases alone give, and decay rates: decays of 0.9999 to 0.01 a token.
SLOWEST_STEP, FASTEST_STEP = 1e-3, 0.3
SLOWEST_RATE, FASTEST_RATE = 0.1, 16.0


@dataclass(frozen=True)
class JambaSpec:
    """A small Jamba. Layer i is attention where `i % attn_period == attn_offset`, so with experts.

    With `attn_offset = n_layers` or `expert_offset = n_layers` no layer is.
    """

    d_model: int = 32
    d_mlp: int = 40
    n_layers: int = 4
    attn_period: int = 3
    attn_offset: int = 1
    expert_period: int = 2
    expert_offset: int = 1
    n_heads: int = 4
    n_kv_heads: int = 2
    n_experts: int = 4
    n_chosen: int = 2
    d_state: int = 8
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 3
    d_vocab: int = 101
    tied: bool = False
    conv_bias: bool = True
    proj_bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(f"heads must divide d_model, kv heads must divide heads: {self}")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers."""
        return self._at(self.attn_period, self.attn_offset)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the Mamba layers."""
        return tuple(i for i in range(self.n_layers) if i not in self.attention_layers)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts; one expert is a dense MLP."""
        return () if self.n_experts == 1 else self._at(self.expert_period, self.expert_offset)

    def _at(self, period: int, offset: int) -> tuple[int, ...]:
        return tuple(i for i in range(self.n_layers) if i % period == offset)


# Seeds chosen on `random_tokens(spec, 4, 40)`, padded and not: the best greedy token is 1e-3 ahead
# of the next, the last expert chosen 1e-4 of a share ahead of the first that is not, the
# continuations of one token wander (8 tokens or more among 18, 7 with one attention layer), and
# transformers, this library and a float64 run of it agree within 5e-6. With other seeds one in
# twelve does not: there fp32 itself is 1e-5 to 4e-5 from float64, in both libraries alike, because
# the norms of dt, B and C divide by the root mean square of a few numbers that may all be small.
SPECS: dict[str, JambaSpec] = {
    "as_published": JambaSpec(
        n_layers=8,
        attn_period=8,
        attn_offset=4,
        n_experts=8,
        d_state=16,
        dt_rank=6,
        n_kv_heads=1,
        seed=14,
    ),
    "one_mamba_layer": JambaSpec(n_layers=1, attn_period=2, d_vocab=61, seed=8),
    "one_mamba_layer_of_experts": JambaSpec(
        n_layers=1, attn_period=2, expert_period=1, expert_offset=0, d_vocab=61, seed=3
    ),
    "one_attention_layer": JambaSpec(n_layers=1, attn_period=1, attn_offset=0, d_vocab=61, seed=12),
    "attention_only": JambaSpec(n_layers=3, attn_period=1, attn_offset=0, n_kv_heads=1, seed=16),
    "mamba_only": JambaSpec(
        n_layers=3, attn_period=4, attn_offset=3, d_state=16, dt_rank=5, seed=10
    ),
    "attention_first_and_last": JambaSpec(
        n_layers=5, attn_period=2, attn_offset=0, n_kv_heads=4, seed=19
    ),
    "attention_with_experts": JambaSpec(
        n_layers=6,
        attn_offset=2,
        expert_period=3,
        expert_offset=2,
        n_experts=8,
        n_chosen=4,
        seed=26,
    ),
    "dense": JambaSpec(
        n_experts=1, n_chosen=1, d_mlp=52, d_state=16, tied=True, d_vocab=97, seed=15
    ),
    "all_of_two_experts": JambaSpec(
        n_experts=2, n_chosen=2, n_heads=2, n_kv_heads=2, d_state=4, seed=23
    ),
    "one_of_two_experts": JambaSpec(
        n_experts=2, n_chosen=1, d_conv=2, d_state=4, dt_rank=9, seed=9
    ),
    "all_of_four_experts": JambaSpec(
        n_chosen=4,
        expert_period=1,
        expert_offset=0,
        d_model=24,
        n_heads=2,
        n_kv_heads=1,
        dt_rank=7,
        seed=13,
    ),
    "one_of_eight_experts": JambaSpec(
        n_experts=8, n_chosen=1, d_model=48, n_heads=6, n_kv_heads=3, d_mlp=28, tied=True, seed=23
    ),
    "short_convolution": JambaSpec(
        d_conv=2, expand=3, d_model=20, n_heads=5, n_kv_heads=1, seed=28
    ),
    "without_convolution_bias": JambaSpec(conv_bias=False, attn_offset=0, n_layers=5, seed=26),
    "with_projection_bias": JambaSpec(proj_bias=True, n_layers=3, dt_rank=5, d_vocab=257, seed=3),
    "no_bias_but_of_projections": JambaSpec(
        conv_bias=False, proj_bias=True, expand=1, n_layers=3, seed=23
    ),
}


def hf_breaks_no_attention(spec: JambaSpec) -> bool:
    """Whether `generate` raises, as any forward that asks its cache for a length: it has none."""
    return not spec.attention_layers


def hf_breaks_left_padding(spec: JambaSpec) -> bool:
    """Whether padding on the left is seen: it is zero before `in_proj`, but its bias after it.

    The convolution reads that before the first tokens. The published models have no such bias.
    transformers 4 masks after it.
    """
    return VERSION >= (5,) and spec.proj_bias and bool(spec.recurrent_layers)


def hf_jamba(spec: JambaSpec) -> JambaForCausalLM:
    """The model with random weights, the same ones every time: eager, fp32, eval."""
    config = JambaConfig(
        vocab_size=spec.d_vocab,
        tie_word_embeddings=spec.tied,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_mlp,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        num_experts=spec.n_experts,
        num_experts_per_tok=spec.n_chosen,
        attn_layer_period=spec.attn_period,
        attn_layer_offset=spec.attn_offset,
        expert_layer_period=spec.expert_period,
        expert_layer_offset=spec.expert_offset,
        mamba_d_state=spec.d_state,
        mamba_d_conv=spec.d_conv,
        mamba_expand=spec.expand,
        mamba_dt_rank=spec.dt_rank,
        mamba_conv_bias=spec.conv_bias,
        mamba_proj_bias=spec.proj_bias,
        attn_implementation="eager",
        **EAGER_EXPERTS,
        **SLOW_MAMBA,
    )
    with torch.random.fork_rng(devices=[]):
        model = JambaForCausalLM(config).float().eval()
    model.generation_config.eos_token_id = None
    randomise(model, spec.seed)
    return model


@torch.no_grad()
def randomise(model: JambaForCausalLM, seed: int) -> None:
    """Draw every parameter anew, so that none is zero or one and every part of the model matters.

    The blocks write more to the residual stream than the embedding does: else, where the
    unembedding is tied, each token would predict itself. Router logits spread over about 3.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind == "A_log" or name.endswith("dt_proj.bias"):
            uniform = torch.rand(parameter.shape, generator=generator)
            if kind == "A_log":
                rate = SLOWEST_RATE * (FASTEST_RATE / SLOWEST_RATE) ** uniform
                parameter.copy_(rate.log())
            else:
                step = SLOWEST_STEP * (FASTEST_STEP / SLOWEST_STEP) ** uniform
                parameter.copy_(torch.log(torch.expm1(step)))
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if kind == "D" or kind.endswith("layernorm"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith(".bias"):
            parameter.copy_(0.2 * noise)
        elif kind == "embed_tokens":
            parameter.copy_(1.5 / math.sqrt(parameter.shape[1]) * noise)
        elif kind == "conv1d":
            parameter.copy_(noise / math.sqrt(parameter.shape[2]))
        else:
            gain = {"out_proj": 1.5, "o_proj": 3.0, "down_proj": 3.0, "dt_proj": 0.5}.get(kind, 1.3)
            parameter.copy_(gain / math.sqrt(parameter.shape[-1]) * noise)


@torch.no_grad()
def hf_logits_uncached(
    model: JambaForCausalLM, tokens: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Logits [b s v] of one forward without a cache; mask [b s]: 1 at tokens, 0 at padding."""
    return model(tokens, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def hf_greedy(
    model: JambaForCausalLM,
    tokens: Tensor,
    n: int,
    mask: Tensor | None = None,
    *,
    uncached: bool = False,
) -> Greedy:
    """`n` greedy tokens after the prompts [b s], by `generate` or by a whole forward for each.

    Rows may be padded on the left, mask [b s].
    """
    mask = torch.ones_like(tokens) if mask is None else mask
    if uncached:
        logits = []
        for _ in range(n):
            logits.append(hf_logits_uncached(model, tokens, mask)[:, -1])
            tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return Greedy(tokens[:, -n:], torch.stack(logits, dim=1))
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=n,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Greedy(out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, dim=1))


@torch.no_grad()
def hf_patterns(
    model: JambaForCausalLM, tokens: Tensor, mask: Tensor | None = None
) -> dict[int, Tensor]:
    """Attention layer -> pattern [b h q k] of one forward without a cache."""
    out = model(tokens, attention_mask=mask, use_cache=False, output_attentions=True)
    return _by_layer(model, out.attentions)


@torch.no_grad()
def hf_router_logits(model: JambaForCausalLM, tokens: Tensor) -> dict[int, Tensor]:
    """Layer with experts -> what its router says [b s e], in one forward without a cache."""
    seen: dict[int, Tensor] = {}
    handles = [
        layer.feed_forward.router.register_forward_hook(
            lambda module, inputs, outputs, i=i: seen.update(
                {i: outputs if isinstance(outputs, Tensor) else outputs[0]}
            )
        )
        for i, layer in _layers(model)
        if hasattr(layer.feed_forward, "router")
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {i: logits.view(*tokens.shape, -1) for i, logits in seen.items()}


@torch.no_grad()
def hf_decode(model: JambaForCausalLM, tokens: Tensor, n_prefill: int) -> Decode:
    """Prefill the first `n_prefill` of the tokens [b s], then read the others one at a time."""
    past = _hf_prefill(model, tokens[:, :n_prefill])
    logits, patterns = [], []
    for position in range(n_prefill, tokens.shape[1]):
        out = _hf_step(model, tokens[:, position : position + 1], position, past)
        logits.append(out.logits)
        patterns.append(_by_layer(model, out.attentions))
    return Decode(torch.cat(logits, dim=1), patterns)


def hf_decode_patterns(
    model: JambaForCausalLM, tokens: Tensor, n_prefill: int
) -> list[dict[int, Tensor]]:
    """The patterns of `hf_decode`, one dict for each position from `n_prefill` on."""
    return hf_decode(model, tokens, n_prefill).patterns


@torch.no_grad()
def hf_states(model: JambaForCausalLM, tokens: Tensor) -> dict[int, RecurrentStates]:
    """Mamba layer -> its states after the tokens [b s], read in one prefill.

    conv [b d_inner d_conv-1]: transformers keeps the current input too, which nothing reads again.
    """
    past = _hf_prefill(model, tokens)
    layers = [i for i, layer in _layers(model) if hasattr(layer, "mamba")]
    if VERSION < (5,):
        states = {i: (past.conv_states[i], past.ssm_states[i]) for i in layers}
    else:
        states = {
            i: (past.layers[i].conv_states[0], past.layers[i].recurrent_states[0]) for i in layers
        }
    return {
        i: RecurrentStates(conv[..., 1:].clone(), ssm.clone()) for i, (conv, ssm) in states.items()
    }


def _hf_prefill(model: JambaForCausalLM, tokens: Tensor) -> Any:
    """Read the tokens from the start; returns the cache, of a class that the version has."""
    past: Any
    if VERSION < (5,):
        from transformers.models.jamba import modeling_jamba  # noqa: TID251

        kind = modeling_jamba.HybridMambaAttentionDynamicCache
        past = kind(model.config, len(tokens), dtype=model.dtype)
    else:
        past = DynamicCache(config=model.config)
    _hf_step(model, tokens, 0, past)
    return past


def _hf_step(model: JambaForCausalLM, tokens: Tensor, start: int, past: Any) -> Any:
    """Read more tokens [b s] without padding, and return all there is to see.

    Without attention layers transformers has no length to make masks for: then none are asked for.
    """
    has_attention = any(hasattr(layer, "self_attn") for _, layer in _layers(model))
    positions = torch.arange(start, start + tokens.shape[1])
    if VERSION < (5,):
        given: dict[str, Any] = {"cache_position": positions}
    else:
        given = {"attention_mask": None if has_attention else {"linear_attention": None}}
    return model(
        tokens,
        position_ids=positions[None],
        **given,
        **{CACHE: past},
        use_cache=True,
        output_attentions=True,
    )


def _layers(model: JambaForCausalLM) -> list[tuple[int, Any]]:
    return list(enumerate(model.model.layers))


def _by_layer(model: JambaForCausalLM, patterns: tuple[Tensor, ...] | None) -> dict[int, Tensor]:
    layers = [i for i, layer in _layers(model) if hasattr(layer, "self_attn")]
    return dict(zip(layers, patterns or (), strict=True))
