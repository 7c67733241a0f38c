"""Heads zeroed in an order: against hooks by hand, and on a model whose sink heads are dormant by construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments import DormantHeads, DormantHeadsConfig, NotApplicable
from p0circuit.experiments.deployment.c19_dormant_heads import (
    Zeroing,
    by_output_norm,
    by_sink_score,
    output_norms,
    random_orders,
    steps,
    zeroed,
)
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.results import Result
from tests.families import VOCAB
from tests.literal import loss, norm, run_with_cache, score
from tests.report.test_figures import assert_legible

QUICK = DormantHeadsConfig(samples=20, orders=6, domain_samples=4, domain_orders=2)


@pytest.fixture(scope="module")
def dormant() -> Result:
    """p0-nano whose two sink heads write nothing; they are in its last layer, so their scores stay what they were."""
    model = load_model("p0-nano", backend="bridge")
    with torch.no_grad():
        model.blocks[3].attn.o.weight[:, 32:96] = 0
    return DormantHeads(QUICK).run(model, natural_text(model, "stdlib", n=40, length=64))


def test_zeroing_against_hooks_by_hand(family_model: Any) -> None:
    model, prompts = family_model("llama-grouped", "bridge"), random_tokens(VOCAB, 3, 10, seed=2)
    order = [(2, 1), (0, 3), (1, 0), (2, 0)]
    run = zeroed(model, prompts, {"mine": order})["mine"]
    assert run.counts == (0, 1, 2, 3, 4)

    def zero(z: Tensor, hook: Any, head: int) -> Tensor:
        z[:, :, head] = 0
        return z

    for place, count in enumerate(run.counts):
        for row, ids in enumerate(prompts.ids):
            hooks = [
                (f"blocks.{layer}.attn.hook_z", lambda z, hook, head=head: zero(z, hook, head))
                for layer, head in order[:count]
            ]
            with torch.no_grad():
                logits = model.run_with_hooks(ids[None], fwd_hooks=hooks)[0]
            assert run.losses[row, place] == pytest.approx(np.mean(loss(logits, ids)), abs=1e-5)
    assert len(np.unique(run.losses.round(4))) == run.losses.size


def test_an_order_is_followed_until_it_is_seen_to_be_beyond(family_model: Any) -> None:
    model, prompts = family_model("gpt2", "bridge"), random_tokens(VOCAB, 3, 10, seed=2)
    whole = zeroed(model, prompts, random_orders(model, 3, 0))
    for name, run in zeroed(model, prompts, random_orders(model, 3, 0), until=0.02).items():
        means = whole[name].losses.mean(0)
        beyond = np.flatnonzero(means > 1.02 * means[0])
        assert len(run.counts) == (beyond[0] + 1 if len(beyond) else len(means))
        np.testing.assert_allclose(run.losses, whole[name].losses[:, : len(run.counts)], atol=1e-6)
        assert run.within().value == whole[name].within().value


def test_padded_rows_have_the_losses_of_their_own_tokens(family_model: Any) -> None:
    model, prompts = family_model("llama", "bridge"), random_tokens(VOCAB, 2, 10, seed=2)
    padded = prompts.pad_left([6, 10])
    run = zeroed(model, padded, {"mine": [(1, 1)]})["mine"]
    logits, _ = run_with_cache(model, prompts.ids[0, :6])
    assert run.losses[0, 0] == pytest.approx(np.mean(loss(logits[0], prompts.ids[0, :6])), abs=1e-5)


def test_the_count_ends_where_the_loss_first_goes_beyond() -> None:
    def count(*losses: float) -> float:
        return Zeroing((0, 1, 2, 3, 4, 6)[: len(losses)], np.array([losses, losses])).within().value

    assert count(1, 1.005, 1.009, 1.0, 0.9, 1.01) == 6
    assert count(1, 1.005, 1.02, 1.0, 0.9, 0.8) == 1, "a later dip does not count"
    assert count(1, 1.02) == 0
    assert count(2, 2.019, 2.03) == 1
    rows = np.array([[1, 1.00, 1.06], [1, 1.015, 1.00]])
    interval = Zeroing((0, 1, 2), rows).within()
    assert (interval.value, interval.low, interval.high) == (1, 0, 1)
    assert Zeroing((0, 1, 2), rows).growth(2).value == pytest.approx(0.03)


def test_steps_widen() -> None:
    assert steps(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert steps(15) == [1, 2, 3, 4, 6, 8, 12, 15]
    assert steps(1) == [1]
    assert steps(144)[-4:] == [64, 96, 128, 144]


@pytest.mark.parametrize("case", [("gpt2", "hooked"), ("llama-grouped", "bridge"), ("neox", "bridge")])
def test_orders_by_score_and_by_norm(case: tuple[str, str], family_model: Any) -> None:
    model, prompts = family_model(*case), random_tokens(VOCAB, 3, 9, seed=1)
    norms, scores = np.zeros((3, 4)), np.zeros((3, 4))
    for ids in prompts.ids:
        _, cache = run_with_cache(model, ids)
        for layer in range(3):
            scores[layer] += score(cache[f"blocks.{layer}.attn.hook_pattern"][0], 0)
            z, weight = cache[f"blocks.{layer}.attn.hook_z"][0], model.blocks[layer].attn.W_O
            for head in range(4):
                norms[layer, head] += sum(norm(z[t, head] @ weight[head]) for t in range(1, 9))
    np.testing.assert_allclose(output_norms(model, prompts), norms / 24, rtol=1e-5)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    assert by_output_norm(model, prompts) == sorted(heads, key=lambda head: norms[head])
    assert by_sink_score(model, prompts) == sorted(heads, key=lambda head: -scores[head])


def test_random_orders_are_orders_and_differ(family_model: Any) -> None:
    model = family_model("gpt2", "bridge")
    orders = random_orders(model, 5, seed=3)
    heads = {(layer, head) for layer in range(3) for head in range(4)}
    assert all(set(order) == heads and len(order) == 12 for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 5
    assert orders == random_orders(model, 5, seed=3) != random_orders(model, 5, seed=4)


def test_heads_that_are_dormant_by_construction_go_first(dormant: Result) -> None:
    """The two sink heads say nothing: the loss without them is that of the whole model."""
    assert dormant.judgement is not None and dormant.judgement.verdict == "reproduced"
    assert dormant.metrics["heads_in_sink_order"].value >= 2 > dormant.metrics["heads_in_random_order"].value
    # Their output has no norm either.
    assert dormant.metrics["heads_in_norm_order"].value >= 2
    orders = dormant.tables["orders"]
    for order in ("sink order", "norm order"):
        assert sorted(orders[orders["order"] == order]["head"][:2]) == ["attn.3.1", "attn.3.2"]
    curves = dormant.tables["curves"].set_index(["order", "heads_zeroed"])
    assert curves.loc[("sink order", 2), "growth_value"] == pytest.approx(0, abs=1e-6)
    everything = curves.xs(16, level="heads_zeroed")["loss"]
    assert everything.max() - everything.min() == 0


def test_every_domain_has_its_counts_and_scores(dormant: Result) -> None:
    domains = ["the prompts", "with BOS", "english", "code", "random tokens"]
    table = dormant.tables["domains"]
    assert list(dict.fromkeys(table["domain"])) == domains
    assert set(table["measured"]) == {
        f"heads_{name}" for name in ("beyond_random_order", "in_sink_order", "in_norm_order", "in_random_order")
    }
    heads = dormant.tables["heads"].set_index("head")
    assert len(heads) == 16 and set(domains) < set(heads.columns)
    assert heads.loc["attn.3.1", "dormant_somewhere"] and not heads.loc["attn.0.0", "dormant_somewhere"]
    turning = heads.index[heads["dormant_somewhere"] & heads["active_somewhere"]]
    assert dormant.notes[-1].endswith(", ".join(turning) or "none")
    for domain in domains[1:]:
        assert f"heads_in_sink_order_on_{domain.lower().replace(' ', '_')}" in dormant.metrics


def test_figures_are_legible(dormant: Result) -> None:
    for figure in dormant.figures.values():
        assert_legible(figure)  # pyright: ignore[reportArgumentType]


def test_without_a_sink_there_is_nothing_to_claim() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            DormantHeads().run(model, prompts)
