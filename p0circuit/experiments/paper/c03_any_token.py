"""Any token becomes the sink: the whole vocabulary at P0 (paper, section on recognition).

1. Choose the sink heads on one half of the samples; the first rows of the other half are the continuations.
2. P0 sees itself alone, so a row of one token gives the exact key that the token has at P0. Put the key of every token
   before the queries of the fixed continuations: the sink score that each token draws (`vocabulary_sweep`).
3. The share of tokens that draw at least half of what the median token draws; the others are head_list.
4. Some tokens drawn at random are put into full runs as well, where the queries may answer to them, once at P0 and, as
   the control, once at position 8.
5. Where the prompts begin with BOS, other tokens take its place, and the median of what they draw has to be at least
   half of what BOS draws: a sink that depends on BOS is not one of any token.
6. A linear probe: how much of the token's identity P0's stream still has, layer by layer, beside position 8.

Decided before measuring:

- *The interval* of the share is over continuations: the vocabulary is measured whole, so there is nothing to draw. All
  ids that a token of the tokenizer leads to count, special ones too; where there is no tokenizer, all ids. A quick run
  of a large model takes a random sample of the vocabulary; the interval is then widened to Wilson's over tokens.
- *The probe.* P0's stream depends on its token only: all occurrences of a token there are one and the same vector, and
  a classifier trained on one occurrence knows every other. So occurrences of *other tokens* are held out: a linear map
  (ridge) from what the next block reads, the stream at unit length, to the token's embedding is fitted on one half of
  the tokens and tested on the other. It counts as a hit if, of all tokens' embeddings, the right one is the nearest in
  angle. Position 8 is treated alike: every token once, behind 8 random ones. The penalty is a hundredth of the variance
  per channel that unit vectors without a common direction have: what is smaller than that beside the common direction
  is as good as gone for the blocks that follow. A map of `d_model` columns needs more tokens than that to be fitted.
- *Token share of the stream*: one minus the squared length of the mean unit vector, what differs between tokens. Exact
  for vocabularies of any size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import studied_sink
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

    from p0circuit.figures.style import Series

PENALTY = 0.01
"""Of the probe, in units of the variance per channel of unit vectors without a common direction."""
_PERCENT = range(0, 101, 5)


@dataclass(frozen=True)
class AnyTokenConfig:
    """`half`: the share of the median score that makes a sink; `continuations`: prompts whose queries meet every token.

    `full_tokens` tokens are put into full runs before `full_continuations` of them. `probe_tokens`: at most that many
    are probed. `control`: the position (after P0) beside P0. `sample`: tokens of the vocabulary to measure, drawn at
    random; all of them if None.
    """

    half: float = 0.5
    continuations: int = 32
    full_tokens: int = 128
    full_continuations: int = 4
    probe_tokens: int = 4096
    control: int = CONTROL
    sample: int | None = None


class AnyToken(Experiment[AnyTokenConfig]):
    """Every token of the vocabulary at P0: the sink score it draws, and a probe of what P0's stream keeps of it."""

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
        config, rows, vocabulary = self.config, second_half(prompts), sampleable_vocabulary(model)[0]
        swept = vocabulary if config.sample is None else min(config.sample, vocabulary)
        full = min(config.full_tokens, swept) * min(config.full_continuations, rows)
        probed = min(config.probe_tokens, swept)
        # Each probed token once at P0, and once behind `control` others.
        tokens = swept + 2 * full * prompts.length + probed * (config.control + 2)
        return min(config.continuations, rows) / prompts.n + tokens / (prompts.n * prompts.length)

    def quick(self, info: ModelInfo) -> AnyToken:
        if not is_large(info):
            return self
        smaller = replace(
            self.config, sample=4096, continuations=8, full_tokens=16, full_continuations=2, probe_tokens=256
        )
        return AnyToken(smaller)

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink, or attention to P0 does not follow from its key."""
        import pandas as pd

        from p0circuit.figures.lines import trajectories

        info, config = describe(model), self.config
        found = studied_sink(model, prompts)
        generator = torch.Generator().manual_seed(prompts.seed)
        vocabulary = torch.arange(sampleable_vocabulary(model)[0])
        sampled = config.sample is not None and config.sample < len(vocabulary)
        tokens = vocabulary
        if sampled:
            tokens = torch.randperm(len(vocabulary), generator=generator)[: config.sample].sort().values
        continuations = found.prompts.subset(slice(0, config.continuations))
        try:
            drawn, norms, of_bos = self._swept(model, continuations, tokens, found.heads)
        except (NotOfTheClosedForm, ModelError) as error:
            raise NotApplicable(f"the keys of {info.title} cannot be exchanged one by one: {error}") from error
        by_token = drawn.mean(1)
        median = float(np.median(by_token))

        shuffled = torch.randperm(len(tokens), generator=generator)
        some = tokens[shuffled[: config.full_tokens]]
        few = found.prompts.subset(slice(0, config.full_continuations))
        full, beside = (self._full_runs(model, few, some, found.heads, place) for place in (0, config.control))
        needed = config.half * np.median(full)
        table = pd.DataFrame(
            {
                "token": tokens.numpy(),
                "text": _texts(model, tokens),
                "sink_score": by_token,
                "over_median": by_token / median,
                "norm_after_block_1": norms[:, min(2, info.n_layers)].double().numpy(),
            }
        )
        ranked = table.sort_values("sink_score", kind="stable")
        exceptions = ranked.loc[ranked["sink_score"].to_numpy() < config.half * median]
        share = bootstrap(drawn.T, functools.partial(share_at_least, half=config.half))
        metrics = {
            "share_of_tokens_with_half_the_median_score": over_tokens(share, len(tokens)) if sampled else share,
            "median_score": bootstrap(drawn.T, lambda scores: np.median(scores, axis=-1)),
            "lowest_score_over_median": bootstrap(drawn.T, lambda scores: scores.min(-1) / np.median(scores, axis=-1)),
            "share_in_full_runs": bootstrap(full >= needed),
            "share_at_position_8_in_full_runs": bootstrap(beside >= needed),
        }
        notes = [found.note]
        if of_bos is not None:
            metrics["median_score_over_that_of_bos"] = over = ratio_interval(np.median(drawn, axis=0), of_bos)
            bound = "is bound" if over.value < config.half else "is not bound"
            notes.append(
                f"the prompts begin with BOS, which draws {of_bos.mean():.3f}; the median token in its place draws "
                f"{over} of that: the sink {bound} to BOS"
            )
        notes += [
            f"{len(exceptions)} of {len(tokens)} tokens draw less than half of the median score of {median:.3f}"
            + (f", the lowest: {_listed(exceptions)}" if len(exceptions) else ""),
        ]
        if sampled:
            notes.append(f"these {len(tokens)} tokens are a random sample of a vocabulary of {len(vocabulary)}")
        probe, why_not = self._probe(model, tokens[shuffled[: config.probe_tokens]], prompts.seed)
        notes += [why_not] if why_not else []
        for place in ("P0", f"position {config.control}"):
            last = probe[probe["place"] == place].iloc[min(2, info.n_layers)]
            metrics[f"token_share_of_the_stream_after_block_1_at_{metric_name(place)}"] = Interval(
                last["token_share"], last["token_share_low"], last["token_share_high"], int(last["n"])
            )
        lines = {
            f"P0 ({'a sample of' if sampled else 'all'} {len(tokens)} tokens)": by_token,
            "P0, full runs": full,
            "position 8, full runs": beside,
        }
        figures = {
            "tokens": trajectories(
                {"Dashed: half the median score": [_quantiles(name, values) for name, values in lines.items()]},
                [str(percent) for percent in _PERCENT],
                f"{info.title}: every token at position zero",
                "% of tokens with a lower score",
                ["sink score"],
                reference=config.half * median,
            ),
            "probe": _draw_probe(probe, info.title),
        }
        tables = {"tokens": table, "exceptions": exceptions, "probe": probe}
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)

    def _swept(
        self, model: HookedModel, prompts: PromptSet, tokens: Int[Tensor, " token"], heads: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, Tensor, np.ndarray | None]:
        """`scores_by_token`, and the scores of BOS by sample where the prompts begin with it."""
        if condition_of(model, prompts) != WITH_BOS:
            return *scores_by_token(model, prompts, tokens, heads), None
        # In the same sweep: the tokens may be a sample without BOS.
        drawn, norms = scores_by_token(model, prompts, torch.cat([tokens, torch.tensor([bos_id(model)])]), heads)
        return drawn[:-1], norms[:-1], drawn[-1]

    def _full_runs(
        self,
        model: HookedModel,
        prompts: PromptSet,
        tokens: Int[Tensor, " token"],
        heads: Sequence[tuple[int, int]],
        place: int,
    ) -> Float[np.ndarray, " token"]:
        """The score of a position with each token there, mean over prompts and heads."""
        ids = prompts.ids.repeat(len(tokens), 1)
        p0 = prompts.p0.repeat(len(tokens))
        ids[torch.arange(len(ids)), p0 + place] = tokens.repeat_interleave(prompts.n)
        mask = prompts.attention_mask.repeat(len(tokens), 1)
        quantity = score_at(place)
        rows = replace(prompts, ids=ids, attention_mask=mask, overflow=None)
        scores = record(model, rows, [quantity], condition=f"tokens at {place}")[quantity].double()
        layers, numbers = map(list, zip(*heads, strict=True))
        return scores[:, layers, numbers].mean(1).view(len(tokens), -1).mean(1).numpy()

    def _probe(self, model: HookedModel, tokens: Int[Tensor, " token"], seed: int) -> tuple[pd.DataFrame, str]:
        """The probe's table, a line for each layer and place; and why there is no probe, where there is none."""
        import pandas as pd

        info, control = describe(model), self.config.control
        size, special = sampleable_vocabulary(model)
        rows = random_tokens(size, len(tokens), control + 1, seed, special=special)
        rows.ids[:, control] = tokens
        quantity = residual_at(control)
        beside = record(model, rows, [quantity], condition="probe")[quantity]
        streams = vocabulary_sweep(model, tokens, residual_layers=range(info.n_layers + 1)).residual
        # The tokens come in random order already.
        train = torch.arange(len(tokens)) < len(tokens) // 2
        probed = int(train.sum()) > info.d_model
        lines = []
        for layer in range(info.n_layers + 1):
            for place, stream in (("P0", streams[layer]), (f"position {control}", beside[:, layer])):
                units = normalize(stream.double(), dim=-1)
                line = {"layer": layer, "place": place, **_columns("token_share", token_share(units))}
                if probed:
                    hits, explained = embedding_probe(units, streams[0].double(), train)
                    line |= _columns("accuracy", bootstrap(hits.double().numpy()))
                    line |= {"variance_explained": explained, "chance": 1 / len(tokens)}
                lines.append(line | {"n": len(tokens)})
        why = f"no probe: half of {len(tokens)} tokens do not determine a map of {info.d_model} channels"
        return pd.DataFrame(lines), "" if probed else why


@torch.no_grad()
def scores_by_token(
    model: HookedModel,
    prompts: PromptSet,
    tokens: Int[Tensor, " token"],
    heads: Sequence[tuple[int, int]],
    chunk: int = CHUNK,
) -> tuple[Float[np.ndarray, "token sample"], Float[Tensor, "token layer_and_end"]]:
    """The mean sink score of some heads, each token's key in the place of P0's, from each prompt's queries.

    As `vocabulary.sink_scores_by_token`, which gives the mean over prompts for all heads. Beside it, from the same
    sweep, the norms of each token's stream at P0 before each block and at the end.

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
    # What is scored at once is [token, prompt, head, query]: some tens of megabytes.
    at_once = max(1, 2**23 // (prompts.n * describe(model).n_heads * prompts.length))
    for start in progress_bar(range(0, len(tokens), chunk), "sweeping the vocabulary"):
        sweep = vocabulary_sweep(model, tokens[start : start + chunk], key_layers=list(by_layer), chunk=chunk)
        norms.append(sweep.norms)
        for layer, key in sweep.keys.items():
            for place, part in zip(range(start, start + chunk, at_once), key.split(at_once), strict=False):
                spread = part[:, None].expand(-1, prompts.n, -1, -1).to(sides[layer].query)
                found = sides[layer].sink_scores(spread)[..., by_layer[layer]]
                scores[place : place + len(part)] += found.double().sum(-1).cpu()
    return (scores / len(heads)).numpy(), torch.cat(norms)


def over_tokens(share: Interval, tokens: int) -> Interval:
    """The interval of a share of sampled tokens: Wilson's over tokens, widened by what it was over continuations."""
    from scipy.stats import binomtest

    hits = round(share.value * tokens)
    wilson = binomtest(hits, tokens).proportion_ci(LEVEL, method="wilson")
    return Interval(share.value, min(share.low, float(wilson.low)), max(share.high, float(wilson.high)), tokens)


def share_at_least(scores: Float[np.ndarray, "*draw token"], half: float) -> Float[np.ndarray, "*draw"] | np.floating:
    """The share of tokens with at least `half` of the median score."""
    return (scores >= half * np.median(scores, axis=-1, keepdims=True)).mean(-1)


def embedding_probe(
    read: Float[Tensor, "token d_model"],
    embedding: Float[Tensor, "token d_embedding"],
    train: Bool[Tensor, " token"],
    penalty: float = PENALTY,
) -> tuple[Bool[Tensor, " held_out"], float]:
    """Fit a linear map to embeddings on some tokens; for the others, whether it finds them, and the variance explained.

    A token is found if its own embedding is, of all tokens', the nearest in angle to what the map says.
    """
    x, y = read - read[train].mean(0), embedding - embedding[train].mean(0)
    known, size = x[train], x.shape[1]
    ridge = penalty * len(known) / size * torch.eye(size, dtype=x.dtype)
    said = x[~train] @ torch.linalg.solve(known.T @ known + ridge, known.T @ y[train])
    nearest = (said @ normalize(y, dim=-1).T).argmax(1)
    right = (~train).nonzero().squeeze(1)
    missed = (y[~train] - said).square().sum() / y[~train].square().sum()
    return nearest == right, float(1 - missed)


def token_share(units: Float[Tensor, "token d_model"]) -> Interval:
    """One minus the squared length of the mean of unit vectors."""
    cosines = bootstrap((units @ units.mean(0)).numpy())
    # The square of the mean's length changes twice as fast as the mean projection on it, which is linear.
    low, high = (2 * (end - cosines.value) for end in (cosines.low, cosines.high))
    return Interval(1 - cosines.value, 1 - cosines.value - high, 1 - cosines.value - low, len(units))


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _texts(model: HookedModel, tokens: Int[Tensor, " token"]) -> list[str]:
    """The tokens as text, quoted; empty where there is no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return [""] * len(tokens) if tokenizer is None else [repr(tokenizer.decode([token])) for token in tokens.tolist()]


def _listed(exceptions: pd.DataFrame, most: int = 8) -> str:
    named = [text or str(token) for token, text in zip(exceptions["token"], exceptions["text"], strict=True)]
    return ", ".join(named[:most]) + (" …" if len(named) > most else "")


def _quantiles(name: str, values: np.ndarray) -> Series:
    from p0circuit.figures.style import Series

    return Series(name, np.percentile(values, _PERCENT).tolist())


def _draw_probe(probe: pd.DataFrame, model: str) -> Any:
    from p0circuit.figures.lines import trajectories
    from p0circuit.figures.style import Series

    def series(column: str) -> list[Series]:
        parts = [(place, part) for place, part in probe.groupby("place", sort=False)]
        return [Series(str(p), *(part[column + end].tolist() for end in ("", "_low", "_high"))) for p, part in parts]

    panels: dict[str, Sequence[Series]] = {"What differs between tokens": series("token_share")}
    labels = ["share of the unit-length stream"]
    if "accuracy" in probe:
        panels = {"Token found by a linear probe": series("accuracy")} | panels
        labels = ["share of held-out tokens", *labels]
    layers = ["emb", *map(str, range(probe["layer"].nunique() - 1))]
    return trajectories(panels, layers, f"{model}: what the stream says of its own token", "after block", labels)
