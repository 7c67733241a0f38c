"""The training trace of the circuit: every checkpoint of a run measured on the same prompts, and what the rows tell.

1. Checkpoints are put in order by the steps in their names.
2. Each is measured: loss, sink rate, norm and direction of P0, concentration in blocks 0-1, and the induction heads
   beside them. A row is on disk before the next checkpoint is loaded, under a hash of the stored weights: what was
   measured before is read, and its weights are not.
3. Sink heads are those of the last checkpoint, chosen on one half of the prompts and followed on the other.
4. Formation: the first checkpoint from which their excess score stays above half its final value.
5. Stages: change points of the development, as many as the Bayesian information criterion asks for.
Paper: section on the training trace. Its words "early", "concentrated" and "stages" get their definitions here.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit import sink
from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.nodes import InterventionError
from p0circuit.interventions.pairs import patch_values, shifted_pair
from p0circuit.io import code_fingerprint, write_json
from p0circuit.log import report_progress
from p0circuit.models import ModelError, StoredModel, describe, list_checkpoints, load_model, stored_model
from p0circuit.models.checkpoints import STEP, Label, parse_label
from p0circuit.models.source import is_gguf_model, local_folder
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import PromptSet, from_ids, random_tokens
from p0circuit.recording.quantities import (
    NORM_RATIO,
    RESIDUAL_NORMS,
    SINK_SCORE,
    TOKEN_LOSSES,
    Batch,
    Quantity,
    residual_at,
    score_at,
)
from p0circuit.recording.record import record
from p0circuit.results import library_versions
from p0circuit.sink import CONTROL, least_excess, sink_heads
from p0circuit.training.formation import (
    EARLY_BLOCKS,
    STAGE_COLUMNS,
    formation_index,
    lost_share,
    observed_concentration,
    stages,
)
from p0circuit.training.live_measurement import SHIFT
from p0circuit.training.runs import LENGTH, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PASSES = 3
"""About how many passes over all prompts a row takes; for the forecast of time alone."""


@dataclass(frozen=True)
class Trace:
    """A run's development.

    Attributes:
        model: the name of the run.
        rows: one per checkpoint that could be measured, by step; the keys are those of `measure_checkpoint`.
        missing: what could not be measured, and why, by the name of the checkpoint.
        length: tokens per prompt.
    """

    model: str
    rows: list[dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    length: int = 64

    @classmethod
    def of(cls, run: Run) -> Trace:
        """The trace that a run's table holds; without the values by head, from which its excess score was made."""
        lines = run.table.drop(columns="first").astype(object).to_dict("records")
        # What is not defined is NaN in a table, and NaN alone differs from itself.
        rows = [{str(name): value if value == value else None for name, value in line.items()} for line in lines]
        return cls(run.name, rows, length=LENGTH)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The sink heads of the last checkpoint, chosen on the first half of the prompts."""
        return sink_heads(torch.tensor(self.rows[-1]["scores_first_half"])[None])

    @property
    def excess(self) -> Float[np.ndarray, " checkpoint"]:
        """Their excess score on the second half, at every checkpoint."""
        if "excess" in self.rows[0]:
            return np.array([row["excess"] for row in self.rows])
        layers, heads = map(list, zip(*self.heads, strict=True))
        return np.array([np.array(row["excess_second_half"])[layers, heads].mean() for row in self.rows])

    @property
    def formation(self) -> int | None:
        """The index of the checkpoint at which the sink has formed; None where there is no sink at the end."""
        return formation_index(self.excess, least_excess(self.length))

    @property
    def formation_step(self) -> int | None:
        return None if self.formation is None else self.rows[self.formation]["step"]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages between change points, with the means of what they were found from."""
        columns = {name: np.array([row[name] for row in self.rows], dtype=np.float64) for name in STAGE_COLUMNS}
        return stages(np.array([row["step"] for row in self.rows]), {"excess": self.excess, **columns})

    def to_json(self) -> dict[str, Any]:
        """What `p0circuit trace --json` prints.

        Keys: model; checkpoints, each with step, tokens (None where nothing tells them), the keys of
        `measure_checkpoint`, and excess (of the heads that are sinks at the end); formation_step, None where there is
        no sink at the end; stages, each with from_step, to_step and the means of excess, sink_rate_from_layer_2,
        norm_ratio and concentration_observed over its checkpoints at which they are defined, None where at none;
        missing, the reason for each checkpoint that could not be measured.
        """
        return {
            "model": self.model,
            "checkpoints": [row | {"excess": float(own)} for row, own in zip(self.rows, self.excess, strict=True)],
            "formation_step": self.formation_step,
            "stages": self.stages,
            "missing": self.missing,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One line per checkpoint, without the values by head."""
        import pandas as pd

        plain = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in self.rows]
        return pd.DataFrame(plain).assign(excess=self.excess)

    def figure(self) -> Figure:
        """The development; a checkpoint that could not be measured is a gap in every line, and marked."""
        import pandas as pd

        from p0circuit.figures.training import development

        gaps = pd.DataFrame({"step": [told.step for told in map(parse_label, self.missing) if told is not None]})
        table = pd.concat([self.to_dataframe(), gaps]) if len(gaps) else self.to_dataframe()
        return development({self.model: table.sort_values("step", ignore_index=True)}, self.formation_step)


@torch.no_grad()
def measure_checkpoint(model: HookedModel, prompts: PromptSet) -> dict[str, Any]:
    """One row of a trace.

    Keys: loss (nats per token, the prediction made at P0 left out: the TNLM loss does not train it), sink_rate,
    sink_rate_from_layer_2, norm_ratio and direction_consistency (after block 1), largest_norm_ratio,
    concentration_observed, concentration_causal, induction_score (best head), and by layer and head
    scores_first_half and excess_second_half. Concentrations are None where there is nothing to share out. Those that a
    monitor reads too (`probe.Measurement`) are the same numbers on the same prompts.
    """
    info = describe(model)
    if info.n_layers <= EARLY_BLOCKS:
        raise ModelError(
            f"{info.name} has {info.n_layers} layers; a trace needs blocks beyond the first {EARLY_BLOCKS}"
        )
    beside = score_at(CONTROL)
    quantities = [SINK_SCORE, beside, NORM_RATIO, RESIDUAL_NORMS, TOKEN_LOSSES, residual_at()]
    recording = record(model, prompts, quantities, cache=None)
    scores, ratios = recording[SINK_SCORE].double(), recording[NORM_RATIO].double().mean(0)
    half = prompts.n // 2
    consistency = sink.direction_cosines(recording[residual_at()]).double().mean(0)
    norms = recording[RESIDUAL_NORMS].double()[torch.arange(prompts.n), :, prompts.p0]
    return {
        "loss": float(beyond_p0(recording[TOKEN_LOSSES], prompts).double().nanmean()),
        "sink_rate": float(sink.sink_rate(scores).mean()),
        "sink_rate_from_layer_2": float(sink.sink_rate(scores, from_layer=EARLY_BLOCKS).mean()),
        "norm_ratio": float(ratios[EARLY_BLOCKS]),
        "largest_norm_ratio": float(ratios.max()),
        "direction_consistency": float(consistency[EARLY_BLOCKS]),
        "concentration_observed": observed_concentration(norms),
        "concentration_causal": causal_concentration(model, prompts, scores),
        "induction_score": induction_score(model, prompts),
        "scores_first_half": scores[:half].mean(0).tolist(),
        "excess_second_half": (scores - recording[beside].double())[half:].mean(0).tolist(),
    }


def beyond_p0(losses: Float[Tensor, "sample pos"], prompts: PromptSet) -> Float[Tensor, "sample pos"]:
    """Next-token losses with that of the prediction made at P0 made NaN."""
    places = torch.arange(losses.shape[1], device=losses.device)
    return losses.masked_fill(places == prompts.p0.to(losses.device)[:, None], math.nan)


def causal_concentration(
    model: HookedModel, prompts: PromptSet, clean: Float[Tensor, "sample layer head"]
) -> float | None:
    """The share of `Sink[2:]` that is lost when P0's residual after block 1 is that of the shifted run.

    None where fewer than one head in a thousand is a sink.
    """

    def rate(scores: Float[Tensor, "sample layer head"]) -> float:
        return float(sink.sink_rate(scores.double(), from_layer=EARLY_BLOCKS).mean())

    def behind_others() -> float:
        pair = shifted_pair(model, prompts, SHIFT, prompts.seed)
        node = f"resid_post.{EARLY_BLOCKS - 1}"
        change = ablate(model, prompts, [node], patch_values(model, pair, [node]))
        return rate(record(model, prompts, SINK_SCORE, cache=None, interventions=[change]))

    return lost_share(rate(clean), behind_others)


def induction_score(model: HookedModel, prompts: PromptSet, rows: int = 32) -> float:
    """The best head's mean attention, in the second half of random tokens said twice, to what followed them before.

    Olsson et al. 2022 (arXiv 2209.11895).
    """
    vocabulary, special = sampleable_vocabulary(model)
    half = prompts.length // 2
    once = random_tokens(vocabulary, n=rows, length=half, seed=prompts.seed, special=special).ids
    twice = torch.cat([once, once], dim=1)
    repeated = from_ids(twice, torch.ones_like(twice, dtype=torch.bool), vocabulary)
    return float(record(model, repeated, INDUCTION, cache=None).mean(0).max())


def _induction(pattern: Float[Tensor, "batch head query key"], batch: Batch) -> Float[Tensor, "batch head"]:
    half = pattern.shape[-1] // 2
    return pattern.diagonal(1 - half, dim1=-2, dim2=-1)[..., 1:].mean(-1)


INDUCTION = Quantity("induction", ("attn.hook_pattern",), _induction)
"""[sample, layer, head] on tokens said twice: attention to the token after the same one before."""


def trace(
    source: str | Path,
    prompts_for: Callable[[StoredModel], PromptSet],
    checkpoints: Sequence[int | str],
    out: Path | None = None,
    load: Callable[[int | str], Any] | None = None,
    settings: str = "",
) -> Trace:
    """Measure the checkpoints of a run, in order of their steps, and keep each row in `out` as soon as it is there.

    `prompts_for` makes the prompts from a checkpoint as it is stored (its tokenizer and the size of its vocabulary);
    a checkpoint for which they come out otherwise than for those before cannot be measured. A row that `out` holds
    already, of the same stored weights, prompts, code and `settings` (whatever else decides what `load` gives, such as
    the dtype), is read, and nothing is loaded. What cannot be loaded or measured is named in `missing`, and stops
    nothing.

    Raises:
        P0Error: a checkpoint's name has no step in it, or they are of several stages of training.
        ModelError: none of the checkpoints could be measured.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    name, length, same = str(source), 0, ""

    def load_it(checkpoint: int | str) -> Any:
        return load_model(source, checkpoint=checkpoint) if load is None else load(checkpoint)

    for checkpoint, told in _in_order(checkpoints):
        try:
            stored = stored_model(source, checkpoint)
            prompts = prompts_for(stored)
            name, length = stored.name.partition("@")[0], prompts.length
            same = same or prompts.fingerprint()
            if prompts.fingerprint() != same:
                raise ModelError("its prompts are not those of the checkpoints before: another tokenizer, or none")
            key = _key(stored, prompts, settings)
            kept = None if out is None else out / f"{name}@{stored.label}.json".replace("/", "--")
            row = _kept_row(kept, key)
            if row is None:
                row = measure_checkpoint(load_it(checkpoint), prompts)
                if kept is not None:
                    write_json(kept, row | {"key": key})
        except (ModelError, InterventionError, FloatingPointError) as reason:
            missing[str(checkpoint)] = str(reason)
            report_progress(f"{checkpoint}: left out: {reason}")
            continue
        finally:
            # A large model has to be gone before the next one comes.
            gc.collect()
        rows.append({"step": told.step, "tokens": tokens_seen(stored, told.step), **row})
        report_progress(
            f"{name} {checkpoint}: loss {row['loss']:.3f}, sink rate from layer 2 {row['sink_rate_from_layer_2']:.3f}"
        )
    if not rows:
        raise ModelError(f"none of the checkpoints of {source} could be measured: {missing}")
    return Trace(name, rows, missing, length)


def _in_order(checkpoints: Sequence[int | str]) -> list[tuple[int | str, Label]]:
    """Checkpoints with what their names say, by step, each step once."""
    found: dict[int, tuple[int | str, Label]] = {}
    for checkpoint in checkpoints:
        if (told := parse_label(checkpoint)) is None:
            raise P0Error(
                f"checkpoint {checkpoint!r} has no step in its name; expected a step or a name such as step-000500, "
                "checkpoint-500, step1000-tokens4B or stage1-step1000-tokens5B"
            )
        found[told.step] = checkpoint, told
    if len(several := sorted({told.stage for _, told in found.values()})) > 1:
        raise P0Error(f"checkpoints of the stages {several} count their steps anew: trace one stage at a time")
    return [found[step] for step in sorted(found)]


def _kept_row(path: Path | None, key: str) -> dict[str, Any] | None:
    """The row that `path` holds, if it was measured on what the key stands for."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        row = json.loads(path.read_text()) if path is not None else {}
        return row if row.pop("key", None) == key else None
    return None


def checkpoints_of(source: str | Path) -> list[int | str]:
    """The checkpoints of a run by step: those that can be loaded and, in a directory, those that look damaged too.

    Raises:
        ModelError: there are none.
    """
    steps = set(list_checkpoints(source))
    folder = None if is_gguf_model(source) else local_folder(source)
    # A directory named after a step without a config is a checkpoint that was not written to its end.
    for place in [*folder.glob("trace/*"), *folder.glob("*")] if folder else []:
        if place.is_dir() and STEP.fullmatch(place.name) and (told := parse_label(place.name)):
            steps.add(told.step)
    if not steps:
        raise ModelError(f"{source} keeps no checkpoints; expected trace/step-000123 or checkpoint-123 in it")
    return sorted(steps)


def tokens_seen(stored: StoredModel, step: int) -> int | None:
    """How many tokens a checkpoint had been trained on; None where nothing tells.

    Its name does (OLMo, rounded), the Trainer's state beside its weights where the Trainer was told to count them, or
    the `trace.csv` of its run.
    """
    told = parse_label(stored.label or "")
    if told is not None and told.tokens is not None:
        return told.tokens
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((stored.folders[0] / "trainer_state.json").read_text())
        if state["num_input_tokens_seen"] > 0:
            return int(state["num_input_tokens_seen"])
    return tokens_by_step(stored.folders[-1]).get(step)


def tokens_by_step(folder: Path) -> dict[int, int]:
    """How many tokens a run had seen at each step, from the `trace.csv` beside it; empty if there is none."""
    path = folder / "trace.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {int(row["step"]): int(row["tokens"]) for row in csv.DictReader(file)}


def _key(stored: StoredModel, prompts: PromptSet, settings: str) -> str:
    parts = stored.fingerprint, prompts.fingerprint(), settings, code_fingerprint(), library_versions()
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
