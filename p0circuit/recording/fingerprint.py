"""A hash of everything that decides what a model computes: weights, buffers and configuration."""

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
# Numbers of eight bytes that are summed up to see whether weights have changed.
_STRETCH = 61
# Weights up to this size are hashed whole each time.
_SMALL_BYTES = 2**18
# Fields of a TransformerLens configuration that decide nothing.
_NAMES_AND_PLACES = {"model_name", "tokenizer_name", "device", "n_devices"}


def weights_fingerprint(model: HookedModel) -> str:
    """A hash of every weight and buffer and of the configuration: of all that decides what the model computes.

    It is computed once per model, and again only when a weight or setting has changed (`_weights_glance`). The weights
    of a model with a device map are hashed once and taken to be unchanged: reading them all again takes too long.
    """
    glance = "" if placement_of(model) is not None else _weights_glance(model)
    if (known := _FINGERPRINTS.get(model)) is None or known[0] != glance:
        _FINGERPRINTS[model] = known = (glance, _weights_fingerprint(model))
    return known[1]


def _settings(model: HookedModel) -> bytes:
    """All that decides what a model computes beside its weights."""
    settings = {name: value for name, value in vars(model.cfg).items() if name not in _NAMES_AND_PLACES}
    return repr((replace(describe(model), name=""), sorted(settings.items()))).encode()


def _weights_glance(model: HookedModel) -> str:
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


def _weights_fingerprint(model: HookedModel) -> str:
    digest = hashlib.sha256(_settings(model))
    # One tensor at a time: a weight that waits on disk is read to be hashed.
    sums = {name: checksum(tensor) for name, tensor in weights_of(model)}
    for name in sorted(sums):
        digest.update(f"{name} {sums[name]}".encode())
    return digest.hexdigest()


def has_hooks(model: HookedModel) -> bool:
    """Whether anything is hooked to the model at present, so that what it computes is not what its weights say."""
    # A bridge's own list lacks the points that were mended (bridge.py), and ours those that nobody reads.
    points = [*model.hook_dict.values(), *hook_points(model).by_name.values()]
    return any(point.has_hooks(dir="fwd") for point in points)
