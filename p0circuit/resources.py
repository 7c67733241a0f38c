"""What a run of a large model will take, said before it starts: memory by place, and about how long.

1. Memory is counted: the weights by place as a device map spreads them (models/device_map.py).
2. Rates are measured, in a second or two: of reading a weight file, of copying to the device that computes, of a matrix
   product on it.
3. Time is the sum of what has to be read, copied and multiplied, each at its rate: every weight once when the model is
   loaded, and those that wait again for every batch. Nothing else is counted; and what the system keeps of a file in
   memory is read faster than this says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from p0circuit.models.device_map import Plan
from p0circuit.recording.batch_size import row_bytes, rows_that_fit

READ_BYTES, COPY_BYTES = 256 * 2**20, 64 * 2**20
LOADING_BATCHES = 5
"""How often weights that wait are brought while a model is loaded and checked."""


@dataclass(frozen=True)
class Rates:
    """Bytes per second from disk and from CPU memory to the device that computes, and operations per second there."""

    read: float
    copy: float
    compute: float


def measure_rates(plan: Plan) -> Rates:
    """Measure the rates of this machine, reading from the model's weight files."""
    assert plan.folder is not None, "a plan of a model that has no files yet"
    return Rates(_reading(plan.folder), _copying(plan.device), _computing(plan.device, plan.dtype))


def seconds(plan: Plan, rates: Rates, samples: int, length: int) -> tuple[float, float]:
    """The time to load the model, and that of one pass over all prompts."""
    moving = plan.waiting.get("disk", 0) / rates.read
    moving += sum(plan.waiting.values()) / rates.copy if plan.device.type != "cpu" else 0.0
    computing = 2 * plan.active * samples * length / rates.compute
    loading = (sum(plan.weights.values()) + plan.converted) / rates.read + LOADING_BATCHES * moving
    return loading, batches(plan, samples, length) * moving + computing


def batches(plan: Plan, samples: int, length: int) -> int:
    """How many batches `record` makes of the prompts; each brings all weights that wait."""
    rows = rows_that_fit(plan.activations // 2, plan.heads, length, plan.vocab_size, plan.dtype.itemsize)
    return -(-samples // rows)


def forecast(
    plan: Plan, rates: Rates, samples: int, length: int, passes: int | None = None, checkpoints: int = 1
) -> str:
    """Memory by place and time, in words; the time of one pass where the number of passes is not known."""
    prompts = f"{samples} prompts of {length} tokens"
    loading, one = seconds(plan, rates, samples, length)
    if passes is None:
        told = f"About {_time(loading)} to load it and {_time(one)} for each pass over {prompts}"
    else:
        whole, each = _time(checkpoints * (loading + passes * one)), f", for each of {checkpoints} checkpoints"
        several = f"{passes} passes" if passes > 1 else "a pass"
        told = f"About {whole}: {_time(loading)} to load it and {several} of {_time(one)} over {prompts}"
        told += each if checkpoints > 1 else ""
    # Few prompts do not take all that is kept free for activations.
    some = 2 * samples * row_bytes(plan.heads, length, plan.vocab_size, plan.dtype.itemsize)
    plan = replace(plan, activations=min(plan.activations, some))
    where = {"cpu": "in CPU memory", "disk": "on disk"}
    waits = "".join(f", {_size(size)} of them waiting {where[place]}" for place, size in plan.waiting.items())
    needs = ", ".join(f"{_size(size)} {where.get(place, f'on {place}')}" for place, size in plan.needed.items())
    at_work = f"{_size(plan.layer)} for the block at work and " if plan.layer else ""
    total, dtype = _size(sum(plan.weights.values())), str(plan.dtype).removeprefix("torch.")
    return (
        f"{plan.name}: {total} of weights in {dtype}{waits}. "
        f"Needs {needs}, with {at_work}{_size(plan.activations)} for activations. {told}."
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**27 else f"{size / 2**20:.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _reading(folder: Path) -> float:
    """Of the largest weight file, not from what the system has kept of it in memory."""
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
    """The least of three."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)
