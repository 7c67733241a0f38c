"""What path patching says of the inputs of sink heads: how much of the edges' effect arrives in Q, K and V."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from p0circuit.interventions.path_patching import PathEffects
from p0circuit.stats import Interval, ratio_interval


def input_shares(effects: PathEffects, heads: Sequence[str]) -> dict[str, Interval] | None:
    """The shares of Q, K and V in the summed sizes of all effects of edges into these heads; None without an effect.

    `heads` are names such as `attn.2.1`; keys of the result are `q`, `k` and `v`.
    """
    sizes = {part: torch.zeros_like(effects.clean) for part in "qkv"}
    for (_, receiver), effect in zip(effects.edges, effects.effect, strict=True):
        name, _, part = receiver.rpartition(".")
        if name in heads:
            sizes[part] = sizes[part] + effect.abs()
    total = sum(sizes.values(), torch.zeros_like(effects.clean))
    if not bool((total > 0).any()):
        return None
    whole = total.double().cpu().numpy()
    return {part: ratio_interval(size.double().cpu().numpy(), whole) for part, size in sizes.items()}
