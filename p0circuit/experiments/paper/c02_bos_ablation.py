"""C2: does the sink need BOS? The same text with and without it (paper, section on BOS).

1. Without BOS the text's own first token is at P0; with BOS the text moves one position to the right. Both conditions
   are made from the prompts, whether or not these begin with BOS, so the result is the same in either case.
2. Compare the sink rate, `Sink[2:]`, the score of the heads that are sinks with BOS, and the first layer with a sink.
3. Compare the loss on the same predicted tokens: those from the third token of the text on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p0circuit import sink
from p0circuit.experiments.base import Experiment, NotApplicable, mean_over_samples
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.experiments.sink_under_study import sink_scores, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, bos_id
from p0circuit.recording.quantities import SINK_SCORE, TOKEN_LOSSES
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPENDS = 0.5
"""A sink depends on BOS if less than this share of its score is left without BOS; `advice` uses the same value."""

_DIFFERENCE, _FROM_LAYER = "difference", "sink_rate_from_layer_"


@dataclass(frozen=True)
class BosAblationConfig:
    """Settings of `BosAblation`.

    Attributes:
        eps: threshold of the sink rate.
        from_layer: first layer of the restricted sink rate.
    """

    eps: float = sink.SINK_THRESHOLD
    from_layer: int = 2


class BosAblation(Experiment[BosAblationConfig]):
    """Sink rate, `Sink[2:]` and loss with and without BOS."""

    id = "bos-ablation"
    title = "With and without BOS"
    config_type = BosAblationConfig
    claim = Claim(
        id="C2",
        title="No BOS needed",
        source="Peng et al., arXiv 2603.06591, section on BOS",
        statement="Whatever token stands at position zero becomes the sink: without BOS it re-forms.",
        measure="The score that sink heads, chosen with BOS on other samples, give to P0 without BOS, over that "
        "with BOS.",
        criteria=(
            Criterion("score_without_over_with_bos", ">=", 0.7, if_measured=True),
            Criterion("score_without_over_with_bos", ">=", 0.6, "low", if_measured=True),
        ),
        control="The same heads' score of position 8 without BOS.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare none: everything is in the clean recording."""
        return 0.0

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure sink rates and loss in both conditions.

        Raises:
            NotApplicable: there is no BOS token, rows are padded, or no token is predicted in both conditions.
        """
        import pandas as pd

        if bos_id(model) is None:
            raise NotApplicable("this model has no BOS token, so there is nothing to remove; run sink-map instead")
        if prompts.length < 4:
            raise NotApplicable(f"needs prompts of at least 4 tokens, got {prompts.length}")
        # Targets 2..T-2 of the text are predicted in both conditions, from contexts that differ in BOS alone.
        shift = {WITHOUT_BOS: 0, WITH_BOS: 1}
        sets = with_and_without_bos(model, prompts)
        if WITH_BOS not in sets:
            raise NotApplicable("these rows are padded, so BOS cannot be put before them; give rows without padding")
        shared = min(sets[WITHOUT_BOS].length - 2, sets[WITH_BOS].length - 3)
        values: dict[str, dict[str, Any]] = {}
        layers = []
        start = min(self.config.from_layer, describe(model).n_layers - 1)
        for name, condition in sets.items():
            recording = record(model, condition, [SINK_SCORE, TOKEN_LOSSES], condition=name)
            scores, losses = recording[SINK_SCORE], recording[TOKEN_LOSSES]
            common = losses[:, 1 + shift[name] :][:, :shared]
            values[name] = {
                "sink_rate": sink.sink_rate(scores, self.config.eps).numpy(),
                f"{_FROM_LAYER}{start}": sink.sink_rate(scores, self.config.eps, start).numpy(),
                "loss": common.double().mean(1).numpy(),
            }
            layers += [(name, layer, *row) for layer, row in enumerate(mean_over_samples(scores))]
        rows, metrics = [], {}
        for quantity in values[WITH_BOS]:
            intervals = {name: bootstrap(values[name][quantity]) for name in (WITH_BOS, WITHOUT_BOS)}
            # Samples are paired: the interval of the difference is that of the differences.
            intervals[_DIFFERENCE] = bootstrap(values[WITHOUT_BOS][quantity] - values[WITH_BOS][quantity])
            rows += [(quantity, name, *interval.to_json().values()) for name, interval in intervals.items()]
            metrics[f"{quantity}_without_bos"] = intervals[WITHOUT_BOS]
            metrics[f"{quantity}_difference"] = intervals[_DIFFERENCE]
        heads = [f"head_{head}" for head in range(len(layers[0]) - 2)]
        notes = _first_layers(layers, self.config.eps)
        try:
            studied = studied_sink(model, sets[WITH_BOS])
        except NotApplicable as reason:
            # The other comparisons are of use where there is no sink, too.
            notes.append(f"with BOS, {reason}")
        else:
            # `split` draws by the seed: these are the same rows of the same text, without BOS before them.
            bare = sets[WITHOUT_BOS].split()[1]
            with_bos, without = (sink_scores(model, rows, studied.heads) for rows in (studied.prompts, bare))
            metrics["score_without_over_with_bos"] = left = ratio_interval(without, with_bos)
            metrics["score_of_position_8_without_bos"] = bootstrap(sink_scores(model, bare, studied.heads, CONTROL))
            notes += [studied.note, _dependence(left)]
        tables = {
            "summary": pd.DataFrame(rows, columns=["quantity", "condition", "value", "low", "high", "n"]),
            "heads": pd.DataFrame(layers, columns=["condition", "layer", *heads]),
        }
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw bars of sink rates and loss with and without BOS."""
        from p0circuit.figures.intervals import bars, intervals_by

        summary = result.tables["summary"]
        conditions = summary.loc[summary["condition"] != _DIFFERENCE]
        titles = {"sink_rate": "Sink rate", "loss": "Loss"}
        panels = {
            titles.get(str(name), f"Sink rate, layers ≥ {str(name).removeprefix(_FROM_LAYER)}"): intervals_by(
                part, "condition"
            )
            for name, part in conditions.groupby("quantity", sort=False)
        }
        units = ["share of heads", "share of heads", "nats per token"]
        return {"bars": bars(panels, f"{result.model_title}: what removing BOS changes", units)}


def _dependence(left: Interval) -> str:
    """Whether the sink depends on BOS, in words; `left` is the share of its score that is left without BOS."""
    share = f"without BOS, these heads give P0 {left} of the score that they give to BOS"
    if left.high < DEPENDS:
        return f"the sink depends on BOS: {share}"
    if left.low >= DEPENDS:
        return f"the sink does not depend on BOS: {share}"
    return f"these prompts do not show whether the sink depends on BOS: {share}, and the interval includes {DEPENDS:g}"


def _first_layers(layers: list[tuple[Any, ...]], eps: float) -> list[str]:
    """The first layer with a head above the threshold in each condition, in words."""
    notes = []
    for name in (WITH_BOS, WITHOUT_BOS):
        first = next((layer for condition, layer, *heads in layers if condition == name and max(heads) > eps), None)
        where = "no sink head" if first is None else f"the first sink head is in layer {first}"
        notes.append(f"{name}, {where}")
    return notes
