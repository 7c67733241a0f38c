"""What all experiments share: a frozen configuration in, a `Result` with its provenance out, and a declared cost.

Cost is counted in passes (`models.passes`): one pass is all prompts of the experiment through all blocks. Every
experiment declares how many passes it takes (`passes`) beyond the clean recording that all experiments of a run share
(`clean_recording`). The declared and the used passes are part of the result's provenance.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.experiments.claim import Claim
from p0circuit.hooked_model import HookedModel
from p0circuit.log import report_progress
from p0circuit.models import ModelInfo, describe
from p0circuit.models.passes import count_passes
from p0circuit.prompts import PromptSet
from p0circuit.recording.cache_reads import note_cache_reads
from p0circuit.recording.memory import remember_rows
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

Config = TypeVar("Config")
"""The frozen dataclass that configures an experiment."""

LARGE_MODEL = 20_000_000
"""Number of weights in its blocks from which a model counts as large: quick runs then take smaller configurations."""
ORDINARY = (4, 16, 32)
"""Positions after P0 whose streams, scores and directions stand for ordinary ones."""


class NotApplicable(P0Error):
    """The model or the prompts lack what the experiment is about; the message says what, and what to do instead."""


class Experiment(ABC, Generic[Config]):
    """A measurement that can be run on any hooked model.

    A subclass sets `id`, `title` and `config_type`, and defines `passes`, `measure` and `draw`. If it tests a claim,
    it sets `claim`; `measure` then returns, among its metrics, those that the claim's criteria name.

    Attributes:
        id: name of the experiment on the command line, in file names and in claims.json.
        title: heading in the report.
        config_type: the frozen dataclass of its settings; its defaults are those of a full run.
        claim: the claim it tests; None for a measurement without one.
        needs_control: whether the claim is also tested on the controls of a large model. Claims about the use of a
            sink are not: a control model is of no use, and the test is slow.
        config: the settings of this instance.

    Example:
        result = SinkMap(SinkMapConfig(eps=0.2)).run(model, prompts)
        print(result.metrics["sink_rate"], result.judgement)
    """

    id: ClassVar[str]
    title: ClassVar[str]
    config_type: ClassVar[type[Any]]
    claim: ClassVar[Claim | None] = None
    needs_control: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config | None = None) -> None:
        """Configure the experiment.

        Args:
            config: its settings; the defaults of `config_type` if None.
        """
        self.config = self.config_type() if config is None else config

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that the circuit is said to be in; those of the paper unless the configuration has a field for it.

        The claims are about the paper's blocks, so there is no verdict for others.
        """
        return getattr(self.config, "blocks", CIRCUIT_BLOCKS)

    @property
    def deciding_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the claim's criteria compare; with other blocks, of their counterparts."""
        return tuple(dict.fromkeys(criterion.metric for criterion in self.claim.criteria)) if self.claim else ()

    @abstractmethod
    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare how many passes over the prompts `measure` takes beyond the clean recording.

        Made before anything runs, from the shapes of model and prompts and from the configuration.

        Args:
            model: the model that would be measured.
            prompts: the prompts that would be given to `run`.

        Returns:
            Passes: 1 is all prompts through all blocks.
        """

    def quick(self, info: ModelInfo) -> Experiment[Config]:
        """Return the experiment of a quick run: with fewer samples, positions and blocks where the model is large.

        Args:
            info: description of the model, which alone decides.
        """
        return self

    @abstractmethod
    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure: fill the metrics, tables and notes of a result. `run` adds judgement, provenance and figures.

        Args:
            model: the model to measure.
            prompts: natural text; the experiment derives its other conditions from it.

        Raises:
            NotApplicable: there is nothing to measure on this model or these prompts.
        """

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the figures of a result from its tables and provenance alone, so a loaded result can be drawn again.

        Args:
            result: a result of this experiment, from `run` or `Result.load`.

        Returns:
            Figures by name; the names are part of the file names.
        """
        return {}

    def run(self, model: HookedModel, prompts: PromptSet, figures: bool = True) -> Result:
        """Measure, judge the claim, record the provenance, and draw the figures.

        Args:
            model: the model to measure.
            prompts: natural text without BOS; the experiment derives its other conditions from it.
            figures: whether to draw; controls are measured without figures.

        Returns:
            The result, with `judgement` if the experiment tests a claim.

        Raises:
            NotApplicable: there is nothing to measure on this model or these prompts.
        """
        started = time.monotonic()
        info = describe(model)
        declared = self.passes(model, prompts)
        report_progress(f"{self.id}: about {declared:.1f} passes over {prompts.n} prompts")
        with remember_rows(), count_passes() as count, note_cache_reads() as reads:
            result = self.measure(model, prompts)
        if self.claim is not None and self.blocks == CIRCUIT_BLOCKS:
            result.claim = self.claim.to_json()
            result.judgement = self.claim.judge(result.metrics)
        elif self.claim is not None:
            where = block_names(CIRCUIT_BLOCKS)
            result.notes.append(f"{self.claim.id} is about {where}, and this is {block_names(self.blocks)}: no verdict")
        if reads.cached:
            report_progress(
                f"{self.id}: {len(reads.cached)} of {len(reads.cached | reads.computed)} recordings read from the cache"
            )
        result.provenance |= {
            "model": asdict(info),
            "prompts": prompts.description | {"fingerprint": prompts.fingerprint(), "seed": prompts.seed},
            "samples": prompts.n,
            "length": prompts.length,
            "config": asdict(self.config),  # pyright: ignore[reportArgumentType]
            "passes": {
                "declared": round(declared, 2),
                "used": round(count.passes(prompts.n, prompts.length, info.n_layers), 2),
            },
            "seconds": round(time.monotonic() - started, 2),
            "from_cache": sorted(reads.cached),
        }
        if figures:
            result.figures = {**result.figures, **self.draw(result)}
        return result


def second_half(prompts: PromptSet) -> int:
    """Return the number of prompts that are measured on; sink heads are chosen on the others (`PromptSet.split`)."""
    return prompts.n - round(prompts.n / 2)


def block_names(blocks: Sequence[int]) -> str:
    """Name blocks in words, as in "block 0", "blocks 0 and 1" and "blocks 0 to 4".

    Args:
        blocks: consecutive blocks, in order.
    """
    first, last = blocks[0], blocks[-1]
    if first == last:
        return f"block {first}"
    return f"blocks {first} {'and' if last == first + 1 else 'to'} {last}"


def is_large(info: ModelInfo) -> bool:
    """Return whether quick runs of this model take smaller configurations; only the size of the model decides."""
    # Four matrices of attention and two of an MLP four times as wide, as in most models.
    return 12 * info.n_layers * info.d_model**2 >= LARGE_MODEL


def mean_over_samples(values: Tensor) -> np.ndarray:
    """Return the mean over the first axis as a float64 array."""
    return values.double().mean(0).numpy()
