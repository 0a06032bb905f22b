"""An autoencoder of SAELens is trained on harvested shards, without the model."""

from itertools import islice
from math import sqrt

import pytest
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer

from hooked_hybrid import HookedHybrid
from hooked_hybrid.harvest import HarvestedActivations, harvest

NAME = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> HarvestedActivations:
    model = HookedHybrid.from_pretrained("tiny-griffin").eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 500, (64, 32), generator=generator)
    folder = tmp_path_factory.mktemp("harvest") / "out"
    return harvest(model, tokens, NAME, folder, shard_bytes=200_000, verbose=False)


def test_saelens_trains_on_harvested_shards(harvested):
    assert len(harvested.paths) > 3
    held_out = next(iter(harvested.batches(NAME, 256, seed=1)))
    torch.manual_seed(0)
    width = held_out.shape[1]
    cfg = StandardTrainingSAEConfig(
        d_in=width,
        d_sae=64,
        l1_coefficient=0.01,
        normalize_activations="expected_average_only_in",
    )
    sae = StandardTrainingSAE(cfg)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=60 * 128, train_batch_size_samples=128, lr=3e-3, lr_end=3e-4
        ),
        sae,
        iter(harvested.batches(NAME, 128, epochs=None)),
    )
    trainer.activation_scaler.scaling_factor = sqrt(width) / harvested.mean_norm(NAME)
    scaled = held_out * trainer.activation_scaler.scaling_factor
    before = float((sae(scaled) - scaled).square().mean())
    trained = trainer.fit()
    after = float((trained(held_out) - held_out).square().mean()) * (
        (sqrt(width) / harvested.mean_norm(NAME)) ** 2
    )
    assert after < 0.5 * before


def test_the_index_holds_the_scale_that_saelens_would_estimate(harvested):
    n = len(harvested) // 128
    scaler = ActivationScaler()
    provider = islice(iter(harvested.batches(NAME, 128, epochs=None)), n)
    scaler.estimate_scaling_factor(128, provider, n)
    assert scaler.scaling_factor == pytest.approx(sqrt(128) / harvested.mean_norm(NAME), rel=1e-4)
