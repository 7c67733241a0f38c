"""Edges into K at P0: the closed form against a plain loop of hooked forward passes, one edge after the other.

All senders of blocks 0 and 1 (embedding, heads, MLPs) to all heads of the later blocks. Where that is fewer than a
thousand edges, single neurons send as well, as the clean pass is paid once for all of them. The loop does what path
patching is usually written as: send with everything between frozen, keep the receiver's key, run again with it; both
passes stop at the receiver's layer. It is timed on edges drawn at random and multiplied up; on these the results are
compared. The clean cache that the loop freezes from is made once and not counted against it.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from benchmarks.memory import peak_mb
from benchmarks.models import gpt2_shape
from p0circuit.interventions.closed_form import key_edges, key_hook
from p0circuit.interventions.nodes import Node, components, nodes_of
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.models import describe, forward
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.sink import sink_score

FEW_EDGES = 1000


@torch.no_grad()
def measure(model: Any = None, rows: int = 2, length: int = 64, edges: int = 12) -> dict[str, Any]:
    """Time both ways on a hooked model (GPT-2-small shape if none is given) and compare `edges` of their results."""
    model = gpt2_shape() if model is None else model
    info = describe(model)
    prompts = random_tokens(info.vocab_size, n=rows, length=length)
    senders = components(model, [0, 1], heads=True)
    receiving = (info.n_layers - 2) * info.n_heads
    if len(senders) * receiving < FEW_EDGES:
        senders += nodes_of([f"neuron.{layer}.{n}" for layer in (0, 1) for n in range(info.d_mlp)], model)
    values = patch_values(model, shift_prompts(prompts, 8, info.vocab_size), senders)
    key_edges(model, prompts, senders[:1], values)  # warm both code and caches

    start = time.perf_counter()
    result = key_edges(model, prompts, senders, values)
    ours = time.perf_counter() - start

    every = [
        (number, layer, head)
        for number in range(len(senders))
        for layer in range(2, info.n_layers)
        for head in range(info.n_heads)
    ]
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:edges].tolist()
    clean = clean_outputs(model, prompts)
    differences, theirs = [], 0.0
    for number, layer, head in (every[place] for place in drawn):
        start = time.perf_counter()
        score = hooked_edge(model, prompts, senders[number], values[senders[number]], layer, head, clean)
        theirs += time.perf_counter() - start
        differences.append(float((result.patched[number, :, layer, head] - score).abs().max()))
    looped = theirs / len(drawn) * len(every)
    return {
        "closed_form_speedup": looped / ours,
        "closed_form_max_abs_diff": max(differences),
        "closed_form_seconds": ours,
        "hook_loop_seconds": looped,
        "edges": len(every),
        "edges_timed": len(drawn),
        "closed_form_largest_effect": float(result.effect.abs().max()),
        "closed_form_over_forward_mb": peak_mb(lambda: key_edges(model, prompts, senders, values))
        / peak_mb(lambda: forward(model, prompts.ids)),
    }


def clean_outputs(model: Any, prompts: PromptSet) -> dict[str, torch.Tensor]:
    """What every attention and MLP writes in the clean run, by hook name."""
    found: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any, name: str) -> None:
        found[name] = activation.clone()

    names = [f"blocks.{layer}.hook_{part}_out" for layer in range(describe(model).n_layers) for part in ("attn", "mlp")]
    hooks = [(name, functools.partial(keep, name=name)) for name in names]
    forward(model, prompts.ids, hooks=hooks, stop_at_layer=describe(model).n_layers)
    return found


def hooked_edge(
    model: Any,
    prompts: PromptSet,
    sender: Node,
    value: torch.Tensor,
    layer: int,
    head: int,
    clean: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The sink score [batch] of one head with one sender's news in its key of P0: two passes with hooks."""
    heard: dict[str, torch.Tensor] = {}
    name = key_hook(model, layer)
    # Only this head's score is read, so it does not matter who else has its key.
    own = head // (describe(model).n_heads // describe(model).n_kv_heads)

    def send(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation = activation.clone()
        sender.put(activation, prompts.p0, value)
        return activation

    def freeze(activation: torch.Tensor, hook: Any, name: str) -> torch.Tensor:
        return clean[name]

    def hear(key: torch.Tensor, hook: Any) -> None:
        heard["key"] = key[:, 0, own].clone()

    def tell(key: torch.Tensor, hook: Any) -> torch.Tensor:
        key = key.clone()
        key[:, 0, own] = heard["key"]
        return key

    def read(pattern: torch.Tensor, hook: Any) -> None:
        heard["score"] = sink_score(pattern[:, head : head + 1], prompts.p0)[:, 0]

    hooks: list[Any] = [(sender.hook, send)]
    for later in range(layer + 1):
        for part, stage in (("attn", 1), ("mlp", 3)):
            if sender.depth < (later, stage):
                frozen = f"blocks.{later}.hook_{part}_out"
                hooks.append((frozen, functools.partial(freeze, name=frozen)))
    forward(model, prompts.ids, hooks=[*hooks, (name, hear)], stop_at_layer=layer + 1)
    pattern = f"blocks.{layer}.attn.hook_pattern"
    forward(model, prompts.ids, hooks=[(name, tell), (pattern, read)], stop_at_layer=layer + 1)
    return heard["score"]


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=2))
