"""Load a model and its tokenizer with `transformers`, and make sure that the weights are complete and finite."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from p0circuit.models.architecture_edits import ArchitectureEdits, gate_name
from p0circuit.models.device_map import Placement
from p0circuit.models.errors import ModelError, listing
from p0circuit.models.offload import offload_to_cpu, weights_of, without_warnings
from p0circuit.models.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: Source, with_bos: bool = False) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model.

    Args:
        source: the files of the model.
        with_bos: whether the tokenizer puts BOS, if it has one, before every text.

    Returns:
        The tokenizer; None where there is none or it cannot be read, since token ids are enough to run a model.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    for folder in source.tokenizer_folders:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            if with_bos:
                with contextlib.suppress(Exception):
                    return AutoTokenizer.from_pretrained(folder, add_bos_token=True, **options)
            try:
                return AutoTokenizer.from_pretrained(folder, **options)
            except Exception as error:
                warnings.warn(f"{source.name}: its tokenizer cannot be read ({error}); use token ids", stacklevel=3)
    return None


def load_hf_model(
    source: Source,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement | None = None,
    offload_folder: Path | None = None,
) -> PreTrainedModel:
    """Load the weights of a model with `transformers`, with eager attention, in eval mode.

    Args:
        source: the files of the model.
        config: of the model, shortened where only its first blocks are loaded.
        dtype: of the loaded weights.
        device: the device of all weights; not used with a placement.
        placement: where the weights go; None to put them all on `device`.
        offload_folder: for weights on disk; None if there are none.

    Raises:
        ModelError: the weights cannot be loaded, some are missing, or some are not finite.
    """
    from transformers import AutoModelForCausalLM

    # These loggers warn of offloaded weights, and of experts that are not split over processes.
    loggers = ["accelerate.big_modeling", "transformers.distributed.tensor_parallel"]
    if ArchitectureEdits.from_config(config.get_text_config(), source.name).gated_attention:
        # This one warns of gates, which are no weights that `transformers` knows.
        loggers.append("transformers.modeling_utils")
    options: dict[str, Any] = {}
    if placement is not None:
        folder = offload_folder and str(offload_folder)
        options = {"device_map": placement.module_devices, "offload_folder": folder}
    try:
        with _without_progress_bar(), without_warnings(*loggers):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        hf, report = loaded
    except Exception as error:
        raise ModelError(f"{source.name}: transformers cannot load the weights in {source.folder}: {error}") from error
    if report["missing_keys"]:
        missing = listing(sorted(report["missing_keys"]), 6)
        raise ModelError(f"{source.name}: the weight files lack {missing}; they would be random")
    if placement is not None:
        offload_to_cpu(hf, placement)
    parameters = {name for name, _ in hf.named_parameters()}
    broken = [name for name, weight in weights_of(hf) if name in parameters and not _is_finite(weight)]
    if broken:
        raise ModelError(f"{source.name}: NaN or infinite values in {listing(broken, 6)}; this checkpoint is damaged")
    return (hf if placement is not None else hf.to(device)).eval()


def load_edits(source: Source, hf: PreTrainedModel, device: torch.device) -> tuple[ArchitectureEdits, list[Tensor]]:
    """Read the edits of a model's forward pass, and its gates.

    Args:
        source: the files of the model.
        hf: the loaded model.
        device: of the gates.

    Returns:
        The edits, and one gate per layer, [heads * d_head, d_model]; an empty list without gated attention.

    Raises:
        ModelError: the weight file lacks a gate.
    """
    edits, gates = ArchitectureEdits.from_config(hf.config.get_text_config(), source.name), []
    if edits.gated_attention:
        from safetensors import safe_open

        names = [gate_name(layer) for layer in range(hf.config.num_hidden_layers)]
        with safe_open(source.folder / "model.safetensors", framework="pt", device=str(device)) as file:
            if missing := sorted(set(names) - set(file.keys())):
                raise ModelError(f"{source.name}: the weight file lacks the gates {listing(missing, 6)}")
            gates = [file.get_tensor(name).to(hf.dtype) for name in names]
    return edits, gates


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hide the progress bar of `transformers`: local weights are read in a moment."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _is_finite(weight: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity: its extremes show it, ten times as fast as all its elements."""
    return weight.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in weight.aminmax())
