"""Receivers: the inputs at which an edge can end, by the names used in tables and graphs.

attn.{l}.{h}.k      K of query head h of block l; likewise Q and V
attn.{l}.kv{g}.k    K of all query heads of key/value head g; likewise V
attn.{l}.0+3.k      K of heads 0 and 3 together; likewise Q and V
attn.{l}.k          K of all heads of block l; likewise Q and V
mlp.{l}             the input of the MLP of block l
resid_pre.{l}       the residual stream before block l; likewise resid_mid.{l} and resid_post.{l}
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError, Node
from p0circuit.models import ModelInfo, describe

Kind = Literal["q", "k", "v", "mlp", "resid_pre", "resid_mid", "resid_post"]

# Heads of a block: one (`3`), several (`0+3`), a key/value group (`kv1`), or all of them (nothing).
_ATTENTION = re.compile(r"attn\.(\d+)(?:\.(kv)?(\d+(?:\+\d+)*))?\.([qkv])")
# Where in its block a receiver reads: before anything with this stage or a later one has been computed.
_STAGE: dict[Kind, int] = {"resid_pre": 0, "q": 1, "k": 1, "v": 1, "resid_mid": 2, "mlp": 3, "resid_post": 4}


@dataclass(frozen=True)
class Receiver:
    """An input at which an edge can end.

    Attributes:
        kind: kind of the input.
        layer: its block.
        heads: query heads whose input it is; empty for MLPs and residual streams.
        name: name of the receiver.
    """

    kind: Kind
    layer: int
    heads: tuple[int, ...]
    name: str

    @classmethod
    def parse(cls, name: str, info: ModelInfo) -> Receiver:
        """Parse the name of a receiver.

        Args:
            name: such as `attn.2.1.k`, `attn.2.kv0.k`, `attn.2.0+3.k`, `attn.2.k`, `mlp.1` or `resid_pre.2`.
            info: description of the model.

        Raises:
            InterventionError: the name is of another form, or the model has no such layer or head.
        """
        if match := _ATTENTION.fullmatch(name):
            layer, grouped, indices, kind = int(match[1]), bool(match[2]), match[3], match[4]
            count = info.n_kv_heads if grouped else info.n_heads
            heads = [*range(info.n_heads)] if indices is None else [int(index) for index in indices.split("+")]
            if grouped and kind == "q":
                raise InterventionError(f"{name}: queries belong to query heads; expected attn.LAYER.HEAD.q")
            if layer >= info.n_layers or max(heads) >= count:
                what = "key/value heads" if grouped else "heads"
                raise InterventionError(
                    f"{name}: {info.name} has layers 0 to {info.n_layers - 1} and {what} 0 to {count - 1}"
                )
            if len({*heads}) < len(heads):
                raise InterventionError(f"{name} names a head twice; expected each once")
            group = info.n_heads // info.n_kv_heads
            if grouped:
                heads = [head for index in heads for head in range(index * group, (index + 1) * group)]
            return cls(kind, layer, tuple(heads), name)  # pyright: ignore[reportArgumentType]
        with contextlib.suppress(InterventionError):
            node = Node.parse(name)
            if node.kind in ("mlp", "resid_pre", "resid_mid", "resid_post"):
                return cls(node.check(info).kind, node.layer, (), name)  # pyright: ignore[reportArgumentType]
        raise InterventionError(
            f"{name!r} names no receiver of {info.name}; expected attn.LAYER.HEAD.q (or k, v), attn.LAYER.kvHEAD.k (or "
            "v), attn.LAYER.HEAD+HEAD.k, attn.LAYER.k, mlp.LAYER, resid_pre.LAYER, resid_mid.LAYER or resid_post.LAYER"
        )

    def comes_after(self, sender: Node, info: ModelInfo) -> bool:
        """Return whether the model computes a sender before this receiver reads the residual stream.

        Args:
            sender: the sender.
            info: description of the model.
        """
        # In parallel blocks attention and MLP read the same stream, so an MLP reads nothing of its own block.
        stage = 1 if self.kind == "mlp" and info.parallel_blocks else _STAGE[self.kind]
        return sender.depth < (self.layer, stage)


NodeEdge = tuple[Node, str]
"""A sender and the name of a receiver, or of a set of receivers."""
Targets = Mapping[str, tuple[Receiver, ...]]
"""Receivers by name; more than one for a set that is patched together."""


def receivers_of(
    model: HookedModel, layers: Sequence[int] | None = None, kinds: Sequence[Kind] = ("q", "k", "v", "mlp")
) -> list[str]:
    """Name all receivers of some kinds, one for each query head.

    Args:
        model: a hooked model.
        layers: their blocks; all if None.
        kinds: their kinds.
    """
    info = describe(model)
    names = []
    for layer in range(info.n_layers) if layers is None else layers:
        parts = [kind for kind in kinds if kind in ("q", "k", "v")]
        names += [f"attn.{layer}.{head}.{part}" for head in range(info.n_heads) for part in parts]
        names += [f"{kind}.{layer}" for kind in kinds if kind not in parts]
    return names


def check_receivers(receivers: Sequence[Receiver], senders: Sequence[Node], info: ModelInfo) -> None:
    """Check that every receiver comes after at least one sender.

    Args:
        receivers: the receivers.
        senders: the senders.
        info: description of the model.

    Raises:
        InterventionError: a receiver comes before every sender.
    """
    for receiver in receivers:
        if not any(receiver.comes_after(sender, info) for sender in senders):
            raise InterventionError(f"{receiver.name} comes before every sender ({', '.join(map(str, senders))})")


def check_targets(targets: Targets) -> None:
    """Check that the receivers of a search are of kinds that it can estimate.

    Args:
        targets: receivers by name.

    Raises:
        InterventionError: a receiver is neither Q, K, V nor an MLP, or a set has other members than K or than V.
    """
    for name, members in targets.items():
        kinds = {member.kind for member in members}
        if len(kinds) != 1 or not kinds <= {"q", "k", "v", "mlp"} or (len(members) > 1 and not kinds <= {"k", "v"}):
            raise InterventionError(
                f"{name} holds inputs of kinds {sorted(kinds)}; expected Q, K or V of heads, an MLP, or a set whose "
                "members are K, or all V"
            )
