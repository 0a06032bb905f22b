"""Texts generated after prompts, by the rules of lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_hybrid.evaluation.batching import Batching
from hooked_hybrid.model.generate import stages_of
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.options import require
from hooked_hybrid.text.text import Text, pad_rows

Tokens = Sequence[int]
_PROMPT_END = 64  # tokens of a prompt, or new ones after it

try:
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ModuleNotFoundError:
    require("lm_eval")
    raise

SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
"""Arguments of `generate` that a task may set, with stop strings and the number of tokens."""


@dataclass(frozen=True)
class GenerationPlan:
    """How a task's texts are generated: stop strings, length, sampling."""

    stop_strings: tuple[str, ...]
    max_new_tokens: int
    sampling: tuple[tuple[str, Any], ...]


def read_plan(arguments: Mapping[str, Any], eos: str, max_new_tokens: int) -> GenerationPlan:
    """Return the plan for a task's generation arguments.

    Args:
        arguments: lm-eval's `generation_kwargs`; a temperature of 0 is the most likely token.
        eos: text of the end-of-sequence token: one more stop string.
        max_new_tokens: if the task does not set it.

    Raises:
        ValueError: an argument without a counterpart in `HookedHybrid.generate`.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), max_new_tokens))
    stops = handle_stop_sequences(given.pop("until"), eos)
    n_new = given.pop("max_gen_toks")
    if unknown := sorted(set(given) - set(SAMPLING)):
        raise ValueError(
            f"the task asks for {', '.join(unknown)} in generation; this model takes until, "
            f"max_gen_toks, {', '.join(SAMPLING)}"
        )
    if not given.get("do_sample"):
        given = {}
    sampling = tuple(sorted((name, value) for name, value in given.items() if value is not None))
    return GenerationPlan(tuple(s for s in stops if s), n_new, sampling)


def texts_after(
    model: HookedHybrid,
    prompts: Sequence[Sequence[int]],
    plan: GenerationPlan,
    batching: Batching,
    on_written: Callable[[int], Any],
    **hooks: Any,
) -> list[str]:
    """Return the text that the model generates after each prompt, in the order of the prompts.

    A text ends before the first stop string or end-of-sequence token, the config's or the
    tokenizer's, and holds no special token.

    Args:
        model: runs the forwards.
        prompts: tokens, one or more each.
        plan: how to generate.
        batching: rows of a forward.
        on_written: called with the number of prompts done since its last call.
        hooks: `fwd_hooks`, `prefill_hooks`, `generation_hooks`, `first_token_stage` of `generate`.
    """

    def forward(members: Sequence[int]) -> list[str]:
        return _write(model, [prompts[i] for i in members], plan, hooks)

    texts = [""] * len(prompts)
    for batch, written in batching.run(range(len(prompts)), lambda i: len(prompts[i]), forward):
        for i, text in zip(batch, written, strict=True):
            texts[i] = text
        on_written(len(batch))
    return texts


def _write(
    model: HookedHybrid,
    prompts: Sequence[Sequence[int]],
    plan: GenerationPlan,
    hooks: Mapping[str, Any],
) -> list[str]:
    own = getattr(model.tokenizer, "eos_token_id", None)
    ends = [*model.text.eos, *(() if own is None else (own,))]
    tokens, mask = pad_rows(prompts, pad=model.text.pad, padding_side="left")
    first = hooks.get("first_token_stage", "prefill")
    prefills, generates = stages_of(tokens.shape[1], plan.max_new_tokens, first)
    idle = {"prefill_hooks": not prefills, "generation_hooks": not generates}
    out = model.generate(
        tokens,
        plan.max_new_tokens,
        attention_mask=mask,
        stop_strings=plan.stop_strings,
        eos_token_id=ends,
        return_type="output",
        verbose=False,
        **dict(plan.sampling),
        **{name: given for name, given in hooks.items() if not idle.get(name)},
    )
    return [
        _written(model.text, prompt, new, ends, plan.stop_strings)
        for prompt, new in zip(prompts, out.new_tokens.tolist(), strict=True)
    ]


def _written(
    text: Text, prompt: Tokens, new: Tokens, ends: Tokens, stop_strings: Sequence[str]
) -> str:
    """Return a text up to its end, decoded after the prompt, with the beginning of a new text."""
    stop = next((at for at, token in enumerate(new) if token in ends), len(new))
    alone = text.decode(new[:stop], skip_special_tokens=True)
    read = text.decode_after(prompt[-_PROMPT_END:], new[:stop], skip_special_tokens=True)
    cut = postprocess_generated_text(read, list(stop_strings), None)
    return cut.removeprefix(" ") if read == f" {alone}" else cut
