"""Quantities: what to record of a forward pass, at which hooks, and how it is reduced.

A `Quantity` names the hooks it needs at every layer and a function that reduces their activations to a small tensor.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from p0circuit import sink
from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.models.hook_names import layer_of
from p0circuit.recording.cache import checksum


class Batch(NamedTuple):
    """The prompts of a batch, as a reduction receives them.

    Attributes:
        ids: token ids.
        mask: whether each token is real.
        p0: index of P0 in each prompt.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    p0: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Quantity:
    """Something to record: the hooks it is read at, and the function that reduces their activations.

    Attributes:
        name: unique name; part of the cache key, so it must contain the parameters of the reduction.
        hooks: hook names without their layer, as in `attn.hook_pattern`; full names if the scope is "model".
        reduce: function of one activation per hook and the `Batch`, giving a tensor whose first axis is the batch.
        scope: "layer": read in every block; "residual": the residual stream before every block and after the last
            one, stacked to n_layers + 1; "model": read once; "logits": the output of the model.
        by_row: whether the value of a prompt is independent of the other prompts of its batch.

    Example:
        def mean_norm(activation, batch):
            return activation.norm(dim=-1).mean(1)

        record(model, prompts, Quantity("mean_mlp_norm", ("hook_mlp_out",), mean_norm))  # [sample, layer]
    """

    name: str
    hooks: tuple[str, ...]
    reduce: Callable[..., Tensor]
    scope: str = "layer"
    by_row: bool = True

    def fingerprint(self) -> str:
        """Hash the definition, code included, so that values of a changed reduction are never read from the cache.

        Raises:
            P0Error: `reduce` is no plain function or `functools.partial` of one, or its source cannot be found.
        """
        reduce = self.reduce
        parameters: dict[Any, Any] = {}
        if isinstance(reduce, functools.partial):
            reduce, parameters = reduce.func, dict(enumerate(reduce.args)) | reduce.keywords
        try:
            # Decorators, such as the checks of annotations in tests, are not part of the definition.
            reduce = inspect.unwrap(reduce)
            parameters |= inspect.getclosurevars(reduce).nonlocals
            code = _source(reduce) + _METRICS
        except (OSError, TypeError) as error:
            raise P0Error(
                f"the reduction of {self.name!r} cannot be told from another one ({error}): define it as a function in "
                "a file or a notebook, or record with cache=None"
            ) from None
        # The repr of a large tensor shows only its corners.
        exact = {name: checksum(value) if isinstance(value, Tensor) else value for name, value in parameters.items()}
        return hashlib.sha256(repr((self.name, self.hooks, self.scope, exact, code)).encode()).hexdigest()


@functools.cache
def _source(function: Callable[..., Tensor]) -> str:
    """The source of a function, read once: its file may be edited while the process runs."""
    return inspect.getsource(function)


_METRICS = inspect.getsource(sink)


def _at(offset: int, batch: Batch) -> Int[Tensor, " batch"]:
    """The index of the position `offset` tokens after P0, checked against the length."""
    position = batch.p0 + offset
    if offset < 0 or int(position.max()) >= batch.ids.shape[1]:
        raise P0Error(
            f"position {offset} lies outside the prompts: expected 0 to {batch.ids.shape[1] - 1 - int(batch.p0.max())}"
        )
    return position


def _score(pattern: Tensor, batch: Batch, offset: int = 0) -> Tensor:
    position = _at(offset, batch)
    attention = sink.attention_to(pattern, position)
    # Half precision is too coarse for a mean over many queries.
    precise = torch.promote_types(attention.dtype, torch.float32)
    return sink.mean_over_queries(attention.to(precise), position, batch.mask)


def _pattern(pattern: Tensor, batch: Batch) -> Tensor:
    return pattern


def _norms(activation: Tensor, batch: Batch) -> Tensor:
    return activation.float().norm(dim=-1)


def _vector(activation: Tensor, batch: Batch, offset: int = 0) -> Tensor:
    return activation[torch.arange(len(activation), device=activation.device), _at(offset, batch)]


def _norm_ratio(residual: Tensor, batch: Batch) -> Tensor:
    return sink.norm_ratio(residual, batch.p0, batch.mask)


def _value_norm_ratio(values: Tensor, batch: Batch) -> Tensor:
    return sink.value_norm_ratio(values, batch.p0, batch.mask)


def _key_query_cosine(queries: Tensor, keys: Tensor, batch: Batch, offset: int = 0) -> Tensor:
    return sink.key_query_cosine(queries, keys, _at(offset, batch), batch.mask)


def _token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Next-token loss in nats [batch, pos - 1]; NaN where the prediction is made at padding."""
    # One prompt at a time: the logits of a batch in float32 may be larger than all other tensors.
    rows = zip(logits[:, :-1], batch.ids[:, 1:], strict=True)
    losses = torch.stack([torch.nn.functional.cross_entropy(row.float(), ids, reduction="none") for row, ids in rows])
    return losses.masked_fill(~batch.mask[:, :-1], torch.nan)


SINK_SCORE = Quantity("sink_score", ("attn.hook_pattern",), _score)
"""[sample, layer, head]: sink score, the attention to P0 averaged over queries."""
NORM_RATIO = Quantity("norm_ratio", ("resid",), _norm_ratio, "residual")
"""[sample, layer + 1]: norm of the residual stream at P0 over the median of the others, before each block and at the
end."""
RESIDUAL_NORMS = Quantity("residual_norms", ("resid",), _norms, "residual")
"""[sample, layer + 1, pos]: norm of the residual stream, before each block and at the end."""
ATTENTION_OUT_NORMS = Quantity("attention_out_norms", ("hook_attn_out",), _norms)
"""[sample, layer, pos]: norm of the output of attention."""
MLP_OUT_NORMS = Quantity("mlp_out_norms", ("hook_mlp_out",), _norms)
"""[sample, layer, pos]: norm of the output of the MLP."""
VALUE_NORM_RATIO = Quantity("value_norm_ratio", ("attn.hook_v",), _value_norm_ratio)
"""[sample, layer, kv_head]: norm of P0's value vector over the median of the others."""
PATTERNS = Quantity("patterns", ("attn.hook_pattern",), _pattern)
"""[sample, layer, head, query, key]: all attention weights; large, so for a small number of prompts."""
TOKEN_LOSSES = Quantity("token_losses", (), _token_losses, "logits")
"""[sample, pos - 1]: next-token loss in nats."""


def score_at(offset: int) -> Quantity:
    """Return the sink score of another position, the control of P0's [sample, layer, head].

    Args:
        offset: tokens after P0; 0 gives `SINK_SCORE`.
    """
    if offset == 0:
        return SINK_SCORE
    return Quantity(f"score_at_{offset}", ("attn.hook_pattern",), functools.partial(_score, offset=offset))


def residual_at(offset: int = 0) -> Quantity:
    """Return the residual stream at one position, before each block and at the end [sample, layer + 1, d_model].

    Args:
        offset: tokens after P0.
    """
    return Quantity(f"residual_at_{offset}", ("resid",), functools.partial(_vector, offset=offset), "residual")


def component_at(component: str, offset: int = 0) -> Quantity:
    """Return the output of a component at one position [sample, layer, d_model].

    Args:
        component: `hook_attn_out` or `hook_mlp_out`.
        offset: tokens after P0.
    """
    return Quantity(f"{component}_at_{offset}", (component,), functools.partial(_vector, offset=offset))


def embedding_at(offset: int = 0) -> Quantity:
    """Return the input of the first block at one position [sample, d_model].

    This is the token embedding, plus the position embedding if that is learned.

    Args:
        offset: tokens after P0.
    """
    return Quantity(
        f"embedding_at_{offset}", ("blocks.0.hook_resid_pre",), functools.partial(_vector, offset=offset), "model"
    )


def key_query_cosine_at(model: HookedModel, offset: int = 0) -> Quantity:
    """Return the mean cosine between the key of one position and later queries [sample, layer, head].

    Args:
        model: the model, whose kind of positions decides which hooks are read.
        offset: tokens after P0.
    """
    rotated = "rot_" if describe(model).positions == "rotary" else ""
    hooks = (f"attn.hook_{rotated}q", f"attn.hook_{rotated}k")
    return Quantity(f"key_query_cosine_at_{offset}", hooks, functools.partial(_key_query_cosine, offset=offset))


def hook_names(quantity: Quantity, layers: int) -> list[tuple[str, ...]]:
    """List the full hook names of a quantity for every layer, in the order in which the values are stacked.

    Args:
        quantity: the quantity.
        layers: number of blocks of the model.

    Returns:
        One tuple of hook names per layer (or one in all, for the scopes "model" and "logits").
    """
    if quantity.scope == "residual":
        return [(f"blocks.{layer}.hook_resid_pre",) for layer in range(layers)] + [
            (f"blocks.{layers - 1}.hook_resid_post",)
        ]
    if quantity.scope == "layer":
        return [tuple(f"blocks.{layer}.{hook}" for hook in quantity.hooks) for layer in range(layers)]
    return [quantity.hooks]


def last_layer(quantities: Sequence[Quantity], layers: int) -> int:
    """Return the last block that has to run to record some quantities, logits excluded.

    Args:
        quantities: the quantities.
        layers: number of blocks of the model.
    """
    names = [name for quantity in quantities for group in hook_names(quantity, layers) for name in group]
    return max(min(layer_of(name, layers), layers - 1) for name in names)
