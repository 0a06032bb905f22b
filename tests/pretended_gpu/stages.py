"""What a user does with a model, stage by stage: functions of it and of where inputs lie.

Each takes `(model, at)`, where `at(tensor)` puts an input on the device of a try, and returns
tensors, to be compared with a CPU's.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, interventions
from hooked_hybrid.model.folding import fold_ln, unfold_ln
from hooked_hybrid.network import plan
from hooked_hybrid.network.state import HybridState
from tests.models import random_tokens

At = Callable[[Tensor], Tensor]
Scenario = Callable[[HookedHybrid, At], Any]
STAGES: dict[str, Scenario] = {}
EVERYTHING = {"names_filter": lambda name: True}
QUIET: dict[str, Any] = {"verbose": False, "stop_at_eos": False}
IDS = torch.tensor([[1] * 6 + [2] * 8 + [3] * 6, [0] * 2 + [1] * 10 + [2] * 8])


def stage(fn: Scenario) -> Scenario:
    STAGES[fn.__name__] = fn
    return fn


def mask(side: str = "left", n_pos: int = 20) -> Tensor:
    given = torch.ones(2, n_pos, dtype=torch.long)
    given[1, slice(0, 6) if side == "left" else slice(n_pos - 6, None)] = 0
    return given


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def gradients(m: HookedHybrid, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients by all weights, and leave none behind."""
    loss.backward()
    found = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
    m.zero_grad()
    return found


# --- forwards -------------------------------------------------------------------------------------


@stage
def forward(m: HookedHybrid, at: At) -> Any:
    tokens = random_tokens()
    return m(at(tokens), return_type="both", loss_per_token=True), m(at(tokens[0, :9]))


@stage
def one_token_and_lists(m: HookedHybrid, at: At) -> Any:
    return m(at(random_tokens(1, 1))), m(random_tokens(1, 9)[0].tolist())


@stage
def long_forward(m: HookedHybrid, at: At) -> Any:
    return m(at(random_tokens(1, 150)), logits_to_keep=3)


@stage
def pieces(m: HookedHybrid, at: At) -> Any:
    def short(n_pos: int, points: Any) -> int:
        return plan.piece_length(n_pos, points, 40)

    with mock.patch("hooked_hybrid.model.language_model.piece_length", short):
        return m(at(random_tokens(2, 90)))


@stage
def padding_on_the_right(m: HookedHybrid, at: At) -> Any:
    return m(at(random_tokens()), attention_mask=at(mask("right")), return_type="both")


@stage
def padding_on_the_left(m: HookedHybrid, at: At) -> Any:
    out, state = m(at(random_tokens()), attention_mask=at(mask()), return_state=True)
    return out, m(at(random_tokens(2, 5, 3)), state=state)


@stage
def packing(m: HookedHybrid, at: At) -> Any:
    out, state = m(at(random_tokens()), segment_ids=at(IDS), return_state=True)
    more = torch.tensor([[3, 3, 4, 4, 4], [2, 2, 2, 5, 5]])
    return out, m(at(random_tokens(2, 5, 3)), state=state, segment_ids=at(more))


@stage
def long_packing(m: HookedHybrid, at: At) -> Any:
    ids = torch.tensor([[1] * 40 + [2] * 45 + [0] * 5])
    return m(at(random_tokens(1, 90)), segment_ids=at(ids), return_type="loss")


@stage
def parts_of_layers(m: HookedHybrid, at: At) -> Any:
    x = m(at(random_tokens()), stop_at_layer=1)
    return x, m(x, start_at_layer=1)


@stage
def inference_mode(m: HookedHybrid, at: At) -> Any:
    with torch.inference_mode():
        out, state = m(at(random_tokens()), return_state=True)
        return out, m(at(random_tokens(2, 3, 2)), state=state)


@stage
def hooks_of_a_user(m: HookedHybrid, at: At) -> Any:
    def odd(x: Tensor, hook: Any) -> Tensor:
        return x.masked_fill((hook.run.query_pos % 2 == 0)[..., None], 0)

    hooks = [("blocks.0.hook_mlp_out", lambda x, hook: 0 * x), ("blocks.1.hook_resid_mid", odd)]
    return m.run_with_hooks(at(random_tokens()), fwd_hooks=hooks)


@stage
def hooks_of_torch(m: HookedHybrid, at: At) -> Any:
    seen: list[Any] = []
    handle = m.blocks[0].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out))
    try:
        return m(at(random_tokens())), seen
    finally:
        handle.remove()


# --- states ---------------------------------------------------------------------------------------


@stage
def cached_steps(m: HookedHybrid, at: At) -> Any:
    out, state = m(at(random_tokens()), return_state=True)
    outs = [out]
    for i in range(3):
        options: dict[str, Any] = {"state": state, "return_state": True, "stage": "generation"}
        out, state = m(at(random_tokens(2, 1, i)), step=i + 1, **options)
        outs.append(out)
    return outs, state.tensors()


@stage
def prefill(m: HookedHybrid, at: At) -> Any:
    _, state = m(at(random_tokens()), None, return_state=True)
    return state.tensors()


@stage
def states_cut_and_joined(m: HookedHybrid, at: At) -> Any:
    (_, s), (_, t) = (m(at(random_tokens(seed=i)), return_state=True) for i in (0, 1))
    r = m.cfg.recurrent_layers[0]
    joined = HybridState.cat([s[0], t[[1]], s[at(torch.tensor([1]))]])
    others = [
        s.fork(2),
        s.replace(t, kinds=("ssm",), layers=[r]),
        s.replace(t, rows=[1]),
        s.replace(t, rows=at(torch.tensor([True, False]))),
        HybridState.cat([joined, s[at(torch.tensor([False, True]))]]),
        s.to("cpu").to(m.device),
    ]
    assert s == s.detach() and s != t
    return [m(at(random_tokens(x.batch_size, 2, 9)), state=x) for x in others], s.n_bytes


@stage
def states_saved_and_loaded(m: HookedHybrid, at: At) -> Any:
    _, state = m(at(random_tokens()), return_state=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "state.safetensors")
        state.to("cpu").save(path)
        state = HybridState.load(path).to(m.device)
    return m(at(random_tokens(2, 3, 9)), state=state)


@stage
def models_saved_and_loaded(m: HookedHybrid, at: At) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        m.save_pretrained(folder)
        other = HookedHybrid.from_pretrained(folder, device=m.device, dtype=m.dtype)
        return other(at(random_tokens()))


@stage
def copies_and_stacks(m: HookedHybrid, at: At) -> Any:
    folded, record = fold_ln(copy.deepcopy(m))
    unfolded = unfold_ln(folded, record)
    return (
        folded(at(random_tokens())),
        unfolded(at(random_tokens())),
        m.W_Q.weight,
        m.W_K.weight,
        m.W_O.weight,
    )


# --- caches ---------------------------------------------------------------------------------------


@stage
def cache_of_everything(m: HookedHybrid, at: At) -> Any:
    return dict(m.run_with_cache(at(random_tokens()), **EVERYTHING)[1].items())


@stage
def cache_on_the_host(m: HookedHybrid, at: At) -> Any:
    _, cache = m.run_with_cache(at(random_tokens()), device="cpu")
    assert all(value.device.type == "cpu" for value in cache.values())
    return dict(cache.items())


@stage
def cache_of_some_positions(m: HookedHybrid, at: At) -> Any:
    tokens, found = at(random_tokens()), []
    for wanted in (-1, slice(2, 9), [1, 4], torch.tensor([3, 5])):
        found.append(dict(m.run_with_cache(tokens, pos_slice=wanted)[1].items()))
    names = [n for n in m.hook_dict if "resid_post" in n or "pattern" in n]
    _, cache = m.run_with_cache(at(random_tokens(2, 90)), pos_slice=-1, names_filter=names)
    return found, dict(cache.items())


@stage
def cache_of_padded_rows(m: HookedHybrid, at: At) -> Any:
    _, cache = m.run_with_cache(at(random_tokens()), attention_mask=at(mask()), **EVERYTHING)
    return dict(cache.items()), cache.last_token(("resid_post", 1))


@stage
def cache_saved_and_loaded(m: HookedHybrid, at: At) -> Any:
    _, cache = m.run_with_cache(at(random_tokens()))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cache.safetensors")
        cache.save(path)
        return dict(type(cache).load(path, m).items())


@stage
def grad_cache(m: HookedHybrid, at: At) -> Any:
    options: dict[str, Any] = {"incl_bwd": True, "metric": lambda logits: metric(logits).sum()}
    _, cache = m.run_with_cache(at(random_tokens(2, 12)), **options, **EVERYTHING)
    return dict(cache.items())


# --- gradients ------------------------------------------------------------------------------------


@stage
def grad_hooks(m: HookedHybrid, at: At) -> Any:
    seen: dict[str, Tensor] = {}

    def look(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad.clone()

    names = [n for n in m.hook_dict if n.endswith(("resid_post", "ssm_state", "hook_z"))]
    halve = ("blocks.1.hook_resid_mid", lambda grad, hook: grad / 2)
    with m.hooks([], [(names, look), halve]):
        return gradients(m, metric(m(at(random_tokens(2, 12)))).sum()), seen


@stage
def grad_training(m: HookedHybrid, at: At) -> Any:
    return gradients(m, m(at(random_tokens(2, 70)), return_type="loss"))


@stage
def grad_training_on_packed_rows(m: HookedHybrid, at: At) -> Any:
    return gradients(m, m(at(random_tokens()), segment_ids=at(IDS), return_type="loss"))


@stage
def grad_training_on_padded_rows(m: HookedHybrid, at: At) -> Any:
    loss = m(at(random_tokens()), attention_mask=at(mask()), return_type="loss")
    return gradients(m, loss)


@stage
def grad_of_a_gradient(m: HookedHybrid, at: At) -> Any:
    x = m(at(random_tokens(1, 12)), stop_at_layer=0).detach().requires_grad_()
    loss = m(x, start_at_layer=0)[:, -1].square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    return first, torch.autograd.grad(first.square().sum(), x)


@stage
def grad_by_torch_func(m: HookedHybrid, at: At) -> Any:
    x = m(at(random_tokens(1, 8)), stop_at_layer=0).detach()
    return torch.func.grad(lambda x: m(x, start_at_layer=0)[:, -1].square().sum())(x)


# --- generation -----------------------------------------------------------------------------------


@stage
def generation(m: HookedHybrid, at: At) -> Any:
    return m.generate(at(random_tokens()), 6, **QUIET)


@stage
def generation_that_ends(m: HookedHybrid, at: At) -> Any:
    first = m.generate(at(random_tokens()), 3, **QUIET)
    options: dict[str, Any] = {"verbose": False, "return_type": "output", "names_filter": True}
    out = m.generate(at(random_tokens()), 6, eos_token_id=int(first[0, 21]), **options)
    values = out.logprobs, out.margins, out.finished, dict(out.cache.items())
    return out.tokens, values, out.state.tensors()


@stage
def generation_of_padded_rows(m: HookedHybrid, at: At) -> Any:
    options: dict[str, Any] = {"return_type": "output", "names_filter": True, **QUIET}
    out = m.generate(at(random_tokens()), 4, attention_mask=at(mask("right")), **options)
    return out.tokens, dict(out.cache.items())


@stage
def generation_from_a_state(m: HookedHybrid, at: At) -> Any:
    _, state = m(at(random_tokens()), return_state=True)
    return m.generate(at(random_tokens(2, 3, 4)), 4, state=state, **QUIET)


@stage
def generation_under_hooks(m: HookedHybrid, at: At) -> Any:
    later = interventions.manipulate_span("null", (2, 5))
    options: dict[str, Any] = {"generation_hooks": later, "first_token_stage": "generation"}
    hooks = interventions.keep_top_heads(2)
    return m.generate(at(random_tokens()), 4, fwd_hooks=hooks, **options, **QUIET)


@stage
def generation_drawn_by_a_generator_of_the_host(m: HookedHybrid, at: At) -> Any:
    options: dict[str, Any] = {"top_k": 5, "top_p": 0.9, "temperature": 0.7, "do_sample": True}
    generator = torch.Generator().manual_seed(3)
    return m.generate(at(random_tokens()), 4, generator=generator, **options, **QUIET)
