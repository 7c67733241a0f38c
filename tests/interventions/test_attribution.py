"""Attribution patching: exact where the model is linear, right to first order elsewhere, and honest about the rest."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from p0circuit.interventions import attribution
from p0circuit.interventions.activation_patching import Patch, patch_grid
from p0circuit.interventions.attribution import (
    Attribution,
    CheckedAttribution,
    attribute,
    attribute_and_check,
    patch_values_at_p0,
)
from p0circuit.interventions.metrics import (
    Metric,
    Reading,
    loss,
    measure,
    norm_ratio_after,
    sink_rate_of,
    sink_score_of,
)
from p0circuit.interventions.nodes import InterventionError, Node
from p0circuit.interventions.pairs import PromptPair, patch_values, shift_prompts
from p0circuit.models import ModelError, describe, forward
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.prompts import from_ids, random_tokens
from tests.families import CASES, VOCAB

PROMPTS = random_tokens(VOCAB, n=3, length=10, seed=1).pad_left([10, 7, 4])
PAIR = shift_prompts(PROMPTS, 4, VOCAB)
SINK = sink_score_of([1, 2])


def kinds_of(model) -> list[str]:
    return ["embed", "attn", "mlp", "resid_post", "head", *([] if describe(model).experts else ["neuron"])]


def exact_effects(model, prompts, values, metric):
    grid = patch_grid(model, PromptPair(prompts, prompts, 0), [Patch(*one) for one in values.items()], metric)
    return grid.patched - grid.base


def partway(model, pair, fraction, kinds):
    """Values a small part of the way from the clean to the shifted ones."""
    clean = patch_values_at_p0(model, PromptPair(pair.clean, pair.clean, 0), kinds, "position", offset=0)
    shifted = patch_values_at_p0(model, pair, kinds)
    return {node: clean[node] + fraction * (shifted[node] - clean[node]) for node in clean}


def stream_at_p0(layer, width):
    """A metric that is linear in P0's residual stream after a block."""
    weights = torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def read(stream, rows):
        return stream[torch.arange(len(stream)), rows.position] @ weights.to(stream)

    return Metric("a linear function", (Reading(f"blocks.{layer}.hook_resid_post", read),), lambda reading: reading)


@pytest.fixture(scope="module")
def model(family_model):
    """Grouped-query attention, gated MLPs, RMSNorm, in float64."""
    return family_model("llama-grouped", dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts(model):
    # A bridge keeps softmax in float32, whose smallest number is not that of float64: padding would become NaN.
    return PROMPTS if describe(model).backend == "hooked" else random_tokens(VOCAB, n=3, length=10, seed=1)


# Where it is exact


def test_linear_streams_have_exact_estimates_for_replacements_of_any_size():
    # Without MLPs and norms P0's stream is linear: its attention to itself is 1 whatever it computes.
    if not has_hooked_transformer():
        pytest.skip("only HookedTransformer can leave out MLPs and norms")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=3, d_model=24, n_ctx=32, d_head=6, n_heads=4, d_vocab=VOCAB, attn_only=True, normalization_type=None,
        seed=0, dtype=torch.float64,
    )  # fmt: skip
    linear = HookedTransformer(config).eval()
    values = patch_values_at_p0(linear, PAIR, ["embed", "resid_pre", "attn", "head"])
    metric = stream_at_p0(2, 24)
    exact = exact_effects(linear, PROMPTS, values, metric)
    for steps in (0, 2):
        # Nodes of one set do not act on each other, so that integrating on their common way finds the same.
        found = attribute(linear, PROMPTS, values, metric, steps)
        assert float((found.estimate - exact).abs().max()) < 1e-12 * float(exact.abs().max())
    assert float(exact.abs().mean(1).min()) > 1e-4, "a node that does nothing tests nothing"


def test_the_last_mlp_adds_to_the_stream_and_so_is_exact(model, prompts):
    info, pair = describe(model), shift_prompts(prompts, 4, VOCAB)
    values = patch_values_at_p0(model, pair, ["neuron", "mlp", "resid_post"], layers=[2])
    exact = exact_effects(model, prompts, values, stream_at_p0(2, info.d_model))
    found = attribute(model, prompts, values, stream_at_p0(2, info.d_model))
    assert found.nodes == tuple(values)
    assert torch.allclose(found.estimate, exact, atol=1e-12, rtol=0)
    assert float(exact.abs().max()) > 0.1


# To first order


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_small_replacements_have_their_exact_effects(family_model, name, backend):
    model = family_model(name, backend)
    values = partway(model, PAIR, 2e-3, kinds_of(model))
    values = dict(list(values.items())[::4])
    for metric in (SINK, norm_ratio_after(2), loss()):
        exact = exact_effects(model, PROMPTS, values, metric)
        found = attribute(model, PROMPTS, values, metric)
        assert torch.allclose(found.clean, measure(model, PROMPTS, metric), atol=1e-6)
        assert float((found.estimate - exact).norm()) < 0.02 * float(exact.norm()), metric.name


@pytest.mark.parametrize("metric", [SINK, loss([0, 2])], ids=lambda metric: metric.name)
def test_the_error_decays_with_the_square_of_the_replacement(model, prompts, metric):
    errors = []
    for fraction in (4e-2, 2e-2, 1e-2):
        values = partway(model, shift_prompts(prompts, 4, VOCAB), fraction, kinds_of(model))
        exact = exact_effects(model, prompts, values, metric)
        errors.append(float((attribute(model, prompts, values, metric).estimate - exact).norm()))
    for larger, smaller in itertools.pairwise(errors):
        assert 3.7 < larger / smaller < 4.3


def test_padding_makes_no_difference(family_model):
    model = family_model("llama-grouped")
    padded = attribute(model, PROMPTS, patch_values_at_p0(model, PAIR), SINK)
    for row, length in enumerate([10, 7, 4]):
        alone = from_ids(PROMPTS.ids[row : row + 1, -length:], vocab_size=VOCAB)
        values = {node: value[row : row + 1] for node, value in patch_values_at_p0(model, PAIR).items()}
        found = attribute(model, alone, values, SINK)
        assert torch.allclose(found.estimate[:, 0], padded.estimate[:, row], atol=1e-5)


@pytest.mark.parametrize("steps", [0, 2])
def test_rows_one_at_a_time_give_the_same(model, prompts, steps, monkeypatch):
    values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB))
    together = attribute(model, prompts, values, SINK, steps)
    monkeypatch.setattr(attribution, "BATCH_BYTES", 1)
    alone = attribute(model, prompts, values, SINK, steps)
    assert torch.allclose(alone.estimate, together.estimate, atol=1e-6)
    assert alone.clean.shape == (prompts.n,)


def test_what_comes_after_the_last_reading_has_no_effect(model, prompts):
    values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB), kinds_of(model), "resample")
    for steps in (0, 1):
        found = attribute(model, prompts, values, sink_score_of([1]), steps)
        for node, estimate in zip(found.nodes, found.estimate, strict=True):
            assert bool(estimate.any()) == (node.layer == 0), str(node)


# Integrated gradients


def replaced_partway(model, prompts, nodes, values, fraction):
    """SINK with all these nodes of one hook moved part of the way, and its gradient times that way: written out."""
    rows, index = torch.arange(prompts.n)[:, None], [node.index for node in nodes]
    place = (rows, prompts.p0[:, None], index) if nodes[0].index is not None else (rows, prompts.p0[:, None])
    seen = {}

    def move(activation, hook):
        seen["way"] = torch.stack([values[node] for node in nodes], 1) - activation[place].detach()
        seen["at"] = (activation[place].detach() + fraction * seen["way"]).requires_grad_()
        activation = activation.clone()
        activation[place] = seen["at"]
        return activation

    pattern = {}
    hooks = [(nodes[0].hook, move)]
    for layer in (1, 2):
        name = f"blocks.{layer}.attn.hook_pattern"
        hooks.append((name, lambda activation, hook, layer=layer: pattern.update({layer: activation})))
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks)
    queries = torch.stack([pattern[layer][rows[:, 0], :, :, prompts.p0] for layer in (1, 2)], 1)
    value = (queries * prompts.attention_mask[:, None, None]).sum(-1) / prompts.attention_mask.sum(1)[:, None, None]
    value = value.mean((1, 2))
    (gradient,) = torch.autograd.grad(value.sum(), seen["at"])
    return value.detach(), (gradient * seen["way"]).flatten(2).sum(2) if gradient.ndim > 2 else gradient * seen["way"]


SETS = [("head", 0), ("head", 1), ("neuron", 0), ("neuron", 1), ("attn", 0), ("mlp", 1), ("embed", 0)]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("kind", "layer"), SETS)
def test_a_set_adds_up_to_the_effect_of_replacing_it_together(model, prompts, kind, layer, steps):
    values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB), [kind], "resample", [layer])
    found = attribute(model, prompts, values, SINK, steps)
    together, _ = replaced_partway(model, prompts, list(values), values, 1.0)
    assert torch.allclose(found.estimate.sum(0), together - found.clean, atol=1e-6 if prompts is not PROMPTS else 1e-12)
    assert float((together - found.clean).abs().max()) > 1e-3


def test_a_component_by_itself_gets_its_exact_effect(model, prompts):
    values = patch_values_at_p0(
        model, shift_prompts(prompts, 4, VOCAB), ["embed", "attn", "mlp", "resid_mid", "resid_post"]
    )
    found = attribute(model, prompts, values, SINK, steps=1)
    assert torch.allclose(found.estimate, exact_effects(model, prompts, values, SINK), atol=1e-6)


@pytest.mark.parametrize(("kind", "layer"), SETS[:4])
def test_many_steps_share_as_the_integral_does(model, prompts, kind, layer):
    values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB), [kind], layers=[layer])
    fractions = (np.arange(40) + 0.5) / 40
    parts = [replaced_partway(model, prompts, list(values), values, fraction)[1] for fraction in fractions]
    integral = torch.stack(parts).mean(0).T
    errors = [
        float((attribute(model, prompts, values, SINK, steps).estimate - integral).abs().max()) for steps in (1, 8)
    ]
    assert errors[1] < 0.02 * float(integral.abs().max())
    assert errors[1] < 0.2 * errors[0]


# The ground truth


@pytest.fixture(scope="module", params=["rotary", "learned"])
def wired(request):
    return wired_model(request.param)


WIRED_PROMPTS = random_tokens(64, n=6, length=24, seed=0)


@functools.lru_cache
def wired_screen(model, steps):
    values = patch_values_at_p0(model, shift_prompts(WIRED_PROMPTS, 5, 64))
    metric = sink_score_of(wired_truth().sink_heads)
    return attribute_and_check(model, WIRED_PROMPTS, values, metric, steps, top=8, sample=None)


def by_node(screened):
    return screened.to_dataframe().set_index("node")


@pytest.mark.parametrize("steps", [0, 8])
def test_the_true_heads_and_neurons_come_first(wired, steps):
    truth, found = wired_truth(), wired_screen(wired, steps)
    true = {Node("head", *head) for head in truth.recognition_heads}
    true |= {Node("neuron", *neuron) for neuron in truth.detector_neurons + truth.sink_neurons}
    assert {found.attribution.nodes[number] for number in found.attribution.order[:4]} == true
    assert found.recall(4) == 1.0
    # Each of the four is necessary: without it nothing is left of 0.84.
    exact = by_node(found).loc[[str(node) for node in true], "exact"]
    assert bool((exact < -0.8).all())


def test_the_plain_gradient_has_the_order_right_but_sees_nothing_of_the_size(wired):
    # P0's norm is 15 times what it need be: no small change of anything moves its direction.
    found = by_node(wired_screen(wired, 0)).head(4)
    assert bool((found["estimate"] < 0).all())
    assert bool((found["estimate"] > -0.001).all())
    agreement = wired_screen(wired, 0).agreement()
    assert agreement.mean_abs_error > 0.99 * agreement.mean_abs_effect


def test_integrated_gradients_have_the_sizes_right_but_split_what_both_heads_do(wired):
    found = by_node(wired_screen(wired, 8))
    for neuron in ("neuron.0.17", "neuron.1.42"):
        assert found.loc[neuron, "estimate"] == pytest.approx(found.loc[neuron, "exact"], rel=0.05)
    heads = [found.loc[head, "estimate"] / found.loc[head, "exact"] for head in ("attn.0.1", "attn.0.3")]
    assert heads == pytest.approx([0.5, 0.5], abs=0.03)
    plain, integrated = wired_screen(wired, 0).agreement(), wired_screen(wired, 8).agreement()
    assert integrated.mean_abs_error < 0.35 * plain.mean_abs_error


# The report


def test_the_report_when_everything_is_checked(model, prompts):
    values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB))
    found = attribute_and_check(model, prompts, values, SINK, top=20, sample=None)
    assert sorted(found.checked.tolist()) == list(range(len(values)))
    exact = exact_effects(model, prompts, values, SINK)
    assert torch.allclose(found.exact, exact[found.checked], atol=1e-6)
    estimate, exact = found.attribution.mean.numpy(), exact.double().mean(1).numpy()
    agreement = found.agreement()
    assert agreement.nodes == len(values)
    assert agreement.pearson == pytest.approx(np.corrcoef(estimate, exact)[0, 1], abs=1e-5)
    ranks = [one.argsort().argsort() for one in (estimate, exact)]
    assert agreement.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=0.01)
    assert agreement.mean_abs_error == pytest.approx(abs(estimate - exact).mean(), abs=1e-6)
    assert agreement.mean_abs_effect == pytest.approx(abs(exact).mean(), abs=1e-6)
    strongest = [set(abs(one).argsort()[-20:].tolist()) for one in (estimate, exact)]
    assert found.recall() == pytest.approx(len(strongest[0] & strongest[1]) / 20)
    assert 0.5 < found.recall() <= 1


def test_a_sample_stands_for_the_rest():
    # Two strongest nodes and two sampled ones out of six others, each standing for three.
    estimate = torch.tensor([9.0, -8.0, 3.0, 2.0, 2.0, 1.0, 0.5, 0.0])[:, None]
    exact = torch.tensor([10.0, -1.0, 2.0, 0.0])[:, None]
    nodes = tuple(Node("neuron", 0, number) for number in range(8))
    found = CheckedAttribution(
        Attribution("x", nodes, 0, torch.zeros(1), estimate), torch.tensor([0, 1, 3, 7]), 2, exact
    )
    drawn, truth = np.repeat([9.0, -8.0, 2.0, 0.0], [1, 1, 3, 3]), np.repeat([10.0, -1.0, 2.0, 0.0], [1, 1, 3, 3])
    everything, top, rest = (found.agreement(among) for among in ("all", "top", "rest"))
    assert everything.pearson == pytest.approx(np.corrcoef(drawn, truth)[0, 1])
    # Of equal values each takes the middle of their ranks.
    ranks = [np.repeat([7.0, 0.0, 5.0, 2.0], [1, 1, 3, 3]), np.repeat([7.0, 0.0, 5.0, 2.0], [1, 1, 3, 3])]
    assert everything.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert everything.mean_abs_error == pytest.approx((1 + 7 + 0 + 0) / 8)
    assert (top.nodes, rest.nodes, everything.nodes) == (2, 2, 4)
    assert top.mean_abs_effect == pytest.approx(5.5)
    assert rest.mean_abs_error == 0
    # By size the exact ones are 10 (top), three of 2 (not), 1 (top): of the first two, one is a top one; of five, two.
    assert [found.recall(k) for k in (1, 2, 4, 5)] == pytest.approx([1, 1 / 2, 1 / 4, 2 / 5])


def test_the_sample_is_drawn_by_its_seed_and_the_tables_name_every_node(model, prompts):
    values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB))
    first, again, other = (
        attribute_and_check(model, prompts, values, SINK, top=5, sample=7, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.checked, again.checked)
    assert not torch.equal(first.checked, other.checked)
    assert torch.equal(first.checked[:5], first.attribution.order[:5])
    assert len(set(first.checked.tolist())) == 12
    table = first.to_dataframe()
    assert list(table.columns) == ["node", "component", "layer", "index", "estimate", "exact", "error", "top"]
    assert len(table) == 12 and table["top"].sum() == 5
    assert (table["exact"].abs().diff().dropna() <= 0).all()
    row = table[table["node"] == str(first.attribution.nodes[first.checked[8]])].iloc[0]
    assert row["exact"] == pytest.approx(float(first.exact[8].mean()))
    whole = first.attribution.to_dataframe()
    assert list(whole["node"]) == [str(node) for node in values]
    assert np.allclose(whole["estimate"], first.attribution.estimate.double().mean(1))
    assert attribute_and_check(model, prompts, {Node("mlp", 0): torch.zeros(3, 32)}, SINK).recall() == 1.0


# The values


@pytest.mark.parametrize("reference", ["shifted", "resample", "position", "mean", "zero"])
def test_values_are_those_of_the_contrast(family_model, reference):
    model = family_model("llama-grouped")
    nodes = ["embed", "mlp.1", "attn.0.3", "attn.1.0", "neuron.0.0", "neuron.1.47"]
    one_by_one = patch_values(model, PAIR, nodes, reference, offset=2)
    found = patch_values_at_p0(model, PAIR, ["embed", "mlp", "head", "neuron"], reference, [0, 1], offset=2)
    info = describe(model)
    assert len(found) == 1 + 2 * (1 + info.n_heads + info.d_mlp)
    for node, value in one_by_one.items():
        assert torch.allclose(found[node], value, atol=1e-6), str(node)


# Traces and errors


def test_nothing_stays_on_the_model_whatever_the_mode_of_the_caller(family_model):
    model = family_model("llama-grouped")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    try:
        flags = [parameter.requires_grad for parameter in model.parameters()]
        assert any(flags)
        values = patch_values_at_p0(model, PAIR)
        plain = attribute(model, PROMPTS, values, SINK)
        with torch.no_grad():
            assert torch.equal(attribute(model, PROMPTS, values, SINK).estimate, plain.estimate)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            prompts = from_ids(PROMPTS.ids.clone(), PROMPTS.attention_mask.clone(), VOCAB)
            values = patch_values_at_p0(model, shift_prompts(prompts, 4, VOCAB))
            assert torch.equal(attribute(model, prompts, values, SINK).estimate, plain.estimate)
        assert not plain.estimate.requires_grad and not plain.clean.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
    finally:
        frozen.requires_grad_(True)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_a_model_whose_parameters_need_no_gradient_has_estimates_too(family_model):
    model = family_model("llama-grouped")
    values = patch_values_at_p0(model, PAIR)
    plain = attribute(model, PROMPTS, values, SINK)
    model.requires_grad_(False)
    try:
        assert torch.equal(attribute(model, PROMPTS, values, SINK).estimate, plain.estimate)
    finally:
        model.requires_grad_(True)


def test_bad_input_is_refused_and_leaves_no_hook(family_model):
    model = family_model("llama-grouped")
    node, good = Node("mlp", 0), torch.zeros(PROMPTS.n, 32)

    def broken(stream, rows):
        raise RuntimeError("broken reading")

    failing = Metric("x", (Reading("blocks.1.hook_resid_pre", broken),), lambda reading: reading)
    steep = Metric(
        "root of nothing",
        (Reading("blocks.2.hook_resid_pre", lambda stream, rows: (0 * stream[:, -1, 0]).abs().sqrt()),),
        lambda reading: reading,
    )
    cases = [
        ("no node", {}, SINK, 0),
        ("layers 0 to 2", {Node("mlp", 3): good}, SINK, 0),
        ("shape", {node: good[:, :-1]}, SINK, 0),
        ("not finite", {node: torch.full_like(good, torch.nan)}, SINK, 0),
        ("steps=-1", {node: good}, SINK, -1),
        ("sink rate .* has no gradient", {node: good}, sink_rate_of([1]), 0),
        ("gradient of root of nothing by mlp.0 .* not finite", {node: good}, steep, 0),
        ("broken reading", {node: good}, failing, 2),
    ]
    for message, values, metric, steps in cases:
        with pytest.raises((InterventionError, RuntimeError), match=message):
            attribute(model, PROMPTS, values, metric, steps)
    for top, sample in ((0, 5), (5, 0)):
        with pytest.raises(InterventionError, match="at least 1 of each"):
            attribute_and_check(model, PROMPTS, {node: good}, SINK, top=top, sample=sample)
    with pytest.raises(InterventionError, match="expected some of embed"):
        patch_values_at_p0(model, PAIR, [])
    with pytest.raises(InterventionError, match="layers 0 to 2"):
        patch_values_at_p0(model, PAIR, ["head"], layers=[3])
    whole = attribute_and_check(model, PROMPTS, {node: good}, SINK)
    with pytest.raises(InterventionError, match="all have been patched"):
        whole.agreement("rest")
    with pytest.raises(InterventionError, match="expected 1 to 1"):
        whole.recall(2)
    model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            attribute(model, PROMPTS, {node: good}, SINK)
    finally:
        model.eval()
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_experts_keep_their_neurons_to_themselves(family_model):
    model = family_model("mixtral")
    with pytest.raises(InterventionError, match=r"belong to its 4 experts .* such as head, attn and mlp"):
        patch_values_at_p0(model, PAIR)
    with pytest.raises(InterventionError, match="belong to its 4 experts"):
        attribute(model, PROMPTS, {Node("neuron", 0, 0): torch.zeros(3)}, SINK)
    found = attribute_and_check(model, PROMPTS, patch_values_at_p0(model, PAIR, ["head", "attn", "mlp"]), SINK, top=4)
    assert len(found.checked) == 3 * (4 + 2)
