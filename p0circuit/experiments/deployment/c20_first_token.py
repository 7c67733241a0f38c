"""How much the prediction of a text depends on what stands at P0, and what a prefix changes about that (C20).

1. *Spread.* The first token of each row is replaced by others, drawn from the vocabulary. The spread of a row is the
   standard deviation over them of its loss, the mean over the predictions made from 8 positions after that token on:
   nearer ones depend on it as on any neighbour. Beside it the spread over all predictions, and by distance.
2. *Prefixes* before the first token, which then stands at position 1: a neutral token (the newline where the tokenizer
   has one token for it, else the most frequent token of the other samples), BOS, and a learned register. What is to be
   predicted is the same in all conditions: the text goes without its last token, which leaves room for a prefix.
3. *The register* is a vector in the place of the first embedding. It starts as that of the neutral token and is trained
   by gradient on the frozen model, on the samples that nothing is measured on, for the loss of step 1.
4. *Controls*: the neutral token stands second, behind the varied one, so that no one but P0 has changed places; and a
   token in the middle is varied, at the same distances from what is predicted: the spread that any token makes. The
   verdict asks for more than that a prefix halves the spread: in second place the same token must not, or what helps
   is one more token to read, not that another one is P0. That can only make the claim harder to reproduce.
5. *Recall by place.* Random tokens stand in the text at its start, a quarter on, in its middle and so on, and once more
   at its end. Recall is the loss of the second time (but for its first token, which nothing announces), taken off the
   loss of the same tokens where they had not been there before. With every prefix: does P0 cost the start its recall?

Measured where the model has a sink, on the text as it is or behind BOS. In random tokens there is nothing to predict.
Sources: a token in front that need mean nothing: Xiao et al. 2023 (arXiv 2309.17453); learned registers: Darcet et al.
2023 (arXiv 2309.16588); recall by place: Liu et al. 2023 (arXiv 2307.03172).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from p0circuit.figures.style import Series

FAR = 8
"""From so many positions after a token on its spread counts."""
SHORTEST = 3 * FAR
SNIPPET = 8
"""Tokens to recall; fewer where five times as many would not fit."""

Prefix = int | Tensor | None
"""What stands before a text: a token, a vector that block 0 reads there, or nothing."""
Losses = Float[np.ndarray, "sample token prediction"]
"""The loss of each prediction after a varied token: number 0 is made at it, whatever stands before it."""

NO_REGISTER = "there is no learned register: none is trained in a quick run of a large model, nor with a device map"
NONE, NEUTRAL, BOS, REGISTER = "no prefix", "neutral prefix", "BOS", "learned register"
SECOND, MIDDLE = "neutral token second", "token in the middle"


@dataclass(frozen=True)
class FirstTokenConfig:
    """`tokens` drawn for each of at most `samples` rows; `steps` of training on `batch` rows make the register.

    Without steps there is no register. `places`: where in the text what is to be recalled has stood, so many of them.
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
        config = self.config
        rows = min(config.samples, second_half(prompts))
        register = bool(config.steps) and placement_of(model) is None
        prefixes = 2 + (bos_id(model) is not None) + register
        trained = config.steps * config.batch * WITH_GRADIENT if register else 0
        # Every prefix and two controls with other first tokens; recall behind every prefix.
        runs = (prefixes + 2) * config.tokens + prefixes * (1 + config.places)
        return (runs * rows + trained) / prompts.n

    def quick(self, info: ModelInfo) -> FirstToken:
        if not is_large(info):
            return self
        return FirstToken(replace(self.config, tokens=3, samples=8, steps=0, places=3))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable without a sink, and where rows are padded or too short."""
        sink = studied_sink(model, prompts, in_either_condition=True)
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("needs rows without padding: something has to be put before them")
        if prompts.length < SHORTEST:
            raise NotApplicable(f"needs rows of at least {SHORTEST} tokens, got {prompts.length}")
        config = self.config
        # The halves of `studied_sink`, without BOS before them.
        others, chosen = text_as_it_is(model, prompts).split()
        text = chosen.subset(slice(0, config.samples))
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
        name = describe(model).title
        figures = {
            "spread": _draw_spread(far, pair, name),
            "reach": _draw_reach(tables["reach"], name),
            "recall": _draw_recall(recalled, name),
        }
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)


# Prefixes


def prefixes_of(
    model: HookedModel, others: PromptSet, config: FirstTokenConfig = FirstTokenConfig()
) -> dict[str, Prefix]:
    """Nothing, the neutral token, BOS if there is one, and a register trained on `others`.

    No register without steps of training, nor where the model has a device map: weights that are taken away after a
    pass are not there to go back.
    """
    neutral = neutral_token(model, others)
    found: dict[str, Prefix] = {NONE: None, NEUTRAL: neutral}
    if (bos := bos_id(model)) is not None:
        found[BOS] = bos
    if config.steps and placement_of(model) is None:
        what = f"register from token {neutral} in {config.steps} steps of {config.batch} rows"
        found[REGISTER] = cached(model, others, what, lambda: trained_register(model, others, neutral, config))
    return found


def neutral_token(model: HookedModel, others: PromptSet) -> int:
    """The newline where it is one token; else the most frequent token of some samples that is not a special one."""
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
    """A vector to stand before a text in the place of an embedding, trained for the loss behind any first token.

    It starts as what block 0 reads of the token `start`. The model's weights and their gradients stay as they are.
    """
    generator = torch.Generator().manual_seed(prompts.seed)
    count = min(config.batch, rows_with_gradients(describe(model), prompts.length))
    with torch.no_grad():
        first = forward(model, torch.tensor([[start]]), stop_at_layer=0)[0, 0].float()
    # In units of the embedding's own size, so that one learning rate does for all models.
    change = torch.zeros_like(first, requires_grad=True)
    size = first.square().mean().sqrt()
    optimizer = torch.optim.Adam([change], lr=0.1)
    for _ in range(config.steps):
        rows = prompts.subset(torch.randint(prompts.n, (count,), generator=generator))
        ids = _rows(_varied(_text(rows), drawn_tokens(model, rows, 1, generator), 0)[:, 0], start)
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
    """The losses of each row with other first tokens, behind every prefix; and those of the two controls."""
    text, neutral = _text(prompts), prefixes[NEUTRAL]
    drawn = drawn_tokens(model, prompts, tokens, torch.Generator().manual_seed(prompts.seed + 1))
    middle = text.shape[1] // 2
    first = _varied(text, drawn, 0)
    found = {name: _losses(model, first, prefix) for name, prefix in prefixes.items()}
    found[SECOND] = _losses(model, first, neutral, 1)
    found[MIDDLE] = _losses(model, _varied(text, drawn, middle))[:, :, middle:]
    return found


def drawn_tokens(
    model: HookedModel, prompts: PromptSet, tokens: int, generator: torch.Generator
) -> Int[Tensor, "sample token"]:
    """Tokens for each row, drawn from all of the vocabulary but special ones."""
    size, special = sampleable_vocabulary(model)
    pool = torch.tensor([token for token in range(size) if token not in special])
    return pool[torch.randint(len(pool), (prompts.n, tokens), generator=generator)]


def spread(losses: Losses) -> Float[np.ndarray, " sample"]:
    """The standard deviation over tokens of the mean loss."""
    return losses.mean(2).std(1, ddof=1)


def spreads_at_same_distance(losses: Mapping[str, Losses]) -> dict[str, Float[np.ndarray, " sample"]]:
    """The spread over first tokens and over tokens in the middle, over equally many predictions at equal distances."""
    stop = losses[MIDDLE].shape[2]
    return {name: spread(losses[name][:, :, FAR:stop]) for name in (NONE, MIDDLE)}


# Recall


def recall_by_place(
    model: HookedModel, prompts: PromptSet, prefixes: Mapping[str, Prefix], count: int = FirstTokenConfig.places
) -> dict[str, dict[int, Float[np.ndarray, " sample"]]]:
    """How much of the loss of some tokens it takes off that they stood in the text before: by prefix and place.

    In nats per token; the places are where the first of them stood in the text, which a prefix moves by one.
    """
    text = _text(prompts)
    length = text.shape[1]
    size = min(SNIPPET, length // 5)
    last = length - 3 * size
    places = [round(last * number / (count - 1)) for number in range(count)]
    generator = torch.Generator().manual_seed(prompts.seed + 2)
    snippet = drawn_tokens(model, prompts, size, generator)
    unseen = text.clone()
    unseen[:, -size:] = snippet
    seen = {place: unseen.clone() for place in places}
    for place, ids in seen.items():
        ids[:, place : place + size] = snippet

    def loss(ids: Tensor, prefix: Prefix) -> Float[np.ndarray, " sample"]:
        return _losses(model, ids[:, None], prefix)[:, 0, 1 - size :].mean(1)

    found = {}
    for name, prefix in prefixes.items():
        without = loss(unseen, prefix)
        found[name] = {place: without - loss(ids, prefix) for place, ids in seen.items()}
    return found


# Rows


def _text(prompts: PromptSet) -> Int[Tensor, "sample pos"]:
    """The rows without their last token, so that a prefix makes them no longer than they were."""
    return prompts.ids[:, :-1]


def _varied(
    text: Int[Tensor, "sample pos"], tokens: Int[Tensor, "sample token"], place: int
) -> Int[Tensor, "sample token pos"]:
    """Every row once with each of its tokens at one place."""
    rows = text[:, None].repeat(1, tokens.shape[1], 1)
    rows[:, :, place] = tokens
    return rows


def _rows(ids: Int[Tensor, "row pos"], inserted: int | None, place: int = 0) -> PromptSet:
    """Rows with a token inserted at one place, or as they are."""
    if inserted is None:
        return from_ids(ids)
    new = torch.full((len(ids), 1), inserted)
    return from_ids(torch.cat([ids[:, :place], new, ids[:, place:]], dim=1))


def _losses(model: HookedModel, ids: Int[Tensor, "sample token pos"], prefix: Prefix = None, place: int = 0) -> Losses:
    """The loss of every token but the first, with a prefix (or its token at another place)."""
    # A vector takes the place of some token's embedding.
    rows = _rows(ids.flatten(0, 1), 0 if isinstance(prefix, Tensor) else prefix, place)
    registers = [ablate(model, rows, ["embed"], prefix)] if isinstance(prefix, Tensor) else []
    losses = record(model, rows, TOKEN_LOSSES, interventions=registers).double()
    # The prediction of, or from, what was inserted is none of the text's.
    return losses[:, rows.length - ids.shape[2] :].unflatten(0, ids.shape[:2]).numpy()


# Tables and figures


def _spread_table(*spreads: Mapping[str, np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    which = ("far predictions", "all predictions", "far predictions, same distances")
    return pd.DataFrame(
        [
            {"predictions": kind, "condition": name, **bootstrap(values).to_json()}
            for kind, part in zip(which, spreads, strict=True)
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
            # The middle has no far end: its last group would be another than that of the others.
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
            {"prefix": name, "place": place, **bootstrap(values).to_json()}
            for name, gains in recalled.items()
            for place, values in gains.items()
        ]
    )


def _draw_spread(far: Mapping[str, np.ndarray], pair: Mapping[str, np.ndarray], model: str) -> Figure:
    from p0circuit.figures.intervals import intervals

    def measured(spreads: Mapping[str, np.ndarray]) -> dict[str, Interval]:
        return {name: bootstrap(values) for name, values in spreads.items()}

    panels = {
        "Other tokens in the first place": measured({name: far[name] for name in far if name != MIDDLE}),
        "Beside other tokens in the middle": measured({"in the first place": pair[NONE], MIDDLE: pair[MIDDLE]}),
    }
    title = f"{model}: how much the loss depends on the first token"
    unit = "standard deviation of the loss over tokens, nats per token"
    return intervals(panels, title, [unit, unit], controls=(SECOND, MIDDLE), reference=0)


def _draw_reach(reach: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    by_name = {name: part.set_index("distance") for name, part in reach.groupby("condition")}
    distances = by_name[NONE].index.tolist()
    shown = [name for name in (NONE, NEUTRAL, REGISTER, MIDDLE) if name in by_name]
    panels: dict[str, Sequence[Series]] = {
        "Spread over tokens": [_line(name, by_name[name].reindex(distances)) for name in shown]
    }
    title = f"{model}: how far a token reaches"
    return trajectories(panels, distances, title, "tokens after the varied one", ["standard deviation, nats"], log=True)


def _draw_recall(recalled: Mapping[str, Mapping[int, np.ndarray]], model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    places = list(recalled[NONE])
    middle = places[len(places) // 2]
    beyond = {name: {place: gains[place] - gains[middle] for place in places} for name, gains in recalled.items()}
    panels: dict[str, Sequence[Series]] = {
        title: [_line(name, part) for name, part in _recall_table(values).groupby("prefix", sort=False)]
        for title, values in {"Recall": recalled, "Beyond that of the middle": beyond}.items()
    }
    title = f"{model}: recall, at the end of the text, of tokens that stood in it before"
    labels = ["loss taken off, nats per token", "difference, nats per token"]
    return trajectories(panels, list(map(str, places)), title, "where they stood", labels, reference=0)


def _line(label: Any, table: pd.DataFrame) -> Series:
    from p0circuit.figures.style import Series

    return Series(str(label), *(table[end].tolist() for end in ("value", "low", "high")))
