"""A small count of random calls; `SEAMS=5000 pytest tests/seams` runs more, `SEAMS_SEED` others."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import pytest
import torch

from hooked_hybrid import HookedHybrid
from tests.models import CONFIGS, tiny_model
from tests.seams.calls import N_SPECIAL, check_cache, check_forward
from tests.seams.generations import check_generation
from tests.seams.programs import check_program
from tests.text.test_text import SPECIAL, toy_tokenizer

COUNT = int(os.environ.get("SEAMS", "8"))
SEED = int(os.environ.get("SEAMS_SEED", "0"))
CHECKS: dict[str, Callable[[Random, HookedHybrid], None]] = {
    "forward": check_forward,
    "cache": check_cache,
    "generate": check_generation,
    "program": check_program,
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_random_calls_equal_each_row_alone(name: str, check: str):
    model = tiny_model(name)
    model.tokenizer = toy_tokenizer()
    assert len(SPECIAL) == N_SPECIAL
    failed: list[str] = []
    for i in range(COUNT):
        seed = SEED + i
        torch.manual_seed(seed)
        try:
            with torch.no_grad():
                CHECKS[check](Random(f"{check} {name} {seed}"), model)
        except Exception as error:
            failed.append(f"seed {seed}: {type(error).__name__}: {str(error)[:900]}")
            model.reset_hooks(including_permanent=True)
    assert not failed, f"{len(failed)} of {COUNT}:\n" + "\n".join(failed[:20])
