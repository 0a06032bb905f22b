"""Properties of the command line: what it asks for, what it refuses, and how it says so."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands import niah as command
from hooked_hybrid.commands import parsing
from hooked_hybrid.commands import program as cli
from hooked_hybrid.commands.niah import figures_table, model_card
from hooked_hybrid.niah.haystacks.word_tokenizer import word_tokenizer
from hooked_hybrid.niah.haystacks.words import vocabulary
from hooked_hybrid.niah.lengths import longest_prompt
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import Prompt, default_depths, default_lengths, shortest_length
from hooked_hybrid.niah.report.report import Written, summary_rows
from hooked_hybrid.niah.settings.papers import GENERATION_MODES, PREFILL_MODES
from tests.models import griffin_config, jamba_config, random_model
from tests.niah.test_summary import sweep_table
from weights_conversion import CheckpointError

N_HEADS = 4
SMALL = ["--lengths", "80", "--depths", "0", "--depths", "1", "--max-new-tokens", "3"]


def small_model(n_keys: int | None = 50) -> HookedHybrid:
    model = random_model(griffin_config(n_keys=n_keys, d_vocab=len(vocabulary())))
    model.tokenizer = word_tokenizer()
    return model


class Sweep:
    """Stands in for the sweep: keeps what it was asked for, and returns a made-up table."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def __call__(self, model: Any, prompts: Any, settings: Any, **options: Any) -> pd.DataFrame:
        self.calls.append({"model": model, "prompts": prompts, "settings": settings, **options})
        if self.error is not None:
            raise self.error
        return sweep_table(ks=(0, 4))

    @property
    def prompts(self) -> list[Prompt]:
        return list(self.calls[-1]["prompts"])

    @property
    def names(self) -> list[str]:
        return [setting.name for setting in self.calls[-1]["settings"]]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sweep:
    """Replace the model, the sweep and the drawing, in a folder of its own."""
    fake = Sweep()
    monkeypatch.chdir(tmp_path)

    def load(name: str, dtype: torch.dtype, device: str) -> HookedHybrid:
        if name == "no-such-model":
            raise CheckpointError("no-such-model is neither a folder nor\na packaged model")
        return small_model().to(device, dtype)

    def write(table: Any, settings: Any, card: Any, folder: Path, **options: Any) -> Written:
        fake.calls[-1] |= {"card": card, **options}
        names = "report.html", "table.csv", "accuracy_by_k.png"
        return Written(folder / names[0], folder / names[1], [folder / names[2]])

    monkeypatch.setattr(HookedHybrid, "from_pretrained", load)
    monkeypatch.setattr(command, "run_sweep", fake)
    monkeypatch.setattr(command, "write_report", write)
    return fake


def run(*arguments: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/some/bin/hooked-hybrid", "niah", *arguments])
        return CliRunner().invoke(cli.build_app(), ["niah", *arguments])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--depths", "0.0,half"], ["'--depths'", "'0.0,half'"]),
        (["--lengths", "80,,90"], ["'80,,90'"]),
        (["--depths", "0", "--lengths=1k"], ["'--lengths'", "'1k'"]),
        (["--k", "1", "--k", "two"], ["'--k'", "'two'"]),
        (["--score", "peak"], ["'peak'", "entropy"]),
    ],
)
def test_a_value_that_cannot_be_read_is_shown_with_the_remedy(words: list[str], said: list[str]):
    found = CliRunner().invoke(cli.build_app(), ["niah", *words], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and all(part in found.output for part in said), found.output


def test_without_options_it_runs_the_papers_experiment(sweep: Sweep):
    result = run()
    assert result.exit_code == 0, result.output
    ks = range(N_HEADS + 1)
    assert sweep.names == [f"{stage} k={k}" for stage in ("generation", "both") for k in ks]
    assert {p.length for p in sweep.prompts} == set(default_lengths(100))  # twice the window
    assert {p.depth for p in sweep.prompts} == set(default_depths())
    assert len(sweep.prompts) == 100
    assert {p.needle for p in sweep.prompts} == {PAPER}
    call = sweep.calls[0]
    assert call["out"] == Path("results/niah") and call["resume"] is False
    assert (call["max_new_tokens"], call["first_token_stage"]) == (40, "prefill")
    assert call["thesis_depth"] is False


def test_every_option_reaches_the_sweep(sweep: Sweep, tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("A guitar can change the school . " * 50)
    options = {
        "--k": ["0", "2", "2"],
        "--stages": ["both"],
        "--score": ["l2"],
        "--lengths": ["150", "180"],
        "--depths": ["0.25"],
        "--haystack": [str(tmp_path / "text")],
        "--needle": ["paper", "held-out"],
        "--n-needles": ["3"],
        "--template": ["instruct"],
        "--distractors": ["1"],
        "--first-token": ["generation"],
        "--max-new-tokens": ["7"],
        "--dtype": ["bfloat16"],
        "--out": [str(tmp_path / "out")],
    }
    words = [word for name, values in options.items() for v in values for word in (name, v)]
    result = run(*words, "--resume", "--thesis-depth", "--read-twice")
    assert result.exit_code == 0, result.output
    assert sweep.names == ["both k=0", "both k=2"]
    assert {setting.spec["score"] for setting in sweep.calls[0]["settings"]} == {"l2"}
    assert [p.length for p in sweep.prompts] == [150, 180] * 3
    assert {p.depth for p in sweep.prompts} == {0.25}
    assert {p.needle for p in sweep.prompts} == {PAPER, *held_out_needles()[:2]}
    assert {(p.template, p.read_twice, p.n_distractors) for p in sweep.prompts} == {
        ("instruct", True, 1)
    }
    guitar = vocabulary().index("guitar")  # generated text has no such word
    assert all(p.tokens.count(guitar) > 0 for p in sweep.prompts)
    call = sweep.calls[0]
    assert (call["max_new_tokens"], call["first_token_stage"]) == (7, "generation")
    assert (call["out"], call["resume"]) == (tmp_path / "out", True)
    assert call["model"].dtype == torch.bfloat16 and call["thesis_depth"] is True


def test_default_lengths_leave_room_for_haystack_where_the_prompt_is_long(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
):
    model = small_model(n_keys=128)
    monkeypatch.setattr(HookedHybrid, "from_pretrained", lambda *a, **o: model)
    assert run("--read-twice").exit_code == 0
    lengths = sorted({p.length for p in sweep.prompts})
    assert lengths[-1] == 256 and len(lengths) == 10
    shortest = shortest_length(model, PAPER, "base", True)
    assert default_lengths(256)[0] < shortest < lengths[0]


def test_the_seed_changes_the_generated_haystack_and_nothing_else(sweep: Sweep):
    for seed in ("0", "0", "1"):
        assert run(*SMALL, "--seed", seed).exit_code == 0
    first, again, other = ([p.tokens for p in call["prompts"]] for call in sweep.calls)
    assert first == again != other


def test_the_seed_changes_the_distractors_too(sweep: Sweep):
    drawn = []
    for seed in ("0", "1"):
        options = ["--distractors", "2", "--depths", "0", "--lengths", "200"]
        assert run(*options, "--seed", seed).exit_code == 0
        drawn.append({p.id for p in sweep.prompts})
    assert not drawn[0] & drawn[1]


def test_distractors_follow_the_seed_of_a_haystack_of_files(sweep: Sweep, tmp_path: Path):
    (tmp_path / "a.txt").write_text("A guitar can change the school . " * 50)
    texts = []
    for seed in ("0", "1"):
        options = ["--haystack", str(tmp_path), "--distractors", "1", "--seed", seed]
        assert run(*options, "--lengths", "150", "--depths", "0").exit_code == 0
        texts.append(sweep.prompts[0].tokens)
    assert texts[0] != texts[1]


def test_distractors_that_leave_no_room_are_an_error(sweep: Sweep):
    result = run("--distractors", "30")
    assert result.exit_code == 1
    assert "give --lengths, or fewer --distractors" in " ".join(result.output.split())


def test_prompts_without_a_needle_show_what_was_answered(tmp_path: Path):
    options = ["--needle", "none", "--k", "0", "--k", "8", "--stages", "generation"]
    out = tmp_path / "r"
    small = ["--lengths", "120", "--depths", "0", "--out", str(out)]
    result = run(*options, *small)
    assert result.exit_code == 0, result.output
    assert "answers without a needle" in result.output
    table = pd.read_csv(out / "table.csv")
    assert (
        len(table) == 2 and table["accuracy"].isna().all() and (table["needle_id"] == "none").all()
    )
    (answer,) = table.loc[table["k"] == 8, "output"]
    assert answer.startswith("The best thing to do in San Francisco is")


def test_a_users_needles_are_read(sweep: Sweep, tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text(
        '[{"sentence": "The sea can change .", "question": "What can change ?",'
        ' "keywords": ["sea"]}]'
    )
    assert run(*SMALL, "--needle", str(path)).exit_code == 0
    assert {p.needle.sentence for p in sweep.prompts if p.needle} == {"The sea can change ."}


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_one_line(sweep: Sweep, device: str):
    result = run("--device", device)
    assert_one_line(result, f"--device {device} cannot be used here")
    assert not sweep.calls


@pytest.mark.parametrize("k", ["-1", "5"])
def test_k_out_of_range_is_refused_before_anything_runs(sweep: Sweep, tmp_path: Path, k: str):
    result = run("--k", "0", "--k", k, "--out", str(tmp_path / "out"))
    assert_one_line(result, f"--k {k}: an attention layer has 4 heads; give 0 to 4")
    assert not sweep.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no-such-model is neither a folder nor a packaged model"),
        (["--lengths", "10"], "the shortest possible prompt"),
        (["--depths", "1.5"], "depths [1.5]: give fractions"),
        (["--haystack", "/no/such/folder"], "there is no such file or folder"),
        (["--needle", "/no/such/needles.json"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(sweep: Sweep, arguments: list[str], message: str):
    assert_one_line(run(*arguments), message)
    assert not sweep.calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("the index\nis damaged"), "the index is damaged"),
        (ValueError("another experiment"), "another experiment"),
        (FileExistsError("results is not empty"), "results is not empty"),
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("[red]brackets[/] stay"), "[red]brackets[/] stay"),
    ],
)
def test_what_goes_wrong_in_the_sweep_is_one_line(sweep: Sweep, error: Exception, message: str):
    sweep.error = error
    assert_one_line(run(), message)


def test_a_fault_of_the_program_keeps_its_traceback(sweep: Sweep):
    sweep.error = KeyError("bug")
    result = run()
    assert isinstance(result.exception, KeyError)


def assert_one_line(result: Any, message: str) -> None:
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert "Traceback" not in result.output


def test_an_interruption_prints_how_to_continue(sweep: Sweep):
    sweep.error = KeyboardInterrupt()
    result = run("--k", "0", "--k", "2", "--out", "my results", "--thesis-depth")
    assert result.exit_code == cli.INTERRUPTED
    said = re.search("what is done is in my results. To go on: (.*)", result.stderr)
    assert said is not None
    resumed = shlex.split(said[1])
    assert resumed[:2] == ["hooked-hybrid", "niah"]
    assert run(*resumed[2:]).exit_code == cli.INTERRUPTED
    before, after = sweep.calls
    assert after["resume"] is True and after["out"] == before["out"] == Path("my results")
    assert [p.id for p in after["prompts"]] == [p.id for p in before["prompts"]]
    assert [s.name for s in after["settings"]] == [s.name for s in before["settings"]]
    again = run(*resumed[2:]).stderr
    assert again.count("--resume") == 1


def test_it_ends_with_the_figures_and_the_paths(sweep: Sweep):
    result = run("--out", "somewhere")
    assert "…" not in result.stdout
    for text in ("generation k=0", "both k=4", "95% interval", "accuracy "):
        assert text in result.stdout
    row = next(line for line in result.stdout.splitlines() if "both k=4" in line)
    (expected,) = (r for r in summary_rows(sweep_table(ks=(0, 4)))[1] if r[0] == "both k=4")
    assert " ".join(expected) == " ".join(row.split())  # on one line of 80 characters
    for name in ("accuracy_by_k.png", "table.csv", "report.html", "maps"):
        assert str(Path("somewhere") / name) in result.stdout
    assert sweep.calls[0]["command"] == "hooked-hybrid niah --out somewhere"


@pytest.mark.parametrize("width", [60, 80])
def test_no_figure_is_cut_on_a_narrow_screen(width: int):
    headings, _ = summary_rows(sweep_table(ks=(0, 4)))
    row = ["generation k=4", "12,345", "100.0%", "12.3 to 100.0%", "98.7%", "65.4%", "32.1%"]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(figures_table(headings, [row]))
    lines = console.export_text().splitlines()
    assert not any("…" in line for line in lines)
    # Below the rule stands the row, all its characters column by column.
    below = lines[next(i for i, line in enumerate(lines) if "───" in line) + 1 :]
    assert sorted("".join("".join(below).split())) == sorted("".join(row).replace(" ", ""))
    if width == 80:
        assert " ".join(below[0].split()) == " ".join(row)


def test_help_explains_every_option_with_an_example():
    result = CliRunner().invoke(cli.build_app(), ["niah", "--help-all"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Example: hooked-hybrid niah" in result.stdout
    wanted = """model k stages score lengths depths haystack needle n-needles template read-twice
        distractors first-token max-new-tokens device dtype out resume thesis-depth seed threads"""
    for name in wanted.split():
        assert result.stdout.count(f"--{name}") >= 2, name  # the option, and an example of it


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_short_and_has_every_option_whole(name: str, width: int):
    command_ = typer.main.get_command(cli.build_app()).commands[name]
    whole, short = (
        CliRunner().invoke(cli.build_app(), [name, option], env={"COLUMNS": str(width)}).stdout
        for option in ("--help-all", "--help")
    )
    assert all(len(line) <= width for line in whole.splitlines())
    words = {word for text in (whole, short) for word in text.replace(",", " ").split()}
    options = {name for p in command_.params for name in (*p.opts, *p.secondary_opts)}
    assert options <= words  # none is cut or folded
    assert "…" not in whole + short
    advanced = {p.opts[0] for p in command_.params if p.rich_help_panel in parsing.MORE}
    rows = {match[1] for match in re.finditer(r"^│ (--[\w-]+)", short, re.MULTILINE)}
    assert rows >= {p.opts[0] for p in command_.params} - advanced and not rows & advanced
    assert ("--help-all" in short) == bool(advanced)
    assert advanced <= {m[1] for m in re.finditer(r"^│ (--[\w-]+)", whole, re.MULTILINE)}


def test_the_help_of_weights_says_what_each_manipulation_does():
    shown = CliRunner().invoke(cli.build_app(), ["weights", "--help"], env={"COLUMNS": "80"}).stdout
    for mode in (*PREFILL_MODES, *GENERATION_MODES):
        assert re.search(rf"^    {mode} +\w", shown, re.MULTILINE), mode


@pytest.mark.parametrize(
    "words",
    [
        "--k 0,4 --lengths 80,90 --depths 0,0.5,1 --stages generation,both",
        "--k 0 --k 4 --lengths 80 --lengths 90 --depths 0 --depths 0.5,1 --stages both,generation",
        "--k=0,4 --lengths=80,90 --depths '0, 0.5, 1' --stages generation --stages=both",
    ],
)
def test_lists_are_given_by_commas_or_one_by_one(words: str, sweep: Sweep):
    result = run(*shlex.split(words))
    assert result.exit_code == 0, result.output
    assert sorted({p.length for p in sweep.prompts}) == [80, 90]
    assert sorted({p.depth for p in sweep.prompts}) == [0, 0.5, 1]
    assert {*sweep.names} == {f"{s} k={k}" for s in ("generation", "both") for k in (0, 4)}


def test_every_list_of_every_command_is_split_at_commas_but_not_the_name_of_a_file(tmp_path: Path):
    lists = 0
    for command_ in typer.main.get_command(cli.build_app()).commands.values():
        for param in command_.params:
            name = param.opts[0]
            if not param.multiple:
                assert [*parsing.split_lists([name, "a,b"], command_.params)] == [name, "a,b"]
                continue
            lists += 1
            split = [*parsing.split_lists([name, "a,b", "--x", "c,d"], command_.params)]
            assert split == [name, "a", name, "b", "--x", "c,d"]
    assert lists >= 20
    (tmp_path / "a,b.json").touch()
    path = str(tmp_path / "a,b.json")
    params = typer.main.get_command(cli.build_app()).commands["niah"].params
    assert [*parsing.split_lists(["--needle", path], params)] == ["--needle", path]
    assert [*parsing.split_lists([f"--needle={path},paper"], params)][-1] == "--needle=paper"


def test_experiments_are_commands_of_one_program():
    result = CliRunner().invoke(cli.build_app(), ["--help"])
    assert "niah" in result.stdout
    assert CliRunner().invoke(cli.build_app(), ["no-such-command"]).exit_code == 2


def test_threads_are_set_and_a_small_model_gets_one(sweep: Sweep):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert run(*SMALL).exit_code == 0
        assert torch.get_num_threads() == 1
        assert run(*SMALL, "--threads", "2").exit_code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_longest_prompt_is_twice_the_window_or_what_the_model_was_made_for():
    assert longest_prompt(griffin_config(n_keys=256)) == 512
    assert longest_prompt(griffin_config(n_keys=2049)) == 4096
    assert longest_prompt(jamba_config()) == 4096
    model = small_model(n_keys=None)
    assert longest_prompt(model.cfg.with_overrides(n_ctx=600)) == 600
    assert longest_prompt(model.cfg.with_overrides(n_ctx=262_144)) == 4096


def test_a_model_without_attention_is_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch):
    model = random_model(griffin_config("RR", d_vocab=len(vocabulary())))
    monkeypatch.setattr(HookedHybrid, "from_pretrained", lambda *a, **o: model)
    assert_one_line(run(), "no attention layer")


def test_the_model_card_states_what_was_run():
    card = model_card(small_model(), "mine")
    assert card["model"] == "mine"
    assert card["layers"] == "RGLRU RGLRU Attention RGLRU"
    assert card["heads in an attention layer"] == "4" and card["keys a query sees"] == "50"
    assert card["dtype, device"] == "float32, cpu"


def test_the_whole_experiment_runs_is_not_overwritten_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = small_model()
    monkeypatch.setattr(HookedHybrid, "from_pretrained", lambda *a, **o: model)
    words = [*SMALL, "--k", "0", "--k", "4", "--stages", "both", "--out", str(tmp_path / "out")]
    result = run(*words)
    assert result.exit_code == 0, result.output
    first = pd.read_csv(tmp_path / "out" / "table.csv")
    assert len(first) == 4
    for line in result.stdout.splitlines():
        if line.strip().startswith(("picture", "each map", "table", "report")):
            assert Path(line.split(maxsplit=1 + line.strip().startswith("each"))[-1]).exists()
    assert_one_line(run(*words), "is not empty")
    assert run(*words, "--resume").exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "table.csv"), first)
    assert_one_line(run(*words, "--resume", "--score", "l2"), "holds another experiment")
