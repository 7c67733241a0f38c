"""Load a model by name, directory or hub id as a raw hooked model: nothing folded, nothing centred, in eval mode.

1. Find the directory: a shipped model's, the caller's own, or the hub's snapshot (from the local cache when offline).
2. Find the checkpoint in it, if one is asked for.
3. Check it before anything heavy: config, weights as safetensors, a causal mask.
4. Load it with `transformers` (eager attention), check the weights, and hand it to a TransformerLens class. With a
   device map (device_map.py) the weights go to several places, and the class is TransformerBridge.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.models.info import ModelError
from p0circuit.models.labels import STEP, by_step, parse_label
from p0circuit.paths import data_dir

if TYPE_CHECKING:
    from p0circuit.models.device_map import DeviceMap, Plan

Backend = Literal["auto", "hooked", "bridge"]

# The models whose weights are constructed (wired.py), by the position schemes they come in.
_WIRED = {
    "wired": ("wired_model", "rotary"),
    "wired-learned": ("wired_model", "learned"),
    "wired-decoy": ("decoy_model", "rotary"),
    "wired-decoy-learned": ("decoy_model", "learned"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
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
class StoredModel:
    """A model as its files tell of it, its weights unread.

    Attributes:
        name: as `describe` gives it.
        label: the name of the checkpoint: its directory's, or the hub's revision; None where none was asked for.
        folders: its own directory, then that of the run it belongs to, if it is a checkpoint.
        tokenizer: None where there is none.
        vocab_size: of its embedding.
        fingerprint: a hash of its config and weight files; a commit of the hub stands for the files in it.
    """

    name: str
    label: str | None
    folders: tuple[Path, ...]
    tokenizer: Any
    vocab_size: int
    fingerprint: str


@dataclass(frozen=True)
class _Source:
    """A resolved model: the folder to read, where its tokenizer may lie, what to call it, and its checkpoint's name."""

    name: str
    folder: Path
    tokenizers: tuple[Path, ...]
    label: str | None = None


def load_model(
    name: str | Path,
    backend: Backend = "auto",
    checkpoint: int | str | None = None,
    device: Any = None,
    dtype: Any = None,
    layers: int | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """Load a shipped model by name, a local Hugging Face directory, or a hub id, as a raw hooked model in eval mode.

    A name is looked up in this order; `wired`, `wired-learned`, `wired-decoy` and `wired-decoy-learned` are the models
    of wired.py, and TransformerLens's short names (`pythia-70m`) stand for the hub ids they mean.
    `checkpoint` is a training step, or the label or hub revision that names it. `backend` "auto" is HookedTransformer
    for the families it computes exactly and TransformerBridge for everything else. `device` defaults to CUDA where
    there is one and the CPU otherwise, `dtype` to float32 whatever the file holds. `layers` loads the first blocks
    alone, for a model that is too large whole: what happens in them is the same, what the model predicts is not.

    `device_map` spreads the weights: "auto" over all GPUs, then CPU memory, then the disk; "cpu" and "disk" let the
    blocks wait there and bring one at a time to `device`; or the place of each module, as `accelerate` has it. What has
    to be written on disk goes into `offload_folder` (the cache folder if not given) and is removed with the model.

    Raises:
        ModelError: for whatever cannot be loaded right; the message says what was found, what was expected, and how
            to mend it.
    """
    import torch

    _check_arguments(name, backend, dtype, device_map)
    if str(name) in _WIRED:
        return _wired(str(name), backend, checkpoint, device, dtype)
    from p0circuit.models.changes import change_hooked, changed

    source = _resolve(name, checkpoint)
    config = _check_folder(source)
    share = 1.0
    if layers is not None:
        share = layers / config.get_text_config().num_hidden_layers
        source = _truncate(source, config, layers)
    dtype = torch.float32 if dtype is None else dtype
    if device_map is not None:
        return _load_placed(source, config, device_map, device, dtype, offload_folder)
    _check_memory(source, share, _device(device), dtype)
    tokenizer = _load_tokenizer(source)
    hf = _load_hf(source, config, dtype, _device(device))
    changes, gates = _changes(source, hf, _device(device))
    # Before wrapping: a bridge puts itself into the model it wraps.
    with changed(hf, changes, gates):
        logits = _causal_logits(source, hf, _device(device))

    from p0circuit.models.bridge import to_bridge
    from p0circuit.models.hooked import FAMILIES, available, to_hooked

    if backend == "hooked" and not available():
        raise ModelError("this TransformerLens has no HookedTransformer any more; use backend='bridge'")
    if backend == "hooked" or (backend == "auto" and available() and type(hf).__name__ in FAMILIES):
        try:
            return _checked(change_hooked(to_hooked(hf, source.name, tokenizer), changes, gates), logits)
        except ModelError as error:
            if backend == "hooked":
                raise
            logging.getLogger(__name__).info("%s; using TransformerBridge", error)
    return _checked(change_hooked(to_bridge(hf, source.name, tokenizer), changes, gates), logits)


def plan_model(
    name: str | Path,
    device_map: DeviceMap | None,
    checkpoint: int | str | None = None,
    device: Any = None,
    dtype: Any = None,
    layers: int | None = None,
    offload_folder: str | Path | None = None,
) -> Plan:
    """Where `load_model` would put the weights, and what that takes, before anything is loaded.

    Raises:
        ModelError: as `load_model` does.
    """
    import torch

    _check_arguments(name, "auto", dtype, device_map)
    source = _resolve(name, checkpoint)
    config = _check_folder(source)
    if layers is not None:
        source = _truncate(source, config, layers)
    return _plan(source, config, device_map, device, torch.float32 if dtype is None else dtype, offload_folder)


def stored_model(name: str | Path, checkpoint: int | str | None = None) -> StoredModel:
    """What the files of a model say about it, without its weights being read; arguments as for `load_model`.

    Raises:
        ModelError: there is no such model or checkpoint, or its files are not whole.
    """
    source = _resolve(name, checkpoint)
    config = _check_folder(source)
    try:
        fingerprint = _files_fingerprint(source.folder)
    except OSError as error:
        # A run under way deletes its oldest checkpoints.
        raise ModelError(f"{source.name}: a file in {source.folder} went or cannot be read: {error}") from error
    return StoredModel(
        source.name,
        source.label,
        source.tokenizers,
        _load_tokenizer(source),
        config.get_text_config().vocab_size,
        fingerprint,
    )


def _files_fingerprint(folder: Path) -> str:
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        return folder.name
    files = (folder / "config.json", *sorted(folder.glob("model*.safetensors*")))
    # Hashing one file after the other would take a large model longer than reading it.
    with ThreadPoolExecutor() as pool:
        found = [f"{path.name} {digest}" for path, digest in zip(files, pool.map(_file_digest, files), strict=True)]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _check_arguments(name: str | Path, backend: Backend, dtype: Any, device_map: DeviceMap | None) -> None:
    import torch

    if backend not in ("auto", "hooked", "bridge"):
        raise ModelError(f"backend must be 'auto', 'hooked' or 'bridge', got {backend!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(f"expected a floating-point dtype such as torch.bfloat16, got {dtype!r}")
    if device_map is not None and backend == "hooked":
        raise ModelError("a HookedTransformer has its weights in one place; with a device map use backend='bridge'")
    if device_map is not None and str(name) in _WIRED:
        raise ModelError(f"{name} is constructed where it is used, and small: it takes no device map")


def _plan(
    source: _Source, config: Any, device_map: DeviceMap | None, device: Any, dtype: Any, folder: str | Path | None
) -> Plan:
    import torch
    from safetensors import SafetensorError

    from p0circuit.models.device_map import free_by_place, offload_parent, plan

    chosen = _device(device)
    # A device that was asked for is the only one to be used.
    every = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    gpus = [] if chosen.type != "cuda" else every if device is None else [torch.device("cuda", chosen.index or 0)]
    free = free_by_place(gpus, offload_parent(folder))
    try:
        return plan(config, dtype, device_map, chosen, free, source.name, source.folder)
    except SafetensorError as error:
        raise _damaged(source, error) from None


def _load_placed(
    source: _Source, config: Any, device_map: DeviceMap, device: Any, dtype: Any, folder: str | Path | None
) -> Any:
    """The bridge of a model whose weights are spread by a device map."""
    from p0circuit.models.changes import change_hooked, changed
    from p0circuit.models.device_map import new_folder, offload_parent, to_placed_bridge

    planned = _plan(source, config, device_map, device, dtype, folder)
    tokenizer = _load_tokenizer(source)
    to_disk = "disk" in planned.weights
    with new_folder(offload_parent(folder)) if to_disk else contextlib.nullcontext() as place:
        hf = _load_hf(source, config, dtype, planned.device, planned, place)
        changes, gates = _changes(source, hf, planned.device)
        with changed(hf, changes, gates):
            logits = _causal_logits(source, hf, planned.device)
        return _checked(change_hooked(to_placed_bridge(hf, tokenizer, planned, place), changes, gates), logits)


def _wired(name: str, backend: Backend, checkpoint: int | str | None, device: Any, dtype: Any) -> Any:
    """One of the models whose weights are constructed."""
    import torch

    from p0circuit.models import wired

    if checkpoint is not None:
        raise ModelError(f"{name} is constructed, not trained: it has no checkpoint {checkpoint!r}")
    build, positions = _WIRED[name]
    return getattr(wired, build)(positions, backend=backend, dtype=dtype or torch.float32, device=_device(device))


def _device(device: Any) -> Any:
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def list_models() -> list[ShippedModel]:
    """The models that come with the package, by name."""
    folders = sorted((data_dir() / "models").glob("*/config.json"))
    return [
        ShippedModel(path.parent.name, _count_parameters(path.parent), tuple(_checkpoints(path.parent)))
        for path in folders
    ]


def list_checkpoints(source: str | Path) -> list[int]:
    """The training steps a shipped model, directory or hub id keeps checkpoints of, in order.

    Of a model trained in stages, which count their steps anew, they are those of the first stage.

    Raises:
        ModelError: if there is no such model.
    """
    folder = local_folder(source)
    if folder is not None:
        return list(_checkpoints(folder))
    return list(by_step(_hub_revisions(_hub_id(str(source)))))


def _resolve(name: str | Path, checkpoint: int | str | None) -> _Source:
    folder = local_folder(name)
    if folder is None:
        return _from_hub(str(name), checkpoint)
    if checkpoint is None:
        return _Source(folder.name, folder, _tokenizer_folders(folder))
    chosen = _find_checkpoint(folder, checkpoint)
    return _Source(f"{folder.name}@{checkpoint}", chosen, (chosen, folder), chosen.name)


def local_folder(name: str | Path) -> Path | None:
    """The folder of a shipped model or of the caller's own, None for what can only be a hub id."""
    shipped = data_dir() / "models" / name
    if len(Path(name).parts) == 1 and (shipped / "config.json").is_file():
        return shipped
    path = Path(name).expanduser()
    if path.is_dir():
        return Path(os.path.abspath(path))
    looks_like_a_path = isinstance(name, Path) or str(name).startswith((".", "/", "~")) or len(path.parts) > 2
    if path.exists() or looks_like_a_path:
        found = "a file" if path.exists() else "nothing"
        raise ModelError(f"{str(name)!r}: expected a directory with config.json and safetensors weights, found {found}")
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


def _checkpoints(folder: Path) -> dict[int, Path]:
    labelled = _labelled(folder)
    return {step: labelled[label] for step, label in by_step(labelled).items()}


def _find_checkpoint(folder: Path, checkpoint: int | str) -> Path:
    labelled, steps, told = _labelled(folder), _checkpoints(folder), parse_label(checkpoint)
    if checkpoint in labelled:
        return labelled[str(checkpoint)]
    # A stage that is named is not to be another's step of that number.
    if told is not None and told.stage == 0 and told.step in steps:
        return steps[told.step]
    if not steps:
        raise ModelError(
            f"{folder.name} keeps no checkpoints (none of trace/step-000123 or checkpoint-123 in {folder})"
        )
    raise ModelError(
        f"{folder.name} has no checkpoint {checkpoint!r}; it keeps those of steps {_listed(sorted(steps))}"
    )


def _from_hub(name: str, checkpoint: int | str | None) -> _Source:
    from huggingface_hub import errors, snapshot_download

    hub_id = _hub_id(name)
    revision = _revision(hub_id, checkpoint)
    label = hub_id if checkpoint is None else f"{hub_id}@{checkpoint}"
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_HUB_FILES)))
    except errors.RevisionNotFoundError:
        found = _hub_revisions(hub_id)
        kept = _listed(list(by_step(found)) or found)
        raise ModelError(f"{hub_id} has no checkpoint {checkpoint!r}; it keeps {kept}") from None
    except errors.GatedRepoError:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"unknown model {name!r}: {_near(name)}") from None
    except OSError as error:
        if revision is not None and (found := _cached_revisions(hub_id)):
            raise ModelError(
                f"{hub_id} at {revision!r} is not in the local cache, and the hub cannot be reached; "
                f"cached are {_listed(found)}"
            ) from error
        raise ModelError(
            f"unknown model {name!r}: no shipped model or directory, {hub_id!r} is not in the local cache, "
            f"and the hub cannot be reached; {_near(name)}"
        ) from error
    return _Source(label, folder, (folder,), revision)


def _revision(hub_id: str, checkpoint: int | str | None) -> str | None:
    """The hub's name for a checkpoint: what it is called there if it was given by its step, else as it was given."""
    if checkpoint is None or not str(checkpoint).isdecimal():
        return None if checkpoint is None else str(checkpoint)
    return by_step(_hub_revisions(hub_id)).get(int(checkpoint), f"step{checkpoint}")


def _hub_id(name: str) -> str:
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

    shipped = [*(model.name for model in list_models()), *_WIRED]
    known = {*shipped, *OFFICIAL_MODEL_NAMES, *(short for names in MODEL_ALIASES.values() for short in names)}
    lowered = {candidate.lower(): candidate for candidate in sorted(known)}
    near = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=4)]
    return f"did you mean {_listed(near)}?" if near else f"shipped are {_listed(shipped) or 'none'}"


def _listed(items: list[Any], most: int = 200) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"


def _check_folder(source: _Source) -> Any:
    """Read the config, having made sure that the folder is whole and holds a causal language model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (source.folder / "config.json").is_file():
        raise ModelError(f"{source.name}: no config.json in {source.folder}; expected a Hugging Face model directory")
    _check_weight_files(source)
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{source.name}: config.json cannot be used ({error}); code from model folders is not run"
        ) from error
    _check_causal_config(source, config)
    return config


def _truncate(source: _Source, config: Any, layers: int) -> _Source:
    """Shorten the config to its first blocks, in place."""
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise ModelError(f"{source.name} has {text.num_hidden_layers} layers; layers={layers} is not among them")
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return replace(source, name=f"{source.name}[:{layers}]")


def _check_memory(source: _Source, share: float, device: Any, dtype: Any) -> None:
    """Refuse what would not fit, before anything heavy; `share` of the blocks will be loaded."""
    from safetensors import SafetensorError

    free = free_memory(device)
    try:
        needed = share * bytes_while_loading(_count_parameters(source.folder), dtype)
    except SafetensorError as error:
        raise _damaged(source, error) from None
    if free is not None and needed > free:
        raise ModelError(
            f"{source.name} needs about {needed / 2**30:.1f} GB on {device} and {free / 2**30:.1f} are free; load it "
            "with a smaller dtype (bfloat16), fewer layers, or on another device"
        )


def _damaged(source: _Source, error: Exception | str) -> ModelError:
    return ModelError(f"{source.name}: a weight file in {source.folder} is damaged: {error}; get it again")


def bytes_while_loading(parameters: int, dtype: Any) -> int:
    """Bytes that weights take at most: HookedTransformer has its own, made beside those of `transformers`."""
    import torch

    return 2 * parameters * torch.finfo(dtype).bits // 8


def free_memory(device: Any) -> int | None:
    """Bytes that can still be had on a device; None where the system does not say."""
    import torch

    if device.type == "cuda":
        # What torch holds without using it can be had too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _check_weight_files(source: _Source) -> None:
    folder = source.folder
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(source, f"{index.name} is no JSON with a weight_map ({error!r})") from None
        if absent:
            raise ModelError(f"{source.name}: weight files missing in {folder}: {_listed(absent)}")
        return
    if (folder / "model.safetensors").is_file():
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if pickles:
        raise ModelError(
            f"{source.name}: the weights in {folder} are pickled ({_listed(pickles)}), and loading a pickle can run "
            "any code. If you trust them, convert them once: transformers.AutoModelForCausalLM.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(folder) writes model.safetensors beside them"
        )
    raise ModelError(
        f"{source.name}: no weights in {folder}; expected model.safetensors or its shards with their index"
    )


def _check_causal_config(source: _Source, config: Any) -> None:
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architecture = (config.architectures or [causal.get(config.model_type)])[0]
    encoder = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False) or architecture not in causal.values() or encoder:
        raise ModelError(
            f"{source.name} is a {architecture or config.model_type}, not a causal language model: without a causal "
            "mask no position is first"
        )


def _load_tokenizer(source: _Source) -> Any:
    """The tokenizer beside the weights, None where there is none: token ids are enough to run a model."""
    from transformers import AutoTokenizer

    for folder in source.tokenizers:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                warnings.warn(f"{source.name}: its tokenizer cannot be read ({error}); use token ids", stacklevel=3)
    return None


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Local weights are read faster than a bar can be looked at."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load_hf(
    source: _Source, config: Any, dtype: Any, device: Any, planned: Plan | None = None, folder: Path | None = None
) -> Any:
    """Load the weights with `transformers`, and make sure that they are all there, finite, and causal."""
    import torch
    from transformers import AutoModelForCausalLM

    from p0circuit.models.changes import Changes
    from p0circuit.models.device_map import let_wait, weights_of, without_warnings

    # Weights that are elsewhere, and experts that no other process shares.
    expected = ["accelerate.big_modeling", "transformers.distributed.tensor_parallel"]
    if Changes.of(config.get_text_config(), source.name).gated_attention:
        # Its gates are no weights that `transformers` knows.
        expected.append("transformers.modeling_utils")
    placed: dict[str, Any] = {}
    if planned is not None:
        placed = {"device_map": planned.places, "offload_folder": folder and str(folder)}
    try:
        with _without_progress_bar(), without_warnings(*expected):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **placed,
            )
        hf, report = loaded
    except Exception as error:
        raise ModelError(f"{source.name}: transformers cannot load the weights in {source.folder}: {error}") from error
    if report["missing_keys"]:
        absent = _listed(sorted(report["missing_keys"]), 6)
        raise ModelError(f"{source.name}: the weight files lack {absent}; they would be random")
    if planned is not None:
        let_wait(hf, planned)
    parameters = {name for name, _ in hf.named_parameters()}
    broken = [name for name, weight in weights_of(hf) if name in parameters and not bool(torch.isfinite(weight).all())]
    if broken:
        raise ModelError(f"{source.name}: NaN or infinite values in {_listed(broken, 6)}; this checkpoint is damaged")
    return (hf if planned is not None else hf.to(device)).eval()


def _changes(source: _Source, hf: Any, device: Any) -> tuple[Any, list[Any]]:
    """What the model's `p0circuit` field changes in its forward pass, and the gates if it has any."""
    from p0circuit.models.changes import Changes, gate_name

    changes, gates = Changes.of(hf.config.get_text_config(), source.name), []
    if changes.gated_attention:
        from safetensors import safe_open

        names = [gate_name(layer) for layer in range(hf.config.num_hidden_layers)]
        with safe_open(source.folder / "model.safetensors", framework="pt", device=str(device)) as file:
            if absent := sorted(set(names) - set(file.keys())):
                raise ModelError(f"{source.name}: the weight file lacks the gates {_listed(absent, 6)}")
            gates = [file.get_tensor(name).to(hf.dtype) for name in names]
    return changes, gates


def _sample(vocab_size: int, device: Any) -> Any:
    """Two rows of five ids that share all but the last."""
    import torch

    ids = torch.arange(5, device=device).repeat(2, 1) * 7 % vocab_size
    ids[1, -1] = (ids[1, -1] + 1) % vocab_size
    return ids


def _causal_logits(source: _Source, hf: Any, device: Any) -> Any:
    """The model's logits on the sample, having seen that the last token changes nothing before it."""
    import torch

    try:
        with torch.no_grad():
            logits = hf(_sample(hf.config.get_text_config().vocab_size, device)).logits.float()
    except Exception as error:
        raise ModelError(f"{source.name}: transformers cannot run it, its config.json may be wrong: {error}") from error
    if not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=0, atol=1e-3 * float(logits.abs().max())):
        raise ModelError(f"{source.name} has no causal mask: a later token changes what stands before it")
    return logits


_OTHER = "try the other backend or another version of TransformerLens"


def _checked(model: Any, expected: Any) -> Any:
    """The model, if it gives the logits that `transformers` gave."""
    import torch

    from p0circuit.models.forward import forward, hook_point

    kind = f"{model.cfg.model_name}: {type(model).__name__}"
    try:
        with torch.no_grad():
            # Looks at the hook points, and mends a bridge's, before the logits are compared.
            hook_point(model, "blocks.0.hook_resid_pre")
            logits = forward(model, _sample(model.cfg.d_vocab, model.cfg.device)).float()
    except Exception as error:
        raise ModelError(f"{kind} cannot run it ({error}); {_OTHER}") from error
    tolerance = 1e-3 if model.cfg.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((logits - expected).abs().max())
    if not difference <= tolerance * float(expected.abs().max()):
        raise ModelError(f"{kind} gives other logits than transformers (difference {difference:.2g}); {_OTHER}")
    return model


def _count_parameters(folder: Path) -> int:
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
