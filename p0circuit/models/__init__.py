"""Models: load one as a hooked model, describe it, and run it, with the same hook names on both backends.

A hooked model is an object of TransformerLens with unprocessed weights: a `HookedTransformer`, or a `TransformerBridge`
for families that the former does not compute, and on TransformerLens 4. `forward` and `resume` take hooks by name.
Shapes are [batch, pos, ...]; all names but the first have the prefix `blocks.{l}.`:

hook_embed                  d_model     the token embedding as it enters the stream: after an embedding norm (BLOOM) or
                                        scale (Gemma), before learned positions are added (GPT-2, OPT)
hook_resid_pre, _post       d_model     the stream before and after a block
hook_resid_mid              d_model     the stream between attention and MLP; not in parallel blocks (GPT-NeoX), nor
                                        where a block norms the sum (post-norm OPT, BERT) or scales it (Granite)
hook_attn_out, hook_mlp_out d_model     what is added to the stream, after a norm of its own (OLMo-2, Gemma-2)
attn.hook_q                 heads, d_head     after projection and bias, before the norm of queries and keys (Qwen3,
attn.hook_k, attn.hook_v    n_kv_heads, d_head  OLMo-2, OLMoE) and before the rotation
attn.hook_rot_q             heads, d_head     after that norm and the rotation: the factors of the scores; only with
attn.hook_rot_k             n_kv_heads, d_head  rotary positions, and not where transformers rotates (GPT-J, CodeGen)
attn.hook_attn_scores       [batch, heads, query, key] scaled, soft-capped, with ALiBi and mask: masked keys have -inf
                                        (hooked) or the dtype's minimum (bridge)
attn.hook_pattern           [batch, heads, query, key] the softmax of the scores; rows of padding have no meaning
attn.hook_z                 heads, d_head     the weighted mean of values, before the output projection
mlp.hook_pre, mlp.hook_post d_mlp       before the activation, and after it (and the gate); not in a mixture of experts

A name that a model does not have is an error, never a hook that does not fire. In GPT-Neo, GPT-J and XGLM, whose
attention transformers computes itself, `hook_pattern` can be read but not edited.
"""

from __future__ import annotations

from p0circuit.models.catalog import CATALOG, NamedModel, named_model
from p0circuit.models.download import fetch
from p0circuit.models.errors import ModelError
from p0circuit.models.forward import forward, resume
from p0circuit.models.hooks import Hook, hook_point, hooked
from p0circuit.models.info import ModelInfo, describe, device_of
from p0circuit.models.load import load_model, model_placement
from p0circuit.models.metadata import StoredModel, stored_model
from p0circuit.models.model_list import KnownModel, ShippedModel, known_models, list_checkpoints, list_models
from p0circuit.models.threads import one_thread_if_small

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
