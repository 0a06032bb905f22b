"""Properties of ActivationCache and of hook names: what each shorthand stands for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import ActivationCache, HookedHybrid
from hooked_hybrid.config import LayerConfig
from hooked_hybrid.hooks.names import (
    ALIASES,
    GROUPS,
    HookNameError,
    get_act_name,
    matching,
    resolve,
)
from tests.layer_configs import CONFIGS as LAYERS
from tests.layer_configs import MAMBA2, config
from tests.models import CONFIGS, griffin_config, random_model, random_tokens

RECURRENT, ATTENTION = (0, 1), 2


@pytest.fixture(scope="module")
def model() -> HookedHybrid:
    return random_model(griffin_config("RRA", d_model=16, d_rnn=16))


@pytest.fixture(scope="module")
def values(model) -> dict[str, Tensor]:
    """Everything of two rows of six tokens, the large values and gradients included."""
    _, kept = model.run_with_cache(
        random_tokens(n_pos=6), names_filter=lambda name: True, incl_bwd=True
    )
    return dict(kept.items())


@pytest.fixture
def cached(model, values) -> ActivationCache:
    return ActivationCache(dict(values), model)


@pytest.fixture
def one_row(model) -> ActivationCache:
    _, kept = model.run_with_cache(random_tokens(batch=1, n_pos=6))
    return kept


def leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1].removeprefix("hook_")


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_the_shorthand_is_what_the_models_submodules_hold(group):
    """Every leaf under it is in the group, and every name of the group is a leaf somewhere.

    `result` is attention's; Mamba-2 has it too, under its full name and ("result", layer, "mixer").
    """
    configs = [*CONFIGS.values(), config(LayerConfig(MAMBA2, None))]
    names = [name for cfg in configs for name in HookedHybrid.meta(cfg).hook_dict]
    inner = re.compile(rf"blocks\.\d+\.{group}\.hook_\w+")
    found = {leaf(n) for n in names if inner.fullmatch(n)}
    assert GROUPS[group] == found - ({"result"} if group == "mixer" else set())


def test_mamba2s_result_has_a_shorthand_where_there_is_no_attention_and_where_there_is():
    names = HookedHybrid.meta(LAYERS["mamba2"]).hook_dict
    assert resolve(("result", 0), names, 3) == "blocks.0.mixer.hook_result"
    assert resolve(("result", 2), names, 3) == "blocks.2.attn.hook_result"
    assert resolve(("result", 2, "mixer"), names, 3) == "blocks.2.mixer.hook_result"


def test_groups_do_not_overlap():
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_hook_point_has_a_shorthand(config):
    """Leaf and layer where that is enough, leaf, layer and submodule always."""
    names, n_layers = HookedHybrid.meta(CONFIGS[config]).hook_dict, CONFIGS[config].n_layers
    for name in names:
        parts = name.split(".")
        layer, submodule = int(parts[1]) if parts[0] == "blocks" else None, None
        if layer is None:
            shorthands: list[Any] = [leaf(name), (leaf(name),)]
        elif len(parts) == 3:
            shorthands = [(leaf(name), layer), f"{leaf(name)}{layer}"]
        else:
            submodule = parts[2]
            shorthands = [(leaf(name), layer, submodule), f"{leaf(name)}{layer}{submodule}"]
            if submodule not in ("ln1", "ln2"):
                shorthands += [(leaf(name), layer), f"{leaf(name)}{layer}"]
        for shorthand in shorthands:
            assert resolve(shorthand, names, n_layers) == name


@pytest.mark.parametrize(
    ("shorthand", "full"),
    [
        (("embed",), "hook_embed"),
        (("k", 6), "blocks.6.attn.hook_k"),
        (("k", 6, "attn"), "blocks.6.attn.hook_k"),
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("pre", 2, "m"), "blocks.2.mlp.hook_pre"),
        (("resid_pre", 2, "b"), "blocks.2.hook_resid_pre"),
        (("resid_pre", 2, ""), "blocks.2.hook_resid_pre"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("k6a",), "blocks.6.attn.hook_k"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("rot_q", 2), "blocks.2.attn.hook_rot_q"),
        (("attn_out", 2), "blocks.2.hook_attn_out"),
        (("mlp_out", 0), "blocks.0.hook_mlp_out"),
        (("resid_post12",), "blocks.12.hook_resid_post"),
        (("blocks.1.attn.hook_z",), "blocks.1.attn.hook_z"),
        (("hook_embed",), "hook_embed"),
    ],
    ids=str,
)
def test_get_act_name_says_what_transformer_lens_says(shorthand, full):
    assert get_act_name(*shorthand) == full


@pytest.mark.parametrize(
    ("shorthand", "full"),
    [
        (("ssm_state", 4), "blocks.4.mixer.hook_ssm_state"),
        (("log_decay", 0), "blocks.0.mixer.hook_log_decay"),
        (("mixer_out", 1), "blocks.1.hook_mixer_out"),
        (("logits",), "unembed.hook_logits"),
        (("act", 3), "blocks.3.mlp.hook_act"),
        (("ssm_B", 1), "blocks.1.mixer.hook_ssm_B"),
        (("ssm_B1",), "blocks.1.mixer.hook_ssm_B"),
        (("expert_out", 1), "blocks.1.mlp.hook_expert_out"),
    ],
    ids=str,
)
def test_get_act_name_knows_the_names_of_hybrids(shorthand, full):
    assert get_act_name(*shorthand) == full


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("attn", "blocks.2.attn.hook_pattern"),
        ("attn_logits", "blocks.2.attn.hook_attn_scores"),
        ("key", "blocks.2.attn.hook_k"),
        ("query", "blocks.2.attn.hook_q"),
        ("value", "blocks.2.attn.hook_v"),
        ("mlp_pre", "blocks.2.mlp.hook_pre"),
        ("mlp_post", "blocks.2.mlp.hook_post"),
    ],
)
def test_aliases_stand_for_what_they_do_in_transformer_lens(cached, alias, name):
    assert cached[alias, 2] is cached.cache_dict[name]
    assert alias in ALIASES


def test_matching_keeps_the_models_order_and_drops_repeats():
    names = ["c", "a", "b"]
    assert matching(["b", "c", "b"], names) == ["c", "b"]
    assert matching("a", names) == ["a"]
    assert matching(lambda name: name != "a", names) == ["c", "b"]


def test_resolve_of_a_full_name_needs_no_rule():
    assert resolve("odd.name1x", ["odd.name1x"], n_layers=1) == "odd.name1x"


# --- reading a cache --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shorthand", "name"),
    [
        (("pattern", 2), "blocks.2.attn.hook_pattern"),
        (("pattern", 2, "attn"), "blocks.2.attn.hook_pattern"),
        (("resid_post", -1), "blocks.2.hook_resid_post"),
        (("ssm_state", -3), "blocks.0.mixer.hook_ssm_state"),
        (("scale", -1, "ln1"), "blocks.2.ln1.hook_scale"),
        ("embed", "hook_embed"),
        ("pattern2", "blocks.2.attn.hook_pattern"),
        ("blocks.1.mixer.hook_conv", "blocks.1.mixer.hook_conv"),
    ],
    ids=str,
)
def test_a_cache_is_read_by_full_name_or_shorthand_and_negative_layers(cached, shorthand, name):
    assert cached[shorthand] is cached.cache_dict[name]
    assert shorthand in cached


def test_gradients_are_read_by_the_name_with_grad_behind_it(cached):
    grad = cached["blocks.2.attn.hook_pattern_grad"]
    assert grad.shape == cached["pattern", 2].shape and not torch.equal(grad, cached["pattern", 2])
    assert cached["resid_post_grad", -1] is cached["blocks.2.hook_resid_post_grad"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (("patern", 2), "blocks.2.attn.hook_pattern"),
        (("pattern", 0), "blocks.2.attn.hook_pattern"),  # a recurrent layer has none
        (("ssm_state", 2), "blocks.1.mixer.hook_ssm_state"),
        (("resid_post", 3), "blocks.2.hook_resid_post"),
        (("resid_post", -4), "blocks.2.hook_resid_post"),
        ("hook_embd", "hook_embed"),
        ("blocks.2.attn.hook_quer", "blocks.2.attn.hook_q"),
        (("scale", 1), "blocks.1.ln1.hook_scale"),  # of which norm?
    ],
    ids=str,
)
def test_what_is_not_there_is_a_key_error_that_lists_the_nearest(cached, wrong, nearest):
    assert wrong not in cached
    with pytest.raises(KeyError) as error:
        cached[wrong]
    assert isinstance(error.value, HookNameError)
    assert nearest in str(error.value).split("nearest")[1]


def test_a_value_that_was_not_kept_is_not_there_though_the_model_has_it(model):
    _, kept = model.run_with_cache(random_tokens(n_pos=4), names_filter="hook_embed")
    assert ("pattern", 2) not in kept and "embed" in kept
    with pytest.raises(HookNameError):
        kept["pattern", 2]


@pytest.mark.parametrize("key", [5, None, 2.5, (), (3, "pattern")], ids=repr)
def test_what_is_no_name_is_not_in_a_cache(cached, unchecked, key):
    assert key not in cached


def test_len_iter_keys_values_and_items_agree_on_full_names(cached):
    assert list(cached) == list(cached.keys()) == [name for name, _ in cached.items()]
    assert len(cached) == len(list(cached)) == len(list(cached.values()))
    for (name, value), again in zip(cached.items(), cached.values(), strict=True):
        assert isinstance(value, Tensor) and value is again and cached[name] is value


def test_values_are_in_the_order_they_were_computed(cached):
    names = [name for name in cached if name.endswith(("resid_pre", "resid_mid", "resid_post"))]
    assert names == [f"blocks.{i}.hook_resid_{w}" for i in range(3) for w in ("pre", "mid", "post")]
    assert next(iter(cached)) == "hook_embed"


def test_get_has_a_default_as_in_any_mapping(cached):
    assert cached.get(("pattern", 2)) is cached["pattern", 2]
    assert cached.get(("pattern", 0)) is None


def test_a_cache_cannot_be_written_to(cached):
    with pytest.raises(TypeError):
        cached["hook_embed"] = torch.zeros(1)


def test_has_embed_tells_whether_the_embedding_was_kept(model, cached):
    _, kept = model.run_with_cache(random_tokens(n_pos=4), names_filter="unembed.hook_logits")
    assert cached.has_embed and not kept.has_embed


def test_repr_tells_how_much_is_kept(cached):
    assert str(len(cached)) in repr(cached) and "MB" in repr(cached)


def test_n_bytes_counts_shared_storage_once(model):
    value = torch.zeros(2, 8)
    kept = ActivationCache({"a": value, "b": value[:1], "c": torch.zeros(3)}, model)
    assert kept.n_bytes == (16 + 3) * 4


# --- the batch axis ---------------------------------------------------------------------------


def test_remove_batch_dim_works_in_place_and_returns_the_cache(one_row):
    before = dict(one_row.items())
    assert one_row.has_batch_dim
    assert one_row.remove_batch_dim() is one_row
    assert not one_row.has_batch_dim
    assert set(one_row) == set(before)
    assert all(torch.equal(one_row[name], before[name][0]) for name in before)


def test_remove_batch_dim_a_second_time_does_nothing(one_row):
    one_row.remove_batch_dim()
    shapes = {name: t.shape for name, t in one_row.items()}
    one_row.remove_batch_dim()
    assert {name: t.shape for name, t in one_row.items()} == shapes


def test_remove_batch_dim_while_running_gives_the_same(model, one_row):
    _, kept = model.run_with_cache(random_tokens(batch=1, n_pos=6), remove_batch_dim=True)
    assert not kept.has_batch_dim
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape[1:] for n, t in one_row.items()}


def test_remove_batch_dim_of_two_rows_is_refused_and_changes_nothing(cached):
    shape = cached["hook_embed"].shape
    with pytest.raises(ValueError, match="2 rows"):
        cached.remove_batch_dim()
    assert cached.has_batch_dim and cached["hook_embed"].shape == shape


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        (1, 1),
        (-1, 1),
        (slice(0, 1), slice(0, 1)),
        ([1, 0, 1], [1, 0, 1]),
        ((0, 1), slice(0, 1)),
        (torch.tensor([1]), [1]),
    ],
    ids=str,
)
def test_rows_are_selected_into_a_new_cache(cached, rows, index):
    before = dict(cached.items())
    some = cached.apply_slice_to_batch_dim(rows)
    assert set(some) == set(before) and some.model is cached.model
    assert all(torch.equal(some[name], before[name][index]) for name in before)
    assert all(cached[name] is before[name] for name in before)
    assert some.has_batch_dim == (not isinstance(rows, int))


def test_selecting_one_row_is_what_running_it_alone_gives(model, cached):
    _, alone = model.run_with_cache(random_tokens(n_pos=6)[1:], remove_batch_dim=True)
    row = cached.apply_slice_to_batch_dim(1)
    for name, value in alone.items():
        torch.testing.assert_close(row[name], value, rtol=1e-5, atol=1e-5)


def test_a_row_outside_is_an_index_error(cached):
    with pytest.raises(IndexError):
        cached.apply_slice_to_batch_dim(2)


def test_rows_cannot_be_selected_without_a_batch_axis(one_row):
    one_row.remove_batch_dim()
    with pytest.raises(ValueError, match="batch axis"):
        one_row.apply_slice_to_batch_dim(0)


# --- moving -----------------------------------------------------------------------------------


def test_to_moves_every_value_and_returns_the_cache(cached):
    names = list(cached)
    assert cached.to("meta") is cached
    assert list(cached) == names and {t.device.type for t in cached.values()} == {"meta"}
    assert cached.model.device.type == "cpu"


def test_to_moves_the_model_on_request():
    model = random_model(griffin_config("A", d_model=8))
    _, kept = model.run_with_cache(random_tokens(n_pos=3))
    kept.to("meta", move_model=True)
    assert model.device.type == "meta"


@pytest.mark.parametrize("mode", [True, False])
def test_toggle_autodiff_switches_autograd_everywhere(cached, mode):
    with torch.set_grad_enabled(not mode):
        cached.toggle_autodiff(mode)
        assert torch.is_grad_enabled() is mode


# --- gradients of a model ---------------------------------------------------------------------


def test_the_default_target_is_the_loss_whatever_the_forward_returns(model):
    tokens, name = random_tokens(n_pos=6), "blocks.2.attn.hook_z"
    _, expected = model.run_with_cache(tokens, "loss", names_filter=name, incl_bwd=True)
    wanted = expected[name + "_grad"]
    assert wanted.abs().max() > 0

    def grad(*args, **kwargs) -> Tensor:
        _, kept = model.run_with_cache(*args, names_filter=name, incl_bwd=True, **kwargs)
        return kept[name + "_grad"]

    for found in (
        grad(tokens),
        grad(input=tokens),
        grad(tokens, return_type="loss"),
        grad(tokens, return_type="both"),
        grad(tokens, "both"),
        grad(tokens, return_state=True),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_partial_forward_has_no_loss_so_gradients_need_a_metric(model, layer):
    with pytest.raises(ValueError, match="metric"):
        model.run_with_cache(
            random_tokens(n_pos=4), names_filter="hook_embed", incl_bwd=True, stop_at_layer=layer
        )


def test_a_metric_is_given_the_logits(model):
    tokens, seen = random_tokens(n_pos=4), []

    def metric(logits: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return logits[..., 0].sum()

    for kwargs in ({}, {"return_type": "both"}, {"return_state": True}):
        model.run_with_cache(
            tokens, names_filter="hook_embed", incl_bwd=True, metric=metric, **kwargs
        )
    assert seen == [(2, 4, model.cfg.d_vocab)] * 3
