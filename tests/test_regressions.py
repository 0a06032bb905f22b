"""Cases that a reader found wrong once: each stays right."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, HybridState, interventions
from hooked_hybrid.commands.convert import main
from hooked_hybrid.model import memory
from hooked_hybrid.text.chat import render_chat
from tests.models import CONFIGS, griffin_config, random_model, random_tokens, relative, tiny_model
from tests.tokenizers_of_the_families import sentencepiece_folder
from weights_conversion import CheckpointError
from weights_conversion.sources import open_torch_file

models = pytest.mark.parametrize("name", list(CONFIGS))
GOOGLE = Path(__file__).parent / "golden" / "recurrentgemma_google" / "tiny.pt"


model_of = cache(tiny_model)


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def double_in_place(x: Tensor, hook: HookPoint) -> None:
    x.mul_(2)


@models
@pytest.mark.parametrize("kinds", [(), ("ssm",), ("conv",), ("ssm", "conv")])
def test_parts_of_a_longer_donor_bring_no_empty_keys(name: str, kinds: tuple[str, ...]):
    model = model_of(name)
    _, short = model(random_tokens(2, 5), return_state=True)
    _, long = model(random_tokens(2, 12, seed=1), return_state=True)
    grafted = short.replace(long, kinds=kinds)
    by_hand = short.tensors()
    by_hand |= {n: t for n, t in long.tensors().items() if n.rsplit(".")[-1] in kinds}
    wanted = HybridState.from_tensors(by_hand, short.n_seen)
    assert grafted == wanted and (grafted == short) == (not kinds)
    following = random_tokens(2, 3, seed=2)
    assert torch.equal(model(following, state=grafted), model(following, state=wanted))


def test_a_state_equals_its_copy_and_no_other():
    model = model_of("griffin")
    _, state = model(random_tokens(), return_state=True)
    assert state == state.fork(1) and state != state.fork(2) and state != 3
    assert state != model(random_tokens(seed=1), return_state=True)[1]


@models
def test_hooks_given_as_an_iterator_are_attached(name: str):
    model, tokens = model_of(name), random_tokens(2, 6)
    names = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    wanted = model.run_with_hooks(tokens, fwd_hooks=[(n, double) for n in names])
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=((n, double) for n in names)), wanted)
    options: dict[str, Any] = {"return_type": "output", "stop_at_eos": False, "verbose": False}
    a = model.generate(tokens, 3, generation_hooks=[(n, double) for n in names], **options)
    b = model.generate(tokens, 3, generation_hooks=((n, double) for n in names), **options)
    assert torch.equal(a.logprobs, b.logprobs)
    assert not torch.equal(a.logprobs, model.generate(tokens, 3, **options).logprobs)


@models
@pytest.mark.parametrize("leaf", ["hook_resid_post", "mixer.hook_ssm_state"])
def test_hook_at_takes_edits_in_place_and_shows_the_run_of_its_position(name: str, leaf: str):
    model, tokens = model_of(name), random_tokens()
    at = f"blocks.{model.cfg.recurrent_layers[0]}.{leaf}"
    seen: list[tuple[int, ...]] = []

    def in_place(x: Tensor, hook: HookPoint) -> None:
        seen.append(tuple(hook.run.query_pos[:, 0].tolist()))
        assert hook.run.query_pos.shape == x.shape[:2]
        x.mul_(2)

    edited = model.run_with_hooks(tokens, fwd_hooks=[(at, interventions.hook_at(in_place, [3, 7]))])
    wanted = model.run_with_hooks(tokens, fwd_hooks=[(at, interventions.hook_at(double, [3, 7]))])
    assert torch.equal(edited, wanted) and relative(edited, model(tokens)) > 1e-4
    assert seen == [(3, 3), (7, 7)]


@models
def test_a_hook_on_kept_logits_sees_the_positions_they_are_of(name: str):
    model, tokens = model_of(name), random_tokens()
    zero = interventions.hook_at(lambda x, hook: torch.zeros_like(x), 0)
    kept = model.run_with_hooks(tokens, logits_to_keep=2, fwd_hooks=[("unembed.hook_logits", zero)])
    assert torch.equal(kept, model(tokens, logits_to_keep=2))
    last = interventions.hook_at(lambda x, hook: torch.zeros_like(x), 19)
    kept = model.run_with_hooks(tokens, logits_to_keep=2, fwd_hooks=[("unembed.hook_logits", last)])
    assert bool((kept[:, 1] == 0).all()) and bool((kept[:, 0] != 0).any())


@models
@pytest.mark.parametrize("point", ["ln_final.hook_scale", "ln_final.hook_normalized"])
def test_the_final_norm_is_read_in_prefill_also_where_its_logits_are_not(name: str, point: str):
    model, tokens = model_of(name), random_tokens()
    options: dict[str, Any] = {"first_token_stage": "generation", "return_type": "output"}
    out = model.generate(
        tokens, 4, names_filter=[point], stop_at_eos=False, verbose=False, **options
    )
    assert out.cache[point].shape[1] == 23


def test_text_that_continues_a_state_gets_no_bos():
    model = tiny_model("griffin")
    words = {"<bos>": 2, "?": 3, **{f"w{i}": i for i in range(4, 20)}}
    model.tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    model.tokenizer.pre_tokenizer = Whitespace()
    model.tokenizer.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    _, state = model("w5", return_state=True)
    assert model("w8", state=state).shape[1] == 1 and model("w8").shape[1] == 2
    assert model("w8", state=state, prepend_bos=True).shape[1] == 2
    point = "blocks.0.hook_resid_post"
    _, text = model.run_with_cache("w8 w9", state=state, names_filter=point, incl_bwd=True)
    tokens = model.to_tokens("w8 w9", prepend_bos=False)
    _, same = model.run_with_cache(tokens, state=state, names_filter=point, incl_bwd=True)
    assert torch.equal(text[point + "_grad"], same[point + "_grad"])
    assert model.to_str_tokens(["w5", "w6"], prepend_bos=False) == [["w5"], ["w6"]]


TEMPLATES = [
    "{{ messages[0] | tojson }}",
    "{% if tools is not none %}tools{% endif %}{{ cls_token }}{{ bos_token }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "   {% if add_generation_prompt %}\n  go\n{% endif %}\n",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_render_as_transformers_renders_them(template: str):
    from transformers import PreTrainedTokenizerFast  # noqa: TID251

    messages = [{"role": "user", "content": "<é & ü>"}, {"role": "model", "content": "b"}]
    words = Tokenizer(WordLevel({"?": 0, "<b>": 1, "<c>": 2}, unk_token="?"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<b>", cls_token="<c>")
    wanted = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ours = render_chat(
        template,
        messages=messages,
        add_generation_prompt=True,
        bos_token="<b>",
        cls_token="<c>",
    )
    assert ours == wanted


def test_bytes_that_are_no_torch_file_are_refused_by_name(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    noise = [bytes(torch.randint(256, (40,), generator=generator).tolist()) for _ in range(40)]
    cut = [old[: int(n)] for n in torch.randint(1, len(old) - 1, (40,), generator=generator)]
    for content in [b"hello", pickle.dumps(3), *noise, *cut]:
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            open_torch_file(tmp_path / "bad.pt")


def test_a_kaggle_folder_reads_text_without_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sentencepiece_folder(tmp_path, "gemma")
    (tmp_path / "2b.pt").write_bytes(GOOGLE.read_bytes())
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    model = HookedHybrid.from_pretrained(tmp_path)
    assert model.to_string(model.to_tokens("The river")) == ["<bos>The river"]
    for damaged in (b"", b"hello", (tmp_path / "tokenizer.model").read_bytes()[:-3]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece"):
            HookedHybrid.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [["--n-keys", "0"], ["--n-heads", "0"], ["--n-heads", "-4"]])
def test_the_command_answers_impossible_numbers_with_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([str(GOOGLE), "--check", *options]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_weights_that_no_layer_has_are_named():
    with pytest.raises(LookupError, match="attn.W_Q"):
        _ = random_model(griffin_config("RR")).W_Q


def test_a_part_of_the_model_is_checked_for_memory_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "WORTH_CHECKING", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    model, tokens = model_of("griffin"), random_tokens()
    with pytest.raises(MemoryError, match="hook_pattern"):
        model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_pattern", stop_at_layer=3)
    with torch.no_grad():  # with gradients attention keeps a mask
        model(tokens, stop_at_layer=3)


@models
@pytest.mark.parametrize("fresh", [True, False])
def test_edits_in_place_work_with_gradients_to_the_weights(name: str, fresh: bool):
    model = random_model(CONFIGS[name]).requires_grad_(fresh)
    tokens = random_tokens(2, 6)
    for point, hook in model.hook_dict.items():
        if hook.is_integer or point.endswith(("hook_log_decay", "hook_rec_gate")):
            continue
        returned = model.run_with_hooks(tokens, fwd_hooks=[(point, double)])
        edited = model.run_with_hooks(tokens, fwd_hooks=[(point, double_in_place)])
        assert torch.equal(edited, returned), point


@models
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_cached_in_every_mode_and_leave_no_graph(name: str, mode: Callable):
    model, tokens = model_of(name), random_tokens(2, 6)
    point = "blocks.0.hook_resid_post"
    with mode():
        (out, state), kept = model.run_with_cache(
            tokens, names_filter=point, incl_bwd=True, return_state=True
        )
    assert kept[point + "_grad"].abs().max() > 0
    assert not any(t.requires_grad for t in (out, *state.tensors().values(), *kept.values()))


def test_what_cannot_run_or_be_kept_is_an_error():
    model, tokens = model_of("griffin"), random_tokens()
    for options in ({"start_at_layer": 99}, {"stop_at_layer": 99}, {"stop_at_layer": -9}):
        with pytest.raises(ValueError, match="there are 4 layers"):
            model(
                model(tokens, stop_at_layer=0) if "start_at_layer" in options else tokens, **options
            )
    with pytest.raises(ValueError, match="keeps nothing"):
        model.run_with_cache(tokens, names_filter="blocks.3.hook_mlp_out", stop_at_layer=1)
    with pytest.raises(ValueError, match="k has 5 entries"):
        hooks = interventions.keep_top_heads(torch.arange(5))
        model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [None, {"input_ids": [1]}, object()])
def test_input_of_another_kind_is_named(given: Any):
    with pytest.raises(ValueError, match="give tokens"):
        model_of("griffin")(given)


@pytest.mark.usefixtures("unchecked")
def test_dtypes_go_by_name_and_wrong_ones_are_named():
    assert HookedHybrid.from_pretrained(GOOGLE, dtype="bfloat16").dtype == torch.bfloat16
    for wrong in ("int8", "half-ish", torch.int64):
        with pytest.raises(ValueError, match="dtype="):
            HookedHybrid.from_pretrained(GOOGLE, dtype=wrong)
    with pytest.raises(ValueError, match="stage='gen'"):
        model_of("griffin")(random_tokens(), stage="gen")
    with pytest.raises(ValueError, match="float64"):
        model_of("griffin")(torch.zeros(1, 2, 24, dtype=torch.float64), start_at_layer=1)
