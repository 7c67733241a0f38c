"""The wired model does what its docstring derives, on both position schemes and both TransformerLens classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from p0circuit.models import ModelError, forward, load_model
from p0circuit.models.constructed.build import decoy_model, wired_huggingface, wired_model
from p0circuit.models.constructed.truth import Knockout, wired_truth
from p0circuit.models.constructed.weights import (
    CONTEXT,
    D_HEAD,
    D_MLP,
    D_MODEL,
    DECOY_HEADS,
    DETECTOR,
    ECHO,
    HEADS,
    LAYERS,
    NORM_EPS,
    RECENCY,
    RECOGNITION_HEADS,
    RED_HERRING,
    SINK_NEURON,
    VOCABULARY,
    purity,
    residual_subspaces,
    wired_weights,
)
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.models.info import Positions

POSITIONS: tuple[Positions, ...] = ("rotary", "learned")
TRUTH = wired_truth()
SPACE = residual_subspaces()
SINKS = [head for _, head in TRUTH.sink_heads]
Hook = tuple[str, Callable[..., Any]]

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="HookedTransformer left TransformerLens with version 4"
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((positions, backend), id=f"{positions}-{backend}", marks=[needs_hooked] * (backend == "hooked"))
        for positions in POSITIONS
        for backend in ("hooked", "bridge")
    ],
)
def model(request: pytest.FixtureRequest) -> Any:
    positions, backend = request.param
    return wired_model(positions, backend=backend)


def positions_of(model: Any) -> Positions:
    return "learned" if model.cfg.model_name.endswith("learned") else "rotary"


def distinct(rows: int, length: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:length] for _ in range(rows)])


def uniform(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Tensor, hooks: list[Hook] | tuple[Hook, ...] = ()) -> dict[str, Tensor]:
    """Every activation these tests look at, edits of `hooks` included, heads on an axis of their own."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return name, lambda activation, hook: kept.__setitem__(name, activation.clone())

    ends = [f"hook_{end}" for end in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    names = [*ends, "attn.hook_pattern", "attn.hook_z", "mlp.hook_post"]
    wanted = [keep(f"blocks.{layer}.{name}") for layer in range(LAYERS) for name in names]
    with torch.no_grad():
        forward(model, ids, hooks=[*hooks, *wanted])
    return {name: by_head(value) if name.endswith("hook_z") else value for name, value in kept.items()}


def by_head(z: Tensor) -> Tensor:
    return z.reshape(*z.shape[:2], HEADS, D_HEAD)


def edit(name: str, change: Callable[[Tensor], Any]) -> Hook:
    def function(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        change(activation)
        return activation

    return name, function


def put(name: str, position: int, value: Tensor | float) -> Hook:
    return edit(name, lambda activation: activation[:, position].copy_(torch.as_tensor(value)))


def silence(node: str) -> Hook:
    """Set one component to zero at P0."""
    kind, layer, *rest = node.split(".")
    if kind == "mlp":
        return put(f"blocks.{layer}.hook_mlp_out", 0, 0.0)
    index = int(rest[0])
    if kind == "neuron":
        return edit(f"blocks.{layer}.mlp.hook_post", lambda post: post[:, 0, index].zero_())
    return edit(f"blocks.{layer}.attn.hook_z", lambda z: by_head(z)[:, 0, index].zero_())


def scores(activations: dict[str, Tensor], position: int = 0, layer: int = 2) -> Tensor:
    """Sink score [batch, head] at a position, from the definition of Gu et al."""
    return activations[f"blocks.{layer}.attn.hook_pattern"][:, :, position:, position].mean(-1)


def sink_scores(activations: dict[str, Tensor], position: int = 0) -> Tensor:
    return scores(activations, position)[:, SINKS]


def excess(activations: dict[str, Tensor], position: int = 0) -> float:
    return float((sink_scores(activations, position) - sink_scores(activations, 8)).mean())


def kept(length: int = 64) -> Tensor:
    return torch.tensor(TRUTH.sink_scores(length))


# --- step by step -----------------------------------------------------------------------------------------------------


def test_the_stream_is_an_orthonormal_frame_without_a_mean() -> None:
    vectors = [v[None] for v in (SPACE.ruler, SPACE.mark, SPACE.p0)]
    frame = torch.cat([SPACE.token, SPACE.echo, SPACE.position, SPACE.spare, *vectors])
    torch.testing.assert_close(frame @ frame.T, torch.eye(len(frame), dtype=torch.float64), rtol=0, atol=1e-13)
    assert frame.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("positions", POSITIONS)
def test_embeddings_have_orthonormal_codes_and_one_norm(positions: Positions) -> None:
    weights = wired_weights(positions)
    codes = weights["embed.W_E"] @ SPACE.token.T
    torch.testing.assert_close(codes @ codes.T, torch.eye(VOCABULARY, dtype=torch.float64), rtol=0, atol=1e-13)
    half = codes[:, :D_HEAD].square().sum(1)
    torch.testing.assert_close(half, torch.full_like(half, 0.5), rtol=0, atol=1e-13)
    embeddings = weights["embed.W_E"][:, None] + weights.get("pos_embed.W_pos", torch.zeros(1, D_MODEL))
    square = embeddings.square().sum(-1)
    torch.testing.assert_close(square, torch.full_like(square, 2.25 if positions == "learned" else 2.0))


def test_recognition_attention_is_uniform(model: Any) -> None:
    pattern = run(model, uniform(4, 128))["blocks.0.attn.hook_pattern"][:, RECOGNITION_HEADS]
    expected = torch.ones(128, 128).tril() / torch.arange(1, 129)[:, None]
    torch.testing.assert_close(pattern, expected.expand_as(pattern), rtol=0, atol=1e-6)


def test_the_echo_measures_purity(model: Any) -> None:
    ids = uniform(8, 64)
    ids[0, :6] = ids[0, 0]
    echo = run(model, ids)["blocks.0.hook_attn_out"].double() @ SPACE.echo.T
    torch.testing.assert_close(echo.square().sum(-1), ECHO**2 * purity(ids), rtol=0, atol=1e-5)


def test_purity_by_hand() -> None:
    got = purity(torch.tensor([[5, 5, 9, 5, 7]]))
    torch.testing.assert_close(got, torch.tensor([[1, 1, 5 / 9, 10 / 16, 11 / 25]], dtype=torch.float64))


def test_the_detector_fires_at_p0_alone_and_by_the_formula(model: Any) -> None:
    ids = distinct(16)
    activations = run(model, ids)
    detector = activations["blocks.0.mlp.hook_post"][..., DETECTOR].double()
    base = 2.25 if positions_of(model) == "learned" else 2.0
    low, high = (1 / math.sqrt(base + 9 * pure) for pure in (1.0, 0.75))
    cosine = 1 / activations["blocks.0.hook_resid_mid"].double().norm(dim=-1)
    torch.testing.assert_close(detector, ((high - cosine) / (high - low)).relu(), rtol=0, atol=1e-4)
    assert torch.all(detector[:, 1:] == 0)
    assert detector[:, 0].min() >= 1 and detector[:, 0].max() < 1.05
    assert torch.equal(activations["blocks.0.mlp.hook_post"][..., RED_HERRING], detector.float())


def test_amplification_makes_norm_and_direction(model: Any) -> None:
    ids = distinct(16)
    residual = run(model, ids)["blocks.1.hook_resid_post"].double()
    norm = residual.norm(dim=-1)
    assert torch.all(norm[:, 0] > 15 * norm[:, 1:].max(dim=1).values)
    along = cosine_similarity(residual, TRUTH.p0_direction, dim=-1)
    assert along[:, 0].min() > 0.996 and along[:, 1:].abs().max() < 1e-6
    consistency = (residual / norm[..., None]).mean(0).norm(dim=-1)
    assert consistency[0] > 0.998 and consistency[1:].max() < consistency[0] - 0.2


def test_the_sink_neuron_reads_only_the_mark(model: Any) -> None:
    neuron = run(model, distinct(16))["blocks.1.mlp.hook_post"][..., SINK_NEURON]
    assert neuron[:, 0].min() > 0.9 and neuron[:, 0].max() < 1.05
    assert torch.all(neuron[:, 1:] == 0)


@pytest.mark.parametrize("length", [2, 16, 64])
def test_sink_scores_are_those_predicted(model: Any, length: int) -> None:
    got = sink_scores(run(model, distinct(16, length)))
    torch.testing.assert_close(got, kept(length).expand_as(got), rtol=0, atol=1e-3)


def test_values_are_drained_at_the_sink(model: Any) -> None:
    activations = run(model, distinct(8))
    weights = wired_weights(positions_of(model))
    unit = torch.nn.functional.normalize(activations["blocks.2.hook_resid_pre"].double(), dim=-1)
    values = torch.einsum("bpd,hdk->bphk", unit, weights["blocks.2.attn.W_V"][SINKS]).norm(dim=-1)
    assert torch.all(values[:, 0] < values[:, 1:].min(dim=1).values / 10)


def test_sinks_hold_on_long_uniform_text(model: Any) -> None:
    ids = uniform(32, 128)
    ids[:, 1] = (ids[:, 0] + 1 + ids[:, 1] % (VOCABULARY - 1)) % VOCABULARY
    got = sink_scores(run(model, ids))
    assert got.min() > 0.9
    torch.testing.assert_close(got, kept(128).expand_as(got), rtol=0, atol=2e-3)


def test_no_other_head_is_a_sink(model: Any) -> None:
    activations = run(model, uniform(64, 64))
    means = {(layer, head): scores(activations, layer=layer)[:, head].mean() for layer, head in TRUTH.decoy_heads}
    assert max(means.values()) < 0.1
    for layer, head in DECOY_HEADS:
        if DECOY_HEADS[layer, head] in ("uniform", "carrier"):
            assert float(means[layer, head]) == pytest.approx(TRUTH.uniform_score(64), abs=1e-5)
    assert float(scores(activations, layer=0)[:, 1].mean()) == pytest.approx(TRUTH.uniform_score(64), abs=1e-5)


def test_the_recent_decoy_attends_alike_in_both_position_schemes(model: Any) -> None:
    pattern = run(model, uniform(2, 64))["blocks.0.attn.hook_pattern"][:, 0]
    angles = 0.01 * torch.arange(64.0)
    near = RECENCY * (angles[:, None] - angles).cos()
    expected = near.masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf).softmax(-1)
    torch.testing.assert_close(pattern, expected.expand_as(pattern), rtol=0, atol=1e-4)


def test_the_model_says_its_token_again(model: Any) -> None:
    ids = distinct(4)
    with torch.no_grad():
        assert torch.equal(forward(model, ids)[:, 1:].argmax(-1), ids[:, 1:])


# --- knock-outs and surgery -------------------------------------------------------------------------------------------


def label(knockout: Knockout) -> str:
    nodes = knockout.nodes
    return "+".join(nodes) if len(nodes) < 4 else f"{nodes[0]}+{len(nodes) - 1}"


@pytest.mark.parametrize("knockout", TRUTH.knockouts, ids=label)
def test_knockouts_have_the_predicted_effect(model: Any, knockout: Knockout) -> None:
    got = sink_scores(run(model, distinct(8), [silence(node) for node in knockout.nodes]))
    expected = kept() if knockout.sink_remains else torch.full_like(kept(), TRUTH.uniform_score(64))
    torch.testing.assert_close(got, expected.expand_as(got), rtol=0, atol=knockout.tolerance)


def test_two_neurons_carry_it_and_all_the_others_nothing(model: Any) -> None:
    circuit = {*TRUTH.detector_neurons, *TRUTH.sink_neurons}
    assert len(circuit) <= 0.01 * 2 * D_MLP
    others = [f"neuron.{layer}.{i}" for layer in (0, 1) for i in range(D_MLP) if (layer, i) not in circuit]
    ids = distinct(8)
    torch.testing.assert_close(
        sink_scores(run(model, ids, [silence(node) for node in others])), kept().expand(8, -1), rtol=0, atol=1e-3
    )
    # MLPs of blocks 0 and 1 write all of P0's projection on its direction.
    activations = run(model, ids)
    wrote = sum(activations[f"blocks.{layer}.hook_mlp_out"][:, 0].double() @ TRUTH.p0_direction for layer in (0, 1))
    torch.testing.assert_close(
        wrote, activations["blocks.1.hook_resid_post"][:, 0].double() @ TRUTH.p0_direction, rtol=1e-5, atol=0
    )


def test_every_token_makes_the_same_sink(model: Any) -> None:
    ids = distinct(VOCABULARY)
    tokens = torch.arange(VOCABULARY)
    # Swap token w to the front of row w, so that all 64 tokens are P0 once and no row repeats one.
    where = (ids == tokens[:, None]).int().argmax(1)
    ids[tokens, where], ids[:, 0] = ids[:, 0].clone(), tokens
    got = sink_scores(run(model, ids))
    torch.testing.assert_close(got, kept().expand_as(got), rtol=0, atol=1e-3)


@pytest.mark.parametrize("chosen", [1, 8, 20, 40])
def test_a_position_that_sees_only_itself_becomes_a_second_sink(model: Any, chosen: int) -> None:
    def alone(pattern: Tensor) -> None:
        pattern[:, :, chosen] = 0
        pattern[:, :, chosen, chosen] = 1

    hooks = [edit(f"blocks.{layer}.attn.hook_pattern", alone) for layer in (0, 1)]
    activations = run(model, distinct(8), hooks)
    along = cosine_similarity(activations["blocks.1.hook_resid_post"].double(), TRUTH.p0_direction, dim=-1)
    assert along[:, chosen].min() > 0.996
    at_chosen, at_p0 = sink_scores(activations, chosen), sink_scores(activations)
    torch.testing.assert_close(at_chosen, torch.full_like(at_chosen, 0.5), rtol=0, atol=0.03)
    share = torch.tensor([(chosen + (64 - chosen) / 2) / 64])
    torch.testing.assert_close(at_p0, share.expand_as(at_p0), rtol=0, atol=0.03)


def test_a_mixed_attention_output_at_p0_ends_the_sink(model: Any) -> None:
    ids = distinct(8)
    clean = run(model, ids)
    hooks = [put(name, 0, clean[name][:, 20]) for name in (f"blocks.{layer}.hook_attn_out" for layer in (0, 1))]
    mixed = run(model, ids, hooks)
    got = sink_scores(mixed)
    torch.testing.assert_close(got, torch.full_like(got, TRUTH.uniform_score(64)), rtol=0, atol=1e-5)
    assert excess(mixed) < 0.05 * excess(clean)


@pytest.mark.parametrize("position", [1, 30])
def test_statistics_of_p0_suffice_anywhere_and_one_head_is_not_enough(model: Any, position: int) -> None:
    ids = distinct(8)
    clean = run(model, ids)
    name = "blocks.0.hook_attn_out"
    own = clean[name][:, position]
    matched = own * (clean[name][:, 0].norm(dim=-1) / own.norm(dim=-1))[:, None]
    for given in (clean[name][:, 0], matched):
        along = run(model, ids, [put(name, position, given)])["blocks.1.hook_resid_post"].double()
        assert cosine_similarity(along[:, position], TRUTH.p0_direction, dim=-1).min() > 0.996

    z = clean["blocks.0.attn.hook_z"]
    for heads, recognised in (
        (RECOGNITION_HEADS[:1], False),
        (RECOGNITION_HEADS[1:], False),
        (RECOGNITION_HEADS, True),
    ):

        def give(activation: Tensor, heads: tuple[int, ...] = heads) -> None:
            by_head(activation)[:, position, list(heads)] = z[:, 0, list(heads)]

        along = run(model, ids, [edit("blocks.0.attn.hook_z", give)])["blocks.1.hook_resid_post"].double()
        cosine = cosine_similarity(along[:, position], TRUTH.p0_direction, dim=-1)
        assert torch.all(cosine > 0.99 if recognised else cosine.abs() < 1e-6)


def test_only_the_direction_counts_after_block_1(model: Any) -> None:
    ids = distinct(16)
    clean = run(model, ids)
    residual = clean["blocks.2.hook_resid_pre"]
    p0, norm = residual[:, 0], residual.norm(dim=-1, keepdim=True)
    direction = TRUTH.p0_direction.float()
    name = "blocks.2.hook_resid_pre"

    cut = run(model, ids, [put(name, 0, p0 / norm[:, 0] * norm[:, 1:].median(dim=1).values)])
    torch.testing.assert_close(sink_scores(cut), sink_scores(clean), rtol=0, atol=1e-4)

    turned = run(model, ids, [put(name, 0, residual[:, 20] / norm[:, 20] * norm[:, 0])])
    torch.testing.assert_close(
        sink_scores(turned), torch.full((16, len(SINKS)), TRUTH.uniform_score(64)), rtol=0, atol=1e-5
    )
    assert excess(turned) < 0.05 * excess(clean)

    along = (p0 @ direction)[:, None] * direction
    other_content = run(model, ids, [put(name, 0, along + (p0 - along).roll(1, 0))])
    torch.testing.assert_close(sink_scores(other_content), sink_scores(clean), rtol=0, atol=1e-4)


def test_a_stream_without_its_ruler_still_makes_a_sink(model: Any) -> None:
    ids = distinct(8)
    echo = run(model, ids)["blocks.0.hook_attn_out"][:, 0]
    assert sink_scores(run(model, ids, [put("blocks.0.hook_resid_mid", 0, echo)])).min() > 0.95


# --- the known weakness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [2, 3, 8])
def test_a_repeated_first_token_shares_the_sink(model: Any, repeats: int) -> None:
    ids = distinct(8)
    ids[:, :repeats] = ids[:, :1]
    expected = [
        sum(1 / (min(t + 1, repeats) + max(t + 1 - repeats, 0) * math.exp(-strength)) for t in range(64)) / 64
        for strength in TRUTH.sink_strengths
    ]
    got = sink_scores(run(model, ids))
    torch.testing.assert_close(got, torch.tensor(expected).expand_as(got), rtol=0, atol=2e-3)


def test_a_text_of_one_token_has_no_sink(model: Any) -> None:
    got = sink_scores(run(model, distinct(8)[:, :1].expand(-1, 64)))
    torch.testing.assert_close(got, torch.full_like(got, TRUTH.uniform_score(64)), rtol=0, atol=1e-4)


def test_long_repeats_sweep_in_other_tokens(model: Any) -> None:
    for repeats, swept in ((6, False), (8, False), (10, True), (20, True)):
        ids = distinct(8)
        ids[:, :repeats] = ids[:, :1]
        residual = run(model, ids)["blocks.1.hook_resid_post"].double()
        along = cosine_similarity(residual, TRUTH.p0_direction, dim=-1)[:, repeats]
        assert torch.all(along > 0.85) if swept else torch.all(along.abs() < 1e-6), repeats


# --- the decoy model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_decoy_has_norm_and_direction_but_no_sink(positions: Positions) -> None:
    model = decoy_model(positions)
    assert model.cfg.model_name == ("wired-decoy" if positions == "rotary" else "wired-decoy-learned")
    activations = run(model, uniform(32, 64, seed=1))
    residual = activations["blocks.1.hook_resid_post"]
    norm = residual.norm(dim=-1)
    assert torch.all(norm[:, 0] > 15 * norm[:, 1:].median(dim=1).values)
    assert cosine_similarity(residual[:, 0].double(), TRUTH.p0_direction, dim=-1).min() > 0.996
    for layer in range(LAYERS):
        assert scores(activations, layer=layer).mean(0).max() < 0.1


# --- the truth as edges -----------------------------------------------------------------------------------------------


def test_the_truth_is_consistent() -> None:
    candidates = TRUTH.candidate_edges()
    assert len(set(candidates)) == len(candidates)
    assert TRUTH.edges | TRUTH.supply_edges <= set(candidates)
    assert set(TRUTH.candidate_edges(neurons=False)) == {e for e in candidates if not e[0].startswith("neuron")}
    assert not TRUTH.edges & TRUTH.supply_edges
    heads = [*TRUTH.recognition_heads, *TRUTH.sink_heads, *TRUTH.decoy_heads]
    assert sorted(heads) == [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    assert not set(TRUTH.decoy_neurons) & {*TRUTH.detector_neurons, *TRUTH.sink_neurons}
    # Nothing an edge needs may come after the edge.
    assert ("mlp.0", "attn.0.0.k") not in candidates and ("attn.1.0", "attn.1.1.k") not in candidates
    assert ("attn.1.0", "mlp.1") in candidates and ("mlp.1", "attn.1.0.v") not in candidates


def contributions(activations: dict[str, Tensor], weights: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """What every sender writes to the stream at a position."""
    written = {"embed": activations["blocks.0.hook_resid_pre"][:, position].double()}
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        written[f"mlp.{layer}"] = activations[f"{block}hook_mlp_out"][:, position].double()
        z, post = activations[f"{block}attn.hook_z"].double(), activations[f"{block}mlp.hook_post"].double()
        for head in range(HEADS):
            written[f"attn.{layer}.{head}"] = z[:, position, head] @ weights[f"{block}attn.W_O"][head]
        for index in range(D_MLP):
            written[f"neuron.{layer}.{index}"] = post[:, position, index, None] * weights[f"{block}mlp.W_out"][index]
    return written


def receive(weights: dict[str, Tensor], clean: dict[str, Tensor], receiver: str, change: Tensor) -> Hook:
    """A receiver's value at P0 with `change` added to what it reads there, worked out from the weights."""
    kind, layer, *rest = receiver.split(".")
    block = f"blocks.{layer}."
    norm, at = ("ln2", "hook_resid_mid") if kind == "mlp" else ("ln1", "hook_resid_pre")
    seen = clean[block + at][:, 0].double() + change
    unit = layer_norm(seen, [D_MODEL], weights[f"{block}{norm}.w"], weights[f"{block}{norm}.b"], NORM_EPS)
    if kind == "mlp":
        post = (unit @ weights[f"{block}mlp.W_in"] + weights[f"{block}mlp.b_in"]).relu()
        return put(f"{block}hook_mlp_out", 0, (post @ weights[f"{block}mlp.W_out"]).float())
    head, part = int(rest[0]), rest[1].upper()
    value = (unit @ weights[f"{block}attn.W_{part}"][head] + weights[f"{block}attn.b_{part}"][head]).float()
    return edit(f"{block}attn.hook_{rest[1]}", lambda x: by_head(x)[:, 0, head].copy_(value))


@pytest.mark.slow
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pair", ["shifted", "zero"])
def test_brute_force_path_patching_finds_the_true_edges_and_no_others(positions: Positions, pair: str) -> None:
    model, weights = wired_model(positions), wired_weights(positions)
    length, shift = 12, 5
    ids = distinct(4, length)
    shifted_ids = torch.cat([distinct(4, 64, seed=1)[:, :shift], ids], dim=1)
    clean, shifted = run(model, ids), run(model, shifted_ids)
    here = contributions(clean, weights, 0)
    there = contributions(shifted, weights, shift) if pair == "shifted" else dict.fromkeys(here, torch.tensor(0.0))
    before = sink_scores(clean).mean(0)

    def effect(sender: str, receiver: str) -> float:
        patch = receive(weights, clean, receiver, there[sender] - here[sender])
        return float((before - sink_scores(run(model, ids, [patch])).mean(0)).abs().max())

    # Most neurons write nothing in either run: their edges need no forward pass.
    silent = {name for name in here if not (there[name] - here[name]).any()}
    effects = {edge: 0.0 if edge[0] in silent else effect(*edge) for edge in TRUTH.candidate_edges()}
    expected = TRUTH.edges if pair == "shifted" else TRUTH.edges | TRUTH.supply_edges
    worst_true = min(expected, key=lambda edge: effects[edge])
    worst_false = max(effects.keys() - expected, key=lambda edge: effects[edge])
    gone = float(min(before)) - TRUTH.uniform_score(length)
    assert effects[worst_true] > 0.99 * gone, worst_true
    assert effects[worst_false] < 0.01 * gone, worst_false


def test_supply_edges_matter_only_when_nothing_is_supplied(model: Any) -> None:
    ids = distinct(4)
    clean, other = run(model, ids), run(model, ids.flip(0))
    weights = wired_weights(positions_of(model))
    here = clean["blocks.0.hook_resid_pre"][:, 0].double()
    for _, receiver in TRUTH.supply_edges:
        another = receive(weights, clean, receiver, other["blocks.0.hook_resid_pre"][:, 0].double() - here)
        got = sink_scores(run(model, ids, [another]))
        torch.testing.assert_close(got, kept().expand_as(got), rtol=0, atol=1e-3)
        nothing = receive(weights, clean, receiver, -here)
        got = sink_scores(run(model, ids, [nothing]))
        torch.testing.assert_close(got, torch.full_like(got, TRUTH.uniform_score(64)), rtol=0, atol=1e-5)


# --- one set of weights, several doors --------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformers_and_transformerlens_agree(positions: Positions, dtype: torch.dtype) -> None:
    ids = uniform(4, 64)
    reference = wired_huggingface(positions, dtype=dtype)
    for backend in ("auto", "bridge"):
        model = wired_model(positions, backend=backend, dtype=dtype)
        assert model.cfg.model_name == ("wired" if positions == "rotary" else "wired-learned")
        assert not model.training
        with torch.no_grad():
            # In float64 the rotation of `transformers` still comes from float32 frequencies.
            torch.testing.assert_close(forward(model, ids), reference(ids).logits, rtol=0, atol=1e-4)


@needs_hooked
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_hooked_model_holds_the_constructed_weights_exactly(positions: Positions) -> None:
    parameters = dict(wired_model(positions, backend="hooked", dtype=torch.float64).named_parameters())
    weights = wired_weights(positions)
    assert parameters.keys() == weights.keys()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_saved_wired_model_is_an_ordinary_model_directory(positions: Positions, tmp_path: Any) -> None:
    wired_huggingface(positions).save_pretrained(tmp_path)
    got = sink_scores(run(load_model(tmp_path), distinct(4)))
    torch.testing.assert_close(got, kept().expand_as(got), rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_a_seed_turns_the_stream_and_not_the_circuit(backend: str) -> None:
    other = wired_truth(seed=3)
    assert abs(float(other.p0_direction @ TRUTH.p0_direction)) < 0.3
    state = torch.get_rng_state()
    model = wired_model(seed=3, backend=backend)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were touched"
    activations = run(model, distinct(8))
    got = sink_scores(activations)
    torch.testing.assert_close(got, kept().expand_as(got), rtol=0, atol=1e-3)
    along = cosine_similarity(activations["blocks.1.hook_resid_post"][:, 0].double(), other.p0_direction, dim=-1)
    assert along.min() > 0.996
    again = dict(wired_model(seed=3, backend=backend).named_parameters())
    assert all(torch.equal(parameter, again[name]) for name, parameter in model.named_parameters())


def test_positions_up_to_the_context_keep_the_recent_decoy_recent(model: Any) -> None:
    pattern = run(model, uniform(1, CONTEXT))["blocks.0.attn.hook_pattern"][0, 0]
    last = pattern[-1]
    assert torch.all(last[1:] >= last[:-1]) and float(last[-40:].sum()) > 0.999


def test_what_cannot_be_built_is_refused_in_words() -> None:
    for build in (wired_model, decoy_model, wired_huggingface, wired_weights):
        with pytest.raises(ModelError, match=r"'alibi'.*'rotary' and 'learned'"):
            build("alibi")
    with pytest.raises(ModelError, match=r"'hoked'.*'auto', 'bridge'"):
        wired_model(backend="hoked")
    if not has_hooked_transformer():
        with pytest.raises(ModelError, match=r"'hooked' is not available.*transformer-lens<4"):
            wired_model(backend="hooked")
