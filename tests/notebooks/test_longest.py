"""The notebook that runs everything; files, unlike the tests in them, run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.notebooks.test_execution import LONGEST, check_key_figures


@pytest.mark.slow
def test_its_key_figures_are_those_of_the_experiments(tmp_path: Path) -> None:
    check_key_figures(LONGEST, tmp_path)
