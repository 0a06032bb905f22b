"""What tells functions, tokenizers and models apart: complete, and the same in every process."""

from __future__ import annotations

import collections
import functools
import importlib
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooked_hybrid import HookedHybrid, interventions
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.runs.identity.comparing import changes, refusal
from hooked_hybrid.runs.identity.model import hash_once, model_identity, weights_hash
from hooked_hybrid.runs.identity.values import UntoldError, describe, describe_callable
from tests.models import random_tokens, tiny_model

ROOT = Path(__file__).parent.parent.parent


def hook_from(source: str, **names: Any) -> Any:
    """Return the function `f` that a module of this source defines."""
    held: dict[str, Any] = {"__name__": "mine", "torch": torch, "functools": functools, **names}
    exec(compile(textwrap.dedent(source), "mine.py", "exec"), held)
    return held["f"]


PLAIN = "def f(x, hook): return 2 * x"
CLOSURE = "def make(a):\n    def f(x, hook): return a * x\n    return f\nf = make({})"
CELL = "def make():\n    def f(x, hook): return x if x else g\n    {}\n    return f\nf = make()"
GLOBAL = "scale = {}\ndef f(x, hook): return scale * x"
DEEP = "scale = {}\ndef g(x): return scale * x\ndef f(x, hook): return (lambda y: g(y))(x)"
BOUND = "class A:\n    def __init__(s, a): s.a = a\n    def m(s, x, hook): return {}\nf = A({}).m"
CLASS = "class A:\n    by = {}\n    def __call__(self, x, hook): return self.by * x\nf = A()"
WRAPS = "@functools.wraps(torch.relu)\ndef f(x, hook): return {} * x"
TRIES = "def f(x, hook):\n    try: x = x + 1\n    except {}: x = x + 1\n    return x"
MADE = "def f(x, hook):\n    def g(y, *, by={}): return by * y\n    return g(x)"
INSIDE = "def f(x, hook):\n    return any(map(lambda y: y in {{1, {}}}, [x]))"

PAIRS: dict[str, tuple[str, str]] = {
    "a constant": (PLAIN, "def f(x, hook): return 3 * x"),
    "a constant's type": (PLAIN, "def f(x, hook): return 2.0 * x"),
    "the sign of zero": ("def f(x, hook): return 0.0", "def f(x, hook): return -0.0"),
    "a name that is looked up": (
        "def f(x, hook): return x.min()",
        "def f(x, hook): return x.max()",
    ),
    "a text that is no docstring": (
        "def f(x, hook): return x if hook == 'a' else 0",
        "def f(x, hook): return x if hook == 'b' else 0",
    ),
    "a text in a comprehension": (
        "def f(x, hook): return ['a' for _ in x]",
        "def f(x, hook): return ['b' for _ in x]",
    ),
    "a default": ("def f(x, hook, s=1): return s * x", "def f(x, hook, s=2): return s * x"),
    "a keyword default": (
        "def f(x, hook, *, s=1): return s * x",
        "def f(x, hook, *, s=2): return s * x",
    ),
    "what a closure holds": (CLOSURE.format(1), CLOSURE.format(2)),
    "a tensor in a closure": (
        CLOSURE.format("torch.zeros(3)"),
        CLOSURE.format("torch.tensor([0, 0, 1e-45])"),
    ),
    "a tensor's dtype": (
        CLOSURE.format("torch.zeros(2)"),
        CLOSURE.format("torch.zeros(2, dtype=torch.int32)"),
    ),
    "an empty cell": (CELL.format("if 0: g = 1"), CELL.format("g = 1")),
    "a global": (GLOBAL.format(1), GLOBAL.format(2)),
    "a global that is not there": (GLOBAL.format(1), GLOBAL.format("1; del scale")),
    "a global of a global function": (DEEP.format(1), DEEP.format(2)),
    "a bound object": (BOUND.format("s.a * x", 1), BOUND.format("s.a * x", 2)),
    "a method's code": (BOUND.format("s.a * x", 1), BOUND.format("s.a + x", 1)),
    "a class's attribute": (CLASS.format(1), CLASS.format(2)),
    "a function that says it is torch's": (WRAPS.format(1), WRAPS.format(2)),
    "what is caught": (TRIES.format("KeyError"), TRIES.format("ValueError")),
    "an inner function's keyword default": (MADE.format(1), MADE.format(2)),
    "a set of constants": (INSIDE.format(2), INSIDE.format(3)),
    "a partial's keyword": (
        "def g(x, hook, s): return s * x\nf = functools.partial(g, s=1)",
        "def g(x, hook, s): return s * x\nf = functools.partial(g, s=2)",
    ),
    "a partial's argument": (
        "def g(s, x, hook): return s * x\nf = functools.partial(g, 1)",
        "def g(s, x, hook): return s * x\nf = functools.partial(g, 2)",
    ),
    "a mark": (PLAIN, f"{PLAIN}\nf.positions = (3,)"),
    "a module's weight": (
        "f = torch.nn.Linear(1, 1); f.requires_grad_(False).weight.fill_(1); f.bias.fill_(0)",
        "f = torch.nn.Linear(1, 1); f.requires_grad_(False).weight.fill_(2); f.bias.fill_(0)",
    ),
    "a cached function": (
        "@functools.lru_cache\ndef f(x, hook): return 1",
        "@functools.lru_cache\ndef f(x, hook): return 2",
    ),
    "a function of torch": (
        "def f(x, hook, act=torch.relu): return act(x)",
        "def f(x, hook, act=torch.sigmoid): return act(x)",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_functions_that_differ_in_one_thing_are_distinguished_and_made_anew_they_are_equal(name):
    one, other = PAIRS[name]
    assert describe_callable(hook_from(one)) == describe_callable(hook_from(one))
    assert describe_callable(hook_from(one))["hash"] != describe_callable(hook_from(other))["hash"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PLAIN, "\n\n# later\ndef f(x, hook):\n    return 2 * x  # and said otherwise"),
        (PLAIN, "def g(x, hook): return 2 * x\nf = g"),
        (PLAIN, 'def f(x, hook):\n    """Return twice as much."""\n    return 2 * x'),
        (MADE.format(2), MADE.format(2).replace("f(x, hook):", "f(x, hook):\n    'In words.'")),
        (GLOBAL.format(1), f"unread = 5\n{GLOBAL.format(1)}"),
    ],
)
def test_lines_names_docstrings_and_what_is_not_looked_up_do_not_count(one, other):
    assert describe(hook_from(one)) == describe(hook_from(other))


def test_what_a_module_of_a_user_holds_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for by in (1, 2, 1):
        (tmp_path / "my_scales.py").write_text(f"by = {by}\nunread = {len(found)}\n")
        sys.modules.pop("my_scales", None)
        importlib.invalidate_caches()
        module = importlib.import_module("my_scales")
        module.by = by  # whatever a cached byte code says
        looked_up = hook_from("def f(x, hook): return my_scales.by * x", my_scales=module)
        inside = hook_from("def f(x, hook):\n    from my_scales import by\n    return by * x")
        found.append((describe(looked_up), describe(inside)))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


Point = collections.namedtuple("Point", "x y")

VALUES: list[tuple[Any, Any]] = [
    ((1, 2), [1, 2]),
    (1, True),
    (1.0, 1),
    ("1", 1),
    ((1, (2, 3)), ((1, 2), 3)),
    ({"a": 1}, {"a": 2}),
    ({1, 2}, {1, 3}),
    (np.arange(3), np.arange(3.0)),
    (np.arange(4), np.arange(4).reshape(2, 2)),
    (torch.float16, torch.bfloat16),
    (Point(1, 2), (1, 2)),
    (torch.ones(2).to_sparse(), torch.zeros(2).to_sparse()),
    (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    (torch.tensor([1j]), torch.tensor([1j]).conj()),
    (nn.GELU(), nn.SiLU()),
    (per_position(functools.partial(max)), functools.partial(max)),
    ([].append, [1].append),
    (torch.zeros(2).add, torch.ones(2).add),
]


@pytest.mark.parametrize("i", range(len(VALUES)))
def test_values_are_distinguished_by_content(i):
    one, other = VALUES[i]
    assert describe(one) == describe(one) != describe(other)


@pytest.mark.parametrize("make", [interventions.keep_top_heads, lambda k: interventions.hook_at(
    lambda x, hook: 0 * x, [k])])  # fmt: skip
def test_interventions_made_anew_are_the_same_and_with_another_argument_are_not(make, unchecked):
    assert describe(make(1)) == describe(make(1)) != describe(make(2))


def test_cycles_end():
    held: list[Any] = [1]
    held.append(held)
    other: list[Any] = [2]
    other.append(other)
    assert describe(held) != describe(other)
    even = "def g(n): return n or f(n - 1)\ndef f(n): return n or g(n - {})"
    assert describe(hook_from(even.format(1))) != describe(hook_from(even.format(2)))
    assert describe(hook_from(even.format(1))) == describe(hook_from(even.format(1)))


PROGRAM = """
import json, torch, functools, random, numpy
from hooked_hybrid import interventions
from hooked_hybrid.runs.identity.values import describe
from hooked_hybrid.niah.settings.papers import weight_matrix

class Scale:
    names = {"c", "a", "b"}
    def __init__(self, by): self.by, self.seen = by, {"x", "y", "z"}
    def __call__(self, x, hook): return self.by * x if hook.name in self.names else x

def made(by, *, shift=frozenset("abc")):
    def hook(x, hook): return by * x + len(shift)
    return hook

setting = weight_matrix()[3]
values = [Scale(2), made(torch.ones(2)), functools.partial(made, by=1), random.Random(3),
          interventions.keep_top_heads(2), (setting.prefill, setting.generation),
          numpy.random.default_rng(1), {"k": {3, "a", (1, 2), None}}, Scale, Scale(1).__call__]
print(json.dumps([describe(value) for value in values]))
"""


def test_what_is_made_anew_in_another_process_is_the_same():
    said = []
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
        ran = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(ran, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout))
    assert said[0] == said[1]
    assert len({one["hash"] for one in said[0]}) == len(said[0])


@pytest.mark.parametrize("what", ["_thread.lock", "generator", "_io.TextIOWrapper"])
def test_a_value_that_cannot_be_identified_is_an_error_with_its_name_and_place(what):
    held: dict[str, Callable[[], Any]] = {
        "_thread.lock": threading.Lock,
        "generator": lambda: (i for i in ()),
        "_io.TextIOWrapper": lambda: sys.__stdout__,
    }
    hook = hook_from("def make(log):\n    def f(x, hook): return log\n    return f\nf = make")(
        held[what]()
    )
    with pytest.raises(
        UntoldError, match=f"a {what}, in 'log' of its closure, in the function .*f"
    ):
        describe([("hook_embed", hook)])
    model = tiny_model()
    model.add_hook("hook_embed", hook)
    with pytest.raises(UntoldError, match="the hook on hook_embed could not be recognized .*lock|"
                       "generator|Text.*; let it hold only what can be pickled"):  # fmt: skip
        model_identity(model)


def test_a_hook_may_hold_the_model_it_runs_on_or_another():
    model, other = tiny_model(), tiny_model(seed=1)
    source = "def make(m):\n    def f(x, hook): return x + m.W_E.sum()\n    return f\nf = make"
    make = hook_from(source)
    model.add_hook("hook_embed", make(model))
    assert "_thread" not in json.dumps(model_identity(model))
    assert (
        describe(make(other)) == describe(make(tiny_model(seed=1))) != describe(make(tiny_model()))
    )


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_running_a_model_leaves_it_the_same(name):
    model = tiny_model(name)
    before = model_identity(model)
    assert before["changes"] == {}
    tokens = random_tokens(2, 20)
    model.run_with_cache(tokens, incl_bwd=True, metric=lambda logits: logits.sum())
    model.generate(tokens, 4, fwd_hooks=interventions.keep_top_heads(1), verbose=False)
    assert model_identity(model) == before == model_identity(tiny_model(name))


def changed_model(change: str) -> HookedHybrid:
    model = tiny_model()
    if change == "one number":
        with torch.no_grad():
            model.blocks[2].attn.o.weight[5, 3] += 1e-6
    elif change == "soft cap":
        model.unembed.soft_cap = 3.0
    elif change == "a torch hook":
        model.blocks[0].register_forward_pre_hook(lambda module, given: None)
    elif change == "a forward of its own":
        model.blocks[1].mlp.forward = lambda x: x
    elif change == "another class":
        model.ln_final = nn.Identity()
    elif change == "a buffer":
        model.blocks[0].register_buffer("shift", torch.ones(1))
    return model


SAID = {
    "one number": "the weights",
    "soft cap": 'what is not as the config makes it: unembed.soft_cap null -> "3.0"',
    "a torch hook": "what is not as the config makes it: blocks.0._forward_pre_hooks",
    "a forward of its own": "what is not as the config makes it: blocks.1.mlp.forward",
    "another class": "what is not as the config makes it: ln_final",
    "a buffer": "the weights",
}


@pytest.mark.parametrize("change", SAID)
def test_whatever_changes_what_a_model_computes_changes_its_identity_and_is_named(change):
    before = model_identity(tiny_model())
    found = changes({"identity": before}, {"identity": model_identity(changed_model(change))})
    assert found and any(clause.startswith(SAID[change]) for clause in found), found


def test_weights_are_hashed_once_in_a_block_and_anew_after_it():
    model = tiny_model()
    with hash_once():
        before = weights_hash(model)
        with hash_once():
            assert weights_hash(model) == before
    model.W_E.data[0, 0] += 1
    assert weights_hash(model) != before


def test_hooks_at_one_place_are_distinguished_by_their_code_and_values():
    said = []
    for by in (1, 2):
        model = tiny_model()
        model.add_hook("blocks.1.hook_mixer_out", hook_from(GLOBAL.format(by)), is_permanent=True)
        said.append({"identity": model_identity(model)})
    assert changes(said[0], said[1]) == ["the hook on blocks.1.hook_mixer_out"]
    older = json.loads(json.dumps(said[0]))
    older["identity"]["hooks"][0] |= {"hash": "0" * 32, "python": "3.9"}
    (clause,) = changes(older, said[0])
    assert clause.startswith(
        "the hook on blocks.1.hook_mixer_out (read under other versions: python"
    )


def test_an_older_identity_proves_what_it_recorded_and_no_more():
    now = {"identity": model_identity(tiny_model()), "prompts": "p", "max_new_tokens": 4}
    weights = now["identity"]["weights"]
    found = changes(
        {"model": weights, "dtype": "torch.float32", "prompts": "p", "max_new_tokens": 4}, now
    )
    said = refusal("F", "experiment", found)
    assert said.startswith("F was begun by an older version")
    assert "did not record all of quantization, config, the tokenizer, hooks on the model" in said
    found = changes(
        {"model": "other", "dtype": "torch.float32", "prompts": "p", "max_new_tokens": 5}, now
    )
    said = refusal("F", "experiment", found)
    assert said.startswith("F holds another experiment: the weights; ")
    assert "max_new_tokens 5 -> 4" in said


def tokenizer_with(**changes: Any) -> Any:
    from hooked_hybrid.niah.haystacks.word_tokenizer import word_tokenizer

    tokenizer = word_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_tokenizers_are_distinguished_by_all_that_they_do():
    import tokenizers

    model = tiny_model()
    found = []
    lower = tokenizer_with(normalizer=tokenizers.normalizers.Lowercase())
    added = tokenizer_with()
    added.add_tokens(["zyzzyva"])
    for tokenizer in (tokenizer_with(), tokenizer_with(), lower, added):
        model.tokenizer = tokenizer
        found.append(model_identity(model)["tokenizer"])
    assert found[0] == found[1]
    assert len({one["content"] for one in found}) == 3
    packaged = HookedHybrid.from_pretrained("tiny-griffin")
    before = model_identity(packaged)["tokenizer"]
    packaged.tokenizer.chat_template = "{{ messages }}"
    after = model_identity(packaged)["tokenizer"]
    assert before["chat_template"] is None and after["chat_template"]
    packaged.cfg = packaged.cfg.with_overrides(eos_token_id=7)
    assert model_identity(packaged)["tokenizer"]["eos"] == [7]


def test_tensors_of_every_layout_are_read():
    value = torch.arange(12.0).reshape(3, 4)
    same: list[Tensor] = [value, value.mT.contiguous().mT, nn.Parameter(value), value.clone()]
    assert len({describe(one)["hash"] for one in same}) == 1
    assert describe(torch.empty(0)) != describe(torch.empty(0, 2))
    assert describe(torch.empty(3, device="meta")) != describe(torch.empty(3))
