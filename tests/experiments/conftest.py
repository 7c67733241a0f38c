"""The small untrained model and a text it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p0circuit.models import load_model
from p0circuit.prompts import PromptSet, natural_text


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path) -> Any:
    """Tests must leave it as it was."""
    return load_model(tiny_model_dir)


@pytest.fixture(scope="session")
def text(tiny: Any) -> PromptSet:
    return natural_text(tiny, "english", n=5, length=12, seed=2)
