"""A sweep on one worker and on two, beside the same experiments one after the other in this process.

The sink map and the norms of four checkpoints of p0-nano, one thread per task, an empty cache of recordings for each
run. Ray and its workers are warm when the clock starts, as this process is for the loop; what that takes stands beside.
All numbers of the three runs are held against each other.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from p0circuit.experiments import EXPERIMENTS
from p0circuit.models import load_model
from p0circuit.prompts import PromptSet, natural_text, random_tokens
from p0circuit.results import Result
from p0circuit.sweep import Sweep, sweep

MODEL, CHECKPOINTS, NAMES = "p0-nano", (0, 941, 4339, 20000), ("sink-map", "norm-direction")


def prompts_for(model: Any, n: int = 128) -> PromptSet:
    return natural_text(model, "stdlib", n=n)


def measure() -> dict[str, Any]:
    """Seconds of the three runs, the speed-up of the second worker, and the largest difference of any number."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with cache_in(place / "loop"):
            load_model(MODEL)
            serial = seconds(lambda: in_turn(place / "loop"))
        one_start, one = on_workers(1, place / "one")
        two_start, two = on_workers(2, place / "two")
        differences = [difference(place / "loop", place / name) for name in ("one", "two")]
    return {
        "sweep_tasks": len(CHECKPOINTS) * len(NAMES),
        "sweep_loop_seconds": serial,
        "sweep_1_worker_seconds": one,
        "sweep_2_workers_seconds": two,
        "sweep_speedup_2_over_1": one / two,
        "sweep_1_worker_start_seconds": one_start,
        "sweep_2_workers_start_seconds": two_start,
        "sweep_max_abs_diff": max(differences),
        "cores": os.cpu_count(),
        "load_before": load,
    }


def on_workers(workers: int, out: Path) -> tuple[float, float]:
    """The seconds of starting Ray with so many warm workers, and of the sweep on them."""
    import ray

    def start() -> None:
        ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        # As many tasks at once as there are workers: each imports and draws once.
        sweep(["wired", "wired-learned"][:workers], [], NAMES[:1], out / "warm", random_prompts)

    with cache_in(out):
        try:
            warming = seconds(start)
            taken = seconds(lambda: check(sweep([MODEL], CHECKPOINTS, NAMES, out, prompts_for)))
        finally:
            ray.shutdown()
    return warming, taken


def check(found: Sweep) -> None:
    assert all(task.status == "done" for task in found.tasks), found


def random_prompts(model: Any) -> PromptSet:
    return random_tokens(model.cfg.d_vocab, n=8, length=16)


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """An empty cache of recordings, for this process and for what it starts."""
    before = os.environ.get("P0CIRCUIT_CACHE")
    os.environ["P0CIRCUIT_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("P0CIRCUIT_CACHE") if before is None else os.environ.update(P0CIRCUIT_CACHE=before)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(out: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for checkpoint in CHECKPOINTS:
        for name in NAMES:
            model = load_model(MODEL, checkpoint=checkpoint)
            EXPERIMENTS[name]().run(model, prompts_for(model)).save(out / f"{MODEL}@{checkpoint}")
    torch.set_num_threads(threads)


def difference(one: Path, other: Path) -> float:
    """The largest difference between the metrics of two runs; infinite where one of them lacks a result."""
    results = sorted(path.relative_to(one) for path in one.glob(f"{MODEL}@*/*.json"))
    found = [0.0] if results else [float("inf")]
    for path in results:
        left, right = Result.load(one / path).metrics, Result.load(other / path).metrics
        found += [abs(left[name].value - right[name].value) for name in left | right]
    return max(found)


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=2))
