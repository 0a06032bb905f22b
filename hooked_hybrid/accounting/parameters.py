"""Parameters by kind of layer, counted on the meta device from the config alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.layers import Embed, RMSNorm, Unembed
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.mlps import MLPS
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.part import Part

if TYPE_CHECKING:
    import pandas as pd

BESIDE_LAYERS: dict[type[nn.Module], str] = {
    RMSNorm: "norms",
    Embed: "embedding",
    Unembed: "read-out",
}
"""The row of each module that is neither a mixer nor an MLP, in the order of the tables."""

TOKEN_KINDS = ("embedding", "read-out")
"""Kinds that grow with the vocabulary, left out of the papers' counts."""


class ParameterRow(NamedTuple):
    """One kind of layer, or a part of one.

    Examples:
        >>> from hooked_hybrid.accounting import count_parameters
        >>> row = count_parameters(jamba.cfg).rows[0]
        >>> row.kind, row.modules, row.parameters, row.active
        ('MLP', 2, 147456, 147456)
    """

    kind: str
    part_of: str | None
    """The kind that already includes these parameters; None if the row is a kind itself."""
    modules: int
    """The number of modules with such parameters."""
    parameters: int
    active: int
    """Parameters that act on one token: of experts, those of the chosen ones."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. A tied read-out shares the embedding's weight and counts as 0.

    Examples:
        >>> from hooked_hybrid.accounting import count_parameters
        >>> count_parameters(model.cfg).total
        962560
    """

    rows: tuple[ParameterRow, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(row.parameters for row in self._kinds())

    @property
    def without_embeddings(self) -> int:
        """All except the embedding and the read-out, as in the papers."""
        return sum(row.parameters for row in self._kinds() if row.kind not in TOKEN_KINDS)

    @property
    def active(self) -> int:
        """Parameters that act on one token, the whole embedding and read-out among them."""
        return sum(row.active for row in self._kinds())

    @property
    def active_without_embeddings(self) -> int:
        """Parameters that act on one token, without the embedding and the read-out."""
        return sum(row.active for row in self._kinds() if row.kind not in TOKEN_KINDS)

    def of(self, kind: str) -> int:
        """Return the parameters of a kind or part; 0 where the model has none."""
        return sum(row.parameters for row in self.rows if row.kind == kind)

    def table(self) -> pd.DataFrame:
        """Return a line for each row.

        The columns are those of `ParameterRow` and two fractions from 0 to 1, missing for embedding
        and read-out: `share` of the parameters without embeddings, and `share_of_column`, of the
        sum of the column, in which parts count twice. The percentages of Table 1 of Zani et al.
        (2025) are of the second kind: its recurrent block already includes its RG-LRU.
        """
        import pandas as pd

        table = pd.DataFrame(self.rows, columns=list(ParameterRow._fields)).fillna({"part_of": ""})
        counted = table["parameters"].where(~table["kind"].isin(TOKEN_KINDS))
        table["share"] = counted / max(self.without_embeddings, 1)
        table["share_of_column"] = counted / max(counted.sum(), 1)
        return table

    def _kinds(self) -> Iterator[ParameterRow]:
        return (row for row in self.rows if row.part_of is None)


def count_parameters(cfg: HybridConfig) -> ParameterCount:
    """Return the parameters of a model by kind of layer, without making its weights.

    Raises:
        LookupError: a parameter belongs to no known kind of module.

    Source: Zani et al. 2025, Table 1, whose counts of RecurrentGemma-2B these are.

    Examples:
        >>> from hooked_hybrid.accounting import PUBLISHED, count_parameters
        >>> count_parameters(PUBLISHED["recurrentgemma-2b"]).total
        2682862080
    """
    found: dict[tuple[str, str | None], list[tuple[str, int, int]]] = defaultdict(list)
    model = Network.meta(cfg)
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        inside = (*inside, f"{path}.") if isinstance(module, Part) else inside
        if type(module) in BESIDE_LAYERS and not path.startswith(inside):
            n = sum(p.numel() for p in module.parameters())
            if n:
                found[BESIDE_LAYERS[type(module)], None].append((path, n, n))
        for name, parameter in module.named_parameters() if isinstance(module, Part) else ():
            child, n = name.split(".")[0], parameter.numel()
            active = module.active_parameters(module.cfg, child, n)
            found[module.rows_apart.get(child, module.row), None].append((path, n, active))
            if part := module.rows_within.get(child):
                found[part, module.row].append((path, n, active))
    rows = tuple(_row(*key, found[key]) for key in sorted(found, key=_order))
    counted, whole = ParameterCount(rows), sum(p.numel() for p in model.parameters())
    if counted.total != whole:
        raise LookupError(
            f"{whole - counted.total:,} parameters are in modules without a kind: add their class "
            "to accounting.parameters.BESIDE_LAYERS, or make it a Mixer or an MLP"
        )
    return counted


def order_of_rows() -> list[str]:
    """Return the rows of the tables in their order: MLPs, recurrences, attention, the rest."""
    mixers = sorted(MIXERS.values(), key=lambda mixer: bool(mixer.grows))
    rows = [row for part in (*MLPS.values(), *mixers) for row in part.rows()]
    return [*dict.fromkeys(rows), *BESIDE_LAYERS.values()]


def _row(kind: str, part_of: str | None, found: list[tuple[str, int, int]]) -> ParameterRow:
    paths, n, active = zip(*found, strict=True)
    return ParameterRow(kind, part_of, len(set(paths)), sum(n), sum(active))


def _order(key: tuple[str, str | None]) -> tuple[int, bool]:
    """Return the sort key of a row: a kind's parts follow its own row."""
    row, part_of = key
    beside = {r: part.row for part in MLPS.values() for r in part.rows_apart.values()}
    beside |= {r: part.row for part in MIXERS.values() for r in part.rows_apart.values()}
    own = part_of or beside.get(row, row)
    return order_of_rows().index(own), own != row
