"""Checkers of the exercises, one function each.

A checker has the number of its exercise. `put` and `ramp` are two of the solutions: the cells after the exercise import
them from here, so that the notebook does not show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from p0circuit.course.exercise import Wrong, as_number, as_tensor, ask, compare, exercise
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import Node
from p0circuit.prompts import PromptSet
from p0circuit.sink import SINK_THRESHOLD

# Exercises


def put(position: int, values: Tensor) -> Callable[[Tensor, object], Tensor]:
    """Return a hook that puts values at one position of an activation.

    Args:
        position: the position.
        values: what is put there, [batch, ...].

    Returns:
        A hook for activations [batch, pos, ...].
    """

    def hook_function(activation: Tensor, hook: object) -> Tensor:
        result = activation.clone()
        result[:, position] = values
        return result

    return hook_function


def ramp(off: float, on: float) -> tuple[float, float]:
    """Return gain and bias of a neuron whose pre-activation is 0 at one input and 1 at another.

    Args:
        off: input at which the pre-activation is 0.
        on: input at which it is 1.
    """
    gain = 1 / (on - off)
    return gain, -gain * off


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pattern(*shape: int, seed: int = 0) -> Tensor:
    """Draw random causal attention patterns [*shape, query, key] in float64; the last of `shape` is the length."""
    length = shape[-1]
    scores = 2 * torch.randn(*shape, length, generator=_generator(seed), dtype=torch.float64)
    hidden = torch.ones(length, length).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@exercise("1.1 sink score")
def check_sink_score(answer: object) -> None:
    """Check the sink score of attention patterns.

    Args:
        answer: function of patterns [head, query, key] that returns the sink scores [head].
    """
    pattern = _pattern(3, 6)
    to_p0 = pattern[:, :, 0]
    result = as_tensor(ask(answer, pattern), (3,))
    compare(
        result,
        to_p0.mean(-1),
        [
            (to_p0.sum(-1), "that is the sum over queries, which grows with the length of the prompt."),
            (to_p0[:, 1:].mean(-1), "the query at position zero is a query too; it is left out here."),
            (to_p0[:, -1], "that is the attention of the last query alone."),
            (to_p0.max(-1).values, "that is the maximum over queries; the sink score is their mean."),
            (
                pattern.mean((1, 2)),
                "that is a mean over keys, and 1/T for any pattern, because every row adds up to 1; the sink score is "
                "about one key, and all queries that see it.",
            ),
            (pattern[:, :, 1].mean(-1), "that is the score of position 1."),
        ],
        f"on a random pattern of 3 heads the scores should lie between 0 and 1 and differ from head to head; yours are "
        f"{[round(value, 3) for value in result.tolist()]}.",
    )


@exercise("1.2 attention everywhere alike")
def check_uniform_score(answer: object, length: int = 64) -> None:
    """Check the sink score of a head with uniform attention.

    Args:
        answer: the sink score.
        length: tokens per prompt.
    """
    compare(
        as_number(answer),
        sum(1 / (t + 1) for t in range(length)) / length,
        [
            (
                1 / length,
                f"1/{length} would be right if every query saw all {length} tokens; which does the first one see?",
            ),
            (sum(1 / (t + 1) for t in range(length)), "that is the sum over queries; the sink score is their mean."),
            (
                sum(1 / t for t in range(1, length)) / length,
                "here the first query is left out, or no query sees its own position.",
            ),
            (2 / (length + 1), "that is the value of the median query; the sink score is the mean over queries."),
        ],
        "take the queries one by one: how many keys does each see, and how much attention does the first key get?",
        # Three digits are enough.
        2e-4,
    )


@exercise("1.3 sink rate")
def check_sink_rate(answer: object) -> None:
    """Check the sink rate.

    Args:
        answer: function of sink scores [sample, layer, head] and a threshold that returns one number.
    """
    scores = torch.rand(5, 3, 4, generator=_generator(), dtype=torch.float64)
    eps = 0.45
    result = as_number(ask(answer, scores, eps))
    if abs(result - float((scores > SINK_THRESHOLD).double().mean())) < 1e-6:
        raise Wrong(f"your function counts scores above {SINK_THRESHOLD} whatever eps it is given.")
    compare(
        result,
        float((scores > eps).double().mean()),
        [
            (
                float((scores.mean(0) > eps).double().mean()),
                "your function averages over samples first: that asks which heads are sinks on average.",
            ),
            (float((scores > eps).sum()), "that is a count, not a share."),
            (float(scores.mean()), "that is the mean score; where is the threshold?"),
            (float((scores <= eps).double().mean()), "that is the share of heads that are not sinks."),
            (
                float((scores > eps).any(2).any(1).double().mean()),
                "that is the share of samples that have a sink head at all.",
            ),
        ],
        f"of 60 (sample, head) pairs your function finds a share of {result:.3f} above {eps}; count a few by hand.",
    )


@exercise("2.1 the cone model")
def check_cone(answer: object) -> None:
    """Check the cone model.

    Args:
        answer: function of a cosine and attention weights [query, key] that returns the expected squared norm [query]
            of
            the weighted means of unit vectors.
    """
    weights, cosine = _pattern(6), 0.4
    purity = weights.square().sum(-1)
    result = as_tensor(ask(answer, cosine, weights), (6,))
    if abs(float(result[0]) - 1) > 1e-6:
        message = (
            f"the first query attends to itself alone, so its mix is one unit vector; yours has {float(result[0]):.3f}."
        )
        raise Wrong(message)
    right = cosine**2 + (1 - cosine**2) * purity
    compare(
        result,
        right,
        [
            (
                cosine + (1 - cosine) * purity,
                "the cosine of two values is not the cosine of each with the common direction: one of them is the "
                "square of the other.",
            ),
            (right.sqrt(), "that is the norm; the model is about its square."),
            (purity, "that is right only for values that share nothing (cosine 0)."),
            (torch.ones(6), "the weights always add up to 1: their sum does not show how mixed the output is."),
            (purity * cosine**2 + (1 - cosine**2), "here mixing reduces what the values share instead of the rest."),
        ],
        "your prediction should fall from 1 as attention becomes more uniform, and never below what all values share; "
        f"at the last query (sum of squared weights {float(purity[-1]):.3f}) it is {float(result[-1]):.3f}.",
    )


@exercise("2.2 edit the mask")
def check_alone(answer: object) -> None:
    """Check an edit of attention patterns after which one query attends to itself alone.

    Args:
        answer: function of patterns [batch, head, query, key] and a query that returns the edited patterns.
    """
    pattern, t = _pattern(2, 3, 7), 4
    result = as_tensor(ask(answer, pattern, t), pattern.shape)
    right = pattern.clone()
    right[:, :, t] = one_hot(torch.tensor(t), 7).double()
    others = [query for query in range(7) if query != t]
    if torch.allclose(result, pattern):
        raise Wrong("nothing has changed.")
    if not torch.allclose(result[:, :, others], right[:, :, others], atol=1e-6):
        wrong_queries = [
            query for query in others if not torch.allclose(result[:, :, query], right[:, :, query], atol=1e-6)
        ]
        raise Wrong(f"only query {t} should change, but queries {wrong_queries} change as well: rows are queries.")
    if not torch.allclose(result[:, :, t].sum(-1), torch.ones(2, 3, dtype=torch.float64), atol=1e-6):
        total = float(result[0, 0, t].sum())
        raise Wrong(f"the attention of query {t} adds up to {total:.3f}; what happens to the other keys?")
    compare(
        result,
        right,
        [
            (_with_row(pattern, t, 0), f"query {t} attends to position zero alone; that is not itself."),
            (_in_one_head(pattern, right, t), "in the other heads, or the other samples, nothing has changed."),
        ],
        f"query {t} should give all of its attention to key {t}; in the first head it gives it "
        f"{float(result[0, 0, t, t]):.3f}.",
    )


def _with_row(pattern: Tensor, query: int, key: int) -> Tensor:
    result = pattern.clone()
    result[:, :, query] = one_hot(torch.tensor(key), pattern.shape[-1]).to(pattern)
    return result


def _in_one_head(pattern: Tensor, right: Tensor, query: int) -> Tensor:
    result = pattern.clone()
    result[:, 0, query] = right[:, 0, query]
    return result


@exercise("3.2 cut the norm")
def check_norm_cut(answer: object) -> None:
    """Check an edit of the residual stream after which P0 has the median norm of the other positions.

    Args:
        answer: function of streams [batch, pos, d] that returns the edited streams.
    """
    stream = torch.randn(3, 6, 8, generator=_generator(), dtype=torch.float64)
    stream *= torch.rand(3, 6, 1, generator=_generator(1), dtype=torch.float64) + 0.5
    stream[:, 0] *= torch.tensor([12, 9, 0.01])[:, None]
    result = as_tensor(ask(answer, stream), stream.shape)
    if not torch.allclose(result[:, 1:], stream[:, 1:], atol=1e-6):
        raise Wrong("positions other than 0 have changed.")
    if torch.allclose(result[:, 0], stream[:, 0]):
        raise Wrong("position 0 has not changed.")
    cosine = (normalize(result[:, 0], dim=-1) * normalize(stream[:, 0], dim=-1)).sum(-1)
    if float(cosine.min()) < 1 - 1e-5:
        raise Wrong(f"the direction of position 0 has changed: its cosine to the old one is {float(cosine.min()):.3f}.")
    norms = stream.norm(dim=-1)
    others = norms[:, 1:]
    compare(
        result[:, 0].norm(dim=-1),
        others.median(-1).values,
        [
            (torch.ones(3), "the norm is 1 now, whatever the norms of the others are."),
            (others.mean(-1), "that is the mean of the others' norms; one large norm among them would change it."),
            (norms.median(-1).values, "position 0 itself was counted among the others."),
            (others.median().expand(3), "all samples have the same norm; each sample has its own median."),
            (
                norms[:, 0].square() / others.median(-1).values,
                "the factor is inverted.",
            ),
            (
                others.median(-1).values / norms[:, 0],
                "its norm is now the ratio of two norms.",
            ),
        ],
        f"in the first sample the norm is {float(result[0, 0].norm()):.3f}, and the others' are "
        f"{[round(norm, 3) for norm in others[0].tolist()]}.",
    )


@exercise("3.1 what a neuron writes")
def check_contribution(answer: object) -> None:
    """Check what neurons write along a direction.

    Args:
        answer: function of activations [neuron], output weights [neuron, d] and a direction [d] that returns the
            projections [neuron].
    """
    activation, w_out = (torch.randn(*shape, generator=_generator(), dtype=torch.float64) for shape in ((5,), (5, 8)))
    direction = 3 * torch.randn(8, generator=_generator(2), dtype=torch.float64)
    unit = normalize(direction, dim=-1)
    result = as_tensor(ask(answer, activation, w_out, direction), (5,))
    right = activation * (w_out @ unit)
    compare(
        result,
        right,
        [
            (
                activation * (w_out @ direction),
                "your result grows with the length of the direction, which is not 1 here.",
            ),
            (
                w_out @ unit,
                "that is what each neuron would write with the same activation; how large is its activation?",
            ),
            (right.abs(), "the sign is lost: neurons can also write against the direction."),
            (
                normalize(w_out, dim=-1) @ unit,
                "those are cosines: a neuron that writes little counts as much as one that writes a lot.",
            ),
            (
                activation.abs() * w_out.norm(dim=-1),
                "that is the length of what each neuron writes, in any direction.",
            ),
            (right / right.sum(), "those are shares; the answer is the projection, in the units of the stream."),
        ],
        f"the activation of the first neuron is {float(activation[0]):.3f}; what it writes along the direction is not "
        f"{float(result[0]):.3f}.",
    )


@exercise("4.1 a hook that patches")
def check_patch_hook(answer: object) -> None:
    """Check a hook that patches P0.

    Args:
        answer: function of activations [batch, pos, d], the hook point and values [batch, d] that returns the patched
            activations.
    """
    activation = torch.randn(3, 5, 4, generator=_generator(), dtype=torch.float64)
    values = torch.randn(3, 4, generator=_generator(1), dtype=torch.float64)
    raw = ask(answer, activation, None, values, may_edit=True, nothing="the hook returns nothing.")
    result = as_tensor(raw, activation.shape)
    right = activation.clone()
    right[:, 0] = values
    everywhere = values[:, None].expand(-1, 5, -1)
    added = activation.clone()
    added[:, 0] += values
    first = activation.clone()
    first[0] = right[0]
    edited_positions = sorted({position for _, position, _ in (result != activation).nonzero().tolist()})
    compare(
        result,
        right,
        [
            (activation, "nothing has changed."),
            (everywhere, "the value is at every position; a patch changes one of them."),
            (added, "the value was added to the activation; a patch replaces it."),
            (first, "only the first sample is patched."),
            (_with_first(activation, values), "every sample has the value of the first one."),
        ],
        f"positions {edited_positions} have changed (axis 1 is the position), and of the {values.numel()} given values "
        f"{int((result[:, 0] == values).sum())} are at P0.",
    )


def _with_first(activation: Tensor, values: Tensor) -> Tensor:
    result = activation.clone()
    result[:, 0] = values[0]
    return result


@exercise("4.3 the closed form")
def check_closed_form(answer: object) -> None:
    """Check the closed form of the attention to P0.

    Keys that a query cannot see have the score -inf. The first query sees no key but P0.

    Args:
        answer: function of the scores of P0 [query] and of the other keys [query, key] that returns the attention to P0
            [query].
    """
    scores = 2 * torch.randn(6, 6, generator=_generator(), dtype=torch.float64)
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    score, others = scores[:, 0].clone(), scores[:, 1:].clone()
    raw = ask(answer, score, others)
    if isinstance(raw, Tensor) and raw.shape == (6,) and not bool(torch.isfinite(raw).all()):
        raise Wrong("some values are not finite: for a query that sees only P0, all other scores are -inf.")
    result = as_tensor(raw, (6,))
    visible = others.masked_fill(others.isinf(), 0)
    compare(
        result,
        scores.softmax(-1)[:, 0],
        [
            (score.sigmoid(), "here P0 competes with no other key: only its own score counts."),
            ((score - scores.logsumexp(-1)).sigmoid(), "P0's own score is counted among those of the other keys."),
            (score.exp(), "that is the numerator of the softmax; the division is missing."),
            (
                (score - visible.sum(-1)).sigmoid(),
                "the scores of the other keys are added as they are; the softmax adds something else.",
            ),
            ((score - others.max(-1).values).sigmoid(), "P0 competes only with the best of the others."),
            (1 - scores.softmax(-1)[:, 0], "that is the attention that goes to the others."),
        ],
        f"softmax gives P0 {float(scores.softmax(-1)[-1, 0]):.4f} of the last query, you {float(result[-1]):.4f}.",
        1e-6,
    )


@exercise("4.2 an edge by hand")
def check_edge(
    answer: object,
    model: HookedModel,
    prompts: PromptSet,
    values: Mapping[Node, Tensor],
    sender: str,
    head: tuple[int, int],
) -> None:
    """Check the effect of one edge, from a sender at P0 into the key of a head.

    Args:
        answer: mean change of the head's sink score when the edge is patched.
        model: a hooked model.
        prompts: the prompts of the notebook.
        values: the values that are patched in, by node.
        sender: name of the sender.
        head: layer and head of the receiver.
    """
    from p0circuit.interventions.ablation import ablate
    from p0circuit.interventions.metrics import measure, sink_score_of
    from p0circuit.interventions.own_scores import edges_into_keys
    from p0circuit.interventions.path_patching import patch_edges

    layer, number = head
    node, metric = Node.parse(sender), sink_score_of([head])

    def effect(through: Literal["direct", "mlps"]) -> float:
        edge = patch_edges(model, prompts, [node], [f"attn.{layer}.{number}.k"], values, metric, through=through)
        return float(edge.effect.mean())

    clean = float(measure(model, prompts, metric).mean())
    with ablate(model, prompts, [node], values):
        total_effect = float(measure(model, prompts, metric).mean()) - clean
    head_effects = edges_into_keys(model, prompts, [node], values).effect[0, :, layer].mean(0).tolist()
    of_others = [(value, f"that is the edge into head {layer}.{one}.") for one, value in enumerate(head_effects)]
    result, right = as_number(answer), effect("direct")
    compare(
        result,
        right,
        [
            (-right, "the sign is reversed: the effect is the patched score minus the clean one."),
            (clean + right, "that is the patched score itself; the effect is its change."),
            (
                total_effect,
                "that is the effect along all paths: nothing between sender and receiver was frozen.",
            ),
            (effect("mlps"), "the MLPs between sender and receiver were not frozen."),
            (clean, "that is the clean score, with nothing patched."),
            *of_others,
        ],
        f"the head's clean sink score is {clean:.4f}, so the change lies between {-clean:.4f} and {1 - clean:.4f}; "
        f"yours is {result:+.4f}. Which key was patched, and whose attention was read?",
        # The effect of an edge can be 0; rounding errors are about 1e-6.
        max(1e-3 * abs(right), 1e-5),
    )


@exercise("5.1 the detector")
def check_detector(answer: object) -> None:
    """Check the weights of the neuron that detects P0.

    Args:
        answer: function of a threshold and of the cosine at P0 that returns gain and bias; relu(gain * cosine + bias)
            is 0
            from the threshold on and 1 at P0.
    """
    for threshold, at_p0 in ((0.338, 0.302), (0.5, 0.2)):
        gain, bias = as_tensor(ask(answer, threshold, at_p0), (2,)).tolist()

        def fires(cosine: float, gain: float = gain, bias: float = bias) -> float:
            return max(0.0, gain * cosine + bias)

        where = f"with a threshold of {threshold} and {at_p0} at P0"
        if gain > 0:
            raise Wrong(f"{where} the neuron fires more where the cosine of the ruler is larger; at P0 it is small.")
        if fires(threshold + 0.1) > 1e-6 or fires(threshold) > 1e-3:
            raise Wrong(f"{where} it fires with {fires(threshold):.3f} at the threshold already; expected 0.")
        if fires(at_p0) < 1e-6:
            raise Wrong(f"{where} it does not fire at P0.")
        if abs(fires(at_p0) - 1) > 1e-3:
            raise Wrong(f"{where} it fires with {fires(at_p0):.3f} at P0; expected 1.")
        if fires((threshold + at_p0) / 2) < 1e-6:
            raise Wrong(f"{where} it is 0 halfway between the two.")


@exercise("5.2 how strong a sink")
def check_strength(answer: object) -> None:
    """Check the sink score of a head that gives P0 one score and all other keys the score 0.

    Args:
        answer: function of the score of P0 and the number of tokens that returns the sink score.
    """
    for strength, length in ((3.0, 10), (8.0, 64), (0.0, 5)):
        result = as_number(ask(answer, strength, length))
        size = math.exp(strength)
        queries = range(length)
        compare(
            result,
            sum(size / (size + t) for t in queries) / length,
            [
                (size / (size + length - 1), "that is the attention of the last query, not the mean over queries."),
                (size / (size + length), "every query is treated as if it saw all tokens."),
                (
                    sum(size / (size + t + 1) for t in queries) / length,
                    "here every query sees one key too many besides P0.",
                ),
                (sum(size / (size + t) for t in queries), "that is the sum over queries."),
                (
                    sum(strength / (strength + t) if strength + t else 0 for t in queries) / length,
                    "here P0's score enters as it is; in a softmax no score does.",
                ),
            ],
            f"with strength {strength:g} on {length} tokens your score is {result:.4f}; what does query t give to P0 "
            "if t other keys have the score 0?",
            1e-4,
        )
