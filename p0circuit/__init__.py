"""The P0 sink circuit: how position zero comes to draw the attention of language models, measured and intervened on.

    import p0circuit
    model = p0circuit.load_model("p0-nano")
    prompts = p0circuit.natural_text(model, "stdlib", n=128)
    result = p0circuit.SinkMap().run(model, prompts)

Names are imported when first used: `import p0circuit` alone loads neither torch nor TransformerLens.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_model": "models",
    "list_models": "models",
    "list_checkpoints": "models",
    "describe": "models",
    "forward": "models",
    "ModelError": "models",
    "PromptSet": "prompts",
    "natural_text": "prompts",
    "random_tokens": "prompts",
    "repeated_token": "prompts",
    "record": "activations",
    "sink_score": "sink",
    "sink_rate": "sink",
    "norm_ratio": "sink",
    "direction_cosines": "sink",
    "Result": "results",
    "Interval": "results",
    "SinkMap": "experiments",
    "NormDirection": "experiments",
    "BosAblation": "experiments",
    "AnyToken": "experiments",
    "Recognition": "experiments",
    "Structure": "experiments",
    "Amplification": "experiments",
    "CausalPath": "experiments",
    "DirectionOrNorm": "experiments",
    "Content": "experiments",
    "KeySide": "experiments",
    "Limits": "experiments",
    "Function": "experiments",
    "Circuit": "experiments",
    "EXPERIMENTS": "experiments",
    "advise": "advice",
    "reproduce": "reproduction",
    "write_report": "report.html",
    "attention_view": "report.attention_view",
    "P0Monitor": "training.monitor",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'p0circuit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"p0circuit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
