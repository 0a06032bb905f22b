"""A hybrid with a known retrieval circuit, as its weights are set by hand.

The layers are R R A R A. The residual stream has two halves of `N_SYMBOLS` channels, E and P, with
one channel for each token; e_s is the unit vector of token s, x_t the token at t. Two components
form the circuit:

    embedding       E_t = e(x_t)
    channel group   h_t = a h_{t-1} + e(x_t);  P_t = h_t           layer 1, one gate block
    head            q_t = B e(x_t) + S e(BOS);  k_t = P_t - E_t    layer 2, one head
                    and k = e(BOS) at BOS; writes C e(x_s) to E_t, where s is the attended key
    logits          G E_t, after the final norm

Key s holds a e(x_{s-1}) + a^2 e(x_{s-2}) + ..., so the head finds the earlier position of its own
token and copies the next token. This is induction, with the "previous token" in the state of a
recurrence. Without a match it attends to BOS and writes nothing. RMS norms scale q, k and v about
equally at all tokens; the constants allow for that. Special tokens enter neither group nor values,
and a prompt begins with BOS, as the first write to a state is not scaled.

All other weights are random as in a fresh model, with outputs multiplied by `noise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import gelu

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.presets.configs import griffin

N_SYMBOLS = 32
N_SPECIAL = 3
"""Tokens 0, 1 and 2: padding, end and BOS."""
BOS = 2
DECAY = 0.5
MATCH, SINK = 16.0, 2.0
"""B and S: they make scores of 27 at a match, 14 one token after it, and 10 at BOS."""
COPY = 6.0
GAIN = 2.0
GATE_BIAS = 3.0


@dataclass(frozen=True)
class PlantedPrompts:
    """Prompts that contain a needle and end with its first token.

    Attributes:
        tokens: BOS, symbols that include the needle once, and its first token again.
        needle_start: position of the needle.
        answers: the needle without its first token, which the model generates next.
    """

    tokens: Int[Tensor, "batch pos"]
    needle_start: Int[Tensor, " batch"]
    answers: Int[Tensor, "batch answer"]

    @property
    def copied_from(self) -> Int[Tensor, " batch"]:
        """Position of the first answer, to which the head attends from the last token."""
        return self.needle_start + 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[start, stop) of the needle in each row."""
        n = self.answers.shape[1] + 1
        return [(start, start + n) for start in self.needle_start.tolist()]

    def corrupted(self, what: Literal["key", "value"] = "key") -> Int[Tensor, "batch pos"]:
        """Return the prompts with one token of the needle replaced by an unused one.

        "key": its first token, so that the question has no match, and the state of the channel
        group differs at the answer. "value": its second token, so that the answer differs.

        Raises:
            ValueError: another `what`, or no unused symbol is left in a row.
        """
        if what not in ("key", "value"):
            raise ValueError(f"what={what!r}: give 'key' or 'value'")
        changed = self.tokens.clone()
        for row, start in enumerate(self.needle_start.tolist()):
            unused = set(range(N_SPECIAL, N_SYMBOLS)) - set(self.tokens[row].tolist())
            if not unused:
                raise ValueError(f"row {row} holds every symbol: give shorter prompts")
            changed[row, start + (what == "value")] = min(unused)
        return changed


@dataclass(frozen=True)
class Planted:
    """The model and the location of its circuit.

    Attributes:
        model: without a tokenizer; tokens from `N_SPECIAL` to `N_SYMBOLS` are symbols.
        head: (layer, head) of the head that retrieves.
        kv_head: its key-value head, which head 0 of the layer shares.
        carrier: (layer, gate block) of the recurrence that carries the previous token.
        channels: the channels of that gate block.
        decay: the decay of the state of these channels at each token.
    """

    model: HookedHybrid
    head: tuple[int, int]
    kv_head: int
    carrier: tuple[int, int]
    channels: slice
    decay: float

    def prompts(
        self, batch: int = 8, length: int = 24, n_needle: int = 2, seed: int = 0
    ) -> PlantedPrompts:
        """Return random prompts of `length` tokens, each with its own needle.

        The needle's symbols are distinct, occur nowhere else, and are followed by a symbol.

        Args:
            batch: rows.
            length: tokens of a prompt, BOS and question included.
            n_needle: tokens of the needle: its first is the question, the others the answers.
            seed: of tokens and positions.

        Raises:
            ValueError: no prompt, a needle of one token, too short a prompt, or too few symbols.
        """
        most = (N_SYMBOLS - N_SPECIAL) // 2
        if batch < 1 or not 2 <= n_needle <= most or length < n_needle + 3:
            raise ValueError(
                f"batch={batch}, n_needle={n_needle}, length={length}: give 1 row or more, a "
                f"needle of 2 to {most} tokens, and 3 tokens more than it"
            )
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.empty(batch, length, dtype=torch.long)
        starts = torch.randint(1, length - n_needle - 1, (batch,), generator=generator)
        answers = torch.empty(batch, n_needle - 1, dtype=torch.long)
        for row, start in enumerate(starts.tolist()):
            symbols = N_SPECIAL + torch.randperm(N_SYMBOLS - N_SPECIAL, generator=generator)
            # Three of the symbols stay unused, for `corrupted`.
            needle, others = symbols[:n_needle], symbols[n_needle:-3]
            drawn = torch.randint(len(others), (length,), generator=generator)
            tokens[row] = others[drawn]
            tokens[row, start : start + n_needle] = needle
            tokens[row, 0], tokens[row, -1] = BOS, needle[0]
            answers[row] = needle[1:]
        return PlantedPrompts(tokens, starts, answers)


def planted_retrieval(noise: float = 0.0, seed: int = 0) -> Planted:
    """Return a model of five layers in which only head 1 in layer 2 retrieves.

    Args:
        noise: factor of all other components' outputs; 0 removes them. At 0.1 every answer on
            `Planted.prompts` is right (margin 8 logits or more), at 0.3 a few percent may be
            wrong; at 1 the circuit does not work.
        seed: of the random weights.

    Raises:
        ValueError: `noise` below 0.

    Without noise the answer's logit is 9.9 above all others (9 at a noise of 0.1), wherever the
    needle is in the attention window, 256 keys.
    """
    if noise < 0:
        raise ValueError(f"noise={noise}: give 0 or more")
    cfg = griffin(
        "RRARA",
        d_model=2 * N_SYMBOLS,
        d_vocab=N_SYMBOLS,
        n_heads=4,
        n_kv_heads=2,
        d_head=2 * N_SYMBOLS,  # the second half of a head is not rotated
        d_mlp=N_SYMBOLS,
        d_rnn=4 * N_SYMBOLS,
        bos_token_id=BOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HookedHybrid(cfg)
    group = slice(2 * N_SYMBOLS, 3 * N_SYMBOLS)
    planted = Planted(model.eval().requires_grad_(False), (2, 1), 0, (1, 2), group, DECAY)
    with torch.no_grad():
        for block in model.blocks:
            block.mixers[0].out_projection.weight.mul_(noise)
            block.mlp.down.weight.mul_(noise)
        model.embed.W_E.zero_()
        model.embed.W_E[:, :N_SYMBOLS] = torch.eye(N_SYMBOLS)  # scaled to 8, like fresh embeddings
        model.ln_final.weight.fill_(GAIN - 1)
        _plant_channels(model.blocks[planted.carrier[0]].mixer, planted)
        _plant_head(model.blocks[planted.head[0]].attn, planted)
    return planted


def _plant_channels(mixer: Any, planted: Planted) -> None:
    """P_t = h_t: the decaying sum of the symbols so far."""
    mine, block = planted.channels, planted.carrier[1]
    read, write = mixer.linear_x.weight, mixer.linear_out.weight
    read[mine] = 0
    read[mine, :N_SYMBOLS] = _symbols()
    mixer.linear_y.weight[mine] = 0
    mixer.linear_y.bias[mine] = GATE_BIAS
    mixer.conv.weight[:, mine] = 0
    mixer.conv.weight[-1, mine] = 1
    for gate in (mixer.input_gate, mixer.rec_gate):
        gate.weight[block] = 0  # both gates are 1/2
    mixer.a_param[mine] = math.log(math.expm1(-math.log(DECAY) / (8 * 0.5)))
    gate = float(gelu(torch.tensor(GATE_BIAS), approximate="tanh"))
    write[:, mine] = 0
    write[N_SYMBOLS:, mine] = _symbols() / (0.5 * math.sqrt(1 - DECAY**2) * gate)


def _plant_head(attn: Any, planted: Planted) -> None:
    """Attend to the position where P - E contains the current symbol, else to BOS; copy E."""
    d = attn.cfg.d_head
    q, k = (slice(i * d, (i + 1) * d) for i in (planted.head[1], planted.kv_head))
    content = slice(d - N_SYMBOLS, d)  # not rotated
    for weight, mine in ((attn.q.weight, q), (attn.k.weight, k), (attn.v.weight, k)):
        weight[mine] = 0
    query = MATCH * _symbols()
    query[BOS] = SINK  # for every token
    attn.q.weight[q][content, :N_SYMBOLS] = query
    attn.k.weight[k][content, N_SYMBOLS:] = _symbols()
    attn.k.weight[k][content, :N_SYMBOLS] = -_symbols()
    attn.k.weight[k][content, BOS] = _symbol(BOS)
    attn.v.weight[k][content, :N_SYMBOLS] = _symbols()
    attn.o.weight[:, q] = 0
    attn.o.weight[:N_SYMBOLS, q][:, content] = COPY * _symbols()


def _symbols() -> Tensor:
    """The identity on symbols, zero on special tokens."""
    eye = torch.eye(N_SYMBOLS)
    eye[:N_SPECIAL] = 0
    return eye


def _symbol(token: int) -> Tensor:
    return torch.eye(N_SYMBOLS)[token]
