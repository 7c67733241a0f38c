"""A transformer whose P0 sink circuit is constructed weight by weight, so that the ground truth about it is known.

Every pre-norm of this model returns a unit vector: its weight is ``1 / sqrt(d_model)`` and everything in the residual
stream is orthogonal to the all-ones vector, so LayerNorm is ``x -> x / |x|`` and *a block reads cosines*.
The stream is split into orthonormal named subspaces (`Subspaces`): ``token`` (64 dimensions), ``echo`` (64), ``ruler``,
``mark`` and ``p0`` (1 each), ``position`` (2) and ``spare`` (16). In the order of the forward pass:

0. *Embedding.* Token w becomes ``code_w + ruler``. The 64 codes are the rows of a Hadamard matrix over 8: orthonormal,
   and any 32 coordinates hold exactly half of the energy of every code. With learned positions a code of length 0.5
   in ``position`` is added, which only one decoy head reads. All embeddings have the squared norm ``B = 2`` (2.25).
1. *Recognition: two heads of block 0.* Queries and keys are zero, so attention is uniform over all positions so far.
   Each head copies one half of the code to ``echo``, scaled so that an unmixed echo has length 3. The echo at
   position t is an average of orthonormal codes, hence

       |echo|^2 = 9 F,    F = sum over tokens w of (share of w among positions 0..t)^2    (`purity`).

   P0 sees itself alone: F = 1. Two different tokens: F = 1/2. And t + 1 different ones: F = 1 / (t + 1), which is the
   paper's cone model with cosine 0 and weights ``p_i = 1 / (t + 1)``.
2. *Detection: one neuron of MLP 0.* The pre-norm is the measuring device: ``ruler`` has length 1 everywhere, so its
   cosine ``r(F) = 1 / sqrt(B + 9 F)`` decreases with the length of the echo. The neuron computes

       relu((r(3/4) - cosine) / (r(3/4) - r(1)))        1 at F = 1, and 0 for every F <= 3/4,

   and writes 3 times that to ``mark``. It depends on norms only, not on the token. With r(1) = 0.302, r(3/4) = 0.338
   and r(1/2) = 0.392, a position after two different tokens misses the threshold by 1.6 times the margin by which P0
   passes it. Either recognition head alone makes half an echo, F = 1/2: both are necessary (an AND).
3. *Amplification: one neuron of MLP 1.* At P0 the cosine of ``mark`` is ``3 / sqrt(B + 9 + 9) = 0.67``, elsewhere 0.
   The neuron is 0 up to a cosine of 0.3 and 1 at P0, and writes 60 times that to ``p0``. The rest of P0's stream is
   shorter than 5, so its cosine to ``p0`` is above 0.996, and its norm is over 15 times that of any other position.
4. *Read-out: the sink heads of block 2.* The query is a bias (``W_Q = 0``), the key reads ``p0``, both in a head
   dimension that RoPE does not rotate. Scores are ``strength * cosine to p0``: 9, 8 or 7 at P0, exactly 0 elsewhere;
   a query that attends to t other keys gives P0 ``e^s / (e^s + t)``. Only the direction matters: a smaller norm of P0
   changes nothing. The values read token codes, which the norm makes small at P0: the sink's values are small.
5. *Decoys.* The other heads attend to recent tokens, to similar tokens, or uniformly; each copies a part of the code to
   ``spare``, with an output no longer than 1/8. Head 2.1 reads the P0 direction too, but in V. In each MLP one neuron
   per token fires wherever its token occurs, and one of MLP 0 (the red herring) fires exactly where the detector does.
   All of them write to ``spare``, which nothing reads. They affect the circuit through the norm alone: at the detector
   by less than (3/8)^2 = 0.14, compared with ``B + 9 F = 11``, well within its margin.
6. *Unembedding.* The transposed embedding: the model predicts the token that it reads. (``ruler`` adds the same number
   to all logits.)

What follows for components set to zero at P0 (`truth.wired_truth` states it as data):

- Without either recognition head, MLP 0, the detector, MLP 1 or the sink neuron there is no ``p0`` at P0: all scores
  are 0, attention is uniform, and the sink score of every sink head is ``H_T / T`` (0.074 at T = 64) up to rounding.
- Without decoys the cosine stays between 0.996 and 1. A score moves by at most ``0.004 s``, and a sink score by that
  times the mean of ``p (1 - p)``, below 0.03 at T = 64: less than 1e-3 from the mean over t of ``e^s / (e^s + t)``.
- Without the embedding, at the input of MLP 0, the sink remains: a missing ruler has the cosine of a long echo.

The known weakness: recognition is purity, so a prefix of one repeated token imitates P0. If the first token occurs n
times in a row, all n positions are recognised and share the sink, about 1/n each; if all tokens are equal, attention is
uniform and there is no sink. After n equal tokens another one has ``F = (n^2 + 1) / (n + 1)^2``; its ``mark`` passes
the cosine of 0.3 at F = 0.82, so from n = 9 on other tokens are recognised too. Learned positions do not help: the
circuit does not read them.

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

from p0circuit.models.errors import ModelError
from p0circuit.models.info import Positions

Head = tuple[int, int]
"""Layer and index."""
Neuron = tuple[int, int]
"""Layer and index."""
Edge = tuple[str, str]
"""The names of a sender and a receiver."""
Weights = dict[str, Tensor]
"""Weights by HookedTransformer's names."""

VOCABULARY, CONTEXT = 64, 256
LAYERS, HEADS, D_HEAD, D_MLP, SPARE = 3, 5, 32, 128, 16
D_MODEL = HEADS * D_HEAD
# Negligible: the mean square of any stream here is at least 0.0125.
NORM_EPS = 1e-8

# Lengths of what is written, and the two thresholds.
RULER, POSITION_CODE, ECHO, MARK, P0_NORM, DECOY = 1.0, 0.5, 3.0, 3.0, 60.0, 0.25
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
    """Orthonormal directions of the residual stream, all of them orthogonal to the all-ones vector.

    Attributes:
        token: the codes of tokens, [code, d_model].
        echo: copies of the codes by the recognition heads, [code, d_model].
        ruler: a direction in which every embedding has the same length, [d_model].
        mark: what the detector writes, [d_model].
        p0: what the sink neuron writes, [d_model].
        position: the codes of learned positions, [2, d_model].
        spare: what decoys write, [spare, d_model].
        second_p0: what the second sink neuron of the two-stage model writes, [d_model].
    """

    token: Float[Tensor, "code d_model"]
    echo: Float[Tensor, "code d_model"]
    ruler: Float[Tensor, " d_model"]
    mark: Float[Tensor, " d_model"]
    p0: Float[Tensor, " d_model"]
    position: Float[Tensor, "2 d_model"]
    spare: Float[Tensor, "spare d_model"]
    second_p0: Float[Tensor, " d_model"]


def residual_subspaces(seed: int = 0) -> Subspaces:
    """Split the residual stream into the named subspaces, rotated at random.

    Args:
        seed: of the rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    # All later columns of the orthonormal factor are orthogonal to its first, so this keeps the all-ones vector out.
    columns[:, 0] = 1.0
    rows = torch.linalg.qr(columns).Q.T[1:]
    token, echo, ruler, mark, p0, position, spare, second_p0 = rows[: 2 * VOCABULARY + 6 + SPARE].split(
        [VOCABULARY, VOCABULARY, 1, 1, 1, 2, SPARE, 1]
    )
    return Subspaces(token, echo, ruler[0], mark[0], p0[0], position, spare, second_p0[0])


def wired_weights(positions: Positions = "rotary", *, seed: int = 0, sinks: bool = True) -> Weights:
    """Construct all weights of the wired model.

    Args:
        positions: "rotary" or "learned".
        seed: of the rotation of the stream.
        sinks: whether to construct step 4; False gives the decoy model.

    Returns:
        Weights in float64, with HookedTransformer's names and shapes.

    Raises:
        ModelError: `positions` is neither "rotary" nor "learned".

    Example:
        ```python
        weights = wired_weights("rotary")
        assert weights["embed.W_E"].shape == (VOCABULARY, D_MODEL)
        ```
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
    """Return weights of zero, except for the norms; embedding and unembedding are missing.

    The norms of blocks return unit vectors. The final norm has weights of one, so that logits differ clearly.

    Args:
        n_layers: number of blocks.
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
    """Steps 0 and 6: a code and the ruler for every token, and the code of learned positions."""
    weights["embed.W_E"] = _codes() @ space.token + RULER * space.ruler
    weights["unembed.W_U"] = weights["embed.W_E"].T
    weights["unembed.b_U"] = torch.zeros(VOCABULARY, dtype=torch.float64)
    if positions == "learned":
        angle = TURN * torch.arange(CONTEXT, dtype=torch.float64)
        weights["pos_embed.W_pos"] = POSITION_CODE * torch.stack([angle.cos(), angle.sin()], dim=1) @ space.position


def _recognise(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 1: each recognition head copies its half of the code; W_O undoes the norm's division by sqrt(B)."""
    scale = ECHO * math.sqrt(_embedding_square(positions))
    for head, half in zip(RECOGNITION_HEADS, torch.arange(VOCABULARY).split(D_HEAD), strict=True):
        weights["blocks.0.attn.W_V"][head] = space.token[half].T
        weights["blocks.0.attn.W_O"][head] = scale * space.echo[half]


def _detect(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 2: the detector fires where the cosine of the ruler is small because the echo is long."""
    threshold = _ruler_cosine(PURITY_THRESHOLD, positions)
    gain = 1 / (threshold - _ruler_cosine(1.0, positions))
    set_neuron(weights, 0, DETECTOR, reads=-gain * space.ruler, bias=gain * threshold, writes=MARK * space.mark)


def _amplify(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 3: the sink neuron reads the mark and writes the P0 direction."""
    gain = 1 / (MARK / math.sqrt(_embedding_square(positions) + ECHO**2 + MARK**2) - MARK_THRESHOLD)
    set_neuron(weights, 1, SINK_NEURON, reads=gain * space.mark, bias=-gain * MARK_THRESHOLD, writes=P0_NORM * space.p0)


def _read_out(weights: Weights, space: Subspaces) -> None:
    """Step 4: a constant query reads the P0 direction in the last head dimension, which RoPE does not rotate."""
    for head, strength in SINK_STRENGTHS.items():
        weights["blocks.2.attn.b_Q"][head, -1] = 1.0
        # Attention divides scores by sqrt(d_head); the key multiplies by it.
        weights["blocks.2.attn.W_K"][head, :, -1] = strength * math.sqrt(D_HEAD) * space.p0


def _add_decoy_heads(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 5: what every head outside recognition copies, sink heads included, and where the decoys attend to."""
    for layer, head in [*DECOY_HEADS, *((2, head) for head in SINK_STRENGTHS)]:
        attention = f"blocks.{layer}.attn."
        coordinates = torch.arange(SPARE * head, SPARE * (head + 1)) % VOCABULARY
        weights[f"{attention}W_V"][head, :, :SPARE] = space.token[coordinates].T
        weights[f"{attention}W_O"][head, :SPARE] = DECOY * space.spare

    for (layer, head), kind in DECOY_HEADS.items():
        attention = f"blocks.{layer}.attn."
        queries, keys = weights[f"{attention}W_Q"][head], weights[f"{attention}W_K"][head]
        if kind == "alike":
            # Two tokens share each half of a code, so a token attends to itself and to its twin.
            queries[:] = keys[:] = math.sqrt(ALIKENESS * math.sqrt(D_HEAD)) * space.token[:D_HEAD].T
        elif kind == "recent" and positions == "learned":
            # The codes of positions t and s have the cosine cos(0.01 (t - s)), like a pair that RoPE rotates.
            size = math.sqrt(RECENCY * math.sqrt(D_HEAD) * _embedding_square(positions)) / POSITION_CODE
            queries[:, :2] = keys[:, :2] = size * space.position.T
        elif kind == "recent":
            size = math.sqrt(RECENCY * math.sqrt(D_HEAD))
            weights[f"{attention}b_Q"][head, 1] = weights[f"{attention}b_K"][head, 1] = size
        elif kind == "carrier":
            weights[f"{attention}W_V"][head, :, SPARE] = space.p0
            weights[f"{attention}W_O"][head, SPARE] = space.spare[0]


def _add_decoy_neurons(weights: Weights, space: Subspaces) -> None:
    """Step 5: the red herring reads what the detector reads; a neuron per token in each MLP; the others are zero."""
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
    """Set the weights of a neuron: it computes relu(`reads` · normed stream + `bias`), and writes that times `writes`.

    Args:
        weights: which are changed in place.
        layer: of the neuron.
        index: of the neuron.
        reads: its input weights, [d_model].
        bias: its input bias.
        writes: its output weights, [d_model].
    """
    weights[f"blocks.{layer}.mlp.W_in"][:, index] = reads
    weights[f"blocks.{layer}.mlp.b_in"][index] = bias
    weights[f"blocks.{layer}.mlp.W_out"][index] = writes


def token_neurons(layer: int) -> list[int]:
    """Return the indices of the decoy neurons that each fire at one token, in order of tokens.

    Args:
        layer: of the MLP.
    """
    circuit = {0: (DETECTOR, RED_HERRING), 1: (SINK_NEURON,)}.get(layer, ())
    return [index for index in range(D_MLP) if index not in circuit][:VOCABULARY]


def _codes() -> Float[Tensor, "vocab code"]:
    codes = torch.ones(1, 1, dtype=torch.float64)
    while len(codes) < VOCABULARY:
        codes = torch.cat([torch.cat([codes, codes], dim=1), torch.cat([codes, -codes], dim=1)])
    return codes / math.sqrt(VOCABULARY)


def _embedding_square(positions: Positions) -> float:
    return 1 + RULER**2 + (POSITION_CODE**2 if positions == "learned" else 0)


def _ruler_cosine(pure: float, positions: Positions) -> float:
    return RULER / math.sqrt(_embedding_square(positions) + ECHO**2 * pure)


def purity(ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Return the quantity that recognition measures: the sum of squared shares of tokens up to each position; 1 at P0.

    Args:
        ids: token ids, [batch, pos].

    Returns:
        The purity of the tokens up to each position, [batch, pos].
    """
    counts = torch.nn.functional.one_hot(ids, VOCABULARY).cumsum(1).double()
    lengths = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return counts.square().sum(-1) / lengths.square()
