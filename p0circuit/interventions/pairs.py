"""Clean and shifted prompts, and the values that an intervention puts in the place of the clean ones.

*Clean* prompts have token x at P0. *Shifted* prompts have the same token, with the same continuation, after a random
prefix of m tokens. The only difference is that x is first in one and not in the other. The output of a node at x in the
shifted run is therefore its output at P0 if P0 were not first. The alternatives `resample`, `mean`, `zero` and
`position` are the usual references of activation patching, for comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.models import forward
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import PromptSet, from_ids
from p0circuit.recording.batch_size import batch_size_for

Reference = Literal["shifted", "resample", "position", "mean", "zero"]


@dataclass(frozen=True)
class PromptPair:
    """Clean prompts and the same prompts after a prefix of other tokens.

    Attributes:
        clean: the clean prompts.
        shifted: the same prompts, each after its own prefix.
        shift: tokens of the prefix.
    """

    clean: PromptSet
    shifted: PromptSet
    shift: int

    @property
    def position(self) -> Int[Tensor, " batch"]:
        """Index in each shifted prompt of the token that is at P0 in the clean one."""
        return self.shifted.p0 + self.shift


def shifted_pair(model: HookedModel, prompts: PromptSet, shift: int = 8, seed: int = 0) -> PromptPair:
    """Pair prompts with themselves after a random prefix, so that the same token is first and not first.

    Args:
        model: a hooked model. Its tokenizer and embedding decide which tokens the prefix is drawn from; special tokens
            are never drawn.
        prompts: the clean prompts.
        shift: tokens of the prefix.
        seed: seed of the prefix.

    Returns:
        The clean and the shifted prompts.

    Raises:
        InterventionError: `shift` is below 1.

    Example:
        pair = p0circuit.shifted_pair(model, prompts, shift=8)
        pair.position  # where P0's token is in the shifted prompts
    """
    size, special = sampleable_vocabulary(model)
    return shift_prompts(prompts, shift, size, seed, tuple(special))


def shift_prompts(
    prompts: PromptSet, shift: int, vocab_size: int, seed: int = 0, special: Sequence[int] = ()
) -> PromptPair:
    """Pair prompts with themselves after a random prefix, given the vocabulary instead of a model.

    Left-padded prompts keep their padding, before the prefix.

    Args:
        prompts: the clean prompts.
        shift: tokens of the prefix.
        vocab_size: number of tokens of the vocabulary.
        seed: seed of the prefix.
        special: token ids that are never drawn.

    Raises:
        InterventionError: `shift` is below 1.
    """
    if shift < 1:
        raise InterventionError(f"a shift of {shift} moves nothing away from P0; expected at least 1")
    tokens = torch.tensor([token for token in range(vocab_size) if token not in set(special)])
    generator = torch.Generator().manual_seed(seed)
    prefix = tokens[torch.randint(len(tokens), (prompts.n, shift), generator=generator)]
    ids = torch.cat([torch.zeros_like(prefix), prompts.ids], dim=1)
    mask = torch.cat([torch.zeros_like(prefix, dtype=torch.bool), prompts.attention_mask], dim=1)
    # The prefix comes immediately before the first real token, after any padding.
    positions = prompts.p0[:, None] + torch.arange(shift)
    ids, mask = ids.scatter(1, positions, prefix), mask.scatter(1, positions, torch.ones_like(prefix, dtype=torch.bool))
    shifted = from_ids(ids, mask, vocab_size)
    return PromptPair(prompts, shifted, shift)


@torch.no_grad()
def values_at(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[str | Node], position: Int[Tensor, " batch"] | None = None
) -> dict[Node, Float[Tensor, "batch *value"]]:
    """Read the output of nodes at one position of each prompt, in batches that fit into memory.

    Args:
        model: a hooked model.
        prompts: the prompts.
        nodes: names or nodes.
        position: index of the position in each prompt; P0 if None.

    Returns:
        Outputs by node: a vector per prompt, or a number for a neuron.

    Raises:
        InterventionError: a node does not exist, or a position lies outside the prompts.
    """
    checked = nodes_of(nodes, model)
    positions = prompts.p0 if position is None else position
    if int(positions.min()) < 0 or int(positions.max()) >= prompts.length:
        raise InterventionError(
            f"positions {positions.tolist()} lie outside the {prompts.length} tokens of the prompts"
        )

    def read(activation: Tensor, node: Node, rows: slice) -> Tensor:
        # A copy, because a view would keep the whole activation in memory.
        return node.read(activation, positions[rows]).clone()

    return _read(model, prompts, checked, read)


def patch_values(
    model: HookedModel,
    pair: PromptPair,
    nodes: Sequence[str | Node],
    reference: Reference = "shifted",
    offset: int = 8,
) -> dict[Node, Float[Tensor, "batch *value"]]:
    """Compute the values that take the place of the clean outputs of nodes at P0.

    Args:
        model: a hooked model.
        pair: clean and shifted prompts.
        nodes: names or nodes.
        reference: "shifted": the output at the same token in the shifted prompt. "resample": the output at P0 of
            another prompt (each prompt takes the next one's). "position": the output at `offset` after P0 in the same
            prompt. "mean": the mean output over the positions after P0 of the same prompt. "zero".
        offset: tokens after P0, for the reference "position".

    Returns:
        Values by node: a vector per prompt, or a number for a neuron.

    Raises:
        InterventionError: the reference is unknown, a node does not exist, or the offset lies outside the prompts.
    """
    if reference == "shifted":
        return values_at(model, pair.shifted, nodes, pair.position)
    if reference == "resample":
        return {node: value.roll(-1, 0) for node, value in values_at(model, pair.clean, nodes).items()}
    if reference == "position":
        return values_at(model, pair.clean, nodes, pair.clean.p0 + offset)
    if reference == "zero":
        return {node: torch.zeros_like(value) for node, value in values_at(model, pair.clean, nodes).items()}
    if reference == "mean":
        return _means_after_p0(model, pair.clean, nodes_of(nodes, model))
    raise InterventionError(f"unknown reference {reference!r}; expected shifted, resample, position, mean or zero")


@torch.no_grad()
def _means_after_p0(model: HookedModel, prompts: PromptSet, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    after = prompts.attention_mask & (torch.arange(prompts.length) != prompts.p0[:, None])

    def mean(activation: Tensor, node: Node, rows: slice) -> Tensor:
        values = activation if node.index is None else activation[:, :, node.index]
        weights = after[rows].to(values).view(*values.shape[:2], *[1] * (values.ndim - 2))
        return (values * weights).sum(1) / weights.sum(1)

    return _read(model, prompts, nodes, mean)


def _read(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[Node], reduce: Callable[[Tensor, Node, slice], Tensor]
) -> dict[Node, Float[Tensor, "batch *value"]]:
    """The reduced activation of each node; `reduce` also gets the node and which prompts are in the batch."""
    values: dict[Node, list[Tensor]] = {node: [] for node in nodes}

    def read(activation: Tensor, hook: object, node: Node, rows: slice) -> None:
        values[node].append(reduce(activation, node, rows))

    stop = max((node.layer for node in nodes), default=-1) + 1
    size = batch_size_for(model, prompts.length, with_logits=False)
    for start in range(0, prompts.n, size):
        rows = slice(start, start + size)
        hooks = [(node.hook, functools.partial(read, node=node, rows=rows)) for node in values]
        forward(model, prompts.ids[rows], prompts.attention_mask[rows], hooks=hooks, stop_at_layer=stop)
    return {node: torch.cat(parts) for node, parts in values.items()}
