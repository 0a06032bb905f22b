"""The one error a checkpoint can cause."""

from hooked_hybrid.outputs.foreign import printable


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message names the thing and the remedy.

    What a terminal would obey is escaped: names of tensors and settings are others' words.
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in said))
