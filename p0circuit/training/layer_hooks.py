"""Run the decoder layers of a model and read residual stream and attention of each as it is computed.

The model is called as it is, in its own dtype and with the hooks it already has. Only one layer's attention exists at a
time, and what follows the last layer does not run. Attention that never becomes a tensor (sdpa, flash) is computed
eagerly: by the model's own eager implementation if it is one of `transformers`, from the arguments of
`scaled_dot_product_attention` otherwise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from p0circuit.models.errors import ModelError
from p0circuit.training.decoder import Decoder
from p0circuit.training.model_state import attention_configs


class _PassComplete(Exception):
    """Ends a forward pass after the last layer of interest."""


class _AttentionCapture(TorchFunctionMode):
    """Inside `with`, calls `read` with the attention pattern of every call of `scaled_dot_product_attention`."""

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            self.read(_attention_pattern(*args, **kwargs))
        return func(*args, **kwargs)


def _attention_pattern(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch head pos pos"]:
    """The attention pattern of `scaled_dot_product_attention`, from its arguments."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    return scores.softmax(-1)


def _is_pattern(value: object, batch: int, length: int) -> bool:
    """Whether a module's output is attention: [batch, head, query, key], no entry negative, no row above 1."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return False
    if (value.shape[0], *value.shape[2:]) != (batch, length, length):
        return False
    return bool((value.min() >= 0) & (value.float().sum(-1).max() < 1.05))


def run_layers(
    decoder: Decoder,
    ids: Int[Tensor, "batch pos"],
    stream: Callable[[int, Tensor], Tensor | None],
    attention: Callable[[int, Tensor], None] | None = None,
    depth: int | None = None,
) -> None:
    """Run token ids through the first layers of a model and call back with what each layer computes.

    Call it inside `preserve_model_state`.

    Args:
        decoder: the model and its layers.
        ids: token ids.
        stream: called as `stream(depth, residual)` with the residual stream [batch, pos, d_model] before the first
            layer (depth 0) and after layer l (depth l + 1). What it returns after a layer, unless None, replaces the
            stream.
        attention: called as `attention(layer, pattern)` with the attention [batch, head, query, key] of each layer
            that has any.
        depth: number of layers to run; all if None.

    Raises:
        ModelError: the layers did not run, or queries attend to later keys.
    """
    depth = len(decoder.layers) if depth is None else depth
    running: list[int] = []
    read: set[int] = set()

    def before_layer(layer: int, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        running.append(layer)
        if layer == 0:
            stream(0, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def after_layer(layer: int, module: nn.Module, args: tuple[object, ...], output: object) -> object:
        parts = (output,) if isinstance(output, Tensor) else cast("tuple[Tensor, ...]", output)
        replaced = stream(layer + 1, parts[0])
        if layer + 1 == depth:
            raise _PassComplete
        if replaced is None:
            return None
        return replaced if isinstance(output, Tensor) else (replaced, *parts[1:])

    def read_pattern(layer: int, pattern: Tensor) -> None:
        if attention is None or layer in read:
            return
        read.add(layer)
        if bool(pattern[:, :, 0, 1:].any()):
            raise ModelError(
                f"{type(decoder.model).__name__} attends to later positions; expected a causal language model, not an "
                "encoder"
            )
        attention(layer, pattern)

    def after_module(layer: int, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        for part in output if isinstance(output, tuple) and layer not in read else ():
            if _is_pattern(part, *ids.shape):
                read_pattern(layer, part)

    # Nothing after the last layer is needed, and the logits could be larger than the model.
    of_transformers = bool(attention_configs(decoder.model))
    options = {"use_cache": False} if of_transformers else {}
    with contextlib.ExitStack() as stack:
        for layer, module in enumerate(decoder.layers[:depth]):
            hooks = [module.register_forward_pre_hook(functools.partial(before_layer, layer), with_kwargs=True)]
            if attention is not None:
                hooks += [
                    part.register_forward_hook(functools.partial(after_module, layer)) for part in module.modules()
                ]
            hooks.append(module.register_forward_hook(functools.partial(after_layer, layer)))
            for hook in hooks:
                stack.callback(hook.remove)
        if attention is not None and not of_transformers:
            stack.enter_context(
                _AttentionCapture(lambda pattern: read_pattern(running[-1], pattern) if running else None)
            )
        with contextlib.suppress(_PassComplete):
            decoder.model(ids, **options)
            raise ModelError(
                f"{type(decoder.model).__name__} has {len(decoder.layers)} layers and ran {running or 'none'}; "
                "expected each of them once"
            )
