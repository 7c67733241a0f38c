"""The formation curve of SmolLM2-135M, recomputed with hooks on a plain `transformers` model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from p0circuit.experiments.depth.curves import measure_curves
from p0circuit.interventions.pairs import shifted_pair
from p0circuit.models.source import resolve
from p0circuit.prompts import natural_text
from p0circuit.sink import CONTROL
from tests.experiments.test_real_models import own_cache

BLOCKS = (0, 2, 10, 11)


@torch.no_grad()
def left_by_hooks(folder: Path, clean: torch.Tensor, shifted: torch.Tensor, shift: int) -> dict[int, torch.Tensor]:
    """Mean excess of every head with P0's stream after a block taken from the shifted rows, by block; -1: clean."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    donor = model(shifted, output_hidden_states=True).hidden_states

    def excess() -> torch.Tensor:
        attentions = model(clean, output_attentions=True).attentions
        scores = [layer[:, :, 0:, 0].mean(-1) - layer[:, :, CONTROL:, CONTROL].mean(-1) for layer in attentions]
        return torch.stack(scores, 1)

    results = {-1: excess()}
    for block in BLOCKS:

        def replace(module: Any, inputs: Any, output: Any, block: int = block) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, 0] = donor[block + 1][:, shift]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.model.layers[block].register_forward_hook(replace)
        results[block] = excess()
        handle.remove()
    return results


@pytest.mark.real
def test_what_is_left_after_each_block_is_that_of_plain_hooks(smollm2: Any) -> None:
    prompts = natural_text(smollm2, "docs", n=4, length=64)
    pair = shifted_pair(smollm2, prompts, 8)
    curves = measure_curves(smollm2, pair, ("stream",))
    with own_cache():
        folder = resolve("smollm2-135m", None).folder
    results = left_by_hooks(folder, pair.clean.ids, pair.shifted.ids, 8)
    heads = [(layer, head) for layer, head in (results[-1].mean(0) > 0.3).nonzero().tolist()]
    for block in BLOCKS:
        chosen = tuple(zip(*[head for head in heads if head[0] > block], strict=True))
        ours, theirs = (
            float(changed[:, chosen[0], chosen[1]].mean() / clean[:, chosen[0], chosen[1]].mean())
            for changed, clean in ((curves.stream[block], curves.clean), (results[block], results[-1]))
        )
        assert ours == pytest.approx(theirs, abs=1e-3), block
