"""Activation patching against TransformerLens's `patching`: same model, same inputs, in one run, results compared.

The grid is components x layers at P0; the metric is the mean sink score of all heads of a few layers in the middle.
Patches above them cannot matter: TransformerLens runs them all the same, ours does not. Both sides are timed from the
prompts to the grid: ours with the recording of its replacement values, TransformerLens's with its cache of the other
run and a hook that keeps the patterns.
"""

from __future__ import annotations

import contextlib
import functools
import io
import time
from typing import Any

import pandas as pd
import torch

from benchmarks.memory import peak_mb
from benchmarks.models import gpt2_shape
from p0circuit.interventions.activation_patching import patch
from p0circuit.interventions.metrics import loss, sink_score_of
from p0circuit.interventions.nodes import nodes_of_kinds
from p0circuit.interventions.pairs import PromptPair, shift_prompts
from p0circuit.models import describe, forward
from p0circuit.prompts import random_tokens
from p0circuit.sink import sink_score

COMPONENTS = {
    "resid_pre": "resid_pre",
    "attn": "attn_out",
    "resid_mid": "resid_mid",
    "mlp": "mlp_out",
    "resid_post": "resid_post",
}
SHIFT = 8


@torch.no_grad()
def measure(model: Any = None, rows: int = 2, length: int = 64, memory: bool = True) -> dict[str, Any]:
    """Time both grids on a hooked model (GPT-2-small shape if none is given), compare them, and weigh ours."""
    model = gpt2_shape() if model is None else model
    info = describe(model)
    pair = shift_prompts(random_tokens(info.vocab_size, n=rows, length=length), SHIFT, info.vocab_size)
    layers = list(range(info.n_layers // 6, info.n_layers // 2)) or [info.n_layers - 1]
    forward(model, pair.shifted.ids)

    start = time.perf_counter()
    grid = patch(model, pair, sink_score_of(layers), nodes_of_kinds(model, list(COMPONENTS)))
    ours = time.perf_counter() - start

    start = time.perf_counter()
    theirs_values = transformer_lens_grid(model, pair, layers)
    theirs = time.perf_counter() - start

    differences = [
        abs(patched - theirs_values[node.kind][node.layer])
        for node, patched in zip(grid.nodes, grid.patched.double().mean(1).tolist(), strict=True)
    ]
    return {
        "grid_speedup": theirs / ours,
        "grid_max_abs_diff": max(differences),
        "grid_largest_effect": float(grid.effect.double().mean(1).abs().max()),
        "grid_seconds": ours,
        "transformer_lens_seconds": theirs,
        "grid_cells": len(grid.nodes),
        "grid_metric": grid.metric,
        "grid_rows": rows,
        "grid_length": length,
        "grid_memory": memory_table(model, rows, length) if memory else None,
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def transformer_lens_grid(
    model: Any, pair: PromptPair, layers: list[int], patched: int | None = None
) -> dict[str, list[float]]:
    """The same grid by `generic_activation_patch`: per component, the metric with each layer (of the first) patched."""
    from transformer_lens import patching

    patterns: dict[str, torch.Tensor] = {}

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        patterns[hook.name] = pattern

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([sink_score(pattern, pair.clean.p0) for pattern in patterns.values()], dim=1).mean()

    def shifted_value(activation: torch.Tensor, index: list[int], other: torch.Tensor) -> torch.Tensor:
        activation[:, index[1]] = other[:, index[1] + pair.shift]
        return activation

    _, cache = model.run_with_cache(pair.shifted.ids)
    where = pd.DataFrame({"layer": range(patched or describe(model).n_layers), "pos": 0})
    reading = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in layers]
    with model.hooks(fwd_hooks=reading), contextlib.redirect_stderr(io.StringIO()):
        return {
            component: patching.generic_activation_patch(
                model, pair.clean.ids, cache, metric, shifted_value, name, index_df=where
            ).tolist()
            for component, name in COMPONENTS.items()
        }


def memory_table(model: Any, rows: int, length: int) -> list[dict[str, Any]]:
    """Peaks (MB, weights not counted) of one forward over the rows and of grids over the same, and their ratio."""
    info = describe(model)
    table = []
    for tokens in (length, 2 * length):
        pair = shift_prompts(random_tokens(info.vocab_size, n=rows, length=tokens), SHIFT, info.vocab_size)
        whole = peak_mb(lambda pair=pair: forward(model, pair.clean.ids))
        sink = sink_score_of([1])
        grids = {
            "components, layer 0": functools.partial(patch, model, pair, sink, "components", layers=[0]),
            "components, layers 0-1": functools.partial(patch, model, pair, sink, "components", layers=[0, 1]),
            "components, layer 0, loss": functools.partial(patch, model, pair, loss(), "components", layers=[0]),
            "TransformerLens: components, layer 0": lambda pair=pair: transformer_lens_grid(model, pair, [1], 1),
            "heads, layer 0": functools.partial(patch, model, pair, sink, layers=[0]),
            "16 neurons, layer 0": functools.partial(
                patch, model, pair, sink, [f"neuron.0.{number}" for number in range(16)]
            ),
        }
        for name, grid in grids.items():
            peak = peak_mb(grid)
            table.append({"grid": name, "length": tokens, "forward_mb": whole, "grid_mb": peak, "ratio": peak / whole})
    return table


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=2))
