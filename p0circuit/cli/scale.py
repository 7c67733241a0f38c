"""`p0circuit sweep` and `bench`: many models on many cores, and how fast one of them is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from p0circuit.cli.inputs import ModelSource, draw_pooled_prompts, load, torch_dtype
from p0circuit.cli.options import (
    MODEL_HELP,
    Backend,
    BackendOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    SamplesOption,
    SeedOption,
    TextOption,
)
from p0circuit.cli.show import print_json
from p0circuit.log import report_progress


def sweep(
    models: Annotated[str, typer.Option(help=f"Separated by commas. {MODEL_HELP}")] = "p0-nano",
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Steps or revisions, separated by commas; a model that keeps none is run once, as it is."),
    ] = None,
    experiments: Annotated[str, typer.Option(help="Ids, or those of claims, separated by commas.")] = "sink-map",
    out: Annotated[str, typer.Option(help="A directory, or any path of fsspec: s3://bucket/sweep.")] = "out/sweep",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster: auto, ray://host:10001. Without it Ray is started here.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Tasks at a time, if Ray is started here.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a task.")] = 1,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of a task; 1 if torch sees one here.")] = None,
    text: TextOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = Backend.auto,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run experiments on checkpoints of models, side by side on Ray; what is in OUT already is not measured again."""
    from functools import partial

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from p0circuit.prompts import NAMED_TEXTS
    from p0circuit.sweep import sweep as sweep_models

    def listed(given: str | None) -> list[str]:
        return [item.strip() for item in (given or "").split(",") if item.strip()]

    # Workers need not have this working directory.
    text = text if text is None or text in NAMED_TEXTS else str(Path(text).absolute())
    found = sweep_models(
        listed(models),
        [int(label) if label.isdecimal() else label for label in listed(checkpoints)],
        listed(experiments),
        out,
        partial(draw_pooled_prompts, text=text, samples=samples, length=length, seed=seed),
        address,
        workers=workers,
        cpus=cpus,
        gpus=gpus,
        backend=backend.value,
        dtype=torch_dtype(dtype),
    )
    table = Table(title=out, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("model", "checkpoint", "experiment", "status", "seconds"):
        table.add_column(column, overflow="fold")
    for task in found.tasks:
        checkpoint = "" if task.checkpoint is None else str(task.checkpoint)
        table.add_row(task.model, checkpoint, task.experiment, task.status, f"{task.seconds:.1f}")
    Console(stderr=True).print(table)
    print_json(found.to_json(), as_json)
    if found.failed:
        report_progress(
            f"error: {len(found.failed)} of {len(found.tasks)} tasks failed; run again, the others are kept"
        )
        raise typer.Exit(1)


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model or shape, may be repeated; gpt2-shape and smollm2-shape if not given."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the vocabulary to sweep; all if not given.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="A Markdown file with the marks of a benchmark table: write the table into it.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Whether peaks of memory are measured too, which takes a while.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Measure speed and memory of the exact fast forms beside the usual ways, in one run (needs a checkout)."""
    import importlib

    from p0circuit.io import repository

    sys.path.insert(0, str(repository()))
    run = importlib.import_module("benchmarks.run")
    names = model or ["gpt2-shape", "smollm2-shape"]
    results = run.measure_all(
        names,
        lambda name: load(ModelSource(name)),
        run.Size(tokens=tokens, memory=memory),
        report_progress,
        lambda results: None if into is None else run.write_into(into, results),
    )
    if as_json:
        print_json(results, True)
    else:
        print(run.markdown(results))
