"""Does it matter which token is at P0? (C9; paper, section on amplification)

1. The *P0 direction* after a block is the mean direction of the stream at P0, estimated on the other half of the
   samples. *Content* is everything orthogonal to it.
2. *Content replaced*: P0's stream after block 1 keeps its component along the direction and gets the content of the
   next sample with another token at P0. This decides the verdict. A second variant takes the content of an ordinary
   position of the next sample (4, 16 and 32 take turns), which no first token wrote.
3. *Control, direction replaced*: P0 keeps its content and gets the component along the P0 direction of the same
   ordinary position. P0's content is small, so after a norm layer even a small component gives a high cosine with the
   P0 direction. That cosine is measured, and a last variant removes the component.
4. The measure is the share of the excess score that the sink heads above keep. All variants are repeated after other
   blocks.

The table of blocks has the share of P0's squared norm that is orthogonal to the direction: how much is replaced.
Source: Peng et al., arXiv 2603.06591.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.base import ORDINARY, Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import StudiedSink, excess_by_head, heads_above, share_left, studied_sink
from p0circuit.experiments.surgery import ordinary_streams, row_of_another_token
from p0circuit.figures.lines import series_by
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import replace_orthogonal, set_component
from p0circuit.interventions.edits import component
from p0circuit.interventions.intervention import p0_direction
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import residual_at
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS
from p0circuit.stats import Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TOKEN, _ORDINARY = "content of another token", "content of an ordinary position"
_ALONG, _REMOVED = "control: direction replaced", "direction removed"

BOUND = 0.9
"""The share of the excess score that must be left with the content replaced."""


@dataclass(frozen=True)
class ContentConfig:
    """Settings of `Content`.

    Attributes:
        ordinary: positions, counted from P0, whose content or component replaces P0's.
        scan_samples: maximum number of prompts of the scan over blocks.
        scan_blocks: maximum number of blocks of the scan.
        blocks: where the circuit is: the first two blocks, as the paper says, or those that `depth` finds.
    """

    ordinary: tuple[int, ...] = ORDINARY
    scan_samples: int = 128
    scan_blocks: int = 8
    blocks: tuple[int, ...] = CIRCUIT_BLOCKS


class Content(Experiment[ContentConfig]):
    """The share of the sink that is left when P0 keeps only its component along the P0 direction."""

    id = "content"
    title = "Content is irrelevant"
    config_type = ContentConfig
    claim = Claim(
        id="C9",
        title="Content is irrelevant",
        source="Peng et al., arXiv 2603.06591, section on amplification",
        statement="After block 1 the component along one direction makes P0 a sink; the token that stands there and "
        "all else in its stream do not matter.",
        measure="Share of the excess score that is left when everything in P0's residual after block 1 that is "
        "orthogonal to the P0 direction is replaced by that of another sample with another token at P0.",
        criteria=(Criterion("left_with_content_replaced", ">=", BOUND),),
        control="The component along the direction replaced by that of an ordinary position, the content kept.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare four interventions after the circuit, and after each block of the scan."""
        rows, config = second_half(prompts), self.config
        scan_rows, blocks = min(rows, config.scan_samples), min(config.scan_blocks, describe(model).n_layers - 1)
        # Four variants, after block 1 and after each block of the scan.
        return 4 * (rows + blocks * scan_rows) / prompts.n

    def quick(self, info: ModelInfo) -> Content:
        """Return a version for large models with fewer samples and blocks in the scan."""
        return Content(replace(self.config, scan_samples=8, scan_blocks=2)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure on the sink heads above the circuit; see `measure_on`."""
        return self.measure_on(studied_sink(model, prompts, above_block=max(self.config.blocks)))

    def measure_on(self, sink: StudiedSink) -> Result:
        """Measure a sink whose heads are known.

        Args:
            sink: the sink; its heads are above block 1.

        Raises:
            NotApplicable: all samples have the same token at P0, or rows are too short for an ordinary position.
        """
        import pandas as pd

        model = sink.model
        prompts = sink.prompts
        block = max(self.config.blocks)
        donor_positions = [offset for offset in self.config.ordinary if offset < prompts.length]
        if not donor_positions:
            raise NotApplicable(f"rows of {prompts.length} tokens have no position {self.config.ordinary[0]}")
        own = record(model, prompts, residual_at())
        first = prompts.ids[torch.arange(prompts.n), prompts.p0]
        ordinary = ordinary_streams(model, prompts, donor_positions)
        donor = {_TOKEN: own[row_of_another_token(first)], _ORDINARY: ordinary, _ALONG: ordinary}
        donor[_REMOVED] = torch.zeros_like(own)
        clean = excess_by_head(model, prompts)[0]
        direction = p0_direction(model, sink.chosen_on, block + 1).cpu()
        left = {
            name: share_left(_excess_after(model, prompts, name, block, direction, streams), clean, sink.heads)
            for name, streams in donor.items()
        }
        content, along = _parts(own[:, block + 1], direction)
        given = _parts(ordinary[:, block + 1], direction)[1]
        metrics = {
            "left_with_content_replaced": left[_TOKEN],
            "left_with_content_of_an_ordinary_position": left[_ORDINARY],
            "left_with_direction_replaced": left[_ALONG],
            "left_with_direction_removed": left[_REMOVED],
            "orthogonal_share_of_squared_norm": bootstrap((content**2 / (content**2 + along**2)).numpy()),
            "cosine_with_direction_replaced": bootstrap((given / (given**2 + content**2).sqrt()).numpy()),
        }
        tables = {
            "surgery": pd.DataFrame([{"surgery": name} | interval.to_json() for name, interval in left.items()]),
            "blocks": self._scan(model, sink, clean, own, donor),
        }
        names = ", ".join(map(str, donor_positions))
        notes = [*sink.notes, f"ordinary positions are {names} of the next sample, in turn", *_caveats(metrics, block)]
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw what is left of the sink, by variant and by the block of the intervention."""
        return {"blocks": _draw(result.tables["blocks"], result.model_title)}

    def _scan(
        self, model: HookedModel, sink: StudiedSink, clean: Tensor, own: Tensor, donor: dict[str, Tensor]
    ) -> pd.DataFrame:
        """All variants after each block, measured on the sink heads above it."""
        import pandas as pd

        first = slice(0, self.config.scan_samples)
        prompts = sink.prompts.subset(first)
        rows = []
        for block in sink.blocks_to_scan(self.config.scan_blocks):
            heads, direction = heads_above(sink.heads, block), p0_direction(model, sink.chosen_on, block + 1).cpu()
            content, along = _parts(own[first, block + 1], direction)
            share = float((content**2 / (content**2 + along**2)).mean())
            for name, streams in donor.items():
                excess = _excess_after(model, prompts, name, block, direction, streams[first])
                left = share_left(excess, clean[first], heads)
                row = {"surgery": name, "after_block": block, "heads": len(heads), **left.to_json()}
                rows.append(row | {"orthogonal_share": share})
        return pd.DataFrame(rows)


def _excess_after(
    model: HookedModel, prompts: PromptSet, surgery: str, block: int, direction: Tensor, streams: Tensor
) -> Float[Tensor, "sample layer head"]:
    """The excess scores of P0 under an intervention on its stream after a block; `streams` are those of the donors."""
    nodes, donor = [f"resid_post.{block}"], streams[:, block + 1]
    if surgery in (_ALONG, _REMOVED):
        intervention = set_component(model, prompts, nodes, direction, component(donor.to(direction), direction))
    else:
        intervention = replace_orthogonal(model, prompts, nodes, direction, to=donor)
    return excess_by_head(model, prompts, [intervention])[0]


def _caveats(metrics: dict[str, Interval], block: int) -> list[str]:
    """Sentences on measurements that qualify the verdict."""
    caveats = []
    ordinary, control = metrics["left_with_content_of_an_ordinary_position"], metrics["left_with_direction_replaced"]
    if ordinary.low < BOUND <= metrics["left_with_content_replaced"].value:
        caveats.append(
            f"the token is irrelevant, but not all that is orthogonal: with that of an ordinary position after block "
            f"{block}, {ordinary} is left; being first shows outside this direction too"
        )
    if control.high > 0.5:
        caveats.append(
            f"the control does not end the sink: {control} is left with an ordinary component along the direction, as "
            f"the content is short and P0's cosine to it is still {metrics['cosine_with_direction_replaced']}; with no "
            f"component along it, {metrics['left_with_direction_removed']} is left"
        )
    return caveats


def _parts(
    streams: Float[Tensor, "sample d_model"], direction: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " sample"], Float[Tensor, " sample"]]:
    """The norm of what is orthogonal to a direction, and the component along it."""
    precise, axis = streams.double(), direction.double()
    along = component(precise, axis)
    return (precise - along[:, None] * axis).norm(dim=-1), along


def _draw(scan: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    title = f"{model}: P0's stream with other content"
    blocks = [str(block) for block in scan["after_block"].unique()]
    panels = {"What is left of the sink": series_by(scan, "surgery")}
    return trajectories(panels, blocks, title, "surgery after block", ["share of the excess left"], reference=BOUND)
