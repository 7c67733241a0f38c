"""Run a sweep: start its tasks, write their results as they arrive, and summarise."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from p0circuit.experiments import find_experiment
from p0circuit.experiments.base import Experiment
from p0circuit.hooked_model import HookedModel
from p0circuit.log import report_progress
from p0circuit.models.load import Backend
from p0circuit.prompts import PromptSet
from p0circuit.sweep.cluster import connected_ray, missing_resources
from p0circuit.sweep.store import ResultStore
from p0circuit.sweep.tasks import Outcome, Sweep, Task, distinct_experiments, memory_of, models_with_checkpoints
from p0circuit.sweep.worker import run_task

if TYPE_CHECKING:
    import torch

RETRIES = 4
"""How often a task is started again after its worker or node has died."""


def sweep(
    models: Sequence[str],
    checkpoints: Sequence[int | str],
    experiments: Sequence[str | Experiment],
    out: str | Path,
    prompts_for: Callable[[HookedModel], PromptSet],
    address: str | None = None,
    *,
    workers: int | None = None,
    cpus: int = 1,
    gpus: float | None = None,
    backend: Backend = "auto",
    dtype: torch.dtype | None = None,
) -> Sweep:
    """Run every experiment on every checkpoint of every model, and write the results into `out`.

    Args:
        models: as `load_model` takes them. A model without checkpoints is run once, whatever `checkpoints` is. On a
            cluster, all nodes must find a directory at the same path.
        checkpoints: steps, labels or revisions; empty for the models as they are.
        experiments: ids, the ids of their claims, or experiments with a configuration of their own.
        out: a directory or any path that fsspec knows, such as s3://bucket/sweep.
        prompts_for: makes the prompts from a loaded model, on the worker.
        address: of a Ray cluster ("auto", "ray://host:10001"). If None, Ray is started here and stopped again, unless
            this process has started it already.
        workers: tasks at a time on this machine; as many as it has cores for if None.
        cpus: cores, and threads, of a task.
        gpus: GPUs of a task; if None, 1 where torch sees one and Ray is started here, else 0.
        backend: as in `load_model`.
        dtype: of the weights; that of `load_model` if None.

    Returns:
        The outcome of every task.

    Raises:
        P0Error: Ray is not installed or its cluster cannot be reached, there is no such experiment, the file system of
            `out` is not known, or two models would share a directory.

    Example:
        summary = sweep(["p0-nano", "bos-0"], [], ["C1"], "out/sweep", natural_text)
        print(summary.failed)
    """
    store = ResultStore(out)
    distinct = distinct_experiments(map(find_experiment, experiments))
    combinations = models_with_checkpoints(models, checkpoints)
    cores = None if workers is None else workers * cpus
    # Ray prints messages about lost nodes, and standard output is for JSON.
    with contextlib.redirect_stdout(sys.stderr), connected_ray(address, models, cores) as (ray, started_here):
        import torch

        gpus = float(started_here and torch.cuda.is_available()) if gpus is None else gpus
        device = "cuda" if gpus else "cpu"
        tasks = [
            Task(model, checkpoint, experiment, prompts_for, backend, device, dtype, cpus)
            for model, checkpoint in combinations
            for experiment in distinct
        ]
        outcomes: dict[int, Outcome] = {}
        running: dict[object, int] = {}
        remote_task = ray.remote(run_task)

        def finish(number: int, outcome: Outcome) -> None:
            outcomes[number] = outcome
            reason = f": {outcome.reason}" if outcome.reason else ""
            report_progress(
                f"{len(outcomes)}/{len(tasks)} {tasks[number]}: {outcome.status} ({outcome.seconds:.1f} s){reason}"
            )

        for number, task in enumerate(tasks):
            memory = memory_of(task.model, task.checkpoint, dtype)
            missing = missing_resources(ray, {"CPU": cpus, "GPU": gpus, "memory": memory})
            if missing and started_here:
                finish(number, task.outcome("failed", reason=missing))
                continue
            if missing:
                # A cluster may grow.
                report_progress(f"{task}: {missing}; it waits for one that has")
            options = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory, "max_retries": RETRIES, "name": str(task)}
            running[remote_task.options(**options).remote(task, store.read(task))] = number
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done)
            task = tasks[number]
            try:
                outcome, files = ray.get(done)
                if files:
                    store.write(task, files)
            except Exception as error:
                # Not an error of the experiment: its worker or node died, or it could not be sent, or its result could
                # not be written, for which every fsspec file system has errors of its own.
                outcome = task.outcome("failed", reason=f"{type(error).__name__}: {_last_line(error)}")
            finish(number, outcome)
    summary = Sweep([outcomes[number] for number in range(len(tasks))], str(out))
    store.write_file("sweep.json", (json.dumps(summary.to_json(), indent=2) + "\n").encode())
    return summary


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
