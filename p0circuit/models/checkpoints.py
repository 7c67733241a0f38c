"""The names of training checkpoints, and what they say: the step, the stage of training, the tokens seen by then.

`checkpoint-500` is the Trainer's, `step-000123` this package's own, `step1000` Pythia's; OLMo has `step1000-tokens4B`
and, for models trained in stages, `stage1-step1000-tokens5B`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

STEP = re.compile(
    r"(?:stage(?P<stage>\d+)-(?:ingredient\d+-)?)?(?:step|checkpoint)-?(?P<step>\d+)"
    r"(?:-tokens(?P<tokens>\d+)(?P<unit>[KMBT]))?"
)
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Label(NamedTuple):
    """What a name says of its checkpoint: `stage` is 0 and `tokens` None where it says nothing; tokens are rounded."""

    step: int
    stage: int = 0
    tokens: int | None = None


def parse_label(label: int | str) -> Label | None:
    """What the name of a checkpoint says; a bare number is a step. None for a name without one."""
    if str(label).isdecimal():
        return Label(int(label))
    if (match := STEP.fullmatch(str(label))) is None:
        return None
    tokens = int(match["tokens"]) * _UNITS[match["unit"]] if match["tokens"] else None
    return Label(int(match["step"]), int(match["stage"] or 0), tokens)


def by_step(labels: Iterable[str]) -> dict[int, str]:
    """The name of the checkpoint at each step, in order of steps; what is no checkpoint's name is left out.

    Every stage of a training counts its steps anew: those of the first stage are found by their number, and those of
    later ones by their whole name alone. Of two names for one step the first in order counts.
    """
    named = [(told, label) for label in sorted(labels) if STEP.fullmatch(label) and (told := parse_label(label))]
    first = min((told.stage for told, _ in named), default=0)
    found = {told.step: label for told, label in reversed(named) if told.stage == first}
    return dict(sorted(found.items()))
