"""Int8 against torch's own quantised tensors, the modules of transformers, and the other backend."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p0circuit.interventions.int8 import (
    INPUTS,
    Site,
    input_sites,
    largest_in_row,
    on_inputs,
    quantised,
    rounded,
    rounded_weights,
    with_weights,
)
from p0circuit.models import describe, forward, load_model
from tests.families import CASES, LAYERS, VOCAB

BOTH = ["gpt2", "neox", "llama-grouped", "qwen3", "olmo2", "opt", "mixtral"]
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))


def with_outliers(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0] = 30
    return x


@torch.no_grad()
def seen(model: Any, ids: Tensor = IDS) -> dict[Site, Tensor]:
    found = {}
    with on_inputs(model, lambda site, x: found.__setitem__(site, x.clone())):
        forward(model, ids)
    return found


def turned(x: Tensor) -> Tensor:
    """Another input of the same size: some norms would undo a smaller one."""
    return x.flatten(2).roll(1, 2).view_as(x)


def of_torch(values: Tensor, largest: float) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(values, largest / 127, 0, -128, 127)


def test_a_grid_for_all_or_for_each_row_or_position_is_that_of_torch() -> None:
    x, p0 = with_outliers(3, 5, 7), torch.zeros(3, dtype=torch.long)
    x[1] /= 3
    whole, by_row = float(x.abs().max()), largest_in_row(x, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(quantised(x, whole, p0), of_torch(x, whole), atol=1e-6, rtol=0)
    per_row, per_token = quantised(x, by_row, p0), quantised(x, whole, p0, per_token=True)
    for row in range(3):
        torch.testing.assert_close(per_row[row], of_torch(x[row], float(x[row].abs().max())), atol=1e-6, rtol=0)
        for position in range(5):
            own = of_torch(x[row, position], float(x[row, position].abs().max()))
            torch.testing.assert_close(per_token[row, position], own, atol=1e-6, rtol=0)


def test_one_position_apart() -> None:
    x, p0 = with_outliers(2, 6, 2, 4), torch.tensor([0, 2])
    x[1, 2] = 50
    rest = torch.arange(6) != p0[:, None]
    largest = float(x[rest].abs().max())
    for per_token in (False, True):
        clipped, kept = (quantised(x, largest, p0, treatment, per_token) for treatment in ("clipped", "kept"))
        assert torch.equal(clipped[rest], kept[rest]) and torch.equal(kept[~rest], x[~rest])
        # The grid of torch has one more step below zero.
        expected = of_torch(x[~rest].clamp(-largest, largest), largest)
        torch.testing.assert_close(clipped[~rest], expected, atol=1e-5, rtol=0)
        ends = x[rest].abs().amax((1, 2)).tolist() if per_token else [largest] * int(rest.sum())
        for token, new, end in zip(x[rest], kept[rest], ends, strict=True):
            torch.testing.assert_close(new, of_torch(token, end), atol=1e-6, rtol=0)


def test_what_does_not_count_makes_no_grid_wider() -> None:
    x = with_outliers(2, 6, 2, 4)
    x[1, :2] = -1e6
    counted = torch.tensor([[False, True, True, True, True, True], [False, False, True, True, True, True]])
    expected = [[float(x[0, 1:].abs().max())], [float(x[1, 2:].abs().max())]]
    assert largest_in_row(x, counted).tolist() == expected
    assert largest_in_row(x, torch.zeros(2, 6, dtype=torch.bool)).tolist() == [[0], [0]]


def test_zeros_stay_and_dtypes_too() -> None:
    assert torch.equal(rounded(torch.zeros(1, 2, 3), 0.0), torch.zeros(1, 2, 3))
    assert rounded(with_outliers(1, 2, 3).bfloat16(), 30.0).dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_every_input_of_every_family_is_reached(family: str, backend: str, family_model: Any) -> None:
    model = family_model(family, backend)
    kinds = [kind for kind in INPUTS if kind != "down" or not describe(model).experts]
    assert sorted(input_sites(model)) == sorted(Site(block, kind) for block in range(LAYERS) for kind in kinds)


@pytest.mark.parametrize("family", BOTH)
@torch.no_grad()
def test_both_backends_have_the_same_inputs_and_the_same_edits(family: str, family_model: Any) -> None:
    hooked, bridge = (family_model(family, backend) for backend in ("hooked", "bridge"))
    ours, theirs = seen(hooked), seen(bridge)
    before = forward(hooked, IDS)
    for site in input_sites(hooked):
        torch.testing.assert_close(ours[site].flatten(2), theirs[site].flatten(2), atol=2e-4, rtol=1e-4)
        logits = []
        for model in (hooked, bridge):
            with on_inputs(model, lambda at, x, site=site: turned(x) if at == site else None):
                logits.append(forward(model, IDS))
        torch.testing.assert_close(*logits, atol=2e-3, rtol=1e-3)
        assert not torch.allclose(logits[0], before, atol=1e-2)
    assert torch.equal(forward(hooked, IDS), before)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama-grouped", {"qkv": "q_proj", "out": "o_proj", "up": "up_proj", "down": "down_proj"}),
        ("gpt2", {"qkv": "c_attn", "out": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj"}),
        ("neox", {"qkv": "query_key_value", "out": "attention.dense", "up": "h_to_4h", "down": "4h_to_h"}),
        ("opt", {"qkv": "q_proj", "out": "out_proj", "up": "fc1", "down": "fc2"}),
        ("gemma2", {"qkv": "q_proj", "out": "o_proj", "up": "up_proj", "down": "down_proj"}),
    ],
)
@torch.no_grad()
def test_they_are_what_the_matrices_of_transformers_read(
    family: str, names: dict[str, str], family_model: Any, family_folder: Any
) -> None:
    from transformers import AutoModelForCausalLM

    hf, read = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval(), {}

    def enter(module: nn.Module, args: tuple[Tensor], site: Site) -> None:
        read[site] = args[0]

    for kind, ending in names.items():
        found = [module for name, module in hf.named_modules() if name.endswith(ending)]
        assert len(found) == LAYERS
        for block, module in enumerate(found):
            module.register_forward_pre_hook(functools.partial(enter, site=Site(block, kind)))
    hf(IDS)
    for site, x in seen(family_model(family, "bridge")).items():
        torch.testing.assert_close(x.flatten(2), read[site].view(2, 9, -1), atol=2e-4, rtol=1e-4)


def test_nothing_stays_on_a_model_that_broke_off() -> None:
    model = load_model("wired")
    ids = torch.arange(6)[None]
    before = forward(model, ids)

    def fail(site: Site, x: Tensor) -> Tensor:
        if site == Site(1, "down"):
            raise RuntimeError("in the middle")
        return x / 2

    with pytest.raises(RuntimeError, match="in the middle"), on_inputs(model, fail):
        forward(model, ids)
    assert torch.equal(forward(model, ids), before)


@pytest.mark.parametrize("family", BOTH)
def test_weights_are_the_same_in_both_backends(family: str, family_model: Any) -> None:
    logits = []
    for model in (family_model(family, backend) for backend in ("hooked", "bridge")):
        weights = rounded_weights(model)
        kept = [each.weight.detach().clone() for each in weights]
        with torch.no_grad(), with_weights(weights):
            logits.append(forward(model, IDS))
        assert all(torch.equal(each.weight, before) for each, before in zip(weights, kept, strict=True))
    torch.testing.assert_close(*logits, atol=2e-3, rtol=1e-3)
    with torch.no_grad():
        assert not torch.allclose(forward(model, IDS), logits[1], atol=1e-3)


def test_each_output_of_a_matrix_has_its_grid(family_model: Any) -> None:
    model = family_model("qwen3-moe", "bridge")
    weights = rounded_weights(model)
    # Queries, keys, values, output, and the two stacks of all experts; no router.
    assert len(weights) == 6 * LAYERS
    for weight, int8 in weights:
        for before, after in zip(weight.detach().flatten(0, -2).unbind(), int8.flatten(0, -2).unbind(), strict=True):
            step = float(before.abs().max()) / 127.5
            steps = after / step
            assert float((steps - steps.round()).abs().max()) < 1e-3 and float(steps.abs().max()) < 128.001
            # The end of the range is half a step farther than the grid goes.
            assert float((after - before).abs().max()) <= step * 0.501


@torch.no_grad()
def test_they_are_integers_of_8_bits_times_a_step(family_folder: Any, family_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(family_folder("llama-grouped")).eval()
    ours = [each.int8 for each in rounded_weights(family_model("llama-grouped", "bridge"))]
    theirs = []
    for matrix in (module.weight for module in hf.model.layers.modules() if isinstance(module, nn.Linear)):
        steps = matrix.abs().amax(1, keepdim=True) / 127.5
        # Not `matrix / steps`: the end of the range lies between two steps, and there the last bit decides.
        theirs.append((matrix * (1 / steps)).round().clamp(-128, 127).to(torch.int8) * steps)
    assert len(ours) == len(theirs) == 7 * LAYERS
    for a in ours:
        assert any(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-6) for b in theirs)


def test_they_are_those_of_torchao(family_folder: Any, family_model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(family_folder("llama-grouped")).eval()
    matrices = [module for module in hf.model.layers.modules() if isinstance(module, nn.Linear)]
    ours = [each.int8 for each in rounded_weights(family_model("llama-grouped", "bridge"))]
    quantization.quantize_(hf.model.layers, quantization.Int8WeightOnlyConfig())
    theirs = [module.weight.dequantize() for module in matrices]
    assert len(ours) == len(theirs) == 7 * LAYERS
    for a in ours:
        assert any(a.shape == b.shape and torch.equal(a, b) for b in theirs)


def test_the_shipped_model_hardly_minds_int8_weights() -> None:
    model = load_model("p0-nano")
    ids = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = forward(model, ids)
        with with_weights(rounded_weights(model)):
            int8 = forward(model, ids)
    assert 1e-4 < float((int8 - exact).norm() / exact.norm()) < 0.03
