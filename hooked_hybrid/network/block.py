"""One residual block: the only place that adds to the residual stream."""

from __future__ import annotations

from typing import Any

from hooked_hybrid.config import HybridConfig, LayerConfig, MixerConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.block_state import BlockState, JointState, NoState
from hooked_hybrid.network.component import Component
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers import Mixer, mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.part import not_stated
from hooked_hybrid.shapes import Resid


class Block(Component):
    """`resid_mid = resid_pre + mixer(ln1(resid_pre))`, then the same with the MLP.

    A mixer is at the path that its class states, and has the further hooks on its write that this
    states: attention at `attn`, with `hook_attn_out`, recurrences at `mixer`. Of several mixers,
    each reads the same and has a hook on its own write (`write_hook`); their sum is the write.

    Norms on what is written are `ln1_post` and `ln2_post`; `hook_mixer_out` and `hook_mlp_out` hold
    what is added to the stream, after them. A layer without a mixer or an MLP has none of its
    norms and hooks, and no `hook_resid_mid`.
    """

    hook_resid_pre: HookPoint
    hook_mixer_in: HookPoint
    hook_mixer_out: HookPoint
    hook_resid_mid: HookPoint
    hook_mlp_in: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_post: HookPoint
    ln1: RMSNorm | None
    ln1_post: RMSNorm | None
    mlp: Any
    ln2: RMSNorm | None
    ln2_post: RMSNorm | None

    def __init__(self, cfg: HybridConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.mixer_paths, self.out_hooks = _paths(layer.mixers)
        self.has_mlp = has_mlp = layer.mlp is not None
        has_mixer = bool(layer.mixers)
        self._add_norm(cfg, "ln1", has_mixer and layer.norm != "post")
        for path, mixer in zip(self.mixer_paths, layer.mixers, strict=True):
            self.add_module(path, _part(mixer_of(mixer), mixer, cfg))
        self._add_norm(cfg, "ln1_post", has_mixer and layer.norm != "pre")
        self._add_norm(cfg, "ln2", has_mlp and layer.norm != "post")
        self.mlp = _part(mlp_of(layer.mlp), layer.mlp, cfg) if has_mlp else None
        self._add_norm(cfg, "ln2_post", has_mlp and layer.norm != "pre")

        of_mixer = ("hook_mixer_in", "hook_mixer_out") if has_mixer else ()
        between = ("hook_resid_mid",) if has_mixer and has_mlp else ()
        of_mlp = ("hook_mlp_in", "hook_mlp_out") if has_mlp else ()
        names = ("hook_resid_pre", *of_mixer, *between, *of_mlp, "hook_resid_post")
        for name in (*names, *self.out_hooks):
            self.add_module(name, HookPoint("batch pos d_model"))

    @property
    def mixers(self) -> tuple[Mixer[Any], ...]:
        """The mixers: none, one, or several side by side."""
        return tuple(self._modules[path] for path in self.mixer_paths)  # type: ignore[misc]

    @property
    def recurrence(self) -> Mixer[Any]:
        """The mixer that is a recurrence, wherever it lies.

        Raises:
            AttributeError: there is none.
        """
        for mixer in self.mixers:
            if mixer.cfg.is_recurrence:
                return mixer
        raise AttributeError("this block has no recurrence: see cfg.recurrent_layers")

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state's tensors by name, without the batch and the key axis."""
        return {
            name: shape
            for path, mixer in zip(self._prefixes, self.mixers, strict=True)
            for name, shape in ((path + n, s) for n, s in mixer.state_shapes(mixer.cfg).items())
        }

    def windows(self) -> dict[str, int | None]:
        """Return how many keys are seen, for each tensor of the state that has an axis of keys."""
        return {
            path + name: mixer.window(mixer.cfg)
            for path, mixer in zip(self._prefixes, self.mixers, strict=True)
            for name in mixer.grows
        }

    @property
    def _prefixes(self) -> tuple[str, ...]:
        """The prefix of the names of each mixer's state."""
        if len(self.mixer_paths) == 1:
            return ("",)
        return tuple(f"{path}." for path in self.mixer_paths)

    def forward(
        self, resid: Resid, state: BlockState | None, layout: Layout
    ) -> tuple[Resid, BlockState]:
        """Return the residual stream after the block, and the mixers' new state."""
        resid = self.hook_resid_pre.branch(resid)
        if self.mixer_paths:
            mixer_out, state = self._mix(self.hook_mixer_in.branch(resid), state, layout)
            resid = resid + mixer_out
            if not self.has_mlp:
                return self.hook_resid_post(resid), state
            resid = self.hook_resid_mid(resid)
        mlp_out = self._run_mlp(self.hook_mlp_in.branch(resid), layout)
        return self.hook_resid_post(resid + mlp_out), NoState() if state is None else state

    def _mix(self, x: Resid, state: BlockState | None, layout: Layout) -> tuple[Resid, BlockState]:
        """Return what the mixers add to the stream."""
        if (ln1 := self.ln1) is not None:
            x = ln1(x)
        if len(self.mixer_paths) == 1:
            out, state = self._modules[self.mixer_paths[0]](x, state, layout)  # type: ignore[misc]
        else:
            out, state = self._mix_side_by_side(x, state, layout)
        if self.ln1_post is not None:
            out = self.ln1_post(out)
        out = self.hook_mixer_out(out)
        if len(self.mixer_paths) == 1:
            for name in self.out_hooks:
                out = self._modules[name].branch(out)  # type: ignore[union-attr, operator]
        return out, state

    def _mix_side_by_side(
        self, x: Resid, state: BlockState | None, layout: Layout
    ) -> tuple[Resid, JointState]:
        """Return the sum of what several mixers write, each with a hook on its own write."""
        before = state.parts if isinstance(state, JointState) else {}
        outs: list[Resid] = []
        after: dict[str, BlockState] = {}
        for path, mixer, hook in zip(self.mixer_paths, self.mixers, self.out_hooks, strict=True):
            out, after[path] = mixer(x, before.get(path), layout)
            outs.append(self._modules[hook](out))  # type: ignore[misc]
        return sum(outs[1:], start=outs[0]), JointState(after)

    def _run_mlp(self, x: Resid, layout: Layout) -> Resid:
        """Return what the MLP adds to the stream."""
        if (ln2 := self.ln2) is not None:
            x = ln2(x)
        out = self.mlp(x, layout)
        if self.ln2_post is not None:
            out = self.ln2_post(out)
        return self.hook_mlp_out(out)

    def _add_norm(self, cfg: HybridConfig, name: str, is_there: bool) -> None:
        setattr(self, name, RMSNorm(cfg.d_model, cfg.norm) if is_there else None)


def _part(part: Any, cfg: Any, model: HybridConfig) -> Any:
    """Return a mixer or an MLP, which must scale its write where the config says so."""
    if cfg.write_scale != 1 and not part.scales_write:
        raise not_stated(part, "scales_write", "that it multiplies its write by `write_scale`")
    return part(cfg, model.d_model)


def _paths(mixers: tuple[MixerConfig, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return where the mixers of a layer lie, and the further hooks on what they write.

    Raises:
        ValueError: two of them have the same path.
    """
    kinds = [mixer_of(mixer) for mixer in mixers]
    paths = tuple(kind.path for kind in kinds)
    if len(set(paths)) < len(paths):
        names = ", ".join(f"{kind.kind!r} at {kind.path!r}" for kind in kinds)
        raise ValueError(f"mixers side by side need paths of their own, not {names}")
    if len(kinds) == 1:
        return paths, kinds[0].out_hooks
    return paths, tuple(kind.write_hook for kind in kinds)
