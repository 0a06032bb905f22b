"""The memory that a model needs on a machine, and the devices of its layers."""

from hooked_hybrid.accounting.plan.machine import Machine, gpus_of, size_of
from hooked_hybrid.accounting.plan.planning import plan

__all__ = ["Machine", "gpus_of", "plan", "size_of"]
