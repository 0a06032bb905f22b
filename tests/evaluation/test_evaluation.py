"""`HookedHybridLM` against lm-eval's own `hf` model, and `hooked-hybrid eval`, on local tasks."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluate as run_lm_eval
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.evaluation import OWN_TASKS, PLUGIN
from hooked_hybrid.evaluation.forms import FORMS, form_of
from hooked_hybrid.evaluation.lm import HookedHybridLM
from hooked_hybrid.evaluation.running import Options, evaluate
from tests.evaluation_references import SPECIAL, Asked, responses, tokenizer
from tests.jamba_references import JambaSpec, hf_jamba
from tests.models import jamba_config, random_model
from tests.references import RGSpec, hf_recurrentgemma
from tests.tolerances import FP32_PARITY

FOLDER = Path(__file__).parents[1] / "evaluation_tasks"
TASKS = ["local_choice", "local_letters", "local_rolling", "local_writing"]
MAX_LENGTH = 32

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run in the folder of the tasks, which data sets are relative to; keep caches out of HOME."""
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        os.chdir(FOLDER)
        yield
    os.chdir(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that gives a checkpoint as `transformers` writes it, tokenizer included."""

    @cache
    def write(family: str) -> str:
        folder = str(tmp_path_factory.mktemp(family))
        is_jamba = family == "jamba"
        model = hf_jamba(JambaSpec()) if is_jamba else hf_recurrentgemma(RGSpec())
        model.save_pretrained(folder)
        tokenizer(family).save_pretrained(folder)
        return folder

    return write


def results(lm: Any, tasks: list[str] | None = None, **how: Any) -> dict[str, Any]:
    """Return lm-eval's results on the local tasks."""
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    found = run_lm_eval(lm, manager.load(tasks or TASKS), bootstrap_iters=0, **how)
    assert found is not None
    return dict(found)


def difference(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> float:
    """Return the largest difference of log-likelihoods, relative; texts and greed must be alike."""
    worst = 0.0
    for task in TASKS[:3]:
        pairs = list(zip(ours[task], theirs[task], strict=True))
        if task != "local_rolling":
            assert [a[1] for a, _ in pairs] == [b[1] for _, b in pairs]
            pairs = [(a[0], b[0]) for a, b in pairs]
        worst = max(worst, max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs))
    assert ours["local_writing"] == theirs["local_writing"]
    return worst


@pytest.mark.parametrize("family", list(SPECIAL))
def test_every_kind_of_request_answers_as_lm_evals_hf_model(
    family: str, checkpoint: Callable[[str], str]
) -> None:
    path = checkpoint(family)
    same: dict[str, Any] = {"max_length": MAX_LENGTH, "device": "cpu"}
    # hf reads RecurrentGemma's padding as tokens, so it goes one row at a time.
    reference = results(HFLM(pretrained=path, dtype="float32", batch_size=1, **same))
    theirs = responses(reference)
    found = results(HookedHybridLM(path, batch_size="auto", **same))
    assert difference(responses(found), theirs) < FP32_PARITY
    for task in TASKS:
        figures = reference["results"][task].items()
        wanted = {k: v for k, v in figures if "," in k and "_stderr" not in k}
        assert wanted
        ours = {k: found["results"][task][k] for k in wanted}
        assert ours == pytest.approx(wanted, rel=1e-4)  # perplexities are exponentials
    assert len({*theirs["local_writing"]}) > 3  # not all texts ended at once
    ablated = responses(results(HookedHybridLM(path, k=0, batch_size=4, **same)))
    for task in TASKS:
        assert ablated[task] != theirs[task]


def test_examples_as_turns_of_a_conversation_answer_as_hf(
    checkpoint: Callable[[str], str],
) -> None:
    how = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    path, tasks = checkpoint("jamba"), ["local_letters"]
    theirs = results(HFLM(pretrained=path, dtype="float32", device="cpu"), tasks, **how)
    ours = results(HookedHybridLM(path, batch_size=8), tasks, **how)
    pairs = [
        (a["arguments"], b["arguments"])
        for a, b in zip(*(f["samples"]["local_letters"] for f in (ours, theirs)), strict=True)
    ]
    assert all(a == b for a, b in pairs) and pairs[0][0][0][0].count("w9") == 7  # 3 shots, 1 asked
    mine, others = (responses(found)["local_letters"] for found in (ours, theirs))
    worst = max(abs(a[0] - b[0]) for a, b in zip(mine, others, strict=True))
    assert worst / max(abs(b[0]) for b in others) < FP32_PARITY
    plain = responses(results(HookedHybridLM(path, batch_size=8), tasks))["local_letters"]
    assert plain != mine


@cache
def griffin() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin")


PROMPT = "The best thing to do in San Francisco is"


def test_generation_hooks_leave_log_likelihoods_alone() -> None:
    asked, written = [Asked(PROMPT, " eat a sandwich")], [Asked(PROMPT, {"max_gen_toks": 12})]
    base = HookedHybridLM(griffin())
    both, later = (HookedHybridLM(griffin(), k=0, stage=s) for s in ("both", "generation"))
    wanted = base.loglikelihood(asked, disable_tqdm=True)
    assert later.loglikelihood(asked, disable_tqdm=True) == wanted
    assert both.loglikelihood(asked, disable_tqdm=True) != wanted
    texts = [lm.generate_until(written, disable_tqdm=True) for lm in (base, both, later)]
    assert texts[0] != texts[2] and texts[1] != texts[2]
    prefill = HookedHybridLM(griffin(), prefill_hooks=FORMS["ablated"].hooks(griffin().cfg))
    assert prefill.loglikelihood(asked, disable_tqdm=True) == both.loglikelihood(asked)


def test_generation_takes_a_tasks_arguments() -> None:
    lm = HookedHybridLM(griffin(), batch_size=4, max_length=64)
    greedy = {"until": ["."], "max_gen_toks": 20, "temperature": 0.0}
    draws = {"do_sample": True, "temperature": 0.9, "max_gen_toks": 8}
    asked = [Asked(PROMPT, greedy), *(Asked(f"{PROMPT} {w}", draws) for w in ("eat", "buy", "sit"))]
    torch.manual_seed(0)
    first = lm.generate_until([*asked, asked[0]], disable_tqdm=True)
    torch.manual_seed(0)
    assert lm.generate_until([*asked, asked[0]], disable_tqdm=True) == first
    torch.manual_seed(1)
    assert lm.generate_until(asked[1:], disable_tqdm=True) != first[1:4]
    assert first[0] == first[4] and "." not in first[0]
    assert asked[0].args[1] == {"until": ["."], "max_gen_toks": 20, "temperature": 0.0}
    with pytest.raises(ValueError, match="asks for num_beams in generation"):
        lm.generate_until([Asked(PROMPT, {"num_beams": 4})])
    with pytest.raises(ValueError, match="64 new tokens leave no room"):
        lm.generate_until([Asked(PROMPT, {"max_gen_toks": 64})])


def test_long_contexts_lose_their_beginning_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = HookedHybridLM(griffin(), max_length=10)
    end = "thing to do in San Francisco is"
    [cut] = lm.loglikelihood([Asked(f"w w w w {end}", " eat a sandwich")], disable_tqdm=True)
    assert "1 of 1 requests are longer than max_length=10" in caplog.text
    tokens = lm.tok_encode(f"w w w w {end}")[-8:]
    wanted = lm._loglikelihood_tokens([(None, tokens, lm.tok_encode("eat a sandwich", False))])
    assert cut == wanted[0]


def test_arguments_that_would_be_misread_are_refused(unchecked: None, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"k": 9}, "k=9: an attention layer has 8 heads"),
        ({"stage": "prefill"}, "stage='prefill'"),
        ({"score": "peak", "k": 2}, "score='peak'"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"tokenizer": str(tmp_path)}, "no folder that holds tokenizer.json"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            HookedHybridLM(griffin(), **given)
    alone = HookedHybrid(griffin().cfg)
    with pytest.raises(ValueError, match="no tokenizer"):
        HookedHybridLM(alone)


# --- the whole evaluation -----------------------------------------------------------------------


def test_a_random_choice_counts_each_answer_once(
    tmp_path: Path, checkpoint: Callable[[str], str]
) -> None:
    """lm-eval asks for each of the four answers twice where it scores mutual information."""
    text = (FOLDER / "choice.yaml").read_text().replace("local_choice", "informed")
    (tmp_path / "informed.yaml").write_text(text.replace("acc_norm", "acc_mutual_info"))
    found = evaluate(
        HookedHybrid.from_pretrained(checkpoint("recurrentgemma")), "m", ["informed"],
        [FORMS["base"]], Options(limit=2), tmp_path / "out", False, tmp_path, lambda text: None,
    )  # fmt: skip
    [cell] = found.cells
    assert cell.chance == 0.25 and "acc_mutual_info,none" in cell.metrics


def test_no_end_of_sequence_stands_between_a_context_and_what_follows() -> None:
    theirs = tokenizer("jamba")
    bos, eos = (theirs.convert_tokens_to_ids(f"<{name}>") for name in ("bos", "eos"))
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    model = random_model(jamba_config(d_vocab=len(theirs)))
    model.tokenizer = theirs
    w1, w2, w3 = theirs.convert_tokens_to_ids(["w1", "w2", "w3"])
    lm = HookedHybridLM(model)
    assert lm.tok_encode("w1 w2") == [bos, w1, w2]
    [(found, _)] = lm.loglikelihood([Asked("w1 w2", " w3")], disable_tqdm=True)
    logprobs = model(torch.tensor([[bos, w1, w2]])).log_softmax(-1)
    assert found == pytest.approx(float(logprobs[0, -1, w3]), rel=1e-5)


def test_a_form_without_heads_loses_the_needles(tmp_path: Path) -> None:
    forms = [FORMS["base"], form_of(0)]
    found = evaluate(
        griffin(), "tiny-griffin", ["needle_choice"], forms, Options(limit=16), tmp_path / "a",
        say=lambda text: None,
    )  # fmt: skip
    base, ablated = (found.cell("needle_choice", form.name) for form in forms)
    assert base is not None and ablated is not None
    assert base.value > 0.9 and abs(ablated.value - 0.25) < 0.25 and base.chance == 0.25
    assert base.n_documents == len(base.documents) == 16


def run(out: Path, *arguments: str) -> Any:
    words = ["eval", "--include-path", str(FOLDER), "--out", str(out), "--no-chat", *arguments]
    return CliRunner().invoke(build_app(), words)


def test_the_command_reports_resumes_and_continues_without_missing_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], str]
) -> None:
    out, model = tmp_path / "out", checkpoint("jamba")
    tasks = ["--tasks", "local_letters", "--tasks", "local_absent", "--tasks", "local_writing"]
    common = ["--model", model, *tasks, "--max-length", str(MAX_LENGTH)]
    first = run(out, *common, "--form", "base")
    assert first.exit_code == 0, first.output
    assert "local_absent is left out" in first.stderr
    report = (out / "report.md").read_text()
    assert "## Not run" in report and "| local_absent | FileNotFoundError" in report
    cells = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert sorted(cells) == ["local_letters--base.json", "local_writing--base.json"]

    again = run(out, *common, "--form", "base")
    assert again.exit_code == 1 and "is not empty: continue with --resume" in again.stderr
    second = run(out, *common, "--form", "base", "--k", "0", "--resume")
    assert second.exit_code == 0, second.output
    assert "local_letters, ablated" in second.stderr and "local_letters, base" not in second.stderr
    assert all((out / "cells" / name).stat().st_mtime_ns == t for name, t in cells.items())
    report = (out / "report.md").read_text()
    assert "| task | metric | documents | base | ablated (k=0) | at random |" in report
    assert "## Base minus form" in report and (out / "scores.png").stat().st_size > 5000
    said = json.loads((out / "results.json").read_text())
    assert [(c["task"], c["form"]) for c in said["cells"]][:2] == [
        ("local_letters", "base"),
        ("local_letters", "ablated"),
    ]
    other = run(out, *common, "--form", "base", "--limit", "2", "--resume")
    assert other.exit_code == 1 and "another evaluation: limit" in other.stderr


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    for arguments, message in [
        (["--tasks", "local_letters", "--k", "9"], "k=9: an attention layer has 8 heads"),
        (["--tasks", "glue", "--tasks", "mmlu"], "different numbers of examples"),
        (["--tasks", "local_absent"], "no task could be run"),
    ]:
        found = run(tmp_path / "out", *arguments)
        assert found.exit_code == 1 and message in " ".join(found.stderr.split())


RUN = """
import functools, runpy, sys, lm_eval.tasks
# lm-eval looks through all its own tasks, which takes long: leave them out.
manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.tasks.TaskManager = manager
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_lm_evals_own_program_knows_the_model(tmp_path: Path) -> None:
    arguments = f"""lm_eval --model hooked_hybrid
        --model_args pretrained=tiny-griffin,k=2,stage=both --limit 2
        --tasks {PLUGIN},needle_choice --include_path {OWN_TASKS}
        --output_path {tmp_path}"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *arguments.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|needle_choice|" in done.stdout
    [written] = tmp_path.rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert (config["k"], config["stage"], config["heads_chosen_by"]) == (2, "both", "entropy")


def test_our_start_of_lm_evals_program_registers_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(model_registry._objs, "hooked_hybrid")
    monkeypatch.delitem(sys.modules, "hooked_hybrid.evaluation.lm")
    known: list[bool] = []
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: known.append("hooked_hybrid" in model_registry)
    )
    runpy.run_module("hooked_hybrid.evaluation", run_name="__main__")
    assert known == [True]
