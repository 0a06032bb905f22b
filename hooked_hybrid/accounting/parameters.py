"""Parameters by kind of layer, counted on the meta device from the config alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.layers import Embed, RMSNorm, Unembed
from hooked_hybrid.network.mixers import RGLRU, Attention, Mamba
from hooked_hybrid.network.mlps import GatedMLP, MoE
from hooked_hybrid.options import require

if TYPE_CHECKING:
    import pandas as pd

KINDS: dict[type[nn.Module], str] = {
    GatedMLP: "MLP",
    MoE: "experts",
    RGLRU: "recurrent block",
    Mamba: "Mamba block",
    Attention: "attention",
    RMSNorm: "norms",
    Embed: "embedding",
    Unembed: "read-out",
}
"""The kind of layer that each class of module is, in the order of the tables."""

BESIDE: dict[tuple[type[nn.Module], str], str] = {(MoE, "router"): "router"}
"""Children of a module that are a kind of their own."""

PARTS: dict[tuple[type[nn.Module], str], str] = {
    **{(RGLRU, child): "RG-LRU" for child in ("input_gate", "rec_gate", "a_param")},
    **{
        (Mamba, child): "selective SSM"
        for child in ("x_proj", "dt_norm", "B_norm", "C_norm", "dt_proj", "A_log", "D")
    },
}
"""Children that are also counted alone, inside their module's kind."""

TOKEN_KINDS = ("embedding", "read-out")
"""Kinds that grow with the vocabulary, left out of the papers' counts."""


class ParameterRow(NamedTuple):
    """One kind of layer, or a part of one."""

    kind: str
    part_of: str | None
    """The kind these parameters are counted in already; None for a kind of its own."""
    modules: int
    """Modules that have some."""
    parameters: int
    active: int
    """Those that act on one token: of experts, the chosen ones'."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. A tied read-out is the embedding again and counts nothing."""

    rows: tuple[ParameterRow, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(row.parameters for row in self._kinds())

    @property
    def without_embeddings(self) -> int:
        """All but the embedding and the read-out, as the papers count."""
        return sum(row.parameters for row in self._kinds() if row.kind not in TOKEN_KINDS)

    @property
    def active(self) -> int:
        """Parameters that act on one token, the whole embedding and read-out among them."""
        return sum(row.active for row in self._kinds())

    @property
    def active_without_embeddings(self) -> int:
        """Parameters that act on one token, but the embedding and the read-out."""
        return sum(row.active for row in self._kinds() if row.kind not in TOKEN_KINDS)

    def of(self, kind: str) -> int:
        """Return the parameters of a kind or part; 0 where the model has none."""
        return sum(row.parameters for row in self.rows if row.kind == kind)

    def table(self) -> pd.DataFrame:
        """Return a line for each row.

        Its columns are those of `ParameterRow` and two fractions of 0 to 1, which embedding and
        read-out have none of: `share` of the parameters without embeddings, and `share_of_column`,
        of the sum of the column, in which parts stand twice. The percentages of Table 1 of Zani et
        al. (2025) are of the second kind: its recurrent block already holds its RG-LRU.
        """
        require("pandas")
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
        LookupError: a parameter of no known kind of module.

    Source: Zani et al. 2025, Table 1, whose counts of RecurrentGemma-2B these are.
    """
    found: dict[tuple[str, str | None], list[tuple[str, int, int]]] = defaultdict(list)
    model = HookedHybrid.meta(cfg)
    kind_of = [(path, m, KINDS[type(m)]) for path, m in model.named_modules() if type(m) in KINDS]
    for path, module, kind in kind_of:
        for name, parameter in module.named_parameters():
            child, n = name.split(".")[0], parameter.numel()
            beside = BESIDE.get((type(module), child))
            active = n if beside else _active(module, n)
            found[beside or kind, None].append((path, n, active))
            if part := PARTS.get((type(module), child)):
                found[part, kind].append((path, n, active))
    rows = tuple(_row(*key, found[key]) for key in sorted(found, key=_order))
    counted, whole = ParameterCount(rows), sum(p.numel() for p in model.parameters())
    if counted.total != whole:
        raise LookupError(
            f"{whole - counted.total:,} parameters lie in modules without a kind: add their class "
            "to accounting.parameters.KINDS"
        )
    return counted


def _active(module: nn.Module, n: int) -> int:
    return n * module.cfg.n_chosen // module.cfg.n_experts if isinstance(module, MoE) else n


def _row(kind: str, part_of: str | None, found: list[tuple[str, int, int]]) -> ParameterRow:
    paths, n, active = zip(*found, strict=True)
    return ParameterRow(kind, part_of, len(set(paths)), sum(n), sum(active))


def _order(key: tuple[str, str | None]) -> tuple[int, bool]:
    """Return where a row stands: parts behind their kind, the router before its experts."""
    kind, part_of = key
    kinds = list(KINDS.values())
    if kind in kinds:
        return kinds.index(kind), part_of is not None
    return kinds.index(part_of or "experts"), True


__all__ = ["KINDS", "TOKEN_KINDS", "ParameterCount", "ParameterRow", "count_parameters"]
