"""The whole residual stream of a position in one input (Q, K or V) of all sink heads, in one run.

All of the stream of the shifted run enters that input, so the change of the score bounds what any component can do
through it. Everything else in the run stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.sink_under_study import Heads
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import repeated
from p0circuit.interventions.closed_form import key_hook, query_hook
from p0circuit.interventions.metrics import Metric, Reading, Rows, measure, sink_score_of
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.receiver_inputs import Input, InputPatch, measure_inputs
from p0circuit.models import device_of, forward
from p0circuit.prompts import PromptSet

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from p0circuit.models.hooks import Hook


@dataclass(frozen=True, eq=False)
class WholeStreamChanges:
    """The change of the sink heads' score of P0 with the whole stream of a position in one input of all of them.

    Attributes:
        at_p0: by input (`k`, `v`), the stream of P0.
        at_control: by input (`k`, `q`, `v`), the stream of a random position.
    """

    at_p0: dict[str, Float[np.ndarray, " sample"]]
    at_control: dict[str, Float[np.ndarray, " sample"]]


def whole_stream_changes(
    model: HookedModel,
    clean: PromptSet,
    heads: Heads,
    values: Mapping[Node, Tensor],
    control_values: Mapping[Node, Tensor],
    control_position: Int[Tensor, " batch"],
) -> WholeStreamChanges:
    """Measure what the whole stream does through each input of the sink heads.

    Args:
        model: the model.
        clean: the clean run.
        heads: the sink heads, as (layer, head).
        values: the stream before the block of every sink head, as the shifted run has it at the token of P0.
        control_values: the same at the token of the control position.
        control_position: a random position of each row.
    """
    metric, device = sink_score_of(heads), device_of(model)
    by_layer: dict[int, tuple[int, ...]] = {}
    for layer, head in heads:
        by_layer[layer] = (*by_layer.get(layer, ()), head)
    streams = {layer: Node("resid_pre", layer) for layer in by_layer}
    at_p0 = Rows(*(part.to(device) for part in (clean.ids, clean.attention_mask, clean.p0)))
    at_control = at_p0._replace(position=control_position.to(device))
    # P0 sees itself alone, so its stream is that of a row of one token.
    index = torch.arange(clean.n, device=device)
    first_token = Rows(
        at_p0.ids[index, at_p0.position][:, None],
        torch.ones_like(at_p0.ids[:, :1], dtype=torch.bool),
        torch.zeros_like(at_p0.position),
    )

    def changes(
        inputs: Mapping[tuple[Input, int], Tensor], rows: Rows, score: Metric, parts: tuple[Input, ...]
    ) -> dict[str, Float[np.ndarray, " sample"]]:
        variants = [
            [InputPatch(part, layer, numbers, inputs[part, layer]) for layer, numbers in by_layer.items()]
            for part in parts
        ]
        patched = measure_inputs(model, rows, score, variants)
        unpatched = measure(model, clean, metric).to(patched)
        return {part: (scores - unpatched).double().cpu().numpy() for part, scores in zip(parts, patched, strict=True)}

    return WholeStreamChanges(
        changes(_inputs_with_stream(model, first_token, streams, values), at_p0, metric, ("k", "v")),
        changes(
            _inputs_with_stream(model, at_control, streams, control_values),
            at_control,
            measured_at_p0(metric),
            ("k", "q", "v"),
        ),
    )


def measured_at_p0(metric: Metric) -> Metric:
    """Return the metric read at P0, wherever in the row the patch is.

    Args:
        metric: a metric that is read at the patched position.
    """

    def read(activation: Tensor, rows: Rows, reading: Reading) -> Tensor:
        return reading.reduce(activation, rows._replace(position=rows.mask.int().argmax(1)))

    readings = tuple(Reading(one.hook, functools.partial(read, reading=one), one.offsets) for one in metric.readings)
    return Metric(f"{metric.name} at P0", readings, metric.combine)


@torch.no_grad()
def _inputs_with_stream(
    model: HookedModel, rows: Rows, streams: Mapping[int, Node], values: Mapping[Node, Tensor]
) -> dict[tuple[Input, int], Tensor]:
    """Queries, keys and changes of values by layer, with the stream of the rows' position replaced before each block.

    The rows run twice in one batch: as they are, and with the stream replaced.
    """
    twice = Rows(*(repeated(part, 2) for part in rows))
    batch = len(rows.ids)
    index = torch.arange(2 * batch, device=rows.ids.device)
    inputs: dict[tuple[Input, int], Tensor] = {}

    def replace_stream(activation: Tensor, hook: HookPoint, node: Node) -> Tensor:
        replaced = activation.clone()
        node.put(replaced, rows.position, values[node], slice(batch, 2 * batch))
        return replaced

    def read(activation: Tensor, hook: HookPoint, part: Input, layer: int) -> None:
        here = activation[index, twice.position]
        inputs[part, layer] = (here[batch:] - here[:batch] if part == "v" else here[batch:]).clone()

    hooks: list[Hook] = []
    for layer, node in streams.items():
        names: dict[Input, str] = {
            "q": query_hook(model, layer),
            "k": key_hook(model, layer),
            "v": f"blocks.{layer}.attn.hook_v",
        }
        hooks.append((node.hook, functools.partial(replace_stream, node=node)))
        hooks += [(name, functools.partial(read, part=part, layer=layer)) for part, name in names.items()]
    forward(model, twice.ids, twice.mask, hooks=hooks, stop_at_layer=max(streams) + 1)
    return inputs
