"""Path patching against the slow, literal way, one edge and one forward pass at a time."""

from __future__ import annotations

import functools

import jaxtyping
import pytest
import torch

from p0circuit.experiments.measures.whole_stream import measured_at_p0
from p0circuit.interventions import path_patching
from p0circuit.interventions.closed_form import NotOfTheClosedForm
from p0circuit.interventions.metrics import loss, measure, norm_ratio_after, sink_rate_of, sink_score_of
from p0circuit.interventions.nodes import InterventionError, Node, components
from p0circuit.interventions.own_scores import edges_into_keys, own_scores
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.path_patching import patch_edges, path_patch
from p0circuit.interventions.receivers import Receiver, receivers_of
from p0circuit.models import describe, forward
from p0circuit.models.bridge import to_bridge
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.hooked_transformer import has_hooked_transformer, to_hooked
from p0circuit.models.hooks import hook_point
from p0circuit.prompts import random_tokens
from p0circuit.stats import bootstrap
from tests.families import CASES, VOCAB, build
from tests.interventions.oracles import component_outputs

PROMPTS = random_tokens(VOCAB, n=2, length=9, seed=4)
METRIC = sink_score_of([2])
CONTRAST = shift_prompts(PROMPTS, 3, VOCAB)


clean_outputs = functools.lru_cache(maxsize=2)(component_outputs)


def literal_path_patch(model, prompts, sender, receiver, value, metric, place, through):
    """Freeze everything between sender and receiver, keep the receiver's own q, k, v or output, run again with it."""
    clean = clean_outputs(model, prompts)
    rows, index = torch.arange(prompts.n), sender.index
    layer, kind, head = receiver

    def put(activation, hook, value, index):
        activation = activation.clone()
        if index is None:
            activation[rows, place] = value
        else:
            activation[rows, place, index] = value
        return activation

    hooks = []
    at = {"mlp": f"blocks.{layer}.hook_mlp_out", "resid_post": f"blocks.{layer}.hook_resid_post"}
    # After qk-norm, which in OLMo mixes the heads: only there is a head's query or key its own.
    rotated = "rot_" if describe(model).positions == "rotary" and kind in "qk" else ""
    name = at.get(kind, f"blocks.{layer}.attn.hook_{rotated}{kind}")
    heard = {}
    hooks.append((name, lambda activation, hook: heard.update(now=activation[rows, place].clone())))
    hooks.append((sender.hook, functools.partial(put, value=value, index=index)))
    for later in range(describe(model).n_layers):
        for part, stage in (("attn", 1), ("mlp", 3)):
            if sender.depth < (later, stage) and (part == "attn" or through == "direct"):
                frozen = clean[f"blocks.{later}.hook_{part}_out"]
                hooks.append((f"blocks.{later}.hook_{part}_out", lambda activation, hook, frozen=frozen: frozen))
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks)
    new = heard["now"] if head is None else heard["now"][:, head]
    point = hook_point(model, name)
    point.add_hook(functools.partial(put, value=new, index=head))
    try:
        return measure(model, prompts, metric, place)
    finally:
        model.reset_hooks()


@pytest.mark.parametrize(("name", "backend"), CASES)
@torch.no_grad()
def test_edges_equal_the_literal_way(family_model, name, backend):
    # One of the two on each backend: what is let through does not depend on the family.
    through, metric = ("direct", loss()) if backend == "bridge" else ("mlps", METRIC)
    model = family_model(name, backend)
    info = describe(model)
    senders = [Node("head", 0, 1), Node("mlp", 0)]
    values = patch_values(model, CONTRAST, senders)
    receivers = {
        "attn.1.3.q": (1, "q", 3),
        "attn.1.kv0.k": (1, "k", 0),
        f"attn.2.kv{info.n_kv_heads - 1}.v": (2, "v", info.n_kv_heads - 1),
        "mlp.1": (1, "mlp", None),
        "resid_post.1": (1, "resid_post", None),
    }
    effects = patch_edges(model, PROMPTS, senders, list(receivers), values, metric, through=through)
    assert len(effects.edges) == len(senders) * len(receivers)
    for (sender, receiver), patched in zip(effects.edges, effects.patched, strict=True):
        node = Node.parse(sender)
        literal = literal_path_patch(
            model, PROMPTS, node, receivers[receiver], values[node], metric, PROMPTS.p0, through
        )
        assert torch.allclose(patched, literal, atol=2e-5, rtol=1e-5), (sender, receiver)
    assert float(effects.effect.abs().max()) > 1e-3


@torch.no_grad()
def test_a_group_of_heads_is_one_receiver(family_model):
    """Q, K and V of all heads of a block, or of some of them, against all of them set in one run."""
    model = family_model("llama-grouped")
    node = Node("mlp", 0)
    values = patch_values(model, CONTRAST, [node])
    receivers = {
        "attn.1.k": ("k", None),
        "attn.1.q": ("q", None),
        "attn.2.v": ("v", None),
        "attn.1.0+3.q": ("q", slice(0, 4, 3)),
    }
    effects = patch_edges(model, PROMPTS, [node], list(receivers), values, loss())
    for (_, receiver), patched in zip(effects.edges, effects.patched, strict=True):
        kind, heads = receivers[receiver]
        target = (int(receiver.split(".")[1]), kind, slice(None) if heads is None else heads)
        literal = literal_path_patch(model, PROMPTS, node, target, values[node], loss(), PROMPTS.p0, "direct")
        assert torch.allclose(patched, literal, atol=1e-5), receiver
    assert float(effects.effect.abs().max()) > 1e-3


@torch.no_grad()
def test_own_scores_need_no_pass_for_an_edge_into_k_or_q_at_any_position(family_model):
    """The closed form of a changed score, against path patching with the head's own sink score as the metric."""
    for name in ("gpt2", "llama-grouped"):
        model = family_model(name)
        for place in (None, torch.tensor([4, 2])):
            senders = [Node("mlp", 0), Node("head", 1, 0)]
            values = patch_values(model, CONTRAST, senders)
            receivers = ["attn.2.1.k", "attn.2.0.q", "attn.2.kv1.k", "attn.2.q"]
            own = own_scores(model, PROMPTS, senders, receivers, values, place)
            assert len(own.edges) == len(senders) * len(receivers)
            for number, (sender, receiver) in enumerate(own.edges):
                heads = Receiver.parse(receiver, describe(model)).heads
                # Read at P0, whatever position is patched.
                metric = measured_at_p0(sink_score_of([(2, head) for head in heads]))
                slow = patch_edges(model, PROMPTS, [sender], [receiver], values, metric, place)
                assert torch.allclose(own.patched[number], slow.patched[0], atol=1e-6), (name, sender, receiver)
                assert torch.allclose(own.clean[number], slow.clean, atol=1e-6)
            assert float(own.effect.abs().max()) > 1e-3
    with pytest.raises(InterventionError, match="expected K or Q"):
        own_scores(model, PROMPTS, senders, ["attn.2.0.v"], values)


@torch.no_grad()
def test_edges_at_another_position(family_model):
    model = family_model("llama")
    place = torch.tensor([4, 2])
    senders = [Node("mlp", 0), Node("head", 1, 0)]
    values = patch_values(model, CONTRAST, senders)
    receivers = {"attn.2.1.q": (2, "q", 1), "attn.2.0.k": (2, "k", 0), "attn.2.2.v": (2, "v", 2)}
    effects = patch_edges(model, PROMPTS, senders, list(receivers), values, loss([0, 2]), place)
    for (sender, receiver), patched in zip(effects.edges, effects.patched, strict=True):
        node = Node.parse(sender)
        literal = literal_path_patch(
            model, PROMPTS, node, receivers[receiver], values[node], loss([0, 2]), place, "direct"
        )
        assert torch.allclose(patched, literal, atol=1e-5), (sender, receiver)


def ungrouped_twin(hf):
    """The same function as a grouped-query model, with a key/value head of its own for every query head."""
    twin = build("llama-grouped", num_key_value_heads=4)
    weights = hf.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.view(2, -1, weight.shape[-1])
            weights[name] = heads.repeat_interleave(2, 0).reshape(-1, weight.shape[-1])
    twin.load_state_dict(weights)
    return twin


@torch.no_grad()
def test_k_and_v_of_one_query_head_under_grouped_query_attention():
    """The reference is an ungrouped model with the same weights repeated: there a head's key is its own."""
    wrap = to_hooked if has_hooked_transformer() else to_bridge
    hf = build("llama-grouped")
    grouped, ungrouped = (wrap(m, "m") for m in (hf, ungrouped_twin(build("llama-grouped"))))
    assert torch.allclose(forward(grouped, PROMPTS.ids), forward(ungrouped, PROMPTS.ids), atol=1e-4)
    senders = [Node("mlp", 0), Node("head", 1, 2)]
    values = patch_values(grouped, CONTRAST, senders)
    names = [f"attn.2.{head}.{kind}" for head in range(4) for kind in "kv"]
    effects = patch_edges(grouped, PROMPTS, senders, names, values, loss())
    for (sender, receiver), patched in zip(effects.edges, effects.patched, strict=True):
        node, (_, _, head, kind) = Node.parse(sender), receiver.split(".")
        literal = literal_path_patch(
            ungrouped, PROMPTS, node, (2, kind, int(head)), values[node], loss(), PROMPTS.p0, "direct"
        )
        assert torch.allclose(patched, literal, atol=1e-5), (sender, receiver)
    # The two heads of a group get different news through one key: neither is the group's.
    effect = dict(zip(effects.edges, effects.effect, strict=True))
    assert not torch.allclose(effect["mlp.0", "attn.2.0.k"], effect["mlp.0", "attn.2.1.k"], atol=1e-4)


@pytest.mark.parametrize(("name", "backend"), CASES)
@torch.no_grad()
def test_hooks_and_closed_form_agree(family_model, name, backend):
    model = family_model(name, backend)
    senders = components(model, [0, 1])
    values = patch_values(model, CONTRAST, senders)
    fast = edges_into_keys(model, PROMPTS, senders, values, "mlps")
    slow = edges_into_keys(model, PROMPTS, senders, values, "mlps", method="hooks")
    assert (fast.method, slow.method) == ("closed form", "hooks")
    assert torch.allclose(fast.clean, slow.clean, atol=1e-5)
    assert torch.allclose(fast.patched, slow.patched, atol=1e-5)


# The face: a pair in the place of prompts and values


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_of_a_pair_every_edge_has_the_effect_of_a_run_also_where_it_is_in_closed_form(family_model, dtype, tolerance):
    """The slow twin runs every edge. The metric is of heads in two blocks, so only K of the later one has the form."""
    for name in ("gpt2", "llama-grouped"):
        if dtype == torch.float64 and not has_hooked_transformer():
            pytest.skip("this TransformerLens has no HookedTransformer")
        model = family_model(name, dtype=dtype)
        receivers = ["attn.1.k", "attn.2.1.k", "attn.2.kv0.k", "attn.2.0+3.k", "attn.2.q", "attn.2.v", "mlp.1"]
        for through, metric in (("direct", sink_score_of([(1, 2), (2, 0), (2, 1)])), ("mlps", METRIC)):
            edges = path_patch(model, CONTRAST, metric, receivers, through=through)
            senders = [Node("embed"), Node("attn", 0), Node("mlp", 0), Node("attn", 1), Node("mlp", 1)]
            values = patch_values(model, CONTRAST, senders)
            slow = patch_edges(model, PROMPTS, senders, receivers, values, metric, through=through)
            assert edges.edges == slow.edges
            assert float((edges.patched - slow.patched.cpu()).abs().max()) < tolerance, (name, through)
            assert float(slow.effect.abs().max()) > 1e-3
            exact = {"attn.2.1.k", "attn.2.kv0.k", "attn.2.0+3.k"}
            assert {receiver for _, receiver in edges.closed_form} == exact
            total = measure(model, CONTRAST.shifted, metric, CONTRAST.position) - edges.clean
            assert torch.equal(edges.relative_effect, edges.effect / total.mean())


@torch.no_grad()
def test_other_metrics_and_other_attention_are_run(family_model, monkeypatch):
    model = family_model("llama-grouped")
    for metric in (loss(), sink_rate_of([2]), sink_score_of([2], offset=1)):
        assert not path_patch(model, CONTRAST, metric, ["attn.2.k"]).closed_form
    assert path_patch(model, CONTRAST, METRIC, ["attn.2.k"]).closed_form

    def other_attention(*_):
        raise NotOfTheClosedForm("of another kind")

    exact = path_patch(model, CONTRAST, METRIC, ["attn.2.k"])
    monkeypatch.setattr(path_patching, "key_edges", other_attention)
    run = path_patch(model, CONTRAST, METRIC, ["attn.2.k"])
    assert not run.closed_form and torch.allclose(run.patched, exact.patched, atol=1e-5)


@torch.no_grad()
def test_single_heads_send_if_asked_and_a_list_of_names_is_taken_as_it_is(family_model, monkeypatch):
    model = family_model("gpt2")
    heads = path_patch(model, CONTRAST, METRIC, ["mlp.0", "attn.1.k"], senders="heads")
    assert {sender for sender, _ in heads.edges} == {"embed", *(f"attn.0.{head}" for head in range(4)), "mlp.0"}
    assert ("mlp.0", "mlp.0") not in heads.edges
    named = path_patch(model, CONTRAST, METRIC, ["attn.1.k"], senders=["mlp.0", Node("head", 0, 1)])
    assert named.edges == (("mlp.0", "attn.1.k"), ("attn.0.1", "attn.1.k"))
    both = dict(zip(heads.edges, heads.patched, strict=True))
    for edge, patched in zip(named.edges, named.patched, strict=True):
        assert torch.allclose(patched, both[edge], atol=1e-6)
    for message, receivers, options in [
        ("no receiver", [], {}),
        ("names of nodes", ["attn.1.k"], {"senders": "mlp.0"}),
        ("comes before every sender", ["attn.1.k"], {"senders": ["mlp.1"]}),
        ("'direct' or 'mlps'", ["attn.1.k"], {"through": "all"}),
    ]:
        # As users run it: in tests jaxtyping would refuse some of this before we can.
        with monkeypatch.context() as patched:
            patched.setattr(jaxtyping.config, "jaxtyping_disable", True)
            with pytest.raises(InterventionError, match=message):
                path_patch(model, CONTRAST, METRIC, receivers, **options)


@torch.no_grad()
def test_tables_intervals_and_figures_of_edges(tmp_path):
    model, truth = wired_model("rotary"), wired_truth()
    pair = shift_prompts(random_tokens(64, n=6, length=24, seed=5), 6, 64)
    last = max(layer for layer, _ in truth.sink_heads)
    metric = sink_score_of(truth.sink_heads)
    edges = path_patch(model, pair, metric, [f"attn.{last}.k", "mlp.1", "mlp.0"])
    for relative, values in ((False, edges.effect), (True, edges.relative_effect)):
        table = edges.to_dataframe(relative).set_index(["sender", "receiver"])
        assert table["effect"].abs().is_monotonic_decreasing and (table["n"] == 6).all()
        for edge, value, interval in zip(edges.edges, values, edges.interval(relative), strict=True):
            assert table.loc[edge, "effect"] == pytest.approx(float(value.mean()), abs=1e-6) == interval.value
            assert [table.loc[edge, name] for name in ("low", "high")] == [interval.low, interval.high]
    assert edges.interval()[0] == bootstrap(edges.effect[0].double().numpy())
    edges.plot().savefig(tmp_path / "edges.png")
    edges.plot(relative=True).savefig(tmp_path / "shares.png")

    graph = edges.circuit(threshold=0.05)
    share = dict(zip(edges.edges, edges.relative_effect.mean(1).tolist(), strict=True))
    assert set(graph.edges) == {edge for edge, value in share.items() if abs(value) >= 0.05}
    assert graph.ends == (f"attn.{last}",) and {"mlp.0", "mlp.1", f"attn.{last}"} <= set(graph.graph.nodes)
    # What is in the graph, in shares, is what its table says.
    for (sender, _), value in zip(graph.edges, graph.relative_effect.mean(1).tolist(), strict=True):
        assert any(value == pytest.approx(data["effect"], abs=1e-6) for data in graph.graph[sender].values())
    assert set(zip(*(graph.to_dataframe()[name] for name in ("sender", "receiver")), strict=True)) == set(graph.edges)
    for relative in (None, False, True):
        figure = graph.plot(relative)
        figure.savefig(tmp_path / "circuit.png")
    everything = edges.circuit(threshold=2.0)
    assert everything.edges == () and everything.to_dataframe().empty
    everything.plot().savefig(tmp_path / "empty.png")
    with pytest.raises(InterventionError, match="other run was measured"):
        values = patch_values(model, pair, ["mlp.0"])
        patch_edges(model, pair.clean, ["mlp.0"], ["mlp.1"], values, metric).circuit(threshold=0.05)


@torch.no_grad()
def test_edges_into_keys_have_a_table_and_a_figure(family_model, tmp_path):
    model = family_model("llama-grouped")
    senders = components(model, [0, 1])
    keys = edges_into_keys(model, PROMPTS, senders, patch_values(model, CONTRAST, senders))
    table = keys.to_dataframe().set_index(["sender", "receiver"])
    assert len(table) == len(keys.edges) == 12 + 2 * 8 + 2 * 4
    assert table.loc[("mlp.0", "attn.2.1.k"), "effect"] == pytest.approx(float(keys.effect[2, :, 2, 1].mean()))
    keys.plot().savefig(tmp_path / "keys.png")
    with pytest.raises(InterventionError, match="other run was measured"):
        _ = keys.relative_effect


@torch.no_grad()
def test_own_values_change_nothing(family_model):
    model = family_model("qwen3")
    senders = components(model, [0, 1])
    own = patch_values(model, CONTRAST, senders, "position", offset=0)
    effects = patch_edges(model, PROMPTS, senders, receivers_of(model, [2]), own, norm_ratio_after(2))
    assert float(effects.effect.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "opt"])
@torch.no_grad()
def test_direct_effects_of_a_complete_set_add_up_where_the_norm_is_frozen(family_model, name):
    """With the receiver's norm frozen its input is linear in the stream, so what the edges bring adds up."""
    model = family_model(name, dtype=torch.float64) if has_hooked_transformer() else family_model(name)
    info = describe(model)
    layer = info.n_layers - 1
    senders = components(model, range(layer))
    values = patch_values(model, CONTRAST, senders)
    scales = {}
    scale = f"blocks.{layer}.ln1.hook_scale"
    forward(model, PROMPTS.ids, hooks=[(scale, lambda value, hook: scales.update(now=value.clone()))])

    def put(activation, hook, node):
        changed = activation.clone()
        node.put(changed, PROMPTS.p0, values[node])
        return changed

    def key_with(senders):
        kept = {}
        hooks = [(scale, lambda value, hook: scales["now"])]
        clean = component_outputs(model, PROMPTS)
        for node in components(model, range(layer)):
            if node in senders:
                write = functools.partial(put, node=node)
            elif node.kind != "embed":
                write = functools.partial(lambda a, hook, node: clean[node.hook], node=node)
            else:
                continue
            hooks.append((node.hook, write))
        hooks.append((f"blocks.{layer}.attn.hook_k", lambda key, hook: kept.update(key=key[:, 0].clone())))
        forward(model, PROMPTS.ids, hooks=hooks)
        return kept["key"]

    clean_key = key_with([])
    total = key_with(senders) - clean_key
    parts = sum(key_with([sender]) - clean_key for sender in senders)
    assert float(total.abs().max()) > 0.1
    assert torch.allclose(parts, total, atol=1e-9 if has_hooked_transformer() else 1e-4)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@torch.no_grad()
def test_every_true_edge_of_the_wired_model_is_above_every_false_one(positions):
    model, truth = wired_model(positions), wired_truth()
    prompts = random_tokens(64, n=4, length=24, seed=5)
    pair = shift_prompts(prompts, 6, 64)
    senders = components(model, heads=True)
    values = patch_values(model, pair, senders)
    effects = patch_edges(model, prompts, senders, receivers_of(model), values, sink_score_of(truth.sink_heads))
    sizes = dict(zip(effects.edges, effects.effect.mean(1).abs().tolist(), strict=True))
    assert set(sizes) == set(truth.candidate_edges(neurons=False))
    true = [size for edge, size in sizes.items() if edge in truth.edges]
    false = [size for edge, size in sizes.items() if edge not in truth.edges]
    assert len(true) == 6
    assert min(true) > 0.2 > 0.01 > max(false)


@torch.no_grad()
def test_bad_input_is_refused_and_leaves_no_hook(family_model):
    model = family_model("llama-grouped")
    node = Node("mlp", 1)
    values = patch_values(model, CONTRAST, [node])
    for message, receivers, options in [
        ("comes before every sender", ["attn.1.0.k"], {}),
        ("comes before every sender", ["mlp.1"], {}),
        ("heads 0 to 3", ["attn.2.4.k"], {}),
        ("key/value heads 0 to 1", ["attn.2.kv2.k"], {}),
        ("queries belong to query heads", ["attn.2.kv0.q"], {}),
        ("names no receiver", ["attn.2.0"], {}),
        ("outside row", ["attn.2.0.k"], {"position": torch.tensor([0, 9])}),
    ]:
        with pytest.raises(InterventionError, match=message):
            patch_edges(model, PROMPTS, [node], receivers, values, METRIC, **options)
    with pytest.raises(InterventionError, match="not finite"):
        patch_edges(model, PROMPTS, [node], ["attn.2.0.k"], {node: values[node] * torch.nan}, METRIC)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
