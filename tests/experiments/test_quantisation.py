"""Int8 with P0 in, clipped and kept, against transformers' own modules with torch's own rounding, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.deployment.c18_quantisation import Quantisation, QuantisationConfig
from p0circuit.experiments.deployment.int8_effects import (
    ANOTHER_KEPT,
    CALIBRATED,
    CALIBRATED_P0_KEPT,
    P0_CLIPPED,
    P0_IN,
    P0_KEPT,
    PER_TOKEN,
    SCHEMES,
    STREAM,
    TOKEN_P0_CLIPPED,
    WEIGHTS,
    Calibration,
    Int8Effects,
    calibrated,
    int8_effects,
    over_draws,
)
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.experiments.surgery import random_offsets
from p0circuit.interventions.int8 import Site
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model
from p0circuit.prompts import from_ids, natural_text, random_tokens
from tests.families import LAYERS, VOCAB
from tests.literal import loss
from tests.report.test_figures import assert_legible

N, T = 3, 11
PROMPTS = random_tokens(VOCAB, N, T, seed=5)
PLACES = [int(place) for place in random_offsets(N, 6, 1, T)]
OTHERS = [[t for t in range(1, T) if t != place] for place in PLACES]
CALIBRATING = random_tokens(VOCAB, 6, T, seed=8)
Ends = dict[str, tuple[float, float]]
"""By the name of the matrix that reads the input: where a calibrated grid ends with P0 in, and with P0 left out."""
Change = Callable[[str, Tensor], Tensor]


def grid(x: Tensor, largest: float) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, max(largest, 1e-30) / 127, 0, -127, 127)


def largest(x: Tensor, gone: int | None = None) -> float:
    return float(x[[t for t in range(len(x)) if t != gone]].abs().max())


def rounding(scheme: str, row: int, x: Tensor, ends: tuple[float, float]) -> Tensor:
    """What a scheme does to an input [pos, ...] of a row."""
    place = PLACES[row] if scheme == ANOTHER_KEPT else 0
    if scheme.startswith(PER_TOKEN):
        new = torch.stack([grid(token, float(token.abs().max())) for token in x])
        if scheme == TOKEN_P0_CLIPPED:
            new[0] = grid(x[0], min(float(x[0].abs().max()), largest(x, 0)))
    elif scheme.startswith(CALIBRATED):
        new = grid(x, ends[scheme == CALIBRATED_P0_KEPT])
    else:
        new = grid(x, largest(x, place if scheme in (P0_KEPT, P0_CLIPPED, ANOTHER_KEPT) else None))
    if "kept" in scheme:
        new[place] = x[place]
    return new


def size(x: Tensor) -> float:
    return float(x.double().square().sum().sqrt())


@pytest.fixture(scope="module")
def hf(family_folder: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(family_folder("llama-grouped")).eval()


@pytest.fixture(scope="module")
def calibration(family_model: Any) -> Calibration:
    return calibrated(family_model("llama-grouped", "bridge"), CALIBRATING)


@pytest.fixture(scope="module")
def effects(family_model: Any, calibration: Calibration) -> Int8Effects:
    return int8_effects(family_model("llama-grouped", "bridge"), PROMPTS, SCHEMES | calibration.schemes())


ENDINGS = {"q_proj": "qkv", "o_proj": "out", "up_proj": "up", "down_proj": "down"}


@pytest.fixture(scope="module")
def ends(hf: Any) -> Ends:
    rows = [run(hf, ids)[1] for ids in CALIBRATING.ids]
    return {name: tuple(max(largest(read[name], gone) for read in rows) for gone in (None, 0)) for name in rows[0]}


@torch.no_grad()
def run(hf: Any, ids: Tensor, change: Change | None = None, int8_weights: bool = False) -> tuple[Tensor, dict]:
    """Logits of a row, and the inputs that its matrices read, every one of them changed."""
    read, handles, kept = {}, [], []

    def enter(module: nn.Module, args: tuple[Tensor], name: str) -> tuple[Tensor] | None:
        read[name] = args[0][0]
        return None if change is None else (change(name, args[0][0])[None],)

    for name, module in hf.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name)))
            if int8_weights:
                kept.append((module, module.weight.data))
                rows = [
                    torch.fake_quantize_per_tensor_affine(row, float(row.abs().max()) / 127.5, 0, -128, 127)
                    for row in module.weight
                ]
                module.weight.data = torch.stack(rows)
    logits = hf(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    for module, weight in kept:
        module.weight.data = weight
    return logits, read


def test_the_error_of_every_input(hf: Any, ends: Ends, effects: Int8Effects) -> None:
    for row, ids in enumerate(PROMPTS.ids):
        for name, x in run(hf, ids)[1].items():
            block, _, ending = name.partition(".")
            kind = ENDINGS.get(ending.rpartition(".")[2])
            if kind is None:
                continue
            number = effects.sites.index(Site(int(block), kind))
            others = OTHERS[row]
            for scheme in effects.inputs:
                expected = size((rounding(scheme, row, x, ends[name]) - x)[others]) / size(x[others])
                assert effects.inputs[scheme][row, number] == pytest.approx(expected, rel=2e-3)
            peak = float(x[0].abs().max() / x[others].abs().max())
            assert effects.peaks[row, number] == pytest.approx(peak, rel=1e-4)


@torch.no_grad()
def test_the_error_of_the_stream(hf: Any, effects: Int8Effects) -> None:
    streams, others = (hf(each.ids, output_hidden_states=True).hidden_states for each in (PROMPTS, CALIBRATING))
    for block in range(LAYERS):
        number = effects.sites.index(Site(block, STREAM))
        ends = largest(others[block].flatten(0, 1)), largest(others[block][:, 1:].flatten(0, 1))
        for row, x in enumerate(streams[block]):
            for scheme in (P0_IN, CALIBRATED, CALIBRATED_P0_KEPT):
                expected = size((rounding(scheme, row, x, ends) - x)[OTHERS[row]]) / size(x[OTHERS[row]])
                assert effects.inputs[scheme][row, number] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("scheme", [*SCHEMES, CALIBRATED, CALIBRATED_P0_KEPT])
def test_logits_and_loss_with_a_scheme_in_use(scheme: str, hf: Any, ends: Ends, effects: Int8Effects) -> None:
    for row, ids in enumerate(PROMPTS.ids):

        def change(name: str, x: Tensor, row: int = row) -> Tensor:
            return rounding(scheme.removeprefix(f"{WEIGHTS}, "), row, x, ends[name])

        exact = run(hf, ids)[0]
        new = run(hf, ids, None if scheme == WEIGHTS else change, scheme.startswith(WEIGHTS))[0]
        a, b = (logits[OTHERS[row]] - logits[OTHERS[row]].mean(-1, keepdim=True) for logits in (new, exact))
        # Where a value lies between two steps, rounding differs with the last bit of what comes before.
        assert effects.logits[scheme][row] == pytest.approx(size(a - b) / size(b), rel=0.1)
        predicting = [t for t in OTHERS[row] if t < T - 1]
        added = np.mean([loss(new, ids)[t] - loss(exact, ids)[t] for t in predicting])
        assert effects.loss[scheme][row] == pytest.approx(added, abs=0.02)
        assert effects.exact_loss[row] == pytest.approx(np.mean([loss(exact, ids)[t] for t in predicting]), rel=1e-4)


def test_what_sums_it_up(effects: Int8Effects) -> None:
    products = [number for number, site in enumerate(effects.sites) if site.kind != STREAM]
    assert len(products) == 4 * LAYERS
    kept, whole = (effects.inputs[name][:, products].mean(1) for name in (P0_KEPT, P0_IN))
    assert effects.error_left(P0_KEPT).value == pytest.approx(kept.mean() / whole.mean())
    left = effects.logits[PER_TOKEN].mean() / effects.logits[P0_IN].mean()
    assert effects.logit_error_left(PER_TOKEN).value == pytest.approx(left)
    share = effects.loss[P0_IN].mean() / effects.exact_loss.mean()
    assert effects.loss_share(P0_IN).value == pytest.approx(share)


def test_calibration_sees_all_rows_and_no_padding(
    family_model: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("llama-grouped", "bridge")
    with monkeypatch.context() as patch:
        patch.setattr("p0circuit.experiments.deployment.int8_effects.batch_size_for", lambda *_, **__: 4)
        in_batches = calibrated(model, CALIBRATING)
    padded = calibrated(model, from_ids(CALIBRATING.ids).pad_left([7] * 6, seed=1))
    short = calibrated(model, from_ids(CALIBRATING.ids[:, :7]))
    for one, other in ((in_batches, calibration), (padded, short)):
        for values in ("p0", "others"):
            np.testing.assert_allclose(getattr(one, values), getattr(other, values), rtol=1e-4)
        assert (one.positions == other.positions).mean() > 0.99


def test_errors_over_draws_of_calibration_rows(family_model: Any, calibration: Calibration) -> None:
    model, rng = family_model("llama-grouped", "bridge"), np.random.default_rng(PROMPTS.seed)
    found = over_draws(model, PROMPTS, calibration, draws=2)
    # Of 6 rows; 16 would be too many.
    assert list(found) == [4]
    for draw in range(2):
        effects = int8_effects(model, PROMPTS, calibration.schemes(rng.permutation(6)[:4]))
        kept, whole = effects.error(CALIBRATED_P0_KEPT).mean(), effects.error(CALIBRATED).mean()
        measured = [values[draw] for values in found[4].values()]
        np.testing.assert_allclose(measured, [whole, kept, kept / whole], rtol=1e-6)


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "hooked"), ("opt", "bridge"), ("olmoe", "bridge")])
def test_padding_is_as_if_it_were_not_there(family: str, backend: str, family_model: Any) -> None:
    model, rows = family_model(family, backend), random_tokens(VOCAB, 4, 9, seed=2)
    padded = from_ids(rows.ids).pad_left([7] * 4, seed=1)
    plain = from_ids(rows.ids[:, :7])
    one, other = int8_effects(model, padded), int8_effects(model, plain)
    for scheme in (P0_IN, P0_KEPT, ANOTHER_KEPT):
        np.testing.assert_allclose(one.inputs[scheme], other.inputs[scheme], rtol=5e-3, atol=1e-5)
    np.testing.assert_allclose(one.logits[WEIGHTS], other.logits[WEIGHTS], rtol=5e-3)
    np.testing.assert_allclose(one.loss[WEIGHTS], other.loss[WEIGHTS], atol=1e-4)


def test_both_backends_agree(family_model: Any, effects: Int8Effects) -> None:
    hooked = int8_effects(family_model("llama-grouped", "hooked"), PROMPTS)
    order = [effects.sites.index(site) for site in hooked.sites]
    np.testing.assert_allclose(hooked.inputs[P0_IN], effects.inputs[P0_IN][:, order], rtol=5e-3)
    np.testing.assert_allclose(hooked.logits[WEIGHTS], effects.logits[WEIGHTS], rtol=5e-3)


def test_the_shipped_model() -> None:
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=48)
    result = Quantisation(QuantisationConfig(draws=3)).run(model, prompts)
    metrics = result.metrics
    assert metrics["error_left_with_p0_kept"].low > 0.35 and metrics["error_left_with_p0_kept"].high < 0.7
    assert metrics["error_left_with_another_position_kept"].low > 0.99
    assert metrics["error_left_with_a_grid_per_token"].high < metrics["error_left_with_p0_kept"].low
    assert metrics["logit_error_left_with_p0_kept"].high < metrics["logit_error_left_with_p0_clipped"].low
    # Rows that are not at hand need a wider grid, and there P0 is not alone.
    assert metrics["error_with_a_calibrated_grid"].low > metrics["error_with_p0_in"].high
    assert metrics["error_left_with_p0_kept_of_a_calibrated_grid"].low > metrics["error_left_with_p0_kept"].high
    assert set(result.tables["calibration"]["rows"]) == {4} and set(result.tables["calibration"]["n"]) == {3}
    # The outlier is written where the norm is, and not before.
    sites = result.tables["sites"].set_index(["input", "block", "measured"])["value"]
    peaks = [sites["MLP, out of hidden", block, "peak of P0 over that of others"] for block in range(4)]
    assert np.argmax(peaks) == 2 and peaks[2] > 5 and peaks[0] < 1
    assert any("block 2, MLP, out of hidden" in note for note in result.notes)
    for figure in result.figures.values():
        assert_legible(figure)


def test_what_a_calibrated_grid_has_to_hold_is_told() -> None:
    """In a few texts the second token is as large as P0."""
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=128, length=48)
    notes = Quantisation(QuantisationConfig(draws=1, draw_samples=2)).run(model, prompts).notes
    assert any("position 1" in note and "block 2, MLP, out of hidden" in note for note in notes)


def test_two_seeds_of_prompts_agree() -> None:
    model = load_model("p0-nano")
    left = []
    for seed in (0, 1):
        prompts = natural_text(model, "stdlib", n=48, length=64, seed=seed)
        effects = int8_effects(model, prompts, {name: SCHEMES[name] for name in (P0_IN, P0_KEPT)})
        left.append(effects.error_left(P0_KEPT))
    assert left[0].low < left[1].high and left[1].low < left[0].high


def test_a_sink_that_hangs_on_bos_is_measured_behind_it() -> None:
    """Early in its training p0-nano had a sink at BOS and hardly any without."""
    model = load_model("p0-nano", checkpoint=1567)
    prompts = natural_text(model, "stdlib", n=24, length=32)
    found = studied_sink(model, prompts, in_either_condition=True)
    assert found.condition == "with BOS" and set(found.prompts.ids[:, 0].tolist()) == {model.tokenizer.bos_token_id}
    result = Quantisation().run(model, prompts)
    assert "measured on text with BOS, 12 rows" in result.notes


def test_without_a_sink_or_enough_tokens_nothing_is_claimed(family_model: Any) -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    with pytest.raises(NotApplicable, match=r"no sink to explain.*after BOS: there is no sink to explain"):
        Quantisation().run(untrained, text)
    with pytest.raises(NotApplicable, match="no sink to explain"):
        Quantisation().run(decoy_model(), random_tokens(64, 8, 32))
    with pytest.raises(NotApplicable, match="at least 4 tokens, got one of 3"):
        int8_effects(family_model("gpt2", "bridge"), random_tokens(VOCAB, 2, 3))
