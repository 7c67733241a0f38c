"""Super experts: which experts of a mixture P0 is routed to, what they write there, and what goes without them.

1. *Text* in which the model has a sink: as it is, or behind BOS if the sink hangs on that.
2. *Routing*, block by block: the share of rows whose P0 is routed to each expert, beside the share of all other
   positions. *Experts in use*: 2 to the power of the entropy of these shares, all of them if none is preferred, as many
   as a token is given if they are always the same; at P0, and for as many rows at position 8.
3. *Order*: experts by the norm of what they write at P0, on the half of the samples that the sink heads were chosen
   on; those of blocks below the last sink head, as no sink head hears the others. All below is measured on the other
   half.
4. *Without one expert*: its output is zero, at P0 alone or at every position. The experts beside it keep their weights.
5. *Without several*: the first 1, 2, 4, 8 … of the order, against as many random ones in the same blocks.
6. *What is left*: excess score of the sink heads, sink rate from layer 2 on, norm ratio before the first sink heads
   (after block 1 at the earliest), loss.

A random expert may be one of the first as well: it is drawn from all of its block. Once all experts of a block are
gone, in either order, the two are the same there.

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
from p0circuit.interventions.experts import experts_at, mixture_layers, remove_experts, routing
from p0circuit.models import ModelInfo, describe
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
"""The first block above those in which the paper has the sink decided."""
_AT_P0, _EVERYWHERE, _RANDOM = "at P0", "everywhere", "random ones of the same blocks"
_EXCESS, _NORM, _LOSS, _RATE = "excess_left", "norm_ratio", "loss_added", "sink_rate_from_layer_2"

Expert = tuple[int, int]
"""Its block and its number."""


@dataclass(frozen=True)
class ExpertsConfig:
    """`alone`: experts taken away one by one; `samples`: rows to do so on, and to find the order on.

    At most `most` experts are taken away together; `draws`: random orders beside theirs. `top` of them are told of
    among the metrics.
    """

    alone: int = 12
    samples: int = 48
    most: int = 16
    draws: int = 6
    top: int = 4


class Left(NamedTuple):
    """What is left of a run, by sample."""

    excess: Float[np.ndarray, " sample"]
    rate: Float[np.ndarray, " sample"]
    norm: Float[np.ndarray, " sample"]
    loss: Float[np.ndarray, " sample"]


class Experts(Experiment[ExpertsConfig]):
    """Which experts P0 is routed to, and the sink without those that write most at P0, one by one and together."""

    id = "experts"
    title = "The experts of P0"
    config_type = ExpertsConfig

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        config, info, rows = self.config, describe(model), second_half(prompts)
        if not info.experts:
            return 0.0
        # P0 is always routed to the same few experts of a block, mostly two.
        few, at_p0 = min(config.samples, rows), 2 * info.n_layers
        most = min(config.most, at_p0)
        # One by one at P0 and everywhere; together likewise, and random ones.
        runs = 2 * min(config.alone, at_p0) + len(_numbers(most)) * (2 + config.draws)
        return (rows + (1 + runs) * few) / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable on a dense model, where there is no sink, and where experts do not add up."""
        info, layers = describe(model), mixture_layers(model)
        if not layers:
            raise NotApplicable(f"{info.title} is no mixture of experts that can be taken apart")
        found = studied_sink(model, prompts, in_either_condition=True)
        routed = routing(model, found.prompts)
        norms = _norms(model, found.chosen_on.subset(slice(0, self.config.samples)), layers)
        heard = [layer for layer in layers if layer < max(layer for layer, _ in found.heads)]
        order = _order(norms[0], layers, heard)
        if not order:
            raise NotApplicable(f"{info.title} has no mixture of experts below its last sink head ({found.note})")
        few = found.prompts.subset(slice(0, self.config.samples))
        # Where the sink heads read; those of blocks 0 and 1 read before there is a norm to speak of.
        reader = min(info.n_layers, max(FIRST_LATER_BLOCK, min(layer for layer, _ in found.heads)))

        def without(experts: Sequence[Expert], offset: int | None = None) -> Left:
            return _left(model, few, found, reader, experts, offset)

        clean = without([])
        alone = self._alone(order, clean, without)
        together = self._together(order, layers, info.experts, clean, without, prompts.seed)
        metrics = {
            "experts_in_use_at_p0": _in_use(_at(routed, found.prompts, 0)),
            f"experts_in_use_at_position_{CONTROL}": _in_use(_at(routed, found.prompts, CONTROL)),
            "excess": bootstrap(clean.excess),
            "norm_ratio": bootstrap(clean.norm),
            **_summary(together, min(self.config.top, together["removed"].max())),
        }
        shares = _shares(routed, found.prompts)
        tables = {"routing": _routing_table(shares, norms, layers), "alone": alone, "together": together}
        notes = [
            found.note,
            f"text {found.condition}; norm ratio before block {reader}",
            f"P0 uses {metrics['experts_in_use_at_p0']} of {info.experts} experts in a block, position {CONTROL} "
            f"{metrics[f'experts_in_use_at_position_{CONTROL}']}",
            "experts by what they write at P0: " + "; ".join(_told(line) for line in alone.head(4).to_dict("records")),
        ]
        figures = {
            "routing": _draw_routing(shares, norms[0], layers, info),
            "removed": _draw_removed(together, clean, reader, info.title),
        }
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)

    def _alone(self, order: Sequence[tuple[Expert, float]], clean: Left, without: Callable[..., Left]) -> pd.DataFrame:
        """Step 4: two lines, at P0 and everywhere, for each of the first experts."""
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
        """Step 5: a line for each number of experts and way to choose them; random ones averaged over their draws."""
        import pandas as pd

        experts = [expert for expert, _ in order][: self.config.most]
        numbers = _numbers(len(experts))
        rng = np.random.default_rng(seed)
        draws = [_random_order(experts, layers, count, rng) for _ in range(self.config.draws)]
        rows = []
        for number in numbers:
            for where, offset in ((_AT_P0, 0), (_EVERYWHERE, None)):
                rows.append({"removed": number, "which": where} | _line(without(experts[:number], offset), clean))
            lefts = [without(drawn[:number]) for drawn in draws]
            rows.append({"removed": number, "which": _RANDOM} | _line_over_draws(lefts, clean))
        return pd.DataFrame(rows)


def _numbers(most: int) -> list[int]:
    """How many experts are taken away together: powers of two, and the most."""
    return sorted({2**power for power in range(20) if 2**power <= most} | {most})


def _norms(model: HookedModel, prompts: PromptSet, layers: Sequence[int]) -> Float[np.ndarray, "two layer expert"]:
    """The mean norm of what each expert writes at P0, and at position 8; 0 where a row is not routed to it."""
    found = np.zeros((2, len(layers), describe(model).experts))

    def see(layer: int, offset: int, here: Any) -> None:
        if not here.complete:
            raise NotApplicable(
                f"the routed experts of block {layer} do not add up to its MLP (a shared expert, or a norm after)"
            )
        found[int(offset == CONTROL), layers.index(layer)] = here.written.double().norm(dim=-1).mean(0).numpy()

    experts_at(model, prompts, see, (0, CONTROL))
    return found


def _order(
    norms: Float[np.ndarray, "layer expert"], layers: Sequence[int], heard: Sequence[int]
) -> list[tuple[Expert, float]]:
    """The experts of some blocks that write anything at P0, by the norm of it, the largest first."""
    found = [
        ((layer, number), float(norm))
        for layer, row in zip(layers, norms, strict=True)
        for number, norm in enumerate(row)
    ]
    return sorted((each for each in found if each[0][0] in heard and each[1] > 0), key=lambda each: -each[1])


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
    """As many random experts, each of the block of the one it stands for, none twice."""
    dealt = {layer: iter(rng.permutation(count).tolist()) for layer in layers}
    return [(layer, next(dealt[layer])) for layer, _ in experts]


def _left(
    model: HookedModel,
    prompts: PromptSet,
    found: StudiedSink,
    reader: int,
    experts: Sequence[Expert],
    offset: int | None,
) -> Left:
    """Step 6 on a run without some experts."""
    changes = [remove_experts(model, prompts, experts, offset)] if experts else []
    beside = score_at(CONTROL)
    recording = record(model, prompts, [SINK_SCORE, beside, NORM_RATIO, TOKEN_LOSSES], interventions=changes)
    scores = recording[SINK_SCORE].double()
    rate = (
        sink.sink_rate(scores, from_layer=FIRST_LATER_BLOCK)
        if scores.shape[1] > FIRST_LATER_BLOCK
        else torch.full((prompts.n,), torch.nan)
    )
    return Left(
        mean_over_heads(scores - recording[beside].double(), found.heads),
        rate.double().numpy(),
        recording[NORM_RATIO][:, reader].double().numpy(),
        recording[TOKEN_LOSSES].double().nanmean(1).numpy(),
    )


def _line(left: Left, clean: Left) -> dict[str, float]:
    """The columns of a table: what is left, with the ends of the intervals over samples."""
    found = {
        _EXCESS: ratio_interval(left.excess, clean.excess),
        _NORM: bootstrap(left.norm),
        _LOSS: bootstrap(left.loss - clean.loss),
    }
    return _columns(found) | {_RATE: float(left.rate.mean())}


def _line_over_draws(lefts: Sequence[Left], clean: Left) -> dict[str, float]:
    """The same with intervals over draws."""
    found = {
        _EXCESS: bootstrap(np.array([left.excess.mean() for left in lefts]) / clean.excess.mean()),
        _NORM: bootstrap(np.array([left.norm.mean() for left in lefts])),
        _LOSS: bootstrap(np.array([(left.loss - clean.loss).mean() for left in lefts])),
    }
    return _columns(found) | {_RATE: float(np.mean([left.rate.mean() for left in lefts]))}


def _columns(found: dict[str, Interval]) -> dict[str, float]:
    return {
        f"{name}{end}": value
        for name, each in found.items()
        for end, value in (("", each.value), ("_low", each.low), ("_high", each.high), ("_n", each.n))
    }


def _in_use(routed: Bool[Tensor, "sample layer expert"]) -> Interval:
    """How many experts a block has in use, in the mean over blocks; the interval is over samples."""

    def perplexity(used: Float[np.ndarray, "draw layer expert"]) -> Float[np.ndarray, " draw"]:
        used = used / used.sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(used > 0, used * np.log2(used), 0).sum(-1)
        return (2**entropy).mean(-1)

    return bootstrap(routed.double().numpy(), perplexity)


def _summary(together: pd.DataFrame, number: int) -> dict[str, Interval]:
    """The metrics of as many experts, or the next number below."""
    words = {_AT_P0: "top_experts_at_p0", _EVERYWHERE: "top_experts_everywhere", _RANDOM: "random_experts"}
    found = {}
    for which, word in words.items():
        row = together[(together["which"] == which) & (together["removed"] <= number)].iloc[-1]
        for what in (_EXCESS, _NORM, _LOSS):
            value, low, high, n = (row[f"{what}{end}"] for end in ("", "_low", "_high", "_n"))
            found[f"{what}_without_{row['removed']}_{word}"] = Interval(float(value), float(low), float(high), int(n))
    return found


def _told(line: dict[str, Any]) -> str:
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


def _draw_routing(
    shares: Float[np.ndarray, "two layer expert"],
    norms: Float[np.ndarray, "layer expert"],
    layers: Sequence[int],
    info: ModelInfo,
) -> Figure:
    from p0circuit.figures.maps import heat_maps

    found = {
        "P0 routed to it": shares[0],
        "Others routed to it": shares[1],
        "Norm written at P0": norms / max(norms.max(), 1e-30),
    }
    # Dense blocks have a line too, so that lines are layers.
    panels = {name: np.zeros((info.n_layers, info.experts)) for name in found}
    for name, values in found.items():
        panels[name][list(layers)] = values
    return heat_maps(panels, f"{info.title}: the experts of P0", "share (of the largest norm)", x_label="expert")


def _draw_removed(together: pd.DataFrame, clean: Left, reader: int, name: str) -> Figure:
    from p0circuit.figures.lines import trajectories
    from p0circuit.figures.style import Series

    whole = {_EXCESS: 1.0, _NORM: float(clean.norm.mean()), _LOSS: 0.0}
    names = {
        _AT_P0: "those that write most at P0, at P0",
        _EVERYWHERE: "the same, everywhere",
        _RANDOM: "random ones of their blocks, everywhere",
    }

    def lines(column: str) -> Sequence[Series]:
        found = []
        for which, label in names.items():
            rows = together[together["which"] == which]
            ends = [[whole[column], *rows[f"{column}{end}"]] for end in ("", "_low", "_high")]
            found.append(Series(label, *ends))
        return found

    panels = {
        "Excess score left": lines(_EXCESS),
        f"Norm ratio before block {reader}": lines(_NORM),
        "Loss": lines(_LOSS),
    }
    labels = ["share of the whole", "P0 over median", "added, nats per token"]
    numbers = ["0", *map(str, together["removed"].unique())]
    return trajectories(panels, numbers, f"{name}: without some experts", "experts taken away", labels)
