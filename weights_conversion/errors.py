"""The error for checkpoints that cannot be loaded or written."""

from hooked_hybrid.outputs.foreign import printable


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message names the thing and the remedy.

    Names of tensors and settings are foreign text, so control characters are escaped.

    Examples:
        >>> from weights_conversion import CheckpointError, check
        >>> check("no_such_folder/")
        Traceback (most recent call last):
            ...
        weights_conversion.errors.CheckpointError: 'no_such_folder/' is not a directory ...
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in said))
