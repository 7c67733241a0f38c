"""Does the sink need BOS? The same text with and without it (paper, section on BOS).

1. Without BOS the text's own first token stands at P0; with BOS the whole text moves one place to the right.
2. Compare sink rate, `Sink[2:]` and the score of the heads that are sinks with BOS.
3. Compare the loss on the very same predicted tokens, those from the third token of the text on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p0circuit import sink
from p0circuit.activations import SINK_SCORE, TOKEN_LOSSES
from p0circuit.experiments.base import Experiment, NotApplicable, mean_over_samples
from p0circuit.experiments.conditions import WITH_BOS, WITHOUT_BOS, bos_id
from p0circuit.intervals import bootstrap
from p0circuit.models import describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result


@dataclass(frozen=True)
class BosAblationConfig:
    """`eps`: threshold of the sink rate; `from_layer`: where the restricted sink rate starts."""

    eps: float = sink.SINK_THRESHOLD
    from_layer: int = 2


class BosAblation(Experiment):
    """Sink rate, `Sink[2:]` and loss with and without BOS."""

    id = "bos-ablation"
    title = "With and without BOS"

    def __init__(self, config: BosAblationConfig = BosAblationConfig()) -> None:
        super().__init__(config)

    def measure(self, model: Any, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no BOS token, or no token that is predicted in both conditions."""
        import pandas as pd

        from p0circuit.report.figures import bars

        bos = bos_id(model)
        if bos is None:
            raise NotApplicable("this model has no BOS token, so there is nothing to remove; run sink-map instead")
        if prompts.length < 4:
            raise NotApplicable(f"needs prompts of at least 4 tokens, got {prompts.length}")
        # Targets 2..T-2 of the text are predicted in both conditions, from contexts that differ in BOS alone.
        shift = {WITHOUT_BOS: 0, WITH_BOS: 1}
        sets = {WITHOUT_BOS: prompts, WITH_BOS: prompts.behind(bos)}
        values: dict[str, dict[str, Any]] = {}
        layers = []
        info = describe(model)
        start = min(self.config.from_layer, info.layers - 1)
        for name, condition in sets.items():
            recording = self.record(model, condition, [SINK_SCORE, TOKEN_LOSSES], name)
            scores, losses = recording[SINK_SCORE], recording[TOKEN_LOSSES]
            common = losses[:, 1 + shift[name] : losses.shape[1] - 1 + shift[name]]
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
        tables = {
            "summary": pd.DataFrame(rows, columns=["quantity", "condition", "value", "low", "high", "n"]),
            "heads": pd.DataFrame(layers, columns=["condition", "layer", *heads]),
        }
        titles = {"sink_rate": "Sink rate", "loss": "Loss"}
        drawn = {titles.get(name, f"Sink rate, layers ≥ {start}"): panel for name, panel in panels.items()}
        labels = ["share of heads", "share of heads", "nats per token"]
        figure = bars(drawn, f"{info.name}: what removing BOS changes", labels)
        return Result(self.id, self.title, metrics, tables, {"bars": figure})
