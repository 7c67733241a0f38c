"""Dormant heads (C19): how many heads can be zeroed when those that attend to P0 go first.

1. *Orders*, made on one half of the prompts: by sink score, the highest first; by the mean norm of a head's output, the
   lowest first; and several random orders.
2. *Zeroing*: on the other half, the loss with the outputs of the first 1, 2, 3, 4, 6, 8, 12 … heads of an order set to
   zero at every position; the biases of attention stay.
3. *The count*: the largest of these numbers up to which the loss stays within 1.01 times that of the full model. A
   later dip does not count. A quick run of a large model uses powers of two up to a quarter of the heads.
4. *The threshold*: the count of the sink order minus that of a random one, averaged over random orders, must be above 0
   with its whole interval over these orders. The interval over samples is measured too.
5. *By domain*: the counts on other texts, each with orders made on text of its own kind, and the heads that have a sink
   in one domain and none in another (active and dormant heads).

Measured on the text as it is, or after BOS if there is a sink only there. Without a sink the claim is not applicable.
Source: Guo et al. 2024, arXiv 2410.13835 (active and dormant heads); Sandoval-Segura et al. 2025, arXiv 2504.03889
(dormant heads zeroed at equal accuracy).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.attention_edits import remove_heads
from p0circuit.models import ModelInfo, describe, forward
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import RANDOM_TOKENS, SHIPPED_TEXTS, PromptSet, bos_id, natural_text, random_tokens
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.recording.quantities import SINK_SCORE, TOKEN_LOSSES
from p0circuit.recording.record import record
from p0circuit.results import Result, metric_name
from p0circuit.sink import SINK_THRESHOLD
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Order = Sequence[tuple[int, int]]
"""Heads as (layer, head), in the order in which they are zeroed."""

TOLERANCE = 0.01
"""The share by which the loss may grow."""
CLOSE_UP = 5
"""Upper limit of the zoomed figure, in multiples of the tolerance."""
ENOUGH = 2
"""In a further domain, an order is followed until the loss has grown by this multiple of the tolerance."""
SINK, NORM, RANDOM = "sink order", "norm order", "random order"
GIVEN = "the prompts"


@dataclass(frozen=True)
class DormantHeadsConfig:
    """Settings of `DormantHeads`.

    Attributes:
        samples: maximum number of prompts of each half.
        orders: number of random orders.
        domain_samples: prompts of each half in a further domain.
        domain_orders: number of random orders in a further domain.
        domains: whether to measure further domains.
        coarse: whether to zero powers of two, up to a quarter of the heads.
    """

    samples: int = 64
    orders: int = 10
    domain_samples: int = 32
    domain_orders: int = 3
    domains: bool = True
    coarse: bool = False


@dataclass(frozen=True)
class Zeroing:
    """The loss as the heads of an order are zeroed one after the other.

    Attributes:
        counts: numbers of zeroed heads; the first is 0, the full model.
        losses: losses in nats per token.
        total: number of heads in the order.
    """

    counts: tuple[int, ...]
    losses: Float[np.ndarray, "sample count"]
    total: int = 0

    def within(self, tolerance: float = TOLERANCE) -> Interval:
        """Return the number of heads that can be zeroed within a tolerance, with its interval over samples.

        Args:
            tolerance: the share by which the loss may grow.
        """
        return bootstrap(self.losses, functools.partial(_within, counts=self.counts, tolerance=tolerance))

    def growth(self, index: int) -> Interval:
        """Return the share by which the loss has grown at one of the counts.

        Args:
            index: index into `counts`.
        """
        return ratio_interval(self.losses[:, index] - self.losses[:, 0], self.losses[:, 0])


class DormantHeads(Experiment[DormantHeadsConfig]):
    """The number of heads that can be zeroed, the sink heads first."""

    id = "dormant-heads"
    title = "Dormant heads"
    config_type = DormantHeadsConfig
    needs_control = False
    claim = Claim(
        id="C19",
        title="Dormant heads",
        source="Guo et al. 2024, arXiv 2410.13835; Sandoval-Segura et al. 2025, arXiv 2504.03889",
        statement="Heads that attend to P0 are dormant: zeroed in the order of their sink score, more heads can go at "
        "1 % more loss than in a random order.",
        measure="How many heads of an order can be zeroed before the loss is above 1.01 times that of the whole model: "
        "in the order of the sink score minus in a random order, over random orders.",
        criteria=(Criterion("heads_beyond_random_order", ">", 0, "low"),),
        control="Random orders; beside them the order of the norm of what heads add to the stream.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare a run for each number of zeroed heads in each order."""
        config, info = self.config, describe(model)
        rows = min(config.samples, second_half(prompts))
        counts = len(steps(info.n_layers * info.n_heads, config.coarse))
        # One more pass for the norms of outputs. With all heads zeroed, every order is the same.
        runs = 1 + (2 + config.orders) * counts - (0 if config.coarse else 1 + config.orders)
        # In a further domain an order is followed until the loss is too high; a third of the counts is assumed.
        texts = (len(SHIPPED_TEXTS) + 1 + (bos_id(model) is not None)) if config.domains and model.tokenizer else 0
        domain = texts * config.domain_samples * (3 + (2 + config.domain_orders) * counts / 3)
        return (runs * rows + domain) / prompts.n

    def quick(self, info: ModelInfo) -> DormantHeads:
        """Return a version for large models with fewer samples, steps and draws."""
        if not is_large(info):
            return self
        return DormantHeads(replace(self.config, samples=6, orders=3, domains=False, coarse=True))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure the counts of every order, on the prompts and in other domains.

        Args:
            model: the model to measure.
            prompts: natural text.

        Raises:
            NotApplicable: there is no sink, neither on the text as it is nor after BOS.
        """
        import pandas as pd

        config, info = self.config, describe(model)
        sink = studied_sink(model, prompts, in_either_condition=True)
        made_on, measured_on = (half.subset(slice(0, config.samples)) for half in (sink.chosen_on, sink.prompts))
        orders = _orders(model, made_on, config.orders)
        runs = zeroed(model, measured_on, orders, coarse=config.coarse)
        metrics = _metrics(runs)
        notes = [
            f"{sink.condition}; {sink.note}",
            f"of {info.n_layers * info.n_heads} heads {_summary(metrics)} can be zeroed at {TOLERANCE:.0%} more loss",
            f"orders made on {made_on.n} prompts, losses measured on {measured_on.n} others",
        ]
        if model.tokenizer is None:
            notes.append("the prompts are random tokens: their losses say nothing about a use of the heads")
        counts, scores = {GIVEN: metrics}, {GIVEN: record(model, measured_on, SINK_SCORE)}
        texts = _other_texts(model, prompts, sink.condition, 2 * config.domain_samples, notes) if config.domains else {}
        for name, text in texts.items():
            first, second = text.split()
            own = _orders(model, first, config.domain_orders)
            counts[name] = _metrics(zeroed(model, second, own, until=ENOUGH * TOLERANCE))
            scores[name] = record(model, second, SINK_SCORE)
        dormant = _dormant(scores)
        turning = dormant["head"][dormant["dormant_somewhere"] & dormant["active_somewhere"]]
        notes.append(
            f"heads with a score above {SINK_THRESHOLD} in some domains and below in others: "
            f"{', '.join(turning) or 'none'}"
        )
        tables = {
            "curves": _curves(runs),
            "orders": pd.DataFrame(
                [
                    {"order": name, "place": number, "head": f"attn.{layer}.{head}"}
                    for name, order in orders.items()
                    for number, (layer, head) in enumerate(order, 1)
                ]
            ),
            "domains": pd.DataFrame(
                [
                    {"domain": domain, "measured": name, **interval.to_json()}
                    for domain, measured in counts.items()
                    for name, interval in measured.items()
                ]
            ),
            "heads": dormant,
        }
        metrics = metrics | {
            f"heads_beyond_{metric_name(kind)}_over_samples": _over_samples(runs, kind) for kind in (RANDOM, NORM)
        }
        metrics |= _growth_at_a_quarter(runs)
        metrics |= {
            f"heads_in_sink_order_on_{metric_name(domain)}": measured["heads_in_sink_order"]
            for domain, measured in counts.items()
            if domain != GIVEN
        }
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the loss by the number of zeroed heads, and the counts of every order by domain."""
        return {
            "curves": _draw_curves(result.tables["curves"], result.model_title),
            "domains": _draw_domains(result.tables["domains"], result.model_title),
        }


def by_sink_score(model: HookedModel, prompts: PromptSet) -> Order:
    """Return all heads, the highest mean sink score first.

    Args:
        model: the model.
        prompts: prompts to measure on.
    """
    return _sorted(-record(model, prompts, SINK_SCORE).double().mean(0))


def by_output_norm(model: HookedModel, prompts: PromptSet) -> Order:
    """Return all heads, the lowest mean norm of their output first.

    Args:
        model: the model.
        prompts: prompts to measure on.
    """
    return _sorted(output_norms(model, prompts))


def random_orders(model: HookedModel, count: int, seed: int) -> dict[str, Order]:
    """Return random orders of all heads, by name.

    Args:
        model: the model.
        count: number of orders.
        seed: seed of the orders.
    """
    info, rng = describe(model), np.random.default_rng(seed)
    heads = [(layer, head) for layer in range(info.n_layers) for head in range(info.n_heads)]
    return {f"{RANDOM} {number}": [heads[index] for index in rng.permutation(len(heads))] for number in range(count)}


@torch.no_grad()
def output_norms(model: HookedModel, prompts: PromptSet) -> Float[Tensor, "layer head"]:
    """Return the norm of each head's output to the stream, mean over positions after P0 and over samples.

    It is measured before the norm layer that some models (OLMo 2, Gemma 2) have after attention, and without biases.

    Args:
        model: the model.
        prompts: prompts to measure on.
    """
    info = describe(model)
    norms = torch.zeros(info.n_layers, info.n_heads, dtype=torch.float64)
    rows = batch_size_for(model, prompts.length, with_logits=False)

    def add(z: Tensor, hook: object, layer: int, after: Tensor) -> None:
        weight = model.blocks[layer].attn.W_O.to(z).float()
        # |z W|^2 from W W^T: the outputs of all heads together would need [batch, query, head, d_model] in memory.
        squares = torch.einsum("bqhd,hde,bqhe->bqh", z.float(), weight @ weight.transpose(1, 2), z.float())
        norms[layer] += squares.clamp(min=0).sqrt()[after.to(z.device)].sum(0).double().cpu()

    for start in range(0, prompts.n, rows):
        part = slice(start, start + rows)
        ids, mask = prompts.ids[part], prompts.attention_mask[part]
        after = mask & (torch.arange(prompts.length) > prompts.p0[part, None])
        hooks: list[tuple[str, Callable[..., None]]] = [
            (f"blocks.{layer}.attn.hook_z", functools.partial(add, layer=layer, after=after))
            for layer in range(info.n_layers)
        ]
        forward(model, ids, mask, hooks=hooks, stop_at_layer=info.n_layers)
    return norms / int(prompts.attention_mask.sum() - prompts.n)


def zeroed(
    model: HookedModel,
    prompts: PromptSet,
    orders: Mapping[str, Order],
    until: float | None = None,
    coarse: bool = False,
) -> dict[str, Zeroing]:
    """Zero the heads of each order one after the other, and measure the losses.

    Args:
        model: the model.
        prompts: prompts to measure on.
        orders: orders of all heads, by name.
        until: stop an order after the first loss that exceeds that of the full model by more than this share.
        coarse: whether to zero powers of two, up to a quarter of the heads (`steps`).
    """
    known: dict[frozenset[tuple[int, int]], np.ndarray] = {}

    def loss_without(heads: frozenset[tuple[int, int]]) -> np.ndarray:
        if heads not in known:
            names = [f"attn.{layer}.{head}" for layer, head in sorted(heads)]
            ablations = [remove_heads(model, prompts, names)] if names else []
            losses = record(model, prompts, TOKEN_LOSSES, interventions=ablations)
            # Predictions made at padding have no loss.
            known[heads] = losses.double().nanmean(1).numpy()
        return known[heads]

    runs = {}
    for name, order in orders.items():
        losses, counts = [], (0, *steps(len(order), coarse))
        for count in counts:
            losses.append(loss_without(frozenset(order[:count])))
            if until is not None and losses[-1].mean() > (1 + until) * losses[0].mean():
                break
        runs[name] = Zeroing(counts[: len(losses)], np.stack(losses, axis=1), len(order))
    return runs


def steps(total: int, coarse: bool = False) -> list[int]:
    """Return the numbers of heads to zero: 1, 2, 3, 4, 6, 8, 12, 16 and so on, and all of them.

    Args:
        total: number of heads.
        coarse: whether to return powers of two up to a quarter of the heads instead.
    """
    powers = [2**exponent for exponent in range(total.bit_length())]
    if coarse:
        return [step for step in powers if step == 1 or 4 * step <= total]
    counts = {total, *powers, *(3 * power for power in powers)}
    return sorted(step for step in counts if step <= total)


def _sorted(values: Float[Tensor, "layer head"]) -> Order:
    """The heads by increasing value."""
    indices = values.flatten().argsort(stable=True).tolist()
    return [divmod(index, values.shape[1]) for index in indices]


def _within(
    losses: Float[np.ndarray, "*draw count"], counts: Sequence[int], tolerance: float
) -> Float[np.ndarray, "*draw"]:
    """The largest count up to which the mean loss stays within the tolerance."""
    beyond = losses > (1 + tolerance) * losses[..., :1]
    return np.where(beyond.any(-1), np.asarray(counts)[beyond.argmax(-1) - 1], counts[-1]).astype(float)


def _orders(model: HookedModel, prompts: PromptSet, count: int) -> dict[str, Order]:
    """Step 1, with so many random orders."""
    orders = {SINK: by_sink_score(model, prompts), NORM: by_output_norm(model, prompts)}
    return orders | random_orders(model, count, prompts.seed)


def _at_random(runs: Mapping[str, Zeroing]) -> list[Zeroing]:
    return [run for name, run in runs.items() if name.startswith(RANDOM)]


def _metrics(runs: Mapping[str, Zeroing]) -> dict[str, Interval]:
    """The counts in every kind of order; those of random orders with an interval over orders."""
    sink, at_random = runs[SINK].within(), np.array([run.within().value for run in _at_random(runs)])
    return {
        "heads_beyond_random_order": bootstrap(sink.value - at_random),
        "heads_in_sink_order": sink,
        "heads_in_norm_order": runs[NORM].within(),
        "heads_in_random_order": bootstrap(at_random),
    }


def _over_samples(runs: Mapping[str, Zeroing], other: str) -> Interval:
    """The count of the sink order minus that of another kind of order, with its interval over samples."""
    compared = [runs[SINK], *(run for name, run in runs.items() if name.startswith(other))]

    def beyond(losses: Float[np.ndarray, "draw order count"]) -> Float[np.ndarray, " draw"]:
        counts = _within(losses, compared[0].counts, TOLERANCE)
        return counts[:, 0] - counts[:, 1:].mean(1)

    return bootstrap(np.stack([run.losses for run in compared], axis=1), beyond)


def _growth_at_a_quarter(runs: Mapping[str, Zeroing]) -> dict[str, Interval]:
    """The growth of the loss with a quarter of the heads zeroed; it compares orders even if no head can be zeroed."""
    counts, total = runs[SINK].counts, runs[SINK].total
    index = min(int(np.searchsorted(counts, total / 4)), len(counts) - 1)
    growth = {SINK: runs[SINK].growth(index), NORM: runs[NORM].growth(index)}
    growth[RANDOM] = bootstrap(np.array([run.growth(index).value for run in _at_random(runs)]))
    return {
        f"loss_growth_at_{counts[index]}_heads_in_{metric_name(kind)}": interval for kind, interval in growth.items()
    }


def _other_texts(
    model: HookedModel, prompts: PromptSet, condition: str, count: int, notes: list[str]
) -> dict[str, PromptSet]:
    """Further kinds of text as long as the prompts; none for a model without a tokenizer.

    These are the prompts in the other condition (after BOS or not), and English, code and random tokens in the same.
    """
    if model.tokenizer is None:
        return {}
    texts: dict[str, PromptSet] = {}
    for source in SHIPPED_TEXTS:
        try:
            texts[source] = natural_text(model, source, count, prompts.length, prompts.seed)
        except P0Error as reason:
            notes.append(f"{source}: left out, {reason}")
    size, special = sampleable_vocabulary(model)
    texts[RANDOM_TOKENS] = random_tokens(size, count, prompts.length, prompts.seed + 1, special=special)
    others = with_and_without_bos(model, prompts.subset(slice(0, count)))
    del others[condition]
    return others | {name: with_and_without_bos(model, text)[condition] for name, text in texts.items()}


def _summary(metrics: Mapping[str, Interval]) -> str:
    kinds = {SINK: "heads_in_sink_order", NORM: "heads_in_norm_order", RANDOM: "heads_in_random_order"}
    return ", ".join(f"{metrics[name]} in {kind}" for kind, name in kinds.items())


def _dormant(scores: Mapping[str, Tensor]) -> pd.DataFrame:
    """The sink score of every head in every domain, and whether it is a sink head in some or not in some."""
    import pandas as pd

    means = {domain: values.double().mean(0) for domain, values in scores.items()}
    layers, heads = next(iter(means.values())).shape
    rows = []
    for layer in range(layers):
        for head in range(heads):
            of_head = {domain: float(values[layer, head]) for domain, values in means.items()}
            sinks = [score > SINK_THRESHOLD for score in of_head.values()]
            rows.append(
                {"head": f"attn.{layer}.{head}", **of_head, "dormant_somewhere": any(sinks)}
                | {"active_somewhere": not all(sinks)}
            )
    return pd.DataFrame(rows)


def _curves(runs: Mapping[str, Zeroing]) -> pd.DataFrame:
    """The growth of the loss by order and count, with its interval over samples."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"order": name, "heads_zeroed": count, "loss": float(run.losses[:, index].mean())}
            | {f"growth_{end}": value for end, value in run.growth(index).to_json().items() if end != "n"}
            for name, run in runs.items()
            for index, count in enumerate(run.counts)
        ]
    )


def _draw_curves(curves: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories
    from p0circuit.figures.style import Series

    counts = curves["heads_zeroed"].unique().tolist()

    def line(name: str) -> Series:
        part = curves[curves["order"] == name]
        return Series(name, *((100 * part[f"growth_{end}"]).tolist() for end in ("value", "low", "high")))

    at_random = curves.loc[curves["order"].str.startswith(RANDOM)]
    growth = 100 * np.asarray(at_random["growth_value"]).reshape(-1, len(counts))
    ends = (growth.mean(0), growth.min(0), growth.max(0))
    lines = [
        line(SINK),
        line(NORM),
        Series(f"{len(growth)} random orders (band: all of them)", *(end.tolist() for end in ends)),
    ]
    figure = trajectories(
        {"All heads": lines, "Close up": lines},
        list(map(str, counts)),
        f"{model}: heads zeroed one after the other (dashed: {TOLERANCE:.0%} more loss)",
        "heads zeroed",
        ["loss added, %"] * 2,
        reference=100 * TOLERANCE,
    )
    top = 100 * CLOSE_UP * TOLERANCE
    within = max(index for each in lines for index, value in enumerate(each.values) if value <= top)
    figure.axes[1].set(ylim=(-100 * TOLERANCE, top), xlim=(-0.2, min(within + 1, len(counts) - 1) + 0.2))
    return figure


def _draw_domains(domains: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.intervals import intervals, intervals_by

    kinds = {"heads_in_sink_order": SINK, "heads_in_norm_order": NORM, "heads_in_random_order": RANDOM}
    panels = {}
    for domain, part in domains.groupby("domain", sort=False):
        of_domain = intervals_by(part, "measured")
        panels[str(domain)[0].upper() + str(domain)[1:]] = {kind: of_domain[name] for name, kind in kinds.items()}
    title = f"{model}: heads that can be zeroed at {TOLERANCE:.0%} more loss"
    return intervals(panels, title, ["heads"] * len(panels), controls=(RANDOM,))
