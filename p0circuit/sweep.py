"""Many models, checkpoints and experiments at once, on Ray: each combination is a task that can die and be repeated.

1. Tasks are all combinations of model, checkpoint and experiment; each declares its CPUs, GPUs and memory.
2. A worker loads the model, makes the prompts, and hashes all that decides the result (`reproduction.result_key`).
   Where `out` holds the result of that key, nothing is measured.
3. The result travels to the driver as files, and the driver writes them at once, the JSON last: workers need no
   access to `out`, and what is there is whole. Only the driver writes.
4. A task whose worker or node dies is started again elsewhere. A driver that dies is started again by hand, and finds
   what was finished. A task that raises, or whose result cannot be written, is named in the summary and stops no other.

    <out>/<model>[@checkpoint]/<experiment>.json, tables/, figures/, attention/     as `Result.save` writes them
    <out>/<model>[@checkpoint]/left-out/<experiment>.json                           not applicable, and why
    <out>/sweep.json                                                                the summary of the last sweep
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.errors import P0Error
from p0circuit.experiments import find_experiment
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.io import data_dir, write_atomically
from p0circuit.log import report_progress
from p0circuit.models import ModelError, load_model
from p0circuit.models.catalog import CATALOG
from p0circuit.models.hub import revision_of
from p0circuit.models.load import Backend
from p0circuit.models.memory import bytes_while_loading
from p0circuit.models.model_files import count_parameters
from p0circuit.models.names import CONSTRUCTED_MODELS, hub_id_of
from p0circuit.models.source import checkpoint_folders, gguf_model_name, is_gguf_model, local_folder, resolve
from p0circuit.prompts import PromptSet
from p0circuit.reproduction import result_key

if TYPE_CHECKING:
    import torch

Status = Literal["done", "kept", "not applicable", "failed"]

OBJECT_STORE_BYTES = 100 * 2**20
"""What passes through Ray are tables and figures; its own default would take a third of the machine's memory."""
WORKER_OVERHEAD_BYTES = 2**30
"""Bytes that a worker needs beyond the weights: its libraries and the activations of a batch."""
RETRIES = 4
"""How often a task is started again after its worker or node has died."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task; `seconds` are the worker's, `why` is empty where there is nothing to explain."""

    model: str
    checkpoint: int | str | None
    experiment: str
    status: Status
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Sweep:
    """The outcomes of a sweep, in the order of its tasks, and where their results are."""

    tasks: list[Outcome]
    out: str

    @property
    def failed(self) -> list[Outcome]:
        return [task for task in self.tasks if task.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        return {"tasks": [asdict(task) for task in self.tasks], "out": self.out}


@dataclass(frozen=True)
class Task:
    """One experiment on one checkpoint of one model, and what it takes to run it anywhere."""

    model: str
    checkpoint: int | str | None
    experiment: Experiment
    prompts_for: Callable[[Any], PromptSet] = field(repr=False)
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
        return f"{self.folder} {self.experiment.id}"

    def outcome(self, status: Status, seconds: float = 0.0, why: str = "") -> Outcome:
        return Outcome(self.model, self.checkpoint, self.experiment.id, status, round(seconds, 2), why)


@dataclass(frozen=True)
class Kept:
    """What an earlier sweep left: the key of a result, or of what was not applicable and why."""

    key: str
    why: str | None = None


def sweep(
    models: Sequence[str],
    checkpoints: Sequence[int | str],
    experiments: Sequence[str | Experiment],
    out: str | Path,
    prompts_for: Callable[[Any], PromptSet],
    address: str | None = None,
    *,
    workers: int | None = None,
    cpus: int = 1,
    gpus: float | None = None,
    backend: Backend = "auto",
    dtype: torch.dtype | None = None,
) -> Sweep:
    """Run every experiment on every checkpoint of every model, and leave the results in `out`.

    Args:
        models: as `load_model` takes them. One without checkpoints is run once, whatever `checkpoints` says; a
            directory must be found at the same place by all nodes of a cluster.
        checkpoints: steps, labels or revisions; empty for the models as they are.
        experiments: ids, the ids of their claims, or experiments with settings of their own.
        out: a directory or any path that fsspec knows, such as s3://bucket/sweep.
        prompts_for: makes the prompts from a loaded model, on the worker.
        address: of a Ray cluster ("auto", "ray://host:10001"). If there is none Ray is started here and stopped
            again, unless this process has started it already: then that is used.
        workers: tasks at a time on this machine; as many as it has cores for if not given.
        cpus: cores, and threads, of a task.
        gpus: of a task; 1 if not given where torch sees one and Ray is started here, else 0.

    Raises:
        P0Error: Ray is not installed or its cluster cannot be reached, there is no such experiment, `out` is of no
            file system that is known, or two models would share a directory.
    """
    place = _Place(out)
    chosen = _distinct(map(find_experiment, experiments))
    places = _places(models, checkpoints)
    cores = None if workers is None else workers * cpus
    # Ray prints what it has to say about lost nodes, and standard output is for JSON.
    with contextlib.redirect_stdout(sys.stderr), _ray(address, models, cores) as (ray, own):
        import torch

        gpus = float(own and torch.cuda.is_available()) if gpus is None else gpus
        device = "cuda" if gpus else "cpu"
        tasks = [
            Task(model, checkpoint, experiment, prompts_for, backend, device, dtype, cpus)
            for model, checkpoint in places
            for experiment in chosen
        ]
        found: dict[int, Outcome] = {}
        running: dict[Any, int] = {}
        work = ray.remote(_work)
        for number, task in enumerate(tasks):
            memory = memory_of(task.model, task.checkpoint, dtype)
            lacking = _lacking(ray, {"CPU": cpus, "GPU": gpus, "memory": memory})
            if lacking and own:
                found[number] = _told(task, task.outcome("failed", why=lacking), len(found) + 1, len(tasks))
                continue
            if lacking:
                # A cluster may grow.
                report_progress(f"{task}: {lacking}; it waits for one that has")
            options = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory, "max_retries": RETRIES, "name": str(task)}
            running[work.options(**options).remote(task, place.kept(task))] = number
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done)
            task = tasks[number]
            try:
                outcome, files = ray.get(done)
                if files:
                    place.write(task, files)
            except Exception as error:
                # Not the experiment: its worker, its node, what could not be sent to it, or the place of the results,
                # which on an fsspec path has errors of its own.
                outcome = task.outcome("failed", why=f"{type(error).__name__}: {_last_line(error)}")
            found[number] = _told(task, outcome, len(found) + 1, len(tasks))
    summary = Sweep([found[number] for number in range(len(tasks))], str(out))
    place.write_file("sweep.json", (json.dumps(summary.to_json(), indent=2) + "\n").encode())
    return summary


def _told(task: Task, outcome: Outcome, number: int, of: int) -> Outcome:
    why = f": {outcome.why}" if outcome.why else ""
    report_progress(f"{number}/{of} {task}: {outcome.status} ({outcome.seconds:.1f} s){why}")
    return outcome


def _distinct(experiments: Iterable[Experiment]) -> list[Experiment]:
    found: dict[str, Experiment] = {}
    for experiment in experiments:
        if found.setdefault(experiment.id, experiment).config != experiment.config:
            raise P0Error(f"{experiment.id!r} is asked for with two settings: sweep them into an --out each")
    return list(found.values())


def memory_of(model: str, checkpoint: int | str | None, dtype: torch.dtype | None = None) -> int:
    """Bytes that a worker needs for a model, from the headers of its weight files (nothing is fetched from a hub).

    A model whose files cannot be looked at from here counts as small.
    """
    import torch

    return WORKER_OVERHEAD_BYTES + bytes_while_loading(_parameters(model, checkpoint), dtype or torch.float32)


def _parameters(model: str, checkpoint: int | str | None) -> int:
    from safetensors import SafetensorError

    if model in CONSTRUCTED_MODELS:
        return 0
    if model in CATALOG:
        return CATALOG[model].parameters
    # What cannot be loaded is told by the worker, as that of its task alone.
    with contextlib.suppress(ModelError, SafetensorError):
        if is_gguf_model(model) or local_folder(model) is not None:
            return count_parameters(resolve(model, checkpoint).folder)
        from huggingface_hub import get_safetensors_metadata

        hub_id = hub_id_of(model)
        # No network, in whatever words the hub's client has for it.
        with contextlib.suppress(Exception):
            revision = revision_of(hub_id, checkpoint)
            return sum(get_safetensors_metadata(hub_id, revision=revision).parameter_count.values())
    return 0


def _places(models: Sequence[str], checkpoints: Sequence[int | str]) -> list[tuple[str, int | str | None]]:
    """The models with their checkpoints, those that keep none once.

    Raises:
        P0Error: two models would share a directory.
    """
    found: list[tuple[str, int | str | None]] = []
    names: dict[str, str] = {}
    for given in dict.fromkeys(models):
        whole = given in CONSTRUCTED_MODELS or is_gguf_model(given)
        folder = None if whole else local_folder(given)
        shipped = folder is not None and folder.parent == data_dir() / "models"
        # A worker need not have the driver's working directory, nor its copy of the package.
        path = (
            given
            if given in CONSTRUCTED_MODELS or given in CATALOG or not whole
            else str(Path(given).expanduser().absolute())
        )
        model = path if folder is None else folder.name if shipped else str(folder)
        name = _name(given)
        if names.setdefault(name, model) != model:
            raise P0Error(f"{names[name]!r} and {model!r} are both called {name!r}: sweep them into an --out each")
        once = whole or (folder is not None and not checkpoint_folders(folder))
        found += [(model, checkpoint) for checkpoint in ([None] if once else dict.fromkeys(checkpoints) or [None])]
    return found


def _name(model: str) -> str:
    """A model's name, as `describe` gives it."""
    if model in CONSTRUCTED_MODELS:
        return model
    if is_gguf_model(model):
        return gguf_model_name(model)
    folder = local_folder(model)
    return folder.name if folder else hub_id_of(model)


def _work(task: Task, kept: Kept | None) -> tuple[Outcome, dict[str, bytes]]:
    """On the worker: the outcome of a task, and the files of its result if there is a new one."""
    import torch

    torch.set_num_threads(task.threads)
    started = time.monotonic()

    def outcome(status: Status, why: str = "") -> Outcome:
        return task.outcome(status, time.monotonic() - started, why)

    try:
        model = load_model(task.model, task.backend, task.checkpoint, task.device, task.dtype)
        prompts = task.prompts_for(model)
        key = result_key(task.experiment, model, prompts)
        if kept is not None and kept.key == key:
            return (outcome("kept") if kept.why is None else outcome("not applicable", kept.why)), {}
        try:
            result = task.experiment.run(model, prompts)
        except NotApplicable as reason:
            left_out = json.dumps(asdict(Kept(key, str(reason))), indent=2) + "\n"
            return outcome("not applicable", str(reason)), {_left_out(task): left_out.encode()}
        result.provenance["key"] = key
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder))
            paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return outcome("done"), files
    except Exception as error:
        # Whatever it was, it is this task's alone.
        return outcome("failed", f"{type(error).__name__}: {error}"), {}


def _left_out(task: Task) -> str:
    return f"left-out/{task.experiment.id}.json"


class _Place:
    """The directory of a sweep, wherever it is."""

    def __init__(self, out: str | Path) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        try:
            self.system, self.root = url_to_fs(str(out))
        except ImportError as error:
            raise P0Error(f"results cannot go to {str(out)!r}: {error}") from None
        self.local = isinstance(self.system, LocalFileSystem)

    def kept(self, task: Task) -> Kept | None:
        """What is there of a task, if it is whole."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = self._read(f"{task.folder}/{task.experiment.id}.json")
            files = [f"tables/{task.experiment.id}-{name}.csv" for name in summary["tables"]]
            files += [f"figures/{task.experiment.id}-{name}.png" for name in summary["figures"]]
            if all(self.system.exists(f"{self.root}/{task.folder}/{path}") for path in files):
                return Kept(summary["provenance"]["key"])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Kept(**self._read(f"{task.folder}/{_left_out(task)}"))
        return None

    def write(self, task: Task, files: dict[str, bytes]) -> None:
        """The files of a task, the one that says that they are whole last."""
        last = f"{task.experiment.id}.json"
        # What an earlier run left must not vouch for what is written now.
        for path in (last, _left_out(task)):
            with contextlib.suppress(FileNotFoundError):
                self.system.rm_file(f"{self.root}/{task.folder}/{path}")
        for path in sorted(files, key=lambda path: (path == last, path)):
            self.write_file(f"{task.folder}/{path}", files[path])

    def write_file(self, path: str, content: bytes) -> None:
        whole = f"{self.root}/{path}"
        if self.local:
            write_atomically(Path(whole), lambda temporary: temporary.write_bytes(content))
        else:
            # Object stores show a file when it is whole.
            self.system.makedirs(whole.rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(whole, content)

    def _read(self, path: str) -> dict[str, Any]:
        return json.loads(self.system.cat_file(f"{self.root}/{path}"))


@contextlib.contextmanager
def _ray(address: str | None, models: Sequence[str], cores: int | None) -> Iterator[tuple[Any, bool]]:
    """Ray, connected, and whether it was started here; what was started is stopped again."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A task without GPUs is to see none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise P0Error("a sweep needs Ray, which is not installed: pip install 'p0circuit[ray]'") from None
    if ray.is_initialized():
        if address is not None:
            report_progress(
                f"this process is connected to Ray already: {address!r} is not used (ray.shutdown() disconnects it)"
            )
        yield ray, False
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        ray.init(
            "local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            **quiet,
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            package = _package(Path(folder), models)
            try:
                ray.init(address, runtime_env={"py_modules": [str(package)]}, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise P0Error(f"no Ray cluster can be used at {address!r}: {error}") from error
    try:
        yield ray, address is None
    finally:
        ray.shutdown()


def _package(folder: Path, models: Sequence[str]) -> Path:
    """This package with the shipped texts and those of `models` that are shipped: what the nodes of a cluster lack."""
    here, package = Path(__file__).resolve().parent, folder / "p0circuit"
    (package / "data" / "models").mkdir(parents=True)
    for path in here.iterdir():
        if path.name not in ("data", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "data" / "prompts").symlink_to(data_dir() / "prompts")
    for model in set(models) & {path.name for path in (data_dir() / "models").iterdir()}:
        (package / "data" / "models" / model).symlink_to(data_dir() / "models" / model)
    return package


def _lacking(ray: Any, needs: dict[str, float]) -> str | None:
    """Why a task with these needs fits on no node; None where it fits on one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        return None
    told = f"{needs['CPU']} CPU, {needs['GPU']:g} GPU and {needs['memory'] / 2**30:.1f} GB of memory"
    return f"it needs {told}, more than any one machine here has"


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
