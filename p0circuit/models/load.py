"""Load a model by name, directory or hub id as a raw hooked model: nothing folded, nothing centred, in eval mode.

1. Find the directory its name stands for, and check it before anything heavy (source.py).
2. Load it with `transformers` (eager attention), and check the weights.
3. Hand it to a TransformerLens class. With a device map (device_map.py) the weights go to several places, and the class
   is TransformerBridge.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.hooked_model import HookedModel
from p0circuit.models.info import ModelError, set_quantisation
from p0circuit.models.memory import bytes_while_loading, free_memory
from p0circuit.models.source import (
    CONSTRUCTED_MODELS,
    Source,
    check_folder,
    count_parameters,
    damaged,
    listed,
    resolve,
)

if TYPE_CHECKING:
    from p0circuit.models.device_map import DeviceMap, Placement

Backend = Literal["auto", "hooked", "bridge"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


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
        quantisation: how its weights were rounded, as `describe` gives it.
    """

    name: str
    label: str | None
    folders: tuple[Path, ...]
    tokenizer: Any
    vocab_size: int
    fingerprint: str
    quantisation: str | None = None


def load_model(
    name: str | Path,
    backend: Backend = "auto",
    checkpoint: int | str | None = None,
    device: Any = None,
    dtype: Any = None,
    n_layers: int | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
) -> HookedModel:
    """Load a model by name, directory, GGUF file or hub id, as a raw hooked model in eval mode.

    A name is looked up in this order: a shipped model; one of the catalog (`smollm2-135m`, `gemma3-270m`), fetched on
    first use; a local Hugging Face directory, a GGUF file, or a directory with one; a hub id. `wired`, `wired-learned`,
    `wired-decoy` and `wired-decoy-learned` are the models of wired.py, and TransformerLens's short names (`pythia-70m`)
    stand for the hub ids they mean.
    `checkpoint` is a training step, or the label or hub revision that names it. `backend` "auto" is HookedTransformer
    for the families it computes exactly and TransformerBridge for everything else. `device` defaults to CUDA where
    there is one and the CPU otherwise, `dtype` to float32 whatever the file holds. `n_layers` loads the first blocks
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
    if str(name) in CONSTRUCTED_MODELS:
        return _wired(str(name), backend, checkpoint, device, dtype)
    from p0circuit.models.architecture_edits import changed, edit_hooked_model

    source = resolve(name, checkpoint)
    config = check_folder(source)
    share = 1.0
    if n_layers is not None:
        share = n_layers / config.get_text_config().num_hidden_layers
        source = _truncate(source, config, n_layers)
    dtype = torch.float32 if dtype is None else dtype
    if device_map is not None:
        placed = _load_placed(source, config, device_map, device, dtype, offload_folder)
        return set_quantisation(placed, source.quantisation)
    _check_memory(source, share, _device(device), dtype)
    # TransformerLens reads a tokenizer a second time to have it put BOS first, which takes seconds for a large one.
    tokenizer = _load_tokenizer(source, with_bos=source.quantisation is not None)
    hf = _load_hf(source, config, dtype, _device(device))
    changes, gates = _changes(source, hf, _device(device))
    # Before wrapping: a bridge puts itself into the model it wraps.
    with changed(hf, changes, gates):
        logits = _causal_logits(source, hf, _device(device))

    from p0circuit.models.bridge import to_bridge
    from p0circuit.models.hooked import FAMILIES, has_hooked_transformer, to_hooked

    if backend == "hooked" and not has_hooked_transformer():
        raise ModelError("this TransformerLens has no HookedTransformer any more; use backend='bridge'")
    if backend == "hooked" or (backend == "auto" and has_hooked_transformer() and type(hf).__name__ in FAMILIES):
        try:
            model = _checked(edit_hooked_model(to_hooked(hf, source.name, tokenizer), changes, gates), logits)
            return set_quantisation(model, source.quantisation)
        except ModelError as error:
            if backend == "hooked":
                raise
            logging.getLogger(__name__).info("%s; using TransformerBridge", error)
    model = _checked(edit_hooked_model(to_bridge(hf, source.name, tokenizer), changes, gates), logits)
    return set_quantisation(model, source.quantisation)


def model_placement(
    name: str | Path,
    device_map: DeviceMap | None,
    checkpoint: int | str | None = None,
    device: Any = None,
    dtype: Any = None,
    n_layers: int | None = None,
    offload_folder: str | Path | None = None,
) -> Placement:
    """Where `load_model` would put the weights, and what that takes, before anything is loaded.

    Raises:
        ModelError: as `load_model` does.
    """
    import torch

    _check_arguments(name, "auto", dtype, device_map)
    source = resolve(name, checkpoint)
    config = check_folder(source)
    if n_layers is not None:
        source = _truncate(source, config, n_layers)
    return _plan(source, config, device_map, device, torch.float32 if dtype is None else dtype, offload_folder)


def stored_model(name: str | Path, checkpoint: int | str | None = None) -> StoredModel:
    """What the files of a model say about it, without its weights being read; arguments as for `load_model`.

    Raises:
        ModelError: there is no such model or checkpoint, or its files are not whole.
    """
    source = resolve(name, checkpoint)
    config = check_folder(source)
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
        source.quantisation,
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
    if device_map is not None and str(name) in CONSTRUCTED_MODELS:
        raise ModelError(f"{name} is constructed where it is used, and small: it takes no device map")


def _plan(
    source: Source, config: Any, device_map: DeviceMap | None, device: Any, dtype: Any, folder: str | Path | None
) -> Placement:
    import torch
    from safetensors import SafetensorError

    from p0circuit.models.device_map import free_bytes_by_device, offload_root, plan_placement

    chosen = _device(device)
    # A device that was asked for is the only one to be used.
    every = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    gpus = [] if chosen.type != "cuda" else every if device is None else [torch.device("cuda", chosen.index or 0)]
    free = free_bytes_by_device(gpus, offload_root(folder))
    try:
        return plan_placement(config, dtype, device_map, chosen, free, source.name, source.folder)
    except SafetensorError as error:
        raise damaged(source, error) from None


def _load_placed(
    source: Source, config: Any, device_map: DeviceMap, device: Any, dtype: Any, folder: str | Path | None
) -> HookedModel:
    """The bridge of a model whose weights are spread by a device map."""
    from p0circuit.models.architecture_edits import changed, edit_hooked_model
    from p0circuit.models.device_map import new_offload_folder, offload_root, to_placed_bridge

    planned = _plan(source, config, device_map, device, dtype, folder)
    tokenizer = _load_tokenizer(source, with_bos=source.quantisation is not None)
    to_disk = "disk" in planned.weight_bytes
    with new_offload_folder(offload_root(folder)) if to_disk else contextlib.nullcontext() as place:
        hf = _load_hf(source, config, dtype, planned.device, planned, place)
        changes, gates = _changes(source, hf, planned.device)
        with changed(hf, changes, gates):
            logits = _causal_logits(source, hf, planned.device)
        return _checked(edit_hooked_model(to_placed_bridge(hf, tokenizer, planned, place), changes, gates), logits)


def _wired(name: str, backend: Backend, checkpoint: int | str | None, device: Any, dtype: Any) -> HookedModel:
    """One of the models whose weights are constructed."""
    import torch

    from p0circuit.models.constructed import build as constructed, two_stages

    if checkpoint is not None:
        raise ModelError(f"{name} is constructed, not trained: it has no checkpoint {checkpoint!r}")
    build, positions = CONSTRUCTED_MODELS[name]
    make = getattr(two_stages if build == "two_stages_model" else constructed, build)
    return make(positions, backend=backend, dtype=dtype or torch.float32, device=_device(device))


def _device(device: Any) -> Any:
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _truncate(source: Source, config: Any, n_layers: int) -> Source:
    """Shorten the config to its first blocks, in place."""
    text = config.get_text_config()
    if not 1 <= n_layers <= text.num_hidden_layers:
        raise ModelError(
            f"{source.name} has {text.num_hidden_layers} layers, so the first {n_layers} cannot be loaded; expected a "
            f"number from 1 to {text.num_hidden_layers}"
        )
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    return replace(source, name=f"{source.name}[:{n_layers}]")


def _check_memory(source: Source, share: float, device: Any, dtype: Any) -> None:
    """Refuse what would not fit, before anything heavy; `share` of the blocks will be loaded."""
    from safetensors import SafetensorError

    free = free_memory(device)
    try:
        needed = share * bytes_while_loading(count_parameters(source.folder), dtype)
    except SafetensorError as error:
        raise damaged(source, error) from None
    if free is not None and needed > free:
        raise ModelError(
            f"{source.name} needs about {needed / 2**30:.1f} GB on {device} and {free / 2**30:.1f} are free; load it "
            "with a smaller dtype (bfloat16), fewer layers, or on another device"
        )


def _load_tokenizer(source: Source, with_bos: bool = False) -> Any:
    """The tokenizer beside the weights, None where there is none: token ids are enough to run a model.

    `with_bos` makes it begin every text with BOS, if it has one.
    """
    from transformers import AutoTokenizer

    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    for folder in source.tokenizers:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            if with_bos:
                with contextlib.suppress(Exception):
                    return AutoTokenizer.from_pretrained(folder, add_bos_token=True, **given)
            try:
                return AutoTokenizer.from_pretrained(folder, **given)
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
    source: Source, config: Any, dtype: Any, device: Any, planned: Placement | None = None, folder: Path | None = None
) -> Any:
    """Load the weights with `transformers`, and make sure that they are all there, finite, and causal."""
    from transformers import AutoModelForCausalLM

    from p0circuit.models.architecture_edits import ArchitectureEdits
    from p0circuit.models.device_map import offload_to_cpu, weights_of, without_warnings

    # Weights that are elsewhere, and experts that no other process shares.
    expected = ["accelerate.big_modeling", "transformers.distributed.tensor_parallel"]
    if ArchitectureEdits.of(config.get_text_config(), source.name).gated_attention:
        # Its gates are no weights that `transformers` knows.
        expected.append("transformers.modeling_utils")
    placed: dict[str, Any] = {}
    if planned is not None:
        placed = {"device_map": planned.module_devices, "offload_folder": folder and str(folder)}
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
        absent = listed(sorted(report["missing_keys"]), 6)
        raise ModelError(f"{source.name}: the weight files lack {absent}; they would be random")
    if planned is not None:
        offload_to_cpu(hf, planned)
    parameters = {name for name, _ in hf.named_parameters()}
    broken = [name for name, weight in weights_of(hf) if name in parameters and not _is_finite(weight)]
    if broken:
        raise ModelError(f"{source.name}: NaN or infinite values in {listed(broken, 6)}; this checkpoint is damaged")
    return (hf if planned is not None else hf.to(device)).eval()


def _is_finite(weight: Any) -> bool:
    """Whether a tensor holds no NaN and no infinity; its extremes tell, ten times quicker than every element."""
    import torch

    return weight.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in weight.aminmax())


def _changes(source: Source, hf: Any, device: Any) -> tuple[Any, list[Any]]:
    """What the model's `p0circuit` field changes in its forward pass, and the gates if it has any."""
    from p0circuit.models.architecture_edits import ArchitectureEdits, gate_name

    changes, gates = ArchitectureEdits.of(hf.config.get_text_config(), source.name), []
    if changes.gated_attention:
        from safetensors import safe_open

        names = [gate_name(layer) for layer in range(hf.config.num_hidden_layers)]
        with safe_open(source.folder / "model.safetensors", framework="pt", device=str(device)) as file:
            if absent := sorted(set(names) - set(file.keys())):
                raise ModelError(f"{source.name}: the weight file lacks the gates {listed(absent, 6)}")
            gates = [file.get_tensor(name).to(hf.dtype) for name in names]
    return changes, gates


def _sample(vocab_size: int, device: Any) -> Any:
    """Two rows of five ids that share all but the last."""
    import torch

    ids = torch.arange(5, device=device).repeat(2, 1) * 7 % vocab_size
    ids[1, -1] = (ids[1, -1] + 1) % vocab_size
    return ids


def _causal_logits(source: Source, hf: Any, device: Any) -> Any:
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


def _checked(model: HookedModel, expected: Any) -> HookedModel:
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
