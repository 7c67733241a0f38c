"""Cards of trained models: those that are shipped say what their configuration and their trace say."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p0circuit.cli import app
from p0circuit.io import data_dir
from p0circuit.models import list_models
from p0circuit.training.card import card, command_of
from p0circuit.training.runs import shipped_runs
from p0circuit.training.trainer import read_config
from p0circuit.training.variants import VARIANTS, TrainConfig

# The card of p0-nano, which is no variant, is written by hand.
SHIPPED = {model.name: model.parameters for model in list_models() if model.name != "p0-nano"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_card_is_the_one_of_its_run(name: str) -> None:
    folder = data_dir() / "models" / name
    config = read_config(folder / "train_config.json")
    runs = [run for run in shipped_runs() if run.name == name]
    text = card(name, config, SHIPPED[name], runs)
    assert runs and (folder / "README.md").read_text(encoding="utf-8") == text
    assert ("runs right only through" in text) == bool(config.architecture_edits)


@pytest.mark.parametrize(
    "config",
    [
        *VARIANTS.values(),
        replace(VARIANTS["bos"], seed=2),
        replace(VARIANTS["bos"], weight_decay=0.5, corpus="my texts"),
        replace(TrainConfig(), betas=(0.9, 0.99), random_first=False),
    ],
)
def test_the_command_of_a_card_makes_its_configuration(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def train(config: TrainConfig, out: Path, **_: object) -> None:
        given.append(config)

    monkeypatch.setattr("p0circuit.training.trainer.train", train)
    told = shlex.split(command_of(config))
    assert CliRunner().invoke(app, told[1:]).exit_code == 0
    assert given == [config] and f"`{command_of(config)}`" in card("mine", config, 1_000_000)
