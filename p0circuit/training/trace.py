"""The training trace: every checkpoint of a run measured on the same prompts.

1. Checkpoints are ordered by the steps in their names.
2. Each is measured (`checkpoint_measurement.py`). A row is written before the next checkpoint is loaded, under a hash
   of the stored weights. A checkpoint that was measured before is read from disk, and its weights are not loaded.
3. Sink heads are those of the last checkpoint, selected on one half of the prompts and measured on the other.
4. Emergence: the first checkpoint from which their excess score stays above half its final value.
5. Stages: change points of several quantities, with their number selected by the Bayesian information criterion.

The paper (arXiv 2603.06591, section on the training trace) speaks of "early", "concentrated" and "stages"; these are
the definitions used here.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Float

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError
from p0circuit.io import code_fingerprint, write_json
from p0circuit.log import report_progress
from p0circuit.models import ModelError, StoredModel, load_model, stored_model
from p0circuit.models.checkpoints import parse_label
from p0circuit.prompts import PromptSet
from p0circuit.results import library_versions
from p0circuit.sink import least_excess, sink_heads
from p0circuit.training.checkpoint_measurement import CheckpointMeasurement, measure_checkpoint
from p0circuit.training.checkpoints import order_checkpoints, tokens_seen
from p0circuit.training.formation import STAGE_COLUMNS, Stage, formation_index, stages
from p0circuit.training.runs import LENGTH, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PASSES_PER_CHECKPOINT = 3
"""About how many passes over all prompts a checkpoint takes; used only to estimate the time."""


class _Row(CheckpointMeasurement):
    step: int
    tokens: int | None


class TraceRow(_Row, total=False):
    """One checkpoint of a trace: what was measured, and when.

    Attributes:
        step: training step.
        tokens: tokens trained on; None where they are not known.
        excess: excess score of the sink heads of the last checkpoint; only in rows of a table, which lack the values by
            head.
    """

    excess: float


class TraceJson(TypedDict):
    """What `p0circuit trace --json` prints, apart from the first token and the text of the prompts.

    Attributes:
        model: name of the run.
        checkpoints: its rows, each with `excess`.
        formation_step: step at which the sink emerged; None if there is no sink at the end.
        stages: its stages, each with from_step, to_step and the means of excess and of `STAGE_COLUMNS` over its
            checkpoints at which they are defined, None where they are at none.
        missing: the reason for each checkpoint that could not be measured.
    """

    model: str
    checkpoints: list[TraceRow]
    formation_step: int | None
    stages: list[Stage]
    missing: dict[str, str]


@dataclass(frozen=True)
class Trace:
    """The measured checkpoints of a run.

    Attributes:
        model: name of the run.
        rows: one row per measured checkpoint, by step.
        missing: the reason for each checkpoint that could not be measured, by its name.
        length: tokens per prompt.
    """

    model: str
    rows: list[TraceRow]
    missing: dict[str, str] = field(default_factory=dict)
    length: int = 64

    @classmethod
    def of(cls, run: Run) -> Trace:
        """Make the trace of a run's table, without the values by head.

        Args:
            run: a run, such as one of `shipped_runs`.
        """
        lines = run.table.drop(columns="first").astype(object).to_dict("records")
        # A value that is not defined is NaN in a table, and only NaN differs from itself.
        rows = [{str(name): value if value == value else None for name, value in line.items()} for line in lines]
        return cls(run.name, cast("list[TraceRow]", rows), length=LENGTH)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The sink heads (layer, head) of the last checkpoint, selected on the first half of the prompts."""
        return sink_heads(torch.tensor(self.rows[-1]["scores_first_half"])[None])

    @property
    def excess(self) -> Float[np.ndarray, " checkpoint"]:
        """Excess score of the sink heads at every checkpoint, on the second half of the prompts."""
        if "excess" in self.rows[0]:
            return np.array([row.get("excess") for row in self.rows])
        layers, heads = map(list, zip(*self.heads, strict=True))
        return np.array([np.array(row["excess_second_half"])[layers, heads].mean() for row in self.rows])

    @property
    def formation(self) -> int | None:
        """Index of the checkpoint at which the sink has emerged; None if there is no sink at the end."""
        return formation_index(self.excess, least_excess(self.length))

    @property
    def formation_step(self) -> int | None:
        """Step of that checkpoint."""
        return None if self.formation is None else self.rows[self.formation]["step"]

    @property
    def stages(self) -> list[Stage]:
        """The stages between change points, with the means of the quantities they were computed from."""
        table = self.to_dataframe()
        columns = {name: table[name].to_numpy(dtype=np.float64) for name in STAGE_COLUMNS}
        return stages(table["step"].to_numpy(), {"excess": self.excess, **columns})

    def to_json(self) -> TraceJson:
        """Return the trace as plain values for JSON."""
        return {
            "model": self.model,
            "checkpoints": [
                cast("TraceRow", row | {"excess": float(excess)})
                for row, excess in zip(self.rows, self.excess, strict=True)
            ],
            "formation_step": self.formation_step,
            "stages": self.stages,
            "missing": self.missing,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per checkpoint, without the values by head."""
        import pandas as pd

        plain = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in self.rows]
        return pd.DataFrame(plain).assign(excess=self.excess)

    def figure(self) -> Figure:
        """Draw all quantities over the steps; a checkpoint that could not be measured is a marked gap in every line."""
        import pandas as pd

        from p0circuit.figures.training import trace_panels

        labels = map(parse_label, self.missing)
        gaps = pd.DataFrame({"step": [label.step for label in labels if label is not None]})
        table = pd.concat([self.to_dataframe(), gaps]) if len(gaps) else self.to_dataframe()
        return trace_panels({self.model: table.sort_values("step", ignore_index=True)}, self.formation_step)


def trace(
    source: str | Path,
    prompts_for: Callable[[StoredModel], PromptSet],
    checkpoints: Sequence[int | str],
    out: Path | None = None,
    load: Callable[[int | str], HookedModel] | None = None,
    settings: str = "",
) -> Trace:
    """Measure the checkpoints of a run in order of their steps.

    A checkpoint that cannot be loaded or measured is named in `missing`; the others are measured.

    Args:
        source: a model name, a directory of checkpoints, or a hub id.
        prompts_for: makes the prompts from a stored checkpoint (its tokenizer and the size of its vocabulary). A
            checkpoint whose prompts differ from those of the checkpoints before cannot be measured.
        checkpoints: steps or names of checkpoints (`checkpoints_of`).
        out: directory for one JSON file per row. A row that it already has, of the same stored weights, prompts, code
            and `settings`, is read, and its checkpoint is not loaded.
        load: loads a checkpoint; `load_model` if None.
        settings: everything else that decides what `load` returns, such as the dtype.

    Raises:
        P0Error: a checkpoint's name has no step in it, or they are of several stages of training.
        ModelError: none of the checkpoints could be measured.

    Example:
        run = trace("p0-nano", lambda stored: natural_text(stored, "stdlib"), checkpoints_of("p0-nano"))
        print(run.formation_step, run.to_dataframe())
    """
    rows: list[TraceRow] = []
    missing: dict[str, str] = {}
    name, length, fingerprint = str(source), 0, ""

    def load_checkpoint(checkpoint: int | str) -> HookedModel:
        return load_model(source, checkpoint=checkpoint) if load is None else load(checkpoint)

    for checkpoint, label in order_checkpoints(checkpoints):
        try:
            stored = stored_model(source, checkpoint)
            prompts = prompts_for(stored)
            name, length = stored.name.partition("@")[0], prompts.length
            fingerprint = fingerprint or prompts.fingerprint()
            if prompts.fingerprint() != fingerprint:
                raise ModelError("its prompts are not those of the checkpoints before: another tokenizer, or none")
            key = _key(stored, prompts, settings)
            path = None if out is None else out / f"{name}@{stored.label}.json".replace("/", "--")
            row = _stored_row(path, key)
            if row is None:
                row = measure_checkpoint(load_checkpoint(checkpoint), prompts)
                if path is not None:
                    write_json(path, row | {"key": key})
        except (ModelError, InterventionError, FloatingPointError) as reason:
            missing[str(checkpoint)] = str(reason)
            report_progress(f"{checkpoint}: left out: {reason}")
            continue
        finally:
            # A large model has to be freed before the next one is loaded.
            gc.collect()
        rows.append({"step": label.step, "tokens": tokens_seen(stored, label.step), **row})
        report_progress(
            f"{name} {checkpoint}: loss {row['loss']:.3f}, sink rate from layer 2 {row['sink_rate_from_layer_2']:.3f}"
        )
    if not rows:
        raise ModelError(f"none of the checkpoints of {source} could be measured: {missing}")
    return Trace(name, rows, missing, length)


def _stored_row(path: Path | None, key: str) -> CheckpointMeasurement | None:
    """The row in the file `path`, if it was measured under this key."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        row = json.loads(path.read_text()) if path is not None else {}
        return cast("CheckpointMeasurement", row) if row.pop("key", None) == key else None
    return None


def _key(stored: StoredModel, prompts: PromptSet, settings: str) -> str:
    parts = stored.fingerprint, prompts.fingerprint(), settings, code_fingerprint(), library_versions()
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
