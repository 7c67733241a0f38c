"""Metadata of a stored model, read without loading its weights."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p0circuit.models.errors import ModelError
from p0circuit.models.hf_loading import load_tokenizer
from p0circuit.models.model_files import read_config
from p0circuit.models.source import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StoredModel:
    """Metadata of a stored model.

    Attributes:
        name: what `describe` calls the loaded model.
        label: the name of the checkpoint's directory, or the revision on the hub; None where none was asked for.
        folders: the directory of its files, then that of its run if it is a checkpoint.
        tokenizer: of the model; None where there is none.
        vocab_size: number of token ids that its embedding has.
        fingerprint: a hash of its config and weight files; for a snapshot of the hub the hash of its commit.
        quantisation: how the weights were rounded before they were stored, such as "Q4_1"; None if they were not.
    """

    name: str
    label: str | None
    folders: tuple[Path, ...]
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    fingerprint: str
    quantisation: str | None = None


def stored_model(name: str | Path, checkpoint: int | str | None = None) -> StoredModel:
    """Read the metadata of a stored model; its weights are not loaded.

    Args:
        name: as for `load_model`.
        checkpoint: as for `load_model`.

    Raises:
        ModelError: there is no such model or checkpoint, or its files are incomplete.

    Example:
        ```python
        assert stored_model("p0-nano").label is None
        ```
    """
    source = resolve(name, checkpoint)
    config = read_config(source.name, source.folder)
    try:
        fingerprint = _files_fingerprint(source.folder)
    except OSError as error:
        # A training run deletes its oldest checkpoints.
        raise ModelError(f"{source.name}: a file in {source.folder} was deleted or cannot be read: {error}") from error
    return StoredModel(
        name=source.name,
        label=source.label,
        folders=source.tokenizer_folders,
        tokenizer=load_tokenizer(source),
        vocab_size=config.get_text_config().vocab_size,
        fingerprint=fingerprint,
        quantisation=source.quantisation,
    )


def _files_fingerprint(folder: Path) -> str:
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        return folder.name
    files = (folder / "config.json", *sorted(folder.glob("model*.safetensors*")))
    # Hashing one file after the other would take a large model longer than reading it.
    with ThreadPoolExecutor() as pool:
        lines = [f"{path.name} {digest}" for path, digest in zip(files, pool.map(_file_digest, files), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
