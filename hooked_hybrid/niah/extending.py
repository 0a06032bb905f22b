"""Extending a sweep: further settings and prompts, with the finished cells kept.

A store records its cells in blocks: a block is every one of some prompts under every one of some
settings, and is computed as a sweep of its own. So the batches of each block, and with them its
numbers, do not depend on what was added later, or on where a run was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_hybrid.niah.prompts import Prompt, prompts_identity
from hooked_hybrid.runs.identity.comparing import changes


@dataclass(frozen=True)
class Block:
    """Prompts, by id, that are all run under some settings, by name."""

    prompts: tuple[str, ...]
    settings: tuple[str, ...]


def first_block(experiment: Mapping[str, Any], prompts: Sequence[Prompt]) -> Block:
    """Return the block of a new sweep: all of it."""
    return Block(tuple(p.id for p in prompts), tuple(experiment.get("settings", ())))


def as_json(blocks: Sequence[Block]) -> str:
    """Return blocks as they are stored."""
    return json.dumps([[list(block.prompts), list(block.settings)] for block in blocks])


def from_json(found: Any) -> list[Block]:
    """Return stored blocks.

    Raises:
        ValueError, TypeError: values of another form.
    """
    blocks = [Block(tuple(prompts), tuple(settings)) for prompts, settings in found]
    names = [name for block in blocks for part in (block.prompts, block.settings) for name in part]
    if not blocks or not all(isinstance(name, str) for name in names):
        raise ValueError("no list of prompts and settings")
    return blocks


def same_cells(a: Sequence[Block], b: Sequence[Block]) -> bool:
    """Whether two lists of blocks hold the same cells, each once."""
    cells = [sorted((p, s) for k in of for p in k.prompts for s in k.settings) for of in (a, b)]
    return cells[0] == cells[1]


def extended(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    blocks: Sequence[Block],
    prompts: Sequence[Prompt],
) -> tuple[list[Block], list[str]]:
    """Return the blocks of an experiment that has more settings or prompts than the stored one.

    Args:
        before, now: the stored experiment and this one, as the store records them.
        blocks: of the stored one.
        prompts: of this one.

    Returns:
        The stored blocks and the new ones; and the differences in what was there before, as clauses
        of `comparing.changes`: if there are any, it is no extension.
    """
    old, named = before.get("settings"), now.get("settings")
    if not isinstance(old, dict) or not isinstance(named, Mapping):
        return [], changes(before, now)
    ids = dict.fromkeys(id for block in blocks for id in block.prompts)
    stored = [prompt for prompt in prompts if prompt.id in ids]
    same = {
        **now,
        "settings": {name: said for name, said in named.items() if name in old},
        **prompts_identity(stored),
    }
    new_settings = tuple(name for name in named if name not in old)
    new_prompts = tuple(prompt.id for prompt in prompts if prompt.id not in ids)
    further = [Block(tuple(ids), new_settings), Block(new_prompts, tuple(named))]
    new = [block for block in further if block.prompts and block.settings]
    return [*blocks, *new], changes(before, same)
