"""The experiments: one file each, named after what it shows. Those that test a claim of the paper carry its number."""

from __future__ import annotations

from typing import Any

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.deployment.c17_streaming import Streaming, StreamingConfig
from p0circuit.experiments.deployment.c18_quantisation import Quantisation, QuantisationConfig
from p0circuit.experiments.deployment.c19_dormant_heads import DormantHeads, DormantHeadsConfig
from p0circuit.experiments.deployment.c20_first_token import FirstToken, FirstTokenConfig
from p0circuit.experiments.deployment.mitigations import Mitigations, MitigationsConfig
from p0circuit.experiments.exploratory.circuit import Circuit, CircuitConfig
from p0circuit.experiments.exploratory.experts import Experts, ExpertsConfig
from p0circuit.experiments.exploratory.norm_direction import NormDirection, NormDirectionConfig
from p0circuit.experiments.paper.c01_sink_map import SinkMap, SinkMapConfig
from p0circuit.experiments.paper.c02_bos_ablation import BosAblation, BosAblationConfig
from p0circuit.experiments.paper.c03_any_token import AnyToken, AnyTokenConfig
from p0circuit.experiments.paper.c04_recognition import Recognition, RecognitionConfig
from p0circuit.experiments.paper.c05_structure import Structure, StructureConfig
from p0circuit.experiments.paper.c06_amplification import Amplification, AmplificationConfig
from p0circuit.experiments.paper.c07_causal_path import CausalPath, CausalPathConfig
from p0circuit.experiments.paper.c08_direction_or_norm import DirectionOrNorm, DirectionOrNormConfig
from p0circuit.experiments.paper.c09_content import Content, ContentConfig
from p0circuit.experiments.paper.c10_key_side import KeySide, KeySideConfig
from p0circuit.experiments.paper.c11_limits import Limits, LimitsConfig
from p0circuit.experiments.paper.c12_function import Function, FunctionConfig
from p0circuit.experiments.training.c13_early import Early
from p0circuit.experiments.training.c14_concentration import Concentration
from p0circuit.experiments.training.c15_convergence import Convergence
from p0circuit.experiments.training.c16_methods import Methods
from p0circuit.experiments.training.runs_experiment import RunsExperiment

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
        Mitigations,
        Circuit,
        Experts,
    )
}
"""What `p0circuit reproduce` runs on a model, in this order."""

RUN_EXPERIMENTS: dict[str, type[RunsExperiment]] = {
    kind.id: kind for kind in (Early, Concentration, Convergence, Methods)
}
"""What it runs on the traces of training runs."""


def find_experiment(name: str | Experiment) -> Experiment:
    """The experiment of an id or of a claim's id, with its default settings; an experiment is given back.

    Raises:
        P0Error: there is none.
    """
    if isinstance(name, Experiment):
        return name
    kind = _by_name(EXPERIMENTS).get(name.lower())
    if kind is None:
        if over_runs(name):
            raise P0Error(f"{name!r} is about training runs, not about a model: `p0circuit run {name}` runs it")
        raise P0Error(f"no experiment {name!r}; there are: {_told(EXPERIMENTS)}, and of runs {_told(RUN_EXPERIMENTS)}")
    return kind()


def over_runs(name: str) -> RunsExperiment | None:
    """The experiment over training runs of an id or of a claim's id; None if there is none of this name."""
    kind = _by_name(RUN_EXPERIMENTS).get(name.lower())
    return kind() if kind else None


def _by_name(kinds: dict[str, type[Any]]) -> dict[str, type[Any]]:
    return kinds | {kind.claim.id.lower(): kind for kind in kinds.values() if kind.claim is not None}


def _told(kinds: dict[str, type[Any]]) -> str:
    return ", ".join(f"{kind.id} ({kind.claim.id})" if kind.claim else kind.id for kind in kinds.values())


__all__ = [
    "EXPERIMENTS",
    "RUN_EXPERIMENTS",
    "Amplification",
    "AmplificationConfig",
    "AnyToken",
    "AnyTokenConfig",
    "BosAblation",
    "BosAblationConfig",
    "CausalPath",
    "CausalPathConfig",
    "Circuit",
    "CircuitConfig",
    "Claim",
    "Concentration",
    "Content",
    "ContentConfig",
    "Convergence",
    "Criterion",
    "DirectionOrNorm",
    "DirectionOrNormConfig",
    "DormantHeads",
    "DormantHeadsConfig",
    "Early",
    "Experiment",
    "Experts",
    "ExpertsConfig",
    "FirstToken",
    "FirstTokenConfig",
    "Function",
    "FunctionConfig",
    "KeySide",
    "KeySideConfig",
    "Limits",
    "LimitsConfig",
    "Methods",
    "Mitigations",
    "MitigationsConfig",
    "NormDirection",
    "NormDirectionConfig",
    "NotApplicable",
    "Quantisation",
    "QuantisationConfig",
    "Recognition",
    "RecognitionConfig",
    "RunsExperiment",
    "SinkMap",
    "SinkMapConfig",
    "Streaming",
    "StreamingConfig",
    "Structure",
    "StructureConfig",
    "find_experiment",
    "over_runs",
]
