"""The later half of the course; files, unlike the tests in them, run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.notebooks.test_execution import LATER, check_key_figures


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
def test_key_figures_are_those_of_the_experiments(name: str, tmp_path: Path) -> None:
    check_key_figures(name, tmp_path)
