"""Models larger than a device: what goes where, and running it there."""

from hooked_hybrid.placement.machine import Machine, gpus_of, size_of
from hooked_hybrid.placement.places import Place, resolve
from hooked_hybrid.placement.placing import place
from hooked_hybrid.placement.running import Placement

__all__ = ["Machine", "Place", "Placement", "gpus_of", "place", "resolve", "size_of"]
