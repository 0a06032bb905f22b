"""Random generations, compared with a loop that reads the whole sequence anew for every token."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hooked_hybrid import HookedHybrid
from tests.models import D_VOCAB
from tests.seams.calls import LONG, DrawnBatch, assert_close, draw_batch
from tests.seams.edits import Edit, draw_edits, hooks_of

TIE = 1e-4
"""Two largest logits nearer than this may be taken in either order."""


def check_generation(random: Random, model: HookedHybrid) -> None:
    """Compare tokens, log-probabilities, cache and state of a generation with the loop's."""
    batch = draw_batch(random, model)
    if batch.is_packed:
        return
    n_new = random.randint(1, 5)
    first = random.choice(["prefill", "generation"])
    begins = [len(h) + len(r) for h, r in zip(batch.histories, batch.rows, strict=True)]
    parts = tuple(n - (first == "generation") for n in begins)
    inside = tuple(map(len, batch.histories))
    prefill, prefill_marks = draw_edits(random, model, inside, parts)
    generation, generation_marks = draw_edits(random, model, parts, (LONG,) * len(parts))
    if first == "prefill" and n_new == 1:
        generation, generation_marks = [], []  # refused: there is no step of generation
    if first == "generation" and batch.tokens.shape[1] == 1:
        prefill, prefill_marks = [], []
    eos = random.sample(range(3, D_VOCAB), random.choice([0, 0, 20]))
    names = keepable(random, model)
    out = model.generate(
        batch.input,
        n_new,
        fwd_hooks=batch.fwd_hooks,
        prefill_hooks=hooks_of(prefill, prefill_marks),
        generation_hooks=hooks_of(generation, generation_marks),
        first_token_stage=first,
        names_filter=names,
        return_type="output",
        verbose=False,
        **(dict(eos_token_id=eos) if eos else dict(stop_at_eos=False)),
        **batch.options,
    )
    ends_at = [len(r) for r in batch.rows]
    edits = [*batch.edits, *prefill, *generation]
    for r in range(len(batch.rows)):
        check_row(model, batch, r, out, edits, set(eos), names)
    assert out.tokens.shape[1] == max(batch.tokens.shape[1], *ends_at) + out.new_tokens.shape[1]


def keepable(random: Random, model: HookedHybrid) -> list[str] | None:
    """Draw some points with a position axis to keep, or none."""
    names = [n for n, p in model.hook_dict.items() if {"pos", "query"} & set(p.axes)]
    return random.choice([None, random.sample(names, 3)])


def check_row(
    model: HookedHybrid,
    batch: DrawnBatch,
    row: int,
    out: Any,
    edits: list[Edit],
    eos: set[int],
    names: list[str] | None,
) -> None:
    """Compare one row with the loop."""
    before, ids = len(batch.histories[row]), [*batch.histories[row], *batch.rows[row]]
    n_read = len(ids) - before
    new = out.new_tokens[row].tolist()
    with model.hooks(hooks_of(edits, [False] * len(edits), row)):
        for i, token in enumerate(new):
            whole = torch.tensor([ids])  # which may end with a padding token that was chosen
            logits = model(whole, attention_mask=torch.ones_like(whole))[0, -1]
            best = logits.topk(2).values
            if float(best[0] - best[1]) > TIE:
                assert token == int(logits.argmax()), f"row {row}, token {i}"
            logprob = log_softmax(logits, dim=-1)[token]
            assert_close(out.logprobs[row, i], logprob, f"log-probability {i} of row {row}", logits)
            ids.append(token)
            if token in eos:
                assert bool(out.finished[row])
                assert not out.logprobs[row, i + 1 :].any()
                break
        read = torch.tensor([ids[:-1]])
        options = {"names_filter": names, "attention_mask": torch.ones_like(read)}
        cached = model.run_with_cache(read, **options)[1] if names else None
    if cached is not None:
        check_kept(model, batch, row, out, cached, before, n_read, len(ids) - 1 - before)


def check_kept(
    model: HookedHybrid,
    batch: DrawnBatch,
    row: int,
    out: Any,
    cached: Any,
    before: int,
    n_prompt: int,
    n_all: int,
) -> None:
    """Compare what the generation kept of a row with one forward over all it read."""
    width = batch.tokens.shape[1]
    place = prompt_columns(batch, row, width)
    columns = torch.tensor([*place, *range(width, width + n_all - n_prompt)])
    for name in out.cache:
        point = model.hook_dict[name]
        if name.startswith(("unembed", "ln_final")):
            continue  # computed for the positions whose logits are asked for
        got = out.cache[name][row].index_select(point.pos_dim - 1, columns)
        want: Tensor = cached[name][0].narrow(point.pos_dim - 1, before, n_all)
        if "key" in point.axes:
            # The key axis: the state's keys, then this call's positions.
            n_old = out.cache[name].shape[-1] - (out.cache[name].shape[2])
            got, want = got[..., n_old + columns], want[..., before:]
            if name.endswith("attn_scores"):
                is_low = want < -1e30
                assert torch.equal(got < -1e30, is_low), f"{name}: another mask"
                got, want = got.masked_fill(is_low, 0), want.masked_fill(is_low, 0)
        assert_close(got.float(), want.float(), f"{name} of row {row}, kept")


def prompt_columns(batch: DrawnBatch, row: int, width: int) -> range:
    """Return where a row's prompt stands in a generation: at its right end."""
    return range(width - len(batch.rows[row]), width)
