"""The command line as it is used: what it prints where, what it leaves behind, and how it ends."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import p0circuit
from p0circuit import cli
from p0circuit.cli import main
from p0circuit.cli.options import First
from p0circuit.experiments import EXPERIMENTS, RUN_EXPERIMENTS, SinkMap
from p0circuit.experiments.sink_summary import sink_summary
from p0circuit.io import data_dir
from p0circuit.models import load_model
from p0circuit.models.gguf_writer import write_gguf
from p0circuit.models.names import CONSTRUCTED_MODELS
from p0circuit.prompts import natural_text
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.reproduction import parameter_count
from p0circuit.results import Result
from p0circuit.training.runs import as_trained, shipped_runs
from tests.tiny import HEADS, LAYERS

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = data_dir() / "prompts" / "english"
# Text that everyone has, and little of it.
QUICK = ("--text", "english", "--samples", "4", "--length", "12")
KEYS = [
    "model",
    "quantisation",
    "backend",
    "n",
    "length",
    "bos",
    "condition",
    "uniform_score",
    "sink_rate",
    "sink_rate_from_layer_2",
    "sink_score",
    "norm_ratio",
    "direction_consistency",
    "first_token",
    "text",
    "after_bos",
]
FILES = {
    "sink-map": {"tables/sink-map-scores.csv", "tables/sink-map-rates.csv", "figures/sink-map-map"},
    "norm-direction": {
        "tables/norm-direction-layers.csv",
        "figures/norm-direction-layers",
        "figures/norm-direction-components",
    },
    "bos-ablation": {
        "tables/bos-ablation-summary.csv",
        "tables/bos-ablation-heads.csv",
        "figures/bos-ablation-bars",
    },
}

Run = Callable[..., "Ended"]


class Ended:
    """How a command ended: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def p0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `p0circuit` with arguments in this process, from its entry point to its exit code."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["p0circuit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        captured = capsys.readouterr()
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would the processes that its tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from p0circuit.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def expected_files(*experiments: str) -> set[str]:
    named = {name for experiment in experiments for name in FILES[experiment]}
    views = {"attention/sink-map.json"} if "sink-map" in experiments else set()
    drawn = {f"{name}.{end}" for name in named if name.startswith("figures/") for end in ("png", "svg")}
    tables = {name for name in named if name.endswith(".csv")}
    return tables | drawn | views | {f"{experiment}.json" for experiment in experiments} | {"manifest.json"}


# sink


def test_help_names_every_command(p0: Run) -> None:
    shown = p0("--help")
    assert shown.code == 0 and shown.err == ""
    for command in ("reproduce", "run", "sink", "models", "fetch", "train", "trace", "sweep", "cache"):
        assert command in shown.out
        assert p0(command, "--help").code == 0


def test_sink_prints_json_and_nothing_else(tiny_model_dir: Path, tmp_path: Path) -> None:
    ended = start("sink", tiny_model_dir, "--json", *QUICK, cwd=tmp_path)
    out, err = ended.communicate(timeout=120)
    assert ended.returncode == 0, err
    # No progress bar, no warning: nobody looks at a pipe.
    assert err == ""
    found = json.loads(out)
    assert list(found) == KEYS
    model = load_model(tiny_model_dir)
    prompts = natural_text(model, "english", n=4, length=12)
    expected = sink_summary(model, prompts, bos=False) | {"first_token": "text", "text": "english", "after_bos": None}
    for key in KEYS:
        if isinstance(expected[key], list):
            np.testing.assert_allclose(found[key], expected[key], atol=1e-5)
        else:
            assert found[key] == expected[key]
    assert np.shape(found["sink_score"]) == (LAYERS, HEADS)
    assert np.shape(found["norm_ratio"]) == np.shape(found["direction_consistency"]) == (LAYERS + 1,)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("first", ["text", "bos", "random"])
def test_sink_puts_first_what_is_asked_for(p0: Run, tiny_model_dir: Path, first: str) -> None:
    ended = p0("sink", tiny_model_dir, "--first", first, "--seed", 3, "--json", *QUICK)
    found = json.loads(ended.out)
    assert (found["bos"], found["first_token"]) == (first == "bos", first)
    model = load_model(tiny_model_dir)
    prompts = natural_text(model, "english", n=4, length=12, seed=3, first_token=first)
    np.testing.assert_allclose(found["sink_score"], sink_summary(model, prompts, bos=False)["sink_score"])


def test_sink_without_json_is_a_table(p0: Run, tiny_model_dir: Path) -> None:
    shown = p0("sink", tiny_model_dir, *QUICK)
    assert shown.code == 0
    told = " ".join(shown.out.split())
    assert "tiny" in told and "Sink rate 0.0" in told and "from layer 2" in told
    assert "4 prompts of 12 tokens of english; at position zero: the text's own first token" in told
    assert "Uniform attention would score 0.259" in told and "after BOS" not in told


def test_one_default_for_what_stands_first_and_for_the_text() -> None:
    commands = [command.callback for command in cli.app.registered_commands if command.callback is not None]
    defaults = [inspect.signature(command).parameters for command in commands]
    assert [of["first"].default for of in defaults if "first" in of] == [First.text] * 2
    assert [of["text"].default for of in defaults if "text" in of] == [None] * 6


def test_sink_says_what_would_be_after_bos_where_the_sink_depends_on_it(p0: Run) -> None:
    options = ("--samples", 40, "--length", 40, "--seed", 1)
    found = json.loads(p0("sink", "bos-0", "--json", *options).out)
    model = load_model("bos-0")
    text = natural_text(model, "stdlib", n=40, length=40, seed=1)
    rows = text.prepend(model.tokenizer.bos_token_id).subset(slice(0, 32))
    expected = sink_summary(model, rows, bos=True)
    assert found["sink_rate"] < 0.05 and (found["condition"], expected["condition"]) == ("without BOS", "with BOS")
    assert found["after_bos"] == {"n": 32, **{key: expected[key] for key in ("sink_rate", "sink_rate_from_layer_2")}}
    shown = p0("sink", "bos-0", *options)
    told = " ".join(shown.out.split())
    assert f"Its sink depends on BOS. After BOS: sink rate {expected['sink_rate']:.3f}" in told
    # Asked for by nobody, the text is the model's own.
    assert shown.err == "bos-0 reads 'stdlib', since --text is not given\n"
    after = json.loads(p0("sink", "bos-0", "--json", *options, "--first", "bos").out)
    assert (after["first_token"], after["condition"], after["after_bos"]) == ("bos", "with BOS", None)
    assert json.loads(p0("sink", "p0-nano", "--json", *options).out)["after_bos"] is None


def test_a_rate_that_uniform_attention_would_reach_is_not_given(p0: Run) -> None:
    short = p0("sink", "wired", "--json", "--samples", 4, "--length", 9)
    found = json.loads(short.out)
    assert found["uniform_score"] == pytest.approx(sum(1 / k for k in range(1, 10)) / 9)
    assert found["sink_rate"] is None and found["sink_rate_from_layer_2"] is None and found["sink_score"]
    assert "at 9 tokens uniform attention scores 0.31, above the threshold of 0.3; give --length 10" in short.err
    assert "No sink rate" in p0("sink", "wired", "--samples", 4, "--length", 8).out
    enough = p0("sink", "wired", "--json", "--samples", 4, "--length", 10)
    assert json.loads(enough.out)["sink_rate"] is not None and "no sink rate" not in enough.err


def test_sink_in_half_precision_and_on_the_other_backend(p0: Run, tiny_model_dir: Path) -> None:
    exact = json.loads(p0("sink", tiny_model_dir, "--json", *QUICK).out)
    for options, backend, tolerance in (
        (("--dtype", "bfloat16"), exact["backend"], 0.02),
        (("--backend", "bridge"), "bridge", 1e-4),
    ):
        other = json.loads(p0("sink", tiny_model_dir, "--json", *QUICK, *options).out)
        assert other["backend"] == backend
        np.testing.assert_allclose(other["sink_score"], exact["sink_score"], atol=tolerance)


def test_a_model_without_tokenizer_reads_random_tokens_and_that_is_said(p0: Run) -> None:
    ended = p0("sink", "wired", "--json", "--samples", 4, "--length", 16)
    found = json.loads(ended.out)
    assert ended.err == "wired has no tokenizer: its prompts are random tokens\n"
    assert (found["model"], found["text"], found["first_token"]) == ("wired", "random tokens", "random")
    assert found["sink_rate"] == pytest.approx(0.2) and found["sink_rate_from_layer_2"] == pytest.approx(0.6)
    refused = p0("sink", "wired", "--first", "bos")
    assert refused.code == 2 and "its BOS token is not known" in refused.err


@pytest.mark.parametrize("name", ["wired-learned", "wired-decoy", "wired-decoy-learned"])
def test_the_constructed_models_have_names(p0: Run, name: str) -> None:
    found = json.loads(p0("sink", name, "--json", "--samples", 2, "--length", 16, "--backend", "bridge").out)
    assert (found["model"], found["backend"]) == (name, "bridge")
    assert found["sink_rate"] == pytest.approx(0 if "decoy" in name else 0.2)
    assert load_model(name).cfg.model_name == name


# run and reproduce


def test_run_leaves_tables_figures_and_a_manifest(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ("run", "sink-map", tiny_model_dir, "--out", tmp_path / "out", "--json", *QUICK)
    ended = p0(*arguments)
    assert ended.code == 0
    folder = tmp_path / "out" / "tiny"
    assert files(tmp_path / "out") == {f"tiny/{name}" for name in expected_files("sink-map")}
    result = Result.load(folder / "sink-map.json")
    shown = json.loads(ended.out)
    assert shown == {"sink-map": {name: interval.to_json() for name, interval in result.metrics.items()}}
    assert f"tables, figures and manifest are in {folder}" in ended.err.replace("\n", "")
    # With --json standard output has nothing but JSON.
    assert "best_head" not in ended.err
    table = p0(*(argument for argument in arguments if argument != "--json")).out
    assert "best_head_with_bos" in table and str(result.metrics["best_head"]) in table
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"] == [str(argument) for argument in arguments if argument != "--json"]
    assert manifest["model"] == "tiny" and manifest["experiments"] == ["sink-map"]
    assert manifest["weights"] == weights_fingerprint(load_model(tiny_model_dir))
    assert manifest["prompts"] == result.provenance["prompts"]["fingerprint"]
    assert (manifest["seed"], manifest["device"]) == (0, "cpu")


def test_a_second_run_reads_the_cache_and_leaves_the_same(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    ended = [
        p0("run", "norm-direction", tiny_model_dir, "--out", tmp_path / name, *QUICK) for name in ("first", "second")
    ]
    assert "read from the cache" not in ended[0].err
    assert "recordings read from the cache" in ended[1].err
    first, second = tmp_path / "first" / "tiny", tmp_path / "second" / "tiny"
    assert files(first) == files(second)
    for name in files(first) - {"manifest.json", "norm-direction.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_reproduce_tests_every_claim_on_every_model(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ("reproduce", tiny_model_dir, "wired", "--out", tmp_path, "--json", "--text", "english")
    ended = p0(*arguments, "--samples", 12, "--length", 20)
    assert ended.code == 0
    shown = json.loads(ended.out)
    assert list(shown) == ["tiny", "wired"]
    ids = [make.claim.id for make in EXPERIMENTS.values() if make.claim is not None]
    for model, found in shown.items():
        folder = Path(found["directory"])
        assert [claim["id"] for claim in found["claims"]] == ids
        assert json.loads((folder / "claims.json").read_text()) == found["claims"]
        assert {"report.html", "report.md", "manifest.json"} <= files(folder)
        for claim in found["claims"]:
            controls = {control["control"]: control["verdict"] for control in claim["controls"]}
            assert list(controls) == ["untrained", "shuffled neurons", "decoy"]
            assert model == "wired" or "reproduced" not in {claim["verdict"], *controls.values()}, claim["id"]
    verdicts = {claim["experiment"]: claim["verdict"] for claim in shown["wired"]["claims"]}
    assert verdicts["sink-map"] == "reproduced"
    # What does not apply to a model is said, written down, and stops nothing.
    assert verdicts["bos-ablation"] == "not applicable"
    left_out = json.loads((tmp_path / "wired" / "manifest.json").read_text())["left_out"]
    assert "no BOS token" in left_out["bos-ablation"]
    assert files(tmp_path / "tiny") >= expected_files(*FILES)
    assert "wired" in (tmp_path / "report.html").read_text()
    scores = pd.read_csv(tmp_path / "wired" / "tables" / "sink-map-scores.csv")
    assert set(scores[scores["sink_score"] > 0.8]["layer"]) == {2}


def test_without_names_a_real_model_comes_first_and_is_missed_without_a_network(
    p0: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pip's own switch; the cache of a test is empty.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("p0circuit.reproduction.front.EXPERIMENTS", {"sink-map": EXPERIMENTS["sink-map"]})
    ended = p0("reproduce", "--out", tmp_path, "--samples", 12, "--length", 20, "--json")
    assert ended.code == 0, ended.err
    assert list(json.loads(ended.out)) == ["p0-nano", "training"]
    (line,) = [line for line in ended.err.splitlines() if line.startswith("going on without smollm2-135m: ")]
    assert "p0circuit fetch smollm2-135m" in line
    page = (tmp_path / "report.html").read_text()
    assert "Missing:" in page and "p0circuit fetch smollm2-135m" in page
    overview = json.loads((tmp_path / "overview.json").read_text())
    assert overview["models"] == ["p0-nano", "training"] and list(overview["left_out"]) == ["smollm2-135m"]
    # By its own name it is what was asked for.
    refused = p0("reproduce", "p0-nano", "smollm2-135m", "--out", tmp_path / "named")
    assert refused.code == 2 and "smollm2-135m cannot be fetched" in refused.err
    assert not (tmp_path / "named").exists()


def test_a_quick_run_takes_as_many_prompts_as_the_size_says(
    p0: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p0circuit.reproduction.front.EXPERIMENTS", {"sink-map": EXPERIMENTS["sink-map"]})
    monkeypatch.setattr("p0circuit.reproduction.cost.LARGE_PARAMETERS", 500_000)
    for name, parameters, samples in (("p0-nano", "0.91", 32), ("wired", "0.", 128)):
        ended = p0("reproduce", name, "--quick", "--length", 20, "--out", tmp_path)
        assert ended.code == 0
        assert re.search(
            rf"{name} has {parameters}\d* million parameters: a quick run takes {samples} prompts", ended.err
        )
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert (manifest["samples"], manifest["length"]) == (samples, 20)
    ended = p0("reproduce", "wired", "--quick", "--samples", 24, "--length", 20, "--out", tmp_path)
    assert ended.code == 0 and "--samples 24 replaces the 128 prompts of a quick run" in ended.err
    assert json.loads((tmp_path / "wired" / "manifest.json").read_text())["samples"] == 24


def test_one_experiment_runs_in_the_condition_of_the_sink(p0: Run, tmp_path: Path) -> None:
    ended = p0("run", "C5", "bos-0", "--out", tmp_path, "--samples", 24, "--length", 40)
    assert ended.code == 0, ended.err
    assert "bos-0 has its sink in text after BOS" in ended.err
    result = Result.load(tmp_path / "bos-0" / "structure.json")
    assert result.provenance["prompts"]["behind"] == 0 and result.claim is not None


def test_a_claim_runs_by_its_number(p0: Run, tmp_path: Path) -> None:
    ended = p0("run", "c1", "wired", "--out", tmp_path, "--samples", 6, "--length", 12)
    assert ended.code == 0 and "C1 The sink: REPRODUCED in wired" in ended.out
    told = " ".join(ended.out.split())
    assert SinkMap.claim is not None
    assert SinkMap.claim.statement in told and SinkMap.claim.threshold in told
    assert Result.load(tmp_path / "wired" / "sink-map.json").judgement.verdict == "reproduced"


def test_claims_about_training_need_no_model(p0: Run, tmp_path: Path) -> None:
    ended = p0("reproduce", "training", "--out", tmp_path, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)["training"]
    assert [claim["id"] for claim in found["claims"]] == ["C13", "C14", "C15", "C16"]
    assert all([control["control"] for control in claim["controls"]] == ["plain text"] for claim in found["claims"])
    assert "reproduced" not in {claim["controls"][0]["verdict"] for claim in found["claims"]}
    assert {"report.html", "report.md", "manifest.json", "claims.json"} <= files(tmp_path / "training")
    assert "<pre>p0circuit run early</pre>" in (tmp_path / "training" / "report.html").read_text()
    ended = p0("run", "C13", "--out", tmp_path / "alone")
    assert ended.code == 0 and found["claims"][0]["verdict"].upper() in ended.out
    ended = p0("run", "C13", "--runs", tmp_path / "nowhere", "--out", tmp_path / "alone")
    assert ended.code == 2 and "no traces in" in ended.err


def test_the_first_layers_alone(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    quick = ("--out", tmp_path, "--layers", 2, *QUICK)
    assert p0("run", "norm-direction", tiny_model_dir, *quick).code == 0
    result = Result.load(tmp_path / "tiny[:2]" / "norm-direction.json")
    assert result.provenance["model"]["n_layers"] == 2
    ended = p0("run", "norm-direction", tiny_model_dir, "--out", tmp_path, "--layers", 9)
    assert ended.code == 2 and "tiny has 3 layers, so the first 9 cannot be loaded" in ended.err


def test_trace_prints_the_promised_keys(p0: Run, tmp_path: Path) -> None:
    quick = ("--samples", 6, "--length", 20, "--out", tmp_path, "--json")
    ended = p0("trace", "p0-nano", "--checkpoints", "0,7221,20000", *quick)
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found["model"] == "p0-nano" and [row["step"] for row in found["checkpoints"]] == [0, 7221, 20000]
    keys = {"step", "tokens", "loss", "sink_rate", "sink_rate_from_layer_2", "norm_ratio", "concentration_observed"}
    assert keys | {"concentration_causal"} <= set(found["checkpoints"][0])
    assert "formation_step" in found and found["stages"]
    assert (found["first_token"], found["text"]) == ("text", "stdlib")
    shown = p0("trace", "p0-nano", "--checkpoints", "0,7221,20000", *quick[:-1]).out
    assert f"the sink emerged at step {found['formation_step']}" in shown
    assert "Text: stdlib; at position zero: the text's own first token" in shown
    assert (tmp_path / "p0-nano" / "figures" / "trace-development.png").is_file()
    # The model is small, so no estimate is printed.
    assert "Needs" not in ended.err
    again = p0("trace", "p0-nano", "--checkpoints", "step-020000, 0,step-007221", *quick)
    assert json.loads(again.out) == found
    ended = p0("trace", "p0-nano", "--checkpoints", "5", *quick)
    assert ended.code == 2 and "none of the checkpoints" in ended.err
    ended = p0("trace", "p0-nano", "--checkpoints", "last", *quick)
    assert ended.code == 2 and "checkpoint 'last' has no step in its name" in ended.err
    assert all(key in p0("trace", "--help").out for key in (*keys, "formation_step", "stages", "missing"))


@pytest.mark.parametrize("name", ["tnlm-0", "baseline-0", "bos-1"])
def test_a_trace_that_comes_with_the_package(p0: Run, tmp_path: Path, name: str) -> None:
    ended = p0(
        "trace", name, "--first", "bos", "--out", tmp_path, "--table", tmp_path / "runs" / "mine-0.csv", "--json"
    )
    found = json.loads(ended.out)
    (run,) = as_trained([run for run in shipped_runs() if run.name == name])
    assert ended.code == 0 and f"{name} has no checkpoints: this is the trace that comes with" in ended.err
    assert f"with {run.first} at position zero" in ended.err and found["model"] == name
    assert [row["excess"] for row in found["checkpoints"]] == run["excess"].tolist()
    formed = None if run.formation is None else run["step"][run.formation]
    assert found["formation_step"] == formed and found["stages"] and not found["missing"]
    assert (found["first_token"], found["text"]) == (run.first, None)
    assert (tmp_path / name / "figures" / "trace-development.png").is_file()
    (kept,) = shipped_runs(tmp_path / "runs")
    pd.testing.assert_frame_equal(kept.table, run.table, check_dtype=False)


def test_a_trace_becomes_a_run_that_claims_are_judged_on(p0: Run, tmp_path: Path) -> None:
    few = ("p0-nano", "--checkpoints", "0,20000", "--samples", 4, "--text", "english", "--out", tmp_path)
    made = [(0, "text"), (0, "bos"), (1, "bos")]
    for seed, first in made:
        table = tmp_path / "runs" / f"bos-{seed}.csv"
        assert p0("trace", *few, "--seed", seed, "--first", first, "--table", table).code == 0
    assert {(run.seed, run.first) for run in shipped_runs(tmp_path / "runs")} == {*made}
    ended = p0("run", "C13", "--runs", tmp_path / "runs", "--out", tmp_path)
    assert ended.code == 0 and "REPRODUCED" in ended.out and "latest_formation_share is" in ended.out
    for wrong, told in ((("mine.csv",), "not named"), (("mine-0.csv", "--length", 24), "64 tokens")):
        ended = p0("trace", *few, "--table", *wrong)
        assert ended.code == 2 and told in ended.err


def test_what_a_large_model_takes_is_told_before_its_trace(
    p0: Run, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "run" / "checkpoint-3")
    monkeypatch.setattr("p0circuit.cli.training.LARGE_BYTES", 1)
    ended = p0("trace", tmp_path / "run", *QUICK, "--device", "cpu", "--out", tmp_path / "out")
    told, _, measured = ended.err.partition("run 3: loss")
    assert ended.code == 0 and measured
    assert "of weights in float32. Needs" in told and "3 passes of 1 s over 4 prompts" in told


def test_two_models_of_one_name_do_not_overwrite_each_other(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for first, second in (("wired", "wired"), (tiny_model_dir, f"{tmp_path}/tiny/")):
        ended = p0("reproduce", first, second, "--out", tmp_path / "out")
        assert ended.code == 2 and f"two of these models are called '{Path(first).name}'" in ended.err
    assert not (tmp_path / "out").exists()


def test_that_an_experiment_does_not_apply_is_a_result(p0: Run, tmp_path: Path) -> None:
    ended = p0("run", "bos-ablation", "wired", "--out", tmp_path)
    assert ended.code == 0 and "error" not in ended.err
    assert "bos-ablation: NOT APPLICABLE to wired" in ended.out and "this model has no BOS token" in ended.out
    ended = p0("run", "bos-ablation", "wired", "--out", tmp_path, "--json")
    result = json.loads(ended.out)["bos-ablation"]
    assert result["verdict"] == "not applicable" and "no BOS token" in result["why"]
    assert files(tmp_path) == set()


def test_settings_of_an_experiment(p0: Run, tmp_path: Path) -> None:
    quick = ("wired", "--out", tmp_path, "--samples", 4, "--length", 16)
    assert p0("run", "C1", *quick, "--set", "eps=0.2", "--set", "control=4").code == 0
    assert Result.load(tmp_path / "wired" / "sink-map.json").provenance["config"] == {"eps": 0.2, "control": 4}
    ended = p0("run", "C13", "--set", "eps=0.2")
    assert ended.code == 2 and "early has no settings" in ended.err


def test_all_experiments_are_listed(p0: Run) -> None:
    shown = p0("run", "--list")
    kinds = [*EXPERIMENTS.values(), *RUN_EXPERIMENTS.values()]
    assert shown.code == 0 and all(kind.id in shown.out and kind.title in shown.out for kind in kinds)
    listed = json.loads(p0("run", "--list", "--json").out)
    assert [entry["id"] for entry in listed] == [kind.id for kind in kinds]
    assert [entry["claim"] for entry in listed] == [kind.claim.id if kind.claim else None for kind in kinds]


def test_version_and_levels_of_messages(p0: Run) -> None:
    assert p0("--version").out == f"p0circuit {p0circuit.__version__}\n"
    small = ("sink", "wired", "--samples", 2, "--length", 12)
    assert p0(*small).err == "wired has no tokenizer: its prompts are random tokens\n"
    quiet = p0("-q", *small)
    assert quiet.err == "" and "Sink rate" in quiet.out
    refused = p0("-q", "sink", "wirde")
    assert refused.code == 2 and refused.err.startswith("error: unknown model")
    assert "exclude each other" in p0("-q", "-v", *small).err


def test_a_manifest_tells_of_a_run_that_came_to_its_end(p0: Run, tmp_path: Path) -> None:
    quick = ("wired", "--out", tmp_path, "--samples", 4, "--length", 12)
    assert p0("run", "sink-map", *quick).code == 0
    assert (tmp_path / "wired" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "wired" / "tables")
    (tmp_path / "wired" / "tables").touch()
    ended = p0("run", "norm-direction", *quick)
    assert ended.code == 1 and "error: " in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "wired" / "manifest.json").exists()
    assert not (tmp_path / "wired" / "norm-direction.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_an_interrupted_reproduction_leaves_nothing_half_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ("--text", "english", "--samples", 48, "--length", 48)
    process = start("reproduce", tiny_model_dir, "wired", "--out", "out", *options, cwd=tmp_path)
    first = tmp_path / "out" / "tiny" / "sink-map.json"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and out == ""
    left = files(tmp_path)
    assert not [name for name in left if ".tmp" in name]
    # No manifest: the run did not come to its end. Whatever has a summary is whole.
    assert "out/tiny/manifest.json" not in left
    assert Result.load(first).metrics["sink_rate"].n == 48
    for name in left:
        if name.endswith(".json"):
            json.loads((tmp_path / name).read_text())
        if name.endswith(".csv"):
            assert len(pd.read_csv(tmp_path / name))
    cache = Path(os.environ["P0CIRCUIT_CACHE"])
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


# GGUF files


def test_results_on_a_gguf_file_say_how_it_was_rounded(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "Q4_1")
    found = json.loads(p0("sink", path, "--json", *QUICK).out)
    assert (found["model"], found["quantisation"]) == ("tiny", "Q4_1")
    assert "tiny (Q4_1)" in p0("sink", path, *QUICK).out
    ended = p0("run", "sink-map", path, "--out", tmp_path / "out", *QUICK)
    folder = tmp_path / "out" / "tiny"
    assert ended.code == 0 and "tiny (Q4_1): sink-map" in ended.out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["model"], manifest["quantisation"]) == ("tiny", "Q4_1")
    assert Result.load(folder / "sink-map.json").provenance["model"]["quantisation"] == "Q4_1"
    drawn = (folder / "figures" / "sink-map-map.svg").read_text()
    assert "tiny (Q4_1): attention to position zero" in drawn


def test_two_files_of_one_name_do_not_overwrite_each_other(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    paths = [write_gguf(tiny_model_dir, tmp_path / kind / "tiny.gguf", kind) for kind in ("F16", "Q8_0")]
    ended = p0("reproduce", *paths, "--out", tmp_path / "out")
    assert ended.code == 2 and "two of these models are called 'tiny'" in ended.err


def test_a_refused_gguf_file_is_one_line(p0: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(10))
    refused = p0("sink", tmp_path / "model.gguf")
    assert refused.code == 2 and "not a complete GGUF file" in refused.err and "Traceback" not in refused.err


# models and training


def test_models_lists_what_is_shipped(p0: Run) -> None:
    shown = p0("models", "--json")
    assert shown.code == 0 and shown.err == ""
    known = json.loads(shown.out)
    found = [entry for entry in known if entry["status"] == "shipped"]
    assert [entry["name"] for entry in found] == sorted(
        path.parent.name for path in (data_dir() / "models").glob("*/config.json")
    )
    table = p0("models").out
    for entry in found:
        keys = ["name", "status", "parameters", "quantisation", "checkpoints", "licence", "description"]
        assert list(entry) == keys and entry["quantisation"] is None and entry["description"]
        folder = data_dir() / "models" / entry["name"]
        # Gates are parameters too, and `transformers` knows nothing of them.
        weights = load_file(folder / "model.safetensors")
        gates = sum(weight.numel() for name, weight in weights.items() if name.endswith("self_attn.gate.weight"))
        assert entry["parameters"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters() + gates
        assert entry["checkpoints"] == sorted(entry["checkpoints"])
        assert entry["name"] in table
    constructed = [entry for entry in known if entry["status"] == "constructed"]
    named = {entry["name"]: entry for entry in known if entry not in found + constructed}
    assert set(named) == {"smollm2-135m", "gemma3-270m"}
    assert {entry["status"] for entry in named.values()} == {"fetchable"}
    assert [entry["name"] for entry in constructed] == list(CONSTRUCTED_MODELS)
    assert all(entry["parameters"] == parameter_count(entry["name"]) for entry in constructed)
    assert all(name in table and str(entry["quantisation"]) in table for name, entry in named.items())
    assert all(entry["name"] in table for entry in constructed)


def test_only_named_models_are_fetched(p0: Run) -> None:
    refused = p0("fetch", "smollm2-135m", "p0-nano")
    assert refused.code == 2 and "no named model 'p0-nano'; there are: smollm2-135m, gemma3-270m" in refused.err


def test_a_trained_model_can_be_measured_and_its_trace_too(p0: Run, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    text = tmp_path / "text.txt"
    text.write_text("".join(path.read_text() for path in sorted(ENGLISH.iterdir())[:3]))
    out = tmp_path / "my-model"
    shape = {"d_model": 16, "n_heads": 2, "d_mlp": 24, "vocab_size": 280, "length": 16, "batch": 2, "checkpoints": 3}
    settings = [part for name, value in shape.items() for part in ("--set", f"{name}={value}")]
    train = ("train", out, "--corpus", text, "--steps", 6, "--layers", 2, *settings)
    assert p0(*train).code == 0
    weights = (out / "model.safetensors").read_bytes()
    again = p0(*train)
    assert again.code == 0 and (out / "model.safetensors").read_bytes() == weights
    other = p0(*train, "--seed", 1)
    assert other.code == 2 and "holds a run of another configuration" in other.err
    torch.set_num_threads(threads)

    found = json.loads(p0("sink", out, "--json", *QUICK).out)
    assert (found["model"], np.shape(found["sink_score"])) == ("my-model", (2, 2))
    # Of two layers there is none from layer 2 on.
    assert list(found) == KEYS and found["sink_rate_from_layer_2"] is None
    start = json.loads(p0("sink", out, "--checkpoint", 0, "--json", *QUICK).out)
    assert start["model"] == "my-model@0" and start["sink_score"] != found["sink_score"]
    results = tmp_path / "results"
    assert p0("run", "sink-map", out, "--checkpoint", 0, "--out", results, *QUICK).code == 0
    assert [path.name for path in results.iterdir()] == ["my-model@0"]
    missing = p0("sink", out, "--checkpoint", 5)
    assert missing.code == 2 and "no checkpoint '5'; it has those of steps 0, 6" in missing.err


# wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sink", "p0-nanoo"], "unknown model 'p0-nanoo'"),
        (["sink", "./nowhere"], "'./nowhere': expected a directory with config.json"),
        (["sink", "wirde"], "did you mean wired"),
        (["sink", "gpt2"], "unknown model 'gpt2'"),
        (["sink", "wired", "--checkpoint", "3"], "wired is constructed, not trained: it has no checkpoint '3'"),
        (["sink", "wired", "--dtype", "int8"], "unknown dtype 'int8'; expected one of float32"),
        (["sink", "wired", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (["sink", "wired", "--length", "100000"], "100000"),
        (["run", "sink-mab"], "no experiment 'sink-mab'; there are: sink-map (C1), norm-direction, bos-ablation (C2)"),
        (["run"], "name an experiment, as in `p0circuit run sink-map`; `p0circuit run --list` lists them all"),
        (
            ["run", "C1", "--set", "cntrol=3"],
            "there is no field 'cntrol'; did you mean 'control'? The fields are eps=0.3",
        ),
        (["run", "C1", "--set", "eps"], "'eps' is not of the form field=value, as in eps=0.3"),
        (["run", "C1", "--set", "control=0.5"], "control cannot be '0.5'; expected a whole number, such as 8"),
        (["run", "C8", "--set", "doses=[1, 2]"], "doses cannot be '[1, 2]'; expected a list of texts"),
        (["reproduce", "wired", "--samples", "0"], "--samples"),
        (["reproduce", "wired", "--length", "1"], "--length"),
        (["reproduce", "--backend", "jax"], "--backend"),
        (["reproduce", "wired", "--out", __file__], "--out"),
        (["sink", "TINY", "--text", "nothing-there.txt"], "no text at 'nothing-there.txt'"),
        (["sink", "TINY", "--text", "english", "--samples", "1000000"], "too little text in 'english'"),
        (["train", "OUT", "--set", "stride=3"], "there is no field 'stride'; the fields are"),
        (["train", "OUT", "--set", "d_model=wide"], "d_model cannot be 'wide'; expected a whole number, such as 128"),
        (["train", "OUT", "--corpus", "nothing-there"], "no text at 'nothing-there'"),
        (["cache", "--drop"], "No such option"),
        (["frobnicate"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_told_and_ends_with_2(
    p0: Run, tiny_model_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"TINY": str(tiny_model_dir), "OUT": str(tmp_path / "run")}
    ended = p0(*(places.get(argument, argument) for argument in arguments))
    assert ended.code == 2
    assert ended.out == ""
    assert message in " ".join(ended.err.split())
    assert "Traceback" not in ended.err


def test_a_place_that_cannot_be_written_to_ends_with_1(p0: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = p0("run", "sink-map", "wired", "--samples", 2, "--length", 12, "--out", tmp_path / "file" / "x")
    assert ended.code == 1 and ended.err.splitlines()[-1].startswith("error: [Errno")


def test_verbose_shows_the_traceback_of_an_error(p0: Run) -> None:
    ended = p0("--verbose", "run", "sink-mab")
    assert ended.code == 2 and "error: no experiment" in ended.err and "Traceback" in ended.err


def test_a_bug_shows_its_traceback(p0: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a shape does not fit")

    monkeypatch.setattr("p0circuit.experiments.sink_summary.sink_summary", broken)
    monkeypatch.setattr(sys, "argv", ["p0circuit", "sink", "wired", "--samples", "2", "--length", "12"])
    with pytest.raises(ValueError, match="a shape does not fit"):
        main()


# device maps


def test_a_model_spread_by_a_device_map(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The numbers are those of the model in one place; what it needs stands on standard error."""
    given = ("sink", tiny_model_dir, *QUICK, "--backend", "bridge", "--device", "cpu", "--json")
    whole = p0(*given)
    spread = p0(*given, "--device-map", "disk", "--offload-folder", tmp_path)
    assert spread.code == whole.code == 0 and json.loads(spread.out) == json.loads(whole.out)
    assert (
        "tiny: 0.2 MB of weights in float32, 0.1 MB of them offloaded to disk. Needs 0.4 MB in CPU memory" in spread.err
    )
    assert "to load it and a pass of 1 s over 4 prompts of 12 tokens." in spread.err
    assert "of weights" not in whole.err
    places = tmp_path / "places.json"
    places.write_text(json.dumps({"model": "disk", "lm_head": "cpu"}))
    other = p0(*given, "--device-map", places, "--dtype", "bfloat16")
    assert other.code == 0 and "offloaded to disk" in other.err and "in bfloat16" in other.err
    for wrong in ("nowhere", '{"model": "disk"}', '{"lm_head": "tape"}'):
        refused = p0(*given, "--device-map", wrong)
        assert refused.code == 2 and refused.err.startswith("error: device map") and not refused.out


def test_a_trace_of_checkpoints_spread_by_a_device_map(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 3, 9):
        shutil.copytree(tiny_model_dir, run / f"checkpoint-{step}")
    (run / "checkpoint-1" / "config.json").unlink()
    given = ("trace", run, *QUICK, "--backend", "bridge", "--device", "cpu", "--json", "--out", tmp_path / "out")
    spread = p0(*given, "--device-map", "disk", "--offload-folder", tmp_path / "offload")
    assert spread.code == 0 and "3 passes of 1 s over 4 prompts of 12 tokens, for each of 3 checkpoints." in spread.err
    # The same weights, prompts and code: what was measured with a device map is read without one.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert json.loads(p0(*given).out) == json.loads(spread.out)
    assert len(written) == 2 and written == {path: path.stat().st_mtime_ns for path in written}


def test_an_experiment_on_a_model_spread_by_a_device_map(p0: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    given = ("run", "norm-direction", tiny_model_dir, *QUICK, "--backend", "bridge", "--device", "cpu")
    whole = p0(*given, "--out", tmp_path / "whole", "--json")
    spread = p0(*given, "--out", tmp_path / "spread", "--json", "--device-map", "cpu")
    assert spread.code == 0 and json.loads(spread.out) == json.loads(whole.out)
    assert "for each pass over 4 prompts of 12 tokens." in spread.err
