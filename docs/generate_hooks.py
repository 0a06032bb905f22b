"""Write `docs/hooks.md`: every hook point of every model, with its shape and its meaning.

    python docs/generate_hooks.py

The meaning of a hook point comes from the class that it belongs to: `hook_meanings` of a mixer or
an MLP, and `MEANINGS` for all other classes. Everything else on the page is read from models
without weights. A hook point without a meaning, or a meaning without a hook point, is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from torch import nn

from hooked_hybrid import HookedHybrid, HookPoint, HybridConfig
from hooked_hybrid.accounting.configs import PUBLISHED
from hooked_hybrid.config import LayerConfig, Mamba2Config, NormConfig
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.mlps import MLPS
from hooked_hybrid.network.part import Part

PAGE = Path(__file__).parent / "hooks.md"

MEANINGS: dict[str, dict[str, str]] = {
    "HookedHybrid": {
        "hook_embed": "the embeddings, after their scale: what the residual stream starts from",
    },
    "Block": {
        "hook_resid_pre": "the residual stream entering the block",
        "hook_mixer_in": "what `ln1` reads; an edit leaves the residual stream itself alone",
        "hook_mixer_out": "what the mixer writes to the residual stream, its output bias included",
        "hook_attn_out": "the same in attention layers, after the hooks on `hook_mixer_out`",
        "hook_resid_mid": "the residual stream between mixer and MLP",
        "hook_mlp_in": "what `ln2` reads; an edit leaves the residual stream itself alone",
        "hook_mlp_out": "what the MLP or the experts write to the residual stream",
        "hook_resid_post": "the residual stream leaving the block",
    },
    "RMSNorm": {
        "hook_scale": "the root mean square that the norm divides by",
        "hook_normalized": "the values divided by it, before the norm's weight",
    },
    "GroupRMSNorm": {
        "hook_scale": "the root mean square of each group that Mamba-2's last norm divides by",
        "hook_normalized": "the values divided by it, before the norm's weight, in fp32",
    },
    "Unembed": {
        "hook_logits": "the logits asked for, before the soft cap",
    },
}
"""What each hook point outside mixers and MLPs holds, by the class that has it and its name."""

TITLES = {
    "HookedHybrid": "The model",
    "Block": "Every block, `blocks.i.`",
    "RMSNorm": "Norms, `blocks.i.ln1.`, `blocks.i.ln2.`, `ln_final.`",
    "GroupRMSNorm": "The norm of Mamba-2's output, `blocks.i.mixer.norm.`",
    "Unembed": "Unembedding, `unembed.`",
}

MODELS: dict[str, HybridConfig] = {
    "tiny-griffin": HybridConfig.from_pretrained("tiny-griffin"),
    "tiny-jamba": HybridConfig.from_pretrained("tiny-jamba"),
    "RecurrentGemma-2B": PUBLISHED["recurrentgemma-2b"],
    "Jamba-v0.1 and Mini 1.5": PUBLISHED["jamba-mini"],
    "Mamba-Codestral-7B": HybridConfig(
        d_model=4096,
        d_vocab=32_768,
        layers=(LayerConfig(Mamba2Config(128, 64, 128, n_groups=8), None),) * 64,
        norm=NormConfig(eps=1e-5),
    ),
}
"""The packaged models, and the published ones at their sizes."""

INTRO = """\
# Hook points

Written by `docs/generate_hooks.py` from the models themselves; a test compares.

A name is the path to the value in the model. `batch` and `pos` are the rows and positions of the
forward; in attention `query` is `pos`, and `key` also counts the keys remembered from before.
Four marks:

- **lazy**: computed only when something is attached to it.
- **large**: `run_with_cache` keeps it only when it is named.
- **integer**: an index, without a gradient.
- **stepwise**: a hook is called once a position, with `pos` of length 1, as an edit reaches every
  later position; a cache holds all positions. `h[:, -1]` would be whichever position it is, so that
  a hook not marked `per_position` may not select there: `interventions.hook_at(fn, positions)` and
  `edit_state(fn, positions)` act at some.

`cache["pattern", 2]` is short for `cache["blocks.2.attn.hook_pattern"]`, and
`cache["blocks.*.attn.hook_pattern"]` is a cache of those of all layers. Every function that takes
names takes them in these three spellings; `"*"` is every point, the large ones too.
"""


class Row(NamedTuple):
    """One line of a table: a hook point of one layer, or of the model."""

    name: str
    shape: str
    marks: str


def marks(point: HookPoint) -> str:
    """Return how a hook point is marked, in words."""
    flags = {
        "lazy": point.is_lazy,
        "large": point.is_large,
        "integer": point.is_integer,
        "stepwise": point.is_stepwise,
    }
    return ", ".join(name for name, is_set in flags.items() if is_set)


def owner(model: HookedHybrid, name: str) -> str:
    """Return the class that a hook point belongs to."""
    path = name.rpartition(".")[0]
    module: nn.Module = model.mod_dict[path] if path else model
    return type(module).__name__


def meanings_of(module: nn.Module) -> Mapping[str, str]:
    """Return what the hook points of a module hold, by the last part of their names."""
    if isinstance(module, Part):
        return module.hook_meanings
    return MEANINGS.get(type(module).__name__, {})


def meaning(model: HookedHybrid, name: str) -> str:
    """Return what a hook point holds.

    Raises:
        LookupError: neither its mixer or MLP nor `MEANINGS` has a line for it.
    """
    path, _, leaf = name.rpartition(".")
    module: nn.Module = model.mod_dict[path] if path else model
    if leaf not in (found := meanings_of(module)):
        kind = type(module).__name__
        where = f"`hook_meanings` of {kind}" if isinstance(module, Part) else "`MEANINGS`"
        raise LookupError(f"{name!r} has no meaning: add a line for {kind} to {where}")
    return found[leaf]


def shape(model: HookedHybrid, name: str) -> tuple[str, ...]:
    """Return the size of each axis of a hook point, `batch`, `pos`, `query` and `key` by name."""
    point, configs = model.hook_dict[name], [model.cfg]
    if name.startswith("blocks."):
        layer = model.cfg.layers[point.layer()]
        configs += [*layer.mixers, *([layer.mlp] if layer.mlp else [])]
    counted = {"head": "n_heads", "kv_head": "n_kv_heads", "group": "n_groups"}

    def size(axis: str) -> str:
        sizes = [getattr(cfg, counted.get(axis, axis), None) for cfg in configs]
        return str(next((n for n in sizes if isinstance(n, int)), axis))

    return tuple(size(axis) for axis in point.axes)


def rows(model: HookedHybrid, names: Iterable[str]) -> list[Row]:
    """Return a line for each of these hook points, named as it is called within its block."""
    found = []
    for name in names:
        leaf = name.split(".", 2)[2] if name.startswith("blocks.") else name
        size = " ".join(shape(model, name))
        found.append(Row(f"`{leaf}`", size, marks(model.hook_dict[name])))
    return found


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    rules = ("---",) * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *lines)) + "\n"


def kinds_of(models: Iterable[HookedHybrid]) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return the title and the meanings of each class with hook points, by its name.

    The classes of `MEANINGS` come first, then the mixers and the MLPs that the models have.
    """
    found = {kind: (TITLES[kind], texts) for kind, texts in MEANINGS.items()}
    paths = {
        type(module): name.split(".", 2)[2]
        for model in models
        for name, module in model.mod_dict.items()
        if isinstance(module, Part)
    }
    for part in (*MIXERS.values(), *MLPS.values()):
        if part in paths:
            title = f"{part.title[0].upper()}{part.title[1:]}, `blocks.i.{paths[part]}.`"
            found[part.__name__] = title, part.hook_meanings
    return found


def meanings_section(models: Iterable[HookedHybrid]) -> str:
    """Return a table for each class: what its hook points hold, with their axes.

    Raises:
        LookupError: a hook point without a meaning, or a meaning without a hook point.
    """
    models = list(models)
    kinds = kinds_of(models)
    found: dict[str, dict[str, tuple[str, ...]]] = {kind: {} for kind in kinds}
    for model in models:
        for name, point in model.hook_dict.items():
            text, leaf = meaning(model, name), name.rpartition(".")[2]
            line = (f"`{leaf}`", text, " ".join(point.axes), marks(point))
            found[owner(model, name)][leaf] = line
    for kind, (_, texts) in kinds.items():
        if unused := sorted(set(texts) - set(found[kind])):
            raise LookupError(f"{kind} has no hook points {unused}: remove their meanings")
    head = ("name", "holds", "axes", "marks")
    parts = [
        f"### {kinds[kind][0]}\n\n{table(head, lines.values())}" for kind, lines in found.items()
    ]
    return "\n".join(["## What they hold\n", *parts])


def model_section(title: str, model: HookedHybrid) -> str:
    """Return the hook points of one model: its own, then those of each kind of block."""
    names = list(model.hook_dict)
    blocks = {
        i: [n for n in names if n.startswith(f"blocks.{i}.")] for i in range(model.cfg.n_layers)
    }
    kinds: dict[tuple[Row, ...], list[int]] = {}
    for i, block in blocks.items():
        kinds.setdefault(tuple(rows(model, block)), []).append(i)
    head = ("name", "shape", "marks")
    outside = rows(model, (n for n in names if not n.startswith("blocks.")))
    parts = [f"## {title}\n\n{len(names)} hook points in {len(blocks)} blocks.\n"]
    parts.append(f"### {title}: outside the blocks\n\n{table(head, outside)}")
    for lines, layers in kinds.items():
        block = model.blocks[layers[0]]
        kind = " and ".join(type(part).__name__ for part in (*block.mixers, block.mlp) if part)
        where = "block" if len(layers) == 1 else "blocks"
        parts.append(
            f"### {title}: {kind}\n\n{where.capitalize()} {spans(layers)}; each name after "
            f"`blocks.i.`\n\n{table(head, lines)}"
        )
    return "\n".join(parts)


def spans(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs written as "3 to 6"."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    words = [f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return ", ".join(words)


def page() -> str:
    """Return the whole page."""
    models = {title: HookedHybrid.meta(cfg) for title, cfg in MODELS.items()}
    parts = [model_section(title, model) for title, model in models.items()]
    return "\n".join([INTRO, meanings_section(models.values()), *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
