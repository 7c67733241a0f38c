"""The causal path of the sink (C7): which components at P0 carry it, and through which input of the sink heads.

*Activation patching.* The clean run has a token at P0; the shifted run has the same token at position m, after a random
prefix. Noising puts what the shifted run computes at m into the clean run at P0: is it necessary? Denoising puts what
the clean run computes at P0 into the shifted run at m: is it sufficient? The metric is the sink heads' score of the
patched position.

1. *Total effect*, one for each direction: the change with the whole stream patched before every block. Nothing of what
   later positions read from this position is left as it was. In denoising the P0 of the prefix still competes, so the
   total effect is smaller than the difference between the two runs; it is the most that a share can reach.
2. *Joint*: the outputs of attention and MLP of blocks 0-1 (without the embedding), all of them at once.
3. *Single*: the embedding, the stream, attention and MLP of every block up to the last sink heads, each by itself.
4. *Control*: as 2, at a random position after P0, with its values of the other run at the same token.

*Path patching*, in the clean run: each edge from a component at P0 to an MLP of blocks 0-1 or to Q, K or V of a sink
head, all other paths cut (`interventions.path_patching`).

5. The edge effect is the sum, over all edges into sink heads, of the sizes of the changes of their score. It is split
   by the input: K, Q or V.
6. For two reasons Q and V are weak rivals of K in 5. P0's own query sees P0 alone, so edges into Q at P0 have no effect
   in any model. And V changes what a head reads, which only later sink heads can respond to. So two more quantities are
   measured. *Whole stream*: the effect of all of the stream at once on K (and V) at P0, and on Q of all later queries,
   each as a share of the total effect of 1. Queries are estimated from one random query of each row, times their
   number. *Control*: the edges of 5 from that random position, and the changes they make in the score of P0.

There are several shifts, each with prefixes of its own. In 1, 2 and 4 every sample is patched at every shift, and the
mean over shifts counts; in 3, 5 and 6 every sample is assigned to one shift.

If single heads and MLPs have more than `most_edges` edges, the run is *bounded*: its work is fixed beforehand.

- In 1, 2 and 4, too, every sample is assigned to one shift.
- In 3 every noising patch is estimated from rows of one token (the exact change of P0's keys, with all later positions
  as they were); the strongest and a random sample are patched exactly, in both directions.
- In 5 the sink heads of a block are one receiver. Edges are estimated, and the strongest and a random sample patched
  exactly (`interventions.edge_search`); the notes state the error of the estimates.
- In 6 the whole stream enters K (or V, or Q) of all sink heads in one run; the same at the random position.

Source: Peng et al., arXiv 2603.06591, sections on recognition and amplification; methods of Meng et al. 2022 (arXiv
2202.05262) and Wang et al. 2022 (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable, block_names
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.measures.joint_patches import (
    DIRECTIONS,
    JOINT,
    JOINT_CONTROL,
    WHOLE_STREAM,
    JointChanges,
    joint_changes_at_every_shift,
    joint_changes_at_one_shift,
    joint_table,
    mean_over_shifts,
)
from p0circuit.experiments.measures.single_patches import (
    COMPONENTS,
    FEWEST_EXACT_SAMPLES,
    patch_every_single,
    patch_strongest_singles,
)
from p0circuit.experiments.measures.sink_head_edges import SinkHeadEdges, patch_every_edge, search_strongest_edges
from p0circuit.experiments.sink_under_study import StudiedSink, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.closed_form import NotOfTheClosedForm
from p0circuit.interventions.edge_search import expected_passes
from p0circuit.interventions.pairs import PromptPair, shifted_pair
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CausalPathConfig:
    """Settings of the causal path.

    Attributes:
        shifts: lengths of the prefixes, in tokens.
        samples: number of samples to patch at most.
        runs: bound on patches times samples in 3, and on edges times samples in 5; there are fewer samples if needed.
        most_edges: number of edges above which the run is bounded.
        rows: number of samples for edges and for estimates of a bounded run.
        row_runs: bound on the exact single patches of a bounded run, and on its exact edges, each in rows through all
            blocks.
        blocks: where the circuit is: the first two blocks, as the paper says, or those that `depth` finds.
    """

    shifts: tuple[int, ...] = (4, 16, 32)
    samples: int = 128
    runs: int = 3072
    most_edges: int = 2_000
    rows: int = 6
    row_runs: int = 72
    blocks: tuple[int, ...] = CIRCUIT_BLOCKS


def share_of_blocks(blocks: Sequence[int], direction: str) -> str:
    """Name the metric that is the share of the total effect that these blocks have together.

    Args:
        blocks: the blocks.
        direction: "noising" or "denoising".
    """
    return f"share_of_blocks_{'_'.join(map(str, blocks))}_in_{direction}"


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
            Criterion(share_of_blocks(CIRCUIT_BLOCKS, "noising"), ">=", 0.8),
            Criterion(share_of_blocks(CIRCUIT_BLOCKS, "denoising"), ">=", 0.8),
            Criterion("share_of_k_among_edges_into_sink_heads", ">=", 0.8),
        ),
        control="The same joint patches at a random position, and edges from there.",
    )

    @property
    def deciding_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the configured blocks that correspond to the claim's."""
        *_, of_keys = super().deciding_metrics
        return *(share_of_blocks(self.blocks, direction) for direction in DIRECTIONS), of_keys

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the passes over the prompts, beyond the recordings that choose the sink heads.

        Args:
            model: the model that would be measured.
            prompts: the prompts that would be given to `run`.
        """
        info, n, length = describe(model), prompts.n, prompts.length
        config, samples, layers = self.config, min(self.config.samples, n - n // 2), info.n_layers
        shifts = _shifts_that_fit(config.shifts, length, info) or [0]
        # Length of a shifted row, and depth of the circuit, in units of the clean row and of the model.
        shifted = 1 + sum(shifts) / len(shifts) / length
        early = len(config.blocks) / layers
        if self._is_bounded(info):
            rows, exact = min(samples, config.rows), min(samples, max(len(shifts), FEWEST_EXACT_SAMPLES))
            joint = samples * (shifted + 3 + 3 * shifted + 2 * early)
            singles = rows * (shifted + 1 + (4 * layers + 2) / length)
            singles += 2 * exact * (1 + shifted + 1) + min(config.row_runs, 2 * exact * layers * 3)
            edges = (
                2 * rows * shifted + 2 * rows + expected_passes(info, length, rows, rows, 0, heads=False, kinds=("v",))
            )
            # The whole stream in five inputs, read at two positions.
            return (joint + singles + edges + config.row_runs + 8 * rows) / n
        joint = samples * (1 + len(shifts) * (shifted + early + early * shifted + 3 + 4 * shifted))
        patches, sink_heads = len(COMPONENTS) * layers, max(1, layers * info.n_heads // 8)
        rows = min(samples, max(len(shifts), config.runs // (2 * patches)))
        singles = rows * (2 * (shifted + 1) * 2 + (4 * layers + 1) / 2 * (1 + shifted))
        senders, inputs = 2 * layers - 1, 3 * sink_heads
        rows = min(samples, max(len(shifts), config.runs // (2 * senders * inputs)))
        # Edges into Q have no effect at P0 and run at the random position only.
        runs_per_row = 3 * senders + 5 / 3 * senders * inputs / layers + senders * len(CIRCUIT_BLOCKS) / 2
        return (joint + singles + rows * (2 * shifted + runs_per_row)) / n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Patch jointly, singly and along paths, and measure the shares of the total effect.

        Args:
            model: the model to measure.
            prompts: natural text.

        Raises:
            NotApplicable: the model has no block 1, or no sink, or P0's whole stream has no effect on its sink.
        """
        info = describe(model)
        if info.n_layers <= (last := max(self.config.blocks)):
            raise NotApplicable(f"the last block of {info.title} is {info.n_layers - 1}: there is no block {last}")
        shifts = _shifts_that_fit(self.config.shifts, prompts.length, info)
        if not shifts:
            raise NotApplicable(
                f"{info.title} has {info.n_ctx} positions: no room for a prefix of {min(self.config.shifts)} tokens "
                f"before prompts of {prompts.length}; shorten them"
            )
        sink = studied_sink(model, prompts)
        clean = sink.prompts.subset(slice(0, self.config.samples))
        pairs = [shifted_pair(model, clean, shift, prompts.seed + number) for number, shift in enumerate(shifts)]
        control_offsets = _random_offsets_after_p0(clean, prompts.seed)
        bounded = self._is_bounded(info)
        patch_jointly = joint_changes_at_one_shift if bounded else joint_changes_at_every_shift
        changes = patch_jointly(model, pairs, sink.heads, control_offsets, self.config.blocks)
        metrics = _joint_metrics(mean_over_shifts(changes), self.config.blocks)
        try:
            singles, notes_on_singles = self._single_patches(model, pairs, sink, changes, bounded)
            edges = self._edges(model, pairs, sink, changes, control_offsets, bounded)
        except NotOfTheClosedForm as reason:
            raise NotApplicable(f"{info.title} has too many components to patch each of them, and {reason}") from None
        metrics |= _edge_metrics(edges)
        assignment = "each sample with one prefix" if bounded else "each sample with every prefix"
        notes = [
            sink.note,
            f"{clean.n} samples; prefixes of {', '.join(map(str, shifts))} tokens, {assignment}; edges on "
            f"{edges.samples} samples",
            *_notes_on_inputs(info, sink),
            *notes_on_singles,
            *edges.notes,
        ]
        if len(shifts) < len(self.config.shifts):
            notes.append(f"longer prefixes do not fit {info.n_ctx} positions")
        tables = {
            "joint": joint_table(pairs, changes, self.config.blocks),
            "components": singles,
            "edges": edges.table,
            "edges_at_random_position": edges.control_table,
        }
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the effects of single components, and the shares of the total effect.

        Args:
            result: a result of this experiment.
        """
        return {
            "components": _draw_components(result.tables["components"], result.model_title),
            "shares": _draw_shares(result.metrics, result.model_title, result.provenance["config"]["blocks"]),
        }

    def _is_bounded(self, info: ModelInfo) -> bool:
        """Whether there are too many edges between components and single heads to patch each of them."""
        receivers = 3 * info.n_layers * info.n_heads + len(CIRCUIT_BLOCKS)
        return (2 * info.n_layers + 1) * receivers // 2 > self.config.most_edges

    def _single_patches(
        self,
        model: HookedModel,
        pairs: Sequence[PromptPair],
        sink: StudiedSink,
        changes: Sequence[JointChanges],
        bounded: bool,
    ) -> tuple[pd.DataFrame, list[str]]:
        """Step 3: the table, and notes on its estimates."""
        if bounded:
            return patch_strongest_singles(model, pairs, sink.heads, changes, self.config.rows, self.config.row_runs)
        return patch_every_single(model, pairs, sink.heads, changes, self.config.runs), []

    def _edges(
        self,
        model: HookedModel,
        pairs: Sequence[PromptPair],
        sink: StudiedSink,
        changes: Sequence[JointChanges],
        control_offsets: Int[Tensor, " sample"],
        bounded: bool,
    ) -> SinkHeadEdges:
        """Steps 5 and 6."""
        if bounded:
            return search_strongest_edges(
                model, pairs, sink.heads, changes, control_offsets, self.config.rows, self.config.row_runs
            )
        return patch_every_edge(model, pairs, sink.heads, changes, control_offsets, self.config.runs)


def _shifts_that_fit(shifts: Sequence[int], length: int, info: ModelInfo) -> list[int]:
    """The shifts at which prompts of this length fit the model's context."""
    return [shift for shift in shifts if info.n_ctx is None or length + shift <= info.n_ctx]


def _random_offsets_after_p0(clean: PromptSet, seed: int) -> Int[Tensor, " sample"]:
    """A random position of each row, counted from P0, at least 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = clean.length - clean.p0
    return 1 + (torch.rand(clean.n, generator=generator) * (lengths - 1)).long()


def _joint_metrics(changes: JointChanges, blocks: Sequence[int]) -> dict[str, Interval]:
    """Shares of the total effect, from the mean change of each sample."""
    metrics: dict[str, Interval] = {}
    for direction in DIRECTIONS:
        total = bootstrap(changes[direction, WHOLE_STREAM])
        if total.low <= 0 <= total.high:
            raise NotApplicable(
                f"{direction} P0's whole stream changes the sink heads' score by {total}, which is not different from "
                "0: the sink does not depend on the stream at P0, so there is no effect to take shares of"
            )
    for direction in DIRECTIONS:
        total = changes[direction, WHOLE_STREAM]
        metrics[share_of_blocks(blocks, direction)] = ratio_interval(changes[direction, JOINT], total)
        metrics[f"share_of_random_position_in_{direction}"] = ratio_interval(changes[direction, JOINT_CONTROL], total)
        metrics[f"total_effect_of_{direction}"] = bootstrap(total)
    return metrics


def _edge_metrics(edges: SinkHeadEdges) -> dict[str, Interval]:
    if edges.shares is None:
        raise NotApplicable("no edge from a component at P0 into a sink head has any effect on its score")
    metrics = {f"share_of_{part}_among_edges_into_sink_heads": edges.shares[part] for part in "kqv"}
    metrics |= {f"share_of_{part}_in_total_effect": share for part, share in edges.whole_stream.items()}
    return metrics | {"edges_at_random_position_over_those_at_p0": edges.control_ratio}


def _notes_on_inputs(info: ModelInfo, sink: StudiedSink) -> list[str]:
    """What a reader of the shares of Q and V has to know about this model."""
    layers = {layer for layer, _ in sink.heads}
    notes = ["an edge into Q at P0 has no effect in any model: P0's query sees P0 alone"]
    if len(layers) == 1:
        notes.append(f"all sink heads are in block {layers.pop()}, so no edge into V can reach another one's score")
    if info.positions == "learned":
        notes.append(
            "the embedding is not part of any block: what the position embedding adds at P0 is not in the joint patch"
        )
    return notes


def _draw_components(singles: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.maps import effect_maps

    panels = {}
    titles = {"noising": "Noising at P0: share lost", "denoising": "Denoising at m: share gained"}
    for direction, part in singles.groupby("direction", sort=False):
        panel = part.pivot(index="layer", columns="component", values="share")
        # In a bounded run cells, and whole blocks, may lack an exact patch.
        panel = panel.reindex(index=range(int(singles["layer"].max()) + 1))
        panel = panel[[name for name in COMPONENTS if name in panel.columns]]
        panel.columns.name = "component"
        panels[titles[str(direction)]] = panel
    n = _sample_range(singles["n"])
    return effect_maps(panels, f"{model}: sink carried by single components at P0 (n = {n})", "share of total effect")


def _draw_shares(metrics: Mapping[str, Interval], model: str, blocks: Sequence[int]) -> Figure:
    from p0circuit.figures.intervals import intervals

    def rounded(name: str) -> Interval:
        # A rounding error should not be labelled in powers of ten; adding 0 removes the sign of -0.
        one = metrics[name]
        return Interval(round(one.value, 3) + 0.0, round(one.low, 3) + 0.0, round(one.high, 3) + 0.0, one.n)

    joint, edges = metrics["total_effect_of_noising"].n, metrics["share_of_k_in_total_effect"].n
    panels = {
        f"All components of {block_names(blocks)} (n = {joint})": {
            "noising at P0": rounded(share_of_blocks(blocks, "noising")),
            "denoising at m": rounded(share_of_blocks(blocks, "denoising")),
            "noising, control position": rounded("share_of_random_position_in_noising"),
            "denoising, control position": rounded("share_of_random_position_in_denoising"),
        },
        f"Edges from components at P0 into sink heads (n = {edges})": {
            part.upper(): rounded(f"share_of_{part}_among_edges_into_sink_heads") for part in "kqv"
        },
        f"Whole stream in one input of the sink heads (n = {edges})": {
            "K of P0": rounded("share_of_k_in_total_effect"),
            "Q of all later queries": rounded("share_of_q_in_total_effect"),
            "V of P0": rounded("share_of_v_in_total_effect"),
        },
    }
    labels = ["share of total effect", "share of summed effects", "share of total effect"]
    controls = ("noising, control position", "denoising, control position")
    return intervals(
        panels, f"{model}: path of the sink from P0 to the sink heads, with 95 % intervals", labels, controls
    )


def _sample_range(n: pd.Series) -> str:
    """The number of samples, or their range where it differs between cells."""
    least, most = int(n.min()), int(n.max())
    return str(least) if least == most else f"{least} to {most}"
