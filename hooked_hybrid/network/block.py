"""One residual block: the only place that adds to the residual stream."""

from __future__ import annotations

from typing import Any

from hooked_hybrid.config import HybridConfig, LayerConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.component import Component
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers import Mixer, mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.state import BlockState
from hooked_hybrid.shapes import Resid


class Block(Component):
    """`resid_mid = resid_pre + mixer(ln1(resid_pre))`, then the same with the MLP.

    The mixer lies at the path that its class states, and has the further hooks on its write that
    this states: attention at `attn`, with `hook_attn_out`, recurrences at `mixer`.
    """

    def __init__(self, cfg: HybridConfig, layer: LayerConfig) -> None:
        super().__init__()
        mixer = mixer_of(layer.mixer)
        self.mixer_path, self.out_hooks = mixer.path, mixer.out_hooks
        self.ln1 = RMSNorm(cfg.d_model, cfg.norm)
        self.add_module(self.mixer_path, mixer(layer.mixer, cfg.d_model))
        self.ln2 = RMSNorm(cfg.d_model, cfg.norm)
        self.mlp = mlp_of(layer.mlp)(layer.mlp, cfg.d_model)

        self.hook_resid_pre = HookPoint("batch pos d_model")
        self.hook_mixer_in = HookPoint("batch pos d_model")
        self.hook_mixer_out = HookPoint("batch pos d_model")
        self.hook_resid_mid = HookPoint("batch pos d_model")
        self.hook_mlp_in = HookPoint("batch pos d_model")
        self.hook_mlp_out = HookPoint("batch pos d_model")
        self.hook_resid_post = HookPoint("batch pos d_model")
        for name in self.out_hooks:
            self.add_module(name, HookPoint("batch pos d_model"))

    @property
    def any_mixer(self) -> Mixer[Any]:
        """The mixer, wherever it lies."""
        return self._modules[self.mixer_path]  # type: ignore[return-value]

    def forward(
        self, resid_pre: Resid, state: BlockState | None, layout: Layout
    ) -> tuple[Resid, BlockState]:
        """Return the residual stream after the block, and the mixer's new state."""
        resid_pre = self.hook_resid_pre.branch(resid_pre)
        mixer_out, state = self.any_mixer(
            self.ln1(self.hook_mixer_in.branch(resid_pre)), state, layout
        )
        mixer_out = self.hook_mixer_out(mixer_out)
        for name in self.out_hooks:
            mixer_out = self._modules[name].branch(mixer_out)  # type: ignore[union-attr, operator]
        resid_mid = self.hook_resid_mid(resid_pre + mixer_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in.branch(resid_mid)), layout))
        return self.hook_resid_post(resid_mid + mlp_out), state
