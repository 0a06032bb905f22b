"""What runs together in a sweep must not change what comes out."""

from typing import Any

from torch import Tensor

from hooked_hybrid import HookPoint
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.sweep import Setting, niah
from tests.niah.test_sweep import QUIET, model_of, prompts_of


def without_mean(x: Tensor, hook: HookPoint) -> Tensor:
    """Take off the mean over the tokens: the hook must see a whole prompt."""
    return x - x.mean(dim=1, keepdim=True)


def test_hooks_that_look_at_some_prompts_whole_give_what_they_give_those_alone():
    model = model_of("griffin")
    first, *_, last = [
        p for p in prompts_of("griffin") if p.length == prompts_of("griffin")[0].length
    ]

    def hooks(prompt: Prompt) -> list[Any]:
        return [("blocks.0.hook_resid_post", without_mean)] if prompt.id == last.id else []

    settings = [Setting("some", prefill=hooks)]
    alone = niah(model, [last], settings, **QUIET).drop(columns="seconds")
    both = niah(model, [first, last], settings, **QUIET).drop(columns="seconds")
    found = both[both["prompt_id"] == last.id].reset_index(drop=True)
    assert found.drop(columns="min_margin").equals(alone.drop(columns="min_margin"))
    assert abs(found["min_margin"] - alone["min_margin"]).max() < 1e-4
