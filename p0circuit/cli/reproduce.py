"""`p0circuit reproduce`: test every claim on every model that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from p0circuit.cli.inputs import ModelSource, load, quick_sample_count, report_estimate, report_text
from p0circuit.cli.options import (
    MODEL_HELP,
    Backend,
    BackendOption,
    CheckpointOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    LengthOption,
    OffloadOption,
    OutOption,
    TextOption,
)
from p0circuit.cli.show import print_claims, print_json
from p0circuit.errors import P0Error
from p0circuit.log import logger, report_progress


def reproduce(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{MODEL_HELP} 'training': the claims about training. Default: smollm2-135m with --quick's number of "
            "prompts, p0-nano, and training."
        ),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="Every named, constructed and shipped model, and the claims about training.")
    ] = False,
    out: OutOption = Path("out"),
    text: TextOption = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="128 prompts; for a model of more than 20 million parameters 32, and smaller configurations.",
        ),
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of prompts; default 1,024.")] = None,
    length: LengthOption = 64,
    seed: Annotated[int, typer.Option(help="First of the three seeds of the prompts.")] = 0,
    checkpoint: CheckpointOption = None,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Test every claim on each model and on its controls; write claims, figures and a report to OUT/MODEL."""
    from p0circuit.models import describe, named_model
    from p0circuit.report.contents import find_reproductions, write_overview
    from p0circuit.report.html import write_report
    from p0circuit.reproduction import (
        FORWARD_PASSES,
        SAMPLES,
        TRAINING,
        failed_claims,
        initial_checkpoint_of,
        reproduce as reproduce_one,
        reproduce_training,
    )
    from p0circuit.training.runs import as_trained, shipped_runs

    available, left_out = _fetch_all(models or _default_models(all_models), required=bool(models))
    _check_directories(available)
    summary: dict[str, Any] = {}
    failures: list[str] = []
    for name in available:
        if name == TRAINING:
            label, directory = TRAINING, out / TRAINING
            reproduce_training(as_trained(shipped_runs()), directory)
            write_report(directory)
            run = find_reproductions(directory)[0]
        else:
            source = ModelSource(name, backend, device, dtype, layers, device_map, offload_folder)
            # By default the real model takes as many prompts as a quick run.
            is_quick = quick or (samples is None and not models and not all_models and named_model(name) is not None)
            count = quick_sample_count(source, checkpoint, samples) if is_quick else samples or SAMPLES
            report_estimate(source, [checkpoint], count, length, FORWARD_PASSES)
            model = load(source, checkpoint)
            report_text(model, text)
            run = reproduce_one(
                model,
                out=out,
                text=text,
                samples=count,
                length=length,
                seed=seed,
                quick=is_quick,
                initial_checkpoint=initial_checkpoint_of(name, lambda step, source=source: load(source, step)),
            )
            label = describe(model).name
        for published in run.comparisons:
            report_progress(f"published: {published}")
        report_progress(f"claims, tables, figures, manifest and report.html are in {run.directory}")
        if not as_json:
            print_claims(run.title, run.claims)
        failures += [f"{label} {claim}" for claim in failed_claims(run.claims)]
        summary[label] = {"directory": str(run.directory), "claims": run.claims}
    if len(available) > 1 or left_out:
        write_overview(out, [Path(entry["directory"]) for entry in summary.values()], left_out)
        write_report(out)
        report_progress(f"an overview is in {out / 'report.html'}")
    if as_json:
        print_json(summary)
    if failures:
        logger.error("error: experiments failed: %s; claims.json has the reasons", ", ".join(failures))
        raise typer.Exit(1)


def _default_models(all_models: bool) -> list[str]:
    """Return the models to reproduce if none is named."""
    from p0circuit.models import CATALOG, list_models
    from p0circuit.reproduction import TRAINING

    if not all_models:
        return ["smollm2-135m", "p0-nano", TRAINING]
    return [*CATALOG, "wired", *(entry.name for entry in list_models()), TRAINING]


def _fetch_all(names: list[str], required: bool) -> tuple[list[str], dict[str, str]]:
    """Fetch the named models; return those that are available, and the reasons why others are not.

    Raises:
        ModelError: one cannot be fetched and is required.
    """
    from p0circuit.models import ModelError, fetch, named_model

    available, left_out = [], {}
    for name in names:
        try:
            if (entry := named_model(name)) is not None:
                fetch(entry)
            available.append(name)
        except ModelError as reason:
            if required:
                raise
            left_out[name] = str(reason)
            report_progress(f"going on without {name}: {reason}")
    return available, left_out


def _check_directories(names: list[str]) -> None:
    """Check that no two models would write to the same directory.

    Raises:
        P0Error: two of them would.
    """
    from p0circuit.models.source import gguf_model_name, is_gguf_model

    labels = [
        gguf_model_name(name) if is_gguf_model(name) else Path(name).absolute().name if Path(name).is_dir() else name
        for name in names
    ]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise P0Error(f"two of these models are called {repeated[0]!r}: run them separately, each with its own --out")
