"""A transformer whose P0 sink circuit is built by hand, weight by weight, so that the truth about it is known.

Every pre-norm of this model returns a unit vector: its weight is ``1 / sqrt(d_model)`` and everything in the residual
stream is orthogonal to the all-ones vector, so LayerNorm is ``x -> x / |x|`` and *what a block reads is a cosine*.
The stream is split into orthonormal named subspaces (`Subspaces`): ``token`` (64 dimensions), ``echo`` (64), ``ruler``,
``mark`` and ``p0`` (1 each), ``place`` (2) and ``spare`` (16). In the order of the forward pass:

0. *Embedding.* Token w becomes ``code_w + ruler``. The 64 codes are the rows of a Hadamard matrix over 8: orthonormal,
   and any 32 coordinates hold exactly half of the energy of every code. With learned positions a code of length 0.5
   in ``place`` is added, which only one decoy head reads. All embeddings have the squared norm ``B = 2`` (2.25).
1. *Recognition: two heads of block 0.* Queries and keys are zero, so attention is uniform over all positions seen.
   Each head copies one half of the code to ``echo``, scaled so that an unmixed echo has length 3. The echo at
   position t is an average of orthonormal codes, hence

       |echo|^2 = 9 F,    F = sum over tokens w of (share of w among positions 0..t)^2    (`purity`).

   P0 sees itself alone: F = 1. Two different tokens: F = 1/2. And t + 1 different ones: F = 1 / (t + 1), which is the
   paper's cone model with cosine 0 and weights ``p_i = 1 / (t + 1)``.
2. *Detection: one neuron of MLP 0.* The pre-norm is the measuring device: ``ruler`` has length 1 everywhere, so its
   cosine ``r(F) = 1 / sqrt(B + 9 F)`` is the smaller, the longer the echo. The neuron computes

       relu((r(3/4) - cosine) / (r(3/4) - r(1)))        1 at F = 1, and 0 for every F <= 3/4,

   and writes 3 times that to ``mark``. It sees norms only: which token it is makes no difference. With r(1) = 0.302,
   r(3/4) = 0.338 and r(1/2) = 0.392, a position that has seen two different tokens misses the threshold by 1.6 times
   the gap by which P0 clears it. Either recognition head alone makes half an echo, F = 1/2: the two are an AND.
3. *Amplification: one neuron of MLP 1.* At P0 the cosine of ``mark`` is ``3 / sqrt(B + 9 + 9) = 0.67``, elsewhere 0.
   The neuron is 0 up to a cosine of 0.3 and 1 at P0, and writes 60 times that to ``p0``. The rest of P0's stream is
   shorter than 5, so its cosine to ``p0`` is above 0.996, and its norm is over 15 times that of any other position.
4. *Read-out: the sink heads of block 2.* The query is a bias (``W_Q = 0``), the key reads ``p0``, both in a head
   dimension that RoPE does not rotate. Scores are ``strength * cosine to p0``: 9, 8 or 7 at P0, exactly 0 elsewhere;
   a query with t other keys in view gives P0 ``e^s / (e^s + t)``. Only the direction counts: cutting P0's norm
   changes nothing. The values read token codes, which the norm has made small at P0: the sink's values are drained.
5. *Decoys.* The other heads blur the recent past, look for tokens alike, or average; each copies some of the code to
   ``spare``, with an output no longer than 1/8. Head 2.1 carries the P0 direction on, but through V. In each MLP one
   neuron per token fires wherever its token stands, and one of MLP 0 (the herring) fires exactly where the detector
   does. All of them write to ``spare``, which nothing reads. They touch the circuit through the norm alone: at the
   detector by less than (3/8)^2 = 0.14 beside ``B + 9 F = 11``, well within its margin.
6. *Unembedding.* That of the embedding: the model says its token again. (``ruler`` adds the same to all logits.)

What follows for components set to zero at P0 (`wired_truth` states it as data):

- Without either recognition head, MLP 0, the detector, MLP 1 or the sink neuron there is no ``p0`` at P0: all scores
  are 0, attention is uniform, the sink score of every sink head is ``H_T / T`` (0.074 at T = 64) but for rounding.
- Without decoys the cosine stays between 0.996 and 1. A score moves by at most ``0.004 s``, and a sink score by that
  times the mean of ``p (1 - p)``, below 0.03 at T = 64: less than 1e-3 from the mean over t of ``e^s / (e^s + t)``.
- Without the embedding, at the input of MLP 0, the sink stays: no ruler at all looks like a long echo.

The known weakness: recognition is purity, so a prefix of one repeated token imitates P0. If the first token stands n
times in a row, all n are recognised and share the sink, about 1/n each; if all tokens are equal, attention is uniform
and no sink is left. After n equal tokens another one has ``F = (n^2 + 1) / (n + 1)^2``; its ``mark`` passes the cosine
of 0.3 at F = 0.82, so from n = 9 on other tokens are swept in too. Learned positions do not help: nothing reads them.

Source: the circuit is that of Peng et al. (arXiv 2603.06591: recognition and amplification) with the neurons of Yona et
al. (arXiv 2503.08908: first-detector and sink neurons); the construction and its numbers are our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.models.info import ModelError, Positions

Head = tuple[int, int]
Neuron = tuple[int, int]
Edge = tuple[str, str]
Weights = dict[str, Tensor]

VOCABULARY, CONTEXT = 64, 256
LAYERS, HEADS, D_HEAD, D_MLP, SPARE = 3, 5, 32, 128, 16
D_MODEL = HEADS * D_HEAD
# The mean square of any stream here is at least 0.0125: next to that it is nothing.
NORM_EPS = 1e-8

# Lengths of what is written, and the two thresholds.
RULER, PLACE, ECHO, MARK, P0_NORM, DECOY = 1.0, 0.5, 3.0, 3.0, 60.0, 0.25
PURITY_THRESHOLD, MARK_THRESHOLD = 0.75, 0.3

RECOGNITION_HEADS = (1, 3)
DETECTOR, RED_HERRING, SINK_NEURON = 17, 90, 42
SINK_STRENGTHS = {0: 9.0, 2: 8.0, 3: 7.0}
DECOY_HEADS: dict[Head, Literal["recent", "alike", "uniform", "carrier"]] = {
    (0, 0): "recent",
    (0, 2): "alike",
    (0, 4): "uniform",
    (1, 0): "uniform",
    (1, 1): "alike",
    (1, 2): "uniform",
    (1, 3): "alike",
    (1, 4): "uniform",
    (2, 1): "carrier",
    (2, 4): "alike",
}
RECENCY, ALIKENESS = 200.0, 20.0

# RoPE rotates the first four dimensions of a head only, in pairs (0, 2) and (1, 3): by 1 and by 0.01 a position.
ROTARY_DIM, ROTARY_BASE, TURN = 4, 10_000.0, 0.01


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Orthonormal directions of the residual stream, all of them orthogonal to the all-ones vector."""

    token: Float[Tensor, "code d_model"]
    echo: Float[Tensor, "code d_model"]
    ruler: Float[Tensor, " d_model"]
    mark: Float[Tensor, " d_model"]
    p0: Float[Tensor, " d_model"]
    place: Float[Tensor, "2 d_model"]
    spare: Float[Tensor, "spare d_model"]
    second_p0: Float[Tensor, " d_model"]


def residual_subspaces(seed: int = 0) -> Subspaces:
    """Split the residual stream into the named subspaces, turned at random by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    # All later columns of the orthonormal factor are orthogonal to its first, so this keeps the all-ones vector out.
    columns[:, 0] = 1.0
    rows = torch.linalg.qr(columns).Q.T[1:]
    token, echo, ruler, mark, p0, place, spare, second_p0 = rows[: 2 * VOCABULARY + 6 + SPARE].split(
        [VOCABULARY, VOCABULARY, 1, 1, 1, 2, SPARE, 1]
    )
    return Subspaces(token, echo, ruler[0], mark[0], p0[0], place, spare, second_p0[0])


def wired_weights(positions: Positions = "rotary", *, seed: int = 0, sinks: bool = True) -> Weights:
    """Construct all weights, in float64, with HookedTransformer's names and shapes; `sinks=False` leaves out step 4.

    Raises:
        ModelError: if `positions` is neither "rotary" nor "learned".
    """
    if positions not in ("rotary", "learned"):
        raise ModelError(f"positions={positions!r}, but the wired model exists with 'rotary' and 'learned' only")
    space = residual_subspaces(seed)
    weights = blank_weights()
    _embed(weights, space, positions)
    _recognise(weights, space, positions)
    _detect(weights, space, positions)
    _amplify(weights, space, positions)
    if sinks:
        _read_out(weights, space)
    _add_decoy_heads(weights, space, positions)
    _add_decoy_neurons(weights, space)
    return weights


def blank_weights(n_layers: int = LAYERS) -> Weights:
    """Nothing but norms: blocks read unit vectors; the last norm keeps its usual size, so that logits are decided.

    Embedding and unembedding are left for others to add.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    weights = {"ln_final.w": zeros(D_MODEL) + 1, "ln_final.b": zeros(D_MODEL)}
    for layer in range(n_layers):
        block = f"blocks.{layer}."
        for norm in ("ln1", "ln2"):
            weights |= {f"{block}{norm}.w": zeros(D_MODEL) + D_MODEL**-0.5, f"{block}{norm}.b": zeros(D_MODEL)}
        for name in "QKV":
            weights |= {f"{block}attn.W_{name}": zeros(HEADS, D_MODEL, D_HEAD)}
            weights |= {f"{block}attn.b_{name}": zeros(HEADS, D_HEAD)}
        weights |= {f"{block}attn.W_O": zeros(HEADS, D_HEAD, D_MODEL), f"{block}attn.b_O": zeros(D_MODEL)}
        weights |= {f"{block}mlp.W_in": zeros(D_MODEL, D_MLP), f"{block}mlp.b_in": zeros(D_MLP)}
        weights |= {f"{block}mlp.W_out": zeros(D_MLP, D_MODEL), f"{block}mlp.b_out": zeros(D_MODEL)}
    return weights


def _embed(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Steps 0 and 6: a code and the ruler for every token, and the place code of learned positions."""
    weights["embed.W_E"] = _codes() @ space.token + RULER * space.ruler
    weights["unembed.W_U"] = weights["embed.W_E"].T
    weights["unembed.b_U"] = torch.zeros(VOCABULARY, dtype=torch.float64)
    if positions == "learned":
        angle = TURN * torch.arange(CONTEXT, dtype=torch.float64)
        weights["pos_embed.W_pos"] = PLACE * torch.stack([angle.cos(), angle.sin()], dim=1) @ space.place


def _recognise(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 1: each recognition head echoes its half of the code; W_O takes back the norm's division by sqrt(B)."""
    scale = ECHO * math.sqrt(_embedding_square(positions))
    for head, half in zip(RECOGNITION_HEADS, torch.arange(VOCABULARY).split(D_HEAD), strict=True):
        weights["blocks.0.attn.W_V"][head] = space.token[half].T
        weights["blocks.0.attn.W_O"][head] = scale * space.echo[half]


def _detect(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 2: the detector fires where the ruler looks short because the echo is long."""
    threshold = _ruler_cosine(PURITY_THRESHOLD, positions)
    gain = 1 / (threshold - _ruler_cosine(1.0, positions))
    set_neuron(weights, 0, DETECTOR, reads=-gain * space.ruler, bias=gain * threshold, writes=MARK * space.mark)


def _amplify(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 3: the sink neuron turns the mark into the P0 direction."""
    gain = 1 / (MARK / math.sqrt(_embedding_square(positions) + ECHO**2 + MARK**2) - MARK_THRESHOLD)
    set_neuron(weights, 1, SINK_NEURON, reads=gain * space.mark, bias=-gain * MARK_THRESHOLD, writes=P0_NORM * space.p0)


def _read_out(weights: Weights, space: Subspaces) -> None:
    """Step 4: a constant query meets the P0 direction in the last head dimension, which no rotation touches."""
    for head, strength in SINK_STRENGTHS.items():
        weights["blocks.2.attn.b_Q"][head, -1] = 1.0
        # Attention divides scores by sqrt(d_head); the key takes it back.
        weights["blocks.2.attn.W_K"][head, :, -1] = strength * math.sqrt(D_HEAD) * space.p0


def _add_decoy_heads(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 5: what every head outside recognition copies, sink heads included, and where the decoys look."""
    for layer, head in [*DECOY_HEADS, *((2, head) for head in SINK_STRENGTHS)]:
        attention = f"blocks.{layer}.attn."
        some = torch.arange(SPARE * head, SPARE * (head + 1)) % VOCABULARY
        weights[f"{attention}W_V"][head, :, :SPARE] = space.token[some].T
        weights[f"{attention}W_O"][head, :SPARE] = DECOY * space.spare

    for (layer, head), kind in DECOY_HEADS.items():
        attention = f"blocks.{layer}.attn."
        queries, keys = weights[f"{attention}W_Q"][head], weights[f"{attention}W_K"][head]
        if kind == "alike":
            # Half a code is shared by two tokens, so a token finds itself and its twin.
            queries[:] = keys[:] = math.sqrt(ALIKENESS * math.sqrt(D_HEAD)) * space.token[:D_HEAD].T
        elif kind == "recent" and positions == "learned":
            # Place codes of positions t and s have the cosine cos(0.01 (t - s)): the same as a pair that RoPE turns.
            size = math.sqrt(RECENCY * math.sqrt(D_HEAD) * _embedding_square(positions)) / PLACE
            queries[:, :2] = keys[:, :2] = size * space.place.T
        elif kind == "recent":
            size = math.sqrt(RECENCY * math.sqrt(D_HEAD))
            weights[f"{attention}b_Q"][head, 1] = weights[f"{attention}b_K"][head, 1] = size
        elif kind == "carrier":
            weights[f"{attention}W_V"][head, :, SPARE] = space.p0
            weights[f"{attention}W_O"][head, SPARE] = space.spare[0]


def _add_decoy_neurons(weights: Weights, space: Subspaces) -> None:
    """Step 5: the herring reads what the detector reads; a neuron per token in each MLP; the others stay silent."""
    reads, bias = (weights[f"blocks.0.mlp.{name}"][..., DETECTOR].clone() for name in ("W_in", "b_in"))
    set_neuron(weights, 0, RED_HERRING, reads=reads, bias=float(bias), writes=space.spare[0])
    for layer in range(LAYERS):
        for token, index in enumerate(token_neurons(layer)):
            code = _codes()[token] @ space.token
            set_neuron(weights, layer, index, reads=code, bias=-0.1, writes=0.5 * space.spare[token % SPARE])


def set_neuron(
    weights: Weights,
    layer: int,
    index: int,
    *,
    reads: Float[Tensor, " d_model"],
    bias: float,
    writes: Float[Tensor, " d_model"],
) -> None:
    """Make a neuron fire with relu(`reads` · normed stream + `bias`), and write that many times `writes`."""
    weights[f"blocks.{layer}.mlp.W_in"][:, index] = reads
    weights[f"blocks.{layer}.mlp.b_in"][index] = bias
    weights[f"blocks.{layer}.mlp.W_out"][index] = writes


def token_neurons(layer: int) -> list[int]:
    taken = {0: (DETECTOR, RED_HERRING), 1: (SINK_NEURON,)}.get(layer, ())
    return [index for index in range(D_MLP) if index not in taken][:VOCABULARY]


def _codes() -> Float[Tensor, "vocab code"]:
    codes = torch.ones(1, 1, dtype=torch.float64)
    while len(codes) < VOCABULARY:
        codes = torch.cat([torch.cat([codes, codes], dim=1), torch.cat([codes, -codes], dim=1)])
    return codes / math.sqrt(VOCABULARY)


def _embedding_square(positions: Positions) -> float:
    return 1 + RULER**2 + (PLACE**2 if positions == "learned" else 0)


def _ruler_cosine(pure: float, positions: Positions) -> float:
    return RULER / math.sqrt(_embedding_square(positions) + ECHO**2 * pure)


def purity(ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """The quantity recognition measures: sum of squared token shares in the prefix up to each position (1 at P0)."""
    counts = torch.nn.functional.one_hot(ids, VOCABULARY).cumsum(1).double()
    seen = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return counts.square().sum(-1) / seen.square()
