"""What holds for every test: no network, one thread, fixed seeds, and a cache of its own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Hub clients read it when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

from tests.families import family_folder, family_model
from tests.tiny import tiny_model_dir

__all__ = ["family_folder", "family_model", "tiny_model_dir"]

hypothesis.settings.register_profile("p0circuit", deadline=None, derandomize=True)
hypothesis.settings.load_profile("p0circuit")


@pytest.fixture(autouse=True, scope="session")
def one_thread_and_a_cache_for_shared_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small tensors are quicker on one thread, and sums come out the same on every machine size."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P0CIRCUIT_CACHE", str(tmp_path_factory.mktemp("shared-cache")))
        yield


@pytest.fixture(autouse=True)
def fixed_seeds_and_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test draws other numbers, or reads other results, because of the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setenv("P0CIRCUIT_CACHE", str(tmp_path_factory.mktemp("cache")))
