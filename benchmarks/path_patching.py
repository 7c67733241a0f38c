"""Path patching and the edge search, beside the usual way: one edge after the other, in passes of its own.

*General path patching* (`patch_edges`): senders of blocks 0 and 1 into Q of a head, V of a key/value head and the MLP
of two blocks in the middle, once for a sink metric and once for the loss. *Edge search* (`search_edges`): all single
heads and MLPs into Q, K, V and MLPs of all blocks, for the edges with 5 % of the effect of P0's whole stream.

The usual way sends with everything between sender and receiver frozen, keeps the receiver's input, and runs again with
it; both passes stop where they can. It is timed on edges drawn at random and multiplied up; on these the results are
compared. What it freezes from is recorded once and not counted.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from benchmarks.closed_form import clean_outputs
from benchmarks.models import gpt2_shape
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.closed_form import key_hook, query_hook
from p0circuit.interventions.edge_search import search_edges
from p0circuit.interventions.metrics import Metric, loss, measure as measure_metric, sink_score_of
from p0circuit.interventions.nodes import Node, components
from p0circuit.interventions.pairs import PromptPair, patch_values, shift_prompts
from p0circuit.interventions.path_patching import patch_edges
from p0circuit.interventions.receivers import Receiver
from p0circuit.models import describe, forward
from p0circuit.models.hooks import hooked
from p0circuit.models.passes import count_passes
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.sink import sink_heads

SHARE = 0.05
SHIFT = 8
BUDGET = 60.0
"""Passes for exact runs, so that a model in which thousands of edges matter a little takes minutes and not hours."""


@torch.no_grad()
def measure(model: Any = None, rows: int = 2, length: int = 64, edges: int = 12) -> dict[str, Any]:
    """Both ways on a hooked model (GPT-2's shape if none is given); `edges` of each are timed the usual way."""
    model = gpt2_shape() if model is None else model
    info = describe(model)
    prompts = random_tokens(info.vocab_size, n=rows, length=length)
    pair = shift_prompts(prompts, SHIFT, info.vocab_size)
    return general(model, prompts, pair, edges) | search(model, prompts, pair, edges)


@torch.no_grad()
def general(model: Any, prompts: PromptSet, pair: PromptPair, edges: int) -> dict[str, Any]:
    """Some edges into Q, V and MLPs, for the sink score of a later block and for the loss."""
    clean = clean_outputs(model, prompts)
    info = describe(model)
    senders = components(model, [0, 1], heads=True)
    values = patch_values(model, pair, senders)
    middle = max(2, info.n_layers // 2)
    receivers = [
        name
        for layer in (middle, middle + 1)
        if layer < info.n_layers
        for name in (f"attn.{layer}.1.q", f"attn.{layer}.kv0.v", f"mlp.{layer}")
    ]
    found: dict[str, Any] = {}
    for label, metric in (("sink", sink_score_of([min(middle + 2, info.n_layers - 1)])), ("loss", loss())):
        start = time.perf_counter()
        result = patch_edges(model, prompts, senders, receivers, values, metric)
        ours = time.perf_counter() - start
        every = list(range(len(result.edges)))
        drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:edges].tolist()
        theirs, differences = 0.0, []
        for number in drawn:
            sender, receiver = result.edges[number]
            start = time.perf_counter()
            patched = hooked_edge(model, prompts, Node.parse(sender), values, receiver, metric, clean)
            theirs += time.perf_counter() - start
            differences.append(float((patched - result.patched[number].cpu()).abs().max()))
        found |= {
            f"path_{label}_edges": len(every),
            f"path_{label}_seconds": ours,
            f"path_{label}_loop_seconds": theirs / len(drawn) * len(every),
            f"path_{label}_speedup": theirs / len(drawn) * len(every) / ours,
            f"path_{label}_max_abs_diff": max(differences),
            f"path_{label}_largest_effect": float(result.effect.abs().max()),
        }
    return found


@torch.no_grad()
def search(model: Any, prompts: PromptSet, pair: PromptPair, edges: int) -> dict[str, Any]:
    """The edges that matter among all there are, for the sink score of the sink heads."""
    clean = clean_outputs(model, prompts)
    heads = sink_heads(record(model, prompts, SINK_SCORE, cache=None))
    info, metric = describe(model), sink_score_of(heads)
    senders = components(model, heads=True)
    receivers = [f"mlp.{layer}" for layer in range(info.n_layers)]
    for layer in range(info.n_layers):
        receivers += [f"attn.{layer}.{head}.q" for head in range(info.n_heads)]
        receivers += [f"attn.{layer}.kv{head}.{part}" for head in range(info.n_kv_heads) for part in "kv"]
    start = time.perf_counter()
    values = patch_values(model, pair, senders)
    threshold = SHARE * whole_effect(model, prompts, pair, metric)
    with count_passes() as counted:
        result = search_edges(model, prompts, senders, receivers, values, heads, threshold, budget=BUDGET)
    ours = time.perf_counter() - start
    count = len(result.edges) + result.without_effect
    drawn = torch.randperm(len(result.exact.edges), generator=torch.Generator().manual_seed(0))[:edges].tolist()
    theirs, differences = 0.0, []
    for number in drawn:
        sender, receiver = result.exact.edges[number]
        start = time.perf_counter()
        patched = hooked_edge(model, prompts, Node.parse(sender), values, receiver, metric, clean)
        theirs += time.perf_counter() - start
        differences.append(float((patched - result.exact.patched[number]).abs().max()))
    return {
        "search_edges": count,
        "search_found": len(result.strong_edges),
        "search_exact_runs": len(result.exact.edges),
        "search_beyond_the_budget": len(result.unverified),
        "search_passes": counted.passes(prompts.n, prompts.length, describe(model).n_layers),
        "search_fewer_passes": count / counted.passes(prompts.n, prompts.length, describe(model).n_layers),
        "search_seconds": ours,
        "search_loop_seconds": theirs / len(drawn) * count,
        "search_speedup": theirs / len(drawn) * count / ours,
        "search_max_abs_diff": max(differences),
        "search_threshold": threshold,
        "search_largest_estimate_left_out": result.largest_screened_out,
        "search_largest_error_of_estimates": float(max(abs(result.errors(False)), default=0.0)),
    }


def whole_effect(model: Any, prompts: PromptSet, pair: PromptPair, metric: Metric) -> float:
    """The size of the mean change of the metric when P0's whole stream is that of the shifted run."""
    streams = [Node("resid_pre", layer) for layer in range(describe(model).n_layers)]
    values = patch_values(model, pair, streams)
    before = measure_metric(model, prompts, metric)
    with ablate(model, prompts, streams, values):
        after = measure_metric(model, prompts, metric)
    return abs(float((after - before).mean()))


def hooked_edge(
    model: Any,
    prompts: PromptSet,
    sender: Node,
    values: dict[Node, torch.Tensor],
    receiver: str,
    metric: Metric,
    clean: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The metric [batch] with one edge patched, the usual way: two passes with hooks."""
    info = describe(model)
    target = Receiver.parse(receiver, info)
    rows, p0 = torch.arange(prompts.n), prompts.p0
    group = info.n_heads // info.n_kv_heads
    places = {
        "q": query_hook(model, target.layer),
        "k": key_hook(model, target.layer),
        "v": f"blocks.{target.layer}.attn.hook_v",
        "mlp": f"blocks.{target.layer}.hook_mlp_out",
    }
    name = places[target.kind]
    index: Any = slice(None)
    if target.kind == "q":
        index = list(target.heads)
    elif target.kind in ("k", "v"):
        index = sorted({head // group for head in target.heads})
    received: dict[str, torch.Tensor] = {}

    def send(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation = activation.clone()
        sender.put(activation, p0, values[sender])
        return activation

    def freeze(activation: torch.Tensor, hook: Any, name: str) -> torch.Tensor:
        return clean[name]

    def read(activation: torch.Tensor, hook: Any) -> None:
        received["input"] = activation[rows, p0].clone()

    def put(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation = activation.clone()
        at_p0 = activation[rows, p0]
        at_p0[:, index] = received["input"][:, index]
        activation[rows, p0] = at_p0
        return activation

    hooks: list[Any] = [(name, read), (sender.hook, send)]
    for later in range(target.layer + 1):
        for part, stage in (("attn", 1), ("mlp", 3)):
            frozen = f"blocks.{later}.hook_{part}_out"
            if sender.depth < (later, stage):
                hooks.append((frozen, functools.partial(freeze, name=frozen)))
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks, stop_at_layer=target.layer + 1)
    with hooked(model, [(name, put)]):
        return measure_metric(model, prompts, metric)


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=2))
