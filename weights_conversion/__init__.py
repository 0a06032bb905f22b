"""Published checkpoints in, published checkpoints out: one table of names a family."""

from weights_conversion.errors import CheckpointError
from weights_conversion.filling import check, load_config
from weights_conversion.save import save

__all__ = ["CheckpointError", "check", "load_config", "save"]
