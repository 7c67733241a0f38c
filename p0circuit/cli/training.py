"""`p0circuit train` and `trace`: train a model, and follow its circuit along training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p0circuit.cli.inputs import LARGE_BYTES, ModelSource, draw_prompts, load, say_estimate
from p0circuit.cli.options import (
    FIRST_IN_WORDS,
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
from p0circuit.cli.show import print_json
from p0circuit.errors import P0Error
from p0circuit.log import report_progress

if TYPE_CHECKING:
    from p0circuit.prompts import PromptSet


def train(
    out: Annotated[Path, typer.Argument(help="An empty directory, or that of an interrupted run to go on with.")],
    corpus: Annotated[
        str, typer.Option(help="python (installed source), a text file or directory, or hub:NAME for a data set.")
    ] = "python",
    variant: Annotated[
        str | None, typer.Option(help="A named configuration to start from: baseline, bos, tnlm, force-sink, …")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field of TrainConfig, as in weight_decay=0.5.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Cores to use.")] = 1,
) -> None:
    """Train a small model, keeping its history; an interrupted run goes on where it stopped."""
    from dataclasses import replace

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from p0circuit.training.config import TrainConfig, parse_options
    from p0circuit.training.trainer import train as train_model
    from p0circuit.training.variants import VARIANTS

    torch.set_num_threads(threads)
    if variant is not None and variant not in VARIANTS:
        raise P0Error(f"no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    named = {"corpus": corpus, "steps": steps, "n_layers": layers, "seed": seed}
    given = {name: value for name, value in named.items() if value is not None} | parse_options(option or [])
    config = replace(VARIANTS[variant] if variant else TrainConfig(), **given)
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=config.steps, loss=float("nan"))
        train_model(config, out, on_step=lambda step, loss: progress.update(task, completed=step, loss=loss))
    report_progress(f"the model and its trace are in {out}")


def trace(
    source: Annotated[str, typer.Argument(help="A shipped model, a directory of checkpoints, or a hub id.")],
    checkpoints: Annotated[
        str | None, typer.Option(help="Steps or revisions, separated by commas; all that are kept if not given.")
    ] = None,
    first: FirstOption = First.text,
    table: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="A file <variant>-<seed>.csv to put the checkpoints into as well, beside those with another --first: "
            "what the claims about training read (run C13 --runs DIRECTORY).",
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
    """Follow the circuit through a training run, checkpoint by checkpoint; what was measured before is read.

    A run whose checkpoints are not kept, but whose trace comes with the package, is shown from that trace.

    --json prints an object with the keys model, checkpoints, formation_step,
    stages, missing, first_token (what stood at position zero: text, bos or
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
        # Told now and not when all is measured.
        variant_and_seed(table)
        if length != LENGTH:
            raise P0Error(f"traces in tables are of {LENGTH} tokens, so that they compare, and --length is {length}")
    given = ModelSource(source, backend, device, dtype, None, device_map, offload_folder)
    begins = first.value
    texts: set[str] = set()

    def read(stored: Any) -> PromptSet:
        made = draw_prompts(stored, text, samples, length, seed, first, announce=False)
        texts.add(made.description.get("source", "random tokens"))
        return made

    try:
        labels = [label.strip() for label in checkpoints.split(",")] if checkpoints else checkpoints_of(source)
    except ModelError:
        if not (kinds := shipped_runs_by_first(source)):
            raise
        (run,) = as_trained([kinds[begins]] if begins in kinds else kinds.values())
        begins, found = run.first, Trace.of(run)
        told = f"this is the trace that comes with it, with {begins} at position zero (kept: {', '.join(kinds)})"
        report_progress(f"{source} keeps no checkpoints: {told}")
    else:
        say_estimate(given, labels, samples, length, PASSES_PER_CHECKPOINT, LARGE_BYTES)
        found = trace_run(
            source,
            read,
            labels,
            out / "checkpoints",
            lambda label: load(given, label),
            settings=f"{backend.value} {dtype or 'float32'}",
        )
    lines = found.to_dataframe().assign(first=begins)
    notes = [f"{label}: left out: {reason}" for label, reason in found.missing.items()]
    path = Result(
        "trace",
        f"The training of {found.model}",
        {},
        {"checkpoints": lines},
        {"development": found.figure()},
        notes=notes,
    ).save(out / found.model.replace("/", "--"))
    if table is not None:
        report_progress(f"its lines are in {save_run(table, lines)}")
    formed = f"formed at step {found.formation_step}" if found.formation_step is not None else "has no sink at its end"
    read_text = ", ".join(texts) or "the text of its trace"
    report_progress(
        f"{found.model} {formed}; {len(found.stages)} stages; on {read_text}, at position zero "
        f"{FIRST_IN_WORDS[First(begins)]}; table and figure are in {path.parent}"
    )
    print_json(found.to_json() | {"first_token": begins, "text": read_text if texts else None}, as_json)
