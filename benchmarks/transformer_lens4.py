"""Direct path patching of TransformerLens 4, one pass per edge, beside `patch_edges`: same model, same edges, one run.

TransformerLens adds the change of a head's write to a later head's own input, at every position; the caches given to it
here differ at P0 only, so the edges are those of `patch_edges`. It reaches Q, K and V of heads, where these have keys
of their own; MLPs as receivers, and K and V under grouped-query attention, it does not. Both sides measure the mean
sink score of the last block. This module runs on TransformerLens 4 only (`make .venv-tl4/.dev`).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.path_patching import patch_edges
from p0circuit.models import describe, forward
from p0circuit.models.bridge import to_bridge
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.sink import sink_score

_PARTS = ("q", "k", "v")


def interpreter() -> Path | None:
    """The Python of this checkout's environment with TransformerLens 4; None where it was not made."""
    python = Path(__file__).parents[1] / ".venv-tl4" / "bin" / "python"
    return python if python.exists() else None


def gpt2_bridge(layers: int = 12, d_model: int = 768, heads: int = 12, vocab_size: int = 50_257) -> Any:
    """A bridge of GPT-2's shape with random weights, large enough for attention to be far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=d_model,
        n_layer=layers,
        n_head=heads,
        n_positions=256,
        initializer_range=0.06,
        attn_implementation="eager",
    )
    return to_bridge(GPT2LMHeadModel(config).eval(), "gpt2-shape")


@torch.no_grad()
def measure(model: Any = None, rows: int = 2, length: int = 64, layers_after: int = 2) -> dict[str, Any]:
    """Time both ways on the edges from one head to Q, K and V of all heads of the last `layers_after` blocks."""
    model = gpt2_bridge() if model is None else model
    info = describe(model)
    prompts = random_tokens(info.vocab_size, n=rows, length=length)
    source = Node("head", info.n_layers - layers_after - 1, 1)
    values = patch_values(model, shift_prompts(prompts, 8, info.vocab_size), [source])
    last = info.n_layers - 1
    receivers = [
        f"attn.{layer}.{head}.{part}"
        for part in _PARTS
        for layer in range(source.layer + 1, info.n_layers)
        for head in range(info.n_heads)
    ]
    forward(model, prompts.ids)

    start = time.perf_counter()
    result = patch_edges(model, prompts, [source], receivers, values, sink_score_of([last]))
    ours = time.perf_counter() - start

    start = time.perf_counter()
    theirs = {part: direct_path(model, prompts, source, values[source], part) for part in _PARTS}
    seconds = time.perf_counter() - start

    differences = []
    for (_, receiver), patched in zip(result.edges, result.patched, strict=True):
        _, layer, head, part = receiver.split(".")
        differences.append(abs(float(patched.mean()) - float(theirs[part][int(layer), int(head)])))
    return {
        "transformer_lens": version("transformer-lens"),
        "direct_path_edges": len(result.edges),
        "direct_path_seconds": ours,
        "direct_path_transformer_lens_seconds": seconds,
        "direct_path_speedup": seconds / ours,
        "direct_path_max_abs_diff": max(differences),
        "direct_path_largest_effect": float(result.effect.mean(1).abs().max()),
        "rows": rows,
        "length": length,
        "threads": torch.get_num_threads(),
        "device": str(model.cfg.device),
    }


def direct_path(model: Any, prompts: PromptSet, source: Node, value: torch.Tensor, part: str) -> torch.Tensor:
    """TransformerLens's own sweep [layer, head]: the mean sink score of the last block with each edge patched."""
    from transformer_lens import patching

    name, last = source.hook, describe(model).n_layers - 1
    found: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any, place: str) -> None:
        found[place] = activation.clone()

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return sink_score(found["pattern"], prompts.p0).mean()

    forward(model, prompts.ids, hooks=[(name, lambda activation, hook: keep(activation, hook, "z"))])
    moved = found["z"].clone()
    source.put(moved, prompts.p0, value)
    pattern = f"blocks.{last}.attn.hook_pattern"
    with model.hooks(fwd_hooks=[(pattern, lambda activation, hook: keep(activation, hook, "pattern"))]):
        return patching.get_act_patch_direct_path(
            model,
            prompts.ids,
            {name: moved},
            {name: found["z"]},
            metric,
            source.layer,
            source.index,
            part,  # pyright: ignore[reportArgumentType]
            verbose=False,
        )


if __name__ == "__main__":
    tiny = "--tiny" in sys.argv
    model = gpt2_bridge(4, 32, 4, 97) if tiny else None
    print(json.dumps(measure(model, length=16 if tiny else 64)))
