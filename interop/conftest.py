"""Every test runs on one core and without a network."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "WANDB_SILENT": "true"}

import torch

torch.set_num_threads(1)
