"""Run a model: the same call, checks and hooks on both backends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models.architecture_edits import p0_positions
from p0circuit.models.errors import ModelError
from p0circuit.models.hook_names import layer_of
from p0circuit.models.hooks import Hook, hook_point, hook_points, hooked
from p0circuit.models.info import ModelInfo, describe
from p0circuit.models.passes import count_blocks

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint


def forward(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    *,
    hooks: Sequence[Hook] = (),
    stop_at_layer: int | None = None,
) -> Tensor:
    """Run token ids through a hooked model.

    A left-padded row gives the same values at its real positions as the row without padding. Hooks are removed
    afterwards, also after an exception.

    Args:
        model: a hooked model in eval mode.
        ids: token ids, [batch, pos].
        attention_mask: 1 (or True) at real tokens and 0 at padding, [batch, pos]; None if there is no padding.
        hooks: pairs of a hook point's name and a function `f(activation, hook)`; what the function returns, unless
            None, replaces the activation. Hooks at or above `stop_at_layer` do not fire.
        stop_at_layer: the block before which to stop; None to run the whole model.

    Returns:
        Logits, [batch, pos, vocab]; with `stop_at_layer` the residual stream before that block, [batch, pos, d_model].

    Raises:
        ModelError: the model is in training mode, the ids have a wrong type, shape, length or range, the mask does not
            fit them, or there is no hook point or layer of that name or number.

    Example:
        ```python
        model = load_model("p0-nano")
        prompts = natural_text(model, "english", n=4)
        stream = forward(model, prompts.ids, stop_at_layer=1)  # after block 0
        ```
    """
    info = describe(model)
    _check_eval_mode(model)
    _check_ids(ids, info)
    mask = _checked_mask(attention_mask, ids.shape, model)
    stop = _checked_layer("stop_at_layer", stop_at_layer, 0, info.n_layers)
    ids = ids.to(model.cfg.device)
    hooks = _hooks_between(model, hooks, -1, stop)
    count_blocks(ids.numel(), info.n_layers if stop is None else stop)
    with p0_positions(model, mask):
        if info.backend == "hooked":
            with hooked(model, hooks):
                return model(ids, attention_mask=mask, stop_at_layer=stop)
        return _run_bridge(model, ids, mask, hooks, stop)


def resume(
    model: HookedModel,
    residual: Float[Tensor, "batch pos d_model"],
    start_at_layer: int,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    *,
    hooks: Sequence[Hook] = (),
    stop_at_layer: int | None = None,
) -> Tensor:
    """Run a hooked model from the residual stream before a block, as if the model had computed this stream itself.

    Args:
        model: a hooked model in eval mode.
        residual: the stream before block `start_at_layer`, [batch, pos, d_model].
        start_at_layer: the first block to run; the number of layers runs the final norm and the unembedding alone.
        attention_mask: as for `forward`.
        hooks: as for `forward`; hooks on the embedding and on blocks below `start_at_layer` do not fire.
        stop_at_layer: as for `forward`.

    Returns:
        Logits or the residual stream, as `forward` does.

    Raises:
        ModelError: as `forward` does, and for a residual of another shape.
    """
    info = describe(model)
    _check_eval_mode(model)
    if residual.ndim != 3 or residual.shape[-1] != info.d_model or 0 in residual.shape:
        raise ModelError(f"expected a residual of shape [batch, pos, {info.d_model}], got {list(residual.shape)}")
    _check_length(residual.shape[1], info)
    mask = _checked_mask(attention_mask, residual.shape[:2], model)
    start = _checked_layer("start_at_layer", start_at_layer, 0, info.n_layers) or 0
    stop = _checked_layer("stop_at_layer", stop_at_layer, start, info.n_layers)
    residual = residual.to(model.cfg.device)
    hooks = _hooks_between(model, hooks, start, stop)
    if stop == start:
        return residual
    count_blocks(residual.shape[0] * residual.shape[1], (info.n_layers if stop is None else stop) - start)
    if info.backend == "hooked":
        with hooked(model, hooks), p0_positions(model, mask):
            return model(residual, start_at_layer=start, attention_mask=mask, stop_at_layer=stop)
    # transformers owns the loop over the blocks and prepares masks and rotations for them. So it runs on stand-in ids,
    # and the skipped blocks return the given residual. All that is wasted is an embedding.
    ids = residual.new_zeros(residual.shape[:2], dtype=torch.long)
    if start == 0:
        hooks = [("blocks.0.hook_resid_pre", lambda activation, hook: residual), *hooks]
    with _skipped_blocks(model, start, residual), p0_positions(model, mask):
        return _run_bridge(model, ids, mask, hooks, stop)


class _Stop(Exception):
    """Carries the residual stream out of a bridge's forward pass."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


def _run_bridge(
    model: HookedModel, ids: Tensor, mask: Tensor | None, hooks: Sequence[Hook], stop: int | None
) -> Tensor:
    if stop is None:
        with hooked(model, hooks):
            return model(ids, attention_mask=mask, use_cache=False)

    def leave(activation: Tensor, hook: HookPoint) -> None:
        raise _Stop(activation)

    last = "blocks.0.hook_resid_pre" if stop == 0 else f"blocks.{stop - 1}.hook_resid_post"
    try:
        with hooked(model, [*hooks, (last, leave)]):
            model(ids, attention_mask=mask, use_cache=False)
    except _Stop as stopped:
        return stopped.residual
    raise ModelError(f"{describe(model).name}: the hook {last!r} did not fire, so it cannot stop at layer {stop}")


@contextlib.contextmanager
def _skipped_blocks(model: HookedModel, start: int, residual: Tensor) -> Iterator[None]:
    """Make the blocks of a bridge below `start` return `residual` instead of computing."""
    output = (residual,) if hook_points(model).blocks_return_tuples else residual
    blocks = list(model.blocks)[:start]
    # A block with offloaded weights has a forward function of its own (offload.py).
    originals = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            # Into the instance's dict: a bridge component passes attribute writes on to the module it wraps.
            block.__dict__["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.__dict__.pop("forward", None)
            if original is not None:
                block.__dict__["forward"] = original


def _hooks_between(model: HookedModel, hooks: Sequence[Hook], start: int, stop: int | None) -> list[Hook]:
    """The hooks on blocks from `start` on and below `stop`; the names of all hooks are checked."""
    for name, _ in hooks:
        hook_point(model, name)
    end = len(model.blocks) + 1 if stop is None else stop
    return [hook for hook in hooks if start <= layer_of(hook[0], len(model.blocks)) < end]


def _check_eval_mode(model: HookedModel) -> None:
    # A bridge and the transformers model inside it can be in different modes.
    if model.training or getattr(model, "original_model", model).training:
        raise ModelError("the model is in training mode, where dropout makes every pass different; call model.eval()")


def _check_ids(ids: Tensor, info: ModelInfo) -> None:
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int32, torch.int64):
        raise ModelError(f"expected integer token ids of shape [batch, pos], got {ids.dtype} {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= info.vocab_size:
        raise ModelError(f"token ids must lie in 0..{info.vocab_size - 1} ({info.name}), got {low}..{high}")
    _check_length(ids.shape[1], info)


def _check_length(length: int, info: ModelInfo) -> None:
    if info.n_ctx is not None and length > info.n_ctx:
        raise ModelError(
            f"sequence of {length} tokens, but {info.name} has {info.positions} positions for {info.n_ctx} of them; "
            "shorten the prompts"
        )


def _checked_mask(mask: Tensor | None, shape: Sequence[int], model: HookedModel) -> Tensor | None:
    """The mask as integers on the model's device; None where the model needs none."""
    if mask is not None:
        if tuple(mask.shape) != tuple(shape):
            raise ModelError(f"the attention mask has shape {list(mask.shape)}, the input [batch, pos] = {list(shape)}")
        mask = mask.to(device=model.cfg.device, dtype=torch.long)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ModelError("the attention mask must hold 1 (or True) at real tokens and 0 at padding")
        if not bool(mask.any(dim=1).all()):
            raise ModelError(f"row {int(mask.any(dim=1).int().argmin())} of the attention mask has no real token")
        if not bool(mask.all()):
            return mask
    # HookedTransformer guesses a mask from the ids when its tokenizer pads on the left: rule that out.
    if getattr(model.tokenizer, "padding_side", "right") == "left":
        return torch.ones(tuple(shape), dtype=torch.long, device=model.cfg.device)
    return None


def _checked_layer(name: str, layer: int | None, low: int, high: int) -> int | None:
    if layer is not None and not low <= layer <= high:
        raise ModelError(f"{name} must lie in {low}..{high}, got {layer}")
    return layer
