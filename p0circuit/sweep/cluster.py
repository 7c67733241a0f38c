"""Ray: started here, or a cluster that is running already."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from p0circuit.errors import P0Error
from p0circuit.io import data_dir
from p0circuit.log import report_progress

OBJECT_STORE_BYTES = 100 * 2**20
"""Size of Ray's object store, which holds tables and figures only; its default is a third of the machine's memory."""


@contextlib.contextmanager
def connected_ray(address: str | None, models: Sequence[str], cores: int | None) -> Iterator[tuple[ModuleType, bool]]:
    """Connect to Ray, starting it if no cluster is named, and stop afterwards what was started.

    Args:
        address: of a cluster; None starts Ray on this machine, unless this process is connected already.
        models: the models of the sweep; shipped ones are sent to the nodes of a cluster.
        cores: cores that Ray may use on this machine; all if None.

    Yields:
        The module `ray`, connected, and whether Ray was started here.

    Raises:
        P0Error: Ray is not installed, or the cluster cannot be used.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A task without GPUs must not see any.
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
        root = str(_package_folder().parent)
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
            package = _package_to_send(Path(folder), models)
            try:
                ray.init(address, runtime_env={"py_modules": [str(package)]}, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise P0Error(f"no Ray cluster can be used at {address!r}: {error}") from error
    try:
        yield ray, address is None
    finally:
        ray.shutdown()


def missing_resources(ray: ModuleType, needs: Mapping[str, float]) -> str | None:
    """Return why a task fits on no node; None if it fits on one.

    Args:
        ray: the module `ray`, connected.
        needs: CPU and GPU in numbers, memory in bytes.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        return None
    amounts = f"{needs['CPU']} CPU, {needs['GPU']:g} GPU and {needs['memory'] / 2**30:.1f} GB of memory"
    return f"it needs {amounts}, more than any one machine here has"


def _package_folder() -> Path:
    """The folder of this package."""
    return Path(__file__).resolve().parents[1]


def _package_to_send(folder: Path, models: Sequence[str]) -> Path:
    """This package with the shipped texts and the shipped models of the sweep, which the nodes of a cluster lack."""
    package = folder / "p0circuit"
    (package / "data" / "models").mkdir(parents=True)
    for path in _package_folder().iterdir():
        if path.name not in ("data", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "data" / "prompts").symlink_to(data_dir() / "prompts")
    for model in set(models) & {path.name for path in (data_dir() / "models").iterdir()}:
        (package / "data" / "models" / model).symlink_to(data_dir() / "models" / model)
    return package
