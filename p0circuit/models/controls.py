"""Models in which there should be nothing to find: the same architecture untrained, or with its neurons shuffled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models.device_map import placement_of
from p0circuit.models.forward import hook_points, hooked
from p0circuit.models.info import ModelError, describe

INITIAL_DEVIATION = 0.02
"""Standard deviation of untrained matrices, as GPT-2 and most models after it start."""


@contextlib.contextmanager
def untrained_weights(model: HookedModel, seed: int = 0) -> Iterator[Any]:
    """The model with the weights of a beginner inside a `with`: matrices normal, biases 0, gains 1.

    Raises:
        ModelError: it was loaded with a device map, so that there need not be room for other weights beside its own.
    """
    if placement_of(model) is not None:
        raise ModelError(f"{describe(model).name} was loaded with a device map: its weights stay as they are")
    generator = torch.Generator().manual_seed(seed)
    # Past the model's own lists: a bridge's leaves out the experts of a mixture.
    parameters = {
        name: parameter.data for name, parameter in torch.nn.Module.named_parameters(cast(torch.nn.Module, model))
    }
    kept = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            last = name.rpartition(".")[2]
            if last.lstrip("_").startswith("b"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                drawn = torch.randn(parameter.shape, generator=generator) * INITIAL_DEVIATION
                parameter.copy_(drawn)
        yield model
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


@contextlib.contextmanager
def shuffled_neurons(model: HookedModel, seed: int = 0) -> Iterator[Any]:
    """The model with every MLP neuron writing what another one of its layer should write, inside a `with`.

    All weights are still there, and each layer's outputs have their usual size; what reads and what writes no longer
    belong together. A HookedTransformer has its output matrices permuted, so that clean runs can be recorded and shared
    like those of any model; a bridge, whose matrices have many names, has its hidden activations permuted by hooks.

    Raises:
        ModelError: its neurons cannot be reached, as in a mixture of experts.
    """
    layers = range(describe(model).n_layers)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in layers]
    if missing := [name for name in names if name not in hook_points(model).by_name]:
        raise ModelError(f"the neurons of {describe(model).name} cannot be shuffled: it has no hook point {missing[0]}")
    generator = torch.Generator().manual_seed(seed)
    width, device = describe(model).d_mlp, model.cfg.device
    orders = [torch.randperm(width, generator=generator).to(device) for _ in layers]
    if describe(model).backend == "hooked":
        with _shuffled_weights([block.mlp.W_out for block in model.blocks], orders):
            yield model
        return
    with hooked(model, [(name, partial(_shuffle, order=order)) for name, order in zip(names, orders, strict=True)]):
        yield model


@contextlib.contextmanager
def _shuffled_weights(
    weights: Sequence[Float[Tensor, "d_mlp d_model"]], orders: Sequence[Int[Tensor, " d_mlp"]]
) -> Iterator[None]:
    """Give each neuron the output of another inside a `with`: hidden[order] @ W is hidden @ W[argsort(order)]."""
    own = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, order in zip(weights, orders, strict=True):
                weight.copy_(weight[order.argsort()])
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, own, strict=True):
                weight.copy_(before)


def _shuffle(
    hidden: Float[Tensor, "batch pos d_mlp"], hook: Any, order: Int[Tensor, " d_mlp"]
) -> Float[Tensor, "batch pos d_mlp"]:
    return hidden[..., order]
