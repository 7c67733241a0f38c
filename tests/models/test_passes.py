"""What is counted as a pass: tokens times blocks, wherever blocks are run."""

from __future__ import annotations

import pytest
import torch

from p0circuit.interventions.vocabulary import vocabulary_sweep
from p0circuit.models import describe, forward, load_model, resume
from p0circuit.models.passes import WITH_GRADIENT, count_passes

IDS = torch.arange(24).reshape(4, 6)


@pytest.fixture(scope="module")
def model():
    return load_model("wired")


@torch.no_grad()
def test_a_pass_is_all_rows_through_all_blocks(model):
    layers = describe(model).n_layers
    with count_passes() as whole:
        forward(model, IDS)
        with count_passes() as rows:
            forward(model, IDS[:1])
        with count_passes() as blocks:
            stream = forward(model, IDS, stop_at_layer=layers - 1)
        with count_passes() as rest:
            resume(model, stream, layers - 1)
            resume(model, stream, layers)  # the unembedding alone
    assert rows.passes(4, 6, layers) == pytest.approx(1 / 4)
    assert blocks.passes(4, 6, layers) == pytest.approx((layers - 1) / layers)
    assert rest.passes(4, 6, layers) == pytest.approx(1 / layers)
    assert whole.passes(4, 6, layers) == pytest.approx(1 + 1 / 4 + 1)


def test_a_pass_with_a_gradient_counts_its_backward_pass(model):
    with count_passes() as count:
        forward(model, IDS)
    assert count.passes(4, 6, describe(model).n_layers) == WITH_GRADIENT


@torch.no_grad()
def test_single_token_rows_in_bare_operations_count_as_well():
    model, tokens = load_model("p0-nano"), torch.arange(60)
    with count_passes() as bare:
        vocabulary_sweep(model, tokens)
    with count_passes() as hooked:
        vocabulary_sweep(model, tokens, key_layers=[0])
    layers = describe(model).n_layers
    assert hooked.token_blocks == 60 * layers
    # The bare form is compared with the model itself on four tokens, block by block, before it is used.
    assert hooked.token_blocks <= bare.token_blocks <= hooked.token_blocks + 2 * 4 * layers


def test_nothing_is_counted_outside_and_after_an_error(model):
    with pytest.raises(KeyboardInterrupt), count_passes() as count:
        raise KeyboardInterrupt
    forward(model, IDS)
    assert count.token_blocks == 0
