"""Recognition: the cone model by hand and on values that keep to it, every part against loops, the wired model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from p0circuit.experiments import NotApplicable
from p0circuit.experiments.paper.c04_recognition import (
    Cone,
    Recognition,
    cone,
    mixed_values,
    norm_and_variance,
    value_summary,
    values_at_positions,
    variance_explained,
)
from p0circuit.models import load_model
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.weights import RECOGNITION_HEADS, purity
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording.quantities import Batch
from p0circuit.results import Result
from tests.literal import norm, run_with_cache

LENGTH = 24


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return random_tokens(64, n=24, length=LENGTH)


@pytest.fixture(scope="module")
def result(prompts: PromptSet) -> Result:
    return Recognition().run(wired_model(), prompts)


def whole(ids: torch.Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long))


def test_the_cone_by_hand() -> None:
    # One value unmixed, values all alike, two of half the weight at right angles, and the same in a cone.
    cosines, purities = np.array([0.3, 1.0, 0.0, 0.25]), np.array([[1.0, 0.1, 0.5, 0.5]])
    np.testing.assert_allclose(cone(cosines, purities), [[1, 1, 0.5, 0.625]])


def test_the_variance_explained_is_not_refitted() -> None:
    measured = np.array([4.0, 2.0, 1.0, 1.0])
    assert variance_explained(measured, measured) == 1
    assert variance_explained(measured, np.full(4, 2.0)) == 0
    # A prediction of the right shape and the wrong size is wrong.
    assert variance_explained(measured, 2 * measured) == pytest.approx(1 - 22 / 6)


@pytest.mark.parametrize("equal_norms", [True, False])
def test_values_that_keep_to_the_cone_are_predicted(equal_norms: bool) -> None:
    samples, length, size, a = 400, 12, 256, 0.4
    around = torch.randn(samples, length, 1, size)
    around[..., 0] = 0
    values = (1 - a**2) ** 0.5 * torch.nn.functional.normalize(around, dim=-1)
    values[..., 0] = a
    values = 3 * values
    if not equal_norms:
        values[:, 0] /= 5
    pattern = torch.rand(samples, 1, length, length).pow(3).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    batch = whole(torch.zeros(samples, length, dtype=torch.long))
    parts = mixed_values(values, pattern, z, batch).double().numpy()
    summary = value_summary(values, batch).double().numpy()
    of = Cone(*(parts[..., part] for part in range(5)), size=summary[..., 0], direction=summary[..., 1:])
    mean = of.mean()
    assert mean.cosine_squared[0] == pytest.approx(a**2, abs=1e-2)
    fits = {name: variance_explained(mean.squared[:, 0], said[:, 0]) for name, said in mean.predictions().items()}
    assert fits["measured_norms"] > 0.99
    assert (fits["cone"] > 0.99) == equal_norms
    # P0's value alone is short: nothing but its norm is wrong with the prediction.
    assert equal_norms or fits["cone"] < 0.5


@pytest.mark.parametrize("case", [("qwen2", "hooked"), ("neox", "bridge"), ("gemma2", "bridge")])
def test_every_part_against_plain_loops(family_model: Callable[[str, str], Any], case: tuple[str, str]) -> None:
    model = family_model(*case)
    ids = random_tokens(96, n=1, length=7).ids
    _, cache = run_with_cache(model, ids[0])
    values, pattern, z, out = (
        cache[f"blocks.1.{name}"].double()
        for name in ("attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_attn_out")
    )
    parts = mixed_values(values, pattern, z, whole(ids))[0]
    for head in range(pattern.shape[1]):
        own = values[0, :, head * values.shape[2] // pattern.shape[1]]
        for query in range(7):
            p = pattern[0, head, query].tolist()
            expected = [
                norm(z[0, query, head]) ** 2,
                sum(x**2 for x in p),
                sum(x * norm(v) for x, v in zip(p, own, strict=True)) ** 2,
                sum(x**2 * norm(v) ** 2 for x, v in zip(p, own, strict=True)),
                norm(sum((x * v / norm(v) for x, v in zip(p, own, strict=True)), torch.zeros_like(own[0]))) ** 2,
            ]
            assert parts[query, head].tolist() == pytest.approx(expected, rel=1e-4)
            # What the cone model is about: heads put out the mix of their values.
            mixed = sum((x * v for x, v in zip(p, own, strict=True)), torch.zeros_like(own[0]))
            assert expected[0] == pytest.approx(norm(mixed) ** 2, rel=1e-4)
    summary = value_summary(values, whole(ids))[0]
    for head, own in enumerate(values[0].transpose(0, 1)):
        assert float(summary[head, 0]) == pytest.approx(sum(norm(v) ** 2 for v in own) / 7, rel=1e-5)
        mean = torch.stack([v / norm(v) for v in own]).mean(0)
        torch.testing.assert_close(summary[head, 1:].double(), mean, rtol=1e-4, atol=1e-6)
    both = norm_and_variance(out, whole(ids))[0]
    for vector, (squared, variance) in zip(out[0], both.tolist(), strict=True):
        assert squared == pytest.approx(norm(vector) ** 2, rel=1e-5)
        assert variance == pytest.approx(np.var(vector.numpy()), rel=1e-5)
    torch.testing.assert_close(values_at_positions(values, whole(ids), [0, 5])[:, 1], values[:, 5].float())


def test_recognition_heads_put_out_the_purity(prompts: PromptSet) -> None:
    outputs, of, _ = Recognition()._record(wired_model(), prompts, 0)
    # Codes have length 1 in a stream of squared norm 2, of which each head reads one half.
    heads = of.squared[..., list(RECOGNITION_HEADS)].sum(-1)
    np.testing.assert_allclose(heads, purity(prompts.ids) / 2, rtol=1e-4)
    # Written into the stream that is an echo of squared length 9; decoys add less than (3/8)^2 elsewhere.
    np.testing.assert_allclose(outputs[..., 0], 9 * purity(prompts.ids), atol=0.15)


def test_block_0_of_the_wired_model_recognises_and_block_1_does_not(result: Result, prompts: PromptSet) -> None:
    metrics = result.metrics
    second = prompts.split()[1]
    profile = purity(second.ids)
    # Decoys write a little at P0 too, and less where they average.
    expected = float(profile[:, 0].mean() / profile[:, 8:].mean())
    assert metrics["squared_norm_over_others_block_0"].value == pytest.approx(expected, rel=0.05)
    assert metrics["variance_explained_by_the_cone_block_0"].value > 0.98
    assert metrics["random_position_over_others_block_0"].value == pytest.approx(1, abs=0.3)
    # P0 is recognised already: its values in block 1 are drained, and its output there is the shorter.
    assert metrics["squared_norm_over_others_block_1"].value < 1
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    assert "block_1" in result.judgement.reason and "block_0" not in result.judgement.reason.split("needed")[1]


def test_the_tables(result: Result) -> None:
    profiles, isotropy = result.tables["profiles"], result.tables["isotropy"]
    assert len(profiles) == 2 * LENGTH and len(isotropy) == 2 * 5
    first = profiles[profiles["block"] == 0].set_index("position")
    # One vector of each row is its own mix; the model is centred, so variance is the squared norm over the channels.
    assert first.loc[0, "cone"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(first["variance"] * 160, first["squared_norm"], rtol=1e-3)
    assert (isotropy["share_of_dimensions"] <= 1.001).all()
    wide = isotropy[(isotropy["block"] == 0) & isotropy["head"].isin(RECOGNITION_HEADS)]
    assert (wide["norm_spread"] < 1e-5).all() and (wide["share_of_dimensions"] > 0.7).all()


def test_intervals_hold_their_values(result: Result) -> None:
    for block in (0, 1):
        interval = result.metrics[f"squared_norm_over_others_block_{block}"]
        assert interval.low <= interval.value <= interval.high and interval.n == 12


def test_padded_rows_have_no_profile(prompts: PromptSet) -> None:
    with pytest.raises(NotApplicable, match="padded"):
        Recognition().run(wired_model(), prompts.pad_left())


@pytest.mark.parametrize(("name", "checkpoint"), [("wired-decoy", None), ("p0-nano", 0)])
def test_without_a_sink_there_is_nothing_to_recognise(name: str, checkpoint: int | None) -> None:
    with pytest.raises(NotApplicable, match="no sink to explain"):
        Recognition().run(load_model(name, checkpoint=checkpoint), random_tokens(64, n=8, length=LENGTH))


def test_the_figure_draws_the_table(result: Result) -> None:
    figure: Any = result.figures["profiles"]
    assert [axis.get_title() for axis in figure.axes] == ["Block 0", "Block 1"]
    first = result.tables["profiles"].query("block == 0")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), first["heads"])
