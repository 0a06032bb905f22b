"""How torchao stores one matrix in fewer bits; see `quantized`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

Matrix = Float[Tensor, "d_out d_in"]

NF4_BLOCK = 64
NF4_SCALES = 256
INSTALL = "pip install 'hooked-hybrid[quantized]'"


def quantizer_of(scheme: str | Any) -> Callable[[Matrix], Tensor]:
    """Return a function that quantises one matrix by "int8", "nf4" or a config of torchao.

    torchao's configs may set compiler options and the precision of all float32 products of the
    process; this is prevented.

    Raises:
        ImportError: torchao is not installed, or too old.
        ValueError: another scheme.
    """
    try:
        with _without_warnings("torchao", "torch.utils._pytree"):  # about kernels for other devices
            from torchao.core.config import AOBaseConfig
            from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
    except ImportError as error:
        raise ImportError(f"quantised weights need torchao 0.18 or later: {INSTALL}") from error

    def as_nf4(weight: Matrix) -> Tensor:
        n_blocks, rest = divmod(weight.numel(), NF4_BLOCK)
        if rest:
            raise ValueError(f"its {weight.numel()} numbers are not a multiple of {NF4_BLOCK}")
        return to_nf4(weight, NF4_BLOCK, math.gcd(n_blocks, NF4_SCALES))

    if scheme == "nf4":
        return as_nf4
    config = Int8WeightOnlyConfig() if scheme == "int8" else scheme
    if not isinstance(config, AOBaseConfig):
        raise ValueError(
            f"quantize={scheme!r}: give 'int8', 'nf4' (4 bits), or a weight-only config of torchao"
        )
    if hasattr(config, "set_inductor_config"):
        config = dataclasses.replace(config, set_inductor_config=False)

    def by_config(weight: Matrix) -> Tensor:
        holder = nn.Linear(1, 1, bias=False, device="meta")
        holder.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(holder, config, filter_fn=lambda *_: True)
        return holder.weight.detach()

    return by_config


@contextmanager
def _without_warnings(*names: str) -> Iterator[None]:
    """Let some loggers report errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
