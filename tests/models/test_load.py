"""`load_model`: where models come from, what they are after loading, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from p0circuit.models import (
    ModelError,
    ShippedModel,
    describe,
    forward,
    list_checkpoints,
    list_models,
    load as load_module,
    load_model,
    stored_model,
)
from p0circuit.models.hooked_transformer import has_hooked_transformer
from tests.families import FAMILIES, Family, build, write

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="HookedTransformer left TransformerLens with version 4"
)
IDS = torch.arange(10)[None]
PARAMETERS = 96 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one shipped model, `tiny`, that keeps three checkpoints."""
    monkeypatch.setattr("p0circuit.models.names.data_dir", lambda: tmp_path / "data")
    folder = write("llama", tmp_path / "data" / "models" / "tiny")
    save_tokenizer(folder)
    for step in (1000, 0, 20):
        write("llama", folder / "trace" / f"step-{step:06d}", seed=step + 1)
    return folder


@pytest.fixture
def llama(tmp_path: Path, family_folder: Callable[[str], Path]) -> Path:
    """A llama's folder that a test may spoil."""
    return Path(shutil.copytree(family_folder("llama"), tmp_path / "llama"))


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return forward(model, IDS)


@torch.no_grad()
def expected(seed: int, family: str | Family = "llama", **fields: Any) -> torch.Tensor:
    return build(family, seed, **fields)(IDS).logits


def test_a_shipped_model_and_its_checkpoints(shipped: Path) -> None:
    assert list_models() == [ShippedModel("tiny", PARAMETERS, (0, 20, 1000))]
    assert list_checkpoints("tiny") == [0, 20, 1000]
    final = load_model("tiny", device="cpu")
    assert describe(final).name == "tiny"
    assert final.tokenizer.encode("a b", add_special_tokens=False) == [2, 3]
    assert torch.allclose(logits_of(final), expected(0), atol=1e-4)
    for checkpoint, step in ((20, 20), ("step-000020", 20), ("1000", 1000), (0, 0), ("step0", 0)):
        model = load_model("tiny", checkpoint=checkpoint, device="cpu")
        assert torch.allclose(logits_of(model), expected(step + 1), atol=1e-4)
        assert describe(model).name == f"tiny@{checkpoint}"
        # The run's tokenizer serves its checkpoints.
        assert model.tokenizer.encode("b", add_special_tokens=False) == [3]


def test_a_checkpoint_folder_of_its_own(shipped: Path) -> None:
    model = load_model(shipped / "trace" / "step-000020", device="cpu")
    assert torch.allclose(logits_of(model), expected(21), atol=1e-4)
    assert model.tokenizer.encode("b", add_special_tokens=False) == [3]


def test_a_trainer_directory(llama: Path) -> None:
    for step in (500, 1500, 90):
        write("llama", llama / f"checkpoint-{step}", seed=step)
    assert list_checkpoints(llama) == [90, 500, 1500]
    assert list_checkpoints(str(llama)) == [90, 500, 1500]
    for checkpoint in (500, "checkpoint-500"):
        model = load_model(llama, checkpoint=checkpoint, device="cpu")
        assert torch.allclose(logits_of(model), expected(500), atol=1e-4)
    assert model.tokenizer is None


def test_checkpoints_with_labels(llama: Path) -> None:
    write("llama", llama / "trace" / "best", seed=7)
    assert list_checkpoints(llama) == []
    assert torch.allclose(logits_of(load_model(llama, checkpoint="best", device="cpu")), expected(7), atol=1e-4)


def test_checkpoints_that_do_not_exist(shipped: Path, llama: Path) -> None:
    for missing in (21, "step-21", "final", "../tiny"):
        with pytest.raises(ModelError, match=rf"tiny has no checkpoint {missing!r}; it has those of steps 0, 20, 1000"):
            load_model("tiny", checkpoint=missing)
    with pytest.raises(ModelError, match="llama has no checkpoints"):
        load_model(llama, checkpoint=3)


def test_backend_device_dtype(llama: Path) -> None:
    auto = load_model(llama, device="cpu")
    assert describe(auto).backend == ("hooked" if has_hooked_transformer() else "bridge")
    assert describe(load_model(llama, backend="bridge", device="cpu")).backend == "bridge"
    assert not auto.training
    for backend in ("hooked", "bridge") if has_hooked_transformer() else ("bridge",):
        for dtype in (None, torch.float64, torch.bfloat16):
            model = load_model(llama, backend=backend, device="cpu", dtype=dtype)
            assert {weight.dtype for weight in model.parameters()} == {dtype or torch.float32}
            assert model.tokenizer is None
            tolerance = 1e-4 if dtype != torch.bfloat16 else 0.5
            assert torch.allclose(logits_of(model).float(), expected(0), atol=tolerance)


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    build("llama").half().save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    loaded = load_model(tmp_path / "half", device="cpu")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.allclose(logits_of(loaded), rounded(IDS).logits, atol=1e-4)


def test_weights_in_shards(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.allclose(logits_of(load_model(tmp_path / "sharded", device="cpu")), expected(0), atol=1e-4)
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"weight files missing in .*model-0000"):
        load_model(tmp_path / "sharded")


@needs_hooked
def test_weights_are_raw(family_folder: Callable[[str], Path]) -> None:
    model = load_model(family_folder("gpt2"), backend="hooked", device="cpu")
    stored = load_file(family_folder("gpt2") / "model.safetensors")
    assert torch.equal(model.blocks[1].ln1.w, stored["transformer.h.1.ln_1.weight"])
    assert torch.equal(model.blocks[1].ln1.b, stored["transformer.h.1.ln_1.bias"])
    assert torch.equal(model.blocks[1].mlp.W_out, stored["transformer.h.1.mlp.c_proj.weight"])
    assert torch.equal(model.embed.W_E, stored["transformer.wte.weight"])
    assert torch.equal(model.unembed.W_U, stored["transformer.wte.weight"].T)


LLAMA = FAMILIES["llama"]
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


@needs_hooked
@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {"attention_bias": True}, "attention biases"),
        ("llama", {"mlp_bias": True}, "MLP biases"),
        ("llama", {"rope_parameters": YARN}, "rotary scaling 'yarn'"),
        ("llama", {"hidden_act": "tanh"}, "activation 'tanh'"),
        ("qwen3", {"attention_bias": True}, "attention biases"),
        ("olmo2", {"num_key_value_heads": 2}, "grouped-query attention in OLMo-2"),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, "norms after the blocks"),
        ("opt", {"word_embed_proj_dim": 16}, "embeddings of another width"),
        ("opt", {"enable_bias": False}, "layers without biases"),
        ("qwen3-moe", {}, "Qwen3MoeForCausalLM is not among GPT2LMHeadModel"),
    ],
)
def test_what_hooked_transformer_cannot_hold_falls_to_the_bridge(
    family: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = write(family, tmp_path / "model", **fields)
    model = load_model(folder, device="cpu")
    assert describe(model).backend == "bridge"
    assert torch.allclose(logits_of(model), expected(0, family, **fields), atol=1e-4)
    with pytest.raises(ModelError, match=f"cannot represent model: {reason}.*backend='bridge'"):
        load_model(folder, backend="hooked")


@needs_hooked
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"sliding_window": 3}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {"num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": 3}),
        ("opt", {"activation_function": "gelu"}),
        ("gpt2", {"n_inner": None, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}),
        ("gpt2", {"scale_attn_weights": False}),
    ],
)
def test_variants_that_hooked_transformer_holds(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(write(family, tmp_path / "model", **fields), backend="hooked", device="cpu")
    assert torch.allclose(logits_of(model), expected(0, family, **fields), atol=1e-4)


@needs_hooked
def test_a_conversion_that_goes_wrong_is_seen_in_the_logits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted with the wrong base of rotation, the model is refused by name and replaced by the bridge."""
    monkeypatch.setattr("p0circuit.models.hooked_transformer._rope_fields", lambda config: {"rotary_base": 10.0})
    with pytest.raises(ModelError, match="HookedTransformer gives other logits than transformers"):
        load_model(llama, backend="hooked", device="cpu")
    assert describe(load_model(llama, device="cpu")).backend == "bridge"


@pytest.mark.skipif(has_hooked_transformer(), reason="this TransformerLens has HookedTransformer")
def test_no_hooked_transformer_in_transformer_lens_4(llama: Path) -> None:
    with pytest.raises(ModelError, match="no HookedTransformer any more; use backend='bridge'"):
        load_model(llama, backend="hooked")


def test_wrong_arguments(llama: Path) -> None:
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(ModelError, match=r"floating-point dtype such as torch.bfloat16"):
            load_model(llama, dtype=dtype)


def test_unknown_names(shipped: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown model 'tinny'.*did you mean .*tiny"):
        load_model("tinny")
    with pytest.raises(ModelError, match=r"unknown model 'pythia-70'.*did you mean .*pythia-70m"):
        load_model("pythia-70")
    with pytest.raises(ModelError, match=r"unknown model '\?': .*shipped are tiny"):
        load_model("?")
    with pytest.raises(ModelError, match=r"'EleutherAI/pythia-70m' is not in the local cache.*cannot be reached"):
        load_model("pythia-70m")
    with pytest.raises(ModelError, match=r"did you mean .*tiny"):
        list_checkpoints("tinyy")


def test_directories_that_are_none(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a directory with config.json .*, found nothing"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="found nothing"):
        load_model("./absent")
    with pytest.raises(ModelError, match="found a file"):
        load_model(llama / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: no config.json in"):
        load_model(tmp_path / "empty")


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in .*; expected model.safetensors"):
        load_model(llama)


def test_pickled_weights_stay_unread(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"not to be opened")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model.bin\).*use_safetensors=False\)\.save_pretrained"):
        load_model(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(llama: Path, value: float) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(llama)


def test_lacking_weights_are_named(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\.self_attn\.k_proj\.weight; they would be random"):
        load_model(llama)


def test_a_damaged_file(llama: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"a weight file in .* is damaged"):
        load_model(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "cannot load the weights"),
        ({"num_key_value_heads": 3}, "llama: "),
        ({"model_type": "of-my-own", "auto_map": {"AutoConfig": "code.Config"}}, "code from model folders is not run"),
    ],
)
def test_a_config_that_does_not_fit(llama: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    (llama / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelError, match=message):
        load_model(llama)


def test_a_config_that_is_no_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be used"):
        load_model(llama)


def test_models_without_a_causal_mask(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    bert = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    encoders = [BertForMaskedLM(bert), BertLMHeadModel(bert), T5ForConditionalGeneration(t5)]
    for model in encoders:
        model.save_pretrained(tmp_path / type(model).__name__)
        with pytest.raises(ModelError, match=f"{type(model).__name__}, not a causal language model"):
            load_model(tmp_path / type(model).__name__)
    fields = LLAMA.fields | {"use_bidirectional_attention": True, "head_dim": 8}
    write(Family("Gemma3TextConfig", fields), tmp_path / "sees-all")
    with pytest.raises(ModelError, match="sees-all has no causal mask: a later token changes"):
        load_model(tmp_path / "sees-all")


def test_a_model_without_attention(tmp_path: Path) -> None:
    family = Family("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2})
    with pytest.raises(ModelError, match="no block with attention"):
        load_model(write(family, tmp_path / "mamba"), device="cpu")


def test_a_tokenizer_that_cannot_be_read_is_done_without(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"tokenizer cannot be read .* use token ids"):
        model = load_model(llama, device="cpu")
    assert model.tokenizer is None
    assert logits_of(model).shape == (1, 10, 96)


@pytest.fixture
def in_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, int]], Path]:
    """Lay revisions of a model out as the hub's client keeps them; there is nothing to ask but the disk."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def lay_out(hub_id: str, revisions: dict[str, int]) -> Path:
        repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        for revision, seed in revisions.items():
            commit = f"{seed}" * 40
            write("llama", repository / "snapshots" / commit, seed=seed)
            (repository / "refs" / revision).write_text(commit)
        return repository

    return lay_out


def test_pythias_revisions_in_the_local_cache(in_hub_cache: Callable[[str, dict[str, int]], Path]) -> None:
    in_hub_cache("someone/small-llama", {"main": 3, "step200": 4, "step30": 5})
    for checkpoint, seed in ((None, 3), (200, 4), ("200", 4), ("step30", 5)):
        model = load_model("someone/small-llama", checkpoint=checkpoint, device="cpu")
        assert torch.allclose(logits_of(model), expected(seed), atol=1e-4)
    assert describe(model).name == "someone/small-llama@step30"
    assert list_checkpoints("someone/small-llama") == [30, 200]
    with pytest.raises(ModelError, match=r"someone/small-llama at 'step9' is not in the local cache.*step200"):
        load_model("someone/small-llama", checkpoint=9)
    stored = stored_model("someone/small-llama", 30)
    assert (stored.label, stored.fingerprint, stored.vocab_size) == ("step30", "5" * 40, 96)


def test_olmos_revisions_in_the_local_cache(in_hub_cache: Callable[[str, dict[str, int]], Path]) -> None:
    in_hub_cache("someone/olmo", {"main": 3, "step1000-tokens4B": 4, "step0-tokens0B": 5})
    assert list_checkpoints("someone/olmo") == [0, 1000]
    for checkpoint, seed in ((1000, 4), ("step1000-tokens4B", 4), (0, 5)):
        model = load_model("someone/olmo", checkpoint=checkpoint, device="cpu")
        assert torch.allclose(logits_of(model), expected(seed), atol=1e-4)
    assert stored_model("someone/olmo", 1000).label == "step1000-tokens4B"


def test_later_stages_are_found_by_their_whole_name(in_hub_cache: Callable[[str, dict[str, int]], Path]) -> None:
    later = "stage2-ingredient1-step1000-tokens3B"
    in_hub_cache("someone/olmo-2", {"main": 3, "stage1-step1000-tokens5B": 4, "stage1-step150-tokens1B": 5, later: 6})
    assert list_checkpoints("someone/olmo-2") == [150, 1000]
    for checkpoint, seed in ((1000, 4), (150, 5), (later, 6)):
        model = load_model("someone/olmo-2", checkpoint=checkpoint, device="cpu")
        assert torch.allclose(logits_of(model), expected(seed), atol=1e-4)
    with pytest.raises(ModelError, match="'step7' is not in the local cache"):
        load_model("someone/olmo-2", checkpoint=7)


def test_stages_on_disk_are_told_apart_too(llama: Path) -> None:
    for name, seed in (("stage1-step20-tokens1B", 8), ("stage2-step20-tokens2B", 9)):
        write("llama", llama / name, seed=seed)
    assert list_checkpoints(llama) == [20]
    for checkpoint, seed in ((20, 8), ("stage2-step20-tokens2B", 9)):
        assert torch.allclose(
            logits_of(load_model(llama, checkpoint=checkpoint, device="cpu")), expected(seed), atol=1e-4
        )
    with pytest.raises(ModelError, match="no checkpoint 'stage3-step20'"):
        load_model(llama, checkpoint="stage3-step20")


def test_a_model_is_told_from_another_by_its_files(llama: Path, tmp_path: Path) -> None:
    first = stored_model(llama)
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    assert stored_model(copy).fingerprint == first.fingerprint and first.tokenizer is first.label is None
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert stored_model(copy).fingerprint != first.fingerprint
    build("llama", 1).save_pretrained(llama)
    assert stored_model(llama).fingerprint != first.fingerprint


@pytest.mark.parametrize("index", ['{"weight_map": {', "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_cut_off(llama: Path, index: str) -> None:
    (llama / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"is damaged: model\.safetensors\.index\.json .* weight_map"):
        load_model(llama)


def test_what_would_not_fit_is_refused_before_it_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = sum(weight.numel() for weight in load_file(llama / "model.safetensors").values())
    whole, reads = 2 * 4 * numbers, []
    monkeypatch.setattr(load_module, "free_memory", lambda device: whole - 1)
    monkeypatch.setattr(load_module, "load_hf_model", lambda *given: reads.append(given))
    with pytest.raises(ModelError, match=r"needs about .* GB on cpu and .* are free; load it with a smaller dtype"):
        load_model(llama, device="cpu")
    assert not reads
    monkeypatch.undo()
    # Half the bytes fit, and so do fewer layers.
    monkeypatch.setattr(load_module, "free_memory", lambda device: whole - 1)
    assert describe(load_model(llama, device="cpu", dtype=torch.bfloat16)).n_layers == 3
    assert describe(load_model(llama, device="cpu", n_layers=2)).n_layers == 2


def test_free_memory_is_what_the_system_has() -> None:
    free = load_module.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("name", [model.name for model in list_models()])
def test_the_shipped_models_load_without_a_word(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(name, device="cpu")
    assert capfd.readouterr() == ("", "")
