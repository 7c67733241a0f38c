"""Load a model by name, directory or hub id as a hooked model: weights unprocessed, in eval mode.

1. Find the files that its name stands for, and check them (source.py, model_files.py).
2. Load them with `transformers`, and run a short batch as a reference (hf_loading.py, reference_check.py).
3. Make a TransformerLens model of it, and compare its logits with the reference. With a device map the weights are on
   several devices and the class is TransformerBridge (device_map.py, offload.py).

"Unprocessed" is the word of TransformerLens (`from_pretrained_no_processing`): no norm is folded into the next weights,
and no weight is centred.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from p0circuit.hooked_model import HookedModel
from p0circuit.models.architecture_edits import edit_hooked_model, temporary_edits
from p0circuit.models.bridge import to_bridge
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.two_stages import two_stages_model
from p0circuit.models.device_map import DISK, DeviceMap, Placement, free_bytes_by_device, plan_placement
from p0circuit.models.errors import ModelError
from p0circuit.models.hf_loading import load_edits, load_hf_model, load_tokenizer
from p0circuit.models.hooked_transformer import FAMILIES, has_hooked_transformer, to_hooked
from p0circuit.models.info import set_quantisation
from p0circuit.models.memory import bytes_while_loading, free_memory
from p0circuit.models.model_files import count_parameters, damaged_file_error, read_config
from p0circuit.models.names import CONSTRUCTED_MODELS
from p0circuit.models.offload import new_offload_folder, offload_root, to_placed_bridge
from p0circuit.models.reference_check import checked, reference_logits
from p0circuit.models.source import Source, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Backend = Literal["auto", "hooked", "bridge"]
"""The TransformerLens class of a loaded model; "auto" chooses it by the family of the model."""
Device = str | torch.device
"""A device, or its name as torch writes it."""
_CONSTRUCTORS = {
    "wired_model": wired_model,
    "decoy_model": decoy_model,
    "two_stages_model": two_stages_model,
}


def load_model(
    name: str | Path,
    backend: Backend = "auto",
    checkpoint: int | str | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    n_layers: int | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
) -> HookedModel:
    """Load a model as a hooked model: weights unprocessed, in eval mode.

    A name is looked up in this order: the models with constructed weights (`wired`, `wired-learned`, `wired-decoy`,
    `wired-decoy-learned`, `wired-two-stages`); the shipped models; the catalog (`smollm2-135m`, `gemma3-270m`), fetched
    on first use; a local Hugging Face directory, a GGUF file, or a directory with one; and a hub id or
    TransformerLens's short name for one (`pythia-70m`).

    Args:
        name: the name, path or hub id.
        backend: "hooked" for HookedTransformer, "bridge" for TransformerBridge; "auto" is HookedTransformer for the
            families that it computes exactly, and TransformerBridge for all others.
        checkpoint: a training step, or the label or revision that names it; None for the model itself.
        device: the device that computes; CUDA by default where there is one, else the CPU.
        dtype: of the loaded weights; float32 by default, whatever the files hold.
        n_layers: load the first blocks only, for a model that is too large. These blocks compute what they compute in
            the whole model; the predictions are not those of the whole model.
        device_map: distributes the weights: "auto" over all GPUs, then CPU memory, then the disk; "cpu" and "disk"
            offload the blocks there and copy one at a time to `device`; a mapping gives the device of each module, as
            in `accelerate`.
        offload_folder: where weights are written that the device map puts on disk; the cache folder by default. They
            are removed with the model.

    Raises:
        ModelError: the model cannot be loaded correctly; the message says what was found, what was expected, and how
            to mend it.

    Example:
        ```python
        model = load_model("p0-nano")
        initial = load_model("p0-nano", checkpoint=0)
        ```
    """
    _check_arguments(name, backend, dtype, device_map)
    if str(name) in CONSTRUCTED_MODELS:
        return _constructed_model(str(name), backend, checkpoint, device, dtype)
    source = resolve(name, checkpoint)
    config = read_config(source.name, source.folder)
    share = 1.0
    if n_layers is not None:
        share = n_layers / config.get_text_config().num_hidden_layers
        source = _truncated(source, config, n_layers)
    dtype = torch.float32 if dtype is None else dtype
    if device_map is not None:
        return _load_placed(source, config, device_map, device, dtype, offload_folder)
    return _load_on_one_device(source, config, share, backend, _device(device), dtype)


def model_placement(
    name: str | Path,
    device_map: DeviceMap | None,
    checkpoint: int | str | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    n_layers: int | None = None,
    offload_folder: str | Path | None = None,
) -> Placement:
    """Return where `load_model` would put the weights and how many bytes that takes; nothing is loaded.

    Args:
        name: as for `load_model`.
        device_map: as for `load_model`.
        checkpoint: as for `load_model`.
        device: as for `load_model`.
        dtype: as for `load_model`.
        n_layers: as for `load_model`.
        offload_folder: as for `load_model`.

    Raises:
        ModelError: as `load_model` does.
    """
    _check_arguments(name, "auto", dtype, device_map)
    source = resolve(name, checkpoint)
    config = read_config(source.name, source.folder)
    if n_layers is not None:
        source = _truncated(source, config, n_layers)
    return _plan(source, config, device_map, device, torch.float32 if dtype is None else dtype, offload_folder)


def _check_arguments(
    name: str | Path, backend: Backend, dtype: torch.dtype | None, device_map: DeviceMap | None
) -> None:
    if backend not in ("auto", "hooked", "bridge"):
        raise ModelError(f"backend must be 'auto', 'hooked' or 'bridge', got {backend!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(f"expected a floating-point dtype such as torch.bfloat16, got {dtype!r}")
    if device_map is not None and backend == "hooked":
        raise ModelError("a HookedTransformer has its weights on one device; with a device map use backend='bridge'")
    if device_map is not None and str(name) in CONSTRUCTED_MODELS:
        raise ModelError(f"{name} is constructed where it is used, and small: it takes no device map")


def _constructed_model(
    name: str, backend: Backend, checkpoint: int | str | None, device: Device | None, dtype: torch.dtype | None
) -> HookedModel:
    if checkpoint is not None:
        raise ModelError(f"{name} is constructed, not trained: it has no checkpoint {checkpoint!r}")
    function, positions = CONSTRUCTED_MODELS[name]
    return _CONSTRUCTORS[function](positions, backend=backend, dtype=dtype or torch.float32, device=_device(device))


def _load_on_one_device(
    source: Source, config: PretrainedConfig, share: float, backend: Backend, device: torch.device, dtype: torch.dtype
) -> HookedModel:
    """Load a model without a device map; `share` of its blocks will be loaded."""
    _check_memory(source, share, device, dtype)
    # TransformerLens loads a tokenizer a second time to have it put BOS first, which takes seconds for a large one.
    tokenizer = load_tokenizer(source, with_bos=source.quantisation is not None)
    hf = load_hf_model(source, config, dtype, device)
    edits, gates = load_edits(source, hf, device)
    # Before the model is wrapped: a bridge puts itself into the model that it wraps.
    with temporary_edits(hf, edits, gates):
        reference = reference_logits(source.name, hf, device)

    if backend == "hooked" and not has_hooked_transformer():
        raise ModelError("this TransformerLens has no HookedTransformer any more; use backend='bridge'")
    if backend == "hooked" or (backend == "auto" and has_hooked_transformer() and type(hf).__name__ in FAMILIES):
        try:
            model = checked(edit_hooked_model(to_hooked(hf, source.name, tokenizer), edits, gates), reference)
            return set_quantisation(model, source.quantisation)
        except ModelError as error:
            if backend == "hooked":
                raise
            logging.getLogger(__name__).info("%s; using TransformerBridge", error)
    model = checked(edit_hooked_model(to_bridge(hf, source.name, tokenizer), edits, gates), reference)
    return set_quantisation(model, source.quantisation)


def _load_placed(
    source: Source,
    config: PretrainedConfig,
    device_map: DeviceMap,
    device: Device | None,
    dtype: torch.dtype,
    folder: str | Path | None,
) -> HookedModel:
    """Load a model with a device map."""
    placement = _plan(source, config, device_map, device, dtype, folder)
    tokenizer = load_tokenizer(source, with_bos=source.quantisation is not None)
    to_disk = DISK in placement.weight_bytes
    with new_offload_folder(offload_root(folder)) if to_disk else contextlib.nullcontext() as offload_folder:
        hf = load_hf_model(source, config, dtype, placement.device, placement, offload_folder)
        edits, gates = load_edits(source, hf, placement.device)
        with temporary_edits(hf, edits, gates):
            reference = reference_logits(source.name, hf, placement.device)
        bridge = to_placed_bridge(hf, tokenizer, placement, offload_folder)
        model = checked(edit_hooked_model(bridge, edits, gates), reference)
    return set_quantisation(model, source.quantisation)


def _plan(
    source: Source,
    config: PretrainedConfig,
    device_map: DeviceMap | None,
    device: Device | None,
    dtype: torch.dtype,
    folder: str | Path | None,
) -> Placement:
    from safetensors import SafetensorError

    main = _device(device)
    # If a GPU is given, no other is used.
    every = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    gpus = [] if main.type != "cuda" else every if device is None else [torch.device("cuda", main.index or 0)]
    free_bytes = free_bytes_by_device(gpus, offload_root(folder))
    try:
        return plan_placement(config, dtype, device_map, main, free_bytes, source.name, source.folder)
    except SafetensorError as error:
        raise damaged_file_error(source.name, source.folder, error) from None


def _device(device: Device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _truncated(source: Source, config: PretrainedConfig, n_layers: int) -> Source:
    """Shorten the config to its first blocks, in place; the model's name states their number."""
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


def _check_memory(source: Source, share: float, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model that does not fit, before anything is loaded; `share` of its blocks will be loaded."""
    from safetensors import SafetensorError

    free = free_memory(device)
    try:
        needed = share * bytes_while_loading(count_parameters(source.folder), dtype)
    except SafetensorError as error:
        raise damaged_file_error(source.name, source.folder, error) from None
    if free is not None and needed > free:
        raise ModelError(
            f"{source.name} needs about {needed / 2**30:.1f} GB on {device} and {free / 2**30:.1f} are free; load it "
            "with a smaller dtype (bfloat16), fewer layers, or on another device"
        )
