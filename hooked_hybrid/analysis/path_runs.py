"""The runs of path patching: the clean run, and those with corrupted senders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.analysis.metrics import Metric, measure
from hooked_hybrid.analysis.path_ends import (
    Component,
    End,
    Receiver,
    Sender,
    Through,
    components,
    is_there,
    several,
)
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import HookFn, per_position
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.interventions.donors import read_kept
from hooked_hybrid.interventions.places import Positions, at_positions, read_positions
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.model.text_model import check_batch
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.shapes import Resid, Tokens


class PathOptions(TypedDict, total=False):
    """Common arguments of this module's functions, other than senders and receivers.

    Attributes:
        through: components on the way that are computed again, instead of staying clean: "mlps",
            "mixers", "all", or pairs ("mlp" | "mixer", layer). The IOI paper uses "mlps". Without
            it, only the direct path.
        freeze_norm: use the clean run's scale in the norms before receivers, so that a receiver's
            input is linear in the senders' outputs. Otherwise the patched stream's scale is used.
        positions: in the document, or a mask [pos] or [batch pos], where senders are corrupted;
            None means everywhere.
        attention_mask: of both runs, where rows are padded.
    """

    through: Through
    freeze_norm: bool
    positions: Positions | None
    attention_mask: Tensor | None


class Paths:
    """The clean run, the corrupted senders, and the runs of paths from them to the receivers."""

    def __init__(
        self,
        model: HookedHybrid,
        tokens: Tokens,
        corrupted_cache: Mapping[Any, Tensor],
        senders: End | Sequence[End],
        receivers: End | Sequence[End],
        metric: Metric,
        options: PathOptions,
    ) -> None:
        if unknown := set(options) - set(PathOptions.__annotations__):
            raise TypeError(f"unknown options {sorted(unknown)}; see PathOptions")
        self.model, self.metric = model, metric
        self.tokens, self.mask = check_batch(model, tokens, options.get("attention_mask"))
        self.senders = [
            Sender.of(model, end) for end in several(senders, "senders", model.hook_dict)
        ]
        self.receivers = [
            Receiver.of(model, end) for end in several(receivers, "receivers", model.hook_dict)
        ]
        self.through = components(model, options.get("through", ()))
        self.freeze_norm = options.get("freeze_norm", False)
        self.layout = lay_out(self.tokens, None, self.mask, None)
        self.at = self._chosen(options.get("positions"))
        self.corrupted = self._checked(corrupted_cache)
        self.clean = self._clean_run()

    def is_heard(self, sender: Sender) -> bool:
        """Whether any receiver comes after the sender."""
        return any(receiver.hears(sender) for receiver in self.receivers)

    def clean_value(self) -> Float[Tensor, "*batch"]:
        """Return the metric of the clean run, computed as those of patched runs are."""
        return self._measure([])

    def value(self, senders: Sequence[Sender]) -> Float[Tensor, "*batch"]:
        """Return the metric with these senders corrupted for the receivers."""
        streams = self._recomputed(senders) if self.through else self._summed(senders)
        hooks: list[HookSpec] = []
        for receiver in self.receivers:
            stream = streams[receiver.source]
            if receiver.name != receiver.source:  # its copies come after the norm
                stream = self._normed(receiver, stream)[:, :, None]
            hooks.append((receiver.name, _put(stream, self._copies(receiver))))
            if self.freeze_norm and receiver.norm and receiver.name == receiver.source:
                scale = f"{receiver.norm}.hook_scale"
                hooks.append((scale, _put(self.clean[scale], None)))
        return self._measure(hooks)

    # --- before any path is run -----------------------------------------------------------------

    def _chosen(self, positions: Positions | None) -> Bool[Tensor, "batch pos"]:
        """Return where senders are corrupted."""
        pos = self.layout.pos
        chosen = read_positions(positions)
        if isinstance(chosen, Tensor) and chosen.shape[:-1] not in ((), pos.shape[:1]):
            raise ValueError(f"a mask of {len(chosen)} rows for the {len(pos)} of the tokens")
        at = at_positions(pos, chosen)
        if not bool(at.any()):
            raise ValueError(f"positions {chosen}: the last position is {int(pos.max())}")
        return at

    def _checked(self, cache: Mapping[Any, Tensor]) -> dict[str, Tensor]:
        """Return the corrupted values of the senders, at the positions of the clean ones."""
        found = {}
        for name in {sender.name for sender in self.senders}:
            value, places = read_kept(cache, name)
            if value.shape[:2] != self.tokens.shape:
                raise ValueError(
                    f"the corrupted {name!r} has [batch pos] {tuple(value.shape[:2])}, the clean "
                    f"tokens {tuple(self.tokens.shape)}: give two runs of the same shape"
                )
            own = self.layout.pos if places is None else places.pos.to(self.layout.pos.device)
            if not torch.equal(own, self.layout.pos):
                raise ValueError(
                    f"the corrupted {name!r} stands at other positions than the clean tokens: give "
                    "attention_mask as both runs had it, and a cache of a whole run"
                )
            found[name] = value.to(self.model.device)
        return found

    def _clean_run(self) -> Mapping[str, Tensor]:
        """Return the values of the clean run that are needed later."""
        names = {_before(self._first_layer())}
        names |= {sender.name for sender in self.senders}
        names |= {receiver.source for receiver in self.receivers}
        if self.freeze_norm:
            names |= {f"{receiver.norm}.hook_scale" for receiver in self.receivers if receiver.norm}
        if self.through:
            outs = ("mixer_out", "mlp_out", "resid_post")
            n_layers = range(self.model.cfg.n_layers)
            every = {f"blocks.{i}.hook_{out}" for i in n_layers for out in outs}
            names |= {"hook_embed"} | (every & self.model.hook_dict.keys())
        _, cache = self.model.run_with_cache(
            self.tokens, names_filter=sorted(names), attention_mask=self.mask
        )
        return cache

    # --- what a receiver reads ------------------------------------------------------------------

    def _delta(self, sender: Sender) -> Resid:
        """Return the corrupted output of a sender minus the clean one."""
        clean, corrupted = self.clean[sender.name], self.corrupted[sender.name]
        delta = sender.write(at_least_fp32(corrupted) - at_least_fp32(clean))
        return delta.where(self.at[..., None], 0.0)

    def _summed(self, senders: Sequence[Sender]) -> dict[str, Resid]:
        """Return the stream at each receiver: the clean one plus the senders' differences."""
        deltas = [(sender, self._delta(sender)) for sender in senders]
        return {
            receiver.source: _plus(
                self.clean[receiver.source],
                [delta for sender, delta in deltas if receiver.hears(sender)],
            )
            for receiver in self.receivers
        }

    def _recomputed(self, senders: Sequence[Sender]) -> dict[str, Resid]:
        """Return the streams of a run with all components clean but `through` and the senders."""
        first = max(min(sender.depth - 1 for sender in senders), 0) // 2
        stop = min(
            max(receiver.depth for receiver in self.receivers) // 2 + 1, len(self.model.blocks)
        )
        hooks: list[HookSpec] = []
        for layer in range(first, stop):
            for part in ("mixer", "mlp"):
                if not is_there(self.model, (part, layer)):
                    continue
                mine = [sender for sender in senders if sender.component == (part, layer)]
                hooks += self._held((part, layer), mine)
        stream = self.clean[_before(first)]
        stream = _plus(stream, [self._delta(s) for s in senders if s.depth == 0])
        names = sorted({receiver.source for receiver in self.receivers})
        with self.model.hooks(hooks):
            _, cache = self.model.run_with_cache(
                stream,
                names_filter=lambda name: name in names,
                start_at_layer=first,
                stop_at_layer=stop,
                attention_mask=self.mask,
            )
        return {name: cache[name] if name in cache else self.clean[name] for name in names}

    def _held(self, component: Component, senders: list[Sender]) -> list[HookSpec]:
        """Return hooks that keep a component clean except for its senders, or only these."""
        if component not in self.through:
            out = f"blocks.{component[1]}.hook_{component[0]}_out"
            return [(out, _put(_plus(self.clean[out], map(self._delta, senders)), None))]
        hooks: list[HookSpec] = []
        for sender in senders:
            donor, where = self.corrupted[sender.name], self.at
            shape = donor.shape[2:]
            chosen = torch.ones(shape.numel(), dtype=torch.bool, device=donor.device)
            if sender.channels is not None:
                chosen = torch.zeros_like(chosen)
                chosen[list(sender.channels)] = True
            where = where.view(*where.shape, *(1,) * len(shape)) & chosen.view(shape)
            hooks.append((sender.name, _put(donor, where)))
        return hooks

    # --- runs -----------------------------------------------------------------------------------

    def _first_layer(self) -> int:
        """Return the first layer that a receiver changes."""
        first = min(receiver.depth for receiver in self.receivers) // 2
        return min(first, len(self.model.blocks) - 1)

    def _measure(self, hooks: list[HookSpec]) -> Float[Tensor, "*batch"]:
        """Return the metric of the clean run with hooks, started at the first layer they change."""
        first = self._first_layer()
        stream = self.clean[_before(first)]
        with self.model.hooks(hooks):
            logits = self.model(stream, start_at_layer=first, attention_mask=self.mask)
        return measure(self.metric, logits)

    def _normed(self, receiver: Receiver, stream: Resid) -> Resid:
        """Return the stream after the norm before a receiver."""
        if receiver.norm is None:
            return stream
        scale, hooks = f"{receiver.norm}.hook_scale", []
        if self.freeze_norm:
            hooks = [(scale, _put(self.clean[scale], None))]
        with self.model.hooks(hooks), self.model.running(self.layout):
            return self.model.mod_dict[receiver.norm](stream)

    def _copies(self, receiver: Receiver) -> Bool[Tensor, "1 1 head 1"] | None:
        """Return True at the heads whose copy of the input is set; None for all."""
        if receiver.heads is None:
            return None
        mixer = self.model.blocks[receiver.depth // 2].attn
        is_query = receiver.name.endswith("hook_q_input")
        n_heads = mixer.cfg.n_heads if is_query else mixer.cfg.n_kv_heads
        chosen = torch.zeros(1, 1, n_heads, 1, dtype=torch.bool, device=self.model.device)
        chosen[:, :, list(receiver.heads)] = True
        return chosen


def _before(layer: int) -> str:
    """Return the hook point that holds the stream entering a layer, before hooks of its own."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"


def _plus(stream: Resid, deltas: Iterable[Tensor]) -> Resid:
    """Return the stream and all that is added to it, rounded once."""
    total = sum(deltas, start=at_least_fp32(stream))
    return total.to(stream.dtype)


def _put(donor: Tensor, where: Tensor | None) -> HookFn:
    """Return a hook that replaces a value, at given places, by a donor's value there."""

    @per_position
    def put(value: Tensor, hook: HookPoint) -> Tensor:
        first, n = hook.run.first, value.shape[1]
        new = donor[:, first : first + n].expand_as(value)
        if where is None:
            return new
        return torch.where(
            where if where.shape[1] == 1 else where[:, first : first + n], new, value
        )

    return put
