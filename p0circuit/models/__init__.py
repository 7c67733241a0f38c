"""Models: load one as a raw hooked model, describe it, run it, with one set of hook names on both backends.

A hooked model is the TransformerLens object itself: `HookedTransformer`, or `TransformerBridge` for families the former
does not compute and on TransformerLens 4. Hooks are given to `forward` and `resume`, which know what each name means;
shapes are [batch, pos, ...], `blocks.{l}.` stands before all but the first:

hook_embed                  d_model     the token's embedding as it enters the stream: after an embedding norm (BLOOM)
                                        or scale (Gemma), before learned positions are added (GPT-2, OPT)
hook_resid_pre, _post       d_model     the stream into and out of a block
hook_resid_mid              d_model     the stream between attention and MLP; none in parallel blocks (GPT-NeoX), nor
                                        where a block norms the sum (post-norm OPT, BERT) or scales it (Granite)
hook_attn_out, hook_mlp_out d_model     what is added to the stream, after a norm of its own (OLMo-2, Gemma-2)
attn.hook_q                 heads, d_head     after projection and bias, before the norm of queries and keys (Qwen3,
attn.hook_k, attn.hook_v    n_kv_heads, d_head  OLMo-2, OLMoE) and before the rotation
attn.hook_rot_q             heads, d_head     after that norm and the rotation: what the scores are products of; only
attn.hook_rot_k             n_kv_heads, d_head  with rotary positions, and not where the bridge leaves the rotation to
                                                 transformers (GPT-J, CodeGen)
attn.hook_attn_scores       [batch, heads, query, key] scaled, soft-capped, with ALiBi and mask: masked keys have -inf
                                        (hooked) or the dtype's minimum (bridge)
attn.hook_pattern           [batch, heads, query, key] the softmax of it; the rows of padding are without meaning
attn.hook_z                 heads, d_head     the mix of values, before the output projection
mlp.hook_pre, mlp.hook_post d_mlp       before the activation, and after it (and the gate); none in a mixture of experts

A name a model does not have is an error, never a hook that does not fire. In GPT-Neo, GPT-J and XGLM, whose attention
TransformerLens leaves to transformers' own code, `hook_pattern` can be read but not edited.
"""

from __future__ import annotations

from p0circuit.models.catalog import CATALOG, NamedModel, named_model
from p0circuit.models.download import fetch
from p0circuit.models.forward import Hook, forward, hook_point, hooked, one_thread_if_small, resume
from p0circuit.models.info import ModelError, ModelInfo, describe, device_of
from p0circuit.models.load import StoredModel, load_model, model_placement, stored_model
from p0circuit.models.source import KnownModel, ShippedModel, known_models, list_checkpoints, list_models

__all__ = [
    "CATALOG",
    "Hook",
    "KnownModel",
    "ModelError",
    "ModelInfo",
    "NamedModel",
    "ShippedModel",
    "StoredModel",
    "describe",
    "device_of",
    "fetch",
    "forward",
    "hook_point",
    "hooked",
    "known_models",
    "list_checkpoints",
    "list_models",
    "load_model",
    "model_placement",
    "named_model",
    "one_thread_if_small",
    "resume",
    "stored_model",
]
