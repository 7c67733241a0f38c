"""What a run of a large model needs: memory by device and time, estimated before the model is loaded.

1. Memory is counted: the weights by device, as a device map distributes them (models/device_map.py).
2. Rates are measured in a second or two: reading a weight file, copying to the device that computes, and multiplying
   matrices on it.
3. Time is the sum of what has to be read, copied and multiplied, each at its rate. Every weight is read once when the
   model is loaded, and offloaded weights again for every batch. Nothing else is counted. A file that the system still
   holds in memory is read faster than the estimate assumes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from p0circuit.models.device_map import Placement
from p0circuit.recording.batch_size import row_bytes, rows_that_fit

READ_BYTES, COPY_BYTES = 256 * 2**20, 64 * 2**20
LOADING_BATCHES = 5
"""How often offloaded weights are read while a model is loaded and checked."""


@dataclass(frozen=True)
class Rates:
    """The speed of this machine.

    Attributes:
        read: bytes per second from disk.
        copy: bytes per second from CPU memory to the device that computes.
        compute: floating-point operations per second on that device.
    """

    read: float
    copy: float
    compute: float


def measure_rates(placement: Placement) -> Rates:
    """Measure the rates of this machine, reading from the model's weight files.

    Args:
        placement: of the model; its `folder`, `device` and `dtype` are used.
    """
    assert placement.folder is not None, "a placement of a model that has no files yet"
    return Rates(_reading(placement.folder), _copying(placement.device), _computing(placement.device, placement.dtype))


def estimated_seconds(placement: Placement, rates: Rates, samples: int, length: int) -> tuple[float, float]:
    """Estimate the time to load a model and the time of one pass over all prompts.

    Args:
        placement: of the model.
        rates: of the machine.
        samples: number of prompts.
        length: tokens per prompt.

    Returns:
        Seconds to load the model, and seconds of one pass.
    """
    moving = placement.offloaded_bytes.get("disk", 0) / rates.read
    moving += sum(placement.offloaded_bytes.values()) / rates.copy if placement.device.type != "cpu" else 0.0
    computing = 2 * placement.active_parameters * samples * length / rates.compute
    loading = (sum(placement.weight_bytes.values()) + placement.rewritten_bytes) / rates.read + LOADING_BATCHES * moving
    return loading, n_batches(placement, samples, length) * moving + computing


def n_batches(placement: Placement, samples: int, length: int) -> int:
    """Count the batches that `record` makes of the prompts; offloaded weights are copied once per batch.

    Args:
        placement: of the model.
        samples: number of prompts.
        length: tokens per prompt.
    """
    room, logit_bytes = placement.activation_bytes // 2, placement.dtype.itemsize
    return -(-samples // rows_that_fit(room, placement.n_heads, length, placement.vocab_size, logit_bytes))


def resource_estimate(
    placement: Placement, rates: Rates, samples: int, length: int, passes: int | None = None, checkpoints: int = 1
) -> str:
    """Describe the memory by device and the time that a run needs, in one or two sentences.

    Args:
        placement: of the model.
        rates: of the machine.
        samples: number of prompts.
        length: tokens per prompt.
        passes: number of passes over all prompts; None if it is not known, and the time of one pass is given.
        checkpoints: number of checkpoints that are loaded one after the other.
    """
    prompts = f"{samples} prompts of {length} tokens"
    loading, one_pass = estimated_seconds(placement, rates, samples, length)
    if passes is None:
        duration = f"About {_time(loading)} to load it and {_time(one_pass)} for each pass over {prompts}"
    else:
        total = _time(checkpoints * (loading + passes * one_pass))
        count = f"{passes} passes" if passes > 1 else "a pass"
        duration = f"About {total}: {_time(loading)} to load it and {count} of {_time(one_pass)} over {prompts}"
        duration += f", for each of {checkpoints} checkpoints" if checkpoints > 1 else ""
    # A small number of prompts does not use all the memory that is kept free for activations.
    used = 2 * samples * row_bytes(placement.n_heads, length, placement.vocab_size, placement.dtype.itemsize)
    placement = replace(placement, activation_bytes=min(placement.activation_bytes, used))
    sources = {"cpu": "to CPU memory", "disk": "to disk"}
    offloaded = "".join(
        f", {_size(size)} of them offloaded {sources[device]}" for device, size in placement.offloaded_bytes.items()
    )
    places = {"cpu": "in CPU memory", "disk": "on disk"}
    needs = ", ".join(
        f"{_size(size)} {places.get(device, f'on {device}')}" for device, size in placement.required_bytes.items()
    )
    block = f"{_size(placement.block_bytes)} for the largest block and " if placement.block_bytes else ""
    weights, dtype = _size(sum(placement.weight_bytes.values())), str(placement.dtype).removeprefix("torch.")
    return (
        f"{placement.name}: {weights} of weights in {dtype}{offloaded}. "
        f"Needs {needs}, with {block}{_size(placement.activation_bytes)} for activations. {duration}."
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**27 else f"{size / 2**20:.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _reading(folder: Path) -> float:
    """Bytes per second from the largest weight file, past what the system holds of it in memory."""
    largest = max(folder.glob("model*.safetensors"), key=lambda path: path.stat().st_size)
    size, read = min(READ_BYTES, largest.stat().st_size), 0
    with largest.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while read < size:
            read += len(file.read(2**23))
    return read / (time.perf_counter() - started)


def _copying(device: torch.device) -> float:
    values = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    return COPY_BYTES / _seconds(lambda: values.to(device, copy=True), device)


def _computing(device: torch.device, dtype: torch.dtype) -> float:
    size = 512 if device.type == "cpu" else 4096
    factor = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: factor @ factor, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of three runs."""
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    return min(durations)
