"""Cards of trained models: those that are shipped say what their configuration and their trace say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p0circuit.models import list_models
from p0circuit.paths import data_dir
from p0circuit.training.card import card
from p0circuit.training.runs import shipped_runs
from p0circuit.training.trainer import read_config
from p0circuit.training.variants import VARIANTS

# The card of p0-nano, which is no variant, is written by hand.
SHIPPED = {model.name: model.parameters for model in list_models() if model.name != "p0-nano"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_card_is_the_one_of_its_run(name: str) -> None:
    folder = data_dir() / "models" / name
    config = read_config(folder / "train_config.json")
    runs = [run for run in shipped_runs() if run.name == name]
    variant = name.rpartition("-")[0]
    text = card(name, variant, config, SHIPPED[name], runs)
    assert runs and (folder / "README.md").read_text(encoding="utf-8") == text
    assert ("runs right only through" in text) == bool(config.changes)


def test_a_run_with_other_settings_is_not_told_as_the_variant() -> None:
    with pytest.raises(ValueError, match="mine was not trained as variant 'bos' is"):
        card("mine", "bos", replace(VARIANTS["bos"], weight_decay=0.5), 1)
