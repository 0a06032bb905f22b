"""Every public call that takes hook names takes them in all spellings, with one meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import ActivationCache, HookedHybrid, HookNameError, interventions
from hooked_hybrid.analysis import activation_patching, attribution
from hooked_hybrid.analysis.attribution_check import compare_with_patching
from hooked_hybrid.analysis.path_patching import path_patch, path_patch_each
from hooked_hybrid.harvest.harvesting import harvest
from hooked_hybrid.hooks.names import matching
from hooked_hybrid.niah import needles, prompts, sweep
from tests.models import random_tokens

LAYER = 2
EXACT = f"blocks.{LAYER}.attn.hook_z"
SPELLINGS = {
    "exact": EXACT,
    "shorthand": ("z", LAYER),
    "from the last": ("z", LAYER - 6),
    "of one word": f"z{LAYER}",
    "pattern": f"blocks.{LAYER}.attn.hook_[z]",
    "in a list": [("z", LAYER)],
    "in a tuple": (f"blocks.{LAYER}*hook_z",),
}
EVERY = {
    "names": ["blocks.2.attn.hook_z", "blocks.5.attn.hook_z"],
    "shorthands": [("z", 5), ("z", -4)],
    "pattern": "blocks.*.attn.hook_z",
    "mixed": ("blocks.2.attn.*z", ("z", 5)),
}


@pytest.fixture(scope="module")
def model() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin").requires_grad_(False)


@pytest.fixture(scope="module")
def runs(model: HookedHybrid) -> tuple[Tensor, Tensor, ActivationCache]:
    clean, corrupted = random_tokens(n_pos=5), random_tokens(n_pos=5, seed=1)
    return clean, corrupted, model.run_with_cache(clean, names_filter="*")[1]


@pytest.fixture(scope="module")
def meant(model: HookedHybrid, runs: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """Return what each call gives for one full name, and for a predicate that is true of two."""
    where = lambda name: name.endswith("attn.hook_z")  # noqa: E731
    folder = tmp_path_factory.mktemp("meant")
    return [calls(model, runs, n, folder / str(i)) for i, n in enumerate((EXACT, where))]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3].sum()


def double(x: Tensor, hook: Any) -> Tensor:
    return 2 * x


def calls(model: HookedHybrid, runs: Any, names: Any, tmp_path: Any) -> dict[str, Any]:
    """Return what each call gives for these names, as values that can be compared."""
    clean, corrupted, cache = runs
    quiet = {"verbose": False}
    found: dict[str, Any] = {}
    found["run_with_hooks"] = model.run_with_hooks(clean, fwd_hooks=[(names, double)])
    with model.hooks(fwd_hooks=[(names, double)]):
        found["hooks"] = model(clean)
        found["list_hooks"] = list(model.list_hooks(names))
    handles = model.add_hook(names, double) + model.add_perma_hook(names, double, dir="bwd")
    found["add_hook"] = [str(handle.point.name) for handle in handles]
    model.reset_hooks(including_permanent=True)
    model.check_hooks_to_add([(names, double)], [(names, double)])
    found["run_with_cache"] = list(model.run_with_cache(clean, names_filter=names)[1])
    found["get_caching_hooks"] = [n for n, _ in model.get_caching_hooks(names)[1]]
    kept = model.add_caching_hooks(names)
    model(clean)
    model.reset_hooks()
    found["add_caching_hooks"] = list(kept)
    written = model.generate(
        clean,
        3,
        fwd_hooks=[(names, double)],
        prefill_hooks=[(names, double)],
        generation_hooks=[(names, double)],
        names_filter=names,
        return_type="output",
        verbose=False,
    )
    found["generate"] = [*written.cache.keys(), written.logprobs]
    found["cache.names_of"] = cache.names_of(names)
    found["cache.select"] = list(cache.select(names))
    some = interventions.patch(cache, names, positions=[1, 2])
    found["patch"] = model.run_with_hooks(corrupted, fwd_hooks=some)
    mapping = {n: cache[n] for n in cache}
    if not _is_from_the_last(names):  # a mapping does not know how many layers there are
        some = interventions.patch(mapping, names)
        found["patch, mapping"] = model.run_with_hooks(corrupted, fwd_hooks=some)
    found["freeze"] = model.run_with_hooks(corrupted, fwd_hooks=interventions.freeze(cache, names))
    at = interventions.on_rows(interventions.hook_at(double, [1]), [0])
    found["hook_at, on_rows"] = model.run_with_hooks(clean, fwd_hooks=[(names, at)])
    grid = activation_patching.generic_activation_patch(
        model, corrupted, cache, metric, names, **quiet
    )
    found["generic_activation_patch"] = [*grid.labels[0], grid.values]
    of = attribution.attribution_patching(model, clean, corrupted, metric, names, **quiet)
    found["attribution_patching"] = [*of.values.items()]
    agreement = compare_with_patching(
        model, clean, corrupted, metric, names, n_cells=2, verbose=False
    )
    found["compare_with_patching"] = [row.patched for row in agreement.rows]
    texts = ["the old man", "a large house"]
    rows = harvest(model, texts, names, tmp_path, verbose=False)
    found["harvest"] = rows.names
    batch = next(iter(rows.batches([*map(str, rows.names)], 3, seed=None)))
    found["harvested"] = list(batch.values())
    return found


def _is_from_the_last(names: Any) -> bool:
    listed = names if isinstance(names, list) else [names]
    return any(isinstance(n, tuple) and isinstance(n[-1], int) and n[-1] < 0 for n in listed)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_call_takes_a_name_in_every_spelling(
    spelling: str, model: HookedHybrid, runs: Any, meant: Any, tmp_path: Any
) -> None:
    found = calls(model, runs, SPELLINGS[spelling], tmp_path)
    assert meant[0]["run_with_cache"] == [EXACT] == meant[0]["harvest"]
    assert not torch.equal(meant[0]["run_with_hooks"], model(runs[0]))  # the hook did act
    assert not [call for call in found if not same(meant[0][call], found[call])]
    assert len(found) == len(meant[0]) - _is_from_the_last(SPELLINGS[spelling])


@pytest.mark.parametrize("spelling", EVERY)
def test_every_call_takes_several_names_in_every_spelling(
    spelling: str, model: HookedHybrid, runs: Any, meant: Any, tmp_path: Any
) -> None:
    found = calls(model, runs, EVERY[spelling], tmp_path)
    assert meant[1]["run_with_cache"] == EVERY["names"]
    assert not [call for call in found if not same(meant[1][call], found[call])]


def test_what_holds_values_is_read_in_every_spelling(
    model: HookedHybrid, runs: Any, tmp_path: Any
) -> None:
    clean, corrupted, cache = runs
    of = attribution.attribution_patching(
        model, clean, corrupted, metric, EVERY["pattern"], "head", verbose=False
    )
    grid = activation_patching.generic_activation_patch(
        model, corrupted, cache, metric, EVERY["pattern"], ("head",), verbose=False
    )
    rows = harvest(model, ["the old man"], EVERY["pattern"], tmp_path / "rows", verbose=False)
    for key in (EXACT, ("z", LAYER), f"z{LAYER}"):
        assert cache[key] is cache.cache_dict[EXACT]
        assert torch.equal(of[key], of.values[EXACT])
        assert torch.equal(grid[key], grid.values[0])
        assert torch.equal(grid[key, 3], grid.values[0, 3])
        assert torch.equal(rows.load(0, key), rows.load(0, EXACT))
        assert rows.shape(key) == rows.shape(EXACT)
        assert key in cache
        assert cache.full_name(key) == EXACT
    one = f"blocks.{LAYER}.attn.hook_[z]"
    for read in (cache.last_token, cache.mean_over_pos, cache.positions):
        assert torch.equal(read(one), read(EXACT))
    assert torch.equal(rows.load(0, one), rows.load(0, EXACT))
    assert torch.equal(grid[one, 2], grid.values[0, 2])
    several = EVERY["pattern"]
    assert list(cache[several]) == list(of[several].values) == EVERY["names"]
    assert cache[several]["z", LAYER] is cache[EXACT]
    assert cache[several].model is model
    assert torch.equal(cache[several].last_token(EXACT), cache.last_token(EXACT))
    assert isinstance(next(iter(rows.batches(several, 2))), dict)
    for read in (cache.full_name, cache.last_token, lambda key: rows.load(0, key)):
        with pytest.raises(HookNameError, match="2 names fit .* one is wanted"):
            read(several)


def test_a_sweep_over_layers_takes_every_spelling(model: HookedHybrid, runs: Any) -> None:
    _, corrupted, cache = runs
    patch_heads, quiet = activation_patching.patch_heads, {"verbose": False}
    every = patch_heads(model, corrupted, cache, metric, **quiet)
    same_ = patch_heads(model, corrupted, cache, metric, "blocks.*.attn.hook_z", **quiet)
    assert every.labels == same_.labels == ((2, 5), tuple(range(every.values.shape[1])))
    assert torch.equal(every.values, same_.values)
    for one in (EXACT, ("z", LAYER), "z2"):
        alone = patch_heads(model, corrupted, cache, metric, one, **quiet)
        assert alone.labels[0] == (LAYER,)
        assert torch.equal(alone.values[0], every.values[0])
    with pytest.raises(ValueError, match="selects several points of a layer"):
        patch_heads(model, corrupted, cache, metric, "blocks.*.attn.hook_[zv]", **quiet)
    with pytest.raises(HookNameError, match="no layer has 'zz'"):
        patch_heads(model, corrupted, cache, metric, "zz", **quiet)
    of = attribution.attribution_patching(
        model, runs[0], corrupted, metric, EVERY["pattern"], "head", verbose=False
    )
    scores = of.head_scores()
    assert torch.equal(of.head_scores("blocks.*.attn.hook_z").values, scores.values)
    assert torch.equal(of.head_scores(("z", 5)).values, scores.values[1:])
    stacked, labels = cache.stack_activation("z", return_labels=True)
    assert labels == EVERY["names"]
    assert torch.equal(cache.stack_activation("blocks.*.attn.hook_z"), stacked)
    assert cache.stack_activation(EXACT, return_labels=True)[1] == [EXACT]
    assert cache.stack_activation(("z", -1), return_labels=True)[1] == EVERY["names"][1:]


def test_paths_have_ends_in_every_spelling(model: HookedHybrid, runs: Any) -> None:
    clean, corrupted, _ = runs
    cache = model.run_with_cache(corrupted, names_filter="*")[1]
    run = lambda senders, receivers: path_patch(  # noqa: E731
        model, clean, cache, senders, receivers, metric
    )
    meant = run(("z", LAYER), ("mlp_in", 4))
    assert float(meant) != float(metric(model(clean)))
    for sender in (EXACT, f"blocks.{LAYER}*hook_z", [("z", LAYER)], f"blocks.{LAYER}.attn.*_z"):
        assert torch.equal(run(sender, "blocks.4.hook_mlp_in"), meant)
    both = run([("z", 2, 1), ("z", 5, 1)], [("mlp_in", i) for i in range(6)])
    assert torch.equal(run(("blocks.*.attn.hook_z", 1), "blocks.*.hook_mlp_in"), both)
    assert torch.equal(run("hook_embed", "blocks.0.hook_mlp_in"), run(("embed",), ("mlp_in", 0)))
    each = path_patch_each(
        model, clean, cache, ["blocks.*.hook_mlp_out"], ("final",), metric, verbose=False
    )
    assert len(each) == model.cfg.n_layers
    with pytest.raises(HookNameError, match="hook_mlp_ou"):
        run("blocks.2.hook_mlp_ou", ("final",))
    with pytest.raises(HookNameError, match="hook_q"):
        run("blocks.2.attn.hook_q", ("final",))  # it writes nothing to the stream


def test_a_sweep_of_needles_takes_hooks_in_every_spelling(model: HookedHybrid) -> None:
    cells = prompts.grid(model, [needles.PAPER], lengths=[64], depths=[0.5])
    zero = lambda x, hook: 0 * x  # noqa: E731
    table = sweep.niah(
        model,
        cells,
        {str(names): [(names, zero)] for names in (EXACT, ("z", LAYER), "blocks.2.*_z")},
        max_new_tokens=4,
        verbose=False,
    )
    assert len(table) == 3
    assert table["output"].nunique() == 1


def test_true_leaves_out_large_points_and_a_star_has_them_too(model: HookedHybrid) -> None:
    tokens = random_tokens(n_pos=4)
    usual = model.run_with_cache(tokens)[1]
    assert list(model.run_with_cache(tokens, names_filter=True)[1]) == list(usual)
    every = model.run_with_cache(tokens, names_filter="*")[1]
    assert list(every) == list(model.run_with_cache(tokens, names_filter=lambda _: True)[1])
    large = set(every) - set(usual)
    assert large == {name for name, point in model.hook_dict.items() if point.is_large} != set()
    for filter_, names in ((True, usual), ("*", every)):
        out = model.generate(tokens, 2, names_filter=filter_, return_type="output", verbose=False)
        assert set(out.cache) == set(names)
    with pytest.raises(HookNameError, match=r"was not kept, as it is large.*names_filter='\*'"):
        usual[min(large)]
    with pytest.raises(TypeError, match="not False|Type-check error"):
        model.run_with_cache(tokens, names_filter=False)


def test_a_name_that_matches_nothing_is_an_error_in_every_spelling(
    model: HookedHybrid, runs: Any
) -> None:
    clean, _, cache = runs
    for wrong, said in (
        ("blocks.2.attn.hook_zz", "no hook point is named 'blocks.2.attn.hook_zz'; the nearest"),
        (("z", 3), "no hook point is named 'blocks.3.attn.hook_z'; the nearest"),
        (("z", 7), "blocks.7.attn.hook_z"),
        (("z", -7), "hook_z"),
        ("blocks.*.attn.hook_zz", "no hook point fits 'blocks.*.attn.hook_zz'; they look like"),
        ("blocks.3.*.hook_z", "look like blocks.2.attn.hook_z, blocks.5.attn.hook_z"),
        ([EXACT, "blocks.9.*"], "fits 'blocks.9.*'"),
        ("z", "nearest are"),
    ):
        for call in (
            lambda names: model.run_with_cache(clean, names_filter=names),
            lambda names: model.run_with_hooks(clean, fwd_hooks=[(names, double)]),
            lambda names: interventions.patch(cache, names),
        ):
            with pytest.raises(HookNameError) as error:
                call(wrong)
            assert said in str(error.value)
    for wrong in (3, [3], [("z", True)], ["z", 2]):
        with pytest.raises(TypeError, match="a name filter is a name, a pattern|Type-check error"):
            model.run_with_cache(clean, names_filter=wrong)
    small = cache.select([EXACT])
    with pytest.raises(HookNameError, match="was not kept"):
        small["blocks.*.attn.hook_pattern"]
    with pytest.raises(HookNameError, match="was not kept"):
        interventions.patch(small, ("pattern", 2))


def test_a_tuple_is_a_list_of_names_unless_its_second_entry_is_a_layer() -> None:
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    assert matching(("embed", "hook_embed"), names) == names[:1]
    assert matching(("hook_embed", "blocks.1.hook_resid_pre"), names) == [names[0], names[2]]
    assert matching(("resid_pre", -2), names) == names[1:2]
    assert matching(("embed", None), names) == names[:1]
    assert matching(["resid_pre1", ("resid_pre", 0)], names) == names[1:]
