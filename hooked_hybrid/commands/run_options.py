"""Options of a command that runs a model: the model, its place, and the folder of results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer

from hooked_hybrid.commands.program import folder, report_errors
from hooked_hybrid.commands.ray_options import (
    GpusPerWorker,
    Ray,
    Workers,
    elsewhere,
    where,
    workers_of,
)
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.outputs.folders import claim
from hooked_hybrid.outputs.foreign import one_line, parse_json, read_json

if TYPE_CHECKING:
    from hooked_hybrid.network.placement.places import DeviceMap
    from hooked_hybrid.runs.ray_workers import RayWorkers

SMALL = 20_000_000
"""Below this many parameters, one core is faster than several, which would wait."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, **settings)


Model = Annotated[
    str, _option("Packaged model, folder or hub id: --model google/recurrentgemma-2b.")
]
Out = Annotated[
    Path, _option("Folder of the results, new or empty: --out results/mine.", parser=folder)
]
Resume = Annotated[
    bool, _option("Continue the results in --out: --out results/mine --resume.", "--resume")
]
Device = Annotated[str, where("Device of the model: --device cuda.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], where("Dtype of the weights: --dtype bfloat16.")
]
Quantize = Annotated[
    Literal["int8", "nf4"] | None,
    elsewhere("Large weights in 8 or 4 bits: --quantize int8.", show_default="weights in --dtype"),
]
DeviceMapText = Annotated[
    str | None,
    elsewhere(
        "Places of the parts of a model larger than a device: --device-map auto, or a "
        'JSON object ({"": 0, "blocks.3": "cpu"}), or a file with one, such as the output of '
        "`hooked-hybrid plan --json`: --device-map plan.json.",
        show_default="all on --device",
    ),
]
MaxMemory = Annotated[
    list[str] | None,
    elsewhere(
        "Memory for --device-map auto, by number of a GPU and for the CPU: --max-memory "
        "0=20GB,cpu=100GB.",
        show_default="the free memory",
    ),
]
OffloadFolder = Annotated[
    Path | None,
    elsewhere(
        "Folder for blocks on the disk: --offload-folder /scratch/weights.",
        show_default="no blocks on the disk",
        parser=folder,
    ),
]
Threads = Annotated[
    int | None,
    where("Processor cores: --threads 2.", min=1, show_default="1 for a small model, else all"),
]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, here or by a worker."""

    name: str
    dtype: str
    quantize: str | None = None
    device_map: DeviceMap | Literal["auto"] | None = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None

    def __call__(self, device: str = "cpu") -> HookedHybrid:
        """Return the model, after checking that the device exists.

        Args:
            device: for a model without a device map.

        Raises:
            ValueError: no such device.
        """
        given: dict[str, Any] = {
            "quantize": self.quantize,
            "device_map": self.device_map,
            "max_memory": self.max_memory,
            "offload_folder": self.offload_folder,
        }
        if self.device_map is None:
            _require_device(device)
            given["device"] = device
        asked = {name: value for name, value in given.items() if value is not None}
        return HookedHybrid.from_pretrained(self.name, dtype=DTYPES[self.dtype], **asked)

    def anywhere(self) -> Loading:
        """Return the same with absolute paths, as a worker may run in another folder."""
        name = str(Path(self.name).resolve()) if Path(self.name).is_dir() else self.name
        offload = None if self.offload_folder is None else str(Path(self.offload_folder).resolve())
        return replace(self, name=name, offload_folder=offload)


@dataclass(frozen=True)
class RunOptions:
    """The model, its place, and the folder of its results."""

    model: Model = "tiny-griffin"
    out: Out = Path("results/run")
    resume: Resume = False
    device: Device = "cpu"
    dtype: Dtype = "float32"
    quantize: Quantize = None
    device_map: DeviceMapText = None
    max_memory: MaxMemory = None
    offload_folder: OffloadFolder = None
    threads: Threads = None
    ray: Ray = None
    workers: Workers = None
    gpus_per_worker: GpusPerWorker = 0.0

    @contextmanager
    def started(self) -> Iterator[RayWorkers | None]:
        """Lock the folder of the results, and yield the workers; None for this process.

        Errors are reported in one line.

        Raises:
            typer.Exit: see `program.report_errors`.
        """
        with (
            report_errors(kept=str(self.out)),
            claim(self.out, self.resume),
            workers_of(
                self.ray,
                self.workers,
                self.gpus_per_worker,
                self.threads,
                self.device,
                self._loading.anywhere(),
            ) as on,
        ):
            yield on

    def load(self) -> HookedHybrid:
        """Return the model, and set this process's threads.

        Raises:
            ValueError: options that exclude each other, or a model that cannot be loaded so.
        """
        model = self._loading(self.device)
        torch.set_num_threads(self.threads or default_threads(model))
        return model

    @cached_property
    def _loading(self) -> Loading:
        if self.device_map is not None and self.device != "cpu":
            raise ValueError(f"--device {self.device} and --device-map: give one of them")
        if self.device_map is None and (self.max_memory or self.offload_folder is not None):
            raise ValueError(
                "--max-memory and --offload-folder need --device-map: give --device-map auto"
            )
        return Loading(
            self.model,
            self.dtype,
            self.quantize,
            None if self.device_map is None else device_map_of(self.device_map),
            memory_of(self.max_memory) if self.max_memory else None,
            None if self.offload_folder is None else str(self.offload_folder),
        )


def default_threads(model: HookedHybrid) -> int:
    """Return the default number of processor cores."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1 if n_parameters < SMALL else torch.get_num_threads()


def device_map_of(text: str) -> DeviceMap | Literal["auto"]:
    """Return the device map that an option's text says: "auto", JSON, or the name of a JSON file.

    The file may be what `hooked-hybrid plan --json` prints.

    Raises:
        ValueError: neither, or no JSON object of names and devices.
    """
    if text == "auto":
        return "auto"
    source = "--device-map"
    try:
        if not text.lstrip().startswith("{"):
            source = f"--device-map {text}"
            found = read_json(Path(text), may_be_pipe=True)
        else:
            found = parse_json(text, "it")
    except OSError as error:
        raise ValueError(
            f"{source}: it cannot be read ({error.strerror}); give auto, a JSON object or a file "
            "that holds one"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {one_line(error)}") from error
    if isinstance(found, dict) and "fits" in found:
        if not found["fits"]:
            raise ValueError(
                f"{source} is a plan that does not fit: {one_line(found.get('why_not'))}"
            )
        found = found.get("device_map")
    if not isinstance(found, dict) or not all(isinstance(v, int | str) for v in found.values()):
        raise ValueError(f'{source}: give an object of parts and devices, such as {{"": "cpu"}}')
    return found


def memory_of(given: Sequence[str]) -> dict[int | str, int | str]:
    """Return `max_memory` from options such as "0=20GB" and "cpu=100GB".

    Raises:
        ValueError: not of this form.
    """
    found: dict[int | str, int | str] = {}
    for text in given:
        name, equals, size = (part.strip() for part in text.partition("="))
        if not (equals and size and (name == "cpu" or name.isdecimal())):
            raise ValueError(f"--max-memory {text}: give such as 0=20GB or cpu=100GB")
        found[int(name) if name.isdecimal() else name] = size
    return found


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from None
