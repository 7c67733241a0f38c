"""Published values of the metrics, and whether ours agree with them.

1. `data/published/*.csv` holds the published values: model, metric, value, source and definition, each in its own unit.
2. A value belongs to a model if the names agree, with or without the organisation: `gpt2-xl` is
   `openai-community/gpt2-xl`.
3. Our value of the metric is compared if prompt length and threshold are the same. It agrees if it is within the
   tolerance.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from p0circuit.errors import P0Error
from p0circuit.io import data_dir
from p0circuit.results import Result
from p0circuit.stats import Interval

# Fixed before any hub model was measured. The published rates come from other texts and other numbers of samples. Gu et
# al.'s rates of Llama chat models and their base models differ by less than 1 percentage point. A tolerance of 5 allows
# for another text and tokenisation, and still distinguishes 97 % from 88 %.
TOLERANCE = 0.05
"""Largest difference from a published share that counts as agreement (0.05: 5 percentage points)."""


@dataclass(frozen=True)
class PublishedFigure:
    """One published value.

    Attributes:
        model: hub id, or the source's own name of a model that is not on the hub.
        metric: our name of the quantity.
        value: the value as printed, in `unit`.
        unit: "%" for a percentage; otherwise the unit of our metric.
        length: tokens per prompt.
        eps: threshold of the sink rate.
        source: the paper.
        table: where in the paper; empty if it is not known.
        definition: the quantity in a few words.
    """

    model: str
    metric: str
    value: float
    unit: str
    length: int
    eps: float
    source: str
    table: str
    definition: str

    @property
    def share(self) -> float:
        """The value in the unit of our metrics: a percentage as a share."""
        return self.value / 100 if self.unit == "%" else self.value

    def __str__(self) -> str:
        """Return the value with its unit."""
        return f"{self.value:g} {self.unit}".strip()


@dataclass(frozen=True)
class Comparison:
    """A published value and ours.

    Attributes:
        published: the published value.
        measured: ours; None if there is none.
        within: whether ours is within the tolerance; None if the two cannot be compared.
        reason: the difference, or why the two cannot be compared.
    """

    published: PublishedFigure
    measured: Interval | None
    within: bool | None
    reason: str

    def __str__(self) -> str:
        """Return both values and the reason in one line."""
        ours = f"ours is {self.measured}" if self.measured else "ours is not known"
        return f"{self.published.metric}: {ours}, published {self.published} ({self.published.source}): {self.reason}"


def read_published(directory: Path | None = None) -> list[PublishedFigure]:
    """Read all published values.

    Args:
        directory: directory of the CSV files; None for the shipped ones.

    Raises:
        P0Error: a row lacks a value or a length, or has one that is not a number.
    """
    figures = []
    for path in sorted((directory or data_dir() / "published").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    numbers = {"value": float(row["value"]), "length": int(row["length"]), "eps": float(row["eps"])}
                    figures.append(PublishedFigure(**{**row, **numbers}))
                except (KeyError, TypeError, ValueError) as error:
                    expected = ", ".join(PublishedFigure.__dataclass_fields__)
                    raise P0Error(f"{path.name}: cannot read {row}: {error}; its columns are {expected}") from None
    return figures


def published_for(model: str, figures: Iterable[PublishedFigure] | None = None) -> list[PublishedFigure]:
    """Select the published values of a model.

    Args:
        model: hub id or its last part, in upper or lower case.
        figures: the published values; None for the shipped ones.
    """
    wanted = model.lower()
    return [
        figure
        for figure in (read_published() if figures is None else figures)
        if wanted == figure.model.lower() or wanted.split("/")[-1] == figure.model.lower().split("/")[-1]
    ]


def values_of(metric: str, figures: Iterable[PublishedFigure] | None = None) -> dict[str, Interval]:
    """Return the published values of a metric by model, in the unit of our metrics, as intervals without width.

    Args:
        metric: our name of the quantity.
        figures: the published values; None for the shipped ones.
    """
    return {
        figure.model.split("/")[-1]: Interval(figure.share, figure.share, figure.share, 0)
        for figure in (read_published() if figures is None else figures)
        if figure.metric == metric
    }


def compare(measured: Interval, published: PublishedFigure, tolerance: float = TOLERANCE) -> Comparison:
    """Compare our value with a published one.

    Args:
        measured: ours.
        published: the published value.
        tolerance: largest difference that counts as agreement, in the unit of our metric.
    """
    difference = measured.value - published.share
    # A difference of 0.05 is within a tolerance of 0.05, whatever the rounding error.
    within = round(abs(difference), 9) <= tolerance
    side = "within" if within else "not within"
    return Comparison(published, measured, within, f"{difference:+.3f}, {side} the tolerance of {tolerance:g}")


def comparisons_for(
    model: str, results: Iterable[Result], figures: Iterable[PublishedFigure] | None = None
) -> list[Comparison]:
    """Compare every published value of a model with ours of the same metric, prompt length and threshold.

    Args:
        model: hub id or its last part.
        results: our results on the model.
        figures: the published values; None for the shipped ones.
    """
    measured = {metric: (interval, result) for result in results for metric, interval in result.metrics.items()}
    rows = []
    for figure in published_for(model, figures):
        interval, result = measured.get(figure.metric, (None, None))
        if interval is None or result is None:
            rows.append(Comparison(figure, None, None, "not measured here"))
            continue
        length = result.provenance.get("length", figure.length)
        eps = result.provenance.get("config", {}).get("eps", figure.eps)
        if (length, eps) != (figure.length, figure.eps):
            ours, theirs = f"length {length} and eps {eps:g}", f"length {figure.length} and eps {figure.eps:g}"
            rows.append(Comparison(figure, interval, None, f"not compared: ours is at {ours}, theirs at {theirs}"))
        else:
            rows.append(compare(interval, figure))
    return rows
