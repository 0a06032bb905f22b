"""Reading and writing published checkpoints, with one table of names for each family."""

from weights_conversion.errors import CheckpointError
from weights_conversion.filling import check, load_config
from weights_conversion.save import save

__all__ = ["CheckpointError", "check", "load_config", "save"]
