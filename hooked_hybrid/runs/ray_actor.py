"""The actor on a worker of a Ray cluster: one model, and one piece of work after another."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.runs.identity.comparing import identity_changes
from hooked_hybrid.runs.identity.model import model_identity

Source = Callable[[], HookedHybrid] | list[Any]
"""The source of a worker's model: a function, or a list with a packed model's Ray reference."""


class Worker:
    """An actor; `hello`, `load` and then `run` are called by `RayWorkers`."""

    def hello(self) -> dict[str, str]:
        """Return the versions and settings, other than the model, that numbers depend on."""
        return versions()

    def load(self, source: Source, expected: dict[str, Any], threads: int, precision: str) -> None:
        """Get the model.

        Args:
            source: the source of the model.
            expected: the required `model_identity`.
            threads: cores that torch uses.
            precision: of `torch.set_float32_matmul_precision`.

        Raises:
            ValueError: it differs from the caller's model.
            Exception: whatever its source raised.
        """
        self.threads, self.key, self.job = threads, -1, None
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        try:
            self.model = source() if callable(source) else unpack_from_bytes(_got(source))
        except Exception as error:
            raise _sendable(error) from None
        if changed := identity_changes(expected, model_identity(self.model)):
            raise ValueError(
                f"a worker loaded another model than this process has ({'; '.join(changed)}): load "
                "the same there, or let this process send its own (RayWorkers without load)"
            )

    def run(self, key: int, sent: list[Any], items: Sequence[Any]) -> Iterator[Any]:
        """Yield the result of each item.

        Args:
            key: identifies the job, which is unpickled once.
            sent: the Ray reference of the pickled job, in a list so that Ray does not resolve it.
            items: of the job.
        """
        from ray import cloudpickle

        try:
            if key != self.key:
                self.job, self.key = cloudpickle.loads(_got(sent)), key
            torch.set_num_threads(self.threads)
            with torch.no_grad():
                done = self.job(self.model, items)  # type: ignore[misc]
                yield from (result for _, result in zip(items, done, strict=True))
        except Exception as error:
            raise _sendable(error) from None


def versions() -> dict[str, str]:
    """Return the versions of this library and torch."""
    try:
        own = version("hooked-hybrid")
    except PackageNotFoundError:  # run from its source
        own = "not installed"
    return {"hooked-hybrid": own, "torch": torch.__version__}


def pack_to_bytes(model: HookedHybrid) -> bytes:
    """Return a model as bytes, from any device."""
    from ray import cloudpickle

    kept = io.BytesIO()
    torch.save(model, kept, pickle_module=cloudpickle)
    return kept.getvalue()


def unpack_from_bytes(data: bytes) -> HookedHybrid:
    """Return a packed model, on the worker's GPU if it has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


def _got(sent: list[Any]) -> Any:
    import ray

    return ray.get(sent[0])


def _sendable(error: Exception) -> Exception:
    """Return an error that can be pickled: itself, or one with its message."""
    from ray import cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # pickling an error may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
