"""Do later blocks recognise P0 again? It sees only itself in every block, so they can rebuild what was taken away.

1. P0's stream after block K - 1, K being the circuit's depth, is that of the same token when it is not first. Later
   blocks run as they are: whatever of the sink is left was rebuilt by them, or needed no recognition.
2. The same with P0's attention output mixed in all later blocks, so that none of them can recognise P0.
3. The difference is what later recognition rebuilds.

Source: Peng et al., arXiv 2603.06591, on the causal mask; the test is our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.depth.curves import excess_above, shifted_values
from p0circuit.experiments.depth.locator import DepthConfig, Located, locate, passes_of_locator, quick_config
from p0circuit.experiments.depth.runs import RowRuns, put_at_p0, row_batches
from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelInfo, describe, device_of
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.stats import Interval, bootstrap, ratio_interval, ratio_of_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FREE, _MIXED = "later blocks free", "P0 mixed in later blocks"


class RecognisedAgain(Experiment[DepthConfig]):
    """What later blocks rebuild of the sink, with and without recognition in them."""

    id = "recognised-again"
    title = "Recognised again"
    config_type = DepthConfig
    claim = Claim(
        id="C22",
        title="Recognised again",
        source="ours; Peng et al., arXiv 2603.06591, on the causal mask",
        statement="P0 sees only itself in later blocks too, so they can rebuild the sink when the first blocks' work "
        "is taken away.",
        measure="Share of the excess score left when P0's stream after block K-1 is that of the same token when it is "
        "not first, minus the same with P0's attention output mixed in all later blocks.",
        criteria=(Criterion("rebuilt_by_later_recognition", ">", 0.1, "low"),),
        control="Untrained weights, shuffled neurons and a model without read-out.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the run with later attention mixed; the curves are those of `Depth`."""
        # After C21 the curves are in the cache, and only the last term is left: one run of the later blocks, one clean
        # and one shifted run.
        measured = min(second_half(prompts), self.config.samples)
        return passes_of_locator(model, prompts, self.config) + 3 * measured / prompts.n

    def quick(self, info: ModelInfo) -> RecognisedAgain:
        """Return a version for large models with fewer samples."""
        return RecognisedAgain(quick_config(self.config, 8)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink, no block after the circuit, or no sink head there."""
        import pandas as pd

        located = locate(model, prompts, self.config)
        depth, n_layers = located.depth_of(), describe(model).n_layers
        if not 0 < depth < n_layers:
            raise NotApplicable(f"the circuit's depth is {depth} of {n_layers} blocks: there are none after it to test")
        clean = excess_above(located.curves.clean, located.sink.heads, depth - 1)
        free = excess_above(located.curves.stream[depth - 1], located.sink.heads, depth - 1)
        if clean is None or free is None:
            raise NotApplicable(f"no sink head is above block {depth - 1}")
        mixed = excess_above(replaced_and_mixed(model, located, depth), located.sink.heads, depth - 1)
        assert mixed is not None
        left = {_FREE: ratio_interval(free, clean), _MIXED: ratio_interval(mixed, clean)}
        rebuilt = bootstrap(np.stack([free - mixed, clean], axis=1), ratio_of_means)
        metrics = {
            "rebuilt_by_later_recognition": rebuilt,
            "left_with_later_blocks_free": left[_FREE],
            "left_with_p0_mixed_in_later_blocks": left[_MIXED],
        }
        table = pd.DataFrame(
            [{"run": name, "block": depth - 1, **interval.to_json()} for name, interval in left.items()]
        )
        notes = [located.sink.note, f"circuit depth {depth}: the stream is replaced after block {depth - 1}"]
        return Result(self.id, self.title, metrics, {"left": table}, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw what is left with later blocks free and mixed."""
        from p0circuit.figures.intervals import intervals

        lines = result.tables["left"].to_dict("records")
        left = {str(line["run"]): Interval(line["value"], line["low"], line["high"], line["n"]) for line in lines}
        title = f"{result.model_title}: what later blocks rebuild (n = {lines[0]['n']}, 95 % intervals)"
        return {"left": intervals({"Share of the sink left": left}, title, ["share of the excess score"])}


@torch.no_grad()
def replaced_and_mixed(model: HookedModel, located: Located, depth: int) -> torch.Tensor:
    """Excess scores with P0's stream replaced after block `depth` - 1 and P0 mixed in all blocks from there on."""
    values, pair, n_layers = shifted_values(model, located.pair), located.pair, describe(model).n_layers
    parts = []
    for rows in row_batches(model, pair.clean):
        batch = RowRuns.of(model, pair.clean, rows)
        streams, clean = batch.clean(model)
        attention, shifted = (part[rows].to(device_of(model)) for part in (values.attention, values.stream))
        hooks = [
            put_at_p0(f"blocks.{block}.hook_attn_out", attention[:, block], batch.p0)
            for block in range(depth, n_layers)
        ]
        parts.append(batch.run(model, clean, batch.with_p0(streams[depth], shifted[:, depth - 1]), depth, hooks))
    return torch.cat(parts)
