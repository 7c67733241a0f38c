"""What the claims about blocks 0 and 1 come to with the blocks that the locator finds.

The claims C4 to C9 keep their statements and verdicts. Beside each stands what is measured with blocks 0 to K - 1; K is
the circuit depth of the model (C21). If K is 2, those are the same blocks, and nothing is measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from p0circuit.experiments.base import Experiment, block_names
from p0circuit.results import Result
from p0circuit.stats import Interval


def located_blocks(depth: Result) -> tuple[int, ...]:
    """Return blocks 0 to K - 1 of a model; empty if K is 0.

    Args:
        depth: the result of the experiment `depth`.
    """
    return tuple(range(round(depth.metrics["circuit_depth"].value)))


def depends_on_blocks(experiment: Experiment[Any]) -> bool:
    """Return whether an experiment's configuration says in which blocks the circuit is."""
    return hasattr(experiment.config, "blocks")


def with_blocks(experiment: Experiment[Any], blocks: Sequence[int]) -> Experiment[Any]:
    """Return an experiment with other blocks in its configuration.

    Args:
        experiment: one whose configuration has the field `blocks`.
        blocks: the blocks that the circuit is in.
    """
    return type(experiment)(replace(experiment.config, blocks=tuple(blocks)))


def located_row(experiment: Experiment[Any], blocks: Sequence[int], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of claims.json that stands beside a verdict.

    Args:
        experiment: the experiment, configured for these blocks.
        blocks: blocks 0 to K - 1; nothing is shown if there are none.
        entry: its entry of claims.json, measured with these blocks.

    Returns:
        The blocks, the deciding metrics that were measured, and why nothing was measured.
    """
    names = experiment.deciding_metrics if blocks else ()
    measured = {name: entry["measured"][name] for name in names if name in entry["measured"]}
    return {"blocks": list(blocks), "measured": measured, "why": entry["why"] if blocks and not measured else ""}


def located_note(row: Mapping[str, Any]) -> str:
    """Say in a sentence what a row of `located_row` holds.

    Args:
        row: the row.
    """
    blocks = row["blocks"]
    if not blocks:
        return "circuit depth K = 0: the sink needs recognition in no block, so there is nothing to measure with K"
    start = f"with {block_names(blocks)}, where C21 finds the circuit"
    if row["why"]:
        return f"{start}: not applicable, {row['why']}"
    values = (f"{name.replace('_', ' ')} {Interval(**value)}" for name, value in row["measured"].items())
    return f"{start}: {', '.join(values)}"
