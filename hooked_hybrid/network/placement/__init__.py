"""Models larger than a device: what goes where, and running it there."""

from hooked_hybrid.network.placement.doors import Placement
from hooked_hybrid.network.placement.homes import place
from hooked_hybrid.network.placement.places import Place, resolve

__all__ = ["Place", "Placement", "place", "resolve"]
