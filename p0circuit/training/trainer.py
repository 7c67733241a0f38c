"""Train a small language model whose P0 sink can be studied, and save checkpoints along the way.

1. Corpus, tokenizer and token streams are made once and stored next to the run (`corpus.py`).
2. Every step is a function of configuration and step number (`updates.py`).
3. Log-spaced checkpoints are stored as Hugging Face directories under `trace/`.
4. The state is saved every `save_every` steps; an interrupted run is resumed from it and gives the same result.
5. At the end the model, its losses as a table and its card are written; the card has the command that repeats the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from p0circuit.errors import NotFiniteError, P0Error
from p0circuit.io import write_json
from p0circuit.models.architecture_edits import edit_hf_model, gates_of
from p0circuit.text import BOS_ID
from p0circuit.training.build import build_model
from p0circuit.training.card import write_card
from p0circuit.training.config import TrainConfig, read_config
from p0circuit.training.corpus import prepare_corpus
from p0circuit.training.run_files import load_state, save_model, save_state, write_log
from p0circuit.training.updates import LogRow, TrainState, batch_at, build_optimizer, train_step, validation_loss

CONFIG_FILE = "train_config.json"
"""The configuration of a run, in its directory from the first step on."""


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """Return about `count` log-spaced steps from 0 to `steps`, both included, each once.

    Args:
        steps: the last step.
        count: number of checkpoints; 1 gives the last step alone.
    """
    if count == 1:
        return [steps]
    first = min(16, steps)
    spaced = np.geomspace(first, steps, count - 1)
    return sorted({0, *(round(float(step)) for step in spaced)})


def train(
    config: TrainConfig, out: Path, save_every: int = 500, on_step: Callable[[int, float], None] | None = None
) -> Path:
    """Train a model and write it, with its checkpoints, into a directory.

    A second call with the same arguments resumes an interrupted run and gives the same weights. A finished run is left
    as it is.

    Args:
        config: the recipe.
        out: an empty or new directory, or that of a run with the same configuration.
        save_every: steps between two saves of the state.
        on_step: called after every step with the step and its training loss.

    Returns:
        `out`.

    Raises:
        P0Error: `out` holds other files or a run of another configuration, or the corpus is too small.
        NotFiniteError: the loss is not finite.

    Example:
        config = dataclasses.replace(VARIANTS["bos"], seed=1)
        train(config, Path("runs/bos-1"))
    """
    _check_directory(config, out)
    if (out / "config.json").exists():
        # This file is written last: the run is finished.
        return out
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG_FILE, asdict(config))

    tokenizer, stream, held_out = prepare_corpus(config, out)
    model = build_model(config)
    if config.architecture_edits:
        edit_hf_model(model, config.architecture_edits, gates_of(model))
    state = TrainState(model, build_optimizer(config, model))
    saved = out / "work" / "state.safetensors"
    if saved.exists():
        load_state(saved, state)
    checkpoints = set(checkpoint_steps(config.steps, config.checkpoints))
    model.train()
    loss = float("nan")
    while True:
        if state.step in checkpoints and not any(row["step"] == state.step for row in state.log):
            save_model(out / "trace" / f"step-{state.step:06d}", model, None)
            tokens = state.step * config.batch * config.length
            row: LogRow = {"step": state.step, "tokens": tokens, "train_loss": loss if state.step else None}
            row["validation_loss"] = validation_loss(config, model, held_out)
            state.log.append(row)
            save_state(saved, state)
        if state.step == config.steps:
            break
        loss = train_step(config, state, batch_at(config, stream, state.step, BOS_ID))
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss became {loss} at step {state.step}; lower the learning rate ({config.learning_rate})"
            )
        if on_step is not None:
            on_step(state.step, loss)
        if state.step % save_every == 0 and state.step not in checkpoints:
            save_state(saved, state)
    write_log(out / "trace.csv", state.log)
    write_card(out, config, sum(parameter.numel() for parameter in model.parameters()))
    save_model(out, model, tokenizer)
    return out


def _check_directory(config: TrainConfig, out: Path) -> None:
    """Refuse a directory that is not empty and not that of a run with this configuration.

    Raises:
        P0Error: it is such a directory, or a file.
    """
    if out.exists() and not out.is_dir():
        raise P0Error(f"{str(out)!r} is a file; choose an empty directory")
    recorded = out / CONFIG_FILE
    if recorded.is_file():
        if read_config(recorded) != config:
            raise P0Error(
                f"{str(out)!r} holds a run of another configuration ({CONFIG_FILE}); choose an empty directory"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise P0Error(
            f"{str(out)!r} is not empty and holds no training run (no {CONFIG_FILE}); choose an empty directory"
        )
