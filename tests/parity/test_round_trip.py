"""What can be saved loads again as the same model, and transformers computes the same from it.

Models of random shapes, also of shapes that no published model has.
"""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    LayerConfig,
    MambaConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RGLRUConfig,
    RotaryConfig,
)
from tests.models import relative
from tests.tolerances import FP32_PARITY
from tests.transformers_versions import EAGER_EXPERTS, VERSION
from weights_conversion import CheckpointError

N_MODELS = 8


def griffin(rng: Random) -> HybridConfig:
    """A RecurrentGemma of any shape: heads need not divide the width, nor gates be many."""
    n_kv, groups = rng.choice((1, 2, 3)), rng.choice((1, 2))
    n_heads, d_head = n_kv * groups, 2 * rng.randint(1, 5)
    rotary = RotaryConfig(2 * rng.randint(0, d_head // 2), rng.choice((10_000.0, 37.0)))
    attention = AttentionConfig(
        n_heads, n_kv, d_head, rng.randint(1, 9), rotary, rng.random() < 0.5, out_bias=True
    )
    recurrence = RGLRUConfig(n_heads * rng.randint(1, 3), n_heads, rng.randint(2, 5))
    mlp = GatedMLPConfig(rng.randint(1, 9))
    kinds = rng.choice((("A",), ("R",), ("R", "A"), ("R", "R", "A"), ("A", "R", "R", "R")))
    mixers = {"A": attention, "R": recurrence}
    n_layers = rng.randint(1, 4)
    return HybridConfig(
        d_model=rng.randint(2, 13),
        d_vocab=rng.randint(3, 40),
        layers=tuple(LayerConfig(mixers[kinds[i % len(kinds)]], mlp) for i in range(n_layers)),
        norm=NormConfig(rng.choice((1e-6, 0.3)), "one_plus_weight"),
        scale_embedding=True,
        tied_embedding=rng.random() < 0.7,
        logits_soft_cap=rng.choice((30.0, 2.5)),
        **of_any(rng),
    )


def jamba(rng: Random) -> HybridConfig:
    """A Jamba of any shape, with experts or without."""
    d_model, eps = rng.randint(2, 13), rng.choice((1e-6, 0.3))
    n_kv = rng.choice((1, 2))
    attention = AttentionConfig(n_kv * rng.choice((1, 3)), n_kv, rng.randint(1, 5))
    mamba = MambaConfig(
        d_model * rng.randint(1, 3),
        *(rng.randint(1, 5) for _ in range(2)),
        rng.randint(2, 5),
        conv_bias=rng.random() < 0.5,
        proj_bias=rng.random() < 0.5,
        norm_eps=eps,
    )
    width, n_experts = rng.randint(1, 9), rng.randint(2, 5)
    dense = GatedMLPConfig(width, "silu", bias=False)
    experts = MoEConfig(n_experts, rng.randint(1, n_experts), width)
    every, of_experts = rng.randint(1, 5), rng.randint(1, 5)
    first, first_of_experts = rng.randrange(every), rng.randrange(of_experts)
    return HybridConfig(
        d_model=d_model,
        d_vocab=rng.randint(3, 40),
        layers=tuple(
            LayerConfig(
                attention if i % every == first else mamba,
                experts if i % of_experts == first_of_experts else dense,
            )
            for i in range(rng.randint(1, 4))
        ),
        norm=NormConfig(eps),
        tied_embedding=rng.random() < 0.5,
        **of_any(rng),
    )


def of_any(rng: Random) -> dict[str, Any]:
    """Settings that no weight depends on."""
    return {
        "bos_token_id": rng.choice((None, 0)),
        "eos_token_id": rng.choice((None, 1, (1, 2))),
        "pad_token_id": rng.choice((None, 2)),
        "n_ctx": rng.choice((None, 64)),
        "default_prepend_bos": rng.random() < 0.5,
        "model_name": rng.choice(("random", "a/model")),
    }


def drawn(cfg: HybridConfig, seed: int) -> HookedHybrid:
    """A model whose every weight matters."""
    model = HookedHybrid(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", [griffin, jamba])
@pytest.mark.parametrize("seed", range(N_MODELS))
def test_a_saved_model_loads_as_it_was_and_transformers_computes_the_same(
    family: Any, seed: int, tmp_path: Path
):
    model = drawn(family(Random(seed)), seed)
    model.save_pretrained(tmp_path / "saved")
    again = HookedHybrid.from_pretrained(tmp_path / "saved")
    assert again.cfg == model.cfg
    assert again.cfg.default_prepend_bos == model.cfg.default_prepend_bos
    assert all(t.equal(again.state_dict()[name]) for name, t in model.state_dict().items())
    if VERSION < (5,):
        pytest.skip("transformers 4: Jamba has no head_dim, RecurrentGemma rotates half alone")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        attn_implementation="eager",
        output_loading_info=True,
        **(EAGER_EXPERTS if family is jamba else {}),
    )
    assert not any(info.values()), info
    tokens = torch.randint(model.cfg.d_vocab, (2, 7), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = theirs.eval()(tokens, use_cache=False).logits
    assert relative(model(tokens), expected) < FP32_PARITY


# --- what no config has a word for ----------------------------------------------------------------

GRIFFIN, JAMBA = griffin(Random(1)), jamba(Random(2))


def with_layers(cfg: HybridConfig, mixer: Any = None, mlp: MLPConfig | None = None) -> HybridConfig:
    layers = tuple(LayerConfig(mixer or x.mixer, mlp or x.mlp) for x in cfg.layers)
    return replace(cfg, layers=layers)


ROTARY = RotaryConfig(2)
REFUSED: dict[str, HybridConfig] = {
    "a mixture has one expert": with_layers(JAMBA, mlp=MoEConfig(1, 1, 5)),
    "n_gate_blocks=3 is not n_heads=2": replace(
        GRIFFIN,
        layers=(
            LayerConfig(RGLRUConfig(6, 3), GatedMLPConfig(4)),
            LayerConfig(AttentionConfig(2, 1, 4, 5, ROTARY, out_bias=True), GatedMLPConfig(4)),
        ),
    ),
    "attention has no window": with_layers(
        GRIFFIN, AttentionConfig(2, 1, 4, None, ROTARY, out_bias=True)
    ),
    "MLPs are not GELU with biases": with_layers(GRIFFIN, mlp=GatedMLPConfig(4, "silu", False)),
    "logits have no soft cap": replace(GRIFFIN, logits_soft_cap=None),
    "attention has rotary positions": with_layers(JAMBA, AttentionConfig(2, 1, 4, None, ROTARY)),
    "d_inner=7 is not a multiple": with_layers(
        replace(JAMBA, d_model=4), MambaConfig(7, 2, 2, norm_eps=JAMBA.norm.eps)
    ),
    "norms multiply by 1 + weight": replace(JAMBA, norm=NormConfig(style="one_plus_weight")),
    "rms_norm_eps=2.0": replace(GRIFFIN, norm=NormConfig(2.0, "one_plus_weight")),
    "eos_token_id=-7 is not a token id": replace(JAMBA, eos_token_id=-7),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_that_would_not_load_is_not_saved_and_the_error_gives_the_reason(
    why: str, tmp_path: Path
):
    with pytest.raises(CheckpointError, match="no published family") as error:
        HookedHybrid(REFUSED[why]).save_pretrained(tmp_path / "saved")
    assert why in str(error.value)
    assert not list(tmp_path.iterdir())
