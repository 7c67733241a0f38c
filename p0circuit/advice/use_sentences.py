"""The sentences about use: dropped first tokens, int8, and dormant heads."""

from __future__ import annotations

from collections.abc import Mapping

from p0circuit.advice.facts import (
    CANNOT_MEASURE,
    INT8_PROMPTS,
    MIN_PROMPTS,
    WindowCosts,
    other_half,
    tokens_to_keep,
    window_costs,
    zero_in_order,
)
from p0circuit.advice.statement import (
    AS_SHARE,
    DORMANT,
    HIGH,
    INT8,
    LOSS_ADDED_WITH,
    LOSS_SHARE,
    LOW,
    MAX_NAMES,
    NO,
    NO_SINK,
    NONE,
    SINK_UNDECIDED,
    TOKENS_DROPPED,
    TOKENS_TO_KEEP,
    UNKNOWN,
    YES,
    Statement,
    head_names,
    is_above,
    percent,
)
from p0circuit.experiments.deployment.c17_streaming import FIRST, WINDOWS_PER_ROW, first_prediction
from p0circuit.experiments.deployment.c19_dormant_heads import TOLERANCE
from p0circuit.experiments.deployment.int8_effects import P0_IN, P0_KEPT, PER_TOKEN, SCHEMES, Int8Effects, int8_effects
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.prompts import PromptSet
from p0circuit.stats import Interval, bootstrap

ERROR_LEFT = 0.5
"""Where no loss can be measured, int8 is a risk if keeping P0 in high precision leaves less of the error than this."""


def streaming_statements(
    model: HookedModel, prompts: PromptSet, sink: str, is_text: bool
) -> tuple[Statement, Interval | None, Statement, int | None]:
    """Measure and say what dropping the first tokens costs, and how many to keep.

    Args:
        model: the model.
        prompts: the prompts in the condition with the sink.
        sink: whether there is one, as a verdict.
        is_text: whether the prompts are text, whose losses can be interpreted.

    Returns:
        The statement about the costs, the loss added in nats per token, the statement about the number, and the number;
        None where it cannot be measured.
    """
    window = prompts.length // WINDOWS_PER_ROW
    reason = _why_no_losses(prompts, is_text)
    if not reason and first_prediction(window) > prompts.length - 2:
        reason = f"Prompts of {prompts.length} tokens end before any token has left a window of {window}."
    costs = None
    if not reason:
        try:
            costs = window_costs(model, prompts)
        except CANNOT_MEASURE as error:
            reason = _cannot_be_measured(error)
    if costs is None:
        windowed = any(size and size < prompts.length for size in describe(model).window)
        advice = "Keep the windows that it was trained with." if windowed else _to_be_safe(sink)
        dropped, to_keep = (Statement(topic, reason, UNKNOWN, advice) for topic in (TOKENS_DROPPED, TOKENS_TO_KEEP))
        return dropped, None, to_keep, None
    number = tokens_to_keep(costs.shares)
    return _dropped_statement(costs, sink), costs.lost, _number_statement(number, costs, sink), number


def _to_be_safe(sink: str) -> str:
    return NO_SINK if sink == NO else f"Keep the first {FIRST}, to be safe."


def _dropped_statement(costs: WindowCosts, sink: str) -> Statement:
    share = costs.shares[0]
    text = (
        f"A window of {costs.window} tokens that keeps none of them adds {costs.lost} nats per token to the loss with "
        f"the first {FIRST} kept, {percent(share)} of it; dropping P0 alone adds {costs.dropped.p0}, dropping one of "
        f"the next three adds {costs.dropped.another}."
    )
    measured = {
        "loss added by keeping none": costs.lost,
        f"loss added by keeping none{AS_SHARE}": share,
        "loss added by dropping P0 alone": costs.dropped.p0,
        "loss added by dropping one of the next three": costs.dropped.another,
    }
    breaks = is_above(share, LOSS_SHARE)
    if breaks == NO:
        return Statement(TOKENS_DROPPED, text, "nothing", "A plain sliding window is enough.", measured)
    if breaks == UNKNOWN:
        advice = f"{_to_be_safe(sink)} Give more text to learn more."
        return Statement(TOKENS_DROPPED, text, UNKNOWN, advice, measured)
    advice = "Do not let a cache drop them: keep them in addition to the window."
    if sink == NO:
        advice = "There is no sink that could cause this: any token that has left a window is missed, first or not."
    return Statement(TOKENS_DROPPED, text, f"{share.value:.1%} more loss", advice, measured)


def _number_statement(number: int | None, costs: WindowCosts, sink: str) -> Statement:
    shares = ", ".join(f"{percent(share)} with {count} kept" for count, share in costs.shares.items())
    text = f"Relative to the loss with {FIRST} kept, the loss grows by {shares}; more than {LOSS_SHARE:.0%} counts."
    if is_above(costs.full_attention, LOSS_SHARE) == YES:
        text += (
            f" Even with {FIRST} kept the window adds {percent(costs.full_attention)} to the loss of full attention: "
            "other tokens that have left it are missed, too."
        )
    names = {0: "no first token", 1: "the first token"}
    measured = {
        f"{LOSS_ADDED_WITH}{names.get(count, f'the first {count} tokens')} kept{AS_SHARE}": share
        for count, share in costs.shares.items()
    }
    measured[f"loss added by the window with the first {FIRST} tokens kept{AS_SHARE}"] = costs.full_attention
    if number == 0:
        advice = "None is needed."
    elif sink == NO:
        advice = NO_SINK
    elif number is None:
        advice = f"{_to_be_safe(sink)} Give more text to learn whether fewer are enough."
    else:
        advice = "Keep the first one in the cache." if number == 1 else f"Keep the first {number} in the cache."
    return Statement(TOKENS_TO_KEEP, text, UNKNOWN if number is None else str(number), advice, measured)


def int8_statement(model: HookedModel, prompts: PromptSet, sink: str, is_text: bool) -> Statement:
    """Measure and say whether int8 activations are a risk.

    Args:
        model: the model.
        prompts: the prompts in the condition with the sink.
        sink: whether there is one, as a verdict.
        is_text: whether the prompts are text, whose losses can be interpreted.
    """
    advice = NO_SINK if sink == NO else "Measure before you rely on it."
    rows = other_half(prompts, INT8_PROMPTS)
    try:
        if reason := _too_few(prompts):
            return Statement(INT8, reason, UNKNOWN, advice)
        effects = int8_effects(model, rows, {name: SCHEMES[name] for name in (P0_IN, P0_KEPT, PER_TOKEN)})
        return int8_risk(effects, sink, is_text)
    except CANNOT_MEASURE as error:
        return Statement(INT8, _cannot_be_measured(error), UNKNOWN, advice)


def int8_risk(effects: Int8Effects, sink: str, is_text: bool) -> Statement:
    """Say what one scale per prompt costs, and whether P0 in high precision or one scale per token helps.

    Args:
        effects: what int8 does with one scale per prompt, the same with P0 in high precision, and one scale per token.
        sink: whether there is a sink, as a verdict.
        is_text: whether losses can be interpreted; if not, the error decides.
    """
    left, error = effects.error_left(P0_KEPT), bootstrap(effects.error(P0_IN))
    measured = {"error of int8 inputs with P0 in": error, "share of the error of int8 inputs left with P0 kept": left}
    text = (
        f"With one scale per prompt, the inputs of matrix products are off by {error} of their size; {left} of that is "
        "left when position zero is kept in high precision."
    )
    if is_text:
        shares = {name: effects.loss_share(name) for name in effects.loss}
        measured |= {f"{LOSS_ADDED_WITH}int8, {name}{AS_SHARE}": share for name, share in shares.items()}
        text += (
            f" In use that adds {percent(shares[P0_IN])} to the loss; with position zero in high precision "
            f"{percent(shares[P0_KEPT])}, and with one scale per token {percent(shares[PER_TOKEN])}."
        )
        costs = effects.loss
        risk = {YES: HIGH, NO: LOW}.get(is_above(shares[P0_IN], LOSS_SHARE), UNKNOWN)
    else:
        text += " What this adds to the loss cannot be measured on random tokens."
        costs = {name: effects.error(name) for name in effects.inputs}
        risk = {NO: HIGH, YES: LOW}.get(is_above(left, ERROR_LEFT), UNKNOWN)

    def lowers(scheme: str, other: str = P0_IN) -> bool:
        """Whether a scheme costs less than another, beyond doubt."""
        return bootstrap(costs[other] - costs[scheme]).low > 0

    if risk == LOW:
        advice = "One scale per prompt is enough" + ("." if is_text else ", as far as position zero is concerned.")
        return Statement(INT8, text, risk, advice, measured)
    p0_helps, per_token_helps = sink != NO and lowers(P0_KEPT), lowers(PER_TOKEN)
    if p0_helps and per_token_helps and lowers(PER_TOKEN, P0_KEPT):
        advice = "Use one scale per token; where that is not available, keep position zero in high precision."
    elif p0_helps:
        advice = "Keep position zero in high precision" + (", or use one scale per token." if per_token_helps else ".")
    else:
        advice = NO_SINK if sink == NO else "Keeping position zero in high precision has no measurable benefit."
        advice += " Use one scale per token." if per_token_helps else " Leave activations in higher precision."
    return Statement(INT8, text, risk, advice + (" Give more text to be sure." if risk == UNKNOWN else ""), measured)


def dormant_statement(
    model: HookedModel, prompts: PromptSet, sink: str, is_text: bool
) -> tuple[Statement, tuple[str, ...] | None]:
    """Measure and say which heads are dormant.

    Args:
        model: the model.
        prompts: the prompts in the condition with the sink.
        sink: whether there is one, as a verdict.
        is_text: whether the prompts are text, whose losses can be interpreted.

    Returns:
        The statement, and the names of the heads; None if they cannot be measured.
    """
    if sink == NO:
        text = "There is no sink for a head to rest on."
        return Statement(DORMANT, text, NONE, "Nothing to prune for this reason."), ()
    careful = "Do not prune a head because of its sink score."
    reason = _why_no_losses(prompts, is_text)
    if not reason and sink == UNKNOWN:
        reason = SINK_UNDECIDED
    if reason:
        return Statement(DORMANT, reason, UNKNOWN, careful), None
    try:
        order, zeroing = zero_in_order(model, prompts)
    except CANNOT_MEASURE as error:
        return Statement(DORMANT, _cannot_be_measured(error), UNKNOWN, careful), None
    count, first = zeroing.within(), head_names(order[:1])
    dormant = tuple(head_names([head]) for head in order[: int(count.low)])
    measured: Mapping[str, Interval] = {
        f"heads that can be zeroed at {TOLERANCE:.0%} more loss": count,
        f"{LOSS_ADDED_WITH}{first} zeroed{AS_SHARE}": zeroing.growth(1),
    }
    text = (
        f"Of {len(order)} heads {count.value:.0f} [{count.low:.0f}, {count.high:.0f}] can be zeroed at {TOLERANCE:.0%} "
        f"more loss, in order of sink score, highest first; the first of them, {first}, adds "
        f"{percent(zeroing.growth(1))}."
    )
    if dormant:
        text += f" Beyond doubt: {', '.join(dormant[:MAX_NAMES])}{' and others' if len(dormant) > MAX_NAMES else ''}."
        advice = "They may be pruned on text like this; check other text first."
        verdict = ", ".join(dormant) if len(dormant) <= 3 else f"{len(dormant)} heads"
        return Statement(DORMANT, text, verdict, advice, measured), dormant
    return Statement(DORMANT, text, UNKNOWN if count.high else NONE, careful, measured), dormant


def _too_few(prompts: PromptSet) -> str:
    return f"{prompts.n} prompts are too few: {MIN_PROMPTS} are needed." if prompts.n < MIN_PROMPTS else ""


def _why_no_losses(prompts: PromptSet, is_text: bool) -> str:
    """Why losses on these prompts say nothing; empty if they do."""
    if is_text:
        return _too_few(prompts)
    return "Losses on random tokens say nothing, and without a tokenizer there is no text to measure on."


def _cannot_be_measured(error: Exception) -> str:
    return f"This cannot be measured: {str(error).rstrip('.')}."
