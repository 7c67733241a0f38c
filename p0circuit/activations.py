"""Record activations once, keep only what is asked for, and keep it on disk.

1. A `Quantity` names the hooks it needs at every layer and a function that reduces what they give to a small tensor.
2. `record` runs the prompts through the model in batches; each reduction happens inside the hook, so that of the full
   attention (or any other large activation) never more than one layer exists.
3. Each quantity is cached under the fingerprints of the weights, the token ids, its own definition and the versions of
   the libraries: a second run reads it, changed weights never do.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from p0circuit import __version__, sink
from p0circuit.cache import Cache, checksum, key_of
from p0circuit.console import track
from p0circuit.models import describe, device_of, forward
from p0circuit.models.device_map import placement_of, weights_of
from p0circuit.models.forward import Hook, hook_points, layer_of
from p0circuit.paths import code_fingerprint
from p0circuit.prompts import PromptSet
from p0circuit.row_memory import row_memory

_FINGERPRINTS: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()
# Numbers of eight bytes that are summed up to see whether weights have changed.
_STRETCH = 61
# Weights up to this size are hashed whole each time.
_SMALL_BYTES = 2**18
# Fields of a TransformerLens configuration that decide nothing.
_NAMES_AND_PLACES = {"model_name", "tokenizer_name", "device", "n_devices"}
# One layer's scores, mask and pattern exist side by side while it is computed.
ATTENTION_COPIES = 6
# Logits in float32, and what a loss makes of them.
LOGIT_COPIES = 3
BATCH_BYTES = 512 * 2**20
# A processor is two to four times as fast with tensors that stay in its cache; with too few tokens in a batch, reading
# the weights of a large model anew for each would take the longest.
CPU_BATCH_BYTES = 16 * 2**20
CPU_BATCH_TOKENS = 1024


class Batch(NamedTuple):
    """What a reduction may need to know of the rows it is given."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    p0: Int[Tensor, " batch"]


@runtime_checkable
class HooksByRow(Protocol):
    """An intervention as `record` sees it: made for a set of prompts, it has hooks for any batch of its rows."""

    @property
    def prompts(self) -> PromptSet: ...

    def hooks(self, rows: slice) -> list[Hook]: ...


@dataclass(frozen=True)
class Quantity:
    """Something to record: where it is read and how it is reduced.

    Attributes:
        name: unique; part of the cache key, so parameters of the reduction belong into it.
        hooks: names without their layer, as in `attn.hook_pattern`; with the scope "model", whole names.
        reduce: gets one activation per hook and the `Batch`; returns a tensor whose first axis is the batch.
        scope: "layer": once per block; "residual": the stream before every block and after the last, stacked to
            layers + 1; "model": hooks are names of the whole model; "logits": the model's output.
        by_row: whether the value of a row is the same whatever rows are recorded beside it.
    """

    name: str
    hooks: tuple[str, ...]
    reduce: Callable[..., Tensor]
    scope: str = "layer"
    by_row: bool = True

    def fingerprint(self) -> str:
        """A hash of the definition, code included: a changed reduction never reads what the old one left.

        Raises:
            ValueError: `reduce` is no plain function or `functools.partial` of one, or its source is not to be found.
        """
        reduce = self.reduce
        parameters: dict[Any, Any] = {}
        if isinstance(reduce, functools.partial):
            reduce, parameters = reduce.func, dict(enumerate(reduce.args)) | reduce.keywords
        try:
            # Decorators, such as those that check annotations in tests, are no part of the definition.
            reduce = inspect.unwrap(reduce)
            parameters |= inspect.getclosurevars(reduce).nonlocals
            code = _source(reduce) + _METRICS
        except (OSError, TypeError) as error:
            raise ValueError(
                f"the reduction of {self.name!r} cannot be told from another one ({error}): define it as a function in "
                "a file or a notebook, or record with cache=None"
            ) from None
        # Printed, a large tensor is only its corners.
        exact = {name: checksum(value) if isinstance(value, Tensor) else value for name, value in parameters.items()}
        return hashlib.sha256(repr((self.name, self.hooks, self.scope, exact, code)).encode()).hexdigest()


@functools.cache
def _source(function: Callable[..., Tensor]) -> str:
    """The source of a function as it was when first asked for: its file may be edited while it is in use."""
    return inspect.getsource(function)


_METRICS = inspect.getsource(sink)


def _at(offset: int, batch: Batch) -> Int[Tensor, " batch"]:
    """The index of the position `offset` places after P0, checked against the length."""
    position = batch.p0 + offset
    if offset < 0 or int(position.max()) >= batch.ids.shape[1]:
        raise ValueError(
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
    """Next-token loss in nats at [batch, pos - 1]; NaN where the prediction is made at padding."""
    # Row by row: in float32 the logits of a batch may be larger than all else.
    rows = zip(logits[:, :-1], batch.ids[:, 1:], strict=True)
    losses = torch.stack([torch.nn.functional.cross_entropy(row.float(), ids, reduction="none") for row, ids in rows])
    return losses.masked_fill(~batch.mask[:, :-1], torch.nan)


SINK_SCORE = Quantity("sink_score", ("attn.hook_pattern",), _score)
"""[sample, layer, head]: attention to P0, mean over queries."""
NORM_RATIO = Quantity("norm_ratio", ("resid",), _norm_ratio, "residual")
"""[sample, layer + 1]: residual norm at P0 over the median of the others, before each block and at the end."""
RESIDUAL_NORMS = Quantity("residual_norms", ("resid",), _norms, "residual")
"""[sample, layer + 1, pos]"""
ATTENTION_OUT_NORMS = Quantity("attention_out_norms", ("hook_attn_out",), _norms)
"""[sample, layer, pos]"""
MLP_OUT_NORMS = Quantity("mlp_out_norms", ("hook_mlp_out",), _norms)
"""[sample, layer, pos]"""
VALUE_NORM_RATIO = Quantity("value_norm_ratio", ("attn.hook_v",), _value_norm_ratio)
"""[sample, layer, kv_head]: norm of P0's value over the median of the others."""
PATTERNS = Quantity("patterns", ("attn.hook_pattern",), _pattern)
"""[sample, layer, head, query, key]: all of the attention; for a few prompts."""
TOKEN_LOSSES = Quantity("token_losses", (), _token_losses, "logits")
"""[sample, pos - 1]: next-token loss in nats."""


def score_at(offset: int) -> Quantity:
    """[sample, layer, head]: the sink score of the position `offset` places after P0, the control for P0 itself."""
    if offset == 0:
        return SINK_SCORE
    return Quantity(f"score_at_{offset}", ("attn.hook_pattern",), functools.partial(_score, offset=offset))


def residual_at(offset: int = 0) -> Quantity:
    """[sample, layer + 1, d_model]: the residual stream at one position, before each block and at the end."""
    return Quantity(f"residual_at_{offset}", ("resid",), functools.partial(_vector, offset=offset), "residual")


def component_at(component: str, offset: int = 0) -> Quantity:
    """[sample, layer, d_model]: `hook_attn_out` or `hook_mlp_out` at one position."""
    return Quantity(f"{component}_at_{offset}", (component,), functools.partial(_vector, offset=offset))


def embedding_at(offset: int = 0) -> Quantity:
    """[sample, d_model]: what the first block reads at one position (token and, where learned, position embedding)."""
    return Quantity(
        f"embedding_at_{offset}", ("blocks.0.hook_resid_pre",), functools.partial(_vector, offset=offset), "model"
    )


def key_query_cosine_at(model: Any, offset: int = 0) -> Quantity:
    """[sample, layer, head]: cosine between the key of one position and later queries, as they enter the scores."""
    rotated = "rot_" if describe(model).positions == "rotary" else ""
    hooks = (f"attn.hook_{rotated}q", f"attn.hook_{rotated}k")
    return Quantity(f"key_query_cosine_at_{offset}", hooks, functools.partial(_key_query_cosine, offset=offset))


def weights_fingerprint(model: Any) -> str:
    """A hash of every weight and buffer and of the configuration: of all that decides what the model computes.

    It is computed once per model, and again only when a weight or setting has changed (`_weights_glance`). The weights
    of a model with a device map are hashed once and taken to be unchanged: reading them all again takes too long.
    """
    placement = placement_of(model)
    if placement is None:
        glance = _weights_glance(model)
        if (known := _FINGERPRINTS.get(model)) is None or known[0] != glance:
            _FINGERPRINTS[model] = known = (glance, _weights_fingerprint(model))
        return known[1]
    if not placement.fingerprints:
        placement.fingerprints.append(_weights_fingerprint(model))
    return placement.fingerprints[0]


def _settings(model: Any) -> bytes:
    """All that decides what a model computes beside its weights."""
    settings = {name: value for name, value in vars(model.cfg).items() if name not in _NAMES_AND_PLACES}
    return repr((replace(describe(model), name=""), sorted(settings.items()))).encode()


def _weights_glance(model: Any) -> str:
    """A hash of small weights and of sums over short stretches of large ones: ten times as fast as a full hash.

    Weights may be changed in ways that torch's version counters do not see (through `.data`), so all of them are read.
    Stretches are of odd length: where rows or columns of a matrix change places, some stretch gets another sum. Only
    numbers that change places within a stretch, and nothing else anywhere, would go unnoticed.
    """
    digest = hashlib.sha256(_settings(model))
    for name, tensor in weights_of(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.device}".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        summed = len(data) // (8 * _STRETCH) * (8 * _STRETCH)
        if len(data) > _SMALL_BYTES and data.storage_offset() % 8 == 0:
            sums = data[:summed].view(torch.int64).view(-1, _STRETCH).sum(1)
            digest.update(sums.cpu().numpy().tobytes())
            data = data[summed:]
        digest.update(data.cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights_fingerprint(model: Any) -> str:
    digest = hashlib.sha256(_settings(model))
    # One tensor at a time: a weight that waits on disk is read to be hashed.
    sums = {name: checksum(tensor) for name, tensor in weights_of(model)}
    for name in sorted(sums):
        digest.update(f"{name} {sums[name]}".encode())
    return digest.hexdigest()


def has_hooks(model: Any) -> bool:
    """Whether anything is hooked to the model at present, so that what it computes is not what its weights say."""
    # A bridge's own list lacks the points that were mended (bridge.py), and ours those that nobody reads.
    points = [*model.hook_dict.values(), *hook_points(model).by_name.values()]
    return any(point.has_hooks(dir="fwd") for point in points)


def hook_names(quantity: Quantity, layers: int) -> list[tuple[str, ...]]:
    """The full hook names of each place a quantity is read at, in the order they are stacked."""
    if quantity.scope == "residual":
        return [(f"blocks.{layer}.hook_resid_pre",) for layer in range(layers)] + [
            (f"blocks.{layers - 1}.hook_resid_post",)
        ]
    if quantity.scope == "layer":
        return [tuple(f"blocks.{layer}.{hook}" for hook in quantity.hooks) for layer in range(layers)]
    return [quantity.hooks]


def last_layer(quantities: Sequence[Quantity], layers: int) -> int:
    """The last block that has to run for these quantities to be read (logits not among them)."""
    names = [name for quantity in quantities for place in hook_names(quantity, layers) for name in place]
    return max(min(layer_of(name, layers), layers - 1) for name in names)


@dataclass
class _Place:
    """One place a quantity is read at: reduced as soon as the last of its hooks has fired."""

    quantity: Quantity
    names: tuple[str, ...]
    batch: Batch
    waiting: dict[str, Tensor] = field(default_factory=dict)
    reduced: list[Tensor] = field(default_factory=list)

    def hooks(self) -> list[Hook]:
        return [(name, functools.partial(self.keep, name)) for name in self.names]

    def keep(self, name: str, activation: Tensor, hook: Any) -> None:
        self.waiting[name] = activation
        if len(self.waiting) == len(self.names):
            found = [self.waiting.pop(name) for name in self.names]
            self.reduced.append(_reduced(self.quantity, found, self.batch))


def _reduced(quantity: Quantity, activations: Sequence[Tensor], batch: Batch) -> Tensor:
    # Where a model is spread over devices, not every layer is where its ids go in.
    here = Batch(*(part.to(activations[0].device) for part in batch))
    return quantity.reduce(*activations, here).detach().cpu()


def _record_batch(
    model: Any, layers: int, quantities: Sequence[Quantity], batch: Batch, edits: Sequence[Hook]
) -> dict[str, Tensor]:
    """One forward pass, what is recorded being read after all edits."""
    inside = [quantity for quantity in quantities if quantity.scope != "logits"]
    places = {
        quantity.name: [_Place(quantity, names, batch) for names in hook_names(quantity, layers)] for quantity in inside
    }
    hooks = [*edits, *(hook for group in places.values() for place in group for hook in place.hooks())]
    # Nothing above the last place that is read, unless logits are wanted.
    stop = last_layer(quantities, layers) + 1 if len(inside) == len(quantities) else None
    output = forward(model, batch.ids, batch.mask, hooks=hooks, stop_at_layer=stop)
    values = {}
    for quantity in quantities:
        if quantity.scope == "logits":
            values[quantity.name] = _reduced(quantity, [output], batch)
        elif quantity.scope == "model":
            values[quantity.name] = places[quantity.name][0].reduced[-1]
        else:
            values[quantity.name] = torch.stack([place.reduced[-1] for place in places[quantity.name]], dim=1)
    return values


def batch_size_for(model: Any, length: int, with_logits: bool, row_by_row: bool = False) -> int:
    """How many rows go through the model at once: what fits into half a gigabyte, and less on a CPU; at least one.

    Logits are counted with their copies, unless whoever reads them does so `row_by_row`. With a device map it is half
    of what the map keeps free: every batch brings all weights that wait.
    """
    info, placement = describe(model), placement_of(model)
    logit_bytes = model.cfg.dtype.itemsize if row_by_row else 4 * LOGIT_COPIES
    row = info.heads, length, info.vocab_size if with_logits else 0, logit_bytes
    if placement is not None:
        return rows_that_fit(placement.plan.activations // 2, *row)
    most = rows_that_fit(BATCH_BYTES, *row)
    if device_of(model).type == "cpu":
        most = min(most, max(rows_that_fit(CPU_BATCH_BYTES, *row), -(-CPU_BATCH_TOKENS // length)))
    return most


def rows_that_fit(room: int, heads: int, length: int, vocab_size: int, logit_bytes: int) -> int:
    """How many rows of attention, and of logits unless `vocab_size` is 0, fit into `room` bytes; at least one."""
    return max(1, room // row_bytes(heads, length, vocab_size, logit_bytes))


def row_bytes(heads: int, length: int, vocab_size: int, logit_bytes: int) -> int:
    """What one row takes: attention, of which several copies exist while it is computed, and logits."""
    return 4 * ATTENTION_COPIES * heads * length**2 + logit_bytes * length * vocab_size


@dataclass(frozen=True)
class Recording:
    """What was recorded, by quantity; the first axis is always the sample.

    Attributes:
        values: tensor by name of its quantity.
        cached: names of those that were read from the cache.
    """

    values: dict[str, Tensor]
    cached: frozenset[str]

    def __getitem__(self, quantity: Quantity) -> Tensor:
        return self.values[quantity.name]


@torch.no_grad()
def record(
    model: Any,
    prompts: PromptSet,
    what: Quantity | Sequence[Quantity],
    batch_size: int | None = None,
    cache: Cache | Literal["default"] | None = "default",
    interventions: Sequence[HooksByRow] = (),
) -> Recording:
    """Run the prompts through the model once and keep the quantities asked for.

    A model with hooks on it (an intervention is under way) is recorded as it behaves, and the cache is left alone;
    likewise with `interventions`, whose hooks go before those that record. `cache=None` computes without reading or
    writing.

    Raises:
        ValueError: a position lies outside the prompts, the model refuses the ids, or an intervention was made for
            other prompts.
        FloatingPointError: an activation is not a number; the message names the quantity.
    """
    quantities = [what] if isinstance(what, Quantity) else list(what)
    for intervention in interventions:
        if intervention.prompts.fingerprint() != prompts.fingerprint():
            raise ValueError("an intervention was made for other prompts than those to record: make it for these")
    store = (Cache() if cache == "default" else cache) if not (interventions or has_hooks(model)) else None
    memory = row_memory() if store is not None else None
    keys: dict[str, str] = {}
    row_keys: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    rows = prompts.row_fingerprints() if memory is not None else []
    if store is not None:
        model_key = _model_key(model)
        for quantity in quantities:
            name, of_quantity = quantity.name, model_key | {"quantity": quantity.fingerprint()}
            keys[name] = key_of(of_quantity | {"prompts": prompts.fingerprint()})
            if memory is not None and quantity.by_row:
                row_keys[name] = key_of(of_quantity)
                if (value := memory.read(row_keys[name], rows)) is not None:
                    values[name] = value
                    continue
            if (value := store.read(keys[name])) is not None:
                values[name] = value
                if memory is not None and quantity.by_row:
                    memory.write(row_keys[name], rows, value)
    cached = frozenset(values)
    missing = [quantity for quantity in quantities if quantity.name not in values]
    if missing:
        reading = [quantity for quantity in missing if quantity.scope == "logits"]
        row_by_row = all(quantity is TOKEN_LOSSES for quantity in reading)
        size = batch_size or batch_size_for(model, prompts.length, bool(reading), row_by_row)
        layers, device = describe(model).layers, device_of(model)
        parts: dict[str, list[Tensor]] = {quantity.name: [] for quantity in missing}
        for start in track(range(0, prompts.n, size), "recording"):
            part = slice(start, start + size)
            batch = Batch(*(whole[part].to(device) for whole in (prompts.ids, prompts.attention_mask, prompts.p0)))
            edits = [hook for intervention in interventions for hook in intervention.hooks(part)]
            for name, value in _record_batch(model, layers, missing, batch, edits).items():
                parts[name].append(value)
        for quantity in missing:
            value = torch.cat(parts[quantity.name])
            # Losses are NaN by definition where the prediction is made at padding.
            real = value[prompts.attention_mask[:, :-1]] if quantity is TOKEN_LOSSES else value
            if not torch.isfinite(real).all():
                raise FloatingPointError(f"{quantity.name} holds values that are not finite: check weights and dtype")
            values[quantity.name] = value
            if store is not None:
                about = {"quantity": quantity.name, "model": describe(model).name, "samples": prompts.n}
                store.write(keys[quantity.name], value, about)
            if quantity.name in row_keys and memory is not None:
                memory.write(row_keys[quantity.name], rows, value)
    return Recording(values, cached)


def kept(model: Any, prompts: PromptSet, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` makes of the model and the prompts, from the cache where it lies.

    `what` has to name all settings that decide it; other code never reads what this code left. The cache is left alone
    while the model has hooks on it.
    """
    if has_hooks(model):
        return compute()
    parts = {"prompts": prompts.fingerprint(), "quantity": what, "code": code_fingerprint()}
    store, key = Cache(), key_of(_model_key(model) | parts)
    if (value := store.read(key)) is None:
        value = compute()
        store.write(key, value, {"quantity": what, "model": describe(model).name, "samples": prompts.n})
    return value.to(device_of(model))


def _model_key(model: Any) -> dict[str, str]:
    """What all quantities recorded from a model have in common."""
    return {
        "weights": weights_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype),
        "libraries": " ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens", "transformers")),
        "p0circuit": __version__,
    }
