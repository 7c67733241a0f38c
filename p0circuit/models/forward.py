"""The one way this package runs a model: the same call, checks and hooks on both backends."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models.architecture_edits import p0_positions
from p0circuit.models.bridge import HookPoints, bridge_points
from p0circuit.models.info import BLOCK_HOOKS, ModelError, backend_of, describe
from p0circuit.models.passes import count_blocks

Hook = tuple[str, Callable[..., Any]]

_POINTS: weakref.WeakKeyDictionary[Any, HookPoints] = weakref.WeakKeyDictionary()

# Hook points that TransformerLens computes only when asked to -> the flag that asks.
_SWITCHED = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


def forward(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    *,
    hooks: Sequence[Hook] = (),
    stop_at_layer: int | None = None,
) -> Tensor:
    """Run token ids through a hooked model and return its logits, or the residual stream before block `stop_at_layer`.

    A left-padded row gives the same values at its real positions as the row without padding. Hooks are
    `(name, fn(activation, hook))` pairs; what `fn` returns, unless None, takes the activation's place. They are gone
    afterwards, also after an exception. Hooks at or above `stop_at_layer` do not fire.

    Raises:
        ModelError: on a model in training mode, ids of the wrong type, shape, length or range, a mask that does not
            fit them, an unknown hook name, or a layer that does not exist.
    """
    info = describe(model)
    _check_ready(model)
    _check_ids(ids, info)
    mask = _check_mask(attention_mask, ids.shape, model)
    stop = _check_layer("stop_at_layer", stop_at_layer, 0, info.n_layers)
    ids = ids.to(model.cfg.device)
    hooks = _between(model, hooks, -1, stop)
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
    """Go on from the residual stream before block `start_at_layer` as if the model had computed it itself.

    Blocks below `start_at_layer` do not run and hooks on them (or on the embedding) do not fire;
    `start_at_layer` equal to the number of layers runs the final norm and the unembedding alone.

    Raises:
        ModelError: as `forward` does, and for a residual of another shape than [batch, pos, d_model].
    """
    info = describe(model)
    _check_ready(model)
    if residual.ndim != 3 or residual.shape[-1] != info.d_model or 0 in residual.shape:
        raise ModelError(f"expected a residual of shape [batch, pos, {info.d_model}], got {list(residual.shape)}")
    _check_length(residual.shape[1], info)
    mask = _check_mask(attention_mask, residual.shape[:2], model)
    start = _check_layer("start_at_layer", start_at_layer, 0, info.n_layers) or 0
    stop = _check_layer("stop_at_layer", stop_at_layer, start, info.n_layers)
    residual = residual.to(model.cfg.device)
    hooks = _between(model, hooks, start, stop)
    if stop == start:
        return residual
    count_blocks(residual.shape[0] * residual.shape[1], (info.n_layers if stop is None else stop) - start)
    if info.backend == "hooked":
        with hooked(model, hooks), p0_positions(model, mask):
            return model(residual, start_at_layer=start, attention_mask=mask, stop_at_layer=stop)
    # transformers owns the loop over the blocks and prepares masks and rotations for them: it runs on stand-in ids,
    # the blocks to be left out hand on the given residual, and an embedding that nobody reads is all that is wasted.
    ids = residual.new_zeros(residual.shape[:2], dtype=torch.long)
    if start == 0:
        hooks = [("blocks.0.hook_resid_pre", lambda activation, hook: residual), *hooks]
    with _left_out(model, start, residual), p0_positions(model, mask):
        return _run_bridge(model, ids, mask, hooks, stop)


@contextlib.contextmanager
def hooked(model: HookedModel, hooks: Sequence[Hook]) -> Iterator[None]:
    """Keep hooks on the model inside a `with`; on leaving, exactly these are removed, whatever happened.

    Raises:
        ModelError: for a name this model has no hook point for.
    """
    pairs = [(hook_point(model, name), _watched(model, name, function)) for name, function in hooks]
    added = []
    try:
        for point, function in pairs:
            point.add_hook(function)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def hook_point(model: HookedModel, name: str) -> Any:
    """The hook point with one of the common names (or any name the backend itself knows).

    Raises:
        ModelError: if there is none, or if it would not fire, with the reason.
    """
    points = hook_points(model).by_name
    if name not in points:
        raise ModelError(f"{describe(model).name} has no hook point {name!r}{_why_missing(model, name)}")
    flag = _SWITCHED.get(name.split(".")[-1])
    if flag and not getattr(model.cfg, flag, False):
        raise ModelError(f"the hook point {name!r} is off; call model.set_{flag}(True) first")
    return points[name]


def hook_points(model: HookedModel) -> HookPoints:
    """A model's hook points, found once per model."""
    if model not in _POINTS:
        hooked = backend_of(model) == "hooked"
        _POINTS[model] = HookPoints(dict(model.hook_dict), frozenset(), False) if hooked else bridge_points(model)
    return _POINTS[model]


def _watched(model: HookedModel, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a plain name, and for a hook point that can only be read one that refuses to edit."""
    read_only = name in hook_points(model).read_only

    # TransformerLens takes a hook's repr for its name, and that of a partial prints every tensor bound to it.
    def watched(activation: Tensor, hook: Any) -> Any:
        edited = function(activation, hook=hook)
        if read_only and edited is not None:
            raise ModelError(f"{name!r} can be read but not edited: {describe(model).architecture} hides its attention")
        return edited

    return watched


class _Stop(Exception):
    """Carries the residual stream out of a bridged model's forward pass."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


def _run_bridge(
    model: HookedModel, ids: Tensor, mask: Tensor | None, hooks: Sequence[Hook], stop: int | None
) -> Tensor:
    if stop is None:
        with hooked(model, hooks):
            return model(ids, attention_mask=mask, use_cache=False)

    def leave(activation: Tensor, hook: Any) -> None:
        raise _Stop(activation)

    last = "blocks.0.hook_resid_pre" if stop == 0 else f"blocks.{stop - 1}.hook_resid_post"
    try:
        with hooked(model, [*hooks, (last, leave)]):
            model(ids, attention_mask=mask, use_cache=False)
    except _Stop as stopped:
        return stopped.residual
    raise ModelError(f"{describe(model).name}: the hook {last!r} did not fire, cannot stop at layer {stop}")


@contextlib.contextmanager
def _left_out(model: HookedModel, start: int, residual: Tensor) -> Iterator[None]:
    """Make the blocks below `start` of a bridged model hand on `residual` instead of computing."""
    output = (residual,) if hook_points(model).blocks_return_tuples else residual
    blocks = list(model.blocks)[:start]
    # A block whose weights are brought for every pass has one of its own (device_map.py).
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            # Into the instance's dict: a bridge component passes attribute writes on to the module it wraps.
            block.__dict__["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def layer_of(name: str, layers: int) -> int:
    """The block a hook name belongs to: -1 for the embedding's, the number of layers for what follows the blocks."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block.group(1))
    return -1 if "embed" in name and "unembed" not in name else layers


def _between(model: HookedModel, hooks: Sequence[Hook], start: int, stop: int | None) -> list[Hook]:
    """The hooks, all of them checked, on what runs from block `start` on and below block `stop`."""
    for name, _ in hooks:
        hook_point(model, name)
    end = len(model.blocks) + 1 if stop is None else stop
    return [hook for hook in hooks if start <= layer_of(hook[0], len(model.blocks)) < end]


def _why_missing(model: HookedModel, name: str) -> str:
    info = describe(model)
    hook = re.sub(r"^blocks\.\d+\.", "", name)
    if hook != name and layer_of(name, info.n_layers) >= info.n_layers:
        return f": it has blocks 0 to {info.n_layers - 1}"
    if hook == "hook_resid_mid" and info.parallel_blocks:
        return ": attention and MLP of its blocks read the same input, there is no stream between them"
    if hook in ("mlp.hook_pre", "mlp.hook_post") and info.experts:
        return f": each of its {info.experts} experts has a hidden layer of its own"
    if "hook_rot_" in hook and info.positions != "rotary":
        return f": its positions are {info.positions}, not rotary; read hook_q and hook_k"
    if hook in BLOCK_HOOKS:
        return f": TransformerLens does not reach it in {info.architecture}"
    near = difflib.get_close_matches(name, hook_points(model).by_name, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _check_ready(model: HookedModel) -> None:
    # A bridge and the transformers model inside it can be in different modes.
    if model.training or getattr(model, "original_model", model).training:
        raise ModelError("the model is in training mode, where dropout makes every pass different; call model.eval()")


def _check_ids(ids: Tensor, info: Any) -> None:
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int32, torch.int64):
        raise ModelError(f"expected integer token ids of shape [batch, pos], got {ids.dtype} {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= info.vocab_size:
        raise ModelError(f"token ids must lie in 0..{info.vocab_size - 1} ({info.name}), got {low}..{high}")
    _check_length(ids.shape[1], info)


def _check_length(length: int, info: Any) -> None:
    if info.n_ctx is not None and length > info.n_ctx:
        raise ModelError(
            f"sequence of {length} tokens, but {info.name} has {info.positions} positions for {info.n_ctx} of them; "
            "shorten the prompts"
        )


def _check_mask(mask: Tensor | None, shape: Sequence[int], model: HookedModel) -> Tensor | None:
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


def _check_layer(name: str, layer: int | None, low: int, high: int) -> int | None:
    if layer is not None and not low <= layer <= high:
        raise ModelError(f"{name} must lie in {low}..{high}, got {layer}")
    return layer


SMALL_MODEL = 5_000_000
"""Parameters up to which one thread is quicker than several."""


def one_thread_if_small(model: HookedModel) -> None:
    """Let a small model run on one thread; OMP_NUM_THREADS, if set, has the last word.

    Its matrices are done before a second thread has woken up: one is twice as fast as two.
    """
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
