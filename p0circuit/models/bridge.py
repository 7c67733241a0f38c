"""Wrap a loaded `transformers` model in a raw TransformerBridge."""

from __future__ import annotations

from typing import Any


def to_bridge(hf: Any, name: str, tokenizer: Any = None) -> Any:
    """Wrap a `transformers` model in a TransformerBridge; its weights are shared, not copied."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer, model_name=name)
    return bridge.eval()
