"""The checkpoints of a run: which there are, their order, and how many tokens each has been trained on."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from p0circuit.errors import P0Error
from p0circuit.models import ModelError, StoredModel, list_checkpoints
from p0circuit.models.checkpoints import STEP, Label, parse_label
from p0circuit.models.source import is_gguf_model, local_folder


def checkpoints_of(source: str | Path) -> list[int | str]:
    """List the checkpoints of a run by step: those that can be loaded and, in a directory, damaged ones too.

    Args:
        source: a model name, a directory of checkpoints, or a hub id.

    Raises:
        ModelError: there are none.
    """
    steps = set(list_checkpoints(source))
    folder = None if is_gguf_model(source) else local_folder(source)
    # A directory named after a step, without a config, is a checkpoint that was not written completely.
    for path in [*folder.glob("trace/*"), *folder.glob("*")] if folder else []:
        if path.is_dir() and STEP.fullmatch(path.name) and (label := parse_label(path.name)):
            steps.add(label.step)
    if not steps:
        raise ModelError(f"{source} keeps no checkpoints; expected trace/step-000123 or checkpoint-123 in it")
    return sorted(steps)


def order_checkpoints(checkpoints: Sequence[int | str]) -> list[tuple[int | str, Label]]:
    """Order checkpoints by step, each step once.

    Args:
        checkpoints: steps or names of checkpoints.

    Returns:
        Each checkpoint with what its name says.

    Raises:
        P0Error: a name has no step in it, or they are of several stages of training.
    """
    by_step: dict[int, tuple[int | str, Label]] = {}
    for checkpoint in checkpoints:
        if (label := parse_label(checkpoint)) is None:
            raise P0Error(
                f"checkpoint {checkpoint!r} has no step in its name; expected a step or a name such as step-000500, "
                "checkpoint-500, step1000-tokens4B or stage1-step1000-tokens5B"
            )
        by_step[label.step] = checkpoint, label
    if len(several := sorted({label.stage for _, label in by_step.values()})) > 1:
        raise P0Error(f"checkpoints of the stages {several} count their steps anew: trace one stage at a time")
    return [by_step[step] for step in sorted(by_step)]


def tokens_seen(stored: StoredModel, step: int) -> int | None:
    """Return the number of tokens that a checkpoint has been trained on.

    It is read from the checkpoint's name (OLMo, rounded), from the state that the Trainer saves next to the weights if
    it was set to count tokens, or from the `trace.csv` of the run, in this order.

    Args:
        stored: the checkpoint.
        step: its step.

    Returns:
        The number; None if none of these has it.
    """
    label = parse_label(stored.label or "")
    if label is not None and label.tokens is not None:
        return label.tokens
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((stored.folders[0] / "trainer_state.json").read_text())
        if state["num_input_tokens_seen"] > 0:
            return int(state["num_input_tokens_seen"])
    return tokens_by_step(stored.folders[-1]).get(step)


def tokens_by_step(folder: Path) -> dict[int, int]:
    """Read the number of tokens at each step from the `trace.csv` of a run; empty if there is none.

    Args:
        folder: directory of the run.
    """
    path = folder / "trace.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {int(row["step"]): int(row["tokens"]) for row in csv.DictReader(file)}
