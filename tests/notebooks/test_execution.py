"""Every notebook once, with few prompts, through the command: its key figures are those of the experiment classes."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
import pytest
import torch

from p0circuit import experiments
from p0circuit.advice import advise
from p0circuit.course import build as notebooks
from p0circuit.course.page import read_prompts
from p0circuit.experiments.conditions import pooled_prompts_for
from p0circuit.experiments.measures.joint_patches import JOINT, WHOLE_STREAM, joint_changes
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.interventions.activation_patching import patch
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.own_scores import edges_into_keys
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.models import load_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import random_tokens
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS
from p0circuit.training.checkpoint_measurement import causal_concentration, measure_checkpoint
from p0circuit.training.runs import as_trained, shipped_runs
from p0circuit.training.trace import Trace
from tests.notebooks.command import ROOT, p0circuit

SAMPLES = 32
Figures = dict[str, float]


@dataclass(frozen=True)
class Expected:
    """What the key figures of a notebook have to be.

    Attributes:
        figures: gives them, told where the notebook has left what it leaves.
        parameters: that the notebook is run with, beside or instead of few samples.
        unchecked: key figures that nothing else can be asked for.
    """

    figures: Callable[[Path], Figures]
    tolerance: float = 1e-4
    parameters: Mapping[str, Any] = field(default_factory=dict)
    unchecked: frozenset[str] = frozenset()


@functools.cache
def p0_nano() -> Any:
    return load_model("p0-nano")


@functools.cache
def result(name: str) -> Result:
    """What an experiment class says on the prompts of the notebooks; what no notebook compares is kept small."""
    configured = {
        "Structure": experiments.StructureConfig(positions=(16,), samples_beside=32, scan_blocks=1),
        "Amplification": experiments.AmplificationConfig(steps=1, draws=1, singles=1, single_samples=2),
        "DirectionOrNorm": experiments.DirectionOrNormConfig(scan_samples=2),
        "Content": experiments.ContentConfig(scan_samples=2),
        "Streaming": experiments.StreamingConfig(other_samples=4, long_tokens=512),
        "DormantHeads": experiments.DormantHeadsConfig(domain_samples=2, domain_orders=1),
        "Mitigations": experiments.MitigationsConfig(int8_samples=2, spread_samples=2, tokens=2),
    }
    kind = getattr(experiments, name)
    made = kind(configured[name]) if name in configured else kind()
    return made.run(p0_nano(), read_prompts(p0_nano(), SAMPLES))


def metrics(name: str, *wanted: str) -> Figures:
    return {one: result(name).metrics[one].value for one in wanted}


def tour(left: Path) -> Figures:
    structure = result("Structure").metrics
    return {
        **metrics("SinkMap", "best_head", "sink_rate"),
        **metrics("NormDirection", "norm_ratio_after_block_1"),
        **metrics("Structure", "p0_excess", "t_over_p0_when_alone"),
        "left_of_p0_by_mixing": 1 - structure["taken_from_p0_by_mixing"].value,
    }


def meet_the_sink(left: Path) -> Figures:
    rates = result("SinkMap").tables["rates"].set_index(["condition", "position", "from_layer"])["sink_rate"]
    return {
        **metrics("SinkMap", "best_head", "sink_rate_from_layer_2", "sink_rate_random_tokens"),
        "sink_rate_of_position_8": float(rates["without BOS", 8, 2]),
        **metrics("BosAblation", "score_without_over_with_bos"),
    }


def recognition(left: Path) -> Figures:
    wanted = [
        f"{name}_block_{block}"
        for name in ("variance_explained_by_the_cone", "squared_norm_over_others")
        for block in (0, 1)
    ]
    return {**metrics("Recognition", *wanted), **metrics("Structure", "t_over_p0_when_alone", "p0_excess")}


def amplification(left: Path) -> Figures:
    config = experiments.DirectionOrNormConfig(ordinary=(16,), scan_samples=2)
    of_position_16 = experiments.DirectionOrNorm(config).run(p0_nano(), read_prompts(p0_nano(), SAMPLES))
    return {
        **metrics("Amplification", "share_of_mlp_0", "share_of_mlp_1"),
        **metrics("DirectionOrNorm", "left_with_norm_cut"),
        **metrics("Content", "left_with_content_replaced"),
        "left_with_direction_of_position_16": of_position_16.metrics["left_with_direction_replaced"].value,
        "excess": result("Structure").metrics["p0_excess"].value,
    }


def patching(left: Path) -> Figures:
    model = p0_nano()
    sink = studied_sink(model, read_prompts(model, SAMPLES), above_block=CIRCUIT_BLOCKS[-1])
    vocabulary, special = sampleable_vocabulary(model)
    pair = shift_prompts(sink.prompts.subset(slice(0, 16)), 8, vocabulary, 0, tuple(special))
    head = sink.heads[0]
    joint = joint_changes(model, pair, [head], torch.full((pair.clean.n,), 5))
    shares = {
        f"share_of_blocks_0_1_in_{direction}": joint[direction, JOINT].mean() / joint[direction, WHOLE_STREAM].mean()
        for direction in ("noising", "denoising")
    }
    grid = patch(model, pair, sink_score_of([head]), ["mlp.1"])
    edges = edges_into_keys(model, pair.clean, ["mlp.1"], patch_values(model, pair, ["mlp.1"]), method="hooks")
    edge = float(edges.effect[0, :, head[0], head[1]].mean())
    return {
        "clean_score": float(grid.base.mean()),
        "effect_of_mlp_1": float(grid.effect.mean()),
        **shares,
        "edge_by_hand": edge,
        "edge_by_closed_form": edge,
        **metrics("KeySide", "query_independent_share"),
    }


def build_a_sink(left: Path) -> Figures:
    wired, prompts = load_model("wired"), random_tokens(64, n=SAMPLES, length=64, seed=0)
    norm_cut = experiments.DirectionOrNorm(experiments.DirectionOrNormConfig(scan_samples=2)).run(wired, prompts)
    config = experiments.StructureConfig(positions=(16,), samples_beside=SAMPLES, scan_blocks=1)
    structure = experiments.Structure(config).run(wired, prompts)
    return {
        "built_left_with_norm_cut": norm_cut.metrics["left_with_norm_cut"].value,
        "built_16_with_norm_of_p0": structure.metrics["t_over_p0_with_norm_of_p0"].value,
        "score_of_strength_9": wired_truth().sink_scores(64)[0],
        "score_without_the_detector": wired_truth().uniform_score(64),
        "trained_left_with_direction_replaced": result("DirectionOrNorm").metrics["left_with_direction_replaced"].value,
        "trained_16_alone": result("Structure").metrics["t_over_p0_when_alone"].value,
    }


def emergence(left: Path) -> Figures:
    runs = as_trained(shipped_runs())
    early, concentration, convergence, methods = (
        kind().run(runs).metrics
        for kind in (experiments.Early, experiments.Concentration, experiments.Convergence, experiments.Methods)
    )
    last = measure_checkpoint(p0_nano(), read_prompts(p0_nano(), SAMPLES))
    mixture = load_model("moe-0")
    config = experiments.ExpertsConfig(alone=1, samples=24, most=4, draws=1)
    experts = experiments.Experts(config).run(mixture, read_prompts(mixture, SAMPLES)).metrics
    lm = load_model("bos-0")
    plain = read_prompts(lm, SAMPLES)
    heads = studied_sink(lm, plain, in_either_condition=True).heads
    behind = plain.prepend(lm.tokenizer.bos_token_id).split()[1]
    moved = plain.split()[1].ids.clone()
    moved[:, 16] = lm.tokenizer.bos_token_id
    _, cache = lm.run_with_cache(moved)
    patterns = [cache["pattern", layer][:, head] for layer, head in heads]
    return {
        "excess_at_the_end": Trace("p0-nano", [last]).excess[-1],
        "causal_at_the_end": last["concentration_causal"],
        "latest_formation_share": early["latest_formation_share"].value,
        "observed_final": concentration["observed_final"].value,
        "causal_final": concentration["causal_final"].value,
        "excess_left_without_4_experts": experts["excess_left_without_4_top_experts_at_p0"].value,
        "causal_of_bos_0_here": causal_concentration(lm, behind, record(lm, behind, SINK_SCORE)) or 0,
        "excess_of_bos_in_the_middle": float(
            sum(one[:, 16:, 16].mean() - one[:, 8:, 8].mean() for one in patterns) / len(heads)
        ),
        "error_difference": convergence["error_difference"].value,
        "force_sink_excess_difference": methods["force_sink_excess_difference"].value,
        "tnlm_excess_difference": methods["tnlm_excess_difference"].value,
    }


def practice(left: Path) -> Figures:
    advice = advise(p0_nano(), read_prompts(p0_nano(), SAMPLES))
    assert advice.loss_without_sink is not None and advice.bos_dependent is False
    # The hidden layer of the MLP that writes the outlier, rounded by torch: each row on the grid that its P0 makes.
    _, cache = p0_nano().run_with_cache(read_prompts(p0_nano(), SAMPLES).split()[1].ids)
    x = cache["blocks.2.mlp.hook_post"]
    rounded = torch.stack(
        [torch.quantize_per_tensor(row, float(row.abs().max()) / 127, 0, torch.qint8).dequantize() for row in x]
    )
    errors = (rounded - x)[:, 1:].norm(dim=(1, 2)) / x[:, 1:].norm(dim=(1, 2))
    return {
        **metrics("Streaming", "dropping_p0_beyond_5_times_another"),
        **metrics("Quantisation", "error_left_with_p0_kept"),
        **metrics("FirstToken", "spread_left_with_neutral_prefix"),
        **metrics("DormantHeads", "heads_in_sink_order"),
        "loss_added_by_hiding_p0": result("Mitigations").metrics["loss_added_by_p0s_key_hidden"].value,
        "int8_error_by_hand": float(errors.mean()),
        "loss_without_sink": advice.loss_without_sink.value,
        "hangs_on_bos": 0.0,
        "other_hangs_on_bos": 1.0,
    }


def bring_your_own_model(left: Path) -> Figures:
    lm = load_model("learned-0")
    prompts = read_prompts(lm, SAMPLES)
    sink_map = experiments.SinkMap().run(lm, prompts).metrics
    bos = experiments.BosAblation().run(lm, prompts).metrics
    room: dict[str, Any] = {"np": np, "torch": torch}
    source = jupytext.read(notebooks.folder() / "07_bring_your_own_model.py")
    exec(next(cell.source for cell in source.cells if "def backcopy" in cell.source), room)

    def rows(seed: int, *starts: bool, n: int = SAMPLES) -> list[torch.Tensor]:
        rng = np.random.default_rng(seed)
        return [room["backcopy"](rng, n, bos) for bos in starts]

    probes = {"after BOS": rows(10_000, True, n=64)[0], "random first": rows(10_000, False, n=64)[0]}
    as_trained, without = rows(20_000, True, False)
    moved = without.clone()
    moved[:, 16] = 0
    # The monitor chooses heads on the even rows and measures on the odd ones; the trace chooses on the first half.
    ends = {
        name: excess_by_transformers(left / "runs" / name, probe[::2], probe[1::2]) for name, probe in probes.items()
    }
    of_bos = functools.partial(excess_by_transformers, left / "runs" / "after BOS", probes["after BOS"][:32])
    return {
        "largest_difference_of_logits": 0.0,
        "monitor_and_trace_apart": 0.0,
        **{name: sink_map[name].value for name in ("best_head", "sink_rate")},
        "score_without_over_with_bos": bos["score_without_over_with_bos"].value,
        "final_excess_behind_bos": ends["after BOS"],
        "final_excess_random_first": ends["random first"],
        "excess_bos_at_p0": of_bos(as_trained),
        "excess_another_at_p0": of_bos(without),
        "excess_bos_at_16": of_bos(moved, at=16),
    }


@torch.no_grad()
def excess_by_transformers(run: Path, chosen_on: torch.Tensor, rows: torch.Tensor, at: int = 0) -> float:
    """The excess score at the last checkpoint of a run, in the heads that are highest on other rows.

    Nothing of ours has a part in it.
    """
    from transformers import AutoModelForCausalLM

    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    model = AutoModelForCausalLM.from_pretrained(last, attn_implementation="eager").eval()

    def scores(ids: torch.Tensor, key: int) -> torch.Tensor:
        attentions = model(ids, output_attentions=True).attentions
        return torch.stack([pattern[:, :, key:, key].mean((0, -1)) for pattern in attentions])  # [layer, head]

    means = scores(chosen_on, 0)
    third = means.flatten().topk(3).values[-1]
    heads = means > 0.3 if means.max() > 0.3 else means >= third
    return float((scores(rows, at) - scores(rows, 8))[heads].mean())


def report(left: Path) -> Figures:
    """From what the run has left on disk, and a few of it from the experiments once more."""
    claims = {
        claim["id"]: claim
        for place in ("p0-nano", "training")
        for claim in json.loads((left / place / "claims.json").read_text())
    }
    assert not any(claim["error"] for claim in claims.values())
    verdicts = Counter(claim["verdict"] for claim in claims.values())
    tested = [kind for kind in (*experiments.EXPERIMENTS.values(), *experiments.RUN_EXPERIMENTS.values()) if kind.claim]
    first = {kind.claim.id: kind.claim.criteria[0].metric for kind in tested if kind.claim}
    assert claims.keys() == first.keys()
    prompts, runs = pooled_prompts_for(p0_nano(), "stdlib", FEW, 64), as_trained(shipped_runs())
    again = [experiments.SinkMap().run(p0_nano(), prompts), experiments.KeySide().run(p0_nano(), prompts)]
    again += [kind().run(runs) for kind in experiments.RUN_EXPERIMENTS.values()]
    values = {identity: claims[identity]["measured"][metric]["value"] for identity, metric in first.items()}
    for one in again:
        assert one.claim is not None
        values[one.claim["id"]] = one.metrics[first[one.claim["id"]]].value
    return {
        "figures": len(list(left.glob("*/figures/*.png"))),
        "reproduced": verdicts["reproduced"],
        "not_reproduced": verdicts["not reproduced"],
        **{f"{identity}_{metric}": values[identity] for identity, metric in first.items()},
    }


FEW = 12
"""Prompts for the notebook that runs everything."""
LONGEST = "90_paper_figures"
LATER = ("05_build_a_sink", "06_emergence", "07_bring_your_own_model", "08_practice")
"""Have files of their own, and so processes: test_longest.py, test_later.py."""
EXPECTED = {
    "00_tour": Expected(tour),
    "01_meet_the_sink": Expected(meet_the_sink),
    "02_recognition": Expected(recognition),
    "03_amplification": Expected(amplification),
    "04_patching_the_circuit": Expected(patching),
    # Our model has no decoys: within a thousandth of what is true of the one that has.
    "05_build_a_sink": Expected(build_a_sink, tolerance=1e-3),
    "06_emergence": Expected(emergence),
    "07_bring_your_own_model": Expected(bring_your_own_model, parameters={"steps": 256}),
    "08_practice": Expected(practice),
    LONGEST: Expected(report, parameters={"samples": FEW, "quick": True}),
}


def test_all_are_executed() -> None:
    assert sorted(EXPECTED) == notebooks.names()


def check_key_figures(name: str, tmp_path: Path) -> None:
    """Run a notebook and hold what it printed last against what it is expected to be."""
    expected = EXPECTED[name]
    given = {"samples": SAMPLES} | dict(expected.parameters)
    options = [word for pair in given.items() for word in ("-p", *map(str, pair))]
    done = p0circuit("run", name, *options, "--out", "done", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left = tmp_path / "done" / name
    found = notebooks.key_figures(left.with_suffix(".ipynb"))
    assert json.loads((left / "key-figures.json").read_text()) == found
    assert any((left / "figures").glob("*.png"))
    values = expected.figures(left)
    assert found.keys() - expected.unchecked == values.keys()
    for key, value in values.items():
        assert found[key] == pytest.approx(value, rel=expected.tolerance, abs=expected.tolerance), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in (*LATER, LONGEST)])
def test_key_figures_are_those_of_the_experiments(name: str, tmp_path: Path) -> None:
    check_key_figures(name, tmp_path)


ALONE = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
ALONE |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""The environment of a process that has no display."""


def with_few_samples(source: str) -> str:
    few, count = re.subn("^samples = 128", "samples = 16", source, flags=re.MULTILINE)
    assert count == 1
    return few


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_tour", "01_meet_the_sink"])
def test_a_notebook_is_a_script_too(name: str, tmp_path: Path) -> None:
    """Without a display and from anywhere; only the number of prompts is made small."""
    script = tmp_path / f"{name}.py"
    script.write_text(with_few_samples((notebooks.folder() / script.name).read_text()))
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=ALONE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found.keys() == notebooks.key_figures(notebooks.folder() / f"{name}.ipynb").keys()


@pytest.mark.slow
def test_a_notebook_is_executed_by_nbconvert(tmp_path: Path) -> None:
    shipped = notebooks.folder() / "00_tour.ipynb"
    notebook = nbformat.read(shipped, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = with_few_samples(parameters.source)
    nbformat.write(notebook, tmp_path / shipped.name)
    command = ["jupyter", "nbconvert", "--to", "notebook", "--execute", "--output", "done", shipped.name]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=ALONE | {"JUPYTER_PREFER_ENV_PATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert notebooks.key_figures(tmp_path / "done.ipynb").keys() == notebooks.key_figures(shipped).keys()
