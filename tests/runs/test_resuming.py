"""Results that are gone on with after any single change: refused, or as if begun with it.

Every kind of store is begun, half of it is taken away, one thing that it reads is changed, and the
run resumed. `SEAMS_ROUNDS` draws as many further changes at random.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tokenizers
import torch

from hooked_hybrid import HookedHybrid
from hooked_hybrid.evaluation.cells import Cell, EvaluationCells
from hooked_hybrid.evaluation.running import Options, experiment_of
from hooked_hybrid.harvest import harvest
from hooked_hybrid.niah.cached_state.sweep import CASES, cached_state
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.setting import PerRow, Setting
from hooked_hybrid.niah.store import COLUMNS, FILE
from hooked_hybrid.niah.store_checks import digest_of
from hooked_hybrid.niah.sweep import niah
from hooked_hybrid.papers.recipe import PaperRecipe
from hooked_hybrid.papers.runs import text_losses
from tests.harvests import contents
from tests.niah.test_sweep import model_of, prompts_of

ROUNDS = int(os.environ.get("SEAMS_ROUNDS", "0"))
"""Changes that are drawn at random for each kind of store, in addition to those that are listed."""
WHERE = "blocks.1.hook_mixer_out"
HOOK = """
scale = {scale}
class Shift:
    def __init__(self, by): self.by = by
    def __call__(self, x): return x + self.by
def scaled(x): return scale * x
def make(factor, shift):
    def f(x, hook, power={default}, *, gain={keyword}):
        return shift(gain * scaled(x) * power * factor) {code}
    return f
f = functools.partial(make({closure}, Shift({bound})), **{partial})
"""
PARTS: dict[str, Any] = {
    "scale": 1.0, "default": 1, "keyword": 1, "code": "* 1.0", "closure": 0.5, "bound": 0.1,
    "partial": {},
}  # fmt: skip
OTHER = {
    "scale": 1.5, "default": 2, "keyword": 2, "code": "* 1.5", "closure": 0.75, "bound": 0.2,
    "partial": {"power": 3},
}  # fmt: skip


def hook_of(**parts: Any) -> Any:
    import functools

    held: dict[str, Any] = {"__name__": "mine", "functools": functools}
    exec(HOOK.format(**{**PARTS, **parts}), held)
    return held["f"]


@dataclass
class World:
    """What a run is of; a change is made to it."""

    model: HookedHybrid = field(default_factory=lambda: model_of("griffin"))
    prompts: list[Prompt] = field(default_factory=lambda: list(prompts_of("griffin")[1::3]))
    hook: Any = field(default_factory=hook_of)
    attached: list[Any] = field(default_factory=lambda: [(WHERE, hook_of(code="+ 0.0"))])
    k: int = 2
    max_new_tokens: int = 2
    first: Any = "prefill"
    options: dict[str, Any] = field(default_factory=dict)
    per_row: int = 1

    def settings(self) -> list[Setting]:
        per_row = PerRow(lambda k: [(WHERE, self.hook)] * int(k.numel() > 0), self.per_row)
        hooks = ((WHERE, self.hook),)
        return [
            Setting("hooked", (), hooks, {"k": self.k}),
            Setting("by row", (), hooks, {"k": 1}, per_row),
        ]

    def own(self) -> HookedHybrid:
        """Return a model that may be changed: others share the one that it is a copy of."""
        self.model = copy.deepcopy(self.model)
        return self.model

    @contextmanager
    def attach(self) -> Iterator[HookedHybrid]:
        for where, hook in self.attached:
            self.model.add_hook(where, hook, is_permanent=True)
        try:
            yield self.model
        finally:
            self.model.reset_hooks(including_permanent=True)


# --- stores ---------------------------------------------------------------------------------------


def cells(table: pd.DataFrame) -> Any:
    return json.loads(table.drop(columns="seconds").to_json())


def sweep(world: World, out: Path, resume: bool) -> Any:
    options: dict[str, Any] = {"max_new_tokens": world.max_new_tokens, "verbose": False}
    options["first_token_stage"] = world.first
    with world.attach() as model:
        table = niah(model, world.prompts, world.settings(), out=out, resume=resume, **options)
    return cells(table)


def cached(world: World, out: Path, resume: bool) -> Any:
    options: dict[str, Any] = {"max_new_tokens": world.max_new_tokens, "verbose": False}
    options |= {"out": out, "resume": resume}
    with world.attach() as model:
        return cells(cached_state(model, world.prompts, [world.k], CASES[:2], **options))


def harvested(documents: list[Any]) -> Callable[[World, Path, bool], Any]:
    def run(world: World, out: Path, resume: bool) -> Any:
        options: dict[str, Any] = {"context_length": 8, "batch_size": 2, "shard_bytes": 1500}
        options |= {"verbose": False, "resume": resume, **world.options}
        fwd_hooks = [("blocks.0.hook_resid_post", world.hook)]
        with world.attach() as model:
            harvest(model, documents, WHERE, out, fwd_hooks=fwd_hooks, **options)
        shards = {k: v for k, v in contents(out).items() if k.startswith("shard")}
        return {
            name: shard[8 + int.from_bytes(shard[:8], "little") :] for name, shard in shards.items()
        }

    return run


def evaluated(world: World, out: Path, resume: bool) -> Any:
    """As `evaluate` does, with the loss of a text in place of lm-eval."""
    found = []
    with world.attach() as model:
        store = EvaluationCells(out, experiment_of(model, "mine", Options(**world.options)), resume)
        for task in ("one", "two"):
            if (cell := store.get(task, "base")) is None:
                tokens = torch.tensor([prompts_of("griffin")[task == "two"].tokens])
                value = float(model(tokens, return_type="loss"))
                numbers = (value, None, False, 1, 0, {}, None, {"loss,none": value}, 0.0)
                store.add(cell := Cell(task, "base", None, "loss,none", *numbers))
            found.append(cell.value)
    return found


def losses(world: World, out: Path, resume: bool) -> Any:
    recipe = PaperRecipe(
        {}, (150,), (0.5,), 1, (0, 1), 1, 2, 2, None, "base", "prefill", "generated"
    )
    out.mkdir(exist_ok=True)
    texts = world.options.get("documents", ())
    with world.attach() as model:
        return json.loads(text_losses(model, world.settings()[:1], recipe, out, texts).to_json())


def half_of_cells(folder: Path) -> None:
    with sqlite3.connect(folder / FILE) as kept:
        (last,) = kept.execute("SELECT max(prompt_id) FROM cells").fetchone()
        kept.execute("DELETE FROM cells WHERE prompt_id = ?", (last,))
        digest = digest_of(kept.execute(f"SELECT {', '.join(COLUMNS)} FROM cells"))
        kept.execute("UPDATE meta SET value = ? WHERE key = 'digest'", (f"{digest:x}",))
    kept.close()


def half_of_shards(folder: Path) -> None:
    shards = sorted(folder.glob("shard-*.safetensors"))
    assert len(shards) > 1
    for path in (shards[-1], folder / "index.json"):
        path.unlink()


TEXTS = ["the old man can see the river", "a dog and the sea", "many of the old words"]
TOKENS = [torch.arange(5, 5 + n) for n in (20, 9, 8)]
STORES: dict[str, tuple[Callable[[World, Path, bool], Any], Callable[[Path], None]]] = {
    "niah": (sweep, half_of_cells),
    "cached state": (cached, half_of_cells),
    "harvest of tokens": (harvested(TOKENS), half_of_shards),
    "harvest of texts": (harvested(TEXTS), half_of_shards),
    "evaluation": (evaluated, lambda folder: (folder / "cells" / "two--base.json").unlink()),
    "loss of text": (losses, lambda folder: None),
}

# --- changes --------------------------------------------------------------------------------------


def loaded_with(world: World, **changes: Any) -> None:
    """Load the same weights with another config, as overrides do."""
    cfg = replace(world.model.cfg, **{k: v for k, v in changes.items() if k == "extra"})
    cfg = cfg.with_overrides(**{k: v for k, v in changes.items() if k != "extra"})
    other = HookedHybrid(cfg, world.model.tokenizer).requires_grad_(False).eval()
    other.load_state_dict(world.model.state_dict())
    world.model = other


def number_of(world: World, name: str, index: int = 0, by: float = 1e-3) -> None:
    weight = world.own().get_parameter(name).data  # which may lie transposed
    weight[torch.unravel_index(torch.tensor(index), weight.shape)] += by


def tokenizer_of(world: World, **changes: Any) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(world.model.tokenizer.to_str())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    world.own().tokenizer = tokenizer


def swapped_words(world: World) -> None:
    said = json.loads(world.model.tokenizer.to_str())
    words = said["model"]["vocab"]
    words["river"], words["sea"] = words["sea"], words["river"]
    world.own().tokenizer = tokenizers.Tokenizer.from_str(json.dumps(said))


def another_prompt(world: World, **changes: Any) -> None:
    world.prompts[0] = replace(world.prompts[0], **changes)


def another_token(world: World) -> None:
    tokens = list(world.prompts[0].tokens)
    tokens[20] = tokens[20] + 1
    another_prompt(world, tokens=tuple(tokens))


def given(world: World, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(world, name, value)


def torch_hook(world: World) -> None:
    world.own().blocks[0].register_forward_hook(lambda module, given, out: None)


Change = Callable[[World], Any]
MODEL: dict[str, Change] = {
    "nothing": lambda w: None,
    "a name": lambda w: loaded_with(w, model_name="other"),
    "what no one reads": lambda w: loaded_with(w, extra={"note": 1}),
    "the same tokenizer": tokenizer_of,
    "a weight": lambda w: number_of(w, "blocks.2.attn.o.weight"),
    "a bias": lambda w: number_of(w, "blocks.0.mixer.conv.bias"),
    "dtype": lambda w: w.own().to(torch.bfloat16),
    "soft cap": lambda w: loaded_with(w, logits_soft_cap=3.0),
    "scale_embedding": lambda w: loaded_with(w, scale_embedding=False),
    "n_keys": lambda w: loaded_with(w, n_keys=5),
    "eos": lambda w: loaded_with(w, eos_token_id=40),
    "several eos": lambda w: loaded_with(w, eos_token_id=(1, 40)),
    "bos": lambda w: loaded_with(w, bos_token_id=9),
    "pad": lambda w: loaded_with(w, pad_token_id=9),
    "n_ctx": lambda w: loaded_with(w, n_ctx=4096),
    "prepends": lambda w: loaded_with(w, default_prepend_bos=False),
    "cfg in place": lambda w: setattr(w.own(), "cfg", w.model.cfg.with_overrides(eos_token_id=40)),
    "an attribute": lambda w: setattr(w.own().ln_final, "eps", 0.5),
    "a forward": lambda w: setattr(w.own().blocks[0].mlp, "forward", lambda x, *_: 0 * x),
    "torch's hook": torch_hook,
    "no permanent hook": lambda w: w.attached.clear(),
    "a permanent hook twice": lambda w: w.attached.extend(w.attached),
    "a permanent hook elsewhere": lambda w: given(
        w, attached=[("hook_embed", hook_of(code="+ 0.0"))]
    ),
    **{
        f"the permanent hook: {part}": lambda w, part=part: given(
            w, attached=[(WHERE, hook_of(**{"code": "+ 0.0", part: OTHER[part]}))]
        )
        for part in PARTS
    },
}
TOKENIZER: dict[str, Change] = {
    "a vocabulary": swapped_words,
    "a normaliser": lambda w: tokenizer_of(w, normalizer=tokenizers.normalizers.Lowercase()),
    "no post-processor": lambda w: tokenizer_of(
        w, post_processor=tokenizers.processors.TemplateProcessing("$A", None, [])
    ),
}
PROMPTS: dict[str, Change] = {
    "a token": another_token,
    "a prompt's depth": lambda w: another_prompt(w, depth=0.9),
    "a prompt's span": lambda w: another_prompt(w, needle_spans=((3, 9),)),
    "a prompt left out": lambda w: w.prompts.pop(),
    "prompts in another order": lambda w: w.prompts.reverse(),
    "max_new_tokens": lambda w: given(w, max_new_tokens=3),
}
K: dict[str, Change] = {"k": lambda w: given(w, k=1)}
HOOKS: dict[str, Change] = {
    f"the setting's hook: {part}": lambda w, part=part: given(
        w, hook=hook_of(**{part: OTHER[part]})
    )
    for part in PARTS
}
SWEEP: dict[str, Change] = {
    "a row's argument": lambda w: given(w, per_row=0),
    "first token": lambda w: given(w, first="generation"),
}
READ: dict[str, dict[str, Change]] = {
    "niah": MODEL | TOKENIZER | PROMPTS | K | HOOKS | SWEEP,
    "cached state": MODEL | TOKENIZER | PROMPTS | K,
    "harvest of tokens": MODEL | TOKENIZER | HOOKS,
    "harvest of texts": MODEL | TOKENIZER | HOOKS,
    "evaluation": MODEL | TOKENIZER,
    "loss of text": MODEL | TOKENIZER | K | HOOKS,
}
"""The changes that are listed for each kind of store: of all that it reads."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "harvest of tokens": [{"context_length": 9}, {"seed": 1}, {"prepend_bos": True}],
    "harvest of texts": [{"dtype": "bfloat16"}, {"drop_special": False}, {"prepend_bos": False}],
    "evaluation": [{"limit": 3}, {"max_gen_toks": 5}, {"stage": "generation"}, {"num_fewshot": 1}],
    "loss of text": [{"documents": ("the old man can see the river and the sea. " * 60,)}],
}
OF_NO_EFFECT = {"nothing", "a name", "what no one reads", "the same tokenizer"}
MAY_GO_ON: dict[str, set[str]] = {"harvest of tokens": set(TOKENIZER)}
"""Besides: tokens are given, no tokenizer is asked."""


def drawn(rng: random.Random, kind: str) -> tuple[str, Change]:
    """Return a random change, small ones too: numbers of any weight, parts of either hook."""
    reads_hook = HOOKS.items() <= READ[kind].items()
    what = rng.choice(["weight", "permanent", "config", "two", *["hook"] * reads_hook])
    if what == "weight":
        names = [n for n, p in model_of("griffin").named_parameters() if p.numel()]
        name, by = rng.choice(names), 10 ** rng.uniform(-4, 0)
        index = rng.randrange(model_of("griffin").get_parameter(name).numel())
        return f"{name}[{index}] by {by}", lambda w: number_of(w, name, index, by)
    if what == "two":
        (one, first), (two, second) = rng.sample(sorted(READ[kind].items()), 2)
        return f"{one} and {two}", lambda w: (first(w), second(w))
    if what == "config":
        key = rng.choice(["logits_soft_cap", "n_keys", "eos_token_id", "pad_token_id"])
        value: Any = rng.randrange(4, 60)
        value = float(value) if key == "logits_soft_cap" else value
        return f"{key} {value}", lambda w: loaded_with(w, **{key: value})
    part, number = rng.choice(sorted(set(PARTS) - {"code", "partial"})), rng.uniform(0.5, 2)
    if what == "hook":
        return f"setting's {part} {number}", lambda w: given(w, hook=hook_of(**{part: number}))
    hook = hook_of(**{"code": "+ 0.0", part: number})
    return f"permanent {part} {number}", lambda w: given(w, attached=[(WHERE, hook)])


def changes_of(kind: str) -> dict[str, Change]:
    listed = dict(READ[kind])
    for options in OPTIONS.get(kind, []):
        listed[f"options {options}"] = lambda w, options=options: w.options.update(options)
    rng = random.Random(f"{kind} {ROUNDS}")
    return listed | dict(drawn(rng, kind) for _ in range(ROUNDS))


@pytest.mark.parametrize("kind", STORES)
def test_a_run_that_is_gone_on_with_after_a_change_is_refused_or_right(kind, tmp_path):
    run, halve = STORES[kind]
    begun = tmp_path / "begun"
    whole = run(World(), begun, False)
    halve(begun)
    went_on, wrong, unsaid = [], [], []
    for i, (name, change) in enumerate(changes_of(kind).items()):
        world, out = World(), tmp_path / str(i)
        change(world)
        shutil.copytree(begun, out)
        try:
            found = run(world, out, True)
        except ValueError as error:
            says_so = "holds another" in str(error) or "holds a harvest of other" in str(error)
            if not says_so or "give another folder" not in str(error):
                unsaid.append((name, error))
        else:
            went_on.append(name)
            if name not in OF_NO_EFFECT:
                change(anew := World())
                right = run(anew, tmp_path / f"{i} anew", False)
            if found != (whole if name in OF_NO_EFFECT else right):
                wrong.append(name)
        shutil.rmtree(out)
    assert not wrong and not unsaid
    listed = set(went_on) & (READ[kind].keys() | {n for n in went_on if n.startswith("options")})
    assert listed == OF_NO_EFFECT | MAY_GO_ON.get(kind, set())
