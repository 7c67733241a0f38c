"""The experiments: one file each, named after what it shows. Those that test a claim of the paper carry its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment as Experiment, NotApplicable as NotApplicable
from p0circuit.experiments.claim import Claim as Claim, Criterion as Criterion
from p0circuit.experiments.deployment.c17_streaming import Streaming as Streaming, StreamingConfig as StreamingConfig
from p0circuit.experiments.deployment.c18_quantisation import (
    Quantisation as Quantisation,
    QuantisationConfig as QuantisationConfig,
)
from p0circuit.experiments.deployment.c19_dormant_heads import (
    DormantHeads as DormantHeads,
    DormantHeadsConfig as DormantHeadsConfig,
)
from p0circuit.experiments.deployment.c20_first_token import (
    FirstToken as FirstToken,
    FirstTokenConfig as FirstTokenConfig,
)
from p0circuit.experiments.deployment.mitigations import (
    Mitigations as Mitigations,
    MitigationsConfig as MitigationsConfig,
)
from p0circuit.experiments.depth.c21_depth import Depth as Depth
from p0circuit.experiments.depth.c22_recognised_again import RecognisedAgain as RecognisedAgain
from p0circuit.experiments.depth.c23_norm_protects import NormProtects as NormProtects
from p0circuit.experiments.depth.c24_first_or_bos import FirstOrBos as FirstOrBos, FirstOrBosConfig as FirstOrBosConfig
from p0circuit.experiments.depth.c25_one_circuit import OneCircuit as OneCircuit
from p0circuit.experiments.depth.locator import DepthConfig as DepthConfig
from p0circuit.experiments.exploratory.circuit import Circuit as Circuit, CircuitConfig as CircuitConfig
from p0circuit.experiments.exploratory.experts import Experts as Experts, ExpertsConfig as ExpertsConfig
from p0circuit.experiments.exploratory.norm_direction import (
    NormDirection as NormDirection,
    NormDirectionConfig as NormDirectionConfig,
)
from p0circuit.experiments.paper.c01_sink_map import SinkMap as SinkMap, SinkMapConfig as SinkMapConfig
from p0circuit.experiments.paper.c02_bos_ablation import (
    BosAblation as BosAblation,
    BosAblationConfig as BosAblationConfig,
)
from p0circuit.experiments.paper.c03_any_token import AnyToken as AnyToken, AnyTokenConfig as AnyTokenConfig
from p0circuit.experiments.paper.c04_recognition import (
    Recognition as Recognition,
    RecognitionConfig as RecognitionConfig,
)
from p0circuit.experiments.paper.c05_structure import Structure as Structure, StructureConfig as StructureConfig
from p0circuit.experiments.paper.c06_amplification import (
    Amplification as Amplification,
    AmplificationConfig as AmplificationConfig,
)
from p0circuit.experiments.paper.c07_causal_path import CausalPath as CausalPath, CausalPathConfig as CausalPathConfig
from p0circuit.experiments.paper.c08_direction_or_norm import (
    DirectionOrNorm as DirectionOrNorm,
    DirectionOrNormConfig as DirectionOrNormConfig,
)
from p0circuit.experiments.paper.c09_content import Content as Content, ContentConfig as ContentConfig
from p0circuit.experiments.paper.c10_key_side import KeySide as KeySide, KeySideConfig as KeySideConfig
from p0circuit.experiments.paper.c11_limits import Limits as Limits, LimitsConfig as LimitsConfig
from p0circuit.experiments.paper.c12_function import Function as Function, FunctionConfig as FunctionConfig
from p0circuit.experiments.training.c13_early import Early as Early
from p0circuit.experiments.training.c14_concentration import Concentration as Concentration
from p0circuit.experiments.training.c15_convergence import Convergence as Convergence
from p0circuit.experiments.training.c16_methods import Methods as Methods
from p0circuit.experiments.training.runs_experiment import RunsExperiment as RunsExperiment

Kind = TypeVar("Kind", type[Experiment[Any]], type[RunsExperiment])

MODEL_EXPERIMENTS = (
    SinkMap,
    NormDirection,
    BosAblation,
    AnyToken,
    Recognition,
    Structure,
    Amplification,
    CausalPath,
    DirectionOrNorm,
    Content,
    KeySide,
    Limits,
    Function,
    Streaming,
    Quantisation,
    DormantHeads,
    FirstToken,
    Depth,
    RecognisedAgain,
    NormProtects,
    FirstOrBos,
    OneCircuit,
    Mitigations,
    Circuit,
    Experts,
)
"""Experiments on a model, in the order in which `p0circuit reproduce` runs them."""
TRAINING_EXPERIMENTS = (Early, Concentration, Convergence, Methods)
"""Experiments on the traces of training runs."""

EXPERIMENTS: dict[str, type[Experiment[Any]]] = {kind.id: kind for kind in MODEL_EXPERIMENTS}
"""`MODEL_EXPERIMENTS` by id."""
RUN_EXPERIMENTS: dict[str, type[RunsExperiment]] = {kind.id: kind for kind in TRAINING_EXPERIMENTS}
"""`TRAINING_EXPERIMENTS` by id."""


def find_experiment(name: str | Experiment[Any]) -> Experiment[Any]:
    """Return the experiment with this id, or with this claim id, in its default configuration.

    Args:
        name: as in "sink-map" or "C1", in upper or lower case; an experiment is returned as it is.

    Raises:
        P0Error: there is no such experiment, or it is about training runs.
    """
    if isinstance(name, Experiment):
        return name
    kind = _by_name(EXPERIMENTS).get(name.lower())
    if kind is not None:
        return kind()
    if over_runs(name):
        raise P0Error(f"{name!r} is about training runs, not about a model: `p0circuit run {name}` runs it")
    raise P0Error(f"no experiment {name!r}; there are: {_names(EXPERIMENTS)}, and of runs {_names(RUN_EXPERIMENTS)}")


def over_runs(name: str) -> RunsExperiment | None:
    """Return the experiment over training runs with this id, or with this claim id; None if there is none.

    Args:
        name: as in "early" or "C13", in upper or lower case.
    """
    kind = _by_name(RUN_EXPERIMENTS).get(name.lower())
    return kind() if kind else None


def _by_name(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    return {**kinds, **{kind.claim.id.lower(): kind for kind in kinds.values() if kind.claim is not None}}


def _names(kinds: Mapping[str, Kind]) -> str:
    return ", ".join(f"{kind.id} ({kind.claim.id})" if kind.claim else kind.id for kind in kinds.values())
