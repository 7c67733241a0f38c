"""The experiments: one file each, named after what it shows."""

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.bos_ablation import BosAblation, BosAblationConfig
from p0circuit.experiments.norm_direction import NormDirection, NormDirectionConfig
from p0circuit.experiments.sink_map import SinkMap, SinkMapConfig

EXPERIMENTS: dict[str, type[Experiment]] = {kind.id: kind for kind in (SinkMap, NormDirection, BosAblation)}
"""What `p0circuit reproduce` runs, in this order."""

__all__ = [
    "EXPERIMENTS",
    "BosAblation",
    "BosAblationConfig",
    "Experiment",
    "NormDirection",
    "NormDirectionConfig",
    "NotApplicable",
    "SinkMap",
    "SinkMapConfig",
]
