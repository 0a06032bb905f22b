"""Interventions as plain hooks: each function returns a list for `fwd_hooks`."""

from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.interventions.ablation import (
    ablate_heads,
    ablate_layers,
    cut_heads,
    keep_heads,
    mean_over_tokens,
)
from hooked_hybrid.interventions.following import follow_span
from hooked_hybrid.interventions.heads import (
    attention_to,
    best_heads,
    keep_top_heads,
    l2_norm,
    negative_entropy,
    random_score,
    reversed_score,
)
from hooked_hybrid.interventions.layers import ablate_mixers, layers_of
from hooked_hybrid.interventions.patching import freeze, knock_out_edges, patch
from hooked_hybrid.interventions.recurrence import (
    edit_state,
    freeze_state,
    knock_out_state_edges,
)
from hooked_hybrid.interventions.rows import check_spans
from hooked_hybrid.interventions.sets_of_heads import check_heads, masks_of_rows
from hooked_hybrid.interventions.weights import boost_span, manipulate_span
from hooked_hybrid.interventions.where import hook_at, on_rows
from hooked_hybrid.interventions.window import knock_out_crossings, limit_window

__all__ = [
    "ablate_heads",
    "ablate_layers",
    "ablate_mixers",
    "attention_to",
    "best_heads",
    "boost_span",
    "check_heads",
    "check_spans",
    "cut_heads",
    "edit_state",
    "follow_span",
    "freeze",
    "freeze_state",
    "hook_at",
    "keep_heads",
    "keep_top_heads",
    "knock_out_crossings",
    "knock_out_edges",
    "knock_out_state_edges",
    "l2_norm",
    "layers_of",
    "limit_window",
    "manipulate_span",
    "masks_of_rows",
    "mean_over_tokens",
    "negative_entropy",
    "on_rows",
    "patch",
    "per_position",
    "random_score",
    "reversed_score",
]
