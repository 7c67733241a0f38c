"""`p0circuit sweep` and `bench`: many models on a cluster, and benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p0circuit.cli.inputs import ModelSource, load, report_text, torch_dtype
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
from p0circuit.cli.show import print_json, print_table
from p0circuit.hooked_model import HookedModel
from p0circuit.log import logger, report_progress

if TYPE_CHECKING:
    from p0circuit.prompts import PromptSet


def sweep(
    models: Annotated[str, typer.Option(help=f"Separated by commas. {MODEL_HELP}")] = "p0-nano",
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Steps or revisions, separated by commas; a model without checkpoints is run once."),
    ] = None,
    experiments: Annotated[
        str, typer.Option(help="Ids of experiments or claims, separated by commas; see `p0circuit run --list`.")
    ] = "sink-map",
    out: Annotated[str, typer.Option(help="A directory, or any path of fsspec: s3://bucket/sweep.")] = "out/sweep",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster: auto, ray://host:10001. Default: Ray is started here.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Tasks at a time, if Ray is started here.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a task.")] = 1,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of a task; default 1 if torch sees one here.")] = None,
    text: TextOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = Backend.auto,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run experiments on checkpoints of models, in parallel on Ray; results that are in OUT are not measured again."""
    from functools import partial

    from p0circuit.prompts import NAMED_TEXTS
    from p0circuit.sweep import sweep as sweep_models

    # Workers may have another working directory.
    text = text if text is None or text in NAMED_TEXTS else str(Path(text).absolute())
    outcome = sweep_models(
        _items(models),
        [int(label) if label.isdecimal() else label for label in _items(checkpoints)],
        _items(experiments),
        out,
        partial(_draw_prompts, text=text, samples=samples, length=length, seed=seed),
        address,
        workers=workers,
        cpus=cpus,
        gpus=gpus,
        backend=backend.value,
        dtype=torch_dtype(dtype),
    )
    if as_json:
        print_json(outcome.to_json())
    else:
        rows = [
            (task.model, task.checkpoint, task.experiment, task.status, f"{task.seconds:.1f}") for task in outcome.tasks
        ]
        print_table(("model", "checkpoint", "experiment", "status", "seconds"), rows, out)
    if outcome.failed:
        logger.error(
            "error: %d of %d tasks failed; run again, finished tasks are not repeated",
            len(outcome.failed),
            len(outcome.tasks),
        )
        raise typer.Exit(1)


def _items(text: str | None) -> list[str]:
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def _draw_prompts(model: HookedModel, text: str | None, samples: int, length: int, seed: int) -> PromptSet:
    """Draw the prompts of `p0circuit run`, in a worker."""
    from p0circuit.experiments.conditions import pooled_prompts_for

    report_text(model, text)
    return pooled_prompts_for(model, text, samples, length, seed)


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model or shape, may be repeated; default gpt2-shape and smollm2-shape."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens of the vocabulary to sweep; default all.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="A Markdown file with the marks of a benchmark table, to write the table into.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure peaks of memory too, which is slow.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Measure speed and memory of the fast exact methods and of the usual ones, in one run (needs a checkout)."""
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
        print_json(results)
    else:
        print(run.markdown(results))
