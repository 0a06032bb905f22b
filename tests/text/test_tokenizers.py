"""The tokenizers that checkpoints bring, and what a chat looks like to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer  # noqa: TID251

from hooked_hybrid import HookedHybrid
from hooked_hybrid.text.chat import check_conversation
from hooked_hybrid.text.tokenizer import CheckpointTokenizer, read_tokenizer
from tests.models import D_VOCAB, tiny_model

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "user", "model", ":", *(f"w{i}" for i in range(54))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'model'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}model :{% endif %}"
)
CHAT = [{"role": "user", "content": "w1 w2"}]


def write_json(folder: Path, adds_bos: bool = True, **settings: Any) -> None:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(WORDS[:4])
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def checkpoint(folder: Path, adds_bos: bool = True, **settings: Any) -> HookedHybrid:
    """Save a tiny model, add a tokenizer to its folder, and load both."""
    assert len(WORDS) == D_VOCAB
    tiny_model("griffin").save_pretrained(folder)
    write_json(folder, adds_bos, **settings)
    return HookedHybrid.from_pretrained(folder)


NAMED = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}


def test_a_checkpoints_tokenizer_json_is_used(tmp_path: Path):
    model = checkpoint(tmp_path / "m", **NAMED)
    assert model.to_tokens("w0 w1").tolist() == [[2, 7, 8]]
    assert model.to_string(torch.tensor([7, 8])) == "w0 w1"
    assert model.to_str_tokens("w0 w1") == ["<bos>", "w0", "w1"]
    assert model.to_single_token("w3") == 10 and model.to_single_str_token(10) == "w3"
    assert model.text.bos == 2 and model.text.eos == (1,) and model.text.pad == 0
    assert isinstance(model.generate("w0 w1", 2, verbose=False), str)


@pytest.mark.parametrize("key", [None, True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_put_in_front_where_the_post_processor_puts_it(
    tmp_path: Path, adds_bos: bool, key: bool | None
):
    settings = {**NAMED, "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {} if key is None else {"add_bos_token": key}
    model = checkpoint(tmp_path / "m", adds_bos, **settings)
    reference = AutoTokenizer.from_pretrained(tmp_path / "m")
    mine = HookedHybrid.from_pretrained(tmp_path / "m", tokenizer=reference)
    assert reference("w0").input_ids == ([2, 7] if adds_bos else [7])
    assert model.to_tokens("w0").tolist() == [reference("w0").input_ids]
    assert mine.to_tokens("w0").tolist() == [reference("w0").input_ids]
    assert model.text.prepends_bos is mine.text.prepends_bos is adds_bos
    assert model.to_tokens("w0", prepend_bos=True).tolist() == [[2, 7]]
    assert model.to_tokens("w0", prepend_bos=False).tolist() == [[7]]


def test_a_users_tokenizer_comes_before_the_checkpoints(tmp_path: Path):
    mine = Tokenizer(WordLevel({"w0": 5, "?": 6}, unk_token="?"))
    checkpoint(tmp_path / "m", **NAMED)
    model = HookedHybrid.from_pretrained(tmp_path / "m", tokenizer=mine)
    assert model.to_tokens("w0", prepend_bos=False).tolist() == [[5]]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_rendered_and_brings_its_own_bos(tmp_path: Path, place: str):
    in_config = {"chat_template": TEMPLATE} if place == "tokenizer_config.json" else {}
    checkpoint(tmp_path / "m", **NAMED, **in_config)
    if place == "chat_template.jinja":
        (tmp_path / "m" / place).write_text(TEMPLATE)
    model = HookedHybrid.from_pretrained(tmp_path / "m")
    assert model.apply_chat_template(CHAT).tolist() == [[2, 4, 6, 8, 9, 5, 6]]
    assert model.apply_chat_template(CHAT, False).tolist() == [[2, 4, 6, 8, 9]]
    with pytest.raises(ValueError, match="no role system"):
        model.apply_chat_template([{"role": "system", "content": "w1"}])


def test_a_chat_template_cannot_reach_python(tmp_path: Path):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    model = checkpoint(tmp_path / "m", **NAMED, chat_template=escape)
    with pytest.raises(ValueError, match="refuses"):
        model.apply_chat_template(CHAT)


def test_without_a_chat_template_the_error_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no chat template"):
        checkpoint(tmp_path / "m", **NAMED).apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="no tokenizer"):
        tiny_model("griffin").apply_chat_template(CHAT)


def chatting(folder: Path) -> HookedHybrid:
    """Return a model whose files transformers reads too."""
    named = {**NAMED, "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return checkpoint(folder, **named, chat_template=TEMPLATE)


def test_a_conversation_longer_than_the_context_keeps_its_end(tmp_path: Path):
    model = chatting(tmp_path / "m")
    reference = AutoTokenizer.from_pretrained(tmp_path / "m")
    short = HookedHybrid(replace(model.cfg, n_ctx=4), tokenizer=model.tokenizer)
    wanted = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert short.apply_chat_template(CHAT).tolist() == [wanted] and len(wanted) == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "at least one"),
        (CHAT[0], "a list of messages"),
        ("w1", "a list of messages"),
        ([CHAT, CHAT], "one at a time"),
        (["w1"], "message 0 is 'w1'"),
        ([*CHAT, {"content": "w1"}], f"message {len(CHAT)}"),
        ([{"role": "user"}], "no content"),
    ],
)
def test_what_is_no_conversation_is_refused(given: Any, said: str):
    with pytest.raises(ValueError, match=said):
        check_conversation(given)


def test_a_model_refuses_what_is_no_conversation_whoevers_tokenizer_it_has(tmp_path: Path):
    model = chatting(tmp_path / "m")
    reference = AutoTokenizer.from_pretrained(tmp_path / "m")
    for tokenizer in (None, reference):
        which = HookedHybrid.from_pretrained(tmp_path / "m", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="message 0"):
            which.apply_chat_template([{"content": "w1"}])
    with pytest.raises(ValueError, match="message 0"):
        model.text.tokenizer.apply_chat_template([{"rol": "user", "content": "w1"}])


def test_a_variable_that_the_chat_template_does_not_read_is_refused(tmp_path: Path):
    tokenizer = checkpoint(tmp_path / "m", **NAMED, chat_template=TEMPLATE).tokenizer
    for name, value in [
        ("continue_final_message", True),
        ("chat_template", "{{ bos_token }}"),
        ("return_tensors", "pt"),
        ("tools", [{"name": "f"}]),
    ]:
        with pytest.raises(ValueError, match=rf"{name}=.* has no effect.*messages"):
            tokenizer.apply_chat_template(CHAT, **{name: value})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %} {{ name }}"
    assert tokenizer.apply_chat_template([{"role": "w1", "content": ""}], name="w2") == [8, 9]
    assert tokenizer.apply_chat_template([{"role": "w1", "content": ""}], tools=None) == [8]


def test_saving_keeps_the_tokenizer_and_its_template(tmp_path: Path):
    model = checkpoint(tmp_path / "m", **NAMED, chat_template=TEMPLATE)
    model.save_pretrained(tmp_path / "again")
    again = HookedHybrid.from_pretrained(tmp_path / "again")
    assert torch.equal(again.apply_chat_template(CHAT), model.apply_chat_template(CHAT))


def test_positions_and_directions_of_tokens(tmp_path: Path):
    model = checkpoint(tmp_path / "m", **NAMED)
    assert model.get_token_position("w1", "w1 w2 w1") == 1
    assert model.get_token_position("w1", "w1 w2 w1", mode="last") == 3
    assert model.get_token_position(9, torch.tensor([[8, 9]])) == 1
    with pytest.raises(ValueError, match="is not in"):
        model.get_token_position("w9", "w1 w2")
    assert torch.equal(model.tokens_to_residual_directions("w1"), model.W_U[:, 8])
    several = model.tokens_to_residual_directions(torch.tensor([[8, 9]]))
    assert torch.equal(several, model.W_U.T[torch.tensor([[8, 9]])])


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Kaggle gives it: a `.pt` would be next to this `tokenizer.model`."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("kaggle")
    (folder / "text").write_text("\n".join(["the cat sat on the mat", "a dog ate the hat"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return folder


def test_a_kaggle_folders_sentencepiece_model_is_used(sentencepiece_folder: Path):
    tokenizer = read_tokenizer(sentencepiece_folder)
    assert isinstance(tokenizer, CheckpointTokenizer)
    ids = tokenizer.encode("the cat ate")
    assert tokenizer.decode(ids) == "the cat ate"
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (2, 1, 0)
    assert tokenizer.decode([2, *ids, 1], skip_special_tokens=True) == "the cat ate"
    model = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for text in ("the cat ate", " a  dog\ton the mat ", "xyz", "", "the\n\nhat"):
        assert tokenizer.encode(text) == model.encode(text)


def test_a_google_checkpoint_with_its_tokenizer_reads_and_writes_text(
    sentencepiece_folder: Path, tmp_path: Path
):
    golden = Path(__file__).parent.parent / "golden" / "recurrentgemma_google" / "tiny.pt"
    for file in (golden, sentencepiece_folder / "tokenizer.model"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = HookedHybrid.from_pretrained(tmp_path)
    assert model.to_tokens("the cat")[0, 0] == 2
    assert model.to_string(model.to_tokens("the cat", prepend_bos=False)[0]) == "the cat"


def test_a_damaged_tokenizer_is_an_error_that_names_the_file(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        read_tokenizer(tmp_path)
    assert read_tokenizer(tmp_path / "nowhere") is None
