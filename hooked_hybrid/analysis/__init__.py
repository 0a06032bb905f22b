"""Circuit analysis: how the parts of a model write, read, remember and retrieve."""

from hooked_hybrid.analysis import plots
from hooked_hybrid.analysis.activation_patching import (
    generic_activation_patch,
    patch_heads,
    patch_layers,
    patch_mixer_out,
    patch_mlp_out,
    patch_resid_pre,
    patch_states,
)
from hooked_hybrid.analysis.attribution import Attribution, attribution_patching
from hooked_hybrid.analysis.attribution_check import Agreement, compare_with_patching
from hooked_hybrid.analysis.channels import GroupScores, channel_scores
from hooked_hybrid.analysis.circuits import ov_circuit, qk_circuit, recurrent_circuit
from hooked_hybrid.analysis.composition import (
    all_composition_scores,
    all_matching_scores,
    composition_scores,
)
from hooked_hybrid.analysis.entropies import EntropyProfile, entropy, entropy_profile
from hooked_hybrid.analysis.heads import induction_scores, repeat_scores, retrieval_scores
from hooked_hybrid.analysis.horizon import (
    DecayRange,
    Reach,
    decay_range,
    half_life,
    how_far,
    memory_horizon,
)
from hooked_hybrid.analysis.implicit_attention import (
    effective_attention,
    effective_offset,
    effective_pattern,
)
from hooked_hybrid.analysis.lens import (
    Lens,
    TopTokens,
    lens_of_generation,
    lens_ranks,
    lens_top_tokens,
    logit_lens,
    token_over_depth,
)
from hooked_hybrid.analysis.metrics import normalised
from hooked_hybrid.analysis.pair_scores import PairScores
from hooked_hybrid.analysis.patch_grid import PatchGrid
from hooked_hybrid.analysis.path_ends import Receiver, Sender
from hooked_hybrid.analysis.path_patching import path_patch, path_patch_each, path_patch_heads
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.analysis.token_circuits import (
    copying_scores,
    full_ov_circuit,
    full_qk_circuit,
    matching_scores,
    token_directions,
    written_tokens,
)

__all__ = [
    "Agreement",
    "Attribution",
    "DecayRange",
    "EntropyProfile",
    "GroupScores",
    "HeadScores",
    "Lens",
    "PairScores",
    "PatchGrid",
    "Reach",
    "Receiver",
    "Sender",
    "TopTokens",
    "all_composition_scores",
    "all_matching_scores",
    "attribution_patching",
    "channel_scores",
    "compare_with_patching",
    "composition_scores",
    "copying_scores",
    "decay_range",
    "effective_attention",
    "effective_offset",
    "effective_pattern",
    "entropy",
    "entropy_profile",
    "full_ov_circuit",
    "full_qk_circuit",
    "generic_activation_patch",
    "half_life",
    "how_far",
    "induction_scores",
    "lens_of_generation",
    "lens_ranks",
    "lens_top_tokens",
    "logit_lens",
    "matching_scores",
    "memory_horizon",
    "normalised",
    "ov_circuit",
    "patch_heads",
    "patch_layers",
    "patch_mixer_out",
    "patch_mlp_out",
    "patch_resid_pre",
    "patch_states",
    "path_patch",
    "path_patch_each",
    "path_patch_heads",
    "plots",
    "qk_circuit",
    "recurrent_circuit",
    "repeat_scores",
    "retrieval_scores",
    "token_directions",
    "token_over_depth",
    "written_tokens",
]
