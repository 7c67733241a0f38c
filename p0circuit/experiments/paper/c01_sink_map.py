"""Where the sink is: the sink score of every head, and what the prompt has to do with it (paper, section on P0 sinks).

1. Record the sink score of every head on each condition (text without and with BOS, random and repeated tokens).
2. Average over samples: a map of layers by heads; count heads above the threshold: the sink rate.
3. Do the same for position 8, which is not special: the control.
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
from p0circuit.models import describe
from p0circuit.prompts import RANDOM_TOKENS, WITH_BOS, WITHOUT_BOS, PromptSet, condition_of
from p0circuit.recording.quantities import PATTERNS, SINK_SCORE, score_at
from p0circuit.recording.record import BatchIntervention, record
from p0circuit.results import Result
from p0circuit.sink import CONTROL
from p0circuit.stats import bootstrap

if TYPE_CHECKING:
    from p0circuit.figures.attention_view import AttentionView


VIEWED_HEADS, VIEWED_TOKENS = 8, 32
"""What the attention view shows of one prompt: more is slow to draw in a browser."""


@dataclass(frozen=True)
class SinkMapConfig:
    """`eps`: threshold of the sink rate; `control`: the position (after P0) whose score stands beside P0's."""

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
        # A random first token, random tokens, one repeated token; and one prompt for the attention view.
        return 3 + 1 / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        import pandas as pd

        from p0circuit.figures.maps import heat_maps

        eps, info = self.config.eps, describe(model)
        place = min(self.config.control, prompts.length - 1)
        control = score_at(place)
        starts = sorted({0, min(2, info.n_layers - 1)})
        maps, rows, rates, metrics = {}, [], [], {}
        late = starts[-1]
        for name, condition in conditions(model, prompts).items():
            recording = record(model, condition, [SINK_SCORE, control], condition=name)
            scores = recording[SINK_SCORE]
            maps[name] = mean_over_samples(scores)
            spread = scores.double().std(0).numpy()
            beside = mean_over_samples(recording[control])
            for (layer, head), value in np.ndenumerate(maps[name]):
                rows.append((name, layer, head, value, spread[layer, head], beside[layer, head]))
            for start in starts:
                for position, values in ((0, scores), (place, recording[control])):
                    interval = bootstrap(sink.sink_rate(values, eps, start).numpy())
                    rates.append((name, position, start, *interval.to_json().values()))
                    if (name, position, start) == (WITHOUT_BOS, 0, 0):
                        metrics["sink_rate"] = interval
            if name == WITHOUT_BOS:
                rate, rate_beside = (sink.sink_rate(recording[at], eps, late).numpy() for at in (SINK_SCORE, control))
                metrics["sink_rate_from_layer_2"] = bootstrap(rate)
                metrics["sink_rate_from_layer_2_above_5_times_position_8"] = bootstrap(rate - 5 * rate_beside)
                metrics["share_of_later_layers_with_a_sink_head"] = bootstrap(
                    scores[:, late:].double().numpy(), lambda means: (means.max(-1) > eps).mean(-1)
                )
            # Under the names by which published figures are looked up.
            if name == WITH_BOS:
                metrics["sink_rate_from_layer_2_with_bos"] = bootstrap(sink.sink_rate(scores, eps, late).numpy())
            if name == RANDOM_TOKENS:
                metrics["sink_rate_random_tokens"] = bootstrap(sink.sink_rate(scores, eps).numpy())
            if name in (WITHOUT_BOS, WITH_BOS):
                layer, head = divmod(int(maps[name].argmax()), scores.shape[2])
                key = "best_head" if name == WITHOUT_BOS else "best_head_with_bos"
                metrics[key] = bootstrap(scores[:, layer, head].numpy())
        given = WITH_BOS if condition_of(model, prompts) == WITH_BOS else WITHOUT_BOS
        notes = [] if WITH_BOS in maps else ["There is no BOS token: the condition with BOS is left out."]
        notes.append(
            f"{info.n_layers * info.n_heads} heads are looked at and no interval of a single head is corrected for "
            "that; "
            "the claim's rates are over all of them"
        )
        if given == WITH_BOS:
            notes.append("the claim is about text without BOS; these prompts were given after BOS, where the sink is")
        if late < 2:
            notes.append(f"{info.title} has {info.n_layers} layers: 'from layer 2' is from its last one")
        columns = ["condition", "layer", "head", "sink_score", "standard_deviation", f"score_at_{place}"]
        rate_columns = ["condition", "position", "from_layer", "sink_rate", "low", "high", "n"]
        return Result(
            self.id,
            self.title,
            metrics,
            {"scores": pd.DataFrame(rows, columns=columns), "rates": pd.DataFrame(rates, columns=rate_columns)},
            {"map": heat_maps(maps, f"{info.title}: attention to position zero, mean over queries", "sink score")},
            notes=notes,
            view=_view(model, prompts, maps[given]),
        )


def _view(model: HookedModel, prompts: PromptSet, scores: np.ndarray) -> AttentionView:
    """The attention of the heads with the highest scores on the first prompt."""
    chosen = sorted(divmod(int(place), scores.shape[1]) for place in scores.ravel().argsort()[::-1][:VIEWED_HEADS])
    title = f"{describe(model).title}: the heads with the highest sink scores, on one prompt"
    return view_heads(model, prompts.subset([0]), chosen, title)


def view_heads(
    model: HookedModel,
    prompt: PromptSet,
    heads: Sequence[tuple[int, int]],
    title: str = "",
    interventions: Sequence[BatchIntervention] = (),
) -> AttentionView:
    """The attention of some heads on the beginning of one prompt (the first row), to click through.

    `interventions` are made for `prompt`.
    """
    from p0circuit.figures.attention_view import attention_view

    start, length = int(prompt.p0[0]), min(VIEWED_TOKENS, prompt.length - int(prompt.p0[0]))
    shown = slice(start, start + length)
    layers, numbers = map(list, zip(*heads, strict=True))
    recorded = record(model, prompt, PATTERNS, cache=None, interventions=interventions)
    patterns = recorded[0][layers, numbers][:, shown, shown]
    ids, tokenizer = prompt.ids[0, shown].tolist(), getattr(model, "tokenizer", None)
    tokens = [f"{token} " if tokenizer is None else tokenizer.decode([token]) for token in ids]
    return attention_view(tokens, patterns, [f"{layer}.{head}" for layer, head in heads], title)
