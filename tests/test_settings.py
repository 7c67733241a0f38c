"""Fields of a configuration from the command line: types, near misses, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from p0circuit.cli.settings import with_settings
from p0circuit.errors import P0Error
from p0circuit.training.config import TrainConfig


@dataclass(frozen=True)
class Config:
    """A field of every type that configurations have."""

    count: int = 3
    share: float = 0.5
    label: str = "a"
    cut: bool = False
    window: int | None = None
    shifts: tuple[int, ...] = (4, 8)
    betas: tuple[float, float] = (0.9, 0.95)
    end: Literal["low", "high"] = "low"


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("count=7", "count", 7),
        ("share=1", "share", 1.0),
        ("share=1e-3", "share", 1e-3),
        ("label=5", "label", "5"),
        ("label=my/texts", "label", "my/texts"),
        ("cut=true", "cut", True),
        ("window=16", "window", 16),
        ("window=null", "window", None),
        ("shifts=[1, 2, 3]", "shifts", (1, 2, 3)),
        ("betas=[0, 0.5]", "betas", (0.0, 0.5)),
        ("end=high", "end", "high"),
    ],
)
def test_a_setting_replaces_a_field(setting: str, field: str, value: object) -> None:
    config = with_settings(Config(), [setting])
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)
    assert [name for name in vars(config) if getattr(config, name) != getattr(Config(), name)] in ([field], [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("count", "'count' is not of the form field=value, as in count=3"),
        ("cuont=4", "there is no field 'cuont'; did you mean 'count'? The fields are count=3, share=0.5"),
        ("zzz=4", "there is no field 'zzz'; the fields are count=3"),
        ("count=0.5", "count cannot be '0.5'; expected a whole number, such as 3"),
        ("count=true", "count cannot be 'true'; expected a whole number, such as 3"),
        ("share=wide", "share cannot be 'wide'; expected a number, such as 0.5"),
        ("cut=1", "cut cannot be '1'; expected true or false, such as false"),
        ("window=x", "window cannot be 'x'; expected a whole number or null, such as null"),
        ("shifts=3", "shifts cannot be '3'; expected a list of whole numbers, such as [4, 8]"),
        ("betas=[1]", "betas cannot be '[1]'; expected a list of numbers, such as [0.9, 0.95]"),
        ("end=middle", 'end cannot be \'middle\'; expected one of "low", "high", such as "low"'),
    ],
)
def test_a_wrong_setting_is_refused(setting: str, message: str) -> None:
    with pytest.raises(P0Error) as refused:
        with_settings(Config(), [setting])
    assert message in str(refused.value)


def test_fields_of_a_training_run() -> None:
    config = with_settings(TrainConfig(), ["steps=50", "learning_rate=1e-3", "random_first=false", "corpus=my/texts"])
    assert (config.steps, config.learning_rate, config.random_first, config.corpus) == (50, 1e-3, False, "my/texts")
    assert with_settings(config, []) is config
