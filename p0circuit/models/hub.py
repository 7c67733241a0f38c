"""Models of the Hugging Face hub: snapshots and revisions, from the local cache when the hub cannot be reached."""

from __future__ import annotations

from pathlib import Path

from p0circuit.models.checkpoints import labels_by_step
from p0circuit.models.errors import ModelError, listing
from p0circuit.models.names import hub_id_of, suggestion_for

_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.*",
    "merges.txt",
)


def snapshot(name: str, checkpoint: int | str | None) -> tuple[Path, str | None]:
    """Return the directory of a model's files, downloaded if they are not in the local cache.

    Args:
        name: a hub id, or one of TransformerLens's short names.
        checkpoint: a training step, or a revision; None for the default revision.

    Returns:
        The directory, and the revision that was asked for.

    Raises:
        ModelError: there is no such model or checkpoint, it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    hub_id = hub_id_of(name)
    revision = revision_of(hub_id, checkpoint)
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_FILES))), revision
    except errors.RevisionNotFoundError:
        revisions = hub_revisions(hub_id)
        known = listing(list(labels_by_step(revisions)) or revisions)
        raise ModelError(f"{hub_id} has no checkpoint {checkpoint!r}; it has {known}") from None
    except errors.GatedRepoError:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"unknown model {name!r}: {suggestion_for(name)}") from None
    except OSError as error:
        if revision is not None and (cached := _cached_revisions(hub_id)):
            raise ModelError(
                f"{hub_id} at {revision!r} is not in the local cache, and the hub cannot be reached; "
                f"cached are {listing(cached)}"
            ) from error
        raise ModelError(
            f"unknown model {name!r}: no shipped model or directory, {hub_id!r} is not in the local cache, "
            f"and the hub cannot be reached; {suggestion_for(name)}"
        ) from error


def revision_of(hub_id: str, checkpoint: int | str | None) -> str | None:
    """Return the revision that holds a checkpoint.

    Args:
        hub_id: of the model.
        checkpoint: a training step, or a revision; None for the default revision.

    Returns:
        For a step, the revision whose name contains it; a revision is returned as it is.
    """
    if checkpoint is None or not str(checkpoint).isdecimal():
        return None if checkpoint is None else str(checkpoint)
    return labels_by_step(hub_revisions(hub_id)).get(int(checkpoint), f"step{checkpoint}")


def hub_revisions(hub_id: str) -> list[str]:
    """Return the branches and tags of a model on the hub; those in the local cache if the hub cannot be reached.

    Args:
        hub_id: of the model.

    Raises:
        ModelError: there is no such model, or it is not in the local cache and the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    try:
        refs = HfApi().list_repo_refs(hub_id)
        return [ref.name for ref in [*refs.branches, *refs.tags]]
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"unknown model {hub_id!r}: {suggestion_for(hub_id)}") from None
    except Exception as error:
        # Without a network the hub's client raises errors of many types.
        if cached := _cached_revisions(hub_id):
            return cached
        raise ModelError(
            f"{hub_id!r} is not in the local cache, and the hub cannot be reached; {suggestion_for(hub_id)}"
        ) from error


def _cached_revisions(hub_id: str) -> list[str]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "refs"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
