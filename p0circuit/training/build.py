"""The untrained model of a training configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from p0circuit.models.architecture_edits import CONFIG_FIELD, add_gates
from p0circuit.text import BOS_ID, EOS_ID
from p0circuit.training.config import TrainConfig


def build_model(config: TrainConfig) -> PreTrainedModel:
    """Build an untrained model of the configured architecture, with tied embeddings.

    Args:
        config: the shape and the architecture; `seed` decides the initial weights.

    Returns:
        A causal language model of `transformers`, in float32 on the CPU. Gates of `gated_attention` are added to it;
        the edits of its forward pass are not (`edit_hf_model` makes them).
    """
    torch.manual_seed(config.seed)
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": True,
    }
    if config.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=config.d_model,
                n_inner=config.d_mlp,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_positions=config.length,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **shared,
            )
        )
    shared |= {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": max(2048, config.length),
        "rms_norm_eps": 1e-5,
    }
    if config.architecture_edits:
        shared[CONFIG_FIELD] = config.architecture_edits.to_json()
    if config.architecture == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=config.window, **shared))
    if config.architecture == "qwen3_moe":
        shared |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.d_mlp,
            "head_dim": config.d_model // config.n_heads,
            "norm_topk_prob": True,
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared))
    model = LlamaForCausalLM(LlamaConfig(**shared))
    if config.gated_attention:
        add_gates(model)
    return model
