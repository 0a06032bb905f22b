"""What an evaluation's folder takes up again and what it refuses; nothing here runs lm-eval."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.evaluation import work
from hooked_hybrid.evaluation.cells import Cell, EvaluationCells
from hooked_hybrid.evaluation.forms import FORMS, Form, form_of
from hooked_hybrid.evaluation.lm import HookedHybridLM
from hooked_hybrid.evaluation.report import write
from hooked_hybrid.evaluation.running import Evaluation, Options, evaluate
from hooked_hybrid.evaluation.tasks import Loaded, TaskSource, source_of
from hooked_hybrid.runs.identity.model import model_identity

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of HOME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@cache
def griffin() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
num_fewshot: 0
metric_list:
  - metric: acc
"""
QUESTIONS = [{"question": f"{i}?", "options": ["a", "b"], "answer": i % 2} for i in range(4)]


def write_task(folder: Path, name: str, questions: list[dict[str, Any]] = QUESTIONS) -> Path:
    """Write a task with its data, and return its file."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    return folder / f"{name}.yaml"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder of three tasks, two of them in the group "pair"."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one", "two", "three"):
        write_task(folder, name)
    (folder / "pair.yaml").write_text("group: pair\ntask: [one, two]\n")
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Put cells in place of runs, and return the list that (task, form) of each is put in."""
    found: list[tuple[str, str]] = []

    def run(_: Any, name: str, loaded: Loaded, form: Form, options: Options) -> Cell:
        found.append((loaded.name, form.name))
        right = {str(i): float(form.k is None or i < 1) for i in range(4)}
        value = sum(right.values()) / 4
        numbers = (value, 0.1, True, 4, loaded.n_fewshot, right, 0.5, {"acc,none": value}, 0.1)
        return Cell(loaded.name, form.name, form.k, "acc,none", *numbers)

    monkeypatch.setattr(work, "_run", run)
    return found


Call = Callable[..., Evaluation]


@pytest.fixture
def call(tmp_path: Path, tasks: Path, runs: list[tuple[str, str]]) -> Call:
    """Return `evaluate` on these tasks, resuming, in one folder; a model and options may differ."""

    def evaluated(
        names: list[str], forms: list[Form], options: Options | None = None, **other: Any
    ) -> Evaluation:
        given = {"model": griffin(), "out": tmp_path / "out", **other}
        return evaluate(
            given["model"], "tiny-griffin", names, forms, options or Options(), given["out"], True,
            tasks, given.get("say", lambda text: None),
        )  # fmt: skip

    return evaluated


BASE, ABLATED = FORMS["base"], FORMS["ablated"]


def test_the_report_holds_what_earlier_calls_left(
    tmp_path: Path, call: Call, tasks: Path, runs: list[tuple[str, str]]
) -> None:
    out, card, options = tmp_path / "out", {"model": "m"}, Options()
    absent = TASK.format(name="absent", folder=tasks)
    (tasks / "absent.yaml").write_text(absent)
    write(call(["pair", "absent"], [BASE, ABLATED]), card, options, out, "first")
    alone = (out / "report.md").read_text()
    assert "earlier commands" not in alone and "| pair, mean of 2 tasks" in alone
    written = write(call(["three", "two"], [BASE, form_of(2)]), card, options, out, "second")
    assert runs[4:] == [("three", "base"), ("three", "k=2"), ("two", "k=2")]
    said = json.loads(written.results.read_text())
    ran = [(cell["task"], cell["form"]) for cell in said["cells"]]
    assert ran == [
        *(("one", form) for form in ("base", "ablated")),
        *(("two", form) for form in ("base", "ablated", "k=2")),
        *(("three", form) for form in ("base", "k=2")),
    ]
    assert list(said["missing"]) == ["absent"]
    report = written.report.read_text()
    # Of each task the gaps of four documents are 0, 1, 1, 1, and a fifth is at the bound, -1 or 1.
    # Under weights uniform on the simplex the mean is below -p in (1 - p)^4 / 8 of all cases, and
    # above q, with the fifth at 1, in 1 - q^4: 2.5% each. Two tasks: distances over sqrt(2).
    low, high = -100 * (1 - 0.2**0.25), 100 * 0.975**0.25
    ends = f"{75 - (75 - low) / 2**0.5:.1f} to {75 + (high - 75) / 2**0.5:.1f}"
    assert ends == "-1.5 to 92.2"
    assert means(report) == [["100.0 ± 7.1", "25.0 ± 7.1", ""], [f"75.0 ({ends})", ""]]
    assert report.count("\n| two | acc |") == 1 and "earlier commands" in report
    assert "| absent | " in report and "second" in report
    table = written.table.read_text()
    assert all(f"\n{task}," in table for task in ("one", "two", "three"))
    # A task that has come to be there is no longer missing.
    write_task(tasks, "absent")
    found = call(["absent"], [BASE])
    # A stopped call leaves cells; means are of the forms that all tasks were asked in.
    left = {**json.loads((out / "cells" / "one--base.json").read_text()), "form": "k=3", "k": 3}
    (out / "cells" / "one--k_3.json").write_text(json.dumps(left))
    write(found, card, options, out)
    report = (out / "report.md").read_text()
    assert "## Not run" not in report and "| k=2 | k=3 |" in report
    assert means(report)[0] == ["100.0 ± 7.1", "25.0 ± 7.1", "", ""]


def means(report: str) -> list[list[str]]:
    """Return the forms' figures in the lines of the group's mean: scores, then gaps."""
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| pair, mean")]
    return [rows[0][3:-1], [cell.removesuffix(" |") for cell in rows[1][1:]]]


def test_the_report_says_how_many_examples_there_were(
    tmp_path: Path, call: Call, tasks: Path
) -> None:
    """lm-eval keeps the 0 examples of a task whose file says 0, whatever is asked for."""
    told: list[str] = []
    (tasks / "free.jsonl").write_text((tasks / "one.jsonl").read_text())
    free = TASK.format(name="free", folder=tasks).replace("num_fewshot: 0\n", "")
    (tasks / "free.yaml").write_text(free)
    options = Options(num_fewshot=2)
    found = call(["one", "free"], [BASE], options, say=told.append)
    write(found, {"model": "m"}, options, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Examples before a question: 2, but 0 in one." in report
    assert "one sets 0 examples in its own config" in told
    own = call(["one", "free"], [BASE], out=tmp_path / "own")
    write(own, {"model": "m"}, Options(), tmp_path / "own")
    report = (tmp_path / "own" / "report.md").read_text()
    assert "Examples before a question: each task's own (0)." in report


def test_a_task_that_has_changed_is_refused_by_name(
    tmp_path: Path, call: Call, tasks: Path, runs: list[tuple[str, str]]
) -> None:
    call(["one", "two"], [BASE])
    call(["one", "two"], [BASE])
    assert runs == [("one", "base"), ("two", "base")]
    path = tasks / "one.yaml"
    path.write_text(path.read_text().replace("{{question}}", "Q: {{question}}"))
    for forms in ([BASE, ABLATED], [ABLATED]):
        with pytest.raises(ValueError, match="one has changed since .* forms base"):
            call(["two", "one"], forms)
    assert len(runs) == 2
    call(["two"], [BASE])
    write_task(tasks, "one", [*QUESTIONS[:3], {**QUESTIONS[3], "answer": 0}])
    with pytest.raises(ValueError, match="one has changed"):
        call(["one"], [BASE])
    (tasks / "one.jsonl").unlink()  # what cannot be compared is kept, and said so
    told: list[str] = []
    assert len(call(["one"], [BASE], say=told.append).cells) == 1
    assert "one cannot be compared with its results" in told[0]


def test_a_form_of_the_same_name_is_not_the_same_form(
    call: Call, runs: list[tuple[str, str]]
) -> None:
    call(["one"], [Form("few", 8)])
    for other in (Form("few", 0), Form("few", 8, "l2")):
        for task in ("one", "two"):  # they would stand in one column
            with pytest.raises(ValueError, match="holds one in the form 'few' with k=8, entropy"):
                call([task], [other])
    call(["one"], [Form("a b", 2)])
    with pytest.raises(ValueError, match="holds one in the form 'a b'"):  # one file for two names
        call(["one"], [Form("a_b", 2)])
    assert runs == [("one", "few"), ("one", "a b")]
    with pytest.raises(ValueError, match="give each its own name"):
        call(["one"], [Form("few", 8), Form("few", 0)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("window", "config layers.2.mixer.n_keys 256 -> 4"),
        ("weights", "the weights"),
        ("hook", "hooks on the model: none -> hook_embed"),
        ("soft cap", "config logits_soft_cap 30.0 -> 3.0"),
    ],
)
def test_another_model_of_the_name_is_refused(
    change: str, said: str, call: Call, runs: list[tuple[str, str]]
) -> None:
    call(["one"], [BASE])
    again = HookedHybrid.from_pretrained("tiny-griffin")
    assert model_identity(again) == model_identity(griffin())
    other = again
    if change == "window":
        other = HookedHybrid.from_pretrained("tiny-griffin", n_keys=4)
    elif change == "weights":
        with torch.no_grad():
            again.blocks[again.cfg.attention_layers[0]].attn.W_O.zero_()
    elif change == "soft cap":
        other = HookedHybrid(replace(again.cfg, logits_soft_cap=3.0), again.text.tokenizer)
        other.load_state_dict(again.state_dict())
    else:
        again.add_hook("hook_embed", lambda x, hook: 2 * x)
    with pytest.raises(ValueError, match=f"holds another evaluation: .*{said}"):
        call(["one"], [BASE], model=other)
    assert len(runs) == 1


def test_a_folder_of_other_things_is_refused_and_one_without_cells_is_not(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no evaluation"):
        EvaluationCells(tmp_path / "mine", {"model": "m"}, resume=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    EvaluationCells(tmp_path / "a", {"model": "m"})
    EvaluationCells(tmp_path / "a", {"model": "n"}, resume=True)
    said = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert said == {"format": 1, "model": "n"}


# --- what is checked before anything is written ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "foo"], "batch_size='foo': give a whole number from 1"),
        (["--batch-size", "0"], "batch_size='0'"),
        (["--limit", "0"], "limit=0: give a number of documents"),
        (["--limit", "-2"], "limit=-2"),
        (["--limit", "2.5"], "limit=2.5"),
        (["--limit", "nan"], "limit=nan"),
        (["--include-path", "nowhere"], "no such folder"),
        (["--chat"], "no chat template"),
        (["--num-fewshot", "3"], "num_fewshot=3 has no effect: needle_choice set 0 examples"),
    ],
)
def test_bad_arguments_leave_no_folder(tmp_path: Path, arguments: list[str], message: str) -> None:
    words = ["eval", "--tasks", "needle_choice", "--out", str(tmp_path / "out"), *arguments]
    found = CliRunner().invoke(build_app(), words)
    assert found.exit_code == 1 and message in " ".join(found.stderr.split())
    assert not (tmp_path / "out").exists()


def test_options_that_the_model_cannot_take_leave_no_folder(tmp_path: Path, call: Call) -> None:
    for options in (Options(max_length=0), Options(max_gen_toks=0)):
        with pytest.raises(ValueError, match="=0: give 1 or more"):
            call(["one"], [BASE], options)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_takes_no_arguments_of_loading() -> None:
    cases: list[dict[str, Any]] = [
        *({"dtype": "float32"}, {"device": "cpu"}, {"revision": "main"}),
        *({"n_keys": 4}, {"n_keys": None}),
    ]
    for given in cases:
        with pytest.raises(ValueError, match=f"{next(iter(given))}= with a model in memory"):
            HookedHybridLM(griffin(), **given)
    for given in ({"max_length": 0}, {"max_batch_size": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}=0"):
            HookedHybridLM(griffin(), **given)
    loaded = HookedHybridLM("tiny-griffin", device="cpu").model
    assert loaded.dtype == torch.float32


def test_what_cannot_be_reached_marks_only_the_tasks_that_read_it(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = "dataset_path: json\ndataset_kwargs: {data_files: https://host/x.jsonl}\ntask: "
    for name in ("far", "farther"):
        (tasks / f"{name}.yaml").write_text(remote + name)
    tried: list[str] = []

    def load(names: list[str]) -> Any:
        tried.append(names[0])
        if names[0].startswith("far"):
            raise ConnectionError("no network")
        return {"tasks": {names[0]: None}}

    source = TaskSource(["far", "farther", "one"], tasks)
    monkeypatch.setattr(source.manager, "load", load)
    assert source.load("far") == source.load("farther") == "ConnectionError: no network"
    assert isinstance(source.load("one"), Loaded) and tried == ["far", "one"]
    subsets = [{"dataset_path": "nyu-mll/glue", "dataset_name": name} for name in ("cola", "rte")]
    assert source_of(subsets[0]) == source_of(subsets[1])
    made = [{"task": name, "custom_dataset": print} for name in ("a", "b")]
    assert source_of(made[0]) != source_of(made[1])
