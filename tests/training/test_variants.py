"""The variants: changed forward passes are the same on `transformers` and on both backends, and are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from p0circuit.models import ModelError, describe, forward, load_model
from p0circuit.models.architecture_edits import ArchitectureEdits, edit_hf_model, gates_of, reserve_channels
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.prompts import from_ids
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.training.build import build_model
from p0circuit.training.config import TrainConfig
from p0circuit.training.run_files import save_model
from p0circuit.training.variants import VARIANTS

BACKENDS = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]
SMALL = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_mlp": 48, "vocab_size": 64}
IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def small(name: str, **fields: object) -> TrainConfig:
    return replace(VARIANTS[name], **SMALL, **fields)


def sharpened(config: TrainConfig) -> torch.nn.Module:
    """The untrained model with weights large enough for every part of it to matter, gates included."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.2).half().float())
    return model.eval()


@pytest.fixture(scope="module", params=list(VARIANTS))
def saved(request, tmp_path_factory):
    """A variant's directory, and the logits of the very model that the trainer would train."""
    config = small(request.param)
    model = sharpened(config)
    if config.architecture_edits:
        edit_hf_model(model, config.architecture_edits, gates_of(model))
    folder = tmp_path_factory.mktemp(request.param) / request.param
    save_model(folder, model, None)
    with torch.no_grad():
        return folder, model(input_ids=IDS).logits, config


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variant_is_loaded_as_it_was_trained(saved, backend):
    folder, logits, config = saved
    if backend == "hooked" and config.experts:
        pytest.skip("HookedTransformer has no Qwen3-MoE")
    model = load_model(folder, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, IDS), logits, rtol=1e-4, atol=1e-4)
    info = describe(model)
    assert (info.experts, info.window[0] or 0) == (config.experts, config.window)
    assert info.positions == ("learned" if config.architecture == "gpt2" else "rotary")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["force-sink", "gated"])
def test_a_changed_model_knows_p0_behind_padding(name, backend, tmp_path):
    save_model(tmp_path / "m", sharpened(small(name)), None)
    model = load_model(tmp_path / "m", backend=backend)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.bool), torch.ones_like(IDS, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, padded, mask)[:, 4:], forward(model, IDS), rtol=1e-4, atol=1e-5)


def test_the_change_matters_and_is_part_of_the_fingerprint(tmp_path):
    for name in ("force-sink", "gated"):
        folder = tmp_path / name
        save_model(folder, sharpened(small(name)), None)
        changed = load_model(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["p0circuit"]
        (folder / "config.json").write_text(json.dumps(config))
        plain = load_model(folder)
        with torch.no_grad():
            assert (forward(changed, IDS) - forward(plain, IDS)).abs().max() > 0.01
        assert weights_fingerprint(changed) != weights_fingerprint(plain)
        prompts = from_ids(IDS, torch.ones_like(IDS, dtype=torch.bool), 64)
        scores = [record(model, prompts, SINK_SCORE) for model in (changed, plain)]
        assert not torch.equal(*scores)


def test_reserved_channels_literally():
    stream = torch.arange(24.0).reshape(2, 3, 4) + 1
    found = reserve_channels(stream, 1, torch.tensor([0, 1]))
    for row, p0 in enumerate((0, 1)):
        for pos in range(3):
            for channel in range(4):
                kept = (channel < 1) == (pos == p0)
                assert found[row, pos, channel] == (stream[row, pos, channel] if kept else 0)
    assert torch.equal(reserve_channels(stream, 1), reserve_channels(stream, 1, torch.tensor([0, 0])))


def test_what_cannot_be_changed_is_refused(tmp_path):
    save_model(tmp_path / "m", sharpened(small("gated")), None)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for field in ({"force_sink": 32}, {"force_sync": 3}, {"gated_attention": 1}):
        path.write_text(json.dumps(config | {"p0circuit": field}))
        with pytest.raises(ModelError, match="p0circuit"):
            load_model(tmp_path / "m")
    path.write_text(json.dumps(config))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights.pop("model.layers.1.self_attn.gate.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the gates model\.layers\.1"):
        load_model(tmp_path / "m")
    with pytest.raises(ModelError, match="Llama"):
        edit_hf_model(build_model(small("learned")), ArchitectureEdits(force_sink=2))


@pytest.mark.parametrize(
    "fields", [{"window": 8}, {"architecture": "mistral"}, {"experts": 4}, {"architecture": "bert"}, {"force_sink": 99}]
)
def test_a_configuration_that_contradicts_itself_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TrainConfig(**(SMALL | fields))


def test_variants_differ_from_the_baseline_in_what_they_are_named_after():
    plain = VARIANTS["baseline"]
    assert plain.bos_share == 0 and plain.loss_at_p0 and not plain.random_first and not plain.architecture_edits
    for name, config in VARIANTS.items():
        same = ("corpus", "batch", "length", "steps", "n_layers", "d_model", "n_heads", "vocab_size", "weight_decay")
        assert [getattr(config, field) for field in same] == [getattr(plain, field) for field in same], name
