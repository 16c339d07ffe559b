"""What every test shares: no network, one thread, fixed seeds, and a working directory of its own."""

import os
import random
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before any other import

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # matrices here are small, and pytest-xdist already uses every core

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test from seed 0, in an empty folder that takes whatever the test writes."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
