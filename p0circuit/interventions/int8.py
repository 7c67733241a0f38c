"""Int8, simulated: the inputs of a model's matrix products, and its weights, rounded to 8 bits.

1. *The grid* is symmetric: a value becomes the nearest multiple of `largest / 127`, up to 127 of them on either side.
   `largest` is the largest magnitude of the row at hand ("per tensor": every row is a batch of its own), or a number
   that was known before and is the same for all rows ("calibrated"), or the largest magnitude at the position itself
   ("per token"). All else stays in floating point, as in simulated quantisation everywhere.
2. *What is rounded*: the inputs of the four kinds of matrix products of a block, `INPUTS`. Norms, scores, softmax and
   the stream are not, nor is the unembedding; the hidden layers of the experts of a mixture are out of reach.
3. *One position apart*: it does not count for `largest`, and is then either clipped to it or kept as it was. (With a
   grid per token it has its own anyway; clipped, that grid ends where those of the others do at the latest.)
4. *Weights*: every matrix of the blocks, a grid for each of its outputs, by torch's own operator. That of `torchao` is
   the same grid. Biases, norms, routers and embeddings stay.

Where the outliers of the first token meet int8: Yang et al. 2024 (arXiv 2405.14428), Liu et al. 2024 (arXiv
2403.01241); a grid per token: Yao et al. 2022 (arXiv 2206.01861).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from p0circuit.hooked_model import HookedModel
from p0circuit.models.forward import forward
from p0circuit.models.hooks import hook_points, hooked
from p0circuit.models.info import describe

LEVELS = 127
"""Steps of the grid on either side of zero."""
INPUTS = {
    "qkv": "queries, keys, values",
    "out": "attention output",
    "up": "MLP, into hidden",
    "down": "MLP, out of hidden",
}
"""The kinds of inputs, by name: what the matrices that read them make."""

Treatment = Literal["in", "clipped", "kept"]
"""Of one position: like all others; clipped to a `largest` that it was left out of; not rounded at all."""


class Site(NamedTuple):
    """The input of the matrix products of one kind in one block."""

    block: int
    kind: str


Change = Callable[[Site, Tensor], Tensor | None]
"""Gets where it is and an input [batch, pos, ...]; returns what takes its place, None for no change."""


# The grid

Ends = float | Float[Tensor, "batch #pos"]
"""Where grids end: for all rows and positions, or for each of them."""


def rounded(x: Float[Tensor, "batch pos *value"], largest: Ends) -> Float[Tensor, "batch pos *value"]:
    """The nearest values of the grid that ends at `largest`; what lies beyond it becomes its end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ends = torch.as_tensor(largest, dtype=wide, device=x.device)
    # A grid of zeros has no step; anything over the smallest number is clipped to nothing there.
    step = (ends / LEVELS).clamp(min=torch.finfo(wide).tiny).view(*ends.shape, *[1] * (x.ndim - ends.ndim))
    return ((x.to(wide) / step).round().clamp(-LEVELS, LEVELS) * step).to(x)


def magnitudes(x: Float[Tensor, "batch pos *value"]) -> Float[Tensor, "batch pos"]:
    """The largest magnitude at every position."""
    return x.abs().flatten(2).amax(2)


def largest_in_row(
    x: Float[Tensor, "batch pos *value"], counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch 1"]:
    """The largest magnitude of each row at the positions that count, where a grid of its own ends; 0 if none does."""
    return magnitudes(x).masked_fill(~counted.to(x.device), 0).amax(1, keepdim=True)


def quantised(
    x: Float[Tensor, "batch pos *value"],
    largest: Ends,
    position: Int[Tensor, " batch"],
    treatment: Treatment = "in",
    per_token: bool = False,
) -> Float[Tensor, "batch pos *value"]:
    """An input in int8, on a grid that ends at `largest` or (per token) at each position's own largest value.

    One position of each row is treated as told. `largest` is to count it only where it is "in"; per token it is what
    the position is clipped to.
    """
    apart = one_hot(position, x.shape[1]).bool().to(x.device)
    if not per_token:
        new = rounded(x, largest)
    else:
        own = magnitudes(x)
        new = rounded(x, torch.where(apart, own.clamp(max=largest), own) if treatment == "clipped" else own)
    return torch.where(apart.view(*apart.shape, *[1] * (x.ndim - 2)), x, new) if treatment == "kept" else new


# Inputs


def input_sites(model: HookedModel) -> list[Site]:
    """The inputs of this model that can be reached, in the order in which a pass computes them."""
    found: dict[Site, None] = {}

    def note(site: Site, x: Tensor) -> None:
        found[site] = None

    with torch.no_grad(), on_inputs(model, note):
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    return list(found)


@contextlib.contextmanager
def on_inputs(model: HookedModel, change: Change) -> Iterator[None]:
    """Read or change the inputs of matrix products in the passes inside the `with`.

    Queries, keys and values may read separate copies of one input; `change` then gets each of them.
    """
    handles, hooks, rows = [], [], []

    def shaped(site: Site, x: Tensor) -> Tensor | None:
        if x.ndim > 2:
            rows[:] = x.shape[:2]
            return change(site, x)
        # OPT lays its rows end to end for the MLP, which comes after an attention that does not.
        new = change(site, x.view(*rows, -1))
        return None if new is None else new.view_as(x)

    for number, block in enumerate(model.blocks):
        for kind, reader in _readers(block).items():
            enter = functools.partial(_enter, shaped, Site(number, kind))
            handles.append(reader.register_forward_pre_hook(enter, with_kwargs=True))
        for kind, hook in _HOOKS.items():
            if (name := f"blocks.{number}.{hook}") in hook_points(model).by_name:
                hooks.append((name, functools.partial(_at_hook, shaped, Site(number, kind))))
    try:
        with hooked(model, hooks):
            yield
    finally:
        for handle in handles:
            handle.remove()


_HOOKS = {"out": "attn.hook_z", "down": "mlp.hook_post"}
# What attention calls what it reads: transformers' name, and HookedTransformer's three.
_READ = ("hidden_states", "query_input", "key_input", "value_input")


def _readers(block: Any) -> dict[str, nn.Module]:
    """The modules of a block whose inputs no hook point shows on both backends."""
    found = {"qkv": getattr(block, "attn", None), "up": getattr(block, "mlp", None)}
    # A bridged MLP without a name stands for two matrices of the block itself, and is never called.
    if getattr(found["up"], "name", "") is None:
        found["up"] = getattr(found["up"], "in", None)
    return {kind: module for kind, module in found.items() if module is not None}


def _enter(
    change: Change, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def new(x: Tensor) -> Tensor:
        given = change(site, x)
        return x if given is None else given

    if args:
        return (new(args[0]), *args[1:]), kwargs
    return args, kwargs | {name: new(kwargs[name]) for name in _READ if name in kwargs}


def _at_hook(change: Change, site: Site, activation: Tensor, hook: Any) -> Tensor | None:
    return change(site, activation)


# Weights


class Rounded(NamedTuple):
    """A weight of a model, and what int8 makes of it."""

    weight: nn.Parameter
    int8: Tensor


def rounded_weights(model: HookedModel) -> list[Rounded]:
    """Every matrix of the blocks and its int8 image, back in floating point; as much memory again as they take."""
    found, experts = [], describe(model).experts
    # Past a bridge's own list, which leaves out the experts of a mixture.
    for module in (module for block in model.blocks for module in nn.Module.modules(block)):
        for name, weight in nn.Module.named_parameters(module, recurse=False):
            # What has an output for each expert is their router.
            router = weight.ndim == 2 and len(weight) == experts
            if not router and (layout := _layout(module, name, weight)):
                given, wanted = layout.split(" -> ")
                sizes = dict(zip(given.split(), weight.shape, strict=True))
                matrix = rearrange(weight.detach(), layout)
                found.append(Rounded(weight, rearrange(_int8(matrix), f"{wanted} -> {given}", **sizes)))
    return found


@contextlib.contextmanager
def with_weights(weights: list[Rounded]) -> Iterator[None]:
    """The model with its weights rounded inside the `with`."""
    kept = [each.weight.data for each in weights]
    try:
        for each in weights:
            each.weight.data = each.int8
        yield
    finally:
        for each, data in zip(weights, kept, strict=True):
            each.weight.data = data


# How a matrix lies, and how it has to lie: outputs first, a grid for each.
_LAYOUTS = {
    **dict.fromkeys(("W_Q", "W_K", "W_V"), "head d e -> (head e) d"),
    "W_O": "head e d -> d (head e)",
    **dict.fromkeys(("W_in", "W_gate", "W_out"), "i o -> o i"),
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj", "down_proj"), "expert o i -> (expert o) i"),
}


def _layout(module: nn.Module, name: str, weight: Tensor) -> str | None:
    from transformers.pytorch_utils import Conv1D

    if weight.ndim == 2 and isinstance(module, nn.Linear | Conv1D):
        return "o i -> o i" if isinstance(module, nn.Linear) else "i o -> o i"
    layout = _LAYOUTS.get(name.lstrip("_"))
    return layout if layout and len(layout.split(" -> ")[0].split()) == weight.ndim else None


def _int8(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
    wide = matrix.float()
    # 255 steps for the whole range: 128 below zero and 127 above.
    step = (wide.abs().amax(1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.zeros(len(wide), dtype=torch.int32, device=wide.device)
    return torch.fake_quantize_per_channel_affine(wide, step, zero, 0, -128, 127).to(matrix)
