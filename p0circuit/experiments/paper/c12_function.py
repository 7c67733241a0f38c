"""The function of the sink: the loss and the spread of a perturbation without it (C12; paper, on over-mixing).

1. *The sink removed* from all sink heads, in three ways: P0's key masked for later queries (the softmax gives its share
   to the other keys), its value set to zero (attention does not change), or its attention moved to a random position.
2. *Control*: the key of a random position masked in the same heads, or its value set to zero.
3. *Loss*, in nats per token, of the predictions made in the second half of each row. Random positions are drawn from
   the first half without P0, so all of these predictions are made after them. The control of the verdict is the mean of
   three draws per sample.
4. *Over-mixing*: the token in the middle of the row is replaced. The measure is the relative change `|x' - x| / |x|` of
   the stream at later positions, by block and by distance. It is measured with the sink, with P0 masked, and with a
   random position before the middle masked; both runs of a pair have the same intervention.

All sink heads count, those of blocks 0 and 1 too. Random tokens cannot be predicted, so on them losses mean nothing.
Source: Peng et al., arXiv 2603.06591; that the sink guards against over-mixing: Barbero et al. 2025, arXiv 2504.02732.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import StudiedSink, studied_sink
from p0circuit.experiments.surgery import random_offsets, require_attention, row_of_another_token
from p0circuit.figures.intervals import intervals_by
from p0circuit.figures.lines import series_by
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.attention_edits import mask_key, redirect_attention, zero_value
from p0circuit.interventions.intervention import Intervention
from p0circuit.models import ModelInfo
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.recording.quantities import TOKEN_LOSSES, Batch, Quantity
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHORTEST = 8
"""Minimum length of the prompts, in tokens."""
_MASKED, _ZEROED, _MOVED = "P0 hidden", "P0's value zeroed", "sink moved"
_MASKED_BESIDE, _ZEROED_BESIDE = "random hidden", "random value zeroed"
_CLEAN = "with the sink"
_CHANGED, _OVER = "relative change", "over with the sink"


@dataclass(frozen=True)
class FunctionConfig:
    """Settings of `Function`.

    Attributes:
        draws: random positions to mask per sample.
        spread_samples: maximum number of prompts that are perturbed.
    """

    draws: int = 3
    spread_samples: int = 256


class Function(Experiment[FunctionConfig]):
    """The loss without the sink, and how far a change of one token spreads with and without it."""

    id = "function"
    title = "What the sink does"
    config_type = FunctionConfig
    claim = Claim(
        id="C12",
        title="Function",
        source="Peng et al., arXiv 2603.06591; over-mixing: Barbero et al. 2025, arXiv 2504.02732",
        statement="The sink is of use to the model: without it the loss is higher, more than without some other "
        "position.",
        measure="Loss of the predictions in the second half of each row with P0 hidden from later queries of the sink "
        "heads, minus that of the clean run, and minus that with a random position of the first half hidden.",
        criteria=(
            Criterion("loss_added_by_hiding_p0", ">", 0, "low"),
            Criterion("loss_added_by_hiding_p0_beyond_random", ">", 0, "low"),
        ),
        control="A random position hidden from the same heads.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the runs with P0 or another position hidden, and the spread of a changed token."""
        rows, config = second_half(prompts), self.config
        # P0 or a random position masked, either value zeroed, attention moved; then pairs of rows in three runs.
        return ((config.draws + 4) * rows + 3 * 2 * min(rows, config.spread_samples)) / prompts.n

    def quick(self, info: ModelInfo) -> Function:
        """Return a version for large models with fewer samples for the spread."""
        return Function(replace(self.config, spread_samples=8)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure on all sink heads; see `measure_on`."""
        return self.measure_on(studied_sink(model, prompts))

    def measure_on(self, sink: StudiedSink) -> Result:
        """Measure a sink whose heads are known.

        Args:
            sink: the sink.

        Raises:
            NotApplicable: rows are padded or too short, or the attention cannot be edited.
        """
        import pandas as pd

        model = sink.model
        prompts = sink.prompts
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("needs rows without padding: the halves of padded rows are not the same positions")
        require_attention(model)
        if prompts.length < SHORTEST:
            raise NotApplicable(f"needs rows of at least {SHORTEST} tokens, got {prompts.length}")
        added = self._losses_added(model, sink)
        beyond = bootstrap(added[_MASKED] - added[_MASKED_BESIDE])
        intervals = {name: bootstrap(values) for name, values in added.items()}
        spread = self._spread(model, sink)
        reached = {name: values[:, -1].mean(1) for name, values in spread.items()}
        metrics = {
            "loss_added_by_hiding_p0": intervals[_MASKED],
            "loss_added_by_hiding_p0_beyond_random": beyond,
            "loss_added_by_hiding_a_random_position": intervals[_MASKED_BESIDE],
            "loss_added_by_zeroing_p0_value": intervals[_ZEROED],
            "loss_added_by_zeroing_a_random_value": intervals[_ZEROED_BESIDE],
            "loss_added_by_moving_the_sink": intervals[_MOVED],
            "spread_with_p0_hidden_over_with_sink": ratio_interval(reached[_MASKED], reached[_CLEAN]),
            "spread_with_random_hidden_over_with_sink": ratio_interval(reached[_MASKED_BESIDE], reached[_CLEAN]),
        }
        tables = {
            "losses": pd.DataFrame([{"removed": name} | each.to_json() for name, each in intervals.items()]),
            "spread_by_block": _table(_by_block(spread), "after_block"),
            "spread_by_distance": _table(_by_distance(spread), "distance"),
        }
        start, stop = prompts.length // 2, prompts.length - 2
        notes = [
            sink.note,
            f"losses of the predictions made at positions {start} to {stop}; the perturbed token is at {start}",
            f"loss added in nats per token: {intervals[_MASKED]} with P0 hidden, {intervals[_MASKED_BESIDE]} with a "
            f"random position hidden, {intervals[_ZEROED]} with P0's value zeroed (attention as it was), "
            f"{intervals[_MOVED]} with P0's attention given to a random position",
            "a changed token changes later positions after the last block "
            f"{_times(metrics['spread_with_p0_hidden_over_with_sink'])} as much with P0 hidden, and "
            f"{_times(metrics['spread_with_random_hidden_over_with_sink'])} with a random position hidden",
        ]
        if getattr(model, "tokenizer", None) is None:
            notes.append("the prompts are random tokens: their losses say nothing about a use of the sink")
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the losses added, and the relative change of the stream by block and by distance."""
        tables, name = result.tables, result.model_title
        return {
            "losses": _draw_losses(intervals_by(tables["losses"], "removed"), name),
            "blocks": _draw_spread(tables["spread_by_block"], "after_block", "after block", name),
            "distances": _draw_spread(tables["spread_by_distance"], "distance", "tokens after the changed one", name),
        }

    def _losses_added(self, model: HookedModel, sink: StudiedSink) -> dict[str, np.ndarray]:
        """The loss of each sample under each intervention minus that of the clean run, over the same predictions."""
        prompts, names = sink.prompts, sink.names
        half = prompts.length // 2
        positions = [
            random_offsets(prompts.n, prompts.seed + draw, 1, half) for draw in range(1, self.config.draws + 1)
        ]

        def loss(*interventions: Intervention) -> np.ndarray:
            losses = record(model, prompts, TOKEN_LOSSES, interventions=interventions)
            return losses[:, half:].double().mean(1).numpy()

        clean = loss()
        masked = [loss(mask_key(model, prompts, names, position)) for position in positions]
        return {
            _MASKED: loss(mask_key(model, prompts, names)) - clean,
            _MASKED_BESIDE: np.mean(masked, axis=0) - clean,
            _ZEROED: loss(zero_value(model, prompts, names)) - clean,
            _ZEROED_BESIDE: loss(zero_value(model, prompts, names, positions[0])) - clean,
            _MOVED: loss(redirect_attention(model, prompts, names, positions[0])) - clean,
        }

    def _spread(
        self, model: HookedModel, sink: StudiedSink
    ) -> dict[str, Float[np.ndarray, "sample layers_and_one later"]]:
        """The relative change of the stream at positions after the middle when the token in the middle is replaced."""
        prompts = sink.prompts.subset(slice(0, self.config.spread_samples))
        middle = prompts.length // 2
        pairs = _pairs(prompts, middle)
        position = random_offsets(prompts.n, prompts.seed + 1, 1, middle).repeat_interleave(2)
        runs = {
            _CLEAN: [],
            _MASKED: [mask_key(model, pairs, sink.names)],
            _MASKED_BESIDE: [mask_key(model, pairs, sink.names, position)],
        }
        quantity = relative_change_after(middle)
        # Both rows of a pair must be in one batch.
        size = max(2, batch_size_for(model, pairs.length, with_logits=False) // 2 * 2)
        return {
            name: record(model, pairs, quantity, size, interventions=interventions)[::2].double().numpy()
            for name, interventions in runs.items()
        }


def _times(ratio: Interval) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times"


def _pairs(prompts: PromptSet, position: int) -> PromptSet:
    """Every row twice, the second time with another sample's token at one position."""
    column = prompts.ids[:, position]
    ids = prompts.ids.repeat_interleave(2, dim=0)
    ids[1::2, position] = column[row_of_another_token(column)]
    description = {**prompts.description, "pairs_that_differ_at": position}
    return replace(
        prompts, ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool), description=description, overflow=None
    )


def _relative_change(residual: Tensor, batch: Batch, start: int) -> Tensor:
    """The relative difference between the rows of each pair at the positions after `start`, repeated for both rows."""
    later = residual[:, start + 1 :].float()
    change = (later[1::2] - later[::2]).norm(dim=-1) / later[::2].norm(dim=-1)
    return change.repeat_interleave(2, dim=0)


def relative_change_after(start: int) -> Quantity:
    """Return the quantity `|x' - x| / |x|` of the stream, [sample, layer + 1, later position].

    Rows 2 i and 2 i + 1 are a pair: the same prompt with another token at position `start`.

    Args:
        start: position of the replaced token.
    """
    reduce = functools.partial(_relative_change, start=start)
    return Quantity(f"relative_change_after_{start}", ("resid",), reduce, "residual", by_row=False)


def _table(spread: dict[str, dict[str, np.ndarray]], column: str) -> pd.DataFrame:
    """The mean change of every run by block or distance, and its ratio to the run with the sink where that is not 0.

    `spread` holds one number per sample, by block or distance and by run.
    """
    import pandas as pd

    rows = []
    for label, runs in spread.items():
        with_sink = runs[_CLEAN]
        for name, values in runs.items():
            measured = {_CHANGED: bootstrap(values)}
            if with_sink.any():
                measured[_OVER] = ratio_interval(values, with_sink)
            for quantity, interval in measured.items():
                rows.append({"measured": quantity, "run": name, column: label, **interval.to_json()})
    return pd.DataFrame(rows)


def _by_block(spread: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The mean over later positions, after each block; the embeddings there do not change."""
    layers = next(iter(spread.values())).shape[1]
    return {
        str(layer - 1): {name: values[:, layer].mean(1) for name, values in spread.items()}
        for layer in range(1, layers)
    }


def _by_distance(spread: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """After the last block; distances 1, 2-3, 4-7, 8-15 and so on."""
    last = next(iter(spread.values())).shape[2]
    groups = {}
    for start in (2**power for power in range(last.bit_length())):
        stop = min(2 * start - 1, last)
        label = str(start) if start == stop else f"{start}-{stop}"
        groups[label] = {name: values[:, -1, start - 1 : stop].mean(1) for name, values in spread.items()}
    return groups


def _draw_losses(losses: dict[str, Interval], model: str) -> Figure:
    from p0circuit.figures.intervals import intervals

    title = f"{model}: the sink removed from its heads"
    return intervals(
        {"Loss added": losses}, title, ["nats per token"], controls=(_MASKED_BESIDE, _ZEROED_BESIDE), reference=0
    )


def _draw_spread(table: pd.DataFrame, column: str, x_label: str, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    names = {_CHANGED: "Relative change", _OVER: "Over that with the sink"}
    parts = {name: table.loc[table["measured"] == measured] for measured, name in names.items()}
    panels = {name: series_by(part, "run") for name, part in parts.items() if len(part)}
    title = f"{model}: how far a changed token reaches"
    labels = ["|x' - x| / |x|", "ratio"][: len(panels)]
    return trajectories(panels, table[column].astype(str).unique().tolist(), title, x_label, labels)
