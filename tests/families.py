"""Small random-weight checkpoints of every model family, written as Hugging Face directories.

Weights are large, norms and biases far from their defaults and attention sharp, so that a swapped matrix, a forgotten
bias or a wrong mask shows in the logits. Import the fixtures into a `conftest.py`: `family_folder(name)` is a folder,
`family_model(name, backend)` a loaded model, each made once per session. Tests must leave the models as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB = 96
CONTEXT = 64
LAYERS = 3


@dataclass(frozen=True)
class Family:
    """How to build a family: the name of its `transformers` config class, the fields to set, who can hold it."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    hooked: bool = True


_WIDE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_NEOX = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
_GROUPED = {"num_key_value_heads": 2}
_MOE = {"num_experts_per_tok": 2, **_GROUPED}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT, "n_inner": 48}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "neox": Family("GPTNeoXConfig", _WIDE | _NEOX),
    "neox-sequential": Family("GPTNeoXConfig", _WIDE | _NEOX | {"use_parallel_residual": False}),
    "llama": Family("LlamaConfig", _WIDE | _ROPE | {"tie_word_embeddings": True}),
    "llama-grouped": Family("LlamaConfig", _WIDE | _GROUPED | {"head_dim": 12, "rope_parameters": _LLAMA3}),
    "mistral": Family("MistralConfig", _WIDE | _ROPE | _GROUPED | {"head_dim": 12, "sliding_window": 6}),
    "qwen2": Family("Qwen2Config", _WIDE | _ROPE | _GROUPED),
    "qwen2-windows": Family(
        "Qwen2Config",
        _WIDE | _ROPE | _GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": Family("Qwen3Config", _WIDE | _ROPE | _GROUPED | {"head_dim": 12}),
    "olmo2": Family("Olmo2Config", _WIDE | _ROPE),
    "opt": Family(
        "OPTConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
        | {"num_hidden_layers": LAYERS, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "mixtral": Family("MixtralConfig", _WIDE | _ROPE | _MOE | {"num_local_experts": 4}),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        _WIDE | _ROPE | _MOE | {"head_dim": 12, "num_experts": 4, "moe_intermediate_size": 24},
        hooked=False,
    ),
    "olmoe": Family("OlmoeConfig", _WIDE | _ROPE | _MOE | {"num_experts": 4}, hooked=False),
    "bloom": Family(
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        hooked=False,
    ),
    "smollm3-nope": Family("SmolLM3Config", _WIDE | _ROPE | _GROUPED | {"no_rope_layers": [0] * LAYERS}, hooked=False),
    "gemma2": Family(
        "Gemma2Config",
        _WIDE
        | _ROPE
        | _GROUPED
        | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0, "tie_word_embeddings": True},
        hooked=False,
    ),
}

# Every (family, backend) pair there is; on TransformerLens 4 the hooked ones skip.
CASES = [
    (name, backend)
    for name, family in FAMILIES.items()
    for backend in ("hooked", "bridge")
    if family.hooked or backend == "bridge"
]


def build(family: str | Family, seed: int = 0, **fields: Any) -> Any:
    """A family's `transformers` model with random weights, in eval mode with eager attention."""
    import transformers

    family = FAMILIES[family] if isinstance(family, str) else family
    config = getattr(transformers, family.config)(**(family.fields | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            weight.copy_(_draw(weight_name, weight, generator))
    return model


def write(family: str | Family, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """Write a family's checkpoint (config.json and model.safetensors, no tokenizer) and return its folder."""
    build(family, seed, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, written on first use."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else write(name, root / name)

    return folder


@pytest.fixture(scope="session")
def family_model(family_folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A family's hooked model in float32 on the CPU; skips where the backend does not exist."""
    from p0circuit.models import load_model
    from p0circuit.models.hooked_transformer import has_hooked_transformer

    loaded: dict[tuple[str, str], Any] = {}

    def model(name: str, backend: str) -> Any:
        if backend == "hooked" and not has_hooked_transformer():
            pytest.skip("HookedTransformer left TransformerLens with version 4")
        if (name, backend) not in loaded:
            loaded[name, backend] = load_model(family_folder(name), backend=backend, device="cpu")
        return loaded[name, backend]

    return model


def _draw(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim == 1:
        # Norm weights stay near their own default, which is 0 in Gemma and 1 elsewhere.
        return weight + 0.3 * noise if name.endswith("weight") else 0.3 * noise
    if "embed" in name or "wte" in name or "wpe" in name:
        return noise
    sharp = 1.7 if any(part in name for part in ("q_proj", "k_proj", "query", "c_attn", "gate.weight")) else 1.0
    return sharp * noise / weight.shape[-1] ** 0.5
