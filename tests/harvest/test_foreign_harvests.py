"""Harvests and texts of others are data: bare names, plain files, numbers that can be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_hybrid.harvest import HarvestedActivations, read_texts
from hooked_hybrid.harvest.shards import INDEX
from hooked_hybrid.niah.prompts import Haystack
from hooked_hybrid.outputs import foreign
from tests.harvests import many_shards
from tests.runs.test_foreign_results import ESCAPE, everything, within


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    many_shards(folder)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def first(index: dict[str, Any]) -> dict[str, Any]:
    return index["shards"][0]


def hook(index: dict[str, Any]) -> dict[str, Any]:
    return next(iter(index["hooks"].values()))


def test_a_harvest_that_was_not_touched_opens_and_is_whole(out: Path):
    HarvestedActivations(out).verify()


@pytest.mark.parametrize(
    "edit",
    [
        lambda i: first(i).update(file="../out/" + first(i)["file"]),
        lambda i: first(i).update(file="./" + first(i)["file"]),
        lambda i: first(i).update(file="/etc/passwd"),
        lambda i: first(i).update(file=3),
        lambda i: first(i).update(file=i["shards"][1]["file"]),
        lambda i: i["shards"].reverse(),
        lambda i: (first(i).update(tokens=10**13), i.update(tokens=10**13 + i["tokens"])),
        lambda i: (
            first(i).update(tokens=first(i)["tokens"] + 1),
            i.update(tokens=i["tokens"] + 1),
        ),
        lambda i: (first(i).update(tokens=-5), i.update(tokens=i["tokens"] - 5)),
        lambda i: first(i).update(tokens="8"),
        lambda i: (first(i).update(tokens=True), i.update(tokens=i["tokens"] + 1)),
        lambda i: (first(i).update(tokens=1.5), i.update(tokens=1.5)),
        lambda i: first(i).update(bytes=str(first(i)["bytes"])),
        lambda i: first(i).update(sha256=[ESCAPE]),
        lambda i: i.update(shards={}),
        lambda i: i.update(hooks=[]),
        lambda i: i.update(beside=["token"]),
        lambda i: i.update(beside=3),
        lambda i: i.update(recipe=[1]),
        lambda i: hook(i).update(shape=[-1]),
        lambda i: hook(i).update(shape="8"),
        lambda i: hook(i).update(dtype="object"),
        lambda i: hook(i).update(mean_norm="1"),
        lambda i: i["hooks"].update({ESCAPE: hook(i)}),
        lambda i: i.update(format="1"),
        lambda i: i.update(format=True),
    ],
)
def test_an_inconsistent_index_is_an_error(edit: Callable, out: Path):
    edited(out, edit)
    with pytest.raises(ValueError, match=INDEX) as error:
        HarvestedActivations(out)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [b"[" * 10**6, b"[]", b"3", b"null", b"\xff\xfe", b'{"format": 1' + b"0" * 5000 + b"}"],
)
def test_an_index_that_is_no_object_is_refused(content: bytes, out: Path):
    (out / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=INDEX):
        HarvestedActivations(out)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(out: Path):
    harvest = HarvestedActivations(out)
    names = (harvest.paths[0].name, INDEX, "tokens.safetensors", "recipe.json")
    for name in names:
        kept = (out / name).read_bytes()
        (out / name).unlink()
        os.mkfifo(out / name)
        with within(10), pytest.raises(ValueError, match=name):
            HarvestedActivations(out) if name in names[:2] else many_shards(out)
        (out / name).unlink()
        (out / name).write_bytes(kept)
    harvest.verify()


def test_a_header_as_long_as_a_book_is_refused(out: Path):
    path = HarvestedActivations(out).paths[0]
    header = b"{" + b" " * (9 * 2**20) + b"}"
    (path).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    edited(out, lambda i: first(i).update(bytes=path.stat().st_size))
    with pytest.raises(ValueError, match="header of 9,437,186 bytes"):
        HarvestedActivations(out)


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.update(shard="0"),
        lambda h: h.update(n_tokens=True),
        lambda h: h.update(recipe=[]),
        lambda h: h.update(sha256=[]),
        lambda h: h.update(sums=[]),
        lambda h: next(iter(h["sums"].values())).update(norm="1"),
        lambda h: h.update(more=1),
        lambda h: h.update(sums="[" * 10**5),
    ],
)
def test_an_inconsistent_header_of_a_shard_is_an_error(edit: Callable, out: Path):
    from safetensors import safe_open

    path = HarvestedActivations(out).paths[0]
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["harvest"])
    edit(said)
    save_file(load_file(path), path, {"harvest": json.dumps(said)})
    edited(out, lambda i: first(i).update(bytes=path.stat().st_size))
    with pytest.raises(ValueError, match="not a whole shard"):
        HarvestedActivations(out)


def test_a_header_too_deep_to_read_is_refused(out: Path):
    path = HarvestedActivations(out).paths[0]
    save_file(load_file(path), path, {"harvest": "[" * 10**6})
    edited(out, lambda i: first(i).update(bytes=path.stat().st_size))
    with pytest.raises(ValueError, match="not a whole shard"):
        HarvestedActivations(out)


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (torch.zeros(9), torch.tensor([0, 9])),
        (torch.zeros(9, dtype=torch.int32), torch.tensor([0, 10**13])),
        (torch.zeros(9, dtype=torch.int32), torch.tensor([-3, 9])),
        (torch.zeros(9, dtype=torch.int32), torch.tensor([0, 5, 3, 9])),
        (torch.zeros(9, dtype=torch.int32), torch.tensor([0.0, 9.0])),
        (torch.zeros(3, 3, dtype=torch.int32), torch.tensor([0, 9])),
        (torch.zeros(9, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)),
        (torch.full((9,), 10**6, dtype=torch.int32), torch.tensor([0, 9])),
    ],
)
def test_tokens_that_are_none_are_refused_before_anything_is_read(
    tokens: torch.Tensor, starts: torch.Tensor, out: Path
):
    import hashlib

    from safetensors import safe_open

    path = out / "tokens.safetensors"
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["documents"])
    found = hashlib.sha256(tokens.numpy().data)
    found.update(starts.numpy().data)
    said["sha256"] = found.hexdigest()
    save_file({"tokens": tokens, "starts": starts}, path, {"documents": json.dumps(said)})
    before = everything(out)
    with pytest.raises(ValueError, match="tokens.safetensors is damaged"):
        many_shards(out)
    assert everything(out) == before


def test_what_others_left_is_still_there_after_a_harvest(tmp_path: Path):
    """In a folder that held no harvest, what looks like a file of safetensors may be another's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmpAbCd12").write_text("mine")
    many_shards(tmp_path / "out")
    assert (tmp_path / "out" / ".tmpAbCd12").read_text() == "mine"


def test_a_recipe_of_others_is_quoted_such_that_a_terminal_shows_it(out: Path):
    path = out / "recipe.json"
    said = json.loads(path.read_text()) | {"dtype": ESCAPE}
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="holds another harvest") as error:
        many_shards(out)
    assert str(error.value).isprintable()


# --- texts ----------------------------------------------------------------------------------------


def saved(folder: Path, columns: dict[str, Any], features: Any = None) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return folder


def test_a_data_set_with_pictures_opens_no_picture(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    secret = tmp_path / "secret.png"
    os.mkfifo(secret)  # opening it never ends
    paths = ["http://127.0.0.1:9/x.png", str(secret)]
    columns = {"text": ["one", "two"], "image": [{"bytes": None, "path": path} for path in paths]}
    kinds = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"text": datasets.Value("string"), "image": kinds})
    folder = saved(tmp_path / "set", columns, features)
    about = json.loads((folder / "dataset_info.json").read_text())
    about["features"]["image"] = {"_type": "Image"}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    with within(30):
        assert list(read_texts(folder)) == ["one", "two"]
        with pytest.raises(ValueError, match="no text in the field 'image'"):
            list(read_texts(folder, "image"))


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/passwd", "a/b.arrow", 3, None, "", ".."])
def test_a_data_set_that_names_files_elsewhere_is_refused(name: object, tmp_path: Path):
    folder = saved(tmp_path / "set", {"text": ["one"]})
    shutil.copy(folder / "data-00000-of-00001.arrow", tmp_path / "other.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="state.json"):
        list(read_texts(folder))


@pytest.mark.parametrize("content", ["[]", "{}", "[" * 10**5, '{"_data_files": 3}', ""])
def test_a_data_set_with_an_invalid_state_is_an_error(content: str, tmp_path: Path):
    folder = saved(tmp_path / "set", {"text": ["one"]})
    (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json"):
        list(read_texts(folder))


def test_damaged_columns_are_refused_and_crash_nothing(tmp_path: Path):
    folder = saved(tmp_path / "set", {"text": [f"text {i}" for i in range(200)]})
    path = folder / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        changed = bytearray(whole)
        changed[at : at + 4] = b"\xff\xff\xff\x7f"
        path.write_bytes(changed)
        try:
            assert all(isinstance(text, str) for text in read_texts(folder))
        except ValueError as error:
            assert "texts " in str(error)


def test_a_document_longer_than_any_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)  # sparse
    for read in (lambda path: list(read_texts(path)), Haystack.read):
        with pytest.raises(ValueError, match=r"a\.txt has over 1,073,741,824 bytes .*split it"):
            read(tmp_path / "a.txt")
    monkeypatch.setattr(foreign, "LARGEST_TEXT", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + "a" * 100 + '"}\n')
    documents = read_texts(tmp_path / "a.jsonl")
    assert next(documents) == "one"
    with pytest.raises(ValueError, match=r"a\.jsonl has over 100 bytes"):
        next(documents)


def test_a_document_from_a_pipe_is_read_and_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def piped(text: str) -> str:
        os.mkfifo(path := tmp_path / f"{len(text)}.txt")
        with ThreadPoolExecutor() as pool:
            pool.submit(path.write_text, text)
            return foreign.read_text(path)

    monkeypatch.setattr(foreign, "LARGEST_TEXT", 100)
    assert piped("a" * 100) == "a" * 100
    with pytest.raises(ValueError, match="has over 100 bytes"):
        piped("a" * 101)


@pytest.mark.parametrize("line", ["[" * 10**5, '{"a": ' * 10**4, '{"\\u001b[31m": 1}', "[1]"])
def test_a_line_that_is_no_document_is_refused(line: str, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2") as error:
        list(read_texts(tmp_path / "a.jsonl"))
    assert str(error.value).isprintable()
