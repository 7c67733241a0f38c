"""The P0 sink circuit: how position zero comes to draw the attention of language models, measured and intervened on.

Example:
    import p0circuit as p0

    model = p0.load_model("p0-nano")
    prompts = p0.natural_text(model, "english", n=64)
    scores = p0.record(model, prompts, p0.SINK_SCORE)  # [sample, layer, head]
    pair = p0.shifted_pair(model, prompts, shift=8)
    grid = p0.patch(model, pair, p0.sink_score_of(p0.sink_heads(scores)), nodes="heads")
    result = p0.CausalPath().run(model, prompts)

Names are imported when first used: `import p0circuit` alone loads neither torch nor TransformerLens. Editors and type
checkers read the imports below.
"""

# ruff: noqa: I001, RUF022 - names stand in their groups

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    # Models
    from p0circuit.errors import P0Error
    from p0circuit.hooked_model import HookedModel
    from p0circuit.models import ModelInfo, describe, forward, list_checkpoints, list_models, load_model

    # Prompts and recording
    from p0circuit.prompts import PromptSet, from_ids, natural_text, random_tokens, repeated_token
    from p0circuit.recording.quantities import (
        NORM_RATIO,
        PATTERNS,
        SINK_SCORE,
        TOKEN_LOSSES,
        VALUE_NORM_RATIO,
        Quantity,
        residual_at,
        score_at,
    )
    from p0circuit.recording.record import Recording, record
    from p0circuit.sink import direction_cosines, norm_ratio, sink_heads, sink_rate, sink_score

    # Interventions and patching
    from p0circuit.interventions import CircuitGraph, PatchGrid, PathEffects, patch, path_patch
    from p0circuit.interventions.ablation import ablate, replace_direction, replace_norm
    from p0circuit.interventions.attention_edits import attend_to_self_only, mask_key, redirect_attention, zero_value
    from p0circuit.interventions.intervention import Intervention
    from p0circuit.interventions.metrics import Metric, norm_ratio_after, sink_rate_of, sink_score_of
    from p0circuit.interventions.nodes import Node
    from p0circuit.interventions.pairs import PromptPair, shifted_pair

    # Experiments and reproduction
    from p0circuit.advice import advise
    from p0circuit.experiments import (
        EXPERIMENTS,
        Amplification,
        AnyToken,
        BosAblation,
        CausalPath,
        Circuit,
        Content,
        DirectionOrNorm,
        DormantHeads,
        FirstToken,
        Function,
        KeySide,
        Limits,
        NormDirection,
        Quantisation,
        Recognition,
        SinkMap,
        Streaming,
        Structure,
        find_experiment,
    )
    from p0circuit.reproduction import reproduce

    # Training and results
    from p0circuit.figures.attention_view import attention_view
    from p0circuit.report.html import write_report
    from p0circuit.results import Result
    from p0circuit.stats import Interval
    from p0circuit.training.monitor import P0Monitor

_MODULES = {
    # Models
    "errors": ("P0Error",),
    "hooked_model": ("HookedModel",),
    "models": ("ModelInfo", "describe", "forward", "list_checkpoints", "list_models", "load_model"),
    # Prompts and recording
    "prompts": ("PromptSet", "from_ids", "natural_text", "random_tokens", "repeated_token"),
    "recording.quantities": (
        "NORM_RATIO",
        "PATTERNS",
        "SINK_SCORE",
        "TOKEN_LOSSES",
        "VALUE_NORM_RATIO",
        "Quantity",
        "residual_at",
        "score_at",
    ),
    "recording.record": ("Recording", "record"),
    "sink": ("direction_cosines", "norm_ratio", "sink_heads", "sink_rate", "sink_score"),
    # Interventions and patching
    "interventions": ("CircuitGraph", "PatchGrid", "PathEffects", "patch", "path_patch"),
    "interventions.ablation": ("ablate", "replace_direction", "replace_norm"),
    "interventions.attention_edits": ("attend_to_self_only", "mask_key", "redirect_attention", "zero_value"),
    "interventions.intervention": ("Intervention",),
    "interventions.metrics": ("Metric", "norm_ratio_after", "sink_rate_of", "sink_score_of"),
    "interventions.nodes": ("Node",),
    "interventions.pairs": ("PromptPair", "shifted_pair"),
    # Experiments and reproduction
    "advice": ("advise",),
    "experiments": (
        "EXPERIMENTS",
        "Amplification",
        "AnyToken",
        "BosAblation",
        "CausalPath",
        "Circuit",
        "Content",
        "DirectionOrNorm",
        "DormantHeads",
        "FirstToken",
        "Function",
        "KeySide",
        "Limits",
        "NormDirection",
        "Quantisation",
        "Recognition",
        "SinkMap",
        "Streaming",
        "Structure",
        "find_experiment",
    ),
    "reproduction": ("reproduce",),
    # Training and results
    "figures.attention_view": ("attention_view",),
    "report.html": ("write_report",),
    "results": ("Result",),
    "stats": ("Interval",),
    "training.monitor": ("P0Monitor",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "__version__",
    # Models
    "P0Error",
    "HookedModel",
    "ModelInfo",
    "describe",
    "forward",
    "list_checkpoints",
    "list_models",
    "load_model",
    # Prompts and recording
    "PromptSet",
    "from_ids",
    "natural_text",
    "random_tokens",
    "repeated_token",
    "NORM_RATIO",
    "PATTERNS",
    "SINK_SCORE",
    "TOKEN_LOSSES",
    "VALUE_NORM_RATIO",
    "Quantity",
    "residual_at",
    "score_at",
    "Recording",
    "record",
    "direction_cosines",
    "norm_ratio",
    "sink_heads",
    "sink_rate",
    "sink_score",
    # Interventions and patching
    "CircuitGraph",
    "PatchGrid",
    "PathEffects",
    "patch",
    "path_patch",
    "ablate",
    "replace_direction",
    "replace_norm",
    "attend_to_self_only",
    "mask_key",
    "redirect_attention",
    "zero_value",
    "Intervention",
    "Metric",
    "norm_ratio_after",
    "sink_rate_of",
    "sink_score_of",
    "Node",
    "PromptPair",
    "shifted_pair",
    # Experiments and reproduction
    "advise",
    "EXPERIMENTS",
    "Amplification",
    "AnyToken",
    "BosAblation",
    "CausalPath",
    "Circuit",
    "Content",
    "DirectionOrNorm",
    "DormantHeads",
    "FirstToken",
    "Function",
    "KeySide",
    "Limits",
    "NormDirection",
    "Quantisation",
    "Recognition",
    "SinkMap",
    "Streaming",
    "Structure",
    "find_experiment",
    "reproduce",
    # Training and results
    "attention_view",
    "write_report",
    "Result",
    "Interval",
    "P0Monitor",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'p0circuit' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"p0circuit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
