"""The one error a checkpoint can cause."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message names the thing and the remedy."""
