"""P0's own stream in bare tensor operations: what is left of a block when a sequence has one token.

Attention to oneself has weight 1, so queries, keys, scores and rotation drop out: what attention adds is `V` and `O`
of its own norm, one matrix product each (under grouped-query attention the heads of a group share a value, so their
output matrices add up to one). With the MLP's products, and norms and activations in a single pass each, a row costs
little more than its matrix products. For the HookedTransformers whose blocks are of this form; `p0_blocks` compares
with the model itself on a few tokens and declines where it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe, resume
from p0circuit.models.passes import count_blocks

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": lambda hidden: functional.silu(hidden, inplace=True),
    "gelu": functional.gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda hidden: functional.gelu(hidden, approximate="tanh")
    ),
}
_NORMS = ("LN", "RMS")
_PROBED = 4


@dataclass(frozen=True)
class P0Block:
    """One block as a function of P0's residual stream alone."""

    norm_attention: Callable[[Tensor], Tensor]
    norm_mlp: Callable[[Tensor], Tensor]
    value: tuple[Float[Tensor, "d_model inner"], Float[Tensor, " inner"]]
    output: tuple[Float[Tensor, "inner d_model"], Float[Tensor, " d_model"]]
    hidden: tuple[Float[Tensor, "d_model d_mlp"], Float[Tensor, " d_mlp"]]
    gate: Float[Tensor, "d_model d_mlp"] | None
    back: tuple[Float[Tensor, "d_mlp d_model"], Float[Tensor, " d_model"]]
    activation: Callable[[Tensor], Tensor]
    parallel: bool

    def __call__(self, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The stream after the block."""
        count_blocks(len(stream), 1)
        value = _affine(self.norm_attention(stream), self.value)
        after_attention = _affine(value, self.output).add_(stream)
        read = self.norm_mlp(stream if self.parallel else after_attention)
        if self.gate is None:
            hidden = self.activation(_affine(read, self.hidden))
        else:
            # TransformerLens adds the bias after the product with the gate.
            weight, bias = self.hidden
            hidden = self.activation(read @ self.gate).mul_(read @ weight).add_(bias)
        return _affine(hidden, self.back).add_(after_attention)


@torch.no_grad()
def p0_blocks(model: HookedModel, probe: Float[Tensor, "row d_model"]) -> list[P0Block] | None:
    """The model's blocks in this form, or None where they are not of it.

    `probe` are rows of the stream before block 0; on a few of them the result is compared with the model's own.
    """
    info, cfg = describe(model), model.cfg
    if info.backend != "hooked" or info.experts or cfg.normalization_type not in _NORMS:
        return None
    if cfg.act_fn not in _ACTIVATIONS or cfg.attn_only:
        return None
    blocks = [_block(block, cfg, info.n_kv_heads) for block in model.blocks]
    rows = probe[:_PROBED]
    expected = resume(model, rows[:, None], 0, stop_at_layer=info.n_layers)[:, 0]
    for block in blocks:
        rows = block(rows)
    tolerance = 1e-10 if rows.dtype == torch.float64 else 1e-4
    return (
        blocks if torch.allclose(rows, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())) else None
    )


def _affine(rows: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return torch.addmm(weights[1], rows, weights[0])


def _norm(norm: Any, cfg: Any) -> Callable[[Tensor], Tensor]:  # noqa: ANN401, modules have no typed parameters
    shape = (cfg.d_model,)
    if cfg.normalization_type == "LN":
        return lambda stream: functional.layer_norm(stream, shape, norm.w, norm.b, cfg.eps)
    return lambda stream: functional.rms_norm(stream, shape, norm.w, cfg.eps)


def _block(block: Any, cfg: Any, n_kv_heads: int) -> P0Block:  # noqa: ANN401, as for `_norm`
    attention, mlp = block.attn, block.mlp
    # Grouped-query attention repeats its values for the heads of a group; the parameters hold them once.
    grouped = hasattr(attention, "_W_V")
    value, bias = (attention._W_V, attention._b_V) if grouped else (attention.W_V, attention.b_V)
    heads, size, width = attention.W_O.shape
    output = attention.W_O.view(len(value), heads // len(value), size, width).sum(1) if grouped else attention.W_O
    return P0Block(
        _norm(block.ln1, cfg),
        _norm(block.ln2, cfg),
        (value.transpose(0, 1).reshape(width, -1).contiguous(), bias.reshape(-1)),
        (output.reshape(-1, width).contiguous(), attention.b_O),
        (mlp.W_in, mlp.b_in),
        mlp.W_gate if cfg.gated_mlp else None,
        (mlp.W_out, mlp.b_out),
        _ACTIVATIONS[cfg.act_fn],
        cfg.parallel_attn_mlp,
    )
