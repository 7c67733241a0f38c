"""Every experiment draws its figures from a saved result as it draws them after a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from p0circuit.experiments import EXPERIMENTS
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import prompts_for
from p0circuit.models import load_model
from p0circuit.recording.memory import remember_rows
from p0circuit.results import Result

KEPT_ASIDE = {"any-token", "amplification"}
"""Their figures have numbers that no table holds."""
TAKES_LONG = {"experts", "dormant-heads", "limits", "remedies", "first-token"}


def numbers(figure: Any) -> list[np.ndarray]:
    """The coordinates of all lines, bars and images of a figure."""
    return [
        np.ma.asarray(values, dtype=float)
        for axis in figure.axes
        for values in (
            *(line.get_xydata() for line in axis.lines),
            *(patch.get_xy() for patch in axis.patches),
            *(image.get_array() for image in axis.images),
        )
    ]


def words(figure: Any) -> list[str]:
    """The titles, axis labels, legends and annotations of a figure, without its tick labels."""
    texts = [figure.get_suptitle()]
    for axis in figure.axes:
        legend = axis.get_legend()
        texts += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(text.get_text() for text in axis.texts)]
        texts += [text.get_text() for text in legend.get_texts()] if legend is not None else []
    return texts


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow if name in TAKES_LONG else ())
        for name in EXPERIMENTS
        if name not in KEPT_ASIDE
    ],
)
def test_a_saved_result_is_drawn_again(experiment: str, tmp_path: Any) -> None:
    model = load_model("moe-0" if experiment == "experts" else "p0-nano")
    prompts = prompts_for(model, None, 8, 64)
    try:
        with remember_rows():
            result = EXPERIMENTS[experiment]().run(model, prompts)
    except NotApplicable as reason:
        pytest.skip(f"{experiment}: {reason}")
    result.save(tmp_path)
    again = EXPERIMENTS[experiment]().draw(Result.load(tmp_path / f"{experiment}.json"))
    assert result.figures and set(again) == set(result.figures)
    for name, figure in again.items():
        for new, old in zip(numbers(figure), numbers(result.figures[name]), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)
        assert words(figure) == words(result.figures[name])
