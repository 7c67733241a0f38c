"""How many prompts of a recording go through the model at once."""

from __future__ import annotations

from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe, device_of
from p0circuit.models.device_map import placement_of

# One layer's scores, mask and pattern exist side by side while it is computed.
ATTENTION_COPIES = 6
# Logits in float32, and what a loss makes of them.
LOGIT_COPIES = 3
BATCH_BYTES = 512 * 2**20
# A processor is two to four times as fast with tensors that stay in its cache; with too few tokens in a batch, reading
# the weights of a large model anew for each would take the longest.
CPU_BATCH_BYTES = 16 * 2**20
CPU_BATCH_TOKENS = 1024


def batch_size_for(model: HookedModel, length: int, with_logits: bool, row_by_row: bool = False) -> int:
    """How many rows go through the model at once: what fits into half a gigabyte, and less on a CPU; at least one.

    Logits are counted with their copies, unless whoever reads them does so `row_by_row`. With a device map it is half
    of what the map keeps free: every batch brings all weights that wait.
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
    """How many rows of attention, and of logits unless `vocab_size` is 0, fit into `room` bytes; at least one."""
    return max(1, room // row_bytes(heads, length, vocab_size, logit_bytes))


def row_bytes(heads: int, length: int, vocab_size: int, logit_bytes: int) -> int:
    """What one row takes: attention, of which several copies exist while it is computed, and logits."""
    return 4 * ATTENTION_COPIES * heads * length**2 + logit_bytes * length * vocab_size
