"""The recipe of a reproduction: prompts, needles and seeds, equal for all tables and figures."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.niah.lengths import ROOM, longest_prompt
from hooked_hybrid.niah.needles import PAPER, Needle, held_out_needles
from hooked_hybrid.niah.prompts import (
    Haystack,
    Prompt,
    default_depths,
    default_lengths,
    grid,
    shortest_length,
)
from hooked_hybrid.niah.sweep import FirstToken
from hooked_hybrid.outputs.folders import holds_results, remove_unfinished, replacing
from hooked_hybrid.outputs.foreign import read_json
from hooked_hybrid.runs.identity.comparing import changes, refusal
from hooked_hybrid.runs.identity.model import model_identity

FILE = "recipe.json"
_FIRST_TOKEN: dict[str, FirstToken] = {"rglru": "generation", "mamba": "prefill"}
"""As in the papers: Google's sampler runs the last prompt token as a step, transformers not.
"""


@dataclass(frozen=True)
class Size:
    """The size of the runs: lengths, depths, and a seed's held-out needles besides the paper's.

    Every seed has its own haystack and held-out needles. `n_draws` is the number of random sets of
    heads, as controls; `n_texts` the number of texts on which the loss of language is measured;
    `n_documents` the number of documents read of a benchmark's task (None is all).
    """

    n_lengths: int
    n_depths: int
    n_held_out: int
    n_seeds: int
    n_draws: int
    n_texts: int
    max_new_tokens: int
    n_documents: int | None


PAPERS = Size(10, 10, 2, 2, 10, 12, 60, None)
"""The papers' ten lengths and ten depths, with more needles and seeds."""
PACKAGED = Size(6, 5, 3, 2, 8, 12, 40, 20)
"""For the packaged models: some twenty minutes on one core."""
QUICK = Size(2, 2, 1, 2, 2, 2, 24, 2)
"""To test that everything runs; too few prompts to conclude from."""


@dataclass(frozen=True)
class PaperRecipe:
    """Everything that the results depend on; it determines the prompts and the runs.

    Args:
        identity: of the model, see `identity.model.model_identity`.
        lengths: tokens of the prompts.
        depths: shares of the haystack before the needle.
        n_held_out: needles in addition to the paper's, different for each seed.
        seeds: of haystacks and needles; two or more.
        n_draws, n_texts, max_new_tokens, n_documents: see `Size`.
        template: of `niah.prompts`.
        first_token: stage that chooses the first new token.
        haystack: hash of the documents, "generated" if there are none.
        include_path: folder of benchmarks that replace lm-eval's. Only cells of benchmarks that
            could not be run without it depend on it.
    """

    identity: Mapping[str, Any]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    n_held_out: int
    seeds: tuple[int, ...]
    n_draws: int
    n_texts: int
    max_new_tokens: int
    n_documents: int | None
    template: str
    first_token: FirstToken
    haystack: str
    include_path: str | None = None

    @property
    def is_quick(self) -> bool:
        """Whether it is as small as `QUICK`: too few prompts to conclude from."""
        least = (QUICK.n_draws, QUICK.n_texts, QUICK.max_new_tokens, QUICK.n_documents)
        return (self.n_draws, self.n_texts, self.max_new_tokens, self.n_documents) == least

    @property
    def n_needles(self) -> int:
        """Number of needles: the paper's, and those of every seed."""
        return 1 + self.n_held_out * len(self.seeds)

    @property
    def n_many(self) -> int:
        """Needles of the runs over many: the paper's and all held-out ones; few if quick."""
        return self.n_needles if self.is_quick else 1 + len(held_out_needles())

    def needles(self, seed: int) -> list[Needle]:
        """Return the paper's needle and the held-out ones of a seed.

        Raises:
            ValueError: there are not enough.
        """
        known, start = held_out_needles(), self.seeds.index(seed) * self.n_held_out
        if start + self.n_held_out > len(known):
            raise ValueError(
                f"{len(self.seeds)} seeds of {self.n_held_out} held-out needles each: there are "
                f"{len(known)} in all, give fewer"
            )
        return [PAPER, *known[start : start + self.n_held_out]]

    def many_needles(self, seed: int) -> list[Needle]:
        """Return a seed's part of the `n_many` needles."""
        known = [PAPER, *held_out_needles()][: self.n_many]
        return known[self.seeds.index(seed) :: len(self.seeds)]

    def save(self, folder: Path, paper: str, resume: bool) -> None:
        """Write recipe and paper to a new folder, or check that an existing folder's are the same.

        A folder of benchmarks may be added to a recipe that had none. Prompts and sizes may change
        if nothing has been run yet, as for tables that follow from the config.

        Raises:
            FileExistsError: the folder is not empty and `resume` is false.
            ValueError: the folder contains another recipe, or none.
        """
        path, now = folder / FILE, json.loads(json.dumps({"paper": paper, **asdict(self)}))
        if holds_results(folder):
            if not resume:
                raise FileExistsError(
                    f"{folder} is not empty: continue with --resume, or give another --out"
                )
            before = _read(path)
            added = {"include_path"} if before.get("include_path") is None else set()
            left = [{k: v for k, v in each.items() if k not in added} for each in (before, now)]
            if "identity" in before and not holds_results(folder / "runs"):
                fixed = ("paper", "identity", "include_path")
                left = [{k: each[k] for k in fixed if k in each} for each in left]
            if changed := changes(*left):
                raise ValueError(refusal(folder, "recipe", changed))
            remove_unfinished(folder)
            if before == {k: v for k, v in now.items() if v is not None or k in before}:
                return
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def recorded_include_path(folder: Path) -> Path | None:
    """Return the folder of benchmarks in the recipe of a folder, or None if it has none.

    The file may come from elsewhere: use the path to compare and show, not to read from.
    """
    path = folder / FILE
    found = _read(path).get("include_path") if path.exists() else None
    if found is None:
        return None
    if not isinstance(found, str) or "\0" in found:
        raise ValueError(f"{path} holds no recipe: give another --out")
    return Path(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path.parent} holds files of something else ({path.name} cannot be read): give "
            "another --out"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no recipe: give another --out")
    return found


def recipe_for(
    model: HookedHybrid,
    size: Size,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    n_held_out: int | None = None,
    n_seeds: int | None = None,
    template: str = "base",
    first_token: FirstToken | None = None,
    documents: Sequence[str] = (),
    include_path: Path | None = None,
) -> PaperRecipe:
    """Return the recipe of a size for a model; arguments replace values of the size.

    Lengths are evenly spaced up to `niah.lengths.longest_prompt`; the first one has room for a
    context given twice. The first token is chosen as in the papers' programs for this kind of
    model.

    Raises:
        ValueError: one seed, or lengths too short for a needle given twice.
    """
    n_seeds = size.n_seeds if n_seeds is None else n_seeds
    n_held_out = size.n_held_out if n_held_out is None else n_held_out
    if n_seeds < 2 or n_held_out < 1:
        raise ValueError(
            f"--seeds {n_seeds}, --held-out {n_held_out}: give two seeds and one held-out needle "
            "or more, an interval needs them"
        )
    kinds = {mixer_of(of).kind for layer in model.cfg.layers for of in layer.mixers}
    as_theirs: list[FirstToken] = [s for kind, s in _FIRST_TOKEN.items() if kind in kinds]
    return PaperRecipe(
        identity=model_identity(model),
        lengths=tuple(lengths or _lengths(model, size.n_lengths, template)),
        depths=tuple(depths or default_depths(size.n_depths)),
        n_held_out=n_held_out,
        seeds=tuple(range(n_seeds)),
        n_draws=size.n_draws,
        n_texts=size.n_texts,
        max_new_tokens=size.max_new_tokens,
        n_documents=size.n_documents,
        template=template,
        first_token=first_token or (as_theirs[0] if as_theirs else "prefill"),
        haystack=_hash(documents),
        include_path=None if include_path is None else str(include_path),
    )


def _lengths(model: HookedHybrid, n: int, template: str) -> list[int]:
    longest = longest_prompt(model.cfg)
    needles = [PAPER, *held_out_needles()]
    needed = max(shortest_length(model, needle, template, True) for needle in needles) + ROOM
    usual = default_lengths(longest, n)
    if needed > longest:
        raise ValueError(
            f"a context given twice takes {needed} tokens, the longest prompt by default is "
            f"{longest}: give --lengths"
        )
    return usual if usual[0] >= needed else default_lengths(longest, n, shortest=needed)


def prompts_of(
    model: HookedHybrid,
    recipe: PaperRecipe,
    documents: Sequence[str] = (),
    *,
    read_twice: bool = False,
    thinned: bool = False,
    many: bool = False,
) -> dict[int, list[Prompt]]:
    """Return the prompts of each seed.

    Args:
        model: gives the tokenizer.
        recipe: lengths, depths, needles and seeds.
        documents: of the haystack; each seed begins at another paragraph.
        read_twice: give the context twice.
        thinned: every second length, from the longest down, and every second depth, if there
            are more than three.
        many: all needles, once each, at the shortest length and the middle depth.

    Raises:
        ValueError: documents too short to begin elsewhere, or see `niah.prompts.grid`.
    """
    lengths, depths = recipe.lengths, recipe.depths
    if thinned:
        lengths, depths = _every_second(lengths[::-1])[::-1], _every_second(depths)
    if many:
        lengths, depths = (min(lengths),), (sorted(depths)[len(depths) // 2],)
    pieces = [p.strip() for text in documents for p in re.split(r"\n\s*\n", text) if p.strip()]
    if pieces and len(pieces) < len(recipe.seeds):
        raise ValueError(
            f"--haystack: {len(pieces)} paragraphs for {len(recipe.seeds)} seeds; give a longer "
            "text, in paragraphs"
        )
    found = {}
    for i, seed in enumerate(recipe.seeds):
        at = i * len(pieces) // len(recipe.seeds)
        hay = Haystack(seed, (*pieces[at:], *pieces[:at]))
        needles = recipe.many_needles(seed) if many else recipe.needles(seed)
        found[seed] = grid(model, needles, lengths, depths, hay, recipe.template, read_twice)
    return found


def _every_second(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values[::2] if len(values) > 3 else values


def _hash(documents: Sequence[str]) -> str:
    if not documents:
        return "generated"
    return hashlib.sha256("\n\n".join(documents).encode()).hexdigest()[:16]
