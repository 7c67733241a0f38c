"""Watch the P0 sink circuit form in a training run of one's own, without changing the run.

    monitor = P0Monitor(tokenizer=tokenizer, csv="p0.csv")
    for step, batch in enumerate(batches):
        ...  # one update
        monitor.step(model, step)

With `transformers`: `monitor.attach(trainer)`; readings go through the Trainer's own `log`, and so to TensorBoard or
W&B. With Lightning: `Trainer(callbacks=[monitor.lightning()])`; they go to the loggers.

1. The same probe rows are read every `every` steps, on rank 0 alone (`probe.py` measures, and puts everything back).
2. Formation, by a rule fixed beforehand: a reading is *above* where its excess score is more than twice that of uniform
   attention on rows of this length. "none": the latest reading is not above. "forming": it is. "formed": the last three
   are, and the step of formation is the first of the unbroken row of readings that lead up to the latest. (The trace of
   a finished run has another rule, above half the final value for good: a run under way has no final value.)
3. What fails, in reading or in handing a reading on, is logged; training goes on.
"""

from __future__ import annotations

import csv as csv_format
import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from p0circuit.errors import P0Error
from p0circuit.interventions.pairs import shift_prompts
from p0circuit.io import write_atomically
from p0circuit.models.errors import ModelError
from p0circuit.prompts import PromptSet, from_ids, random_tokens, sampleable_vocabulary_of, tokenized_text
from p0circuit.sink import CONTROL, least_excess
from p0circuit.training.live_measurement import SHIFT, Measurement, measure, same_randomness, unwrap

COLUMNS = ("step", *(field.name for field in fields(Measurement)), "formation", "formation_step", "probe")
"""Of the CSV file: the fields of `Reading`."""
LASTING = 3
"""A sink is formed when as many readings in a row are above the threshold."""
STAGES = ("none", "forming", "formed")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading(Measurement):
    """A measurement, the step it was made at, and how far the sink has formed by then.

    Attributes:
        step: as the training loop counts.
        formation: "none", "forming" or "formed".
        formation_step: the first step of the unbroken row of readings above the threshold, once formed.
        probe: the beginning of the fingerprint of the probe rows; readings of other rows do not compare.
    """

    step: int
    formation: str
    formation_step: int | None
    probe: str

    @property
    def status(self) -> str:
        """Formation in words."""
        return f"formed since step {self.formation_step}" if self.formation == "formed" else self.formation

    def numbers(self) -> dict[str, float]:
        """What there is to log, under names such as `p0/sink_rate`; formation as 0 (none), 1 (forming), 2 (formed)."""
        values = asdict(self) | {"formation": float(STAGES.index(self.formation))}
        left_out = ("step", "probe")
        return {f"p0/{name}": value for name, value in values.items() if value is not None and name not in left_out}


def formation(excess: Sequence[tuple[int, float]], threshold: float) -> tuple[str, int | None]:
    """The stage of formation, and the step once formed, from (step, excess score) of all readings in order."""
    above: list[int] = []
    for step, value in excess:
        above = [*above, step] if value > threshold else []
    if len(above) < LASTING:
        return STAGES[bool(above)], None
    return "formed", above[0]


class P0Monitor:
    """Reads the P0 sink of a model in training every so many steps.

    The probe rows are those given, or made of text with a tokenizer, or of random tokens where there is neither; they
    are drawn once, by the seed. At P0 stands what the rows begin with: for a model that always sees BOS it is to be
    `first="bos"`, since its sink may hang on that token. The random tokens of the shifted run leave special ones out
    where a tokenizer is known, its own or that of the Trainer it is attached to.

    Attributes:
        readings: all so far, those of the CSV file that this run goes on with included.
    """

    def __init__(
        self,
        probe: PromptSet | Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: str | Path = "english",
        first: str | int = "text",
        rows: int = 32,
        length: int = 64,
        seed: int = 0,
        every: int = 100,
        csv: str | Path | None = None,
    ) -> None:
        """Watch a run.

        Args:
            probe: rows to read, without padding: a `PromptSet` or ids [batch, pos].
            tokenizer: makes the probe from `text` where none is given.
            text, first, rows, length, seed: of a probe that is made here, as in `prompts.natural_text`; `first` is what
                stands at P0: "text", "bos", "random", or a token id.
            every: steps between readings.
            csv: a file to write one row per reading to. A run that is started again goes on with it: rows at or after
                the step it begins at are superseded, and the file as it was is kept beside it with `.old` at the end.

        Raises:
            P0Error: the probe is padded or too small, both probe and tokenizer are given, `every` is below 1, or
                the file holds something else.
        """
        if every < 1:
            raise P0Error(f"every must be at least 1 step, got {every}")
        if probe is not None and tokenizer is not None:
            raise P0Error("a probe and a tokenizer to make one with: expected one of them")
        self.every, self.seed = every, seed
        self._size = rows, length
        self._text, self._first, self._tokenizer = text, first, tokenizer
        self._probe: PromptSet | None = None
        self._prefix: Int[Tensor, "batch shift"] | None = None
        if probe is not None:
            self._set_probe(from_ids(probe.cpu()) if isinstance(probe, Tensor) else probe)
        elif tokenizer is not None:
            self._set_probe(self._text_probe(tokenizer))
        self._csv = None if csv is None else Path(csv)
        # How many readings the file holds for certain.
        self._in_file = 0
        self.readings: list[Reading] = read_readings(self._csv) if self._csv is not None and self._csv.exists() else []

    @property
    def status(self) -> str:
        """Formation at the latest reading: "none", "forming", or "formed since step N"."""
        return self.readings[-1].status if self.readings else "none"

    def step(
        self, model: nn.Module, step: int, log: Callable[[dict[str, float]], object] | None = None
    ) -> Reading | None:
        """Call it after every step: every `every` steps it reads the model, and hands the numbers to `log`.

        Returns the reading, or None where none was due, where another process than rank 0 asks, and where it failed.
        What fails, `log` and the file included, goes to `logging`, and training goes on; a line that could not be
        written is in the file as soon as it can be.
        """
        if step % self.every or not _is_first_process():
            return None
        reading = None
        try:
            with same_randomness(model):
                reading = self._read(model, step)
                try:
                    if log is not None:
                        log(reading.numbers())
                finally:
                    self._write()
        except Exception:
            told = "no reading" if reading is None else "its reading was not logged, or not written to the file"
            _logger.exception("P0 at step %d: %s; training goes on", step, told)
        return reading

    def read(self, model: nn.Module, step: int) -> Reading:
        """Read a model now, whatever the step, and keep the reading.

        Raises:
            ModelError: the model is none whose P0 can be seen, or cannot read the probe rows.
            FloatingPointError: what it computes at P0 is not finite.
            OSError: the file cannot be written; the reading is kept.
        """
        with same_randomness(model):
            reading = self._read(model, step)
        self._write()
        return reading

    def attach(self, trainer: Any) -> None:
        """Watch the run of a `transformers.Trainer` and log through it; if no probe is set, its tokenizer makes one."""
        tokenizer = getattr(trainer, "processing_class", None)
        if self._tokenizer is None and isinstance(tokenizer, PreTrainedTokenizerBase):
            self._tokenizer = tokenizer
            if self._probe is None:
                self._set_probe(self._text_probe(tokenizer))
        trainer.add_callback(P0TrainerCallback(self, trainer.log))

    def lightning(self, model: Callable[[Any], nn.Module] | None = None) -> Any:
        """A callback for a Lightning Trainer, of `lightning.pytorch` or `pytorch_lightning`; logs to its loggers.

        `model` finds in the LightningModule what is called with token ids; if not given it is its only child with
        weights, or the LightningModule itself if there are several.

        Raises:
            ImportError: neither package is installed.
        """
        monitor, find = self, model or _only_child_with_weights

        class P0LightningCallback(_lightning().Callback):
            """Reads when training starts and after every update that a reading is due at."""

            last: int | None = None

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.look(trainer, pl_module)

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
                # Batches whose gradients are accumulated end without an update.
                if trainer.global_step != self.last:
                    self.look(trainer, pl_module)

            def look(self, trainer: Any, pl_module: Any) -> None:
                self.last = step = trainer.global_step

                def log(numbers: dict[str, float]) -> None:
                    for logger in trainer.loggers:
                        logger.log_metrics(numbers, step=step)

                monitor.step(find(pl_module), step, log)

        return P0LightningCallback()

    def _read(self, model: nn.Module, step: int) -> Reading:
        probe, prefix = self._made_for(unwrap(model))
        measured = measure(model, probe.ids, prefix)
        kept = [reading for reading in self.readings if reading.step < step]
        trace = [(reading.step, reading.excess) for reading in kept] + [(step, measured.excess)]
        stage, since = formation(trace, least_excess(probe.length))
        made_with = probe.fingerprint()[:12]
        reading = Reading(**asdict(measured), step=step, formation=stage, formation_step=since, probe=made_with)
        if len(kept) < len(self.readings):
            self._in_file = 0
        self.readings = [*kept, reading]
        return reading

    def _text_probe(self, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
        return tokenized_text(tokenizer, self._text, *self._size, self.seed, self._first)

    def _set_probe(self, probe: PromptSet) -> None:
        if not bool(probe.attention_mask.all()):
            raise P0Error("the probe rows are padded; expected rows of one length, so that P0 is where each begins")
        if probe.n < 2 or probe.length <= CONTROL:
            raise P0Error(
                f"the probe has {probe.n} rows of {probe.length} tokens; expected at least 2 (heads are chosen on one "
                f"half and measured on the other) of {CONTROL + 1} (P0 is compared with position {CONTROL})"
            )
        self._probe = probe

    def _made_for(self, model: nn.Module) -> tuple[PromptSet, Int[Tensor, "batch shift"]]:
        """The probe and its prefixes; with the first model, what is missing of them is drawn."""
        vocab_size, context = _vocabulary(model), _context(model)
        if self._probe is None:
            rows, length = self._size
            self._set_probe(random_tokens(vocab_size, rows, min(length, context or length), self.seed))
        probe = self._probe
        assert probe is not None
        # On a GPU an id or a position too many ends the process, not only the pass.
        probe.check_vocabulary(vocab_size)
        if context is not None and probe.length > context:
            raise ModelError(
                f"the probe rows have {probe.length} tokens and {type(model).__name__} reads {context}; give the "
                f"monitor shorter rows"
            )
        if self._prefix is None:
            drawn, special = sampleable_vocabulary_of(self._tokenizer, vocab_size)
            self._prefix = shift_prompts(probe, SHIFT, drawn, probe.seed, tuple(special)).shifted.ids[:, :SHIFT]
        return probe, self._prefix

    def _write(self) -> None:
        """Add the latest reading to the file; one that supersedes others, or follows a failure, rewrites it."""
        if (path := self._csv) is None:
            return

        def add(readings: Sequence[Reading], target: Path, mode: str) -> None:
            with target.open(mode, newline="") as file:
                writer = csv_format.DictWriter(file, COLUMNS, lineterminator="\n")
                if mode == "w":
                    writer.writeheader()
                writer.writerows([asdict(reading) for reading in readings])

        # Whatever breaks off from here on, the file is not to be trusted with another line.
        before, self._in_file = self._in_file, 0
        step = self.readings[-1].step
        if before and before == len(self.readings) - 1:
            add(self.readings[-1:], path, "a")
        else:
            if path.exists() and any(reading.step > step for reading in read_readings(path)):
                old = path.with_name(f"{path.name}.old")
                told = "%s: the readings after step %d are superseded; the file is kept as %s"
                _logger.warning(told, path, step, old)
                shutil.copyfile(path, old)
            write_atomically(path, lambda temporary: add(self.readings, temporary, "w"))
        self._in_file = len(self.readings)


class P0TrainerCallback(TrainerCallback):
    """Reads when training starts and after every step of a `transformers.Trainer`; see `P0Monitor.attach`.

    Without `log`, the Trainer's own method, readings go only where the monitor keeps them.
    """

    def __init__(self, monitor: P0Monitor, log: Callable[[dict[str, float]], object] | None = None) -> None:
        self.monitor, self.log = monitor, log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        self._look(state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        self._look(state, control, model)

    def _look(self, state: Any, control: Any, model: Any) -> None:
        # Whatever is logged counts to the Trainer as its own log of this step, which would then be left out.
        due = control.should_log
        self.monitor.step(model, state.global_step, self.log)
        control.should_log = due


def read_readings(path: Path) -> list[Reading]:
    """The readings in a monitor's CSV file; a last row that was cut off is left out.

    Raises:
        P0Error: the file is none of a monitor's.
    """
    text = path.read_text()
    rows = list(csv_format.reader(text[: text.rfind("\n") + 1].splitlines()))
    if rows and tuple(rows[0]) != COLUMNS:
        raise P0Error(
            f"{str(path)!r} is not a file of P0Monitor, or of another version: its columns are {rows[0]}, expected "
            f"{list(COLUMNS)}; name another file"
        )
    kinds: dict[str, Any] = {"step": int, "formation_step": int, "formation": str, "probe": str}

    def value(name: str, text: str) -> Any:
        return kinds.get(name, float)(text) if text else None

    return [Reading(**{name: value(name, text) for name, text in zip(COLUMNS, row, strict=True)}) for row in rows[1:]]


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _vocabulary(model: nn.Module) -> int:
    given: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if given is None else given()
    if embedding is None:
        embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise ModelError(f"no embedding found in {type(model).__name__}; expected an nn.Embedding among its modules")
    return embedding.weight.shape[0]


def _context(model: nn.Module) -> int | None:
    """The longest row a model says it reads, if it says so."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _lightning() -> Any:
    names = ("lightning.pytorch", "pytorch_lightning")
    # Who has imported one of them will use that one's Trainer.
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    raise ImportError("the Lightning callback needs Lightning: pip install lightning")


def _only_child_with_weights(module: Any) -> nn.Module:
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    return children[0] if len(children) == 1 else module
