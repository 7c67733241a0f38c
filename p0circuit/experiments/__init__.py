"""The experiments: one file each, named after what it shows. Those that test a claim of the paper carry its number."""

from __future__ import annotations

from typing import Any

from p0circuit.experiments.amplification import Amplification, AmplificationConfig
from p0circuit.experiments.any_token import AnyToken, AnyTokenConfig
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.bos_ablation import BosAblation, BosAblationConfig
from p0circuit.experiments.circuit import Circuit, CircuitConfig
from p0circuit.experiments.claim import Claim, Clause
from p0circuit.experiments.content import Content, ContentConfig
from p0circuit.experiments.direction_or_norm import DirectionOrNorm, DirectionOrNormConfig
from p0circuit.experiments.function import Function, FunctionConfig
from p0circuit.experiments.key_side import KeySide, KeySideConfig
from p0circuit.experiments.limits import Limits, LimitsConfig
from p0circuit.experiments.norm_direction import NormDirection, NormDirectionConfig
from p0circuit.experiments.path import ThePath, ThePathConfig
from p0circuit.experiments.recognition import Recognition, RecognitionConfig
from p0circuit.experiments.sink_map import SinkMap, SinkMapConfig
from p0circuit.experiments.structure import Structure, StructureConfig

EXPERIMENTS: dict[str, type[Any]] = {
    kind.id: kind
    for kind in (
        SinkMap,
        NormDirection,
        BosAblation,
        AnyToken,
        Recognition,
        Structure,
        Amplification,
        ThePath,
        DirectionOrNorm,
        Content,
        KeySide,
        Limits,
        Function,
        Circuit,
    )
}
"""What `p0circuit reproduce` runs, in this order."""


def find_experiment(name: str | Experiment) -> Experiment:
    """The experiment of an id or of a claim's id, with its default settings; an experiment is given back.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, Experiment):
        return name
    claims = {kind.claim.id: kind for kind in EXPERIMENTS.values() if kind.claim is not None}
    kind = EXPERIMENTS.get(name) or claims.get(name.upper())
    if kind is None:
        raise ValueError(f"no experiment {name!r}; there are: {', '.join(EXPERIMENTS)} and {', '.join(claims)}")
    return kind()


__all__ = [
    "EXPERIMENTS",
    "Amplification",
    "AmplificationConfig",
    "AnyToken",
    "AnyTokenConfig",
    "BosAblation",
    "BosAblationConfig",
    "Circuit",
    "CircuitConfig",
    "Claim",
    "Clause",
    "Content",
    "ContentConfig",
    "DirectionOrNorm",
    "DirectionOrNormConfig",
    "Experiment",
    "Function",
    "FunctionConfig",
    "KeySide",
    "KeySideConfig",
    "Limits",
    "LimitsConfig",
    "NormDirection",
    "NormDirectionConfig",
    "NotApplicable",
    "Recognition",
    "RecognitionConfig",
    "SinkMap",
    "SinkMapConfig",
    "Structure",
    "StructureConfig",
    "ThePath",
    "ThePathConfig",
    "find_experiment",
]
