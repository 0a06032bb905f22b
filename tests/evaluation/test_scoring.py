"""Log-likelihoods in batches and from shared beginnings, forms and gaps: what needs no lm-eval."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hooked_hybrid import HookedHybrid
from hooked_hybrid.evaluation import scoring
from hooked_hybrid.evaluation.benchmarks import BENCHMARKS
from hooked_hybrid.evaluation.cells import Cell, EvaluationCells
from hooked_hybrid.evaluation.conversation import as_text
from hooked_hybrid.evaluation.forms import FORMS, Form, form_of
from hooked_hybrid.evaluation.gaps import Estimate, gap, mean
from hooked_hybrid.evaluation.scoring import FAMILY, Request, score, truncate
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.interventions import keep_top_heads
from hooked_hybrid.text.tokenizer import CheckpointTokenizer
from tests.models import random_tokens, tiny_model
from tests.tolerances import FP32_PARITY

LONG = 12
"""Tokens that count as a long beginning here: shorter inputs show as much."""


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LONG_BEGINNING", LONG)


def requests() -> list[Request]:
    """Return what lm-eval asks for: choices of a context, one-token ones, few-shot beginnings."""
    rows = random_tokens(12, 30, seed=3).tolist()
    found = []
    for i, row in enumerate(rows[:3]):
        context = tuple(row[: 9 + 5 * i])
        tails = [tuple(row[20 : 20 + n]) for n in (1, 2, 4)] + [tuple(rows[5][:3])]
        found += [Request(context, tail) for tail in tails]
    start = tuple(rows[6][: LONG + 3])
    for row in rows[7 : 7 + FAMILY + 1]:
        found += [Request(start + tuple(row[:4]), (token,)) for token in (4, 5)]
    found.append(Request(start, (7, 8)))  # its whole context is others' beginning
    return [*found, found[0], found[3]]


def one_by_one(model: HookedHybrid, hooks: Any = ()) -> list[tuple[float, bool]]:
    """Return each score by the definition."""
    return by_definition(model, requests(), hooks)


def by_definition(
    model: HookedHybrid, requests: list[Request], hooks: Any = ()
) -> list[tuple[float, bool]]:
    """Return scores of a forward, log-softmax and gather for each."""
    found = []
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        for context, continuation in requests:
            tokens = torch.tensor([context + continuation[:-1]])
            logits = model(tokens, stage="prefill")[0, -len(continuation) :]
            targets = torch.tensor(continuation)
            own = logits.log_softmax(-1).gather(1, targets[:, None])
            found.append((float(own.sum()), bool((logits.argmax(-1) == targets).all())))
    return found


@cache
def model(name: str) -> HookedHybrid:
    return tiny_model(name)


def relative_error(found: list[Any], wanted: list[Any]) -> float:
    """Return the largest difference of log-probabilities, relative to the largest of them."""
    assert [f[1] for f in found] == [w[1] for w in wanted]
    worst = max(abs(f[0] - w[0]) for f, w in zip(found, wanted, strict=True))
    return worst / max(abs(w[0]) for w in wanted)


@pytest.mark.parametrize("name", ["griffin", "jamba"])
@pytest.mark.parametrize("k", [None, 1])
def test_batches_and_shared_beginnings_score_as_single_forwards(name: str, k: int | None) -> None:
    hooks = Form("", k).hooks(model(name).cfg)
    wanted = one_by_one(model(name), hooks)
    for batch_size, shares in ((3, True), (4, False)):
        found = score(model(name), requests(), hooks, batch_size, shares)
        assert relative_error(found, wanted) < FP32_PARITY


def test_a_context_with_several_continuations_shares_a_forward_with_one_that_has_one() -> None:
    first, second = ((*row[:6],) for row in random_tokens(2, 6, seed=3).tolist())
    asked = [Request(first, (7, 8)), Request(first, (9, 5)), Request(second, (7,))]
    found = score(model("griffin"), asked, batch_size=2)
    assert relative_error(found, by_definition(model("griffin"), asked)) < FP32_PARITY


def test_interventions_change_the_scores() -> None:
    some = requests()[::5]
    base = score(model("jamba"), some)
    for k in (0, 1):
        found = score(model("jamba"), some, keep_top_heads(k))
        assert max(abs(f[0] - b[0]) for f, b in zip(found, base, strict=True)) > 0.01


def test_a_hook_on_whole_inputs_sees_whole_unpadded_ones() -> None:
    seen: list[tuple[int, ...]] = []

    def centre(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        assert hook.run.query_pos.min() == 0  # no padding, and the beginning is there
        assert hook.run.stage == "prefill"
        seen.append(tuple(resid.shape))
        return resid - resid.mean(1, keepdim=True)

    hooks = [("blocks.1.hook_resid_pre", centre)]
    found = score(model("jamba"), requests(), hooks, batch_size=8)
    n_inputs = len({r.context + r.continuation[:-1] for r in requests()})
    assert sum(shape[0] for shape in seen) == n_inputs
    assert relative_error(found, one_by_one(model("jamba"), hooks)) < FP32_PARITY


def test_what_is_shared_is_read_once() -> None:
    counted: list[int] = []

    @per_position
    def count(embed: torch.Tensor, hook: Any) -> None:
        counted.append(int((hook.run.query_pos >= 0).sum()))

    hooks = [("hook_embed", count)]
    score(model("griffin"), requests(), hooks, 4, shares=False)
    whole = sum(counted)
    counted.clear()
    score(model("griffin"), requests(), hooks, 4)
    contexts = [9, 14, 19]  # each is read once, then its continuations without their last tokens
    choices = sum(contexts) + len(contexts) * (1 + 3 + 2)
    beginning = LONG + 3 - 1  # of the one context that is no more than that, the end is asked about
    family = beginning + (FAMILY + 1) * (1 + 4) + 2
    assert sum(counted) == choices + family < whole


@pytest.mark.parametrize(("marked", "n_logits"), [(True, 3), (False, 8)])
def test_hooks_on_whole_inputs_are_given_all_logits_and_others_those_asked_about(
    marked: bool, n_logits: int
) -> None:
    """Of 6 tokens and a continuation of 3, of which the last is not read."""
    seen: list[int] = []

    def look(logits: torch.Tensor, hook: Any) -> None:
        seen.append(logits.shape[1])

    hooks = [("unembed.hook_logits", per_position(look) if marked else look)]
    score(model("griffin"), [Request((3, 4, 5, 6, 7, 8), (9, 10, 11))], hooks)
    assert seen == [n_logits]


@pytest.mark.parametrize(
    ("n", "n_shared", "is_shared"),
    [(FAMILY, LONG, True), (FAMILY - 1, LONG, False), (FAMILY, LONG - 1, False)],
)
def test_a_beginning_is_shared_from_so_many_contexts_and_tokens_on(
    n: int, n_shared: int, is_shared: bool
) -> None:
    start, counted = tuple(range(3, 3 + n_shared)), []

    @per_position
    def count(embed: torch.Tensor, hook: Any) -> None:
        counted.append(int((hook.run.query_pos >= 0).sum()))

    some = [Request((*start, 20 + i, 40), (5,)) for i in range(n)]
    score(model("griffin"), some, [("hook_embed", count)], 4)
    assert sum(counted) == (n_shared + 2 * n if is_shared else n * (n_shared + 2))


def test_scores_are_reported_one_at_a_time_and_returned_in_order() -> None:
    told: list[int] = []
    found = score(model("griffin"), requests(), batch_size=2, on_scored=told.append)
    assert sum(told) == len(requests()) and len(told) > 3
    backwards = score(model("griffin"), requests()[::-1], batch_size=8)
    assert relative_error(backwards[::-1], found) < FP32_PARITY


def test_auto_halves_its_batches_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, sizes = model("griffin"), []
    forward = HookedHybrid.forward

    def short_of_memory(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(input))
        if len(input) > 2:
            raise MemoryError("no room")
        return forward(self, input, *args, **kwargs)

    wanted = score(tiny, requests(), batch_size=2)
    monkeypatch.setattr(HookedHybrid, "forward", short_of_memory)
    assert relative_error(score(tiny, requests(), batch_size="auto"), wanted) < FP32_PARITY
    assert max(sizes) > 2
    with pytest.raises(MemoryError, match="no room"):
        score(tiny, requests(), batch_size=8)


def test_truncation_keeps_the_end_of_the_context() -> None:
    assert truncate([1, 2, 3], [4, 5], 4) == Request((1, 2, 3), (4, 5))
    assert truncate([1, 2, 3], [4, 5], 3) == Request((2, 3), (4, 5))
    assert truncate([1, 2, 3], [4, 5], 2) == Request((3,), (4, 5))
    with pytest.raises(ValueError, match="does not fit in max_length=1"):
        truncate([1, 2, 3], [4, 5], 1)


def test_bad_requests_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="request 1 has no context or no continuation"):
        score(model("griffin"), [Request((1,), (2,)), Request((1,), ())])
    with pytest.raises(ValueError, match="batch_size=0"):
        score(model("griffin"), requests(), batch_size=0)


# --- forms --------------------------------------------------------------------------------------


def test_forms_name_what_they_keep_and_refuse_what_is_not_there(unchecked: None) -> None:
    cfg = model("griffin").cfg
    assert FORMS["base"].hooks(cfg) == []
    assert form_of(0) is FORMS["ablated"] and form_of(5) is FORMS["sparse"]
    assert form_of(2) == Form("k=2", 2)
    with pytest.raises(ValueError, match=r"k=5: an attention layer has \d heads; give 0 to \d"):
        FORMS["sparse"].hooks(cfg)
    with pytest.raises(ValueError, match="score='peak'"):
        Form("x", 1, "peak").hooks(cfg)  # type: ignore[arg-type]


# --- gaps ---------------------------------------------------------------------------------------


def cell(form: str, documents: list[float]) -> Cell:
    value = sum(documents) / len(documents)
    about: dict[str, Any] = {
        "task": "t",
        "form": form,
        "k": None,
        "main": "acc,none",
        "value": value,
        "stderr": 0.2,
        "higher_is_better": True,
        "n_documents": len(documents),
        "n_fewshot": 0,
        "documents": {str(i): v for i, v in enumerate(documents)},
        "chance": 0.5,
        "metrics": {"acc,none": value, "acc_stderr,none": 0.2},
        "seconds": 1.0,
    }
    return Cell(**about)


def test_gaps_are_taken_document_by_document_where_they_can_be() -> None:
    base, other = cell("base", [1.0, 1.0, 1.0, 0.0]), cell("ablated", [1.0, 0.0, 0.0, 0.0])
    found = gap(base, other)
    assert found.is_paired and found.value == pytest.approx(50)
    assert found.stderr == pytest.approx(100 * (1 / 3) ** 0.5 / 2)  # of 0, 1, 1, 0
    apart = gap(replace(base, documents={}), other)
    assert not apart.is_paired and apart.stderr == pytest.approx(100 * 0.08**0.5)
    assert gap(replace(base, documents={}, stderr=None), other).stderr is None


def test_means_weigh_documents_or_tasks() -> None:
    parts = [Estimate(10.0, 1.0), Estimate(40.0, 2.0)]
    by_documents = mean(parts, [300, 100], "documents")
    assert by_documents.value == pytest.approx(17.5)
    assert by_documents.stderr == pytest.approx((0.75**2 + 0.5**2) ** 0.5)
    assert by_documents.interval is None  # no task has one
    ends = [replace(parts[0], interval=(6.0, 18.0)), replace(parts[1], interval=(28.0, 44.0))]
    by_documents = mean(ends, [300, 100], "documents")  # distances 3 and 3 below, 6 and 1 above
    assert by_documents.interval == pytest.approx((17.5 - 18**0.5, 17.5 + 37**0.5))
    assert mean([ends[0], parts[1]], [1, 1], "tasks").interval is None
    assert mean(parts, [300, 100], "tasks").value == pytest.approx(25)
    assert mean([parts[0], Estimate(1.0, None)], [1, 1], "tasks").stderr is None


def test_the_thesis_benchmarks_are_written_down() -> None:
    glue, mmlu = BENCHMARKS["glue"], BENCHMARKS["mmlu"]
    assert (glue.num_fewshot, mmlu.num_fewshot) == (0, 5) and mmlu.chat and mmlu.multiturn
    assert {form: str(g) for form, g in glue.gaps.items()} == {"sparse": "9.1", "ablated": "6.6"}
    assert {f: str(g) for f, g in mmlu.gaps.items()} == {"sparse": "6.0", "ablated": "about 42"}
    assert all(set(b.gaps) < set(b.forms) <= set(FORMS) for b in BENCHMARKS.values())


def test_cells_are_kept_and_other_experiments_refused(tmp_path: Any) -> None:
    cells = EvaluationCells(tmp_path / "a", {"model": "m"})
    cells.add(cell("base", [1.0, 0.0]))
    again = EvaluationCells(tmp_path / "a", {"model": "m"}, resume=True)
    assert again.get("t", "base") == cell("base", [1.0, 0.0]) and again.get("t", "k=2") is None
    with pytest.raises(FileExistsError, match="--resume"):
        EvaluationCells(tmp_path / "a", {"model": "m"})
    with pytest.raises(ValueError, match="another evaluation: model .*m.* -> .*n"):
        EvaluationCells(tmp_path / "a", {"model": "n"}, resume=True)


# --- conversations ------------------------------------------------------------------------------


def tokenizer(template: str | None) -> CheckpointTokenizer:
    return CheckpointTokenizer(Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), {}, template, {})


GEMMA_LIKE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def test_conversations_are_rendered_or_left_open() -> None:
    turns = [{"role": "user", "content": "Hi "}, {"role": "model", "content": "It is "}]
    assert as_text(tokenizer(GEMMA_LIKE), turns[:1], True) == "<user>Hi <end><model>"
    assert as_text(tokenizer(GEMMA_LIKE), turns, False) == "<user>Hi <end><model>It is"


def test_a_refused_system_message_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert as_text(tokenizer(GEMMA_LIKE), turns, True) == "<user>Hi<end><model>"
    assert "it is left out" in caplog.text
    with pytest.raises(ValueError, match="no chat template"):
        as_text(tokenizer(None), turns, True)
