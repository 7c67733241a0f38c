"""List the models that can be loaded by a short name, and the checkpoints of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p0circuit.models.catalog import CATALOG
from p0circuit.models.checkpoints import labels_by_step
from p0circuit.models.download import is_fetched
from p0circuit.models.hub import hub_revisions
from p0circuit.models.model_files import count_parameters
from p0circuit.models.names import hub_id_of, shipped_model_folder, shipped_model_folders
from p0circuit.models.source import checkpoint_folders, is_gguf_model, local_folder

_CONSTRUCTED = {
    "wired": (455_648, "A sink circuit built weight by weight, so that the truth about it is known"),
    "wired-learned": (496_608, "The same circuit with learned positions in place of rotary ones"),
    "wired-decoy": (455_648, "A decoy: P0 has a large norm, and no head attends to it"),
    "wired-decoy-learned": (496_608, "The decoy with learned positions in place of rotary ones"),
    "wired-two-stages": (890_432, "Two such circuits, one after the other: a neuron erases the first"),
}
"""Number of parameters and description of each constructed model."""


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with the package.

    Attributes:
        name: what `load_model` calls it.
        parameters: the number of weights.
        checkpoints: the training steps of its checkpoints.
    """

    name: str
    parameters: int
    checkpoints: tuple[int, ...]


@dataclass(frozen=True)
class KnownModel:
    """A model that can be loaded by a short name, as `p0circuit models` lists it.

    Attributes:
        name: what `load_model` calls it.
        status: "shipped" with the package, "constructed" by its code, "fetched" into the cache folder, or "fetchable"
            by `p0circuit fetch`.
        parameters: the number of weights.
        quantisation: how the weights were rounded before they were stored; None if they were not.
        checkpoints: the training steps of its checkpoints.
        licence: of the weights.
        description: one line.
    """

    name: str
    status: Literal["shipped", "constructed", "fetched", "fetchable"]
    parameters: int
    quantisation: str | None
    checkpoints: tuple[int, ...]
    licence: str
    description: str


def list_models() -> list[ShippedModel]:
    """Return the models that come with the package, sorted by name."""
    return [
        ShippedModel(folder.name, count_parameters(folder), tuple(checkpoint_folders(folder)))
        for folder in shipped_model_folders()
    ]


def known_models() -> list[KnownModel]:
    """Return the models that can be loaded by a short name: shipped, constructed, then those of the catalog."""
    shipped = [
        KnownModel(model.name, "shipped", model.parameters, None, model.checkpoints, "MIT", _first_sentence(model.name))
        for model in list_models()
    ]
    constructed = [
        KnownModel(name, "constructed", parameters, None, (), "MIT", description)
        for name, (parameters, description) in _CONSTRUCTED.items()
    ]
    named = [
        KnownModel(
            entry.name,
            "fetched" if is_fetched(entry) else "fetchable",
            entry.parameters,
            entry.quantisation,
            (),
            entry.licence,
            entry.title,
        )
        for entry in CATALOG.values()
    ]
    return shipped + constructed + named


def list_checkpoints(source: str | Path) -> list[int]:
    """Return the training steps of a model's checkpoints, in order.

    A training in stages counts its steps anew in each stage; those of the first stage are returned.

    Args:
        source: the name of a shipped model, a directory or a hub id.

    Raises:
        ModelError: there is no such model.
    """
    if is_gguf_model(source):
        return []
    folder = local_folder(source)
    if folder is not None:
        return list(checkpoint_folders(folder))
    return list(labels_by_step(hub_revisions(hub_id_of(str(source)))))


def _first_sentence(name: str) -> str:
    """The first sentence of a shipped model's card, up to a colon; empty where there is no card."""
    folder = shipped_model_folder(name)
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return ""
    paragraphs = path.read_text().split("\n\n")
    text = next((part for part in paragraphs if part and part[0] not in "-#|"), "")
    return re.split(r"[.:](?:\s|$)", " ".join(text.split()))[0]
