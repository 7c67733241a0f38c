"""A claim: one statement with a threshold fixed before measuring, and the one place where verdicts are made.

A threshold is a list of criteria, each comparing a measured value, or an end of its 95 % interval, with a number. All
that apply to the model must hold. A claim that misses its threshold is `not reproduced`: that is a finding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from p0circuit.results import Judgement
from p0circuit.stats import Interval

Op = Literal[">", ">=", "<", "<="]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_ENDS = {"value": "", "low": ", lower end of the interval,", "high": ", upper end of the interval,"}


@dataclass(frozen=True)
class Criterion:
    """`metric` must compare with `threshold` as `op` says, taken at its value or at an end of its interval.

    `if_measured`: the criterion is about some kinds of models only, and does not count where its metric is absent.
    """

    metric: str
    op: Op
    threshold: float
    at: Literal["value", "low", "high"] = "value"
    if_measured: bool = False

    def compared(self, measured: Mapping[str, Interval]) -> float:
        """What is compared with the threshold."""
        return getattr(measured[self.metric], self.at)

    def holds(self, measured: Mapping[str, Interval]) -> bool:
        """Return whether the measured values meet the criterion."""
        return _COMPARE[self.op](self.compared(measured), self.threshold)

    def __str__(self) -> str:
        return f"{self.metric}{_ENDS[self.at]} {self.op} {self.threshold:g}"


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, or of ours, as it can be tested.

    Attributes:
        id: C1, C2, …
        source: paper and section.
        statement: what is claimed: the hypothesis.
        measure: what is measured, in a sentence or two.
        criteria: the threshold for `reproduced`; they are not moved after measuring.
        control: what must not show the effect.
    """

    id: str
    title: str
    source: str
    statement: str
    measure: str
    criteria: tuple[Criterion, ...]
    control: str

    @property
    def threshold(self) -> str:
        """The criteria in words."""
        texts = (str(one) + (" (where it applies)" if one.if_measured else "") for one in self.criteria)
        return "; ".join(texts)

    def judge(self, measured: Mapping[str, Interval]) -> Judgement:
        """The verdict on measured values; there is none on a value that is not a finite number.

        Raises:
            KeyError: a metric is missing that some criterion cannot do without.
        """
        applying = [one for one in self.criteria if one.metric in measured or not one.if_measured]
        if not applying:
            return Judgement("not applicable", "nothing that its threshold is about exists in this model")
        if no_number := [criterion for criterion in applying if not math.isfinite(criterion.compared(measured))]:
            values = "; ".join(f"{name} is {measured[name]}" for name in dict.fromkeys(c.metric for c in no_number))
            return Judgement("not applicable", f"{values}: not a number that a threshold can be held against")
        missed = [criterion for criterion in applying if not criterion.holds(measured)]
        # Two criteria may be about one value and its interval.
        names = dict.fromkeys(criterion.metric for criterion in missed or applying)
        values = "; ".join(f"{name} is {measured[name]}" for name in names)
        if missed:
            return Judgement("not reproduced", f"{values}; needed {' and '.join(map(str, missed))}")
        return Judgement("reproduced", values)

    def to_json(self) -> dict[str, str]:
        """Return the texts of the claim, which stand in its entry of claims.json."""
        return {
            "id": self.id,
            "title": self.title,
            "source": self.source,
            "statement": self.statement,
            "measure": self.measure,
            "threshold": self.threshold,
            "control": self.control,
        }
