"""C1: which heads attend to position zero, and on which prompts (paper, section on P0 sinks).

1. Record the sink score of every head in each condition: text without BOS, with BOS, after a random token, random
   tokens, and one repeated token.
2. Average over samples: a map of layers by heads. The share of heads above the threshold is the sink rate.
3. Do the same for position 8, an ordinary position: the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from p0circuit import sink
from p0circuit.experiments.base import Experiment, mean_over_samples
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import conditions
from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import RANDOM_TOKENS, WITH_BOS, WITHOUT_BOS, PromptSet, condition_of
from p0circuit.recording.quantities import PATTERNS, SINK_SCORE, score_at
from p0circuit.recording.record import BatchIntervention, record
from p0circuit.results import Result
from p0circuit.sink import CONTROL
from p0circuit.stats import bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from p0circuit.figures.attention_view import AttentionView


VIEWED_HEADS, VIEWED_TOKENS = 8, 32
"""Size of the attention view of one prompt; a browser draws larger ones slowly."""


@dataclass(frozen=True)
class SinkMapConfig:
    """Settings of `SinkMap`.

    Attributes:
        eps: threshold of the sink rate.
        control: position, counted from P0, that is compared with P0.
    """

    eps: float = sink.SINK_THRESHOLD
    control: int = CONTROL


class SinkMap(Experiment[SinkMapConfig]):
    """Sink score per layer and head, on text with and without BOS, on random tokens and on one repeated token."""

    id = "sink-map"
    title = "Where the sink is"
    config_type = SinkMapConfig
    claim = Claim(
        id="C1",
        title="The sink",
        source="Peng et al., arXiv 2603.06591, section on P0 sinks; metric of Gu et al., arXiv 2410.10781",
        statement="Most of the attention of many heads from layer 2 on goes to position zero, without BOS too.",
        measure="Share of (sample, head) pairs from layer 2 on whose mean attention to P0 is above 0.3, on natural "
        "text without BOS; and how far that is above 5 times the same share for position 8.",
        criteria=(
            Criterion("sink_rate_from_layer_2", ">", 0.05, "low"),
            Criterion("sink_rate_from_layer_2_above_5_times_position_8", ">", 0),
        ),
        control="The same rate of position 8.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare one pass for each of three conditions, and one prompt for the attention view."""
        return 3 + 1 / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Record the sink scores in every condition."""
        import pandas as pd

        eps, info = self.config.eps, describe(model)
        position = min(self.config.control, prompts.length - 1)
        control = score_at(position)
        starts = sorted({0, min(2, info.n_layers - 1)})
        maps, rows, rates, metrics = {}, [], [], {}
        late = starts[-1]
        for name, condition in conditions(model, prompts).items():
            recording = record(model, condition, [SINK_SCORE, control], condition=name)
            scores, control_scores = recording[SINK_SCORE], recording[control]
            maps[name] = mean_over_samples(scores)
            spread = scores.double().std(0).numpy()
            control_means = mean_over_samples(control_scores)
            for (layer, head), value in np.ndenumerate(maps[name]):
                rows.append((name, layer, head, value, spread[layer, head], control_means[layer, head]))
            for start in starts:
                for offset, values in ((0, scores), (position, control_scores)):
                    interval = bootstrap(sink.sink_rate(values, eps, start).numpy())
                    rates.append((name, offset, start, *interval.to_json().values()))
                    if (name, offset, start) == (WITHOUT_BOS, 0, 0):
                        metrics["sink_rate"] = interval
            if name == WITHOUT_BOS:
                rate, control_rate = (sink.sink_rate(each, eps, late).numpy() for each in (scores, control_scores))
                metrics["sink_rate_from_layer_2"] = bootstrap(rate)
                metrics["sink_rate_from_layer_2_above_5_times_position_8"] = bootstrap(rate - 5 * control_rate)
                metrics["share_of_later_layers_with_a_sink_head"] = bootstrap(
                    scores[:, late:].double().numpy(), lambda means: (means.max(-1) > eps).mean(-1)
                )
            # Published figures are looked up under these names.
            if name == WITH_BOS:
                metrics["sink_rate_from_layer_2_with_bos"] = bootstrap(sink.sink_rate(scores, eps, late).numpy())
            if name == RANDOM_TOKENS:
                metrics["sink_rate_random_tokens"] = bootstrap(sink.sink_rate(scores, eps).numpy())
            if name in (WITHOUT_BOS, WITH_BOS):
                layer, head = divmod(int(maps[name].argmax()), scores.shape[2])
                key = "best_head" if name == WITHOUT_BOS else "best_head_with_bos"
                metrics[key] = bootstrap(scores[:, layer, head].numpy())
        given = WITH_BOS if condition_of(model, prompts) == WITH_BOS else WITHOUT_BOS
        columns = ["condition", "layer", "head", "sink_score", "standard_deviation", f"score_at_{position}"]
        rate_columns = ["condition", "position", "from_layer", "sink_rate", "low", "high", "n"]
        return Result(
            self.id,
            self.title,
            metrics,
            {"scores": pd.DataFrame(rows, columns=columns), "rates": pd.DataFrame(rates, columns=rate_columns)},
            notes=_notes(info, WITH_BOS in maps, given, late),
            view=_view(model, prompts, maps[given]),
        )

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw a map of the sink scores for every condition."""
        from p0circuit.figures.maps import heat_maps

        table = result.tables["scores"]
        maps = {
            str(name): part.pivot(index="layer", columns="head", values="sink_score").to_numpy()
            for name, part in table.groupby("condition", sort=False)
        }
        title = f"{result.model_title}: attention to position zero, mean over queries"
        return {"map": heat_maps(maps, title, "sink score")}


def _notes(info: ModelInfo, has_bos: bool, given: str, late: int) -> list[str]:
    """Notes on the conditions; `late` is the layer from which the restricted sink rate counts."""
    notes = [] if has_bos else ["The model has no BOS token: the condition with BOS is left out."]
    notes.append(
        f"{info.n_layers * info.n_heads} heads are measured, and the intervals of single heads are not corrected for "
        "their number; the rates in the claim are over all heads"
    )
    if given == WITH_BOS:
        notes.append("the claim is about text without BOS; these prompts begin with BOS, because the sink needs it")
    if late < 2:
        notes.append(f"{info.title} has {info.n_layers} layers: 'from layer 2' means from its last layer")
    return notes


def _view(model: HookedModel, prompts: PromptSet, scores: np.ndarray) -> AttentionView:
    """The attention of the heads with the highest scores on the first prompt."""
    heads = sorted(divmod(int(index), scores.shape[1]) for index in scores.ravel().argsort()[::-1][:VIEWED_HEADS])
    title = f"{describe(model).title}: the heads with the highest sink scores, on one prompt"
    return view_heads(model, prompts.subset([0]), heads, title)


def view_heads(
    model: HookedModel,
    prompt: PromptSet,
    heads: Sequence[tuple[int, int]],
    title: str = "",
    interventions: Sequence[BatchIntervention] = (),
) -> AttentionView:
    """Make an interactive view of the attention of heads on the beginning of one prompt.

    Args:
        model: the model.
        prompt: its first row is shown.
        heads: heads as (layer, head).
        title: stands above the view.
        interventions: made for `prompt`.
    """
    from p0circuit.figures.attention_view import attention_view

    start = int(prompt.p0[0])
    window = slice(start, start + min(VIEWED_TOKENS, prompt.length - start))
    layers, numbers = map(list, zip(*heads, strict=True))
    patterns = record(model, prompt, PATTERNS, cache=None, interventions=interventions)[0]
    patterns = patterns[layers, numbers][:, window, window]
    ids, tokenizer = prompt.ids[0, window].tolist(), getattr(model, "tokenizer", None)
    tokens = [f"{token} " if tokenizer is None else tokenizer.decode([token]) for token in ids]
    return attention_view(tokens, patterns, [f"{layer}.{head}" for layer, head in heads], title)
