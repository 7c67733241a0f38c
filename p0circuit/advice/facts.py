"""What advice is based on: the sink in each condition, the costs of a window, and the order of zeroed heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p0circuit.advice.statement import LOSS_SHARE, NO, YES, head_names_or_count, is_above
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.experiments.deployment.c17_streaming import (
    DROPPED,
    FIRST,
    SINKS,
    WINDOWS_PER_ROW,
    Costs,
    costs_of,
    decoded,
    first_prediction,
)
from p0circuit.experiments.deployment.c19_dormant_heads import (
    ENOUGH,
    SINK,
    TOLERANCE,
    Order,
    Zeroing,
    by_sink_score,
    zeroed,
)
from p0circuit.experiments.sink_under_study import ByHead, Heads, excess_by_head, mean_over_heads
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import ModelError
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import TOKEN_LOSSES, score_at
from p0circuit.recording.record import record
from p0circuit.sink import CONTROL, least_excess, sink_heads
from p0circuit.stats import Interval, bootstrap, ratio_interval

MIN_PROMPTS = 16
"""With fewer prompts no question is answered."""
ALL_FIRST = tuple(range(FIRST))
"""The first tokens that are kept at most."""
INT8_PROMPTS = 64
"""Maximum number of prompts that int8 is measured on."""
DORMANT_PROMPTS = 64
"""Maximum number of prompts in each half that dormant heads are measured on."""

CANNOT_MEASURE = (NotApplicable, InterventionError, ModelError)
"""Errors that say that something cannot be measured on this model or these prompts."""


@dataclass(frozen=True)
class ConditionSink:
    """The sink in one condition.

    Attributes:
        condition: "without BOS" or "with BOS", or what the condition is called.
        prompts: the prompts.
        heads: sink heads, selected on one half of the prompts.
        scores: excess scores [sample, layer, head] on the other half.
        verdict: whether the heads are sinks: yes, no, or "cannot tell".
    """

    condition: str
    prompts: PromptSet
    heads: Heads
    scores: ByHead
    verdict: str

    @property
    def excess(self) -> Interval:
        """Excess score, mean over the sink heads."""
        return bootstrap(mean_over_heads(self.scores, self.heads))

    @property
    def names(self) -> str:
        """Names of the sink heads."""
        return head_names_or_count(self.heads)


def sinks_by_condition(model: HookedModel, prompts: PromptSet) -> list[ConditionSink]:
    """Measure the sink in the text as it is and, if BOS can be prepended, after BOS.

    Args:
        model: the model.
        prompts: the text as it is.

    Returns:
        One entry per condition; none if there are too few prompts.
    """
    if prompts.n < MIN_PROMPTS or prompts.length <= CONTROL + 1:
        return []
    sinks = []
    for name, rows in with_and_without_bos(model, prompts).items():
        first, second = rows.split()
        heads = sink_heads(record(model, first, score_at(0)))
        scores = excess_by_head(model, second)[0]
        verdict = is_above(bootstrap(mean_over_heads(scores, heads)), least_excess(prompts.length))
        sinks.append(ConditionSink(name, rows, heads, scores, verdict))
    return sinks


def conditions_in_use(sinks: Sequence[ConditionSink], bos_loss: Interval | None) -> Sequence[ConditionSink]:
    """Return the conditions in which the model is used: not after a BOS that increases the loss beyond doubt.

    Args:
        sinks: the conditions, the text as it is first.
        bos_loss: what BOS adds to the loss; None if that cannot be measured.
    """
    return sinks[:1] if bos_loss and bos_loss.low > 0 else sinks


def sink_in_use(sinks: Sequence[ConditionSink], bos_loss: Interval | None) -> ConditionSink | None:
    """Return the first condition in use that has a sink; None if none has.

    Args:
        sinks: the conditions, the text as it is first.
        bos_loss: what BOS adds to the loss; None if that cannot be measured.
    """
    return next((sink for sink in conditions_in_use(sinks, bos_loss) if sink.verdict == YES), None)


def loss_added_by_bos(model: HookedModel, without: PromptSet, after: PromptSet) -> Interval:
    """Measure what BOS adds to the loss of the same predictions, in nats per token.

    Args:
        model: the model.
        without: the prompts as they are.
        after: the same prompts after BOS.
    """
    plain, with_bos = (record(model, rows, TOKEN_LOSSES).double().numpy() for rows in (without, after))
    # After BOS every token is one position later, and the last one is cut off.
    return bootstrap((with_bos[:, 1:] - plain[:, :-1]).mean(1))


@dataclass(frozen=True)
class WindowCosts:
    """What a sliding window costs, on predictions made when the first tokens are outside it.

    Attributes:
        window: tokens in the window.
        lost: loss added by keeping no first token to that with four kept, in nats per token.
        shares: the same as a share of the loss, by number of first tokens kept.
        dropped: loss added by dropping one of the first tokens.
        full_attention: what the window adds to the loss of full attention with four kept, as a share of it.
    """

    window: int
    lost: Interval
    shares: Mapping[int, Interval]
    dropped: Costs
    full_attention: Interval


def window_costs(model: HookedModel, prompts: PromptSet) -> WindowCosts:
    """Measure what a sliding window costs, with 0, 1, 2 and 4 first tokens kept.

    Args:
        model: the model.
        prompts: the prompts; the window is a quarter of their length.

    Raises:
        NotApplicable: this model or these prompts cannot be decoded with a window.
    """
    window = prompts.length // WINDOWS_PER_ROW
    start = first_prediction(window)
    losses = decoded(model, prompts, window, [None, *SINKS, *DROPPED])
    late = {positions: losses[positions][:, start:].mean(1) for positions in (None, *SINKS)}
    return WindowCosts(
        window,
        lost=bootstrap(late[()] - late[ALL_FIRST]),
        shares={
            len(positions): ratio_interval(late[positions] - late[ALL_FIRST], late[ALL_FIRST])
            for positions in SINKS
            if positions not in (None, ALL_FIRST)
        },
        dropped=costs_of(losses, window),
        full_attention=ratio_interval(late[ALL_FIRST] - late[None], late[None]),
    )


def tokens_to_keep(added: Mapping[int, Interval]) -> int | None:
    """Return the smallest number of first tokens that is enough.

    A number is enough if its whole interval is within 1 %. Four are the answer only if every smaller number is too
    small beyond doubt.

    Args:
        added: by number, the loss beyond that with four kept, as a share of it.

    Returns:
        The number; None if it cannot be decided.
    """
    verdicts = {count: is_above(share, LOSS_SHARE) for count, share in added.items()}
    enough = [count for count, verdict in verdicts.items() if verdict == NO]
    if enough:
        return min(enough)
    return FIRST if all(verdict == YES for verdict in verdicts.values()) else None


def zero_in_order(model: HookedModel, prompts: PromptSet) -> tuple[Order, Zeroing]:
    """Zero heads in order of their sink score, highest first, until the loss has grown well beyond the tolerance.

    Args:
        model: the model.
        prompts: the order is made on one half of them, and the losses are measured on the other.

    Returns:
        The order of the heads, and the losses.

    Raises:
        NotApplicable: the losses cannot be measured on this model.
    """
    order = by_sink_score(model, prompts.split()[0].subset(slice(0, DORMANT_PROMPTS)))
    rows = other_half(prompts, DORMANT_PROMPTS)
    return order, zeroed(model, rows, {SINK: order}, until=ENOUGH * TOLERANCE)[SINK]


def other_half(prompts: PromptSet, most: int) -> PromptSet:
    """Return prompts that sink heads were not selected on.

    Args:
        prompts: all prompts.
        most: maximum number of prompts.
    """
    return prompts.split()[1].subset(slice(0, most)) if prompts.n > 1 else prompts
