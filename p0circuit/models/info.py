"""What a hooked model is, in one small frozen record, whichever TransformerLens class holds it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.errors import P0Error
from p0circuit.prompts import sampleable_vocabulary_of
from p0circuit.results import model_title

if TYPE_CHECKING:
    import torch

Positions = Literal["rotary", "learned", "alibi", "none"]

# The hook points of a block under their common names, `blocks.{layer}.` before each; see p0circuit.models.
BLOCK_HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "mlp.hook_pre",
    "mlp.hook_post",
)

_POSITIONS: dict[str, Positions] = {
    "rotary": "rotary",
    "standard": "learned",
    "shortformer": "learned",
    "alibi": "alibi",
    "none": "none",
}


class ModelError(P0Error):
    """A model, checkpoint or input that p0circuit refuses; the message says why and how to mend it."""


@dataclass(frozen=True)
class ModelInfo:
    """The description of a hooked model that the rest of the package relies on.

    `positions` is "learned" for any table added to the embeddings. `window` holds one entry per layer: how many keys a
    query sees, itself included, or None for all of them. `n_ctx` is the longest sequence in tokens, None where
    nothing limits it. `d_mlp` is the width of one expert in a mixture of experts; `experts` is then their number, and
    0 for dense models. In `parallel_blocks` the MLP reads the block's input instead of the stream after attention.
    `quantisation` is how the weights were rounded before they were loaded, as in "Q4_1"; None for plain weights.
    """

    name: str
    backend: Literal["hooked", "bridge"]
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab_size: int
    n_ctx: int | None
    positions: Positions
    window: tuple[int | None, ...]
    experts: int
    parallel_blocks: bool
    quantisation: str | None = None

    @property
    def title(self) -> str:
        """What people are shown: the name, and how the weights were rounded if they were."""
        return model_title(self.name, self.quantisation)


def set_quantisation(model: Any, quantisation: str | None) -> Any:
    """The hooked model, with what `describe` will say of its quantisation."""
    model.__dict__["quantisation"] = quantisation
    return model


def describe(model: Any) -> ModelInfo:
    """Describe a `HookedTransformer` or `TransformerBridge`, loaded by us or built by hand.

    Raises:
        ModelError: if `model` is neither.
    """
    backend = backend_of(model)
    cfg = model.cfg
    hf = model.original_model.config.get_text_config() if backend == "bridge" else None
    positions = _positions(model, hf)
    return ModelInfo(
        name=cfg.model_name or "custom",
        backend=backend,
        architecture=(cfg.original_architecture if hf is None else cfg.architecture) or "custom",
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        d_mlp=0 if cfg.attn_only else (cfg.d_mlp if hf is None else _mlp_width(hf, cfg)) or 0,
        vocab_size=cfg.d_vocab,
        n_ctx=None if positions in ("alibi", "none") else cfg.n_ctx,
        positions=positions,
        window=_hooked_windows(cfg) if hf is None else layer_windows(hf),
        experts=(cfg.num_experts or 0) if hf is None else experts(hf),
        parallel_blocks=bool(getattr(cfg, "parallel_attn_mlp", False)) if hf is None else _is_parallel(model),
        quantisation=model.__dict__.get("quantisation"),
    )


def device_of(model: Any) -> torch.device:
    """Where a hooked model takes token ids; of one with a device map, other parts may be elsewhere."""
    import torch

    return torch.device(model.cfg.device)


def backend_of(model: Any) -> Literal["hooked", "bridge"]:
    """Which TransformerLens class a model is.

    Raises:
        ModelError: if it is neither `HookedTransformer` nor `TransformerBridge`.
    """
    # By name and not by isinstance: HookedTransformer cannot be imported from TransformerLens 4 on.
    classes = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in classes:
        return "hooked"
    if "TransformerBridge" in classes:
        return "bridge"
    raise ModelError(
        f"expected a TransformerLens model (HookedTransformer or TransformerBridge), got {type(model).__name__}; "
        "load one with p0circuit.load_model"
    )


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """The sliding window of every layer of a `transformers` config, None where a layer sees everything."""
    layers = config.num_hidden_layers
    size = next((getattr(config, field) for field in _window_fields(type(config))), None)
    if not isinstance(size, int) or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None:
        return (size,) * layers
    return tuple(size if kind in ("sliding_attention", "local") else None for kind in kinds)


@functools.cache
def _window_fields(kind: type) -> list[str]:
    """The window fields a config class declares: files carry others too, of which their family knows nothing."""
    return [name for name in ("sliding_window", "window_size") if name in inspect.signature(kind).parameters]


def experts(config: Any) -> int:
    """The number of routed experts a `transformers` config asks for, 0 for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((count for count in (getattr(config, name, None) for name in names) if count), 0)


def _mlp_width(config: Any, cfg: Any) -> int | None:
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    names = ("moe_intermediate_size", *names) if experts(config) else names
    return next((width for width in (getattr(config, name, None) for name in names) if width), cfg.d_mlp)


def _hooked_windows(cfg: Any) -> tuple[int | None, ...]:
    if not cfg.use_local_attn:
        return (None,) * cfg.n_layers
    return tuple(cfg.window_size if kind == "local" else None for kind in cfg.attn_types)


def _positions(model: Any, hf: Any) -> Positions:
    kind = _POSITIONS.get(model.cfg.positional_embedding_type, "none")
    # One entry per layer, 1 where it rotates: SmolLM 3 can leave rotation out.
    if (rotated := getattr(hf, "no_rope_layers", None)) and not any(rotated):
        return "none"
    if hf is None or kind != "learned" or hasattr(model, "pos_embed"):
        return kind
    # The bridge says "standard" unless its adapter says otherwise, table or no table.
    tables = ("wpe", "embed_positions", "position_embeddings")
    has_table = any(name.endswith(tables) for name, _ in model.original_model.named_modules())
    return "learned" if has_table else "none"


def _is_parallel(model: Any) -> bool:
    return any(cls.__name__ == "ParallelBlockBridge" for cls in type(model.blocks[0]).__mro__)


def sampleable_vocabulary(model: Any) -> tuple[int, Collection[int]]:
    """What random tokens are drawn from: the size of the vocabulary, and the special tokens to leave out."""
    return sampleable_vocabulary_of(getattr(model, "tokenizer", None), describe(model).vocab_size)
