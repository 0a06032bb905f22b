"""Ways to answer a prompt with zeroed heads, and their effects on the state between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.run import Stage
from hooked_hybrid.interventions import keep_top_heads, on_rows
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.finite import require_numbers
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.shapes import Tokens

Answer = tuple[str, int, float]
"""Text, number of new tokens, and smallest difference of the two largest logits at any step."""


Rows = Int[Tensor, " row"]


@dataclass(frozen=True)
class Case:
    """Where heads are zeroed, and which parts of the state keep the effect.

    Attributes:
        name: of the case.
        damaged: parts of the prompt's state that come from a prefill with zeroed heads ("kv",
            "ssm", "conv"); the others come from the unmodified model.
        steps: None: generation steps are unmodified. Otherwise heads are zeroed in them; these
            parts of the state are updated by such a step, the others by a step of the unmodified
            model from the same state.
        recomputed: keep no state, but run the whole sequence for every new token, with heads zeroed
            at all positions or only at the last one.

    Examples:
        >>> from hooked_hybrid.niah.cached_state import Case
        >>> Case("prompt: keys and values", damaged=("kv",)).damaged
        ('kv',)
    """

    name: str
    damaged: tuple[str, ...] = ()
    steps: tuple[str, ...] | None = None
    recomputed: Literal["everywhere", "last"] | None = None


Cases = list[tuple[Case, int | None]]
KV, RECURRENT = ("kv",), ("ssm", "conv")
ALL = (*KV, *RECURRENT)
CASES: tuple[Case, ...] = (
    Case("whole model"),
    Case("prompt: keys and values", KV),
    Case("prompt: recurrent states", RECURRENT),
    Case("prompt: all", ALL),
    Case("steps: carry nothing", (), ()),
    Case("steps: carry keys and values", (), KV),
    Case("steps: carry recurrent states", (), RECURRENT),
    Case("steps: carry convolution inputs", (), ("conv",)),
    Case("steps: carry recurrences", (), ("ssm",)),
    Case("steps: carry all", (), ALL),
    Case("prompt and steps: all", ALL, ALL),
    Case("no cache: everywhere", recomputed="everywhere"),
    Case("no cache: last position", recomputed="last"),
)
"""Effects in parts of the prompt's state, in the steps, in both; and without a state."""


def way_of(case: Case) -> str:
    """Return the name in `WAYS` of the way to answer a case."""
    if case.recomputed:
        return case.recomputed
    return "kept" if case.steps is None or set(case.steps) == set(ALL) else "in parts"


def _keep(
    model: HookedHybrid, tokens: Tokens, of_prompt: Rows, cases: Cases, max_new_tokens: int
) -> list[Answer]:
    """Generate from unmodified cached states."""
    silenced = [row for row, (case, _) in enumerate(cases) if case.steps is not None]
    out = model.generate(
        tokens[of_prompt, -1:],
        max_new_tokens,
        generation_hooks=_on(silenced, [k or 0 for _, k in cases]),
        first_token_stage="generation",
        state=_starts(model, tokens, of_prompt, cases),
        return_type="output",
        verbose=False,
    )
    n_new, margins = torch.isfinite(out.margins).sum(1).tolist(), out.margins.amin(1).tolist()
    return list(zip(out.text, n_new, margins, strict=True))


def _keep_parts(
    model: HookedHybrid, tokens: Tokens, of_prompt: Rows, cases: Cases, max_new_tokens: int
) -> list[Answer]:
    """Run each step with and without its hooks, and continue from a state composed of both."""
    state, rows, ks = _starts(model, tokens, of_prompt, cases), torch.arange(len(cases)), _ks(cases)

    def step(so_far: Tokens, going: Rows) -> Tensor:
        nonlocal state, rows
        state, rows = state[torch.isin(rows, going).nonzero()[:, 0]], going
        last, kept = so_far[:, -1:], keep_top_heads(ks[going])
        options: Any = {"state": state, "return_state": True, "stage": "generation", "step": 1}
        _, state = model(last, return_type=None, **options)
        logits, damaged = model.run_with_hooks(last, fwd_hooks=kept, **options)
        for i, row in enumerate(going.tolist()):
            if parts := cases[row][0].steps:
                state = state.replace(damaged, kinds=parts, rows=[i])
        return logits[:, -1]

    return _decoded(model, tokens[of_prompt], step, max_new_tokens)


def _run_everything(
    model: HookedHybrid, tokens: Tokens, of_prompt: Rows, cases: Cases, max_new_tokens: int
) -> list[Answer]:
    """Run the whole sequence for every token, with hooks at all positions."""
    ks = _ks(cases)

    def step(so_far: Tokens, going: Rows) -> Tensor:
        hooks, whole = keep_top_heads(ks[going]), torch.ones_like(so_far)
        return model.run_with_hooks(
            so_far, fwd_hooks=hooks, attention_mask=whole, logits_to_keep=1
        )[:, -1]

    return _decoded(model, tokens[of_prompt], step, max_new_tokens)


def _run_to_the_last(
    model: HookedHybrid, tokens: Tokens, of_prompt: Rows, cases: Cases, max_new_tokens: int
) -> list[Answer]:
    """Run the whole sequence for every token, with hooks only at the last position."""
    ks = _ks(cases)

    def step(so_far: Tokens, going: Rows) -> Tensor:
        state = _read(model, so_far[:, :-1], "forward")
        hooks = keep_top_heads(ks[going])
        return model.run_with_hooks(so_far[:, -1:], fwd_hooks=hooks, state=state)[:, -1]

    return _decoded(model, tokens[of_prompt], step, max_new_tokens)


WAYS: dict[str, Callable[..., list[Answer]]] = {
    "kept": _keep,
    "in parts": _keep_parts,
    "everywhere": _run_everything,
    "last": _run_to_the_last,
}
"""The ways to answer rows of a case and a k; see `way_of`."""


def _starts(model: HookedHybrid, tokens: Tokens, of_prompt: Rows, cases: Cases) -> HybridState:
    """Return the state from which each row's generation starts, composed of two prefills."""
    ks = sorted({k for case, k in cases if k is not None and case.damaged})
    clean = _prefilled(model, tokens, [])
    damaged = {k: _prefilled(model, tokens, keep_top_heads(k)) for k in ks}
    states = [clean[i] for i in of_prompt.tolist()]
    for row, (case, k) in enumerate(cases):
        if k is not None and case.damaged:
            donor = damaged[k][int(of_prompt[row])]
            states[row] = states[row].replace(donor, kinds=case.damaged)
    return HybridState.cat(states)


def _prefilled(model: HookedHybrid, tokens: Tokens, hooks: list[HookSpec]) -> HybridState:
    with model.hooks(hooks):
        return _read(model, tokens[:, :-1], "prefill")


def _read(model: HookedHybrid, tokens: Tokens, stage: Stage) -> HybridState:
    """Return the state after tokens, none of them padding."""
    whole = torch.ones_like(tokens)
    return model(tokens, None, attention_mask=whole, return_state=True, stage=stage)[1]


def _on(rows: list[int], ks: list[int]) -> list[HookSpec]:
    """Return hooks that keep the k most peaked heads of each row, for each row's k."""
    return [
        (where, on_rows(fn, [row for row in rows if ks[row] == k]))
        for k in sorted({ks[row] for row in rows})
        for where, fn in keep_top_heads(k)
    ]


def _ks(cases: Cases) -> Int[Tensor, " row"]:
    return torch.tensor([k for _, k in cases])


def _decoded(
    model: HookedHybrid,
    tokens: Tokens,
    step: Callable[[Tensor, Tensor], Tensor],
    max_new_tokens: int,
) -> list[Answer]:
    """Return greedy choices; `step` returns logits [row d_vocab] of the unfinished rows."""
    n_prompt, eos = tokens.shape[1], tokens.new_tensor(model.text.eos)
    margins, lengths = torch.full((len(tokens),), torch.inf), [0] * len(tokens)
    going = torch.arange(len(tokens))
    for _ in range(max_new_tokens):
        best = step(tokens[going.to(tokens.device)], going).float().cpu().topk(2, dim=-1)
        require_numbers(best.values, "the two largest logits of each row")
        chosen = torch.zeros(len(tokens), 1, dtype=torch.long)
        chosen[going, 0] = best.indices[:, 0]
        margins[going] = margins[going].minimum(best.values[:, 0] - best.values[:, 1])
        for row in going.tolist():
            lengths[row] += 1
        tokens = torch.cat([tokens, chosen.to(tokens.device)], dim=1)
        going = going[~torch.isin(best.indices[:, 0], eos.cpu())]
        if not len(going):
            break
    new = [row[n_prompt : n_prompt + n] for row, n in zip(tokens, lengths, strict=True)]
    texts = []
    for row, ids in zip(tokens[:, :n_prompt].tolist(), new, strict=True):
        texts.append(model.text.added(row, ids[~torch.isin(ids, eos)].tolist()))
    return list(zip(texts, lengths, margins.tolist(), strict=True))
