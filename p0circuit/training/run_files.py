"""Files of a training run: its state, its checkpoints and its log, each written as a whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from p0circuit.io import write_atomically, write_json
from p0circuit.training.updates import LogRow, TrainState


def save_state(path: Path, state: TrainState) -> None:
    """Write weights, optimizer moments, step and log into one safetensors file.

    Args:
        path: path of the file.
        state: state of the training run.
    """
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in state.model.named_parameters()}
    moments = state.optimizer.state_dict()["state"]
    for index, entry in moments.items():
        for name, value in entry.items():
            tensors[f"optimizer.{index}.{name}"] = value.contiguous()
    metadata = {"step": str(state.step), "log": json.dumps(state.log)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_state(path: Path, state: TrainState) -> None:
    """Read what `save_state` wrote into `state`, in place.

    Args:
        path: path of the file.
        state: state of the training run, which is changed in place.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = int(metadata["step"])
    state.log = json.loads(metadata["log"])


def save_model(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Write a model as a Hugging Face directory in float16; the model itself stays in its own dtype.

    Args:
        directory: where to write; config.json is written last, so a directory that has one is complete.
        model: the model.
        tokenizer: its tokenizer; None writes the model alone.
    """
    half = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        half.pop("lm_head.weight", None)
    config = model.config.to_dict() | {"dtype": "float16", "architectures": [type(model).__name__]}
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_atomically(directory / "model.safetensors", lambda path: save_file(half, path, metadata={"format": "pt"}))
    write_json(directory / "config.json", dict(sorted(config.items())))


def write_log(path: Path, log: Sequence[LogRow]) -> None:
    """Write the losses at the checkpoints as CSV.

    Args:
        path: path of the CSV file.
        log: one row per checkpoint, at least one.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, log[0].keys())
            writer.writeheader()
            writer.writerows(log)

    write_atomically(path, write)
