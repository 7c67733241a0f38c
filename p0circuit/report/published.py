"""Figures that papers published, and whether ours lie close to them. They are shown beside ours, never mixed.

1. `data/published/*.csv` holds what was published: model, metric, value, its source and definition, in its own unit.
2. A figure is about a model when the names agree, with or without the organisation: `gpt2-xl` is
   `openai-community/gpt2-xl`.
3. Our value of the same metric is compared where prompt length and threshold are the same, and lies within the
   tolerance or not.
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

# Fixed before any hub model was measured. The published rates come from other texts and other numbers of samples; on
# chat models and their bases, which differ by more than a choice of text, Gu et al.'s Llama rates differ by under 1
# percentage point. 5 leave room for another text and another tokenisation, and still tell 97 % from 88 %.
TOLERANCE = 0.05
"""How far a share may lie from the published one, as a share (0.05: 5 percentage points)."""


@dataclass(frozen=True)
class PublishedFigure:
    """One value as it was published.

    Attributes:
        model: hub id, or the source's own name for a model that is not on the hub.
        metric: our name for the quantity.
        value: in `unit`, as printed.
        length: tokens per prompt.
        eps: threshold of the sink rate.
        table: where in the source; empty where it is not known.
        definition: what the value is, in a few words.
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
        return f"{self.value:g} {self.unit}".strip()


@dataclass(frozen=True)
class Comparison:
    """A published figure beside ours.

    Attributes:
        measured: ours; None where there is none.
        within: whether ours lies within the tolerance; None where the two cannot be compared.
        why: the difference, or why there is none.
    """

    published: PublishedFigure
    measured: Interval | None
    within: bool | None
    why: str

    def __str__(self) -> str:
        ours = f"ours is {self.measured}" if self.measured else "ours is not known"
        return f"{self.published.metric}: {ours}, published {self.published} ({self.published.source}): {self.why}"


def read_published(directory: Path | None = None) -> list[PublishedFigure]:
    """All published figures; `directory` holds the CSV files, the shipped ones if it is not given.

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
    """What was published about a model, given its hub id or the last part of it, in any case of letters."""
    wanted = model.lower()
    return [
        figure
        for figure in (read_published() if figures is None else figures)
        if wanted == figure.model.lower() or wanted.split("/")[-1] == figure.model.lower().split("/")[-1]
    ]


def values_of(metric: str, figures: Iterable[PublishedFigure] | None = None) -> dict[str, Interval]:
    """What was published under the name of a metric, by model and in the unit of ours; as intervals without width."""
    return {
        figure.model.split("/")[-1]: Interval(figure.share, figure.share, figure.share, 0)
        for figure in (read_published() if figures is None else figures)
        if figure.metric == metric
    }


def compare(measured: Interval, published: PublishedFigure, tolerance: float = TOLERANCE) -> Comparison:
    """Whether our value lies within `tolerance` (in the unit of our metric) of the published one."""
    difference = measured.value - published.share
    # What is printed as 0.05 away counts as 0.05 away.
    within = round(abs(difference), 9) <= tolerance
    side = "within" if within else "not within"
    return Comparison(published, measured, within, f"{difference:+.3f}, {side} the tolerance of {tolerance:g}")


def beside_ours(
    model: str, results: Iterable[Result], figures: Iterable[PublishedFigure] | None = None
) -> list[Comparison]:
    """Every published figure about a model beside ours of the same metric, prompt length and threshold."""
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
