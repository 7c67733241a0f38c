"""Why sink heads attend to P0: the query-independent part of their scores (C10; paper, section on P0 sinks).

1. Choose the sink heads, and average their queries, on one half of the samples; measure on the other half.
2. The *gap* of a query is its score at P0, before the softmax, minus the mean of its scores at the other visible keys.
3. Replace every query by the mean query: its gap is the *query-independent part*. The difference is the
   query-dependent part.
4. Also measured: the norm of P0's key, its direction, its cosine with queries, and the norm of P0's value.

Decided before measuring:

- *The mean query* of a head is averaged over samples and positions after P0, after the rotation where positions are
  rotary. It holds neither the content nor the position of a query. Components that rotate fast with the distance
  average out and count as query-dependent, which is the stricter reading. ALiBi's distance term depends on no query and
  is in both parts; a soft cap on scores is in neither.
- *Half of the gap.* In the mean over queries the claim holds nearly by definition: if P0's key is the same in all
  samples, its mean score equals its score with the mean query. So the threshold has two conditions: half of the mean
  gap, and half of its mean square, `E[gap * part] / E[gap^2]`. The second holds only if queries agree about P0. Scores
  are logits, so heads are pooled without scaling.
- *In attention*: the excess score that the heads would have if all queries were the mean query.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from p0circuit import sink
from p0circuit.experiments.base import Experiment, NotApplicable, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.closed_form import (
    MASKED,
    NotOfTheClosedForm,
    ScoreForm,
    key_hook,
    query_hook,
    query_side,
)
from p0circuit.models import ModelError, describe
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import VALUE_NORM_RATIO, Batch, Quantity
from p0circuit.recording.record import Recording, record
from p0circuit.results import Result
from p0circuit.sink import CONTROL
from p0circuit.stats import bootstrap, ratio_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_P0, _MEAN_QUERY, _CONTROL = "P0", "mean query", f"position {CONTROL}"

PARTS = (
    "gap",
    "independent",
    "gap_squared",
    "gap_times_independent",
    "gap_at_median_key_norm",
    "cosine",
    "cosine_of_others",
    "key_norm_ratio",
    "score",
    "score_with_mean_query",
)
"""What `score_parts` gives for each head, in this order."""


@dataclass(frozen=True)
class KeySideConfig:
    """Settings of `KeySide`.

    Attributes:
        control: the position, counted from P0, whose key is compared with P0's.
        tested: number of prompts on which the closed form of the scores is tested.
    """

    control: int = CONTROL
    tested: int = 8


class KeySide(Experiment[KeySideConfig]):
    """The sink heads' scores of P0, split into the part of the mean query and the rest."""

    id = "key-side"
    title = "The key side of the sink"
    config_type = KeySideConfig
    claim = Claim(
        id="C10",
        title="Key side",
        source="Peng et al., arXiv 2603.06591, section on P0 sinks; after Ran-Milo et al. 2026, arXiv 2604.14722",
        statement="Sink heads find P0 by its key: any query would, whatever it says.",
        measure="The gap between the score before the softmax at P0 and the mean score of the other keys, and the part "
        "of it that the mean query over samples and positions makes: of the mean gap, and of its mean square.",
        criteria=(
            Criterion("query_independent_share", ">=", 0.5),
            Criterion("query_independent_share_of_the_mean_gap", ">=", 0.5),
        ),
        control="The gap of position 8 over that of P0.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare one run for the mean query and one for everything else."""
        # The mean query on one half of the prompts, all else on the other.
        return 1 + min(self.config.tested, second_half(prompts)) / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure the gap, its query-independent part, and P0's key, for all sink heads.

        Args:
            model: the model to measure.
            prompts: natural text.

        Raises:
            NotApplicable: there is no sink, or scores are no product of query and key.
        """
        import pandas as pd

        info, config = describe(model), self.config
        studied = studied_sink(model, prompts)
        by_layer: dict[int, list[int]] = {}
        for layer, head in studied.heads:
            by_layer.setdefault(layer, []).append(head)
        try:
            query_side(model, studied.prompts.subset(slice(0, config.tested)), lambda layer, side: None)
        except (NotOfTheClosedForm, ModelError) as error:
            raise NotApplicable(f"scores of {info.title} cannot be taken apart: {error}") from error
        queries = {
            layer: Quantity(f"mean_query_{layer}", (query_hook(model, layer),), mean_query, "model")
            for layer in by_layer
        }
        mean_queries = record(model, prompts.split()[0], list(queries.values()), condition="chosen on")
        what = [VALUE_NORM_RATIO]
        parts: dict[tuple[int, int], Quantity] = {}
        keys: dict[int, Quantity] = {}
        for layer, heads in by_layer.items():
            mean = mean_queries[queries[layer]].double().mean(0)[heads].float()
            for offset in (0, config.control):
                parts[layer, offset] = _parts_at(model, layer, heads, mean, offset)
            keys[layer] = Quantity(f"key_at_p0_{layer}", (key_hook(model, layer),), key_at_p0, "model")
        recording = record(model, studied.prompts, [*what, *parts.values(), *keys.values()], condition="measured on")

        at_p0, at_control = (_of_heads(recording, parts, by_layer, offset) for offset in (0, config.control))
        pooled, control = ({name: value.mean(1) for name, value in one.items()} for one in (at_p0, at_control))
        # Heads are in the order of `by_layer`; those of a group share a key and a value.
        group = info.n_heads // info.n_kv_heads
        names = [(layer, head) for layer, heads in by_layer.items() for head in heads]
        drained = np.stack([recording[VALUE_NORM_RATIO][:, i, j // group].double().numpy() for i, j in names], axis=1)
        steady = np.stack(
            [sink.direction_cosines(recording[keys[i]][:, j // group]).double().numpy() for i, j in names], axis=1
        )

        excess = {part: pooled[part] - control[part] for part in ("score", "score_with_mean_query")}
        metrics = {
            "query_independent_share": ratio_interval(pooled["gap_times_independent"], pooled["gap_squared"]),
            "query_independent_share_of_the_mean_gap": ratio_interval(pooled["independent"], pooled["gap"]),
            "gap": bootstrap(pooled["gap"]),
            "gap_of_position_8_over_that_of_p0": ratio_interval(control["gap"], pooled["gap"]),
            "gap_kept_at_median_key_norm": ratio_interval(pooled["gap_at_median_key_norm"], pooled["gap"]),
            "excess_kept_with_mean_query": ratio_interval(excess["score_with_mean_query"], excess["score"]),
            "key_norm_over_median": bootstrap(pooled["key_norm_ratio"]),
            "key_direction_consistency": bootstrap(steady.mean(1)),
            "cosine_of_queries_with_p0": bootstrap(pooled["cosine"]),
            "cosine_of_queries_with_other_keys": bootstrap(pooled["cosine_of_others"]),
            "value_norm_over_median": bootstrap(drained.mean(1)),
        }
        rows = []
        for number, (layer, head) in enumerate(names):
            one, other = ({part: value[:, number] for part, value in each.items()} for each in (at_p0, at_control))
            row = {
                "share": ratio_interval(one["gap_times_independent"], one["gap_squared"]),
                "share_of_mean_gap": ratio_interval(one["independent"], one["gap"]),
                "gap": bootstrap(one["gap"]),
                "gap_of_position_8": bootstrap(other["gap"]),
                "gap_at_median_key_norm": bootstrap(one["gap_at_median_key_norm"]),
                "excess": bootstrap(one["score"] - other["score"]),
                "excess_with_mean_query": bootstrap(one["score_with_mean_query"] - other["score_with_mean_query"]),
                "key_norm_over_median": bootstrap(one["key_norm_ratio"]),
                "key_direction_consistency": bootstrap(steady[:, number]),
                "cosine_with_p0": bootstrap(one["cosine"]),
                "cosine_with_others": bootstrap(one["cosine_of_others"]),
                "value_norm_over_median": bootstrap(drained[:, number]),
            }
            rows += [(layer, head, name, *interval.to_json().values()) for name, interval in row.items()]
        table = pd.DataFrame(rows, columns=["layer", "head", "quantity", "value", "low", "high", "n"])
        share, of_mean = metrics["query_independent_share"], metrics["query_independent_share_of_the_mean_gap"]
        notes = [
            studied.note,
            f"in the mean over queries {of_mean} of the gap is query-independent, which follows nearly by definition; "
            f"query by query (mean square) it is {share}",
        ]
        gaps = {
            _P0: metrics["gap"],
            _MEAN_QUERY: bootstrap(pooled["independent"]),
            _CONTROL: bootstrap(control["gap"]),
        }
        lines = [{"gap_of": name, **interval.to_json()} for name, interval in gaps.items()]
        tables = {"heads": table, "gaps": pd.DataFrame(lines)}
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the score gap, its query-independent share, the cosines with queries, and the norms of key and value."""
        from p0circuit.figures.intervals import bars, intervals_by

        metrics = result.metrics
        panels = {
            "Score gap": intervals_by(result.tables["gaps"], "gap_of"),
            "Share of the gap": {
                "mean gap": metrics["query_independent_share_of_the_mean_gap"],
                "mean square": metrics["query_independent_share"],
                "median norm": metrics["gap_kept_at_median_key_norm"],
            },
            "Cosine with queries": {
                "P0's key": metrics["cosine_of_queries_with_p0"],
                "other keys": metrics["cosine_of_queries_with_other_keys"],
            },
            "P0 over the median": {
                "key norm": metrics["key_norm_over_median"],
                "value norm": metrics["value_norm_over_median"],
            },
        }
        title = f"{result.model_title}: the sink heads' scores of P0"
        return {"scores": bars(panels, title, ["logits", "share", "cosine", "ratio"])}


def mean_query(query: Float[Tensor, "batch query head d_head"], batch: Batch) -> Float[Tensor, "batch head d_head"]:
    """Return the mean query of each prompt over the positions after P0 that are not padding."""
    after = batch.mask & (torch.arange(query.shape[1], device=query.device) > batch.p0[:, None])
    weights = after[..., None, None].to(query)
    return (query * weights).sum(1) / weights.sum(1)


def key_at_p0(key: Float[Tensor, "batch key kv_head d_head"], batch: Batch) -> Float[Tensor, "batch kv_head d_head"]:
    """Return the keys of P0."""
    return key[torch.arange(len(key), device=key.device), batch.p0]


def score_parts(
    query: Float[Tensor, "batch query head d_head"],
    key: Float[Tensor, "batch key kv_head d_head"],
    scores: Float[Tensor, "batch head query key"],
    batch: Batch,
    mean: Float[Tensor, "chosen d_head"],
    heads: Sequence[int],
    scale: float,
    cap: float | None,
    distance: bool,
    offset: int,
) -> Float[Tensor, "batch chosen part"]:
    """Return `PARTS` for some heads and one key, each the mean over the queries after that key.

    Args:
        query: queries of the layer, as they enter the scores.
        key: its keys.
        scores: its scores before the softmax.
        batch: the prompts.
        mean: the mean query of each of the heads.
        heads: numbers of the heads.
        scale: factor on the product of query and key.
        cap: soft cap on scores; None without one.
        distance: whether scores have a term that depends on the distance alone (ALiBi).
        offset: position of the key, counted from P0.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)[:, :, list(heads)].to(wide)
    query, scores = query[:, :, list(heads)].to(wide), scores[:, list(heads)].to(wide)
    position, length = batch.p0 + offset, query.shape[1]
    positions = torch.arange(length, device=query.device)
    at = positions == position[:, None]
    product = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    visible = (scores > MASKED) & batch.mask[:, None, :, None] & batch.mask[:, None, None]
    rest = (scores - product).masked_fill(~visible, 0) if distance else torch.zeros_like(product)
    full = product + rest
    alone = scale * torch.einsum("hd,bkhd->bhk", mean.to(key), key)[:, :, None] + rest
    # For another key than P0's, P0 is not among the other keys: its score would hide that of the control.
    rivals = visible & ~(at | (positions == batch.p0[:, None]))[:, None, None]
    counted = (positions > position[:, None])[:, None] & sink.attention_to(visible.to(wide), position).bool()

    def over_others(sizes: Tensor) -> Tensor:
        return (sizes * rivals).sum(-1) / rivals.sum(-1).clamp(min=1)

    def over_queries(sizes: Tensor) -> Tensor:
        return (sizes * counted).sum(-1) / counted.sum(-1)

    def gap_of(scores: Tensor, cut: Tensor | float = 1.0) -> Tensor:
        own, added = sink.attention_to(scores - rest, position), sink.attention_to(rest, position)
        return own * cut + added - over_others(scores)

    def score_of(scores: Tensor) -> Tensor:
        logits = scores if cap is None else cap * torch.tanh(scores / cap)
        pattern = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
        return sink.mean_over_queries(sink.attention_to(pattern, position), position, batch.mask)

    gap, independent = gap_of(full), gap_of(alone)
    ratio = sink.ratio_to_others(key.norm(dim=-1), position, batch.mask)
    cosines = torch.einsum("bqhd,bkhd->bhqk", normalize(query, dim=-1), normalize(key, dim=-1))
    return torch.stack(
        [
            over_queries(gap),
            over_queries(independent),
            over_queries(gap.square()),
            over_queries(gap * independent),
            over_queries(gap_of(full, 1 / ratio[..., None])),
            over_queries(sink.attention_to(cosines, position)),
            over_queries(over_others(cosines)),
            ratio,
            score_of(full),
            score_of(alone),
        ],
        dim=-1,
    )


def _parts_at(model: HookedModel, layer: int, heads: Sequence[int], mean: Tensor, offset: int) -> Quantity:
    form = ScoreForm.of(model, layer)
    reduce = functools.partial(
        score_parts,
        mean=mean,
        heads=tuple(heads),
        scale=float(form.scale),
        cap=form.cap,
        distance=describe(model).positions == "alibi",
        offset=offset,
    )
    hooks = (query_hook(model, layer), key_hook(model, layer), f"blocks.{layer}.attn.hook_attn_scores")
    return Quantity(f"score_parts_{layer}_at_{offset}", hooks, reduce, "model")


def _of_heads(
    recording: Recording, parts: dict[tuple[int, int], Quantity], by_layer: dict[int, list[int]], offset: int
) -> dict[str, Float[np.ndarray, "sample head"]]:
    """Each of `PARTS` for all sink heads."""
    values = torch.cat([recording[parts[layer, offset]] for layer in by_layer], dim=1).double().numpy()
    return {name: values[..., number] for number, name in enumerate(PARTS)}
