"""The recall task, its training and the map: right by construction, resumed without a trace."""

import json

import pytest
import torch

from experiments.recall import map as recall_map
from experiments.recall.map import Cell, Found, boundary, grid, read_all, todo
from experiments.recall.map_page import picture, write
from experiments.recall.score import Score, answered, scores
from experiments.recall.task import ASK, BOS, Task, draw, drill
from experiments.recall.train import Training, TrainingRecipe, levels_of, small_config, train
from hooked_hybrid import HookedHybrid

TASK = Task(48, 4)


def test_the_same_seed_draws_the_same_batch_and_another_draws_another():
    one, same, other = draw(TASK, 8, 3), draw(TASK, 8, 3), draw(TASK, 8, 4)
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("task", [TASK, Task(14, 3), Task(64, 1), Task(200, 16, n_questions=3)])
def test_every_question_has_its_fact_once_and_its_answer(task):
    batch = draw(task, 32, 0)
    assert batch.tokens.shape == (32, task.length)
    for row, tokens in enumerate(batch.tokens.tolist()):
        assert tokens[0] == BOS and tokens[1 + task.room] == ASK
        facts = {tokens[p]: (p, tokens[p + 1]) for p in batch.keys[row].tolist()}
        assert len(facts) == task.n_facts  # keys differ, no pair stands over another
        body = tokens[: 1 + task.room]
        assert all(body.count(key) == 1 for key in facts)
        assert all(task.first_value <= value < task.first_value + 16 for _, value in facts.values())
        for at, answer, distance in zip(
            batch.questions.tolist(), batch.answers[row], batch.distances[row], strict=True
        ):
            where, value = facts[tokens[at]]
            assert value == tokens[at + 1] == int(answer)
            assert distance == at - where - 1


def test_facts_occur_at_every_place():
    """Every arrangement is equally likely: first and last places are used as often as others."""
    task = Task(20, 2)
    places = draw(task, 4000, 0).keys
    counts = torch.bincount(places.flatten(), minlength=task.room + 1)[1 : task.room]
    # One of the two pairs begins at either end with odds 2 / 13, elsewhere less often.
    assert counts.min() > 0.7 * counts.float().mean()
    assert counts[0] / 4000 == pytest.approx(2 / (task.room - 2), rel=0.15)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((48, 0), "n_facts=0"),
        ((48, 33), "give 1 to 32 facts"),
        ((48, 2, 3), "at most as many questions"),
        ((17, 4), "give at least 18"),
    ],
)
def test_what_does_not_fit_is_an_error(sizes, words):
    with pytest.raises(ValueError, match=words):
        Task(*sizes)


def test_drills_ask_for_what_stood_there():
    found = drill(TASK, 16, 12, 0)
    for tokens, asked in zip(found.tokens.tolist(), found.asked.tolist(), strict=True):
        seen: dict[int, int] = {}
        for pair in range(12):
            key, value = tokens[2 * pair : 2 * pair + 2]
            assert asked[pair] == (key in seen)
            assert seen.setdefault(key, value) == value
        assert len(seen) <= TASK.n_facts


def test_levels_end_with_the_task_and_have_room():
    assert [t.length for t in levels_of(Task(256, 4))] == [32, 64, 128, 256]
    assert [t.length for t in levels_of(Task(64, 16))] == [64]
    assert all(t.n_facts == 8 for t in levels_of(Task(256, 8)))


def test_an_untrained_model_is_at_chance_and_a_reader_of_answers_is_not():
    model = HookedHybrid(small_config("MAM", TASK))
    found = scores(model, TASK, n=64)
    assert set(found) == {"whole", "no attention", "no memory"}
    assert found["whole"].accuracy < 0.25
    batch = draw(TASK, 64, 0)

    def read_the_answer(logits, hook):
        told = torch.zeros_like(logits)
        told[:, :-1] = torch.nn.functional.one_hot(batch.tokens[:, 1:], logits.shape[2])
        return told

    assert answered(model, batch, [("unembed.hook_logits", read_the_answer)]).all()


def test_a_stopped_training_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.recall.train.EVERY", 2)
    cfg, recipe = (
        small_config("MAM", TASK, d_model=8),
        TrainingRecipe(steps=6, tokens=256, patience=2),
    )
    whole = train(cfg, TASK, recipe, tmp_path / "whole", keep=[0, 4, 6])
    seen = []

    def stop(run, save=Training.save):
        seen.append(run)
        if len(seen) == 2:
            raise KeyboardInterrupt
        save(run)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(Training, "save", stop)
        train(cfg, TASK, recipe, tmp_path / "cut", keep=[0, 4, 6])
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    again = train(cfg, TASK, recipe, tmp_path / "cut", keep=[0, 4, 6])
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert {p.name for p in (tmp_path / "cut").glob("step-*")} == {
        "step-0.pt",
        "step-4.pt",
        "step-6.pt",
    }
    for name in ("whole", "cut"):  # the line of step 4 was written, its checkpoint was not
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [2, 4, 6]
    with pytest.raises(ValueError, match="another recipe"):
        train(cfg, TASK, TrainingRecipe(steps=7, tokens=256), tmp_path / "cut")


def found_at(place, lean, whole=1.0, seed=0):
    """Return what a cell that loses as much as `lean` says would score."""
    without = {"no attention": whole - max(lean, 0), "no memory": whole + min(lean, 0)}
    return Found(
        Cell(*place, seed), {n: Score(a, 0.01) for n, a in {"whole": whole, **without}.items()}, 1.0
    )


def test_lean_tells_the_sides_apart():
    place = grid()[0]
    assert found_at(place, 0.9).lean == 1
    assert found_at(place, -0.9).lean == -1
    both = Found(
        Cell(*place, 0),
        {"whole": Score(1, 0), "no attention": Score(0.2, 0), "no memory": Score(0.2, 0)},
        1.0,
    )
    assert both.lean == 0
    assert not found_at(place, 0.1, whole=0.7).learned


def test_more_seeds_go_to_the_boundary_only():
    places = sorted(grid())
    states = sorted({p[0] for p in places})
    found = [found_at(p, -0.9 if p[0] == states[-1] else 0.9) for p in places]
    at = boundary(found)
    assert {p[0] for p in at} == set(states[-2:])  # the largest lie opposite to the next
    assert {c.place for c in todo(found)} == set(at)
    assert {c.seed for c in todo(found)} == {1, 2}
    assert [c.place for c in todo(found[:-1])] == [places[-1]]  # one seed everywhere comes first
    assert not boundary([found_at(p, 0.95) for p in places])


def test_a_cell_is_run_once_and_the_page_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(recall_map, "STEPS", 2)
    cell = Cell(4, 2, 64, 0, 0)
    found = recall_map.run_cell(cell, tmp_path)
    assert read_all(tmp_path) == [found]
    assert not (tmp_path / cell.name).exists()

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(recall_map, "train", fail)
    assert recall_map.run_cell(cell, tmp_path) == found
    page = tmp_path / "page.md"
    mark = "<!-- measured: elsewhere map | a command | 1a2b3c4 -->"
    page.write_text(f"before\n{mark}\nold\n<!-- end -->\nafter\n")
    write([found, found_at((1, 4, 64, 0), 0.9), found_at((16, 4, 64, 0), -0.9)], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 64 | 0 | 4 | 1024 | 0 | 100.0% ± 1.0% |" in text
    assert (tmp_path / "images" / "recall_map.png").stat().st_size > 5000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="0 blocks elsewhere 'map'"):
        write([found], page)


def test_cells_trained_otherwise_are_refused(tmp_path, monkeypatch):
    recall_map.check_folder(tmp_path)
    recall_map.check_folder(tmp_path)
    for name, value in (("D_INNER", 32), ("STEPS", 900), ("PATTERN", "MA")):
        with monkeypatch.context() as patch:
            patch.setattr(recall_map, name, value)
            with pytest.raises(ValueError, match="cells of another training"):
                recall_map.check_folder(tmp_path)


def test_the_picture_says_what_each_cell_scores():
    place = (16, 8, 64, 0)
    seeds = [found_at(place, 0.8), found_at(place, 0.3, whole=0.5, seed=1)]
    figure = picture([found_at((1, 4, 64, 0), 0.9), found_at((4, 4, 64, 0), 0.1, 0.5), *seeds])
    words = [text.get_text() for text in figure.axes[0].texts]
    assert any("no attention 10%" in w for w in words)
    assert any("not learned\n(50%)" in w for w in words)
    assert any("no attention 20%" in w and "1 of 2 seeds" in w for w in words)
