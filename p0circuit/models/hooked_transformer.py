"""Build a HookedTransformer from a loaded `transformers` model, its weights unprocessed, offline and of any size.

1. Translate the `transformers` config into that of TransformerLens.
2. Rearrange the weights with TransformerLens's own converters; no norm is folded, no weight is centred.
3. Refuse configs that HookedTransformer cannot represent; `load_model` compares logits, and so finds what this list
   lacks.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

from p0circuit.hooked_model import HookedModel
from p0circuit.models.errors import ModelError
from p0circuit.models.hf_config import layer_windows, n_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = {
    "GPT2LMHeadModel": "convert_gpt2_weights",
    "GPTNeoXForCausalLM": "convert_neox_weights",
    "LlamaForCausalLM": "convert_llama_weights",
    "MistralForCausalLM": "convert_mistral_weights",
    "MixtralForCausalLM": "convert_mixtral_weights",
    "OPTForCausalLM": "convert_opt_weights",
    "Olmo2ForCausalLM": "convert_olmo2_weights",
    "Qwen2ForCausalLM": "convert_qwen2_weights",
    "Qwen3ForCausalLM": "convert_qwen3_weights",
}
"""The converter in `transformer_lens.pretrained.weight_conversions` by architecture."""

_ACTIVATIONS = {name: name for name in ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")}
_ACTIVATIONS["swish"] = "silu"


def has_hooked_transformer() -> bool:
    """Return whether the installed TransformerLens has HookedTransformer, as versions before 4 do."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def to_hooked(hf: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> HookedModel:
    """Copy a `transformers` model into a HookedTransformer of the same device and dtype.

    Args:
        hf: a causal language model with eager attention.
        name: what `describe` calls the model.
        tokenizer: of the model; None for a model that is given token ids only.

    Raises:
        ModelError: HookedTransformer cannot compute the same function.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    architecture = type(hf).__name__
    unsupported = _unsupported(hf.config, architecture)
    if unsupported:
        raise ModelError(f"HookedTransformer cannot represent {name}: {unsupported}; load it with backend='bridge'")
    weight = next(hf.parameters())
    fields = _family_fields(hf.config, architecture) | {
        "model_name": name,
        "original_architecture": architecture,
        "init_weights": False,
        "device": str(weight.device),
        "dtype": weight.dtype,
        "d_vocab": hf.config.vocab_size,
    }
    cfg = HookedTransformerConfig.from_dict(fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer)
    with torch.no_grad():
        state = getattr(weight_conversions, FAMILIES[architecture])(hf, cfg)
        missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith(_BUFFERS)]
    if missing or unexpected:
        raise ModelError(f"HookedTransformer cannot represent {name}: weights {[*missing, *unexpected]} do not fit")
    return cast(HookedModel, model.eval())


_BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos", "unembed.b_U")


def _family_fields(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The fields of HookedTransformerConfig for one of the supported families."""
    if architecture == "GPT2LMHeadModel":
        return {
            "d_model": config.n_embd,
            "d_head": config.n_embd // config.n_head,
            "n_heads": config.n_head,
            "d_mlp": config.n_inner or 4 * config.n_embd,
            "n_layers": config.n_layer,
            "n_ctx": config.n_positions,
            "eps": config.layer_norm_epsilon,
            "act_fn": _ACTIVATIONS[config.activation_function],
            "use_attn_scale": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "normalization_type": "LN",
        }
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": heads,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
    }
    if architecture == "OPTForCausalLM":
        act_fn = _ACTIVATIONS[config.activation_function]
        return shape | {"d_mlp": config.ffn_dim, "act_fn": act_fn, "normalization_type": "LN"}
    shape |= {
        "d_mlp": config.intermediate_size,
        "act_fn": _ACTIVATIONS[config.hidden_act],
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        **_rope_fields(config),
    }
    if architecture == "GPTNeoXForCausalLM":
        return shape | {
            "eps": config.layer_norm_eps,
            "rotary_dim": int(d_head * _rope(config).get("partial_rotary_factor", 1.0)),
            "parallel_attn_mlp": config.use_parallel_residual,
            "normalization_type": "LN",
        }
    windows = layer_windows(config)
    shape |= {"eps": config.rms_norm_eps, "normalization_type": "RMS", "gated_mlp": True}
    if any(windows):
        local = ["local" if window else "global" for window in windows]
        shape |= {"use_local_attn": True, "window_size": max(filter(None, windows)), "attn_types": local}
    # TransformerLens reads "as many key heads as heads" as grouped-query attention where its converter does.
    always_grouped = architecture in ("MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM")
    if always_grouped or config.num_key_value_heads != heads:
        shape["n_key_value_heads"] = config.num_key_value_heads
    if architecture == "Qwen3ForCausalLM":
        shape["use_qk_norm"] = True
    if architecture == "MixtralForCausalLM":
        per_token = config.num_experts_per_tok
        shape |= {"num_experts": n_experts(config), "experts_per_token": per_token, "norm_topk_prob": True}
    return shape


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _rope_fields(config: PretrainedConfig) -> dict[str, Any]:
    rope = _rope(config)
    fields: dict[str, Any] = {"rotary_base": rope.get("rope_theta", 10000.0)}
    if rope.get("rope_type") == "linear":
        fields["rotary_scaling_factor"] = rope["factor"]
    if rope.get("rope_type") == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    return fields


def _unsupported(config: PretrainedConfig, architecture: str) -> str | None:
    """The property of a config that HookedTransformer or its converter cannot represent, None if there is none."""
    if architecture not in FAMILIES:
        return f"{architecture} is not among {', '.join(FAMILIES)}"
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    heads = getattr(config, "num_attention_heads", 0)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope_type = _rope(config).get("rope_type", "default")
    reasons = {
        f"activation {activation!r}": activation not in _ACTIVATIONS,
        f"rotary scaling {rope_type!r}": rope_type not in ("default", "linear", "llama3"),
        "linear rotary scaling in sliding-window layers": rope_type == "linear" and any(layer_windows(config)),
        "quantized weights": getattr(config, "quantization_config", None) is not None,
    }
    if architecture == "GPT2LMHeadModel":
        reasons["cross-attention"] = config.add_cross_attention
    elif architecture == "GPTNeoXForCausalLM":
        reasons["attention without biases"] = not config.attention_bias
    elif architecture == "OPTForCausalLM":
        reasons["norms after the blocks"] = not config.do_layer_norm_before
        reasons["no final norm"] = config._remove_final_layer_norm
        reasons["embeddings of another width than the stream"] = config.word_embed_proj_dim != config.hidden_size
        reasons["layers without biases"] = not config.enable_bias or not config.layer_norm_elementwise_affine
    else:
        biased = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Olmo2ForCausalLM")
        reasons["attention biases"] = biased and config.attention_bias
        reasons["MLP biases"] = architecture == "LlamaForCausalLM" and config.mlp_bias
    if architecture == "Olmo2ForCausalLM":
        reasons["grouped-query attention in OLMo-2"] = config.num_key_value_heads != heads
        reasons["heads that do not add up to the stream's width"] = heads * d_head != config.hidden_size
    return next((reason for reason, holds in reasons.items() if holds), None)
