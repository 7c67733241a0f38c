"""Control models that should have no circuit: the same architecture with untrained weights or with shuffled neurons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models.device_map import placement_of
from p0circuit.models.errors import ModelError
from p0circuit.models.hooks import hook_points, hooked
from p0circuit.models.info import describe

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

INITIAL_DEVIATION = 0.02
"""Standard deviation of untrained matrices, as in GPT-2 and most later models."""


@contextlib.contextmanager
def untrained_weights(model: HookedModel, seed: int = 0) -> Iterator[HookedModel]:
    """Give a model random initial weights inside a `with`: normal matrices, biases 0, gains 1.

    Args:
        model: which is changed in place and restored afterwards.
        seed: of the random weights.

    Yields:
        The same model.

    Raises:
        ModelError: the model was loaded with a device map, so that a second set of weights may not fit into memory.
    """
    if placement_of(model) is not None:
        raise ModelError(f"{describe(model).name} was loaded with a device map: its weights stay as they are")
    generator = torch.Generator().manual_seed(seed)
    # Past the model's own lists: a bridge's leaves out the experts of a mixture.
    parameters = {
        name: parameter.data for name, parameter in torch.nn.Module.named_parameters(cast(torch.nn.Module, model))
    }
    original = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            last = name.rpartition(".")[2]
            if last.lstrip("_").startswith("b"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * INITIAL_DEVIATION)
        yield model
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(original[name])


@contextlib.contextmanager
def shuffled_neurons(model: HookedModel, seed: int = 0) -> Iterator[HookedModel]:
    """Shuffle the output weights of the neurons of every MLP inside a `with`.

    All weights remain, and the outputs of every layer have their usual size, but a neuron's input weights no longer
    belong to its output weights. In a HookedTransformer the output matrices are permuted, so that its clean runs are
    recorded and cached like those of any model. In a bridge, whose matrices have many names, hooks permute the hidden
    activations.

    Args:
        model: which is changed in place and restored afterwards.
        seed: of the permutations.

    Yields:
        The same model.

    Raises:
        ModelError: the neurons have no hook point, as in a mixture of experts.
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
    """Permute output weights inside a `with`: hidden[order] @ W is hidden @ W[argsort(order)]."""
    originals = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, order in zip(weights, orders, strict=True):
                weight.copy_(weight[order.argsort()])
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def _shuffle(
    hidden: Float[Tensor, "batch pos d_mlp"], hook: HookPoint, order: Int[Tensor, " d_mlp"]
) -> Float[Tensor, "batch pos d_mlp"]:
    return hidden[..., order]
