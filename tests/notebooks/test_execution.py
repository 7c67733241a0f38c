"""Every notebook once, with few prompts, through the command: its key figures are those of the experiment classes."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from p0circuit import experiments, notebooks
from p0circuit.activations import SINK_SCORE, record
from p0circuit.advice import advise
from p0circuit.experiments.conditions import drawable
from p0circuit.experiments.path import JOINT, WHOLE, joint_changes
from p0circuit.experiments.practice import find_used_sink
from p0circuit.experiments.surgery import find_sink
from p0circuit.interventions.activation_patching import patch_components
from p0circuit.interventions.contrast import contrast, replacements
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.path_patching import edges_into_keys
from p0circuit.models import load_model
from p0circuit.models.wired import wired_truth
from p0circuit.results import Result
from p0circuit.teaching import read_prompts
from p0circuit.training.runs import as_trained, shipped_runs
from p0circuit.training.trace import Trace, causal_concentration, measure_checkpoint
from tests.notebooks.command import ROOT, p0circuit

SAMPLES = 32
Figures = dict[str, float]


@functools.cache
def p0_nano() -> Any:
    return load_model("p0-nano")


@functools.cache
def result(name: str) -> Result:
    """What an experiment class says on the prompts of the notebooks; what no notebook compares is kept small."""
    configured = {
        "Structure": experiments.StructureConfig(positions=(16,), samples_beside=32, scan_blocks=1),
        "Amplification": experiments.AmplificationConfig(steps=1, draws=1, shown=1, shown_samples=2),
        "DirectionOrNorm": experiments.DirectionOrNormConfig(scan_samples=2),
        "Content": experiments.ContentConfig(scan_samples=2),
        "Streaming": experiments.StreamingConfig(other_samples=4, long_tokens=512),
    }
    kind = getattr(experiments, name)
    made = kind(configured[name]) if name in configured else kind()
    return made.run(p0_nano(), read_prompts(p0_nano(), SAMPLES))


def metrics(name: str, *wanted: str) -> Figures:
    return {one: result(name).metrics[one].value for one in wanted}


def tour() -> Figures:
    structure = result("Structure").metrics
    return {
        **metrics("SinkMap", "best_head", "sink_rate"),
        **metrics("NormDirection", "norm_ratio_after_block_1"),
        **metrics("Structure", "p0_excess", "t_over_p0_when_alone"),
        "left_of_p0_by_mixing": 1 - structure["taken_from_p0_by_mixing"].value,
    }


def meet_the_sink() -> Figures:
    rates = result("SinkMap").tables["rates"].set_index(["condition", "position", "from_layer"])["sink_rate"]
    return {
        **metrics("SinkMap", "best_head", "sink_rate_from_layer_2", "sink_rate_random_tokens"),
        "sink_rate_of_position_8": float(rates["without BOS", 8, 2]),
        **metrics("BosAblation", "score_without_over_with_bos"),
    }


def recognition() -> Figures:
    wanted = [
        f"{name}_block_{block}"
        for name in ("variance_explained_by_the_cone", "squared_norm_over_others")
        for block in (0, 1)
    ]
    return {**metrics("Recognition", *wanted), **metrics("Structure", "t_over_p0_when_alone", "p0_excess")}


def amplification() -> Figures:
    return {
        **metrics("Amplification", "share_of_mlp_0", "share_of_mlp_1"),
        **metrics("DirectionOrNorm", "left_with_norm_cut"),
        **metrics("Content", "left_with_content_replaced"),
        **{"excess": result("Structure").metrics["p0_excess"].value},
    }


def patching() -> Figures:
    model = p0_nano()
    sink = find_sink(model, read_prompts(model, SAMPLES))
    vocabulary, special = drawable(model)
    pair = contrast(sink.prompts.subset(slice(0, 16)), 8, vocabulary, 0, tuple(special))
    head = sink.heads[0]
    joint = joint_changes(model, pair, [head], torch.full((pair.clean.n,), 5))
    shares = {
        f"share_of_blocks_0_1_in_{direction}": joint[direction, JOINT].mean() / joint[direction, WHOLE].mean()
        for direction in ("noising", "denoising")
    }
    grid = patch_components(model, pair, sink_score_of([head]), ("mlp",), [1])
    edges = edges_into_keys(model, pair.clean, ["mlp.1"], replacements(model, pair, ["mlp.1"]), method="hooks")
    edge = float(edges.effect[0, :, head[0], head[1]].mean())
    return {
        "clean_score": float(grid.base.mean()),
        "effect_of_mlp_1": float((grid.patched - grid.base).mean()),
        **shares,
        "edge_by_hand": edge,
        "edge_by_closed_form": edge,
        **metrics("KeySide", "query_independent_share"),
    }


def build_a_sink() -> Figures:
    return {
        "score_of_strength_9": wired_truth().score_kept(64)[0],
        "score_without_the_detector": wired_truth().score_gone(64),
        "trained_left_with_direction_replaced": result("DirectionOrNorm").metrics["left_with_direction_replaced"].value,
        "trained_16_alone": result("Structure").metrics["t_over_p0_when_alone"].value,
    }


def emergence() -> Figures:
    runs = as_trained(shipped_runs())
    early, concentration, convergence, methods = (
        kind().run(runs).metrics
        for kind in (experiments.Early, experiments.Concentration, experiments.Convergence, experiments.Methods)
    )
    last = measure_checkpoint(p0_nano(), read_prompts(p0_nano(), SAMPLES))
    lm = load_model("bos-0")
    plain = read_prompts(lm, SAMPLES)
    heads = find_used_sink(lm, plain)[0].heads
    behind = plain.behind(lm.tokenizer.bos_token_id).split()[1]
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
        "causal_of_bos_0_here": causal_concentration(lm, behind, record(lm, behind, SINK_SCORE)[SINK_SCORE]) or 0,
        "excess_of_bos_in_the_middle": float(
            sum(one[:, 16:, 16].mean() - one[:, 8:, 8].mean() for one in patterns) / len(heads)
        ),
        "error_difference": convergence["error_difference"].value,
        "force_sink_excess_difference": methods["force_sink_excess_difference"].value,
        "tnlm_excess_difference": methods["tnlm_excess_difference"].value,
    }


def practice() -> Figures:
    advice = advise(p0_nano(), read_prompts(p0_nano(), SAMPLES))
    assert advice.loss_without_sink is not None and advice.bos_dependent is False
    # The hidden layer of the MLP that writes the outlier, rounded by torch on the grid that P0 makes.
    _, cache = p0_nano().run_with_cache(read_prompts(p0_nano(), SAMPLES).split()[1].ids)
    x = cache["blocks.2.mlp.hook_post"]
    rounded = torch.quantize_per_tensor(x, float(x.abs().max()) / 127, 0, torch.qint8).dequantize()
    errors = (rounded - x)[:, 1:].norm(dim=(1, 2)) / x[:, 1:].norm(dim=(1, 2))
    return {
        **metrics("Streaming", "dropping_p0_beyond_5_times_another"),
        **metrics("Quantisation", "error_left_with_p0_kept"),
        **metrics("FirstToken", "spread_left_with_neutral_prefix"),
        "int8_error_by_hand": float(errors.mean()),
        "loss_without_sink": advice.loss_without_sink.value,
        "hangs_on_bos": 0.0,
        "other_hangs_on_bos": 1.0,
    }


EXPECTED: dict[str, tuple[Callable[[], Figures], float]] = {
    "00_tour": (tour, 1e-4),
    "01_meet_the_sink": (meet_the_sink, 1e-4),
    "02_recognition": (recognition, 1e-4),
    "03_amplification": (amplification, 1e-4),
    "04_patching_the_circuit": (patching, 1e-4),
    # Our model has no decoys: within a thousandth of what is true of the one that has.
    "05_build_a_sink": (build_a_sink, 1e-3),
    "06_emergence": (emergence, 1e-4),
    "08_practice": (practice, 1e-4),
}


def test_all_are_executed() -> None:
    assert sorted(EXPECTED) == notebooks.names()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_key_figures_are_those_of_the_experiments(name: str, tmp_path: Path) -> None:
    done = p0circuit("run", name, "-p", "samples", str(SAMPLES), "--out", "done", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    executed = tmp_path / "done" / f"{name}.ipynb"
    found = notebooks.key_figures(executed)
    assert json.loads((tmp_path / "done" / name / "key-figures.json").read_text()) == found
    assert any((tmp_path / "done" / name / "figures").glob("*.png"))
    expected, tolerance = EXPECTED[name]
    for key, value in expected().items():
        assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


@pytest.mark.slow
def test_a_notebook_is_a_script_too(tmp_path: Path) -> None:
    """Without a display and from anywhere; only the number of prompts is made small."""
    source = (notebooks.folder() / "00_tour.py").read_text()
    (tmp_path / "00_tour.py").write_text(re.sub("^samples = 128", "samples = 16", source, flags=re.MULTILINE))
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "00_tour.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert json.loads(done.stdout[done.stdout.index("{\n") :])["best_head"] > 0.4
