"""What an intervention puts in the place of the clean value: the pair that isolates being first.

*Clean* has token x at P0. *Shifted* has the same token, with the same continuation, at position m behind a random
prefix. Nothing differs but that x is first in one and not in the other. What a node computes at x in the shifted run
is therefore what it would compute at P0 if P0 were not first. The alternatives `resample`, `mean`, `zero` and
`position` are the usual references of activation patching, for comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """Pairs of runs: row i of `shifted` is row i of `clean` behind `shift` other tokens."""

    clean: PromptSet
    shifted: PromptSet
    shift: int

    @property
    def position(self) -> Int[Tensor, " batch"]:
        """Where in each shifted row the token stands that is at P0 in the clean one."""
        return self.shifted.p0 + self.shift


def shifted_pair(model: HookedModel, prompts: PromptSet, shift: int = 8, seed: int = 0) -> PromptPair:
    """Pair prompts with themselves after `shift` random tokens, so that the same token is first and not first.

    Args:
        model: a hooked model; its tokenizer and embedding say which tokens can be drawn. Special ones never are.
        prompts: the clean run.
        shift: how many tokens to prepend.
        seed: of the random tokens.

    Raises:
        InterventionError: `shift` is below 1.
    """
    size, special = sampleable_vocabulary(model)
    return shift_prompts(prompts, shift, size, seed, tuple(special))


def shift_prompts(
    prompts: PromptSet, shift: int, vocab_size: int, seed: int = 0, special: Sequence[int] = ()
) -> PromptPair:
    """Pair prompts with themselves behind a prefix of `shift` tokens drawn uniformly, `special` ones excepted.

    Another seed gives other prefixes. Left-padded prompts keep their padding, before the prefix.

    Raises:
        InterventionError: `shift` is below 1.
    """
    if shift < 1:
        raise InterventionError(f"a shift of {shift} moves nothing away from P0; expected at least 1")
    drawable = torch.tensor([token for token in range(vocab_size) if token not in set(special)])
    generator = torch.Generator().manual_seed(seed)
    prefix = drawable[torch.randint(len(drawable), (prompts.n, shift), generator=generator)]
    ids = torch.cat([torch.zeros_like(prefix), prompts.ids], dim=1)
    mask = torch.cat([torch.zeros_like(prefix, dtype=torch.bool), prompts.attention_mask], dim=1)
    # The prefix stands immediately before the first real token, that is over the last of the row's padding.
    place = prompts.p0[:, None] + torch.arange(shift)
    ids, mask = ids.scatter(1, place, prefix), mask.scatter(1, place, torch.ones_like(prefix, dtype=torch.bool))
    shifted = from_ids(ids, mask, vocab_size)
    return PromptPair(prompts, shifted, shift)


@torch.no_grad()
def values_at(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[str | Node], position: Int[Tensor, " batch"] | None = None
) -> dict[Node, Float[Tensor, "batch *value"]]:
    """What each node computes at one position of each row (at P0 if none is given), in batches that fit in memory."""
    checked = nodes_of(nodes, model)
    place = prompts.p0 if position is None else position
    if int(place.min()) < 0 or int(place.max()) >= prompts.length:
        raise InterventionError(f"positions {place.tolist()} lie outside the {prompts.length} tokens of the prompts")

    def read(activation: Tensor, node: Node, rows: slice) -> Tensor:
        # Only this position is kept, not the activation it would be a view of.
        return node.read(activation, place[rows]).clone()

    return _read(model, prompts, checked, read)


def patch_values(
    model: HookedModel,
    pair: PromptPair,
    nodes: Sequence[str | Node],
    reference: Reference = "shifted",
    offset: int = 8,
) -> dict[Node, Float[Tensor, "batch *value"]]:
    """What to put in the place of each node's clean value at P0.

    `shifted`: its value at the same token behind a prefix. `resample`: at another row's P0 (each row takes the next
    one's). `position`: at the position `offset` after P0 in the same row. `mean`: the mean over the row's positions
    after P0. `zero`.

    Raises:
        InterventionError: an unknown reference, a node that does not exist, or an offset outside the prompts.
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
    """What `reduce` makes of each node's activation, given the node and which rows of the prompts it holds."""
    found: dict[Node, list[Tensor]] = {node: [] for node in nodes}

    def keep(activation: Tensor, hook: Any, node: Node, rows: slice) -> None:
        found[node].append(reduce(activation, node, rows))

    stop = max((node.layer for node in nodes), default=-1) + 1
    size = batch_size_for(model, prompts.length, with_logits=False)
    for start in range(0, prompts.n, size):
        rows = slice(start, start + size)
        hooks = [(node.hook, functools.partial(keep, node=node, rows=rows)) for node in found]
        forward(model, prompts.ids[rows], prompts.attention_mask[rows], hooks=hooks, stop_at_layer=stop)
    return {node: torch.cat(parts) for node, parts in found.items()}
