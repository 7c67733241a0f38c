"""Run a model in training without changing it: what a forward pass could change is restored afterwards."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients and with eager attention; restore its state after the `with` block.

    Restored are the mode of every submodule, buffers, the attention implementation, and the random generators of torch
    (CPU and the model's devices), numpy and Python. Autocast and compilation are off inside the block.

    Args:
        model: the model in training.
    """
    kind = _accelerator(model)[0] or "cpu"
    compiling = "torch._dynamo" in sys.modules
    with (
        preserve_random_state(model),
        torch.no_grad(),
        # The cache of an autocast around the training step would keep weights cast here, without their gradients.
        torch.autocast(kind, enabled=False),
        torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext(),
        _preserve_buffers(model),
        _eval_mode(model),
        _eager_attention(model),
    ):
        yield


@contextlib.contextmanager
def preserve_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random generators of torch (CPU and the model's devices), numpy and Python after the `with` block.

    Args:
        model: decides which devices have generators to restore.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    kind, indices = _accelerator(model)
    # torch cannot fork the generator of Apple's GPUs.
    forked = [] if kind == "mps" else indices
    try:
        with torch.random.fork_rng(forked, device_type=kind or "cuda"):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def attention_configs(model: nn.Module) -> list[Any]:
    """Return the `transformers` configurations by which the parts of a model choose their attention implementation.

    Args:
        model: a model of `transformers`.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values())


def _accelerator(model: nn.Module) -> tuple[str | None, list[int]]:
    """The kind of accelerator that a model is on, None for the CPU alone, and the numbers of those devices."""
    devices = {weight.device for weight in model.parameters() if weight.device.type not in ("cpu", "meta")}
    return next((device.type for device in devices), None), sorted(device.index or 0 for device in devices)


@contextlib.contextmanager
def _preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Some models count in buffers even in eval mode, such as the tokens that each expert gets."""
    before = [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, content, version in before:
            module._buffers[name] = buffer
            if buffer._version != version:
                buffer.copy_(content)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Not by model.eval(), which some adapters override to merge weights.
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    before = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
