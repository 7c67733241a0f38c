"""The command line: a thin door to the same classes the notebooks use.

Exit codes: 0 when the job was done, 2 for wrong use, 1 for anything else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from p0circuit import notebooks
from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.log import say

if TYPE_CHECKING:
    from p0circuit.advice import Advice
    from p0circuit.experiments import Experiment
    from p0circuit.prompts import PromptSet
    from p0circuit.results import Result

app = typer.Typer(
    help="The P0 sink circuit: how position zero comes to draw a language model's attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(notebooks.app, name="notebooks")


class First(str, Enum):
    """What stands at position zero of natural text."""

    text = "text"
    bos = "bos"
    random = "random"


class Backend(str, Enum):
    """Which TransformerLens class holds the model."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


FIRST_IN_WORDS = {
    First.text: "the text's own first token",
    First.bos: "BOS, before the text",
    First.random: "a random token",
}
MODEL_HELP = (
    "A name that 'p0circuit models' lists, a local Hugging Face directory, a GGUF file, a hub id, or 'wired', whose "
    "weights are constructed."
)

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
BackendOption = Annotated[Backend, typer.Option(help="Which TransformerLens class holds the model.")]
CheckpointOption = Annotated[str | None, typer.Option(help="A step, revision or label of the training trace.")]
DeviceOption = Annotated[str | None, typer.Option(help="As in torch: cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or float64.")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Load the first blocks alone, for what is too large.")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        help="For what is larger than one device: auto (GPUs, then CPU memory, then disk); cpu or disk, where its "
        "blocks wait; or JSON, or a file of it, with the place of each module."
    ),
]
OffloadOption = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Where weights that wait on disk are written, if they must be; removed again."),
]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="docs (Python's language reference), english, code, stdlib, or a text file or directory. Chosen by the "
        "model if not given; random tokens if it has no tokenizer."
    ),
]
FirstOption = Annotated[
    First, typer.Option(help="What stands at position zero: the text's own first token, BOS, or a random token.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Number of prompts.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per prompt.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the prompts.")]
OutOption = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Where the results go.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command()
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
    from p0circuit.models.source import gguf_model_name, is_gguf_model
    from p0circuit.report.contents import find_runs, write_overview
    from p0circuit.report.html import write_report
    from p0circuit.reproduction import (
        FORWARD_PASSES,
        SAMPLES,
        TRAINING,
        failed,
        initial_checkpoint_of,
        reproduce_training,
    )
    from p0circuit.reproduction import reproduce as reproduce_model
    from p0circuit.training.runs import as_trained, shipped_runs

    _check_quick(quick, samples)
    given, left_out = _fetched(models or _default_models(every), required=bool(models))
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
            source = Source(name, backend, device, dtype, layers, device_map, offload_folder)
            few = quick or (samples is None and not models and not every and _named_model(name) is not None)
            count = _quick_samples(source, checkpoint) if few else samples or SAMPLES
            _forecast(source, [checkpoint], count, length, FORWARD_PASSES)
            model = _load(source, checkpoint)
            prompts = _three_seeds(model, text, count, length, seed)
            beginner = initial_checkpoint_of(source.name, lambda step, source=source: _load(source, step))
            label, title = describe(model).name, describe(model).title
            directory = out / label.replace("/", "--")
            experiments = [make() for make in EXPERIMENTS.values()]
            if few:
                experiments = [experiment.quick(describe(model)) for experiment in experiments]
            claims = reproduce_model(model, prompts, directory, experiments, beginner)
        write_report(directory)
        _show_claims(title, claims)
        for published in find_runs(directory)[0].beside:
            say(f"published: {published}")
        say(f"claims, tables, figures, manifest and report.html are in {directory}")
        broken += [f"{label} {claim}" for claim in failed(claims)]
        summary[label] = {"directory": str(directory), "claims": claims}
    if len(given) > 1 or left_out:
        write_overview(out, [Path(entry["directory"]) for entry in summary.values()], left_out)
        write_report(out)
        say(f"an overview is in {out / 'report.html'}")
    _print_json(summary, as_json)
    if broken:
        say(f"error: broke off: {', '.join(broken)}; claims.json has the reasons")
        raise typer.Exit(1)


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="The experiment's id, as in sink-map, or its claim's, as in C1.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "p0-nano",
    checkpoint: CheckpointOption = None,
    out: OutOption = Path("out"),
    text: TextOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The configuration and the prompts that `reproduce --quick` takes.")
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of prompts; 128 if not given.")] = None,
    length: LengthOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="For claims about training: a directory of traces, <variant>-<seed>.csv; else the shipped."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run one experiment on one model, in the condition in which it has its sink, or on the traces of training runs."""
    from p0circuit.experiments import find_experiment, over_runs
    from p0circuit.experiments.sink_condition import find_condition
    from p0circuit.models import describe
    from p0circuit.reproduction import TRAINING
    from p0circuit.training.runs import as_trained, shipped_runs

    if about_training := over_runs(experiment):
        found = about_training.run(as_trained(shipped_runs(runs)))
        _print_json(_keep(found, out / TRAINING, TRAINING, runs=found.provenance["runs"]), as_json)
        return
    chosen = find_experiment(experiment)
    _check_quick(quick, samples)
    source = Source(model, backend, device, dtype, layers, device_map, offload_folder)
    count = _quick_samples(source, checkpoint) if quick else samples or 128
    _forecast(source, [checkpoint], count, length)
    loaded = _load(source, checkpoint)
    chosen = chosen.quick(describe(loaded)) if quick else chosen
    condition = find_condition(loaded, _three_seeds(loaded, text, count, length, seed))
    say(condition.summary)
    _print_json(_run_one(chosen, loaded, condition.prompts, out), as_json)


@app.command()
def sink(
    model: ModelArgument,
    checkpoint: CheckpointOption = None,
    first: FirstOption = First.text,
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
    """Measure the sink of one model: sink scores, sink rate, norm ratio and direction consistency of P0."""
    from p0circuit.experiments.sink_summary import after_bos, sink_summary
    from p0circuit.results import titled
    from p0circuit.sink import SINK_THRESHOLD, shortest_for

    given = Source(model, backend, device, dtype, None, device_map, offload_folder)
    _forecast(given, [checkpoint], samples, length, passes=1)
    loaded = _load(given, checkpoint)
    prompts = _prompts(loaded, text, samples, length, seed, first)
    # Without a tokenizer the prompts are random tokens, the first one too.
    first = First.random if loaded.tokenizer is None else first
    summary = sink_summary(loaded, prompts, bos=first is First.bos)
    summary |= {"first_token": first.value, "text": prompts.description.get("source", "random tokens")}
    summary["after_bos"] = after_bos(loaded, prompts)
    if summary["sink_rate"] is None:
        say(
            f"no sink rate: at {length} tokens attention spread evenly scores {summary['uniform_score']:.2f}, above "
            f"the threshold of {SINK_THRESHOLD:g}; give --length {shortest_for()} or more"
        )
    if as_json:
        _print_json(summary, True)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("layer", "sink scores of its heads", "norm ratio before", "direction before")
    table.title = titled(summary["model"], summary["quantisation"])
    rows = zip(summary["sink_score"], summary["norm_ratio"], summary["direction_consistency"], strict=False)
    for layer, (scores, ratio, direction) in enumerate(rows):
        table.add_row(str(layer), " ".join(f"{score:.2f}" for score in scores), f"{ratio:.2f}", f"{direction:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{_rates(summary)}, of {prompts.n} prompts of {length} tokens of {escape(str(summary['text']))}; at position "
        f"zero: {FIRST_IN_WORDS[first]}. Attention spread evenly would score {summary['uniform_score']:.3f}."
    )
    if summary["after_bos"] is not None:
        console.print(f"Its sink depends on BOS. After BOS: {_rates(summary['after_bos'])} (--first bos).")


def _rates(summary: dict[str, Any]) -> str:
    """The sink rates in words."""
    whole, later = summary["sink_rate"], summary["sink_rate_from_layer_2"]
    if whole is None:
        return "no sink rate"
    return f"sink rate {whole:.3f}" + (f", from layer 2 {later:.3f}" if later is not None else "")


@app.command()
def advise(
    model: ModelArgument,
    checkpoint: CheckpointOption = None,
    out: OutOption = Path("out"),
    text: TextOption = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of prompts; 128, or 32 for a model of more than 20 million parameters."),
    ] = None,
    length: LengthOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the first token does to a model on a text, and what to do about it; leave advice.html in OUT/MODEL."""
    from p0circuit.advice import advise as advise_on
    from p0circuit.advice import passes, write_advice
    from p0circuit.models import describe
    from p0circuit.models.passes import count_passes

    source = Source(model, backend, device, dtype)
    count = samples or _quick_samples(source, checkpoint)
    loaded = _load(source, checkpoint)
    prompts = _prompts(loaded, text, count, length, seed, First.text)
    say(f"at most {passes(loaded, prompts):.0f} passes over {prompts.n} prompts")
    with count_passes() as counted:
        found = advise_on(loaded, prompts)
    used = counted.passes(prompts.n, prompts.length, describe(loaded).n_layers)
    say(f"it took {used:.1f} passes")
    directory = out / found.model.replace("/", "--")
    written = write_advice(found, directory)
    if as_json:
        _print_json(found.to_json(), True)
    else:
        _show_advice(found)
    say(f"{' and '.join(path.name for path in written)} are in {directory}")


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Named models, as 'p0circuit models' lists them.")],
) -> None:
    """Download named models into the cache folder, checked by hash; what is there already is not downloaded again."""
    from p0circuit.models import CATALOG
    from p0circuit.models import fetch as fetch_model

    if unknown := [name for name in names if name not in CATALOG]:
        raise P0Error(f"no named model {unknown[0]!r}; there are: {', '.join(CATALOG)}")
    for name in names:
        say(f"{name}: {fetch_model(CATALOG[name])}")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models with names: shipped with the package, fetched, and those that can be fetched."""
    from dataclasses import asdict

    from p0circuit.models import known_models

    known = known_models()
    if as_json:
        _print_json([asdict(entry) for entry in known], True)
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("name", "status", "weights", "parameters"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is")
    for entry in known:
        steps = f"; {len(entry.checkpoints)} checkpoints" if entry.checkpoints else ""
        licence = "" if entry.status == "shipped" else f"; {entry.licence}"
        parameters = f"{entry.parameters / 1e6:.1f} M"
        columns = (entry.name, entry.status, entry.quantisation or "plain", parameters)
        table.add_row(*map(escape, (*columns, f"{entry.description}{steps}{licence}")))
    Console().print(table)


@app.command()
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

    from p0circuit.training.trainer import train as train_model
    from p0circuit.training.variants import VARIANTS, TrainConfig, parse_options

    torch.set_num_threads(threads)
    if variant is not None and variant not in VARIANTS:
        raise P0Error(f"no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    named = {"corpus": corpus, "steps": steps, "layers": layers, "seed": seed}
    given = {name: value for name, value in named.items() if value is not None} | parse_options(option or [])
    config = replace(VARIANTS[variant] if variant else TrainConfig(), **given)
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=config.steps, loss=float("nan"))
        train_model(config, out, report=lambda step, loss: progress.update(task, completed=step, loss=loss))
    say(f"the model and its trace are in {out}")


@app.command()
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
    from p0circuit.training.runs import LENGTH, as_trained, keep_run, shipped_kinds, variant_and_seed
    from p0circuit.training.trace import PASSES, Trace, checkpoints_of
    from p0circuit.training.trace import trace as trace_run

    if table is not None:
        # Told now and not when all is measured.
        variant_and_seed(table)
        if length != LENGTH:
            raise P0Error(f"traces in tables are of {LENGTH} tokens, so that they compare, and --length is {length}")
    given = Source(source, backend, device, dtype, None, device_map, offload_folder)
    begins = first.value
    texts: set[str] = set()

    def read(stored: Any) -> PromptSet:
        made = _prompts(stored, text, samples, length, seed, first, announce=False)
        texts.add(made.description.get("source", "random tokens"))
        return made

    try:
        labels = [label.strip() for label in checkpoints.split(",")] if checkpoints else checkpoints_of(source)
    except ModelError:
        if not (kinds := shipped_kinds(source)):
            raise
        (run,) = as_trained([kinds[begins]] if begins in kinds else kinds.values())
        begins, found = run.first, Trace.of(run)
        told = f"this is the trace that comes with it, with {begins} at position zero (kept: {', '.join(kinds)})"
        say(f"{source} keeps no checkpoints: {told}")
    else:
        _forecast(given, labels, samples, length, PASSES, LARGE)
        found = trace_run(
            source,
            read,
            labels,
            out / "checkpoints",
            lambda label: _load(given, label),
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
        say(f"its lines are in {keep_run(table, lines)}")
    formed = f"formed at step {found.formation_step}" if found.formation_step is not None else "has no sink at its end"
    read_text = ", ".join(texts) or "the text of its trace"
    say(
        f"{found.model} {formed}; {len(found.stages)} stages; on {read_text}, at position zero "
        f"{FIRST_IN_WORDS[First(begins)]}; table and figure are in {path.parent}"
    )
    _print_json(found.to_json() | {"first_token": begins, "text": read_text if texts else None}, as_json)


@app.command()
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
        partial(_three_seeds, text=text, samples=samples, length=length, seed=seed),
        address,
        workers=workers,
        cpus=cpus,
        gpus=gpus,
        backend=backend.value,
        dtype=_dtype(dtype),
    )
    table = Table(title=out, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("model", "checkpoint", "experiment", "status", "seconds"):
        table.add_column(column, overflow="fold")
    for task in found.tasks:
        checkpoint = "" if task.checkpoint is None else str(task.checkpoint)
        table.add_row(task.model, checkpoint, task.experiment, task.status, f"{task.seconds:.1f}")
    Console(stderr=True).print(table)
    _print_json(found.to_json(), as_json)
    if found.failed:
        say(f"error: {len(found.failed)} of {len(found.tasks)} tasks failed; run again, the others are kept")
        raise typer.Exit(1)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the cache holds, recordings and models converted from GGUF, or clear it (fetched files stay)."""
    from p0circuit.models.gguf_conversion import clear_converted_models, list_converted_models
    from p0circuit.recording.cache import Cache

    store = Cache()
    if clear:
        freed = store.clear() + clear_converted_models()
        say(f"freed {freed / 2**20:.1f} MiB in {store.directory}")
    entries = [entry | store.about(entry["key"]) for entry in store.entries()]
    total = sum(entry["bytes"] for entry in entries)
    models = list_converted_models()
    if as_json:
        held = {"directory": str(store.directory), "limit": store.limit, "bytes": total, "entries": entries}
        _print_json(held | {"converted": models}, True)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "quantity", "samples", "KiB", title=str(store.directory))
    for entry in entries:
        table.add_row(
            str(entry.get("model")),
            str(entry.get("quantity")),
            str(entry.get("samples")),
            f"{entry['bytes'] / 1024:.0f}",
        )
    for model in models:
        table.add_row(escape(str(model["file"])), "plain weights", "", f"{model['bytes'] / 1024:.0f}")
    console = Console()
    console.print(table)
    console.print(f"{total / 2**20:.1f} of {store.limit / 2**20:.0f} MiB in use by recordings")
    if models:
        console.print(f"{sum(model['bytes'] for model in models) / 2**20:.1f} MiB in use by converted models")


@app.command()
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
        lambda name: _load(Source(name)),
        run.Size(tokens=tokens, memory=memory),
        say,
        lambda results: None if into is None else run.write_into(into, results),
    )
    if as_json:
        _print_json(results, True)
    else:
        print(run.markdown(results))


def _default_models(every: bool) -> list[str]:
    """What is reproduced where no model is named: a real one, the teaching model and the training runs, or all."""
    from p0circuit.models import list_models
    from p0circuit.models.catalog import CATALOG
    from p0circuit.reproduction import TRAINING

    if not every:
        return ["smollm2-135m", "p0-nano", TRAINING]
    return [*CATALOG, "wired", *(entry.name for entry in list_models()), TRAINING]


def _named_model(name: str) -> Any:
    from p0circuit.models.catalog import named_model

    return named_model(name)


def _fetched(names: list[str], required: bool) -> tuple[list[str], dict[str, str]]:
    """The models whose files are here or could be fetched, and why the others could not, by name.

    Raises:
        ModelError: one cannot be fetched and is required.
    """
    from p0circuit.models import ModelError, fetch

    here, left_out = [], {}
    for name in names:
        try:
            if (entry := _named_model(name)) is not None:
                fetch(entry)
            here.append(name)
        except ModelError as reason:
            if required:
                raise
            left_out[name] = str(reason)
            say(f"going on without {name}: {reason}")
    return here, left_out


def _check_quick(quick: bool, samples: int | None) -> None:
    if quick and samples is not None:
        raise P0Error(
            f"--quick decides the number of prompts by the model's size and --samples asks for {samples}: leave one out"
        )


def _quick_samples(source: Source, checkpoint: str | None) -> int:
    """How many prompts a quick run takes, said with its reason; known from the files, before anything is loaded."""
    from p0circuit.reproduction import quick_samples

    parameters = _parameters(source, checkpoint)
    samples = quick_samples(parameters)
    say(f"{source.name} has {parameters / 1e6:.3g} million parameters: this takes {samples} prompts")
    return samples


def _parameters(source: Source, checkpoint: str | None) -> int:
    """The number of a model's weights, from the headers of its files; those of a constructed one are counted."""
    from safetensors import SafetensorError

    from p0circuit.models.model_files import count_parameters
    from p0circuit.models.names import CONSTRUCTED_MODELS
    from p0circuit.models.source import resolve

    if (entry := _named_model(source.name)) is not None:
        return entry.parameters
    with contextlib.suppress(SafetensorError):
        if source.name not in CONSTRUCTED_MODELS:
            return count_parameters(resolve(source.name, checkpoint).folder)
    # Constructed, or damaged, which loading says in its own words.
    return sum(weight.numel() for weight in _load(source, checkpoint).parameters())


class Source(NamedTuple):
    """A model and how it is to be loaded, as given on the command line."""

    name: str
    backend: Backend = Backend.auto
    device: str | None = None
    dtype: str | None = None
    layers: int | None = None
    device_map: str | None = None
    offload_folder: Path | None = None


def _load(source: Source, checkpoint: str | int | None = None) -> Any:
    """`load_model`, with device, dtype and device map given as text."""
    import torch

    from p0circuit.models import load_model, one_thread_if_small

    try:
        torch.empty(0, device=source.device)
    except (RuntimeError, AssertionError) as error:
        raise P0Error(f"device {source.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    model = load_model(
        source.name,
        source.backend.value,
        checkpoint,
        source.device,
        _dtype(source.dtype),
        source.layers,
        _device_map(source.device_map),
        source.offload_folder,
    )
    one_thread_if_small(model)
    return model


def _device_map(text: str | None) -> Any:
    from p0circuit.models.device_map import parse_device_map

    return None if text is None else parse_device_map(text)


LARGE = 2**30
"""Bytes of weights from which on it is said what a trace will take, wherever they are put."""


def _forecast(
    source: Source,
    checkpoints: Sequence[str | int | None],
    samples: int,
    length: int,
    passes: int | None = None,
    large: float = math.inf,
) -> None:
    """Say what a model will take, from the first checkpoint that is whole: with a device map, or if it is `large`."""
    if source.device_map is None and large == math.inf:
        return
    from p0circuit.models import ModelError, model_placement
    from p0circuit.resources import measure_rates, resource_estimate

    device_map, dtype = _device_map(source.device_map), _dtype(source.dtype)
    reasons = []
    for checkpoint in checkpoints:
        try:
            placement = model_placement(
                source.name, device_map, checkpoint, source.device, dtype, source.layers, source.offload_folder
            )
        except ModelError as reason:
            reasons.append(reason)
            continue
        if device_map is not None or sum(placement.weight_bytes.values()) > large:
            say(resource_estimate(placement, measure_rates(placement), samples, length, passes, len(checkpoints)))
        return
    if device_map is not None:
        raise reasons[0]


def _dtype(name: str | None) -> Any:
    """The torch dtype of a name, None for None."""
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name is not None and name not in kinds:
        raise P0Error(f"unknown dtype {name!r}; expected one of {', '.join(kinds)}")
    return kinds[name] if name else None


def _prompts(
    model: HookedModel, text: str | None, samples: int, length: int, seed: int, first: First, announce: bool = True
) -> PromptSet:
    """Crops of the text, or random tokens for a model that has no tokenizer to read text with."""
    from p0circuit.experiments.conditions import prompts_for

    if model.tokenizer is None and first is First.bos:
        raise P0Error(f"{_name(model)} has no tokenizer, and so no BOS token that is known: use --first random")
    if announce:
        _say_what_it_reads(model, text)
    return prompts_for(model, text, samples, length, seed, first.value)


def _three_seeds(model: HookedModel, text: str | None, samples: int, length: int, seed: int) -> PromptSet:
    """The prompts of a reproduction: as many as asked for, drawn in equal parts by three seeds."""
    from p0circuit.experiments.conditions import pooled_prompts_for

    _say_what_it_reads(model, text)
    return pooled_prompts_for(model, text, samples, length, seed)


def _say_what_it_reads(model: HookedModel, text: str | None) -> None:
    """Say which text was chosen by the model, or that there is none it can read."""
    from p0circuit.experiments.conditions import default_text

    if model.tokenizer is None:
        say(f"{_name(model)} has no tokenizer: its prompts are random tokens")
    elif text is None:
        say(f"{_name(model)} reads {default_text(model)!r}, as no --text is given")


def _name(model: HookedModel) -> str:
    """What to call a loaded model, or one as it is stored, in a message."""
    from p0circuit.models import StoredModel, describe
    from p0circuit.results import titled

    return titled(model.name, model.quantisation) if isinstance(model, StoredModel) else describe(model).title


def _run_one(experiment: Experiment, model: HookedModel, prompts: PromptSet, out: Path) -> dict[str, Any]:
    """Run one experiment on a model, save its result and a manifest, and print what was found."""
    from p0circuit.models import describe
    from p0circuit.recording.fingerprint import weights_fingerprint

    info = describe(model)
    result = experiment.run(model, prompts)
    return _keep(
        result,
        out / info.name.replace("/", "--"),
        info.name,
        info.quantisation,
        weights=weights_fingerprint(model),
        prompts=prompts.fingerprint(),
        seed=prompts.seed,
        device=str(model.cfg.device),
    )


def _keep(
    result: Result, directory: Path, name: str, quantisation: str | None = None, **details: Any
) -> dict[str, Any]:
    """Save a result and its manifest, and print what was found."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from p0circuit.results import titled, write_manifest

    # The manifest is written last: one that is there tells of a run that came to its end.
    (directory / "manifest.json").unlink(missing_ok=True)
    result.save(directory)
    table = Table(title=f"{titled(name, quantisation)}: {result.experiment}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("quantity", "value [95 % interval]"):
        table.add_column(column, overflow="fold")
    for key, value in result.metrics.items():
        table.add_row(key, str(value))
    for note in result.notes:
        say(f"{result.experiment}: {note}")
    started = time.time() - result.provenance["seconds"]
    about = {"model": name, "quantisation": quantisation, "experiments": [result.experiment]}
    write_manifest(directory, sys.argv[1:], started, **about, **details)
    Console(stderr=True).print(table)
    if result.claim is not None:
        say(f"{result.claim['id']} {result.claim['verdict']}: {result.claim['why']}")
    say(f"tables, figures and manifest are in {directory}")
    return {result.experiment: {key: value.to_json() for key, value in result.metrics.items()}}


def _show_claims(name: str, claims: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("claim", "verdict", "why"):
        table.add_column(column, overflow="fold")
    for claim in claims:
        table.add_row(f"{claim['id']} {claim['title']}", claim["verdict"], claim["why"])
    Console(stderr=True).print(table)


def _show_advice(advice: Advice) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    # Names and text may hold what rich would take for markup.
    console.print(Text(f"{advice.title}: what the first token does, and what to do about it", style="bold"))
    for statement in advice.statements:
        console.print(Text.assemble("\n", (statement.topic, "bold"), "  ", (statement.verdict, "reverse")))
        console.print(Padding(Text(statement.text), (0, 0, 0, 2)))
        if statement.advice:
            console.print(Padding(Text(f"→ {statement.advice}"), (0, 0, 0, 2)))


def _print_json(value: Any, wanted: bool) -> None:
    if wanted:
        typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """The `p0circuit` command."""
    try:
        app()
    except P0Error as error:
        if os.environ.get("P0CIRCUIT_DEBUG"):
            raise
        say(f"error: {error}")
        sys.exit(2)
    except (OSError, FloatingPointError) as error:
        # A full disk, or weights that give no numbers: the input was right, the job is not done.
        if os.environ.get("P0CIRCUIT_DEBUG"):
            raise
        say(f"error: {error}")
        sys.exit(1)
