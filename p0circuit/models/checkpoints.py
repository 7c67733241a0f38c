"""The names of training checkpoints: the step, the stage of training, and the number of tokens that they state.

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
"""The names that contain a step."""
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Label(NamedTuple):
    """What the name of a checkpoint states.

    Attributes:
        step: of the training.
        stage: of the training; 0 where the name states none.
        tokens: the rounded number of tokens that the model was trained on; None where the name states none.
    """

    step: int
    stage: int = 0
    tokens: int | None = None


def parse_label(label: int | str) -> Label | None:
    """Parse the name of a checkpoint; a number is a step.

    Args:
        label: such as "step1000-tokens4B" or 1000.

    Returns:
        The parts of the name; None for a name without a step.

    Example:
        ```python
        assert parse_label("stage1-step1000-tokens5B") == (1000, 1, 5 * 10**9)
        ```
    """
    if str(label).isdecimal():
        return Label(int(label))
    if (match := STEP.fullmatch(str(label))) is None:
        return None
    tokens = int(match["tokens"]) * _UNITS[match["unit"]] if match["tokens"] else None
    return Label(int(match["step"]), int(match["stage"] or 0), tokens)


def labels_by_step(labels: Iterable[str]) -> dict[int, str]:
    """Select the names of checkpoints, and sort them by step.

    Every stage of a training counts its steps anew, so only the checkpoints of the first stage are returned; those of
    later stages can be loaded by their names. Of two names with one step the first in alphabetical order is returned.

    Args:
        labels: names, which need not all be those of checkpoints.

    Returns:
        The name by step, in order of steps.
    """
    parsed = [(label, name) for name in sorted(labels) if STEP.fullmatch(name) and (label := parse_label(name))]
    first = min((label.stage for label, _ in parsed), default=0)
    by_step = {label.step: name for label, name in reversed(parsed) if label.stage == first}
    return dict(sorted(by_step.items()))
