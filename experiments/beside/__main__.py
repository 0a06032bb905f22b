"""Run an experiment, or all of them, on a model, and collect the findings.

    python -m experiments.beside NAME --model tiny-griffin --out results/beside
    python -m experiments.beside all --model tiny-griffin --model tiny-jamba --out results/beside

Finished experiments are not run again, and a stopped one continues where it was. `findings.md` in
the folder has one line for each finding.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

import torch

from experiments.beside.frame import Bench, Experiment, save
from hooked_hybrid import HookedHybrid
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.runs.identity.comparing import changes, refusal
from hooked_hybrid.runs.identity.model import model_identity

NAMES = (
    "gather_aggregate",
    "few_heads",
    "channels",
    "convolution",
    "removal",
    "window",
    "share",
)
MODEL_FREE = ("window", "share")
"""Experiments that do not use the packaged models: their folder is shared by all models."""
HEAD = "| experiment | published | model | ours | the packaged model |\n|---|---|---|---|---|"


def experiment_of(name: str) -> Experiment:
    """Return an experiment by its name."""
    return import_module(f"experiments.beside.{name}").EXPERIMENT


def run_one(name: str, model: str, out: Path) -> None:
    """Run an experiment on a model unless it is finished; write its finding, table and figure.

    Raises:
        ValueError: the folder contains the finding of another model of this name, or of an
            unidentified one.
    """
    folder = folder_of(name, model, out)
    hybrid = HookedHybrid.from_pretrained(model).requires_grad_(False)
    about = {} if name in MODEL_FREE else {"identity": model_identity(hybrid)}
    if (folder / "finding.json").exists():
        before = json.loads((folder / "finding.json").read_text(encoding="utf-8"))
        if about.keys() - before.keys():
            raise ValueError(
                f"{folder} contains a finding of unidentified weights: give another --out, "
                f"nothing is overwritten"
            )
        if changed := changes({key: before[key] for key in about}, about):
            raise ValueError(refusal(folder, "finding", changed))
        print(f"{folder}: done")
        return
    experiment = experiment_of(name)
    finding = experiment.run(Bench(hybrid, folder))
    save(finding, experiment, folder.parent.name, folder, about)
    print(f"{folder}: {finding.verdict}: {finding.ours}")


def folder_of(name: str, model: str, out: Path) -> Path:
    """Return the folder of the finding of an experiment on a model."""
    return out / ("trained" if name in MODEL_FREE else Path(model).name) / name


def report(out: Path) -> str:
    """Return the findings in a folder as a table."""
    lines = [HEAD]
    for name in NAMES:
        for path in sorted(out.glob(f"*/{name}/finding.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            published = f"{found['claim']} ({found['source']})"
            cells = (name, published, found["model"], found["ours"], found["verdict"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the experiments named on the command line."""
    parser = argparse.ArgumentParser(
        "experiments.beside", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--model", action="append", help="tiny-griffin; may be given again")
    parser.add_argument("--out", type=Path, default=Path("results/beside"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.model or ["tiny-griffin"]:
        for name in NAMES if args.name == "all" else [args.name]:
            run_one(name, model, args.out)
    with replacing(args.out / "findings.md") as temporary:
        temporary.write_text(report(args.out), encoding="utf-8")


if __name__ == "__main__":
    main()
