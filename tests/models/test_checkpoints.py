"""The names of checkpoints, as the Trainer, this package, Pythia and OLMo write them."""

from __future__ import annotations

import pytest

from p0circuit.models.checkpoints import Label, labels_by_step, parse_label


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (7, Label(7)),
        ("0", Label(0)),
        ("checkpoint-500", Label(500)),
        ("step-000000", Label(0)),
        ("step-004339", Label(4339)),
        ("step1000", Label(1000)),
        ("step1000-tokens4B", Label(1000, tokens=4 * 10**9)),
        ("stage1-step150-tokens1B", Label(150, 1, 10**9)),
        ("stage2-ingredient3-step2000-tokens9B", Label(2000, 2, 9 * 10**9)),
        ("stage1-step1413814", Label(1413814, 1)),
        ("step5-tokens2T", Label(5, tokens=2 * 10**12)),
        ("main", None),
        ("step", None),
        ("-5", None),
        ("step5-unsharded", None),
        ("my-step5", None),
    ],
)
def test_what_a_name_says(name: str | int, told: Label | None) -> None:
    assert parse_label(name) == told


def test_steps_are_those_of_the_first_stage() -> None:
    assert labels_by_step(["main", "step1000", "step0", "step512"]) == {0: "step0", 512: "step512", 1000: "step1000"}
    stages = ["stage2-ingredient1-step1000-tokens3B", "stage1-step1000-tokens5B", "stage2-ingredient1-step7-tokens1B"]
    assert labels_by_step(stages) == {1000: "stage1-step1000-tokens5B"}
    assert labels_by_step(["step-000005", "checkpoint-5"]) == {5: "checkpoint-5"}
    # A branch of digits alone may be anything.
    assert labels_by_step(["main", "2024"]) == {}
