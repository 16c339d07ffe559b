"""What every test shares: no network, one thread, fixed seeds, and a working directory of its own."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

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
def _reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test from seed 0, in an empty folder that takes whatever it writes; end it with no other environment.

    Lightning leaves its seed in the environment, from which processes that later tests start would be seeded.
    """
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with patch.dict(os.environ):
        yield
