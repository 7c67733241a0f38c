"""Every token of the vocabulary at P0: its exact stream, norms and keys, from rows of one token.

P0 attends to itself alone, so what it computes depends on its token only. A full-length prompt per token would compute
the same numbers again at T times the cost: the sweep runs the vocabulary as a batch of one-token rows, in chunks small
enough to stay in the processor's cache. Where only the stream is asked for and the model's blocks allow it, a block is
reduced to what one row needs (`single_token.py`).

`sink_scores_by_token` then asks what each token's key would draw: the keys are put, one by one, before the queries of
fixed continuations (closed form, see `closed_form.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.closed_form import key_hook, query_side
from p0circuit.interventions.nodes import InterventionError
from p0circuit.interventions.single_token import p0_blocks
from p0circuit.log import progress_bar
from p0circuit.models import describe, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet

CHUNK = 1024
"""Tokens in a batch: large enough for full matrix products, small enough for a few MB per activation."""


@dataclass(frozen=True)
class VocabularySweep:
    """What each token computes when it stands at P0.

    Attributes:
        tokens: the token ids, the first axis of all that follows.
        norms: of the residual stream before each block and at the end.
        residual: the stream itself at the layers asked for.
        keys: P0's keys, as they enter the scores, at the layers asked for.
    """

    tokens: Int[Tensor, " token"]
    norms: Float[Tensor, "token layer_and_end"]
    residual: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)
    keys: dict[int, Float[Tensor, "token kv_head d_head"]] = field(default_factory=dict)


@torch.no_grad()
def vocabulary_sweep(
    model: HookedModel,
    tokens: Int[Tensor, " token"] | None = None,
    residual_layers: Sequence[int] = (),
    key_layers: Sequence[int] = (),
    chunk: int = CHUNK,
) -> VocabularySweep:
    """The exact P0 stream of every token of the vocabulary (or of `tokens`).

    `residual_layers` counts streams: l is the one before block l, the number of layers the one at the end. Keeping
    vectors costs memory: 4 * tokens * d_model bytes for each stream, 4 * tokens * n_kv_heads * d_head for each layer's
    keys, in float32; norms alone cost next to nothing.

    Raises:
        InterventionError: a layer does not exist.
        ModelError: a token is outside the vocabulary.
    """
    info = describe(model)
    for layer in (*residual_layers, *(layer + 1 for layer in key_layers)):
        if not 0 <= layer <= info.n_layers:
            raise InterventionError(
                f"{info.name} has {info.n_layers} layers; streams 0 to {info.n_layers}, keys one fewer"
            )
    if tokens is None:
        tokens = torch.arange(info.vocab_size)
    if not key_layers:
        fast = _sweep_streams(model, tokens, residual_layers, chunk)
        if fast is not None:
            return fast
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(info.n_layers)]
    streams.append(f"blocks.{info.n_layers - 1}.hook_resid_post")
    dtype = next(model.parameters()).dtype
    norms = torch.empty(len(tokens), info.n_layers + 1, dtype=dtype)
    residual = {layer: torch.empty(len(tokens), info.d_model, dtype=dtype) for layer in residual_layers}
    keys = {layer: torch.empty(len(tokens), info.n_kv_heads, info.d_head, dtype=dtype) for layer in key_layers}
    for start in progress_bar(range(0, len(tokens), chunk), "sweeping the vocabulary"):
        part = slice(start, start + chunk)

        def read_stream(stream: Tensor, hook: object, layer: int, part: slice = part) -> None:
            norms[part, layer] = stream[:, 0].norm(dim=-1).cpu()
            if layer in residual:
                residual[layer][part] = stream[:, 0].cpu()

        def read_key(key: Tensor, hook: object, layer: int, part: slice = part) -> None:
            keys[layer][part] = key[:, 0].cpu()

        hooks: list[Hook] = [(name, functools.partial(read_stream, layer=layer)) for layer, name in enumerate(streams)]
        hooks += [(key_hook(model, layer), functools.partial(read_key, layer=layer)) for layer in key_layers]
        forward(model, tokens[part, None], hooks=hooks, stop_at_layer=info.n_layers)
    return VocabularySweep(tokens, norms, residual, keys)


def _sweep_streams(
    model: HookedModel, tokens: Int[Tensor, " token"], residual_layers: Sequence[int], chunk: int
) -> VocabularySweep | None:
    """The sweep without keys, in bare tensor operations; None for models whose blocks are of another form."""
    info = describe(model)
    blocks = p0_blocks(model, forward(model, tokens[:1, None], stop_at_layer=0)[:, 0])
    if blocks is None:
        return None
    dtype = next(model.parameters()).dtype
    norms = torch.empty(len(tokens), info.n_layers + 1, dtype=dtype)
    residual = {layer: torch.empty(len(tokens), info.d_model, dtype=dtype) for layer in residual_layers}
    for start in progress_bar(range(0, len(tokens), chunk), "sweeping the vocabulary"):
        part = slice(start, start + chunk)
        stream = forward(model, tokens[part, None], stop_at_layer=0)[:, 0]
        for layer in range(info.n_layers + 1):
            norms[part, layer] = stream.norm(dim=-1).cpu()
            if layer in residual:
                residual[layer][part] = stream.cpu()
            if layer < info.n_layers:
                stream = blocks[layer](stream)
    return VocabularySweep(tokens, norms, residual)


@torch.no_grad()
def sink_scores_by_token(
    model: HookedModel, prompts: PromptSet, tokens: Int[Tensor, " token"] | None = None, chunk: int = CHUNK
) -> Float[Tensor, "token layer head"]:
    """The sink score that each token's key draws from the queries of the prompts, mean over prompts.

    The queries are those of the prompts as they are, with their own first tokens: only the key of P0 changes, in every
    layer. That isolates the key side; what a new first token does to the queries is left out.

    Raises:
        InterventionError: the model's attention is not of the closed form.
    """
    info = describe(model)
    if tokens is None:
        tokens = torch.arange(info.vocab_size)
    side = query_side(model, prompts)
    scores = torch.empty(len(tokens), info.n_layers, info.n_heads)
    # Scored keys are [token, prompt, head, query]; this many tokens keep that at some tens of megabytes.
    at_once = max(1, 2**23 // (prompts.n * info.n_heads * prompts.length))
    for start in progress_bar(range(0, len(tokens), chunk), "sweeping the vocabulary"):
        part = slice(start, start + chunk)
        sweep = vocabulary_sweep(model, tokens[part], key_layers=range(info.n_layers), chunk=chunk)
        for layer, key in sweep.keys.items():
            for first, keys in zip(range(start, start + chunk, at_once), key.split(at_once), strict=False):
                spread = keys[:, None].expand(-1, prompts.n, -1, -1)
                scores[first : first + len(keys), layer] = side[layer].sink_scores(spread).mean(1).to(scores)
    return scores
