"""Does the sink need BOS? The same text with and without it (paper, section on BOS).

1. Without BOS the text's own first token stands at P0; with BOS the whole text moves one place to the right. Both are
   made from the prompts, whether these begin with BOS or not, so that the same is measured in either case.
2. Compare sink rate, `Sink[2:]`, the score of the heads that are sinks with BOS, and the first layer with a sink.
3. Compare the loss on the very same predicted tokens, those from the third token of the text on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

DEPENDS = 0.5
"""A sink depends on BOS where less than this share of its score is left without; as in the advice."""


@dataclass(frozen=True)
class BosAblationConfig:
    """`eps`: threshold of the sink rate; `from_layer`: where the restricted sink rate starts."""

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
        return 0.0  # all of it is in the clean recording

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no BOS token, or no token that is predicted in both conditions."""
        import pandas as pd

        from p0circuit.figures.intervals import bars

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
        info = describe(model)
        start = min(self.config.from_layer, info.n_layers - 1)
        for name, condition in sets.items():
            recording = record(model, condition, [SINK_SCORE, TOKEN_LOSSES], condition=name)
            scores, losses = recording[SINK_SCORE], recording[TOKEN_LOSSES]
            common = losses[:, 1 + shift[name] :][:, :shared]
            values[name] = {
                "sink_rate": sink.sink_rate(scores, self.config.eps).numpy(),
                f"sink_rate_from_layer_{start}": sink.sink_rate(scores, self.config.eps, start).numpy(),
                "loss": common.double().mean(1).numpy(),
            }
            layers += [(name, layer, *row) for layer, row in enumerate(mean_over_samples(scores))]
        rows, metrics, panels = [], {}, {}
        for quantity in values[WITH_BOS]:
            panels[quantity] = {name: bootstrap(values[name][quantity]) for name in (WITH_BOS, WITHOUT_BOS)}
            for name, interval in panels[quantity].items():
                rows.append((quantity, name, *interval.to_json().values()))
            # Samples are paired: the interval of the difference is that of the differences.
            difference = bootstrap(values[WITHOUT_BOS][quantity] - values[WITH_BOS][quantity])
            rows.append((quantity, "difference", *difference.to_json().values()))
            metrics[f"{quantity}_without_bos"] = panels[quantity][WITHOUT_BOS]
            metrics[f"{quantity}_difference"] = difference
        heads = [f"head_{head}" for head in range(len(layers[0]) - 2)]
        notes = _first_layers(layers, self.config.eps)
        try:
            found = studied_sink(model, sets[WITH_BOS])
        except NotApplicable as reason:
            # The rest of the comparison is worth having also where there is no sink.
            notes.append(f"with BOS, {reason}")
        else:
            # `split` draws by the seed: the same rows of the same text, without BOS before them.
            bare = sets[WITHOUT_BOS].split()[1]
            with_bos, without = sink_scores(model, found.prompts, found.heads), sink_scores(model, bare, found.heads)
            metrics["score_without_over_with_bos"] = left = ratio_interval(without, with_bos)
            metrics["score_of_position_8_without_bos"] = bootstrap(sink_scores(model, bare, found.heads, CONTROL))
            notes += [found.note, _depends(left)]
        tables = {
            "summary": pd.DataFrame(rows, columns=["quantity", "condition", "value", "low", "high", "n"]),
            "heads": pd.DataFrame(layers, columns=["condition", "layer", *heads]),
        }
        titles = {"sink_rate": "Sink rate", "loss": "Loss"}
        drawn = {titles.get(name, f"Sink rate, layers ≥ {start}"): panel for name, panel in panels.items()}
        labels = ["share of heads", "share of heads", "nats per token"]
        figure = bars(drawn, f"{info.title}: what removing BOS changes", labels)
        return Result(self.id, self.title, metrics, tables, {"bars": figure}, notes=notes)


def _depends(left: Interval) -> str:
    """In words, what the sink depends on; `left` is the share of the score with BOS that is there without."""
    told = f"without BOS {left} of the score that these heads give to BOS at position zero is left"
    if left.high < DEPENDS:
        return f"the sink depends on BOS: {told}"
    if left.low >= DEPENDS:
        return f"the sink does not depend on BOS: {told}"
    return f"whether the sink depends on BOS cannot be said: {told}, on both sides of {DEPENDS:g}"


def _first_layers(layers: list[tuple[Any, ...]], eps: float) -> list[str]:
    """In words, the first layer with a head above the threshold in each condition."""
    told = []
    for name in (WITH_BOS, WITHOUT_BOS):
        first = next((layer for condition, layer, *heads in layers if condition == name and max(heads) > eps), None)
        told.append(f"{name}, " + (f"the first sink head is in layer {first}" if first is not None else "no sink head"))
    return told
