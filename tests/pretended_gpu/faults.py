"""Faults of the kind that only a GPU shows, planted to see that they are noticed."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import CodeType
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A change of one function's source, and a scenario that runs it.

    Args:
        where: `module:name` or `module:Class.name`, in `hooked_hybrid`.
        old, new: what is replaced by what.
        scenario, model: what shows it.
    """

    where: str
    old: str
    new: str
    scenario: str = "forward"
    model: str = "griffin"


FAULTS = {
    "positions on the host": Fault(
        "network.layout:lay_out", "torch.arange(n_pos, device=device)", "torch.arange(n_pos)"
    ),
    "starts on the host": Fault(
        "network.layout:lay_out",
        "torch.zeros(batch, dtype=torch.long, device=device)",
        "torch.zeros(batch, dtype=torch.long)",
    ),
    "masks left where they were given": Fault(
        "network.layout:lay_out",
        "allow_empty_rows).to(device)",
        "allow_empty_rows).cpu()",
        "padding_on_the_left",
    ),
    "indices of padding on the host": Fault(
        "network.layout:_last_real_index", ", device=is_real.device", "", "packing"
    ),
    "angles on the host": Fault(
        "network.layers:rotation", "device=layout.pos.device, ", "", "cached_steps"
    ),
    "a state's rows on the host": Fault(
        "network.state:HybridState.replace", ", device=self.device", "", "states_cut_and_joined"
    ),
    "a cache's positions not moved": Fault(
        "hooks.savers:PieceSaver.save", ".to(value.device)", "", "cache_of_some_positions"
    ),
    "entries of rows not moved": Fault(
        "interventions.rows:entries_of_rows",
        "values.to(rows.device)[rows]",
        "values[rows]",
        "spans_only, forward",
    ),
    "spans not moved": Fault(
        "interventions.rows:in_spans",
        "bounds.to(run.rows.device)",
        "bounds",
        "spans_permuted, forward",
    ),
    "chosen heads on the host": Fault(
        "interventions.weights:_is_chosen",
        ", device=pattern.device",
        "",
        "spans_omitted_by_row, forward",
    ),
    "masks of heads not moved": Fault(
        "interventions.ablation:_mask", ".to(hook.run.rows.device)", "", "heads_cut_by_row, forward"
    ),
    "donors not moved": Fault(
        "interventions.donors:Donor.at",
        "self.value.to(value.device)",
        "self.value",
        "patched_from_the_host, forward",
    ),
    "hidden corners on the host": Fault(
        "network.attention.attend:_corner", ", device=device", "", "cache_of_everything"
    ),
    "what left a window on the host": Fault(
        "network.attention.attend:_left",
        "torch.arange(n, device=device)",
        "torch.arange(n)",
        "cache_of_everything",
    ),
    "channels on the host": Fault(
        "interventions.state_edges:is_chosen",
        "torch.zeros(n, dtype=torch.bool, device=value.device)",
        "torch.zeros(n, dtype=torch.bool)",
        "state_edges_cut_by_a_mask, forward",
    ),
    "a norm's weight not moved": Fault(
        "model.residual.norms:apply_ln_to_stack",
        "norm.w.to(stack.device)",
        "norm.w",
        "parts_of_a_cache_on_the_host",
    ),
    "values changed where only a GPU runs": Fault(
        "network.kernels.fused_attention:read_masked", "b kv (g q) e", "b kv (q g) e"
    ),
    "queries of a group that see each other's keys": Fault(
        "network.attention.attend:Sight.is_causal",
        "self.n_cached == start == 0",
        "start == 0",
        "states_cut_and_joined",
    ),
}


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Run a function with its source changed, whoever has imported it."""
    function = _function(fault.where)
    before = function.__code__
    source = textwrap.dedent(inspect.getsource(function))
    assert fault.old in source, f"{fault.where} has changed: {fault.old!r} is not in it any more"
    changed = source.replace(fault.old, fault.new)
    flags = __future__.annotations.compiler_flag
    module = compile(changed, before.co_filename, "exec", flags=flags, dont_inherit=True)
    found = [c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == before.co_name]
    assert len(found) == 1 and found[0].co_freevars == before.co_freevars
    function.__code__ = found[0]
    try:
        yield
    finally:
        function.__code__ = before


def _function(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    found: Any = import_module(f"hooked_hybrid.{module}")
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "__func__", found)
    return inspect.unwrap(found)
