"""Models larger than a device: what goes where, and running it there."""

from hooked_hybrid.accounting.plan.machine import Machine, gpus_of, size_of
from hooked_hybrid.network.placement.doors import Placement
from hooked_hybrid.network.placement.homes import place
from hooked_hybrid.network.placement.places import Place, resolve

__all__ = ["Machine", "Place", "Placement", "gpus_of", "place", "resolve", "size_of"]
