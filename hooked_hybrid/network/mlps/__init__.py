"""MLPs, by the class of their config: adding one is a file and a line here."""

from torch import nn

from hooked_hybrid.config import GatedMLPConfig, MoEConfig
from hooked_hybrid.network.mlps.gated import GatedMLP
from hooked_hybrid.network.mlps.moe import MoE

MLPS: dict[type, type[nn.Module]] = {GatedMLPConfig: GatedMLP, MoEConfig: MoE}

__all__ = ["MLPS", "GatedMLP", "MoE"]
