"""The names of models: shipped, constructed, of the catalog and of the hub, and the nearest ones to a misspelt name."""

from __future__ import annotations

import difflib
from pathlib import Path

from p0circuit.io import data_dir
from p0circuit.models.catalog import CATALOG
from p0circuit.models.errors import listing
from p0circuit.models.info import Positions

CONSTRUCTED_MODELS: dict[str, tuple[str, Positions]] = {
    "wired": ("wired_model", "rotary"),
    "wired-learned": ("wired_model", "learned"),
    "wired-decoy": ("decoy_model", "rotary"),
    "wired-decoy-learned": ("decoy_model", "learned"),
    "wired-two-stages": ("two_stages_model", "rotary"),
}
"""The models with constructed weights: the function that builds them, and their position scheme."""


def shipped_model_folders() -> list[Path]:
    """Return the directories of the models that come with the package, sorted by name."""
    return [path.parent for path in sorted((data_dir() / "models").glob("*/config.json"))]


def shipped_model_folder(name: str | Path) -> Path | None:
    """Return the directory of a model that comes with the package; None if no model has this name.

    Args:
        name: of a model.
    """
    folder = data_dir() / "models" / name
    return folder if len(Path(name).parts) == 1 and (folder / "config.json").is_file() else None


def hub_id_of(name: str) -> str:
    """Return the hub id that one of TransformerLens's short names stands for; any other name is returned as it is.

    Args:
        name: such as "pythia-70m".
    """
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((hub_id for hub_id, short in MODEL_ALIASES.items() if name in short), name)


def suggestion_for(name: str) -> str:
    """Return the end of an error message about an unknown model: similar names, or the shipped ones.

    Args:
        name: that no model has.
    """
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    shipped = [*(folder.name for folder in shipped_model_folders()), *CONSTRUCTED_MODELS]
    known = {*shipped, *CATALOG, *OFFICIAL_MODEL_NAMES, *(short for names in MODEL_ALIASES.values() for short in names)}
    lowered = {candidate.lower(): candidate for candidate in sorted(known)}
    # A name of the hub can be right although the hub cannot be reached: it has no similar names then.
    keys = [] if name in known else difflib.get_close_matches(name.lower(), lowered, n=4)
    similar = [lowered[key] for key in keys]
    return f"did you mean {listing(similar)}?" if similar else f"shipped are {listing(shipped) or 'none'}"
