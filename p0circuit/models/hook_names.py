"""The hook names that both backends share, and the block that a name belongs to."""

from __future__ import annotations

import re

BLOCK_HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "mlp.hook_pre",
    "mlp.hook_post",
)
"""The hook points of a block without their prefix `blocks.{layer}.`; `p0circuit.models` lists their shapes."""


def layer_of(name: str, n_layers: int) -> int:
    """Return the block that a hook name belongs to.

    Args:
        name: of a hook point.
        n_layers: number of blocks of the model.

    Returns:
        The index of the block; -1 for hook points of the embedding, `n_layers` for those after the last block.
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block.group(1))
    return -1 if "embed" in name and "unembed" not in name else n_layers
