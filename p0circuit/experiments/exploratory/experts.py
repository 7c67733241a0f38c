"""Super experts: the experts of a mixture that P0 is routed to, their output there, and the sink without them.

1. *Text* in which the model has a sink: as it is, or after BOS if the sink depends on BOS.
2. *Routing* by block: the share of rows whose P0 is routed to each expert, and the share of all other positions.
   *Experts in use*: 2 to the power of the entropy of these shares. It is the number of experts if all are used equally,
   and the number of experts per token if they are always the same. Measured at P0 and at position 8.
3. *Order*: experts by the norm of their output at P0, on the half of the samples that the sink heads were chosen on.
   Only blocks below the last sink head count, since no sink head reads the others. All later steps are measured on the
   other half.
4. *Without one expert*: its output is zero, at P0 alone or at every position. The other experts keep their weights.
5. *Without several*: the first 1, 2, 4, 8 … of the order, compared with as many random experts of the same blocks.
6. *Measured*: excess score of the sink heads, sink rate from layer 2 on, norm ratio before the first sink heads (after
   block 1 at the earliest), loss.

Random experts are drawn from all experts of a block, the first of the order included. Once all experts of a block are
removed, both sets are equal there.

Source: super experts, Su et al. 2025 (arXiv 2507.23279); Oh et al. 2024 (arXiv 2410.01866).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p0circuit import sink
from p0circuit.experiments.base import Experiment, NotApplicable, second_half
from p0circuit.experiments.sink_under_study import StudiedSink, mean_over_heads, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.experts import (
    Experts as ExpertsOutputs,
    experts_at,
    mixture_layers,
    remove_experts,
    routing,
)
from p0circuit.models import describe
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE, TOKEN_LOSSES, score_at
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS, CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FIRST_LATER_BLOCK = CIRCUIT_BLOCKS[-1] + 1
"""The first block above the two blocks of the P0 circuit."""
_AT_P0, _EVERYWHERE, _RANDOM = "at P0", "everywhere", "random ones of the same blocks"
_EXCESS, _NORM, _LOSS, _RATE = "excess_left", "norm_ratio", "loss_added", "sink_rate_from_layer_2"

Expert = tuple[int, int]
"""An expert as (block, number)."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Settings of `Experts`.

    Attributes:
        alone: maximum number of experts that are removed one by one.
        samples: maximum number of prompts to remove them on, and to find the order on.
        most: maximum number of experts that are removed together.
        draws: number of random orders.
        top: number of removed experts in the metrics.
    """

    alone: int = 12
    samples: int = 48
    most: int = 16
    draws: int = 6
    top: int = 4


class Left(NamedTuple):
    """Measurements without some experts, by sample."""

    excess: Float[np.ndarray, " sample"]
    rate: Float[np.ndarray, " sample"]
    norm: Float[np.ndarray, " sample"]
    loss: Float[np.ndarray, " sample"]


class Experts(Experiment[ExpertsConfig]):
    """The experts that P0 is routed to, and the sink without those with the largest output at P0."""

    id = "experts"
    title = "The experts of P0"
    config_type = ExpertsConfig

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare a run for each expert that is ablated alone, and for each group."""
        config, info, rows = self.config, describe(model), second_half(prompts)
        if not info.experts:
            return 0.0
        # P0 is always routed to the same few experts of a block, mostly two.
        fewer, at_p0 = min(config.samples, rows), 2 * info.n_layers
        most = min(config.most, at_p0)
        # One by one at P0 and everywhere; together likewise, and random ones.
        runs = 2 * min(config.alone, at_p0) + len(_numbers(most)) * (2 + config.draws)
        return (rows + (1 + runs) * fewer) / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure the routing of P0, and the sink without experts.

        Args:
            model: the model to measure.
            prompts: natural text.

        Raises:
            NotApplicable: the model is dense, there is no sink, or the experts' outputs do not add up to the MLP's.
        """
        import pandas as pd

        info, layers = describe(model), mixture_layers(model)
        if not layers:
            raise NotApplicable(f"{info.title} is no mixture of experts that can be taken apart")
        studied = studied_sink(model, prompts, in_either_condition=True)
        routed = routing(model, studied.prompts)
        norms = _norms(model, studied.chosen_on.subset(slice(0, self.config.samples)), layers)
        below_heads = [layer for layer in layers if layer < max(layer for layer, _ in studied.heads)]
        order = _order(norms[0], layers, below_heads)
        if not order:
            raise NotApplicable(f"{info.title} has no mixture of experts below its last sink head ({studied.note})")
        rows = studied.prompts.subset(slice(0, self.config.samples))
        # The block of the first sink heads; before block 2 the norm of P0 is not yet large.
        reader = min(info.n_layers, max(FIRST_LATER_BLOCK, min(layer for layer, _ in studied.heads)))

        def without(experts: Sequence[Expert], offset: int | None = None) -> Left:
            return _left(model, rows, studied, reader, experts, offset)

        clean = without([])
        alone = self._alone(order, clean, without)
        together = self._together(order, layers, info.experts, clean, without, prompts.seed)
        metrics = {
            "experts_in_use_at_p0": _in_use(_at(routed, studied.prompts, 0)),
            f"experts_in_use_at_position_{CONTROL}": _in_use(_at(routed, studied.prompts, CONTROL)),
            "excess": bootstrap(clean.excess),
            "norm_ratio": bootstrap(clean.norm),
            **_summary(together, min(self.config.top, together["removed"].max())),
        }
        shares = _shares(routed, studied.prompts)
        tables = {
            "routing": _routing_table(shares, norms, layers),
            "alone": alone,
            "together": together,
            "clean": pd.DataFrame([{"norm_ratio_before_block": reader, **bootstrap(clean.norm).to_json()}]),
        }
        notes = [
            studied.note,
            f"text {studied.condition}; norm ratio before block {reader}",
            f"P0 uses {metrics['experts_in_use_at_p0']} of {info.experts} experts in a block, position {CONTROL} "
            f"{metrics[f'experts_in_use_at_position_{CONTROL}']}",
            "experts by what they write at P0: "
            + "; ".join(_summary_of(line) for line in alone.head(4).to_dict("records")),
        ]
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the routing, the norms of the experts' outputs at P0, and the sink by the number of removed experts."""
        tables, name, model = result.tables, result.model_title, result.provenance["model"]
        return {
            "routing": _draw_routing(tables["routing"], model["n_layers"], model["experts"], name),
            "removed": _draw_removed(tables["together"], tables["clean"], name),
        }

    def _alone(self, order: Sequence[tuple[Expert, float]], clean: Left, without: Callable[..., Left]) -> pd.DataFrame:
        """Step 4: two rows, at P0 and everywhere, for each of the first experts."""
        import pandas as pd

        rows = []
        for (layer, number), norm in order[: self.config.alone]:
            for where, offset in ((_AT_P0, 0), (_EVERYWHERE, None)):
                left = without([(layer, number)], offset)
                line = {"layer": layer, "expert": number, "norm_at_p0": norm, "where": where}
                rows.append(line | _line(left, clean))
        return pd.DataFrame(rows)

    def _together(
        self,
        order: Sequence[tuple[Expert, float]],
        layers: Sequence[int],
        count: int,
        clean: Left,
        without: Callable[..., Left],
        seed: int,
    ) -> pd.DataFrame:
        """Step 5: a row for each number of experts and each way to choose them; random ones averaged over draws."""
        import pandas as pd

        experts = [expert for expert, _ in order][: self.config.most]
        numbers = _numbers(len(experts))
        rng = np.random.default_rng(seed)
        draws = [_random_order(experts, layers, count, rng) for _ in range(self.config.draws)]
        rows = []
        for number in numbers:
            for where, offset in ((_AT_P0, 0), (_EVERYWHERE, None)):
                rows.append({"removed": number, "which": where} | _line(without(experts[:number], offset), clean))
            lefts = [without(draw[:number]) for draw in draws]
            rows.append({"removed": number, "which": _RANDOM} | _line_over_draws(lefts, clean))
        return pd.DataFrame(rows)


def _numbers(most: int) -> list[int]:
    """Numbers of experts that are removed together: powers of two, and the maximum."""
    return sorted({2**power for power in range(20) if 2**power <= most} | {most})


def _norms(model: HookedModel, prompts: PromptSet, layers: Sequence[int]) -> Float[np.ndarray, "two layer expert"]:
    """The mean norm of each expert's output at P0, and at position 8; 0 in rows that are not routed to it."""
    norms = np.zeros((2, len(layers), describe(model).experts))

    def read(layer: int, offset: int, here: ExpertsOutputs) -> None:
        if not here.complete:
            raise NotApplicable(
                f"the routed experts of block {layer} do not add up to its MLP (a shared expert, or a norm after)"
            )
        norms[int(offset == CONTROL), layers.index(layer)] = here.written.double().norm(dim=-1).mean(0).numpy()

    experts_at(model, prompts, read, (0, CONTROL))
    return norms


def _order(
    norms: Float[np.ndarray, "layer expert"], layers: Sequence[int], below_heads: Sequence[int]
) -> list[tuple[Expert, float]]:
    """The experts of the blocks below sink heads with any output at P0, the largest norm first."""
    experts = [
        ((layer, number), float(norm))
        for layer, row in zip(layers, norms, strict=True)
        for number, norm in enumerate(row)
    ]
    return sorted((each for each in experts if each[0][0] in below_heads and each[1] > 0), key=lambda each: -each[1])


def _at(routed: Bool[Tensor, "sample pos layer expert"], prompts: PromptSet, offset: int) -> Tensor:
    return routed[torch.arange(prompts.n), prompts.p0 + offset]


def _shares(
    routed: Bool[Tensor, "sample pos layer expert"], prompts: PromptSet
) -> Float[np.ndarray, "two layer expert"]:
    """The share of rows whose P0 is routed to each expert, and that of all other positions."""
    others = prompts.attention_mask & (torch.arange(prompts.length) != prompts.p0[:, None])
    return torch.stack([_at(routed, prompts, 0).double().mean(0), routed[others].double().mean(0)]).numpy()


def _random_order(
    experts: Sequence[Expert], layers: Sequence[int], count: int, rng: np.random.Generator
) -> list[Expert]:
    """As many random experts, each of the same block as the one it replaces, none twice."""
    shuffled = {layer: iter(rng.permutation(count).tolist()) for layer in layers}
    return [(layer, next(shuffled[layer])) for layer, _ in experts]


def _left(
    model: HookedModel,
    prompts: PromptSet,
    studied: StudiedSink,
    reader: int,
    experts: Sequence[Expert],
    offset: int | None,
) -> Left:
    """Step 6 on a run without some experts."""
    ablations = [remove_experts(model, prompts, experts, offset)] if experts else []
    control = score_at(CONTROL)
    recording = record(model, prompts, [SINK_SCORE, control, NORM_RATIO, TOKEN_LOSSES], interventions=ablations)
    scores = recording[SINK_SCORE].double()
    rate = (
        sink.sink_rate(scores, from_layer=FIRST_LATER_BLOCK)
        if scores.shape[1] > FIRST_LATER_BLOCK
        else torch.full((prompts.n,), torch.nan)
    )
    return Left(
        mean_over_heads(scores - recording[control].double(), studied.heads),
        rate.double().numpy(),
        recording[NORM_RATIO][:, reader].double().numpy(),
        recording[TOKEN_LOSSES].double().nanmean(1).numpy(),
    )


def _line(left: Left, clean: Left) -> dict[str, float]:
    """The measurements as columns of a table, with the ends of their intervals over samples."""
    intervals = {
        _EXCESS: ratio_interval(left.excess, clean.excess),
        _NORM: bootstrap(left.norm),
        _LOSS: bootstrap(left.loss - clean.loss),
    }
    return _columns(intervals) | {_RATE: float(left.rate.mean())}


def _line_over_draws(lefts: Sequence[Left], clean: Left) -> dict[str, float]:
    """The same with intervals over draws."""
    intervals = {
        _EXCESS: bootstrap(np.array([left.excess.mean() for left in lefts]) / clean.excess.mean()),
        _NORM: bootstrap(np.array([left.norm.mean() for left in lefts])),
        _LOSS: bootstrap(np.array([(left.loss - clean.loss).mean() for left in lefts])),
    }
    return _columns(intervals) | {_RATE: float(np.mean([left.rate.mean() for left in lefts]))}


def _columns(intervals: dict[str, Interval]) -> dict[str, float]:
    return {
        f"{name}{end}": value
        for name, each in intervals.items()
        for end, value in (("", each.value), ("_low", each.low), ("_high", each.high), ("_n", each.n))
    }


def _in_use(routed: Bool[Tensor, "sample layer expert"]) -> Interval:
    """The number of experts in use (step 2), mean over blocks; the interval is over samples."""

    def perplexity(used: Float[np.ndarray, "draw layer expert"]) -> Float[np.ndarray, " draw"]:
        used = used / used.sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(used > 0, used * np.log2(used), 0).sum(-1)
        return (2**entropy).mean(-1)

    return bootstrap(routed.double().numpy(), perplexity)


def _summary(together: pd.DataFrame, number: int) -> dict[str, Interval]:
    """The metrics without so many experts, or without the next smaller number in the table."""
    words = {_AT_P0: "top_experts_at_p0", _EVERYWHERE: "top_experts_everywhere", _RANDOM: "random_experts"}
    metrics = {}
    for which, word in words.items():
        row = together[(together["which"] == which) & (together["removed"] <= number)].iloc[-1]
        for what in (_EXCESS, _NORM, _LOSS):
            value, low, high, n = (row[f"{what}{end}"] for end in ("", "_low", "_high", "_n"))
            metrics[f"{what}_without_{row['removed']}_{word}"] = Interval(float(value), float(low), float(high), int(n))
    return metrics


def _summary_of(line: dict[str, Any]) -> str:
    return (
        f"{line['layer']}.{line['expert']} ({line['where']}: norm {line['norm_at_p0']:.3g}, {line[_EXCESS]:.2f} of the "
        f"excess left without it, loss {line[_LOSS]:+.3f})"
    )


def _routing_table(
    shares: Float[np.ndarray, "two layer expert"], norms: Float[np.ndarray, "two layer expert"], layers: Sequence[int]
) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        [
            (layers[row], number, *shares[:, row, number], *norms[:, row, number])
            for row, number in np.ndindex(*shares.shape[1:])
        ],
        columns=["layer", "expert", "share_at_p0", "share_elsewhere", "norm_at_p0", f"norm_at_{CONTROL}"],
    )


def _draw_routing(routing: pd.DataFrame, n_layers: int, n_experts: int, model: str) -> Figure:
    from p0circuit.figures.maps import heat_maps

    columns = {
        "P0 routed to it": routing["share_at_p0"],
        "Others routed to it": routing["share_elsewhere"],
        "Norm written at P0": routing["norm_at_p0"] / max(routing["norm_at_p0"].max(), 1e-30),
    }
    # Dense blocks have a row of zeros, so that rows are layers.
    panels = {name: np.zeros((n_layers, n_experts)) for name in columns}
    for name, values in columns.items():
        panels[name][routing["layer"], routing["expert"]] = values
    return heat_maps(panels, f"{model}: the experts of P0", "share (of the largest norm)", x_label="expert")


def _draw_removed(together: pd.DataFrame, clean: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories
    from p0circuit.figures.style import Series

    reader, norm = int(clean["norm_ratio_before_block"].iloc[0]), float(clean["value"].iloc[0])
    of_clean = {_EXCESS: 1.0, _NORM: norm, _LOSS: 0.0}
    names = {
        _AT_P0: "those that write most at P0, at P0",
        _EVERYWHERE: "the same, everywhere",
        _RANDOM: "random ones of their blocks, everywhere",
    }

    def lines(column: str) -> Sequence[Series]:
        series = []
        for which, label in names.items():
            rows = together[together["which"] == which]
            ends = [[of_clean[column], *rows[f"{column}{end}"]] for end in ("", "_low", "_high")]
            series.append(Series(label, *ends))
        return series

    panels = {
        "Excess score left": lines(_EXCESS),
        f"Norm ratio before block {reader}": lines(_NORM),
        "Loss": lines(_LOSS),
    }
    labels = ["share of the whole", "P0 over median", "added, nats per token"]
    numbers = ["0", *map(str, together["removed"].unique())]
    return trajectories(panels, numbers, f"{model}: without some experts", "experts taken away", labels)
