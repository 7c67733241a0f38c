"""The causal path of the sink (C7): which components at P0 it takes, and which input of the sink heads it arrives in.

*Activation patching.* The clean run has a token at P0, the shifted one has it at position m, behind a random prefix.
Noising puts what the shifted run computes at m into the clean run at P0 (is it necessary?), denoising what the clean
run computes at P0 into the shifted run at m (is it sufficient?). What is measured is the sink heads' score of the place
that is patched.

1. *Total effect*, one for each direction: the change that the whole stream makes, put in before every block. Nothing
   that this position says to others is left as it was. In denoising the prefix's own P0 still competes, so this is less
   than the difference between the two runs, and it is what a share can reach.
2. *Joint*: the outputs of attention and MLP of blocks 0-1 (without the embedding), all of them at once.
3. *Single*: the embedding, the stream, attention and MLP of every block up to the last sink heads, each by itself.
4. *Control*: as 2, at a random position after P0 instead: its values of the other run at the same token.

*Path patching*, in the clean run: each edge from a component at P0 to an MLP of blocks 0-1 or to Q, K or V of a sink
head, all other paths cut (`interventions.path_patching`).

5. The edge effect is the sum, over all edges into sink heads, of the sizes of the change each makes in their score. It
   is split by the input: K, Q or V.
6. Two things make Q and V weak rivals: P0's own query sees P0 alone, whatever it is, so edges into Q at P0 have no
   effect at all; and V changes what a head reads, which only later sink heads can answer to. So two more quantities are
   given beside it. *Whole stream*: the effect of all of the stream at once on K (and V) at P0, and on Q of all later
   queries, each as a share of the total effect of 1. Queries are estimated from one random query of each row, times
   their number. *Control*: the edges of 5 at that random position, by what they change in the score of P0.

There are several shifts, each with prefixes of its own. In 1, 2 and 4 every row is patched at every shift, and what is
given is the mean; in 3, 5 and 6 rows are dealt out to the shifts.
Paper: sections on recognition and amplification; methods of Meng et al. 2022 (arXiv 2202.05262) and Wang et al. 2022
(arXiv 2211.00593).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.claim import Claim, Clause
from p0circuit.experiments.conditions import drawable
from p0circuit.experiments.edges import input_shares
from p0circuit.experiments.heads import SinkHeads, find_sink_heads, scores_of
from p0circuit.intervals import Interval, bootstrap, ratio_interval
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.activation_patching import Component, Direction, patch_components
from p0circuit.interventions.contrast import Contrast, contrast, values_at
from p0circuit.interventions.metrics import Metric, Reading, Rows, sink_score_of
from p0circuit.interventions.nodes import Node, components
from p0circuit.interventions.path_patching import PathEffects, path_patch
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BLOCKS = (0, 1)
_DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
JOINT, WHOLE, BESIDE = "blocks 0-1", "whole stream", "blocks 0-1 at a random position"
"""What is patched: the names in the tables."""
_COLUMNS: tuple[Component, ...] = ("embed", "attn", "mlp", "resid_pre", "resid_mid")
_WIDTH = ("value", "low", "high")


@dataclass(frozen=True)
class ThePathConfig:
    """`shifts`: tokens of the prefixes; `samples`: the most rows to patch.

    `runs` bounds the work of single patches and of edges: as many rows are used as keep patches times rows below it.
    """

    shifts: tuple[int, ...] = (4, 16, 32)
    samples: int = 128
    runs: int = 3072


class ThePath(Experiment):
    """Activation patching in both directions, and path patching into Q, K and V of the sink heads."""

    id = "path"
    title = "The path of the sink"
    claim = Claim(
        id="C7",
        title="The path",
        source="Peng et al., arXiv 2603.06591, sections on recognition and amplification",
        statement="Attention and MLPs of blocks 0-1 at P0 are necessary and sufficient for the sink, and what they "
        "write reaches the sink heads through their keys.",
        measure="What all components of blocks 0-1 at P0, patched together between the clean and the shifted run, "
        "change in the sink heads' score, over what P0's whole stream changes, both ways; and the share of K in the "
        "summed effects of all edges from components at P0 into sink heads.",
        clauses=(
            Clause("share_of_blocks_0_1_in_noising", ">=", 0.8),
            Clause("share_of_blocks_0_1_in_denoising", ">=", 0.8),
            Clause("share_of_k_among_edges_into_sink_heads", ">=", 0.8),
        ),
        control="The same joint patches at a random position, and edges from there.",
    )

    def __init__(self, config: ThePathConfig = ThePathConfig()) -> None:
        super().__init__(config)

    def measure(self, model: Any, prompts: PromptSet) -> Result:
        """Raises NotApplicable without blocks 0-1 or a sink, and where P0's whole stream has no effect on it."""
        info = describe(model)
        if info.layers < 2:
            raise NotApplicable(f"{info.title} has {info.layers} block, and the claim is about blocks 0 and 1")
        shifts = [m for m in self.config.shifts if info.context is None or prompts.length + m <= info.context]
        if not shifts:
            raise NotApplicable(
                f"{info.title} has {info.context} positions: no room for a prefix of {min(self.config.shifts)} tokens "
                f"before prompts of {prompts.length}; shorten them"
            )
        found = find_sink_heads(model, prompts)
        chosen = found.prompts.subset(slice(0, self.config.samples))
        vocabulary, special = drawable(model)
        pairs = [
            contrast(chosen, shift, vocabulary, prompts.seed + number, tuple(special))
            for number, shift in enumerate(shifts)
        ]
        # From 1 on: the position after P0 is the first that is not P0.
        generator = torch.Generator().manual_seed(prompts.seed)
        lengths = chosen.length - chosen.p0
        beside = 1 + (torch.rand(chosen.n, generator=generator) * (lengths - 1)).long()
        changes = [joint_changes(model, pair, found.heads, beside) for pair in pairs]

        means = {key: np.mean([change[key] for change in changes], axis=0) for key in changes[0]}
        for direction in _DIRECTIONS:
            if (total := bootstrap(means[direction, WHOLE])).low <= 0 <= total.high:
                raise NotApplicable(
                    f"{direction} P0's whole stream changes the sink heads' score by {total}: the sink is not in it, "
                    "and no component can have a share of that"
                )
        metrics: dict[str, Interval] = {}
        for direction in _DIRECTIONS:
            whole = means[direction, WHOLE]
            metrics[f"share_of_blocks_0_1_in_{direction}"] = ratio_interval(means[direction, JOINT], whole)
            metrics[f"share_of_random_position_in_{direction}"] = ratio_interval(means[direction, BESIDE], whole)
            metrics[f"total_effect_of_{direction}"] = bootstrap(whole)

        singles = self._singles(model, pairs, found, changes)
        effects, whole_stream, beside_effects, rows = self._edges(model, pairs, found, changes, beside)
        shares = input_shares(effects, found.names)
        if shares is None:
            raise NotApplicable("no edge from a component at P0 into a sink head has any effect on its score")
        metrics |= {f"share_of_{part}_among_edges_into_sink_heads": shares[part] for part in "kqv"}
        metrics |= {f"share_of_{part}_in_total_effect": interval for part, interval in whole_stream.items()}
        metrics["edges_at_random_position_over_those_at_p0"] = ratio_interval(
            _sizes(beside_effects, found.names), _sizes(effects, found.names)
        )
        tables = {
            "joint": _joint_table(pairs, changes),
            "components": singles,
            "edges": effects.to_dataframe(),
            "edges_at_random_position": beside_effects.to_dataframe(),
        }
        prefixes = ", ".join(map(str, shifts))
        notes = [
            found.note,
            f"{chosen.n} samples, each behind prefixes of {prefixes} tokens in turn; edges on {rows} of them",
            *_inputs_told(info, found),
        ]
        if len(shifts) < len(self.config.shifts):
            notes.append(f"longer prefixes do not fit {info.context} positions")
        figures = {
            "components": _component_maps(singles, info),
            "shares": _share_lines(metrics, info),
        }
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)

    def _singles(
        self,
        model: Any,
        pairs: Sequence[Contrast],
        found: SinkHeads,
        changes: Sequence[dict[tuple[str, str], np.ndarray]],
    ) -> pd.DataFrame:
        """Each component of each block by itself, both ways: its share of the total effect in the same rows."""
        import pandas as pd

        metric, last = sink_score_of(found.heads), max(layer for layer, _ in found.heads)
        count = len(_COLUMNS) * (last + 1)
        dealt = _dealt(pairs, max(len(pairs), self.config.runs // (2 * count)))
        rows = []
        for direction in _DIRECTIONS:
            grids = [
                patch_components(model, _part(pair, some), metric, _COLUMNS, range(last + 1), direction=direction)
                for pair, some in zip(pairs, dealt, strict=True)
            ]
            patched = torch.cat([grid.patched - grid.base for grid in grids], dim=1).double().numpy()
            total = np.concatenate(
                [change[direction, WHOLE][some.numpy()] for change, some in zip(changes, dealt, strict=True)]
            )
            for node, change in zip(grids[0].nodes, patched, strict=True):
                share = ratio_interval(change, total)
                rows.append((direction, str(node), node.kind, node.layer, change.mean(), *share.to_json().values()))
        names = ["direction", "node", "component", "layer", "change", "share", "low", "high", "n"]
        return pd.DataFrame(rows, columns=names)

    def _edges(
        self,
        model: Any,
        pairs: Sequence[Contrast],
        found: SinkHeads,
        changes: Sequence[dict[tuple[str, str], np.ndarray]],
        beside: Int[Tensor, " batch"],
    ) -> tuple[PathEffects, dict[str, Interval], PathEffects, int]:
        """Steps 5 and 6: the edges, the whole stream's shares by input, the edges at random positions, and the rows."""
        last = max(layer for layer, _ in found.heads)
        # What the block of the last sink heads writes, none of them reads.
        senders = components(model, range(max(last, _BLOCKS[-1] + 1)))
        inputs = [f"{name}.{part}" for name in found.names for part in "qkv"]
        dealt = _dealt(pairs, max(len(pairs), self.config.runs // (2 * len(senders) * len(inputs))))
        parts = [_part(pair, some) for pair, some in zip(pairs, dealt, strict=True)]
        order = torch.cat(dealt)
        clean = pairs[0].clean.subset(order)
        away = clean.p0 + beside[order]
        streams = {layer: Node("resid_pre", layer) for layer in sorted({layer for layer, _ in found.heads})}

        def shifted(offsets: Int[Tensor, " batch"]) -> dict[Node, Tensor]:
            """What everything computes in the shifted runs, this far after the place."""
            found_values = [
                values_at(model, part.shifted, [*senders, *streams.values()], part.position + offsets[some])
                for part, some in zip(parts, dealt, strict=True)
            ]
            return {node: torch.cat([values[node] for values in found_values]) for node in found_values[0]}

        first, elsewhere = shifted(torch.zeros_like(beside)), shifted(beside)
        metric, of_p0 = sink_score_of(found.heads), at_p0(sink_score_of(found.heads))
        mlps = [f"mlp.{layer}" for layer in _BLOCKS]
        effects = path_patch(model, clean, senders, [*mlps, *inputs], first, metric)
        beside_effects = path_patch(model, clean, senders, inputs, elsewhere, of_p0, away)

        later = (clean.length - 1 - clean.p0).double().numpy()
        sums = {part: np.zeros(clean.n) for part in "kqv"}
        for layer, stream in streams.items():
            mine = [name for name, head in zip(found.names, found.heads, strict=True) if head[0] == layer]
            read = [f"{name}.{part}" for name in mine for part in "kv"]
            for (_, receiver), effect in zip(
                (here := path_patch(model, clean, [stream], read, first, metric)).edges, here.effect, strict=True
            ):
                sums[receiver[-1]] += effect.double().cpu().numpy()
            asked = path_patch(model, clean, [stream], [f"{name}.q" for name in mine], elsewhere, of_p0, away)
            sums["q"] += asked.effect.sum(0).double().cpu().numpy() * later
        total = np.concatenate(
            [change["noising", WHOLE][some.numpy()] for change, some in zip(changes, dealt, strict=True)]
        )
        return effects, {part: ratio_interval(value, total) for part, value in sums.items()}, beside_effects, clean.n


def joint_changes(
    model: Any, pair: Contrast, heads: Sequence[tuple[int, int]], beside: Int[Tensor, " batch"]
) -> dict[tuple[str, str], Float[np.ndarray, " sample"]]:
    """Steps 1, 2 and 4 for one shift: the change of the score by direction and by what was patched, for each row."""
    blocks = [node for node in components(model, _BLOCKS) if node.kind != "embed"]
    stream = [Node("resid_pre", layer) for layer in range(describe(model).layers)]
    clean, shifted, shift = pair.clean, pair.shifted, pair.shift
    runs = {
        "noising": (clean, 0, values_at(model, shifted, [*blocks, *stream], pair.position)),
        "denoising": (shifted, shift, values_at(model, clean, [*blocks, *stream])),
    }
    elsewhere = {
        "noising": values_at(model, shifted, blocks, pair.position + beside),
        "denoising": values_at(model, clean, blocks, clean.p0 + beside),
    }
    found = {}
    for direction, (prompts, place, values) in runs.items():
        before = scores_of(model, prompts, heads, place)
        patches = {
            JOINT: ablate(model, prompts, blocks, values, place),
            WHOLE: ablate(model, prompts, stream, values, place),
            BESIDE: ablate(model, prompts, blocks, elsewhere[direction], place + beside),
        }
        for name, patch in patches.items():
            found[direction, name] = scores_of(model, prompts, heads, place, [patch]) - before
    return found


def _dealt(pairs: Sequence[Contrast], most: int) -> list[Int[Tensor, " rows"]]:
    """Rows for each pair, in turn, at most so many in all."""
    rows = torch.arange(min(most, pairs[0].clean.n))
    return [rows[number :: len(pairs)] for number in range(len(pairs)) if number < len(rows)]


def _part(pair: Contrast, rows: Int[Tensor, " rows"]) -> Contrast:
    return Contrast(pair.clean.subset(rows), pair.shifted.subset(rows), pair.shift)


def at_p0(metric: Metric) -> Metric:
    """The metric read at P0, wherever in the row the patch is."""

    def read(activation: Tensor, rows: Rows, reading: Reading) -> Tensor:
        return reading.reduce(activation, rows._replace(place=rows.mask.int().argmax(1)))

    readings = tuple(Reading(one.hook, functools.partial(read, reading=one), one.offsets) for one in metric.readings)
    return Metric(f"{metric.name} at P0", readings, metric.combine)


def _sizes(effects: PathEffects, heads: Sequence[str]) -> Float[np.ndarray, " sample"]:
    """The summed sizes of the effects of all edges into these heads."""
    into = [receiver.rpartition(".")[0] in heads for _, receiver in effects.edges]
    return effects.effect[torch.tensor(into)].abs().sum(0).double().cpu().numpy()


def _joint_table(pairs: Sequence[Contrast], changes: Sequence[dict[tuple[str, str], np.ndarray]]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for pair, change in zip(pairs, changes, strict=True):
        for (direction, name), values in change.items():
            mean, share = bootstrap(values), ratio_interval(values, change[direction, WHOLE])
            ends = [getattr(interval, end) for interval in (mean, share) for end in _WIDTH]
            rows.append((direction, pair.shift, name, *ends, mean.n))
    names = ["change", "change_low", "change_high", "share", "share_low", "share_high", "n"]
    return pd.DataFrame(rows, columns=["direction", "shift", "patched", *names])


def _inputs_told(info: ModelInfo, found: SinkHeads) -> list[str]:
    """What a reader of the shares of Q and V has to know about this model."""
    layers = {layer for layer, _ in found.heads}
    told = ["an edge into Q at P0 has no effect in any model: P0's query sees P0 alone"]
    if len(layers) == 1:
        told.append(f"all sink heads are in block {layers.pop()}, so no edge into V can reach another one's score")
    if info.positions == "learned":
        told.append("the embedding is no component of a block: what it says of position 0 is not in the joint patch")
    return told


def _component_maps(singles: pd.DataFrame, info: ModelInfo) -> Figure:
    from p0circuit.report.figures import effect_maps

    panels = {}
    places = {"noising": "Noising, at P0: lost", "denoising": "Denoising, at m: won"}
    for direction, part in singles.groupby("direction", sort=False):
        panel = part.pivot(index="layer", columns="component", values="share")
        panel = panel[[name for name in _COLUMNS if name in panel.columns]]
        panel.columns.name = "component"
        panels[places[str(direction)]] = panel
    return effect_maps(
        panels, f"{info.title}: what single components at P0 do to the sink", "share of the total effect"
    )


def _share_lines(metrics: dict[str, Interval], info: ModelInfo) -> Figure:
    from p0circuit.report.figures import intervals

    def rounded(name: str) -> Interval:
        # What is nothing but rounding should not be told in powers of ten; adding 0 takes the sign off -0.
        one = metrics[name]
        return Interval(round(one.value, 3) + 0.0, round(one.low, 3) + 0.0, round(one.high, 3) + 0.0, one.n)

    panels = {
        "All components of blocks 0-1": {
            "noising at P0": rounded("share_of_blocks_0_1_in_noising"),
            "denoising at m": rounded("share_of_blocks_0_1_in_denoising"),
            "noising elsewhere": rounded("share_of_random_position_in_noising"),
            "denoising elsewhere": rounded("share_of_random_position_in_denoising"),
        },
        "Edges from components at P0 into sink heads": {
            part.upper(): rounded(f"share_of_{part}_among_edges_into_sink_heads") for part in "kqv"
        },
        "Whole stream into one input of the sink heads": {
            "K of P0": rounded("share_of_k_in_total_effect"),
            "Q of all later queries": rounded("share_of_q_in_total_effect"),
            "V of P0": rounded("share_of_v_in_total_effect"),
        },
    }
    labels = ["share of the total effect", "share of the summed effects", "share of the total effect"]
    controls = ("noising elsewhere", "denoising elsewhere")
    return intervals(panels, f"{info.title}: how the sink gets from P0 to the sink heads", labels, controls)
