"""What a large model takes: counted against a model that is loaded, and as the documentation tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p0circuit.io import repository
from p0circuit.models import load_model, model_placement
from p0circuit.models.device_map import Placement, placement_of, plan_placement
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.resources import LOADING_BATCHES, Rates, estimated_seconds, measure_rates, n_batches, resource_estimate

G = 2**30
RATES = Rates(read=2e9, copy=12e9, compute=100e12)
"""Those of the documentation."""
HARDWARE = {
    "a GPU of 80 GB": ("auto", {"cuda:0": 78 * G, "cpu": 58 * G, "disk": 500 * G}),
    "a GPU of 24 GB, 64 GB of memory": ("auto", {"cuda:0": 23 * G, "cpu": 58 * G, "disk": 500 * G}),
    "a GPU of 16 GB, 16 GB of memory, a disk": ("disk", {"cuda:0": 15 * G, "cpu": 12 * G, "disk": 500 * G}),
}


@pytest.fixture(scope="module")
def thirty_billion(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Placement]:
    """Plans for a mixture of the size of the paper's, whose files hold each expert by itself, on some hardware."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        tie_word_embeddings=False,
    )
    # Names are all that a plan reads of the files: those of the weights that are stored as they are.
    folder = tmp_path_factory.mktemp("files")
    blocks = [f"model.layers.{layer}." for layer in range(48)]
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm"]
    parts += ["self_attn.k_norm", "mlp.gate", "input_layernorm", "post_attention_layernorm"]
    names = [f"{block}{part}.weight" for block in blocks for part in parts]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")

    def planned(hardware: str) -> Placement:
        device_map, free = HARDWARE[hardware]
        return plan_placement(config, torch.bfloat16, device_map, torch.device("cuda", 0), free, "30B-A3B", folder)

    return planned


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hardware", HARDWARE)
def test_the_readme_tells_what_the_command_would(thirty_billion: Callable[[str], Placement], hardware: str) -> None:
    planned = thirty_billion(hardware)
    assert planned.parameters == 30_532_122_624 and planned.active_parameters == pytest.approx(3.35e9, rel=0.01)
    loading, one = estimated_seconds(planned, RATES, 1024, 64)
    where = {"cpu": "in CPU memory", "disk": "on disk"}
    waits = ", ".join(f"{size / G:.0f} GB {where[place]}" for place, size in planned.offloaded_bytes.items()) or "none"
    row = (
        f"| {hardware} | `{HARDWARE[hardware][0]}` | {planned.required_bytes['cuda:0'] / G:.0f} GB | {waits} | "
        f"{loading:.0f} s | {one:.0f} s |"
    )
    readme = (repository() / "docs" / "guides" / "large-models.md").read_text()
    assert row in readme, row
    if planned.rewritten_bytes:
        assert f"{planned.rewritten_bytes / G:.0f} GB are written" in readme


def test_memory_and_time_in_words(family_folder: Callable[[str], Path]) -> None:
    planned = model_placement(family_folder("qwen3-moe"), "disk", device="cpu")
    mega = 2**20
    rates = Rates(planned.offloaded_bytes["disk"], 1e12, 2 * planned.active_parameters * 4096.0)
    text = resource_estimate(planned, rates, 64, 64, passes=3, checkpoints=4)
    assert "and 51.0 MB for activations" in text
    total, layer = sum(planned.weight_bytes.values()), planned.block_bytes
    assert text.startswith(
        f"qwen3-moe: {total / mega:.1f} MB of weights in float32, {3 * layer / mega:.1f} MB of them offloaded to disk. "
    )
    rewritten = f"{planned.rewritten_bytes / mega:.1f}"
    assert f"in CPU memory, {rewritten} MB on disk, with {layer / mega:.1f} MB for the largest block" in text
    # One second to read what waits, one to multiply; a file of experts is read and written anew.
    loading = (total + planned.rewritten_bytes) / (3 * layer) + LOADING_BATCHES
    assert estimated_seconds(planned, rates, 64, 64) == pytest.approx((loading, 2))
    whole = round(4 * (loading + 6))
    assert text.endswith(
        f"About {whole} s: {round(loading)} s to load it and 3 passes of 2 s over 64 prompts of 64 tokens, "
        "for each of 4 checkpoints."
    )
    assert "for each pass over 64 prompts" in resource_estimate(planned, rates, 64, 64)


def test_in_one_place_the_weights_are_there_twice_while_a_model_is_loaded(
    family_folder: Callable[[str], Path],
) -> None:
    planned = model_placement(family_folder("llama"), None, device="cpu", dtype=torch.float64)
    assert 8 * planned.parameters <= planned.weight_bytes["cpu"] < 8.1 * planned.parameters
    assert not planned.offloaded_bytes
    assert planned.required_bytes == {"cpu": 2 * planned.weight_bytes["cpu"] + planned.activation_bytes}


def test_batches_are_those_that_are_recorded(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("qwen3-moe")
    model = load_model(folder, device="cpu", device_map="disk", offload_folder=tmp_path)
    planned = model_placement(folder, "disk", device="cpu")
    placed = placement_of(model)
    assert placed is not None
    # Free memory is not the same a moment later.
    planned = replace(planned, activation_bytes=placed.activation_bytes)
    for length in (64, 2048):
        size = batch_size_for(model, length, with_logits=True, row_by_row=True)
        for samples in (1, size, size + 1):
            assert n_batches(planned, samples, length) == -(-samples // size)


def test_rates_are_measured(family_folder: Callable[[str], Path]) -> None:
    rates = measure_rates(model_placement(family_folder("llama"), "disk", device="cpu"))
    assert rates.read > 1e4 and rates.copy > 1e6 and rates.compute > 1e6
