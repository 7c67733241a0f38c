"""Forward passes that no library implements: what the `p0circuit` field of config.json changes in an architecture.

- Force-sink masking: before every pre-norm, the first `k` channels are kept at P0 only, and the other `d_model - k`
  channels at all other positions only. The residual stream itself is not masked (paper, version 2, section on training
  methods).
- Gated attention: each head's output is multiplied elementwise by `sigmoid(W x)`, where `x` is the input of the
  attention (Qiu et al. 2025, arXiv 2505.06708).

Both are hooks on modules. The same hooks serve a `transformers` model, to train it and as the reference when it is
loaded, and the TransformerLens model that is made of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from p0circuit.hooked_model import HookedModel
from p0circuit.models.errors import ModelError
from p0circuit.models.hooks import hook_point

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG_FIELD = "p0circuit"
"""The entry of config.json that holds the fields of `ArchitectureEdits`."""
GATES = "p0circuit_gates"
"""The buffer of a hooked model that holds its gates, [layer, heads * d_head, d_model]."""


@dataclass(frozen=True)
class ArchitectureEdits:
    """How a forward pass differs from that of its architecture.

    Attributes:
        force_sink: number of channels that only P0 may use; 0 for no masking.
        gated_attention: whether the output of every head is gated.
    """

    force_sink: int = 0
    gated_attention: bool = False

    def __bool__(self) -> bool:
        """Tell whether there is any edit."""
        return self != ArchitectureEdits()

    def to_json(self) -> dict[str, int | bool]:
        """Return the dictionary that is stored in config.json."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_config(cls, config: PretrainedConfig, name: str = "config.json") -> ArchitectureEdits:
        """Read the edits of a `transformers` config.

        Args:
            config: of a causal language model.
            name: what an error message calls the config.

        Raises:
            ModelError: the field holds an entry that this version does not know; ignoring it would compute another
                model.
        """
        entries = getattr(config, CONFIG_FIELD, None) or {}
        known = {field.name: type(field.default) for field in fields(cls)}
        wrong = {key: value for key, value in entries.items() if type(value) is not known.get(key)}
        if wrong or not 0 <= entries.get("force_sink", 0) < config.hidden_size:
            raise ModelError(
                f"{name}: its field {CONFIG_FIELD!r} is {entries}; expected {' and '.join(known)}, a number of "
                f"channels below {config.hidden_size} and true or false"
            )
        return cls(**entries)


class _Sites(NamedTuple):
    """The modules to hook: for every layer its pre-norms, the attention's first, and the module after the heads."""

    norms: list[list[nn.Module]]
    after_heads: list[nn.Module]


class P0Positions:
    """The position of P0 in each row of the batch that is being run.

    Attributes:
        index: the position of P0 by row, [batch]; None where it is 0 in every row.
    """

    def __init__(self) -> None:
        """Start with P0 at position 0 in every row."""
        self.index: Int[Tensor, " batch"] | None = None

    @contextlib.contextmanager
    def from_mask(self, mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        """Read the positions from an attention mask, for the passes inside the `with`.

        Args:
            mask: 1 at real tokens and 0 at padding, [batch, pos]; None if there is no padding.
        """
        self.index = None if mask is None else mask.long().argmax(dim=1)
        try:
            yield
        finally:
            self.index = None


def reserve_channels(
    stream: Float[Tensor, "batch pos *head d_model"], channels: int, p0: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch pos *head d_model"]:
    """Apply force-sink masking: the first channels are kept at P0 only, the others everywhere but at P0.

    Args:
        stream: what a pre-norm reads, [batch, pos, ..., d_model].
        channels: how many channels are reserved for P0.
        p0: the position of P0 by row, [batch]; None for position 0.
    """
    positions = torch.arange(stream.shape[1], device=stream.device)
    at_p0 = positions == (torch.zeros(1, dtype=torch.long, device=stream.device) if p0 is None else p0)[:, None]
    reserved = torch.arange(stream.shape[-1], device=stream.device) < channels
    mask = at_p0[..., None] == reserved
    return stream * mask.view(*mask.shape[:2], *(1,) * (stream.ndim - 3), -1)


def apply_gate(
    heads: Float[Tensor, "batch pos ..."],
    attention_input: Float[Tensor, "batch pos d_model"],
    gate: Float[Tensor, "inner d_model"],
) -> Float[Tensor, "batch pos ..."]:
    """Multiply the output of all heads by the sigmoid of a linear map of the attention's input.

    Args:
        heads: output of the heads, [batch, pos, inner] or [batch, pos, head, d_head].
        attention_input: the normed stream that the attention reads, [batch, pos, d_model].
        gate: the linear map, [inner, d_model], where inner is the number of heads times d_head.
    """
    return heads * torch.sigmoid(attention_input @ gate.to(attention_input).T).reshape(heads.shape)


def add_gates(hf: PreTrainedModel) -> None:
    """Give every attention of an untrained `transformers` model a gate of zeros, which halves its output.

    Args:
        hf: a model with Llama's layout.
    """
    for layer in _layers(hf):
        width = layer.self_attn.o_proj.in_features
        layer.self_attn.gate = nn.Linear(hf.config.hidden_size, width, bias=False)
        nn.init.zeros_(layer.self_attn.gate.weight)


def gates_of(hf: PreTrainedModel) -> list[Tensor]:
    """Return the gates that `add_gates` has given to a model.

    Args:
        hf: a model with Llama's layout.

    Returns:
        One matrix per layer, [inner, d_model]; an empty list for a model without gates.
    """
    return [layer.self_attn.gate.weight for layer in _layers(hf) if hasattr(layer.self_attn, "gate")]


def gate_name(layer: int) -> str:
    """Return the name under which a gate is stored in the weight file.

    Args:
        layer: the index of its block.
    """
    return f"model.layers.{layer}.self_attn.gate.weight"


def edit_hf_model(
    hf: PreTrainedModel, edits: ArchitectureEdits, gates: Sequence[Float[Tensor, "inner d_model"]] = ()
) -> list[RemovableHandle]:
    """Edit the forward pass of a `transformers` model.

    Args:
        hf: a model with Llama's layout.
        edits: what to change.
        gates: one per layer if the attention is gated.

    Returns:
        The handles that undo the edits.

    Raises:
        ModelError: the model has another layout than Llama's.
    """
    layers = _layers(hf)
    sites = _Sites(
        [[layer.input_layernorm, layer.post_attention_layernorm] for layer in layers],
        [layer.self_attn.o_proj for layer in layers],
    )
    return _add_hooks(sites, edits, P0Positions(), gates.__getitem__)


@contextlib.contextmanager
def temporary_edits(
    hf: PreTrainedModel, edits: ArchitectureEdits, gates: Sequence[Float[Tensor, "inner d_model"]] = ()
) -> Iterator[None]:
    """Edit the forward pass of a `transformers` model inside a `with`.

    Args:
        hf: a model, which may have any layout if there are no edits.
        edits: what to change.
        gates: one per layer if the attention is gated.
    """
    handles = edit_hf_model(hf, edits, gates) if edits else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edit_hooked_model(
    model: HookedModel, edits: ArchitectureEdits, gates: Sequence[Float[Tensor, "inner d_model"]] = ()
) -> HookedModel:
    """Edit the forward pass of a hooked model for good; its hook points see the edited activations.

    Args:
        model: a hooked model, which is changed in place.
        edits: what to change.
        gates: one per layer if the attention is gated.

    Returns:
        The same model.
    """
    if not edits:
        return model
    model.cfg.p0circuit = edits
    module = cast(nn.Module, model)
    if gates:
        module.register_buffer(GATES, torch.stack(list(gates)).to(model.cfg.device, model.cfg.dtype))
    positions = P0Positions()
    model.__dict__["p0_positions"] = positions
    sites = _Sites(
        [[block.ln1, block.ln2] for block in model.blocks],
        [hook_point(model, f"blocks.{layer}.attn.hook_z") for layer in range(len(model.blocks))],
    )
    # Past a bridge's own attribute look-up, which knows no buffers.
    _add_hooks(sites, edits, positions, lambda layer: cast(Tensor, module._buffers[GATES])[layer])
    return model


def p0_positions(
    model: HookedModel, mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None
) -> contextlib.AbstractContextManager[None]:
    """Give an edited model the positions of P0 for the passes inside a `with`; for other models nothing happens.

    Args:
        model: a hooked model.
        mask: 1 at real tokens and 0 at padding, [batch, pos]; None if there is no padding.
    """
    positions = model.__dict__.get("p0_positions")
    return contextlib.nullcontext() if positions is None else positions.from_mask(mask)


def _add_hooks(
    sites: _Sites, edits: ArchitectureEdits, positions: P0Positions, gate_of: Callable[[int], Tensor]
) -> list[RemovableHandle]:
    handles = []
    for layer, (norms, after_heads) in enumerate(zip(*sites, strict=True)):
        if edits.gated_attention:
            attention_input: list[Tensor] = []
            handles.append(norms[0].register_forward_hook(partial(_store_output, attention_input)))
            handles.append(after_heads.register_forward_pre_hook(partial(_gate_input, attention_input, gate_of, layer)))
        if edits.force_sink:
            for norm in norms:
                handles.append(norm.register_forward_pre_hook(partial(_mask_input, edits.force_sink, positions)))
    return handles


def _store_output(storage: list[Tensor], module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
    storage[:] = [output]


def _gate_input(
    attention_input: list[Tensor],
    gate_of: Callable[[int], Tensor],
    layer: int,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    return (apply_gate(inputs[0], attention_input.pop(), gate_of(layer)), *inputs[1:])


def _mask_input(
    channels: int, positions: P0Positions, module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (reserve_channels(inputs[0], channels, positions.index), *inputs[1:])


def _layers(hf: PreTrainedModel) -> list[Any]:
    layers = list(getattr(getattr(hf, "model", None), "layers", []))
    if not layers or not hasattr(getattr(layers[0], "self_attn", None), "o_proj"):
        raise ModelError(f"the forward pass of {type(hf).__name__} cannot be edited; expected the layout of Llama")
    return layers
