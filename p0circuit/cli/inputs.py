"""Models and prompts, made from what was given on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from p0circuit.cli.options import Backend, First
from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.log import report_progress

if TYPE_CHECKING:
    import torch

    from p0circuit.models.device_map import DeviceMap
    from p0circuit.models.metadata import StoredModel
    from p0circuit.prompts import PromptSet

LARGE_BYTES = 2**30
"""Size of the weights from which `trace` prints an estimate of time and memory."""


class ModelSource(NamedTuple):
    """A model and how to load it, as given on the command line.

    Attributes:
        name: name, directory, GGUF file or hub id.
        backend: TransformerLens class.
        device: as in torch.
        dtype: name of the dtype.
        layers: number of blocks to load; all if None.
        device_map: a word, JSON, or a JSON file.
        offload_folder: folder for weights offloaded to disk.
    """

    name: str
    backend: Backend = Backend.auto
    device: str | None = None
    dtype: str | None = None
    layers: int | None = None
    device_map: str | None = None
    offload_folder: Path | None = None


def load(source: ModelSource, checkpoint: str | int | None = None) -> HookedModel:
    """Load a model with `load_model`; a small one runs on one thread from now on, which is faster.

    Args:
        source: the model.
        checkpoint: step, revision or label of a checkpoint.

    Raises:
        P0Error: the device, dtype, device map, model or checkpoint does not exist.
    """
    import torch

    from p0circuit.models import load_model, one_thread_if_small

    try:
        torch.empty(0, device=source.device)
    except (RuntimeError, AssertionError) as error:
        raise P0Error(f"device {source.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    model = load_model(
        source.name,
        source.backend.value,
        checkpoint,
        source.device,
        torch_dtype(source.dtype),
        source.layers,
        _device_map(source.device_map),
        source.offload_folder,
    )
    one_thread_if_small(model)
    return model


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of a name; None for None.

    Args:
        name: float32, float16, bfloat16 or float64.

    Raises:
        P0Error: it is none of these.
    """
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name is not None and name not in dtypes:
        raise P0Error(f"unknown dtype {name!r}; expected one of {', '.join(dtypes)}")
    return dtypes[name] if name else None


def _device_map(text: str | None) -> DeviceMap | None:
    from p0circuit.models.device_map import parse_device_map

    return None if text is None else parse_device_map(text)


def report_estimate(
    source: ModelSource,
    checkpoints: Sequence[str | int | None],
    samples: int,
    length: int,
    passes: int | None = None,
    min_bytes: float = math.inf,
) -> None:
    """Report the time and memory that a model with a device map, or a large one, will need.

    The estimate is made from the first checkpoint whose files are complete.

    Args:
        source: the model.
        checkpoints: the checkpoints to measure.
        samples: number of prompts.
        length: tokens per prompt.
        passes: number of passes; the time is left out if None.
        min_bytes: without a device map, report only if the weights are larger.

    Raises:
        ModelError: a device map was given and no checkpoint is complete.
    """
    if source.device_map is None and min_bytes == math.inf:
        return
    from p0circuit.models import ModelError, model_placement
    from p0circuit.resources import measure_rates, resource_estimate

    device_map, dtype = _device_map(source.device_map), torch_dtype(source.dtype)
    errors = []
    for checkpoint in checkpoints:
        try:
            placement = model_placement(
                source.name, device_map, checkpoint, source.device, dtype, source.layers, source.offload_folder
            )
        except ModelError as error:
            errors.append(error)
            continue
        if device_map is not None or sum(placement.weight_bytes.values()) > min_bytes:
            rates = measure_rates(placement)
            report_progress(resource_estimate(placement, rates, samples, length, passes, len(checkpoints)))
        return
    if device_map is not None:
        raise errors[0]


def quick_sample_count(source: ModelSource, checkpoint: str | None, samples: int | None = None) -> int:
    """Return the number of prompts of a quick run, and report the reason.

    The size of the model decides; it is read from the files before the model is loaded. An explicit number wins.

    Args:
        source: the model.
        checkpoint: step, revision or label of a checkpoint.
        samples: the number given with --samples; None if it was not given.
    """
    from p0circuit.reproduction import parameter_count, quick_samples

    parameters = parameter_count(source.name, checkpoint)
    default = quick_samples(parameters)
    size = f"{source.name} has {parameters / 1e6:.3g} million parameters"
    if samples is None:
        report_progress(f"{size}: a quick run takes {default} prompts")
        return default
    report_progress(f"{size}: --samples {samples} replaces the {default} prompts of a quick run")
    return samples


def draw_prompts(
    model: HookedModel | StoredModel, text: str | None, samples: int, length: int, seed: int, first: First
) -> PromptSet:
    """Draw prompts from a text, or random tokens for a model without a tokenizer.

    Args:
        model: the model, or its files: only its tokenizer is used.
        text: as in --text.
        samples: number of prompts.
        length: tokens per prompt.
        seed: seed of the draw.
        first: token at position zero.

    Raises:
        P0Error: BOS was asked for and the model has no tokenizer, or the text is too short.
    """
    from p0circuit.experiments.conditions import prompts_for

    if model.tokenizer is None and first is First.bos:
        raise P0Error(f"{_title(model)} has no tokenizer, so its BOS token is not known: use --first random")
    return prompts_for(model, text, samples, length, seed, first.value)


def report_text(model: HookedModel | StoredModel, text: str | None) -> None:
    """Report which text was chosen for the model, or that its prompts are random tokens.

    Args:
        model: the model, or its files.
        text: as in --text; nothing is reported if it was given.
    """
    from p0circuit.experiments.conditions import default_text

    if model.tokenizer is None:
        report_progress(f"{_title(model)} has no tokenizer: its prompts are random tokens")
    elif text is None:
        report_progress(f"{_title(model)} reads {default_text(model)!r}, since --text is not given")


def _title(model: HookedModel | StoredModel) -> str:
    from p0circuit.models import StoredModel, describe
    from p0circuit.results import model_title

    return model_title(model.name, model.quantisation) if isinstance(model, StoredModel) else describe(model).title
