"""Small harvests, and the same activations without one."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hooked_hybrid import HookedHybrid
from hooked_hybrid.harvest import HarvestedActivations, harvest
from tests.models import D_VOCAB, tiny_model

RESID = "blocks.*.hook_resid_post"
CONTEXT = 8
LENGTHS = (3, 20, 8, 1, 0, 30, 9)


@cache
def model_named(name: str = "griffin") -> HookedHybrid:
    return tiny_model(name)


@cache
def packaged() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin").eval()


def documents_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, D_VOCAB, (n,), generator=generator) for n in lengths]


def rows_of(harvested: HarvestedActivations) -> dict[str, Tensor]:
    """Return every column of a harvest, whole."""
    parts = [load_file(path) for path in harvested.paths]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def alone(
    model: HookedHybrid, names: list[str], fwd_hooks: tuple = (), lengths: tuple = LENGTHS
) -> dict[str, Tensor]:
    """Return the rows of each context run by itself, in the order of documents."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for document in documents_of(lengths):
        for context in document.split(CONTEXT) if len(document) else ():
            with torch.no_grad(), model.hooks(fwd_hooks):
                _, left = model.run_with_cache(context[None], names_filter=names)
            for name in names:
                found[name].append(left[name][0])
    return {name: torch.cat(rows) for name, rows in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def many_shards(folder: Path, **changes) -> HarvestedActivations:
    settings = {"context_length": CONTEXT, "batch_size": 2, "shard_bytes": 18000, "seed": 0}
    settings |= {"resume": True, "verbose": False, **changes}
    model = settings.pop("model", None) or model_named()
    return harvest(model, documents_of((20,) * 12), RESID, folder, **settings)
