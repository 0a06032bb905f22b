"""Padding is known: a padded batch of tokens is never read as text, with a mask or without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, analysis
from hooked_hybrid.text.text import Text
from tests.models import griffin_config, jamba_config, random_model
from tests.text.test_text import BOS, EOS, PAD, toy_tokenizer

CONFIGS = {"griffin": griffin_config("RA", d_model=16), "jamba": jamba_config("MA")}
TEXTS = ["w7 w9 w11 w30 w31", "w8", "w20 w21"]
QUIET: dict[str, Any] = {"verbose": False, "stop_at_eos": False}


def model_of(name: str = "griffin", **changes: Any) -> HookedHybrid:
    cfg = dataclasses.replace(CONFIGS[name], default_prepend_bos=True, **changes)
    model = random_model(cfg)
    model.tokenizer = toy_tokenizer()
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: Any) -> HookedHybrid:
    return model_of(request.param)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tokens_are_read_as_their_texts(model: HookedHybrid, side: Any):
    tokens = model.to_tokens(TEXTS, padding_side=side)
    logits, (_, cache) = model(tokens), model.run_with_cache(tokens, names_filter="hook_embed")
    loss = model(tokens, return_type="loss", loss_per_token=True)
    for row, text in enumerate(TEXTS):
        alone = model(text)[0]
        n = len(alone)
        at = slice(-n, None) if side == "left" else slice(0, n)
        assert_close(logits[row, at], alone)
        assert_close(loss[row].sum() / (n - 1), model(text, return_type="loss"))
    assert_close(model.loss_fn(logits, tokens), model(TEXTS, return_type="loss"))
    assert cache["hook_embed"].shape[:2] == tokens.shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_continues_each_text(model: HookedHybrid, side: Any):
    tokens = model.to_tokens(TEXTS, padding_side=side)
    found = model.generate(tokens, 3, return_type="output", **QUIET).new_tokens
    for row, text in enumerate(TEXTS):
        alone = model.generate(text, 3, return_type="output", **QUIET).new_tokens[0]
        assert found[row].tolist() == alone.tolist()


def test_to_tokens_gives_the_mask_that_the_model_takes(model: HookedHybrid):
    tokens, mask = model.to_tokens(TEXTS, padding_side="left", return_mask=True)
    assert mask.tolist() == [[1] * 6, [0] * 4 + [1] * 2, [0] * 3 + [1] * 3]
    assert torch.equal(model.get_attention_mask(tokens), mask)
    assert torch.equal(model.padding_mask(tokens), mask == 0)
    assert model.padding_mask(tokens).dtype == torch.bool
    assert torch.equal(model.padding_mask(tokens.tolist()), mask == 0)  # lists, as in a forward
    with pytest.raises(ValueError, match="attention_mask"):  # it is the opposite of this one
        model(tokens, attention_mask=model.padding_mask(tokens).long())
    assert torch.equal(model(tokens, attention_mask=mask), model(tokens))
    one, ones = model.to_tokens("w7 w8", return_mask=True)
    assert ones.tolist() == [[1, 1, 1]] and torch.equal(one, model.to_tokens("w7 w8"))


def test_a_mask_of_ones_and_segments_take_padding_tokens_as_text():
    text, bare = model_of(), model_of()
    bare.tokenizer = None
    tokens = text.to_tokens(TEXTS)
    ones = torch.ones_like(tokens)
    assert torch.equal(text(tokens, attention_mask=ones), bare(tokens))
    assert torch.equal(text(tokens, segment_ids=ones), bare(tokens, segment_ids=ones))
    assert not torch.allclose(text(tokens)[1, -1], bare(tokens)[1, -1])
    assert torch.equal(bare.get_attention_mask(tokens), ones)


def test_padding_tokens_within_a_row_are_text_and_so_is_a_text_that_says_them():
    model = model_of()
    inside = torch.tensor([[BOS, PAD, 7], [BOS, 8, 9]])
    assert model.get_attention_mask(inside).tolist() == [[1, 1, 1], [1, 1, 1]]
    said = model("w7 <pad>", prepend_bos=False)
    ones = torch.ones(1, 2, dtype=torch.long)
    assert torch.equal(said, model(torch.tensor([[7, PAD]]), attention_mask=ones))


def test_one_token_a_row_is_taken_as_it_is():
    model = model_of()
    tokens = model.to_tokens(["w7 w8", "w9 w10"])
    _, state = model(tokens, return_state=True)
    step = torch.tensor([[PAD], [7]])
    whole = torch.cat([tokens, step], dim=1)
    ones = torch.ones_like(whole)
    assert_close(model(step, state=state)[:, -1], model(whole, attention_mask=ones)[:, -1])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[PAD, 7, PAD], [7, 8, 9]], r"rows \[0\] begin and end.*attention_mask="),
        ([[7, 8], [PAD, PAD]], r"rows \[1\] hold nothing but padding.*attention_mask="),
    ],
)
def test_padding_that_may_be_text_is_refused(rows: list[list[int]], match: str):
    model, tokens = model_of(), torch.tensor(rows)
    uses = (model, model.run_with_cache, lambda t: model.generate(t, 1, verbose=False))
    for use in uses:
        with pytest.raises(ValueError, match=match):
            use(tokens)


@pytest.mark.parametrize("pad", [EOS, BOS])
def test_a_padding_token_that_is_bos_or_eos_too_is_refused_where_it_pads(pad: int):
    model = model_of(pad_token_id=pad)
    for rows in ([[pad, pad, 7], [8, 9, 10]], [[7, pad, pad], [8, 9, 10]]):
        tokens = torch.tensor(rows)
        with pytest.raises(ValueError, match=f"token {pad}.*attention_mask="):
            model(tokens)
        model(tokens, attention_mask=torch.ones_like(tokens))
    model(torch.tensor([[pad, 7, 8], [pad, 9, EOS]]))  # as texts begin and end
    for side in ("left", "right"):
        with pytest.raises(ValueError, match="return_mask=True"):
            model.to_tokens(TEXTS, padding_side=side)
        tokens, mask = model.to_tokens(TEXTS, padding_side=side, return_mask=True)
        assert_close(
            model(tokens, attention_mask=mask)[mask.bool()],
            torch.cat([model(text)[0] for text in TEXTS]),
        )
    assert model.to_tokens(["w7", "w8"]).shape == (2, 2)


def test_one_padding_token_before_bos_beside_rows_that_begin_with_bos_is_padding():
    model = model_of(pad_token_id=EOS)
    prompts = torch.tensor([[EOS, BOS, 7], [BOS, 8, 9]])
    for use in (model, model.run_with_cache, lambda t: model.generate(t, 1, verbose=False)):
        with pytest.raises(ValueError, match=f"token {EOS}.*attention_mask="):
            use(prompts)
    for text in ([[EOS, BOS, 7]], [[EOS, BOS, 7], [9, EOS, 8]], [[EOS, BOS, 7], [EOS, BOS, 8]]):
        assert model.get_attention_mask(torch.tensor(text)).all()


def test_prompts_of_which_some_end_with_a_padding_token_that_is_eos_are_not_continued():
    model = model_of(pad_token_id=EOS)
    tokens = torch.tensor([[BOS, 7, EOS], [BOS, 8, 9]])
    with pytest.raises(ValueError, match=rf"rows \[0\] end with token {EOS}.*attention_mask="):
        model.generate(tokens, 2, **QUIET)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    new = model.generate(tokens, 2, attention_mask=mask, **QUIET)[0, -2:]
    assert new.tolist() == model.generate(tokens[:1, :2], 2, **QUIET)[0, -2:].tolist()
    for text in (tokens[:1], tokens[:1].expand(2, -1)):  # no row is longer
        read = model.generate(text, 2, **QUIET)
        ones = torch.ones_like(text)
        assert torch.equal(read, model.generate(text, 2, attention_mask=ones, **QUIET))
    assert model(tokens).shape[:2] == tokens.shape  # what stands before does not see it


def test_pieces_of_a_cache_know_the_padding():
    model, name = model_of(), "blocks.1.hook_resid_post"
    tokens, mask = model.to_tokens(TEXTS, padding_side="left", return_mask=True)
    options: Any = {"names_filter": name, "pos_slice": [-1]}
    _, told = model.run_with_cache(tokens, attention_mask=mask, **options)
    _, found = model.run_with_cache(tokens, **options)
    assert torch.equal(found[name], told[name])
    _, grads = model.run_with_cache(tokens, names_filter=name, incl_bwd=True)
    _, told = model.run_with_cache(tokens, names_filter=name, incl_bwd=True, attention_mask=mask)
    assert torch.equal(grads[f"{name}_grad"], told[f"{name}_grad"])


def test_analyses_know_the_padding_too():
    model, name = model_of(), "blocks.0.hook_resid_post"
    clean, mask = model.to_tokens(TEXTS, padding_side="left", return_mask=True)
    corrupted = torch.where(mask.bool() & (clean > 3), clean + 1, clean)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7].mean()

    options: Any = {"names_filter": name, "verbose": False}
    told = analysis.attribution_patching(
        model, clean, corrupted, metric, attention_mask=mask, **options
    )
    found = analysis.attribution_patching(model, clean, corrupted, metric, **options)
    assert torch.equal(found.values[name], told.values[name])
    other = model.to_tokens([TEXTS[1], *TEXTS[:2]], padding_side="left")
    with pytest.raises(ValueError, match="different places"):
        analysis.attribution_patching(model, clean, other, metric, **options)


def test_lists_of_texts_and_others_are_refused():
    model = model_of()
    for mixed in (["w7", 3], [3, "w7"]):
        for use in (model, model.run_with_cache, lambda x: model.generate(x, 1, verbose=False)):
            with pytest.raises(ValueError, match=r"holds (a int|texts)"):
                use(mixed)


def test_a_tokenizer_is_an_object_or_a_folder(tmp_path: Any):
    with pytest.raises(ValueError, match=r"tokenizer='gpt2': no folder.*AutoTokenizer"):
        HookedHybrid(CONFIGS["griffin"], tokenizer="gpt2")
    with pytest.raises(ValueError, match="is a int, which cannot encode"):
        HookedHybrid(CONFIGS["griffin"], tokenizer=3)
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = HookedHybrid(CONFIGS["griffin"], tokenizer=tmp_path)
    assert model.to_tokens("w7").tolist() == [[7]]


def test_a_tokenizer_that_pads_or_cuts_by_itself_is_refused():
    for name, enable in (("padding", "enable_padding"), ("truncation", "enable_truncation")):
        tokenizer = toy_tokenizer()
        getattr(tokenizer, enable)(**({"max_length": 3} if name == "truncation" else {}))
        with pytest.raises(ValueError, match=f"has {name} enabled.*no_{name}"):
            Text(tokenizer, CONFIGS["griffin"])
