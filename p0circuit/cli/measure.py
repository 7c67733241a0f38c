"""`p0circuit run`, `sink` and `advise`: one measurement on one model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p0circuit.cli.inputs import ModelSource, draw_prompts, load, quick_sample_count, report_estimate, report_text
from p0circuit.cli.options import (
    FIRST_TOKEN_DESCRIPTIONS,
    MODEL_HELP,
    Backend,
    BackendOption,
    CheckpointOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    First,
    FirstOption,
    JsonOption,
    LayersOption,
    LengthOption,
    ModelArgument,
    OffloadOption,
    OutOption,
    SamplesOption,
    SeedOption,
    TextOption,
)
from p0circuit.cli.settings import with_settings
from p0circuit.cli.show import print_advice, print_json, print_paragraphs, print_result, print_table
from p0circuit.errors import P0Error
from p0circuit.log import report_progress

if TYPE_CHECKING:
    from p0circuit.results import Result


def run(
    experiment: Annotated[
        str | None, typer.Argument(help="Id of an experiment or of its claim, as in sink-map or C1; see --list.")
    ] = None,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "p0-nano",
    list_all: Annotated[bool, typer.Option("--list", help="List all experiments with their claims, and end.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the experiment's configuration, the value as JSON; may be repeated. An unknown field "
            "lists them all.",
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    out: OutOption = Path("out"),
    text: TextOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The configuration and number of prompts of `reproduce --quick`.")
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of prompts; default 128.")] = None,
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
        typer.Option(help="For claims about training: a directory of traces, <variant>-<seed>.csv; default: shipped."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run one experiment on one model, or on the traces of training runs.

    BOS is prepended to the prompts if the model has its sink only after BOS.
    """
    from p0circuit.experiments import find_experiment, over_runs
    from p0circuit.experiments.base import NotApplicable
    from p0circuit.experiments.conditions import pooled_prompts_for
    from p0circuit.experiments.sink_condition import find_condition
    from p0circuit.models import describe
    from p0circuit.recording.fingerprint import weights_fingerprint
    from p0circuit.reproduction import TRAINING
    from p0circuit.reproduction.front import run_directory
    from p0circuit.training.runs import as_trained, shipped_runs

    if list_all:
        _list_experiments(as_json)
        return
    if experiment is None:
        raise P0Error("name an experiment, as in `p0circuit run sink-map`; `p0circuit run --list` lists them all")
    if about_training := over_runs(experiment):
        if settings:
            raise P0Error(f"{about_training.id} has no settings: it reads the traces of training runs")
        started = time.time()
        result = about_training.run(as_trained(shipped_runs(runs)))
        _save(result, out / TRAINING, started, model=TRAINING, quantisation=None, runs=result.provenance["runs"])
        _show(result, TRAINING, as_json)
        return
    selected = find_experiment(experiment)
    # Errors in the settings are raised before the model is loaded.
    with_settings(selected.config, settings or [])
    source = ModelSource(model, backend, device, dtype, layers, device_map, offload_folder)
    count = quick_sample_count(source, checkpoint, samples) if quick else samples or 128
    report_estimate(source, [checkpoint], count, length)
    loaded = load(source, checkpoint)
    info = describe(loaded)
    selected = selected.quick(info) if quick else selected
    selected = type(selected)(with_settings(selected.config, settings or []))
    report_text(loaded, text)
    condition = find_condition(loaded, pooled_prompts_for(loaded, text, count, length, seed))
    report_progress(condition.summary)
    prompts = condition.prompts
    started = time.time()
    try:
        result = selected.run(loaded, prompts)
    except NotApplicable as reason:
        _show_not_applicable(selected.id, info.title, str(reason), as_json)
        return
    _save(
        result,
        run_directory(out, info),
        started,
        model=info.name,
        quantisation=info.quantisation,
        weights=weights_fingerprint(loaded),
        prompts=prompts.fingerprint(),
        seed=prompts.seed,
        device=str(loaded.cfg.device),
    )
    _show(result, info.title, as_json)


def _list_experiments(as_json: bool) -> None:
    """Print id, claim and title of every experiment."""
    from p0circuit.experiments import EXPERIMENTS, RUN_EXPERIMENTS

    kinds = [*EXPERIMENTS.values(), *RUN_EXPERIMENTS.values()]
    rows = [(kind.id, kind.claim.id if kind.claim else None, kind.title) for kind in kinds]
    if as_json:
        print_json([{"id": name, "claim": claim, "title": title} for name, claim, title in rows])
    else:
        print_table(("id", "claim", "title"), rows)


def _save(result: Result, directory: Path, started: float, **details: object) -> None:
    """Save a result, and last its manifest, whose presence means that the run is complete."""
    from p0circuit.results import write_manifest

    (directory / "manifest.json").unlink(missing_ok=True)
    result.save(directory)
    write_manifest(directory, sys.argv[1:], started, **details, experiments=[result.experiment])
    report_progress(f"tables, figures and manifest are in {directory}")


def _show(result: Result, subject: str, as_json: bool) -> None:
    if as_json:
        print_json({result.experiment: {key: value.to_json() for key, value in result.metrics.items()}})
    else:
        print_result(result, subject)


def _show_not_applicable(experiment: str, subject: str, reason: str, as_json: bool) -> None:
    if as_json:
        print_json({experiment: {"verdict": "not applicable", "why": reason}})
    else:
        print_paragraphs(f"{experiment}: NOT APPLICABLE to {subject}", {"reason": reason})


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
    from p0circuit.results import model_title
    from p0circuit.sink import SINK_THRESHOLD, shortest_for

    source = ModelSource(model, backend, device, dtype, None, device_map, offload_folder)
    report_estimate(source, [checkpoint], samples, length, passes=1)
    loaded = load(source, checkpoint)
    prompts = draw_prompts(loaded, text, samples, length, seed, first)
    report_text(loaded, text)
    # Without a tokenizer all tokens of a prompt are random, also the first one.
    first = First.random if loaded.tokenizer is None else first
    summary = sink_summary(loaded, prompts, bos=first is First.bos)
    summary |= {"first_token": first.value, "text": prompts.description.get("source", "random tokens")}
    summary["after_bos"] = after_bos(loaded, prompts)
    if summary["sink_rate"] is None:
        report_progress(
            f"no sink rate: at {length} tokens uniform attention scores {summary['uniform_score']:.2f}, above the "
            f"threshold of {SINK_THRESHOLD:g}; give --length {shortest_for()} or more"
        )
    if as_json:
        print_json(summary)
        return
    layers = zip(summary["sink_score"], summary["norm_ratio"], summary["direction_consistency"], strict=False)
    print_table(
        ("layer", "sink scores of its heads", "norm ratio before", "direction before"),
        [
            (layer, " ".join(f"{score:.2f}" for score in scores), f"{ratio:.2f}", f"{direction:.2f}")
            for layer, (scores, ratio, direction) in enumerate(layers)
        ],
        model_title(summary["model"], summary["quantisation"]),
    )
    typer.echo(
        f"{_rates(summary).capitalize()}, on {prompts.n} prompts of {length} tokens of {summary['text']}; at position "
        f"zero: {FIRST_TOKEN_DESCRIPTIONS[first]}. Uniform attention would score {summary['uniform_score']:.3f}."
    )
    if summary["after_bos"] is not None:
        typer.echo(f"Its sink depends on BOS. After BOS: {_rates(summary['after_bos'])} (--first bos).")


def _rates(summary: dict[str, Any]) -> str:
    """The sink rates in words."""
    rate, later_rate = summary["sink_rate"], summary["sink_rate_from_layer_2"]
    if rate is None:
        return "no sink rate"
    return f"sink rate {rate:.3f}" + (f", from layer 2 on {later_rate:.3f}" if later_rate is not None else "")


def advise(
    model: ModelArgument,
    checkpoint: CheckpointOption = None,
    out: OutOption = Path("out"),
    text: TextOption = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of prompts; default 128, or 32 for a model of more than 20 million parameters."
        ),
    ] = None,
    length: LengthOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report what the first token does to a model on a text, and what to do about it; write OUT/MODEL/advice.html."""
    from p0circuit.advice import advise as advise_on, passes, write_advice
    from p0circuit.models import describe
    from p0circuit.models.passes import count_passes
    from p0circuit.reproduction.front import run_directory

    source = ModelSource(model, backend, device, dtype)
    count = samples or quick_sample_count(source, checkpoint)
    loaded = load(source, checkpoint)
    info = describe(loaded)
    prompts = draw_prompts(loaded, text, count, length, seed, First.text)
    report_text(loaded, text)
    report_progress(f"at most {passes(loaded, prompts):.0f} passes over {prompts.n} prompts")
    with count_passes() as counted:
        advice = advise_on(loaded, prompts)
    report_progress(f"it took {counted.passes(prompts.n, prompts.length, info.n_layers):.1f} passes")
    directory = run_directory(out, info)
    files = write_advice(advice, directory)
    if as_json:
        print_json(advice.to_json())
    else:
        print_advice(advice)
    report_progress(f"{' and '.join(path.name for path in files)} are in {directory}")
