"""Harvested activations: what is written, from which documents, and the command."""

import json
import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hooked_hybrid import interventions
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.harvest import HarvestedActivations, harvest, read_texts
from hooked_hybrid.harvest.contexts import PackingPlan
from hooked_hybrid.harvest.documents import Documents
from hooked_hybrid.harvest.running import hooks_to_keep
from hooked_hybrid.hooks.names import HookNameError
from tests.harvests import (
    CONTEXT,
    LENGTHS,
    RESID,
    alone,
    documents_of,
    model_named,
    packaged,
    rows_of,
)
from tests.models import D_VOCAB, relative, tiny_model
from tests.tolerances import FP32_PARITY


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_every_hook_point_is_what_each_context_gives_alone(tmp_path, name):
    model = model_named(name)
    harvested = harvest(
        model,
        documents_of(),
        "*",
        tmp_path / "out",
        context_length=CONTEXT,
        batch_size=2,
        verbose=False,
    )
    has_rows = [n for n, point in model.hook_dict.items() if "key" not in point.axes]
    assert harvested.names == has_rows
    written, wanted = rows_of(harvested), alone(model, has_rows)
    for point in has_rows:
        assert written[point].dtype == wanted[point].dtype
        assert (
            written[point].shape == wanted[point].shape == (sum(LENGTHS), *wanted[point].shape[1:])
        )
        assert relative(written[point].double(), wanted[point].double()) < FP32_PARITY, point


def test_beside_each_row_stand_its_token_document_and_position(tmp_path):
    documents = documents_of()
    harvested = harvest(
        model_named(), documents, "hook_embed", tmp_path / "out", context_length=4, verbose=False
    )
    rows = rows_of(harvested)
    assert rows["token"].tolist() == torch.cat(documents).tolist()
    assert rows["document"].tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert rows["position"].tolist() == [p for n in LENGTHS for p in range(n)]


@pytest.mark.parametrize("drop", [True, False])
def test_bos_begins_every_context_and_special_rows_are_left_out(tmp_path, drop):
    model, text = packaged(), "The best thing to do in Dover is read a book ."
    ids = model.text.encode(text, prepend_bos=False)
    bos, eos = model.text.bos, model.text.eos[0]
    documents = [torch.tensor([bos, *ids, eos])]
    harvested = harvest(
        model,
        documents,
        "blocks.0.hook_resid_post",
        tmp_path / "out",
        context_length=5,
        prepend_bos=True,
        drop_special=drop,
        verbose=False,
    )
    rows, position = rows_of(harvested), list(range(len(ids) + 1))
    wanted = [([bos] if not drop else []) + [*ids, eos][i : i + 4] for i in position[::4]]
    flat = [token for context in wanted for token in context if not (drop and token == eos)]
    assert rows["token"].tolist() == flat
    assert [p for p in rows["position"].tolist() if p >= 0] == position[: len(ids) + (not drop)]
    with torch.no_grad():
        second = model(torch.tensor([[bos, *ids[4:8]]]), None, stop_at_layer=1)[0, 1:]
    start = rows["position"].tolist().index(4)
    got = rows["blocks.0.hook_resid_post"][start : start + 4]
    assert relative(got, second) < FP32_PARITY


def test_texts_are_read_as_the_model_was_trained(tmp_path):
    model, texts = packaged(), ["A cat can see a dog .", "", "Dover is a city ."]
    harvested = harvest(model, texts, "hook_embed", tmp_path / "out", verbose=False)
    rows = rows_of(harvested)
    for i, text in enumerate(texts):
        here = rows["document"] == i
        assert rows["token"][here].tolist() == model.text.encode(text, prepend_bos=False)
    assert harvested.index["recipe"]["bos"] == model.text.bos


def test_the_forward_ends_after_the_last_layer_that_is_needed(tmp_path):
    def boom(value, hook):
        raise RuntimeError("ran")

    model, hooks = model_named(), [("blocks.2.hook_resid_pre", boom)]
    settings = {"fwd_hooks": hooks, "verbose": False}
    harvest(model, documents_of(), "blocks.1.hook_resid_post", tmp_path / "a", **settings)
    with pytest.raises(RuntimeError, match="ran"):
        harvest(model, documents_of(), "blocks.2.hook_resid_post", tmp_path / "b", **settings)
    assert not model.list_hooks()


def centred(value: Tensor, hook) -> Tensor:
    """Take off the mean over a row's tokens: padding must not count."""
    real = (hook.run.query_pos >= 0)[..., None]
    return value - (value * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "hooks",
    [
        tuple(interventions.keep_top_heads(1)),
        (("blocks.0.hook_resid_post", centred),),
    ],
    ids=["per position", "over the row"],
)
def test_interventions_act_as_on_each_context_alone(tmp_path, hooks):
    model, names = model_named(), [f"blocks.{i}.hook_resid_post" for i in range(4)]
    settings = {"context_length": CONTEXT, "verbose": False, "fwd_hooks": hooks}
    harvested = harvest(model, documents_of(), RESID, tmp_path / "out", **settings)
    written, wanted, plain = rows_of(harvested), alone(model, names, hooks), alone(model, names)
    for name in names:
        assert relative(written[name], wanted[name]) < FP32_PARITY, name
    assert relative(written[names[-1]], plain[names[-1]]) > 1e-3
    assert not model.list_hooks()


def test_the_index_has_what_trainers_normalise_with(tmp_path):
    name = "blocks.1.hook_resid_post"
    harvested = harvest(
        model_named(),
        documents_of(),
        [name, "blocks.0.hook_resid_post"],
        tmp_path / "out",
        context_length=CONTEXT,
        shard_bytes=4000,
        verbose=False,
    )
    assert len(harvested.paths) > 3
    norms = rows_of(harvested)[name].double().norm(dim=1)
    said = harvested.index["hooks"][name]
    assert said["mean_norm"] == pytest.approx(float(norms.mean()), rel=1e-6)
    assert said["mean_squared_norm"] == pytest.approx(float(norms.square().mean()), rel=1e-6)
    assert (said["dtype"], said["shape"]) == ("float32", [24])
    assert [shard["bytes"] for shard in harvested.index["shards"]] == [
        path.stat().st_size for path in harvested.paths
    ]
    row = 2 * 24 * 4 + 3 * 4
    assert all(shard["tokens"] * row <= 4000 for shard in harvested.index["shards"])
    harvested.verify()


def test_the_dtype_is_that_asked_for_and_too_large_values_are_refused(tmp_path):
    model, name = model_named(), "blocks.1.hook_resid_post"
    harvested = harvest(
        model, documents_of(), name, tmp_path / "a", dtype="bfloat16", verbose=False
    )
    wanted = harvest(model, documents_of(), name, tmp_path / "b", verbose=False)
    assert torch.equal(rows_of(harvested)[name], rows_of(wanted)[name].bfloat16())
    huge = [("blocks.0.hook_resid_post", lambda value, hook: value * 1e6)]
    with pytest.raises(
        ValueError, match=r"hook_resid_post has values in document 5 up to .*too large"
    ):
        harvest(
            model, documents_of(), RESID, tmp_path / "c", dtype="float16", fwd_hooks=huge,
            verbose=False,
        )  # fmt: skip
    nan = [("blocks.0.hook_resid_post", lambda value, hook: value * torch.nan)]
    with pytest.raises(ValueError, match="not finite: check the model"):
        harvest(model, documents_of(), RESID, tmp_path / "d", fwd_hooks=nan, verbose=False)
    model = tiny_model(seed=9)
    with torch.no_grad():
        model.embed.W_E[5] = torch.nan
    documents = [[3, 4], [6, 7, 8, 9, 10], [4, 5]]  # the longest are run first
    with pytest.raises(ValueError, match="hook_embed has values in document 2 that are not finite"):
        harvest(model, documents, "hook_embed", tmp_path / "e", verbose=False)
    for folder in ("c", "d", "e"):
        assert not list((tmp_path / folder).glob("shard*"))


def test_a_seed_puts_contexts_in_random_order(tmp_path):
    found = {}
    for seed in (None, 0, 1):
        settings = {"context_length": 4, "seed": seed, "verbose": False}
        harvested = harvest(
            model_named(), documents_of(), "hook_embed", tmp_path / f"{seed}", **settings
        )
        rows = rows_of(harvested)
        found[seed] = list(zip(rows["document"].tolist(), rows["position"].tolist(), strict=True))
    assert found[None] == sorted(found[None])
    assert found[None] != found[0] != found[1] != found[None]
    assert Counter(found[None]) == Counter(found[0]) == Counter(found[1])


def test_names_are_patterns_lists_and_predicates():
    model = model_named()
    assert hooks_to_keep(model, "blocks.[01].hook_resid_post") == [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    ]
    assert hooks_to_keep(model, ["blocks.1.hook_mlp_out", "hook_embed"]) == [
        "hook_embed",
        "blocks.1.hook_mlp_out",
    ]
    assert "blocks.2.attn.hook_z" in hooks_to_keep(model, lambda name: ".attn." in name)
    assert not any("pattern" in name for name in hooks_to_keep(model, "blocks.2.*"))
    with pytest.raises(HookNameError, match="no hook point with a row for each token fits 'blok"):
        hooks_to_keep(model, "blok.*")
    with pytest.raises(HookNameError, match="the nearest are"):
        hooks_to_keep(model, "blocks.1.hook_resid_pst")
    with pytest.raises(ValueError, match=r"axes \[batch head query key\], no row for each token"):
        hooks_to_keep(model, "blocks.2.attn.hook_pattern")


def test_texts_of_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntext")
    lines = [{"text": "first"}, {"text": "second", "id": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    (tmp_path / "c.csv").write_text("left out")
    assert list(read_texts(tmp_path)) == ["first", "second", "one\ntext"]
    assert list(read_texts(tmp_path / "b.txt")) == ["one\ntext"]
    for make, match in (
        (lambda: read_texts(tmp_path / "none"), "no such file or folder"),
        (lambda: read_texts(tmp_path / "c.csv"), "give a .txt or .jsonl file"),
        (lambda: list(read_texts(tmp_path / "a.jsonl", "body")), "line 1: no text in the field"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is not JSON"):
        list(read_texts(tmp_path / "a.jsonl"))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="b.txt is not UTF-8"):
        list(read_texts(tmp_path / "b.txt"))


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    assert list(read_texts(tmp_path)) == ["one", "two"]


def test_a_text_that_is_no_unicode_is_named_before_work(tmp_path):
    with pytest.raises(ValueError, match="document 1: .* surrogates not allowed"):
        harvest(packaged(), ["A cat .", "a \ud800"], "hook_embed", tmp_path / "out", verbose=False)
    assert not (tmp_path / "out").exists()


def test_documents_without_a_token_give_no_rows(tmp_path):
    documents = [[], [3, 4], [], torch.tensor([], dtype=torch.long), [5]]
    harvested = harvest(model_named(), documents, "hook_embed", tmp_path / "out", verbose=False)
    assert rows_of(harvested)["document"].tolist() == [1, 1, 4]


def test_texts_of_a_saved_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"body": ["one", "two"]})
    saved.save_to_disk(str(tmp_path / "set"))
    assert list(read_texts(tmp_path / "set", "body")) == ["one", "two"]
    with pytest.raises(ValueError, match="row 0: no text in the field 'text'; it has body"):
        list(read_texts(tmp_path / "set"))
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "sets"))
    with pytest.raises(ValueError, match="has parts: give the folder of one, test, train"):
        read_texts(tmp_path / "sets")
    monkeypatch.setattr("hooked_hybrid.harvest.texts.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_texts(tmp_path / "set")


@pytest.mark.parametrize(
    ("documents", "changes", "match"),
    [
        ("a text", {}, "documents is one text: give a list"),
        ([], {}, "there are no documents"),
        ([torch.tensor([], dtype=torch.long)], {}, "there is no token in the 1 documents"),
        ([[3, D_VOCAB]], {}, f"document 0: tokens from 3 to {D_VOCAB}, but the model's go from 0"),
        ([[3, 2**40]], {}, "document 0: tokens from 3 to 1099511627776, but"),
        ([[3, 4], [3.5]], {}, r"document 1: .* a text or a row of tokens, not list \[3.5\]"),
        ([["a", "b"]], {}, r"a row of tokens, not list \['a', 'b'\]"),
        ([{"text": "a"}], {}, "a row of tokens, not dict {'text': 'a'}"),
        ([torch.tensor([True, False])], {}, "a row of tokens, not Tensor"),
        (torch.tensor([3, 4]), {}, "a row of tokens, not Tensor"),
        ([[3, 4], "text"], {}, "texts and rows of tokens are mixed"),
        (["text"], {}, "no tokenizer"),
        ([[3, 4]], {"context_length": 0}, "context_length=0: give 1 or more"),
        ([[3, 4]], {"context_length": 7.5}, "context_length=7.5: give a whole number"),
        ([[3, 4]], {"batch_size": True}, "batch_size=True: give a whole number"),
        ([[3, 4]], {"seed": 1.5}, "seed=1.5: give a whole number"),
        ([[3, 4]], {"batch_size": -1}, "batch_size=-1"),
        ([[3, 4]], {"dtype": torch.float64}, "give 'float32', 'bfloat16' or 'float16'"),
        ([[3, 4]], {"dtype": "fp16"}, "dtype=fp16: give 'float32', 'bfloat16' or 'float16'"),
        ([[3, 4]], {"seed": 2**70}, "give .* 64 bits"),
        ([[3, 4]], {"prepend_bos": True, "context_length": 1}, "no room after BOS"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_work(tmp_path, unchecked, documents, changes, match):
    with pytest.raises(ValueError, match=match):
        harvest(model_named(), documents, "hook_embed", tmp_path / "out", verbose=False, **changes)
    assert not (tmp_path / "out").exists()


def test_a_padded_row_is_refused_for_its_padding_would_be_read(tmp_path):
    model = packaged()
    texts = ["the old man can see the river", "the sea"]
    for side in ("left", "right"):
        tokens, mask = model.to_tokens(texts, padding_side=side, return_mask=True)
        with pytest.raises(ValueError, match=r"document 1: it begins or ends with the padding"):
            harvest(model, tokens, "hook_embed", tmp_path / side, verbose=False)
    cut = [row[kept.bool()] for row, kept in zip(tokens, mask, strict=True)]
    name = "blocks.5.hook_resid_post"
    found = rows_of(harvest(model, cut, name, tmp_path / "cut", verbose=False))[name]
    wanted = [model.run_with_cache(row[None], names_filter=name)[1][name][0, 1:] for row in cut]
    assert relative(found, torch.cat(wanted)) < FP32_PARITY


def test_nothing_to_keep_is_no_name(unchecked):
    with pytest.raises(ValueError, match="names_filter=None: give the hook points"):
        hooks_to_keep(packaged(), None)


def test_a_field_that_is_no_text_is_not_called_missing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 5}')
    with pytest.raises(ValueError, match="line 1: the field 'text' holds 5, which is not text"):
        list(read_texts(tmp_path / "a.jsonl"))


def test_a_plan_holds_every_token_once_and_keeps_to_its_sizes():
    draw = random.Random(0)
    for seed in range(30):
        lengths = [draw.randint(0, 40) for _ in range(draw.randint(1, 12))] + [1]
        tokens = torch.cat([torch.randint(0, 9, (n,)) for n in lengths]).int()
        starts = torch.tensor([0, *lengths]).cumsum(0)
        left_out = tuple(draw.sample(range(9), draw.randint(0, 3)))
        kept = ~torch.isin(tokens, torch.tensor(left_out, dtype=torch.int32))
        if not kept.any():
            continue
        bos, room = draw.choice([None, 10]), draw.randint(2, 30)
        plan = PackingPlan(
            Documents(tokens, starts, "", "", ""), 7, room, 20, bos, left_out,
            draw.choice([None, seed]),
        )  # fmt: skip
        found = []
        for shard in range(plan.n_shards):
            beside = plan.beside(shard)
            assert len(beside.token) == plan.n_rows(shard)
            assert plan.n_rows(shard) <= room or len(plan.contexts(shard)) == 1
            read = torch.full((plan.n_rows(shard),), -1)
            for batch in plan.batches(shard):
                assert batch.tokens.numel() <= 20 or len(batch.tokens) == 1
                assert batch.tokens.shape[1] <= 7
                assert bool((read[batch.rows] == -1).all())
                read[batch.rows] = batch.tokens[batch.is_kept]
            assert torch.equal(read, beside.token.long())
            columns = (beside.document, beside.position, beside.token)
            found += list(zip(*(column.tolist() for column in columns), strict=True))
        own = [row for row in found if row[1] >= 0]
        assert sorted(own) == [
            (d, p, int(tokens[starts[d] + p]))
            for d, n in enumerate(lengths)
            for p in range(n)
            if kept[starts[d] + p]
        ]
        assert (len(found) > len(own)) == (bos is not None)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_harvests_and_says_what_is_wrong(tmp_path):
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out"
    texts.write_text(
        "".join(json.dumps({"body": "A cat can see a dog ."}) + "\n" for _ in range(5))
    )
    given = ["harvest", "--texts", str(texts), "--field", "body", "--n-documents", "3", "--out"]
    run = CliRunner().invoke(
        build_app(), [*given, str(out), "--hook", "blocks.*.hook_mlp_out", "--hook", "hook_embed",
        "--write", "bfloat16", "--k", "1", "--threads", "1"]
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    harvested = HarvestedActivations(out)
    n_tokens = 3 * len(packaged().text.encode("A cat can see a dog .", prepend_bos=False))
    assert f"{n_tokens} tokens in 1 shards" in run.output
    assert harvested.names == ["hook_embed", *(f"blocks.{i}.hook_mlp_out" for i in range(6))]
    assert rows_of(harvested)["hook_embed"].dtype == torch.bfloat16
    wrong = CliRunner().invoke(build_app(), [*given, str(tmp_path / "b"), "--hook", "hook_embd"])
    assert wrong.exit_code == 1
    assert "error: --hook: no hook point is named 'hook_embd'" in wrong.output
    assert not (tmp_path / "b").exists()
