"""The constructed weights as models of TransformerLens and of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import nn

from p0circuit.hooked_model import HookedModel
from p0circuit.models.bridge import to_bridge
from p0circuit.models.constructed.weights import (
    CONTEXT,
    D_HEAD,
    D_MLP,
    D_MODEL,
    HEADS,
    NORM_EPS,
    ROTARY_BASE,
    ROTARY_DIM,
    VOCABULARY,
    Weights,
    wired_weights,
)
from p0circuit.models.errors import ModelError
from p0circuit.models.hooked_transformer import has_hooked_transformer, to_hooked
from p0circuit.models.info import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wired_model(
    positions: Positions = "rotary",
    *,
    seed: int = 0,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> HookedModel:
    """Build the model with the constructed P0 sink: 3 layers, 5 heads of 32, d_model 160, 64 tokens, 256 positions.

    Args:
        positions: "rotary" or "learned".
        seed: rotates the residual stream; the circuit stays the same.
        backend: "hooked" for HookedTransformer, "bridge" for TransformerBridge; "auto" is HookedTransformer where
            TransformerLens has it (before version 4).
        dtype: of the weights.
        device: of the weights.

    Returns:
        A hooked model in eval mode, named `wired` or `wired-learned`.

    Raises:
        ModelError: for other positions, and for a backend that TransformerLens does not have.

    Example:
        ```python
        model = wired_model("learned")
        assert describe(model).name == "wired-learned"
        ```
    """
    return _build("wired", positions, seed, True, backend, dtype, device)


def decoy_model(
    positions: Positions = "rotary",
    *,
    seed: int = 0,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> HookedModel:
    """Build the wired model without step 4: P0 has its norm and its direction, but no head reads them in K.

    So there is no sink; the heads that are sink heads in the wired model attend uniformly.

    Args:
        positions: as for `wired_model`.
        seed: as for `wired_model`.
        backend: as for `wired_model`.
        dtype: as for `wired_model`.
        device: as for `wired_model`.

    Returns:
        A hooked model in eval mode, named `wired-decoy` or `wired-decoy-learned`.

    Raises:
        ModelError: as `wired_model` does.
    """
    return _build("wired-decoy", positions, seed, False, backend, dtype, device)


def _build(
    name: str,
    positions: Positions,
    seed: int,
    sinks: bool,
    backend: str,
    dtype: torch.dtype,
    device: str | torch.device,
) -> HookedModel:
    name = name if positions == "rotary" else f"{name}-{positions}"
    weights = wired_weights(positions, seed=seed, sinks=sinks)
    return model_from_weights(weights, name, positions, backend=backend, dtype=dtype, device=device)


def model_from_weights(
    weights: Weights,
    name: str,
    positions: Positions = "rotary",
    *,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> HookedModel:
    """Build a hooked model of the wired model's shape from weights such as those of `wired_weights`.

    Args:
        weights: by HookedTransformer's names.
        name: what `describe` calls the model.
        positions: as for `wired_model`.
        backend: as for `wired_model`.
        dtype: as for `wired_model`.
        device: as for `wired_model`.

    Raises:
        ModelError: for a backend that TransformerLens does not have.
    """
    if backend == "auto":
        backend = "hooked" if has_hooked_transformer() else "bridge"
    if backend != "bridge" and not (backend == "hooked" and has_hooked_transformer()):
        raise ModelError(
            f"backend={backend!r} is not available: expected 'auto', 'bridge', or (with transformer-lens<4) 'hooked'"
        )
    # New modules are initialised at random; the caller's random state is restored.
    with torch.random.fork_rng(devices=[]):
        module = _huggingface(weights, positions, dtype)
        # Modules are moved in place; the type of transformers' own `to` is wrong.
        nn.Module.to(module, device)
        return to_hooked(module, name) if backend == "hooked" else to_bridge(module, name)


def wired_huggingface(
    positions: Positions = "rotary", *, seed: int = 0, sinks: bool = True, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build the wired model as a `transformers` model: GPT-NeoX for rotary positions, GPT-2 for learned, with ReLU.

    Args:
        positions: as for `wired_model`.
        seed: as for `wired_model`.
        sinks: whether to construct the sink heads; False gives the decoy model.
        dtype: of the weights.

    Raises:
        ModelError: `positions` is neither "rotary" nor "learned".
    """
    return _huggingface(wired_weights(positions, seed=seed, sinks=sinks), positions, dtype)


def _huggingface(weights: Weights, positions: Positions, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        model, state = _gpt2(weights) if positions == "learned" else _neox(weights)
    nn.Module.to(model, dtype)
    model.eval()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == state.keys(), f"in one of the two only: {sorted(parameters.keys() ^ state.keys())}"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return model


def _gpt2(weights: Weights) -> tuple[PreTrainedModel, Weights]:
    """An empty GPT-2 of our shape, and our weights in its layout (matrices as ours, heads joined)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=_n_layers(weights),
        n_head=HEADS,
        n_inner=D_MLP,
        activation_function="relu",
        layer_norm_epsilon=NORM_EPS,
        bos_token_id=0,
        eos_token_id=0,
    )
    state = {
        "transformer.wte.weight": weights["embed.W_E"],
        "transformer.wpe.weight": weights["pos_embed.W_pos"],
        "transformer.ln_f.weight": weights["ln_final.w"],
        "transformer.ln_f.bias": weights["ln_final.b"],
    }
    for layer in range(_n_layers(weights)):
        ours = _block(weights, layer)
        matrices, biases = (torch.stack([ours[f"attn.{kind}_{part}"] for part in "QKV"]) for kind in "Wb")
        theirs = {
            "ln_1.weight": ours["ln1.w"],
            "ln_1.bias": ours["ln1.b"],
            "attn.c_attn.weight": rearrange(matrices, "part head d_model d -> d_model (part head d)"),
            "attn.c_attn.bias": rearrange(biases, "part head d -> (part head d)"),
            "attn.c_proj.weight": rearrange(ours["attn.W_O"], "head d d_model -> (head d) d_model"),
            "attn.c_proj.bias": ours["attn.b_O"],
            "ln_2.weight": ours["ln2.w"],
            "ln_2.bias": ours["ln2.b"],
            "mlp.c_fc.weight": ours["mlp.W_in"],
            "mlp.c_fc.bias": ours["mlp.b_in"],
            "mlp.c_proj.weight": ours["mlp.W_out"],
            "mlp.c_proj.bias": ours["mlp.b_out"],
        }
        state |= {f"transformer.h.{layer}.{name}": weight for name, weight in theirs.items()}
    return GPT2LMHeadModel(config), state


def _neox(weights: Weights) -> tuple[PreTrainedModel, Weights]:
    """An empty GPT-NeoX of our shape, and our weights in its layout (matrices transposed, Q, K, V within each head)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=D_MODEL,
        num_hidden_layers=_n_layers(weights),
        num_attention_heads=HEADS,
        intermediate_size=D_MLP,
        hidden_act="relu",
        layer_norm_eps=NORM_EPS,
        use_parallel_residual=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROTARY_BASE,
            "partial_rotary_factor": ROTARY_DIM / D_HEAD,
        },
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    state = {
        "gpt_neox.embed_in.weight": weights["embed.W_E"],
        "gpt_neox.final_layer_norm.weight": weights["ln_final.w"],
        "gpt_neox.final_layer_norm.bias": weights["ln_final.b"],
    }
    for layer in range(_n_layers(weights)):
        ours = _block(weights, layer)
        matrices, biases = (torch.stack([ours[f"attn.{kind}_{part}"] for part in "QKV"]) for kind in "Wb")
        theirs = {
            "input_layernorm.weight": ours["ln1.w"],
            "input_layernorm.bias": ours["ln1.b"],
            "attention.query_key_value.weight": rearrange(matrices, "part head d_model d -> (head part d) d_model"),
            "attention.query_key_value.bias": rearrange(biases, "part head d -> (head part d)"),
            "attention.dense.weight": rearrange(ours["attn.W_O"], "head d d_model -> d_model (head d)"),
            "attention.dense.bias": ours["attn.b_O"],
            "post_attention_layernorm.weight": ours["ln2.w"],
            "post_attention_layernorm.bias": ours["ln2.b"],
            "mlp.dense_h_to_4h.weight": ours["mlp.W_in"].T,
            "mlp.dense_h_to_4h.bias": ours["mlp.b_in"],
            "mlp.dense_4h_to_h.weight": ours["mlp.W_out"].T,
            "mlp.dense_4h_to_h.bias": ours["mlp.b_out"],
        }
        state |= {f"gpt_neox.layers.{layer}.{name}": weight for name, weight in theirs.items()}
    return GPTNeoXForCausalLM(config), state


def _block(weights: Weights, layer: int) -> Weights:
    prefix = f"blocks.{layer}."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _n_layers(weights: Weights) -> int:
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
