"""One identity of a run: what its results depend on, behind every store and every worker."""

from hooked_hybrid.runs.identity.model import model_identity

__all__ = ["model_identity"]
