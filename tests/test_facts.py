"""Every mixer and every MLP states every fact, or says in one sentence what it does not state."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hooked_hybrid import HookedHybrid, HybridConfig, NotSupported, fold_ln
from hooked_hybrid.accounting import prefill_flops, state_bytes
from hooked_hybrid.accounting.plan.working import Sizes
from hooked_hybrid.analysis import effective_attention
from hooked_hybrid.analysis.forms import FORMS, LinearForm, form_of, register_form
from hooked_hybrid.config import GatedMLPConfig, LayerConfig, MixerConfig, MLPConfig, NormConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.interventions import freeze_state, knock_out_crossings
from hooked_hybrid.network.block_state import BlockState, RecurrentState, class_of
from hooked_hybrid.network.costs import Flops, Piece
from hooked_hybrid.network.layers import Linear, RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers import MIXERS, Mixer, mixer_of, register_mixer
from hooked_hybrid.network.mlps import MLPS, mlp_of, register_mlp
from hooked_hybrid.network.part import Part
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.network.weights.quantized import quantizable
from tests.layer_configs import MAMBA2
from tests.models import CONFIGS, D_VOCAB, random_tokens
from tests.toy_mixer import Ema, EmaConfig, EmaForm
from tests.toy_mlp import SquaredConfig, SquaredMLP

MODELS: dict[str, HybridConfig] = {
    **CONFIGS,
    "toy": HybridConfig(24, D_VOCAB, (LayerConfig(EmaConfig(4, 8), SquaredConfig(20)),)),
    "mamba2": HybridConfig(24, D_VOCAB, (LayerConfig(MAMBA2, SquaredConfig(20)),)),
}
PIECE = Piece(batch=2, n_pos=5, n_tokens=9, width=4, on_cpu=True)


def instances() -> dict[str, Part]:
    """One mixer and one MLP of each kind, as they stand in a model."""
    found: dict[str, Part] = {}
    for cfg in MODELS.values():
        for block in HookedHybrid.meta(cfg).blocks:
            for part in (block.mixers[0], block.mlp):
                found.setdefault(type(part).kind, part)
    return found


PARTS = instances()
every_part = pytest.mark.parametrize("kind", list(PARTS))


def test_the_kinds_walked_are_all_there_are():
    known = {part.kind for part in (*MIXERS.values(), *MLPS.values())} - {"silent", "silent mlp"}
    assert known == set(PARTS)
    recurrent = {m.kind for m in MIXERS.values() if not m.grows} - {"silent"}
    assert recurrent == set(FORMS)


@every_part
def test_what_it_reads_and_writes_are_its_parameters_and_hook_points(kind: str):
    part, d_model = PARTS[kind], 24
    parameters = dict(part.named_parameters())
    for name in part.reads:
        assert parameters[name].shape[-1] == d_model, name
    for name in part.writes:
        assert parameters[name].shape[-2] == d_model, name
    assert set(part.kept_plain) <= {*part.reads, *part.writes}
    points = {name for name, m in part.named_modules() if isinstance(m, HookPoint)}
    assert set(part.hooks_after_norm) <= points
    for inner in part.inner_norms:
        norm = part.get_submodule(inner.norm)
        assert norm.weight.shape[0] == parameters[inner.reader].shape[-1]
        assert inner.hook in points
    assert set(part.hook_meanings) <= points
    children = {name.split(".")[0] for name in parameters}
    assert {*part.rows_apart, *part.rows_within} <= children
    assert part.title and part.row and part.label


@every_part
def test_what_it_costs(kind: str):
    part = PARTS[kind]
    flops = part.operations(part.cfg, 24)
    assert set(flops) == set(part.rows()) and all(f.products > 0 for f in flops.values())
    assert part.working_bytes(part.cfg, 24, PIECE) > 0
    for name, parameter in part.named_parameters():
        n = parameter.numel()
        assert 0 < part.active_parameters(part.cfg, name.split(".")[0], n) <= n


@every_part
def test_the_parts_of_its_write(kind: str):
    part = PARTS[kind]
    norm = RMSNorm(24, NormConfig())
    if part.part_letter is None:
        with pytest.raises(NotSupported, match=f"{kind!r}.*does not state parts of its write"):
            part.split(norm)
        return
    split = part.split(norm)
    assert split.n > 1 and split.ways
    for way in split.ways:
        below = [n.partition(".")[2] for n in way.names if not n.startswith("ln")]
        assert all(isinstance(getattr(part, name), HookPoint) for name in below)


@pytest.mark.parametrize("mixer", list(MIXERS.values()), ids=lambda m: m.kind)
def test_a_mixer_states_the_required_facts(mixer: type[Mixer[Any]]):
    if mixer.kind not in PARTS:
        pytest.skip("made by another test of this file")
    part: Any = PARTS[mixer.kind]
    cfg, shapes = part.cfg, mixer.state_shapes(part.cfg)
    assert mixer.grows == class_of(dict.fromkeys(shapes)).growing
    assert cfg.is_recurrence == (mixer.kind in FORMS)
    assert mixer.scales_write and mixer.write_hook in ("hook_attn_out", "hook_ssm_out")
    points = {name for name, m in part.named_modules() if isinstance(m, HookPoint)}
    assert set(mixer.hooked_numbers(cfg, 5, 9)) <= points
    assert isinstance(part.out_projection, Linear)
    if mixer.grows:
        assert mixer.pair_operations(cfg).total > 0 and mixer.n_kept(cfg, 3) <= 3
        for fact in ("holds", "forgets", "scan_hooks"):
            with pytest.raises(NotSupported, match=f"does not state.*define `{fact}`"):
                getattr(mixer, fact)
        return
    assert mixer.n_kept(cfg, 3) == 0 and mixer.n_taps(cfg) >= 1
    assert {"hook_ssm_y", "hook_ssm_state", *mixer.scan_hooks} <= points
    assert {*mixer.holds, *mixer.forgets} <= points and mixer.holds and mixer.forgets
    with pytest.raises(NotSupported, match="does not state how many keys a query sees"):
        mixer.window(cfg)


@pytest.mark.parametrize("kind", list(FORMS))
def test_the_linear_form_of_a_recurrence(kind: str):
    part: Any = PARTS[kind].to_empty(device="cpu")
    form, width = FORMS[kind], part.state_shapes(part.cfg)["ssm"][0]
    assert form_of(part.cfg) is form and form.n_states(part.cfg) >= 1
    assert form.taps(part).shape == (part.n_taps(part.cfg), width)
    maps = {name: tuple(W.shape) for name, W in form.maps(part).items()}
    assert maps == {"in": (24, width), "gate": (24, width), "out": (width, 24)}
    axes = 2 if form.has_states else 1
    assert all(decay.ndim == axes for decay in form.decay_range(part))


# --- what states nothing --------------------------------------------------------------------------


@dataclass(frozen=True)
class SilentConfig(MixerConfig):
    pass


@dataclass(frozen=True)
class SilentMLPConfig(MLPConfig):
    pass


class Silent(Mixer[RecurrentState]):
    """Runs, and states nothing but its kind."""

    config, kind = SilentConfig, "silent"

    def __init__(self, cfg: SilentConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.hook_ssm_y = HookPoint("batch pos d_model")
        self.hook_ssm_state = HookPoint("batch pos d_model", lazy=True, stepwise=True)

    def forward(self, x: Any, state: Any, layout: Layout) -> Any:
        last = x[:, -1:].clone()
        return self.hook_ssm_y(x), RecurrentState(last, last[:, 0])


class SilentMLP(SquaredMLP):
    """An MLP that states nothing but its kind."""

    config, kind = SilentMLPConfig, "silent mlp"

    def __init__(self, cfg: Any, d_model: int) -> None:
        super().__init__(SquaredConfig(4), d_model)
        self.cfg = cfg


def silent_model() -> HookedHybrid:
    register_mixer(Silent)
    layer = LayerConfig(SilentConfig(), GatedMLPConfig(8))
    return HookedHybrid(HybridConfig(24, D_VOCAB, (layer,))).requires_grad_(False)


@pytest.fixture
def silent():
    yield silent_model()
    MIXERS.pop(SilentConfig)


def test_a_mixer_that_states_nothing_runs_and_its_errors_name_what_is_missing(silent: HookedHybrid):
    tokens = random_tokens(n_pos=6)
    logits, cache = silent.run_with_cache(tokens)
    assert logits.shape == (2, 6, D_VOCAB)
    assert cache.decompose_resid(return_labels=True)[1][1] == "0_silent_out"
    assert silent.generate(tokens, 2, verbose=False, stop_at_eos=False).shape == (2, 8)
    asked: dict[str, Callable[[], Any]] = {
        "the parameters that read the residual stream: define `reads`": lambda: fold_ln(silent),
        "the parameters that read the residual": lambda: quantizable(silent.cfg),
        "its floating-point operations: define `operations`": lambda: prefill_flops(silent.cfg, 5),
        "the shapes of its state: define `state_shapes`": lambda: state_bytes(silent.cfg, 5),
        "the bytes of its values in a forward: define `working_bytes`": lambda: Sizes(
            silent.cfg, torch.float32
        ).working(0, 5),
        "how its state is held: define `holds`": lambda: silent.run_with_hooks(
            tokens, fwd_hooks=freeze_state(2)
        ),
        "how its state is dropped: define `forgets`": lambda: knock_out_crossings(silent.cfg, 3),
        "the parameters that write to the residual": lambda: silent.blocks[0].mixer.out_projection,
    }
    for sentence, ask in asked.items():
        wanted = r"^the kind 'silent' \(Silent\) does not state " + re.escape(sentence)
        with pytest.raises(NotSupported, match=wanted) as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(NotSupported, match="the kind 'silent' has no linear form; there are some"):
        effective_attention(cache, 0)


def test_a_tensor_of_a_state_that_no_other_kind_keeps_is_counted_and_replaced():
    class Keeper(Silent):
        kind = "keeper"

        @classmethod
        def state_shapes(cls, cfg: Any) -> dict[str, tuple[int, ...]]:
            return {"kept": (3, 5), "ssm": (7,)}

    @dataclass(frozen=True, eq=False)
    class Kept(BlockState):
        kept: torch.Tensor
        ssm: torch.Tensor

    register_mixer(Keeper)
    cfg = HybridConfig(24, D_VOCAB, (LayerConfig(SilentConfig(), GatedMLPConfig(8)),))
    found = state_bytes(cfg, 5, torch.bfloat16)
    MIXERS.pop(SilentConfig)
    assert (found.recurrence, found.keys_values) == (15 * 2 + 7 * 4, 0)
    states = [
        HybridState(
            (Kept(torch.full((2, 3), n), torch.full((2, 7), n)),), *(torch.ones(2).long(),) * 2
        )
        for n in (0.0, 1.0)
    ]
    assert states[0].replace(states[1], kinds="ssm").blocks[0].kept.sum() == 6
    assert states[0].replace(states[1], kinds="conv").blocks[0].kept.sum() == 0
    again = HybridState.from_tensors(states[1].tensors())
    assert type(again.blocks[0]) is Kept
    with pytest.raises(ValueError, match="no kind of layer keeps other"):
        HybridState.from_tensors({**states[1].tensors(), "blocks.1.other": torch.ones(2)})


def test_a_config_without_a_class_is_refused_where_a_model_is_made():
    cfg = HybridConfig(24, D_VOCAB, (LayerConfig(SilentConfig(), SilentMLPConfig()),))
    sentence = "no mixer is registered for a SilentConfig; .* call .*register_mixer"
    with pytest.raises(NotSupported, match=sentence):
        HookedHybrid(cfg)
    with pytest.raises(NotSupported, match="no mlp is registered for a SilentMLPConfig"):
        mlp_of(SilentMLPConfig())
    assert mixer_of(EmaConfig(1, 1)) is Ema


def test_names_follow_from_the_kind_and_are_not_taken_twice():
    assert (SilentMLP.title, SilentMLP.row, SilentMLP.label) == ("silent mlp",) * 3
    assert SilentMLP.operations(SquaredConfig(2), 3) == {"silent mlp": Flops(24, elementwise=10)}

    class Twin(Silent):
        kind = "ema"
        config = SilentMLPConfig

    with pytest.raises(ValueError, match="Twin has the kind of Ema, 'ema': give it one of its own"):
        register_mixer(Twin)
    register_mlp(SquaredMLP)  # again: nothing changes
    register_form(EmaForm())

    class OtherForm(EmaForm):
        pass

    with pytest.raises(ValueError, match="the kind 'ema' has a linear form already"):
        register_form(OtherForm())


def test_a_form_says_what_it_does_not_state():
    class EmptyForm(LinearForm):
        kind = "silent"

    with pytest.raises(NotSupported, match="the linear form of the kind 'silent' does not state"):
        EmptyForm().decay_range(None)
