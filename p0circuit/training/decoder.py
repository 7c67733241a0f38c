"""The decoder layers of a causal language model, whatever wraps it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from p0circuit.models.errors import ModelError


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model and its decoder layers.

    Attributes:
        model: the model, which takes token ids [batch, pos].
        layers: its decoder layers, in the order in which they run.
    """

    model: nn.Module
    layers: list[nn.Module]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile.

    Args:
        model: a model or a wrapper of one.
    """
    while len(model._modules) == 1:
        name, inner = next(iter(model._modules.items()))
        if name not in ("module", "_orig_mod") or inner is None:
            break
        model = inner
    return model


def decoder_of(model: nn.Module) -> Decoder:
    """Find the decoder layers of a causal language model: of its outermost lists of layers the one with most weights.

    Args:
        model: the model, possibly wrapped for training.

    Raises:
        ModelError: there is no such list, the model is an encoder-decoder, or its weights are sharded.
    """
    model = unwrap(model)
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; expected a causal language model, which has a decoder alone")
    sharded = any(hasattr(weight, "ds_id") or type(weight).__name__ == "DTensor" for weight in model.parameters())
    if sharded or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ModelError(
            f"the weights of {name} are sharded over processes (FSDP, ZeRO-3, tensor parallel), so that one of them "
            "alone cannot run it; expected a whole model on rank 0, as with DistributedDataParallel"
        )
    lists = {path: module for path, module in model.named_modules() if _is_list_of_layers(module)}
    outermost = [
        list(module.children())
        for path, module in lists.items()
        if not any(path != other and path.startswith(f"{other}.") for other in lists)
    ]
    if not outermost:
        raise ModelError(
            f"no decoder layers found in {name}; expected an nn.ModuleList (or a ModuleDict or Sequential of one kind "
            f"of module) among its modules, and found {', '.join(n for n, _ in model.named_children()) or 'none'}"
        )
    expected = getattr(config, "num_hidden_layers", None)
    size = {id(layers): sum(w.numel() for layer in layers for w in layer.parameters()) for layers in outermost}
    return Decoder(model, max(outermost, key=lambda layers: (len(layers) == expected, size[id(layers)])))


def _is_list_of_layers(module: nn.Module) -> bool:
    children = list(module.children())
    one_kind = len(children) > 1 and len({type(child) for child in children}) == 1
    return bool(children) and (
        isinstance(module, nn.ModuleList) or (one_kind and isinstance(module, (nn.ModuleDict, nn.Sequential)))
    )
