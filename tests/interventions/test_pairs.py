"""Values for interventions do not depend on how many rows are run at a time."""

from __future__ import annotations

import pytest
import torch

from p0circuit.interventions.pairs import patch_values, shift_prompts, values_at
from p0circuit.models.constructed.build import wired_model
from p0circuit.prompts import random_tokens
from p0circuit.recording import batch_size

NODES = ["embed", "attn.0", "attn.1.2", "mlp.1", "neuron.0.17", "resid_post.2"]


@pytest.mark.parametrize("padded", [False, True])
def test_rows_one_at_a_time_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    model, prompts = wired_model(), random_tokens(64, n=5, length=12)
    prompts = prompts.pad_left([12, 5, 9, 3, 7]) if padded else prompts
    pair = shift_prompts(prompts, 3, 64)
    last = torch.full((5,), 11)

    def everything():
        yield from patch_values(model, pair, NODES).items()
        yield from patch_values(model, pair, NODES, "mean").items()
        yield from values_at(model, prompts, NODES, last).items()

    at_once = list(everything())
    monkeypatch.setattr(batch_size, "BATCH_BYTES", 1)
    assert batch_size.batch_size_for(model, 12, with_logits=False) == 1
    one_by_one = list(everything())
    assert len(one_by_one) == 3 * len(NODES)
    for (node, expected), (same, value) in zip(at_once, one_by_one, strict=True):
        assert node == same and len(value) == 5
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
