"""Simulated int8: the inputs of a model's matrix products, and its weights, rounded to 8 bits.

1. *Scale.* Quantisation is symmetric: a value becomes the nearest multiple of `largest / 127`, at most 127 multiples on
   either side of zero. `largest` is the largest magnitude in the prompt ("per-tensor dynamic": every prompt is a batch
   of its own), or a number that was measured before and is the same for all prompts ("static", calibrated), or the
   largest magnitude at each position ("per-token dynamic"). Everything else stays in floating point.
2. *Rounded inputs* are those of the four kinds of matrix products of a block, `INPUTS`. Norms, scores, softmax and the
   residual stream are not rounded, nor is the unembedding. The hidden layers of the experts of a mixture cannot be
   reached.
3. *One position excluded.* It does not count for `largest`, and is then either clipped to `largest` or not rounded.
   (With a scale per token each position has its own scale anyway; "clipped" then limits it to the others' largest.)
4. *Weights.* Every matrix of the blocks is rounded with one scale per output, by torch's own operator, as `torchao`
   does. Biases, norms, routers and embeddings are not rounded.

Outliers of the first token under int8: Yang et al. 2024 (arXiv 2405.14428), Liu et al. 2024 (arXiv 2403.01241); one
scale per token: Yao et al. 2022 (arXiv 2206.01861).
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
"""Number of levels on either side of zero."""
INPUTS = {
    "qkv": "queries, keys, values",
    "out": "attention output",
    "up": "MLP, into hidden",
    "down": "MLP, out of hidden",
}
"""The kinds of inputs, and what the matrices that read them compute."""

Treatment = Literal["in", "clipped", "kept"]
"""Treatment of one position: rounded as all others; clipped to a `largest` that excludes it; or not rounded."""


class Site(NamedTuple):
    """The input of the matrix products of one kind in one block.

    Attributes:
        block: number of the block.
        kind: a key of `INPUTS`.
    """

    block: int
    kind: str


Change = Callable[[Site, Tensor], Tensor | None]
"""Function of a site and its input [batch, pos, ...]; returns the new input, or None for no change."""


# Scales

Ends = float | Float[Tensor, "batch #pos"]
"""The largest magnitude that int8 represents: one for all, or one per prompt or position."""


def rounded(x: Float[Tensor, "batch pos *value"], largest: Ends) -> Float[Tensor, "batch pos *value"]:
    """Round to the nearest int8 level; larger magnitudes are clipped.

    Args:
        x: values.
        largest: the largest magnitude that int8 represents.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    ends = torch.as_tensor(largest, dtype=wide, device=x.device)
    # If `largest` is 0 the step is the smallest number, and everything is clipped to about 0.
    step = (ends / LEVELS).clamp(min=torch.finfo(wide).tiny).view(*ends.shape, *[1] * (x.ndim - ends.ndim))
    return ((x.to(wide) / step).round().clamp(-LEVELS, LEVELS) * step).to(x)


def magnitudes(x: Float[Tensor, "batch pos *value"]) -> Float[Tensor, "batch pos"]:
    """Compute the largest magnitude at every position.

    Args:
        x: values.
    """
    return x.abs().flatten(2).amax(2)


def largest_in_row(
    x: Float[Tensor, "batch pos *value"], counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch 1"]:
    """Compute the largest magnitude of each prompt over some positions; 0 if there are none.

    Args:
        x: values.
        counted: positions that count.
    """
    return magnitudes(x).masked_fill(~counted.to(x.device), 0).amax(1, keepdim=True)


def quantised(
    x: Float[Tensor, "batch pos *value"],
    largest: Ends,
    position: Int[Tensor, " batch"],
    treatment: Treatment = "in",
    per_token: bool = False,
) -> Float[Tensor, "batch pos *value"]:
    """Round an input to int8, with one scale per prompt or one per position.

    Args:
        x: the input.
        largest: the largest magnitude that int8 represents. It must include the position only if `treatment` is "in".
            With `per_token`, only the position is clipped to it.
        position: index of the position that is treated differently.
        treatment: how that position is rounded.
        per_token: whether every position has a scale of its own.
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
    """List the inputs of a model that can be reached, in the order in which a pass computes them.

    Args:
        model: a hooked model.
    """
    sites: dict[Site, None] = {}

    def note(site: Site, x: Tensor) -> None:
        sites[site] = None

    with torch.no_grad(), on_inputs(model, note):
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    return list(sites)


@contextlib.contextmanager
def on_inputs(model: HookedModel, change: Change) -> Iterator[None]:
    """Read or change the inputs of matrix products in all passes inside a `with` block.

    Queries, keys and values may read separate copies of one input; `change` is then called for each copy.

    Args:
        model: a hooked model.
        change: called with every input.
    """
    handles, hooks, rows = [], [], []

    def shaped(site: Site, x: Tensor) -> Tensor | None:
        if x.ndim > 2:
            rows[:] = x.shape[:2]
            return change(site, x)
        # OPT flattens batch and positions for its MLP; the attention before it gives their numbers.
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
# Names of the inputs of attention: that of transformers, and the three of HookedTransformer.
_READ = ("hidden_states", "query_input", "key_input", "value_input")


def _readers(block: object) -> dict[str, nn.Module]:
    """The modules of a block whose inputs have no hook point on both backends."""
    modules = {"qkv": getattr(block, "attn", None), "up": getattr(block, "mlp", None)}
    # A bridged MLP without a name represents two matrices of the block itself, and is never called.
    if getattr(modules["up"], "name", "") is None:
        modules["up"] = getattr(modules["up"], "in", None)
    return {kind: module for kind, module in modules.items() if module is not None}


def _enter(
    change: Change, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def new(x: Tensor) -> Tensor:
        given = change(site, x)
        return x if given is None else given

    if args:
        return (new(args[0]), *args[1:]), kwargs
    return args, kwargs | {name: new(kwargs[name]) for name in _READ if name in kwargs}


def _at_hook(change: Change, site: Site, activation: Tensor, hook: object) -> Tensor | None:
    return change(site, activation)


# Weights


class Rounded(NamedTuple):
    """A weight of a model and its rounded values.

    Attributes:
        weight: the weight.
        int8: its values rounded to int8, in floating point.
    """

    weight: nn.Parameter
    int8: Tensor


def rounded_weights(model: HookedModel) -> list[Rounded]:
    """Round every matrix of the blocks to int8; this takes as much memory again as the matrices.

    Args:
        model: a hooked model.
    """
    rounded, experts = [], describe(model).experts
    # nn.Module's methods, because those of a bridge omit the experts of a mixture.
    for module in (module for block in model.blocks for module in nn.Module.modules(block)):
        for name, weight in nn.Module.named_parameters(module, recurse=False):
            # A matrix with one output per expert is their router.
            router = weight.ndim == 2 and len(weight) == experts
            if not router and (layout := _layout(module, name, weight)):
                given, wanted = layout.split(" -> ")
                sizes = dict(zip(given.split(), weight.shape, strict=True))
                matrix = rearrange(weight.detach(), layout)
                rounded.append(Rounded(weight, rearrange(_int8(matrix), f"{wanted} -> {given}", **sizes)))
    return rounded


@contextlib.contextmanager
def with_weights(weights: list[Rounded]) -> Iterator[None]:
    """Give a model its rounded weights inside a `with` block.

    Args:
        weights: as `rounded_weights` returns them.
    """
    originals = [each.weight.data for each in weights]
    try:
        for each in weights:
            each.weight.data = each.int8
        yield
    finally:
        for each, data in zip(weights, originals, strict=True):
            each.weight.data = data


# The axes of a weight, and of the matrix that is rounded: outputs first, one scale for each.
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
    # The range has 255 steps: 128 below zero and 127 above.
    step = (wide.abs().amax(1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.zeros(len(wide), dtype=torch.int32, device=wide.device)
    return torch.fake_quantize_per_channel_affine(wide, step, zero, 0, -128, 127).to(matrix)
