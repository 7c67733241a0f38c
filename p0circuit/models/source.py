"""Find the files that a model's name stands for.

1. A name is one of these: a shipped model, one of the catalog (fetched on first use), the user's own directory or GGUF
   file, or a model of the hub. A GGUF file is converted once (gguf_conversion.py).
2. In a directory with checkpoints, the one that is asked for is looked up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from p0circuit.models.catalog import CATALOG, NamedModel
from p0circuit.models.checkpoints import STEP, labels_by_step, parse_label
from p0circuit.models.download import fetch, sha256_of
from p0circuit.models.errors import ModelError, listing
from p0circuit.models.gguf import gguf_file_in, is_gguf
from p0circuit.models.gguf_conversion import ConvertedModel, converted_model, read_sidecar
from p0circuit.models.hub import snapshot
from p0circuit.models.names import hub_id_of, shipped_model_folder


@dataclass(frozen=True)
class Source:
    """The files of a model.

    Attributes:
        name: what `describe` calls the model.
        folder: the directory to read.
        tokenizer_folders: where its tokenizer may be, in the order in which to look.
        label: the name of the checkpoint's directory, or the revision on the hub; None where none was asked for.
        quantisation: how the weights were rounded before they were stored, such as "Q4_1"; None if they were not.
    """

    name: str
    folder: Path
    tokenizer_folders: tuple[Path, ...]
    label: str | None = None
    quantisation: str | None = None


def resolve(name: str | Path, checkpoint: int | str | None) -> Source:
    """Find the files of a model and of its checkpoint; they are fetched and converted where that is necessary.

    Args:
        name: of a model; the path of a directory or GGUF file; a hub id.
        checkpoint: a training step, or the label or revision that names it; None for the model itself.

    Raises:
        ModelError: there is no such model or checkpoint, or it cannot be fetched or converted.
    """
    entry, file = _catalog_entry(name), _gguf_file(name)
    if (entry or file) and checkpoint is not None:
        raise ModelError(f"{name} is one GGUF file: it has no checkpoint {checkpoint!r}")
    if entry is not None:
        return _converted_source(entry.name, converted_model(entry.name, entry.sha256, partial(fetch, entry)))
    if file is not None:
        model_name = gguf_model_name(name)
        return _converted_source(model_name, converted_model(model_name, sha256_of(file), lambda: file))
    folder = local_folder(name)
    if folder is None:
        hub_folder, revision = snapshot(str(name), checkpoint)
        hub_id = hub_id_of(str(name))
        return Source(hub_id if checkpoint is None else f"{hub_id}@{checkpoint}", hub_folder, (hub_folder,), revision)
    if checkpoint is None:
        sidecar = read_sidecar(folder)
        quantisation = sidecar.quantisation if sidecar else None
        return Source(folder.name, folder, _tokenizer_folders(folder), quantisation=quantisation)
    checkpoint_folder = _find_checkpoint(folder, checkpoint)
    return Source(f"{folder.name}@{checkpoint}", checkpoint_folder, (checkpoint_folder, folder), checkpoint_folder.name)


def is_gguf_model(name: str | Path) -> bool:
    """Return whether a name stands for one GGUF file, which has no checkpoints.

    Args:
        name: of a model of the catalog, or the path of a file or of a directory with one.
    """
    return (_catalog_entry(name) or _gguf_file(name)) is not None


def gguf_model_name(name: str | Path) -> str:
    """Return the name of a GGUF model: as in the catalog, else that of its directory, or of its file without suffix.

    Args:
        name: of a model of the catalog, or a path.
    """
    path = Path(os.path.abspath(Path(name).expanduser()))
    return str(name) if str(name) in CATALOG else path.name if path.is_dir() else path.stem


def local_folder(name: str | Path) -> Path | None:
    """Return the directory of a shipped model or of the user's own.

    Args:
        name: of a model, or a path.

    Returns:
        The directory; None for a name that is in the catalog or can only be a hub id.

    Raises:
        ModelError: the name is a path without a directory.
    """
    if shipped := shipped_model_folder(name):
        return shipped
    if str(name) in CATALOG:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return Path(os.path.abspath(path))
    lowered = str(name).lower()
    looks_like_a_path = isinstance(name, Path) or lowered.startswith((".", "/", "~")) or len(path.parts) > 2
    looks_like_a_path = looks_like_a_path or lowered.endswith(".gguf")
    if path.exists() or looks_like_a_path:
        existing = "a file" if path.exists() else "nothing"
        raise ModelError(
            f"{str(name)!r}: expected a directory with config.json and safetensors weights, or a GGUF file, "
            f"found {existing}"
        )
    return None


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Return the directories of a run's checkpoints by training step, in order of steps.

    Args:
        folder: of the run.
    """
    labelled = _model_folders_in(folder)
    return {step: labelled[label] for step, label in labels_by_step(labelled).items()}


def _converted_source(name: str, converted: ConvertedModel) -> Source:
    return Source(name, converted.folder, (converted.folder,), quantisation=converted.quantisation)


def _catalog_entry(name: str | Path) -> NamedModel | None:
    return None if shipped_model_folder(name) else CATALOG.get(str(name))


def _gguf_file(name: str | Path) -> Path | None:
    """The GGUF file at a path: the file itself, or the only one in a directory."""
    if shipped_model_folder(name) or str(name) in CATALOG:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return gguf_file_in(path)
    return Path(os.path.abspath(path)) if is_gguf(path) else None


def _tokenizer_folders(folder: Path) -> tuple[Path, ...]:
    """Where to look for a tokenizer: the checkpoint's own directory, then that of its run."""
    if not STEP.fullmatch(folder.name):
        return (folder,)
    return (folder, folder.parent.parent if folder.parent.name == "trace" else folder.parent)


def _model_folders_in(folder: Path) -> dict[str, Path]:
    """The directories in a run that hold a model, by name: checkpoints, with a step in their names or without."""
    configs = [*folder.glob("trace/*/config.json"), *folder.glob("*/config.json")]
    return {config.parent.name: config.parent for config in configs}


def _find_checkpoint(folder: Path, checkpoint: int | str) -> Path:
    labelled, steps, label = _model_folders_in(folder), checkpoint_folders(folder), parse_label(checkpoint)
    if checkpoint in labelled:
        return labelled[str(checkpoint)]
    # A label that names a stage must not select the same step of another stage.
    if label is not None and label.stage == 0 and label.step in steps:
        return steps[label.step]
    if not steps:
        raise ModelError(
            f"{folder.name} has no checkpoints; expected directories such as trace/step-000123 or checkpoint-123 in "
            f"{folder}"
        )
    raise ModelError(f"{folder.name} has no checkpoint {checkpoint!r}; it has those of steps {listing(sorted(steps))}")
