"""C3: does any token become the sink? Every token of the vocabulary at P0 (paper, section on recognition).

1. Choose the sink heads on one half of the samples. The first prompts of the other half are the continuations.
2. P0 attends to itself alone, so the key that a token has at P0 follows from a row of one token. Put the key of every
   token before the queries of the fixed continuations: the sink score that each token draws (`vocabulary_sweep`).
3. Report the share of tokens that draw at least half of what the median token draws, and list the other tokens.
4. Put random tokens into full runs as well, where the queries may respond to them: once at P0 and, as the control, once
   at position 8.
5. If the prompts begin with BOS, other tokens replace it. The median of what they draw has to be at least half of what
   BOS draws: a sink that depends on BOS is not a sink of any token.
6. A linear probe shows, layer by layer, how much of the token's identity is left in P0's stream, and at position 8.

Decided before measuring:

- *The interval* of the share is over continuations: the whole vocabulary is measured, so nothing is sampled. All ids of
  tokens of the tokenizer count, special ones too; without a tokenizer, all ids. A quick run of a large model measures a
  random sample of the vocabulary; the interval then also covers Wilson's interval over tokens.
- *The probe.* P0's stream depends on its token only: all occurrences of a token at P0 have the same vector, and a
  classifier trained on one occurrence knows all others. So *other tokens* are held out: a linear map (ridge) from the
  stream at unit length, which the next block reads, to the token's embedding is fitted on one half of the tokens and
  tested on the other half. A token counts as a hit if, of all embeddings, its own has the smallest angle to the
  prediction. Position 8 is treated alike: every token once, after 8 random tokens. The penalty is a hundredth of the
  variance per channel of unit vectors without a common direction: later blocks cannot use differences smaller than
  that. The map has `d_model` columns and needs more tokens than that to be fitted.
- *Token share of the stream*: one minus the squared length of the mean unit vector: what differs between tokens. It is
  exact for vocabularies of any size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import Heads, mean_over_heads, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.closed_form import NotOfTheClosedForm, QueryScores, query_side
from p0circuit.interventions.vocabulary import CHUNK, vocabulary_sweep
from p0circuit.log import progress_bar
from p0circuit.models import ModelError, ModelInfo, describe
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import WITH_BOS, PromptSet, bos_id, condition_of, random_tokens
from p0circuit.recording.quantities import residual_at, score_at
from p0circuit.recording.record import record
from p0circuit.results import Result, metric_name
from p0circuit.sink import CONTROL
from p0circuit.stats import LEVEL, Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PENALTY = 0.01
"""Ridge penalty of the probe, in units of the variance per channel of unit vectors without a common direction."""
_PERCENT = range(0, 101, 5)


@dataclass(frozen=True)
class AnyTokenConfig:
    """Settings of `AnyToken`.

    Attributes:
        half: share of the median score from which a token counts as a sink.
        continuations: number of prompts whose queries meet every token.
        full_tokens: number of tokens that are put into full runs.
        full_continuations: number of continuations in full runs.
        probe_tokens: maximum number of tokens that the probe is fitted and tested on.
        control: position, counted from P0, that is compared with P0.
        sample: number of tokens of the vocabulary to measure, drawn at random; None for all of them.
    """

    half: float = 0.5
    continuations: int = 32
    full_tokens: int = 128
    full_continuations: int = 4
    probe_tokens: int = 4096
    control: int = CONTROL
    sample: int | None = None


class AnyToken(Experiment[AnyTokenConfig]):
    """The sink score that every token of the vocabulary draws at P0, and a probe of what P0's stream encodes of it."""

    id = "any-token"
    title = "Any token becomes the sink"
    config_type = AnyTokenConfig
    claim = Claim(
        id="C3",
        title="No semantics needed",
        source="Peng et al., arXiv 2603.06591, section on recognition",
        statement="Which token stands at position zero makes next to no difference: every one becomes the sink.",
        measure="The sink score of sink heads that every token of the vocabulary draws as P0 from the queries of "
        "fixed continuations; the share of tokens with at least half of the median score. On prompts that begin with "
        "BOS also the median score over that of BOS.",
        criteria=(
            Criterion("share_of_tokens_with_half_the_median_score", ">=", 0.9),
            Criterion("median_score_over_that_of_bos", ">=", 0.5, if_measured=True),
        ),
        control="The same tokens at position 8 of full runs, held against the same median.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the sweep of the vocabulary, the full runs and the probe."""
        config, rows, vocabulary = self.config, second_half(prompts), sampleable_vocabulary(model)[0]
        swept = vocabulary if config.sample is None else min(config.sample, vocabulary)
        full = min(config.full_tokens, swept) * min(config.full_continuations, rows)
        probed = min(config.probe_tokens, swept)
        # Each probed token once at P0, and once after `control` others.
        tokens = swept + 2 * full * prompts.length + probed * (config.control + 2)
        return min(config.continuations, rows) / prompts.n + tokens / (prompts.n * prompts.length)

    def quick(self, info: ModelInfo) -> AnyToken:
        """Return a version for large models that measures a sample of the vocabulary."""
        if not is_large(info):
            return self
        smaller = replace(
            self.config, sample=4096, continuations=8, full_tokens=16, full_continuations=2, probe_tokens=256
        )
        return AnyToken(smaller)

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Sweep the vocabulary, check random tokens in full runs, and fit the probe.

        Raises:
            NotApplicable: there is no sink, or attention to P0 does not follow from its key.
        """
        import pandas as pd

        info, config = describe(model), self.config
        sink = studied_sink(model, prompts)
        generator = torch.Generator().manual_seed(prompts.seed)
        vocabulary = torch.arange(sampleable_vocabulary(model)[0])
        sampled = config.sample is not None and config.sample < len(vocabulary)
        tokens = vocabulary
        if sampled:
            tokens = torch.randperm(len(vocabulary), generator=generator)[: config.sample].sort().values
        continuations = sink.prompts.subset(slice(0, config.continuations))
        try:
            scores, norms, bos_scores = _swept(model, continuations, tokens, sink.heads)
        except (NotOfTheClosedForm, ModelError) as error:
            raise NotApplicable(f"the keys of {info.title} cannot be exchanged one by one: {error}") from error
        by_token = scores.mean(1)
        median = float(np.median(by_token))

        shuffled = torch.randperm(len(tokens), generator=generator)
        full_tokens = tokens[shuffled[: config.full_tokens]]
        full_rows = sink.prompts.subset(slice(0, config.full_continuations))
        full, control = (
            _full_runs(model, full_rows, full_tokens, sink.heads, position) for position in (0, config.control)
        )
        needed = config.half * np.median(full)
        table = pd.DataFrame(
            {
                "token": tokens.numpy(),
                "text": token_texts(model, tokens),
                "sink_score": by_token,
                "over_median": by_token / median,
                "norm_after_block_1": norms[:, min(2, info.n_layers)].double().numpy(),
            }
        )
        ranked = table.sort_values("sink_score", kind="stable")
        exceptions = ranked.loc[ranked["sink_score"].to_numpy() < config.half * median]
        share = bootstrap(scores.T, functools.partial(share_at_least, half=config.half))
        metrics = {
            "share_of_tokens_with_half_the_median_score": over_tokens(share, len(tokens)) if sampled else share,
            "median_score": bootstrap(scores.T, lambda means: np.median(means, axis=-1)),
            "lowest_score_over_median": bootstrap(scores.T, lambda means: means.min(-1) / np.median(means, axis=-1)),
            "share_in_full_runs": bootstrap(full >= needed),
            "share_at_position_8_in_full_runs": bootstrap(control >= needed),
        }
        notes = [sink.note]
        if bos_scores is not None:
            metrics["median_score_over_that_of_bos"] = over = ratio_interval(np.median(scores, axis=0), bos_scores)
            depends = "depends" if over.value < config.half else "does not depend"
            notes.append(
                f"the prompts begin with BOS, which draws a score of {bos_scores.mean():.3f}; the median token in its "
                f"place draws {over} of that: the sink {depends} on BOS"
            )
        lowest = f"; the lowest: {_named(exceptions)}" if len(exceptions) else ""
        notes.append(
            f"{len(exceptions)} of {len(tokens)} tokens draw less than half of the median score of {median:.3f}{lowest}"
        )
        if sampled:
            notes.append(f"these {len(tokens)} tokens are a random sample of a vocabulary of {len(vocabulary)}")
        probe, why_not = probe_by_layer(model, tokens[shuffled[: config.probe_tokens]], config.control, prompts.seed)
        notes += [why_not] if why_not else []
        for position in ("P0", f"position {config.control}"):
            last = probe[probe["place"] == position].iloc[min(2, info.n_layers)]
            metrics[f"token_share_of_the_stream_after_block_1_at_{metric_name(position)}"] = Interval(
                last["token_share"], last["token_share_low"], last["token_share_high"], int(last["n"])
            )
        return Result(
            self.id,
            self.title,
            metrics,
            {"tokens": table, "exceptions": exceptions, "probe": probe},
            notes=notes,
            drawing={"P0, full runs": full, f"position {config.control}, full runs": control, "sampled": sampled},
        )

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the scores of the tokens in order, and the probe by layer."""
        return {
            "tokens": _draw_tokens(result, self.config.half),
            "probe": _draw_probe(result.tables["probe"], result.model_title),
        }


def _swept(
    model: HookedModel, prompts: PromptSet, tokens: Int[Tensor, " token"], heads: Heads
) -> tuple[np.ndarray, Tensor, np.ndarray | None]:
    """`scores_by_token`, and the scores of BOS by sample if the prompts begin with it."""
    if condition_of(model, prompts) != WITH_BOS:
        return *scores_by_token(model, prompts, tokens, heads), None
    # In the same sweep: the tokens may be a sample without BOS.
    scores, norms = scores_by_token(model, prompts, torch.cat([tokens, torch.tensor([bos_id(model)])]), heads)
    return scores[:-1], norms[:-1], scores[-1]


def _full_runs(
    model: HookedModel, prompts: PromptSet, tokens: Int[Tensor, " token"], heads: Heads, position: int
) -> Float[np.ndarray, " token"]:
    """The score of a position with each token there, mean over prompts and heads."""
    ids = prompts.ids.repeat(len(tokens), 1)
    p0 = prompts.p0.repeat(len(tokens))
    ids[torch.arange(len(ids)), p0 + position] = tokens.repeat_interleave(prompts.n)
    mask = prompts.attention_mask.repeat(len(tokens), 1)
    rows = replace(prompts, ids=ids, attention_mask=mask, overflow=None)
    scores = record(model, rows, score_at(position), condition=f"tokens at {position}").double()
    return mean_over_heads(scores, heads).reshape(len(tokens), -1).mean(1)


def probe_by_layer(
    model: HookedModel, tokens: Int[Tensor, " token"], control: int = CONTROL, seed: int = 0
) -> tuple[pd.DataFrame, str]:
    """Measure how much of a token's identity is left in the stream, at P0 and at an ordinary position.

    Args:
        model: the model.
        tokens: token ids in random order; the first half is fitted, the other half tested.
        control: the ordinary position, counted from P0; random tokens are before it.
        seed: seed of these tokens.

    Returns:
        A data frame with a row for each layer and position; and the reason why no probe is fitted, empty if one is.
    """
    import pandas as pd

    info = describe(model)
    size, special = sampleable_vocabulary(model)
    rows = random_tokens(size, len(tokens), control + 1, seed, special=special)
    rows.ids[:, control] = tokens
    control_streams = record(model, rows, residual_at(control), condition="probe")
    streams = vocabulary_sweep(model, tokens, residual_layers=range(info.n_layers + 1)).residual
    # The tokens are in random order already.
    train = torch.arange(len(tokens)) < len(tokens) // 2
    determined = int(train.sum()) > info.d_model
    lines = []
    for layer in range(info.n_layers + 1):
        for position, stream in (("P0", streams[layer]), (f"position {control}", control_streams[:, layer])):
            units = normalize(stream.double(), dim=-1)
            line = {"layer": layer, "place": position, **_columns("token_share", token_share(units))}
            if determined:
                hits, explained = embedding_probe(units, streams[0].double(), train)
                line |= _columns("accuracy", bootstrap(hits.double().numpy()))
                line |= {"variance_explained": explained, "chance": 1 / len(tokens)}
            lines.append(line | {"n": len(tokens)})
    reason = f"no probe: half of {len(tokens)} tokens do not determine a map of {info.d_model} channels"
    return pd.DataFrame(lines), "" if determined else reason


@torch.no_grad()
def scores_by_token(
    model: HookedModel,
    prompts: PromptSet,
    tokens: Int[Tensor, " token"],
    heads: Heads,
    chunk: int = CHUNK,
) -> tuple[Float[np.ndarray, "token sample"], Float[Tensor, "token layer_and_end"]]:
    """Measure the mean sink score of heads with each token's key in the place of P0's key.

    Like `vocabulary.sink_scores_by_token`, which returns the mean over prompts for all heads.

    Args:
        model: the model.
        prompts: the continuations, whose queries attend.
        tokens: token ids.
        heads: heads as (layer, head).
        chunk: number of tokens in one batch of the sweep.

    Returns:
        The scores [token, sample]; and, from the same sweep, the norm of each token's stream at P0 before each block
        and at the end, [token, n_layers + 1].

    Raises:
        NotOfTheClosedForm: attention to P0 does not follow from query and key.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    sides: dict[int, QueryScores] = {}

    def keep(layer: int, side: QueryScores) -> None:
        if layer in by_layer:
            sides[layer] = side

    query_side(model, prompts, keep)
    scores = torch.zeros(len(tokens), prompts.n, dtype=torch.float64)
    norms: list[Tensor] = []
    # A batch of scores is [token, prompt, head, query]: some tens of megabytes.
    batch = max(1, 2**23 // (prompts.n * describe(model).n_heads * prompts.length))
    for start in progress_bar(range(0, len(tokens), chunk), "sweeping the vocabulary"):
        sweep = vocabulary_sweep(model, tokens[start : start + chunk], key_layers=list(by_layer), chunk=chunk)
        norms.append(sweep.norms)
        for layer, key in sweep.keys.items():
            for first, part in zip(range(start, start + chunk, batch), key.split(batch), strict=False):
                spread = part[:, None].expand(-1, prompts.n, -1, -1).to(sides[layer].query)
                of_heads = sides[layer].sink_scores(spread)[..., by_layer[layer]]
                scores[first : first + len(part)] += of_heads.double().sum(-1).cpu()
    return (scores / len(heads)).numpy(), torch.cat(norms)


def over_tokens(share: Interval, tokens: int) -> Interval:
    """Return the interval of a share of sampled tokens, wide enough for both sources of error.

    Args:
        share: the share with its interval over continuations.
        tokens: number of tokens in the sample.

    Returns:
        The share, with an interval that covers the given one and Wilson's over tokens.
    """
    from scipy.stats import binomtest

    hits = round(share.value * tokens)
    wilson = binomtest(hits, tokens).proportion_ci(LEVEL, method="wilson")
    return Interval(share.value, min(share.low, float(wilson.low)), max(share.high, float(wilson.high)), tokens)


def share_at_least(scores: Float[np.ndarray, "*draw token"], half: float) -> Float[np.ndarray, "*draw"] | np.floating:
    """Return the share of tokens that have at least `half` of the median score.

    Args:
        scores: sink scores, tokens on the last axis.
        half: share of the median score.
    """
    return (scores >= half * np.median(scores, axis=-1, keepdims=True)).mean(-1)


def embedding_probe(
    read: Float[Tensor, "token d_model"],
    embedding: Float[Tensor, "token d_embedding"],
    train: Bool[Tensor, " token"],
    penalty: float = PENALTY,
) -> tuple[Bool[Tensor, " held_out"], float]:
    """Fit a linear map from streams to embeddings on some tokens, and test it on the others.

    Args:
        read: what the map reads of each token.
        embedding: what it has to predict of each token.
        train: which tokens it is fitted on.
        penalty: ridge penalty, in units of the variance per channel of unit vectors.

    Returns:
        For each other token whether its own embedding is, of all embeddings, the nearest in angle to the prediction;
        and the share of the variance explained on the other tokens.
    """
    x, y = read - read[train].mean(0), embedding - embedding[train].mean(0)
    known, size = x[train], x.shape[1]
    ridge = penalty * len(known) / size * torch.eye(size, dtype=x.dtype)
    predicted = x[~train] @ torch.linalg.solve(known.T @ known + ridge, known.T @ y[train])
    nearest = (predicted @ normalize(y, dim=-1).T).argmax(1)
    right = (~train).nonzero().squeeze(1)
    missed = (y[~train] - predicted).square().sum() / y[~train].square().sum()
    return nearest == right, float(1 - missed)


def token_share(units: Float[Tensor, "token d_model"]) -> Interval:
    """Return one minus the squared length of the mean of unit vectors, with its interval over tokens.

    Args:
        units: unit vectors.
    """
    cosines = bootstrap((units @ units.mean(0)).numpy())
    # The square of the mean's length changes twice as fast as the mean projection on it, which is linear.
    low, high = (2 * (end - cosines.value) for end in (cosines.low, cosines.high))
    return Interval(1 - cosines.value, 1 - cosines.value - high, 1 - cosines.value - low, len(units))


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def token_texts(model: HookedModel, tokens: Int[Tensor, " token"]) -> list[str]:
    """Return the tokens as quoted text; empty strings for a model without a tokenizer.

    Args:
        model: the model.
        tokens: token ids.
    """
    tokenizer = getattr(model, "tokenizer", None)
    return [""] * len(tokens) if tokenizer is None else [repr(tokenizer.decode([token])) for token in tokens.tolist()]


def _named(exceptions: pd.DataFrame, most: int = 8) -> str:
    """The first of these tokens as text."""
    names = [text or str(token) for token, text in zip(exceptions["token"], exceptions["text"], strict=True)]
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _draw_tokens(result: Result, half: float) -> Figure:
    from p0circuit.figures.lines import trajectories
    from p0circuit.figures.style import Series

    by_token = result.tables["tokens"]["sink_score"].to_numpy()
    runs = dict(result.drawing)
    which = "a sample of" if runs.pop("sampled", False) else "all"
    quantiles = {f"P0 ({which} {len(by_token)} tokens)": by_token, **runs}
    series = [Series(name, np.percentile(values, _PERCENT).tolist()) for name, values in quantiles.items()]
    return trajectories(
        {"Dashed: half the median score": series},
        [str(percent) for percent in _PERCENT],
        f"{result.model_title}: every token at position zero",
        "% of tokens with a lower score",
        ["sink score"],
        reference=half * float(np.median(by_token)),
    )


def _draw_probe(probe: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories
    from p0circuit.figures.style import Series

    def series(column: str) -> list[Series]:
        return [
            Series(str(position), *(part[column + end].tolist() for end in ("", "_low", "_high")))
            for position, part in probe.groupby("place", sort=False)
        ]

    panels = {"What differs between tokens": series("token_share")}
    labels = ["share of the unit-length stream"]
    if "accuracy" in probe:
        panels = {"Token identified by a linear probe": series("accuracy")} | panels
        labels = ["share of held-out tokens", *labels]
    layers = ["emb", *map(str, range(probe["layer"].nunique() - 1))]
    return trajectories(panels, layers, f"{model}: what the stream encodes of its token", "after block", labels)
