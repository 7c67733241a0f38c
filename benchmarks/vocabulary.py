"""The vocabulary sweep against the time of its bare matrix products, and against the usual way.

The bare products are those that a one-token row needs in every block: V and O (attention to itself has weight 1) and
the matrices of the MLP, at the sweep's own chunk size, with nothing between them. No implementation can be
faster than that. The usual way runs a prompt of full length for each token; it is timed on a few and multiplied up.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.memory import peak_mb
from benchmarks.models import gpt2_shape
from p0circuit.interventions.vocabulary import CHUNK, vocabulary_sweep
from p0circuit.models import describe, forward
from p0circuit.prompts import random_tokens


@torch.no_grad()
def measure(model: Any = None, tokens: int | None = None, length: int = 64) -> dict[str, Any]:
    """Time the sweep of `tokens` of the vocabulary (all if not given) beside its limit, in alternation."""
    model = gpt2_shape() if model is None else model
    info = describe(model)
    count = info.vocab_size if tokens is None else min(tokens, info.vocab_size)
    ids = torch.arange(count)
    vocabulary_sweep(model, ids[:CHUNK])
    bare_products(model, min(count, CHUNK))

    ours = bare = 0.0
    norms = []
    # In turns, part by part: what else the machine does meanwhile slows both alike.
    for part in ids.split(4 * CHUNK):
        start = time.perf_counter()
        norms.append(vocabulary_sweep(model, part).norms)
        between = time.perf_counter()
        bare_products(model, len(part))
        ours, bare = ours + between - start, bare + time.perf_counter() - between
    final_norms = torch.cat(norms)[:, -1]

    # Of tokens that were swept, or there would be nothing to compare.
    few = random_tokens(count, n=min(8, count), length=length)
    start = time.perf_counter()
    forward(model, few.ids, stop_at_layer=info.n_layers)
    usual = (time.perf_counter() - start) / few.n * count

    found: dict[int, torch.Tensor] = {}

    def read(stream: torch.Tensor, hook: Any) -> None:
        found[0] = stream[:, 0].norm(dim=-1).clone()

    forward(model, few.ids, hooks=[(f"blocks.{info.n_layers - 1}.hook_resid_post", read)], stop_at_layer=info.n_layers)
    chosen = final_norms[few.ids[:, 0]]
    return {
        "vocab_sweep_over_matmul": ours / bare,
        "vocab_sweep_seconds": ours,
        "vocab_sweep_matmul_seconds": bare,
        "vocab_sweep_tokens": count,
        "vocab_sweep_speedup_over_full_prompts": usual / ours,
        "vocab_sweep_relative_difference": float(((chosen - found[0]) / found[0]).abs().max()),
        "vocab_sweep_extra_mb": peak_mb(lambda: vocabulary_sweep(model, ids[: 4 * CHUNK]))
        + 4 * max(0, count - 4 * CHUNK) * (info.n_layers + 1) / 1e6,
        "vocab_sweep_extra_mb_with_all_keys": 4 * count * info.n_layers * info.n_kv_heads * info.d_head / 1e6,
    }


def bare_products(model: Any, tokens: int) -> None:
    """The matrix products of one-token rows through all blocks, chunk by chunk, and nothing else."""
    info = describe(model)
    d, wide, narrow = info.d_model, info.d_mlp, info.n_kv_heads * info.d_head
    # A gated MLP reads the stream twice.
    reads = 2 if getattr(model.cfg, "gated_mlp", False) else 1
    shapes = [(d, narrow), (narrow, d), *[(d, wide)] * reads, (wide, d)]
    weights = [torch.randn(*shape) / d for shape in shapes]
    for start in range(0, tokens, CHUNK):
        rows = min(CHUNK, tokens - start)
        stream, mixed, hidden = torch.randn(rows, d), torch.randn(rows, narrow), torch.randn(rows, wide)
        for _ in range(info.n_layers):
            for value, weight in zip((stream, mixed, *[stream] * reads, hidden), weights, strict=True):
                torch.mm(value, weight)


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=2))
