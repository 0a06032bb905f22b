"""Log-likelihoods of continuations: many at a time, with shared parts computed once.

Three parts are shared. Requests that differ only in their last token are one row of a forward (the
letters of a multiple choice). Continuations of one context are read from the context's state, each
from a copy of it. Contexts that begin alike (the examples before each question) are read from the
state after the beginning. The second and third cut a sequence in pieces, which is exact as long as
every hook is marked `per_position`; otherwise each input is run whole, with rows of its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.evaluation.batching import Batching, BatchSize, may_cut
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.text.text import pad_rows

LONG_BEGINNING = 64
"""Least number of shared tokens for which the beginning of contexts is run separately."""
FAMILY = 4
"""Least number of contexts that share them."""
POSITIONS = 256
"""Positions whose probabilities are normalized at a time: bounds the memory of a large vocabulary.
"""

Tokens = tuple[int, ...]


class Request(NamedTuple):
    """A continuation to score, and the tokens before it: at least one token each."""

    context: Tokens
    continuation: Tokens


class Score(NamedTuple):
    """The log-probability of a continuation (nats); whether each of its tokens is the likeliest."""

    logprob: float
    is_greedy: bool


class _Answer(NamedTuple):
    """Tokens of a request whose log-probabilities are read from a row's last logits."""

    request: int
    tokens: Tokens


@dataclass
class _Row:
    """Tokens to run: `answers` are read from the last `n_scored` logits; rows `after` follow."""

    tokens: Tokens
    n_scored: int
    answers: list[_Answer]
    after: list[_Row] = field(default_factory=list)

    @property
    def beginning(self) -> Tokens:
        """The tokens whose logits are not needed."""
        return self.tokens[: len(self.tokens) - self.n_scored]


def score(
    model: HookedHybrid,
    requests: Sequence[Request],
    hooks: Iterable[HookSpec] = (),
    batch_size: BatchSize = 1,
    shares: bool = True,
    on_scored: Callable[[int], Any] | None = None,
) -> list[Score]:
    """Return the score of each request, in the order of the requests.

    Args:
        model: runs the forwards, in the stage "prefill".
        requests: may repeat.
        hooks: attached throughout. They must treat rows alike: batches are made here.
        batch_size: rows of a forward; "auto" is as many as fit in memory, up to 64.
        shares: compute shared parts of requests once. If False, and where a hook is not marked
            `per_position`, each distinct input is run whole; the scores are the same to rounding.
        on_scored: called with the number of requests scored since its last call.

    Raises:
        ValueError: a request without a context or a continuation, or a batch size below 1.
        HookNameError: a hook that matches nothing; raised before anything runs.
        MemoryError, torch.OutOfMemoryError: a forward of this many rows does not fit.
    """
    for i, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise ValueError(f"request {i} has no context or no continuation: give a token of each")
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        batching = Batching(batch_size, may_cut(model.hook_points()))
        run = _Scoring(model, batching, on_scored or (lambda _: None))
        if batching.may_pad and shares:
            run.family(_rows_by_context(requests), None, 0)
        else:
            run.batches(_rows_by_input(requests), None, 0)
    return [run.scores[i] for i in range(len(requests))]


def truncate(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """Return a request of at most `max_length` tokens to read: the end of the context is kept.

    The last token of the continuation is not read, so that context and continuation may have one
    token more; as in lm-eval's `hf` model.

    Raises:
        ValueError: the continuation alone is longer.
    """
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation of {len(continuation)} tokens does not fit in max_length={max_length}"
        )
    n_context = min(len(context), max_length + 1 - len(continuation))
    return Request(tuple(context[len(context) - n_context :]), tuple(continuation))


def _rows_by_input(requests: Sequence[Request]) -> list[_Row]:
    """Return a row for each distinct input."""
    rows: dict[tuple[Tokens, int], _Row] = {}
    for i, (context, continuation) in enumerate(requests):
        tokens, n_scored = context + continuation[:-1], len(continuation)
        row = rows.setdefault((tokens, n_scored), _Row(tokens, n_scored, []))
        row.answers.append(_Answer(i, continuation))
    return list(rows.values())


def _rows_by_context(requests: Sequence[Request]) -> list[_Row]:
    """Return a row for each distinct context; several continuations are run after it."""
    contexts: dict[Tokens, list[int]] = {}
    for i, request in enumerate(requests):
        contexts.setdefault(request.context, []).append(i)
    rows = []
    for context, members in contexts.items():
        wholes = _rows_by_input([requests[i] for i in members])
        if len(wholes) == 1:
            [row] = wholes
            row.answers = [_Answer(members[a.request], a.tokens) for a in row.answers]
        else:
            row = _Row(context, 1, [_Answer(i, requests[i].continuation[:1]) for i in members])
            row.after = [
                _rest(whole, len(context), members) for whole in wholes if whole.n_scored > 1
            ]
        rows.append(row)
    return rows


def _rest(whole: _Row, n_context: int, members: Sequence[int]) -> _Row:
    """Return the tokens of a row after the context, whose logits score the first of them."""
    answers = [_Answer(members[a.request], a.tokens[1:]) for a in whole.answers]
    return _Row(whole.tokens[n_context:], whole.n_scored - 1, answers)


class _Scoring:
    """One call of `score`."""

    def __init__(
        self, model: HookedHybrid, batching: Batching, on_scored: Callable[[int], Any]
    ) -> None:
        self.model, self.batching, self.on_scored = model, batching, on_scored
        self.scores: dict[int, Score] = {}

    def family(self, rows: list[_Row], state: HybridState | None, n_read: int) -> None:
        """Score rows with a common prefix; `state`, of one row, is after its `n_read` tokens."""
        loose: list[_Row] = []
        for members in _alike(rows, n_read + LONG_BEGINNING):
            if len(members) < FAMILY:
                loose += members
                continue
            shared = _common_start(members[0].beginning, members[-1].beginning)
            tokens = torch.tensor([shared[n_read:]], device=self.model.device)
            _, after = self.model(
                tokens,
                return_type=None,
                attention_mask=torch.ones_like(tokens),
                state=state,
                return_state=True,
                stage="prefill",
            )
            self.family(members, after, len(shared))
        self.batches(loose, state, n_read)

    def batches(self, rows: list[_Row], state: HybridState | None, n_read: int) -> None:
        """Score rows from a state of one row, those of equal length together."""
        for _, found in self.batching.run(
            rows, lambda row: len(row.tokens), lambda batch: self._batch(batch, state, n_read)
        ):
            self.scores.update(found)
            self.on_scored(len(found))

    def _batch(
        self, rows: Sequence[_Row], state: HybridState | None, n_read: int
    ) -> dict[int, Score]:
        """Return the scores of the requests of one forward, and of the forwards from its state."""
        start = None if state is None else state.fork(len(rows))
        wants_state = any(row.after for row in rows)
        inputs = [row.tokens[n_read:] for row in rows]
        found, after = self._forward(rows, inputs, start, wants_state)
        rest = [(i, row) for i, first in enumerate(rows) for row in first.after]
        for part in _parts(rest, self.batching.n_rows):
            assert after is not None
            states = after[[i for i, _ in part]]
            tails = [row for _, row in part]
            more, _ = self._forward(tails, [row.tokens for row in tails], states, False)
            for i, (logprob, is_greedy) in more.items():
                found[i] = Score(found[i].logprob + logprob, found[i].is_greedy and is_greedy)
        return found

    def _forward(
        self,
        rows: Sequence[_Row],
        inputs: Sequence[Tokens],
        state: HybridState | None,
        wants_state: bool,
    ) -> tuple[dict[int, Score], HybridState | None]:
        tokens, mask = pad_rows(inputs, pad=0, padding_side="left")
        out = self.model(
            tokens.to(self.model.device),
            attention_mask=mask,
            state=state,
            return_state=wants_state,
            stage="prefill",
            # A hook that needs the whole input must see all of its logits too.
            logits_to_keep=max(row.n_scored for row in rows) if self.batching.may_pad else None,
        )
        logits, after = out if wants_state else (out, None)
        found: dict[int, Score] = {}
        for row, its_logits in zip(rows, logits, strict=True):
            found.update(_read_off(its_logits[-row.n_scored :], row.answers))
        return found, after


def _read_off(logits: Float[Tensor, "pos d_vocab"], answers: Sequence[_Answer]) -> dict[int, Score]:
    """Return the scores of several continuations under the same logits, in fp32."""
    parts = [part.float() for part in logits.split(POSITIONS)]
    norm = torch.cat([part.logsumexp(-1) for part in parts])
    if bool(norm.isnan().any()):
        raise ValueError(
            f"logits are NaN at {int(norm.isnan().sum())} of {len(norm)} positions of request "
            f"{answers[0][0]}: a hook left them so, or a value outgrew the dtype"
        )
    best = torch.cat([part.argmax(-1) for part in parts])
    found = {}
    for request, tokens in answers:
        ids = torch.tensor(tokens, device=logits.device)
        own = logits.gather(-1, ids[:, None])[:, 0].float() - norm
        found[request] = Score(float(own.double().sum()), bool((best == ids).all()))
    return found


def _alike(rows: Sequence[_Row], n: int) -> Iterator[list[_Row]]:
    """Yield groups of rows whose first `n` tokens are equal and need no logits."""
    families: dict[Any, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: row.beginning):
        start = row.beginning[:n]
        key = start if len(start) == n else ("alone", len(families))
        families.setdefault(key, []).append(row)
    yield from families.values()


def _common_start(a: Tokens, b: Tokens) -> Tokens:
    """Return the common prefix of two rows; of sorted rows, the first and last have that of all."""
    n = min(len(a), len(b))
    return a[: next((i for i in range(n) if a[i] != b[i]), n)]


def _parts(values: Sequence[Any], n: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), n):
        yield values[start : start + n]
