"""What the monitor costs: one reading against a hundred training steps, at p0-nano's size and at a larger one.

A training step and a reading by turns, on the batch that p0-nano is trained with (16 rows of 128 tokens) and with the
monitor's default probe (32 rows of 64), medians of both: other work on the machine slows both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from p0circuit.training.build import build_model
from p0circuit.training.config import TrainConfig
from p0circuit.training.monitor import P0Monitor
from p0circuit.training.updates import TrainState, build_optimizer, train_step

EVERY = 100
LARGER = {"n_layers": 6, "d_model": 384, "n_heads": 6, "d_mlp": 1024, "vocab_size": 4096}


def measure(rounds: int = 15) -> dict[str, Any]:
    """The share of training time that a reading every hundred steps takes, and what each of them took."""
    overhead, step, reading = compare(TrainConfig(), rounds)
    larger, _, _ = compare(replace(TrainConfig(), **LARGER), max(3, rounds // 3))
    return {
        "monitor_overhead": overhead,
        "monitor_overhead_larger": larger,
        "monitor_step_seconds": step,
        "monitor_reading_seconds": reading,
    }


def compare(config: TrainConfig, rounds: int) -> tuple[float, float, float]:
    """The overhead of a reading every hundred steps, and the seconds of a step and of a reading."""
    model = build_model(config).train()
    state = TrainState(model, build_optimizer(config, model))
    ids = torch.randint(config.vocab_size, (config.batch, config.length), generator=torch.Generator().manual_seed(0))
    monitor = P0Monitor(every=EVERY)
    steps, readings = [], []
    for turn in range(rounds + 2):
        steps.append(seconds(lambda: train_step(config, state, ids)))
        readings.append(seconds(lambda turn=turn: monitor.read(model, turn * EVERY)))
    # The first turns warm caches.
    step, reading = (statistics.median(times[2:]) for times in (steps, readings))
    return reading / (EVERY * step), step, reading


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=2))
