"""The effect of a setting on ordinary language: the loss on haystack text with its hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Haystack, Prompt, build_prompt
from hooked_hybrid.niah.settings.setting import Setting, hooks_of_rows
from hooked_hybrid.runs.intervals import mean_interval
from hooked_hybrid.runs.work import Job, results

if TYPE_CHECKING:
    import pandas as pd

    from hooked_hybrid.runs.ray_workers import RayWorkers

FIRST_SEED = 1000
"""Seeds of the texts, which no prompt of a sweep uses by default."""
PIECE = 64
"""Positions whose logits are held at once."""


def text_loss(
    model: HookedHybrid,
    settings: Sequence[Setting],
    length: int,
    n_texts: int = 12,
    documents: Sequence[str] = (),
    *,
    workers: RayWorkers | None = None,
    verbose: bool = True,
) -> pd.DataFrame:
    """Return the loss of haystack text under each setting, in nats a token.

    As in a sweep, the first half of a text is read as prefill, and the second half in the
    generation stage, with given tokens; the loss is that of the second half. The first half
    contains a needle for settings that act on one; it is not counted.

    Args:
        model: with a tokenizer.
        settings: of a sweep.
        length: tokens of a text, including the question after it.
        n_texts: texts with different beginnings, as the rows of one batch.
        documents: their source, as in `Haystack`; by default generated text.
        workers: run the settings on workers, with the same losses.
        verbose: show a progress bar.

    Returns:
        One row for each setting: `setting`, `loss`, its 95% interval `low` and `high` (Student's,
        over texts), and `more`, the difference from the first setting on the same texts, with its
        interval `more_low` and `more_high`.

    Raises:
        ValueError: `length` too short for needle and template, or `n_texts` below 2.

    Examples:
        >>> from hooked_hybrid.niah.language import text_loss
        >>> from hooked_hybrid.niah.settings import Setting
        >>> text_loss(model, [Setting("whole")], 128, n_texts=2, verbose=False)["setting"].tolist()
        ['whole']
    """
    import pandas as pd

    prompts, half, stop = texts_of(model, length, n_texts, documents)
    tokens = torch.tensor([prompt.tokens for prompt in prompts])
    job = _TextLossJob(list(settings), prompts, tokens[:, :stop], half)
    units, found = [[i] for i in range(len(settings))], {}
    with tqdm(total=len(units), unit="setting", desc="text loss", disable=not verbose) as bar:
        for i, losses in results(model, job, units, workers):
            found[i] = losses
            bar.update()
    rows = []
    for i, setting in enumerate(settings):
        losses, first = found[i], found[0]
        low, high = mean_interval(losses.tolist(), range(n_texts), None)
        more = losses - first
        more_low, more_high = mean_interval(more.tolist(), range(n_texts), None)
        rows.append(
            {
                "setting": setting.name,
                "loss": float(losses.mean()),
                "low": low,
                "high": high,
                "more": float(more.mean()),
                "more_low": more_low,
                "more_high": more_high,
            }
        )
    return pd.DataFrame(rows)


def texts_of(
    model: HookedHybrid, length: int, n_texts: int, documents: Sequence[str] = ()
) -> tuple[list[Prompt], int, int]:
    """Return the texts of `text_loss`, and the range of their loss.

    Raises:
        ValueError: as `text_loss`.
    """
    if n_texts < 2:
        raise ValueError(f"n_texts={n_texts}: give 2 or more, an interval needs them")
    pieces = [piece.strip() for text in documents for piece in re.split(r"\n\s*\n", text)]
    hays = []
    for i in range(n_texts):
        at = i * len(pieces) // n_texts
        hays.append(Haystack(FIRST_SEED + i, (*pieces[at:], *pieces[:at])))
    prompts = [build_prompt(model, PAPER, length, 0.25, hay) for hay in hays]
    stop = length - _common_end(torch.tensor([prompt.tokens for prompt in prompts]))
    half = max(length // 2, max(prompt.needle_spans[0][1] for prompt in prompts))
    if stop - half < 8:
        raise ValueError(f"length={length}: too few tokens of text after the needle, give more")
    return prompts, half, stop


class _TextLossJob(Job[int, Tensor]):
    """An item is a setting, its result the loss of each text."""

    def __init__(
        self,
        settings: Sequence[Setting],
        prompts: Sequence[Prompt],
        tokens: Int[Tensor, "text pos"],
        half: int,
    ) -> None:
        self.settings, self.prompts, self.tokens, self.half = settings, prompts, tokens, half

    def __call__(self, model: HookedHybrid, items: Sequence[int]) -> Iterator[Tensor]:
        """Yield the losses of each setting."""
        for i in items:
            yield _losses(model, self.settings[i], self.prompts, self.tokens, self.half)

    def describe(self, items: Sequence[int]) -> str:
        """Return which settings these are."""
        return f"the loss of text under {', '.join(repr(self.settings[i].name) for i in items)}"


@torch.no_grad()
def _losses(
    model: HookedHybrid,
    setting: Setting,
    prompts: Sequence[Prompt],
    tokens: Int[Tensor, "text pos"],
    half: int,
) -> Float[Tensor, " text"]:
    """Return the mean loss of each text's second half."""
    rows = [(setting, prompt) for prompt in prompts]
    with model.hooks(hooks_of_rows(rows, "prefill")):
        first = tokens[:, : half - 1]
        _, state = model(
            first,
            return_type=None,
            attention_mask=torch.ones_like(first),
            return_state=True,
            stage="prefill",
        )
    losses = []
    with model.hooks(hooks_of_rows(rows, "generation")):
        # In pieces, as the logits of a real vocabulary are large.
        for start in range(half - 1, tokens.shape[1] - 1, PIECE):
            stop = min(start + PIECE, tokens.shape[1] - 1)
            part = tokens[:, start:stop]
            logits, state = model(
                part,
                attention_mask=torch.ones_like(part),
                state=state,
                return_state=True,
                stage="generation",
                step=1,
            )
            targets = tokens[:, start + 1 : stop + 1].to(logits.device)
            each = cross_entropy(logits.float().mT, targets, reduction="none")
            losses.append(each.cpu())
    return torch.cat(losses, dim=1).mean(1)


def _common_end(tokens: Int[Tensor, "text pos"]) -> int:
    """Return the length of the common suffix of all texts, which is the question."""
    same = (tokens == tokens[:1]).all(0).flip(0)
    return int(same.long().cumprod(0).sum())
