"""Callbacks by which the trainers of `transformers` and of Lightning call a monitor."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]

Log = Callable[[dict[str, float]], object]
"""Logs numbers by name."""


@runtime_checkable
class Monitor(Protocol):
    """What a callback needs of a monitor."""

    def step(self, model: nn.Module, step: int, log: Log | None = None) -> object:
        """Read the model if a reading is due at this step, and log the numbers.

        Args:
            model: the model in training.
            step: number of updates so far.
            log: gets the numbers by name; None to log nothing.
        """
        ...


@runtime_checkable
class LightningLogger(Protocol):
    """A logger of Lightning."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers by name.

        Args:
            metrics: numbers by name.
            step: number of updates so far.
        """
        ...


@runtime_checkable
class LightningTrainer(Protocol):
    """What the callback reads of a Trainer of Lightning."""

    @property
    def global_step(self) -> int:
        """Number of updates made."""
        ...

    @property
    def loggers(self) -> Sequence[LightningLogger]:
        """Loggers of the run."""
        ...


class P0TrainerCallback(TrainerCallback):
    """Calls a monitor when training starts and after every step of a `transformers.Trainer`; see `P0Monitor.attach`."""

    def __init__(self, monitor: Monitor, log: Log | None = None) -> None:
        """Connect a monitor to a Trainer.

        Args:
            monitor: reads the model.
            log: the Trainer's own method `log`; if None, the readings are stored by the monitor only.
        """
        self.monitor, self.log = monitor, log

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Read the model before the first step.

        Args:
            args: not used.
            state: state of the Trainer, with the step.
            control: what the Trainer does next.
            model: the model in training.
            **kwargs: not used.
        """
        self._read(state, control, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Read the model after a step.

        Args:
            args: not used.
            state: state of the Trainer, with the step.
            control: what the Trainer does next.
            model: the model in training.
            **kwargs: not used.
        """
        self._read(state, control, model)

    def _read(self, state: TrainerState, control: TrainerControl, model: nn.Module | None) -> None:
        if model is None:
            return
        # Logging resets this flag, and the Trainer would then leave out its own log of this step.
        due = control.should_log
        self.monitor.step(model, state.global_step, self.log)
        control.should_log = due


def lightning_callback(monitor: Monitor, model: Callable[[nn.Module], nn.Module] | None = None) -> Callback:
    """Make a callback for a Trainer of Lightning; see `P0Monitor.lightning`.

    Args:
        monitor: reads the model.
        model: returns, given the LightningModule, the module that takes token ids; if None it is its only child with
            weights, or the LightningModule itself if there are several.

    Returns:
        A `Callback` of `lightning.pytorch` or of `pytorch_lightning`, of the one that is imported already.

    Raises:
        ImportError: neither package is installed.
    """
    find = model or _only_child_with_weights

    class P0LightningCallback(_lightning().Callback):
        """Reads the model when training starts and after every update that a reading is due at."""

        last_step: int | None = None

        def on_train_start(self, trainer: LightningTrainer, pl_module: nn.Module) -> None:
            self.read(trainer, pl_module)

        def on_train_batch_end(self, trainer: LightningTrainer, pl_module: nn.Module, *batch: object) -> None:
            # Batches whose gradients are accumulated end without an update.
            if trainer.global_step != self.last_step:
                self.read(trainer, pl_module)

        def read(self, trainer: LightningTrainer, pl_module: nn.Module) -> None:
            self.last_step = step = trainer.global_step

            def log(numbers: dict[str, float]) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=step)

            monitor.step(find(pl_module), step, log)

    return P0LightningCallback()


def _lightning() -> ModuleType:
    names = ("lightning.pytorch", "pytorch_lightning")
    # A user who has imported one of them will use its Trainer.
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    raise ImportError("the Lightning callback needs Lightning: pip install lightning")


def _only_child_with_weights(module: nn.Module) -> nn.Module:
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    return children[0] if len(children) == 1 else module
