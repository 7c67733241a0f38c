"""What a worker does with a task."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from p0circuit.experiments.base import NotApplicable
from p0circuit.models import load_model
from p0circuit.reproduction import result_key
from p0circuit.sweep.store import StoredOutcome, left_out_path
from p0circuit.sweep.tasks import Outcome, Status, Task


def run_task(task: Task, stored: StoredOutcome | None) -> tuple[Outcome, dict[str, bytes]]:
    """Run a task, unless its stored result is still valid.

    Args:
        task: the task.
        stored: what an earlier sweep has stored of it.

    Returns:
        The outcome, and the contents of the new files by path below the task's folder.
    """
    import torch

    torch.set_num_threads(task.threads)
    started = time.monotonic()

    def outcome(status: Status, reason: str = "") -> Outcome:
        return task.outcome(status, time.monotonic() - started, reason)

    try:
        model = load_model(task.model, task.backend, task.checkpoint, task.device, task.dtype)
        prompts = task.prompts_for(model)
        key = result_key(task.experiment, model, prompts)
        if stored is not None and stored.key == key:
            return (outcome("kept") if stored.reason is None else outcome("not applicable", stored.reason)), {}
        try:
            result = task.experiment.run(model, prompts)
        except NotApplicable as error:
            left_out = StoredOutcome(key, str(error)).to_bytes()
            return outcome("not applicable", str(error)), {left_out_path(task): left_out}
        result.provenance["key"] = key
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder))
            paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return outcome("done"), files
    except Exception as error:
        # Any error is that of this task alone.
        return outcome("failed", f"{type(error).__name__}: {error}"), {}
