"""Advice: what the first-token bias does to one model on one text, and what to do about it.

1. *Is there a P0 sink?* Sink heads are chosen on one half of the rows; on the other their excess score has to be above
   twice that of uniform attention, beyond doubt. Looked for in the text as it is and then behind BOS.
2. *Does it hang on BOS?* It does where less than half of the excess score that there is behind BOS is left without.
3. *From which layer on?* The first layer with a sink head whose own excess score passes the same test.
4. *What breaks if the first tokens are dropped?* Decoding with a window and none of them, against the first four kept
   (C17), and how many have to be kept.
5. *Does int8 need care?* The error that is left when P0 is kept in high precision, and the loss that one grid per
   tensor adds (C18).
6. *Which heads are dormant?* Those that can be zeroed, the highest sink score first, at 1 % more loss (C19).

Every answer carries the values behind it with their 95 % intervals. An interval on both sides of its limit is answered
"cannot tell", and so is what this model or this text does not show, with the reason. The limits stand below; they were
fixed before anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from p0circuit.activations import TOKEN_LOSSES, record, score_at
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import WITH_BOS, WITHOUT_BOS, bos_id
from p0circuit.experiments.dormant_heads import ENOUGH, SINK, TOLERANCE, by_sink_score, zeroed
from p0circuit.experiments.heads import Heads, excess_by_head, over_heads, sink_heads
from p0circuit.experiments.quantisation import P0_IN, P0_KEPT, SCHEMES, int8_effects
from p0circuit.experiments.streaming import (
    DROPPED,
    FIRST,
    SINKS,
    WINDOWS_PER_ROW,
    costs_of,
    decoded,
    first_prediction,
)
from p0circuit.files import write_atomically, write_json
from p0circuit.intervals import Interval, bootstrap, ratio_interval
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import ModelError, describe
from p0circuit.prompts import PromptSet
from p0circuit.sink import CONTROL, least_excess

FEWEST = 16
"""With fewer rows nothing is told."""
HANGS_ON_BOS = 0.5
"""A sink that keeps less than this share of its excess score without BOS hangs on it."""
LOSS_SHARE = 0.01
"""Loss counts from this share of it on: when first tokens are dropped, and in int8."""
ERROR_LEFT = 0.5
"""P0 spoils int8 where keeping it in high precision leaves less than this share of the error."""
ALL_FIRST = tuple(range(FIRST))
INT8_ROWS = 64
DORMANT_ROWS = 64

CANNOT = (NotApplicable, InterventionError, ModelError)
"""What says that something cannot be measured on this model or these prompts."""

YES, NO, UNKNOWN, NOTHING = "yes", "no", "cannot tell", "not applicable"
HIGH, LOW = "high", "low"


@dataclass(frozen=True)
class Statement:
    """One thing that was found out.

    Attributes:
        topic: the question.
        text: the answer with its figures, or why there is none.
        verdict: the answer in a word: yes, no, a number, high, low, "cannot tell", "not applicable".
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


@dataclass(frozen=True)
class Advice:
    """What the first-token bias does to a model on a text; None stands for what could not be told.

    Attributes:
        has_sink: whether there is a P0 sink, in the text as it is or behind BOS.
        bos_dependent: whether it hangs on BOS; None also where there is no sink.
        first_sink_layer: the first layer with a sink head; None also where there is no sink.
        sink_tokens_to_keep: how many first tokens a sliding window should keep in its cache.
        loss_without_sink: what keeping none adds to the loss of keeping four, in nats per token.
        quantisation_risk: "low", "high" or "cannot tell".
        dormant_heads: those that can be zeroed at 1 % more loss, beyond doubt.
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

    def to_json(self) -> dict[str, Any]:
        lost, heads = self.loss_without_sink, self.dormant_heads
        return vars(self) | {
            "loss_without_sink": None if lost is None else lost.to_json(),
            "dormant_heads": None if heads is None else list(heads),
            "statements": [statement.to_json() for statement in self.statements],
        }


def advise(model: Any, prompts: PromptSet) -> Advice:
    """Measure what the first-token bias does to a model on these prompts: text as it is, without BOS.

    Without a tokenizer the prompts are taken for random tokens, whose losses tell nothing.
    """
    reads = model.tokenizer is not None
    looked = _look(model, prompts)
    used = next((look for look in looked if look.verdict == YES), None)
    rows = used.prompts if used else prompts
    sink = _sink(looked, used, prompts)
    bos, hangs = _bos(model, looked, used, sink.verdict)
    layer_said, layer = _layer(used, sink.verdict)
    lost_said, lost, keep_said, keep = _streaming(model, rows, reads)
    risk = _int8(model, rows, reads)
    dormant_said, dormant = _dormant(model, rows, sink.verdict, reads)
    return Advice(
        model=describe(model).name,
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
    from p0circuit.report.page import render

    page = render("advice.html.j2", advice=advice)
    written = write_json(directory / "advice.json", advice.to_json())
    html = directory / "advice.html"
    write_atomically(html, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return [written, html]


# The sink


@dataclass(frozen=True)
class _Look:
    """What there is of a sink in one condition; `scores` are excess scores on rows the heads were not chosen on."""

    condition: str
    prompts: PromptSet
    heads: Heads
    scores: Any
    verdict: str

    @property
    def excess(self) -> Interval:
        return bootstrap(over_heads(self.scores, self.heads))

    @property
    def names(self) -> str:
        return _listed(self.heads)


def _look(model: Any, prompts: PromptSet) -> list[_Look]:
    """The text as it is and, where it can be put there, behind BOS; nothing where there is too little of it."""
    if prompts.n < FEWEST or prompts.length <= CONTROL + 1:
        return []
    conditions = {WITHOUT_BOS: prompts}
    if (bos := bos_id(model)) is not None and bool(prompts.attention_mask.all()):
        conditions[WITH_BOS] = prompts.behind(bos)
    found = []
    for name, rows in conditions.items():
        first, second = rows.split()
        heads, _ = sink_heads(record(model, first, score_at(0))[score_at(0)])
        scores = excess_by_head(model, second)[0]
        verdict = _passes(bootstrap(over_heads(scores, heads)), least_excess(prompts.length))
        found.append(_Look(name, rows, heads, scores, verdict))
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
    if prompts.n < FEWEST:
        advice = f"Give at least {FEWEST} rows."
    return Statement("Measured on", text, "text" if reads else "random tokens", advice)


def _sink(looked: list[_Look], used: _Look | None, prompts: PromptSet) -> Statement:
    topic, needed = "Is there a P0 sink?", least_excess(prompts.length)
    if not looked:
        reason = (
            f"{prompts.n} rows of {prompts.length} tokens are too few: {FEWEST} of more than {CONTROL + 1} are needed."
        )
        return Statement(topic, reason, UNKNOWN, "Give more text.")
    measured = {f"excess score {look.condition}": look.excess for look in looked}
    if used is not None:
        text = (
            f"In text {used.condition}, {used.names} give position zero {used.excess} more of their attention than "
            f"position {CONTROL}; a sink needs {needed:.3f}, twice what uniform attention gives."
        )
        return Statement(topic, text, YES, "Treat position zero as part of the model, not of the text.", measured)
    told = " and ".join(f"{look.excess} {look.condition}" for look in looked)
    text = f"The highest heads have an excess score of {told}; a sink needs more than {needed:.3f}."
    if any(look.verdict == UNKNOWN for look in looked):
        return Statement(topic, text, UNKNOWN, "Give more text: the interval is on both sides of that.", measured)
    return Statement(topic, text, NO, "Nothing has to be done on account of a sink.", measured)


def _bos(model: Any, looked: list[_Look], used: _Look | None, sink: str) -> tuple[Statement, bool | None]:
    topic = "Does it hang on BOS?"
    if used is None:
        return _no_sink(topic, sink), None
    if len(looked) == 1:
        text = f"There is no BOS here to put before it, and the sink is there: excess score {used.excess}."
        advice = "Nothing to do: whatever token stands first takes its place."
        return Statement(topic, text, NO, advice, {"excess score": used.excess}), False
    # The same heads on the same rows.
    without, with_bos = (over_heads(look.scores, used.heads) for look in looked)
    left = ratio_interval(without, with_bos)
    measured = {"excess score without BOS": bootstrap(without), "with BOS": bootstrap(with_bos), "left without": left}
    text = f"Without BOS {left} of the excess score behind BOS is left ({bootstrap(without)} of {bootstrap(with_bos)})."
    helps = UNKNOWN
    if model.tokenizer is not None:
        added = measured["loss added by BOS"] = bootstrap(_added_by_bos(model, *(look.prompts for look in looked)))
        helps = {YES: NO, NO: YES}.get(_passes(added, 0), UNKNOWN)
        text += f" BOS adds {added} nats per token to the loss of the text."
    kept = _passes(left, HANGS_ON_BOS)
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


def _added_by_bos(model: Any, without: PromptSet, behind: PromptSet) -> np.ndarray:
    """What BOS adds to the loss of the same predictions, by sample."""
    before, after = (record(model, rows, TOKEN_LOSSES)[TOKEN_LOSSES].double().numpy() for rows in (without, behind))
    # Behind BOS every token stands one place later, and the last has none.
    return (after[:, 1:] - before[:, :-1]).mean(1)


def _layer(used: _Look | None, sink: str) -> tuple[Statement, int | None]:
    topic = "From which layer on?"
    if used is None:
        return _no_sink(topic, sink), None
    excess = {head: bootstrap(over_heads(used.scores, [head])) for head in used.heads}
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


_NO_SINK_TOLD = "Whether there is a sink could not be told."


# What it is good for


def _streaming(model: Any, prompts: PromptSet, reads: bool) -> tuple[Statement, Interval | None, Statement, int | None]:
    """What dropping the first tokens costs, and how many to keep."""
    drops, keeps = "What breaks if the first tokens are dropped?", "How many first tokens to keep in a window?"
    window = prompts.length // WINDOWS_PER_ROW
    start = first_prediction(window)
    reason = _why_no_losses(prompts, reads)
    if not reason and start > prompts.length - 2:
        reason = f"Rows of {prompts.length} tokens end before anything has fallen out of a window of {window}."
    if not reason:
        try:
            losses = decoded(model, prompts, window, [*SINKS, *DROPPED])
        except CANNOT as cannot:
            reason = _sentence(cannot)
    if reason:
        keep_all = f"Keep the first {FIRST}, to be safe."
        return Statement(drops, reason, UNKNOWN, keep_all), None, Statement(keeps, reason, UNKNOWN, keep_all), None
    late = {kept: losses[kept][:, start:].mean(1) for kept in SINKS if kept is not None}
    base = late[ALL_FIRST]
    lost, costs = bootstrap(late[()] - base), costs_of(losses, window)
    growth = ratio_interval(late[()] - base, base)
    measured = {
        "loss added by keeping none": lost,
        "share of the loss": growth,
        "by dropping P0 alone": costs.p0,
        "by dropping one of the next three": costs.another,
    }
    breaks = _passes(growth, LOSS_SHARE)
    text = (
        f"A window of {window} tokens that keeps none of them adds {lost} nats per token to one that keeps the first "
        f"{FIRST}, {_percent(growth)} of the loss; dropping P0 alone adds {costs.p0}, one of the next three "
        f"{costs.another}."
    )
    advice = {
        YES: "Do not let a cache drop them: keep them beside the window.",
        NO: "A plain sliding window does.",
        UNKNOWN: f"Keep the first {FIRST}, to be safe, or give more text.",
    }[breaks]
    keep = tokens_to_keep(late)
    shares = {len(kept): ratio_interval(values - base, base) for kept, values in late.items() if kept != ALL_FIRST}
    told = ", ".join(f"{_percent(share)} with {count}" for count, share in shares.items())
    sure = keep == FIRST or _passes(shares[keep], LOSS_SHARE) == NO
    how_many = Statement(
        keeps,
        f"Beyond the loss with {FIRST} kept there is {told}. Up to {LOSS_SHARE:.0%} counts as none, and so does what "
        "cannot be told from that.",
        str(keep),
        _keep(keep) + ("" if sure else " Give more text to be sure."),
        {f"loss added with {count} kept, as a share": share for count, share in shares.items()},
    )
    return Statement(drops, text, breaks, advice, measured), lost, how_many, keep


def tokens_to_keep(losses: Mapping[tuple[int, ...], Float[np.ndarray, " sample"]]) -> int:
    """The smallest number of first tokens whose loss is not, beyond doubt, over 1 % above that with four kept."""
    most = losses[ALL_FIRST]
    enough = (kept for kept in losses if not bootstrap(losses[kept] - (1 + LOSS_SHARE) * most).low > 0)
    return min(map(len, enough))


def _keep(count: int) -> str:
    few = {0: "None is needed.", 1: "Keep the first one in the cache."}
    return few.get(count, f"Keep the first {count} in the cache.")


def _int8(model: Any, prompts: PromptSet, reads: bool) -> Statement:
    topic = "Is int8 for activations a risk?"
    careful = "Keep position zero in high precision, or use one grid per token, and measure."
    rows = _other_half(prompts, INT8_ROWS)
    try:
        if reason := _too_few(prompts):
            return Statement(topic, reason, UNKNOWN, careful)
        effects = int8_effects(model, rows, {name: SCHEMES[name] for name in (P0_IN, P0_KEPT)})
        left = effects.error_left(P0_KEPT)
    except CANNOT as cannot:
        return Statement(topic, _sentence(cannot), UNKNOWN, careful)
    measured = {"error left with P0 kept": left, "error with P0 in": bootstrap(effects.error(P0_IN))}
    text = (
        f"With one grid per tensor the inputs of matrix products are off by {measured['error with P0 in']}; with P0 "
        f"kept in high precision {left} of that is left."
    )
    spoilt, costly = {YES: NO, NO: YES}.get(_passes(left, ERROR_LEFT), UNKNOWN), UNKNOWN
    if reads:
        whole = np.nanmean(record(model, rows, TOKEN_LOSSES)[TOKEN_LOSSES].double().numpy(), axis=1)
        growth = measured["loss added, as a share"] = ratio_interval(effects.loss[P0_IN], whole)
        costly = _passes(growth, LOSS_SHARE)
        text += f" It adds {_percent(growth)} of the loss."
    else:
        text += " What it adds to the loss, random tokens do not tell."
    if YES in (spoilt, costly):
        return Statement(topic, text, HIGH, careful, measured)
    if spoilt == costly == NO:
        return Statement(topic, text, LOW, "One grid per tensor does, as far as position zero goes.", measured)
    return Statement(topic, text, UNKNOWN, careful, measured)


def _dormant(model: Any, prompts: PromptSet, sink: str, reads: bool) -> tuple[Statement, tuple[str, ...] | None]:
    topic = "Which heads are dormant?"
    if sink == NO:
        return Statement(topic, "There is no sink for a head to rest on.", NO, "Nothing to prune on this account."), ()
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
    measured = {"heads": count, "loss added by the first": run.growth(1)}
    text = (
        f"Of {whole} heads {count.value:.0f} [{count.low:.0f}, {count.high:.0f}] can be zeroed at {TOLERANCE:.0%} more "
        f"loss, the highest sink score first; the first of them, {_listed(order[:1])}, adds {_percent(run.growth(1))}."
    )
    if dormant:
        text += f" Beyond doubt: {', '.join(dormant)}."
        return Statement(
            topic, text, YES, "They may be pruned on text like this; check other text first.", measured
        ), dormant
    return Statement(topic, text, UNKNOWN if count.high else NO, careful, measured), dormant


def _other_half(prompts: PromptSet, most: int) -> PromptSet:
    """Rows that sink heads were not chosen on."""
    return prompts.split()[1].subset(slice(0, most)) if prompts.n > 1 else prompts


def _too_few(prompts: PromptSet) -> str:
    return f"{prompts.n} rows are too few: {FEWEST} are needed." if prompts.n < FEWEST else ""


def _why_no_losses(prompts: PromptSet, reads: bool) -> str:
    """Why losses on these prompts tell nothing; empty where they do."""
    return (
        _too_few(prompts) if reads else "Losses on random tokens tell nothing, and there is no tokenizer to read text."
    )


def _sentence(reason: Exception) -> str:
    told = str(reason)
    return told[:1].upper() + told[1:].rstrip(".") + "."


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _listed(heads: Heads) -> str:
    return ", ".join(f"attn.{layer}.{head}" for layer, head in heads)
