"""The closed form against path patching with hooks, on every family and both backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from p0circuit.interventions.closed_form import key_edges, p0_keys
from p0circuit.interventions.nodes import InterventionError, Node, components
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.single_token import p0_blocks
from p0circuit.interventions.vocabulary import sink_scores_by_token, vocabulary_sweep
from p0circuit.models import describe, forward
from p0circuit.prompts import random_tokens
from tests.families import CASES, FAMILIES, VOCAB
from tests.interventions.oracles import literal_key_edge

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PROMPTS = random_tokens(VOCAB, n=3, length=10, seed=1)


def senders_of(model) -> list[Node]:
    neurons = [] if describe(model).experts else [Node("neuron", 1, 5)]
    return [*components(model, [0, 1]), Node("head", 0, 1), Node("head", 1, 3), *neurons]


@pytest.mark.parametrize("through", ["direct", "mlps"])
@pytest.mark.parametrize(("name", "backend"), CASES)
@torch.no_grad()
def test_closed_form_equals_path_patching_with_hooks(family_model, name, backend, through):
    model = family_model(name, backend)
    senders = senders_of(model)
    values = patch_values(model, shift_prompts(PROMPTS, 4, VOCAB), senders)
    edges = key_edges(model, PROMPTS, senders, values, through)
    assert edges.method == "closed form"
    moved = 0.0
    for sender, patched in zip(senders, edges.patched, strict=True):
        for layer in range(sender.layer, describe(model).n_layers):
            literal = literal_key_edge(model, PROMPTS, sender, values[sender], layer, through)
            assert torch.allclose(patched[:, layer], literal, atol=1e-5, rtol=0), (str(sender), layer)
            moved = max(moved, float((literal - edges.clean[:, layer]).abs().max()))
    assert moved > 0.01, "no edge did anything: the comparison would pass whatever the code does"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.hooked and name != "mixtral"])
@torch.no_grad()
def test_in_float64_they_agree_to_1e_10(family_model, name):
    # Without Mixtral: the grouped matrix product that transformers uses for its experts has no float64.
    model = family_model(name, "hooked", torch.float64)
    senders = [Node("embed"), Node("head", 0, 1), Node("mlp", 0)]
    values = patch_values(model, shift_prompts(PROMPTS, 4, VOCAB), senders)
    edges = key_edges(model, PROMPTS, senders, values)
    for sender, patched in zip(senders, edges.patched, strict=True):
        literal = literal_key_edge(model, PROMPTS, sender, values[sender], 2)
        assert float((patched[:, 2] - literal).abs().max()) < 1e-10, str(sender)


@given(
    length=st.integers(2, 9),
    rows=st.integers(1, 3),
    shift=st.integers(1, 4),
    seed=st.integers(0, 99),
    padded=st.booleans(),
)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_any_shape_and_padding(grouped_model, length, rows, shift, seed, padded):
    prompts = random_tokens(VOCAB, n=rows, length=length, seed=seed)
    prompts = prompts.pad_left(seed=seed) if padded else prompts
    senders = [Node("mlp", 0), Node("head", 1, 3)]
    values = patch_values(grouped_model, shift_prompts(prompts, shift, VOCAB, seed), senders)
    edges = key_edges(grouped_model, prompts, senders, values)
    for sender, patched in zip(senders, edges.patched, strict=True):
        literal = literal_key_edge(grouped_model, prompts, sender, values[sender], 2)
        assert torch.allclose(patched[:, 2], literal, atol=1e-5, rtol=0)


@torch.no_grad()
def test_own_values_change_nothing(grouped_model):
    senders = senders_of(grouped_model)
    own = patch_values(grouped_model, shift_prompts(PROMPTS, 1, VOCAB), senders, "position", offset=0)
    edges = key_edges(grouped_model, PROMPTS, senders, own)
    assert float(edges.effect.abs().max()) < 1e-6


@torch.no_grad()
def test_one_token_rows_give_the_keys_of_full_prompts(grouped_model):
    found = {}
    hooks = [("blocks.2.attn.hook_rot_k", lambda key, hook: found.update(key=key[:, 0].clone()))]
    forward(grouped_model, PROMPTS.ids, hooks=hooks)
    keys = p0_keys(grouped_model, PROMPTS.ids[:, 0], [], {})
    assert torch.allclose(keys[0, :, 2], found["key"], atol=1e-5)


@torch.no_grad()
def test_the_vocabulary_sweep_is_the_p0_stream_of_full_prompts(grouped_model):
    sweep = vocabulary_sweep(grouped_model, residual_layers=[0, 3], key_layers=[1], chunk=40)
    prompts = random_tokens(VOCAB, n=VOCAB, length=6, seed=0)
    prompts = prompts.prepend(torch.arange(VOCAB))
    found = {}
    hooks = [
        ("blocks.2.hook_resid_post", lambda stream, hook: found.update(end=stream[:, 0].clone())),
        ("blocks.1.attn.hook_rot_k", lambda key, hook: found.update(key=key[:, 0].clone())),
    ]
    forward(grouped_model, prompts.ids, hooks=hooks)
    assert torch.allclose(sweep.residual[3], found["end"], atol=1e-5)
    assert torch.allclose(sweep.norms[:, 3], found["end"].norm(dim=-1), rtol=1e-5)
    assert torch.allclose(sweep.keys[1], found["key"], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.hooked and name != "mixtral"])
@torch.no_grad()
def test_the_sweep_of_streams_in_bare_operations_is_that_of_the_model(family_model, name, dtype):
    model = family_model(name, "hooked", dtype)
    fast = vocabulary_sweep(model, residual_layers=[2, 3])
    # With keys the sweep runs the model itself.
    slow = vocabulary_sweep(model, residual_layers=[2, 3], key_layers=[0])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for layer in (2, 3):
        difference = float((fast.residual[layer] - slow.residual[layer]).abs().max())
        assert difference <= tolerance * float(slow.residual[layer].abs().max())
    assert torch.allclose(fast.norms, slow.norms, rtol=tolerance)
    start = forward(model, torch.arange(4)[:, None], stop_at_layer=0)[:, 0]
    # OLMo-2 has its norms after attention and MLP: there the model runs itself.
    assert (p0_blocks(model, start) is None) == (name == "olmo2")


@torch.no_grad()
def test_scores_by_token_put_each_key_before_the_same_queries(grouped_model):
    by_token = sink_scores_by_token(grouped_model, PROMPTS, torch.arange(VOCAB))
    one = Node("embed")
    for token in (3, 50):
        embedding = vocabulary_sweep(grouped_model, torch.tensor([token]), residual_layers=[0]).residual[0]
        edges = key_edges(grouped_model, PROMPTS, [one], {one: embedding.expand(PROMPTS.n, -1)}, "all")
        assert torch.allclose(by_token[token], edges.patched[0].mean(0), atol=1e-5)


def test_bad_input_is_refused_and_leaves_no_hook(grouped_model):
    node = Node("mlp", 0)
    width = describe(grouped_model).d_model
    cases = {
        "layers 0 to 2": ([Node("mlp", 3)], {}),
        "heads 0 to 3": (["attn.0.4"], {}),
        "no value": ([node], {}),
        "shape": ([node], {node: torch.zeros(PROMPTS.n, width + 1)}),
        "not finite": ([node], {node: torch.full((PROMPTS.n, width), torch.nan)}),
        "names no node": (["mlp0"], {}),
    }
    for message, (senders, values) in cases.items():
        with pytest.raises(InterventionError, match=message):
            key_edges(grouped_model, PROMPTS, senders, values)
    with pytest.raises(Exception, match="mlp"):
        key_edges(grouped_model, PROMPTS, [node], {node: torch.zeros(PROMPTS.n, width)}, "mlp")
    assert not any(point.has_hooks() for point in grouped_model.hook_dict.values())


@pytest.fixture(scope="module")
def grouped_model(family_model):
    return family_model("llama-grouped")
