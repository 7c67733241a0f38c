"""The shipped model has the sink its card states, and the numbers are those of a plain `transformers` forward pass."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from p0circuit.cli import app
from p0circuit.io import data_dir
from p0circuit.models import list_checkpoints, load_model
from p0circuit.prompts import natural_text
from p0circuit.recording.quantities import SINK_SCORE, residual_at
from p0circuit.recording.record import record
from p0circuit.sink import direction_cosines

FOLDER = data_dir() / "models" / "p0-nano"


def sink_json(*arguments: str) -> dict:
    outcome = CliRunner().invoke(app, ["sink", "p0-nano", "--json", *arguments])
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def summary() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return sink_json("--first", "random")


def test_it_reaches_its_target_on_held_out_code_without_bos(summary):
    """The target was set before the model was trained: T 64, the first token drawn at random."""
    scores = sorted((score for layer in summary["sink_score"] for score in layer), reverse=True)
    assert scores[0] >= 0.45
    assert scores[1] >= 0.30
    assert summary["sink_rate_from_layer_2"] >= 0.10
    assert summary["norm_ratio"][2] >= 2
    assert min(summary["direction_consistency"][2:]) >= 0.9


def test_p0_is_more_consistent_than_other_positions():
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=128, length=64, first_token="random")
    at = {offset: residual_at(offset) for offset in (0, 8, 16, 32)}
    recording = record(model, prompts, list(at.values()))
    consistency = {offset: direction_cosines(recording[quantity]).mean(0) for offset, quantity in at.items()}
    for offset in (8, 16, 32):
        assert float((consistency[0] - consistency[offset])[2:].min()) >= 0.2


def test_the_numbers_are_those_of_a_plain_eager_forward(summary):
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    model = load_model("p0-nano")
    ids = natural_text(model, "stdlib", n=128, length=64, first_token="random").ids
    streams: list[torch.Tensor] = []
    for block in plain.model.layers:
        block.register_forward_hook(lambda block, args, output: streams.append(output))
    with torch.no_grad():
        output = plain(ids, output_attentions=True)
    scores = torch.stack([pattern[:, :, :, 0].mean(-1) for pattern in output.attentions], dim=1)
    assert torch.allclose(scores.mean(0), torch.tensor(summary["sink_score"]), atol=1e-4)
    rate = (scores[:, 2:] > 0.3).float().mean()
    assert float(rate) == pytest.approx(summary["sink_rate_from_layer_2"], abs=1e-4)
    embedded = plain.model.embed_tokens(ids).detach()
    for place, stream in enumerate([embedded, *streams]):
        norms = stream.norm(dim=-1)
        others = norms[:, 1:].sort(dim=1).values[:, 31]  # 63 other positions: the middle one is the median
        ratio = float((norms[:, 0] / others).mean())
        assert ratio == pytest.approx(summary["norm_ratio"][place], rel=1e-4)
        units = stream[:, 0] / stream[:, 0].norm(dim=-1, keepdim=True)
        consistency = float(units.mean(0).norm())
        assert consistency == pytest.approx(summary["direction_consistency"][place], abs=1e-4)


def test_untrained_it_has_no_sink():
    assert list_checkpoints("p0-nano")[0] == 0
    assert sink_json("--checkpoint", "0")["sink_rate"] == 0


def test_the_trace_is_about_16_log_spaced_checkpoints_of_at_most_4_mb():
    steps = list_checkpoints("p0-nano")
    assert len(steps) == 16
    assert (steps[0], steps[-1]) == (0, 20_000)
    ratios = [later / earlier for earlier, later in itertools.pairwise(steps[1:])]
    assert max(ratios) / min(ratios) < 1.1
    for checkpoint in (FOLDER / "trace").iterdir():
        assert sum(file.stat().st_size for file in checkpoint.iterdir()) <= 4e6


@torch.no_grad()
def test_the_last_checkpoint_is_the_model():
    model, last = load_model("p0-nano"), load_model("p0-nano", checkpoint=20_000)
    prompts = natural_text(model, "code", n=4, length=32)
    assert torch.equal(record(model, prompts, SINK_SCORE), record(last, prompts, SINK_SCORE))
