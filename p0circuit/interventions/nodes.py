"""Nodes: the parts of a model that an intervention can act on, by the names used in tables and graphs.

embed              the input of block 0: the token embedding, plus the position embedding if that is learned
resid_pre.{l}      the residual stream before block l; likewise resid_mid.{l} and resid_post.{l}
attn.{l}           the output of the attention of block l; attn.{l}.{h}: its head h (`hook_z`)
mlp.{l}            the output of the MLP of block l; neuron.{l}.{i}: its hidden neuron i (after the non-linearity and,
                   in gated MLPs, the product with the linear branch)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelError, ModelInfo, describe
from p0circuit.models.hooks import hook_point

Kind = Literal["embed", "resid_pre", "resid_mid", "resid_post", "attn", "head", "mlp", "neuron"]
COMPONENTS: tuple[Kind, ...] = ("embed", "resid_pre", "attn", "resid_mid", "mlp", "resid_post")
"""Kinds of nodes that are one vector at each position, in the order of a block."""

_HOOKS: dict[Kind, str] = {
    "embed": "blocks.0.hook_resid_pre",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn": "blocks.{}.hook_attn_out",
    "head": "blocks.{}.attn.hook_z",
    "mlp": "blocks.{}.hook_mlp_out",
    "neuron": "blocks.{}.mlp.hook_post",
}
_NAME = re.compile(r"(embed)|(resid_pre|resid_mid|resid_post|attn|mlp)\.(\d+)|(attn|neuron)\.(\d+)\.(\d+)")
# Where in its block a component acts; the embedding comes before block 0, resid_post after everything in its block.
_STAGE: dict[Kind, int] = {
    "embed": -1, "resid_pre": 0, "attn": 1, "head": 1, "resid_mid": 2, "mlp": 3, "neuron": 3, "resid_post": 4,
}  # fmt: skip


class InterventionError(P0Error):
    """An intervention that is not possible; the message says why, and what to do instead."""


@dataclass(frozen=True)
class Node:
    """One node of the model.

    Attributes:
        kind: kind of the node.
        layer: its block.
        index: number of a head or neuron; None for other kinds.
    """

    kind: Kind
    layer: int = 0
    index: int | None = None

    @classmethod
    def parse(cls, name: str) -> Node:
        """Parse the name of a node.

        Args:
            name: such as `embed`, `attn.0`, `attn.0.3`, `mlp.1`, `neuron.1.17` or `resid_mid.2`.

        Raises:
            InterventionError: the name is not of this form.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise InterventionError(
                f"{name!r} names no node; expected embed, attn.LAYER, attn.LAYER.HEAD, mlp.LAYER, neuron.LAYER.INDEX, "
                "or resid_pre.LAYER, resid_mid.LAYER, resid_post.LAYER"
            )
        if match[1]:
            return cls("embed")
        if match[2]:
            return cls(match[2], int(match[3]))  # pyright: ignore[reportArgumentType]
        return cls("head" if match[4] == "attn" else "neuron", int(match[5]), int(match[6]))

    def __str__(self) -> str:
        if self.kind == "embed":
            return "embed"
        if self.index is None:
            return f"{self.kind}.{self.layer}"
        return f"{'attn' if self.kind == 'head' else 'neuron'}.{self.layer}.{self.index}"

    @property
    def hook(self) -> str:
        """Name of the hook point whose activation contains the output of this node."""
        return _HOOKS[self.kind].format(self.layer)

    @property
    def depth(self) -> tuple[int, int]:
        """Layer and stage within the block: a key that sorts nodes in the order in which the model computes them."""
        return self.layer, _STAGE[self.kind]

    def read(self, activation: Tensor, position: Int[Tensor, " batch"]) -> Float[Tensor, "batch *value"]:
        """Read the output of this node at one position of each prompt.

        Args:
            activation: activation at `hook` [batch, pos, ...].
            position: index of the position in each prompt.

        Returns:
            A vector per prompt, or a number for a neuron.
        """
        rows = torch.arange(len(activation), device=activation.device)
        at = activation[rows, position.to(activation.device)]
        return at if self.index is None else at[:, self.index]

    def put(
        self,
        activation: Tensor,
        position: Int[Tensor, " rows"],
        value: Tensor,
        rows: slice | Int[Tensor, " rows"] = slice(None),
    ) -> None:
        """Write an output of this node into an activation, in place.

        Args:
            activation: activation at `hook` [batch, pos, ...].
            position: index of the position in each of the rows.
            value: output to write, one per row.
            rows: rows of the activation to write into; all by default.
        """
        numbers = torch.arange(len(activation), device=activation.device)[rows]
        index: tuple[Any, ...] = (numbers, position.to(activation.device))
        if self.index is not None:
            index += (self.index,)
        activation[index] = value.to(activation)

    def check(self, info: ModelInfo) -> Node:
        """Check that a model has this node.

        Args:
            info: description of the model.

        Returns:
            The node itself.

        Raises:
            InterventionError: there is no such layer, head or neuron, or no residual stream between attention and MLP.
        """
        if not 0 <= self.layer < info.n_layers:
            raise InterventionError(f"{self}: {info.name} has layers 0 to {info.n_layers - 1}")
        limit = {"head": info.n_heads, "neuron": info.d_mlp}.get(self.kind)
        if limit is not None and (self.index is None or not 0 <= self.index < limit):
            raise InterventionError(f"{self}: {info.name} has {self.kind}s 0 to {limit - 1} in a layer")
        if self.kind == "neuron" and info.experts:
            raise InterventionError(f"{self}: the neurons of {info.name} belong to its {info.experts} experts")
        if self.kind == "resid_mid" and info.parallel_blocks:
            raise InterventionError(
                f"{self}: attention and MLP of {info.name} read the same stream, nothing is between"
            )
        return self


def components(model: HookedModel, layers: Sequence[int] | None = None, heads: bool = False) -> list[Node]:
    """List the nodes that write to the residual stream: embedding, attention (or its heads) and MLP of every layer.

    The outputs of all of them at a position add up to the final residual stream there.

    Args:
        model: a hooked model.
        layers: layers to list; all if None.
        heads: whether to list heads in place of attention outputs.
    """
    info = describe(model)
    nodes = [Node("embed")]
    for layer in range(info.n_layers) if layers is None else layers:
        if heads:
            nodes += [Node("head", layer, head) for head in range(info.n_heads)]
        else:
            nodes.append(Node("attn", layer))
        nodes.append(Node("mlp", layer))
    return [node.check(info) for node in nodes]


def nodes_of(names: Sequence[str | Node], model: HookedModel) -> list[Node]:
    """Parse names of nodes and check them against a model.

    Args:
        names: names or nodes.
        model: a hooked model.

    Raises:
        InterventionError: a name is not that of a node, or the model does not have it.
    """
    info = describe(model)
    return [(Node.parse(name) if isinstance(name, str) else name).check(info) for name in names]


def nodes_of_kinds(model: HookedModel, kinds: Sequence[Kind], layers: Sequence[int] | None = None) -> list[Node]:
    """List all nodes of some kinds, block by block.

    Args:
        model: a hooked model.
        kinds: kinds of nodes. Components that the model does not have are left out: in parallel blocks there is no
            residual stream between attention and MLP.
        layers: blocks to list; all if None. The embedding belongs to block 0.

    Raises:
        InterventionError: there is no such layer, or the neurons belong to experts.
    """
    info = describe(model)
    for layer in layers or ():
        if not 0 <= layer < info.n_layers:
            raise InterventionError(f"there is no layer {layer}: {info.name} has layers 0 to {info.n_layers - 1}")
    nodes = []
    for layer in range(info.n_layers) if layers is None else layers:
        for kind in kinds:
            if kind in ("head", "neuron"):
                numbers = range(info.n_heads if kind == "head" else info.d_mlp)
                nodes += [Node(kind, layer, number).check(info) for number in numbers]
            elif (kind != "embed" or layer == 0) and has_node(model, Node(kind, layer)):
                nodes.append(Node(kind, layer))
    return nodes


def has_node(model: HookedModel, node: Node) -> bool:
    """Return whether a model has the hook point of a node.

    Args:
        model: a hooked model.
        node: the node.
    """
    try:
        hook_point(model, node.hook)
    except ModelError:
        return False
    return True
