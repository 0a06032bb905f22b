"""The identity of a run: everything its results depend on, for stores and workers."""

from hooked_hybrid.runs.identity.model import model_identity

__all__ = ["model_identity"]
