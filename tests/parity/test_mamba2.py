"""Mamba, Mamba-2 and a hybrid against transformers: logits, states, padding, cuts, files."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid
from hooked_hybrid.accounting import count_parameters
from hooked_hybrid.interventions import patch
from tests.models import relative
from tests.tolerances import FP32_PARITY, PATTERN_OF_SCAN
from weights_conversion import CheckpointError
from weights_conversion.families import FAMILIES as FAMILY
from weights_conversion.rules import revert

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("mamba2", "bamba", "mamba", "falcon_mamba")
PROMPT = 50
every = pytest.mark.parametrize("family", FAMILIES)


@cache
def golden(family: str = "mamba2") -> dict[str, Tensor]:
    return load_file(GOLDEN / family / "golden.safetensors")


@cache
def ours(family: str = "mamba2") -> HookedHybrid:
    return HookedHybrid.from_pretrained(GOLDEN / family).requires_grad_(False)


def close(a: Tensor, b: Tensor) -> bool:
    return relative(a, b) < FP32_PARITY


@every
def test_logits_and_what_each_layer_writes(family: str):
    logits, cache_ = ours(family).run_with_cache(golden(family)["input_ids"])
    assert close(logits, golden(family)["logits"])
    assert close(cache_["hook_embed"][0], golden(family)["embed"])
    for i, layer in enumerate(ours(family).cfg.layers):
        kind = "mamba" if layer.recurrence else "attn"
        assert close(cache_["mixer_out", i][0], golden(family)[f"L{i}.{kind}_out"])
        if kind == "attn":
            assert close(cache_["pattern", i][0], golden(family)[f"L{i}.pattern"])
        assert close(cache_["resid_post", i][0], golden(family)[f"L{i}.resid_post"])


@every
def test_states_after_the_prompt(family: str):
    _, state = ours(family)(golden(family)["input_ids"], return_state=True)
    for i, block in enumerate(state.blocks):
        if block.growing:
            continue
        conv, ssm = golden(family)[f"L{i}.conv_state"], golden(family)[f"L{i}.ssm_state"]
        assert close(block.conv, conv[..., 1:].mT)  # theirs holds the current input too
        assert close(block.ssm, ssm.reshape(block.ssm.shape))


@every
def test_greedy_tokens_and_their_logits(family: str):
    tokens = golden(family)["input_ids"]
    out = ours(family).generate(tokens, 12, verbose=False, stop_at_eos=False, return_type="output")
    assert torch.equal(out.new_tokens, golden(family)["generated"])
    whole = torch.cat([tokens, golden(family)["generated"]], dim=1)
    assert close(ours(family)(whole)[:, PROMPT - 1 : -1], golden(family)["generated_logits"])


@every
@pytest.mark.parametrize("cuts", [(1,) * 49, (21, 13), (2, 2, 1), (49,)])
def test_any_cut_equals_the_whole(family: str, cuts: tuple[int, ...]):
    tokens, state, parts, done = golden(family)["input_ids"], None, [], 0
    for n in (*cuts, PROMPT - sum(cuts)):
        part, state = ours(family)(tokens[:, done : done + n], state=state, return_state=True)
        parts.append(part)
        done += n
    assert close(torch.cat(parts, dim=1), golden(family)["logits"])


@every
def test_padding_on_either_side_and_going_on_from_it(family: str):
    ids, mask = golden(family)["padded_ids"], golden(family)["padded_mask"]
    real = mask[0].bool()
    logits, state = ours(family)(ids, attention_mask=mask, return_state=True)
    reference = golden(family)["padded_logits"]
    row = next(i for i in range(2) if int(mask[i].sum()) == len(reference))
    assert close(logits[row][mask[row].bool()], reference)
    assert real.any()
    n_pad = int((mask[row] == 0).sum())
    right = torch.cat([ids[row, n_pad:], ids[row, :n_pad]])[None]
    right_mask = torch.cat([mask[row, n_pad:], mask[row, :n_pad]])[None]
    from_right, after = ours(family)(right, attention_mask=right_mask, return_state=True)
    assert close(from_right[0, : len(reference)], reference)
    more = golden(family)["padded_generated"]
    for began, rows in ((state, slice(None)), (after, slice(row, row + 1))):
        continued = ours(family)(more[rows], state=began)[..., -1, :]
        alone = ours(family)(torch.cat([ids[row][mask[row].bool()], more[row]])[None])[0, -1]
        assert close(continued[row if rows == slice(None) else 0], alone)


def test_a_limit_of_step_sizes_is_that_of_the_config():
    """transformers applies `time_step_limit` in prefill alone; here it is part of the model."""
    model = HookedHybrid.from_pretrained(GOLDEN / "mamba2")
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, dt_min=0.02, dt_max=0.4))
        for layer in model.cfg.layers
    )
    other = HookedHybrid(replace(model.cfg, layers=layers))
    other.load_state_dict(model.state_dict())
    assert close(other(golden()["input_ids"][:1])[0], golden()["logits_dt_limit"])


@every
def test_both_spellings_of_the_config_are_the_same_model(family: str, tmp_path: Path):
    for name in ("config.json", "config_4x.json"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(GOLDEN / family / name, folder / "config.json")
        shutil.copy(GOLDEN / family / "model.safetensors", folder)
        model = HookedHybrid.from_pretrained(folder)
        assert torch.equal(
            model(golden(family)["input_ids"]), ours(family)(golden(family)["input_ids"])
        )


@every
def test_what_is_saved_loads_here_bit_for_bit_and_there(family: str, tmp_path: Path):
    ours(family).save_pretrained(tmp_path / "saved")
    back = HookedHybrid.from_pretrained(tmp_path / "saved")
    assert back.cfg == ours(family).cfg
    mine = ours(family).state_dict()
    assert all(torch.equal(t, mine[name]) for name, t in back.state_dict().items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(theirs(golden(family)["input_ids"]).logits, golden(family)["logits"])
    assert close(
        HookedHybrid.from_hf(theirs)(golden(family)["input_ids"]), golden(family)["logits"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_groups": 4}, r": num_heads=6 is not a multiple of n_groups=4"),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit"),
        ({"time_step_limit": 3}, "time_step_limit"),
        ({"time_step_limit": [float("inf"), float("inf")]}, "time_step_limit"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"expand": 3}, "expand"),
        ({"expand": None}, "expand is null"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"num_heads": 0}, "num_heads"),
        ({"new_setting": 1}, "new_setting"),
    ],
)
def test_a_config_that_cannot_be_names_the_setting(changes: dict, message: str, tmp_path: Path):
    config = json.loads((GOLDEN / "mamba2" / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "mamba2" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        HookedHybrid.from_pretrained(tmp_path)


MAMBA_SSM = {"rms_norm": True, "time_step_init_scheme": "random", "time_step_scale": 1.0}
CONVERTED = {
    "mamba2": MAMBA_SSM | {"intermediate_size": 72, "norm_before_gate": True},
    "bamba": {"attn_rotary_emb": 6},
    "mamba": MAMBA_SSM
    | {"d_inner": 72, "d_model": 36, "n_layer": 4, "fused_add_norm": True, "ssm_cfg": {}}
    | {"pad_vocab_size_multiple": 8},
    "falcon_mamba": {"expand": 16},
}


@every
def test_settings_of_the_published_files_are_known(family: str, tmp_path: Path):
    """The first published files have settings that transformers does not read."""
    config = json.loads((GOLDEN / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | CONVERTED[family]))
    shutil.copy(GOLDEN / family / "model.safetensors", tmp_path)
    model = HookedHybrid.from_pretrained(tmp_path)
    assert close(model(golden(family)["input_ids"]), golden(family)["logits"])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba", {"d_inner": 144}),
        ("mamba", {"n_layer": 5}),
        ("mamba", {"ssm_cfg": {"layer": "Mamba2"}}),
        ("bamba", {"attn_rotary_emb": 12}),
        ("bamba", {"mamba_n_groups": 4}),
        ("bamba", {"num_attention_heads": 36}),
    ],
)
def test_such_a_setting_that_says_otherwise_is_refused(family: str, changes: dict):
    config = json.loads((GOLDEN / family / "config.json").read_text()) | changes
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        FAMILY[family].read(config, {})


# --- the matrix of a head -------------------------------------------------------------------------


def by_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (6, -1)).transpose(1, 2)


def test_the_pattern_is_the_scan_and_heads_sum_to_the_write():
    names = ["ssm_pattern", "ssm_input", "ssm_y", "result", "mixer_out", "ssm_scores", "ssm_dt"]
    _, cached = ours().run_with_cache(
        golden()["input_ids"], names_filter=[f"*hook_{name}" for name in names]
    )
    for i, block in enumerate(ours().blocks):
        pattern, u = cached["ssm_pattern", i], by_head(cached["ssm_input", i])
        y = pattern @ u + block.mixer.D[:, None, None] * u
        assert relative(y, by_head(cached["ssm_y", i])) < PATTERN_OF_SCAN
        assert torch.equal(pattern, pattern.tril())
        diagonal = cached["ssm_scores", i] * cached["ssm_dt", i].mT[:, :, None]
        assert close(pattern.diagonal(dim1=2, dim2=3), diagonal.diagonal(dim1=2, dim2=3))
        result = cached[f"blocks.{i}.mixer.hook_result"]
        assert close(result.sum(2), cached["mixer_out", i])


def test_an_edit_of_the_pattern_replaces_the_matrix():
    """A key that no query reads: the state keeps it, and its own skip remains."""
    tokens, key = golden()["input_ids"], 7

    def cut(pattern: Tensor, hook: object) -> Tensor:
        pattern = pattern.clone()
        pattern[..., key] = 0
        return pattern

    names = ["*hook_ssm_pattern", "*hook_ssm_input", "*hook_ssm_y", "*hook_ssm_state"]
    plain = ours().run_with_cache(tokens, names_filter=names)[1]
    with ours().hooks([("blocks.0.mixer.hook_ssm_pattern", cut)]):
        edited = ours().run_with_cache(tokens, names_filter=names)[1]
    u = by_head(plain["ssm_input", 0])
    y = cut(plain["ssm_pattern", 0], None) @ u + ours().blocks[0].mixer.D[:, None, None] * u
    assert relative(by_head(edited["ssm_y", 0]), y) < PATTERN_OF_SCAN
    assert torch.equal(edited["ssm_state", 0], plain["ssm_state", 0])


def test_an_edited_pattern_is_masked_again_and_runs_whole():
    tokens = golden()["input_ids"].repeat(1, 12)  # longer than a piece

    def ones(pattern: Tensor, hook: object) -> Tensor:
        assert pattern.shape[-2:] == (600, 600)
        return torch.ones_like(pattern)

    name = "blocks.0.mixer.hook_ssm_y"
    with ours().hooks([("blocks.0.mixer.hook_ssm_pattern", ones)]):
        _, edited = ours().run_with_cache(tokens, names_filter=[name, "*0.mixer.hook_ssm_input"])
    u = by_head(edited["ssm_input", 0])
    y = u.cumsum(2) + ours().blocks[0].mixer.D[:, None, None] * u
    assert close(by_head(edited[name]), y)


@pytest.mark.parametrize("name", ["ssm_scores", "ssm_pattern"])
def test_a_pattern_is_patched_from_another_run(name: str):
    tokens, other = golden()["input_ids"][:, :20], golden()["input_ids"][:, 20:40]
    full = f"blocks.0.mixer.hook_{name}"
    donor = ours().run_with_cache(other, names_filter=full)[1]
    with ours().hooks(patch(donor, full, positions=[3, 4], heads=[1])):
        patched = ours().run_with_cache(tokens, names_filter=full)[1][full]
    expected = ours().run_with_cache(tokens, names_filter=full)[1][full].clone()
    expected[:, 1, 3:5] = donor[full][:, 1, 3:5]
    assert torch.equal(patched, expected)


def test_a_generation_keeps_the_matrices_of_its_forwards_and_nan_between_them():
    """A step reads earlier positions from the state; a 0 there would say that it does not."""
    tokens, full = golden()["input_ids"][:1, :8], "blocks.0.mixer.hook_ssm_pattern"
    for given, state in ((tokens, None), (tokens[:, 5:], ours()(tokens, return_state=True)[1])):
        n = given.shape[1]
        out = ours().generate(
            given, 3, state=state, names_filter=full, return_type="output", verbose=False
        )
        kept = out.cache[full]
        assert kept.shape == (1, 6, n + 2, n + 2)
        prompt = ours().run_with_cache(given, state=state, names_filter=full)[1][full]
        assert close(kept[..., :n, :n], prompt)
        unknown = torch.ones(n + 2, n + 2, dtype=torch.bool).tril(-1)
        unknown[:n] = False
        assert torch.equal(kept.isnan(), unknown.expand_as(kept))


# --- the published sizes --------------------------------------------------------------------------

PUBLISHED = {
    "mamba2": (
        {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128}
        | {"head_dim": 64, "state_size": 128, "n_groups": 8, "tie_word_embeddings": False},
        7_285_403_648,
    ),
    "bamba": (
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27], "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128}
        | {"mamba_n_groups": 1, "mamba_expand": 2, "rope_theta": 10000.0},
        9_780_235_392,
    ),
    "mamba": (
        {"vocab_size": 50280, "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16},
        2_768_345_600,
    ),
    "falcon_mamba": (
        {"vocab_size": 65024, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 16}
        | {"tie_word_embeddings": False},
        7_272_665_088,
    ),
}


def published_names(family: str) -> Counter[tuple[str, tuple[int, ...]]]:
    """Return names and shapes in memory at the published size, and how often each is there."""
    lines = (GOLDEN / "keys" / f"keys_published_{family}.txt").read_text().splitlines()[1:]
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for line in lines:
        name, shape, n = re.fullmatch(r"(\S+) \(([\d, ]+)\)\s+x(\d+) .*", line).groups()
        found[name, tuple(int(s) for s in shape.split(",") if s.strip())] += int(n)
    return found


@every
def test_names_shapes_and_counts_of_the_published_size(family: str):
    config, total = PUBLISHED[family]
    of = FAMILY[family]
    cfg = of.read({"model_type": family, **config}, {})
    model = HookedHybrid.meta(cfg)
    assert sum(p.numel() for p in model.parameters()) == total == count_parameters(cfg).total
    written = revert(of.rules(cfg), dict(model.named_parameters()))
    ours_ = Counter((re.sub(r"\.\d+\.", ".{i}.", name), tuple(t.shape)) for name, t in written)
    theirs = published_names(family)
    tied = [key for key in theirs if any(re.fullmatch(p, key[0]) for p in of.ignored(cfg))]
    assert len(tied) == cfg.tied_embedding
    assert ours_ == Counter({key: n for key, n in theirs.items() if key not in tied})


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24}, 128_989_632),
        ({"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80}, 2_702_599_680),
    ],
)
def test_counts_of_the_first_mamba2_models(changes: dict, total: int):
    config = {"model_type": "mamba2", "vocab_size": 50288, "head_dim": 64, "state_size": 128}
    config |= {"n_groups": 1, "tie_word_embeddings": True, **changes}
    assert count_parameters(FAMILY["mamba2"].read(config, {})).total == total
