"""Path patching against the slow, literal way, one edge and one forward pass at a time."""

from __future__ import annotations

import functools

import pytest
import torch

from p0circuit.experiments.measures.whole_stream import measured_at_p0
from p0circuit.interventions.metrics import loss, measure, norm_ratio_after, sink_score_of
from p0circuit.interventions.nodes import InterventionError, Node, components
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.path_patching import Receiver, edges_into_keys, own_scores, path_patch, receivers_of
from p0circuit.models import describe, forward
from p0circuit.models.bridge import to_bridge
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.hooked_transformer import has_hooked_transformer, to_hooked
from p0circuit.models.hooks import hook_point
from p0circuit.prompts import random_tokens
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
    effects = path_patch(model, PROMPTS, senders, list(receivers), values, metric, through=through)
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
    effects = path_patch(model, PROMPTS, [node], list(receivers), values, loss())
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
                slow = path_patch(model, PROMPTS, [sender], [receiver], values, metric, place)
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
    effects = path_patch(model, PROMPTS, senders, list(receivers), values, loss([0, 2]), place)
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
    effects = path_patch(grouped, PROMPTS, senders, names, values, loss())
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


@torch.no_grad()
def test_own_values_change_nothing(family_model):
    model = family_model("qwen3")
    senders = components(model, [0, 1])
    own = patch_values(model, CONTRAST, senders, "position", offset=0)
    effects = path_patch(model, PROMPTS, senders, receivers_of(model, [2]), own, norm_ratio_after(2))
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
    effects = path_patch(model, prompts, senders, receivers_of(model), values, sink_score_of(truth.sink_heads))
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
            path_patch(model, PROMPTS, [node], receivers, values, METRIC, **options)
    with pytest.raises(InterventionError, match="not finite"):
        path_patch(model, PROMPTS, [node], ["attn.2.0.k"], {node: values[node] * torch.nan}, METRIC)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
