"""Models: load one as a raw hooked model, describe it, run it."""

from __future__ import annotations

from p0circuit.models.forward import forward, resume
from p0circuit.models.info import ModelError, ModelInfo, describe
from p0circuit.models.load import ShippedModel, list_checkpoints, list_models, load_model

__all__ = [
    "ModelError",
    "ModelInfo",
    "ShippedModel",
    "describe",
    "forward",
    "list_checkpoints",
    "list_models",
    "load_model",
    "resume",
]
