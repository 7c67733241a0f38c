"""Interventions on a model's run; this package is the face of patching.

`patch` puts the output of single nodes in one run into another run (activation patching). `path_patch` does so for
single edges, from a node to an input of another one, with every other path cut. Both take a pair of clean and shifted
prompts and a metric. Their results have raw and relative effects, intervals, a table and a figure.

Example:
    import p0circuit as p0

    model = p0.load_model("p0-nano")
    prompts = p0.natural_text(model, "english", n=16)
    pair = p0.shifted_pair(model, prompts, shift=8)
    metric = p0.sink_score_of([(3, 1), (3, 2)])
    grid = p0.patch(model, pair, metric, nodes="heads")
    edges = p0.path_patch(model, pair, metric, receivers=["attn.3.k", "mlp.1"])
"""

from p0circuit.interventions.activation_patching import Direction, PatchGrid, patch
from p0circuit.interventions.edge_effects import CircuitGraph, PathEffects
from p0circuit.interventions.path_patching import path_patch

__all__ = ["CircuitGraph", "Direction", "PatchGrid", "PathEffects", "patch", "path_patch"]
