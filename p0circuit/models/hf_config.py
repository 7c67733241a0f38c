"""Facts that a `transformers` config states in different words for each family."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Return the sliding window of every layer.

    Args:
        config: of a causal language model.

    Returns:
        One entry per layer: the number of keys that a query attends to, itself included; None where it attends to all.
    """
    n_layers = config.num_hidden_layers
    size = next((getattr(config, field) for field in _window_fields(type(config))), None)
    if not isinstance(size, int) or getattr(config, "use_sliding_window", True) is False:
        return (None,) * n_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None:
        return (size,) * n_layers
    return tuple(size if kind in ("sliding_attention", "local") else None for kind in kinds)


@functools.cache
def _window_fields(kind: type) -> list[str]:
    """The window fields that a config class declares: a file may hold others, which its family ignores."""
    return [name for name in ("sliding_window", "window_size") if name in inspect.signature(kind).parameters]


def n_experts(config: PretrainedConfig) -> int:
    """Return the number of routed experts per layer, 0 for a dense model.

    Args:
        config: of a causal language model.
    """
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((count for count in (getattr(config, name, None) for name in names) if count), 0)


def mlp_width(config: PretrainedConfig) -> int | None:
    """Return the width of an MLP, or of one expert in a mixture of experts; None where the config does not state it.

    Args:
        config: of a causal language model.
    """
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    names = ("moe_intermediate_size", *names) if n_experts(config) else names
    return next((width for width in (getattr(config, name, None) for name in names) if width), None)
