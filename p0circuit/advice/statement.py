"""Statements: a question, its answer in words, a verdict, what to do, and the measured values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from p0circuit.experiments.sink_under_study import Heads
from p0circuit.stats import Interval

YES, NO, NONE, UNKNOWN, NOTHING = "yes", "no", "none", "cannot tell", "not applicable"
HIGH, LOW = "high", "low"

# The questions, in the order in which they are answered.
SINK_PRESENT, BOS_NEEDED, FIRST_LAYER = "Is there a P0 sink?", "Does it depend on BOS?", "From which layer on?"
TOKENS_DROPPED = "What breaks if the first tokens are dropped?"
TOKENS_TO_KEEP = "How many first tokens to keep in a window?"
INT8, DORMANT = "Is int8 for activations a risk?", "Which heads are dormant?"

NO_SINK = "There is no sink, and nothing to do because of one."
SINK_UNDECIDED = "Whether there is a sink cannot be decided."

LOSS_SHARE = 0.01
"""Share of the loss from which an increase counts, when first tokens are dropped and in int8."""
MAX_NAMES = 8
"""Of more heads than this the first ones are named and the others counted."""

# Names of the measured values that the figure shows: their beginning and their end.
LOSS_ADDED_WITH, AS_SHARE = "loss added with ", ", as a share"


@dataclass(frozen=True)
class Statement:
    """The answer to one question.

    Attributes:
        topic: the question.
        text: the answer with its values, or why there is none.
        verdict: the answer in a few words: yes, no, a number, high, low, nothing, names, "cannot tell".
        advice: what to do about it.
        measured: the values behind it.
    """

    topic: str
    text: str
    verdict: str
    advice: str
    measured: Mapping[str, Interval] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        return vars(self) | {"measured": {name: interval.to_json() for name, interval in self.measured.items()}}


def is_above(measured: Interval, limit: float) -> str:
    """Return whether a value is above a limit: yes, no, or "cannot tell" if its interval is on both sides.

    Args:
        measured: the value with its interval.
        limit: the limit.
    """
    return YES if measured.low > limit else NO if measured.high <= limit else UNKNOWN


def percent(share: Interval) -> str:
    """Return a share with its interval in per cent.

    Args:
        share: the share, 1 for 100 %.
    """
    # A zero has no sign.
    value, low, high = (f"{end:.1%}".replace("-0.0%", "0.0%") for end in (share.value, share.low, share.high))
    return f"{value} [{low}, {high}]"


def head_names(heads: Heads) -> str:
    """Return the names of all heads.

    Args:
        heads: layer and number of each head.
    """
    return ", ".join(f"attn.{layer}.{head}" for layer, head in heads)


def head_names_or_count(heads: Heads) -> str:
    """Return the names of heads; of many heads their number and the first names.

    Args:
        heads: layer and number of each head.
    """
    if len(heads) <= MAX_NAMES:
        return head_names(heads)
    return f"{len(heads)} heads ({head_names(heads[:MAX_NAMES])} and others)"
