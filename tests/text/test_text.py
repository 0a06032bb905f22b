"""Properties of text in and out, with toy tokenizers of both libraries."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast  # noqa: TID251

from hooked_hybrid import HookedHybrid
from tests.models import D_VOCAB, griffin_config, random_model

PAD, EOS, BOS, UNK = 0, 1, 2, 3
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
KINDS = ["tokenizers", "transformers", "transformers_that_adds_bos"]
CONFIG = dataclasses.replace(griffin_config("RA", d_model=16), default_prepend_bos=True)


def toy_tokenizer(kind: str = "tokenizers") -> Any:
    """Return a tokenizer in which word `w7` is token 7, up to the models' vocabulary."""
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), D_VOCAB)]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    if kind == "tokenizers":
        return tokenizer
    if kind == "transformers_that_adds_bos":
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    names = {f"{w.strip('<>')}_token": w for w in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def with_tokenizer(tokenizer: Any, **changes: Any) -> HookedHybrid:
    model = random_model(dataclasses.replace(CONFIG, **changes))
    model.tokenizer = tokenizer
    return model


@pytest.fixture(params=KINDS)
def model(request) -> HookedHybrid:
    return with_tokenizer(toy_tokenizer(request.param))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- text to tokens ---------------------------------------------------------------------------


def test_a_text_is_one_row_with_bos_in_front(model):
    tokens = model.to_tokens("w7 w9")
    assert tokens.tolist() == [[BOS, 7, 9]] and tokens.dtype == torch.long


def test_bos_is_left_out_on_request(model):
    assert model.to_tokens("w7 w9", prepend_bos=False).tolist() == [[7, 9]]


@pytest.mark.parametrize("default", [True, False])
def test_the_default_is_the_configs(default):
    model = with_tokenizer(toy_tokenizer(), default_prepend_bos=default)
    assert model.to_tokens("w7").tolist() == [[BOS, 7] if default else [7]]
    assert model.to_tokens("w7", prepend_bos=not default).tolist() == [[7] if default else [BOS, 7]]


def test_bos_is_not_doubled_where_the_text_brings_it(model):
    assert model.to_tokens("<bos> w7").tolist() == [[BOS, 7]]
    assert model.to_tokens(["<bos> w7", "w7"]).tolist() == [[BOS, 7], [BOS, 7]]
    assert model.to_tokens("<bos>").tolist() == [[BOS]]


def test_bos_brought_by_the_text_stays_where_none_is_prepended(model):
    assert model.to_tokens("<bos> w7", prepend_bos=False).tolist() == [[BOS, 7]]


def test_several_texts_are_padded_on_the_right_by_default(model):
    texts = ["w7 w9 w11", "w8"]
    right = [[BOS, 7, 9, 11], [BOS, 8, PAD, PAD]]
    assert model.to_tokens(texts).tolist() == right
    assert model.to_tokens(texts, padding_side="right").tolist() == right
    assert model.to_tokens(texts, padding_side="left").tolist() == [
        [BOS, 7, 9, 11],
        [PAD, PAD, BOS, 8],
    ]
    assert model.to_tokens(tuple(texts), prepend_bos=False).tolist() == [[7, 9, 11], [8, PAD, PAD]]


def test_another_padding_side_is_refused(model, unchecked):
    with pytest.raises(ValueError, match="'left' or 'right'"):
        model.to_tokens(["w7", "w8 w9"], padding_side="middle")


def test_unknown_words_are_the_unknown_token(model):
    assert model.to_tokens("w7 nonsense", prepend_bos=False).tolist() == [[7, UNK]]


def test_tokens_are_cut_at_n_ctx_by_default():
    model = with_tokenizer(toy_tokenizer(), n_ctx=3)
    text = "w7 w8 w9 w10"
    assert model.to_tokens(text).tolist() == [[BOS, 7, 8]]
    assert model.to_tokens(text, truncate=False).tolist() == [[BOS, 7, 8, 9, 10]]


def test_no_text_is_bos_alone_and_nothing_without_it_is_refused(model):
    assert model.to_tokens("").tolist() == [[BOS]]
    with pytest.raises(ValueError, match=r"\[1\].*BOS"):
        model.to_tokens(["w7", ""], prepend_bos=False)


def test_an_empty_list_of_texts_is_refused_with_a_message_of_ours(model):
    with pytest.raises(ValueError, match="at least one"):
        model.to_tokens([])


# --- special tokens ---------------------------------------------------------------------------


def test_the_config_names_the_special_tokens_a_tokenizer_does_not():
    model = with_tokenizer(toy_tokenizer(), bos_token_id=11, pad_token_id=12)
    assert model.to_tokens(["w7", "w7 w8"]).tolist() == [[11, 7, 12], [11, 7, 8]]


def test_the_tokenizers_own_special_tokens_come_first():
    model = with_tokenizer(toy_tokenizer("transformers"), bos_token_id=11, pad_token_id=12)
    assert model.to_tokens(["w7", "w7 w8"]).tolist() == [[BOS, 7, PAD], [BOS, 7, 8]]


def test_without_a_bos_anywhere_none_is_prepended_and_asking_for_it_is_an_error():
    model = with_tokenizer(toy_tokenizer(), bos_token_id=None)
    assert model.to_tokens("w7").tolist() == [[7]]
    with pytest.raises(ValueError, match="BOS"):
        model.to_tokens("w7", prepend_bos=True)


def test_padding_needs_no_padding_token():
    model = with_tokenizer(toy_tokenizer(), pad_token_id=None, bos_token_id=None)
    texts = ["w7 w8 w9", "w5"]
    tokens, mask = model.to_tokens(texts, return_mask=True)
    assert tokens.shape == (2, 3) and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="return_mask=True"):
        model.to_tokens(texts)
    assert_close(model(texts)[1, :1], model("w5")[0])


# --- tokens to text ---------------------------------------------------------------------------


def test_one_row_is_a_string_and_several_are_a_list(model):
    assert model.to_string(torch.tensor([7, 9])) == "w7 w9"
    assert model.to_string([7, 9]) == "w7 w9"
    assert model.to_string(torch.tensor([[7, 9], [8, 8]])) == ["w7 w9", "w8 w8"]
    assert model.to_string(torch.tensor([[7, 9]])) == ["w7 w9"]
    assert model.to_string(torch.tensor(7)) == "w7"


def test_special_tokens_are_shown(model):
    assert model.to_string([BOS, 7, EOS]) == "<bos> w7 <eos>"


def test_text_comes_back_from_its_tokens(model):
    text = "w7 w9 w60 w7"
    assert model.to_string(model.to_tokens(text, prepend_bos=False)[0]) == text


def test_str_tokens_are_the_tokens_one_by_one(model):
    assert model.to_str_tokens("w7 w9") == ["<bos>", "w7", "w9"]
    assert model.to_str_tokens("w7 w9", prepend_bos=False) == ["w7", "w9"]
    for tokens in ([7, 9], torch.tensor([7, 9]), torch.tensor([[7, 9]])):
        assert model.to_str_tokens(tokens) == ["w7", "w9"]


def test_there_is_one_str_token_for_each_token(model):
    text = "w7 nonsense w9"
    assert len(model.to_str_tokens(text)) == model.to_tokens(text).shape[1]


def test_a_single_token_is_its_id(model):
    assert model.to_single_token("w7") == 7
    assert model.to_single_token("<eos>") == EOS


@pytest.mark.parametrize(("string", "count"), [("w7 w8", 2), ("", 0)])
def test_several_tokens_or_none_are_no_single_token(model, string, count):
    with pytest.raises(ValueError) as error:
        model.to_single_token(string)
    assert repr(string) in str(error.value) and f"{count} tokens" in str(error.value)


# --- the forward on text ----------------------------------------------------------------------


def test_a_forward_on_a_text_is_one_on_its_tokens(model):
    assert torch.equal(model("w7 w9 w8"), model(torch.tensor([[BOS, 7, 9, 8]])))
    assert torch.equal(model("w7 w9", prepend_bos=False), model(torch.tensor([[7, 9]])))


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_forward_on_several_texts_is_each_text_alone(model, side):
    texts = ["w7 w9 w8 w30 w31 w32 w33 w34 w35", "w8", "w20 w21 w22"]
    logits = model(texts, padding_side=side)
    for row, text in enumerate(texts):
        alone = model(text)[0]
        n = alone.shape[0]
        assert_close(logits[row, -n:] if side == "left" else logits[row, :n], alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_several_texts_counts_every_predicted_token_once(model, side):
    texts = ["w7 w9 w8 w30 w31", "w8 w9"]
    alone = [model(text, return_type="loss") for text in texts]
    expected = (5 * alone[0] + 2 * alone[1]) / 7
    assert_close(model(texts, return_type="loss", padding_side=side), expected)


def test_gradients_of_a_text_are_those_of_its_tokens(model):
    options: dict[str, Any] = {"names_filter": "hook_embed", "incl_bwd": True}
    _, of_text = model.run_with_cache("w7 w9 w8", **options)
    _, of_tokens = model.run_with_cache(torch.tensor([[BOS, 7, 9, 8]]), **options)
    assert torch.equal(of_text["hook_embed_grad"], of_tokens["hook_embed_grad"])
    _, of_two = model.run_with_cache(["w7 w9 w8", "w5"], **options, padding_side="left")
    _, masked = model.run_with_cache(
        torch.tensor([[BOS, 7, 9, 8], [PAD, PAD, BOS, 5]]),
        attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        **options,
    )
    assert torch.equal(of_two["hook_embed_grad"], masked["hook_embed_grad"])


def test_text_with_a_mask_is_refused(model):
    for name in ("attention_mask", "segment_ids"):
        with pytest.raises(ValueError, match="mask"):
            model("w7 w9", **{name: torch.ones(1, 3, dtype=torch.long)})


# --- no tokenizer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m("w7"),
        lambda m: m(["w7", "w8"]),
        lambda m: m.to_tokens("w7"),
        lambda m: m.to_string([7]),
        lambda m: m.to_str_tokens("w7"),
        lambda m: m.to_str_tokens([7]),
        lambda m: m.to_single_token("w7"),
        lambda m: m.run_with_cache("w7"),
        lambda m: m.generate("w7", 2, verbose=False),
        lambda m: m.generate(torch.tensor([[7]]), 2, return_type="str", verbose=False),
        lambda m: m.generate(torch.tensor([[7]]), 2, stop_strings="w9", verbose=False),
    ],
)
def test_text_without_a_tokenizer_is_an_error_that_says_what_to_do(use):
    with pytest.raises(ValueError, match="no tokenizer.*tokenizer="):
        use(with_tokenizer(None))


def test_tokens_need_no_tokenizer():
    bare, model = with_tokenizer(None), with_tokenizer(toy_tokenizer())
    tokens = torch.tensor([[BOS, 7, 9]])
    assert torch.equal(bare(tokens), model("w7 w9"))
    out = bare.generate(tokens, 3, return_type="output", verbose=False)
    assert out.text is None and out.new_tokens.shape[0] == 1
