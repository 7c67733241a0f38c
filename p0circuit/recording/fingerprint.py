"""Fingerprint of a model: a hash of weights, buffers and configuration, which decide what it computes."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import replace
from typing import Any

import torch

from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.models.device_map import placement_of
from p0circuit.models.hooks import hook_points
from p0circuit.models.offload import weights_of
from p0circuit.recording.cache import checksum

_FINGERPRINTS: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()
# Weights are summed in groups of this many numbers of eight bytes, to detect changes.
_GROUP = 61
# Weights up to this size are hashed completely each time.
_SMALL_BYTES = 2**18
# Fields of a TransformerLens configuration that do not change what the model computes.
_NAMES_AND_DEVICES = {"model_name", "tokenizer_name", "device", "n_devices"}


def weights_fingerprint(model: HookedModel) -> str:
    """Hash every weight and buffer and the configuration: everything that decides what the model computes.

    The hash is computed once per model, and again only after a weight or setting has changed (`_quick_hash`). A model
    with a device map is hashed only once and assumed not to change, because reading all its weights is slow.

    Args:
        model: a hooked model.
    """
    quick_hash = "" if placement_of(model) is not None else _quick_hash(model)
    if (known := _FINGERPRINTS.get(model)) is None or known[0] != quick_hash:
        _FINGERPRINTS[model] = known = (quick_hash, _weights_fingerprint(model))
    return known[1]


def _settings(model: HookedModel) -> bytes:
    """Everything apart from weights that decides what a model computes."""
    settings = {name: value for name, value in vars(model.cfg).items() if name not in _NAMES_AND_DEVICES}
    return repr((replace(describe(model), name=""), sorted(settings.items()))).encode()


def _quick_hash(model: HookedModel) -> str:
    """A hash of small weights and of sums over short groups of large ones: ten times as fast as a full hash.

    Weights may be changed in ways that torch's version counters do not see (through `.data`), so all of them are read.
    The size of a group is odd, so that exchanging rows or columns of a matrix changes some sum. The only change that is
    not detected is an exchange of numbers within one group.
    """
    digest = hashlib.sha256(_settings(model))
    for name, tensor in weights_of(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.device}".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        summed = len(data) // (8 * _GROUP) * (8 * _GROUP)
        if len(data) > _SMALL_BYTES and data.storage_offset() % 8 == 0:
            sums = data[:summed].view(torch.int64).view(-1, _GROUP).sum(1)
            digest.update(sums.cpu().numpy().tobytes())
            data = data[summed:]
        digest.update(data.cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights_fingerprint(model: HookedModel) -> str:
    digest = hashlib.sha256(_settings(model))
    # One tensor at a time, because weights that are offloaded to disk are read for it.
    sums = {name: checksum(tensor) for name, tensor in weights_of(model)}
    for name in sorted(sums):
        digest.update(f"{name} {sums[name]}".encode())
    return digest.hexdigest()


def has_hooks(model: HookedModel) -> bool:
    """Return whether the model has forward hooks at present, so that its weights alone do not decide its activations.

    Args:
        model: a hooked model.
    """
    # A bridge's own list lacks the hook points that bridge.py adds; ours lacks those that the package never reads.
    points = [*model.hook_dict.values(), *hook_points(model).by_name.values()]
    return any(point.has_hooks(dir="fwd") for point in points)
