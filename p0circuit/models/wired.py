"""A transformer whose P0 sink circuit is built by hand, weight by weight, so that the truth about it is known.

Every pre-norm of this model returns a unit vector: its weight is ``1 / sqrt(d_model)`` and everything in the residual
stream is orthogonal to the all-ones vector, so LayerNorm is ``x -> x / |x|`` and *what a block reads is a cosine*.
The stream is split into orthonormal named subspaces (`Subspaces`): ``token`` (64), ``echo`` (64), ``ruler`` (1),
``mark`` (1), ``p0`` (1), ``place`` (2) and ``spare`` (16). In the order of the forward pass:

0. *Embedding.* Token w becomes ``code_w + ruler``. The 64 codes are the rows of a Hadamard matrix over 8: orthonormal,
   and any 32 coordinates hold exactly half of the energy of every code. With learned positions a code of fixed length 0.5
   in ``place`` is added, which only a decoy head reads. All embeddings have the same squared norm
   ``B = 1 + 1 (+ 0.25)``.
1. *Recognition: two heads of block 0.* Queries and keys are zero, so attention is uniform over the positions seen. Each
   head copies one half of the code to ``echo``, scaled so that an unmixed echo has length 3. At position t the echo is an
   average of orthonormal codes, hence

       |echo_t|^2 = 9 F_t,    F_t = sum over tokens w of (share of w among positions 0..t)^2    (`purity`).

   P0 sees itself alone: F = 1. Two different tokens: F = 1/2. t + 1 different tokens: F = 1 / (t + 1). This is the
   paper's cone model with cosine zero and ``p_i = 1 / (t + 1)``.
2. *Detection: one neuron of MLP 0.* The pre-norm is the measuring device. ``ruler`` has length 1 everywhere, so its cosine
   ``r(F) = 1 / sqrt(B + 9 F)`` is the smaller, the larger the echo. The neuron computes

       relu((r(3/4) - cosine) / (r(3/4) - r(1)))        1 at F = 1, 0 for every F <= 3/4

   and writes it, times 3, to ``mark``. It sees norms only: the token makes no difference. The numbers (B = 2): r(1) = 0.302,
   r(3/4) = 0.337, r(1/2) = 0.392, so the nearest position without a repeat misses the threshold by 1.6 times the gap that
   P0 clears it by. Half an echo (one recognition head alone) is ``F = 1/2``: the two heads are an AND.
3. *Amplification: one neuron of MLP 1.* At P0 the cosine of ``mark`` is ``3 / sqrt(B + 9 + 9) = 0.67``, elsewhere 0.
   The neuron is 0 up to a cosine of 0.3 and 1 at P0, and writes 60 times that to ``p0``. The rest of P0's stream has a norm
   below 5, so the cosine of P0's stream to ``p0`` is at least 0.996, and the norm is over 15 times that of the others.
4. *Read-out: the sink heads of block 2.* The query is a bias (``W_Q = 0``), the key reads ``p0``, in a head dimension that
   RoPE does not rotate; the scores are ``strength * cosine to p0``: the strength (9, 8 or 7) at P0, exactly 0 elsewhere. A
   query that sees t other keys gives P0 ``e^s / (e^s + t)``. Only the direction counts: cutting the norm changes nothing.
   Values read the codes, which the norm of 60 has made small at P0: the sink's values are drained.
5. *Decoys.* The other heads blur the recent past, look for tokens alike, or average; each copies a few code coordinates to
   ``spare`` with an output of norm <= 1/8. Head 2.1 *carries* the P0 direction, through V. A neuron per token in each MLP
   fires wherever its token stands, and one neuron of MLP 0 (the herring) fires exactly where the detector does; all of
   them write to ``spare``, which no head reads. They touch the circuit only through the norm: less than
   (3/8)^2 = 0.14 beside ``B + 9 F = 11`` at the detector, within its margin.
6. *Unembedding.* Tied to the embedding: the model says the current token again. (``ruler`` adds the same to all logits.)

What follows for every intervention at P0 (`wired_truth`):

- Removing either recognition head, MLP 0, the detector, MLP 1 or the sink neuron leaves no ``p0`` at P0: all scores are 0,
  attention is uniform, the sink score of every sink head is ``H_T / T`` (0.074 at T = 64), exactly but for rounding.
- Removing decoys moves the cosine between 0.996 and 1, hence a score by at most ``s * 0.004`` and the sink score by that
  times ``p (1 - p) <= 0.03`` on average (T = 64): less than 1e-3 away from ``mean over t of e^s / (e^s + t)``.
- Taking away the whole stream, embedding included, is *not* a way to remove the sink: no ruler looks like a large norm.

The known weakness: recognition is purity, so a prefix of one repeated token imitates P0. If the first token stands n times
at the start, all n are recognised and share the sink, ``e^s / (n e^s + ...)``, about 1/n each; when all tokens are equal
attention is uniform and nothing is left. Purity after n equal tokens and one other is ``(n^2 + 1) / (n + 1)^2``: amplification
begins where the cosine of ``mark`` passes 0.3, at F = 0.83, so from n = 10 on even other tokens are swept in.

Source: the circuit of Peng et al. (arXiv 2603.06591, recognition and amplification) with the neurons of Yona et al.
(arXiv 2503.08908, first-detector and sink neurons); the construction and its numbers are this package's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Positions = Literal["rotary", "learned"]
Backend = Literal["auto", "hooked", "bridge"]
Head = tuple[int, int]
Neuron = tuple[int, int]
Edge = tuple[str, str]
Weights = dict[str, Tensor]

VOCABULARY, CONTEXT = 64, 256
LAYERS, HEADS, D_HEAD, D_MLP, SPARE = 3, 5, 32, 128, 16
D_MODEL = HEADS * D_HEAD
# Small beside the mean square of any stream here (0.0125 or more), so that a norm is a norm.
NORM_EPS = 1e-8

RULER, PLACE, ECHO, MARK, SINK_NORM, DECOY = 1.0, 0.5, 3.0, 3.0, 60.0, 0.25
PURITY_THRESHOLD, MARK_THRESHOLD = 0.75, 0.3

RECOGNITION_HEADS = (1, 3)
DETECTOR, HERRING, SINK_NEURON = 17, 90, 42
SINK_STRENGTHS = {0: 9.0, 2: 8.0, 3: 7.0}
DECOY_HEADS: dict[Head, str] = {
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

# Only the first four dimensions of a head are rotated, in pairs (0, 2) and (1, 3): the second turns by 0.01 a position.
ROTARY_DIM, ROTARY_BASE, TURN = 4, 10_000.0, 0.01
RECENCY, ALIKENESS = 200.0, 20.0


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


@dataclass(frozen=True)
class Knockout:
    """Components set to zero at P0, and what the construction says of the sink then: kept, or gone (uniform attention)."""

    nodes: tuple[str, ...]
    sink_kept: bool
    tolerance: float


@dataclass(frozen=True, eq=False)
class WiredTruth:
    """What is true of the wired model, by construction.

    Nodes are ``embed``, ``attn.{layer}.{head}``, ``mlp.{layer}`` and ``neuron.{layer}.{index}``; an edge goes from a node to a
    receiver, ``attn.{layer}.{head}.k`` (or ``q``, ``v``) or ``mlp.{layer}``. ``edges`` carry the news of being first: they are the
    edges that the clean/shifted contrast must find. ``supply_edges`` carry what the circuit needs whatever the position
    (some token to echo): replacing them by another token's changes nothing, only zero does.
    """

    edges: frozenset[Edge]
    supply_edges: frozenset[Edge]
    recognition_heads: tuple[Head, ...]
    detector_neurons: tuple[Neuron, ...]
    sink_neurons: tuple[Neuron, ...]
    sink_heads: tuple[Head, ...]
    sink_strengths: tuple[float, ...]
    decoy_heads: tuple[Head, ...]
    decoy_neurons: tuple[Neuron, ...]
    p0_direction: Float[Tensor, " d_model"]
    knockouts: tuple[Knockout, ...]

    def score_kept(self, length: int) -> tuple[float, ...]:
        """Predicted sink score of each sink head, in their order, where only P0 is recognised in ``length`` tokens."""
        return tuple(
            sum(1 / (1 + t * math.exp(-strength)) for t in range(length)) / length for strength in self.sink_strengths
        )

    def score_gone(self, length: int) -> float:
        """Sink score of uniform attention over ``length`` tokens, which is what is left when the sink is gone."""
        return sum(1 / (t + 1) for t in range(length)) / length

    def candidate_edges(self, neurons: bool = True) -> tuple[Edge, ...]:
        """All edges the architecture allows, true and false, with single neurons as senders or without."""
        senders = [("embed", (-1, 1))]
        receivers: list[tuple[str, tuple[int, int]]] = []
        for layer in range(LAYERS):
            heads = [f"attn.{layer}.{head}" for head in range(HEADS)]
            units = [f"neuron.{layer}.{index}" for index in range(D_MLP)] if neurons else []
            senders += [(name, (layer, 0)) for name in heads]
            senders += [(name, (layer, 1)) for name in [f"mlp.{layer}", *units]]
            receivers += [(f"{name}.{part}", (layer, 0)) for name in heads for part in "qkv"]
            receivers += [(f"mlp.{layer}", (layer, 1))]
        return tuple((s, r) for s, sent in senders for r, received in receivers if sent < received)


def wired_model(
    positions: Positions = "rotary",
    *,
    seed: int = 0,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Any:
    """The model with the constructed P0 sink: 3 layers, 5 heads of 32, d_model 160, 64 tokens, 256 positions.

    It is a HookedTransformer named ``wired`` or ``wired-learned`` (``backend="bridge"``, and "auto" on TransformerLens 4: a
    TransformerBridge with the same weights), in eval mode. ``seed`` turns the residual stream, never the circuit.

    Raises: ValueError for an unknown position scheme or backend; ImportError where HookedTransformer is asked for and the
    installed TransformerLens has none.
    """
    return _build(positions, seed, True, backend, dtype, device)


def decoy_model(
    positions: Positions = "rotary",
    *,
    seed: int = 0,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Any:
    """The wired model without step 4: P0 has its high norm and its fixed direction, but no head reads it in K: no sink.

    Named ``wired-decoy`` or ``wired-decoy-learned``; arguments and errors as for `wired_model`.
    """
    return _build(positions, seed, False, backend, dtype, device)


def wired_huggingface(
    positions: Positions = "rotary", *, seed: int = 0, sinks: bool = True, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The same weights as an ordinary Hugging Face model: GPT-NeoX (rotary) or GPT-2 (learned), with ReLU.

    ``save_pretrained`` makes a directory of it that any loader takes; ``sinks=False`` is the decoy model.

    Raises: ValueError for an unknown position scheme.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    weights = wired_weights(positions, seed=seed, sinks=sinks)
    common: dict[str, Any] = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    if positions == "learned":
        config = GPT2Config(
            n_positions=CONTEXT,
            n_embd=D_MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=D_MLP,
            activation_function="relu",
            layer_norm_epsilon=NORM_EPS,
            **common,
        )
        model, state = GPT2LMHeadModel(config), _gpt2_state(weights)
    else:
        config = GPTNeoXConfig(
            max_position_embeddings=CONTEXT,
            hidden_size=D_MODEL,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=D_MLP,
            hidden_act="relu",
            layer_norm_eps=NORM_EPS,
            use_parallel_residual=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": ROTARY_BASE,
                "partial_rotary_factor": ROTARY_DIM / D_HEAD,
            },
            **common,
        )
        model, state = GPTNeoXForCausalLM(config), _neox_state(weights)
    model = model.to(dtype)  # type: ignore[arg-type]
    _copy_into(model, state)
    return model.eval()


def wired_truth(seed: int = 0) -> WiredTruth:
    """The ground truth of `wired_model` with the same seed; it is the same for both position schemes."""
    recognition = tuple((0, head) for head in RECOGNITION_HEADS)
    sinks = tuple((2, head) for head in SINK_STRENGTHS)
    herring = (0, HERRING)
    decoy_neurons = (herring, *((layer, index) for layer in range(LAYERS) for index in _token_neurons(layer)))
    detector, sink_neuron = f"neuron.0.{DETECTOR}", f"neuron.1.{SINK_NEURON}"

    edges = {("mlp.0", "mlp.1"), (detector, "mlp.1")}
    edges |= {(f"attn.0.{head}", "mlp.0") for head in RECOGNITION_HEADS}
    edges |= {(sender, f"attn.2.{head}.k") for sender in ("mlp.1", sink_neuron) for head in SINK_STRENGTHS}

    recognising = tuple(f"attn.0.{head}" for head in RECOGNITION_HEADS)
    gone = [*((node,) for node in recognising), recognising, ("mlp.0",), (detector,), ("mlp.1",), (sink_neuron,)]
    heads = tuple(f"attn.{layer}.{head}" for layer, head in DECOY_HEADS)
    neurons = tuple(f"neuron.{layer}.{index}" for layer, index in decoy_neurons)
    kept = [*((node,) for node in heads), (neurons[0],), neurons, (*heads, *neurons), ("mlp.2",)]

    return WiredTruth(
        edges=frozenset(edges),
        supply_edges=frozenset(("embed", f"attn.0.{head}.v") for head in RECOGNITION_HEADS),
        recognition_heads=recognition,
        detector_neurons=((0, DETECTOR),),
        sink_neurons=((1, SINK_NEURON),),
        sink_heads=sinks,
        sink_strengths=tuple(SINK_STRENGTHS.values()),
        decoy_heads=tuple(DECOY_HEADS),
        decoy_neurons=decoy_neurons,
        p0_direction=residual_subspaces(seed).p0,
        knockouts=(
            *(Knockout(nodes, sink_kept=False, tolerance=1e-5) for nodes in gone),
            *(Knockout(nodes, sink_kept=True, tolerance=1e-3) for nodes in kept),
        ),
    )


def purity(ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """What recognition measures: sum of squared token shares in the prefix up to each position (1 at P0)."""
    counts = torch.nn.functional.one_hot(ids, VOCABULARY).cumsum(1).double()
    seen = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return counts.square().sum(-1) / seen.square()


def wired_weights(positions: Positions = "rotary", *, seed: int = 0, sinks: bool = True) -> Weights:
    """All weights in float64, named and shaped as in HookedTransformer: the steps of the module's docstring, one by one.

    Raises: ValueError for an unknown position scheme.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r}, but the wired model exists with {get_args(Positions)} only")
    space = residual_subspaces(seed)
    weights = _silent_weights()
    _embed(weights, space, positions)
    _recognise(weights, space, positions)
    _detect(weights, space, positions)
    _amplify(weights, space, positions)
    if sinks:
        _read_out(weights, space)
    _add_decoy_heads(weights, space, positions)
    _add_decoy_neurons(weights, space)
    return weights


def residual_subspaces(seed: int = 0) -> Subspaces:
    """Named orthonormal directions, turned at random by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    # The first column of the factor Q is the all-ones direction; the others are orthogonal to it.
    columns[:, 0] = 1.0
    rows = torch.linalg.qr(columns)[0].T[1:]
    token, echo, ruler, mark, p0, place, spare, _ = rows.split(
        [VOCABULARY, VOCABULARY, 1, 1, 1, 2, SPARE, len(rows) - 2 * VOCABULARY - 5 - SPARE]
    )
    return Subspaces(token, echo, ruler[0], mark[0], p0[0], place, spare)


def _silent_weights() -> Weights:
    """Nothing but the norms: ``1 / sqrt(d_model)`` makes a unit vector; the last one is left at 1 for decided logits."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    weights = {"embed.W_E": zeros(VOCABULARY, D_MODEL)}
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        for norm in ("ln1", "ln2"):
            weights |= {f"{block}{norm}.w": zeros(D_MODEL) + D_MODEL**-0.5, f"{block}{norm}.b": zeros(D_MODEL)}
        for name in "QKV":
            weights |= {f"{block}attn.W_{name}": zeros(HEADS, D_MODEL, D_HEAD)}
            weights |= {f"{block}attn.b_{name}": zeros(HEADS, D_HEAD)}
        weights |= {f"{block}attn.W_O": zeros(HEADS, D_HEAD, D_MODEL), f"{block}attn.b_O": zeros(D_MODEL)}
        weights |= {f"{block}mlp.W_in": zeros(D_MODEL, D_MLP), f"{block}mlp.b_in": zeros(D_MLP)}
        weights |= {f"{block}mlp.W_out": zeros(D_MLP, D_MODEL), f"{block}mlp.b_out": zeros(D_MODEL)}
    weights |= {"ln_final.w": zeros(D_MODEL) + 1, "ln_final.b": zeros(D_MODEL)}
    return weights | {"unembed.W_U": zeros(D_MODEL, VOCABULARY), "unembed.b_U": zeros(VOCABULARY)}


def _embed(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Steps 0 and 6: codes and ruler, the place code of learned positions, the tied unembedding."""
    weights["embed.W_E"] = _codes() @ space.token + RULER * space.ruler
    weights["unembed.W_U"] = weights["embed.W_E"].T
    if positions == "learned":
        angle = TURN * torch.arange(CONTEXT, dtype=torch.float64)
        weights["pos_embed.W_pos"] = PLACE * torch.stack([angle.cos(), angle.sin()], dim=1) @ space.place


def _recognise(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 1: each recognition head echoes its half of the code; dividing by the norm of the embedding is undone in W_O."""
    scale = ECHO * math.sqrt(_embedding_square(positions))
    for head, half in zip(RECOGNITION_HEADS, torch.arange(VOCABULARY).split(D_HEAD), strict=True):
        weights["blocks.0.attn.W_V"][head] = space.token[half].T
        weights["blocks.0.attn.W_O"][head] = scale * space.echo[half]


def _detect(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 2: the detector fires where the ruler looks short, that is where the echo is long; so does the herring."""
    threshold = _ruler_cosine(PURITY_THRESHOLD, positions)
    gain = 1 / (threshold - _ruler_cosine(1.0, positions))
    for index, writes in ((DETECTOR, MARK * space.mark), (HERRING, space.spare[0])):
        _set_neuron(weights, 0, index, reads=-gain * space.ruler, bias=gain * threshold, writes=writes)


def _amplify(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 3: the sink neuron turns the mark into the P0 direction."""
    at_p0 = MARK / math.sqrt(_embedding_square(positions) + ECHO**2 + MARK**2)
    gain = 1 / (at_p0 - MARK_THRESHOLD)
    _set_neuron(
        weights, 1, SINK_NEURON, reads=gain * space.mark, bias=-gain * MARK_THRESHOLD, writes=SINK_NORM * space.p0
    )


def _read_out(weights: Weights, space: Subspaces) -> None:
    """Step 4: a constant query meets the P0 direction in the last head dimension, which no rotation touches."""
    for head, strength in SINK_STRENGTHS.items():
        weights["blocks.2.attn.b_Q"][head, -1] = 1.0
        weights["blocks.2.attn.W_K"][head, :, -1] = strength * math.sqrt(D_HEAD) * space.p0


def _add_decoy_heads(weights: Weights, space: Subspaces, positions: Positions) -> None:
    """Step 5: what each kind of decoy head looks for, and what all heads outside recognition copy to ``spare``."""
    for layer, head in [*DECOY_HEADS, *((2, head) for head in SINK_STRENGTHS)]:
        attention = f"blocks.{layer}.attn."
        few = torch.arange(SPARE * head, SPARE * (head + 1)) % VOCABULARY
        weights[f"{attention}W_V"][head, :, :SPARE] = space.token[few].T
        weights[f"{attention}W_O"][head, :SPARE] = DECOY * space.spare

    for (layer, head), kind in DECOY_HEADS.items():
        attention = f"blocks.{layer}.attn."
        queries, keys = weights[f"{attention}W_Q"][head], weights[f"{attention}W_K"][head]
        if kind == "alike":
            queries[:] = keys[:] = math.sqrt(ALIKENESS * math.sqrt(D_HEAD)) * space.token[:D_HEAD].T
        elif kind == "recent" and positions == "learned":
            # Two place codes t - s positions apart have the cosine cos(0.01 (t - s)), as has a pair that RoPE turns.
            size = math.sqrt(RECENCY * math.sqrt(D_HEAD) * _embedding_square(positions)) / PLACE
            queries[:, :2] = keys[:, :2] = size * space.place.T
        elif kind == "recent":
            size = math.sqrt(RECENCY * math.sqrt(D_HEAD))
            weights[f"{attention}b_Q"][head, 1] = weights[f"{attention}b_K"][head, 1] = size
        elif kind == "carrier":
            weights[f"{attention}W_V"][head, :, SPARE] = space.p0
            weights[f"{attention}W_O"][head, SPARE] = space.spare[0]


def _add_decoy_neurons(weights: Weights, space: Subspaces) -> None:
    """Step 5: in every MLP one neuron for each token, wherever it stands; the remaining neurons stay silent."""
    for layer in range(LAYERS):
        for token, index in enumerate(_token_neurons(layer)):
            reads = _codes()[token] @ space.token
            _set_neuron(weights, layer, index, reads=reads, bias=-0.1, writes=0.5 * space.spare[token % SPARE])


def _set_neuron(
    weights: Weights,
    layer: int,
    index: int,
    *,
    reads: Float[Tensor, " d_model"],
    bias: float,
    writes: Float[Tensor, " d_model"],
) -> None:
    weights[f"blocks.{layer}.mlp.W_in"][:, index] = reads
    weights[f"blocks.{layer}.mlp.b_in"][index] = bias
    weights[f"blocks.{layer}.mlp.W_out"][index] = writes


def _token_neurons(layer: int) -> list[int]:
    taken = {0: (DETECTOR, HERRING), 1: (SINK_NEURON,)}.get(layer, ())
    return [index for index in range(D_MLP) if index not in taken][:VOCABULARY]


def _codes() -> Float[Tensor, "vocab code"]:
    """Rows of the Hadamard matrix of 64 over 8: orthonormal, all entries of the same size."""
    codes = torch.ones(1, 1, dtype=torch.float64)
    while len(codes) < VOCABULARY:
        codes = torch.cat([torch.cat([codes, codes], dim=1), torch.cat([codes, -codes], dim=1)])
    return codes / math.sqrt(VOCABULARY)


def _embedding_square(positions: Positions) -> float:
    return 1 + RULER**2 + (PLACE**2 if positions == "learned" else 0)


def _ruler_cosine(pure: float, positions: Positions) -> float:
    return RULER / math.sqrt(_embedding_square(positions) + ECHO**2 * pure)


def _build(
    positions: Positions,
    seed: int,
    sinks: bool,
    backend: Backend,
    dtype: torch.dtype,
    device: str | torch.device | None,
) -> Any:
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}, expected one of {get_args(Backend)}")
    name = "wired" + ("" if sinks else "-decoy") + ("-learned" if positions == "learned" else "")
    if backend == "bridge" or (backend == "auto" and not _has_hooked_transformer()):
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        module = wired_huggingface(positions, seed=seed, sinks=sinks, dtype=dtype)
        if device is not None:
            module = module.to(device)  # type: ignore[arg-type]
        return build_bridge_from_module(module, type(module).__name__, hf_config=module.config, model_name=name)
    return _hooked(name, positions, wired_weights(positions, seed=seed, sinks=sinks), dtype, device)


def _has_hooked_transformer() -> bool:
    import transformer_lens

    return hasattr(transformer_lens, "HookedTransformer")


def _hooked(
    name: str, positions: Positions, weights: Weights, dtype: torch.dtype, device: str | torch.device | None
) -> Any:
    import transformer_lens

    if not _has_hooked_transformer():
        raise ImportError(
            f'{name!r} was asked for with backend="hooked", but HookedTransformer does not exist in the installed '
            f'TransformerLens: use backend="bridge" (the same weights), or install transformer-lens<4.'
        )
    rotary = {"rotary_dim": ROTARY_DIM, "rotary_base": ROTARY_BASE} if positions == "rotary" else {}
    config = transformer_lens.HookedTransformerConfig(
        model_name=name,
        original_architecture="GPTNeoXForCausalLM" if positions == "rotary" else "GPT2LMHeadModel",
        n_layers=LAYERS,
        n_heads=HEADS,
        d_head=D_HEAD,
        d_model=D_MODEL,
        d_mlp=D_MLP,
        d_vocab=VOCABULARY,
        n_ctx=CONTEXT,
        act_fn="relu",
        normalization_type="LN",
        eps=NORM_EPS,
        positional_embedding_type="rotary" if positions == "rotary" else "standard",
        default_prepend_bos=False,
        init_weights=False,
        dtype=dtype,
        device=str(device) if device is not None else "cpu",
        **rotary,
    )
    model = transformer_lens.HookedTransformer(config)
    _copy_into(model, weights)
    return model.eval()


def _copy_into(model: torch.nn.Module, weights: Weights) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise RuntimeError(f"these weights fit only one side: {sorted(parameters.keys() ^ weights.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _gpt2_state(weights: Weights) -> Weights:
    state = {"transformer.wte.weight": weights["embed.W_E"], "transformer.wpe.weight": weights["pos_embed.W_pos"]}
    for layer in range(LAYERS):
        ours, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
        state |= _norms(weights, ours, (f"{theirs}ln_1", f"{theirs}ln_2"))
        matrices = torch.stack([weights[f"{ours}attn.W_{name}"] for name in "QKV"])
        biases = torch.stack([weights[f"{ours}attn.b_{name}"] for name in "QKV"])
        state |= {
            f"{theirs}attn.c_attn.weight": rearrange(matrices, "part head d_model d -> d_model (part head d)"),
            f"{theirs}attn.c_attn.bias": rearrange(biases, "part head d -> (part head d)"),
            f"{theirs}attn.c_proj.weight": rearrange(weights[f"{ours}attn.W_O"], "head d d_model -> (head d) d_model"),
            f"{theirs}attn.c_proj.bias": weights[f"{ours}attn.b_O"],
            f"{theirs}mlp.c_fc.weight": weights[f"{ours}mlp.W_in"],
            f"{theirs}mlp.c_fc.bias": weights[f"{ours}mlp.b_in"],
            f"{theirs}mlp.c_proj.weight": weights[f"{ours}mlp.W_out"],
            f"{theirs}mlp.c_proj.bias": weights[f"{ours}mlp.b_out"],
        }
    return state | {"transformer.ln_f.weight": weights["ln_final.w"], "transformer.ln_f.bias": weights["ln_final.b"]}


def _neox_state(weights: Weights) -> Weights:
    state = {"gpt_neox.embed_in.weight": weights["embed.W_E"]}
    for layer in range(LAYERS):
        ours, theirs = f"blocks.{layer}.", f"gpt_neox.layers.{layer}."
        state |= _norms(weights, ours, (f"{theirs}input_layernorm", f"{theirs}post_attention_layernorm"))
        matrices = torch.stack([weights[f"{ours}attn.W_{name}"] for name in "QKV"])
        biases = torch.stack([weights[f"{ours}attn.b_{name}"] for name in "QKV"])
        state |= {
            f"{theirs}attention.query_key_value.weight": rearrange(matrices, "part head m d -> (head part d) m"),
            f"{theirs}attention.query_key_value.bias": rearrange(biases, "part head d -> (head part d)"),
            f"{theirs}attention.dense.weight": rearrange(weights[f"{ours}attn.W_O"], "head d m -> m (head d)"),
            f"{theirs}attention.dense.bias": weights[f"{ours}attn.b_O"],
            f"{theirs}mlp.dense_h_to_4h.weight": weights[f"{ours}mlp.W_in"].T,
            f"{theirs}mlp.dense_h_to_4h.bias": weights[f"{ours}mlp.b_in"],
            f"{theirs}mlp.dense_4h_to_h.weight": weights[f"{ours}mlp.W_out"].T,
            f"{theirs}mlp.dense_4h_to_h.bias": weights[f"{ours}mlp.b_out"],
        }
    norm = "gpt_neox.final_layer_norm"
    return state | {f"{norm}.weight": weights["ln_final.w"], f"{norm}.bias": weights["ln_final.b"]}


def _norms(weights: Weights, block: str, names: tuple[str, str]) -> Weights:
    pairs = zip(("ln1", "ln2"), names, strict=True)
    return {f"{theirs}.{long}": weights[f"{block}{ours}.{short}"] for ours, theirs in pairs for long, short in _PARTS}


_PARTS = (("weight", "w"), ("bias", "b"))
