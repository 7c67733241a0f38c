"""The models that benchmarks run on: random weights in the shapes of real ones, and a tiny one for the tests."""

from __future__ import annotations

from typing import Any


def gpt2_shape(layers: int = 12, vocab_size: int = 50_257, heads: int = 12) -> Any:
    """A HookedTransformer of GPT-2 small's shape with random weights."""
    return _random(
        n_layers=layers,
        d_model=768,
        n_heads=heads,
        d_head=768 // heads,
        d_mlp=3072,
        n_ctx=1024,
        d_vocab=vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
    )


def smollm2_shape(layers: int = 30, vocab_size: int = 49_152) -> Any:
    """A HookedTransformer of SmolLM2-135M's shape (grouped-query attention, gated MLPs) with random weights."""
    return _random(
        n_layers=layers,
        d_model=576,
        n_heads=9,
        d_head=64,
        n_key_value_heads=3,
        d_mlp=1536,
        n_ctx=2048,
        d_vocab=vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=64,
    )


def tiny_shape() -> Any:
    """A small Llama-like HookedTransformer on which every benchmark takes a second."""
    return _random(
        n_layers=4,
        d_model=32,
        n_heads=4,
        d_head=8,
        n_key_value_heads=2,
        d_mlp=48,
        n_ctx=128,
        d_vocab=97,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=8,
        initializer_range=0.3,
    )


SHAPES = {"gpt2-shape": gpt2_shape, "smollm2-shape": smollm2_shape, "tiny-shape": tiny_shape}


def _random(**settings: Any) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

    # Large enough for attention to be far from uniform, so that patches move the metric.
    cfg = HookedTransformerConfig(**{"initializer_range": 0.06, "seed": 0, **settings})
    return HookedTransformer(cfg).eval()
