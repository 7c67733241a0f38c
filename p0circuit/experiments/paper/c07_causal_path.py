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

Where single heads and MLPs have more than `most_edges` edges, the run is *bounded*: what it takes is fixed beforehand.

- Rows are dealt out to the shifts in 1, 2 and 4 as well.
- In 3 every noising patch is estimated from rows of one token (the exact change of P0's keys, with all later positions
  as they were); the strongest and a random sample are patched exactly, in both directions.
- In 5 the sink heads of a block are one receiver. Edges are estimated, and the strongest and a random sample patched
  exactly (`interventions.edge_search`); the notes state the error of the estimates.
- In 6 the whole stream goes into K (or V, or Q) of all sink heads in one run, and so it does at the random position.
Paper: sections on recognition and amplification; methods of Meng et al. 2022 (arXiv 2202.05262) and Wang et al. 2022
(arXiv 2211.00593).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.edges import input_shares
from p0circuit.experiments.sink_under_study import StudiedSink, sink_scores, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.activation_patching import (
    Component,
    Direction,
    pair_patches,
    patch_components,
    patch_grid,
)
from p0circuit.interventions.batched_runs import repeated
from p0circuit.interventions.closed_form import NotOfTheClosedForm, key_edges, key_hook, query_hook
from p0circuit.interventions.edge_search import EdgeSearch, expected_passes, search_edges
from p0circuit.interventions.metrics import Metric, Reading, Rows, batches, measure, sink_score_of
from p0circuit.interventions.nodes import InterventionError, Node, components
from p0circuit.interventions.pairs import PromptPair, shifted_pair, values_at
from p0circuit.interventions.path_patching import PathEffects, path_patch
from p0circuit.interventions.receiver_inputs import InputPatch, measure_inputs
from p0circuit.models import ModelInfo, describe, device_of, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet, from_ids
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
JOINT, WHOLE, BESIDE = "blocks 0-1", "whole stream", "blocks 0-1 at a random position"
"""What is patched: the names in the tables."""
_FEWEST_ROWS = 3
"""Rows for exact single patches in a bounded run, at least one for each shift."""
_COLUMNS: tuple[Component, ...] = ("embed", "attn", "mlp", "resid_pre", "resid_mid")
_WIDTH = ("value", "low", "high")


@dataclass(frozen=True)
class CausalPathConfig:
    """`shifts`: tokens of the prefixes; `samples`: the most rows to patch.

    `runs` bounds the work of single patches and of edges: as many rows are used as keep patches times rows below it.
    With more than `most_edges` edges the run is bounded: `rows` are used for edges and estimates, and single patches
    and edges each get exact runs worth `row_runs` rows through all blocks.
    """

    shifts: tuple[int, ...] = (4, 16, 32)
    samples: int = 128
    runs: int = 3072
    most_edges: int = 2_000
    rows: int = 6
    row_runs: int = 72


class CausalPath(Experiment[CausalPathConfig]):
    """Activation patching in both directions, and path patching into Q, K and V of the sink heads."""

    id = "path"
    title = "The path of the sink"
    config_type = CausalPathConfig
    claim = Claim(
        id="C7",
        title="The path",
        source="Peng et al., arXiv 2603.06591, sections on recognition and amplification",
        statement="Attention and MLPs of blocks 0-1 at P0 are necessary and sufficient for the sink, and what they "
        "write reaches the sink heads through their keys.",
        measure="What all components of blocks 0-1 at P0, patched together between the clean and the shifted run, "
        "change in the sink heads' score, over what P0's whole stream changes, both ways; and the share of K in the "
        "summed effects of all edges from components at P0 into sink heads.",
        criteria=(
            Criterion("share_of_blocks_0_1_in_noising", ">=", 0.8),
            Criterion("share_of_blocks_0_1_in_denoising", ">=", 0.8),
            Criterion("share_of_k_among_edges_into_sink_heads", ">=", 0.8),
        ),
        control="The same joint patches at a random position, and edges from there.",
    )

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable without blocks 0-1 or a sink, and where P0's whole stream has no effect on it."""
        info = describe(model)
        if info.n_layers < 2:
            raise NotApplicable(f"{info.title} has {info.n_layers} block, and the claim is about blocks 0 and 1")
        shifts = [m for m in self.config.shifts if info.n_ctx is None or prompts.length + m <= info.n_ctx]
        if not shifts:
            raise NotApplicable(
                f"{info.title} has {info.n_ctx} positions: no room for a prefix of {min(self.config.shifts)} tokens "
                f"before prompts of {prompts.length}; shorten them"
            )
        found = studied_sink(model, prompts)
        chosen = found.prompts.subset(slice(0, self.config.samples))
        pairs = [shifted_pair(model, chosen, shift, prompts.seed + number) for number, shift in enumerate(shifts)]
        # From 1 on: the position after P0 is the first that is not P0.
        generator = torch.Generator().manual_seed(prompts.seed)
        lengths = chosen.length - chosen.p0
        beside = 1 + (torch.rand(chosen.n, generator=generator) * (lengths - 1)).long()
        bounded = self._bounded(info)
        if bounded:
            changes = _dealt_changes(model, pairs, found.heads, beside)
        else:
            own = values_at(model, chosen, _patched_nodes(model))
            changes = [joint_changes(model, pair, found.heads, beside, own) for pair in pairs]

        # A row that was not patched at a shift is not a number there.
        means = {key: np.nanmean([change[key] for change in changes], axis=0) for key in changes[0]}
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

        if bounded:
            try:
                singles, notes_on_singles = self._few_singles(model, pairs, found, changes)
                edges = self._searched_edges(model, pairs, found, changes, beside)
            except NotOfTheClosedForm as reason:
                raise NotApplicable(
                    f"{info.title} has too many components to patch each of them, and {reason}"
                ) from None
        else:
            singles, notes_on_singles = self._singles(model, pairs, found, changes), []
            edges = self._edges(model, pairs, found, changes, beside)
        if edges.shares is None:
            raise NotApplicable("no edge from a component at P0 into a sink head has any effect on its score")
        shares = edges.shares
        metrics |= {f"share_of_{part}_among_edges_into_sink_heads": shares[part] for part in "kqv"}
        metrics |= {f"share_of_{part}_in_total_effect": interval for part, interval in edges.whole_stream.items()}
        metrics["edges_at_random_position_over_those_at_p0"] = edges.elsewhere
        tables = {
            "joint": _joint_table(pairs, changes),
            "components": singles,
            "edges": edges.table,
            "edges_at_random_position": edges.table_elsewhere,
        }
        prefixes = ", ".join(map(str, shifts))
        notes = [
            found.note,
            f"{chosen.n} samples, {'dealt out to' if bounded else 'each behind'} prefixes of {prefixes} tokens"
            f"{'' if bounded else ' in turn'}; edges on {edges.rows} of them",
            *_inputs_told(info, found),
            *notes_on_singles,
            *edges.notes,
        ]
        if len(shifts) < len(self.config.shifts):
            notes.append(f"longer prefixes do not fit {info.n_ctx} positions")
        figures = {
            "components": _component_maps(singles, info),
            "shares": _share_lines(metrics, info),
        }
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)

    def _singles(
        self,
        model: HookedModel,
        pairs: Sequence[PromptPair],
        found: StudiedSink,
        changes: Sequence[dict[tuple[str, str], np.ndarray]],
    ) -> pd.DataFrame:
        """Each component of each block by itself, both ways: its share of the total effect in the same rows."""
        import pandas as pd

        metric, last = sink_score_of(found.heads), max(layer for layer, _ in found.heads)
        count = len(_COLUMNS) * (last + 1)
        dealt = _dealt(pairs, max(len(pairs), self.config.runs // (2 * count)))
        pairs, changes = pairs[: len(dealt)], changes[: len(dealt)]
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
        model: HookedModel,
        pairs: Sequence[PromptPair],
        found: StudiedSink,
        changes: Sequence[dict[tuple[str, str], np.ndarray]],
        beside: Int[Tensor, " batch"],
    ) -> _Edges:
        """Steps 5 and 6, every edge exactly."""
        last = max(layer for layer, _ in found.heads)
        # What the block of the last sink heads writes, none of them reads.
        senders = components(model, range(max(last, CIRCUIT_BLOCKS[-1] + 1)))
        inputs = [f"{name}.{part}" for name in found.names for part in "qkv"]
        most = max(len(pairs), self.config.runs // (2 * len(senders) * len(inputs)))
        streams = {layer: Node("resid_pre", layer) for layer in sorted({layer for layer, _ in found.heads})}
        clean, away, first, elsewhere, order = _shifted_values(
            model, pairs, beside, most, [*senders, *streams.values()]
        )
        metric, of_p0 = sink_score_of(found.heads), at_p0(sink_score_of(found.heads))
        mlps = [f"mlp.{layer}" for layer in CIRCUIT_BLOCKS]
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
        total = _totals(changes, order)
        return _Edges(
            shares=input_shares(effects, found.names),
            whole_stream={part: ratio_interval(value, total) for part, value in sums.items()},
            elsewhere=_ratio_of_sizes(_sizes(beside_effects, found.names), _sizes(effects, found.names)),
            table=effects.to_dataframe(),
            table_elsewhere=beside_effects.to_dataframe(),
            rows=clean.n,
            notes=[],
        )

    def _bounded(self, info: ModelInfo) -> bool:
        """Whether there are too many edges between components and single heads to patch each of them."""
        return (2 * info.n_layers + 1) * (
            3 * info.n_layers * info.n_heads + len(CIRCUIT_BLOCKS)
        ) // 2 > self.config.most_edges

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """The passes over all `n` prompts that a run takes beside the recordings that choose the sink heads."""
        info, n, length = describe(model), prompts.n, prompts.length
        config, chosen, layers = self.config, min(self.config.samples, n - n // 2), info.n_layers
        shifts = [m for m in config.shifts if info.n_ctx is None or length + m <= info.n_ctx] or [0]
        longer = 1 + sum(shifts) / len(shifts) / length
        few = len(CIRCUIT_BLOCKS) / layers
        if self._bounded(info):
            rows, least = min(chosen, config.rows), min(chosen, max(len(shifts), _FEWEST_ROWS))
            joint = chosen * (longer + 3 + 3 * longer + 2 * few)
            singles = rows * (longer + 1 + (4 * layers + 2) / length)
            singles += 2 * least * (1 + longer + 1) + min(config.row_runs, 2 * least * layers * 3)
            edges = (
                2 * rows * longer + 2 * rows + expected_passes(info, length, rows, rows, 0, heads=False, kinds=("v",))
            )
            # The whole stream into five inputs, read at two places.
            return (joint + singles + edges + config.row_runs + 8 * rows) / n
        joint = chosen * (1 + len(shifts) * (longer + few + few * longer + 3 + 4 * longer))
        count, sink_heads = len(_COLUMNS) * layers, max(1, layers * info.n_heads // 8)
        least = min(chosen, max(len(shifts), config.runs // (2 * count)))
        singles = least * (2 * (longer + 1) * 2 + (4 * layers + 1) / 2 * (1 + longer))
        senders, inputs = 2 * layers - 1, 3 * sink_heads
        rows = min(chosen, max(len(shifts), config.runs // (2 * senders * inputs)))
        # Edges into Q have no effect at P0 and are run at the random position only.
        edges = rows * (
            2 * longer + 3 * senders + 5 / 3 * senders * inputs / layers + senders * len(CIRCUIT_BLOCKS) / 2
        )
        return (joint + singles + edges) / n

    def _few_singles(
        self,
        model: HookedModel,
        pairs: Sequence[PromptPair],
        found: StudiedSink,
        changes: Sequence[dict[tuple[str, str], np.ndarray]],
    ) -> tuple[pd.DataFrame, list[str]]:
        """Step 3, bounded: estimates of all noising patches, exact ones of as many as `row_runs` allows."""
        import pandas as pd

        info, metric, last = describe(model), sink_score_of(found.heads), max(layer for layer, _ in found.heads)
        nodes = _single_nodes(info, last)
        dealt = _dealt(pairs, max(len(pairs), self.config.rows))
        parts = [_part(pair, some) for pair, some in zip(pairs, dealt, strict=False)]
        values = [values_at(model, part.shifted, nodes, part.position) for part in parts]
        joined = {node: torch.cat([value[node] for value in values]) for node in nodes}
        order = torch.cat(dealt)
        keys = key_edges(model, pairs[0].clean.subset(order), nodes, joined, "all")
        layers, numbers = map(list, zip(*found.heads, strict=True))
        estimate = keys.effect[:, :, layers, numbers].double().mean(-1).cpu().numpy()

        # A third of the exact runs goes to a random sample, from which the error of the others is known.
        shares = abs(estimate.mean(1))
        ranked = sorted(range(len(nodes)), key=lambda place: (nodes[place].kind.startswith("resid"), -shares[place]))
        few = _dealt(pairs, max(len(pairs), _FEWEST_ROWS))
        patched_rows = len(torch.cat(few))
        chosen = _within(nodes, ranked, 2 / 3 * self.config.row_runs, patched_rows, info.n_layers)
        strongest = len(chosen)
        left = [place for place in range(len(nodes)) if place not in chosen]
        generator = torch.Generator().manual_seed(pairs[0].clean.seed)
        mixed = [left[place] for place in torch.randperm(len(left), generator=generator).tolist()]
        chosen += _within(nodes, mixed, self.config.row_runs / 3, patched_rows, info.n_layers)
        exact = {}
        for direction in _DIRECTIONS:
            grids = []
            for pair, some in zip(pairs, few, strict=False):
                part = _part(pair, some)
                patches = pair_patches(model, part, [nodes[place] for place in chosen], direction)
                grids.append(patch_grid(model, part, patches, metric, direction))
            patched = torch.cat([grid.patched - grid.base for grid in grids], dim=1).double().numpy()
            exact[direction] = dict(zip(chosen, patched, strict=True))
        rows = []
        for direction in _DIRECTIONS:
            for place, node in enumerate(nodes):
                is_exact = place in exact[direction]
                if not is_exact and direction == "denoising":
                    continue
                change = exact[direction][place] if is_exact else estimate[place]
                total = np.concatenate(
                    [
                        change_of[direction, WHOLE][some.numpy()]
                        for change_of, some in zip(changes, few if is_exact else dealt, strict=False)
                    ]
                )
                share = ratio_interval(change, total)
                rows.append(
                    (direction, str(node), node.kind, node.layer, change.mean(), *share.to_json().values(), is_exact)
                )
        names = ["direction", "node", "component", "layer", "change", "share", "low", "high", "n", "exact"]
        # The same rows of estimates and exact patches.
        of_few = [int((order == row).nonzero()[0, 0]) for row in torch.cat(few)]
        whole = abs(_totals(changes, torch.cat(few)).mean())
        errors = [
            [abs(float(estimate[place, of_few].mean() - exact["noising"][place].mean())) / whole for place in some]
            for some in (chosen[:strongest], chosen[strongest:])
        ]
        notes = [
            f"single patches: {len(nodes)} noising ones estimated on {len(order)} samples, {len(chosen)} patched "
            f"exactly on {len(torch.cat(few))}, both ways",
            "mean error of the estimates of single patches, in shares of the total effect: "
            f"{np.mean(errors[0] or [0.0]):.3f} on the {strongest} strongest, {np.mean(errors[1] or [0.0]):.3f} on "
            f"{len(errors[1])} drawn at random",
        ]
        return pd.DataFrame(rows, columns=names), notes

    def _searched_edges(
        self,
        model: HookedModel,
        pairs: Sequence[PromptPair],
        found: StudiedSink,
        changes: Sequence[dict[tuple[str, str], np.ndarray]],
        beside: Int[Tensor, " batch"],
    ) -> _Edges:
        """Steps 5 and 6, bounded: the sink heads of a block are one receiver, those of all blocks another."""
        last = max(layer for layer, _ in found.heads)
        senders = components(model, range(max(last, CIRCUIT_BLOCKS[-1] + 1)))
        by_layer: dict[int, list[int]] = {}
        for layer, head in found.heads:
            by_layer.setdefault(layer, []).append(head)
        groups = {f"attn.{layer}.{'+'.join(map(str, sorted(heads)))}" for layer, heads in by_layer.items()}
        inputs = {part: [f"{name}.{part}" for name in sorted(groups)] for part in "kqv"}
        streams = {layer: Node("resid_pre", layer) for layer in by_layer}
        clean, away, first, elsewhere, order = _shifted_values(
            model,
            pairs,
            beside,
            max(len(pairs), self.config.rows),
            [*senders, *streams.values()],
            list(streams.values()),
        )
        total = _totals(changes, order)
        search = search_edges(
            model,
            clean,
            senders,
            [*(f"mlp.{layer}" for layer in CIRCUIT_BLOCKS), *inputs["k"], *inputs["q"], *inputs["v"]],
            first,
            found.heads,
            # A hundredth: shares are of summed sizes, in which many small edges count.
            max(abs(float(total.mean())) / 100, 1e-6),
            budget=self.config.row_runs / clean.n,
            seed=clean.seed,
        )
        sizes = {part: search.sizes(inputs[part]) for part in "kqv"}
        summed = np.sum(list(sizes.values()), axis=0)
        stream = _whole_stream(model, clean, found.heads, streams, first, elsewhere, away)
        later = (clean.length - 1 - clean.p0).double().numpy()
        at_p0_sizes = sum(abs(stream["p0", part]) for part in "kv")
        elsewhere_sizes = sum(abs(stream["elsewhere", part]) for part in "kqv")
        in_total = {"k": stream["p0", "k"], "q": stream["elsewhere", "q"] * later, "v": stream["p0", "v"]}
        shares = {part: ratio_interval(size, summed) for part, size in sizes.items()} if summed.any() else None
        return _Edges(
            shares=shares,
            whole_stream={part: ratio_interval(value, total) for part, value in in_total.items()},
            elsewhere=_ratio_of_sizes(np.asarray(elsewhere_sizes), np.asarray(at_p0_sizes)),
            table=_with_estimates(search),
            table_elsewhere=_stream_table(stream),
            rows=clean.n,
            notes=["the sink heads of a block are one receiver of edges", *search.summary()],
        )


@dataclass(frozen=True)
class _Edges:
    """What steps 5 and 6 give: shares by input, the whole stream's shares, the control's ratio, and the tables."""

    shares: dict[str, Interval] | None
    whole_stream: dict[str, Interval]
    elsewhere: Interval
    table: pd.DataFrame
    table_elsewhere: pd.DataFrame
    rows: int
    notes: list[str]


def _ratio_of_sizes(numerator: np.ndarray, denominator: np.ndarray) -> Interval:
    return ratio_interval(numerator, denominator) if denominator.any() else Interval(0.0, 0.0, 0.0, len(denominator))


def _totals(
    changes: Sequence[dict[tuple[str, str], np.ndarray]], order: Int[Tensor, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The total effect of noising in these rows, each at the shift it is dealt out to."""
    return np.array([changes[int(row) % len(changes)]["noising", WHOLE][int(row)] for row in order])


def _single_nodes(info: ModelInfo, last: int) -> list[Node]:
    """The nodes of step 3, those the model does not have left out."""
    nodes = [Node("embed")]
    for layer in range(last + 1):
        for kind in _COLUMNS[1:]:
            with contextlib.suppress(InterventionError):
                nodes.append(Node(kind, layer).check(info))
    return nodes


def _within(nodes: Sequence[Node], order: Sequence[int], row_runs: float, rows: int, layers: int) -> list[int]:
    """The first numbers of `order` whose exact patches, both ways, take at most so many rows through all blocks."""
    chosen, spent = [], 0.0
    for place in order:
        spent += 2 * rows * (layers - nodes[place].layer) / layers
        if spent > row_runs:
            break
        chosen.append(place)
    return chosen


def _shifted_values(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    beside: Int[Tensor, " batch"],
    most: int,
    nodes: Sequence[Node],
    nodes_elsewhere: Sequence[Node] | None = None,
) -> tuple[PromptSet, Int[Tensor, " rows"], dict[Node, Tensor], dict[Node, Tensor], Int[Tensor, " rows"]]:
    """Rows dealt out to the shifts: clean prompts, random positions in them, and what the shifted runs compute.

    The values at the token of P0 and, of `nodes_elsewhere` (`nodes` if not given), at the token of the random position;
    last the numbers of the rows.
    """
    dealt = _dealt(pairs, most)
    parts = [_part(pair, some) for pair, some in zip(pairs, dealt, strict=False)]
    order = torch.cat(dealt)
    clean = pairs[0].clean.subset(order)

    def shifted(offsets: Int[Tensor, " batch"], chosen: Sequence[Node]) -> dict[Node, Tensor]:
        """What everything computes in the shifted runs, this far after the place."""
        found_values = [
            values_at(model, part.shifted, chosen, part.position + offsets[some])
            for part, some in zip(parts, dealt, strict=True)
        ]
        return {node: torch.cat([values[node] for values in found_values]) for node in found_values[0]}

    first = shifted(torch.zeros_like(beside), nodes)
    elsewhere = shifted(beside, nodes if nodes_elsewhere is None else nodes_elsewhere)
    return clean, clean.p0 + beside[order], first, elsewhere, order


def _whole_stream(
    model: HookedModel,
    clean: PromptSet,
    heads: Sequence[tuple[int, int]],
    streams: dict[int, Node],
    first: dict[Node, Tensor],
    elsewhere: dict[Node, Tensor],
    away: Int[Tensor, " rows"],
) -> dict[tuple[str, str], Float[np.ndarray, " rows"]]:
    """Step 6, bounded: the change of the score with the whole stream in one input of all sink heads.

    At P0 into K and V; at the random position into K, Q and V (the score is that of P0 all the same).
    """
    metric, device = sink_score_of(heads), device_of(model)
    by_layer: dict[int, tuple[int, ...]] = {}
    for layer, head in heads:
        by_layer[layer] = (*by_layer.get(layer, ()), head)
    rows = Rows(*(part.to(device) for part in (clean.ids, clean.attention_mask, clean.p0)))
    there = rows._replace(position=away.to(device))
    # P0's stream is that of a row of one token.
    index = torch.arange(clean.n, device=device)
    alone = Rows(
        rows.ids[index, rows.position][:, None], torch.ones_like(rows.ids[:, :1], dtype=torch.bool), 0 * rows.position
    )
    found = {}
    for name, run, place, values, parts, scored in (
        ("p0", alone, rows, first, "kv", metric),
        ("elsewhere", there, there, elsewhere, "kqv", at_p0(metric)),
    ):
        inputs = _inputs_with_stream(model, run, streams, values)
        variants = [
            [InputPatch(part, layer, by_layer[layer], inputs[part, layer]) for layer in by_layer]  # pyright: ignore[reportArgumentType]
            for part in parts
        ]
        patched = measure_inputs(model, place, scored, variants)
        before = measure(model, clean, metric).to(patched)
        for part, values_of in zip(parts, patched, strict=True):
            found[name, part] = (values_of - before).double().cpu().numpy()
    return found


@torch.no_grad()
def _inputs_with_stream(
    model: HookedModel, rows: Rows, streams: dict[int, Node], values: dict[Node, Tensor]
) -> dict[tuple[str, int], Tensor]:
    """Queries, keys and changes of values at the rows' place, the whole stream there replaced before each block."""
    twice = Rows(*(repeated(part, 2) for part in rows))
    batch = len(rows.ids)
    numbers = torch.arange(2 * batch, device=rows.ids.device)
    found: dict[tuple[str, int], Tensor] = {}

    def put(activation: Tensor, hook: Any, node: Node) -> Tensor:
        changed = activation.clone()
        node.put(changed, rows.position, values[node], slice(batch, 2 * batch))
        return changed

    def note(activation: Tensor, hook: Any, part: str, layer: int) -> None:
        here = activation[numbers, twice.position]
        found[part, layer] = (here[batch:] - here[:batch] if part == "v" else here[batch:]).clone()

    hooks: list[Hook] = []
    for layer, node in streams.items():
        places = {"q": query_hook(model, layer), "k": key_hook(model, layer), "v": f"blocks.{layer}.attn.hook_v"}
        hooks.append((node.hook, functools.partial(put, node=node)))
        hooks += [(hook, functools.partial(note, part=part, layer=layer)) for part, hook in places.items()]
    forward(model, twice.ids, twice.mask, hooks=hooks, stop_at_layer=max(streams) + 1)
    return found


def _with_estimates(search: EdgeSearch) -> pd.DataFrame:
    """All edges of a search: the exact effect where there is one, else the estimate; `exact` says which."""
    table = search.exact.to_dataframe().assign(exact=True)
    exact = {*search.exact.edges}
    assert search.by_row is not None
    numbers = [number for number, edge in enumerate(search.edges) if edge not in exact]
    edges, estimates = tuple(search.edges[number] for number in numbers), search.by_row[numbers]
    rest = PathEffects(edges, search.exact.clean, search.exact.clean + estimates, search.exact.metric, "direct")
    import pandas as pd

    both = pd.concat([table, rest.to_dataframe().assign(exact=False)]) if edges else table
    return both.sort_values("effect", key=lambda effect: -effect.abs(), kind="stable", ignore_index=True)


def _stream_table(stream: dict[tuple[str, str], np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for (where, part), values in stream.items():
        if where == "elsewhere":
            mean = bootstrap(values)
            rows.append((WHOLE, f"sink.{part}", mean.value, mean.low, mean.high, mean.n))
    return pd.DataFrame(rows, columns=["sender", "receiver", "effect", "low", "high", "n"])


def _patched_nodes(model: HookedModel) -> list[Node]:
    """What the joint patches put in: the components of blocks 0-1, then the stream before every block."""
    blocks = [node for node in components(model, CIRCUIT_BLOCKS) if node.kind != "embed"]
    return [*blocks, *(Node("resid_pre", layer) for layer in range(describe(model).n_layers))]


def joint_changes(
    model: HookedModel,
    pair: PromptPair,
    heads: Sequence[tuple[int, int]],
    beside: Int[Tensor, " batch"],
    own: Mapping[Node, Tensor] | None = None,
    shifted_run: tuple[Mapping[Node, Tensor], np.ndarray] | None = None,
    before_clean: np.ndarray | None = None,
) -> dict[tuple[str, str], Float[np.ndarray, " sample"]]:
    """Steps 1, 2 and 4 for one shift: the change of the score by direction and by what was patched, for each row.

    What the caller has already is not run again: `own`, the values of `_patched_nodes` at P0 in the clean run; those at
    the same token in the shifted run, with its scores there; the scores of the clean run.
    """
    nodes = _patched_nodes(model)
    blocks, stream = ([node for node in nodes if (node.kind == "resid_pre") == whole] for whole in (False, True))
    clean, shifted, shift = pair.clean, pair.shifted, pair.shift
    own = values_at(model, clean, nodes) if own is None else own
    if shifted_run is None:
        shifted_values = values_at(model, shifted, nodes, pair.position)
    else:
        shifted_values, before_shifted = shifted_run
        stream = [node for node in stream if node in shifted_values and node in own]
    runs = {"noising": (clean, 0, shifted_values), "denoising": (shifted, shift, own)}
    elsewhere = {
        "noising": values_at(model, shifted, blocks, pair.position + beside),
        "denoising": values_at(model, clean, blocks, clean.p0 + beside),
    }
    found = {}
    for direction, (prompts, place, values) in runs.items():
        if direction == "noising" and before_clean is not None:
            before = before_clean
        elif direction == "denoising" and shifted_run is not None:
            before = before_shifted
        else:
            before = sink_scores(model, prompts, heads, place)
        patches = {
            JOINT: ablate(model, prompts, blocks, values, place),
            WHOLE: ablate(model, prompts, stream, values, place),
            BESIDE: ablate(model, prompts, blocks, elsewhere[direction], place + beside),
        }
        for name, patch in patches.items():
            found[direction, name] = sink_scores(model, prompts, heads, place, [patch]) - before
    return found


def _dealt_changes(
    model: HookedModel, pairs: Sequence[PromptPair], heads: Sequence[tuple[int, int]], beside: Int[Tensor, " batch"]
) -> list[dict[tuple[str, str], Float[np.ndarray, " sample"]]]:
    """Steps 1, 2 and 4, bounded: as `joint_changes` for each shift, not a number in rows dealt out to another one."""
    clean, last = pairs[0].clean, max(layer for layer, _ in heads)
    before = sink_scores(model, clean, heads, 0)
    # The stream above the last sink heads changes no score.
    nodes = [node for node in _patched_nodes(model) if node.kind != "resid_pre" or node.layer <= last]
    index = torch.arange(clean.n)
    # P0's stream is that of a row of its token and any other.
    two = from_ids(torch.stack([clean.ids[index, clean.p0]] * 2, dim=1))
    own = values_at(model, two, nodes)
    changes = []
    for pair, some in zip(pairs, _dealt(pairs, clean.n), strict=False):
        part = _part(pair, some)
        found = joint_changes(
            model,
            part,
            heads,
            beside[some],
            {node: value[some] for node, value in own.items()},
            _values_and_scores(model, part.shifted, nodes, part.position, sink_score_of(heads)),
            before[some.numpy()],
        )
        spread = {}
        for key, values in found.items():
            spread[key] = np.full(clean.n, np.nan)
            spread[key][some.numpy()] = values
        changes.append(spread)
    return changes


@torch.no_grad()
def _values_and_scores(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[Node], position: Int[Tensor, " batch"], metric: Metric
) -> tuple[dict[Node, Tensor], Float[np.ndarray, " batch"]]:
    """What each node computes at a position of each row, and the metric there, from one run."""
    values: dict[Node, list[Tensor]] = {node: [] for node in nodes}
    scores = []
    end = max(metric.end(model), 1 + max(node.layer for node in nodes))
    for rows in batches(model, prompts, position):
        readings: dict[int, Tensor] = {}

        def note(activation: Tensor, hook: Any, node: Node, rows: Rows = rows) -> None:
            values[node].append(node.read(activation, rows.position).clone())

        def score(activation: Tensor, hook: Any, number: int, rows: Rows = rows, readings: Any = readings) -> None:
            readings[number] = metric.readings[number].reduce(activation, rows)

        hooks: list[Hook] = [(node.hook, functools.partial(note, node=node)) for node in nodes]
        hooks += [
            (reading.hook, functools.partial(score, number=number)) for number, reading in enumerate(metric.readings)
        ]
        forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=end)
        scores.append(metric.value(readings))
    return {node: torch.cat(parts) for node, parts in values.items()}, torch.cat(scores).double().cpu().numpy()


def _dealt(pairs: Sequence[PromptPair], most: int) -> list[Int[Tensor, " rows"]]:
    """Rows for each pair, in turn, at most so many in all."""
    rows = torch.arange(min(most, pairs[0].clean.n))
    return [rows[number :: len(pairs)] for number in range(len(pairs)) if number < len(rows)]


def _part(pair: PromptPair, rows: Int[Tensor, " rows"]) -> PromptPair:
    return PromptPair(pair.clean.subset(rows), pair.shifted.subset(rows), pair.shift)


def at_p0(metric: Metric) -> Metric:
    """The metric read at P0, wherever in the row the patch is."""

    def read(activation: Tensor, rows: Rows, reading: Reading) -> Tensor:
        return reading.reduce(activation, rows._replace(position=rows.mask.int().argmax(1)))

    readings = tuple(Reading(one.hook, functools.partial(read, reading=one), one.offsets) for one in metric.readings)
    return Metric(f"{metric.name} at P0", readings, metric.combine)


def _sizes(effects: PathEffects, heads: Sequence[str]) -> Float[np.ndarray, " sample"]:
    """The summed sizes of the effects of all edges into these heads."""
    into = [receiver.rpartition(".")[0] in heads for _, receiver in effects.edges]
    return effects.effect[torch.tensor(into)].abs().sum(0).double().cpu().numpy()


def _joint_table(pairs: Sequence[PromptPair], changes: Sequence[dict[tuple[str, str], np.ndarray]]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for pair, change in zip(pairs, changes, strict=False):
        for (direction, name), values in change.items():
            patched = np.isfinite(values)
            mean = bootstrap(values[patched])
            share = ratio_interval(values[patched], change[direction, WHOLE][patched])
            ends = [getattr(interval, end) for interval in (mean, share) for end in _WIDTH]
            rows.append((direction, pair.shift, name, *ends, mean.n))
    names = ["change", "change_low", "change_high", "share", "share_low", "share_high", "n"]
    return pd.DataFrame(rows, columns=["direction", "shift", "patched", *names])


def _inputs_told(info: ModelInfo, found: StudiedSink) -> list[str]:
    """What a reader of the shares of Q and V has to know about this model."""
    layers = {layer for layer, _ in found.heads}
    told = ["an edge into Q at P0 has no effect in any model: P0's query sees P0 alone"]
    if len(layers) == 1:
        told.append(f"all sink heads are in block {layers.pop()}, so no edge into V can reach another one's score")
    if info.positions == "learned":
        told.append("the embedding is no component of a block: what it says of position 0 is not in the joint patch")
    return told


def _component_maps(singles: pd.DataFrame, info: ModelInfo) -> Figure:
    from p0circuit.figures.maps import effect_maps

    panels = {}
    places = {"noising": "Noising, at P0: lost", "denoising": "Denoising, at m: won"}
    for direction, part in singles.groupby("direction", sort=False):
        panel = part.pivot(index="layer", columns="component", values="share")
        # In a bounded run cells, and whole blocks, may lack an exact patch.
        panel = panel.reindex(index=range(int(singles["layer"].max()) + 1))
        panel = panel[[name for name in _COLUMNS if name in panel.columns]]
        panel.columns.name = "component"
        panels[places[str(direction)]] = panel
    return effect_maps(
        panels, f"{info.title}: what single components at P0 do to the sink", "share of the total effect"
    )


def _share_lines(metrics: dict[str, Interval], info: ModelInfo) -> Figure:
    from p0circuit.figures.intervals import intervals

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
