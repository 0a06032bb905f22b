"""Measure trained models on held-out needles and add one of them to the package.

    python -m experiments.publish_tiny griffin results/tiny-griffin-0 results/tiny-griffin-1

The first folder is the one that ships; its model card reports all of them. Measurements are stored
in each folder, so that a second call only writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

import hooked_hybrid
from experiments.train_tiny import LEVELS, cut
from hooked_hybrid import HookedHybrid
from hooked_hybrid.niah.haystacks.word_tokenizer import word_tokenizer
from hooked_hybrid.niah.haystacks.words import SPECIAL
from hooked_hybrid.niah.lengths import longest_prompt
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import default_depths, default_lengths, grid, shortest_length
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from hooked_hybrid.outputs.figures import save_figure

if TYPE_CHECKING:
    import pandas as pd

N_LENGTHS, N_DEPTHS, ROOM = 10, 3, 32
OTHERS = 13
"""Needles on which the runs that do not ship are measured; the shipped one is measured on all."""


def with_tokenizer(folder: Path) -> HookedHybrid:
    """Return the trained model, with the tokenizer it ships with."""
    return HookedHybrid.from_pretrained(folder / "model", tokenizer=word_tokenizer())


def measure(model: HookedHybrid, out: Path, n_needles: int | None) -> pd.DataFrame:
    """Return the cells of the paper's needle and of held-out ones; resumes in `out`."""
    needles = [PAPER, *held_out_needles()][:n_needles]
    shortest = max(shortest_length(model, needle) for needle in needles) + ROOM
    lengths = default_lengths(longest_prompt(model.cfg), N_LENGTHS, shortest)
    prompts = grid(model, needles, lengths, default_depths(N_DEPTHS))
    no_memory = tuple(cut(model, "no memory"))
    settings = [
        Setting("whole", spec={"kind": "whole"}),
        *top_k_settings([0]),
        Setting("no memory", no_memory, no_memory, {"kind": "no memory"}),
    ]
    return niah(model, prompts, settings, out=out, resume=True)


def share(rows: pd.DataFrame) -> str:
    """Return a mean accuracy in percent; a dash if there are no rows."""
    return f"{100 * rows['accuracy'].mean():.1f}" if len(rows) else "-"


def figures(table: pd.DataFrame) -> dict[str, str]:
    """Return the line of one seed, in percent."""
    whole = table[table["setting"] == "whole"]
    inside, paper = whole["in_window"].astype(bool), whole["needle_id"] == "paper"
    return {
        "paper's needle": share(whole[paper]),
        "held-out needles": share(whole[~paper]),
        "inside the window": share(whole[inside]),
        "beyond it": share(whole[~inside]),
        "k=0 in generation": share(table[table["setting"] == "generation k=0"]),
        "k=0 in both": share(table[table["setting"] == "both k=0"]),
        "memory cut": share(table[table["setting"] == "no memory"]),
    }


def by_length(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return accuracy by length, in percent."""
    whole = table[table["setting"] == "whole"]
    lines = []
    for length, rows in whole.groupby("length"):
        paper = rows["needle_id"] == "paper"
        inside = rows["in_window"].astype(bool)
        lines.append(
            {
                "prompt length (tokens)": length,
                "paper's needle": share(rows[paper]),
                "held-out needles": share(rows[~paper]),
                "inside the window": share(rows[inside]),
                "beyond it": share(rows[~inside]),
            }
        )
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """Return a table."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(map(str, line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(kind: str, folders: list[Path], path: Path) -> None:
    """Draw accuracy, the length trained at, and the loss of text over the steps, all seeds."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True)
    for folder in folders:
        log = [line for line in log_of(folder) if line["length"]]
        steps, name = [line["step"] for line in log], folder.name
        right = [e["whole"] if e["needles"] else e["drill, whole"] for e in log]
        (line,) = above.plot(steps, right, label=name)
        middle.plot(steps, [entry["length"] for entry in log], color=line.get_color())
        text = [(s, e["text, whole"]) for s, e in zip(steps, log, strict=True) if e["text, whole"]]
        below.plot(*zip(*text, strict=True), color=line.get_color())
        cuts = [entry["no attention"] for entry in log]
        above.plot(steps, cuts, color=line.get_color(), linestyle=":")
    above.set_ylabel("accuracy (dotted:\nattention cut)")
    middle.set_ylabel("level's length (tokens)")
    below.set(xlabel="step", ylabel="text loss (nats a token)")
    above.set_title(f"tiny-{kind}: drills, then the drawn words of answers")
    above.legend(fontsize=8)
    save_figure(figure, path)


def card(kind: str, model: HookedHybrid, folders: list[Path], tables: list[pd.DataFrame]) -> str:
    """Return the model card."""
    recipe = json.loads((folders[0] / "recipe.json").read_text())
    last = log_of(folders[0])[-1]
    windows = {layer.attention.n_keys for layer in model.cfg.layers if layer.attention}
    kinds = [
        type(of).__name__.removesuffix("Config")
        for layer in model.cfg.layers
        for of in layer.mixers
    ]
    lines = [
        {"run": folder.name, **figures(table)}
        for folder, table in zip(folders, tables, strict=True)
    ]
    window = ", ".join("all" if w is None else str(w) for w in windows)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_held_out = len(held_out_needles())
    about = "\n".join(f"- `{name}`: {value}" for name, value in recipe.items())
    n_prompts = " and ".join(f"{n:,}" for n in (t["prompt_id"].nunique() for t in tables[:2]))
    return f"""---
license: apache-2.0
---
# tiny-{kind}

A toy hybrid language model that retrieves sentences from its context, for the needle-in-a-haystack
experiment of `hooked_hybrid`. It knows {model.cfg.d_vocab} words and nothing of the world.

- layers: {" ".join(kinds)}; d_model {model.cfg.d_model}; 8 heads an attention layer; keys a query
  sees: {window}; {n_parameters:,} parameters, bf16
- data: drawn on the fly by `experiments/tiny_data.py`. Drills first (motifs of random words, again
  and again, over 64, then 128, 256 and all words), then prompts of 128 to 512 tokens with 2 to 8
  needles about different cities in generated text, and questions about some of them. Length and
  number of needles rise when accuracy on the drawn words of the answers passes 90%.
- held out: the paper's needle with its city and each of its phrases, and {n_held_out} other
  needles with their cities.
- loss: next-word cross-entropy; the context's text counts 0.5, the frame of answers 0.3, their
  drawn words and the drills 1.
- why drills: without them attention learned in 1,500 steps to fetch a word of the right kind from
  any needle, and never which one. Recurrence decays start between 0.01 and 0.97 instead of above
  0.9: Griffin's own start smears the last words, by which attention finds its place.

## Recipe of the shipped run

{about}

`python -m experiments.train_tiny {kind} --seed {recipe["seed"]} --out FOLDER`. Batches
follow from the seed alone; another machine rounds otherwise, and gets another model of this kind.
Last evaluation: step {last["step"]}, {last["seconds"]:.0f} s, text loss
{last["text, whole"]} nats a token ({last["text, no attention"]} with attention cut,
{last["text, no memory"]} with the recurrences' memory cut).

![training](training.png)

## Accuracy

Mean graded score / 5 in percent, fp32, of {n_prompts} prompts: the
paper's needle and {n_held_out} held-out ones ({OTHERS - 1} for the runs not shipped), {N_LENGTHS}
lengths, {N_DEPTHS} depths. "k=0" cuts every attention head; "memory cut" makes each recurrence
forget all but the current word (its convolution keeps three more).

{markdown(lines)}

The shipped run by length:

{markdown(by_length(tables[0]))}
"""


def tokenizer_config() -> dict[str, Any]:
    """Return the tokenizer's settings that transformers needs."""
    names = dict(zip(("pad", "eos", "bos", "unk"), SPECIAL, strict=True))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LEVELS[-1].length,
        **{f"{name}_token": text for name, text in names.items()},
    }


def write_checkpoint(model: HookedHybrid, folder: Path) -> None:
    """Write a checkpoint for transformers and `from_pretrained`."""
    model.save_pretrained(folder)
    config = json.dumps(tokenizer_config(), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config)


def publish(kind: str, folders: list[Path], target: Path) -> None:
    """Write the packaged model's folder, replacing an earlier one at once."""
    models = [with_tokenizer(folder) for folder in folders]
    tables = [
        measure(model, folder / "niah", OTHERS if i else None)
        for i, (model, folder) in enumerate(zip(models, folders, strict=True))
    ]
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shipped = models[0].bfloat16()
    write_checkpoint(shipped, partial)
    (partial / "README.md").write_text(card(kind, shipped, folders, tables))
    curve(kind, folders, partial / "training")
    (partial / "training.pdf").unlink()
    shutil.copy(folders[0] / "log.jsonl", partial / "training.jsonl")
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["griffin", "jamba"])
    parser.add_argument("folders", type=Path, nargs="+", help="of train_tiny; the first ships")
    args = parser.parse_args()
    torch.set_num_threads(1)
    package = Path(hooked_hybrid.__file__).parent
    publish(args.kind, args.folders, package / f"tiny-{args.kind}")


if __name__ == "__main__":
    main()
