"""MLPs: each has one file, with everything the library knows of its kind, and a line here."""

from hooked_hybrid.network.mlps.base import MLP, MLPS, mlp_of, register_mlp
from hooked_hybrid.network.mlps.gated import GatedMLP
from hooked_hybrid.network.mlps.moe import MoE

register_mlp(GatedMLP, MoE)

__all__ = ["MLP", "MLPS", "GatedMLP", "MoE", "mlp_of", "register_mlp"]
