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
from p0circuit.training.card import card, command_of, variant_of
from p0circuit.training.config import TrainConfig, read_config
from p0circuit.training.runs import shipped_runs
from p0circuit.training.variants import ABOUT, VARIANTS

# The card of p0-nano, which is no variant, is written by hand.
SHIPPED = {model.name: model.parameters for model in list_models() if model.name != "p0-nano"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_card_is_the_one_of_its_run(name: str) -> None:
    folder = data_dir() / "models" / name
    config = read_config(folder / "train_config.json")
    runs = [run for run in shipped_runs() if run.name == name]
    text = card(name, config, SHIPPED[name], runs)
    assert runs and (folder / "README.md").read_text(encoding="utf-8") == text
    assert ("Load it with `p0circuit` only" in text) == bool(config.architecture_edits)


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
    command = shlex.split(command_of(config))
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert given == [config] and f"`{command_of(config)}`" in card("mine", config, 1_000_000)


@pytest.mark.parametrize(
    ("variant", "command"),
    [
        ("first", "train OUT --variant baseline --set bos_share=0.5 --set random_first=true"),
        ("first-tnlm", "train OUT --variant tnlm-plain --set bos_share=0.5 --set random_first=true"),
        ("first-force", "train OUT --variant baseline --set force_sink=8 --set bos_share=0.5 --set random_first=true"),
        ("first-moe", "train OUT --variant moe --set bos_share=0.5 --set random_first=true"),
    ],
)
def test_variants_with_first_tokens_are_other_variants_with_two_settings(
    variant: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that were trained with the longer command are runs of the variant."""
    given: list[TrainConfig] = []
    monkeypatch.setattr("p0circuit.training.trainer.train", lambda config, out, **_: given.append(config))
    for arguments in (command, f"train OUT --variant {variant}"):
        assert CliRunner().invoke(app, shlex.split(arguments)).exit_code == 0
    assert given == [VARIANTS[variant]] * 2
    assert variant_of(given[0]) == variant_of(replace(given[0], seed=5)) == variant


def test_every_variant_has_a_name_of_its_own_and_a_sentence() -> None:
    assert set(ABOUT) == set(VARIANTS) and len(set(VARIANTS.values())) == len(VARIANTS)
