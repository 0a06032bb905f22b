"""GPU kernels, each the fast twin of a definition in plain torch, and what of them can run here.

    linear_scan      h_t = a_t h_{t-1} + x_t                Triton       twin of `scan.scan_loop`
    selective_scan   Mamba's scan, its states never stored  Triton       twin of `selective_scan`
    mamba_ssm        the same, differentiable               mamba-ssm    twin of `selective_scan`
    causal_conv1d    the convolution over the last taps     causal-conv1d  twin of `CausalConv1d`
    grouped_experts  all experts in three products          torch        twin of `MoE._run_sorted`

Each module has a `usable`, to be called before its function, and imports what it needs
only then. A kernel is tried on small inputs before it is first used on a GPU (`trials`), and left
out where it does not run or is wrong. Second derivatives are the definition's (`twice`).
`import hooked_hybrid` imports none of them, and works without any of their packages.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_CAPABILITY = (8, 0)  # what Triton 3 compiles for; AMD's devices count differently


def has_triton() -> bool:
    """Return whether Triton is installed and has something to run on: a GPU or its interpreter."""
    if not _is_installed("triton"):
        return False
    return interpreting() or (torch.cuda.is_available() and _is_capable(torch.device("cuda")))


def interpreting() -> bool:
    """Return whether kernels that are imported from now on run in Triton's interpreter.

    It runs them on any machine, slowly, and so is for tests: `TRITON_INTERPRET=1`, set before the
    kernels are imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_reads(*tensors: Tensor) -> bool:
    """Return whether a Triton kernel can be given all of these: on one device that it runs on."""
    device = tensors[0].device
    if any(t.device != device for t in tensors) or not _is_installed("triton"):
        return False
    if device.type == "cuda":
        return _is_capable(device)
    return device.type == "cpu" and interpreting()


def need_gradients(*tensors: Tensor) -> bool:
    """Return whether autograd needs a gradient by any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@cache
def importable(module: str) -> bool:
    """Return whether `module` of an optional package can be imported.

    Compiled packages break when torch is updated, others by what they import, with any error; such
    a one is not used, which a warning says.
    """
    package = module.partition(".")[0]
    if not _is_installed(package):
        return False
    try:
        importlib.import_module(module)
    except Exception as error:
        warnings.warn(
            f"{package} is installed but cannot be imported, so that plain torch is used instead: "
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
    except ValueError:  # a module of this name that no import made
        return False
