"""`describe` tells what a model is, whoever built it and whichever class holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from p0circuit.models import ModelError, ModelInfo, describe, load_model
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.models.info import backend_of
from tests.families import CASES, CONTEXT, FAMILIES, LAYERS, VOCAB, Family, write

EXPECTED: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "GPT2LMHeadModel", "positions": "learned"},
    "neox": {"architecture": "GPTNeoXForCausalLM", "parallel_blocks": True},
    "neox-sequential": {"architecture": "GPTNeoXForCausalLM"},
    "llama": {"architecture": "LlamaForCausalLM"},
    "llama-grouped": {"architecture": "LlamaForCausalLM", "n_kv_heads": 2, "d_head": 12},
    "mistral": {"architecture": "MistralForCausalLM", "n_kv_heads": 2, "d_head": 12, "window": (6, 6, 6)},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "n_kv_heads": 2},
    "qwen2-windows": {"architecture": "Qwen2ForCausalLM", "n_kv_heads": 2, "window": (None, 5, 5)},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "n_kv_heads": 2, "d_head": 12},
    "olmo2": {"architecture": "Olmo2ForCausalLM"},
    "opt": {"architecture": "OPTForCausalLM", "positions": "learned"},
    "mixtral": {"architecture": "MixtralForCausalLM", "n_kv_heads": 2, "experts": 4},
    "qwen3-moe": {"architecture": "Qwen3MoeForCausalLM", "n_kv_heads": 2, "d_head": 12, "experts": 4, "d_mlp": 24},
    "olmoe": {"architecture": "OlmoeForCausalLM", "n_kv_heads": 2, "experts": 4},
    "bloom": {"architecture": "BloomForCausalLM", "positions": "alibi", "n_ctx": None, "d_mlp": 128},
    "smollm3-nope": {"architecture": "SmolLM3ForCausalLM", "n_kv_heads": 2, "positions": "none", "n_ctx": None},
    "gemma2": {"architecture": "Gemma2ForCausalLM", "n_kv_heads": 2, "d_head": 12, "window": (5, None, 5)},
}
PLAIN = {
    "n_layers": LAYERS,
    "n_heads": 4,
    "n_kv_heads": 4,
    "d_head": 8,
    "d_model": 32,
    "d_mlp": 48,
    "vocab_size": VOCAB,
    "n_ctx": CONTEXT,
    "positions": "rotary",
    "window": (None, None, None),
    "experts": 0,
    "parallel_blocks": False,
}


@pytest.mark.parametrize(("family", "backend"), CASES, ids=[f"{name}-{backend}" for name, backend in CASES])
def test_every_family(family: str, backend: str, family_model: Any) -> None:
    expected = ModelInfo(name=family, backend=backend, **(PLAIN | EXPECTED[family]))  # type: ignore[arg-type]
    assert describe(family_model(family, backend)) == expected


def test_every_family_is_expected() -> None:
    assert EXPECTED.keys() == FAMILIES.keys()


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.skipif(not has_hooked_transformer(), reason="HookedTransformer left TransformerLens with version 4")
def test_a_model_built_by_hand() -> None:
    from transformer_lens import HookedTransformer

    shape = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 2, "n_ctx": 16, "d_vocab": 11, "act_fn": "relu"}
    info = describe(HookedTransformer({**shape, "device": "cpu"}))
    assert (info.name, info.backend, info.architecture) == ("custom", "hooked", "custom")
    assert (info.positions, info.n_ctx, info.d_mlp, info.n_kv_heads) == ("learned", 16, 32, 2)
    local = {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"], "attn_only": True}
    rotary = {"positional_embedding_type": "rotary", "model_name": "toy", "device": "cpu"}
    info = describe(HookedTransformer({**shape, **local, **rotary}))
    assert (info.name, info.positions, info.window, info.d_mlp) == ("toy", "rotary", (3, None), 0)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            Family(
                "JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
            ),
            {"positions": "none", "n_ctx": None, "experts": 2},
        ),
        (
            Family("GPTNeoConfig", {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5}),
            {"positions": "learned", "window": (None, 5, None, 5), "d_mlp": 128},
        ),
        (
            Family("FalconConfig", {"multi_query": True}),
            {"positions": "rotary", "n_kv_heads": 1, "parallel_blocks": True},
        ),
    ],
    ids=["jamba", "gpt-neo", "falcon"],
)
def test_families_beyond_the_named_ones(family: Family, expected: dict[str, Any], tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT}
    heads = {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family.config == "JambaConfig":
        heads |= {"num_key_value_heads": 2, "use_mamba_kernels": False, "intermediate_size": 48}
    if family.config == "GPTNeoConfig":
        shape.pop("num_hidden_layers")
    whole = dataclasses.replace(family, fields={**shape, **heads, **family.fields})
    info = describe(load_model(write(whole, tmp_path / "model"), device="cpu"))
    assert info.backend == "bridge"
    assert {name: getattr(info, name) for name in expected} == expected


def test_what_is_no_hooked_model() -> None:
    with pytest.raises(ModelError, match="got Linear; load one with"):
        backend_of(torch.nn.Linear(2, 2))
