"""Answers to prompts with a needle: which new tokens were copied, and from where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.model.hybrid import HookedHybrid


@runtime_checkable
class HasNeedle(Protocol):
    """A prompt and the spans of its needle, such as `hooked_hybrid.niah.prompts.Prompt`."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids."""

    @property
    def needle_spans(self) -> Sequence[tuple[int, int]]:
        """[start, stop) of every copy of the needle."""


class NeedlePrompt(NamedTuple):
    """A prompt given by its tokens and spans."""

    tokens: Sequence[int]
    needle_spans: Sequence[tuple[int, int]]


class Copied(NamedTuple):
    """Prompts of one length with generated tokens, and which of these are in the needle.

    Attributes:
        tokens: prompt and new tokens.
        n_prompt: tokens of a prompt.
        in_needle: whether a token of the prompt belongs to the needle.
        sources: for each new token, the equal tokens of the needle; none if the needle was not
            found.
    """

    tokens: Int[Tensor, "batch pos"]
    n_prompt: int
    in_needle: Bool[Tensor, "batch prompt"]
    sources: Bool[Tensor, "batch new prompt"]

    @property
    def is_copy(self) -> Bool[Tensor, "batch new"]:
        """Whether each new token is in the needle."""
        return self.sources.any(dim=2)


def copies(
    model: HookedHybrid,
    prompts: Sequence[HasNeedle],
    max_new_tokens: int = 40,
    min_recall: float = 0.5,
    batch_size: int = 8,
    verbose: bool = True,
) -> Iterator[Copied]:
    """Yield answered prompts in batches of one length; arguments as in `retrieval_scores`.

    Raises:
        ValueError: as `retrieval_scores`; at the end, if no needle was found.
    """
    if not prompts or any(not prompt.needle_spans for prompt in prompts):
        raise ValueError("give at least one prompt, each with the spans of its needle")
    by_length: dict[int, list[HasNeedle]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.tokens), []).append(prompt)
    found = 0
    with tqdm(total=len(prompts), unit="prompt", disable=not verbose) as bar:
        for same in by_length.values():
            for i in range(0, len(same), batch_size):
                part = same[i : i + batch_size]
                copied = _read_answers(model, part, max_new_tokens, min_recall)
                bar.update(len(part))
                if n := int(copied.is_copy.sum()):
                    found += n
                    yield copied
    if not found:
        raise ValueError(
            f"none of {len(prompts)} needles was found: no answer holds {min_recall:.0%} of its "
            "tokens. Give prompts that the model answers, with needles in its attention window"
        )


def _read_answers(
    model: HookedHybrid, prompts: Sequence[HasNeedle], max_new_tokens: int, min_recall: float
) -> Copied:
    tokens = torch.tensor([list(p.tokens) for p in prompts], device=model.device)
    n = tokens.shape[1]
    in_needle = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for start, stop in prompt.needle_spans:
            in_needle[row, start:stop] = True
    options: Any = {"attention_mask": torch.ones_like(tokens), "return_type": "tokens"}
    whole = model.generate(tokens, max_new_tokens, verbose=False, **options)
    new = whole[:, n:]
    ends = torch.isin(new, new.new_tensor(model.cfg.eos_token_ids))
    is_text = ends.cumsum(1) == 0
    sources = (new[:, :, None] == tokens[:, None]) & in_needle[:, None] & is_text[:, :, None]
    recall = sources.any(1).sum(1) / in_needle.sum(1)
    return Copied(whole, n, in_needle, sources & (recall >= min_recall)[:, None, None])
