"""C17: decoding with a sliding window, with and without the first tokens in the cache.

1. *Decoding.* Each query attends to the last W tokens and to the sink tokens in the cache, with rotary positions
   counted inside the cache (`interventions.sliding_window`): no sink tokens, the first 1, 2 or 4; and full attention
   for comparison. W is a quarter of the rows unless it is given. *Control*: position 8 is in the cache instead of P0.
2. *What a token is worth.* The loss with one of the first four tokens dropped minus the loss with all four in the
   cache: for P0, and on average for the other three. All caches have one size, and none of the other three tokens is
   P0.
3. *The threshold.* The cost of dropping P0 minus five times the cost of dropping another token has to be above 0 with
   its whole interval. The other cost counts with its absolute value: where dropping another token changes next to
   nothing, its sign is noise, and a gain must not look like a large ratio. The ratio is reported where the other cost
   is above 0 with its whole interval.
4. *Losses*, in nats per token, of the same predictions in all runs: those made where all of the first nine tokens are
   outside the window.
5. *Where the sink is*: on the text as it is, or after BOS if the sink is only there (the first four tokens are then BOS
   and three of the text). The costs are measured in the other condition, too.
6. *A long stream*, with the length of the prompts as its window: new text of the same kind, eight times as long. The
   loss of full attention there depends on the lengths that the model was trained on, which are not always known.

A model without a sink is measured like any other: its first token should be worth as little as the next ones. Source:
Xiao et al. 2023, arXiv 2309.17453 (attention sinks; sections 3.1 and 3.2).
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

SinkTokens = tuple[int, ...] | None
"""Positions that stay in the cache with the window; None for full attention."""
Losses = Mapping[SinkTokens, Float[np.ndarray, "sample pos"]]
"""The loss of every prediction by the sink tokens: that of the next token, made at each position but the last."""

FIRST = 4
"""Maximum number of first tokens in the cache; they are dropped one at a time."""
TIMES = 5
"""Dropping P0 has to cost more than this many times what dropping another token costs."""
SINKS: tuple[SinkTokens, ...] = ((), (0,), (0, 1), (0, 1, 2, 3))
OTHER: SinkTokens = (CONTROL,)
ALL: SinkTokens = tuple(range(FIRST))
DROPPED: tuple[SinkTokens, ...] = tuple(
    tuple(position for position in range(FIRST) if position != dropped) for dropped in range(FIRST)
)
WINDOWS_PER_ROW = 4
BINS = 8


@dataclass(frozen=True)
class StreamingConfig:
    """Settings of `Streaming`.

    Attributes:
        window: tokens in the window; None for a quarter of the rows.
        samples: maximum number of prompts.
        other_samples: maximum number of prompts in the other condition.
        long_windows: length of the long stream, in multiples of the prompts' length.
        long_tokens: tokens of the long stream in all rows together, which sets the number of rows.
    """

    window: int | None = None
    samples: int = 10**9
    other_samples: int = 128
    long_windows: int = 8
    long_tokens: int = 8_192

    def window_of(self, length: int) -> int:
        """Return the window for rows of this length, in tokens.

        Args:
            length: tokens in a row.
        """
        return self.window or length // WINDOWS_PER_ROW


@dataclass(frozen=True)
class Costs:
    """What it costs to drop one of the first tokens from the cache, in nats per token of each sample.

    Attributes:
        each: costs by position.
    """

    each: Float[np.ndarray, "first sample"]

    @property
    def p0(self) -> Interval:
        """The cost of dropping P0."""
        return bootstrap(self.each[0])

    @property
    def another(self) -> Interval:
        """The cost of dropping another first token, mean over them."""
        return bootstrap(self.each[1:].mean(0))

    @property
    def beyond(self) -> Interval:
        """The cost of dropping P0 minus five times the absolute cost of dropping another token."""
        return bootstrap(np.stack([self.each[0], self.each[1:].mean(0)], axis=1), _beyond)

    @property
    def ratio(self) -> Interval | None:
        """The cost of dropping P0 over that of another token; None if the latter is not above 0 beyond doubt."""
        return ratio_interval(self.each[0], self.each[1:].mean(0)) if self.another.low > 0 else None


class Streaming(Experiment[StreamingConfig]):
    """The loss of decoding with a sliding window, with and without the first tokens in the cache."""

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
        """Declare the decoding runs in both conditions and of the long stream."""
        config, n, length, info = self.config, prompts.n, prompts.length, describe(model)
        given = min(n, config.samples) * length * (len(SINKS) + 1 + len(DROPPED))
        other = min(n, config.other_samples) * length * (1 + len(DROPPED)) if bos_id(model) is not None else 0
        long = min(length * config.long_windows, info.n_ctx or 10**9)
        rows = max(1, min(n, config.long_tokens // long)) if long >= 2 * length else 0
        return (given + other + rows * long * (1 + len(SINKS))) / (n * length)

    def quick(self, info: ModelInfo) -> Streaming:
        """Return a version for large models with fewer samples and a shorter stream."""
        if not is_large(info):
            return self
        return Streaming(replace(self.config, samples=8, other_samples=4, long_windows=4, long_tokens=512))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Decode with every set of sink tokens, in both conditions, and a long stream.

        Raises:
            NotApplicable: decoding cannot be computed exactly, or the rows are too short for the window.
        """
        import pandas as pd

        info = describe(model)
        window = self.config.window_of(prompts.length)
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
        added = {_name(sinks): bootstrap(_late(losses, sinks, start, None)) for sinks in (*SINKS, OTHER)}
        metrics = _metrics(costs) | {
            f"loss_added_with_{metric_name(name)}": interval for name, interval in added.items()
        }
        notes = [
            note,
            f"a window of {window} tokens over rows of {prompts.length}; losses of the predictions made at positions "
            f"{start} to {prompts.length - 2}",
            f"loss added by the window alone {added[_name(())]}, with P0 in the cache {added[_name((0,))]}, with the "
            f"first {FIRST} {added[_name(ALL)]}, with position {CONTROL} {added[_name(OTHER)]}",
        ]
        if costs.ratio is None:
            notes.append(
                f"dropping another early position costs {costs.another}: not above 0 beyond doubt, so there is no ratio"
            )
        if info.positions != "rotary":
            notes.append(f"the positions of this model are {info.positions}: they are not counted inside the cache")
        if model.tokenizer is None:
            notes.append("the prompts are random tokens: their losses do not show whether the first token is of use")
        for condition, rows in other.items():
            there = costs_of(decoded(model, rows, window, [ALL, *DROPPED]), window)
            metrics |= {f"{name}_{metric_name(condition)}": interval for name, interval in _metrics(there).items()}
            notes.append(f"{condition}: dropping P0 costs {there.p0}, dropping another early position {there.another}")
        tables = {
            "kept": pd.DataFrame([{"kept": name, **interval.to_json()} for name, interval in added.items()]),
            "dropped": pd.DataFrame(
                [{"dropped": position, **bootstrap(cost).to_json()} for position, cost in enumerate(costs.each)]
            ),
            "positions": _by_position(losses),
        }
        if (long := self._long(model, given, notes)) is not None:
            tables["long_positions"] = _by_position(long)
            half = (long[None].shape[1] + 1) // 2
            metrics |= {
                f"long_stream_loss_with_{metric_name(_name(sinks))}_beyond_{metric_name(_name(ALL))}": bootstrap(
                    _late(long, sinks, half, ALL)
                )
                for sinks in ((), (0,), None)
            }
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the loss along the rows, and the cost of dropping each of the first tokens."""
        length = result.provenance["length"]
        tables = {f"Rows of {length}, window {self.config.window_of(length)}": result.tables["positions"]}
        if (long := result.tables.get("long_positions")) is not None:
            # The last prediction is made one token before the end.
            tables[f"Rows of {long['tokens'].max() + 1}, window {length}"] = long
        return {"positions": _draw_positions(tables, result.model_title), "costs": _draw_costs(result)}

    def _long(self, model: HookedModel, prompts: PromptSet, notes: list[str]) -> Losses | None:
        """Step 6; None if the model's context or the text is too short."""
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
            f"loss of a window of {window} with the first {FIRST} in the cache"
            + ("; the stream is longer than the model can use" if beyond.low > 0 else "")
        )
        return losses


def decoded(model: HookedModel, prompts: PromptSet, window: int, sets: Sequence[SinkTokens]) -> Losses:
    """Measure the losses of the prompts, decoded with every set of sink tokens.

    Args:
        model: the model.
        prompts: prompts to decode.
        window: tokens in the window.
        sets: sets of sink tokens; None among them for full attention.

    Raises:
        NotApplicable: decoding with a cache cannot be computed exactly on this model or these prompts.
    """
    if reason := why_not_streamed(model, prompts):
        raise NotApplicable(reason)
    losses = {}
    for positions in sets:
        try:
            edits = [] if positions is None else [streamed(model, prompts, positions, window)]
            losses[positions] = record(model, prompts, TOKEN_LOSSES, interventions=edits).double().numpy()
        except InterventionError as reason:
            raise NotApplicable(str(reason)) from reason
    return losses


def first_prediction(window: int) -> int:
    """Return the first position at which all tokens that may be dropped are outside the window.

    Args:
        window: tokens in the window.
    """
    return window + CONTROL + 1


def costs_of(losses: Losses, window: int) -> Costs:
    """Return the cost of dropping each of the first tokens (step 2).

    Args:
        losses: with the first four tokens in the cache, and with each of them dropped.
        window: tokens in the window.
    """
    start = first_prediction(window)
    return Costs(np.stack([_late(losses, sinks, start, ALL) for sinks in DROPPED]))


def _late(losses: Losses, sinks: SinkTokens, start: int, base: SinkTokens) -> Float[np.ndarray, " sample"]:
    """The mean loss from a position on with one set of sink tokens minus that with another set."""
    return (losses[sinks] - losses[base])[:, start:].mean(1)


def _beyond(costs: Float[np.ndarray, "draw 2"]) -> Float[np.ndarray, " draw"]:
    return costs[:, 0] - TIMES * abs(costs[:, 1])


def _conditions(model: HookedModel, prompts: PromptSet, most: int) -> tuple[PromptSet, dict[str, PromptSet], str]:
    """The prompts in the condition that has the sink, `most` of them in the other condition, and a note.

    The conditions are the text as it is and, if there is a BOS token, after BOS. Without a sink in either, the prompts
    stay as they are.
    """
    try:
        sink = studied_sink(model, prompts, in_either_condition=True)
        condition, note = sink.condition, f"{sink.condition}; {sink.note}"
    except NotApplicable as reason:
        note = f"{reason}: so this measurement is a control"
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


def _name(sinks: SinkTokens) -> str:
    if sinks is None:
        return "full attention"
    names = {(): "the window alone", (0,): "P0 kept", OTHER: f"position {CONTROL} kept"}
    return names.get(sinks, f"first {len(sinks)} kept")


def _by_position(losses: Losses) -> pd.DataFrame:
    """The mean loss in each eighth of the row; `tokens` is the number of tokens up to its end."""
    import pandas as pd

    rows = []
    for sinks, values in losses.items():
        if sinks is not None and sinks not in SINKS:
            continue
        for part in np.array_split(np.arange(values.shape[1]), min(BINS, values.shape[1])):
            interval = bootstrap(values[:, part].mean(1))
            rows.append({"kept": _name(sinks), "tokens": int(part[-1]) + 1, **interval.to_json()})
    return pd.DataFrame(rows)


def _draw_positions(tables: Mapping[str, pd.DataFrame], model: str) -> Figure:
    from p0circuit.figures.lines import series_by, sweeps

    panels = {
        name: (series_by(table, "kept"), [str(tokens) for tokens in table["tokens"].unique()])
        for name, table in tables.items()
    }
    title = f"{model}: decoding with a window and the first tokens in the cache"
    return sweeps(panels, title, ["tokens read"] * len(panels), "loss, nats per token")


def _draw_costs(result: Result) -> Figure:
    from p0circuit.figures.intervals import intervals, intervals_by

    dropped = {
        "P0" if position == "0" else f"position {position}": cost
        for position, cost in intervals_by(result.tables["dropped"], "dropped").items()
    }
    panels = {
        f"One of the first {FIRST} tokens dropped": dropped,
        "Window against full attention": intervals_by(result.tables["kept"], "kept"),
    }
    controls = (*list(dropped)[1:], _name(OTHER))
    title = f"{result.model_title}: what the first token is worth"
    return intervals(panels, title, ["loss added, nats per token"] * 2, controls, reference=0)
