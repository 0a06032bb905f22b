"""MLPs, by the class of their config: adding one is a file and a line here."""

from torch import nn

from hooked_hybrid.config import GatedMLPConfig
from hooked_hybrid.mlps.gated import GatedMLP

MLPS: dict[type, type[nn.Module]] = {GatedMLPConfig: GatedMLP}

__all__ = ["MLPS", "GatedMLP"]
