"""Batch size: the number of prompts that run through the model at once."""

from __future__ import annotations

from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe, device_of
from p0circuit.models.device_map import placement_of

# Tensors of attention size that exist at once while a layer is computed: scores, mask, pattern and their copies.
ATTENTION_COPIES = 6
# Tensors of logit size in float32 that exist at once while a loss is computed.
LOGIT_COPIES = 3
BATCH_BYTES = 512 * 2**20
# A CPU is two to four times as fast with tensors that stay in its cache. But a batch needs enough tokens: otherwise
# reading the weights of a large model, once per batch, takes most of the time.
CPU_BATCH_BYTES = 16 * 2**20
CPU_BATCH_TOKENS = 1024


def batch_size_for(model: HookedModel, length: int, with_logits: bool, row_by_row: bool = False) -> int:
    """Choose the batch size: the number of prompts that fit into half a gigabyte, or less on a CPU; at least one.

    With a device map, the batch takes half of the memory that the map keeps free for activations, because offloaded
    weights are copied once per batch.

    Args:
        model: a hooked model.
        length: tokens per prompt.
        with_logits: whether the logits are computed.
        row_by_row: whether the logits are reduced one prompt at a time, so that no copies of them exist.
    """
    info, placement = describe(model), placement_of(model)
    logit_bytes = model.cfg.dtype.itemsize if row_by_row else 4 * LOGIT_COPIES
    row = info.n_heads, length, info.vocab_size if with_logits else 0, logit_bytes
    if placement is not None:
        return rows_that_fit(placement.activation_bytes // 2, *row)
    most = rows_that_fit(BATCH_BYTES, *row)
    if device_of(model).type == "cpu":
        most = min(most, max(rows_that_fit(CPU_BATCH_BYTES, *row), -(-CPU_BATCH_TOKENS // length)))
    return most


def rows_that_fit(room: int, heads: int, length: int, vocab_size: int, logit_bytes: int) -> int:
    """Return the number of prompts whose attention and logits fit into memory; at least one.

    Args:
        room: available memory in bytes.
        heads: number of heads in a layer.
        length: tokens per prompt.
        vocab_size: number of tokens of the vocabulary; 0 if there are no logits.
        logit_bytes: bytes per logit, including copies.
    """
    return max(1, room // row_bytes(heads, length, vocab_size, logit_bytes))


def row_bytes(heads: int, length: int, vocab_size: int, logit_bytes: int) -> int:
    """Return the memory in bytes of one prompt: the attention of one layer with its copies, and the logits.

    Args:
        heads: number of heads in a layer.
        length: tokens per prompt.
        vocab_size: number of tokens of the vocabulary; 0 if there are no logits.
        logit_bytes: bytes per logit, including copies.
    """
    return 4 * ATTENTION_COPIES * heads * length**2 + logit_bytes * length * vocab_size
