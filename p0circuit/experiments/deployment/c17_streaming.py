"""Streaming (C17): decoding with a sliding window, with and without the first tokens kept.

1. *Decoding.* Each query sees the last W tokens and the kept ones, rotary positions counted inside the cache
   (`interventions.streaming`): none kept, the first 1, 2 or 4, and beside that full attention. W is a quarter of the
   rows unless it is given. *Control*: position 8 is kept in P0's place.
2. *What a token is worth.* The loss with one of the first four tokens dropped minus that with all four kept: for P0,
   and on average for the other three. The caches of both are of one size, and none of the other three is P0.
3. *The threshold.* The cost of P0 minus five times that of another one has to be above 0 with its whole interval. As
   the other's cost its absolute value counts: where dropping it does as good as nothing, either sign is noise, and a
   gain must not pass for a large ratio. The ratio stands beside it where the other's cost is above 0 beyond doubt.
4. *Losses*, in nats per token, of the same predictions in all runs: those made where all of the first nine tokens have
   fallen out of the window.
5. *Where the sink is*: on the text as it is, or behind BOS where there is a sink only there (the first four tokens are
   then BOS and three of the text). In the other condition the costs are measured too.
6. *A long stream*, with the length of the prompts as its window: new text of the same kind, eight times as long. What
   full attention does there depends on the lengths that the model was trained on, which nobody has to have told us.

A model without a sink is measured like any other: there the first token should be worth as little as its neighbours.
Source: Xiao et al. 2023, arXiv 2309.17453 (attention sinks; sections 3.1 and 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, NotApplicable, is_large
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import text_like, with_and_without_bos
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.figures.lines import series_by
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError
from p0circuit.interventions.sliding_window import streamed, why_not_streamed
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, bos_id, condition_of
from p0circuit.recording.quantities import TOKEN_LOSSES
from p0circuit.recording.record import record
from p0circuit.results import Result, metric_name
from p0circuit.sink import CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Kept = tuple[int, ...] | None
"""The positions that stay in the cache beside the window; None for full attention."""
Losses = Mapping[Kept, Float[np.ndarray, "sample pos"]]
"""The loss of every prediction by what was kept: that of the next token, made at each position but the last."""

FIRST = 4
"""So many first tokens are kept at most, and dropped one at a time."""
TIMES = 5
SINKS: tuple[Kept, ...] = ((), (0,), (0, 1), (0, 1, 2, 3))
OTHER: Kept = (CONTROL,)
ALL: Kept = tuple(range(FIRST))
DROPPED: tuple[Kept, ...] = tuple(tuple(place for place in range(FIRST) if place != gone) for gone in range(FIRST))
WINDOWS_PER_ROW = 4
BINS = 8


@dataclass(frozen=True)
class StreamingConfig:
    """`window` in tokens, a quarter of the rows if None; the most rows, here and in the other condition.

    The long stream is `long_windows` times as long as the prompts, in as many rows as make `long_tokens` tokens.
    """

    window: int | None = None
    samples: int = 10**9
    other_samples: int = 128
    long_windows: int = 8
    long_tokens: int = 8_192


@dataclass(frozen=True)
class Costs:
    """What it costs to drop one of the first tokens from the cache, in nats per token of each sample.

    Attributes:
        each: by position.
    """

    each: Float[np.ndarray, "first sample"]

    @property
    def p0(self) -> Interval:
        return bootstrap(self.each[0])

    @property
    def another(self) -> Interval:
        """The mean over the other first tokens."""
        return bootstrap(self.each[1:].mean(0))

    @property
    def beyond(self) -> Interval:
        """The cost of P0 minus five times the size of another one's."""
        return bootstrap(np.stack([self.each[0], self.each[1:].mean(0)], axis=1), _beyond)

    @property
    def ratio(self) -> Interval | None:
        """The cost of P0 over that of another one; None where the latter cannot be told from nothing or a gain."""
        return ratio_interval(self.each[0], self.each[1:].mean(0)) if self.another.low > 0 else None


class Streaming(Experiment[StreamingConfig]):
    """What keeping the first tokens is worth when a window moves over the text."""

    id = "streaming"
    title = "Streaming"
    config_type = StreamingConfig
    claim = Claim(
        id="C17",
        title="Streaming",
        source="Xiao et al. 2023, arXiv 2309.17453, sections 3.1 and 3.2",
        statement="A model that decodes with a sliding window needs P0 in its cache: dropping it costs at least five "
        "times what dropping another early position costs.",
        measure="Loss in nats per token with one of the first four tokens dropped from the cache minus that with all "
        "four kept beside the window: that of P0 minus five times the size of the mean of the others.",
        criteria=(Criterion("dropping_p0_beyond_5_times_another", ">", 0, "low"),),
        control="Positions 1, 2 and 3, dropped in the same way; position 8 kept in P0's place.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        config, n, length, info = self.config, prompts.n, prompts.length, describe(model)
        given = min(n, config.samples) * length * (len(SINKS) + 1 + len(DROPPED))
        other = min(n, config.other_samples) * length * (1 + len(DROPPED)) if bos_id(model) is not None else 0
        long = min(length * config.long_windows, info.n_ctx or 10**9)
        rows = max(1, min(n, config.long_tokens // long)) if long >= 2 * length else 0
        return (given + other + rows * long * (1 + len(SINKS))) / (n * length)

    def quick(self, info: ModelInfo) -> Streaming:
        if not is_large(info):
            return self
        return Streaming(replace(self.config, samples=8, other_samples=4, long_windows=4, long_tokens=512))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where decoding cannot be followed exactly, or the rows are too short for the window."""
        import pandas as pd

        info = describe(model)
        window = self.config.window or prompts.length // WINDOWS_PER_ROW
        start = first_prediction(window)
        if start > prompts.length - 2:
            raise NotApplicable(
                f"rows of {prompts.length} tokens end before position {CONTROL} is out of a window of {window}; they "
                f"need at least {start + 2} tokens"
            )
        given, other, note = _conditions(model, prompts, self.config.other_samples)
        given = given.subset(slice(0, self.config.samples)) if given.n > self.config.samples else given
        losses = decoded(model, given, window, [None, *SINKS, OTHER, *DROPPED])
        costs = costs_of(losses, window)
        added = {_name(kept): bootstrap(_late(losses, kept, start, None)) for kept in (*SINKS, OTHER)}
        metrics = _metrics(costs) | {
            f"loss_added_with_{metric_name(name)}": interval for name, interval in added.items()
        }
        notes = [
            note,
            f"a window of {window} tokens over rows of {prompts.length}; losses of the predictions made at positions "
            f"{start} to {prompts.length - 2}",
            f"loss added by the window alone {added[_name(())]}, with P0 kept {added[_name((0,))]}, with the first "
            f"{FIRST} kept {added[_name(ALL)]}, with position {CONTROL} kept {added[_name(OTHER)]}",
        ]
        if costs.ratio is None:
            notes.append(
                f"dropping another early position costs {costs.another}: not above 0 beyond doubt, so there is no ratio"
            )
        if info.positions != "rotary":
            notes.append(f"its positions are {info.positions}: they are not counted anew inside the cache")
        if model.tokenizer is None:
            notes.append("the prompts are random tokens: their losses say nothing about a use of the first token")
        for condition, rows in other.items():
            there = costs_of(decoded(model, rows, window, [ALL, *DROPPED]), window)
            metrics |= {f"{name}_{metric_name(condition)}": interval for name, interval in _metrics(there).items()}
            notes.append(f"{condition}: dropping P0 costs {there.p0}, dropping another early position {there.another}")
        tables = {
            "kept": pd.DataFrame([{"kept": name, **interval.to_json()} for name, interval in added.items()]),
            "dropped": pd.DataFrame(
                [{"dropped": place, **bootstrap(cost).to_json()} for place, cost in enumerate(costs.each)]
            ),
            "positions": _by_position(losses),
        }
        panels = {f"Rows of {prompts.length}, window {window}": tables["positions"]}
        if (long := self._long(model, given, notes)) is not None:
            tables["long_positions"] = _by_position(long)
            length = long[None].shape[1] + 1
            panels[f"Rows of {length}, window {prompts.length}"] = tables["long_positions"]
            metrics |= {
                f"long_stream_loss_with_{metric_name(_name(kept))}_beyond_{metric_name(_name(ALL))}": bootstrap(
                    _late(long, kept, length // 2, ALL)
                )
                for kept in ((), (0,), None)
            }
        figures = {"positions": _draw_positions(panels, info.title), "costs": _draw_costs(costs, added, info.title)}
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)

    def _long(self, model: HookedModel, prompts: PromptSet, notes: list[str]) -> Losses | None:
        """Step 6; None where the model's context or the text ends too early."""
        info, window = describe(model), prompts.length
        length = min(window * self.config.long_windows, info.n_ctx or 10**9)
        count = max(1, min(prompts.n, self.config.long_tokens // length))
        try:
            if length < 2 * window:
                raise P0Error(f"its context is {info.n_ctx} tokens")
            text = text_like(model, prompts, length, count)
            losses = decoded(model, text, window, [None, *SINKS])
        except P0Error as reason:
            notes.append(f"no long stream: {reason}")
            return None
        beyond = bootstrap(_late(losses, None, length // 2, ALL))
        notes.append(
            f"long stream: {count} rows of {length} tokens; in their second half full attention adds {beyond} to the "
            f"loss of a window of {window} with the first {FIRST} kept"
            + ("; the stream is longer than what the model can use" if beyond.low > 0 else "")
        )
        return losses


def decoded(model: HookedModel, prompts: PromptSet, window: int, kept: Sequence[Kept]) -> Losses:
    """The losses of the prompts decoded with each of these sets kept; None among them for full attention.

    Raises:
        NotApplicable: decoding with a cache cannot be followed exactly on this model or these prompts.
    """
    if reason := why_not_streamed(model, prompts):
        raise NotApplicable(reason)
    losses = {}
    for places in kept:
        try:
            changes = [] if places is None else [streamed(model, prompts, places, window)]
            recorded = record(model, prompts, TOKEN_LOSSES, interventions=changes)
        except InterventionError as reason:
            raise NotApplicable(str(reason)) from reason
        losses[places] = recorded.double().numpy()
    return losses


def first_prediction(window: int) -> int:
    """The first position at which all of the tokens that may be dropped have fallen out of the window."""
    return window + CONTROL + 1


def costs_of(losses: Losses, window: int) -> Costs:
    """Step 2, from the losses with the first four kept and with each of them dropped."""
    start = first_prediction(window)
    return Costs(np.stack([_late(losses, kept, start, ALL) for kept in DROPPED]))


def _late(losses: Losses, kept: Kept, start: int, beyond: Kept) -> Float[np.ndarray, " sample"]:
    """The mean loss from a position on with one set kept minus that with another."""
    return (losses[kept] - losses[beyond])[:, start:].mean(1)


def _beyond(costs: Float[np.ndarray, "draw 2"]) -> Float[np.ndarray, " draw"]:
    return costs[:, 0] - TIMES * abs(costs[:, 1])


def _conditions(model: HookedModel, prompts: PromptSet, most: int) -> tuple[PromptSet, dict[str, PromptSet], str]:
    """The prompts where their sink is (as they are, where there is none), some of them in the other condition, a note.

    The conditions are the text as it is and, where there is a BOS token, behind it.
    """
    try:
        sink = studied_sink(model, prompts, in_either_condition=True)
        condition, note = sink.condition, f"{sink.condition}; {sink.note}"
    except NotApplicable as reason:
        note = f"{reason}: here this is a control"
        condition = WITH_BOS if condition_of(model, prompts) == WITH_BOS else WITHOUT_BOS
    sets = with_and_without_bos(model, prompts)
    given = sets.pop(condition)
    return given, {name: rows.subset(slice(0, most)) for name, rows in sets.items()}, note


def _metrics(costs: Costs) -> dict[str, Interval]:
    metrics = {
        f"dropping_p0_beyond_{TIMES}_times_another": costs.beyond,
        "loss_added_by_dropping_p0": costs.p0,
        "loss_added_by_dropping_another": costs.another,
    }
    if costs.ratio is not None:
        metrics["dropping_p0_over_dropping_another"] = costs.ratio
    return metrics


def _name(kept: Kept) -> str:
    if kept is None:
        return "full attention"
    names = {(): "the window alone", (0,): "P0 kept", OTHER: f"position {CONTROL} kept"}
    return names.get(kept, f"first {len(kept)} kept")


def _by_position(losses: Losses) -> pd.DataFrame:
    """The mean loss in each eighth of the row; `tokens` is where it ends."""
    import pandas as pd

    rows = []
    for kept, values in losses.items():
        if kept is not None and kept not in SINKS:
            continue
        for part in np.array_split(np.arange(values.shape[1]), min(BINS, values.shape[1])):
            interval = bootstrap(values[:, part].mean(1))
            rows.append({"kept": _name(kept), "tokens": int(part[-1]) + 1, **interval.to_json()})
    return pd.DataFrame(rows)


def _draw_positions(panels: Mapping[str, pd.DataFrame], model: str) -> Figure:
    from p0circuit.figures.lines import sweeps

    drawn = {
        name: (series_by(table, "kept"), [str(tokens) for tokens in table["tokens"].unique()])
        for name, table in panels.items()
    }
    title = f"{model}: decoding with a window and the first tokens kept"
    return sweeps(drawn, title, ["tokens read"] * len(drawn), "loss, nats per token")


def _draw_costs(costs: Costs, added: Mapping[str, Interval], model: str) -> Figure:
    from p0circuit.figures.intervals import intervals

    dropped = {"P0" if place == 0 else f"position {place}": bootstrap(cost) for place, cost in enumerate(costs.each)}
    panels = {f"One of the first {FIRST} tokens dropped": dropped, "Window against full attention": dict(added)}
    controls = (*list(dropped)[1:], _name(OTHER))
    labels = ["loss added, nats per token"] * 2
    return intervals(panels, f"{model}: what the first token is worth", labels, controls, reference=0)
