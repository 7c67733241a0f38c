"""Look at P0 in a model that is being trained, and leave no trace of having looked.

1. `decoder_of` finds the decoder layers of a model, in whatever wraps it.
2. `undisturbed` puts back everything that a forward pass, or what the probe needs for it, could change.
3. `measure` runs the probe rows with hooks on the layers. Each layer's attention is reduced to sink scores as soon as
   it is computed, so that never more than one layer's exists; what follows the last layer does not run.
4. For the causal concentration the rows run once more, with P0's stream after block 1 taken from the shifted run. As
   nothing after a token reaches it, the shifted run is but the prefix and that token.

The model is called as it is, in its own dtype and with the hooks that are on it; nothing is converted. Attention that
never becomes a tensor (sdpa, flash) is computed eagerly for these passes: by the model's own eager implementation if it
is one of `transformers`, beside `scaled_dot_product_attention` otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from p0circuit import sink
from p0circuit.models.errors import ModelError
from p0circuit.sink import CONTROL, sink_heads
from p0circuit.training.formation import EARLY_BLOCKS, lost_share, observed_concentration

SHIFT = 8
"""How many random tokens stand before P0's token in the shifted run."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model that takes token ids [batch, pos], and its decoder layers in the order in which they run."""

    model: nn.Module
    layers: list[nn.Module]


@dataclass(frozen=True)
class Measurement:
    """The P0 sink of a model as it stands. Means over the probe rows, norms and directions those of the stream.

    Attributes:
        sink_rate: share of (row, head) pairs with a sink score above 0.3 (Gu et al. 2025, section 3).
        sink_rate_from_layer_2: the same from layer 2 on, `Sink[2:]`; None where no such layer has attention.
        norm_ratio: norm at P0 over the median of the other positions, after block 1.
        largest_norm_ratio: the same where it is largest, before any block or after the last.
        direction_consistency: cosine of P0 with the mean P0 direction of all rows, after block 1.
        concentration_observed: share of P0's gain in log norm, from the embedding to its largest, that blocks 0 and 1
            wrote; negative where they take away, None where its norm grows by less than a tenth.
        concentration_causal: share of `Sink[2:]` lost when P0's stream after block 1 is that of the same token behind
            8 random ones; negative where it grows, as it may while few heads are above 0.3, None where fewer than one
            in a thousand is.
        excess: score of P0 minus that of position 8 in the heads with the highest scores (`heads.sink_heads`), chosen
            on the even rows and measured on the odd ones.
    """

    sink_rate: float
    sink_rate_from_layer_2: float | None
    norm_ratio: float
    largest_norm_ratio: float
    direction_consistency: float
    concentration_observed: float | None
    concentration_causal: float | None
    excess: float


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while len(model._modules) == 1:
        name, inner = next(iter(model._modules.items()))
        if name not in ("module", "_orig_mod") or inner is None:
            break
        model = inner
    return model


def decoder_of(model: nn.Module) -> Decoder:
    """Find the decoder layers of a causal language model: the outermost list of layers with the most weights.

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


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model inside the `with` in eval mode, without gradients, with eager attention; then all is as before.

    What is put back: the mode of every submodule, buffers, the attention implementation, and the random generators of
    torch (CPU and the model's devices), numpy and Python. Autocast and compilation are off meanwhile.
    """
    kind = _accelerator(model)[0] or "cpu"
    compiling = "torch._dynamo" in sys.modules
    with (
        same_randomness(model),
        torch.no_grad(),
        # Weights cast inside an autocast that training has open would stay in its cache, without a gradient.
        torch.autocast(kind, enabled=False),
        torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext(),
        _same_buffers(model),
        _in_eval_mode(model),
        _eager_attention(model),
    ):
        yield


@contextlib.contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Put the random generators of torch (CPU and the model's devices), numpy and Python back after the `with`."""
    ours, numpys = random.getstate(), np.random.get_state()
    kind, indices = _accelerator(model)
    # torch cannot fork the generator of Apple's GPUs.
    forked = [] if kind == "mps" else indices
    try:
        with torch.random.fork_rng(forked, device_type=kind or "cuda"):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def _accelerator(model: nn.Module) -> tuple[str | None, list[int]]:
    """The kind of accelerator that a model is on, None for the CPU alone, and the numbers of those devices."""
    devices = {weight.device for weight in model.parameters() if weight.device.type not in ("cpu", "meta")}
    return next((device.type for device in devices), None), sorted(device.index or 0 for device in devices)


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
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
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
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
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _configs(model: nn.Module) -> list[Any]:
    """The configurations by which the parts of a `transformers` model choose how to compute attention."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values())


class _Done(Exception):
    """Ends a forward pass in which everything has been seen."""


class _OpenAttention(TorchFunctionMode):
    """Under `with`: `see` is told the attention pattern behind every call of `scaled_dot_product_attention`."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            self.see(_pattern_of(*args, **kwargs))
        return function(*args, **kwargs)


def _pattern_of(
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
    """What `scaled_dot_product_attention` attends to, given its arguments."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    return scores.softmax(-1)


def _is_pattern(tensor: Any, batch: int, length: int) -> bool:
    """Whether a module's output is attention: [batch, head, query, key], no entry negative, no row above 1."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
        return False
    if (tensor.shape[0], *tensor.shape[2:]) != (batch, length, length):
        return False
    return bool((tensor.min() >= 0) & (tensor.float().sum(-1).max() < 1.05))


def run(
    decoder: Decoder,
    ids: Int[Tensor, "batch pos"],
    stream: Callable[[int, Tensor], Tensor | None],
    attention: Callable[[int, Tensor], None] | None = None,
    depth: int | None = None,
) -> None:
    """Run token ids through the first `depth` decoder layers (all if not given), and tell what goes by.

    `stream(depth, residual)` gets the residual [batch, pos, d_model] before the first layer as depth 0 and after layer
    l as depth l + 1; what it returns, unless None, takes the residual's place after a layer. `attention(layer,
    pattern)` gets each layer's attention [batch, head, query, key], and is not called for layers without any. Call it
    inside `undisturbed`.

    Raises:
        ModelError: the layers did not run, or queries attend to later keys.
    """
    depth = len(decoder.layers) if depth is None else depth
    running: list[int] = []
    seen: set[int] = set()

    def enter(layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(layer)
        if layer == 0:
            stream(0, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def leave(layer: int, module: Any, args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        changed = stream(layer + 1, output if whole else output[0])
        if layer + 1 == depth:
            raise _Done
        return None if changed is None else changed if whole else (changed, *output[1:])

    def see(layer: int, pattern: Tensor) -> None:
        if attention is None or layer in seen:
            return
        seen.add(layer)
        if bool(pattern[:, :, 0, 1:].any()):
            raise ModelError(
                f"{type(decoder.model).__name__} attends to later positions; expected a causal language model, not an "
                "encoder"
            )
        attention(layer, pattern)

    def look(layer: int, module: Any, args: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) and layer not in seen else ():
            if _is_pattern(part, *ids.shape):
                see(layer, part)

    # Past the last layer nothing is of interest, and its logits could be larger than the model.
    configured = bool(_configs(decoder.model))
    quiet = {"use_cache": False} if configured else {}
    hidden = attention is not None and not configured
    with contextlib.ExitStack() as stack:
        for layer, module in enumerate(decoder.layers[:depth]):
            hooks = [module.register_forward_pre_hook(functools.partial(enter, layer), with_kwargs=True)]
            if attention is not None:
                hooks += [part.register_forward_hook(functools.partial(look, layer)) for part in module.modules()]
            hooks.append(module.register_forward_hook(functools.partial(leave, layer)))
            for hook in hooks:
                stack.callback(hook.remove)
        if hidden:
            stack.enter_context(_OpenAttention(lambda pattern: see(running[-1], pattern) if running else None))
        with contextlib.suppress(_Done):
            decoder.model(ids, **quiet)
            raise ModelError(
                f"{type(decoder.model).__name__} has {len(decoder.layers)} layers and ran {running or 'none'}; "
                "expected each of them once"
            )


@dataclass(frozen=True)
class _Pass:
    """What one pass over the probe rows showed; `attended` are the layers that have attention."""

    attended: list[int]
    scores: Float[Tensor, "batch layer head"]
    control: Float[Tensor, "batch layer head"]
    at_p0: Float[Tensor, "batch depth d_model"]
    ratios: Float[Tensor, "batch depth"]

    def sink_rate(self, from_layer: int = 0) -> float | None:
        below = sum(layer < from_layer for layer in self.attended)
        return None if below == len(self.attended) else float(sink.sink_rate(self.scores, from_layer=below).mean())


def _observe(decoder: Decoder, ids: Int[Tensor, "batch pos"], replaced: tuple[int, Tensor] | None = None) -> _Pass:
    """One pass; `replaced` is a depth and what P0's stream [batch, d_model] becomes there.

    Raises:
        ModelError: no attention was seen.
        FloatingPointError: the stream at P0 is not finite.
    """
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    at_p0: list[Tensor] = []
    ratios: list[Tensor] = []
    # Rows are unpadded: P0 is where they begin.
    p0 = torch.zeros(len(ids), dtype=torch.long, device=ids.device)

    def attention(layer: int, pattern: Tensor) -> None:
        precise = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        places = p0.to(pattern.device), p0.to(pattern.device) + CONTROL
        first, control = (sink.sink_score(precise, place).cpu() for place in places)
        scores[layer] = first, control

    def stream(depth: int, residual: Tensor) -> Tensor | None:
        changed = None
        if replaced is not None and replaced[0] == depth:
            changed = residual.clone()
            changed[:, 0] = replaced[1].to(residual)
            residual = changed
        at_p0.append(residual[:, 0].float().cpu())
        ratios.append(sink.norm_ratio(residual, p0.to(residual.device)).cpu())
        return changed

    run(decoder, ids, stream, attention)
    if not all(bool(vector.isfinite().all()) for vector in at_p0):
        raise FloatingPointError("the residual stream at P0 is not finite: the weights, or what they compute, are not")
    if not scores:
        raise ModelError(
            f"no attention seen in {type(decoder.model).__name__}: expected layers that compute it through a model of "
            "transformers, through torch's scaled_dot_product_attention, or in a module that returns (output, weights)"
        )
    both = zip(*(scores[layer] for layer in sorted(scores)), strict=True)
    first, control = (torch.stack(list(parts), dim=1) for parts in both)
    return _Pass(sorted(scores), first, control, torch.stack(at_p0, dim=1), torch.stack(ratios, dim=1))


def _last_of(decoder: Decoder, ids: Int[Tensor, "batch pos"], depth: int) -> Float[Tensor, "batch d_model"]:
    """The stream at the last position after `depth` layers."""
    found: list[Tensor] = []

    def stream(at: int, residual: Tensor) -> None:
        if at == depth:
            found.append(residual[:, -1].clone())

    run(decoder, ids, stream, depth=depth)
    return found[0]


def measure(model: nn.Module, ids: Int[Tensor, "batch pos"], prefix: Int[Tensor, "batch shift"]) -> Measurement:
    """Measure the P0 sink of a causal language model on unpadded rows of ids, without changing anything about it.

    `prefix` holds the random tokens that stand before each row's first token in the shifted run. The numbers are those
    of `trace.measure_checkpoint` on the same rows, under the same names.

    Raises:
        ModelError: it is not a causal language model whose layers and attention can be seen (`decoder_of`, `run`).
        FloatingPointError: the stream at P0 is not finite.
    """
    decoder = decoder_of(model)
    device = next(decoder.model.parameters()).device
    ids, prefix = ids.to(device), prefix.to(device)
    after = min(EARLY_BLOCKS, len(decoder.layers))

    def rate_behind_others() -> float:
        shifted = _last_of(decoder, torch.cat([prefix, ids[:, :1]], dim=1), after)
        return _observe(decoder, ids, (after, shifted)).sink_rate(EARLY_BLOCKS) or 0.0

    with undisturbed(decoder.model):
        clean = _observe(decoder, ids)
        later = clean.sink_rate(EARLY_BLOCKS)
        causal = lost_share(later or 0.0, rate_behind_others)
    heads = sink_heads(clean.scores[::2])
    layers, numbers = (list(part) for part in zip(*heads, strict=True))
    return Measurement(
        sink_rate=clean.sink_rate() or 0.0,
        sink_rate_from_layer_2=later,
        norm_ratio=float(clean.ratios[:, after].mean()),
        largest_norm_ratio=float(clean.ratios.mean(0).max()),
        direction_consistency=float(sink.direction_cosines(clean.at_p0[:, after]).mean()),
        concentration_observed=observed_concentration(clean.at_p0.norm(dim=-1), after),
        concentration_causal=causal,
        excess=float((clean.scores - clean.control)[1::2, layers, numbers].mean()),
    )
