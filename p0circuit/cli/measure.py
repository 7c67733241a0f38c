"""`p0circuit run`, `sink` and `advise`: one measurement on one model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p0circuit.cli.inputs import (
    ModelSource,
    check_quick,
    draw_pooled_prompts,
    draw_prompts,
    load,
    quick_prompt_count,
    say_estimate,
)
from p0circuit.cli.options import (
    FIRST_IN_WORDS,
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
from p0circuit.cli.show import print_json, show_advice
from p0circuit.hooked_model import HookedModel
from p0circuit.log import report_progress

if TYPE_CHECKING:
    from p0circuit.experiments import Experiment
    from p0circuit.prompts import PromptSet
    from p0circuit.results import Result


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
        print_json(save_and_show(found, out / TRAINING, TRAINING, runs=found.provenance["runs"]), as_json)
        return
    chosen = find_experiment(experiment)
    check_quick(quick, samples)
    source = ModelSource(model, backend, device, dtype, layers, device_map, offload_folder)
    count = quick_prompt_count(source, checkpoint) if quick else samples or 128
    say_estimate(source, [checkpoint], count, length)
    loaded = load(source, checkpoint)
    chosen = chosen.quick(describe(loaded)) if quick else chosen
    condition = find_condition(loaded, draw_pooled_prompts(loaded, text, count, length, seed))
    report_progress(condition.summary)
    print_json(_run_one(chosen, loaded, condition.prompts, out), as_json)


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

    given = ModelSource(model, backend, device, dtype, None, device_map, offload_folder)
    say_estimate(given, [checkpoint], samples, length, passes=1)
    loaded = load(given, checkpoint)
    prompts = draw_prompts(loaded, text, samples, length, seed, first)
    # Without a tokenizer the prompts are random tokens, the first one too.
    first = First.random if loaded.tokenizer is None else first
    summary = sink_summary(loaded, prompts, bos=first is First.bos)
    summary |= {"first_token": first.value, "text": prompts.description.get("source", "random tokens")}
    summary["after_bos"] = after_bos(loaded, prompts)
    if summary["sink_rate"] is None:
        report_progress(
            f"no sink rate: at {length} tokens attention spread evenly scores {summary['uniform_score']:.2f}, above "
            f"the threshold of {SINK_THRESHOLD:g}; give --length {shortest_for()} or more"
        )
    if as_json:
        print_json(summary, True)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("layer", "sink scores of its heads", "norm ratio before", "direction before")
    table.title = model_title(summary["model"], summary["quantisation"])
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
    from p0circuit.advice import advise as advise_on, passes, write_advice
    from p0circuit.models import describe
    from p0circuit.models.passes import count_passes

    source = ModelSource(model, backend, device, dtype)
    count = samples or quick_prompt_count(source, checkpoint)
    loaded = load(source, checkpoint)
    prompts = draw_prompts(loaded, text, count, length, seed, First.text)
    report_progress(f"at most {passes(loaded, prompts):.0f} passes over {prompts.n} prompts")
    with count_passes() as counted:
        found = advise_on(loaded, prompts)
    used = counted.passes(prompts.n, prompts.length, describe(loaded).n_layers)
    report_progress(f"it took {used:.1f} passes")
    directory = out / found.model.replace("/", "--")
    written = write_advice(found, directory)
    if as_json:
        print_json(found.to_json(), True)
    else:
        show_advice(found)
    report_progress(f"{' and '.join(path.name for path in written)} are in {directory}")


def _run_one(experiment: Experiment, model: HookedModel, prompts: PromptSet, out: Path) -> dict[str, Any]:
    """Run one experiment on a model, save its result and a manifest, and print what was found."""
    from p0circuit.models import describe
    from p0circuit.recording.fingerprint import weights_fingerprint

    info = describe(model)
    result = experiment.run(model, prompts)
    return save_and_show(
        result,
        out / info.name.replace("/", "--"),
        info.name,
        info.quantisation,
        weights=weights_fingerprint(model),
        prompts=prompts.fingerprint(),
        seed=prompts.seed,
        device=str(model.cfg.device),
    )


def save_and_show(
    result: Result, directory: Path, name: str, quantisation: str | None = None, **details: Any
) -> dict[str, Any]:
    """Save a result and its manifest, and print what was found."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from p0circuit.results import model_title, write_manifest

    # The manifest is written last: one that is there tells of a run that came to its end.
    (directory / "manifest.json").unlink(missing_ok=True)
    result.save(directory)
    table = Table(
        title=f"{model_title(name, quantisation)}: {result.experiment}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("quantity", "value [95 % interval]"):
        table.add_column(column, overflow="fold")
    for key, value in result.metrics.items():
        table.add_row(key, str(value))
    for note in result.notes:
        report_progress(f"{result.experiment}: {note}")
    started = time.time() - result.provenance["seconds"]
    about = {"model": name, "quantisation": quantisation, "experiments": [result.experiment]}
    write_manifest(directory, sys.argv[1:], started, **about, **details)
    Console(stderr=True).print(table)
    if result.claim is not None and result.judgement is not None:
        report_progress(f"{result.claim['id']} {result.judgement.verdict}: {result.judgement.reason}")
    report_progress(f"tables, figures and manifest are in {directory}")
    return {result.experiment: {key: value.to_json() for key, value in result.metrics.items()}}
