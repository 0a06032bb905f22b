"""GPU kernels, each a fast version of a definition in plain torch, and whether they can run.

    linear_scan      h_t = a_t h_{t-1} + x_t                Triton       twin of `scan.scan_loop`
    selective_scan   Mamba's scan without stored states     Triton       twin of `selective_scan`
    mamba_ssm        the same, differentiable               mamba-ssm    twin of `selective_scan`
    causal_conv1d    the convolution over the last taps     causal-conv1d  twin of `CausalConv1d`
    grouped_experts  all experts in three products          torch        twin of `MoE._run_sorted`

Each module has a function `usable`, to be called first, which imports the packages that it needs.
A kernel is tried on small inputs before its first use on a GPU (`trials`), and not used if it does
not run or is wrong. Second derivatives are those of the definition (`twice`).
`import hooked_hybrid` imports none of these packages, and works without them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_CAPABILITY = (8, 0)  # the least that Triton 3 supports; AMD numbers differ


def has_triton() -> bool:
    """Return whether Triton is installed and can run: on a GPU or in its interpreter."""
    if not _is_installed("triton"):
        return False
    return interpreting() or (torch.cuda.is_available() and _is_capable(torch.device("cuda")))


def interpreting() -> bool:
    """Return whether kernels imported from now on run in Triton's interpreter.

    The interpreter runs on any machine, slowly; it is meant for tests. `TRITON_INTERPRET=1` selects
    it if set before the kernels are imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_reads(*tensors: Tensor) -> bool:
    """Return whether a Triton kernel can take these tensors: all on one device that it supports."""
    device = tensors[0].device
    if any(t.device != device for t in tensors) or not _is_installed("triton"):
        return False
    if device.type == "cuda":
        return _is_capable(device)
    return device.type == "cpu" and interpreting()


def need_gradients(*tensors: Tensor) -> bool:
    """Return whether autograd needs a gradient with respect to any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@cache
def importable(module: str) -> bool:
    """Return whether `module` of an optional package can be imported.

    A compiled package may break when torch is updated, or by its own imports, with any error. It is
    then not used, with a warning.
    """
    package = module.partition(".")[0]
    if not _is_installed(package):
        return False
    try:
        importlib.import_module(module)
    except Exception as error:
        warnings.warn(
            f"{package} is installed but cannot be imported; plain torch is used instead: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


@cache
def _is_capable(device: torch.device) -> bool:
    return (
        torch.version.hip is not None
        or torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY
    )


@cache
def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module of this name that was not imported
        return False
