"""How much the prediction of a text depends on the token at P0, with and without a prefix (C20).

1. *Spread.* The first token of each row is replaced by random tokens. The spread of a row is the standard deviation of
   its loss over these tokens, the loss being the mean over predictions made 8 or more positions after that token:
   nearer predictions depend on it as on any neighbour. The spread over all predictions and the spread by distance are
   measured too.
2. *Prefixes* before the first token, which moves to position 1: a neutral token (the newline if it is one token, else
   the most frequent token of the other samples), BOS, and a learned register. The predictions are the same in all
   conditions: the text lacks its last token, which leaves room for a prefix.
3. *The register* is a vector that replaces the first embedding. It starts as that of the neutral token and is trained
   by gradient with frozen weights, on the samples that are not measured, for the loss of step 1.
4. *Controls*: the neutral token at position 1, after the varied one, which stays P0; and a varied token in the middle,
   at the same distances from the predictions: the spread that any token causes. The verdict requires that the prefix
   halves the spread, and that the same token at position 1 does not: otherwise one more token helps, not another P0.
5. *Recall by position.* Random tokens are put into the text at its start, after a quarter, in its middle and so on, and
   once more at its end. Recall is the loss of the same tokens at the end without the earlier copy, minus their loss
   with it; the first token of the copy, which nothing predicts, does not count. It is measured with every prefix: does
   being P0 reduce the recall of the start?

Measured where the model has a sink, on the text as it is or after BOS. Random tokens cannot be predicted.
Sources: a token in front that need mean nothing: Xiao et al. 2023 (arXiv 2309.17453); learned registers: Darcet et al.
2023 (arXiv 2309.16588); recall by place: Liu et al. 2023 (arXiv 2307.03172).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import text_as_it_is
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.attribution import rows_with_gradients
from p0circuit.models import ModelInfo, describe, forward
from p0circuit.models.device_map import placement_of
from p0circuit.models.passes import WITH_GRADIENT
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import PromptSet, bos_id, from_ids
from p0circuit.recording.quantities import TOKEN_LOSSES
from p0circuit.recording.record import cached, record
from p0circuit.results import Result, metric_name
from p0circuit.stats import bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from p0circuit.figures.style import Series

FAR = 8
"""Minimum distance, in tokens, from the varied token at which losses are counted."""
SHORTEST = 3 * FAR
"""Minimum length of the prompts, in tokens."""
SNIPPET = 8
"""Number of tokens to recall; fewer if five times as many do not fit."""

Prefix = int | Tensor | None
"""The prefix of a text: a token, a vector in the place of an embedding, or None."""
Losses = Float[np.ndarray, "sample token prediction"]
"""The loss of each prediction from a varied token on: number 0 is made at the varied token."""

NO_REGISTER = "there is no learned register: none is trained in a quick run of a large model, nor with a device map"
NONE, NEUTRAL, BOS, REGISTER = "no prefix", "neutral prefix", "BOS", "learned register"
SECOND, MIDDLE = "neutral token second", "token in the middle"
_PREDICTIONS = ("far predictions", "all predictions", "far predictions, same distances")


@dataclass(frozen=True)
class FirstTokenConfig:
    """Settings of `FirstToken`.

    Attributes:
        tokens: number of first tokens for each row.
        samples: maximum number of prompts.
        steps: training steps of the register; 0 for none.
        batch: prompts in a training step.
        places: number of positions of the tokens to recall.
    """

    tokens: int = 8
    samples: int = 128
    steps: int = 40
    batch: int = 16
    places: int = 5


class FirstToken(Experiment[FirstTokenConfig]):
    """The spread of the loss over first tokens, and the recall of the start, with and without a prefix."""

    id = "first-token"
    title = "What hangs on the first token"
    config_type = FirstTokenConfig
    needs_control = False
    claim = Claim(
        id="C20",
        title="First-token sensitivity",
        source="ours; learned registers: Darcet et al., arXiv 2309.16588",
        statement="Prediction depends on what happens to stand at P0, and a neutral token before it takes that away.",
        measure="The standard deviation, over tokens in the first place, of the mean loss from 8 positions on; behind "
        "a neutral prefix over without one. Stricter than the statement: the same token behind the varied one has to "
        "leave more than half, or it need not stand before it.",
        criteria=(
            Criterion("spread_left_with_neutral_prefix", "<=", 0.5, "high"),
            Criterion("spread_left_with_neutral_token_second", ">", 0.5, "low"),
        ),
        control="The neutral token behind the varied one; a token in the middle varied.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare a run for each first token, and the recall test."""
        config = self.config
        rows = min(config.samples, second_half(prompts))
        register = bool(config.steps) and placement_of(model) is None
        prefixes = 2 + (bos_id(model) is not None) + register
        trained = config.steps * config.batch * WITH_GRADIENT if register else 0
        # Every prefix and two controls with other first tokens; recall behind every prefix.
        runs = (prefixes + 2) * config.tokens + prefixes * (1 + config.places)
        return (runs * rows + trained) / prompts.n

    def quick(self, info: ModelInfo) -> FirstToken:
        """Return a version for large models with fewer samples and first tokens."""
        if not is_large(info):
            return self
        return FirstToken(replace(self.config, tokens=3, samples=8, steps=0, places=3))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure spread and recall with every prefix.

        Args:
            model: the model to measure.
            prompts: natural text without padding.

        Raises:
            NotApplicable: there is no sink, rows are padded or too short, or no prediction depends on the first token.
        """
        sink = studied_sink(model, prompts, in_either_condition=True)
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("needs rows without padding: something has to be put before them")
        if prompts.length < SHORTEST:
            raise NotApplicable(f"needs rows of at least {SHORTEST} tokens, got {prompts.length}")
        config = self.config
        # The halves of `studied_sink`, without BOS before them.
        others, rows = text_as_it_is(model, prompts).split()
        text = rows.subset(slice(0, config.samples))
        prefixes = prefixes_of(model, others, config)
        sensitivity = first_token_losses(model, text, prefixes, config.tokens)
        far = {name: spread(losses[:, :, FAR:]) for name, losses in sensitivity.items()}
        if not far[NONE].any():
            raise NotApplicable("no prediction depends on the first token at all")
        near = {name: spread(losses) for name, losses in sensitivity.items()}
        pair = spreads_at_same_distance(sensitivity)
        recalled = recall_by_place(model, text, prefixes, config.places)

        metrics = {"spread_without_prefix": bootstrap(far[NONE])}
        for name in (*prefixes, SECOND):
            if name != NONE:
                metrics[f"spread_left_with_{metric_name(name)}"] = ratio_interval(far[name], far[NONE])
                metrics[f"spread_left_with_{metric_name(name)}_all_predictions"] = ratio_interval(
                    near[name], near[NONE]
                )
        metrics["spread_of_first_over_middle_token"] = ratio_interval(pair[NONE], pair[MIDDLE])
        level = {name: losses[:, :, FAR:].mean((1, 2)) for name, losses in sensitivity.items() if name in prefixes}
        metrics["loss_without_prefix"] = bootstrap(level[NONE])
        metrics |= {
            f"loss_added_by_{metric_name(name)}": bootstrap(values - level[NONE])
            for name, values in level.items()
            if name != NONE
        }
        for name, gains in recalled.items():
            first, middle = gains[0], gains[list(gains)[len(gains) // 2]]
            metrics[f"recall_of_the_start_with_{metric_name(name)}"] = bootstrap(first)
            metrics[f"recall_of_middle_beyond_start_with_{metric_name(name)}"] = bootstrap(middle - first)
        tables = {
            "spread": _spread_table(far, near, pair),
            "reach": _reach_table(sensitivity),
            "recall": _recall_table(recalled),
            "recall_beyond_middle": _recall_table(_beyond_middle(recalled)),
        }
        neutral = prefixes[NEUTRAL]
        notes = [
            sink.note,
            f"that sink is in text {sink.condition}; measured on {text.n} rows",
            f"the neutral token is {neutral}"
            + (f" ({model.tokenizer.decode([neutral])!r})" if model.tokenizer is not None else ", the most frequent"),
        ]
        if REGISTER not in prefixes:
            notes.append(NO_REGISTER)
        if BOS not in prefixes:
            notes.append("there is no BOS token: the condition with BOS is left out")
        if model.tokenizer is None:
            notes.append("the prompts are random tokens: their losses tell little about text")
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the spread by prefix, the spread by distance, and the recall by position."""
        tables, name = result.tables, result.model_title
        return {
            "spread": _draw_spread(tables["spread"], name),
            "reach": _draw_reach(tables["reach"], name),
            "recall": _draw_recall(tables["recall"], tables["recall_beyond_middle"], name),
        }


# Prefixes


def prefixes_of(
    model: HookedModel, others: PromptSet, config: FirstTokenConfig = FirstTokenConfig()
) -> dict[str, Prefix]:
    """Return the prefixes by name: none, the neutral token, BOS if there is one, and a register trained on `others`.

    There is no register without training steps, or with a device map: offloaded weights allow no backward pass.

    Args:
        model: the model.
        others: prompts that are not measured.
        config: settings of the register.
    """
    neutral = neutral_token(model, others)
    prefixes: dict[str, Prefix] = {NONE: None, NEUTRAL: neutral}
    if (bos := bos_id(model)) is not None:
        prefixes[BOS] = bos
    if config.steps and placement_of(model) is None:
        what = f"register from token {neutral} in {config.steps} steps of {config.batch} rows"
        prefixes[REGISTER] = cached(model, others, what, lambda: trained_register(model, others, neutral, config))
    return prefixes


def neutral_token(model: HookedModel, others: PromptSet) -> int:
    """Return the newline if it is one token; else the most frequent token of some prompts that is not special.

    Args:
        model: the model, for its tokenizer and vocabulary.
        others: the prompts.
    """
    if model.tokenizer is not None:
        newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"]
        if len(newline) == 1:
            return int(newline[0])
    size, special = sampleable_vocabulary(model)
    counts = others.ids[others.attention_mask].bincount(minlength=size)
    counts[list(special)] = 0
    return int(counts.argmax())


def trained_register(
    model: HookedModel, prompts: PromptSet, start: int, config: FirstTokenConfig = FirstTokenConfig()
) -> Float[Tensor, " d_model"]:
    """Train a vector that, as the first embedding, minimises the loss after a random first token.

    The model's weights and their gradients do not change.

    Args:
        model: the model.
        prompts: prompts to train on.
        start: the token whose embedding is the initial value.
        config: number of steps and prompts per step.
    """
    generator = torch.Generator().manual_seed(prompts.seed)
    count = min(config.batch, rows_with_gradients(describe(model), prompts.length))
    with torch.no_grad():
        first = forward(model, torch.tensor([[start]]), stop_at_layer=0)[0, 0].float()
    # In units of the embedding's size, so that one learning rate works for all models.
    change = torch.zeros_like(first, requires_grad=True)
    size = first.square().mean().sqrt()
    optimizer = torch.optim.Adam([change], lr=0.1)
    for _ in range(config.steps):
        rows = prompts.subset(torch.randint(prompts.n, (count,), generator=generator))
        ids = _rows(_varied(_text(rows), sampled_tokens(model, rows, 1, generator), 0)[:, 0], start)
        with torch.enable_grad():
            register = ablate(model, ids, ["embed"], first + size * change)
            logits = forward(model, ids.ids, hooks=register.hooks())[:, 1 + FAR : -1]
            loss = cross_entropy(logits.flatten(0, 1).float(), ids.ids[:, 2 + FAR :].flatten().to(logits.device))
            # Not `backward`, which would leave gradients on the model.
            (change.grad,) = torch.autograd.grad(loss, [change])
        optimizer.step()
    return (first + size * change).detach()


# Spread


def first_token_losses(
    model: HookedModel, prompts: PromptSet, prefixes: Mapping[str, Prefix], tokens: int = FirstTokenConfig.tokens
) -> dict[str, Losses]:
    """Measure the losses of each row with other first tokens after every prefix, and those of the two controls.

    Args:
        model: the model.
        prompts: the rows.
        prefixes: the prefixes by name, the neutral token among them.
        tokens: number of first tokens for each row.
    """
    text, neutral = _text(prompts), prefixes[NEUTRAL]
    sampled = sampled_tokens(model, prompts, tokens, torch.Generator().manual_seed(prompts.seed + 1))
    middle = text.shape[1] // 2
    first = _varied(text, sampled, 0)
    losses = {name: _losses(model, first, prefix) for name, prefix in prefixes.items()}
    losses[SECOND] = _losses(model, first, neutral, 1)
    losses[MIDDLE] = _losses(model, _varied(text, sampled, middle))[:, :, middle:]
    return losses


def sampled_tokens(
    model: HookedModel, prompts: PromptSet, tokens: int, generator: torch.Generator
) -> Int[Tensor, "sample token"]:
    """Draw tokens for each row from the vocabulary without special tokens.

    Args:
        model: the model, for its vocabulary.
        prompts: the rows.
        tokens: number of tokens for each row.
        generator: source of randomness.
    """
    size, special = sampleable_vocabulary(model)
    pool = torch.tensor([token for token in range(size) if token not in special])
    return pool[torch.randint(len(pool), (prompts.n, tokens), generator=generator)]


def spread(losses: Losses) -> Float[np.ndarray, " sample"]:
    """Return the standard deviation over tokens of the mean loss.

    Args:
        losses: losses with every token.
    """
    return losses.mean(2).std(1, ddof=1)


def spreads_at_same_distance(losses: Mapping[str, Losses]) -> dict[str, Float[np.ndarray, " sample"]]:
    """Return the spreads over first tokens and over tokens in the middle, for predictions at equal distances.

    Args:
        losses: losses by condition, those of NONE and MIDDLE among them.
    """
    stop = losses[MIDDLE].shape[2]
    return {name: spread(losses[name][:, :, FAR:stop]) for name in (NONE, MIDDLE)}


# Recall


def recall_by_place(
    model: HookedModel, prompts: PromptSet, prefixes: Mapping[str, Prefix], count: int = FirstTokenConfig.places
) -> dict[str, dict[int, Float[np.ndarray, " sample"]]]:
    """Measure by how much an earlier copy of some tokens reduces their loss, in nats per token.

    Args:
        model: the model.
        prompts: the rows.
        prefixes: the prefixes by name.
        count: number of positions of the copy.

    Returns:
        By prefix and by position of the copy in the text, not counting the prefix.
    """
    text = _text(prompts)
    length = text.shape[1]
    size = min(SNIPPET, length // 5)
    last = length - 3 * size
    positions = [round(last * number / (count - 1)) for number in range(count)]
    generator = torch.Generator().manual_seed(prompts.seed + 2)
    snippet = sampled_tokens(model, prompts, size, generator)
    unseen = text.clone()
    unseen[:, -size:] = snippet
    seen = {position: unseen.clone() for position in positions}
    for position, ids in seen.items():
        ids[:, position : position + size] = snippet

    def loss(ids: Tensor, prefix: Prefix) -> Float[np.ndarray, " sample"]:
        return _losses(model, ids[:, None], prefix)[:, 0, 1 - size :].mean(1)

    recalled = {}
    for name, prefix in prefixes.items():
        without = loss(unseen, prefix)
        recalled[name] = {position: without - loss(ids, prefix) for position, ids in seen.items()}
    return recalled


def _beyond_middle(recalled: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, dict[int, np.ndarray]]:
    """The recall of every position minus that of the middle one."""
    positions = list(recalled[NONE])
    middle = positions[len(positions) // 2]
    return {
        name: {position: gains[position] - gains[middle] for position in positions} for name, gains in recalled.items()
    }


# Rows


def _text(prompts: PromptSet) -> Int[Tensor, "sample pos"]:
    """The rows without their last token, so that a prefix makes them no longer than they were."""
    return prompts.ids[:, :-1]


def _varied(
    text: Int[Tensor, "sample pos"], tokens: Int[Tensor, "sample token"], position: int
) -> Int[Tensor, "sample token pos"]:
    """Every row once with each of its tokens at one position."""
    rows = text[:, None].repeat(1, tokens.shape[1], 1)
    rows[:, :, position] = tokens
    return rows


def _rows(ids: Int[Tensor, "row pos"], inserted: int | None, position: int = 0) -> PromptSet:
    """Rows with a token inserted at one position, or as they are."""
    if inserted is None:
        return from_ids(ids)
    new = torch.full((len(ids), 1), inserted)
    return from_ids(torch.cat([ids[:, :position], new, ids[:, position:]], dim=1))


def _losses(
    model: HookedModel, ids: Int[Tensor, "sample token pos"], prefix: Prefix = None, position: int = 0
) -> Losses:
    """The loss of every token but the first, with a prefix (or its token at another position)."""
    # A vector replaces the embedding of token 0.
    rows = _rows(ids.flatten(0, 1), 0 if isinstance(prefix, Tensor) else prefix, position)
    registers = [ablate(model, rows, ["embed"], prefix)] if isinstance(prefix, Tensor) else []
    losses = record(model, rows, TOKEN_LOSSES, interventions=registers).double()
    # Predictions of an inserted token, or from it, do not count.
    return losses[:, rows.length - ids.shape[2] :].unflatten(0, ids.shape[:2]).numpy()


# Tables and figures


def _spread_table(*spreads: Mapping[str, np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        [
            {"predictions": kind, "condition": name, **bootstrap(values).to_json()}
            for kind, part in zip(_PREDICTIONS, spreads, strict=True)
            for name, values in part.items()
        ]
    )


def _reach_table(losses: Mapping[str, Losses]) -> pd.DataFrame:
    """The spread by distance from the varied token: 0, 1, 2-3, 4-7, 8-15 and so on."""
    import pandas as pd

    rows = []
    for name, values in losses.items():
        last = values.shape[2] - 1
        for start in (0, *(2**power for power in range(last.bit_length()))):
            # After the middle the row is shorter: an incomplete last group would have other distances.
            stop = max(0, 2 * start - 1)
            if stop <= last or name != MIDDLE:
                stop = min(stop, last)
                distance = str(start) if start == stop else f"{start}-{stop}"
                measured = bootstrap(spread(values[:, :, start : stop + 1]))
                rows.append({"condition": name, "distance": distance, **measured.to_json()})
    return pd.DataFrame(rows)


def _recall_table(recalled: Mapping[str, Mapping[int, np.ndarray]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        [
            {"prefix": name, "place": position, **bootstrap(values).to_json()}
            for name, gains in recalled.items()
            for position, values in gains.items()
        ]
    )


def _draw_spread(table: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.intervals import intervals, intervals_by

    far, _, pair = (intervals_by(table.loc[table["predictions"] == kind], "condition") for kind in _PREDICTIONS)
    panels = {
        "Other tokens in the first place": {name: interval for name, interval in far.items() if name != MIDDLE},
        "Beside other tokens in the middle": {"in the first place": pair[NONE], MIDDLE: pair[MIDDLE]},
    }
    title = f"{model}: how much the loss depends on the first token"
    unit = "standard deviation of the loss over tokens, nats per token"
    return intervals(panels, title, [unit, unit], controls=(SECOND, MIDDLE), reference=0)


def _draw_reach(reach: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    by_name = {name: part.set_index("distance") for name, part in reach.groupby("condition")}
    distances = by_name[NONE].index.tolist()
    names = [name for name in (NONE, NEUTRAL, REGISTER, MIDDLE) if name in by_name]
    panels: dict[str, Sequence[Series]] = {
        "Spread over tokens": [_line(name, by_name[name].reindex(distances)) for name in names]
    }
    title = f"{model}: how far a token reaches"
    return trajectories(panels, distances, title, "tokens after the varied one", ["standard deviation, nats"], log=True)


def _draw_recall(recall: pd.DataFrame, beyond_middle: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import series_by, trajectories

    panels = {"Recall": series_by(recall, "prefix"), "Beyond that of the middle": series_by(beyond_middle, "prefix")}
    positions = [str(position) for position in recall["place"].unique()]
    title = f"{model}: recall, at the end of the text, of tokens that stood in it before"
    labels = ["loss taken off, nats per token", "difference, nats per token"]
    return trajectories(panels, positions, title, "where they stood", labels, reference=0)


def _line(label: object, table: pd.DataFrame) -> Series:
    from p0circuit.figures.style import Series

    return Series(str(label), *(table[end].tolist() for end in ("value", "low", "high")))
