"""The experiments: one file each, named after what it shows."""

from __future__ import annotations

from typing import Any

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.bos_ablation import BosAblation, BosAblationConfig
from p0circuit.experiments.circuit import Circuit, CircuitConfig
from p0circuit.experiments.norm_direction import NormDirection, NormDirectionConfig
from p0circuit.experiments.sink_map import SinkMap, SinkMapConfig

EXPERIMENTS: dict[str, type[Any]] = {kind.id: kind for kind in (SinkMap, NormDirection, BosAblation, Circuit)}
"""What `p0circuit reproduce` runs, in this order."""

__all__ = [
    "EXPERIMENTS",
    "BosAblation",
    "BosAblationConfig",
    "Circuit",
    "CircuitConfig",
    "Experiment",
    "NormDirection",
    "NormDirectionConfig",
    "NotApplicable",
    "SinkMap",
    "SinkMapConfig",
]
