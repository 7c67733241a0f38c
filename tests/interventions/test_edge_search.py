"""The edge search against exhaustive path patching, and runs with set inputs against literal hooks."""

from __future__ import annotations

import functools

import pytest
import torch

from p0circuit.interventions.closed_form import key_hook, query_hook
from p0circuit.interventions.edge_search import search_edges
from p0circuit.interventions.metrics import Rows, loss, measure, sink_score_of
from p0circuit.interventions.nodes import InterventionError, Node, components
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.path_patching import patch_edges
from p0circuit.interventions.receiver_inputs import InputPatch, measure_inputs, read_at_p0
from p0circuit.interventions.receivers import receivers_of
from p0circuit.models import describe, forward, load_model, passes
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.hooks import hooked
from p0circuit.models.passes import count_passes
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import natural_text, random_tokens
from tests.families import CASES, VOCAB

SHARE = 0.05


@pytest.fixture
def runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count forward runs, whether their gradient is taken or not: the search is held against runs of an edge."""
    monkeypatch.setattr(passes, "WITH_GRADIENT", 1)


def studied(name):
    """A model, prompts, and the heads whose score is the metric."""
    if name == "p0-nano":
        model = load_model("p0-nano")
        return model, natural_text(model, "stdlib", n=16, length=64), [(3, 1), (3, 2)]
    return wired_model(name), random_tokens(64, n=8, length=24, seed=5), list(wired_truth().sink_heads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p0-nano", "rotary", "learned"])
@torch.no_grad()
def test_the_same_edges_as_exhaustive_search_at_a_twentieth_of_a_pass_per_edge(name, runs_alone):
    model, prompts, heads = studied(name)
    vocabulary, special = sampleable_vocabulary(model)
    pair = shift_prompts(prompts, 8, vocabulary, 0, tuple(special))
    senders, receivers = components(model, heads=True), receivers_of(model)
    values = patch_values(model, pair, senders)
    every = patch_edges(model, prompts, senders, receivers, values, sink_score_of(heads))
    exact = dict(zip(every.edges, every.effect.mean(1).tolist(), strict=True))
    threshold = SHARE * float(every.clean.mean())
    with count_passes() as counted:
        search = search_edges(model, prompts, senders, receivers, values, heads, threshold)
    assert set(search.strong_edges) == {edge for edge, effect in exact.items() if abs(effect) >= threshold}
    assert len(search.strong_edges) >= 5
    assert len(every.edges) / counted.passes(prompts.n, prompts.length, describe(model).n_layers) >= 20
    # What it gives are the exact effects, and no edge is lost from the count.
    for edge, effect in zip(search.exact.edges, search.exact.effect.mean(1).tolist(), strict=True):
        assert effect == pytest.approx(exact[edge], abs=1e-6)
    assert len(search.edges) + search.without_effect == len(every.edges)
    assert max(abs(effect) for (_, end), effect in exact.items() if end.endswith(".q")) < 1e-7
    largest = max(abs(exact[edge] - mean) for edge, mean in zip(search.edges, search.means.tolist(), strict=True))
    assert largest < threshold / 2, "the safety factor would be too small"


@pytest.mark.parametrize(("name", "backend"), CASES)
@torch.no_grad()
def test_exact_effects_are_those_of_path_patching_in_every_family(family_model, name, backend):
    model = family_model(name, backend)
    info, prompts = describe(model), random_tokens(VOCAB, n=3, length=10, seed=1)
    senders = [Node("embed"), Node("head", 0, 1), Node("mlp", 0), Node("mlp", 1)]
    values = patch_values(model, shift_prompts(prompts, 4, VOCAB), senders)
    receivers = ["attn.1.3.k", f"attn.2.kv{info.n_kv_heads - 1}.k", "attn.1.k", "attn.2.0+2.v", "attn.1.1.v", "mlp.1"]
    heads = [(1, 0), (2, 1), (2, 3)]
    every = patch_edges(model, prompts, senders, receivers, values, sink_score_of(heads))
    search = search_edges(model, prompts, senders, receivers, values, heads, 1e-9)
    exact = dict(zip(search.exact.edges, search.exact.patched, strict=True))
    moved = 0.0
    for edge, patched in zip(every.edges, every.patched, strict=True):
        assert torch.allclose(exact.get(edge, search.exact.clean), patched.cpu(), atol=1e-5), edge
        moved = max(moved, float((patched - every.clean).abs().max()))
    assert moved > 1e-3


@torch.no_grad()
def test_an_edge_into_k_of_the_last_sink_heads_is_estimated_exactly(family_model):
    """Nothing is downstream of them, so their own score is all there is, and it is in closed form."""
    model = family_model("llama-grouped")
    prompts = random_tokens(VOCAB, n=3, length=10, seed=2).pad_left([10, 7, 9])
    senders = [Node("mlp", 0), Node("head", 1, 2), Node("mlp", 1)]
    values = patch_values(model, shift_prompts(prompts, 3, VOCAB), senders)
    search = search_edges(model, prompts, senders, receivers_of(model, [2], ["k"]), values, [(2, 1), (2, 2)], 1e-9)
    exact = dict(zip(search.exact.edges, search.exact.effect, strict=True))
    assert search.by_row is not None and any(effect.abs().max() > 1e-3 for effect in exact.values())
    for edge, estimate in zip(search.edges, search.by_row, strict=True):
        assert torch.allclose(estimate, exact.get(edge, torch.zeros(3)), atol=1e-6), edge


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "qwen3"])
@torch.no_grad()
def test_inputs_set_in_several_blocks_against_literal_hooks(family_model, name):
    """Q, K and V of all heads at a position of each row, and an MLP: all set together, in one plain forward pass."""
    model, info = family_model(name), describe(family_model(name))
    prompts = random_tokens(VOCAB, n=2, length=9, seed=4)
    place = torch.tensor([4, 2])
    generator = torch.Generator().manual_seed(0)
    index, every = torch.arange(2), tuple(range(info.n_heads))
    new = {
        **{("q", layer): torch.randn(2, info.n_heads, info.d_head, generator=generator) for layer in (1, 2)},
        **{
            (part, layer): torch.randn(2, info.n_kv_heads, info.d_head, generator=generator)
            for part in "kv"
            for layer in (1, 2)
        },
        ("mlp", 1): torch.randn(2, info.d_model, generator=generator),
    }
    metric = loss()
    for kinds in (("q",), ("k",), ("v",), ("mlp",), ("k", "v"), ("q", "mlp")):
        patches = [
            InputPatch(kind, layer, () if kind == "mlp" else every, value)
            for (kind, layer), value in new.items()
            if kind in kinds
        ]

        def put(activation, hook, value, change):
            activation = activation.clone()
            activation[index, place] = activation[index, place] + value if change else value
            return activation

        hooks = []
        for (kind, layer), value in new.items():
            where = {"q": query_hook(model, layer), "k": key_hook(model, layer), "v": f"blocks.{layer}.attn.hook_v"}
            if kind in kinds:
                point = where.get(kind, f"blocks.{layer}.hook_mlp_out")
                hooks.append((point, functools.partial(put, value=value, change=kind == "v")))
        with hooked(model, hooks):
            literal = measure(model, prompts, metric, place)
        rows = Rows(prompts.ids, prompts.attention_mask, place)
        assert torch.allclose(measure_inputs(model, rows, metric, [patches, patches])[1], literal, atol=1e-5), kinds
        assert not torch.allclose(literal, measure(model, prompts, metric, place), atol=1e-4)


@torch.no_grad()
def test_what_is_read_at_p0_from_one_token_is_what_full_rows_read(family_model):
    model = family_model("llama-grouped")
    prompts, sender = random_tokens(VOCAB, n=3, length=8), Node("mlp", 0)
    values = patch_values(model, shift_prompts(prompts, 4, VOCAB), [sender])
    inputs = read_at_p0(model, prompts.ids[:, 0], [sender], values, 3)
    found = {}
    names = {"key": key_hook(model, 2), "value": "blocks.2.attn.hook_v", "mlp": "blocks.2.hook_mlp_out"}
    hooks = [(point, lambda a, hook, name=name: found.update({name: a[:, 0].clone()})) for name, point in names.items()]
    forward(model, prompts.ids, hooks=hooks)
    for name, value in found.items():
        assert torch.allclose(getattr(inputs, name)[0, :, 2], value, atol=1e-5), name
    assert not torch.allclose(inputs.key[1], inputs.key[0], atol=1e-3)


@torch.no_grad()
def test_receivers_above_the_sink_heads_have_no_effect_and_are_not_run(family_model):
    model = family_model("llama-grouped")
    prompts, senders = random_tokens(VOCAB, n=2, length=9), [Node("mlp", 0), Node("mlp", 1)]
    values = patch_values(model, shift_prompts(prompts, 3, VOCAB), senders)
    receivers = receivers_of(model)
    every = patch_edges(model, prompts, senders, receivers[13:], values, sink_score_of([(1, 0), (1, 2)]))
    search = search_edges(
        model, prompts, senders, receivers[13:], values, [(1, 0), (1, 2)], 1e-6, sample=2, budget=1000.0
    )
    effect = dict(zip(every.edges, every.effect.abs().amax(1).tolist(), strict=True))
    assert len(search.edges) + search.without_effect == len(every.edges)
    assert {edge for edge in effect if effect[edge] > 0} <= {*search.edges}
    assert not any(receiver.startswith(("attn.2", "mlp.2")) for _, receiver in search.edges)


@torch.no_grad()
def test_a_set_of_receivers_is_patched_together():
    """K of all sink heads of the wired model at once is the whole sink; each alone a third of it."""
    model, prompts, heads = studied("rotary")
    values = patch_values(model, shift_prompts(prompts, 8, 64), [Node("mlp", 1)])
    keys = [f"attn.{layer}.{head}.k" for layer, head in heads]
    search = search_edges(model, prompts, ["mlp.1"], keys, values, heads, 0.05, {"sink.k": keys})
    effect = dict(zip(search.exact.edges, search.exact.effect.mean(1).tolist(), strict=True))
    assert effect["mlp.1", "sink.k"] == pytest.approx(sum(effect["mlp.1", key] for key in keys), abs=1e-6)
    truth = wired_truth()
    lost = sum(truth.sink_scores(prompts.length)) / len(heads) - truth.uniform_score(prompts.length)
    assert effect["mlp.1", "sink.k"] == pytest.approx(-lost, abs=5e-3)


@torch.no_grad()
def test_a_budget_of_passes_is_kept_and_what_it_leaves_out_is_said(runs_alone):
    model, prompts, heads = studied("p0-nano")
    vocabulary, special = sampleable_vocabulary(model)
    senders, receivers = components(model), [f"mlp.{layer}" for layer in range(3)]
    receivers += [f"attn.{layer}.{part}" for layer in range(4) for part in "kv"]
    values = patch_values(model, shift_prompts(prompts, 8, vocabulary, 0, tuple(special)), senders)
    search = functools.partial(search_edges, model, prompts, senders, receivers, values, heads)
    with count_passes() as counted:
        few = search(0.002, budget=3.0, sample=2, screening_rows=4)
    assert few.unverified and few.by_row is None
    assert (
        len(few.exact.edges) <= 12
        and counted.passes(prompts.n, prompts.length, describe(model).n_layers) < 3 + 1 + 3 * 1.25 + 2
    )
    assert any("beyond the limit" in line for line in few.summary())
    with pytest.raises(InterventionError, match="screening_rows=None"):
        few.sizes(["attn.3.k"])
    # Without a need for it the budget goes to the sample.
    calm = search(0.1, budget=6.0, sample=1)
    assert not calm.unverified and len(calm.sampled) > 1
    members = search(0.05, members=True)
    assert any(end in ("attn.3.1.k", "attn.3.2.k") for _, end in members.strong_edges)
    sizes = members.sizes(["attn.3.k"])
    exact = {edge: row for edge, row in zip(members.exact.edges, members.exact.effect.abs(), strict=True)}
    assert (sizes >= exact["mlp.2", "attn.3.k"].double().numpy() - 1e-6).all()


@torch.no_grad()
def test_bad_input_is_refused(family_model):
    model = family_model("llama-grouped")
    prompts, node = random_tokens(VOCAB, n=2, length=9, seed=4), Node("mlp", 0)
    values = patch_values(model, shift_prompts(prompts, 3, VOCAB), [node])
    for message, receivers, options in [
        ("threshold above 0", ["mlp.1"], {"threshold": 0.0}),
        ("no negative number", ["mlp.1"], {"sample": -1}),
        ("names no receiver", ["attn"], {}),
        ("names a head twice", ["attn.1.0+0.k"], {}),
        ("heads 0 to 3", ["attn.1.2+4.k"], {}),
        ("expected Q, K or V", ["resid_post.1"], {}),
        ("members are K, or all V", ["mlp.1"], {"sets": {"both": ["attn.1.0.k", "attn.2.0.v"]}}),
    ]:
        with pytest.raises(InterventionError, match=message):
            search_edges(model, prompts, [node], receivers, values, [(2, 0)], **{"threshold": 0.1, **options})
    with pytest.raises(InterventionError, match="no sender"):
        search_edges(model, prompts, [], ["mlp.1"], values, [(2, 0)], 0.1)
    nothing = search_edges(model, prompts, [node], ["attn.1.0.q"], values, [(2, 0)], 0.1, screening_rows=1)
    assert nothing.edges == () and nothing.without_effect == 1 and nothing.strong_edges == []
    with pytest.raises(InterventionError, match="no value"):
        search_edges(model, prompts, ["mlp.1"], ["mlp.2"], values, [(2, 0)], 0.1)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
