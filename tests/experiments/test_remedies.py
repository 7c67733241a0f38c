"""The remedies against what they are by hand, and what they do to the shipped model."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.deployment.c20_first_token import FAR
from p0circuit.experiments.deployment.mitigations import (
    AFTER_BOS,
    AFTER_REGISTER,
    AS_IS,
    KEY_HIDDEN,
    QUANTITIES,
    VALUE_ZEROED,
    WINDOW,
    WINDOW_KEPT,
    ZERO_LOGIT,
    ZERO_LOGIT_ALL,
    Mitigation,
    Mitigations,
    MitigationsConfig,
    int8_errors,
    mitigations_for,
    text_losses,
)
from p0circuit.interventions.attention_edits import mask_key, zero_logit
from p0circuit.interventions.edits import with_zero_logit
from p0circuit.interventions.int8 import LEVELS, Site, on_inputs
from p0circuit.models import describe, forward, load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.prompts import PromptSet, natural_text, random_tokens
from tests.families import VOCAB
from tests.literal import loss
from tests.report.test_figures import assert_legible

N, T = 3, 30
PROMPTS = random_tokens(VOCAB, N, T, seed=5)
TEXT = PROMPTS.ids[:, :-1]
CASES = [("gpt2", "hooked"), ("llama-grouped", "hooked"), ("llama-grouped", "bridge"), ("opt", "bridge")]
SMALL = MitigationsConfig(samples=24, int8_samples=8, spread_samples=8, tokens=3, register_steps=3)


def literal_softmax(scores: Tensor) -> Tensor:
    """`exp(s) / (1 + sum exp(s))`, number by number."""
    weights = scores.double().exp()
    return weights / (1 + weights.sum(-1, keepdim=True))


def test_an_extra_logit_is_a_key_with_a_zero_value() -> None:
    scores = 4 * torch.randn(2, 3, 5, 5, dtype=torch.float64)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    new = with_zero_logit(scores.softmax(-1), scores)
    torch.testing.assert_close(new, literal_softmax(scores), rtol=0, atol=1e-12)
    beside = torch.cat([scores, torch.zeros(2, 3, 5, 1)], dim=-1).softmax(-1)
    torch.testing.assert_close(new, beside[..., :-1], rtol=0, atol=1e-12)
    # Where exp overflows, nothing goes nowhere; where all is far below zero, nearly everything does.
    for level, left in ((1000.0, 1.0), (-1000.0, 0.0)):
        high = torch.full((1, 1, 2, 2), level)
        assert float(with_zero_logit(high.softmax(-1), high).sum(-1).mean()) == left


@pytest.mark.parametrize("case", CASES)
def test_heads_with_a_zero_logit(case: tuple[str, str], family_model: Any) -> None:
    model = family_model(*case)
    layer, head, others = 1, 2, [0, 1, 3]
    names = [f"blocks.{layer}.attn.hook_{point}" for point in ("attn_scores", "pattern", "z", "v")]

    def look(hooks: Any) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        # What records stands behind what changes.
        reading = [(name, lambda x, hook, name=name: seen.update({name: x.clone()})) for name in names]
        with torch.no_grad():
            seen["logits"] = forward(model, PROMPTS.ids, hooks=[*hooks, *reading])
        return seen

    clean, changed = look([]), look(zero_logit(model, PROMPTS, [f"attn.{layer}.{head}"]).hooks())
    scores, pattern, z, v = names
    torch.testing.assert_close(changed[scores], clean[scores], rtol=0, atol=0)
    torch.testing.assert_close(changed[pattern][:, others], clean[pattern][:, others], rtol=0, atol=0)
    literal = literal_softmax(clean[scores][:, head])
    torch.testing.assert_close(changed[pattern][:, head].double(), literal, rtol=0, atol=1e-6)
    values = clean[v].repeat_interleave(4 // clean[v].shape[2], dim=2)[:, :, head].double()
    torch.testing.assert_close(changed[z][:, :, head].double(), literal @ values, rtol=0, atol=1e-5)
    assert (changed["logits"] - clean["logits"]).abs().max() > 1e-4
    everywhere = look(zero_logit(model, PROMPTS, [f"attn.{layer}"]).hooks())
    torch.testing.assert_close(everywhere[pattern].double(), literal_softmax(clean[scores]), rtol=0, atol=1e-6)


def test_losses_and_errors_are_those_of_the_same_text(family_model: Any) -> None:
    model = family_model("llama-grouped", "bridge")
    heads = ["attn.1.0", "attn.1.2"]
    remedies = {
        None: Mitigation(),
        7: Mitigation(7),
        "hidden": Mitigation(None, lambda rows: mask_key(model, rows, heads)),
        "both": Mitigation(7, lambda rows: mask_key(model, rows, heads)),
    }
    for remedy in remedies.values():
        before = [] if remedy.prefix is None else [remedy.prefix]
        measured, errors = text_losses(model, TEXT, remedy), int8_errors(model, TEXT, remedy)
        for row in range(N):
            ids = torch.tensor([*before, *TEXT[row].tolist()])
            one = PromptSet(ids[None], torch.ones(1, len(ids), dtype=torch.bool), {}, 0)
            inputs: dict[Site, Tensor] = {}

            def look(site: Site, x: Tensor, inputs: dict[Site, Tensor] = inputs) -> None:
                inputs.setdefault(site, x[0].flatten(1).double())

            change = remedy.change(one) if remedy.change else contextlib.nullcontext()
            with torch.no_grad(), change, on_inputs(model, look):
                losses = loss(forward(model, ids[None])[0], ids)
            np.testing.assert_allclose(measured[row], losses[len(before) + FAR :], atol=1e-4)
            found = []
            for x in inputs.values():
                step = float(x.abs().max()) / LEVELS
                wrong = ((x / step).round() * step - x)[1:]
                found.append(float(wrong.norm() / x[1:].norm()))
            assert errors[row] == pytest.approx(np.mean(found), rel=1e-3)


def test_what_a_model_cannot_take_is_left_out() -> None:
    notes: list[str] = []
    base, remedies = mitigations_for(wired_model(), random_tokens(64, 4, 40), ["attn.2.0"], "without BOS", None, notes)
    assert base == AS_IS and AFTER_BOS not in remedies and AFTER_REGISTER not in remedies
    assert any("BOS" in note for note in notes) and any("register" in note for note in notes)
    model = load_model("p0-nano")
    prompts = natural_text(model, "code", n=4, length=40)
    base, remedies = mitigations_for(model, prompts, ["attn.3.1"], "with BOS", torch.zeros(128), [])
    bos = model.tokenizer.bos_token_id
    assert base == AFTER_BOS and remedies[KEY_HIDDEN].prefix == bos and remedies[AS_IS].prefix is None
    padded = prompts.pad_left([30] * 4)
    assert WINDOW not in mitigations_for(model, padded, ["attn.3.1"], "without BOS", None, notes)[1]
    assert any("padded" in note for note in notes)


def test_the_shipped_model_with_every_remedy() -> None:
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=48, length=48)
    result = Mitigations(SMALL).run(model, prompts)
    table = result.tables["remedies"]
    assert set(table["remedy"]) == {
        AS_IS, AFTER_BOS, AFTER_REGISTER, KEY_HIDDEN, VALUE_ZEROED, ZERO_LOGIT, ZERO_LOGIT_ALL, WINDOW, WINDOW_KEPT
    }  # fmt: skip
    assert set(table["measured"]) == {*QUANTITIES, "loss_added"}
    metrics = result.metrics
    # What each leaves of the sink: nothing, all of it (the key is kept), or more.
    assert metrics["excess_with_p0s_key_hidden"].high < 0.05
    assert metrics["excess_with_p0s_value_zeroed"] == metrics["excess_with_text_as_it_is"]
    assert metrics["excess_with_bos_before_it"].value > metrics["excess_with_text_as_it_is"].value
    assert metrics["loss_added_by_window_alone"].low > metrics["loss_added_by_window_first_4_kept"].value
    # P0 too may then attend to nothing: the outlier goes, and with it the error that it makes.
    assert metrics["norm_ratio_with_the_same_in_all_heads"].high < metrics["norm_ratio_with_text_as_it_is"].low
    assert metrics["int8_error_with_the_same_in_all_heads"].high < metrics["int8_error_with_text_as_it_is"].low
    for figure in result.figures.values():
        assert_legible(figure)


def test_where_there_is_no_sink_there_is_nothing_to_remedy() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            Mitigations().run(model, prompts)
    wired = wired_model()
    with pytest.raises(NotApplicable, match="without padding"):
        Mitigations().run(wired, random_tokens(64, 8, 32).pad_left([30] * 8))
    with pytest.raises(NotApplicable, match="at least 24 tokens, got 20"):
        Mitigations().run(wired, random_tokens(64, 8, 20))
    result = Mitigations(SMALL).run(wired, random_tokens(64, 16, 26))
    assert any("random tokens" in note for note in result.notes)
    assert describe(wired).name in str(result.provenance["model"])
