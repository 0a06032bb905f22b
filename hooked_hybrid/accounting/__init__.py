"""The parameters, operations and state memory of a model, from its config."""

from hooked_hybrid.accounting.configs import PUBLISHED, config_of
from hooked_hybrid.accounting.flops import (
    Ratio,
    count_pairs,
    flops_table,
    prefill_flops,
    recurrence_over_attention,
    step_flops,
)
from hooked_hybrid.accounting.memory import (
    StateBytes,
    memory_table,
    state_bytes,
    tokens_where_attention_is_larger,
)
from hooked_hybrid.accounting.parameters import ParameterCount, ParameterRow, count_parameters
from hooked_hybrid.network.costs import Flops

__all__ = [
    "PUBLISHED",
    "Flops",
    "ParameterCount",
    "ParameterRow",
    "Ratio",
    "StateBytes",
    "config_of",
    "count_pairs",
    "count_parameters",
    "flops_table",
    "memory_table",
    "prefill_flops",
    "recurrence_over_attention",
    "state_bytes",
    "step_flops",
    "tokens_where_attention_is_larger",
]
