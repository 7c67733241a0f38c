"""The models in which there should be nothing to find, and that they leave the model as it was."""

from __future__ import annotations

import pytest
import torch

from p0circuit.models import ModelError, describe, forward, load_model
from p0circuit.models.controls import shuffled_neurons, untrained_weights
from p0circuit.recording.fingerprint import has_hooks, weights_fingerprint

IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_untrained_is_untrained_and_passes(tiny_model_dir, backend):
    try:
        model = load_model(tiny_model_dir, backend=backend)
    except ModelError as error:
        pytest.skip(str(error))
    before, weights = forward(model, IDS).detach(), weights_fingerprint(model)
    with pytest.raises(KeyboardInterrupt), untrained_weights(model) as beginner:
        assert beginner is model and weights_fingerprint(model) != weights
        named = {name: p.detach() for name, p in torch.nn.Module.named_parameters(model)}
        matrices = [p for name, p in named.items() if p.ndim > 1 and not name.rpartition(".")[2].startswith("b")]
        assert float(torch.cat([p.flatten() for p in matrices]).std()) == pytest.approx(0.02, rel=0.05)
        gains = [p for name, p in named.items() if p.ndim == 1 and not name.rpartition(".")[2].startswith("b")]
        assert gains and all(bool((p == 1).all()) for p in gains)
        raise KeyboardInterrupt
    assert weights_fingerprint(model) == weights and torch.equal(forward(model, IDS), before)


def test_shuffled_neurons_write_what_another_should(tiny_model_dir):
    model = load_model(tiny_model_dir)
    if describe(model).backend != "hooked":
        pytest.skip("written for HookedTransformer's weights")
    before = forward(model, IDS).detach()
    with shuffled_neurons(model, seed=3):
        inside = forward(model, IDS).detach()
    assert not has_hooks(model) and torch.equal(forward(model, IDS), before)
    # The same thing done to the weights: neuron i writes what neuron order^-1(i) wrote.
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        order = torch.randperm(describe(model).d_mlp, generator=generator)
        block.mlp.W_out.data = block.mlp.W_out.data[torch.argsort(order)]
    torch.testing.assert_close(forward(model, IDS), inside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inside, before, atol=1e-3)


def test_experts_have_no_neurons_to_shuffle(family_model):
    model = family_model("mixtral", "bridge")
    with pytest.raises(ModelError, match="cannot be shuffled"), shuffled_neurons(model):
        raise AssertionError("it was shuffled")
