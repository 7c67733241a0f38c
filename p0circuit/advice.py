"""Advice: what the first-token bias does to one model on one text, and what to do about it.

1. *Is there a P0 sink?* Sink heads are chosen on one half of the rows; on the other their excess score has to be above
   twice that of uniform attention, beyond doubt. Looked for in the text as it is and then behind BOS, unless the model
   predicts worse there, beyond doubt: that is no BOS of its own.
2. *Does it hang on BOS?* It does where less than half of the excess score that there is behind BOS is left without.
3. *From which layer on?* The first layer with a sink head whose own excess score passes the same test.
4. *What breaks if the first tokens are dropped?* Decoding with a window and none of them, against the first four kept
   (C17). A smaller number is enough where it costs less than the limit beyond doubt; four are the answer where all
   fewer cost more beyond doubt, and what is kept to be safe where that cannot be told.
5. *Does int8 need care?* The loss decides that one grid per tensor adds (C18), or, where no loss can be read, the error
   that is left when P0 is kept in high precision. That is advised only where it helps beyond doubt.
6. *Which heads are dormant?* Those that can be zeroed, the highest sink score first, at 1 % more loss (C19).

Every answer carries the values behind it with their 95 % intervals. An interval on both sides of its limit is answered
"cannot tell", and so is what this model or this text does not show, with the reason. Where there is no sink, nothing is
advised on account of one. The limits stand below; they were fixed before anything was measured.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import text_as_it_is, with_and_without_bos
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
from p0circuit.experiments.deployment.c19_dormant_heads import ENOUGH, SINK, TOLERANCE, by_sink_score, steps, zeroed
from p0circuit.experiments.deployment.int8_effects import P0_IN, P0_KEPT, PER_TOKEN, SCHEMES, Int8Effects, int8_effects
from p0circuit.experiments.sink_under_study import Heads, excess_by_head, mean_over_heads
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError
from p0circuit.io import write_atomically, write_json
from p0circuit.models import ModelError, describe
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, bos_id
from p0circuit.recording.quantities import TOKEN_LOSSES, score_at
from p0circuit.recording.record import record
from p0circuit.results import figure_bytes, model_title
from p0circuit.sink import CONTROL, least_excess, sink_heads
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_PROMPTS = 16
"""With fewer rows nothing is told."""
BOS_DEPENDENCE = 0.5
"""A sink that keeps less than this share of its excess score without BOS hangs on it."""
LOSS_SHARE = 0.01
"""Loss counts from this share of it on: when first tokens are dropped, and in int8."""
ERROR_LEFT = 0.5
"""Where no loss can be read, P0 spoils int8 if keeping it in high precision leaves less of the error than this."""
MOST_NAMES = 8
"""More heads than this are counted, and the first of them named."""
ALL_FIRST = tuple(range(FIRST))
INT8_ROWS = 64
DORMANT_ROWS = 64

CANNOT = (NotApplicable, InterventionError, ModelError)
"""What says that something cannot be measured on this model or these prompts."""

YES, NO, NONE, UNKNOWN, NOTHING = "yes", "no", "none", "cannot tell", "not applicable"
HIGH, LOW = "high", "low"

# The questions, in the order in which they are answered.
SINK_THERE, ON_BOS, FROM_LAYER = "Is there a P0 sink?", "Does it hang on BOS?", "From which layer on?"
DROPS, KEEPS = "What breaks if the first tokens are dropped?", "How many first tokens to keep in a window?"
INT8, DORMANT = "Is int8 for activations a risk?", "Which heads are dormant?"


@dataclass(frozen=True)
class Statement:
    """One thing that was found out.

    Attributes:
        topic: the question.
        text: the answer with its figures, or why there is none.
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
        return vars(self) | {"measured": {name: interval.to_json() for name, interval in self.measured.items()}}


def passes(model: HookedModel, prompts: PromptSet) -> float:
    """How many passes over the prompts `advise` takes at most: rows times blocks that run, over all rows and blocks."""
    info, half = describe(model), prompts.n / 2
    # The sink, and in two conditions also the loss; then full attention and windows with several tokens kept.
    looked, streaming = 1 if bos_id(model) is None else 4, 1 + len(SINKS) + len(DROPPED)
    # The model as it is and with three ways to round; its heads in order, and ever more of them zeroed.
    int8, dormant = 4 * min(INT8_ROWS, half), (2 + len(steps(info.n_layers * info.n_heads))) * min(DORMANT_ROWS, half)
    if model.tokenizer is None:
        # Losses on random tokens tell nothing, so they are not measured.
        return looked + int8 / prompts.n
    return looked + streaming + (int8 + dormant) / prompts.n


@dataclass(frozen=True)
class Advice:
    """What the first-token bias does to a model on a text; None stands for what could not be told.

    Attributes:
        has_sink: whether there is a P0 sink, in the text as it is or behind BOS.
        bos_dependent: whether it hangs on BOS; None also where there is no sink.
        first_sink_layer: the first layer with a sink head; None also where there is no sink.
        sink_tokens_to_keep: how many first tokens a sliding window should keep in its cache, beyond doubt.
        loss_without_sink: what keeping none adds to the loss of keeping four, in nats per token.
        quantisation_risk: "low", "high" or "cannot tell".
        dormant_heads: those that can be zeroed at 1 % more loss, beyond doubt.
        quantisation: how the weights were rounded, as `describe` gives it; None for plain weights.
    """

    model: str
    has_sink: bool | None
    bos_dependent: bool | None
    first_sink_layer: int | None
    sink_tokens_to_keep: int | None
    loss_without_sink: Interval | None
    quantisation_risk: str
    dormant_heads: tuple[str, ...] | None
    statements: tuple[Statement, ...]
    quantisation: str | None = None

    @property
    def title(self) -> str:
        """The model's name, and how its weights were rounded if they were."""
        return model_title(self.model, self.quantisation)

    def to_json(self) -> dict[str, Any]:
        lost, heads = self.loss_without_sink, self.dormant_heads
        return vars(self) | {
            "loss_without_sink": None if lost is None else lost.to_json(),
            "dormant_heads": None if heads is None else list(heads),
            "statements": [statement.to_json() for statement in self.statements],
        }


def advise(model: HookedModel, prompts: PromptSet) -> Advice:
    """Measure what the first-token bias does to a model on these prompts; BOS before them is taken away first.

    Without a tokenizer the prompts are taken for random tokens, whose losses tell nothing.
    """
    reads = model.tokenizer is not None
    prompts = text_as_it_is(model, prompts)
    looked = sinks_by_condition(model, prompts)
    added = _added_by_bos(model, *(look.prompts for look in looked)) if reads and len(looked) > 1 else None
    used = next((look for look in _counted(looked, added) if look.verdict == YES), None)
    rows = used.prompts if used else prompts
    sink = _sink(looked, used, prompts, added)
    bos, hangs = _bos(model, looked, used, sink.verdict, added)
    layer_said, layer = _layer(used, sink.verdict)
    lost_said, lost, keep_said, keep = _streaming(model, rows, sink.verdict, reads)
    risk = _int8(model, rows, sink.verdict, reads)
    dormant_said, dormant = _dormant(model, rows, sink.verdict, reads)
    return Advice(
        model=describe(model).name,
        quantisation=describe(model).quantisation,
        has_sink={YES: True, NO: False}.get(sink.verdict),
        bos_dependent=hangs,
        first_sink_layer=layer,
        sink_tokens_to_keep=keep,
        loss_without_sink=lost,
        quantisation_risk=risk.verdict,
        dormant_heads=dormant,
        statements=(_about(prompts, reads), sink, bos, layer_said, lost_said, keep_said, risk, dormant_said),
    )


def write_advice(advice: Advice, directory: Path) -> list[Path]:
    """Write `advice.json` and `advice.html`, one file that opens offline; returns their paths."""
    from p0circuit.report.html import render

    figure = draw_costs(advice)
    picture = figure and "data:image/svg+xml;base64," + base64.b64encode(figure_bytes(figure, "svg")).decode()
    page = render("advice.html.j2", advice=advice, picture=picture, limit=f"{LOSS_SHARE:.0%}")
    written = write_json(directory / "advice.json", advice.to_json())
    html = directory / "advice.html"
    write_atomically(html, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return [written, html]


def draw_costs(advice: Advice) -> Figure | None:
    """What was found to add to the loss, question by question, against the limit; None where no loss could be read."""
    from p0circuit.figures.intervals import intervals

    def costs(statement: Statement) -> dict[str, Interval]:
        named = {
            name.removeprefix(_WITH).removesuffix(_SHARE): share
            for name, share in statement.measured.items()
            if name.startswith(_WITH) and name.endswith(_SHARE)
        }
        return {
            name: Interval(100 * share.value, 100 * share.low, 100 * share.high, share.n)
            for name, share in named.items()
        }

    panels = {statement.topic: found for statement in advice.statements if (found := costs(statement))}
    if not panels:
        return None
    title = f"{advice.title}: loss added (dashed: the limit, {LOSS_SHARE:.0%})"
    return intervals(panels, title, ["% of the loss"] * len(panels), reference=100 * LOSS_SHARE)


# How the values are named that stand in the figure.
_WITH, _SHARE = "loss added with ", ", as a share"


# The sink


@dataclass(frozen=True)
class ConditionSink:
    """What there is of a sink in one condition; `scores` are excess scores on rows the heads were not chosen on."""

    condition: str
    prompts: PromptSet
    heads: Heads
    scores: Any
    verdict: str

    @property
    def excess(self) -> Interval:
        return bootstrap(mean_over_heads(self.scores, self.heads))

    @property
    def names(self) -> str:
        if len(self.heads) <= MOST_NAMES:
            return _listed(self.heads)
        return f"{len(self.heads)} heads ({_listed(self.heads[:MOST_NAMES])} and others)"


def sinks_by_condition(model: HookedModel, prompts: PromptSet) -> list[ConditionSink]:
    """The text as it is and, where it can be put there, behind BOS; nothing where there is too little of it."""
    if prompts.n < MIN_PROMPTS or prompts.length <= CONTROL + 1:
        return []
    found = []
    for name, rows in with_and_without_bos(model, prompts).items():
        first, second = rows.split()
        heads = sink_heads(record(model, first, score_at(0)))
        scores = excess_by_head(model, second)[0]
        verdict = _passes(bootstrap(mean_over_heads(scores, heads)), least_excess(prompts.length))
        found.append(ConditionSink(name, rows, heads, scores, verdict))
    return found


def _passes(measured: Interval, limit: float) -> str:
    """Whether a value is above a limit, beyond doubt either way."""
    return YES if measured.low > limit else NO if measured.high <= limit else UNKNOWN


def _about(prompts: PromptSet, reads: bool) -> Statement:
    about = prompts.description
    source = about.get("source", "token ids that were given") if reads else "random tokens, as there is no tokenizer"
    text = f"{prompts.n} rows of {prompts.length} tokens: {source}."
    step = about.get("new_tokens_per_crop", prompts.length)
    advice = "" if reads else "Give a model with its tokenizer to learn about losses."
    if step < prompts.length:
        text += f" There is so little text that rows overlap: each has {step} new tokens, so intervals are too narrow."
        advice = "Give more text, or ask for fewer samples."
    if prompts.n < MIN_PROMPTS:
        advice = f"Give at least {MIN_PROMPTS} rows."
    return Statement("Measured on", text, "text" if reads else "random tokens", advice)


def _counted(looked: list[ConditionSink], added: Interval | None) -> list[ConditionSink]:
    """The conditions in which the model is used: not behind a BOS that adds to its loss beyond doubt."""
    return looked[:1] if added and added.low > 0 else looked


def _sink(
    looked: list[ConditionSink], used: ConditionSink | None, prompts: PromptSet, added: Interval | None
) -> Statement:
    """`added`: what BOS adds to the loss; None where that cannot be told."""
    topic, needed = SINK_THERE, least_excess(prompts.length)
    if not looked:
        reason = f"{prompts.n} rows of {prompts.length} tokens are too few: {MIN_PROMPTS} of {CONTROL + 2} are needed."
        return Statement(topic, reason, UNKNOWN, "Give more text.")
    measured = {f"excess score {look.condition}": look.excess for look in looked}
    if used is not None:
        text = (
            f"In text {used.condition}, position zero gets {used.excess} more attention from {used.names} than "
            f"position {CONTROL} does; a sink needs {needed:.3f}, twice what uniform attention gives."
        )
        return Statement(topic, text, YES, "Treat position zero as part of the model, not of the text.", measured)
    told = " and ".join(f"{look.excess} {look.condition}" for look in looked)
    text = f"The highest heads have an excess score of {told}; a sink needs more than {needed:.3f}."
    counted = _counted(looked, added)
    if added and any(look.verdict != NO for look in looked[len(counted) :]):
        measured["loss added by BOS"] = added
        text += f" Behind BOS it does not count: that adds {added} nats per token to the loss, it is none of its own."
    if any(look.verdict == UNKNOWN for look in counted):
        return Statement(topic, text, UNKNOWN, "Give more text: the interval is on both sides of that.", measured)
    return Statement(topic, text, NO, "Nothing has to be done on account of a sink.", measured)


def _bos(
    model: HookedModel, looked: list[ConditionSink], used: ConditionSink | None, sink: str, added: Interval | None
) -> tuple[Statement, bool | None]:
    topic = ON_BOS
    if used is None:
        return _no_sink(topic, sink), None
    if len(looked) == 1:
        measured = {"excess score": used.excess}
        if bos_id(model) is not None:
            text = f"Padded rows cannot be put behind BOS to compare; as they are, the excess score is {used.excess}."
            return Statement(topic, text, UNKNOWN, "Give rows without padding.", measured), None
        text = f"There is no BOS token to put before the text, and the sink is there: excess score {used.excess}."
        advice = "Nothing to do: whatever token stands first takes its place."
        return Statement(topic, text, NO, advice, measured), False
    # The same heads on the same rows.
    without, with_bos = (mean_over_heads(look.scores, used.heads) for look in looked)
    left = ratio_interval(without, with_bos)
    measured = {
        f"excess score {WITHOUT_BOS}": bootstrap(without),
        f"excess score {WITH_BOS}": bootstrap(with_bos),
        f"share of the excess score left {WITHOUT_BOS}": left,
    }
    text = f"Without BOS {left} of the excess score behind BOS is left ({bootstrap(without)} of {bootstrap(with_bos)})."
    helps = UNKNOWN
    if added:
        measured["loss added by BOS"] = added
        helps = {YES: NO, NO: YES}.get(_passes(added, 0), UNKNOWN)
        text += f" {_what_bos_does(added)}."
    kept = _passes(left, BOS_DEPENDENCE)
    if helps == NO:
        advice = "Leave BOS out: this model predicts worse behind it."
    elif kept == YES:
        advice = "BOS may be left out as far as the sink goes."
    else:
        advice = "Put BOS before every text, chunks of a long one too."
    if helps == YES:
        advice += " The loss is lower behind it."
    verdict, hangs = {YES: (NO, False), NO: (YES, True)}.get(kept, (UNKNOWN, None))
    return Statement(topic, text, verdict, advice, measured), hangs


def _what_bos_does(added: Interval) -> str:
    """In words, what BOS does to the loss; a negative sum is no addition."""
    if added.high < 0:
        lowered = Interval(-added.value, -added.high, -added.low, added.n)
        return f"BOS lowers the loss of the text by {lowered} nats per token"
    return f"BOS adds {added} nats per token to the loss of the text"


def _added_by_bos(model: HookedModel, without: PromptSet, behind: PromptSet) -> Interval:
    """What BOS adds to the loss of the same predictions."""
    before, after = (record(model, rows, TOKEN_LOSSES).double().numpy() for rows in (without, behind))
    # Behind BOS every token stands one place later, and the last has none.
    return bootstrap((after[:, 1:] - before[:, :-1]).mean(1))


def _layer(used: ConditionSink | None, sink: str) -> tuple[Statement, int | None]:
    topic = FROM_LAYER
    if used is None:
        return _no_sink(topic, sink), None
    excess = {head: bootstrap(mean_over_heads(used.scores, [head])) for head in used.heads}
    needed = least_excess(used.prompts.length)
    clear = [head for head in used.heads if excess[head].low > needed]
    measured = {f"excess score of {_listed([head])}": excess[head] for head in used.heads}
    if not clear:
        text = "No sink head is one beyond doubt when it stands alone."
        return Statement(topic, text, UNKNOWN, "Give more text.", measured), None
    layer = min(clear)[0]
    text = f"The first sink head is {_listed([min(clear)])}: excess score {excess[min(clear)]}."
    advice = f"What edits or replaces blocks up to {layer} can change the sink; check it afterwards."
    return Statement(topic, text, str(layer), advice, measured), layer


def _no_sink(topic: str, sink: str) -> Statement:
    if sink == UNKNOWN:
        return Statement(topic, _NO_SINK_TOLD, UNKNOWN, "Give more text.")
    return Statement(topic, "There is no sink to ask that of.", NOTHING, "Nothing to do.")


_NO_SINK = "There is no sink, and nothing to do on its account."
_NO_SINK_TOLD = "Whether there is a sink could not be told."


# What it is good for


def _streaming(
    model: HookedModel, prompts: PromptSet, sink: str, reads: bool
) -> tuple[Statement, Interval | None, Statement, int | None]:
    """What dropping the first tokens costs, and how many to keep."""
    window = prompts.length // WINDOWS_PER_ROW
    start = first_prediction(window)
    reason = _why_no_losses(prompts, reads)
    if not reason and start > prompts.length - 2:
        reason = f"Rows of {prompts.length} tokens end before anything has fallen out of a window of {window}."
    if not reason:
        try:
            losses = decoded(model, prompts, window, [None, *SINKS, *DROPPED])
        except CANNOT as cannot:
            reason = _sentence(cannot)
    if reason:
        windowed = any(size and size < prompts.length for size in describe(model).window)
        advice = "Keep to the windows that it was trained with." if windowed else _to_be_safe(sink)
        said, kept = (Statement(topic, reason, UNKNOWN, advice) for topic in (DROPS, KEEPS))
        return said, None, kept, None
    late = {kept: losses[kept][:, start:].mean(1) for kept in (None, *SINKS)}
    shares = {
        len(kept): ratio_interval(late[kept] - late[ALL_FIRST], late[ALL_FIRST])
        for kept in SINKS
        if kept not in (None, ALL_FIRST)
    }
    lost, keep = bootstrap(late[()] - late[ALL_FIRST]), tokens_to_keep(shares)
    itself = ratio_interval(late[ALL_FIRST] - late[None], late[None])
    drops = _drops(window, lost, shares[0], costs_of(losses, window), sink)
    return drops, lost, _keeps(keep, shares, itself, sink), keep


def _to_be_safe(sink: str) -> str:
    return _NO_SINK if sink == NO else f"Keep the first {FIRST}, to be safe."


def _drops(window: int, lost: Interval, share: Interval, costs: Costs, sink: str) -> Statement:
    text = (
        f"A window of {window} tokens that keeps none of them adds {lost} nats per token to one that keeps the first "
        f"{FIRST}, {_percent(share)} of the loss; dropping P0 alone adds {costs.p0}, one of the next three "
        f"{costs.another}."
    )
    measured = {
        "loss added by keeping none": lost,
        f"loss added by keeping none{_SHARE}": share,
        "loss added by dropping P0 alone": costs.p0,
        "loss added by dropping one of the next three": costs.another,
    }
    breaks = _passes(share, LOSS_SHARE)
    if breaks == NO:
        return Statement(DROPS, text, "nothing", "A plain sliding window does.", measured)
    if breaks == UNKNOWN:
        return Statement(DROPS, text, UNKNOWN, f"{_to_be_safe(sink)} Give more text to learn more.", measured)
    advice = "Do not let a cache drop them: keep them beside the window."
    if sink == NO:
        advice = "There is no sink that this could be due to: whatever has left a window is missed, first or not."
    return Statement(DROPS, text, f"{share.value:.1%} more loss", advice, measured)


def _keeps(keep: int | None, shares: Mapping[int, Interval], itself: Interval, sink: str) -> Statement:
    """`itself`: what the window adds to the loss of full attention, the first four kept."""
    told = ", ".join(f"{_percent(share)} with {count}" for count, share in shares.items())
    text = f"Beyond the loss with {FIRST} kept there is {told}; more than {LOSS_SHARE:.0%} counts."
    if _passes(itself, LOSS_SHARE) == YES:
        text += (
            f" Even with {FIRST} kept the window adds {_percent(itself)} to the loss of full attention: what else has "
            "fallen out of it is missed, too."
        )
    names = {0: "no first token", 1: "the first token"}
    measured = {
        f"{_WITH}{names.get(count, f'the first {count} tokens')} kept{_SHARE}": share for count, share in shares.items()
    }
    measured[f"loss added by the window with the first {FIRST} tokens kept{_SHARE}"] = itself
    if keep == 0:
        advice = "None is needed."
    elif sink == NO:
        advice = _NO_SINK
    elif keep is None:
        advice = f"{_to_be_safe(sink)} Give more text to learn whether fewer do."
    else:
        advice = "Keep the first one in the cache." if keep == 1 else f"Keep the first {keep} in the cache."
    return Statement(KEEPS, text, UNKNOWN if keep is None else str(keep), advice, measured)


def tokens_to_keep(added: Mapping[int, Interval]) -> int | None:
    """The smallest number of first tokens that is enough; None where that cannot be told.

    `added` is, by number, the loss beyond that with four kept, as a share of it. A number is enough if its whole
    interval is within 1 %. Four are told only where every smaller number is too small beyond doubt.
    """
    over = {count: _passes(share, LOSS_SHARE) for count, share in added.items()}
    enough = [count for count, verdict in over.items() if verdict == NO]
    if enough:
        return min(enough)
    return FIRST if all(verdict == YES for verdict in over.values()) else None


def _int8(model: HookedModel, prompts: PromptSet, sink: str, reads: bool) -> Statement:
    unmeasured = _NO_SINK if sink == NO else "Measure before you rely on it."
    rows = _other_half(prompts, INT8_ROWS)
    try:
        if reason := _too_few(prompts):
            return Statement(INT8, reason, UNKNOWN, unmeasured)
        effects = int8_effects(model, rows, {name: SCHEMES[name] for name in (P0_IN, P0_KEPT, PER_TOKEN)})
        return int8_risk(effects, sink, reads)
    except CANNOT as cannot:
        return Statement(INT8, _sentence(cannot), UNKNOWN, unmeasured)


def int8_risk(effects: Int8Effects, sink: str, reads: bool) -> Statement:
    """What one grid per tensor does, and whether it helps to keep P0 in high precision or to give each token a grid.

    `sink`: whether there is one, as a verdict; `reads`: whether losses tell anything.
    """
    left, error = effects.error_left(P0_KEPT), bootstrap(effects.error(P0_IN))
    measured = {"error of int8 inputs with P0 in": error, "share of the error of int8 inputs left with P0 kept": left}
    text = (
        f"With one grid per tensor, made for each row, the inputs of matrix products are off by {error} of their size; "
        f"{left} of that is left when position zero is kept in high precision."
    )
    if reads:
        shares = {name: effects.loss_share(name) for name in effects.loss}
        measured |= {f"{_WITH}int8, {name}{_SHARE}": share for name, share in shares.items()}
        text += (
            f" In use that adds {_percent(shares[P0_IN])} to the loss; with position zero kept "
            f"{_percent(shares[P0_KEPT])}, and with one grid per token {_percent(shares[PER_TOKEN])}."
        )
        costs = effects.loss
        risk = {YES: HIGH, NO: LOW}.get(_passes(shares[P0_IN], LOSS_SHARE), UNKNOWN)
    else:
        text += " What it adds to the loss, random tokens do not tell."
        costs = {name: effects.error(name) for name in effects.inputs}
        risk = {NO: HIGH, YES: LOW}.get(_passes(left, ERROR_LEFT), UNKNOWN)

    def lowers(scheme: str, other: str = P0_IN) -> bool:
        """Whether a scheme costs less than another, beyond doubt."""
        return bootstrap(costs[other] - costs[scheme]).low > 0

    if risk == LOW:
        advice = "One grid per tensor does" + ("." if reads else ", as far as position zero goes.")
        return Statement(INT8, text, risk, advice, measured)
    kept, per_token = sink != NO and lowers(P0_KEPT), lowers(PER_TOKEN)
    if kept and per_token and lowers(PER_TOKEN, P0_KEPT):
        advice = "Use one grid per token; where that is not to be had, keep position zero in high precision."
    elif kept:
        advice = "Keep position zero in high precision" + (", or use one grid per token." if per_token else ".")
    else:
        advice = _NO_SINK if sink == NO else "Keeping position zero in high precision is not seen to help."
        advice += " Use one grid per token." if per_token else " Leave activations in higher precision."
    return Statement(INT8, text, risk, advice + (" Give more text to be sure." if risk == UNKNOWN else ""), measured)


def _dormant(
    model: HookedModel, prompts: PromptSet, sink: str, reads: bool
) -> tuple[Statement, tuple[str, ...] | None]:
    topic = DORMANT
    if sink == NO:
        text = "There is no sink for a head to rest on."
        return Statement(topic, text, NONE, "Nothing to prune on this account."), ()
    careful = "Prune no head on account of its sink score."
    reason = _why_no_losses(prompts, reads)
    if not reason and sink == UNKNOWN:
        reason = _NO_SINK_TOLD
    if not reason:
        made_on, measured_on = prompts.split()[0].subset(slice(0, DORMANT_ROWS)), _other_half(prompts, DORMANT_ROWS)
        try:
            order = by_sink_score(model, made_on)
            run = zeroed(model, measured_on, {SINK: order}, until=ENOUGH * TOLERANCE)[SINK]
        except CANNOT as cannot:
            reason = _sentence(cannot)
    if reason:
        return Statement(topic, reason, UNKNOWN, careful), None
    count, whole = run.within(), len(order)
    dormant = tuple(_listed([head]) for head in order[: int(count.low)])
    measured = {
        f"heads that can be zeroed at {TOLERANCE:.0%} more loss": count,
        f"{_WITH}{_listed(order[:1])} zeroed{_SHARE}": run.growth(1),
    }
    text = (
        f"Of {whole} heads {count.value:.0f} [{count.low:.0f}, {count.high:.0f}] can be zeroed at {TOLERANCE:.0%} more "
        f"loss, the highest sink score first; the first of them, {_listed(order[:1])}, adds {_percent(run.growth(1))}."
    )
    if dormant:
        named = ", ".join(dormant[:MOST_NAMES])
        text += f" Beyond doubt: {named}{' and others' if len(dormant) > MOST_NAMES else ''}."
        advice = "They may be pruned on text like this; check other text first."
        return Statement(topic, text, _few(dormant), advice, measured), dormant
    return Statement(topic, text, UNKNOWN if count.high else NONE, careful, measured), dormant


def _few(heads: tuple[str, ...]) -> str:
    return ", ".join(heads) if len(heads) <= 3 else f"{len(heads)} heads"


def _other_half(prompts: PromptSet, most: int) -> PromptSet:
    """Rows that sink heads were not chosen on."""
    return prompts.split()[1].subset(slice(0, most)) if prompts.n > 1 else prompts


def _too_few(prompts: PromptSet) -> str:
    return f"{prompts.n} rows are too few: {MIN_PROMPTS} are needed." if prompts.n < MIN_PROMPTS else ""


def _why_no_losses(prompts: PromptSet, reads: bool) -> str:
    """Why losses on these prompts tell nothing; empty where they do."""
    return (
        _too_few(prompts) if reads else "Losses on random tokens tell nothing, and there is no tokenizer to read text."
    )


def _sentence(reason: Exception) -> str:
    return f"Not to be measured: {str(reason).rstrip('.')}."


def _percent(share: Interval) -> str:
    # A zero has no sign.
    value, low, high = (f"{end:.1%}".replace("-0.0%", "0.0%") for end in (share.value, share.low, share.high))
    return f"{value} [{low}, {high}]"


def _listed(heads: Heads) -> str:
    return ", ".join(f"attn.{layer}.{head}" for layer, head in heads)
