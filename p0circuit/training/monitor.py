"""Watch the P0 sink emerge in a training run of one's own, without changing the run.

    monitor = P0Monitor(tokenizer=tokenizer, csv="p0.csv")
    for step, batch in enumerate(batches):
        ...  # one update
        monitor.step(model, step)

With `transformers`, `monitor.attach(trainer)` logs the readings through the Trainer's own `log`, and so to TensorBoard
or W&B. With Lightning, `Trainer(callbacks=[monitor.lightning()])` logs them to its loggers.

1. The same prompts are read every `every` steps, on rank 0 alone (`live_measurement.py` measures and restores all
   state).
2. Emergence has a fixed rule (`readings.py`).
3. An error while reading or logging is itself logged; training continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from p0circuit.errors import P0Error
from p0circuit.interventions.pairs import shift_prompts
from p0circuit.models.errors import ModelError
from p0circuit.prompts import PromptSet, from_ids, random_tokens, sampleable_vocabulary_of, tokenized_text
from p0circuit.sink import CONTROL, least_excess
from p0circuit.training.callbacks import Log, P0TrainerCallback, lightning_callback
from p0circuit.training.decoder import unwrap
from p0circuit.training.live_measurement import SHIFT, measure
from p0circuit.training.model_state import preserve_random_state
from p0circuit.training.readings import Reading, ReadingsFile, formation_stage

if TYPE_CHECKING:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
    from transformers import Trainer

_logger = logging.getLogger(__name__)


class P0Monitor:
    """Reads the P0 sink of a model in training at regular steps.

    Without a tokenizer of its own, the monitor takes that of the Trainer it is attached to. Special tokens are left out
    of the random tokens of the shifted run where a tokenizer is known.

    Attributes:
        every: steps between readings.
        seed: seed of the prompts.
        readings: all readings so far, including those of a CSV file that an earlier run has begun.

    Example:
        monitor = P0Monitor(tokenizer=tokenizer, first_token="bos", every=100, csv="p0.csv")
        monitor.step(model, 0)
        print(monitor.status)
    """

    def __init__(
        self,
        prompts: PromptSet | Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: str | Path = "english",
        first_token: str | int = "text",
        n: int = 32,
        length: int = 64,
        seed: int = 0,
        every: int = 100,
        csv: str | Path | None = None,
    ) -> None:
        """Choose the prompts that are read.

        They are `prompts`, or text if there is a tokenizer, or random tokens. They are drawn once, from the seed. A
        model whose training rows all begin with BOS needs `first_token="bos"`: its sink may depend on BOS.

        Args:
            prompts: prompts without padding, as a `PromptSet` or as token ids [sample, pos].
            tokenizer: makes the prompts from `text` if none are given.
            text: source of the text, as in `prompts.natural_text`.
            first_token: token at position 0 of the text prompts: "text", "bos", "random" or a token id.
            n: number of prompts.
            length: tokens per prompt.
            seed: seed of the random choice of prompts.
            every: steps between readings.
            csv: a file with one row per reading. A run that is started again continues it: rows at or after the step
                it starts at are superseded, and the earlier file is kept with `.old` at the end of its name.

        Raises:
            P0Error: the prompts are padded or too few, both prompts and tokenizer are given, `every` is below 1, or the
                file holds something else.
        """
        if every < 1:
            raise P0Error(f"every must be at least 1 step, got {every}")
        if prompts is not None and tokenizer is not None:
            raise P0Error("both prompts and a tokenizer to make prompts with are given: expected one of them")
        self.every, self.seed = every, seed
        self._size = n, length
        self._text, self._first_token, self._tokenizer = text, first_token, tokenizer
        self._prompts: PromptSet | None = None
        self._prefix: Int[Tensor, "sample shift"] | None = None
        if prompts is not None:
            self._set_prompts(from_ids(prompts.cpu()) if isinstance(prompts, Tensor) else prompts)
        elif tokenizer is not None:
            self._set_prompts(self._text_prompts(tokenizer))
        self._file = None if csv is None else ReadingsFile(Path(csv))
        self.readings: list[Reading] = [] if self._file is None else self._file.read()

    @property
    def status(self) -> str:
        """Emergence at the latest reading: "none", "forming", or "emerged at step N"."""
        return self.readings[-1].status if self.readings else "none"

    def step(self, model: nn.Module, step: int, log: Log | None = None) -> Reading | None:
        """Read the model if a reading is due. Call it after every step.

        An error in the reading, in `log` or in writing the file is logged with `logging`, and training continues. A row
        that could not be written is written with the next one.

        Args:
            model: the model in training.
            step: step of the training loop.
            log: called with the numbers of the reading by name.

        Returns:
            The reading; None if none is due, on other processes than rank 0, and if the reading failed.
        """
        if step % self.every or not _is_first_process():
            return None
        reading = None
        try:
            with preserve_random_state(model):
                reading = self._read(model, step)
                try:
                    if log is not None:
                        log(reading.numbers())
                finally:
                    self._write()
        except Exception:
            problem = "no reading" if reading is None else "its reading was not logged, or not written to the file"
            _logger.exception("P0 at step %d: %s; training goes on", step, problem)
        return reading

    def read(self, model: nn.Module, step: int) -> Reading:
        """Read the model at any step and store the reading.

        Args:
            model: the model in training.
            step: step of the training loop.

        Raises:
            ModelError: the layers or the attention of the model cannot be read, or it cannot take the prompts.
            FloatingPointError: the residual stream at P0 is not finite.
            OSError: the file cannot be written; the reading is stored in `readings`.
        """
        with preserve_random_state(model):
            reading = self._read(model, step)
        self._write()
        return reading

    def attach(self, trainer: Trainer) -> None:
        """Watch the run of a `transformers.Trainer` and log through it.

        Args:
            trainer: the Trainer; its tokenizer makes the prompts if none are given.
        """
        tokenizer = getattr(trainer, "processing_class", None)
        if self._tokenizer is None and isinstance(tokenizer, PreTrainedTokenizerBase):
            self._tokenizer = tokenizer
            if self._prompts is None:
                self._set_prompts(self._text_prompts(tokenizer))
        trainer.add_callback(P0TrainerCallback(self, trainer.log))

    def lightning(self, model: Callable[[nn.Module], nn.Module] | None = None) -> Callback:
        """Make a callback for a Trainer of Lightning, which logs to its loggers.

        Args:
            model: returns, given the LightningModule, the module that takes token ids; if None it is its only child
                with weights, or the LightningModule itself if there are several.

        Returns:
            A `Callback` of `lightning.pytorch` or of `pytorch_lightning`, of the one that is imported already.

        Raises:
            ImportError: neither package is installed.
        """
        return lightning_callback(self, model)

    def _read(self, model: nn.Module, step: int) -> Reading:
        prompts, prefix = self._prepare(unwrap(model))
        measured = measure(model, prompts.ids, prefix)
        earlier = [reading for reading in self.readings if reading.step < step]
        excess = [(reading.step, reading.excess) for reading in earlier] + [(step, measured.excess)]
        stage, formation_step = formation_stage(excess, least_excess(prompts.length))
        reading = Reading(
            **asdict(measured),
            step=step,
            formation=stage,
            formation_step=formation_step,
            prompts_fingerprint=prompts.fingerprint()[:12],
        )
        self.readings = [*earlier, reading]
        return reading

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(self.readings)

    def _text_prompts(self, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
        return tokenized_text(tokenizer, self._text, *self._size, self.seed, self._first_token)

    def _set_prompts(self, prompts: PromptSet) -> None:
        if not bool(prompts.attention_mask.all()):
            raise P0Error("the prompts are padded; expected prompts of one length, each beginning at position 0")
        if prompts.n < 2 or prompts.length <= CONTROL:
            raise P0Error(
                f"{prompts.n} prompts of {prompts.length} tokens are too few; expected at least 2 (heads are selected "
                f"on one half and measured on the other) of {CONTROL + 1} (P0 is compared with position {CONTROL})"
            )
        self._prompts = prompts

    def _prepare(self, model: nn.Module) -> tuple[PromptSet, Int[Tensor, "sample shift"]]:
        """The prompts and the prefixes of the shifted run; with the first model, those not yet made are drawn."""
        vocab_size, n_ctx = _vocabulary_size(model), _context_length(model)
        if self._prompts is None:
            n, length = self._size
            self._set_prompts(random_tokens(vocab_size, n, min(length, n_ctx or length), self.seed))
        prompts = cast("PromptSet", self._prompts)
        # On a GPU an id or a position out of range ends the process, not only the pass.
        prompts.check_vocabulary(vocab_size)
        if n_ctx is not None and prompts.length > n_ctx:
            raise ModelError(
                f"the prompts have {prompts.length} tokens and {type(model).__name__} reads {n_ctx}; give the monitor "
                "shorter prompts"
            )
        if self._prefix is None:
            tokens, special = sampleable_vocabulary_of(self._tokenizer, vocab_size)
            self._prefix = shift_prompts(prompts, SHIFT, tokens, prompts.seed, tuple(special)).shifted.ids[:, :SHIFT]
        return prompts, self._prefix


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _vocabulary_size(model: nn.Module) -> int:
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if callable(get_embedding) else None
    if embedding is None:
        embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise ModelError(f"no embedding found in {type(model).__name__}; expected an nn.Embedding among its modules")
    return cast("nn.Embedding", embedding).weight.shape[0]


def _context_length(model: nn.Module) -> int | None:
    """Tokens in the longest row that the model's configuration allows; None if it has no such limit."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)
