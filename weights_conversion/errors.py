"""The error for checkpoints that cannot be loaded or written."""

from hooked_hybrid.outputs.foreign import printable


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message names the thing and the remedy.

    Names of tensors and settings are foreign text, so control characters are escaped.
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in said))
