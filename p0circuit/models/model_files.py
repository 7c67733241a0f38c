"""Check the files of a model before any weight is read: config, weights as safetensors, a causal language model."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from p0circuit.models.errors import ModelError, listing

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(name: str, folder: Path) -> PretrainedConfig:
    """Read the config of a model whose files are complete.

    Args:
        name: what error messages call the model.
        folder: a Hugging Face directory.

    Raises:
        ModelError: a file is missing, damaged or pickled, or the model is not a causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: no config.json in {folder}; expected a Hugging Face model directory, or one GGUF file in it"
        )
    _check_weight_files(name, folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{name}: config.json cannot be used ({error}); code from model folders is not run") from error
    _check_causal_config(name, config)
    return config


def damaged_file_error(name: str, folder: Path, error: Exception | str) -> ModelError:
    """Return the error of a weight file that cannot be read.

    Args:
        name: what the message calls the model.
        folder: of its files.
        error: the reason.
    """
    return ModelError(f"{name}: a weight file in {folder} is damaged: {error}; get it again")


def count_parameters(folder: Path) -> int:
    """Return the number of weights, from the headers of the weight files alone.

    Args:
        folder: a Hugging Face directory.
    """
    return sum(prod(shape) for shape in stored_shapes(folder).values())


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every weight by its name in the weight files, from their headers alone.

    Args:
        folder: a Hugging Face directory.
    """
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return shapes


def _check_weight_files(name: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged_file_error(name, folder, f"{index.name} is no JSON with a weight_map ({error!r})") from None
        if missing:
            raise ModelError(f"{name}: weight files missing in {folder}: {listing(missing)}")
        return
    if (folder / "model.safetensors").is_file():
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if pickles:
        raise ModelError(
            f"{name}: the weights in {folder} are pickled ({listing(pickles)}), and loading a pickle can run any code. "
            "If you trust them, convert them once: transformers.AutoModelForCausalLM.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(folder) writes model.safetensors next to them"
        )
    raise ModelError(f"{name}: no weights in {folder}; expected model.safetensors or its shards with their index")


def _check_causal_config(name: str, config: PretrainedConfig) -> None:
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architecture = (config.architectures or [causal.get(config.model_type)])[0]
    encoder = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False) or architecture not in causal.values() or encoder:
        raise ModelError(
            f"{name} is a {architecture or config.model_type}, not a causal language model: without a causal mask no "
            "position is first"
        )
