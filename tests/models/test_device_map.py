"""Device maps: the numbers of a model in one place, one layer at hand at a time, and nothing left behind.

A machine without a GPU can let weights wait too: in CPU memory by `accelerate.cpu_offload`, on disk as anywhere.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import PeakMemory
from p0circuit.experiments.sink_summary import sink_summary
from p0circuit.interventions.experts import experts_at_p0, remove_experts
from p0circuit.models import ModelError, describe, device_of, forward, load_model, model_placement, resume
from p0circuit.models.controls import shuffled_neurons, untrained_weights
from p0circuit.models.device_map import Placement, parse_device_map, placement_of, plan_placement
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.prompts import random_tokens
from p0circuit.recording.batch_size import ATTENTION_COPIES
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE, TOKEN_LOSSES, Quantity, residual_at
from p0circuit.recording.record import record
from p0circuit.training.checkpoint_measurement import measure_checkpoint
from p0circuit.training.trace import trace
from tests.families import FAMILIES, write

G = 2**30
FAMILY = Callable[[str], Path]
PROMPTS = random_tokens(96, n=8, length=16)
QUANTITIES: list[Quantity] = [SINK_SCORE, NORM_RATIO, TOKEN_LOSSES, residual_at()]
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}


def on_meta(model: Any) -> int:
    """How many weights are elsewhere."""
    return sum(weight.is_meta for weight in torch.nn.Module.parameters(model))


def whole(folder: Path) -> Any:
    return load_model(folder, backend="bridge", device="cpu")


@pytest.mark.parametrize("family", ["qwen3-moe", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_the_numbers_are_those_of_a_model_in_one_place(
    family_folder: FAMILY, tmp_path: Path, family: str, device_map: str
) -> None:
    folder = family_folder(family)
    expected, model = whole(folder), load_model(folder, device="cpu", device_map=device_map, offload_folder=tmp_path)
    waiting = on_meta(model)
    assert waiting > 3 * 7 and describe(model) == describe(expected) and device_of(model).type == "cpu"
    recorded, kept = (record(each, PROMPTS, QUANTITIES, cache=None) for each in (expected, model))
    for quantity in QUANTITIES:
        torch.testing.assert_close(kept[quantity], recorded[quantity], rtol=0, atol=0, equal_nan=True)
    assert measure_checkpoint(model, PROMPTS) == measure_checkpoint(expected, PROMPTS)
    assert sink_summary(model, PROMPTS, bos=False) == sink_summary(expected, PROMPTS, bos=False)
    assert weights_fingerprint(model) == weights_fingerprint(expected)
    assert on_meta(model) == waiting


@pytest.mark.parametrize("device_map", ["cpu", "disk", SPLIT])
def test_interventions_too(family_folder: FAMILY, tmp_path: Path, device_map: Any) -> None:
    folder = family_folder("qwen3-moe")
    model = load_model(folder, device="cpu", device_map=device_map, offload_folder=tmp_path)
    expected = whole(folder)
    with torch.no_grad():
        stream = forward(expected, PROMPTS.ids, stop_at_layer=1)
        torch.testing.assert_close(forward(model, PROMPTS.ids, stop_at_layer=1), stream, rtol=0, atol=0)
        for start in (0, 1, 3):
            found, right = (resume(each, stream, start) for each in (model, expected))
            torch.testing.assert_close(found, right, rtol=0, atol=0)
        left = []
        for each in (model, expected):
            with remove_experts(each, PROMPTS, [(0, 1), (2, 3)]):
                left.append(forward(each, PROMPTS.ids))
        torch.testing.assert_close(*left, rtol=0, atol=0)
    found, right = (experts_at_p0(each, PROMPTS, 1) for each in (model, expected))
    assert found is not None and right is not None and torch.equal(found.written, right.written)


def test_gradients_reach_the_stream_through_weights_that_are_gone_again(family_folder: FAMILY, tmp_path: Path) -> None:
    folder = family_folder("llama")
    gradients = []
    for model in (whole(folder), load_model(folder, device="cpu", device_map="disk", offload_folder=tmp_path)):
        seen: list[torch.Tensor] = []

        def keep(activation: torch.Tensor, hook: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(activation.detach().requires_grad_())
            return seen[0]

        logits = forward(model, PROMPTS.ids, hooks=[("blocks.1.hook_resid_pre", keep)])
        gradients.append(torch.autograd.grad(logits.square().sum(), seen)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_one_block_is_onloaded_at_a_time(family_folder: FAMILY, tmp_path: Path, device_map: str) -> None:
    model = load_model(family_folder("qwen3-moe"), device="cpu", device_map=device_map, offload_folder=tmp_path)
    seen: dict[str, tuple[set[int], int]] = {}

    def onloaded(activation: Any, hook: Any, name: str) -> None:
        sizes = {
            layer: sum(w.numel() * w.element_size() for w in torch.nn.Module.parameters(block) if not w.is_meta)
            for layer, block in enumerate(model.blocks)
        }
        seen[name] = {layer for layer, size in sizes.items() if size}, sum(sizes.values())

    hooks = ["hook_resid_pre", "attn.hook_pattern", "hook_resid_mid", "mlp.gate.hook_out", "hook_mlp_out"]
    names = ["hook_embed", *(f"blocks.{layer}.{hook}" for layer in range(3) for hook in hooks), "ln_final.hook_out"]

    def hook(name: str) -> Any:
        return name, lambda activation, hook: onloaded(activation, hook, name)

    with torch.no_grad():
        forward(model, PROMPTS.ids, hooks=[hook(name) for name in names])
    placement = placement_of(model)
    assert placement is not None
    for name in names:
        block = {int(name.split(".")[1])} if name.startswith("blocks.") else set()
        assert seen[name] == (block, placement.block_bytes if block else 0), name


@pytest.mark.parametrize("device_map", [None, "cpu", "disk"])
def test_recording_adds_at_most_the_activations_of_one_layer(tmp_path: Path, device_map: Any) -> None:
    peaks = {}
    for layers in (3, 9):
        folder = write("qwen3-moe", tmp_path / f"deep-{layers}", num_hidden_layers=layers)
        model = load_model(folder, "bridge", device="cpu", device_map=device_map, offload_folder=tmp_path)
        prompts = random_tokens(96, n=4, length=64)
        record(model, prompts, [SINK_SCORE, NORM_RATIO], batch_size=4, cache=None)
        for what in ("recording", "alone"):
            with torch.no_grad(), PeakMemory() as memory:
                if what == "recording":
                    record(model, prompts, [SINK_SCORE, NORM_RATIO], batch_size=4, cache=None)
                else:
                    forward(model, prompts.ids, prompts.attention_mask)
            peaks[layers, what] = memory.peak
    one_layer = 4 * ATTENTION_COPIES * 4 * 4 * 64**2
    assert peaks[9, "recording"] < peaks[3, "recording"] + one_layer / 10
    assert peaks[9, "recording"] < peaks[9, "alone"] + one_layer


def test_weights_go_back_when_a_block_is_left_by_an_exception(family_folder: FAMILY, tmp_path: Path) -> None:
    folder = family_folder("qwen3-moe")
    model = load_model(folder, device="cpu", device_map="disk", offload_folder=tmp_path)
    waiting = on_meta(model)

    def fail(activation: Any, hook: Any) -> None:
        raise ArithmeticError("in the middle of a block")

    for name in ("hook_embed", "blocks.1.attn.hook_pattern", "blocks.2.hook_mlp_out"):
        with pytest.raises(ArithmeticError), torch.no_grad():
            forward(model, PROMPTS.ids, hooks=[(name, fail)])
        assert on_meta(model) == waiting
    with torch.no_grad():
        assert torch.equal(forward(model, PROMPTS.ids), forward(whole(folder), PROMPTS.ids))


def test_the_folder_goes_with_the_model(family_folder: FAMILY, tmp_path: Path) -> None:
    model = load_model(family_folder("qwen3-moe"), device="cpu", device_map="disk", offload_folder=tmp_path / "new")
    (folder,) = (tmp_path / "new").iterdir()
    # The experts alone, as the file has one matrix for each of them; the rest is read where it is.
    placement = placement_of(model)
    assert placement is not None
    assert {path.name.rsplit(".", 2)[-2] for path in folder.iterdir()} == {"gate_up_proj", "down_proj"}
    assert 0 <= sum(path.stat().st_size for path in folder.iterdir()) - placement.rewritten_bytes < 4096
    del model, placement
    gc.collect()
    assert not list((tmp_path / "new").iterdir())


def test_nothing_is_left_of_a_model_that_cannot_be_loaded(family_folder: FAMILY, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(family_folder("qwen3-moe"), tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.experts.3.up_proj.weight"][2, 2] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or infinite values in model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_model(broken, device="cpu", device_map="disk", offload_folder=tmp_path / "offload")
    assert not list((tmp_path / "offload").iterdir())
    (broken / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=r"a weight file in .* is damaged"):
        load_model(broken, device="cpu", device_map="disk", offload_folder=tmp_path / "offload")


def test_what_a_dead_process_left_is_removed(family_folder: FAMILY, tmp_path: Path) -> None:
    model = load_model(family_folder("llama"), device="cpu", device_map="disk", offload_folder=tmp_path)
    (mine,) = tmp_path.iterdir()
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", ".4194999."))
    dead.mkdir()
    other = load_model(family_folder("llama"), device="cpu", device_map="disk", offload_folder=tmp_path)
    assert mine.is_dir() and not dead.exists() and len(list(tmp_path.iterdir())) == 2
    del model, other


def test_a_trace_holds_one_checkpoint_at_a_time(tmp_path: Path) -> None:
    for step in (10, 20):
        write("qwen3-moe", tmp_path / "run" / f"checkpoint-{step}", seed=step)
    offload, at_load = tmp_path / "offload", []

    def load(step: Any) -> Any:
        at_load.append(list(offload.glob("*")))
        return load_model(tmp_path / "run", "bridge", step, "cpu", device_map="disk", offload_folder=offload)

    found = trace(tmp_path / "run", lambda model: PROMPTS, [10, 20], load=load)
    assert at_load == [[], []] and not list(offload.iterdir())
    expected = trace(tmp_path / "run", lambda model: PROMPTS, [10, 20])
    assert found.rows == expected.rows


def test_controls_that_would_change_the_weights_are_refused(family_folder: FAMILY, tmp_path: Path) -> None:
    model = load_model(family_folder("llama"), device="cpu", device_map="disk", offload_folder=tmp_path)
    with pytest.raises(ModelError, match="device map: its weights stay as they are"), untrained_weights(model):
        pass
    with shuffled_neurons(model), torch.no_grad():
        assert not torch.equal(forward(model, PROMPTS.ids), forward(whole(family_folder("llama")), PROMPTS.ids))


def test_fused_queries_keys_and_values(family_folder: FAMILY, tmp_path: Path) -> None:
    """TransformerLens splits them: version 4 keeps the parts at hand, version 3 would compute with nothing."""
    folder = family_folder("neox")
    if has_hooked_transformer():
        with pytest.raises(ModelError, match=r"TransformerLens splits weights of GPTNeoX.*put every block on a GPU"):
            load_model(folder, device="cpu", device_map="disk", offload_folder=tmp_path)
        assert not list(tmp_path.iterdir())
    else:
        model = load_model(folder, device="cpu", device_map="disk", offload_folder=tmp_path)
        with torch.no_grad():
            assert torch.equal(forward(model, PROMPTS.ids), forward(whole(folder), PROMPTS.ids))


def test_a_model_that_fits_has_all_its_weights_onloaded(family_folder: FAMILY) -> None:
    model = load_model(family_folder("qwen3-moe"), device="cpu", device_map="auto")
    placement = placement_of(model)
    assert on_meta(model) == 0 and placement is not None and placement.block_bytes == 0
    assert set(placement.weight_bytes) == {"cpu"} and not placement.offloaded_bytes


def planned(device_map: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, **free: int) -> Placement:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**FAMILIES["qwen3-moe"].fields)
    places = {name.replace("gpu", "cuda:"): size for name, size in free.items()}
    return plan_placement(config, dtype, device_map, torch.device(device), places, "small")


def test_a_placement_counts_parameters_and_bytes() -> None:
    weights = {name: weight.numel() * 4 for name, weight in build_small().named_parameters()}
    layer = sum(size for name, size in weights.items() if name.startswith("model.layers.0."))
    found = planned("disk", cpu=G, disk=G)
    assert found.offloaded_bytes == {"disk": 3 * layer} and found.block_bytes == layer
    # Beside parameters there are two small buffers of the rotation.
    assert found.weight_bytes["cpu"] == pytest.approx(sum(weights.values()) - 3 * layer, abs=64)
    assert found.required_bytes["cpu"] == found.weight_bytes["cpu"] + layer + found.activation_bytes
    assert found.parameters == sum(weights.values()) // 4
    routed = sum(size for name, size in weights.items() if ".experts." in name) // 4
    assert found.active_parameters == found.parameters - routed // 2
    assert planned("cpu", "cuda:0", gpu0=G, cpu=G).offloaded_bytes == {"cpu": 3 * layer}
    half = planned("disk", dtype=torch.bfloat16, cpu=G, disk=G)
    assert half.block_bytes == layer // 2


def build_small() -> Any:
    from tests.families import build

    return build("qwen3-moe")


@pytest.mark.filterwarnings("ignore")
def test_auto_fills_gpus_then_memory_then_the_disk() -> None:
    whole_size = sum(planned("disk", cpu=G, disk=G).weight_bytes.values())
    one = planned("disk", cpu=G, disk=G).block_bytes
    assert set(planned("auto", "cuda:0", gpu0=G, cpu=G, disk=G).weight_bytes) == {"cuda:0"}
    # Room for its block at work and a quarter for activations are kept free.
    two = planned("auto", "cuda:0", gpu0=4 * one, gpu1=8 * one, cpu=G, disk=G)
    assert (
        set(two.weight_bytes) == {"cuda:0", "cuda:1"}
        and not two.offloaded_bytes
        and two.device == torch.device("cuda", 0)
    )
    mixed = planned("auto", "cuda:0", gpu0=4 * one, cpu=G, disk=G)
    assert set(mixed.weight_bytes) == {"cuda:0", "cpu"} and set(mixed.offloaded_bytes) == {"cpu"}
    assert mixed.block_bytes == one
    on_disk = planned("auto", cpu=whole_size, disk=G)
    assert set(on_disk.offloaded_bytes) == {"disk"} and on_disk.required_bytes["cpu"] <= whole_size
    # A GPU that was not asked for is left alone.
    assert set(planned("auto", "cpu", gpu0=G, cpu=G, disk=G).weight_bytes) == {"cpu"}


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({**SPLIT, "model.layers.7": "cpu"}, r"small has no model\.layers\.7; its blocks are model\.layers\.0"),
        ({name: place for name, place in SPLIT.items() if name != "model.norm"}, r"parameters: model\.norm\.weight"),
        ({**SPLIT, "lm_head": "tape"}, r"'lm_head' cannot be put on 'tape'; expected a GPU's number, cpu or disk"),
        ("everywhere", "'everywhere': expected auto, cpu, disk or the devices of modules"),
        ({}, "expected auto, cpu, disk or the devices of modules"),
    ],
)
def test_maps_that_do_not_fit_the_model(device_map: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(device_map, cpu=G, disk=G)


def test_tied_weights_have_one_place(family_folder: FAMILY) -> None:
    with pytest.raises(ModelError, match="are the same weights; put them on the same device"):
        model_placement(family_folder("llama"), {"model": "cpu", "lm_head": "disk"})


def test_what_fits_nowhere_is_refused() -> None:
    total = sum(planned("disk", cpu=G, disk=G).weight_bytes.values())
    with pytest.raises(ModelError, match=r"needs .* GB on cpu and .* are free; spread it \(device map auto\)"):
        planned("cpu", cpu=total // 2, disk=G)
    with pytest.raises(ModelError, match=r"needs .* GB on cpu"):
        planned("auto", cpu=total // 8, disk=G)


def test_too_little_disk_is_seen_before_anything_is_written(
    family_folder: FAMILY, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"on disk and 0\.0 are free; .*an offload folder on a larger disk helps too"):
        load_model(family_folder("qwen3-moe"), device="cpu", device_map="disk", offload_folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # A dense model is read where it is.
    load_model(family_folder("llama"), device="cpu", device_map="disk", offload_folder=tmp_path)


def test_device_maps_as_text(tmp_path: Path) -> None:
    assert parse_device_map("auto") == "auto" and parse_device_map("disk") == "disk"
    expected = {"model": 1, "lm_head": "cpu"}
    text = '{"model": "cuda:1", "lm_head": "cpu"}'
    (tmp_path / "map.json").write_text(text)
    assert parse_device_map(text) == parse_device_map(str(tmp_path / "map.json")) == expected
    for wrong in ("gpu", "{", "[1, 2]", "./nowhere.json"):
        with pytest.raises(ModelError, match="device map"):
            parse_device_map(wrong)


def test_wrong_arguments(family_folder: FAMILY) -> None:
    with pytest.raises(ModelError, match="with a device map use backend='bridge'"):
        load_model(family_folder("llama"), backend="hooked", device_map="cpu")
    with pytest.raises(ModelError, match=r"wired is constructed .* takes no device map"):
        load_model("wired", device_map="auto")
