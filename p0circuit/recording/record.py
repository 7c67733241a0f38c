"""Record activations once, keep only what is asked for, and keep it on disk.

1. A `Quantity` names the hooks it needs at every layer and a function that reduces what they give to a small tensor.
2. `record` runs the prompts through the model in batches; each reduction happens inside the hook, so that of the full
   attention (or any other large activation) never more than one layer exists.
3. Each quantity is cached under the fingerprints of the weights, the token ids, its own definition and the versions of
   the libraries: a second run reads it, changed weights never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from p0circuit import __version__
from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.io import code_fingerprint
from p0circuit.log import progress_bar
from p0circuit.models import describe, device_of, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.recording.cache import Cache, key_of
from p0circuit.recording.cache_reads import note
from p0circuit.recording.fingerprint import has_hooks, weights_fingerprint
from p0circuit.recording.memory import row_memory
from p0circuit.recording.quantities import TOKEN_LOSSES, Batch, Quantity, hook_names, last_layer


@runtime_checkable
class BatchIntervention(Protocol):
    """An intervention as `record` sees it: made for a set of prompts, it has hooks for any batch of its rows."""

    @property
    def prompts(self) -> PromptSet: ...

    def hooks(self, rows: slice) -> list[Hook]: ...


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
    model: HookedModel, layers: int, quantities: Sequence[Quantity], batch: Batch, edits: Sequence[Hook]
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


@overload
def record(
    model: HookedModel,
    prompts: PromptSet,
    what: Quantity,
    batch_size: int | None = None,
    cache: Cache | Literal["default"] | None = "default",
    interventions: Sequence[BatchIntervention] = (),
    condition: str | None = None,
) -> Tensor: ...


@overload
def record(
    model: HookedModel,
    prompts: PromptSet,
    what: Sequence[Quantity],
    batch_size: int | None = None,
    cache: Cache | Literal["default"] | None = "default",
    interventions: Sequence[BatchIntervention] = (),
    condition: str | None = None,
) -> Recording: ...


@torch.no_grad()
def record(
    model: HookedModel,
    prompts: PromptSet,
    what: Quantity | Sequence[Quantity],
    batch_size: int | None = None,
    cache: Cache | Literal["default"] | None = "default",
    interventions: Sequence[BatchIntervention] = (),
    condition: str | None = None,
) -> Tensor | Recording:
    """Run the prompts through the model once and record one quantity (as a tensor) or several (as a `Recording`).

    A model with hooks on it (an intervention is under way) is recorded as it behaves, and the cache is left alone;
    likewise with `interventions`, whose hooks go before those that record. `cache=None` computes without reading or
    writing.

    Raises:
        P0Error: a position lies outside the prompts, the model refuses the ids, or an intervention was made for
            other prompts.
        FloatingPointError: an activation is not a number; the message names the quantity.
    """
    quantities = [what] if isinstance(what, Quantity) else list(what)
    for intervention in interventions:
        if intervention.prompts.fingerprint() != prompts.fingerprint():
            raise P0Error("an intervention was made for other prompts than those to record: make it for these")
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
    cached_names = frozenset(values)
    if store is not None:
        for quantity in quantities:
            name = f"{condition or prompts.fingerprint()[:12]}/{quantity.name}"
            note(name, from_cache=quantity.name in cached_names)
    missing = [quantity for quantity in quantities if quantity.name not in values]
    if missing:
        reading = [quantity for quantity in missing if quantity.scope == "logits"]
        row_by_row = all(quantity is TOKEN_LOSSES for quantity in reading)
        size = batch_size or batch_size_for(model, prompts.length, bool(reading), row_by_row)
        layers, device = describe(model).n_layers, device_of(model)
        parts: dict[str, list[Tensor]] = {quantity.name: [] for quantity in missing}
        for start in progress_bar(range(0, prompts.n, size), "recording"):
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
    recording = Recording(values, cached_names)
    return recording[what] if isinstance(what, Quantity) else recording


def cached(model: HookedModel, prompts: PromptSet, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` makes of the model and the prompts, from the cache where it lies.

    `what` has to name all settings that decide it; other code never reads what this code left. The cache is left alone
    while the model has hooks on it.
    """
    if has_hooks(model):
        return compute()
    parts = {"prompts": prompts.fingerprint(), "quantity": what, "code": code_fingerprint()}
    store, key = Cache(), key_of(_model_key(model) | parts)
    value = store.read(key)
    note(f"{prompts.fingerprint()[:12]}/{what}", from_cache=value is not None)
    if value is None:
        value = compute()
        store.write(key, value, {"quantity": what, "model": describe(model).name, "samples": prompts.n})
    return value.to(device_of(model))


def _model_key(model: HookedModel) -> dict[str, str]:
    """What all quantities recorded from a model have in common."""
    return {
        "weights": weights_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype),
        "libraries": " ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens", "transformers")),
        "p0circuit": __version__,
    }
