"""What all experiments share: a frozen configuration in, a `Result` with its provenance out, and a declared cost.

Cost is counted in passes (`models.passes`): one pass is all prompts of the experiment through all blocks. Every
experiment declares what it takes (`passes`) beyond the clean recording that all experiments of a run share
(`clean_recording`), says it before it starts, and keeps what it used beside what it declared.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.experiments.claim import Claim
from p0circuit.hooked_model import HookedModel
from p0circuit.log import say
from p0circuit.models import ModelInfo, describe
from p0circuit.models.passes import count_passes
from p0circuit.prompts import PromptSet
from p0circuit.recording.memory import remember_rows
from p0circuit.recording.quantities import Quantity
from p0circuit.recording.record import Recording, record
from p0circuit.results import Result

if TYPE_CHECKING:
    import numpy as np


LARGE_MODEL = 20_000_000
"""From so many weights in its blocks on a model is large: quick runs then take smaller configurations."""
ORDINARY = (4, 16, 32)
"""Positions after P0 whose streams, scores and directions stand for ordinary ones."""


def second_half(prompts: PromptSet) -> int:
    """Rows of the half of the prompts that is measured on; the heads are chosen on the others (`PromptSet.split`)."""
    return prompts.n - round(prompts.n / 2)


def is_large(info: ModelInfo) -> bool:
    """Whether quick runs of a model of this size take smaller configurations; decided by its size alone."""
    # Four matrices of attention and two of an MLP four times as wide, as in most models.
    return 12 * info.n_layers * info.d_model**2 >= LARGE_MODEL


class NotApplicable(P0Error):
    """This model or these prompts lack what the experiment is about; the message says what, and what to do instead."""


class Experiment(ABC):
    """A measurement that can be run on any hooked model.

    A subclass sets `id` and `title`, takes a frozen dataclass as its configuration, and writes `measure`. One that
    tests a claim names it; `measure` then gives, among its metrics, those that the claim's threshold is about.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[Claim | None] = None
    needs_control: ClassVar[bool] = True
    """Whether the claim is tried on controls of a large model, too. Claims about the use of a sink are not: they say
    little of a model that is of no use, and take long to say it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._cached: set[str] = set()
        self._recorded: set[str] = set()

    @abstractmethod
    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """How many passes over these prompts `measure` takes beyond the clean recording.

        A declaration, made before anything runs from the shapes of model and prompts and from the configuration: what
        it comes to is counted, and both stand in the result's provenance.
        """

    def quick(self, info: ModelInfo) -> Experiment:
        """This experiment as a quick run of a model of this shape has it: with fewer rows, positions and blocks."""
        return self

    @abstractmethod
    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """The measurement itself; `run` adds the provenance.

        Raises:
            NotApplicable: there is nothing to measure on this model or these prompts.
        """

    def run(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure, judge the claim, say what came from the cache, and write down where the numbers came from.

        `prompts` are natural text without BOS; an experiment derives its other conditions from them.

        Raises:
            NotApplicable: there is nothing to measure on this model or these prompts.
        """
        started = time.monotonic()
        self._cached, self._recorded = set(), set()
        info = describe(model)
        declared = self.passes(model, prompts)
        say(f"{self.id}: about {declared:.1f} passes over {prompts.n} prompts")
        with remember_rows(), count_passes() as count:
            result = self.measure(model, prompts)
        if self.claim is not None:
            result.claim = self.claim.record(self.claim.judge(result.metrics), result.metrics)
        if self._cached:
            say(
                f"{self.id}: {len(self._cached)} of {len(self._cached | self._recorded)} recordings read from the cache"
            )
        result.provenance |= {
            "model": asdict(info),
            "prompts": prompts.description | {"fingerprint": prompts.fingerprint(), "seed": prompts.seed},
            "samples": prompts.n,
            "length": prompts.length,
            "config": asdict(self.config),
            "passes": {
                "declared": round(declared, 2),
                "used": round(count.passes(prompts.n, prompts.length, info.n_layers), 2),
            },
            "seconds": round(time.monotonic() - started, 2),
            "from_cache": sorted(self._cached),
        }
        return result

    def record(self, model: HookedModel, prompts: PromptSet, what: Sequence[Quantity], condition: str) -> Recording:
        """`activations.record`, remembering for the provenance what was read from the cache."""
        recording = record(model, prompts, what)
        for quantity in what:
            kept = self._cached if quantity.name in recording.cached else self._recorded
            kept.add(f"{condition}/{quantity.name}")
        return recording


def mean_over_samples(values: Tensor) -> np.ndarray:
    """The mean over the first axis as a float64 array."""
    return values.double().mean(0).numpy()
