"""Models of every family, loaded once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from p0circuit.models import load_model
from p0circuit.models.hooked_transformer import has_hooked_transformer


@pytest.fixture(scope="session")
def family_model(family_folder: Callable[[str], Any]) -> Callable[..., Any]:
    """A family's model on a backend; the same object each time, so tests must leave it as they found it."""
    loaded: dict[tuple[Any, ...], Any] = {}

    def load(name: str, backend: str = "auto", dtype: torch.dtype = torch.float32) -> Any:
        if backend == "hooked" and not has_hooked_transformer():
            pytest.skip("this TransformerLens has no HookedTransformer")
        key = (name, backend, dtype)
        if key not in loaded:
            loaded[key] = load_model(family_folder(name), backend, dtype=dtype)
        return loaded[key]

    return load
