"""Checkpoints, tokenizers, templates, caches and configs of others are data, of bounded size."""

from __future__ import annotations

import base64
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers

from hooked_hybrid import ActivationCache, HookedHybrid
from hooked_hybrid.accounting.configs import config_of
from hooked_hybrid.commands.run_options import device_map_of
from hooked_hybrid.evaluation.cells import EvaluationCells
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.niah.needles import load_needles
from hooked_hybrid.outputs.foreign import DEEPEST, one_line, parse_json, printable, read_json
from hooked_hybrid.papers.recipe import recorded_include_path
from hooked_hybrid.presets.packaged import packaged_models
from hooked_hybrid.text.chat import render_chat
from hooked_hybrid.text.sentencepiece_file import read_sentencepiece
from hooked_hybrid.text.tokenizer import read_tokenizer
from tests.runs.test_foreign_results import ESCAPE, within
from tests.stores import EXPERIMENT, evaluated
from weights_conversion.errors import CheckpointError
from weights_conversion.json_files import LARGEST_CONFIG
from weights_conversion.json_files import read_json as read_object
from weights_conversion.torch_files import read_torch_file

DEEP = "[" * 100_000


# --- text and JSON --------------------------------------------------------------------------------


def test_what_a_terminal_obeys_is_shown_and_the_rest_stays():
    obeyed = "\x1b[31m\x07\r\x00\x7f\x9b\u202e\u2066\u2028\ud800"
    shown = printable(obeyed)
    assert shown == r"\x1b[31m\x07\x0d\x00\x7f\x9b\u202e\u2066\u2028\ud800"
    kept = "plain\ttext\nin two lines, ÄÖ 漢字 ▁ 🙂"
    assert printable(kept) == kept
    assert one_line("a\n b\x1b" + "c" * 300, 10) == "a b\\x1b..." and one_line(3) == "3"


def test_json_is_read_to_a_depth_and_a_size(tmp_path: Path):
    assert parse_json('{"a": [1, {"b": null}]}', "x") == {"a": [1, {"b": None}]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")
    for text in (DEEP, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "{", "1" * 5000, b"\xff"):
        with pytest.raises(ValueError, match="x is no"):
            parse_json(text, "x")
    (tmp_path / "big.json").write_text(" " * 100 + "1")
    with pytest.raises(ValueError, match="has 101 bytes, more than 100"):
        read_json(tmp_path / "big.json", 100)
    os.mkfifo(tmp_path / "pipe.json")
    with within(5), pytest.raises(ValueError, match="not a plain file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def readers_of_json(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Return every reader of a JSON file that may be another's: its file, and a call of it."""
    model = Path(shutil.copytree(packaged_models()["tiny-griffin"], folder / "model"))
    evaluated(folder / "eval")
    (folder / "r").mkdir()
    load: Callable[[], object] = lambda: HookedHybrid.from_pretrained(model)  # noqa: E731
    cells: Callable[[], object] = lambda: EvaluationCells(folder / "eval", EXPERIMENT, resume=True)  # noqa: E731
    return {
        "config": (model / "config.json", load),
        "generation config": (model / "generation_config.json", load),
        "index": (
            model / "model.safetensors.index.json",
            lambda: read_object(model / "model.safetensors.index.json", LARGEST_CONFIG),
        ),
        "tokenizer": (model / "tokenizer.json", lambda: read_tokenizer(model)),
        "settings": (model / "tokenizer_config.json", lambda: read_tokenizer(model)),
        "accounting": (folder / "a.json", lambda: config_of(folder / "a.json")),
        "needles": (folder / "n.json", lambda: load_needles(folder / "n.json")),
        "device map": (folder / "d.json", lambda: device_map_of(str(folder / "d.json"))),
        "evaluation": (folder / "eval" / "evaluation.json", cells),
        "calls": (folder / "eval" / "calls.json", cells),
        "cell": (folder / "eval" / "cells" / "t--base.json", cells),
        "recipe": (folder / "r" / "recipe.json", lambda: recorded_include_path(folder / "r")),
    }


MAY_BE_PIPES = ("config", "generation config", "needles", "device map")
"""The first two are then as if they were not there, the others are what the user typed."""
CONTENTS = (DEEP.encode(), b"{" + b'"a": {' * 300, b"\xff\xfe", b'{"\x1b": }', b"9" * 5000)


def test_every_reader_of_json_refuses_what_is_none_with_one_kind_of_error(tmp_path: Path):
    for name, (path, read) in readers_of_json(tmp_path).items():
        kept = path.read_bytes() if path.exists() else None
        for content in CONTENTS:
            path.write_bytes(content)
            with pytest.raises(ValueError) as error:
                read()
            assert str(error.value).isprintable(), name
        path.unlink()
        os.mkfifo(path)
        if name in MAY_BE_PIPES:
            path.unlink()
        else:
            with within(20), pytest.raises(ValueError):
                read()
            path.unlink()
        if kept is not None:
            path.write_bytes(kept)


@pytest.mark.parametrize(
    "change",
    [
        {"task": 3},
        {"form": ["base"]},
        {"value": "0.5"},
        {"k": True},
        {"metrics": {"acc,none": {"a": 1}}},
        {"documents": [1]},
        {"n_documents": 1.5},
        {"main": None},
        *({name: -1} for name in ("n_documents", "n_fewshot", "k")),
        *({name: 10**400} for name in ("n_documents", "k", "value", "seconds", "stderr", "chance")),
        {"metrics": {"acc,none": 10**400}},
        {"documents": {"0": -(10**400)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_cell_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path):
    evaluated(tmp_path)
    path = tmp_path / "cells" / "t--base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="damaged .*remove it"):
        EvaluationCells(tmp_path, EXPERIMENT, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": []},
        {"groups": {"t": [1]}},
        {"forms": [{"name": 1}]},
        {"forms": [{"name": "a", "more": 1}]},
        {"missing": {"t": 3}},
    ],
)
def test_a_list_of_calls_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path):
    evaluated(tmp_path)
    call = {"groups": {"t": ["t"]}, "forms": [], "missing": {}} | change
    (tmp_path / "calls.json").write_text(json.dumps([call]))
    with pytest.raises(ValueError, match="damaged .*no list of calls"):
        EvaluationCells(tmp_path, EXPERIMENT, resume=True)


# --- files of torch -------------------------------------------------------------------------------


class Holding:
    """Something of which pickle keeps a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.said = function, arguments

    def __reduce__(self) -> Any:
        return self.said


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL", "Data.pkl", "data.PKL"])
def test_a_pickle_is_looked_at_under_every_name_that_torch_takes_for_it(name: str, tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain.pt")
    content = pickle.dumps(OrderedDict(a=Holding(bytearray, 2**20)), protocol=2)
    with zipfile.ZipFile(tmp_path / "plain.pt") as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(tmp_path / "bad.pt", "w", zipfile.ZIP_STORED) as new:
        for part, kept in parts.items():
            is_pickle = part.endswith("data.pkl")
            new.writestr(part.replace("data.pkl", name), content if is_pickle else kept)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_torch_file(tmp_path / "bad.pt")


def test_two_parts_of_one_name_are_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "two.pt")
    with zipfile.ZipFile(tmp_path / "two.pt", "a") as archive:
        archive.writestr("two/DATA.PKL", pickle.dumps({}, protocol=2))
    with pytest.raises(CheckpointError, match="two parts of one name"):
        read_torch_file(tmp_path / "two.pt")


# --- tokenizers -----------------------------------------------------------------------------------


def plain_tokenizer(**parts: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return json.loads(tokenizer.to_str())


def read_from(folder: Path, content: dict[str, Any] | str) -> Any:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tokenizer.json").write_text(text)
    return read_tokenizer(folder)


def charsmap(n_trie: int, text: bytes = b"a\0") -> str:
    return base64.b64encode(struct.pack("<I", n_trie) + bytes(4) + text).decode()


@pytest.mark.parametrize(
    "said",
    [
        charsmap(2**32 - 4),
        charsmap(2**32 - 1),
        charsmap(4, b"b" * 20_000 + b"\0"),
        charsmap(3),
        "AAA",
        "",
        3,
    ],
)
@pytest.mark.parametrize("hides", [False, True])
def test_a_table_of_characters_that_needs_much_memory_is_an_error(
    said: object, hides: bool, tmp_path: Path
):
    content = plain_tokenizer()
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": said}
    text = json.dumps(content)
    if hides:
        text = text.replace("recompiled", "\\u0072ecompiled")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="is not a tokenizer"):
        read_from(tmp_path, text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_the_table_of_a_sentencepiece_model_is_looked_at_too():
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    piece = field(1, field(1, b"a"))
    for table in (struct.pack("<I", 2**32 - 4) + bytes(8), b"abc"):
        with pytest.raises(ValueError, match="cut off"):
            read_sentencepiece(piece * 3 + field(3, field(2, table)))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)},
        {"normalizer": normalizers.Replace("a", "b" * 20_000)},
        {"decoder": decoders.Sequence([decoders.Replace("a", "aaa")] * 40)},
    ],
)
def test_steps_that_make_a_book_of_a_letter_are_refused(parts: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match="is not a tokenizer .*of one"):
        read_from(tmp_path, plain_tokenizer(**parts))


def test_a_tokenizer_that_breaks_off_raises_a_value_error(tmp_path: Path):
    """Panics of the tokenizers library are no `Exception`; whichever part panics, it is caught."""
    from hooked_hybrid.text.tokenizer_guard import breaking_off

    class PanicException(BaseException):
        """As pyo3 names its own."""

    said = r"cannot read \(.x1b called .Option::unwrap"
    with pytest.raises(ValueError, match=said), breaking_off("cannot read"):
        raise PanicException("\x1b called `Option::unwrap()` on a `None` value")
    with pytest.raises(KeyboardInterrupt), breaking_off("cannot read"):
        raise KeyboardInterrupt
    tokenizer = read_from(tmp_path, plain_tokenizer())
    for ids in ([2**32], [-1]):
        with pytest.raises(ValueError, match="cannot write these tokens"):
            tokenizer.decode(ids)


def test_every_byte_of_a_tokenizer_may_be_wrong_and_the_error_is_one_of_values(tmp_path: Path):
    content = (packaged_models()["tiny-griffin"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for at in range(0, len(content), max(1, len(content) // 60)):
        for byte in (b"0", b"-", b'"', b"\\"):
            changed = content[:at] + byte + content[at + 1 :]
            (tmp_path / "tokenizer.json").write_bytes(changed)
            try:
                tokenizer = read_tokenizer(tmp_path)
                tokenizer.decode(tokenizer.encode("the old man"))
            except ValueError as error:
                assert str(error).isprintable() or "\n" in str(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_an_invalid_tokenizer_file_is_an_error_at_once(name: str, tmp_path: Path):
    read_from(tmp_path, plain_tokenizer())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with within(5), pytest.raises(ValueError, match="not a plain file"):
        read_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**30)  # takes no place on the disk
    with within(5), pytest.raises(ValueError, match="bytes, more than"):
        read_tokenizer(tmp_path)


# --- templates ------------------------------------------------------------------------------------

DOUBLED = "{% for i in range(60) %}{% set n.x = DOUBLE %}{% endfor %}{{ n.x }}"
BOMBS = [
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{% set x = [1] * 10**9 %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    *(
        "{% set n = namespace(x='a') %}" + DOUBLED.replace("DOUBLE", double)
        for double in ("n.x ~ n.x", "n.x + n.x", "'%s%s' % (n.x, n.x)", "'{0}{0}'.format(n.x)")
    ),
    "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    *(
        "{% set n = namespace(x=[1]) %}"
        + DOUBLED.replace("DOUBLE", "[n.x, n.x]").replace("{{ n.x }}", shown)
        for shown in ("{{ n.x }}", "{{ n.x|tojson }}", "{{ 'a' ~ n.x }}", "{{ '%s' % n.x }}")
    ),
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 9999999999) }}",
    "{{ ('a'*1000000).replace('a', 'b'*1000000) }}",
    "{{ (('a'*100000)|list)|join('b'*100000) }}",
    "{{ ('\n'*90000)|indent(90000) }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ lipsum(n=9999) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content.missing.more }}",
    "{{ ''.__class__.__mro__ }}",
    "{% if",
]


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_a_template_of_others_ends_soon_and_in_a_value_error(
    template: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hooked_hybrid.text.chat_bounds.STEPS", 3_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(60), pytest.raises(ValueError, match="the chat template (refuses|fails)"):
        render_chat(template, messages=[{"role": "user", "content": "hello"}])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_a_template_stops_after_some_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hooked_hybrid.text.chat_bounds.SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="seconds"):
        render_chat("{% for a in range(9999) %}{% set x = range(9999)|list %}{% endfor %}")
    assert time.monotonic() - start < 10


def test_the_bounds_change_nothing_of_what_templates_do():
    template = (
        "{%- for m in messages if m.role != 'tool' -%}"
        "{{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }}{{ loop.previtem and '<' }}"
        "{%- if not loop.first %}{{ ',' ~ ' ' }}{% endif -%}"
        "{{ '%-5s|' % m.role }}{{ '{:>4}'.format(3) }}{{ m.content | trim ~ '-' * 3 }}"
        "{{ m.content[:2] + m['content'][-1] }}{{ m | tojson(indent=1) }}"
        "{%- else %}none{% endfor -%}"
        "{% set ns = namespace(n=0) %}{% for k, v in {'a': 1}.items() %}{% set ns.n = ns.n + v %}"
        "{% endfor %}{{ ns.n }}{% for x in missing %}{% endfor %}{% for i in range(7) %}"
        "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% macro f(x) %}<{{ x|upper|replace('A', 'B') }}>{% endmacro %}{{ f('a') }}"
        "{% set t %}x{{ 1 }}{% endset %}{{ t }}{{ [3, 1]|sort|join('+') }}{{ 2 ** 5 % 7 }}"
        "{% generation %}said{% endgeneration %}"
    )
    messages = [{"role": "user", "content": " hi "}, {"role": "model", "content": "yes"}]
    text = render_chat(template, messages=messages)
    assert text.startswith("1/2user |   3hi---") and "2/2!<, model|   3yes---" in text
    assert '{\n "role": "user",\n "content": " hi "\n}' in text
    assert text.endswith("101234<B>x11+34said")


def test_control_characters_of_a_template_do_not_reach_the_terminal():
    with pytest.raises(ValueError) as error:
        render_chat("{{ raise_exception(x) }}", x=ESCAPE)
    assert str(error.value).isprintable()


# --- caches and states ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin")


def test_a_state_or_cache_that_is_a_pipe_or_too_deep_is_refused(
    model: HookedHybrid, tmp_path: Path
):
    tensors = {"next_pos": torch.zeros(1), "segment": torch.zeros(1)}
    save_file(tensors, tmp_path / "deep", {"n_seen": DEEP, "about": DEEP})
    save_file(tensors, tmp_path / "text", {"n_seen": '"many"', "about": "3"})
    save_file({**tensors, "blocks.x.k": torch.zeros(1)}, tmp_path / "name", {"n_seen": "1"})
    save_file({**tensors, "blocks.0": torch.zeros(1)}, tmp_path / "parts", {"n_seen": "1"})
    save_file({**tensors, "blocks.0.mine": torch.zeros(1)}, tmp_path / "leaf", {"n_seen": "1"})
    save_file({**tensors, "blocks.0.k": torch.zeros(2)}, tmp_path / "rows", {"n_seen": "1"})
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path.iterdir():
        for load in (HybridState.load, ActivationCache.load):
            with within(5), pytest.raises(ValueError, match=path.name):
                load(path)


def test_a_state_and_a_cache_are_not_written_through_links(model: HookedHybrid, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    _, cache = model.run_with_cache("the old man", names_filter="hook_embed")
    _, state = model("the old man", return_state=True)
    for name, value in (("cache", cache), ("state", state)):
        for link in (f"{name}.partial", name):
            (tmp_path / link).symlink_to(tmp_path / "mine.txt")
        value.save(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
        type(value).load(tmp_path / name)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_offload_folder_whose_inner_one_is_a_link_is_not_filled(tmp_path: Path):
    model = packaged_models()["tiny-griffin"]
    how = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    HookedHybrid.from_pretrained(model, **how)
    (inner,) = (tmp_path / "off").iterdir()
    shutil.rmtree(inner)
    (tmp_path / "elsewhere").mkdir()
    inner.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        HookedHybrid.from_pretrained(model, **how)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_link_in_an_offload_folder_is_replaced_and_its_target_neither_read_nor_written(
    tmp_path: Path,
):
    path = packaged_models()["tiny-griffin"]
    how = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    wanted = HookedHybrid.from_pretrained(path, **how)("the old man")
    weight = next((tmp_path / "off").rglob("ln_final.weight"))
    other = bytes(weight.stat().st_size)
    (tmp_path / "mine").write_bytes(other)
    weight.unlink()
    weight.symlink_to(tmp_path / "mine")
    assert torch.equal(HookedHybrid.from_pretrained(path, **how)("the old man"), wanted)
    assert not weight.is_symlink() and (tmp_path / "mine").read_bytes() == other


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "a\\b.safetensors", "a\0.safetensors", {"a": 1}, "x" * 300, "..", ""],
)
def test_an_index_names_files_of_its_folder_alone(name: object, tmp_path: Path):
    folder = Path(shutil.copytree(packaged_models()["tiny-griffin"], tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its directory"):
        HookedHybrid.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"n_layers": n} for n in (1e400, -1, None, "6", True)),
        *({"names": names} for names in ([1], "hook_embed", {"hook_embed": 1}, ["hook_embed"] * 2)),
        *({"axes": {"hook_embed": axes}} for axes in (["batch"], [1, 2, 3], "abc", None, [[]] * 3)),
        *({"axes": axes} for axes in ([], {"mine": []})),
        *({"places": {"hook_embed": pair}} for pair in ([0, -0.5], [True, 0], [9, 0], [-1, 0], 3)),
        *({"has_batch_dim": flag} for flag in (1, None, [1])),
        *({"pos_slice": at} for at in (1.5, True, "../x", [[1]], {"slice": [0.5, 1, 1]}, {})),
        {"places": 3},
    ],
    ids=str,
)
def test_an_inconsistent_cache_is_an_error(
    change: dict[str, Any], model: HookedHybrid, tmp_path: Path
):
    from safetensors import safe_open

    _, cache = model.run_with_cache("the old man", names_filter="hook_embed")
    cache.save(tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "c", {"about": json.dumps(about | change)})
    with pytest.raises(ValueError, match="no whole cache"):
        ActivationCache.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [[None, 2], [2, None], [True], [[2]], ["2"], [2.5]], ids=str)
def test_an_end_token_that_is_none_is_refused(ends: list[Any], name: str, tmp_path: Path):
    folder = Path(shutil.copytree(packaged_models()["tiny-griffin"], tmp_path / "m"))
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id=.* is not a token id"):
        HookedHybrid.from_pretrained(folder)


def with_part(state: HybridState, name: str, part: torch.Tensor, path: Path) -> Path:
    """Write a state of which one tensor is another."""
    about = {"n_seen": json.dumps(state.n_seen), "n_blocks": json.dumps(len(state.blocks))}
    tensors = {key: t.clone().contiguous() for key, t in state.tensors().items()}
    save_file({**tensors, name: part.contiguous()}, path, about)
    return path


def test_a_state_of_other_dtypes_axes_or_positions_is_refused(model: HookedHybrid, tmp_path: Path):
    _, state = model("the old man", return_state=True)
    whole = state.tensors()
    changes = {
        "next_pos": [whole["next_pos"][None].repeat(1, 1), whole["next_pos"] - 99],
        "blocks.2.pos": [whole["blocks.2.pos"] - 99, whole["blocks.2.pos"][0]],
        "blocks.2.k": [whole["blocks.2.k"][..., 0], whole["blocks.2.k"].long()],
        "blocks.0.ssm": [whole["blocks.0.ssm"][0], whole["blocks.0.ssm"].to(torch.complex64)],
        "blocks.0.conv": [whole["blocks.0.conv"][..., None]],
    }
    kinds = (torch.bool, torch.int32, torch.float16, torch.complex64, torch.float8_e4m3fn)
    for name in ("next_pos", "segment", "blocks.2.pos"):
        changes.setdefault(name, []).extend(whole[name].to(kind) for kind in kinds)
    for name in ("blocks.2.v", "blocks.0.ssm", "blocks.0.conv"):
        changes.setdefault(name, []).append(whole[name].to(torch.float8_e4m3fn))
    for name, parts in changes.items():
        for part in parts:
            path = with_part(state, name, part, tmp_path / "s")
            with pytest.raises(ValueError, match=r"s holds no whole state \("):
                HybridState.load(path)
    assert HybridState.load(with_part(state, "segment", whole["segment"], tmp_path / "s")) == state


@pytest.mark.parametrize("said", [[{"name": ["x"], "template": "a"}], {"a": 1}, 3, [3]])
def test_a_chat_template_of_another_type_is_ignored_or_chosen_by_name(said: object, tmp_path: Path):
    read_from(tmp_path, plain_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    assert read_tokenizer(tmp_path).chat_template in ("a", None)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("always")
def test_names_in_a_checkpoint_are_shown_and_not_obeyed(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    folder = Path(shutil.copytree(packaged_models()["tiny-griffin"], tmp_path / "m"))
    (folder / f"model-{ESCAPE.replace('/', '')}-of-2.safetensors").touch()
    (folder / "generation_config.json").write_text(json.dumps({f"x{ESCAPE}": ESCAPE}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {f"wandb_{ESCAPE}": None}))
    HookedHybrid.from_pretrained(folder)
    assert len(recwarn) and all(str(w.message).isprintable() for w in recwarn)
    (folder / "config.json").write_text(json.dumps(config | {f"mine{ESCAPE}": 3}))
    with pytest.raises(CheckpointError) as error:
        HookedHybrid.from_pretrained(folder)
    assert str(error.value).isprintable()
    error = CheckpointError(f"{ESCAPE} is not a tensor")
    assert str(error).isprintable() and str(pickle.loads(pickle.dumps(error))) == str(error)
