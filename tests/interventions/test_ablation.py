"""Every ablation and surgery against a literal computation, on every family and backend, with left-padded prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from p0circuit.interventions import edits
from p0circuit.interventions.ablation import (
    ablate,
    add_component,
    match_statistics,
    replace_direction,
    replace_norm,
    replace_orthogonal,
    set_component,
)
from p0circuit.interventions.attention_edits import (
    attend_to_self_only,
    copy_attention_row,
    mask_key,
    redirect_attention,
    remove_heads,
    zero_value,
)
from p0circuit.interventions.intervention import Intervention, p0_direction
from p0circuit.interventions.nodes import InterventionError, Node
from p0circuit.interventions.pairs import patch_values, shift_prompts, values_at
from p0circuit.models import ModelError, describe, forward
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.hooks import hook_point
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording.quantities import SINK_SCORE, TOKEN_LOSSES, residual_at
from p0circuit.recording.record import record
from tests.families import CASES, VOCAB

N, LENGTH = 5, 11
PADDING = (0, 3, 0, 1, 2)
FEW = [("gpt2", "hooked"), ("llama-grouped", "hooked"), ("llama-grouped", "bridge"), ("opt", "bridge")]

cases = pytest.mark.parametrize(("family", "backend"), CASES, ids=[f"{name}-{backend}" for name, backend in CASES])
few = pytest.mark.parametrize(("family", "backend"), FEW, ids=[f"{name}-{backend}" for name, backend in FEW])
ROWS = range(N)


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    """Rows of random tokens, some of them padded on the left."""
    made = random_tokens(VOCAB, N, LENGTH, seed=3)
    return replace(made, attention_mask=torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None])


def vectors(model: Any) -> list[Node]:
    """One node of every kind that has a direction."""
    names = ["embed", "attn.0", "attn.1.2", "mlp.0", "resid_pre.2", "resid_post.1"]
    return [Node.parse(name) for name in names + ["resid_mid.1"] * (not describe(model).parallel_blocks)]


def every_kind(model: Any) -> list[Node]:
    neurons = [] if describe(model).experts else [Node("neuron", 1, 7), Node("neuron", 1, 40)]
    return vectors(model) + neurons


def points(model: Any) -> list[str]:
    """The hook points of the first two blocks that the tests look at, where the model has them."""
    hooks = ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    hooks += ["attn.hook_z", "attn.hook_v", "attn.hook_pattern", "mlp.hook_post"]
    found = []
    for name in (f"blocks.{layer}.{hook}" for layer in range(3) for hook in hooks):
        try:
            hook_point(model, name)
        except ModelError:
            continue
        found.append(name)
    return found


@torch.no_grad()
def look(model: Any, prompts: PromptSet, *interventions: Intervention, hooks: Sequence[Any] = ()) -> dict[str, Tensor]:
    """Every activation of interest and the logits, under interventions put on the model by `with`."""
    if interventions:
        with interventions[0]:
            return look(model, prompts, *interventions[1:], hooks=hooks)
    seen: dict[str, Tensor] = {}
    seers = [(name, lambda x, hook, name=name: seen.__setitem__(name, x.clone())) for name in points(model)]
    seen["logits"] = forward(model, prompts.ids, prompts.attention_mask, hooks=[*hooks, *seers])
    return seen


def at(activation: Tensor, place: Tensor) -> Tensor:
    return torch.stack([activation[row, int(place[row])] for row in range(len(activation))])


def said(seen: dict[str, Tensor], node: Node) -> Tensor:
    """What a node says at all positions."""
    return seen[node.hook] if node.index is None else seen[node.hook][:, :, node.index]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def same_before(place: Tensor, a: dict[str, Tensor], b: dict[str, Tensor], prompts: PromptSet, model: Any) -> bool:
    """Whether the logits of real positions before a place are equal: to the bit, where no expert serves both sides."""
    tokens = torch.arange(LENGTH)
    earlier = prompts.attention_mask & (tokens < place[:, None])
    one, other = a["logits"][earlier], b["logits"][earlier]
    return close(one, other, 1e-6) if describe(model).experts else torch.equal(one, other)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def all_hooks(model: Any) -> int:
    names = {*model.hook_dict, *points(model)}
    return sum(len(hook_point(model, name).fwd_hooks) for name in names if exists(model, name))


def exists(model: Any, name: str) -> bool:
    try:
        hook_point(model, name)
    except ModelError:
        return False
    return True


# Pure functions


def tensors(*shape: int) -> st.SearchStrategy[Tensor]:
    """Normally distributed entries at scales from 1e-3 to 1e3."""
    return st.builds(
        lambda seed, scale: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 10.0**scale,
        st.integers(0, 2**31),
        st.integers(-3, 3),
    )


rows_and_width = st.tuples(st.integers(1, 5), st.integers(2, 9))


@given(rows_and_width.flatmap(lambda s: st.tuples(tensors(*s), tensors(*s), tensors(s[0]))))
def test_vector_surgery_changes_what_it_names_and_nothing_else(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    value, other, number = drawn
    size = number.abs()
    exact = {"rtol": 1e-9, "atol": 1e-9 * float(max(value.abs().max(), other.abs().max(), size.max()))}

    resized = edits.with_norm(value, size)
    assert torch.allclose(resized.norm(dim=-1), size, **exact)
    assert torch.allclose(cosine_similarity(resized, value, dim=-1), torch.ones(1).double())

    turned = edits.with_direction(value, other)
    assert torch.allclose(turned.norm(dim=-1), value.norm(dim=-1), **exact)
    assert torch.allclose(cosine_similarity(turned, other, dim=-1), torch.ones(1).double())

    standardised = (value - value.mean(-1, keepdim=True)) / value.var(-1, unbiased=False, keepdim=True).sqrt()
    literal = standardised * other.var(-1, unbiased=False, keepdim=True).sqrt() + other.mean(-1, keepdim=True)
    assert torch.allclose(edits.with_statistics(value, other), literal, rtol=1e-6, atol=exact["atol"])

    unit = other / other.norm(dim=-1, keepdim=True)
    projected = edits.with_component(value, other, number)
    assert torch.allclose((projected * unit).sum(-1), number, **exact)
    rest = value - (value * unit).sum(-1, keepdim=True) * unit
    assert torch.allclose(projected - number[:, None] * unit, rest, **exact)
    assert torch.allclose(edits.with_added(value, other, number), value + number[:, None] * unit, **exact)


@given(rows_and_width.flatmap(lambda s: st.tuples(tensors(*s), tensors(*s), tensors(s[1]))))
def test_the_orthogonal_part_is_the_others_and_the_parallel_part_stays(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    value, other, direction = drawn
    exact = {"rtol": 1e-9, "atol": 1e-9 * float(max(value.abs().max(), other.abs().max()))}
    unit = direction / direction.norm()
    new = edits.with_orthogonal(value, other, direction)
    assert torch.allclose(new @ unit, value @ unit, **exact)
    assert torch.allclose(new - torch.outer(new @ unit, unit), other - torch.outer(other @ unit, unit), **exact)


@given(rows_and_width.flatmap(lambda s: st.tuples(tensors(*s), tensors(s[1]))))
def test_surgery_with_a_vectors_own_properties_changes_no_bit(drawn: tuple[Tensor, Tensor]) -> None:
    value, direction = drawn[0].float(), drawn[1].float()
    own = edits.component(value, direction)
    for new in (
        edits.with_norm(value, value.norm(dim=-1)),
        edits.with_direction(value, value),
        edits.with_statistics(value, value),
        edits.with_component(value, direction, own),
        edits.with_orthogonal(value, value, direction),
    ):
        assert torch.equal(new, value)


def test_vectors_without_direction_or_variance_stay_finite() -> None:
    zero, constant, like = torch.zeros(1, 4), torch.full((1, 4), 2.0), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert torch.equal(edits.with_norm(zero, torch.tensor([5.0])), zero)
    assert torch.equal(edits.with_direction(zero, like), zero)
    assert torch.equal(edits.with_statistics(constant, like), torch.full((1, 4), 3.0))


@st.composite
def attention(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, causally masked, behind left padding; a source and a later target in each row."""
    batch, heads, length = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(3, 8))
    starts = draw(st.lists(st.integers(0, length - 2), min_size=batch, max_size=batch))
    source = [draw(st.integers(start, length - 1)) for start in starts]
    target = [draw(st.integers(start, length - 1)) for start in source]
    scores = draw(tensors(batch, heads, length, length)).clamp(-20, 20)
    hidden = torch.ones(length, length).triu(1).bool() | (torch.arange(length) < torch.tensor(starts)[:, None, None])
    # As models do, padding attends to something finite and meaningless.
    scores = scores.masked_fill(hidden[:, None], -1e9)
    return scores, torch.tensor(starts), torch.tensor(source), torch.tensor(target)


@given(attention())
@settings(max_examples=60)
def test_attention_surgery_edits_the_entries_it_should(drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scores, _, source, target = drawn
    pattern = scores.softmax(-1)
    itself, copied = pattern.clone(), pattern.clone()
    moved, renormalised = pattern.clone(), pattern.clone()
    batch, heads, length, _ = pattern.shape
    for row in range(batch):
        s, t = int(source[row]), int(target[row])
        for head in range(heads):
            itself[row, head, t] = 0
            itself[row, head, t, t] = 1
            copied[row, head, s] = pattern[row, head, t]
            for query in range(length):
                if query >= t and s != t:
                    moved[row, head, query, t] += pattern[row, head, query, s]
                    moved[row, head, query, s] = 0
                if query > s:
                    others = [key for key in range(length) if key != s]
                    exponentials = (scores[row, head, query] - scores[row, head, query, others].max()).exp()
                    renormalised[row, head, query] = exponentials / exponentials[others].sum()
                    renormalised[row, head, query, s] = 0
    assert torch.equal(edits.attending_to_itself(pattern, target), itself)
    assert torch.equal(edits.attending_as(pattern, source, target), copied)
    assert torch.allclose(edits.redirected(pattern, source, target), moved, rtol=0, atol=1e-12)
    assert torch.allclose(edits.without_key(scores, source).softmax(-1), renormalised, rtol=0, atol=1e-12)

    values = torch.randn(batch, length, heads, 4, generator=torch.Generator().manual_seed(0)).double()
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    zeroed = values.clone()
    zeroed[torch.arange(batch), source] = 0
    read = edits.without_value(z, pattern, values, source)
    for row in range(batch):
        s = int(source[row])
        assert torch.equal(read[row, :s], z[row, :s])
        literal = torch.einsum("hqk,khd->qhd", pattern[row], zeroed[row])
        assert torch.allclose(read[row, s:], literal[s:], rtol=0, atol=1e-12)


@given(st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**31))
def test_the_median_leaves_out_the_position_itself_and_padding(batch: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(batch, length, 3, generator=generator)
    starts = torch.randint(length - 1, (batch,), generator=generator)
    mask = torch.arange(length) >= starts[:, None]
    position = starts + torch.randint(length, (batch,), generator=generator) % (length - starts)
    medians = edits.median_norm_of_others(stream, position, mask)
    for row in range(batch):
        others = [other for other in range(int(starts[row]), length) if other != int(position[row])]
        literal = statistics.median(float(stream[row, other].norm()) for other in others)
        assert float(medians[row]) == pytest.approx(literal, rel=1e-6)


# Interventions on what nodes say


@cases
def test_a_run_patched_with_itself_is_the_same_bit_for_bit(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model(family, backend)
    clean, hooks_before = look(model, prompts), all_hooks(model)
    for offset in (0, 4):
        own = values_at(model, prompts, every_kind(model), prompts.p0 + offset)
        nodes = vectors(model)
        for nothing in (
            ablate(model, prompts, every_kind(model), own, offset),
            replace_direction(model, prompts, nodes, own, offset),
            replace_norm(model, prompts, nodes[:1], own[nodes[0]].norm(dim=-1), offset),
            match_statistics(model, prompts, nodes, donor=offset, offset=offset),
            match_statistics(model, prompts, nodes, donor=offset, offset=offset, only_norm=True),
            replace_orthogonal(model, prompts, nodes, own, own, offset),
            copy_attention_row(model, prompts, ["attn.0", "attn.1.1"], donor=offset, offset=offset),
            redirect_attention(model, prompts, ["attn.0"], target=offset, offset=offset),
        ):
            assert same(clean, look(model, prompts, nothing))
    # P0 attends to nothing but itself already.
    assert same(clean, look(model, prompts, attend_to_self_only(model, prompts, ["attn.0", "attn.1", "attn.2"], 0)))
    assert all_hooks(model) == hooks_before


@cases
def test_ablation_puts_the_values_there_and_leaves_the_past_alone(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model, offset = family_model(family, backend), 4
    place = prompts.p0 + offset
    clean = look(model, prompts)
    for number, node in enumerate(every_kind(model)):
        values = said(clean, node)
        after = [[q for q in range(LENGTH) if q > prompts.p0[row]] for row in ROWS]
        literal = {
            "resample": torch.stack([values[(row + 1) % N, place[(row + 1) % N]] for row in ROWS]),
            "mean": torch.stack([values[row, after[row]].mean(0) for row in ROWS]),
            "zero": torch.zeros_like(at(values, place)),
        }
        # Each kind of node with one of the three, to save time: that a value arrives does not depend on which it is.
        to = ("resample", "mean", "zero")[number % 3]
        value = literal[to]

        def put(activation: Tensor, hook: Any, node: Node = node, value: Tensor = value) -> Tensor:
            changed = activation.clone()
            for row in ROWS:
                if node.index is None:
                    changed[row, place[row]] = value[row]
                else:
                    changed[row, place[row], node.index] = value[row]
            return changed

        seen = look(model, prompts, ablate(model, prompts, [node], to, offset))
        expected = look(model, prompts, hooks=[(node.hook, put)])
        assert close(at(said(seen, node), place), value)
        assert all(close(seen[name], expected[name]) for name in seen)
        assert same_before(place, seen, clean, prompts, model)
        assert not torch.equal(at(seen["logits"], place), at(clean["logits"], place))
        for name in points(model):
            if int(name.split(".")[1]) < node.layer:
                assert torch.equal(seen[name], clean[name])


@few
def test_a_given_tensor_may_be_one_for_all_rows_and_an_offset_one_per_row(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model(family, backend)
    vector, per_row = torch.randn(32), torch.tensor([0, 3, 10, 1, 8])
    seen = look(model, prompts, ablate(model, prompts, ["mlp.1", "attn.0"], vector, per_row))
    for name in ("blocks.1.hook_mlp_out", "blocks.0.hook_attn_out"):
        assert torch.equal(at(seen[name], prompts.p0 + per_row), vector.expand(N, -1))
    pair = shift_prompts(prompts, 2, VOCAB)
    shifted = patch_values(model, pair, ["mlp.1"], "shifted")
    seen = look(model, prompts, ablate(model, prompts, ["mlp.1"], shifted))
    assert torch.equal(at(seen["blocks.1.hook_mlp_out"], prompts.p0), shifted[Node("mlp", 1)])


@few
def test_norm_direction_and_statistics_of_every_kind_of_vector(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model(family, backend)
    clean = look(model, prompts)
    for number, node in enumerate(vectors(model)):
        # At P0 and at another position in turn.
        offset, donor = (0, 5) if number % 2 else (5, 0)
        place, source = prompts.p0 + offset, prompts.p0 + donor
        stream = said(clean, node)
        value, like = at(stream, place), at(stream, source)
        direction = torch.randn(value.shape[-1])
        others = [[q for q in range(int(prompts.p0[r]), LENGTH) if q != place[r]] for r in ROWS]
        medians = torch.tensor([statistics.median(float(stream[r, q].norm()) for q in others[r]) for r in ROWS])
        unit, along = normalize(direction, dim=0), (value @ normalize(direction, dim=0))[:, None]
        size = torch.linspace(-2, 2, N)
        mean, spread = value.mean(-1, keepdim=True), value.std(-1, keepdim=True)
        standardised = (value - mean) / spread
        literal = [
            (replace_direction(model, prompts, [node], direction, offset), unit * value.norm(dim=-1, keepdim=True)),
            (replace_norm(model, prompts, [node], offset=offset), normalize(value, dim=-1) * medians[:, None]),
            (replace_norm(model, prompts, [node], 3, offset), normalize(value, dim=-1) * 3),
            (replace_norm(model, prompts, [node], size.abs(), offset), normalize(value, dim=-1) * size.abs()[:, None]),
            (
                match_statistics(model, prompts, [node], donor, offset),
                standardised * like.std(-1, keepdim=True) + like.mean(-1, keepdim=True),
            ),
            (
                match_statistics(model, prompts, [node], donor, offset, only_norm=True),
                normalize(value, dim=-1) * like.norm(dim=-1, keepdim=True),
            ),
            (set_component(model, prompts, [node], direction, offset=offset), value - along * unit),
            (set_component(model, prompts, [node], direction, size, offset), value + (size[:, None] - along) * unit),
            (add_component(model, prompts, [node], direction, 4.0, offset), value + 4 * unit),
            (
                replace_orthogonal(model, prompts, [node], direction, offset=offset),
                value.roll(-1, 0) + (along - along.roll(-1, 0)) * unit,
            ),
        ]
        for intervention, expected in literal:
            seen = look(model, prompts, intervention)
            assert close(at(said(seen, node), place), expected)
            untouched = torch.ones(N, LENGTH, dtype=torch.bool)
            untouched[torch.arange(N), place] = False
            assert torch.equal(said(seen, node)[untouched], stream[untouched])
            assert not close(seen["logits"], clean["logits"], 1e-4)


def test_a_half_precision_model_keeps_its_dtype_and_gets_norms_computed_in_float32() -> None:
    model = wired_model(backend="bridge", dtype=torch.bfloat16)
    prompts = random_tokens(64, 3, 8)
    clean, seen = look(model, prompts), look(model, prompts, replace_norm(model, prompts, ["resid_pre.1"]))
    medians = clean["blocks.1.hook_resid_pre"][:, 1:].float().norm(dim=-1).median(1).values
    assert seen["blocks.1.hook_resid_pre"].dtype == torch.bfloat16
    # Rounding 160 entries to 8 bits each moves the norm by far less than one of them.
    assert torch.allclose(seen["blocks.1.hook_resid_pre"][:, 0].float().norm(dim=-1), medians, rtol=2e-3)


@few
def test_several_interventions_act_in_the_order_in_which_they_come(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model, vector = family_model(family, backend), torch.randn(32)
    both = [ablate(model, prompts, ["mlp.0"], vector), replace_norm(model, prompts, ["mlp.0"], 2.0)]
    forth, back = look(model, prompts, *both), look(model, prompts, *reversed(both))
    assert close(at(forth["blocks.0.hook_mlp_out"], prompts.p0), normalize(vector, dim=0).mul(2).expand(N, -1))
    assert torch.equal(at(back["blocks.0.hook_mlp_out"], prompts.p0), vector.expand(N, -1))


# Interventions on attention


@cases
def test_mask_surgery_reaches_the_attention_output(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model, t = family_model(family, backend), 4
    info, place = describe(model), prompts.p0 + t
    groups = info.n_heads // info.n_kv_heads
    clean = look(model, prompts)

    alone = look(model, prompts, attend_to_self_only(model, prompts, ["attn.0", "attn.1.2"], t))
    for layer, heads in ((0, range(info.n_heads)), (1, [2])):
        values = alone[f"blocks.{layer}.attn.hook_v"].repeat_interleave(groups, dim=2)
        for head in heads:
            read = at(alone[f"blocks.{layer}.attn.hook_z"], place)[:, head]
            assert close(read, at(values, place)[:, head])
            shown = at(alone[f"blocks.{layer}.attn.hook_pattern"][:, head], place)
            assert torch.equal(shown, torch.nn.functional.one_hot(place, LENGTH).float())
    assert not close(at(alone["blocks.1.attn.hook_pattern"][:, 1], place), shown, 1e-3)
    assert same_before(place, alone, clean, prompts, model)

    mixed = look(model, prompts, copy_attention_row(model, prompts, ["attn.0", "attn.1"], donor=t))
    for layer in (0, 1):
        out = mixed[f"blocks.{layer}.hook_attn_out"]
        assert close(at(out, prompts.p0), at(out, place))
    assert torch.equal(at(mixed["blocks.0.hook_attn_out"], place), at(clean["blocks.0.hook_attn_out"], place))
    assert not close(mixed["logits"], clean["logits"], 1e-3)
    one = look(model, prompts, copy_attention_row(model, prompts, ["attn.0.3"], donor=t))["blocks.0.attn.hook_z"]
    assert close(at(one, prompts.p0)[:, 3], at(clean["blocks.0.attn.hook_z"], place)[:, 3])
    assert torch.equal(one[:, :, :3], clean["blocks.0.attn.hook_z"][:, :, :3])


@cases
def test_a_key_is_hidden_or_a_value_zeroed_for_the_chosen_heads_alone(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model, layer, head = family_model(family, backend), 1, 1
    info = describe(model)
    groups = info.n_heads // info.n_kv_heads
    clean = look(model, prompts)
    pattern, z = clean[f"blocks.{layer}.attn.hook_pattern"], clean[f"blocks.{layer}.attn.hook_z"]
    values = clean[f"blocks.{layer}.attn.hook_v"].repeat_interleave(groups, dim=2)
    others = [other for other in range(info.n_heads) if other != head]

    for offset in (0, 3):
        place = prompts.p0 + offset
        hidden = look(model, prompts, mask_key(model, prompts, [f"attn.{layer}.{head}"], offset))
        new = hidden[f"blocks.{layer}.attn.hook_pattern"]
        assert torch.equal(new[:, others], pattern[:, others])
        for row in ROWS:
            p = int(place[row])
            assert torch.equal(new[row, head, : p + 1], pattern[row, head, : p + 1])
            assert not new[row, head, p + 1 :, p].any()
            share = 1 - pattern[row, head, p + 1 :, p]
            expected = pattern[row, head, p + 1 :] / share[:, None]
            expected[:, p] = 0
            # Where nearly all attention went to the hidden key, this quotient, not the softmax, is inexact.
            assert close(new[row, head, p + 1 :][share > 1e-3], expected[share > 1e-3], 1e-4)
        seen_z = hidden[f"blocks.{layer}.attn.hook_z"][:, :, head]
        literal = torch.einsum("bqk,bkd->bqd", new[:, head], values[:, :, head])
        assert close(seen_z[prompts.attention_mask], literal[prompts.attention_mask])

        zeroed = look(model, prompts, zero_value(model, prompts, [f"attn.{layer}.{head}"], offset))
        kept = values[:, :, head].clone()
        kept[torch.arange(N), place] = 0
        literal = torch.einsum("bhqk,bkd->bqhd", pattern[:, [head]], kept)[:, :, 0]
        seen_z = zeroed[f"blocks.{layer}.attn.hook_z"]
        assert close(seen_z[:, :, head][prompts.attention_mask], literal[prompts.attention_mask])
        assert torch.equal(seen_z[:, :, others], z[:, :, others])
        assert torch.equal(zeroed[f"blocks.{layer}.attn.hook_pattern"], pattern)
        assert not close(zeroed["logits"], clean["logits"], 1e-4)

        def zero(v: Tensor, hook: Any, place: Tensor = place) -> Tensor:
            changed = v.clone()
            changed[torch.arange(N), place] = 0
            return changed

        whole = look(model, prompts, zero_value(model, prompts, [f"attn.{layer}"], offset))
        literally = look(model, prompts, hooks=[(f"blocks.{layer}.attn.hook_v", zero)])
        real = prompts.attention_mask
        assert close(whole["logits"][real], literally["logits"][real])


@few
def test_the_sink_moves_with_its_attention(family: str, backend: str, family_model: Any, prompts: PromptSet) -> None:
    model = family_model(family, backend)
    clean = look(model, prompts)["blocks.1.attn.hook_pattern"]
    seen = look(model, prompts, redirect_attention(model, prompts, ["attn.1.0"], target=4))[
        "blocks.1.attn.hook_pattern"
    ]
    assert torch.equal(seen[:, 1:], clean[:, 1:])
    for row in ROWS:
        p0, t = int(prompts.p0[row]), int(prompts.p0[row]) + 4
        assert torch.equal(seen[row, 0, :t], clean[row, 0, :t])
        assert not seen[row, 0, t:, p0].any()
        assert close(seen[row, 0, t:, t], clean[row, 0, t:, t] + clean[row, 0, t:, p0])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "llama-grouped", "neox", "opt"])
def test_a_head_is_subtracted_from_the_stream(family: str, backend: str, family_model: Any, prompts: PromptSet) -> None:
    model = family_model(family, backend)
    clean = look(model, prompts)
    seen = look(model, prompts, remove_heads(model, prompts, ["attn.0.1", "attn.0.2"]))
    added = sum(clean["blocks.0.attn.hook_z"][:, :, head] @ model.blocks[0].attn.W_O[head].detach() for head in (1, 2))
    real = prompts.attention_mask
    assert close(seen["blocks.0.hook_attn_out"][real], (clean["blocks.0.hook_attn_out"] - added)[real])
    if not describe(model).parallel_blocks:
        assert close(seen["blocks.0.hook_resid_mid"][real], (clean["blocks.0.hook_resid_mid"] - added)[real])


# Together with recording


@pytest.mark.parametrize(("family", "backend"), [("llama-grouped", "hooked"), ("llama-grouped", "bridge")])
def test_recording_in_batches_is_recording_under_with(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model(family, backend)
    made = [
        ablate(model, prompts, ["attn.0", "neuron.1.3"], "resample", torch.tensor([0, 3, 8, 1, 2])),
        replace_norm(model, prompts, ["resid_mid.1"]),
        match_statistics(model, prompts, ["attn.1"], donor=0, offset=5),
        attend_to_self_only(model, prompts, ["attn.0"], 3),
        zero_value(model, prompts, ["attn.2.1"]),
        mask_key(model, prompts, ["attn.2.3"]),
    ]
    quantities = [SINK_SCORE, TOKEN_LOSSES]
    plain = record(model, prompts, quantities)
    batched = record(model, prompts, quantities, batch_size=2, interventions=made)
    with made[0], made[1], made[2], made[3], made[4], made[5]:
        whole = record(model, prompts, quantities, batch_size=N)
    for quantity in quantities:
        assert torch.allclose(batched[quantity], whole[quantity], rtol=0, atol=1e-5, equal_nan=True)
        assert not torch.allclose(batched[quantity], plain[quantity], rtol=0, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("node", ["resid_mid.1", "mlp.0"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_what_an_intervention_gives_is_never_cached_or_read_from_the_cache(
    backend: str, node: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model("llama-grouped", backend)
    cut = ablate(model, prompts, [node])
    first = record(model, prompts, [SINK_SCORE])
    with cut:
        under = record(model, prompts, [SINK_SCORE])
    given = record(model, prompts, [SINK_SCORE], interventions=[cut])
    again = record(model, prompts, [SINK_SCORE])
    assert (first.cached, under.cached, given.cached) == (frozenset(),) * 3
    assert again.cached == {"sink_score"} and torch.equal(again[SINK_SCORE], first[SINK_SCORE])
    assert torch.equal(under[SINK_SCORE], given[SINK_SCORE])
    assert not torch.allclose(under[SINK_SCORE], first[SINK_SCORE], atol=1e-3)


def test_other_rows_lengths_or_prompts_are_refused(family_model: Any, prompts: PromptSet) -> None:
    model = family_model("llama-grouped", "bridge")
    before = all_hooks(model)
    for cut in (ablate(model, prompts, ["mlp.0"]), attend_to_self_only(model, prompts, ["attn.0.1"], 3)):
        with pytest.raises(InterventionError, match="made for 5 prompts of 11 tokens met 2 of 11"), cut:
            record(model, prompts, SINK_SCORE, batch_size=2)
        with pytest.raises(InterventionError, match="made for 5 prompts of 11 tokens met 5 of 9"), cut:
            forward(model, prompts.ids[:, :9])
        with pytest.raises(ValueError, match="other prompts"):
            record(model, random_tokens(VOCAB, N, LENGTH, seed=9), SINK_SCORE, interventions=[cut])
    assert all_hooks(model) == before


@few
def test_nothing_outlives_the_block(family: str, backend: str, family_model: Any, prompts: PromptSet) -> None:
    model = family_model(family, backend)
    clean, before = look(model, prompts), all_hooks(model)
    made = [
        ablate(model, prompts, every_kind(model)),
        mask_key(model, prompts, ["attn.1"]),
        zero_value(model, prompts, ["attn.0.1"]),
    ]
    for cut in made:
        with cut:
            assert all_hooks(model) > before
            with cut:  # the same once more: each block takes off what it put on
                pass
            assert not close(look(model, prompts)["logits"], clean["logits"], 1e-4)
        assert all_hooks(model) == before
        with pytest.raises(KeyboardInterrupt), cut:
            raise KeyboardInterrupt
        with pytest.raises(ModelError, match="no hook point"), cut:
            forward(model, prompts.ids, hooks=[("blocks.0.nowhere", lambda x, hook: None)])
        assert all_hooks(model) == before and same(clean, look(model, prompts))


# The direction of P0, and the circuit whose truth is known


@cases
def test_the_p0_direction_is_that_of_full_prompts(
    family: str, backend: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model(family, backend)
    streams = record(model, prompts, residual_at(0))
    for layer in range(describe(model).n_layers + 1):
        mean = normalize(streams[:, layer], dim=-1).mean(0)
        assert close(p0_direction(model, prompts, layer), mean / mean.norm(), 1e-4)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_surgery_on_the_wired_model_does_what_its_construction_says(positions: Any, backend: str) -> None:
    """Norm, content and values do not matter to its sink, being unmixed in block 0 and direction do."""
    try:
        model = wired_model(positions, backend=backend)
    except ModelError as error:
        pytest.skip(str(error))
    truth, t = wired_truth(), 6
    tokens = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(row))[:24] for row in range(6)])
    prompts = PromptSet(tokens, torch.ones_like(tokens, dtype=torch.bool), {})
    heads = [head for _, head in truth.sink_heads]
    names = [f"attn.{layer}.{head}" for layer, head in truth.sink_heads]

    def score(*interventions: Intervention) -> Tensor:
        """The mean attention of the sink heads to P0 and to position t, over queries after t."""
        pattern = look(model, prompts, *interventions)["blocks.2.attn.hook_pattern"][:, heads, t + 1 :]
        return pattern[..., [0, t]].mean((0, 1, 2))

    clean = score()
    direction = p0_direction(model, prompts, 2)
    assert clean[0] > 0.8 and clean[1] < 0.02
    assert abs(float(direction @ truth.p0_direction.float())) > 0.99

    elsewhere = edits.with_component(torch.randn(160), direction, torch.tensor(0.0))
    gone = [
        copy_attention_row(model, prompts, ["attn.0"], donor=t),
        match_statistics(model, prompts, ["attn.0"], donor=t, offset=0),
        replace_direction(model, prompts, ["resid_pre.2"], elsewhere),
        set_component(model, prompts, ["resid_post.1"], direction),
        ablate(model, prompts, [f"neuron.{layer}.{index}" for layer, index in truth.sink_neurons]),
        mask_key(model, prompts, names),
    ]
    assert all(score(cut)[0] < 0.08 for cut in gone)
    kept = [
        copy_attention_row(model, prompts, ["attn.1"], donor=t),
        replace_norm(model, prompts, ["resid_pre.2"]),
        replace_orthogonal(model, prompts, ["resid_pre.2"], direction),
        zero_value(model, prompts, names),
        ablate(model, prompts, [f"neuron.{layer}.{index}" for layer, index in truth.decoy_neurons]),
        remove_heads(model, prompts, [f"attn.{layer}.{head}" for layer, head in truth.decoy_heads]),
    ]
    assert all(abs(score(cut)[0] - clean[0]) < 0.02 for cut in kept)
    size = values_at(model, prompts, ["resid_pre.2"])[Node("resid_pre", 2)] @ direction
    shared = [
        attend_to_self_only(model, prompts, ["attn.0"], t),
        match_statistics(model, prompts, ["attn.0"], donor=0, offset=t, only_norm=True),
        match_statistics(model, prompts, ["attn.0"], donor=0, offset=t),
        add_component(model, prompts, ["resid_pre.2"], direction, size, offset=t),
    ]
    for cut in shared:
        at_p0, at_t = score(cut)
        assert abs(at_p0 - at_t) < 0.05 and at_t > 0.4
    moved = score(redirect_attention(model, prompts, names, target=t))
    assert moved[0] == 0 and abs(moved[1] - clean.sum()) < 1e-5


# Errors

Make = Callable[[Any, PromptSet], Any]
REFUSED: dict[str, tuple[Make, str]] = {
    "position after the end": (lambda m, p: ablate(m, p, ["mlp.0"], offset=9), "expected 0 to 7"),
    "position before P0": (lambda m, p: attend_to_self_only(m, p, ["attn.0"], -1), "expected 0 to 7"),
    "donor outside": (lambda m, p: copy_attention_row(m, p, ["attn.0"], donor=8), "position 8 after P0 lies outside"),
    "offsets of other rows": (lambda m, p: ablate(m, p, ["mlp.0"], offset=torch.arange(3)), "each of 5 rows"),
    "no such head": (lambda m, p: mask_key(m, p, ["attn.1.4"]), "heads 0 to 3"),
    "no such layer": (lambda m, p: remove_heads(m, p, ["attn.3.0"]), "layers 0 to 2"),
    "no such neuron": (lambda m, p: ablate(m, p, ["neuron.0.48"]), "neurons 0 to 47"),
    "no node": (lambda m, p: ablate(m, p, ["mlp"]), "names no node"),
    "no attention": (lambda m, p: zero_value(m, p, ["mlp.1"]), "mlp.1 has no attention"),
    "a neuron's direction": (lambda m, p: replace_norm(m, p, ["neuron.0.1"]), "neither norm nor direction"),
    "NaN": (lambda m, p: ablate(m, p, ["mlp.0"], torch.full((32,), torch.nan)), "NaN or infinity"),
    "infinite size": (lambda m, p: add_component(m, p, ["mlp.0"], torch.ones(32), torch.inf), "NaN or infinity"),
    "shape": (lambda m, p: ablate(m, p, ["mlp.0"], torch.zeros(31)), r"shape \[32\] or, one per row, \[5, 32\]"),
    "rows": (lambda m, p: ablate(m, p, ["attn.0.1"], torch.zeros(4, 12)), r"\[5, 12\], got \[4, 12\]"),
    "node without value": (lambda m, p: ablate(m, p, ["mlp.0"], {Node("mlp", 1): torch.zeros(32)}), "only for mlp.1"),
    "no direction": (lambda m, p: set_component(m, p, ["mlp.0"], "zero"), "points nowhere"),
    "negative norm": (lambda m, p: replace_norm(m, p, ["mlp.0"], -1.0), "at least 0"),
    "one row to resample": (lambda m, p: ablate(m, p.subset([0]), ["mlp.0"], "resample"), "at least 2 prompts"),
    "no layer of P0": (lambda m, p: p0_direction(m, p, 4), "stop_at_layer must lie in 0..3"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_when_it_is_made(
    make: Make, message: str, family_model: Any, prompts: PromptSet
) -> None:
    model = family_model("llama-grouped", "bridge")
    before = all_hooks(model)
    with pytest.raises(ValueError, match=message):
        make(model, prompts)
    assert all_hooks(model) == before


@few
def test_a_model_in_training_mode_is_refused(family: str, backend: str, family_model: Any, prompts: PromptSet) -> None:
    model = family_model(family, backend)
    before = all_hooks(model)
    cut = ablate(model, prompts, ["mlp.0"])
    model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            ablate(model, prompts, ["mlp.0"], "mean")
        with pytest.raises(ModelError, match="training mode"), cut:
            forward(model, prompts.ids)
    finally:
        model.eval()
    assert all_hooks(model) == before


def test_neurons_and_parallel_streams_that_do_not_exist_are_refused(family_model: Any, prompts: PromptSet) -> None:
    with pytest.raises(InterventionError, match="belong to its 4 experts"):
        ablate(family_model("olmoe", "bridge"), prompts, ["neuron.0.0"])
    with pytest.raises(InterventionError, match="nothing is between"):
        ablate(family_model("neox", "bridge"), prompts, ["resid_mid.0"])
