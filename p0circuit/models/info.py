"""The description of a hooked model, the same whichever TransformerLens class holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.hooked_model import HookedModel
from p0circuit.models.errors import ModelError
from p0circuit.models.hf_config import layer_windows, mlp_width, n_experts
from p0circuit.results import model_title

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Positions = Literal["rotary", "learned", "alibi", "none"]
"""How a model encodes positions; "learned" is any table that is added to the embeddings."""

_POSITIONS: dict[str, Positions] = {
    "rotary": "rotary",
    "standard": "learned",
    "shortformer": "learned",
    "alibi": "alibi",
    "none": "none",
}


@dataclass(frozen=True)
class ModelInfo:
    """The description of a hooked model that the rest of the package relies on.

    Attributes:
        name: of the model, with its checkpoint if one was loaded.
        backend: "hooked" for a HookedTransformer, "bridge" for a TransformerBridge.
        architecture: the class of the `transformers` model, such as "LlamaForCausalLM".
        n_layers: number of blocks.
        n_heads: attention heads per block.
        n_kv_heads: key and value heads per block; fewer than `n_heads` in grouped-query attention.
        d_head: width of a head.
        d_model: width of the residual stream.
        d_mlp: width of an MLP, or of one expert in a mixture of experts.
        vocab_size: number of token ids that the embedding has.
        n_ctx: the longest sequence in tokens; None where nothing limits it.
        positions: how positions are encoded.
        window: for every layer the number of keys that a query attends to, itself included; None for all of them.
        experts: routed experts per block; 0 for a dense model.
        parallel_blocks: whether the MLP reads the block's input instead of the stream after attention.
        quantisation: how the weights were rounded before they were loaded, such as "Q4_1"; None if they were not.
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
        """The name that readers see: with the quantisation, if there is one."""
        return model_title(self.name, self.quantisation)


def set_quantisation(model: HookedModel, quantisation: str | None) -> HookedModel:
    """Record how a model's weights were rounded, for `describe`.

    Args:
        model: a hooked model.
        quantisation: such as "Q4_1"; None for weights that were not rounded.

    Returns:
        The same model.
    """
    model.__dict__["quantisation"] = quantisation
    return model


def describe(model: HookedModel) -> ModelInfo:
    """Describe a `HookedTransformer` or a `TransformerBridge`.

    Args:
        model: as `load_model` returns it, or built with TransformerLens.

    Raises:
        ModelError: the model is neither.

    Example:
        ```python
        model = load_model("p0-nano")
        assert describe(model).n_layers == len(model.blocks)
        ```
    """
    backend = backend_of(model)
    cfg = model.cfg
    config = _hf_config(model) if backend == "bridge" else None
    positions = _positions(model, config)
    return ModelInfo(
        name=cfg.model_name or "custom",
        backend=backend,
        architecture=(cfg.original_architecture if config is None else cfg.architecture) or "custom",
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        d_mlp=0 if cfg.attn_only else (None if config is None else mlp_width(config)) or cfg.d_mlp or 0,
        vocab_size=cfg.d_vocab,
        n_ctx=None if positions in ("alibi", "none") else cfg.n_ctx,
        positions=positions,
        window=_hooked_windows(model) if config is None else layer_windows(config),
        experts=(cfg.num_experts or 0) if config is None else n_experts(config),
        parallel_blocks=_has_parallel_blocks(model, backend),
        quantisation=model.__dict__.get("quantisation"),
    )


def device_of(model: HookedModel) -> torch.device:
    """Return the device that takes a model's token ids; with a device map other weights may be elsewhere.

    Args:
        model: a hooked model.
    """
    import torch

    return torch.device(model.cfg.device)


def backend_of(model: object) -> Literal["hooked", "bridge"]:
    """Return which TransformerLens class a model is.

    Args:
        model: any object; a `HookedTransformer` gives "hooked" and a `TransformerBridge` "bridge".

    Raises:
        ModelError: the model is neither.
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


def _hf_config(model: HookedModel) -> PretrainedConfig:
    bridge: Any = model
    return bridge.original_model.config.get_text_config()


def _hooked_windows(model: HookedModel) -> tuple[int | None, ...]:
    cfg = model.cfg
    if not cfg.use_local_attn:
        return (None,) * cfg.n_layers
    return tuple(cfg.window_size if kind == "local" else None for kind in cfg.attn_types)


def _positions(model: HookedModel, config: PretrainedConfig | None) -> Positions:
    kind = _POSITIONS.get(model.cfg.positional_embedding_type, "none")
    # One entry per layer, 1 where it rotates: SmolLM 3 can leave rotation out.
    if (rotated := getattr(config, "no_rope_layers", None)) and not any(rotated):
        return "none"
    if config is None or kind != "learned" or hasattr(model, "pos_embed"):
        return kind
    # A bridge has "standard" here unless its adapter sets another value, whether there is a table or not.
    tables = ("wpe", "embed_positions", "position_embeddings")
    bridge: Any = model
    has_table = any(name.endswith(tables) for name, _ in bridge.original_model.named_modules())
    return "learned" if has_table else "none"


def _has_parallel_blocks(model: HookedModel, backend: str) -> bool:
    if backend == "hooked":
        return bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return any(cls.__name__ == "ParallelBlockBridge" for cls in type(model.blocks[0]).__mro__)
