"""The trace of a run: formulas on made-up curves, the wired circuit, resuming, and damaged checkpoints."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from p0circuit.activations import RESIDUAL_NORMS, SINK_SCORE, record
from p0circuit.models import ModelError, describe, forward, load_model
from p0circuit.paths import data_dir
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.training import trace as module
from p0circuit.training.development import change_points, formation_index
from p0circuit.training.trace import (
    INDUCTION,
    Trace,
    causal_concentration,
    checkpoints_of,
    measure_checkpoint,
    observed_concentration,
    trace,
)

STEPS = (0, 4339, 20000)


def prompts_for(model):
    return natural_text(model.tokenizer, "english", n=8, length=24)


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
    assert formation_index(np.array(curve), least=0.05) == expected


def test_change_points_are_found_where_they_were_made():
    rng = np.random.default_rng(0)
    means = np.repeat([[0.0, 1.0], [2.0, 1.0], [2.0, 5.0]], [6, 5, 7], axis=0)
    assert change_points(means + 0.05 * rng.standard_normal(means.shape)) == [6, 11]
    assert change_points(rng.standard_normal((16, 3))) == []
    assert change_points(np.zeros((3, 2))) == []
    assert change_points(np.zeros((1, 2))) == [], "a single checkpoint is one stage"


def test_the_observed_share_of_the_norm_gain():
    norms = torch.tensor([[1.0, 2.0, 8.0, 16.0, 4.0]]).expand(3, 5).double()
    assert observed_concentration(norms) == pytest.approx(math.log(8) / math.log(16))
    assert observed_concentration(torch.tensor([[1.0, 2.0, 8.0, 5.0]]).double()) == 1.0
    assert observed_concentration(torch.ones(2, 4).double()) is None


def test_the_wired_circuit_is_concentrated_in_its_first_blocks():
    model = load_model("wired")
    prompts = random_tokens(describe(model).vocab_size, n=16, length=24)
    scores = record(model, prompts, SINK_SCORE, cache=None)[SINK_SCORE]
    assert causal_concentration(model, prompts, scores) == pytest.approx(1.0)
    assert causal_concentration(model, prompts, torch.zeros_like(scores)) is None
    row = measure_checkpoint(model, prompts)
    assert row["concentration_causal"] == pytest.approx(1.0)
    norms = record(model, prompts, RESIDUAL_NORMS, cache=None)[RESIDUAL_NORMS][:, :, 0].double()
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
    found = record(model, prompts, INDUCTION, cache=None)[INDUCTION][:, 1, :4]
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
    scores = record(model, prompts_for(model), SINK_SCORE)[SINK_SCORE]
    assert nano.rows[-1]["sink_rate_from_layer_2"] == pytest.approx(float((scores[:, 2:] > 0.3).double().mean()))
    found = nano.to_json()
    assert set(found) == {"model", "checkpoints", "formation_step", "stages", "missing"}
    assert {"step", "tokens", "loss", "sink_rate", "sink_rate_from_layer_2", "norm_ratio"} <= set(
        found["checkpoints"][0]
    )
    assert list(nano.to_dataframe()["excess"]) == list(nano.excess)


def test_what_was_measured_before_is_read(tmp_path, monkeypatch):
    source = data_dir() / "models" / "p0-nano"
    first = trace(source, prompts_for, STEPS[:2], tmp_path)
    monkeypatch.setattr(module, "measure_checkpoint", lambda model, prompts: pytest.fail("measured again"))
    again = trace(source, prompts_for, STEPS[:2], tmp_path)
    assert again.rows == first.rows
    monkeypatch.undo()
    kept = next(tmp_path.glob("*-0.json"))
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"key": "of other code"}))
    assert trace(source, prompts_for, STEPS[:1], tmp_path).rows == first.rows[:1]


def test_a_damaged_checkpoint_is_named_and_left_out(tmp_path):
    source = tmp_path / "run"
    shutil.copytree(
        data_dir() / "models" / "p0-nano", source, ignore=lambda folder, names: [n for n in names if n == "trace"]
    )
    for step in (0, 16):
        shutil.copytree(data_dir() / "models" / "p0-nano" / "trace" / f"step-{step:06d}", source / f"checkpoint-{step}")
    (source / "checkpoint-16" / "model.safetensors").write_bytes(b"cut off")
    (source / "checkpoint-27").mkdir()
    assert checkpoints_of(source) == [0, 16, 27]
    found = trace(source, prompts_for, checkpoints_of(source))
    assert [row["step"] for row in found.rows] == [0] and list(found.missing) == ["16", "27"]
    with pytest.raises(ModelError, match="none of the checkpoints"):
        trace(source, prompts_for, [27])
    with pytest.raises(ModelError, match="keeps no checkpoints"):
        checkpoints_of(data_dir() / "prompts")


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
