"""Which files a model's name stands for, and whether they hold a causal language model, before any weight is read.

1. Look the name up: a shipped model, one of the catalog (fetched on first use), the caller's own directory or GGUF
   file, or the hub's snapshot (from the local cache when offline). GGUF files are converted once (gguf.py).
2. Find the checkpoint in it, if one is asked for.
3. Check it before anything heavy: config, weights as safetensors, a causal mask.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from p0circuit.io import data_dir
from p0circuit.models.catalog import CATALOG, NamedModel
from p0circuit.models.checkpoints import STEP, by_step, parse_label
from p0circuit.models.download import fetch, is_fetched, sha256_of
from p0circuit.models.gguf import Converted, converted, gguf_file_in, is_gguf, read_sidecar
from p0circuit.models.info import ModelError

# The models whose weights are constructed (wired.py), by the position schemes they come in.
CONSTRUCTED_MODELS = {
    "wired": ("wired_model", "rotary"),
    "wired-learned": ("wired_model", "learned"),
    "wired-decoy": ("decoy_model", "rotary"),
    "wired-decoy-learned": ("decoy_model", "learned"),
    "wired-two-stages": ("two_stages_model", "rotary"),
}
_CONSTRUCTED = {
    "wired": (455_648, "A sink circuit built weight by weight, so that the truth about it is known"),
    "wired-learned": (496_608, "The same circuit with learned positions in place of rotary ones"),
    "wired-decoy": (455_648, "A decoy: P0 has a large norm, and no head attends to it"),
    "wired-decoy-learned": (496_608, "The decoy with learned positions in place of rotary ones"),
}
"""Number of parameters and description of each constructed model."""
_HUB_FILES = (
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


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with the package: its name, its number of parameters and the steps of its checkpoints."""

    name: str
    parameters: int
    checkpoints: tuple[int, ...]


@dataclass(frozen=True)
class KnownModel:
    """A model that can be loaded by a short name, as `p0circuit models` lists it.

    Attributes:
        name: what to call it.
        status: "shipped" with the package, "constructed" by its code, "fetched" into the cache folder, or "fetchable"
            by `p0circuit fetch`.
        parameters: the number of weights.
        quantisation: how they were rounded before they came here; None for plain weights.
        checkpoints: the training steps it keeps.
        licence: of the weights.
        description: what it is, in one line.
    """

    name: str
    status: Literal["shipped", "constructed", "fetched", "fetchable"]
    parameters: int
    quantisation: str | None
    checkpoints: tuple[int, ...]
    licence: str
    description: str


@dataclass(frozen=True)
class Source:
    """A resolved model: the folder to read, where its tokenizer may lie, what to call it, and its checkpoint's name.

    `quantisation` is how its weights were rounded before they came here, as in "Q4_1"; None for plain weights.
    """

    name: str
    folder: Path
    tokenizers: tuple[Path, ...]
    label: str | None = None
    quantisation: str | None = None


def list_models() -> list[ShippedModel]:
    """The models that come with the package, by name."""
    folders = sorted((data_dir() / "models").glob("*/config.json"))
    return [
        ShippedModel(path.parent.name, count_parameters(path.parent), tuple(checkpoint_folders(path.parent)))
        for path in folders
    ]


def known_models() -> list[KnownModel]:
    """List the models that can be loaded by a short name: shipped, constructed, then those of the catalog."""
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


def _first_sentence(shipped: str) -> str:
    """Of a shipped model's card, up to what it says after a colon or a comma; empty where there is no card."""
    path = data_dir() / "models" / shipped / "README.md"
    if not path.is_file():
        return ""
    paragraphs = path.read_text().split("\n\n")
    text = next((part for part in paragraphs if part and part[0] not in "-#|"), "")
    return re.split(r"[.:](?:\s|$)", " ".join(text.split()))[0]


def list_checkpoints(source: str | Path) -> list[int]:
    """The training steps a shipped model, directory or hub id keeps checkpoints of, in order.

    Of a model trained in stages, which count their steps anew, they are those of the first stage.

    Raises:
        ModelError: if there is no such model.
    """
    if is_gguf_model(source):
        return []
    folder = local_folder(source)
    if folder is not None:
        return list(checkpoint_folders(folder))
    return list(by_step(_hub_revisions(hub_id_of(str(source)))))


def resolve(name: str | Path, checkpoint: int | str | None) -> Source:
    """The files of a model and of its checkpoint; what has to be fetched or converted for that is.

    Raises:
        ModelError: there is no such model or checkpoint, or it cannot be had.
    """
    entry, file = _catalog_entry(name), _gguf_file(name)
    if (entry or file) and checkpoint is not None:
        raise ModelError(f"{name} is one GGUF file: it has no checkpoint {checkpoint!r}")
    if entry is not None:
        return _from_gguf(entry.name, converted(entry.name, entry.sha256, partial(fetch, entry)))
    if file is not None:
        called = gguf_model_name(name)
        return _from_gguf(called, converted(called, sha256_of(file), lambda: file))
    folder = local_folder(name)
    if folder is None:
        return _from_hub(str(name), checkpoint)
    if checkpoint is None:
        about = read_sidecar(folder)
        return Source(folder.name, folder, _tokenizer_folders(folder), None, about.quantisation if about else None)
    chosen = _find_checkpoint(folder, checkpoint)
    return Source(f"{folder.name}@{checkpoint}", chosen, (chosen, folder), chosen.name)


def _from_gguf(name: str, made: Converted) -> Source:
    return Source(name, made.folder, (made.folder,), None, made.quantisation)


def _catalog_entry(name: str | Path) -> NamedModel | None:
    return None if _shipped_folder(name) else CATALOG.get(str(name))


def _gguf_file(name: str | Path) -> Path | None:
    """The GGUF file that a path means, itself or as the only one in a directory."""
    if _shipped_folder(name) or str(name) in CATALOG:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return gguf_file_in(path)
    return Path(os.path.abspath(path)) if is_gguf(path) else None


def is_gguf_model(name: str | Path) -> bool:
    """Whether a name stands for one GGUF file, of the catalog or the caller's own."""
    return (_catalog_entry(name) or _gguf_file(name)) is not None


def gguf_model_name(name: str | Path) -> str:
    """What the model of a GGUF file is called: as in the catalog, else after its directory or file."""
    path = Path(os.path.abspath(Path(name).expanduser()))
    return str(name) if str(name) in CATALOG else path.name if path.is_dir() else path.stem


def _shipped_folder(name: str | Path) -> Path | None:
    folder = data_dir() / "models" / name
    return folder if len(Path(name).parts) == 1 and (folder / "config.json").is_file() else None


def local_folder(name: str | Path) -> Path | None:
    """The folder of a shipped model or of the caller's own, None for what can only be a hub id or in the catalog."""
    if shipped := _shipped_folder(name):
        return shipped
    if str(name) in CATALOG:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return Path(os.path.abspath(path))
    named = str(name).lower()
    looks_like_a_path = isinstance(name, Path) or named.startswith((".", "/", "~")) or len(path.parts) > 2
    looks_like_a_path = looks_like_a_path or named.endswith(".gguf")
    if path.exists() or looks_like_a_path:
        found = "a file" if path.exists() else "nothing"
        raise ModelError(
            f"{str(name)!r}: expected a directory with config.json and safetensors weights, or a GGUF file, "
            f"found {found}"
        )
    return None


def _tokenizer_folders(folder: Path) -> tuple[Path, ...]:
    """Where to look for a tokenizer: a checkpoint's own folder, then that of the run it belongs to."""
    if not STEP.fullmatch(folder.name):
        return (folder,)
    return (folder, folder.parent.parent if folder.parent.name == "trace" else folder.parent)


def _labelled(folder: Path) -> dict[str, Path]:
    """The directories in a run that hold a model, by name: checkpoints, with a step in their names or without."""
    found = [*folder.glob("trace/*/config.json"), *folder.glob("*/config.json")]
    return {config.parent.name: config.parent for config in found}


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    labelled = _labelled(folder)
    return {step: labelled[label] for step, label in by_step(labelled).items()}


def _find_checkpoint(folder: Path, checkpoint: int | str) -> Path:
    labelled, steps, told = _labelled(folder), checkpoint_folders(folder), parse_label(checkpoint)
    if checkpoint in labelled:
        return labelled[str(checkpoint)]
    # A stage that is named is not to be another's step of that number.
    if told is not None and told.stage == 0 and told.step in steps:
        return steps[told.step]
    if not steps:
        raise ModelError(
            f"{folder.name} keeps no checkpoints (none of trace/step-000123 or checkpoint-123 in {folder})"
        )
    raise ModelError(f"{folder.name} has no checkpoint {checkpoint!r}; it keeps those of steps {listed(sorted(steps))}")


def _from_hub(name: str, checkpoint: int | str | None) -> Source:
    from huggingface_hub import errors, snapshot_download

    hub_id = hub_id_of(name)
    revision = revision_of(hub_id, checkpoint)
    label = hub_id if checkpoint is None else f"{hub_id}@{checkpoint}"
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_HUB_FILES)))
    except errors.RevisionNotFoundError:
        found = _hub_revisions(hub_id)
        kept = listed(list(by_step(found)) or found)
        raise ModelError(f"{hub_id} has no checkpoint {checkpoint!r}; it keeps {kept}") from None
    except errors.GatedRepoError:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"unknown model {name!r}: {_near(name)}") from None
    except OSError as error:
        if revision is not None and (found := _cached_revisions(hub_id)):
            raise ModelError(
                f"{hub_id} at {revision!r} is not in the local cache, and the hub cannot be reached; "
                f"cached are {listed(found)}"
            ) from error
        raise ModelError(
            f"unknown model {name!r}: no shipped model or directory, {hub_id!r} is not in the local cache, "
            f"and the hub cannot be reached; {_near(name)}"
        ) from error
    return Source(label, folder, (folder,), revision)


def revision_of(hub_id: str, checkpoint: int | str | None) -> str | None:
    """The hub's name for a checkpoint: what it is called there if it was given by its step, else as it was given."""
    if checkpoint is None or not str(checkpoint).isdecimal():
        return None if checkpoint is None else str(checkpoint)
    return by_step(_hub_revisions(hub_id)).get(int(checkpoint), f"step{checkpoint}")


def hub_id_of(name: str) -> str:
    """The hub id behind one of TransformerLens's short names, and any other name as it is."""
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((hub_id for hub_id, short in MODEL_ALIASES.items() if name in short), name)


def _hub_revisions(hub_id: str) -> list[str]:
    from huggingface_hub import HfApi, errors

    try:
        refs = HfApi().list_repo_refs(hub_id)
        return [ref.name for ref in [*refs.branches, *refs.tags]]
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"unknown model {hub_id!r}: {_near(hub_id)}") from None
    except Exception as error:
        # No network, in whatever words the hub's client has for it.
        if found := _cached_revisions(hub_id):
            return found
        raise ModelError(
            f"{hub_id!r} is not in the local cache, and the hub cannot be reached; {_near(hub_id)}"
        ) from error


def _cached_revisions(hub_id: str) -> list[str]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "refs"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _near(name: str) -> str:
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    shipped = [*(model.name for model in list_models()), *CONSTRUCTED_MODELS]
    known = {*shipped, *CATALOG, *OFFICIAL_MODEL_NAMES, *(short for names in MODEL_ALIASES.values() for short in names)}
    lowered = {candidate.lower(): candidate for candidate in sorted(known)}
    # A name of the hub may be right, and only out of reach.
    near = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=4) if lowered[key] != name]
    near = [] if name in known else near
    return f"did you mean {listed(near)}?" if near else f"shipped are {listed(shipped) or 'none'}"


def listed(items: list[Any], most: int = 200) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"


def check_folder(source: Source) -> Any:
    """Read the config, having made sure that the folder is whole and holds a causal language model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (source.folder / "config.json").is_file():
        raise ModelError(
            f"{source.name}: no config.json in {source.folder}; expected a Hugging Face model directory, or "
            "one GGUF file in it"
        )
    _check_weight_files(source)
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{source.name}: config.json cannot be used ({error}); code from model folders is not run"
        ) from error
    _check_causal_config(source, config)
    return config


def damaged(source: Source, error: Exception | str) -> ModelError:
    return ModelError(f"{source.name}: a weight file in {source.folder} is damaged: {error}; get it again")


def _check_weight_files(source: Source) -> None:
    folder = source.folder
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(source, f"{index.name} is no JSON with a weight_map ({error!r})") from None
        if absent:
            raise ModelError(f"{source.name}: weight files missing in {folder}: {listed(absent)}")
        return
    if (folder / "model.safetensors").is_file():
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if pickles:
        raise ModelError(
            f"{source.name}: the weights in {folder} are pickled ({listed(pickles)}), and loading a pickle can run "
            "any code. If you trust them, convert them once: transformers.AutoModelForCausalLM.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(folder) writes model.safetensors beside them"
        )
    raise ModelError(
        f"{source.name}: no weights in {folder}; expected model.safetensors or its shards with their index"
    )


def _check_causal_config(source: Source, config: Any) -> None:
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architecture = (config.architectures or [causal.get(config.model_type)])[0]
    encoder = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False) or architecture not in causal.values() or encoder:
        raise ModelError(
            f"{source.name} is a {architecture or config.model_type}, not a causal language model: without a causal "
            "mask no position is first"
        )


def count_parameters(folder: Path) -> int:
    """The number of weights, from the headers of the files alone."""
    from math import prod

    return sum(prod(shape) for shape in stored_shapes(folder).values())


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of every weight by its name in the files, from their headers alone."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return shapes
