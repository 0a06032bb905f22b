"""Generations by the hundred leave nothing behind; `UNDER_FIRE_ROUNDS=2000` runs them all."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from experiments.under_fire import soak

ROUNDS = int(os.environ.get("UNDER_FIRE_ROUNDS", "18"))


@pytest.fixture
def young() -> Iterator[None]:
    """Leave out of each collection and count what other tests and the packages hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", ["tiny-griffin", "tiny-jamba"])
def test_memory_stays_flat(name: str, unchecked: None, young: None):
    found = soak.soak(name, ROUNDS, warm_up=12)
    assert found["tensors at the end"] == found["tensors after warm-up"]
    assert found["growth"] < soak.SHARE


def test_what_is_left_is_seen(monkeypatch: pytest.MonkeyPatch, unchecked: None, young: None):
    kept = []
    once = soak._round

    def leak(model: soak.HookedHybrid, i: int) -> None:
        once(model, i)
        kept.append(model.W_E.repeat(2**6, 1))

    monkeypatch.setattr(soak, "_round", leak)
    found = soak.soak("tiny-griffin", 3, warm_up=1)
    assert found["tensors at the end"] == found["tensors after warm-up"] + 3
    assert found["growth"] > soak.SHARE
