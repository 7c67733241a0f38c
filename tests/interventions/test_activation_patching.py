"""Activation patching against TransformerLens's own, against a plain hook loop, and against what must hold exactly."""

from __future__ import annotations

import contextlib
import io

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from benchmarks.memory import PeakMemory
from p0circuit.interventions import activation_patching as ap
from p0circuit.interventions.activation_patching import (
    Patch,
    pair_patches,
    patch,
    patch_grid,
)
from p0circuit.interventions.metrics import (
    LOGITS,
    Metric,
    Reading,
    batches,
    loss,
    measure,
    norm_ratio_after,
    of_logits,
    sink_rate_of,
    sink_score_of,
)
from p0circuit.interventions.nodes import InterventionError, Node, has_node, nodes_of_kinds
from p0circuit.interventions.pairs import PromptPair, patch_values, shift_prompts
from p0circuit.models import ModelError, describe, forward, load_model
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.models.hooks import hook_points
from p0circuit.prompts import random_tokens
from p0circuit.recording import batch_size
from p0circuit.stats import bootstrap, ratio_interval
from tests.families import CASES, FAMILIES, VOCAB

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_hooked = pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has no HookedTransformer")
TOKENS = random_tokens(VOCAB, n=3, length=9, seed=1)
SHIFT = 4
PAIR = shift_prompts(TOKENS, SHIFT, VOCAB)
PADDED = shift_prompts(TOKENS.pad_left([9, 6, 7]), SHIFT, VOCAB)
SINK = sink_score_of([1, (2, 0), (2, 3)])


@pytest.fixture(scope="module")
def load(family_folder):
    models = {}

    def loaded(name, backend, dtype=torch.float32):
        if backend == "hooked" and not has_hooked_transformer():
            pytest.skip("this TransformerLens has no HookedTransformer")
        key = name, backend, dtype
        if key not in models:
            models[key] = load_model(family_folder(name), backend, dtype=dtype)
        return models[key]

    return loaded


@pytest.fixture
def model(load):
    return load("llama-grouped", "hooked" if has_hooked_transformer() else "bridge")


def hooks_on(model) -> int:
    """How many hooks stand on the model; some bridges need a few of their own."""
    points = {id(point): point for point in [*model.hook_dict.values(), *hook_points(model).by_name.values()]}
    return sum(len(point._forward_hooks) for point in points.values())


def some_nodes(model) -> list[Node]:
    """Every kind of node the model has, at several depths."""
    names = ["embed", "attn.0", "resid_mid.0", "mlp.0", "attn.0.3", "resid_pre.1", "attn.1", "attn.1.1", "mlp.2"]
    names += [] if describe(model).experts else ["neuron.0.5", "neuron.1.7"]
    return [node for node in map(Node.parse, names) if has_node(model, node)]


# --- The slow, obvious way --------------------------------------------------------------------------------------------


@torch.no_grad()
def literal_run(model, prompts, patch=None, place=None):
    """Patterns by layer, final streams by layer and logits of one whole forward, one patch in it."""
    seen = {}

    def edit(activation, hook):
        activation = activation.clone()
        for row, position in enumerate(place.tolist()):
            where = (
                (row, position + patch.offset)
                if patch.node.index is None
                else (row, position + patch.offset, patch.node.index)
            )
            activation[where] = patch.value[row]
        return activation

    hooks = [] if patch is None else [(patch.node.hook, edit)]
    for layer in range(describe(model).n_layers):
        for name in ("attn.hook_pattern", "hook_resid_post"):
            hooks.append((f"blocks.{layer}.{name}", lambda a, hook, key=(layer, name): seen.update({key: a.clone()})))
    seen[LOGITS] = forward(model, prompts.ids, prompts.attention_mask, hooks=hooks)
    return seen


def literal_sink(seen, prompts, place):
    """The metric `SINK` of every row, straight from its definition."""
    heads = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 3)]
    return torch.stack(
        [
            torch.stack([seen[layer, "attn.hook_pattern"][row, head, at:, at].mean() for layer, head in heads]).mean()
            for row, at in enumerate(place.tolist())
        ]
    )


def literal_loss(seen, prompts, place):
    surprise = -seen[LOGITS].log_softmax(-1)
    last = prompts.length - 1
    return torch.stack(
        [
            torch.stack([surprise[row, at, prompts.ids[row, at + 1]] for at in range(start, last)]).mean()
            for row, start in enumerate(place.tolist())
        ]
    )


def literal_norm_ratio(seen, prompts, place):
    norms = seen[1, "hook_resid_post"].norm(dim=-1)
    ratios = []
    for row, at in enumerate(place.tolist()):
        real = prompts.attention_mask[row].clone()
        real[at] = False
        ratios.append(norms[row, at] / np.median(norms[row, real].numpy()))
    return torch.stack(ratios)


METRICS = {
    "sink": (SINK, literal_sink),
    "loss": (loss(), literal_loss),
    "norm": (norm_ratio_after(1), literal_norm_ratio),
}


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_grid_equals_a_plain_hook_loop(load, name, backend):
    model = load(name, backend)
    standing = hooks_on(model)
    for pair, direction, offset, read in (
        (PAIR, "noising", 0, ["sink", "norm"]),
        (PADDED, "denoising", 1, ["sink", "loss"]),
    ):
        patches = pair_patches(model, pair, some_nodes(model), direction, [offset])
        base, place, other, other_place = ap._runs(pair, direction)
        runs = [literal_run(model, base, patch, place) for patch in patches]
        for metric, literal in map(METRICS.get, read):
            grid = patch_grid(model, pair, patches, metric, direction, patches_per_batch=3)
            expected = torch.stack([literal(seen, base, place) for seen in runs])
            scale = max(1.0, float(expected.abs().max()))
            assert torch.allclose(grid.patched, expected, atol=1e-5 * scale, rtol=0), (grid.metric, direction)
            assert torch.allclose(grid.base, literal(literal_run(model, base), base, place), atol=1e-5 * scale, rtol=0)
            source = literal(literal_run(model, other), other, other_place)
            assert torch.allclose(grid.source, source, atol=1e-5 * scale, rtol=0)
            assert (grid.patched - grid.base).abs().max() > 1e-3, "nothing moved: any two grids would agree"
    assert hooks_on(model) == standing


# --- TransformerLens's own --------------------------------------------------------------------------------------------

HOOKED = [name for name, family in FAMILIES.items() if family.hooked]


@needs_hooked
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", HOOKED)
@torch.no_grad()
def test_grids_equal_those_of_transformer_lens(load, name, dtype, tolerance):
    """Every layer and position of two unrelated sets of prompts, in TransformerLens's way to say it."""
    from transformer_lens import patching

    if name == "mixtral" and dtype == torch.float64:
        pytest.skip("transformers multiplies matrices of experts in float32 or less")
    model = load(name, "hooked", dtype)
    info, length = describe(model), 4
    ours, others = (random_tokens(VOCAB, n=2, length=length, seed=seed) for seed in (2, 3))
    pair, layers, offsets = PromptPair(ours, others, 0), range(info.n_layers), range(length)
    _, cache = model.run_with_cache(others.ids)
    patterns = {}

    def sink(logits):
        return literal_sink(patterns, ours, ours.p0).mean()

    def last_logit(logits):
        return logits[:, -1, 7].mean()

    def keep(pattern, hook):
        patterns[hook.layer(), "attn.hook_pattern"] = pattern

    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in layers]
    functions = {"attn": patching.get_act_patch_attn_out, "mlp": patching.get_act_patch_mlp_out}
    if not info.parallel_blocks:
        functions["resid_mid"] = patching.get_act_patch_resid_mid
    # TransformerLens fills a tensor of the default dtype.
    torch.set_default_dtype(dtype)
    try:
        with model.hooks(fwd_hooks=hooks), contextlib.redirect_stderr(io.StringIO()):
            sinks = [function(model, ours.ids, cache, sink) for function in functions.values()]
            last_logits = patching.get_act_patch_resid_pre(model, ours.ids, cache, last_logit)
            heads = patching.get_act_patch_attn_head_out_by_pos(model, ours.ids, cache, sink)
    finally:
        torch.set_default_dtype(torch.float32)

    metric = of_logits("last logit", lambda logits, rows: logits[:, 0, 7], [length - 1])
    for expected, grid in (
        (
            torch.stack(sinks).permute(2, 1, 0),
            patch(model, pair, SINK, nodes_of_kinds(model, list(functions)), offsets=offsets),
        ),
        (last_logits.T, patch(model, pair, metric, nodes_of_kinds(model, ["resid_pre"]), offsets=offsets)),
        (heads.permute(1, 0, 2), patch(model, pair, SINK, offsets=offsets)),
    ):
        assert torch.allclose(grid.patched.mean(1), expected.flatten(), atol=tolerance, rtol=0)
        assert (grid.patched - grid.base).abs().max() > 1e-3


# --- What must hold exactly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_patching_a_run_with_itself_changes_no_bit(load, name, backend):
    model = load(name, backend)
    for prompts in (TOKENS, PADDED.clean):
        pair = PromptPair(prompts, prompts, 0)
        patches = pair_patches(model, pair, some_nodes(model))
        for metric in (SINK, loss()):
            for at_once in (None, 1, 3):
                grid = patch_grid(model, pair, patches, metric, patches_per_batch=at_once)
                assert torch.equal(grid.patched, grid.base.expand_as(grid.patched))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "neox"])
@torch.no_grad()
def test_one_at_a_time_the_pass_itself_changes_no_bit(load, name, backend):
    """The same without step 4, which would hide a branch that does more than write its values."""
    model = load(name, backend)
    (rows,) = batches(model, TOKENS, TOKENS.p0)
    stream = forward(model, rows.ids, stop_at_layer=0)
    for metric in (SINK, loss()):
        for one in pair_patches(
            model, PromptPair(TOKENS, TOKENS, 0), ["embed", "attn.0", "mlp.0", "attn.0.2", "neuron.0.3"]
        ):
            assert torch.equal(
                ap._branch(model, stream, 0, rows, {0: one}, metric, {})[0], measure(model, TOKENS, metric)
            )


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "mistral"])
@torch.no_grad()
def test_patching_everything_gives_the_other_run(load, name, backend):
    model = load(name, backend)
    other = random_tokens(VOCAB, n=3, length=9, seed=5)
    everywhere = tuple(range(9))
    patches = [
        Patch(Node("embed"), forward(model, other.ids, stop_at_layer=0), everywhere),
        Patch(Node("resid_pre", 1), forward(model, other.ids, stop_at_layer=1), everywhere),
        Patch(Node("resid_post", 0), forward(model, other.ids, stop_at_layer=1), everywhere),
    ]
    for metric in (SINK, norm_ratio_after(2), loss([0, 5])):
        pair = PromptPair(TOKENS, other, 0)
        if metric.name != "loss":  # whose targets are the base run's tokens, which no patch changes
            grid = patch_grid(model, pair, patches, metric, patches_per_batch=1)
            assert torch.equal(grid.patched, grid.source.expand(3, -1)), metric.name
            assert (grid.source - grid.base).abs().max() > 0.01
        together = patch_grid(model, pair, patches, metric, patches_per_batch=3)
        assert torch.allclose(together.patched[1:], together.patched[:1].expand(2, -1), atol=1e-5, rtol=1e-5)


def test_what_comes_later_does_not_reach_p0(model):
    def norm(stream, rows):
        return stream[rows.at(0)].norm(dim=-1)

    metric = Metric("norm at P0", (Reading("blocks.2.hook_resid_post", norm),), lambda reading: reading)
    later, here = (patch(model, PAIR, metric, "components", offsets=offsets) for offsets in ([1, 3], [0]))
    assert torch.allclose(later.patched, later.base.expand_as(later.patched), rtol=1e-6)
    assert (here.patched - here.base).abs().max() > 0.1


@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    rotary=st.booleans(),
    window=st.sampled_from([None, 3]),
    pads=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    length=st.integers(8, 11),
    shift=st.integers(1, 5),
    offset=st.integers(0, 2),
    direction=st.sampled_from(["noising", "denoising"]),
    at_once=st.sampled_from([None, 1, 2, 4]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
@needs_hooked
def test_any_shape_grouping_and_padding(heads, rotary, window, pads, length, shift, offset, direction, at_once, seed):
    model = tiny_model(*heads, rotary, window, seed)
    prompts = random_tokens(13, n=len(pads), length=length, seed=seed).pad_left([length - pad for pad in pads])
    pair = shift_prompts(prompts, shift, 13, seed)
    nodes = [
        "embed",
        "attn.0",
        f"attn.0.{heads[0] - 1}",
        "resid_mid.0",
        "mlp.0",
        "neuron.0.4",
        "resid_pre.1",
        "attn.1.0",
    ]
    patches = pair_patches(model, pair, nodes, direction, [offset])
    base, place, *_ = ap._runs(pair, direction)
    grid = patch_grid(model, pair, patches, sink_score_of([(1, heads[0] - 1)]), direction, at_once)
    for one, patched in zip(patches, grid.patched, strict=True):
        seen = literal_run(model, base, one, place)[1, "attn.hook_pattern"]
        expected = torch.stack([seen[row, -1, at:, at].mean() for row, at in enumerate(place.tolist())])
        assert torch.allclose(patched, expected, atol=1e-5, rtol=0), str(patch.node)


def tiny_model(heads, kv_heads, rotary, window, seed):
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

    shape = dict(n_layers=2, d_model=12, n_heads=heads, d_head=4, d_mlp=10, n_ctx=24, d_vocab=13, act_fn="relu")
    if kv_heads != heads:
        shape["n_key_value_heads"] = kv_heads
    if rotary:
        shape |= {"positional_embedding_type": "rotary", "rotary_dim": 4}
    if window:
        shape |= {"use_local_attn": True, "window_size": window, "attn_types": ["global", "local"]}
    return HookedTransformer(HookedTransformerConfig(**shape, seed=seed, initializer_range=0.6)).eval()


def test_rows_in_several_batches_come_out_the_same(model, monkeypatch):
    whole = patch(model, PADDED, SINK, "components", offsets=[0, 1])
    monkeypatch.setattr(batch_size, "BATCH_BYTES", 1)
    calls = len(batches(model, PADDED.clean, PADDED.clean.p0))
    by_row = patch(model, PADDED, SINK, "components", offsets=[0, 1])
    assert calls == 3 and torch.allclose(by_row.patched, whole.patched, atol=1e-6)
    assert torch.allclose(by_row.base, whole.base, atol=1e-6) and torch.allclose(by_row.source, whole.source, atol=1e-6)


# --- What is not measured is not computed -----------------------------------------------------------------------------


@needs_hooked
def test_a_pass_starts_at_its_patch_and_ends_with_the_metric(load):
    model, calls = load("llama", "hooked"), []
    handles = [
        block.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        patches = pair_patches(model, PAIR, ["attn.1.0", "attn.1.1", "attn.1.2"])
        calls.clear()
        patch_grid(model, PAIR, patches, norm_ratio_after(1), patches_per_batch=2)
        # The base run, two branches from block 1 on, and the other run; block 2 never.
        assert calls == [0, 1, 1, 1, 0, 1]
        calls.clear()
        patch_grid(model, PAIR, patches, norm_ratio_after(2), patches_per_batch=2)
        # Block 1 once for the one token that changes in it, then two branches from block 2 on.
        assert calls == [0, 1, 1, 2, 2, 2, 0, 1, 2]
        calls.clear()
        grid = patch_grid(model, PAIR, patches, sink_score_of([1]))
        # The pattern is read before any z of the same block: nothing to run.
        assert calls == [0, 1, 0, 1] and torch.equal(grid.patched, grid.base.expand(3, -1))
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@needs_hooked
@pytest.mark.parametrize(("length", "vocab"), [(32, 3000), (64, 200)])
def test_no_grid_takes_more_than_one_and_a_half_forwards(length, vocab, monkeypatch):
    monkeypatch.setattr(ap, "_SMALL", 0)  # the rule as for models of any size
    model = middling_model(3, vocab)
    pair = shift_prompts(random_tokens(vocab, n=6, length=length), SHIFT, vocab)
    whole = peak(lambda: forward(model, pair.clean.ids))
    grids = {
        "components": lambda: patch(model, pair, SINK, "components"),
        "heads": lambda: patch(model, pair, SINK, "heads"),
        "neurons": lambda: patch(model, pair, SINK, [f"neuron.{layer}.{n}" for layer in range(3) for n in range(30)]),
        "loss": lambda: patch(model, pair, loss(), "components", layers=[0, 2]),
        "norm": lambda: patch(model, pair, norm_ratio_after(2), "components", layers=[0, 2]),
    }
    for name, grid in grids.items():
        assert peak(grid) < 1.5 * whole, name


@torch.no_grad()
@needs_hooked
def test_memory_does_not_grow_with_layers_or_patches(monkeypatch):
    monkeypatch.setattr(ap, "_SMALL", 0)
    pair = shift_prompts(random_tokens(200, n=6, length=32), SHIFT, 200)
    shallow, deep = middling_model(2, 200), middling_model(6, 200)
    few, many = (peak(lambda m=m: patch(m, pair, sink_score_of([0, 1]), "components")) for m in (shallow, deep))
    assert many < 1.05 * few
    neurons = [f"neuron.{layer}.{n}" for n in range(200) for layer in range(2)]
    few, many = (peak(lambda n=n: patch(shallow, pair, sink_score_of([1]), neurons[:n])) for n in (64, 400))
    assert many < 1.05 * few


def middling_model(layers, vocab):
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

    shape = dict(n_layers=layers, d_model=64, n_heads=4, d_head=16, d_mlp=256, n_ctx=128, d_vocab=vocab, act_fn="gelu")
    return HookedTransformer(HookedTransformerConfig(**shape, seed=0)).eval()


def peak(run) -> int:
    with PeakMemory() as memory:
        run()
    return memory.peak


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@torch.no_grad()
def test_a_pass_that_ended_early_leaves_nothing_behind(load, backend):
    """It ends between the places where a bridge looks at the stream before and after attention."""
    model, other = load("llama", backend), random_tokens(VOCAB, n=2, length=5, seed=8)
    before = forward(model, other.ids)
    patch(model, PAIR, SINK, nodes_of_kinds(model, ["attn", "resid_mid"]))
    assert torch.equal(forward(model, other.ids), before)


# --- The model whose circuit is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_on_the_wired_model_the_grids_show_the_circuit(positions):
    model, truth = wired_model(positions), wired_truth()
    pair = shift_prompts(random_tokens(64, n=8, length=24, seed=1), 7, 64)
    metric = sink_score_of(truth.sink_heads)

    def effects(grid):
        return dict(zip(map(str, grid.nodes), grid.relative_effect.mean(1).tolist(), strict=True))

    necessary = effects(patch(model, pair, metric, "components"))
    sufficient = effects(patch(model, pair, metric, "components", "denoising"))
    circuit = {
        "attn.0",
        "resid_mid.0",
        "mlp.0",
        "resid_post.0",
        "resid_pre.1",
        "resid_mid.1",
        "mlp.1",
        "resid_post.1",
        "resid_pre.2",
    }
    for node in necessary:
        # The shifted run's own P0 keeps its sink, so the copy at m can win about half of the attention.
        expected = (0.7, 0.4) if node in circuit else (-0.02, -0.02)
        assert necessary[node] > expected[0] and sufficient[node] > expected[1], node
        assert node in circuit or max(necessary[node], sufficient[node]) < 0.02, node
    control = effects(patch(model, pair, metric, "components", offsets=[5]))
    assert max(map(abs, control.values())) < 0.02
    heads = effects(patch(model, pair, metric))
    assert {node for node, effect in heads.items() if effect > 0.5} == {
        f"attn.0.{head}" for _, head in truth.recognition_heads
    }
    neurons = patch(model, pair, metric, "neurons", layers=[0, 1]).to_dataframe(relative=True)
    found = neurons[neurons["effect"] > 0.5]
    assert set(zip(found["layer"], found["index"], strict=True)) == {*truth.detector_neurons, *truth.sink_neurons}


def test_any_values_can_be_patched_in(model):
    nodes = ["attn.0", "mlp.1"]
    zero = patch_values(model, PAIR, nodes, "zero")
    grid = patch_grid(model, PAIR, [Patch(node, value) for node, value in zero.items()], SINK)
    for node, patched in zip(zero, grid.patched, strict=True):
        run = literal_run(model, PAIR.clean, Patch(node, zero[node]), PAIR.clean.p0)
        assert torch.allclose(patched, literal_sink(run, PAIR.clean, PAIR.clean.p0), atol=1e-6)


# --- Metrics and results ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ready_made_metrics_say_what_they_mean(model):
    prompts, place = PADDED.shifted, PADDED.position
    seen = literal_run(model, prompts)
    for metric, literal in METRICS.values():
        assert torch.allclose(measure(model, prompts, metric, place), literal(seen, prompts, place), atol=1e-5)
    scores = torch.stack([measure(model, prompts, sink_score_of([(1, head)]), place) for head in range(4)], dim=1)
    rate = measure(model, prompts, sink_rate_of([1], eps=0.2), place)
    assert torch.equal(rate, (scores > 0.2).float().mean(1)) and 0 < rate.mean() < 1
    picked = measure(model, prompts, of_logits("picked", lambda logits, rows: logits[:, 1, 3], [0, 2]), place)
    assert torch.allclose(picked, seen[LOGITS][torch.arange(3), place + 2, 3], atol=1e-5)
    surprise = -seen[LOGITS].log_softmax(-1)[torch.arange(3), place + 1, prompts.ids[torch.arange(3), place + 2]]
    assert torch.allclose(measure(model, prompts, loss([1]), place), surprise, atol=1e-5)


def test_effects_and_their_intervals(model):
    prompts = random_tokens(VOCAB, n=40, length=8, seed=4)
    pair = shift_prompts(prompts, 3, VOCAB)
    noised, denoised = (patch(model, pair, SINK, "heads", way, layers=[0]) for way in ("noising", "denoising"))
    assert torch.equal(noised.clean, noised.base) and torch.equal(noised.shifted, noised.source)
    assert torch.allclose(noised.clean, denoised.clean, atol=1e-6) and torch.equal(denoised.shifted, denoised.base)
    table = noised.to_dataframe(relative=True)
    assert list(table["node"]) == ["attn.0.0", "attn.0.1", "attn.0.2", "attn.0.3"] and list(table["index"]) == [
        0,
        1,
        2,
        3,
    ]
    total = (noised.shifted - noised.clean).double().numpy()
    shares = zip(noised.patched, noised.interval(relative=True), noised.relative_effect, table.iterrows(), strict=True)
    for patched, interval, share, (_, line) in shares:
        assert interval == ratio_interval((patched - noised.clean).double().numpy(), total)
        assert [line[name] for name in ("effect", "low", "high", "n")] == [*interval.to_json().values()]
        assert interval.value == pytest.approx(float(share.mean()), rel=1e-4)
    assert torch.equal(noised.effect, noised.patched - noised.base)
    for effect, interval in zip(noised.effect, noised.interval(), strict=True):
        assert interval == bootstrap(effect.double().numpy())
    panels = patch(model, pair, SINK, "components", layers=[0, 1], offsets=[0, 2]).maps()
    assert list(panels) == ["at P0", "at P0 + 2"]
    panel = panels["at P0"]
    assert list(panel.columns) == ["embed", "resid_pre", "attn", "resid_mid", "mlp", "resid_post"]
    assert panel["embed"].isna().tolist() == [False, True]


def test_the_figure_has_a_panel_per_offset(model, tmp_path):
    for relative in (False, True):
        figure = patch(model, PAIR, SINK, "components", offsets=[0, 2]).plot(relative)
        assert [axis.get_title() for axis in figure.axes[:2]] == ["at P0", "at P0 + 2"]
        figure.savefig(tmp_path / "grid.png")


def test_mixed_nodes_are_drawn_as_lines_the_largest_effect_first(model):
    grid = patch(model, PAIR, SINK, ["neuron.0.3", "mlp.0", "attn.0.1"])
    figure = grid.plot()
    largest = grid.effect.mean(1).abs().argsort(descending=True)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [str(grid.nodes[number]) for number in largest.tolist()]
    assert "change of the sink score" in figure.axes[0].get_xlabel()


def test_named_nodes_are_those_of_their_kind(model):
    """One way to name nodes gives the same numbers as another."""
    heads = patch(model, PAIR, SINK, "heads", "denoising")
    named = patch(model, PAIR, SINK, [f"attn.{layer}.{head}" for layer in range(3) for head in range(4)], "denoising")
    assert heads.nodes == named.nodes and torch.equal(heads.patched, named.patched)


# --- What is refused --------------------------------------------------------------------------------------------------

ZERO = torch.zeros(3, 32)


def patch_with(node="mlp.0", value=ZERO, offset=0):
    return lambda model: patch_grid(model, PAIR, [Patch(Node.parse(node), value, offset)], SINK)


def with_metric(metric):
    return lambda model: patch(model, PAIR, metric, "components", layers=[0])


def fails(*_):
    raise RuntimeError("in the middle of a pass")


REFUSED = {
    "no patch": (lambda m: patch_grid(m, PAIR, [], SINK), InterventionError, "nothing to patch"),
    "no room for one": (lambda m: patch(m, PAIR, SINK, patches_per_batch=0), InterventionError, "at least 1"),
    "no such direction": (lambda m: patch(m, PAIR, SINK, direction="up"), InterventionError, "'up'"),
    "no such layer": (lambda m: patch(m, PAIR, SINK, layers=[0, 7]), InterventionError, "no layer 7"),
    "no such component": (lambda m: patch(m, PAIR, SINK, ["key.0"]), InterventionError, "'key.0' names"),
    "no such kind of nodes": (lambda m: patch(m, PAIR, SINK, "mlp.1"), InterventionError, "expected 'heads'"),
    "layers of named nodes": (lambda m: patch(m, PAIR, SINK, ["mlp.1"], layers=[1]), InterventionError, "have names"),
    "no such head": (patch_with("attn.0.9", ZERO[:, :12]), InterventionError, "heads 0 to 3"),
    "no such neuron": (lambda m: patch(m, PAIR, SINK, ["neuron.0.48"]), InterventionError, "neurons 0 to 47"),
    "too few rows": (patch_with(value=ZERO[:2]), InterventionError, r"\[2, 32\]; expected \[3, 32\]"),
    "wrong width": (patch_with("attn.0.1"), InterventionError, r"expected \[3, 12\]"),
    "offset not in value": (patch_with(offset=(0, 1)), InterventionError, r"expected \[3, 2, 32\]"),
    "value not finite": (patch_with(value=ZERO / 0), InterventionError, "not finite"),
    "past the end": (patch_with(offset=9), InterventionError, "expected an offset from 0 to 8"),
    "before the row": (patch_with(offset=-1), InterventionError, "expected an offset from 0 to 8"),
    "rows that do not pair": (
        lambda m: patch(m, PromptPair(TOKENS, TOKENS.subset([0]), 0), SINK),
        InterventionError,
        "3 clean and 1 shifted",
    ),
    "a metric of no such layer": (with_metric(sink_score_of([5])), ModelError, "blocks 0 to 2"),
    "a metric of no such head": (with_metric(sink_score_of([(1, 4)])), InterventionError, "heads 0 to 3"),
    "a metric past the end": (with_metric(sink_score_of([1], offset=30)), InterventionError, "offset 30"),
    "a metric of nothing": (with_metric(Metric("void", (), torch.stack)), InterventionError, "expected hooks"),
    "a metric outside": (
        with_metric(Metric("out", (Reading("ln_final.hook_normalized", lambda a, rows: a), ), lambda a: a)),
        (InterventionError, ModelError),
        "ln_final",
    ),
    "a metric per token": (
        with_metric(Metric("wide", (Reading("blocks.1.hook_resid_post", lambda a, rows: a[..., 0]),), lambda a: a)),
        InterventionError,
        r"gives \[\d+, 9\] for \d+ rows",
    ),
    "a metric not finite": (
        with_metric(Metric("log", (Reading("blocks.1.hook_resid_post", lambda a, rows: a[:, 0, 0] / 0),), lambda a: a)),
        InterventionError,
        "log is not finite",
    ),
    "a metric that fails": (
        with_metric(Metric("bad", (Reading("blocks.1.hook_resid_post", fails),), lambda a: a)),
        RuntimeError,
        "in the middle of a pass",
    ),
    "equal runs": (
        lambda m: patch(m, PromptPair(TOKENS, TOKENS, 0), SINK).relative_effect, InterventionError, "same sink score"
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_use_is_refused_and_leaves_no_hook(load, backend, case, monkeypatch):
    # As users run it: in tests jaxtyping would refuse some of this before we can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = load("llama-grouped", backend)
    standing = hooks_on(model)
    run, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(model)
    assert hooks_on(model) == standing
    assert patch(model, PAIR, SINK, layers=[0]).patched.shape == (4, 3), "and the model goes on working"


def test_metrics_without_heads_are_refused():
    with pytest.raises(InterventionError, match="no head"):
        sink_score_of([])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_damaged_and_training_models_are_refused(family_folder, backend):
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = load_model(family_folder("gpt2"), backend)
    patches = pair_patches(model, PAIR, ["mlp.0"])
    standing = hooks_on(model)
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        patch_grid(model, PAIR, patches, SINK)
    model.eval()
    with torch.no_grad():
        dict(model.named_parameters())[
            next(n for n, _ in model.named_parameters() if "blocks.1" in n or "h.1." in n)
        ].fill_(torch.nan)
    with pytest.raises(InterventionError, match="not finite"):
        patch_grid(model, PAIR, patches, SINK)
    assert hooks_on(model) == standing


def test_parallel_blocks_have_no_middle(load):
    model = load("neox", "hooked" if has_hooked_transformer() else "bridge")
    assert "resid_mid" not in {node.kind for node in patch(model, PAIR, SINK, "components").nodes}
    with pytest.raises(InterventionError, match="nothing is between"):
        pair_patches(model, PAIR, ["resid_mid.0"])
