"""The trace of a run: formulas on made-up curves, the wired circuit, resuming, and damaged checkpoints."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from p0circuit.io import data_dir
from p0circuit.models import ModelError, describe, forward, load_model, metadata, stored_model
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.recording.quantities import RESIDUAL_NORMS, SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.training.checkpoint_measurement import INDUCTION, causal_concentration, measure_checkpoint
from p0circuit.training.checkpoints import checkpoints_of, tokens_seen
from p0circuit.training.formation import change_points, formation_index, lost_share, observed_concentration, stages
from p0circuit.training.runs import shipped_runs_by_first
from p0circuit.training.trace import Trace, trace

STEPS = (0, 4339, 20000)


def prompts_for(model):
    return natural_text(model, "english", n=8, length=24)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.0, 0.1, 0.3, 0.5, 0.6], 3),
        ([0.0, 0.4, 0.2, 0.5, 0.6], 3),  # it fell back to half and below: not formed yet
        ([0.5, 0.5, 0.6], 0),
        ([0.0, 0.3, 0.6], 2),  # half is not above half
        ([0.0, 0.01, 0.02], None),
        ([], None),
    ],
)
def test_formation_is_where_it_stays_above_half_its_final_value(curve, expected):
    assert formation_index(np.array(curve), threshold=0.05) == expected


def test_change_points_are_found_where_they_were_made():
    rng = np.random.default_rng(0)
    means = np.repeat([[0.0, 1.0], [2.0, 1.0], [2.0, 5.0]], [6, 5, 7], axis=0)
    assert change_points(means + 0.05 * rng.standard_normal(means.shape)) == [6, 11]
    assert change_points(rng.standard_normal((16, 3))) == []
    assert change_points(np.zeros((3, 2))) == []
    assert change_points(np.zeros((1, 2))) == [], "a single checkpoint is one stage"


def test_the_observed_share_of_the_norm_gain():
    norms = torch.tensor([[1.0, 2.0, 8.0, 16.0, 4.0]]).expand(3, 5)
    assert observed_concentration(norms) == pytest.approx(math.log(8) / math.log(16))
    assert observed_concentration(torch.tensor([[1.0, 2.0, 8.0, 5.0]])) == 1.0
    assert observed_concentration(torch.tensor([[1.0, 1.0, 0.5, 1.09]])) is None
    assert observed_concentration(torch.tensor([[1.0, 1.0, 0.5, 1.11]])) < 0


def test_the_share_of_a_sink_that_is_lost():
    assert lost_share(0.4, lambda: 0.1) == pytest.approx(0.75)
    assert lost_share(1e-3, lambda: 3e-3) == pytest.approx(-2)
    assert lost_share(9e-4, lambda: pytest.fail("measured for nothing")) is None


def test_stages_tell_means_of_what_is_defined():
    rate = np.repeat([0.0, 5.0, 9.0], 4)
    share = np.array([np.nan] * 4 + [np.nan, 0.5, 0.7, np.nan] + [1.0] * 4)
    found = stages(np.arange(12), {"rate": rate, "share": share})
    assert [(stage["from_step"], stage["to_step"]) for stage in found] == [(0, 3), (4, 7), (8, 11)]
    assert [stage["share"] for stage in found] == [None, pytest.approx(0.6), 1.0]
    assert [stage["rate"] for stage in found] == [0.0, 5.0, 9.0]


def test_the_wired_circuit_is_concentrated_in_its_first_blocks():
    model = load_model("wired")
    prompts = random_tokens(describe(model).vocab_size, n=16, length=24)
    scores = record(model, prompts, SINK_SCORE, cache=None)
    assert causal_concentration(model, prompts, scores) == pytest.approx(1.0)
    assert causal_concentration(model, prompts, torch.zeros_like(scores)) is None
    row = measure_checkpoint(model, prompts)
    assert row["concentration_causal"] == pytest.approx(1.0)
    norms = record(model, prompts, RESIDUAL_NORMS, cache=None)[:, :, 0].double()
    assert row["concentration_observed"] == pytest.approx(observed_concentration(norms))


def test_induction_is_attention_to_what_followed_before():
    model = load_model("wired")
    ids = random_tokens(describe(model).vocab_size, n=2, length=5).ids.repeat(1, 2)
    prompts = random_tokens(describe(model).vocab_size, n=2, length=10)
    prompts = type(prompts)(ids, prompts.attention_mask, {})
    seen: list[torch.Tensor] = []
    keep = "blocks.1.attn.hook_pattern", lambda pattern, hook: seen.append(pattern.detach())
    forward(model, ids, hooks=[keep])
    expected = [[sum(float(seen[0][r, h, q, q - 4]) for q in range(5, 10)) / 5 for h in range(4)] for r in range(2)]
    found = record(model, prompts, INDUCTION, cache=None)[:, 1, :4]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def nano():
    source = data_dir() / "models" / "p0-nano"
    return trace(source, prompts_for, STEPS)


def test_rows_tell_step_tokens_and_what_was_measured(nano):
    assert [row["step"] for row in nano.rows] == list(STEPS)
    assert [row["tokens"] for row in nano.rows] == [step * 16 * 128 for step in STEPS]
    assert nano.rows[0]["sink_rate_from_layer_2"] == 0 and nano.rows[0]["concentration_causal"] is None
    assert nano.rows[-1]["loss"] < nano.rows[1]["loss"] < nano.rows[0]["loss"]
    model = load_model("p0-nano")
    scores = record(model, prompts_for(model), SINK_SCORE)
    assert nano.rows[-1]["sink_rate_from_layer_2"] == pytest.approx(float((scores[:, 2:] > 0.3).double().mean()))
    found = nano.to_json()
    assert set(found) == {"model", "checkpoints", "formation_step", "stages", "missing"}
    assert [row["excess"] for row in found["checkpoints"]] == list(nano.excess)
    assert {"step", "tokens", "loss", "sink_rate", "sink_rate_from_layer_2", "norm_ratio"} <= set(
        found["checkpoints"][0]
    )
    assert list(nano.to_dataframe()["excess"]) == list(nano.excess)


@pytest.fixture
def run(tmp_path):
    """A run in the Trainer's layout: p0-nano with three of its checkpoints."""
    nano, source = data_dir() / "models" / "p0-nano", tmp_path / "run"
    shutil.copytree(nano, source, ignore=shutil.ignore_patterns("trace", "trace.csv"))
    for step in STEPS:
        shutil.copytree(nano / "trace" / f"step-{step:06d}", source / f"checkpoint-{step}")
    return source


def test_what_was_measured_before_is_read_without_loading_it(run, tmp_path):
    loaded: list[int] = []

    def load(step):
        loaded.append(step)
        return load_model(run, checkpoint=step)

    def again(checkpoints, settings="float32"):
        loaded.clear()
        return trace(run, prompts_for, checkpoints, tmp_path / "out", load, settings).rows, loaded

    first, loads = again(STEPS)
    assert loads == list(STEPS)
    assert again(["checkpoint-20000", 4339, "0"]) == (first, [])
    # Other weights of the same size, another dtype, and a file that holds no row.
    (run / "checkpoint-0" / "model.safetensors").write_bytes(
        (run / "checkpoint-4339" / "model.safetensors").read_bytes()
    )
    changed, loads = again(STEPS)
    assert loads == [0] and changed[0] == first[1] | {"step": 0} and changed[1:] == first[1:]
    assert again([4339], "bfloat16")[1] == [4339]
    (tmp_path / "out" / "run@checkpoint-20000.json").write_text("[1, 2")
    assert again([20000]) == (first[2:], [20000])


def test_checkpoints_come_in_order_of_their_steps(nano):
    found = trace("p0-nano", prompts_for, ["20000", "step-004339", "step0"])
    assert found.rows == nano.rows and found.formation_step == nano.formation_step
    for wrong in (["0", "best"], ["-1"]):
        with pytest.raises(ValueError, match=f"checkpoint '{wrong[-1]}' has no step in its name"):
            trace("p0-nano", prompts_for, wrong)
    with pytest.raises(ValueError, match=r"stages \[1, 2\] count their steps anew"):
        trace("p0-nano", prompts_for, ["stage1-step5-tokens1B", "stage2-step7-tokens1B"])


def test_revisions_of_the_hub(tmp_path, monkeypatch):
    """In the layout of the hub's cache, with nothing to ask but the disk."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--nano"
    revisions = {"main": 20000, "step4339-tokens9M": 4339, "step0-tokens0M": 0, "step20000-tokens41M": 20000}
    for number, (revision, step) in enumerate(revisions.items()):
        commit = f"{number}" * 40
        shutil.copytree(
            data_dir() / "models" / "p0-nano" / "trace" / f"step-{step:06d}", repository / "snapshots" / commit
        )
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    tokens = random_tokens(1024, n=4, length=16)
    found = trace("someone/nano", lambda stored: tokens, checkpoints_of("someone/nano"), tmp_path / "out")
    assert [(row["step"], row["tokens"]) for row in found.rows] == [(0, 0), (4339, 9_000_000), (20000, 41_000_000)]
    assert found.model == "someone/nano" and not found.missing
    # A commit names what is in it: no weights are read.
    again = trace("someone/nano", lambda stored: tokens, ["step4339-tokens9M", "0"], tmp_path / "out", pytest.fail)
    assert again.rows == found.rows[:2]


def test_where_the_tokens_are_told(run):
    def seen(state=None):
        if state is not None:
            (run / "checkpoint-4339" / "trainer_state.json").write_text(state)
        return tokens_seen(stored_model(run, 4339), 4339)

    assert seen() is None
    assert [seen(state) for state in ('{"num_input_tokens_seen": 0}', "{}", "[", "null")] == [None] * 4
    (run / "trace.csv").write_text("step,tokens\n4339,700\n")
    assert seen() == 700 and seen('{"num_input_tokens_seen": 512}') == 512
    (run / "checkpoint-4339").rename(run / "step4339-tokens4B")
    assert seen() == 4_000_000_000


def test_a_damaged_checkpoint_is_named_left_out_and_a_gap(run, tmp_path):
    for step in (3, 7000, 7001, 7002, 7003, 7004):
        shutil.copytree(run / "checkpoint-4339", run / f"checkpoint-{step}")
    (run / "checkpoint-7000" / "model.safetensors").write_bytes(b"cut off")
    for step, content in ((7001, '{"weight_map": {'), (7002, '{"metadata": {}}')):
        (run / f"checkpoint-{step}" / "model.safetensors.index.json").write_text(content)
    for step in (27, 7005):
        (run / f"checkpoint-{step}").mkdir()
    steps = [0, 3, 27, 4339, 7000, 7001, 7002, 7003, 7004, 7005, 20000]
    assert checkpoints_of(run) == steps
    # It loads, and what it computes from most tokens is infinite.
    weights = load_file(run / "checkpoint-7003" / "model.safetensors")
    weights = {name: weight.float() for name, weight in weights.items()}
    weights["model.embed_tokens.weight"][100:] = 1e25
    save_file(weights, run / "checkpoint-7003" / "model.safetensors", metadata={"format": "pt"})
    (run / "checkpoint-3" / "model.safetensors").unlink()
    config = json.loads((run / "checkpoint-7004" / "config.json").read_text())
    (run / "checkpoint-7004" / "config.json").write_text(json.dumps(config | {"vocab_size": "many"}))

    found = trace(run, prompts_for, checkpoints_of(run))
    assert [row["step"] for row in found.rows] == [*STEPS]
    gaps = [step for step in steps if step not in STEPS]
    assert list(map(int, found.missing)) == gaps
    for step in ("7001", "7002"):
        assert "a weight file in" in found.missing[step] and "no JSON with a weight_map" in found.missing[step]
    assert "not finite" in found.missing["7003"] and "config.json cannot be used" in found.missing["7004"]
    figure = found.figure()
    loss = dict(zip(*figure.axes[0].lines[0].get_data(), strict=True))
    assert [step for step, value in loss.items() if math.isnan(value)] == gaps
    assert all(list(axis.lines[1].get_xdata()) == gaps for axis in figure.axes)
    with pytest.raises(ModelError, match="none of the checkpoints"):
        trace(run, prompts_for, [27])
    with pytest.raises(ModelError, match="keeps no checkpoints"):
        checkpoints_of(data_dir() / "prompts")


def test_a_checkpoint_that_goes_while_it_is_read_is_a_gap(run, monkeypatch):
    whole = metadata._file_digest

    def vanishing(path):
        if path.parent.name == "checkpoint-4339" and path.suffix == ".safetensors":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return whole(path)

    monkeypatch.setattr(metadata, "_file_digest", vanishing)
    found = trace(run, prompts_for, STEPS)
    assert [row["step"] for row in found.rows] == [0, 20000] and "was deleted or cannot be read" in found.missing[
        "4339"
    ]


def test_all_checkpoints_are_measured_on_the_same_prompts(run):
    """A tokenizer beside the last checkpoint alone: what it reads is not what the others did."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(run / name, run / "checkpoint-20000" / name)

    def prompts(stored):
        return random_tokens(1024, n=4, length=16) if stored.tokenizer is None else prompts_for(stored)

    found = trace(run, prompts, STEPS)
    assert [row["step"] for row in found.rows] == [0, 4339]
    assert "another tokenizer, or none" in found.missing["20000"]


def test_the_place_of_a_run_is_that_of_a_model(run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setenv("HOME", str(run.parent))
    assert checkpoints_of(".") == checkpoints_of("~/run") == checkpoints_of(run) == [*STEPS]


def test_a_shipped_table_is_a_trace_too():
    for first, run in shipped_runs_by_first("tnlm-0").items():
        found = Trace.of(run)
        assert first in ("text", "bos") and found.model == "tnlm-0"
        assert found.formation == run.formation and list(found.excess) == list(run["excess"])
        told = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert told["checkpoints"][0]["step"] == 0 and told["checkpoints"][0]["concentration_causal"] is None
        assert told["stages"] and found.figure().axes
    assert shipped_runs_by_first("tnlm-99") == {}


def test_formation_and_stages_of_a_made_up_run():
    def row(step, score):
        return {
            "step": step,
            "scores_first_half": [[0.0, 0.1], [score, 0.2]],
            "excess_second_half": [[0.0, 0.0], [score, 0.1]],
            "sink_rate_from_layer_2": score,
            "norm_ratio": 1 + score,
            "concentration_observed": None,
        }

    run = Trace("made-up", [row(step, 0.0 if step < 5 else 0.8) for step in range(10)])
    assert run.heads == [(1, 0)] and run.formation_step == 5
    assert [(stage["from_step"], stage["to_step"]) for stage in run.stages] == [(0, 4), (5, 9)]
    assert Trace("flat", [row(step, 0.05) for step in range(4)]).formation_step is None
