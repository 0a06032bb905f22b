"""Models larger than a device: the places of their parts, and running them there."""

from hooked_hybrid.network.placement.doors import Placement
from hooked_hybrid.network.placement.homes import place
from hooked_hybrid.network.placement.places import Place, resolve

__all__ = ["Place", "Placement", "place", "resolve"]
