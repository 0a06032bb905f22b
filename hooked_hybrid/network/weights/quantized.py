"""Weights in 8 or 4 bits, by torchao (extra `quantized`): a larger model on the same device.

    int8    one scale a row of the output, symmetric; 8 bits and 4 bytes a row    CPU and CUDA
    nf4     4-bit NormalFloat (Dettmers et al. 2023, QLoRA): 16 levels, a scale for each 64
            weights, itself in 8 bits; 4.1 bits a weight                          CPU and CUDA

Any other weight-only config of torchao can be given as an object: its integer 4-bit kernels need a
CUDA device and say so. Activations, and so every hook point, keep the dtype of the model; gradients
reach them. Quantised are the large matrices of attention, of recurrent blocks, of MLPs and experts.
Embedding and read-out stay as they are, and so does everything that sets what a recurrence keeps:
gates, decays, convolutions, Mamba's x_proj and dt_proj, and norms and routers.

Properties such as `W_Q`, and all that reads them, return the values that the quantised weights
stand for. `dequantize_weights` puts these into an ordinary model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.allocator import give_back_freed_memory
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.weights.layout import laid_out
from hooked_hybrid.network.weights.plain import as_matrix, is_quantized, set_weight, stored_bytes
from hooked_hybrid.network.weights.quantization import Only, Quantization, QuantizedWeight
from hooked_hybrid.network.weights.torchao import Matrix, quantizer_of


class Quantizer:
    """Which weights of a model are quantised, and how: chosen and tried before any is.

    Args:
        model: with weights, or on the meta device to learn what it would take.
        scheme: "int8", "nf4" or a weight-only config of torchao.
        only: names (see `quantizable`) or a predicate on them; None takes all.
        device_of: says by name where each weight will be given; None means where it is.

    `names` are those chosen, `bytes_of` what a matrix of each of their shapes will take.

    Raises:
        ImportError: torchao is not installed.
        TypeError, ValueError: what cannot be quantised, or not here; nothing has been changed.
    """

    def __init__(
        self,
        model: Network,
        scheme: str | Any,
        only: Only | None = None,
        device_of: Callable[[str], torch.device] | None = None,
    ) -> None:
        if model.quantization is not None:
            raise ValueError(
                f"this model is quantised already ({model.quantization.scheme}): load it anew"
            )
        if model.placement is not None and model.placement.brings_weights:
            raise ValueError(
                "blocks of this model are kept elsewhere than where they run: quantised weights "
                "stay where they run, so load it with each block on a device"
            )
        self.scheme = scheme
        self.label = scheme if isinstance(scheme, str) else repr(scheme)
        self.quantized = quantizer_of(scheme)
        self.names = _chosen(quantizable(model.cfg), only)
        parameters = dict(model.named_parameters())
        tried: dict[tuple[tuple[int, ...], torch.device], int] = {}
        for name in self.names:
            device = parameters[name].device if device_of is None else device_of(name)
            key = tuple(parameters[name].shape[-2:]), device
            if key not in tried:
                tried[key] = self._try(name, *key, model.dtype)
        self.bytes_of = {shape: n_bytes for (shape, _), n_bytes in tried.items()}

    def quantize(
        self, name: str, weight: Tensor
    ) -> tuple[nn.Parameter | nn.ParameterList, QuantizedWeight]:
        """Return the weight of this name quantised, and what became of it.

        Raises:
            ValueError: values that are not finite once they are quantised.
        """
        matrices = weight.unbind() if weight.ndim == 3 else (weight,)
        new, squares = [], torch.zeros(2, dtype=torch.float64)
        for matrix in matrices:
            new.append(nn.Parameter(self.quantized(matrix.contiguous()), requires_grad=False))
            squares += _squares(as_matrix(new[-1]), matrix)
        error = float("nan") if weight.device.type == "meta" else _ratio(*squares.tolist())
        if math.isinf(error):
            raise ValueError(f"{name} does not survive {self.scheme}: some values are not finite")
        record = QuantizedWeight(name, tuple(weight.shape), weight.nbytes, stored_bytes(new), error)
        return nn.ParameterList(new) if weight.ndim == 3 else new[0], record

    def quantization(self, done: Iterable[QuantizedWeight]) -> Quantization:
        """Return what a model says of how it is quantised."""
        order = {name: number for number, name in enumerate(self.names)}
        return Quantization(self.label, tuple(sorted(done, key=lambda w: order[w.name])))

    def _try(
        self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> int:
        """Return the bytes of a matrix of some shape.

        Raises:
            ValueError: it cannot be stored so, or the device has no kernel for it.
        """
        if self.scheme == "int8" and dtype not in (torch.float32, torch.bfloat16):
            # In float16 torchao's product overflows, as the scale comes after it.
            raise ValueError(
                f"int8 weights cannot be used with {dtype}: take torch.bfloat16 or float32"
            )
        try:
            weight = self.quantized(torch.zeros(shape, dtype=dtype, device=device))
            linear(torch.zeros(1, shape[1], dtype=dtype, device=device), weight)
            as_matrix(weight)
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{name}, {list(shape)} in {dtype}, cannot be quantised with {self.scheme} on "
                f"{device}: {reason}; leave it out (`only`), or take 'int8' or 'nf4'"
            ) from error
        if not is_quantized(weight):
            raise ValueError(
                f"{self.scheme} leaves {name}, {list(shape)}, as it is: its group size does not "
                "divide the inputs; leave it out (`only`), or take 'int8' or 'nf4'"
            )
        return stored_bytes([weight])


def quantize_weights(
    model: Network, scheme: str | Any, only: Only | None = None, verbose: bool = False
) -> Quantization:
    """Quantise the large weights of a model in place, one tensor at a time.

    `HookedHybrid.from_pretrained(..., quantize=...)` does it while loading, so that the whole model
    is never there in its own dtype.

    Args:
        model: each weight stays on its device. On the meta device, only `Quantization.bytes` is of
            use.
        scheme: "int8", "nf4" or a weight-only config of torchao.
        only: names (see `quantizable`) or a predicate on them; None takes all.
        verbose: show progress.

    Returns:
        Each weight with its bytes and its error; `model.quantization` keeps it.

    Raises:
        ImportError: torchao is not installed.
        TypeError, ValueError: what cannot be quantised, or not here; nothing has been changed.
    """
    quantizer = Quantizer(model, scheme, only)
    for name in quantizer.names:
        weight = model.get_parameter(name)
        if weight.device.type != "meta" and not bool(weight.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity: look at where it comes from")
    done = []
    for name in tqdm(quantizer.names, desc="quantise", unit="weight", disable=not verbose):
        new, record = quantizer.quantize(name, model.get_parameter(name).detach())
        set_weight(model, name, new)
        give_back_freed_memory()  # of the temporaries: they may be larger than what is kept
        done.append(record)
    model.quantization = quantizer.quantization(done)
    return model.quantization


def dequantize_weights(model: Network) -> None:
    """Replace quantised weights by plain ones with the same values, in place.

    The model then computes the same up to rounding, and can be folded, edited and saved. What
    quantising lost is not restored.
    """
    quantization, wants_grad = model.quantization, model.W_E.requires_grad
    for weight in () if quantization is None else quantization.weights:
        path, _, leaf = weight.name.rpartition(".")
        values = as_matrix(getattr(model.get_submodule(path), leaf))
        set_weight(model, weight.name, nn.Parameter(laid_out(values), requires_grad=wants_grad))
    model.quantization = None


def quantizable(cfg: HybridConfig) -> list[str]:
    """Return the names of the parameters that can be quantised, in the order of the layers.

    Raises:
        NotSupported: a mixer or an MLP does not state what reads and writes the stream.
    """
    names = []
    for i, layer in enumerate(cfg.layers):
        for mixer in map(mixer_of, layer.mixers):
            names += [f"blocks.{i}.{mixer.path}.{leaf}" for leaf in mixer.large()]
        if layer.mlp is not None:
            names += [f"blocks.{i}.mlp.{leaf}" for leaf in mlp_of(layer.mlp).large()]
    return names


def _chosen(names: list[str], only: Only | None) -> list[str]:
    if only is None:
        return names
    if callable(only):
        chosen = [name for name in names if only(name)]
    else:
        only = [only] if isinstance(only, str) else list(only)
        if unknown := sorted(set(only) - set(names)):
            raise ValueError(
                f"{unknown[0]!r} is none of the {len(names)} weights that can be quantised, such "
                f"as {', '.join(names[:3])}: `quantized.quantizable(model.cfg)` lists them"
            )
        chosen = [name for name in names if name in only]
    if not chosen:
        raise ValueError("`only` chooses no weight: `quantized.quantizable(model.cfg)` lists them")
    return chosen


def _squares(new: Matrix, old: Matrix) -> Float[Tensor, " 2"]:
    """Return |new - old|^2 and |old|^2; on the meta device zeros."""
    if old.device.type == "meta":
        return torch.zeros(2, dtype=torch.float64)
    difference = (new.float() - old.float()).square().sum()
    return torch.stack([difference, old.float().square().sum()]).double().cpu()


def _ratio(difference: float, whole: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return math.sqrt(difference / whole) if whole else math.sqrt(difference)
