"""The figure of the costs: what adds to the loss, question by question, against the limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from p0circuit.advice.answers import Advice
from p0circuit.advice.statement import AS_SHARE, LOSS_ADDED_WITH, LOSS_SHARE, Statement
from p0circuit.experiments.deployment.int8_effects import P0_IN, P0_KEPT, PER_TOKEN
from p0circuit.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {
    f"int8, {P0_IN}": "int8, one scale per prompt",
    f"int8, {P0_KEPT}": "the same, P0 in high precision",
    f"int8, {PER_TOKEN}": "int8, one scale per token",
}
"""Labels of the measured values whose names in advice.json are not plain."""


def draw_costs(advice: Advice) -> Figure | None:
    """Draw what adds to the loss, one panel per question, with the limit as a dashed line.

    Args:
        advice: the answers.

    Returns:
        The figure; None if no loss could be measured.
    """
    from p0circuit.figures.intervals import intervals

    panels = {statement.topic: costs for statement in advice.statements if (costs := _costs(statement))}
    if not panels:
        return None
    counts = sorted({interval.n for costs in panels.values() for interval in costs.values()})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    title = f"{advice.title}: loss added (95 % intervals, {n}; dashed: the limit, {LOSS_SHARE:.0%})"
    return intervals(panels, title, ["% of the loss"] * len(panels), reference=100 * LOSS_SHARE)


def _costs(statement: Statement) -> dict[str, Interval]:
    """The measured shares of the loss, in per cent, by label."""
    costs = {}
    for name, share in statement.measured.items():
        if name.startswith(LOSS_ADDED_WITH) and name.endswith(AS_SHARE):
            label = name.removeprefix(LOSS_ADDED_WITH).removesuffix(AS_SHARE)
            costs[_LABELS.get(label, label)] = Interval(100 * share.value, 100 * share.low, 100 * share.high, share.n)
    return costs
