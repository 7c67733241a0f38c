"""Experts of a mixture: routing and contributions against a literal router, removal against weights of zero."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from p0circuit.interventions.experts import experts_at, mixture_layers, remove_experts, routing
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import forward, load_model
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording.quantities import RESIDUAL_NORMS, SINK_SCORE
from p0circuit.recording.record import record
from tests.families import write

CASES = [("mixtral", "hooked"), ("mixtral", "bridge"), ("qwen3-moe", "bridge"), ("olmoe", "bridge")]
Model = Callable[[str, str], Any]


def down(model: Any, layer: int, number: int) -> torch.Tensor:
    """The weights by which an expert writes."""
    mlp = model.blocks[layer].mlp
    if hasattr(mlp, "original_component"):
        return mlp.original_component.experts.down_proj.data[number]
    return mlp.experts[number].W_out.weight.data


@contextlib.contextmanager
def silent(model: Any, experts: list[tuple[int, int]]) -> Iterator[None]:
    """The model with the output weights of some experts set to zero."""
    kept = {expert: down(model, *expert).clone() for expert in experts}
    for expert in experts:
        down(model, *expert).zero_()
    try:
        yield
    finally:
        for expert, weight in kept.items():
            down(model, *expert).copy_(weight)


@torch.no_grad()
def outputs(model: Any, prompts: PromptSet, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block's MLP reads and gives, caught at the module itself."""
    seen: list[Any] = []
    handle = model.blocks[layer].mlp.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    forward(model, prompts.ids, prompts.attention_mask)
    handle.remove()
    read, out = seen[0]
    return read, out[0] if isinstance(out, tuple) else out


def router(model: Any, layer: int) -> torch.Tensor:
    mlp = model.blocks[layer].mlp
    return mlp.original_component.gate.weight if hasattr(mlp, "original_component") else mlp.W_gate.weight


@pytest.mark.parametrize("case", CASES)
def test_an_expert_taken_away_writes_nothing(family_model: Model, case: tuple[str, str]) -> None:
    model, prompts = family_model(*case), random_tokens(96, n=6, length=9)
    for experts in ([(1, 2)], [(0, 0), (1, 3), (1, 1), (2, 0)]):
        with torch.no_grad():
            with remove_experts(model, prompts, experts):
                found = forward(model, prompts.ids)
            with silent(model, experts):
                expected = forward(model, prompts.ids)
            whole = forward(model, prompts.ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert float((found - whole).abs().max()) > 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_at_one_position_it_is_gone_there_alone(family_model: Model, case: tuple[str, str], padded: bool) -> None:
    model, prompts = family_model(*case), random_tokens(96, n=5, length=8)
    prompts = prompts.pad_left([8, 5, 3, 6, 4]) if padded else prompts
    rows, layer, number = torch.arange(prompts.n), 1, 2
    _, whole = outputs(model, prompts, layer)
    seen: list[torch.Tensor] = []
    look = (f"blocks.{layer}.hook_mlp_out", lambda activation, hook: seen.append(activation.clone()))
    with torch.no_grad(), remove_experts(model, prompts, [(layer, number)], offset=1):
        forward(model, prompts.ids, prompts.attention_mask, hooks=[look])
    with silent(model, [(layer, number)]):
        _, without = outputs(model, prompts, layer)
    expected = whole.clone()
    expected[rows, prompts.p0 + 1] = without[rows, prompts.p0 + 1]
    real = prompts.attention_mask
    torch.testing.assert_close(seen[0][real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.equal(seen[0][real], whole[real])


def test_it_goes_through_record_in_batches_of_any_size(family_model: Model) -> None:
    model, prompts = family_model("qwen3-moe", "bridge"), random_tokens(96, n=7, length=8)
    change = remove_experts(model, prompts, [(0, 1), (1, 0)])
    found = [
        record(model, prompts, [SINK_SCORE, RESIDUAL_NORMS], batch_size=size, interventions=[change]) for size in (7, 3)
    ]
    for name in found[0].values:
        torch.testing.assert_close(found[0].values[name], found[1].values[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_routing_is_what_the_router_says(family_model: Model, case: tuple[str, str]) -> None:
    model, prompts = family_model(*case), random_tokens(96, n=4, length=7)
    found = routing(model, prompts)
    assert found.shape == (4, 7, 3, 4) and mixture_layers(model) == [0, 1, 2]
    for layer in range(3):
        read, _ = outputs(model, prompts, layer)
        logits = (read @ router(model, layer).T).detach()
        for row in range(4):
            for position in range(7):
                best = sorted(range(4), key=lambda e, at=logits[row, position]: -float(at[e]))[:2]
                assert found[row, position, layer].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("case", CASES)
def test_what_experts_write_anywhere(family_model: Model, case: tuple[str, str]) -> None:
    model, prompts = family_model(*case), random_tokens(96, n=4, length=7)
    seen: dict[tuple[int, int], Any] = {}
    experts_at(model, prompts, lambda layer, offset, here: seen.update({(layer, offset): here}), (0, 5))
    assert set(seen) == {(layer, offset) for layer in range(3) for offset in (0, 5)}
    for (layer, offset), here in seen.items():
        _, whole = outputs(model, prompts, layer)
        assert here.complete
        torch.testing.assert_close(here.output, whole[:, offset], rtol=1e-4, atol=1e-5)
        for number in range(4):
            with silent(model, [(layer, number)]):
                _, without = outputs(model, prompts, layer)
            difference = (whole - without)[:, offset]
            torch.testing.assert_close(here.written[:, number], difference, rtol=1e-4, atol=1e-5)


def test_dense_blocks_and_dense_models_have_no_experts(family_model: Model, tmp_path: Path) -> None:
    assert mixture_layers(family_model("llama", "bridge")) == []
    model = load_model(write("qwen3-moe", tmp_path / "mixed", mlp_only_layers=[1]))
    assert mixture_layers(model) == [0, 2]
    assert routing(model, random_tokens(96, n=2, length=5)).shape == (2, 5, 2, 4)
    for expert in ((1, 0), (0, 4), (3, 0)):
        with pytest.raises(InterventionError, match=r"mixed has experts 0 to 3 in the layers \[0, 2\]"):
            remove_experts(model, random_tokens(96, n=2, length=5), [expert])
