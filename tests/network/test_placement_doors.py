"""Bringing the weights of a block to where it runs, and letting them go again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hooked_hybrid.network.placement import doors as running
from hooked_hybrid.network.placement import place, resolve
from hooked_hybrid.network.placement.doors import Door, Placement, is_one_device
from tests.models import random_tokens, tiny_model


def test_a_door_brings_weights_for_as_long_as_anyone_is_inside(monkeypatch: Any):
    model, brought = tiny_model("jamba"), []

    def copied(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        brought.append(parameter)
        return nn.Parameter(parameter.detach() + 0, requires_grad=False)

    monkeypatch.setattr(running, "_there", copied)
    before = dict(model.named_parameters())
    doors = [Door(block, torch.device("cpu"), is_streamed=True) for block in model.blocks]
    with doors[1], doors[1]:
        inside = dict(model.blocks[1].named_parameters())
        assert all(p is not before[f"blocks.1.{n}"] for n, p in inside.items())
        assert len(brought) == len(inside)
        model(random_tokens(n_pos=5))
    assert all(p is before[n] for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("device_map", "brings", "is_on_one", "needs_none"),
    [
        ({"": "cpu"}, False, True, True),
        ({"": "cpu", "blocks": "meta"}, False, False, False),
        ({"": "cpu", "blocks": "meta", "blocks.0": "cpu"}, True, False, False),
        ({"": "cpu", "blocks.1": "disk"}, True, True, False),
        ({"": "disk"}, True, True, False),
    ],
)
def test_where_parts_lie_says_whether_weights_are_brought(
    device_map: dict[str, Any], brings: bool, is_on_one: bool, needs_none: bool
):
    model = tiny_model("griffin")
    places = resolve(model.cfg, device_map)
    placement = Placement(model, places)
    assert (placement.brings_weights, placement.is_on_one_device) == (brings, is_on_one)
    assert is_one_device(places) == needs_none


def test_a_door_that_cannot_bring_everything_leaves_the_block_as_it_was(monkeypatch: Any):
    model = tiny_model("griffin")
    before = dict(model.named_parameters())
    door = Door(model.blocks[0], torch.device("cpu"), is_streamed=True)
    with monkeypatch.context() as patched:
        patched.setattr(running, "_there", _out_of_memory_after(3))
        with pytest.raises(MemoryError), door:
            pass
    assert all(p is before[n] for n, p in model.named_parameters())
    monkeypatch.setattr(running, "_there", lambda p, device: nn.Parameter(p.detach() + 0))
    with door:  # now there is room
        assert all(p is not before[f"blocks.0.{n}"] for n, p in model.blocks[0].named_parameters())
    assert all(p is before[n] for n, p in model.named_parameters())


def test_weights_that_are_brought_take_gradients_where_those_kept_do():
    frozen, trained = (nn.Parameter(torch.ones(3), requires_grad=grad) for grad in (False, True))
    device = torch.device("meta")
    brought = running._there(frozen, device)
    assert brought.device == device and not brought.requires_grad
    running._there(trained, torch.device("cpu")).sum().backward()
    assert trained.grad is not None and trained.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_a_graph_holds_no_weight_that_was_brought(name: str, tmp_path: Path, monkeypatch: Any):
    brought: list[StorageWeakRef] = []

    def copied(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        found = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        brought.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(running, "_there", copied)
    one = tiny_model(name).requires_grad_(False)
    several = place(tiny_model(name), {"": "cpu", "blocks": "disk"}, tmp_path)
    assert several.placement is not None
    for door in several.placement._doors:
        door.is_streamed = True  # as on a GPU
    tokens, grads = random_tokens(n_pos=6), []
    for model in (one, several):
        start = model.embed(tokens).requires_grad_()
        out = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook, s=start: s)])
        assert out.grad_fn is not None and all(weight.expired() for weight in brought)
        grads += torch.autograd.grad(out.square().sum(), start)
    assert len(brought) > 20 and float(grads[0].abs().max()) > 0
    assert torch.equal(*grads)


def _out_of_memory_after(n: int) -> Any:
    calls: list[int] = []

    def there(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        calls.append(1)
        if len(calls) > n:
            raise MemoryError("no room")
        return nn.Parameter(parameter.detach().clone())

    return there
