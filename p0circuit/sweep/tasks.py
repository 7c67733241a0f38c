"""The tasks of a sweep, what they need, and their outcomes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment
from p0circuit.hooked_model import HookedModel
from p0circuit.io import data_dir
from p0circuit.models import ModelError
from p0circuit.models.catalog import CATALOG
from p0circuit.models.hub import revision_of
from p0circuit.models.load import Backend
from p0circuit.models.memory import bytes_while_loading
from p0circuit.models.model_files import count_parameters
from p0circuit.models.names import CONSTRUCTED_MODELS, hub_id_of
from p0circuit.models.source import checkpoint_folders, gguf_model_name, is_gguf_model, local_folder, resolve
from p0circuit.prompts import PromptSet

if TYPE_CHECKING:
    import torch

Status = Literal["done", "kept", "not applicable", "failed"]
"""How a task ended; "kept" is a result of an earlier sweep that is still valid."""

WORKER_OVERHEAD_BYTES = 2**30
"""Memory of a worker beyond the weights: its libraries and the activations of a batch."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        model: name or path of the model.
        checkpoint: its checkpoint; None for the model as it is.
        experiment: id of the experiment.
        status: how the task ended.
        seconds: time that the worker took.
        reason: why the task failed or was not applicable; empty otherwise.
    """

    model: str
    checkpoint: int | str | None
    experiment: str
    status: Status
    seconds: float = 0.0
    reason: str = ""

    def to_json(self) -> dict[str, str | int | float | None]:
        """Return it as it stands in sweep.json, where the reason is named "why"."""
        return {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "experiment": self.experiment,
            "status": self.status,
            "seconds": self.seconds,
            "why": self.reason,
        }


@dataclass(frozen=True)
class Sweep:
    """The summary of a sweep.

    Attributes:
        tasks: the outcomes, in the order of the tasks.
        out: where the results are.
    """

    tasks: list[Outcome]
    out: str

    @property
    def failed(self) -> list[Outcome]:
        """The tasks that failed."""
        return [task for task in self.tasks if task.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as it stands in sweep.json."""
        return {"tasks": [task.to_json() for task in self.tasks], "out": self.out}


@dataclass(frozen=True)
class Task:
    """One experiment on one checkpoint of one model, with all that a worker needs to run it.

    Attributes:
        model: name or absolute path of the model.
        checkpoint: its checkpoint; None for the model as it is.
        experiment: the experiment.
        prompts_for: makes the prompts from the loaded model.
        backend: as in `load_model`.
        device: "cpu" or "cuda".
        dtype: of the weights; that of `load_model` if None.
        threads: threads of torch.
    """

    model: str
    checkpoint: int | str | None
    experiment: Experiment
    prompts_for: Callable[[HookedModel], PromptSet] = field(repr=False)
    backend: Backend = "auto"
    device: str = "cpu"
    dtype: torch.dtype | None = None
    threads: int = 1

    @property
    def folder(self) -> str:
        """The directory of its results below `out`."""
        at = "" if self.checkpoint is None else f"@{self.checkpoint}"
        return f"{_name(self.model)}{at}".replace("/", "--")

    def __str__(self) -> str:
        """Return the directory and the experiment of the task."""
        return f"{self.folder} {self.experiment.id}"

    def outcome(self, status: Status, seconds: float = 0.0, reason: str = "") -> Outcome:
        """Return an outcome of this task.

        Args:
            status: how the task ended.
            seconds: time that it took.
            reason: why it failed or was not applicable.
        """
        return Outcome(self.model, self.checkpoint, self.experiment.id, status, round(seconds, 2), reason)


def distinct_experiments(experiments: Iterable[Experiment]) -> list[Experiment]:
    """Return each experiment once.

    Args:
        experiments: experiments, possibly repeated.

    Raises:
        P0Error: one is given with two configurations, whose results would share a file.
    """
    by_id: dict[str, Experiment] = {}
    for experiment in experiments:
        if by_id.setdefault(experiment.id, experiment).config != experiment.config:
            raise P0Error(f"{experiment.id!r} is asked for with two settings: sweep them into an --out each")
    return list(by_id.values())


def models_with_checkpoints(
    models: Sequence[str], checkpoints: Sequence[int | str]
) -> list[tuple[str, int | str | None]]:
    """Combine models with checkpoints; a model that has no checkpoints is listed once.

    Args:
        models: as `load_model` takes them.
        checkpoints: steps, labels or revisions.

    Returns:
        Name or absolute path of each model, and the checkpoint, None for the model as it is.

    Raises:
        P0Error: two models would share a directory.
    """
    combinations: list[tuple[str, int | str | None]] = []
    names: dict[str, str] = {}
    for given in dict.fromkeys(models):
        single = given in CONSTRUCTED_MODELS or is_gguf_model(given)
        folder = None if single else local_folder(given)
        shipped = folder is not None and folder.parent == data_dir() / "models"
        # A worker need not have the driver's working directory, nor its copy of the package.
        path = (
            given
            if given in CONSTRUCTED_MODELS or given in CATALOG or not single
            else str(Path(given).expanduser().absolute())
        )
        model = path if folder is None else folder.name if shipped else str(folder)
        name = _name(given)
        if names.setdefault(name, model) != model:
            raise P0Error(f"{names[name]!r} and {model!r} are both called {name!r}: sweep them into an --out each")
        once = single or (folder is not None and not checkpoint_folders(folder))
        combinations += [
            (model, checkpoint) for checkpoint in ([None] if once else dict.fromkeys(checkpoints) or [None])
        ]
    return combinations


def memory_of(model: str, checkpoint: int | str | None, dtype: torch.dtype | None = None) -> int:
    """Return the memory that a worker needs for a model, from the headers of its weight files.

    No weights are downloaded. A model whose files cannot be read from here counts as small.

    Args:
        model: name or path of the model.
        checkpoint: its checkpoint; None for the model as it is.
        dtype: of the loaded weights; float32 if None.

    Returns:
        Bytes.
    """
    import torch

    return WORKER_OVERHEAD_BYTES + bytes_while_loading(_parameters(model, checkpoint), dtype or torch.float32)


def _parameters(model: str, checkpoint: int | str | None) -> int:
    from safetensors import SafetensorError

    if model in CONSTRUCTED_MODELS:
        return 0
    if model in CATALOG:
        return CATALOG[model].parameters
    # A model that cannot be loaded is an error of its task alone, which the worker reports.
    with contextlib.suppress(ModelError, SafetensorError):
        if is_gguf_model(model) or local_folder(model) is not None:
            return count_parameters(resolve(model, checkpoint).folder)
        from huggingface_hub import get_safetensors_metadata

        hub_id = hub_id_of(model)
        # Without a network the hub's client raises errors of many types.
        with contextlib.suppress(Exception):
            revision = revision_of(hub_id, checkpoint)
            return sum(get_safetensors_metadata(hub_id, revision=revision).parameter_count.values())
    return 0


def _name(model: str) -> str:
    """A model's name, as `describe` gives it."""
    if model in CONSTRUCTED_MODELS:
        return model
    if is_gguf_model(model):
        return gguf_model_name(model)
    folder = local_folder(model)
    return folder.name if folder else hub_id_of(model)
