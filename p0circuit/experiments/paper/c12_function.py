"""What is the sink good for? The loss and the spread of a perturbation without it (paper, discussion of over-mixing).

1. *The sink removed* from all sink heads, in three ways: P0 hidden from later queries (the softmax hands its share to
   the other keys), its value set to zero (attention stays as it is), or its attention moved to a random position.
2. *Control*: a random position hidden from the same heads, or its value set to zero.
3. *Loss*, in nats per token, of the same predictions in all runs: those made in the second half of each row. Random
   positions are drawn from the first half without P0, so that each of these predictions is made after them. They are
   drawn three times per sample for the control of the verdict.
4. *Over-mixing*: the token in the middle is replaced by another one. How far this reaches is the relative change
   `|x' - x| / |x|` of the stream at later positions, by block and by distance. It is measured with the sink, with P0
   hidden, and with a random position before the middle hidden; both runs of a pair have the same surgery.

Here all sink heads count, those of blocks 0 and 1 too. In text that is random tokens, there is nothing to predict.
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
from p0circuit.figures.lines import series_by
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.attention_edits import mask_key, redirect_attention, zero_value
from p0circuit.interventions.intervention import Intervention
from p0circuit.models import ModelInfo, describe
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
_MASKED, _ZEROED, _MOVED = "P0 hidden", "P0's value zeroed", "sink moved"
_MASKED_BESIDE, _ZEROED_BESIDE = "random hidden", "random value zeroed"
_CLEAN = "with the sink"
_CHANGED, _OVER = "relative change", "over with the sink"


@dataclass(frozen=True)
class FunctionConfig:
    """`draws` of random positions to hide per sample; `spread_samples` rows are perturbed."""

    draws: int = 3
    spread_samples: int = 256


class Function(Experiment[FunctionConfig]):
    """The loss without the sink, and how far a perturbed token spreads with and without it."""

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
        rows, config = second_half(prompts), self.config
        # P0 or a random position hidden, either value zeroed, attention moved; then pairs of rows in three runs.
        return ((config.draws + 4) * rows + 3 * 2 * min(rows, config.spread_samples)) / prompts.n

    def quick(self, info: ModelInfo) -> Function:
        return Function(replace(self.config, spread_samples=8)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        return self.measure_on(studied_sink(model, prompts))

    def measure_on(self, found: StudiedSink) -> Result:
        """The measurement on sink heads that have been found.

        Raises:
            NotApplicable: rows are padded or too short, or the attention cannot be edited.
        """
        import pandas as pd

        model = found.model
        prompts = found.prompts
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("needs rows without padding: the halves of padded rows are not the same positions")
        require_attention(model)
        if prompts.length < SHORTEST:
            raise NotApplicable(f"needs rows of at least {SHORTEST} tokens, got {prompts.length}")
        added = self._losses_added(model, found)
        beyond = bootstrap(added[_MASKED] - added[_MASKED_BESIDE])
        intervals = {name: bootstrap(values) for name, values in added.items()}
        spread = self._spread(model, found)
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
            found.note,
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
        name = describe(model).title
        figures = {
            "losses": _draw_losses(intervals, name),
            "blocks": _draw_spread(tables["spread_by_block"], "after_block", "after block", name),
            "distances": _draw_spread(tables["spread_by_distance"], "distance", "tokens after the changed one", name),
        }
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)

    def _losses_added(self, model: HookedModel, found: StudiedSink) -> dict[str, np.ndarray]:
        """The loss of each sample with surgery minus that without, over the same predictions."""
        prompts, names = found.prompts, found.names
        half = prompts.length // 2
        places = [random_offsets(prompts.n, prompts.seed + draw, 1, half) for draw in range(1, self.config.draws + 1)]

        def loss(*interventions: Intervention) -> np.ndarray:
            losses = record(model, prompts, TOKEN_LOSSES, interventions=interventions)
            return losses[:, half:].double().mean(1).numpy()

        clean = loss()
        hidden = [loss(mask_key(model, prompts, names, place)) for place in places]
        return {
            _MASKED: loss(mask_key(model, prompts, names)) - clean,
            _MASKED_BESIDE: np.mean(hidden, axis=0) - clean,
            _ZEROED: loss(zero_value(model, prompts, names)) - clean,
            _ZEROED_BESIDE: loss(zero_value(model, prompts, names, places[0])) - clean,
            _MOVED: loss(redirect_attention(model, prompts, names, places[0])) - clean,
        }

    def _spread(
        self, model: HookedModel, found: StudiedSink
    ) -> dict[str, Float[np.ndarray, "sample layers_and_one later"]]:
        """The relative change of the stream after the middle, where the token in the middle is another one."""
        prompts = found.prompts.subset(slice(0, self.config.spread_samples))
        middle = prompts.length // 2
        pairs = _pairs(prompts, middle)
        place = random_offsets(prompts.n, prompts.seed + 1, 1, middle).repeat_interleave(2)
        hidden = {
            _CLEAN: [],
            _MASKED: [mask_key(model, pairs, found.names)],
            _MASKED_BESIDE: [mask_key(model, pairs, found.names, place)],
        }
        quantity = relative_change_after(middle)
        # The rows of a pair must meet in one batch.
        size = max(2, batch_size_for(model, pairs.length, with_logits=False) // 2 * 2)
        return {
            name: record(model, pairs, quantity, size, interventions=change)[::2].double().numpy()
            for name, change in hidden.items()
        }


def _times(ratio: Interval) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times"


def _pairs(prompts: PromptSet, place: int) -> PromptSet:
    """Every row twice, the second time with another sample's token at one position."""
    column = prompts.ids[:, place]
    ids = prompts.ids.repeat_interleave(2, dim=0)
    ids[1::2, place] = column[row_of_another_token(column)]
    description = {**prompts.description, "pairs_that_differ_at": place}
    return replace(
        prompts, ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool), description=description, overflow=None
    )


def _relative_change(residual: Tensor, batch: Batch, start: int) -> Tensor:
    """How much the second row of each pair differs from the first after position `start`, given to both rows."""
    later = residual[:, start + 1 :].float()
    change = (later[1::2] - later[::2]).norm(dim=-1) / later[::2].norm(dim=-1)
    return change.repeat_interleave(2, dim=0)


def relative_change_after(start: int) -> Quantity:
    """[sample, layer + 1, later position]: `|x' - x| / |x|` of the stream, rows 2 i and 2 i + 1 making a pair."""
    reduce = functools.partial(_relative_change, start=start)
    return Quantity(f"relative_change_after_{start}", ("resid",), reduce, "residual", by_row=False)


def _table(spread: dict[str, dict[str, np.ndarray]], column: str) -> pd.DataFrame:
    """The mean change in every run by block or distance, and over that with the sink where there is any.

    `spread` holds one number per sample, by place and run.
    """
    import pandas as pd

    rows = []
    for place, runs in spread.items():
        with_sink = runs[_CLEAN]
        for name, values in runs.items():
            measured = {_CHANGED: bootstrap(values)}
            if with_sink.any():
                measured[_OVER] = ratio_interval(values, with_sink)
            for what, interval in measured.items():
                rows.append({"measured": what, "run": name, column: place, **interval.to_json()})
    return pd.DataFrame(rows)


def _by_block(spread: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The mean over later positions; the embedding is left out, as nothing changes there."""
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
    return trajectories(panels, table[column].unique().tolist(), title, x_label, labels)
