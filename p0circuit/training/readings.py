"""Readings of a monitor: a measurement at a training step, how far the sink has emerged by then, and their CSV file.

Emergence in a run in progress has a rule that was fixed before anything was measured. A reading is *above* where its
excess score is more than twice that of uniform attention on prompts of this length.

- "none": the latest reading is not above.
- "forming": the latest reading is above.
- "formed": the last three readings are above. The sink emerged at the first of the unbroken series of readings above
  that ends with the latest.

The trace of a finished run has another rule, above half the final value until the end: a run in progress has no final
value.
"""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from p0circuit.errors import P0Error
from p0circuit.io import write_atomically
from p0circuit.training.live_measurement import Measurement

LASTING = 3
"""Number of readings in a row above the threshold after which a sink counts as formed."""
STAGES = ("none", "forming", "formed")
"""Stages of emergence, in order."""
COLUMNS = ("step", *(field.name for field in fields(Measurement)), "formation", "formation_step", "prompts_fingerprint")
"""Columns of the CSV file: the fields of `Reading`."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading(Measurement):
    """A measurement, the training step it was made at, and how far the sink has emerged by then.

    Attributes:
        step: step of the training loop.
        formation: "none", "forming" or "formed".
        formation_step: step at which the sink emerged; None unless `formation` is "formed".
        prompts_fingerprint: first 12 characters of the fingerprint of the prompts; readings on different prompts
            cannot be compared.
    """

    step: int
    formation: str
    formation_step: int | None
    prompts_fingerprint: str

    @property
    def status(self) -> str:
        """Emergence in words: "none", "forming", or "emerged at step N"."""
        return f"emerged at step {self.formation_step}" if self.formation == "formed" else self.formation

    def numbers(self) -> dict[str, float]:
        """Return the values to log, by names such as `p0/sink_rate`.

        `p0/formation` is 0 (none), 1 (forming) or 2 (formed). Values that are None are left out.
        """
        values = asdict(self) | {"formation": float(STAGES.index(self.formation))}
        left_out = ("step", "prompts_fingerprint")
        return {f"p0/{name}": value for name, value in values.items() if value is not None and name not in left_out}


def formation_stage(excess: Sequence[tuple[int, float]], threshold: float) -> tuple[str, int | None]:
    """Return the stage of emergence at the latest reading.

    Args:
        excess: (step, excess score) of all readings, in order.
        threshold: excess score that a reading has to exceed.

    Returns:
        One of `STAGES`, and the step at which the sink emerged, None unless it is "formed".
    """
    above: list[int] = []
    for step, value in excess:
        above = [*above, step] if value > threshold else []
    if len(above) < LASTING:
        return STAGES[bool(above)], None
    return "formed", above[0]


class ReadingsFile:
    """The CSV file of a monitor: one row per reading."""

    def __init__(self, path: Path) -> None:
        """Use a file, which need not exist.

        Args:
            path: the file.
        """
        self.path = path
        # The readings that the file is known to hold.
        self._stored: list[Reading] = []

    def read(self) -> list[Reading]:
        """Read the file; a last row that was cut off is left out.

        Raises:
            P0Error: the file was not written by a monitor.
        """
        return read_readings(self.path) if self.path.exists() else []

    def write(self, readings: Sequence[Reading]) -> None:
        """Make the file hold these readings.

        The last one is appended where the file is known to hold the others. The file is rewritten otherwise; if it has
        readings after the last of these, a copy of it is kept with `.old` at the end of its name.

        Args:
            readings: all readings, in order of their steps.

        Raises:
            OSError: the file cannot be written.
        """
        stored, last = self._stored, readings[-1].step
        # If writing fails the file may be torn, and the next call has to rewrite it.
        self._stored = []
        if stored and stored == list(readings[:-1]):
            _write_rows(self.path, readings[-1:], "a")
        else:
            if any(reading.step > last for reading in self.read()):
                copy = self.path.with_name(f"{self.path.name}.old")
                message = "%s: the readings after step %d are superseded; the file is kept as %s"
                _logger.warning(message, self.path, last, copy)
                shutil.copyfile(self.path, copy)
            write_atomically(self.path, lambda temporary: _write_rows(temporary, readings, "w"))
        self._stored = list(readings)


def read_readings(path: Path) -> list[Reading]:
    """Read the CSV file of a monitor; a last row that was cut off is left out.

    Args:
        path: the file.

    Raises:
        P0Error: the file was not written by a monitor.
    """
    text = path.read_text()
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if rows and tuple(rows[0]) != COLUMNS:
        raise P0Error(
            f"{str(path)!r} is not a file of P0Monitor, or of another version: its columns are {rows[0]}, expected "
            f"{list(COLUMNS)}; name another file"
        )
    return [_parse(dict(zip(COLUMNS, row, strict=True))) for row in rows[1:]]


def _parse(row: dict[str, str]) -> Reading:
    def number(name: str) -> float | None:
        return float(row[name]) if row[name] else None

    return Reading(
        **{field.name: number(field.name) for field in fields(Measurement)},  # pyright: ignore[reportArgumentType]
        step=int(row["step"]),
        formation=row["formation"],
        formation_step=int(row["formation_step"]) if row["formation_step"] else None,
        prompts_fingerprint=row["prompts_fingerprint"],
    )


def _write_rows(path: Path, readings: Sequence[Reading], mode: str) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows([asdict(reading) for reading in readings])
