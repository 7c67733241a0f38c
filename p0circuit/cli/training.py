"""`p0circuit train` and `trace`: train a model, and follow its circuit through training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p0circuit.cli.inputs import LARGE_BYTES, ModelSource, draw_prompts, load, report_estimate
from p0circuit.cli.options import (
    FIRST_TOKEN_DESCRIPTIONS,
    Backend,
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    First,
    FirstOption,
    JsonOption,
    LengthOption,
    OffloadOption,
    OutOption,
    SamplesOption,
    SeedOption,
    TextOption,
)
from p0circuit.cli.settings import with_settings
from p0circuit.cli.show import print_json, print_table
from p0circuit.errors import P0Error
from p0circuit.log import report_progress

if TYPE_CHECKING:
    from p0circuit.models.metadata import StoredModel
    from p0circuit.prompts import PromptSet
    from p0circuit.training.trace import Trace

_TRACE_COLUMNS = {
    "loss": "loss",
    "excess": "excess",
    "sink_rate": "sink rate",
    "sink_rate_from_layer_2": "rate from layer 2",
    "norm_ratio": "norm ratio",
    "concentration_causal": "share of blocks 0-1",
    "induction_score": "induction score",
}
"""Values of a checkpoint that are printed after its step, with their headings; the CSV file has all values."""


def train(
    out: Annotated[Path, typer.Argument(help="An empty directory, or that of an interrupted run to resume.")],
    corpus: Annotated[
        str, typer.Option(help="python (installed source), a text file or directory, or hub:NAME for a data set.")
    ] = "python",
    variant: Annotated[
        str | None, typer.Option(help="A named configuration to start from: baseline, bos, tnlm, force-sink, …")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of updates.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of blocks.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of TrainConfig, as in weight_decay=0.5; may be repeated. An unknown field lists "
            "them all.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of cores to use.")] = 1,
) -> None:
    """Train a small model and keep checkpoints of it; an interrupted run is resumed where it stopped."""
    from dataclasses import replace

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from p0circuit.training.config import TrainConfig
    from p0circuit.training.trainer import train as train_model
    from p0circuit.training.variants import VARIANTS

    torch.set_num_threads(threads)
    if variant is not None and variant not in VARIANTS:
        raise P0Error(f"no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    options = {"corpus": corpus, "steps": steps, "n_layers": layers, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    config = with_settings(replace(VARIANTS[variant] if variant else TrainConfig(), **given), settings or [])
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=config.steps, loss=float("nan"))
        train_model(config, out, on_step=lambda step, loss: progress.update(task, completed=step, loss=loss))
    report_progress(f"the model and its trace are in {out}")


def trace(
    source: Annotated[str, typer.Argument(help="A shipped model, a directory of checkpoints, or a hub id.")],
    checkpoints: Annotated[
        str | None, typer.Option(help="Steps or revisions, separated by commas; default: all checkpoints.")
    ] = None,
    first: FirstOption = First.text,
    table: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="A file <variant>-<seed>.csv to add the checkpoints to, beside those with another --first: the input "
            "of the claims about training (run C13 --runs DIRECTORY).",
        ),
    ] = None,
    out: OutOption = Path("out"),
    text: TextOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Follow the circuit through a training run; a checkpoint that was measured before is not measured again.

    If the run has no checkpoints, but its trace comes with the package, that trace is shown.

    --json prints an object with the keys model, checkpoints, formation_step,
    stages, missing, first_token (the token at position zero: text, bos or
    random) and text (null for a trace that comes with the package). A
    checkpoint has step, tokens, loss, sink_rate, sink_rate_from_layer_2,
    norm_ratio, largest_norm_ratio, direction_consistency,
    concentration_observed, concentration_causal,
    induction_score and excess, and if it was measured now scores_first_half and
    excess_second_half by layer and head; null is what is not defined or not
    known. A stage has from_step, to_step, and the means of excess,
    sink_rate_from_layer_2, norm_ratio and concentration_observed over the
    checkpoints at which they are defined. missing has the reason for every
    checkpoint that could not be measured.
    """
    from p0circuit.models import ModelError
    from p0circuit.results import Result
    from p0circuit.training.checkpoints import checkpoints_of
    from p0circuit.training.runs import LENGTH, as_trained, save_run, shipped_runs_by_first, variant_and_seed
    from p0circuit.training.trace import PASSES_PER_CHECKPOINT, Trace, trace as trace_run

    if table is not None:
        # Refuse a bad name before the run is measured, not after.
        variant_and_seed(table)
        if length != LENGTH:
            raise P0Error(f"traces in tables are of {LENGTH} tokens, so that they compare, and --length is {length}")
    given = ModelSource(source, backend, device, dtype, None, device_map, offload_folder)
    first_token = first.value
    texts: set[str] = set()

    def prompts_of(stored: StoredModel) -> PromptSet:
        prompts = draw_prompts(stored, text, samples, length, seed, first)
        texts.add(prompts.description.get("source", "random tokens"))
        return prompts

    try:
        labels = [label.strip() for label in checkpoints.split(",")] if checkpoints else checkpoints_of(source)
    except ModelError:
        if not (by_first := shipped_runs_by_first(source)):
            raise
        (run,) = as_trained([by_first[first_token]] if first_token in by_first else by_first.values())
        first_token, measured = run.first, Trace.of(run)
        report_progress(
            f"{source} has no checkpoints: this is the trace that comes with the package, with {first_token} at "
            f"position zero (it has: {', '.join(by_first)})"
        )
    else:
        report_estimate(given, labels, samples, length, PASSES_PER_CHECKPOINT, LARGE_BYTES)
        measured = trace_run(
            source,
            prompts_of,
            labels,
            out / "checkpoints",
            lambda label: load(given, label),
            settings=f"{backend.value} {dtype or 'float32'}",
        )
    rows = measured.to_dataframe().assign(first=first_token)
    path = Result(
        "trace",
        f"The training of {measured.model}",
        {},
        {"checkpoints": rows},
        {"development": measured.figure()},
        notes=[f"{label}: left out: {reason}" for label, reason in measured.missing.items()],
    ).save(out / measured.model.replace("/", "--"))
    if table is not None:
        report_progress(f"its rows are in {save_run(table, rows)}")
    report_progress(f"table and figure are in {path.parent}")
    if as_json:
        text_read = ", ".join(texts) or None
        print_json(measured.to_json() | {"first_token": first_token, "text": text_read})
    else:
        _print_trace(measured, ", ".join(texts) or "the text of its trace", First(first_token))


def _print_trace(measured: Trace, text: str, first: First) -> None:
    """Print the checkpoints as a table, and when the sink emerged."""
    rows = measured.to_json()["checkpoints"]
    cells = [[row["step"], *(_number(row.get(name)) for name in _TRACE_COLUMNS)] for row in rows]
    print_table(("step", *_TRACE_COLUMNS.values()), cells, measured.model)
    step = measured.formation_step
    emergence = "there is no sink at its end" if step is None else f"the sink emerged at step {step}"
    stages = len(measured.stages)
    typer.echo(
        f"{measured.model}: {emergence}; {stages} stage{'s' * (stages > 1)}. Text: {text}; at position zero: "
        f"{FIRST_TOKEN_DESCRIPTIONS[first]}."
    )
    for label, reason in measured.missing.items():
        typer.echo(f"Left out: {label}: {reason}")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
