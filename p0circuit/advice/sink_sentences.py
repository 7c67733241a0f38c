"""The sentences about the sink itself: whether there is one, whether it depends on BOS, and where it begins."""

from __future__ import annotations

from collections.abc import Sequence

from p0circuit.advice.facts import MIN_PROMPTS, ConditionSink, conditions_in_use
from p0circuit.advice.statement import (
    BOS_NEEDED,
    FIRST_LAYER,
    NO,
    NOTHING,
    SINK_PRESENT,
    SINK_UNDECIDED,
    UNKNOWN,
    YES,
    Statement,
    head_names,
    is_above,
)
from p0circuit.experiments.paper.c02_bos_ablation import DEPENDS
from p0circuit.experiments.sink_under_study import mean_over_heads
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet
from p0circuit.sink import CONTROL, least_excess
from p0circuit.stats import Interval, bootstrap, ratio_interval


def prompts_statement(prompts: PromptSet, is_text: bool) -> Statement:
    """Say what was measured on.

    Args:
        prompts: the prompts.
        is_text: whether they are text; random tokens otherwise.
    """
    description = prompts.description
    source = description.get("source", "given token ids") if is_text else "random tokens, as there is no tokenizer"
    text = f"{prompts.n} prompts of {prompts.length} tokens: {source}."
    step = description.get("new_tokens_per_crop", prompts.length)
    advice = "" if is_text else "Give a model with its tokenizer to learn about losses."
    if step < prompts.length:
        text += f" There is so little text that prompts overlap: each has {step} new tokens. Intervals are too narrow."
        advice = "Give more text, or ask for fewer samples."
    if prompts.n < MIN_PROMPTS:
        advice = f"Give at least {MIN_PROMPTS} prompts."
    return Statement("Measured on", text, "text" if is_text else "random tokens", advice)


def sink_statement(
    sinks: Sequence[ConditionSink], used: ConditionSink | None, prompts: PromptSet, bos_loss: Interval | None
) -> Statement:
    """Say whether there is a sink.

    Args:
        sinks: the sink in each condition.
        used: the condition with the sink; None if there is none.
        prompts: the prompts.
        bos_loss: what BOS adds to the loss; None if that cannot be measured.
    """
    topic, needed = SINK_PRESENT, least_excess(prompts.length)
    if not sinks:
        text = (
            f"{prompts.n} prompts of {prompts.length} tokens are too few: {MIN_PROMPTS} of {CONTROL + 2} tokens are "
            "needed."
        )
        return Statement(topic, text, UNKNOWN, "Give more text.")
    measured = {f"excess score {sink.condition}": sink.excess for sink in sinks}
    if used is not None:
        text = (
            f"In text {used.condition}, position zero gets {used.excess} more attention from {used.names} than "
            f"position {CONTROL} does; a sink needs {needed:.3f}, twice what uniform attention gives."
        )
        return Statement(topic, text, YES, "Treat position zero as part of the model, not of the text.", measured)
    scores = " and ".join(f"{sink.excess} {sink.condition}" for sink in sinks)
    text = f"The highest heads have an excess score of {scores}; a sink needs more than {needed:.3f}."
    in_use = conditions_in_use(sinks, bos_loss)
    if bos_loss and any(sink.verdict != NO for sink in sinks[len(in_use) :]):
        measured["loss added by BOS"] = bos_loss
        text += (
            f" The score after BOS does not count: BOS adds {bos_loss} nats per token to the loss, so the model was "
            "hardly trained with it."
        )
    if any(sink.verdict == UNKNOWN for sink in in_use):
        return Statement(topic, text, UNKNOWN, "Give more text: the interval is on both sides of this limit.", measured)
    return Statement(topic, text, NO, "Nothing has to be done because of a sink.", measured)


def bos_statement(
    sinks: Sequence[ConditionSink],
    used: ConditionSink | None,
    verdict: str,
    bos_loss: Interval | None,
    has_bos: bool,
) -> tuple[Statement, bool | None]:
    """Say whether the sink depends on BOS.

    Args:
        sinks: the sink in each condition.
        used: the condition with the sink; None if there is none.
        verdict: whether there is a sink.
        bos_loss: what BOS adds to the loss; None if that cannot be measured.
        has_bos: whether the model has a BOS token.

    Returns:
        The statement, and the answer; None if there is none.
    """
    topic = BOS_NEEDED
    if used is None:
        return _no_sink(topic, verdict), None
    if len(sinks) == 1:
        measured = {"excess score": used.excess}
        if has_bos:
            text = (
                f"BOS cannot be prepended to padded prompts for a comparison; as they are, the excess score is "
                f"{used.excess}."
            )
            return Statement(topic, text, UNKNOWN, "Give prompts without padding.", measured), None
        text = f"There is no BOS token to put before the text, and the sink is there: excess score {used.excess}."
        advice = "Nothing to do: the sink is on whatever token comes first."
        return Statement(topic, text, NO, advice, measured), False
    # The same heads on the same prompts.
    without, with_bos = (mean_over_heads(sink.scores, used.heads) for sink in sinks)
    left = ratio_interval(without, with_bos)
    measured = {
        f"excess score {WITHOUT_BOS}": bootstrap(without),
        f"excess score {WITH_BOS}": bootstrap(with_bos),
        f"share of the excess score left {WITHOUT_BOS}": left,
    }
    text = f"Without BOS {left} of the excess score after BOS is left ({bootstrap(without)} of {bootstrap(with_bos)})."
    helps = UNKNOWN
    if bos_loss:
        measured["loss added by BOS"] = bos_loss
        helps = {YES: NO, NO: YES}.get(is_above(bos_loss, 0), UNKNOWN)
        text += f" {_effect_of_bos(bos_loss)}."
    independent = is_above(left, DEPENDS)
    if helps == NO:
        advice = "Leave BOS out: this model predicts worse after it."
    elif independent == YES:
        advice = "BOS may be left out as far as the sink is concerned."
    else:
        advice = "Put BOS before every text, and before each chunk of a long one."
    if helps == YES:
        advice += " The loss is lower with it."
    answer, depends = {YES: (NO, False), NO: (YES, True)}.get(independent, (UNKNOWN, None))
    return Statement(topic, text, answer, advice, measured), depends


def layer_statement(used: ConditionSink | None, verdict: str) -> tuple[Statement, int | None]:
    """Say from which layer on there are sink heads.

    Args:
        used: the condition with the sink; None if there is none.
        verdict: whether there is a sink.

    Returns:
        The statement, and the layer; None if there is none.
    """
    topic = FIRST_LAYER
    if used is None:
        return _no_sink(topic, verdict), None
    excess = {head: bootstrap(mean_over_heads(used.scores, [head])) for head in used.heads}
    needed = least_excess(used.prompts.length)
    certain = [head for head in used.heads if excess[head].low > needed]
    measured = {f"excess score of {head_names([head])}": excess[head] for head in used.heads}
    if not certain:
        text = "No single sink head is one beyond doubt."
        return Statement(topic, text, UNKNOWN, "Give more text.", measured), None
    layer = min(certain)[0]
    text = f"The first sink head is {head_names([min(certain)])}: excess score {excess[min(certain)]}."
    advice = f"Editing or replacing blocks up to {layer} can change the sink; check it afterwards."
    return Statement(topic, text, str(layer), advice, measured), layer


def _effect_of_bos(bos_loss: Interval) -> str:
    """What BOS does to the loss; a decrease is given as a positive number."""
    if bos_loss.high < 0:
        lowered = Interval(-bos_loss.value, -bos_loss.high, -bos_loss.low, bos_loss.n)
        return f"BOS lowers the loss of the text by {lowered} nats per token"
    return f"BOS adds {bos_loss} nats per token to the loss of the text"


def _no_sink(topic: str, verdict: str) -> Statement:
    if verdict == UNKNOWN:
        return Statement(topic, SINK_UNDECIDED, UNKNOWN, "Give more text.")
    return Statement(topic, "There is no sink, so the question does not arise.", NOTHING, "Nothing to do.")
