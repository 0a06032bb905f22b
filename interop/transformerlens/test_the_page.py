"""docs/transformerlens.md, line by line: the same calls on TransformerLens's classes and on ours.

A name of the page is "the same" where a call that its users write gives the same here. What differs
stands in `DIFFERENT`, with words of the page that say so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_act_name
from transformers import AutoTokenizer  # noqa: TID251

import hooked_hybrid
from hooked_hybrid import HookedHybrid
from hooked_hybrid.hooks import names
from hooked_hybrid.presets.packaged import packaged_models

PAGE = (Path(__file__).parents[2] / "docs" / "transformerlens.md").read_text()
WORDS = " ".join(PAGE.split())
PAIRS: dict[str, tuple[type, type]] = {
    "HookPoint": (HookPoint, hooked_hybrid.HookPoint),
    "HookedRootModule": (HookedRootModule, hooked_hybrid.HookedRootModule),
    "ActivationCache": (ActivationCache, hooked_hybrid.ActivationCache),
    "FactoredMatrix": (FactoredMatrix, hooked_hybrid.FactoredMatrix),
    "TransformerBridge": (TransformerBridge, HookedHybrid),
}
MODEL_METHODS = (
    "forward generate run_with_hooks run_with_cache to_tokens to_string to_str_tokens "
    "to_single_token to_single_str_token get_token_position tokens_to_residual_directions"
).split()

# --- signatures -----------------------------------------------------------------------------------

MISSING = {
    "HookPoint.enable_reshape": "`enable_reshape`",
    "HookedRootModule.cache_all": "`cache_all`, `cache_some`",
    "HookedRootModule.cache_some": "`cache_all`, `cache_some`",
    "HookedRootModule.check_and_add_hook": "`check_and_add_hook`",
    "ActivationCache.compute_ssm_effective_attention": "compute_ssm_effective_attention",
    "ActivationCache.compute_ssm_state": "compute_ssm_state",
    "ActivationCache.logit_lens": "logit_lens",
    "ActivationCache.ssm_layers": "`ssm_layers`",
}
"""Methods of theirs that ours lack, and the words of the page that say so."""

DIFFERENT = {
    "HookPoint.add_hook(alias_names)": "`alias_names`",
    "HookedRootModule.check_hooks_to_add(*)": "`check_hooks_to_add` takes lists of hooks",
    "ActivationCache.remove_batch_dim(batch_size)": "`remove_batch_dim(batch_size=)`",
    "TransformerBridge.to_str_tokens(padding_side)": "`padding_side` of `to_str_tokens`",
    "TransformerBridge.get_token_position(padding_side)": "`padding_side` of `to_str_tokens`",
    "TransformerBridge.generate(do_sample)": "`do_sample=False`",
    "TransformerBridge.run_with_cache(return_cache_object)": "`return_cache_object`",
    "TransformerBridge.run_with_hooks(remove_batch_dim)": "`remove_batch_dim` of `run_with_hooks`",
} | {
    f"TransformerBridge.generate({name})": f"`{name}`"
    for name in (
        "freq_penalty repetition_penalty use_past_kv_cache output_logits return_cache "
        "return_input_tokens device stopping_criteria"
    ).split()
}
"""Arguments that ours lack or whose default differs, and the words of the page that say so."""

FILLED_IN = {"temperature": 1.0, "return_type": "logits"}
"""Defaults that ours fill in later, so that an argument without effect can be refused."""

OTHER_MODELS = {"self", "pixel_values", "forced_bos_token_id", "multimodal_kwargs", "kwargs"}
"""Arguments for other kinds of model, or that a catch-all takes."""


def methods() -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Yield every public method of theirs that ours answer to, by name."""
    for kind, (theirs, ours) in PAIRS.items():
        listed = MODEL_METHODS if kind == "TransformerBridge" else sorted(vars(theirs))
        for name in listed:
            method = inspect.getattr_static(theirs, name)
            if name.startswith("_") or not inspect.isfunction(method) or name == "forward":
                continue
            yield f"{kind}.{name}", method, inspect.getattr_static(ours, name, None)


METHODS = {name: (theirs, ours) for name, theirs, ours in methods()}


@pytest.mark.parametrize("name", METHODS)
def test_the_arguments_are_theirs_or_the_page_says_how_they_differ(name: str):
    theirs, ours = METHODS[name]
    if ours is None:
        assert MISSING[name] in WORDS
        return
    assert name not in MISSING
    mine = dict(inspect.signature(ours).parameters)
    if name.endswith("run_with_hooks") or name.endswith("run_with_cache"):
        mine |= inspect.signature(HookedHybrid.forward).parameters
    different = set()
    for key, parameter in inspect.signature(theirs).parameters.items():
        if key in OTHER_MODELS or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        filled_in = FILLED_IN.get(key) == parameter.default
        if key not in mine or not (filled_in or same_default(parameter.default, mine[key].default)):
            different.add(key)
    if f"{name}(*)" in DIFFERENT:
        assert different
        assert DIFFERENT[f"{name}(*)"] in WORDS
        return
    written = {key.split("(")[1][:-1] for key in DIFFERENT if key.startswith(f"{name}(")}
    assert different == written
    assert all(DIFFERENT[f"{name}({key})"] in WORDS for key in different)


def same_default(theirs: Any, ours: Any) -> bool:
    """Whether two defaults mean the same: an empty list and an empty tuple do, "" is no prompt."""
    if ours is inspect.Parameter.empty:
        return theirs in (inspect.Parameter.empty, "")
    return theirs == ours or (theirs == [] and ours == ())


# --- hook points and modules ----------------------------------------------------------------------


def module_of(root: type, point: type) -> Any:
    """Return a module of two points and a weight, made of one library's classes."""

    class Module(root):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.hook_in, self.hook_out = point(), point()
            self.linear = nn.Linear(3, 3)
            with torch.no_grad():
                self.linear.weight.copy_(torch.arange(9.0).view(3, 3) / 7)
                self.linear.bias.copy_(torch.arange(3.0))
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_out(self.linear(self.hook_in(x)))

    return Module()


def theirs_and_ours() -> tuple[Any, Any]:
    """Return the module of TransformerLens's classes and that of ours."""
    ours = module_of(hooked_hybrid.HookedRootModule, lambda: hooked_hybrid.HookPoint("batch pos d"))
    return module_of(HookedRootModule, HookPoint), ours


X = torch.arange(30.0).view(2, 5, 3) / 10


def scenario_order(module: Any) -> Any:
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda tensor, hook: seen.append(f"{name} {hook.name}")

    module.hook_in.add_hook(note("first"))
    module.hook_in.add_hook(note("before"), prepend=True)
    module.add_hook("hook_out", note("out"))
    module.add_perma_hook(lambda name: name.endswith("in"), note("kept"))
    module(X)
    module.reset_hooks()
    module(X)
    module.reset_hooks(including_permanent=True)
    module(X)
    return seen


def scenario_blocks(module: Any) -> Any:
    def scale(by: float) -> Any:
        return lambda tensor, hook: tensor * by

    results = []
    module.add_hook("hook_in", scale(2.0))
    with module.hooks([("hook_in", scale(3.0))]):
        with module.hooks([(lambda name: name.startswith("hook"), scale(0.5))]):
            results.append(module(X))
        results.append(module(X))
    results.append(module(X))
    try:
        with module.hooks([("hook_out", scale(9.0))]):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        results.append(module(X))
    results.append(module.run_with_hooks(X, fwd_hooks=[("hook_out", scale(4.0))]))
    results.append(module(X))
    return [r.detach() for r in results]


def scenario_listing(module: Any) -> Any:
    def fn(tensor: Tensor, hook: Any) -> None:
        return None

    module.add_hook("hook_in", fn)
    module.add_hook("hook_in", fn, dir="bwd")
    module.add_perma_hook("hook_out", fn)
    calls: list[dict[str, Any]] = [
        {},
        {"name_filter": "hook_in"},
        {"name_filter": ["hook_out"]},
        {"name_filter": lambda name: name == "hook_in"},
        {"dir": "bwd"},
        {"including_permanent": False},
    ]
    counts = [{k: len(v) for k, v in module.list_hooks(**call).items()} for call in calls]
    flags = [
        (p.has_hooks(), p.has_hooks("fwd"), p.has_hooks("bwd"), p.has_hooks("both", False))
        for p in (module.hook_in, module.hook_out)
    ]
    names_shown = [p.name in repr(p) for p in (module.hook_in, module.hook_out)]
    module.hook_in.remove_hooks("bwd")
    return counts, flags, names_shown, {k: len(v) for k, v in module.list_hooks().items()}


def scenario_levels(module: Any) -> Any:
    def fn(tensor: Tensor, hook: Any) -> None:
        return None

    for level in (None, 1, 2):
        module.hook_in.add_hook(fn, level=level)
    module.remove_all_hook_fns(level=2)
    left = len(module.hook_in.fwd_hooks)
    module.hook_in.ctx["a"] = 1
    module.remove_all_hook_fns()
    kept = dict(module.hook_in.ctx)
    module.clear_contexts()
    return left, kept, dict(module.hook_in.ctx)


def scenario_gradients(module: Any) -> Any:
    got: list[Tensor] = []
    module.hook_in.add_hook(lambda grad, hook: got.append(grad.clone()), dir="bwd")
    x = X.clone().requires_grad_()
    with module.hooks(bwd_hooks=[("hook_out", lambda grad, hook: (grad * 2,))]):
        module(x).sum().backward()
    assert x.grad is not None
    return got, x.grad


def scenario_caches(module: Any) -> Any:
    _, cached = module.run_with_cache(X)
    _, some = module.run_with_cache(X, names_filter=["hook_out"])
    _, by_rule = module.run_with_cache(X, names_filter=lambda name: name == "hook_in")
    _, one = module.run_with_cache(X[:1], remove_batch_dim=True, names_filter="hook_in")
    filled: dict[str, Tensor] = {}
    same = module.add_caching_hooks("hook_out", cache=filled)
    module(X)
    module.reset_hooks()
    kept, fwd, bwd = module.get_caching_hooks("hook_in", incl_bwd=True, pos_slice=[0, 2])
    with module.hooks(fwd, bwd):
        module(X.clone().requires_grad_()).sum().backward()
    listed = [dict(c.items()) for c in (cached, some, by_rule, one, filled, kept)]
    return [{k: v.detach() for k, v in c.items()} for c in listed], same is filled


SCENARIOS = {
    name.removeprefix("scenario_"): value
    for name, value in list(globals().items())
    if name.startswith("scenario_")
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_module_of_either_library_does_the_same(name: str):
    theirs, ours = (SCENARIOS[name](module) for module in theirs_and_ours())
    assert_alike(ours, theirs)


SLICES: dict[str, Any] = {
    "an int": 3,
    "the last": -1,
    "a numpy int": np.int64(2),
    "a tensor of one": torch.tensor(2),
    "a start and a stop": (1, 4),
    "a stop": (2,),
    "a step": (0, 5, 2),
    "a list": [0, 3],
    "negative ones": [-1, 0],
    "a tensor": torch.tensor([1, 4]),
    "an array": np.array([1, 4]),
    "a mask": torch.tensor([True, False, True, False, False]),
    "everything": None,
}


@pytest.mark.parametrize("where", SLICES)
def test_pos_slice_keeps_what_theirs_keeps(where: str):
    theirs, ours = theirs_and_ours()
    results = [m.run_with_cache(X, pos_slice=SLICES[where])[1] for m in (theirs, ours)]
    assert_alike(*({k: v.detach() for k, v in c.items()} for c in reversed(results)))


def assert_alike(ours: Any, theirs: Any) -> None:
    """Fail unless two nested results agree."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_alike(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)) and not isinstance(theirs, str):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    else:
        assert ours == theirs


# --- names, matrices ------------------------------------------------------------------------------

SHORTHANDS: list[tuple[Any, ...]] = [
    ("k", 6, "a"),
    ("pattern", 2),
    ("embed",),
    ("normalized", 27, "ln2"),
    ("k6",),
    ("scale4ln1",),
    ("pre5",),
    ("resid_pre", 0),
    ("attn_scores", 1),
    ("mlp_out", 3),
    ("rot_q", 2),
    ("post", 2, "mlp"),
]


@pytest.mark.parametrize("shorthand", SHORTHANDS, ids=str)
def test_get_act_name_gives_the_same_name(shorthand: tuple[Any, ...]):
    assert names.get_act_name(*shorthand) == get_act_name(*shorthand)


MATRICES: dict[str, Callable[[Any], Any]] = {
    "AB": lambda m: m.AB,
    "BA": lambda m: m.BA,
    "T": lambda m: m.T.AB,
    "S": lambda m: m.S,
    "norm": lambda m: m.norm(),
    "eigenvalues": lambda m: m.eigenvalues.abs().sort().values,
    "singular values": lambda m: m.svd()[1],
    "the product of the decomposition": lambda m: (
        m.U @ torch.diag_embed(m.S) @ m.Vh.transpose(-1, -2)
    ),
    "collapse_l": lambda m: m.collapse_l().abs(),
    "collapse_r": lambda m: m.collapse_r().abs(),
    "make_even": lambda m: m.make_even().AB,
    "corner": lambda m: m.get_corner(2),
    "a row": lambda m: m[..., 1:3, :].AB,
    "an element": lambda m: m[..., 1, 2].AB if hasattr(m[..., 1, 2], "AB") else m[..., 1, 2],
    "times a vector": lambda m: m @ torch.ones(m.AB.shape[-1]),
    "times a matrix": lambda m: (m @ torch.ones(m.AB.shape[-1], 2)).AB,
    "from the left": lambda m: (torch.ones(2, m.AB.shape[-2]) @ m).AB,
    "times two": lambda m: (m * 2).AB,
    "unsqueeze": lambda m: m.unsqueeze(0).AB,
    "pair": lambda m: m.pair,
    "ndim": lambda m: m.ndim,
    "shape": lambda m: tuple(m.shape),
}


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stacked"])
@pytest.mark.parametrize("name", MATRICES)
def test_factored_matrices_agree(name: str, stacked: bool):
    torch.manual_seed(0)
    shape = (4,) if stacked else ()
    a, b = torch.randn(*shape, 5, 2), torch.randn(*shape, 2, 5)
    wanted = MATRICES[name](FactoredMatrix(a, b))
    assert_alike(MATRICES[name](hooked_hybrid.FactoredMatrix(a, b)), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["eigenvalues", "singular values"])
def test_factored_matrices_in_16_bits_agree(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    a, b = torch.randn(5, 2, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    wanted = MATRICES[name](FactoredMatrix(a, b))
    got = MATRICES[name](hooked_hybrid.FactoredMatrix(a, b))
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0.02, atol=0.02)


# --- the model ------------------------------------------------------------------------------------

TEXTS = ["the old man saw the river", "the sea", "the best thing to do in the city is"]


@cache
def models() -> tuple[Any, HookedHybrid]:
    """Return TransformerLens's bridge and our model of the packaged Jamba."""
    folder = str(packaged_models()["tiny-jamba"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, tokenizer=tokenizer, dtype=torch.float32)
    bridge.eval()
    return bridge, HookedHybrid.from_pretrained("tiny-jamba")


CALLS: dict[str, Callable[[Any], Any]] = {
    "to_tokens of a text": lambda m: m.to_tokens(TEXTS[0]),
    "to_tokens without BOS": lambda m: m.to_tokens(TEXTS[0], prepend_bos=False),
    "to_tokens of several": lambda m: m.to_tokens(TEXTS),
    "to_tokens padded on the left": lambda m: m.to_tokens(TEXTS, padding_side="left"),
    "to_str_tokens of a text": lambda m: m.to_str_tokens(TEXTS[1]),
    "to_str_tokens of tokens": lambda m: m.to_str_tokens(m.to_tokens(TEXTS[0])),
    "to_str_tokens without BOS": lambda m: m.to_str_tokens(TEXTS[0], prepend_bos=False),
    "to_string of a batch": lambda m: m.to_string(m.to_tokens(TEXTS[0])),
    "to_string of a row": lambda m: m.to_string(m.to_tokens(TEXTS[0])[0]),
    "to_single_token": lambda m: m.to_single_token("river"),
    "to_single_str_token": lambda m: m.to_single_str_token(11),
    "get_token_position": lambda m: m.get_token_position("old", TEXTS[0]),
    "its last": lambda m: m.get_token_position("the", TEXTS[0], mode="last"),
    "directions of a token": lambda m: m.tokens_to_residual_directions(11),
    "directions of tokens": lambda m: m.tokens_to_residual_directions(torch.tensor([11, 12])),
    "directions of a text": lambda m: m.tokens_to_residual_directions("river"),
    "logits": lambda m: m(TEXTS[0]),
    "loss": lambda m: m(TEXTS[0], return_type="loss"),
    "both": lambda m: m(TEXTS[0], return_type="both"),
    "loss of each token": lambda m: m(TEXTS[0], return_type="loss", loss_per_token=True),
    "logits of tokens": lambda m: m(m.to_tokens(TEXTS[0])),
    "texts padded on the left": lambda m: m(TEXTS, padding_side="left")[:, -1],
    "their loss": lambda m: m(TEXTS, padding_side="left", return_type="loss"),
    "stop_at_layer": lambda m: m(TEXTS[0], stop_at_layer=2),
    "stop_at_layer from the end": lambda m: m(TEXTS[0], stop_at_layer=-1),
    "start_at_layer": lambda m: m(m(TEXTS[0], stop_at_layer=2), start_at_layer=2),
    "a mask": lambda m: m(
        m.to_tokens(TEXTS[0]).repeat(2, 1), attention_mask=torch.tensor([[1] * 7, [0] + [1] * 6])
    )[:, -1],
    "a hooked run": lambda m: m.run_with_hooks(
        TEXTS[0], fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value * 0.5)]
    ),
    "a slice of positions": lambda m: m.run_with_cache(TEXTS[0], pos_slice=3)[1][
        "blocks.1.hook_resid_pre"
    ],
    "residual streams": lambda m: [m.run_with_cache(TEXTS[0])[1]["resid_post", i] for i in (0, -1)],
    "greedy text": lambda m: m.generate(TEXTS[0], 6, do_sample=False, verbose=False),
    "greedy tokens": lambda m: m.generate(m.to_tokens(TEXTS[0]), 6, do_sample=False, verbose=False),
    "greedy texts": lambda m: m.generate(TEXTS, 6, do_sample=False, verbose=False),
    "sampling from one token": lambda m: m.generate(
        TEXTS[0], 3, do_sample=True, top_k=1, verbose=False
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_the_model_gives_what_theirs_gives(name: str):
    with torch.no_grad():
        theirs, ours = (CALLS[name](model) for model in models())
    if isinstance(theirs, Tensor) and theirs.is_floating_point():
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    else:
        with torch.no_grad():
            assert_alike_loosely(ours, theirs)


def assert_alike_loosely(ours: Any, theirs: Any) -> None:
    """Fail unless results agree, tensors to 1e-5 of their largest entry."""
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike_loosely(a, b)
    elif isinstance(theirs, Tensor) and theirs.is_floating_point():
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    elif isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs
