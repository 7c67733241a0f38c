"""What holds for every test: no network, one thread, fixed seeds, and a cache of its own."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Hub clients read it when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

from p0circuit.io import cache_directory
from p0circuit.log import show_messages
from tests.chromium import CHROMIUM, NONE_FOUND, chromium, open_page
from tests.families import family_folder, family_model
from tests.tiny import tiny_model_dir

# The user's own: what was fetched stays fetched, from one run of the tests to the next.
OWN_CACHE = cache_directory()

__all__ = ["chromium", "family_folder", "family_model", "open_page", "tiny_model_dir"]

hypothesis.settings.register_profile("p0circuit", deadline=None, derandomize=True)
hypothesis.settings.load_profile("p0circuit")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that tests were skipped for want of a browser: a green run would hide it."""
    if CHROMIUM is None:
        terminalreporter.write_line(NONE_FOUND)


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


@pytest.fixture(autouse=True)
def messages_as_before() -> Iterator[None]:
    """A test that runs the command line leaves the package as silent as it was."""
    logger = logging.getLogger("p0circuit")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def shown_messages(messages_as_before: None) -> None:
    """Messages go to standard error in this test, as they do on the command line."""
    show_messages()


@pytest.fixture(scope="session")
def own_cache() -> Path:
    """The user's own cache folder, in which fetched models lie."""
    return OWN_CACHE


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M in the user's own cache, fetched if need be; without it the test is skipped."""
    from p0circuit.models import CATALOG, ModelError, fetch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P0CIRCUIT_CACHE", str(OWN_CACHE))
        try:
            return fetch(CATALOG["smollm2-135m"])
        except ModelError as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Any:
    """SmolLM2-135M as a hooked model; without it the test is skipped. Tests must leave it as it was."""
    from p0circuit.models import load_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P0CIRCUIT_CACHE", str(OWN_CACHE))
        return load_model("smollm2-135m", device="cpu")
