"""Senders and receivers of paths: components that write to and read the residual stream.

========================================  =====================================================
sender                                    its output
========================================  =====================================================
`("z", layer, head)`, or "result"         an attention head's output; without `head`, all heads'
`("gated", layer, part)`                  channels of a recurrent layer: one of the RG-LRU's gate
                                          blocks by its number, or any by a slice or a list;
                                          without `part`, all
`("mixer_out", layer)`, or "attn_out"     a whole mixer, or all that are side by side
`("attn_out", layer)`, "ssm_out"          one of several mixers side by side
`("mlp_out", layer)`                      an MLP or a mixture of experts
`("embed",)`                              the embedding
========================================  =====================================================

========================================  =====================================================
receiver                                  its input
========================================  =====================================================
`("q_input", layer, head)`                a query head's queries; without `head`, all heads'
`("k_input", layer, kv_head)`, "v_input"  a key-value head's keys, or its values
`("mixer_in", layer)`                     a whole mixer, of any kind
`("mlp_in", layer)`                       an MLP
`("final",)`                              the final norm: the direct effect on the logits
========================================  =====================================================

A negative layer counts from the last. An entry may also have the name of the hook point instead of
the short name and the layer, or a pattern for each that fits: "blocks.2.attn.hook_z",
("blocks.*.attn.hook_z", head).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.hooks.names import is_pattern, matching, resolve
from hooked_hybrid.hooks.slicing import whole_numbers
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.part import NotSupported
from hooked_hybrid.shapes import Resid

End = str | tuple[Any, ...]
"""A sender or a receiver: a name, a layer, a head or channels; or a hook name or pattern."""
Through = Literal["mlps", "mixers", "all"] | Iterable[tuple[str, int]]
Component = tuple[str, int]
"""("mixer" | "mlp", layer)."""

WRITES = ("z", "result", "gated", "mixer_out", "attn_out", "ssm_out", "mlp_out", "embed")
READS = ("q_input", "k_input", "v_input", "mixer_in", "mlp_in", "final")
ALIASES = {"result": "z"}


@dataclass(frozen=True)
class Sender:
    """A hook point on the way to an output, and the selected channels of it.

    Attributes:
        name: of the hook point.
        depth: order of writing: 0 for the embedding, 2 layer + 1 for a mixer, 2 layer + 2 for an
            MLP.
        channels: of the flattened heads, or of a recurrence; None means all.
        weight: from these channels to the stream; None if the value is the output itself.

    Examples:
        >>> sender = analysis.Sender.of(model, ("z", 2, 3))
        >>> sender.name, sender.depth, len(sender.channels)
        ('blocks.2.attn.hook_z', 5, 16)
    """

    name: str
    depth: int
    channels: tuple[int, ...] | None = None
    weight: Float[Tensor, "channel d_model"] | None = None

    @classmethod
    def of(cls, model: HookedHybrid, end: End) -> Sender:
        """Return the sender of an entry of the module's table.

        Raises:
            ValueError: an entry of another form, or a head or channels that do not exist.
            HookNameError: a layer without such a hook point.
        """
        leaf, layer, which = _parsed(end, WRITES, "sender", n_indices={"embed": 0})
        if leaf == "embed":
            return cls("hook_embed", 0)
        name = resolve((ALIASES.get(leaf, leaf), layer), model.hook_dict, model.cfg.n_layers)
        layer = model.hook_dict[name].layer()
        block = model.blocks[layer]
        if leaf == "mlp_out":
            return cls(name, 2 * layer + 2)
        if leaf == "attn_out" and len(block.mixers) == 1:
            name = f"blocks.{layer}.hook_mixer_out"
        if leaf != "mixer_out" and block.ln1_post is not None:
            raise NotSupported(
                f"the sender {end!r}: what its layer writes passes a norm, so that no part of it "
                f"is added to the stream by itself: give ('mixer_out', {layer})"
            )
        if leaf in ("mixer_out", "attn_out", "ssm_out"):
            return cls(name, 2 * layer + 1)
        mixer = block.attn if leaf in ("z", "result") else block.recurrence
        weight = mixer.out_projection.W
        return cls(name, 2 * layer + 1, _channels(mixer.cfg, len(weight), which, end), weight)

    @property
    def component(self) -> Component:
        """Its component; the embedding counts as ("mlp", -1)."""
        return ("mixer" if self.depth % 2 else "mlp", (self.depth - 1) // 2)

    def write(self, value: Float[Tensor, "batch pos ..."]) -> Resid:
        """Return the output for a value, or a difference of values, at the hook point."""
        value = at_least_fp32(value)
        if self.weight is None:
            return value
        value, weight = value.flatten(2), at_least_fp32(self.weight)
        if self.channels is None:
            return value @ weight
        return value[..., list(self.channels)] @ weight[list(self.channels)]


@dataclass(frozen=True)
class Receiver:
    """A hook point on the input of a component, which is set.

    Attributes:
        name: of the hook point, before the norm, or after it where each head has a copy.
        source: the hook point that holds the stream that is read; `name` itself before the norm.
        norm: path of the norm between the stream and the component, or None.
        depth: it reads what components up to this depth have written.
        heads: which copies are set; None means all there are.

    Examples:
        >>> receiver = analysis.Receiver.of(model, ("k_input", 5, 0))
        >>> receiver.name, receiver.depth
        ('blocks.5.attn.hook_k_input', 10)
    """

    name: str
    source: str
    norm: str | None
    depth: int
    heads: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: HookedHybrid, end: End) -> Receiver:
        """Return the receiver of an entry of the module's table.

        Raises:
            ValueError: an entry of another form, or a head that does not exist.
            HookNameError: a layer without such a hook point.
        """
        n_layers, counts = model.cfg.n_layers, {"final": 0, "mixer_in": 1, "mlp_in": 1}
        leaf, layer, head = _parsed(end, READS, "receiver", counts)
        if leaf == "final":
            name = f"blocks.{n_layers - 1}.hook_resid_post"
            return cls(name, name, "ln_final", 2 * n_layers)
        name = resolve((leaf, layer), model.hook_dict, n_layers)
        layer = model.hook_dict[name].layer()
        block = model.blocks[layer]
        if leaf == "mlp_in":
            norm = None if block.ln2 is None else f"blocks.{layer}.ln2"
            return cls(name, name, norm, 2 * layer + 1)
        heads = None
        if head is not None:
            cfg = block.attn.cfg
            heads = _among(head, cfg.n_heads if leaf == "q_input" else cfg.n_kv_heads, end)
        source = f"blocks.{layer}.hook_mixer_in"
        norm = None if block.ln1 is None else f"blocks.{layer}.ln1"
        return cls(name, source, norm, 2 * layer, heads)

    @property
    def component(self) -> Component:
        """Its component; the final norm counts as ("mixer", n_layers)."""
        return ("mlp" if self.depth % 2 else "mixer", self.depth // 2)

    def hears(self, sender: Sender) -> bool:
        """Whether the sender writes before this receiver reads."""
        return sender.depth <= self.depth


def several(ends: Any, what: str, names: Collection[str]) -> list[End]:
    """Return one or several senders or receivers as a list of tuples that begin with a short name.

    Args:
        ends: of the module's tables, or hook names or patterns.
        what: "senders" or "receivers".
        names: hook points of the model.

    Raises:
        ValueError: none.
        HookNameError: a name or a pattern that no sender or receiver has.
    """
    is_one = isinstance(ends, str) or (
        isinstance(ends, tuple) and ends and isinstance(ends[0], str)
    )
    ends = [ends] if is_one and not _are_names(ends) else list(ends)
    if not ends:
        raise ValueError(f"no {what}: give one or more, such as {('mixer_out', 0)}")
    leaves = WRITES if what == "senders" else READS
    short = {name: _shortened(name) for name in names if _leaf(name) in leaves}
    found: list[End] = []
    for end in ends:
        name, *which = [end] if isinstance(end, str) else end or [None]
        is_name = isinstance(name, str) and name not in leaves
        if not is_name or not (isinstance(end, str) or is_pattern(name) or name in names):
            found.append(end)
            continue
        entries = dict.fromkeys(short[full] for full in matching(str(name), short))
        found += [(*entry, *which) for entry in entries]
    return found


def _are_names(ends: Any) -> bool:
    """Whether a tuple holds several hook names, and no part of one."""
    return isinstance(ends, tuple) and len(ends) > 1 and all(isinstance(e, str) for e in ends)


def _leaf(name: str) -> str:
    return name.rpartition("hook_")[2]


def _shortened(name: str) -> tuple[Any, ...]:
    """Return a hook point as an entry of the tables."""
    leaf, parts = ALIASES.get(_leaf(name), _leaf(name)), name.split(".")
    return (leaf, int(parts[1])) if parts[0] == "blocks" else (leaf,)


def components(model: HookedHybrid, through: Through) -> frozenset[Component]:
    """Return the components of `through`.

    Raises:
        ValueError: it has none, or names a layer that does not exist.
    """
    n = model.cfg.n_layers
    if isinstance(through, str):
        kinds = {"mlps": ("mlp",), "mixers": ("mixer",), "all": ("mixer", "mlp")}
        if through not in kinds:
            raise ValueError(f"through={through!r}: give 'mlps', 'mixers', 'all' or a list")
        every = ((kind, i) for kind in kinds[through] for i in range(n))
        return frozenset(component for component in every if is_there(model, component))
    found = frozenset(tuple(component) for component in through)
    for component in found:
        is_pair = len(component) == 2 and component[0] in ("mixer", "mlp")
        if not is_pair or component[1] not in range(n) or not is_there(model, component):
            raise ValueError(
                f"through has {component!r}: give pairs ('mixer' | 'mlp', layer), layers from 0 "
                f"to {n - 1} that have one"
            )
    return found  # type: ignore[return-value]


def is_there(model: HookedHybrid, component: tuple[Any, ...]) -> bool:
    """Whether a layer has a mixer, or an MLP."""
    return f"blocks.{component[1]}.hook_{component[0]}_out" in model.hook_dict


def _parsed(
    end: End, leaves: tuple[str, ...], what: str, n_indices: dict[str, int]
) -> tuple[str, int, Any]:
    """Return name, layer and head or channels; 0 and None if there are none."""
    named = isinstance(end, tuple) and bool(end) and end[0] in leaves
    if not named:
        raise ValueError(f"the {what} {end!r}: give a tuple that begins with one of {leaves}")
    no_part = {"mixer_out": 1, "attn_out": 1, "ssm_out": 1, "mlp_out": 1}
    most = {**no_part, **n_indices}.get(end[0], 2)
    if not min(most, 1) < len(end) <= most + 1:
        raise ValueError(
            f"the {what} {end!r}: after {end[0]!r} give "
            + ("nothing", "a layer", "a layer, and a head or channels if not all")[most]
        )
    layer, which = (*end[1:], None, None)[:2]
    if layer is not None and (isinstance(layer, bool) or not hasattr(layer, "__index__")):
        raise ValueError(f"the {what} {end!r}: the layer must be a whole number")
    return end[0], 0 if layer is None else operator.index(layer), which


def _channels(cfg: Any, width: int, which: Any, end: End) -> tuple[int, ...] | None:
    """Return the channels of heads, of a gate block, or those that are listed."""
    if which is None:
        return None
    is_attention, is_one = isinstance(cfg, AttentionConfig), hasattr(which, "__index__")
    if not (is_attention or is_one):
        return _among(which, width, end)
    n_groups = cfg.n_heads if is_attention else mixer_of(cfg).channel_groups(cfg)
    if n_groups is None:
        raise ValueError(f"{end!r}: this layer has no gate blocks, give channels in a slice")
    size = width // n_groups
    return tuple(g * size + i for g in _among(which, n_groups, end) for i in range(size))


def _among(which: Any, n: int, end: End) -> tuple[int, ...]:
    """Return indices, after checking that there are some and all are below `n`."""
    if isinstance(which, slice):
        which = range(n)[which]
    chosen = whole_numbers(which, f"{end!r}:")
    if max(chosen) >= n:
        raise ValueError(f"{end!r}: there are {n} here, counted from 0")
    return chosen
