"""The clean run and its gradients, from which the effects of edges at P0 are estimated.

Whatever stays in P0's own stream is computed in rows of one token. What a new key or value of P0 does at later
positions is first order: the gradient of the metric by what every head reads (z), times the exact change of z. One
gradient is taken in the clean run and one halfway, because later positions saturate: a gradient of 0 in the clean run
can hide an effect.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.attribution import rows_with_gradients
from p0circuit.interventions.batched_runs import by_variant, repeated
from p0circuit.interventions.closed_form import QueryScores, query_side
from p0circuit.interventions.metrics import Complete, Rows, reading_hooks, sink_score_of
from p0circuit.interventions.nodes import Node
from p0circuit.models import describe, forward
from p0circuit.models.hooks import Hook
from p0circuit.models.memory import return_freed_memory
from p0circuit.prompts import PromptSet
from p0circuit.sink import mean_over_queries

POINTS = 2
"""Number of points at which gradients are taken: the clean run and halfway."""


@dataclass(eq=False)
class CleanLayer:
    """One block of the clean run: its queries, and the gradient of the metric by what its heads read.

    Attributes:
        side: queries and scores.
        later: 1 at real positions after P0, 0 elsewhere.
        weight: weight of each head's sink score in the metric.
        slope: gradient of the metric by z.
        along_others: the slope along what each query reads from the keys other than P0, at full weight.
        attention: attention to P0.
        clean: sink scores.
        along_value: the slope along P0's value.
    """

    side: QueryScores
    later: Float[Tensor, "batch query"]
    weight: Float[Tensor, " head"]
    slope: Float[Tensor, "point batch query head d_head"]
    along_others: Float[Tensor, "point batch head query"]
    attention: Float[Tensor, "batch head query"]
    clean: Float[Tensor, "batch head"]
    along_value: Float[Tensor, "point batch head query"]

    def effect(
        self,
        key: Float[Tensor, "variant batch kv_head d_head"],
        value: Float[Tensor, "variant batch kv_head d_head"] | None,
    ) -> Float[Tensor, "variant point batch head"]:
        """Estimate the change of the metric through each head with new keys (and values) of P0.

        The change of a head's own score is exact; what its new output does at later positions is first order.

        Args:
            key: new keys of P0.
            value: new values of P0; the clean ones if None.
        """
        side = self.side
        attention = side.attention(key)
        variants = len(key)
        own = mean_over_queries(attention.flatten(0, 1), side.p0.repeat(variants), repeated(side.mask, variants))
        along = self.along_value
        if value is not None:
            value = value.repeat_interleave(self.slope.shape[3] // value.shape[2], dim=2)
            along = torch.einsum("pbqhd,sbhd->spbhq", self.slope, value)
        attention = attention[:, None]
        read = attention * along + (1 - attention) * self.along_others
        before = self.attention * self.along_value + (1 - self.attention) * self.along_others
        passed_on = ((read - before) * self.later[:, None]).sum(-1)
        return ((by_variant(own, variants) - self.clean) * self.weight)[:, None] + passed_on


def attention_outputs(
    model: HookedModel,
    tokens: Int[Tensor, " batch"],
    sending: Mapping[int, Sequence[Node]],
    values: Mapping[Node, Tensor],
) -> dict[int, Float[Tensor, "batch d_model"]]:
    """Compute the attention output of blocks at P0 with new values of all of their sending heads at once.

    Args:
        model: a hooked model.
        tokens: the tokens at P0.
        sending: sending heads by block.
        values: new values of the heads at P0.
    """
    outputs: dict[int, Tensor] = {}
    if not sending:
        return outputs
    position = torch.zeros_like(tokens)

    def put(z: Tensor, hook: object, nodes: Sequence[Node]) -> Tensor:
        patched = z.clone()
        for node in nodes:
            node.put(patched, position, values[node])
        return patched

    def read(out: Tensor, hook: object, layer: int) -> None:
        outputs[layer] = out[:, 0].clone()

    hooks: list[Hook] = []
    for layer, nodes in sending.items():
        hooks.append((nodes[0].hook, functools.partial(put, nodes=nodes)))
        hooks.append((Node("attn", layer).hook, functools.partial(read, layer=layer)))
    with torch.no_grad():
        forward(model, tokens[:, None], hooks=hooks, stop_at_layer=max(sending) + 1)
    return outputs


def values_together(
    model: HookedModel, tokens: Int[Tensor, " batch"], nodes: Sequence[Node], values: Mapping[Node, Tensor], end: int
) -> dict[int, Float[Tensor, "batch kv_head d_head"]]:
    """Compute P0's value in every block with new values of all senders at once.

    Args:
        model: a hooked model.
        tokens: the tokens at P0.
        nodes: the senders.
        values: new values of the senders at P0.
        end: number of blocks.
    """
    read: dict[int, Tensor] = {}
    position = torch.zeros_like(tokens)
    by_hook: dict[str, list[Node]] = {}
    for node in nodes:
        by_hook.setdefault(node.hook, []).append(node)

    def put(activation: Tensor, hook: object, senders: Sequence[Node]) -> Tensor:
        patched = activation.clone()
        for node in senders:
            node.put(patched, position, values[node])
        return patched

    def note(value: Tensor, hook: object, layer: int) -> None:
        read[layer] = value[:, 0].clone()

    hooks: list[Hook] = [(name, functools.partial(put, senders=senders)) for name, senders in by_hook.items()]
    hooks += [(f"blocks.{layer}.attn.hook_v", functools.partial(note, layer=layer)) for layer in range(end)]
    with torch.no_grad():
        forward(model, tokens[:, None], hooks=hooks, stop_at_layer=end)
    return read


def clean_side(
    model: HookedModel,
    prompts: PromptSet,
    rows: Rows,
    heads: Sequence[tuple[int, int]],
    end: int,
    together: Mapping[int, Float[Tensor, "batch kv_head d_head"]],
) -> tuple[dict[int, CleanLayer], Float[Tensor, "point batch layer d_model"]]:
    """Run the clean prompts for queries, scores and values, and twice more for the gradients of the metric.

    The first gradient is taken in the clean run. The second is taken halfway: with P0's values moved half the way to
    those that all senders lead to together.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        rows: the same, as one batch.
        heads: (layer, head) whose mean sink score is the metric.
        end: number of blocks.
        together: P0's value in every block with new values of all senders, as of `values_together`.

    Returns:
        The blocks, by layer; and the gradients of the metric by the MLP outputs at P0.

    Raises:
        NotOfTheClosedForm: the model's attention is of another kind.
    """
    info = describe(model)
    index = torch.arange(prompts.n, device=rows.position.device)
    mixed: dict[int, Tensor] = {}
    at_p0: dict[int, Tensor] = {}
    attention: dict[int, Tensor] = {}

    def read_value(value: Tensor, hook: object, layer: int) -> None:
        at_p0[layer] = value[index, rows.position].clone()
        mixed[layer] = value

    def read_pattern(pattern: Tensor, hook: object, layer: int) -> None:
        attention[layer] = pattern[index, :, :, rows.position].clone()
        to_others = pattern.clone()
        to_others[index, :, :, rows.position] = 0
        values = mixed[layer].repeat_interleave(info.n_heads // info.n_kv_heads, dim=2)
        total = to_others.sum(-1, keepdim=True).clamp(min=torch.finfo(to_others.dtype).tiny)
        # Normalised: what is read without attention to P0. A query that sees P0 alone reads nothing else.
        mixed[layer] = torch.einsum("bhqk,bkhd->bqhd", to_others / total, values)

    hooks: list[Hook] = []
    for layer in range(end):
        hooks.append((f"blocks.{layer}.attn.hook_v", functools.partial(read_value, layer=layer)))
        hooks.append((f"blocks.{layer}.attn.hook_pattern", functools.partial(read_pattern, layer=layer)))
    sides = query_side(model, prompts, hooks=hooks, layers=end)
    halfway = {layer: (together[layer] - value) / 2 for layer, value in at_p0.items()}
    unmoved, moved = (_slopes(model, rows, heads, end, moves) for moves in ({}, halfway))
    slopes = [torch.stack(pair) for pair in zip(unmoved[0], moved[0], strict=True)]
    slope_mlp = torch.stack([unmoved[1], moved[1]])
    position = torch.arange(prompts.length, device=rows.position.device)
    later = ((position > rows.position[:, None]) & rows.mask).to(slopes[0])
    layers = {}
    for layer, side in sides.items():
        weight = torch.zeros(info.n_heads, device=rows.position.device)
        for head in (head for at, head in heads if at == layer):
            weight[head] += 1 / len(heads)
        value = at_p0[layer].repeat_interleave(info.n_heads // info.n_kv_heads, dim=1)
        layers[layer] = CleanLayer(
            side,
            later,
            weight,
            slopes[layer],
            torch.einsum("pbqhd,bqhd->pbhq", slopes[layer], mixed[layer]),
            attention[layer],
            mean_over_queries(attention[layer], rows.position, rows.mask),
            torch.einsum("pbqhd,bhd->pbhq", slopes[layer], value),
        )
    return layers, slope_mlp


def _slopes(
    model: HookedModel,
    rows: Rows,
    heads: Sequence[tuple[int, int]],
    end: int,
    moves: Mapping[int, Float[Tensor, "batch kv_head d_head"]],
) -> tuple[list[Float[Tensor, "batch query head d_head"]], Float[Tensor, "batch layer d_model"]]:
    """The gradient of the metric by z of every block and by its MLP's output at P0, with P0's values moved."""
    metric, info = sink_score_of(heads), describe(model)
    # By block and part; what comes after the metric's last reading has no slope.
    z: dict[int, list[Tensor]] = {layer: [] for layer in range(end)}
    mlp: dict[int, list[Tensor]] = {layer: [] for layer in range(end)}
    with torch.inference_mode(False), torch.enable_grad():
        for numbers in torch.arange(len(rows.ids), device=rows.ids.device).split(
            rows_with_gradients(info, rows.ids.shape[1])
        ):
            here = Rows(*(part[numbers] for part in rows))
            at_p0 = (torch.arange(len(numbers), device=numbers.device), here.position)
            added: dict[str, Tensor] = {}
            readings: dict[int, Tensor] = {}

            def enter(activation: Tensor, hook: object, name: str, added: dict[str, Tensor] = added) -> Tensor:
                added[name] = torch.zeros_like(activation, requires_grad=True)
                return activation + added[name]

            def move(value: Tensor, hook: object, by: Tensor, at_p0: tuple[Tensor, Tensor] = at_p0) -> Tensor:
                return value.index_put(at_p0, by.to(value), accumulate=True)

            hooks: list[Hook] = [
                (f"blocks.{layer}.attn.hook_v", functools.partial(move, by=by[numbers])) for layer, by in moves.items()
            ]
            names = [f"blocks.{layer}.{part}" for layer in range(end) for part in ("attn.hook_z", "hook_mlp_out")]
            hooks += [(name, functools.partial(enter, name=name)) for name in names]
            with contextlib.suppress(Complete):
                forward(model, here.ids, here.mask, hooks=[*hooks, *reading_hooks(metric, here, readings)])
            total = metric.value(readings).sum()
            slope_of: dict[str, Tensor] = {}
            if added and total.requires_grad:
                slopes = torch.autograd.grad(total, list(added.values()), allow_unused=True, materialize_grads=True)
                slope_of = dict(zip(added, slopes, strict=True))
            shape = (*here.ids.shape, info.n_heads, info.d_head)
            for layer in range(end):
                slope = slope_of.get(f"blocks.{layer}.attn.hook_z")
                z[layer].append(total.new_zeros(shape) if slope is None else slope)
                slope = slope_of.get(f"blocks.{layer}.hook_mlp_out")
                mlp[layer].append(total.new_zeros(len(numbers), info.d_model) if slope is None else slope[at_p0])
            # The graph of a backward pass is many small tensors, whose pages the allocator would keep.
            del added, readings, total, slope_of
            return_freed_memory()
    return (
        [torch.cat(z[layer]).detach() for layer in range(end)],
        torch.stack([torch.cat(mlp[layer]).detach() for layer in range(end)], dim=1),
    )
