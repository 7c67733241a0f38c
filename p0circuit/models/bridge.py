"""Wrap a loaded `transformers` model in a TransformerBridge, its weights unprocessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from p0circuit.hooked_model import HookedModel
from p0circuit.models.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def to_bridge(
    hf: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | None = None,
) -> HookedModel:
    """Wrap a `transformers` model in a TransformerBridge; its weights are shared, not copied.

    Args:
        hf: a causal language model with eager attention.
        name: what `describe` calls the model.
        tokenizer: of the model; None for a model that is given token ids only.
        device: the device that takes token ids; that of the first weight if not given.

    Raises:
        ModelError: TransformerLens has no bridge for the architecture, or the architecture has no attention.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(hf).__name__
    try:
        bridge = build_bridge_from_module(
            hf, architecture, hf_config=hf.config, tokenizer=tokenizer, model_name=name, device=device
        )
    except Exception as error:
        raise ModelError(f"TransformerLens cannot bridge {name} ({architecture}): {error!r}") from error
    if not any(hasattr(block, "attn") for block in getattr(bridge, "blocks", ())):
        raise ModelError(f"{name} ({architecture}) has no block with attention, so it cannot have an attention sink")
    return cast(HookedModel, bridge.eval())
