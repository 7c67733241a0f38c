"""Models and prompts as the command line names them: loaded, drawn, and announced on standard error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from p0circuit.cli.options import Backend, First
from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.log import report_progress

if TYPE_CHECKING:
    from p0circuit.prompts import PromptSet


class ModelSource(NamedTuple):
    """A model and how it is to be loaded, as given on the command line."""

    name: str
    backend: Backend = Backend.auto
    device: str | None = None
    dtype: str | None = None
    layers: int | None = None
    device_map: str | None = None
    offload_folder: Path | None = None


def load(source: ModelSource, checkpoint: str | int | None = None) -> Any:
    """`load_model`, with device, dtype and device map given as text."""
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
        parse_device_map_option(source.device_map),
        source.offload_folder,
    )
    one_thread_if_small(model)
    return model


def parse_device_map_option(text: str | None) -> Any:
    from p0circuit.models.device_map import parse_device_map

    return None if text is None else parse_device_map(text)


def torch_dtype(name: str | None) -> Any:
    """The torch dtype of a name, None for None."""
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name is not None and name not in kinds:
        raise P0Error(f"unknown dtype {name!r}; expected one of {', '.join(kinds)}")
    return kinds[name] if name else None


LARGE_BYTES = 2**30
"""Bytes of weights from which on it is said what a trace will take, wherever they are put."""


def say_estimate(
    source: ModelSource,
    checkpoints: Sequence[str | int | None],
    samples: int,
    length: int,
    passes: int | None = None,
    large: float = math.inf,
) -> None:
    """Say what a model will take, from the first checkpoint that is whole: with a device map, or if it is `large`."""
    if source.device_map is None and large == math.inf:
        return
    from p0circuit.models import ModelError, model_placement
    from p0circuit.resources import measure_rates, resource_estimate

    device_map, dtype = parse_device_map_option(source.device_map), torch_dtype(source.dtype)
    reasons = []
    for checkpoint in checkpoints:
        try:
            placement = model_placement(
                source.name, device_map, checkpoint, source.device, dtype, source.layers, source.offload_folder
            )
        except ModelError as reason:
            reasons.append(reason)
            continue
        if device_map is not None or sum(placement.weight_bytes.values()) > large:
            report_progress(
                resource_estimate(placement, measure_rates(placement), samples, length, passes, len(checkpoints))
            )
        return
    if device_map is not None:
        raise reasons[0]


def quick_prompt_count(source: ModelSource, checkpoint: str | None) -> int:
    """How many prompts a quick run takes, said with its reason; known from the files, before anything is loaded."""
    from p0circuit.reproduction import quick_samples

    parameters = _count_parameters(source, checkpoint)
    samples = quick_samples(parameters)
    report_progress(f"{source.name} has {parameters / 1e6:.3g} million parameters: this takes {samples} prompts")
    return samples


def _count_parameters(source: ModelSource, checkpoint: str | None) -> int:
    """The number of a model's weights, from the headers of its files; those of a constructed one are counted."""
    from safetensors import SafetensorError

    from p0circuit.models.catalog import named_model
    from p0circuit.models.model_files import count_parameters
    from p0circuit.models.names import CONSTRUCTED_MODELS
    from p0circuit.models.source import resolve

    if (entry := named_model(source.name)) is not None:
        return entry.parameters
    with contextlib.suppress(SafetensorError):
        if source.name not in CONSTRUCTED_MODELS:
            return count_parameters(resolve(source.name, checkpoint).folder)
    # Constructed, or damaged, which loading says in its own words.
    return sum(weight.numel() for weight in load(source, checkpoint).parameters())


def draw_prompts(
    model: HookedModel, text: str | None, samples: int, length: int, seed: int, first: First, announce: bool = True
) -> PromptSet:
    """Crops of the text, or random tokens for a model that has no tokenizer to read text with."""
    from p0circuit.experiments.conditions import prompts_for

    if model.tokenizer is None and first is First.bos:
        raise P0Error(f"{_title(model)} has no tokenizer, and so no BOS token that is known: use --first random")
    if announce:
        _say_text(model, text)
    return prompts_for(model, text, samples, length, seed, first.value)


def draw_pooled_prompts(model: HookedModel, text: str | None, samples: int, length: int, seed: int) -> PromptSet:
    """The prompts of a reproduction: as many as asked for, drawn in equal parts by three seeds."""
    from p0circuit.experiments.conditions import pooled_prompts_for

    _say_text(model, text)
    return pooled_prompts_for(model, text, samples, length, seed)


def _say_text(model: HookedModel, text: str | None) -> None:
    """Say which text was chosen by the model, or that there is none it can read."""
    from p0circuit.experiments.conditions import default_text

    if model.tokenizer is None:
        report_progress(f"{_title(model)} has no tokenizer: its prompts are random tokens")
    elif text is None:
        report_progress(f"{_title(model)} reads {default_text(model)!r}, as no --text is given")


def _title(model: HookedModel) -> str:
    """What to call a loaded model, or one as it is stored, in a message."""
    from p0circuit.models import StoredModel, describe
    from p0circuit.results import model_title

    return model_title(model.name, model.quantisation) if isinstance(model, StoredModel) else describe(model).title


def check_quick(quick: bool, samples: int | None) -> None:
    if quick and samples is not None:
        raise P0Error(
            f"--quick decides the number of prompts by the model's size and --samples asks for {samples}: leave one out"
        )
