"""`p0circuit reproduce`: every claim on every model that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from p0circuit.cli.inputs import ModelSource, check_quick, draw_pooled_prompts, load, quick_prompt_count, say_estimate
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
from p0circuit.cli.show import print_json, show_claims
from p0circuit.errors import P0Error
from p0circuit.log import report_progress


def reproduce(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{MODEL_HELP} 'training': the claims about training. If none is named: smollm2-135m with as many "
            "prompts as --quick takes, p0-nano, and training."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every named, constructed and shipped model, and the claims about training.")
    ] = False,
    out: OutOption = Path("out"),
    text: TextOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few prompts: 128, or 32 for a model of more than 20 million parameters.")
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of prompts; 1,024 if not given.")] = None,
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
    """Test every claim on each model, with its controls; leave claims, figures and a report in OUT/MODEL."""
    from p0circuit.experiments import EXPERIMENTS
    from p0circuit.models import describe
    from p0circuit.models.catalog import named_model
    from p0circuit.models.source import gguf_model_name, is_gguf_model
    from p0circuit.report.contents import find_runs, write_overview
    from p0circuit.report.html import write_report
    from p0circuit.reproduction import (
        FORWARD_PASSES,
        SAMPLES,
        TRAINING,
        failed,
        initial_checkpoint_of,
        reproduce as reproduce_model,
        reproduce_training,
    )
    from p0circuit.training.runs import as_trained, shipped_runs

    check_quick(quick, samples)
    given, left_out = _fetch_all(models or _default_models(every), required=bool(models))
    names = [
        gguf_model_name(name) if is_gguf_model(name) else Path(name).absolute().name if Path(name).is_dir() else name
        for name in given
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise P0Error(f"two of these models are called {twice[0]!r}: give each an --out, in a call of its own")
    summary: dict[str, Any] = {}
    broken: list[str] = []
    for name in given:
        if name == TRAINING:
            label, title, directory = TRAINING, TRAINING, out / TRAINING
            claims = reproduce_training(as_trained(shipped_runs()), directory)
        else:
            source = ModelSource(name, backend, device, dtype, layers, device_map, offload_folder)
            few = quick or (samples is None and not models and not every and named_model(name) is not None)
            count = quick_prompt_count(source, checkpoint) if few else samples or SAMPLES
            say_estimate(source, [checkpoint], count, length, FORWARD_PASSES)
            model = load(source, checkpoint)
            prompts = draw_pooled_prompts(model, text, count, length, seed)
            beginner = initial_checkpoint_of(source.name, lambda step, source=source: load(source, step))
            label, title = describe(model).name, describe(model).title
            directory = out / label.replace("/", "--")
            experiments = [make() for make in EXPERIMENTS.values()]
            if few:
                experiments = [experiment.quick(describe(model)) for experiment in experiments]
            claims = reproduce_model(model, prompts, directory, experiments, beginner)
        write_report(directory)
        show_claims(title, claims)
        for published in find_runs(directory)[0].beside:
            report_progress(f"published: {published}")
        report_progress(f"claims, tables, figures, manifest and report.html are in {directory}")
        broken += [f"{label} {claim}" for claim in failed(claims)]
        summary[label] = {"directory": str(directory), "claims": claims}
    if len(given) > 1 or left_out:
        write_overview(out, [Path(entry["directory"]) for entry in summary.values()], left_out)
        write_report(out)
        report_progress(f"an overview is in {out / 'report.html'}")
    print_json(summary, as_json)
    if broken:
        report_progress(f"error: broke off: {', '.join(broken)}; claims.json has the reasons")
        raise typer.Exit(1)


def _default_models(every: bool) -> list[str]:
    """What is reproduced where no model is named: a real one, the teaching model and the training runs, or all."""
    from p0circuit.models import list_models
    from p0circuit.models.catalog import CATALOG
    from p0circuit.reproduction import TRAINING

    if not every:
        return ["smollm2-135m", "p0-nano", TRAINING]
    return [*CATALOG, "wired", *(entry.name for entry in list_models()), TRAINING]


def _fetch_all(names: list[str], required: bool) -> tuple[list[str], dict[str, str]]:
    """The models whose files are here or could be fetched, and why the others could not, by name.

    Raises:
        ModelError: one cannot be fetched and is required.
    """
    from p0circuit.models import ModelError, fetch
    from p0circuit.models.catalog import named_model

    here, left_out = [], {}
    for name in names:
        try:
            if (entry := named_model(name)) is not None:
                fetch(entry)
            here.append(name)
        except ModelError as reason:
            if required:
                raise
            left_out[name] = str(reason)
            report_progress(f"going on without {name}: {reason}")
    return here, left_out
