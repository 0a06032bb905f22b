"""SAELens trains sparse autoencoders on our hook points, and they run inside our forward."""

from __future__ import annotations

import copy
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from hooked_hybrid import HookedHybrid

CONTEXT = 32
STEPS = 12
HOOKS = {
    "tiny-griffin": [
        "hook_embed",
        "blocks.3.hook_resid_post",
        "blocks.1.hook_mixer_out",
        "blocks.0.mixer.hook_ssm_state",
        "blocks.1.mixer.hook_ssm_y",
        "blocks.2.attn.hook_z",
        "blocks.4.mlp.hook_post",
    ],
    "tiny-jamba": [
        "blocks.1.hook_resid_post",
        "blocks.0.mixer.hook_ssm_state",
        "blocks.1.mixer.hook_gated",
        "blocks.1.mlp.hook_expert_out",
        "blocks.2.attn.hook_result",
    ],
}
CASES = [(name, hook) for name, hooks in HOOKS.items() for hook in hooks]
CASES_OF = {name: (name, hooks[0]) for name, hooks in HOOKS.items()}


class Trained(NamedTuple):
    """What a run left: the runner, and the autoencoder it saved, loaded again."""

    runner: LanguageModelSAETrainingRunner
    sae: SAE[Any]
    width: int


@cache
def model_named(name: str) -> HookedHybrid:
    return HookedHybrid.from_pretrained(name).eval()


def tokens_for(seed: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 500, (rows, CONTEXT), generator=generator)


@cache
def activations(name: str, hook: str) -> Tensor:
    """Return what two held-out prompts leave at a hook point."""
    with torch.no_grad():
        _, left = model_named(name).run_with_cache(tokens_for(1, 2), names_filter=hook)
    return left[hook]


def train(name: str, hook: str, folder: Path, dataset: Dataset) -> Trained:
    torch.manual_seed(0)
    width = prod(activations(name, hook).shape[2:])
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=width, d_sae=64, l1_coefficient=0.01),
        model_name=name,
        hook_name=hook,
        context_size=CONTEXT,
        training_tokens=STEPS * 128,
        train_batch_size_tokens=128,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        n_eval_batches=1,
        eval_batch_size_prompts=2,
        lr=3e-3,
        prepend_bos=False,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(folder),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset, override_model=model_named(name)
    )
    runner.run()
    return Trained(runner, SAE.load_from_disk(str(folder), device="cpu"), width)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains on a hook point, once."""

    @cache
    def once(name: str, hook: str) -> Trained:
        dataset = Dataset.from_dict({"tokens": tokens_for(0, 64).tolist()})
        return train(name, hook, tmp_path_factory.mktemp("sae"), dataset)

    return once


@pytest.mark.parametrize(("name", "hook"), CASES)
def test_an_autoencoder_is_trained_saved_and_loaded(trained, name, hook):
    runner, sae, width = trained(name, hook)
    assert sae.cfg.metadata.hook_name == hook
    assert (sae.cfg.d_in, sae.W_dec.shape) == (width, (64, width))
    torch.manual_seed(0)
    untrained = LanguageModelSAETrainingRunner(
        runner.cfg,
        override_dataset=runner.activations_store.dataset,
        override_model=model_named(name),
    ).sae
    x = activations(name, hook).flatten(2)
    features, rebuilt = sae.encode(x), sae.decode(sae.encode(x))
    assert features.shape == (2, CONTEXT, 64)
    assert bool((features > 0).any())
    assert bool((features >= 0).all())
    assert rebuilt.shape == x.shape
    assert bool(torch.isfinite(rebuilt).all())
    before = untrained.decode(untrained.encode(x))
    assert float((rebuilt - x).square().mean()) < float((before - x).square().mean())


@pytest.mark.parametrize("name", HOOKS)
def test_it_reads_every_hook_point_as_our_cache_does(trained, name):
    """Every one with a position axis and a gradient; SAELens flattens what follows the position."""
    model, store = model_named(name), trained(*CASES_OF[name]).runner.activations_store
    store = copy.copy(store)
    hooks = [n for n, p in model.hook_dict.items() if "pos" in p.axes and not p.is_integer]
    assert len(hooks) > 100
    for hook in hooks:
        wanted = activations(name, hook).flatten(2)
        store.hook_name, store.d_in = hook, wanted.shape[-1]
        got = store.get_activations(tokens_for(1, 2))
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5), hook


@pytest.mark.parametrize(("name", "hook"), CASES)
def test_it_is_spliced_in_with_a_hook(trained, name, hook):
    """What the hook returns is what every later layer reads."""
    model, sae = model_named(name), trained(name, hook).sae
    seen: list[Tensor] = []

    def splice(value: Tensor, hook: Any) -> Tensor:
        new = sae.decode(sae.encode(value.flatten(2))).reshape(value.shape)
        seen.append(new)
        return new

    def replace(value: Tensor, hook: Any) -> Tensor:
        at = int(hook.run.query_pos[0, 0])
        return rebuilt[:, at : at + value.shape[1]]

    tokens = tokens_for(1, 2)
    with torch.no_grad():
        spliced = model.run_with_hooks(tokens, fwd_hooks=[(hook, splice)])
        rebuilt = torch.cat(seen, dim=1)
        wanted = model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])
        plain = model(tokens)
    assert rebuilt.shape == activations(name, hook).shape
    assert torch.isfinite(spliced).all()
    assert float((spliced - plain).abs().max()) > 1e-3
    assert torch.allclose(spliced, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("tiny-griffin", "blocks.3.hook_resid_post"),
        ("tiny-griffin", "blocks.1.mixer.hook_ssm_y"),
        ("tiny-griffin", "blocks.2.attn.hook_z"),
        ("tiny-jamba", "blocks.1.mixer.hook_gated"),
    ],
)
def test_its_evaluation_runs(trained, name, hook):
    runner, sae, _ = trained(name, hook)
    loss = evaluate(runner, sae, name)
    assert all(torch.isfinite(torch.tensor(value)) for value in loss.values())
    assert loss["ce_loss_without_sae"] > 0
    assert loss["ce_loss_with_sae"] != loss["ce_loss_without_sae"]


def test_its_evaluation_does_not_take_the_state_position_by_position(trained):
    """SAELens masks special tokens of the whole row; `hook_ssm_state` is edited one at a time."""
    runner, sae, _ = trained("tiny-griffin", "blocks.0.mixer.hook_ssm_state")
    with pytest.raises(ValueError, match=r"hook_ssm_state' returned shape \(2, 32, 128\)"):
        evaluate(runner, sae, "tiny-griffin")


def evaluate(runner: LanguageModelSAETrainingRunner, sae: SAE[Any], name: str) -> dict[str, float]:
    """Return SAELens's losses with the autoencoder, without it, and without the activation."""
    wanted = EvalConfig(
        batch_size_prompts=2,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    store, scaler = runner.activations_store, ActivationScaler()
    with torch.no_grad():
        metrics, _ = run_evals(sae, store, model_named(name), scaler, wanted)
    return metrics["model_performance_preservation"] | metrics["model_behavior_preservation"]


def test_it_reads_text_through_our_tokenizer(tmp_path):
    """A data set of texts is tokenized, joined and cut by SAELens with `model.to_tokens`."""
    model = model_named("tiny-griffin")
    text = "The best thing to do in Dover is read a book in the park ."
    dataset = Dataset.from_dict({"text": [text] * 200})
    runner, sae, _ = train("tiny-griffin", "blocks.3.hook_resid_post", tmp_path, dataset)
    batch, tokens = runner.activations_store.get_batch_tokens(2), model.to_tokens(text)[0]
    assert tokens[0] == model.cfg.bos_token_id
    assert batch.shape == (2, CONTEXT)
    joined = torch.cat([tokens[1:], tokens.repeat(5)])  # a BOS between the texts, none before
    assert torch.equal(batch.flatten(), joined[: batch.numel()])
    assert torch.isfinite(sae(activations("tiny-griffin", "blocks.3.hook_resid_post"))).all()
