"""The training trace of the circuit: every checkpoint of a run measured on the same prompts, and what the rows tell.

1. Each checkpoint is loaded, and measured: loss, sink rate, norm and direction of P0, concentration in blocks 0-1, and
   the induction heads beside them. A row is on disk before the next checkpoint is loaded.
2. Sink heads are those of the last checkpoint, chosen on one half of the prompts and followed on the other.
3. Formation: the first checkpoint from which their excess score stays above half its final value.
4. Stages: change points of the development, as many as the Bayesian information criterion asks for.
Paper: section on the training trace. Its words "early", "concentrated" and "stages" get their definitions here.
"""

from __future__ import annotations

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
from p0circuit.activations import (
    NORM_RATIO,
    RESIDUAL_NORMS,
    SINK_SCORE,
    TOKEN_LOSSES,
    Batch,
    Quantity,
    record,
    residual_at,
    score_at,
    weights_fingerprint,
)
from p0circuit.console import say
from p0circuit.experiments.conditions import drawable
from p0circuit.experiments.heads import sink_heads
from p0circuit.files import write_json
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.contrast import contrast, replacements
from p0circuit.models import ModelError, describe, list_checkpoints, load_model
from p0circuit.models.load import STEP
from p0circuit.paths import code_fingerprint, data_dir
from p0circuit.prompts import PromptSet, from_ids, random_tokens
from p0circuit.sink import CONTROL, least_excess
from p0circuit.training.development import STAGE_COLUMNS, formation_index, stages
from p0circuit.training.probe import SHIFT

if TYPE_CHECKING:
    import pandas as pd

PASSES = 3
"""About how many passes over all prompts a row takes; for the forecast of time alone."""
EARLY_BLOCKS = 2
"""Recognition and amplification are said to be done by these many blocks."""


@dataclass(frozen=True)
class Trace:
    """A run's development.

    Attributes:
        model: the name of the run.
        rows: one per checkpoint that could be measured, by step; the keys are those of `measure_checkpoint`.
        missing: what could not be measured, and why.
        length: tokens per prompt.
    """

    model: str
    rows: list[dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    length: int = 64

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The sink heads of the last checkpoint, chosen on the first half of the prompts."""
        return sink_heads(torch.tensor(self.rows[-1]["scores_first_half"])[None])[0]

    @property
    def excess(self) -> Float[np.ndarray, " checkpoint"]:
        """Their excess score on the second half, at every checkpoint."""
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
        return {
            "model": self.model,
            "checkpoints": self.rows,
            "formation_step": self.formation_step if self.rows else None,
            "stages": self.stages if self.rows else [],
            "missing": self.missing,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One line per checkpoint, without the values by head."""
        import pandas as pd

        plain = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in self.rows]
        return pd.DataFrame(plain).assign(excess=self.excess)


@torch.no_grad()
def measure_checkpoint(model: Any, prompts: PromptSet) -> dict[str, Any]:
    """One row of a trace.

    Keys: loss (nats per token, the prediction made at P0 left out: the TNLM loss does not train it), sink_rate,
    sink_rate_from_layer_2, norm_ratio and direction_consistency (after block 1), largest_norm_ratio,
    concentration_observed, concentration_causal, induction_score (best head), and by layer and head
    scores_first_half and excess_second_half. Concentrations are None where there is nothing to share out.
    """
    info = describe(model)
    if info.layers <= EARLY_BLOCKS:
        raise ModelError(f"{info.name} has {info.layers} layers; a trace needs blocks beyond the first {EARLY_BLOCKS}")
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


def observed_concentration(norms: Float[Tensor, "sample layer"]) -> float | None:
    """The share of P0's log-norm gain that blocks 0-1 write; None where its norm does not grow by a tenth anywhere.

    The gain is from the embedding to the largest norm along the layers, in means over samples.
    """
    logs = norms.log().mean(0)
    gain = float(logs.max() - logs[0])
    return None if gain < math.log(1.1) else min(1.0, float(logs[EARLY_BLOCKS] - logs[0]) / gain)


def causal_concentration(model: Any, prompts: PromptSet, clean: Float[Tensor, "sample layer head"]) -> float | None:
    """The share of `Sink[2:]` that is lost when P0's residual after block 1 is that of the shifted run.

    None where fewer than one head in a thousand is a sink.
    """
    rate = float(sink.sink_rate(clean, from_layer=EARLY_BLOCKS).mean())
    if rate < 1e-3:
        return None
    vocabulary, special = drawable(model)
    pair = contrast(prompts, SHIFT, vocabulary, prompts.seed, tuple(special))
    node = f"resid_post.{EARLY_BLOCKS - 1}"
    values = replacements(model, pair, [node])
    patched = record(model, prompts, SINK_SCORE, cache=None, interventions=[ablate(model, prompts, [node], values)])
    return 1 - float(sink.sink_rate(patched[SINK_SCORE], from_layer=EARLY_BLOCKS).mean()) / rate


def induction_score(model: Any, prompts: PromptSet, rows: int = 32) -> float:
    """The best head's mean attention, in the second half of random tokens said twice, to what followed them before.

    Olsson et al. 2022 (arXiv 2209.11895).
    """
    vocabulary, special = drawable(model)
    half = prompts.length // 2
    once = random_tokens(vocabulary, n=rows, length=half, seed=prompts.seed, special=special).ids
    twice = torch.cat([once, once], dim=1)
    repeated = from_ids(twice, torch.ones_like(twice, dtype=torch.bool), vocabulary)
    return float(record(model, repeated, INDUCTION, cache=None)[INDUCTION].mean(0).max())


def _induction(pattern: Float[Tensor, "batch head query key"], batch: Batch) -> Float[Tensor, "batch head"]:
    half = pattern.shape[-1] // 2
    return pattern.diagonal(1 - half, dim1=-2, dim2=-1)[..., 1:].mean(-1)


INDUCTION = Quantity("induction", ("attn.hook_pattern",), _induction)
"""[sample, layer, head] on tokens said twice: attention to the token after the same one before."""


def trace(
    source: str | Path,
    prompts_for: Callable[[Any], PromptSet],
    checkpoints: Sequence[int | str],
    out: Path | None = None,
    load: Callable[[int | str], Any] | None = None,
) -> Trace:
    """Measure the checkpoints of a run, in the order given, and keep each row in `out` as soon as it is there.

    `prompts_for` makes the prompts from a loaded model (its tokenizer); they are the same for every checkpoint. A row
    that `out` holds already, of the same prompts and code, is read. What cannot be loaded is named in `missing`, and
    stops nothing.

    Raises:
        ModelError: none of the checkpoints could be loaded.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    name, length = str(source), 0
    tokens = tokens_by_step(_folder(source) or Path(source))
    for checkpoint in checkpoints:
        try:
            model = (load or (lambda step: load_model(source, checkpoint=step)))(checkpoint)
        except ModelError as reason:
            missing[str(checkpoint)] = str(reason)
            say(f"{checkpoint}: left out: {reason}")
            continue
        prompts = prompts_for(model)
        length = prompts.length
        name = describe(model).name.partition("@")[0]
        kept = out / f"{name.replace('/', '--')}-{checkpoint}.json" if out is not None else None
        key = _key(model, prompts)
        row = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
        if row.get("key") != key:
            step = int(checkpoint) if str(checkpoint).isdigit() else len(rows)
            row = {"step": step, "tokens": tokens.get(step), **measure_checkpoint(model, prompts), "key": key}
            if kept is not None:
                write_json(kept, row)
        rows.append({field: value for field, value in row.items() if field != "key"})
        say(f"{name} {checkpoint}: loss {row['loss']:.3f}, sink rate from layer 2 {row['sink_rate_from_layer_2']:.3f}")
        # A large model has to be gone before the next one comes.
        del model
        gc.collect()
    if not rows:
        raise ModelError(f"none of the checkpoints of {source} could be loaded: {missing}")
    return Trace(name, rows, missing, length)


def checkpoints_of(source: str | Path) -> list[int | str]:
    """The checkpoints of a run by step: those that can be loaded and, in a directory, those that look damaged too.

    Raises:
        ModelError: there are none.
    """
    steps = set(list_checkpoints(source))
    folder = _folder(source)
    # A directory named after a step without a config is a checkpoint that was not written to its end.
    for place in [*folder.glob("trace/*"), *folder.glob("*")] if folder else []:
        if place.is_dir() and (match := STEP.fullmatch(place.name)):
            steps.add(int(match.group(1)))
    if not steps:
        raise ModelError(f"{source} keeps no checkpoints; expected trace/step-000123 or checkpoint-123 in it")
    return sorted(steps)


def _folder(source: str | Path) -> Path | None:
    """The directory of a shipped model or of the caller's own; None for a hub id."""
    return next((path for path in (data_dir() / "models" / source, Path(source)) if path.is_dir()), None)


def tokens_by_step(folder: Path) -> dict[int, int]:
    """How many tokens a run had seen at each step, from the `trace.csv` beside it; empty if there is none."""
    path = folder / "trace.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {int(row["step"]): int(row["tokens"]) for row in csv.DictReader(file)}


def _key(model: Any, prompts: PromptSet) -> str:
    parts = (weights_fingerprint(model), prompts.fingerprint(), code_fingerprint())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
