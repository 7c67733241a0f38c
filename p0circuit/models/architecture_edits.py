"""Forward passes that no library knows: what the `p0circuit` field of a config.json adds to a known architecture.

- Force-sink masking: before every pre-norm, P0 keeps its first `k` channels alone and all other positions the other
  `d_model - k`. The stream itself keeps everything (paper, v2, section on training methods).
- Gated attention: each head's output is multiplied by `sigmoid(W x)`, element by element, where `x` is what the
  attention read (Qiu et al. 2025, arXiv 2505.06708).

Both are hooks on modules, the same ones on a `transformers` model (to train it, and as the reference when it is loaded)
and on the TransformerLens model that is made of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from p0circuit.hooked_model import HookedModel
from p0circuit.models.info import ModelError

FIELD = "p0circuit"
"""The entry of config.json, a dictionary of the fields of `ArchitectureEdits`."""
GATES = "p0circuit_gates"
"""The buffer of a hooked model that holds its gates."""


@dataclass(frozen=True)
class ArchitectureEdits:
    """How a forward pass differs from its architecture's.

    `force_sink` is the number of channels kept for P0 alone, 0 for no masking; `gated_attention` puts a gate on the
    output of every head.
    """

    force_sink: int = 0
    gated_attention: bool = False

    def __bool__(self) -> bool:
        return self != ArchitectureEdits()

    def to_json(self) -> dict[str, Any]:
        """The dictionary that goes into config.json."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def of(cls, config: Any, name: str = "config.json") -> ArchitectureEdits:
        """Read them from a `transformers` config.

        Raises:
            ModelError: the field holds something that this version does not know; to ignore it would be wrong.
        """
        given = getattr(config, FIELD, None) or {}
        known = {field.name: type(field.default) for field in fields(cls)}
        wrong = {key: value for key, value in given.items() if type(value) is not known.get(key)}
        if wrong or not 0 <= given.get("force_sink", 0) < config.hidden_size:
            raise ModelError(
                f"{name}: its field {FIELD!r} is {given}; expected {' and '.join(known)}, a number of channels below "
                f"{config.hidden_size} and true or false"
            )
        return cls(**given)


class _Sites(NamedTuple):
    """The modules to hook: per layer its pre-norms, the attention's first, and what receives the heads' output."""

    norms: list[list[nn.Module]]
    after_heads: list[nn.Module]


class P0Positions:
    """Where P0 stands in the batch that is being run: index 0, or under left padding one index per row."""

    def __init__(self) -> None:
        self.index: Int[Tensor, " batch"] | None = None

    @contextlib.contextmanager
    def at(self, mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        """Take P0's place from an attention mask, for the passes inside the `with`."""
        self.index = None if mask is None else mask.long().argmax(dim=1)
        try:
            yield
        finally:
            self.index = None


def reserve_channels(
    stream: Float[Tensor, "batch pos *head d_model"], channels: int, p0: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch pos *head d_model"]:
    """Force-sink masking: the first `channels` of the stream survive at P0 alone, the others everywhere but at P0."""
    positions = torch.arange(stream.shape[1], device=stream.device)
    at_p0 = positions == (torch.zeros(1, dtype=torch.long, device=stream.device) if p0 is None else p0)[:, None]
    reserved = torch.arange(stream.shape[-1], device=stream.device) < channels
    kept = at_p0[..., None] == reserved
    return stream * kept.view(*kept.shape[:2], *(1,) * (stream.ndim - 3), -1)


def gated(
    heads: Float[Tensor, "batch pos ..."],
    read: Float[Tensor, "batch pos d_model"],
    gate: Float[Tensor, "inner d_model"],
) -> Float[Tensor, "batch pos ..."]:
    """Gated attention: the output of all heads times the sigmoid of a linear map of what the attention read."""
    return heads * torch.sigmoid(read @ gate.to(read).T).reshape(heads.shape)


def add_gates(hf: Any) -> None:
    """Give every attention of an untrained `transformers` model a gate, all half open."""
    for layer in _layers(hf):
        width = layer.self_attn.o_proj.in_features
        layer.self_attn.gate = nn.Linear(hf.config.hidden_size, width, bias=False)
        nn.init.zeros_(layer.self_attn.gate.weight)


def gates_of(hf: Any) -> list[Tensor]:
    """The gates that `add_gates` gave to a model, by layer; none if it has none."""
    return [layer.self_attn.gate.weight for layer in _layers(hf) if hasattr(layer.self_attn, "gate")]


def gate_name(layer: int) -> str:
    """The name under which a layer's gate is saved."""
    return f"model.layers.{layer}.self_attn.gate.weight"


def edit_hf_model(
    hf: Any, changes: ArchitectureEdits, gates: Sequence[Float[Tensor, "inner d_model"]] = ()
) -> list[Any]:
    """Change the forward pass of a `transformers` model; returns the handles that undo it.

    Raises:
        ModelError: its layers are not of the kind that can be changed.
    """
    layers = _layers(hf)
    sites = _Sites(
        [[layer.input_layernorm, layer.post_attention_layernorm] for layer in layers],
        [layer.self_attn.o_proj for layer in layers],
    )
    return _change(sites, changes, P0Positions(), gates.__getitem__)


@contextlib.contextmanager
def changed(
    hf: Any, changes: ArchitectureEdits, gates: Sequence[Float[Tensor, "inner d_model"]] = ()
) -> Iterator[None]:
    """Change the forward pass of a `transformers` model inside a `with`; nothing if there is nothing to change."""
    handles = edit_hf_model(hf, changes, gates) if changes else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edit_hooked_model(
    model: HookedModel, changes: ArchitectureEdits, gates: Sequence[Float[Tensor, "inner d_model"]] = ()
) -> HookedModel:
    """Change the forward pass of a hooked model for good, hook points included; returns the model."""
    from p0circuit.models.forward import hook_point

    if not changes:
        return model
    model.cfg.p0circuit = changes
    module = cast(nn.Module, model)
    if gates:
        module.register_buffer(GATES, torch.stack(list(gates)).to(model.cfg.device, model.cfg.dtype))
    place = P0Positions()
    model.__dict__["p0_place"] = place
    sites = _Sites(
        [[block.ln1, block.ln2] for block in model.blocks],
        [hook_point(model, f"blocks.{layer}.attn.hook_z") for layer in range(len(model.blocks))],
    )
    # Past a bridge's own attribute look-up, which knows no buffers.
    _change(sites, changes, place, lambda layer: cast(Tensor, module._buffers[GATES])[layer])
    return model


def p0_positions(model: HookedModel, mask: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Tell a changed model where P0 stands in the passes inside the `with`; nothing for any other model."""
    place = model.__dict__.get("p0_place")
    return contextlib.nullcontext() if place is None else place.at(mask)


def _change(sites: _Sites, changes: ArchitectureEdits, place: P0Positions, gate: Callable[[int], Tensor]) -> list[Any]:
    handles = []
    for layer, (norms, after) in enumerate(zip(*sites, strict=True)):
        if changes.gated_attention:
            read: list[Tensor] = []
            handles.append(norms[0].register_forward_hook(partial(_keep, read)))
            handles.append(after.register_forward_pre_hook(partial(_gate, read, gate, layer)))
        if changes.force_sink:
            for norm in norms:
                handles.append(norm.register_forward_pre_hook(partial(_reserve, changes.force_sink, place)))
    return handles


def _keep(read: list[Tensor], module: Any, inputs: Any, output: Tensor) -> None:
    read[:] = [output]


def _gate(read: list[Tensor], gate: Callable[[int], Tensor], layer: int, module: Any, inputs: Any) -> tuple[Any, ...]:
    return (gated(inputs[0], read.pop(), gate(layer)), *inputs[1:])


def _reserve(channels: int, place: P0Positions, module: Any, inputs: Any) -> tuple[Any, ...]:
    return (reserve_channels(inputs[0], channels, place.index), *inputs[1:])


def _layers(hf: Any) -> Any:
    layers = getattr(getattr(hf, "model", None), "layers", [])
    if not len(layers) or not hasattr(getattr(layers[0], "self_attn", None), "o_proj"):
        raise ModelError(f"the forward pass of {type(hf).__name__} cannot be changed; expected the layout of Llama")
    return layers
