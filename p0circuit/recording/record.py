"""Record activations once, reduce them at once, and cache the result on disk.

1. A `Quantity` names the hooks it needs at every layer, and a function that reduces their activations to a small one.
2. `record` runs the prompts through the model in batches. Each reduction happens inside the hook, so that the full
   attention (or another large activation) of only one layer exists at a time.
3. The cache key of a quantity is made of the fingerprints of the weights, the prompts and its own definition, and the
   versions of the libraries: a second run reads it from the cache, and a changed model is recorded again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from p0circuit import __version__
from p0circuit.errors import NotFiniteError, P0Error
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
    """An intervention as `record` needs it: made for a set of prompts, with hooks for any batch of them."""

    @property
    def prompts(self) -> PromptSet:
        """The prompts that the intervention was made for."""
        ...

    def hooks(self, rows: slice) -> list[Hook]:
        """Return the hooks for a batch.

        Args:
            rows: which of the prompts are in the batch.
        """
        ...


@dataclass
class _Reader:
    """Reads a quantity in one layer, and reduces it as soon as the last of its hooks has fired."""

    quantity: Quantity
    names: tuple[str, ...]
    batch: Batch
    activations: dict[str, Tensor] = field(default_factory=dict)
    reduced: list[Tensor] = field(default_factory=list)

    def hooks(self) -> list[Hook]:
        return [(name, functools.partial(self.read, name)) for name in self.names]

    def read(self, name: str, activation: Tensor, hook: object) -> None:
        self.activations[name] = activation
        if len(self.activations) == len(self.names):
            inputs = [self.activations.pop(name) for name in self.names]
            self.reduced.append(_reduced(self.quantity, inputs, self.batch))


def _reduced(quantity: Quantity, activations: Sequence[Tensor], batch: Batch) -> Tensor:
    # With a device map, a layer may be on another device than the token ids.
    here = Batch(*(part.to(activations[0].device) for part in batch))
    return quantity.reduce(*activations, here).detach().cpu()


def _record_batch(
    model: HookedModel, layers: int, quantities: Sequence[Quantity], batch: Batch, edits: Sequence[Hook]
) -> dict[str, Tensor]:
    """One forward pass; quantities are read after all edits."""
    inside = [quantity for quantity in quantities if quantity.scope != "logits"]
    readers = {
        quantity.name: [_Reader(quantity, names, batch) for names in hook_names(quantity, layers)]
        for quantity in inside
    }
    hooks = [*edits, *(hook for group in readers.values() for reader in group for hook in reader.hooks())]
    # Blocks above the last hook that is read do not run, unless logits are recorded.
    stop = last_layer(quantities, layers) + 1 if len(inside) == len(quantities) else None
    output = forward(model, batch.ids, batch.mask, hooks=hooks, stop_at_layer=stop)
    values = {}
    for quantity in quantities:
        if quantity.scope == "logits":
            values[quantity.name] = _reduced(quantity, [output], batch)
        elif quantity.scope == "model":
            values[quantity.name] = readers[quantity.name][0].reduced[-1]
        else:
            values[quantity.name] = torch.stack([reader.reduced[-1] for reader in readers[quantity.name]], dim=1)
    return values


@dataclass(frozen=True)
class Recording:
    """Recorded quantities. The first axis of each is the sample.

    Attributes:
        values: tensors by the name of their quantity.
        cached: names of the quantities that were read from the cache.

    Example:
        recording = record(model, prompts, [SINK_SCORE, NORM_RATIO])
        recording[SINK_SCORE]  # [sample, layer, head]
    """

    values: dict[str, Tensor]
    cached: frozenset[str]

    def __getitem__(self, quantity: Quantity) -> Tensor:
        """Return the tensor of a quantity."""
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
    """Run the prompts through the model once and record one quantity or several.

    The cache is neither read nor written if the model has hooks (inside `with ablate(...)`), or with `interventions`.

    Args:
        model: a hooked model.
        prompts: the prompts.
        what: a quantity, or several that are recorded in the same pass.
        batch_size: number of prompts that run at once; chosen by memory if None.
        cache: "default" for the cache directory, another `Cache`, or None to compute without one.
        interventions: interventions made for these prompts. Their hooks run before those that record.
        condition: name of the prompts in the provenance of a result (`note_cache_reads`).

    Returns:
        The tensor of one quantity, or a `Recording` of several.

    Raises:
        P0Error: a position lies outside the prompts, a token id outside the vocabulary, or an intervention was made for
            other prompts.
        NotFiniteError: an activation is not a number; the message names the quantity.

    Example:
        scores = p0circuit.record(model, prompts, p0circuit.SINK_SCORE)  # [sample, layer, head]
        with p0circuit.ablate(model, prompts, ["mlp.0"]):
            ablated = p0circuit.record(model, prompts, p0circuit.SINK_SCORE)
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
            batch = Batch(*(each[part].to(device) for each in (prompts.ids, prompts.attention_mask, prompts.p0)))
            edits = [hook for intervention in interventions for hook in intervention.hooks(part)]
            for name, value in _record_batch(model, layers, missing, batch, edits).items():
                parts[name].append(value)
        for quantity in missing:
            value = torch.cat(parts[quantity.name])
            # Where the prediction is made at padding, losses are NaN by definition.
            real = value[prompts.attention_mask[:, :-1]] if quantity is TOKEN_LOSSES else value
            if not torch.isfinite(real).all():
                raise NotFiniteError(f"{quantity.name} holds values that are not finite: check weights and dtype")
            values[quantity.name] = value
            if store is not None:
                about = {"quantity": quantity.name, "model": describe(model).name, "samples": prompts.n}
                store.write(keys[quantity.name], value, about)
            if quantity.name in row_keys and memory is not None:
                memory.write(row_keys[quantity.name], rows, value)
    recording = Recording(values, cached_names)
    return recording[what] if isinstance(what, Quantity) else recording


def cached(model: HookedModel, prompts: PromptSet, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """Compute a tensor from the model and the prompts, or read it from the cache.

    The cache is neither read nor written while the model has hooks. Other versions of the package's code do not share
    cached values.

    Args:
        model: a hooked model.
        prompts: the prompts.
        what: name of the tensor; it must contain all settings that decide the value.
        compute: computes the tensor.

    Returns:
        The tensor, on the model's device.
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
    """The part of the cache key that all quantities of a model share."""
    return {
        "weights": weights_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype),
        "libraries": " ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens", "transformers")),
        "p0circuit": __version__,
    }
