"""Options of a command that reads prompts with a needle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hooked_hybrid.commands.option_groups import refuse_given
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.lengths import lengths_for
from hooked_hybrid.niah.needles import PAPER, AnyNeedle, held_out_needles, load_needles
from hooked_hybrid.niah.prompts import Haystack, Prompt, default_depths, grid


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Prompts", **settings)


def _more(text: str, *names: str, **settings: Any) -> Any:
    panel = "Prompts and answers, more"
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


Lengths = Annotated[
    list[int] | None,
    _option(
        "Tokens of a prompt: --lengths 256,512.",
        show_default="ten, up to twice the window",
    ),
]
Depths = Annotated[
    list[float] | None,
    _option(
        "Share of the haystack before the needle: --depths 0,0.5.",
        show_default="ten, from 0 to 1",
    ),
]
HaystackPath = Annotated[
    Path | None,
    _option("Text file, or folder of .txt: --haystack essays/.", show_default="generated text"),
]
Needles = Annotated[
    list[str] | None,
    _option(
        "paper, held-out, none (the paper's question, its needle left out), or a JSON list of "
        "{sentence, question, keywords}: --needle mine.json.",
        show_default="paper",
    ),
]
NNeedles = Annotated[
    int | None,
    _option("Use only this many of these needles: --n-needles 10.", min=1, show_default="all"),
]
Template = Annotated[
    Literal["base", "instruct", "chat"], _option("Form of the prompt: --template instruct.")
]
Distractors = Annotated[
    int, _more("Sentences about other cities in each prompt: --distractors 3.", min=0)
]
MaxNewTokens = Annotated[int, _more("Length of an answer: --max-new-tokens 60.", min=1)]
Seed = Annotated[int, _more("Seed of the generated haystack and the distractors: --seed 1.")]
FirstToken = Annotated[
    Literal["prefill", "generation"],
    _more("Stage that chooses the first new token: --first-token generation, as Google's code."),
]
ReadTwice = Annotated[bool, _more("Give context and question twice: --read-twice.", "--read-twice")]
ThesisDepth = Annotated[
    bool, _more("Count depth from the end, as the thesis: --thesis-depth.", "--thesis-depth")
]


@dataclass(frozen=True)
class PromptOptions:
    """The prompts to read, and the longest answer."""

    lengths: Lengths = None
    depths: Depths = None
    haystack: HaystackPath = None
    needle: Needles = None
    n_needles: NNeedles = None
    template: Template = "base"
    distractors: Distractors = 0
    seed: Seed = 0
    max_new_tokens: MaxNewTokens = 40

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """The haystack's texts; none if it is generated."""
        return () if self.haystack is None else Haystack.read(self.haystack).documents

    @cached_property
    def needles(self) -> list[AnyNeedle | None]:
        """The needles, in order; None for a prompt without one."""
        found = needles_of(self.needle or ["paper"])
        if self.n_needles is not None and self.n_needles > len(found):
            raise ValueError(
                f"--n-needles {self.n_needles}: there {'is' if len(found) == 1 else 'are'} "
                f"{len(found)}; name more with --needle"
            )
        return found[: self.n_needles]

    def prompts(self, model: HookedHybrid, read_twice: Sequence[bool] = (False,)) -> list[Prompt]:
        """Return the prompts, of the same lengths in each form.

        Args:
            model: with a tokenizer.
            read_twice: whether context and question are given twice, of each form.

        Raises:
            ValueError: an option that cannot be read, does not fit, or has no effect.
        """
        needles, haystack = self.needles, Haystack(self.seed, self.documents)
        if self.haystack is not None and not self.distractors:
            why = "a --haystack is read as it is, and without --distractors nothing is drawn"
            refuse_given(why, "seed")
        longest_form = (self.template, max(read_twice), self.distractors)
        lengths = self.lengths or lengths_for(model, needles, *longest_form, self.seed)
        depths = self.depths or default_depths()
        return [
            prompt
            for twice in read_twice
            for prompt in grid(
                model, needles, lengths, depths, haystack, self.template, twice, self.distractors
            )
        ]


def needles_of(sources: Sequence[str]) -> list[AnyNeedle | None]:
    """Return the needles that `--needle` names, in order; None for none."""
    found: list[AnyNeedle | None] = []
    for source in sources:
        if source in ("paper", "none"):
            found.append(PAPER if source == "paper" else None)
        else:
            found += held_out_needles() if source == "held-out" else load_needles(source)
    return found
