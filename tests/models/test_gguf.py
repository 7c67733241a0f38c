"""GGUF files: what is read out of one, what its conversion keeps, and what is refused."""

from __future__ import annotations

import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from p0circuit.models import (
    ModelError,
    describe,
    gguf_conversion,
    list_checkpoints,
    load_model,
    model_placement,
    stored_model,
)
from p0circuit.models.gguf import read_header
from p0circuit.models.gguf_conversion import check_dense, list_converted_models
from p0circuit.models.gguf_writer import gguf_weights, interleave_rotary_rows, write_gguf
from p0circuit.models.hooked_transformer import has_hooked_transformer

KINDS = ["F32", "F16", "Q8_0", "Q4_1"]
IDS = torch.arange(40)[None] * 3 % 384


@pytest.fixture(scope="session")
def files(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny Llama as F32, F16, Q8_0 and Q4_1."""
    folder = tmp_path_factory.mktemp("gguf")
    for kind in KINDS:
        write_gguf(tiny_model_dir, folder / f"tiny-{kind}.gguf", kind)
    return folder


@pytest.fixture
def q4(files: Path, tmp_path: Path) -> Path:
    """A Q4_1 file that a test may spoil."""
    return Path(shutil.copy(files / "tiny-Q4_1.gguf", tmp_path / "tiny.gguf"))


def plain(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave_rotary_rows`, row by row: the slow twin of what `transformers` does."""
    out, half = np.empty_like(weight), weight.shape[0] // heads // 2
    for head in range(heads):
        for pair in range(half):
            for side in range(2):
                out[head * 2 * half + side * half + pair] = weight[head * 2 * half + 2 * pair + side]
    return out


# Round trip


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_reads_back_as_gguf_itself_takes_it_back(files: Path, kind: str, tiny_model_dir: Path) -> None:
    path = files / f"tiny-{kind}.gguf"
    stored = stored_model(path)
    weights = load_file(stored.folders[0] / "model.safetensors")
    config: Any = AutoConfig.from_pretrained(tiny_model_dir)
    names = dict(
        zip(gguf_weights(tiny_model_dir, config), load_file(tiny_model_dir / "model.safetensors"), strict=True)
    )
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert set(tensors) == set(names) and set(names.values()) == set(weights)
    rounded = 0
    for name, tensor in tensors.items():
        expected = dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in name:
            expected = plain(expected, config.num_attention_heads)
        if "attn_k" in name:
            expected = plain(expected, config.num_key_value_heads)
        np.testing.assert_array_equal(weights[names[name]].numpy(), expected)
        rounded += tensor.tensor_type.name == kind
    assert rounded >= len(names) // 2


def test_interleaved_rows_are_put_back(tiny_model_dir: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(24, 5))
    np.testing.assert_array_equal(plain(interleave_rotary_rows(weight, 3), 3), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_on_the_same_weights(files: Path, kind: str) -> None:
    path = files / f"tiny-{kind}.gguf"
    expected = AutoModelForCausalLM.from_pretrained(
        files, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model = load_model(path, device="cpu")
    assert describe(model).backend == ("hooked" if has_hooked_transformer() else "bridge")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS).logits, rtol=0, atol=1e-4)


def test_only_rounding_tells_the_kinds_apart(files: Path, tiny_model_dir: Path) -> None:
    with torch.no_grad():
        whole = load_model(tiny_model_dir, device="cpu")(IDS)
        off = [
            float((load_model(files / f"tiny-{kind}.gguf", device="cpu")(IDS) - whole).abs().max()) for kind in KINDS
        ]
    assert off[0] < 1e-5 and off == sorted(off) and off[-1] > 10 * off[1]


def test_the_tokenizer_comes_out_of_the_file(files: Path, tiny_model_dir: Path) -> None:
    text = "def position_zero(x):\n    return 'é' + x[0]  # 12.5 %\n"
    expected = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer = load_model(files / "tiny-Q8_0.gguf", device="cpu").tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == expected(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (expected.bos_token, expected.bos_token_id)


def test_the_tokenizer_has_no_token_beyond_the_vocabulary(files: Path, tiny_model_dir: Path) -> None:
    size = AutoConfig.from_pretrained(tiny_model_dir).vocab_size
    # `transformers` gives a byte-level BPE an unknown token of its own.
    as_read = AutoTokenizer.from_pretrained(files, gguf_file="tiny-Q8_0.gguf")
    assert len(as_read) == size + 1
    for tokenizer in (stored_model(files / "tiny-Q8_0.gguf").tokenizer, load_model(files / "tiny-Q8_0.gguf").tokenizer):
        assert len(tokenizer) == size and max(tokenizer.added_tokens_decoder) < size
        assert tokenizer.unk_token is None


def test_the_tokenizer_is_the_one_that_transformer_lens_makes_of_it(files: Path, monkeypatch: Any) -> None:
    from p0circuit.models import load as load_module

    path, text = files / "tiny-Q8_0.gguf", "one text\nand  another"
    once = load_model(path, device="cpu").tokenizer
    plainly = load_module.load_tokenizer
    monkeypatch.setattr(load_module, "load_tokenizer", lambda source, with_bos: plainly(source))
    twice = load_model(path, device="cpu").tokenizer
    for special in (True, False):
        assert once(text, add_special_tokens=special).input_ids == twice(text, add_special_tokens=special).input_ids
    assert (once.padding_side, once.pad_token, once.eos_token) == (twice.padding_side, twice.pad_token, twice.eos_token)


# What a model is called, and where it comes from


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantisation_is_part_of_the_description(files: Path, kind: str) -> None:
    info = describe(load_model(files / f"tiny-{kind}.gguf", device="cpu"))
    assert (info.name, info.quantisation, info.title) == (f"tiny-{kind}", kind, f"tiny-{kind} ({kind})")
    assert stored_model(files / f"tiny-{kind}.gguf").quantisation == kind


def test_plain_weights_have_no_quantisation(tiny_model_dir: Path) -> None:
    info = describe(load_model(tiny_model_dir, device="cpu"))
    assert (info.quantisation, info.title) == (None, "tiny")


def test_a_directory_with_one_file_is_that_file(q4: Path) -> None:
    folder = q4.parent / "my-model"
    folder.mkdir()
    q4.rename(folder / "any.gguf")
    info = describe(load_model(folder, device="cpu", backend="bridge"))
    assert (info.name, info.quantisation, info.backend) == ("my-model", "Q4_1", "bridge")


def test_a_copy_of_the_converted_directory_keeps_its_quantisation(q4: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored_model(q4).folders[0], tmp_path / "copy"))
    assert describe(load_model(folder, device="cpu")).title == "copy (Q4_1)"


def test_a_file_without_the_suffix_is_known_by_its_first_bytes(q4: Path) -> None:
    assert describe(load_model(q4.rename(q4.with_name("weights")), device="cpu")).title == "weights (Q4_1)"


def test_no_label_means_the_type_of_most_weights(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(GGUFWriter, "add_file_type", lambda *_: None)
    path = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "Q8_0")
    assert read_header(path).quantisation == "Q8_0"


def test_the_options_of_loading_work_on_a_file(files: Path) -> None:
    path, whole = files / "tiny-Q4_1.gguf", load_model(files / "tiny-Q4_1.gguf", device="cpu")
    first = load_model(path, device="cpu", n_layers=2)
    assert describe(first).title == "tiny-Q4_1[:2] (Q4_1)" and describe(first).n_layers == 2
    plan = model_placement(path, "cpu", device="cpu")
    assert sum(plan.weight_bytes.values()) > 0
    placed = load_model(path, device="cpu", device_map="cpu")
    assert describe(placed).quantisation == "Q4_1"
    with torch.no_grad():
        torch.testing.assert_close(placed(IDS), whole(IDS), rtol=0, atol=1e-4)
    assert load_model(path, device="cpu", dtype=torch.bfloat16).cfg.dtype is torch.bfloat16


def test_a_file_has_no_checkpoints(files: Path) -> None:
    path = files / "tiny-Q4_1.gguf"
    assert list_checkpoints(path) == []
    for call in (load_model, stored_model):
        with pytest.raises(ModelError, match=r"one GGUF file: it has no checkpoint 100"):
            call(path, checkpoint=100)


# The cache


def test_it_is_converted_once(q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []
    save = gguf_conversion._save
    monkeypatch.setattr(gguf_conversion, "_save", lambda *given: (saved.append(given[1]), save(*given)))
    first = stored_model(q4)
    assert stored_model(q4).folders == first.folders and saved == [q4]
    # It is the content that counts, not where it lies.
    again = Path(shutil.copy(q4, q4.with_name("other-name.gguf")))
    assert stored_model(again).folders == first.folders and saved == [q4]
    (entry,) = list_converted_models()
    assert (entry["file"], entry["quantisation"]) == ("tiny.gguf", "Q4_1")
    assert entry["bytes"] == sum(path.stat().st_size for path in first.folders[0].iterdir())


@pytest.mark.parametrize("damage", ["a bit", "half", "gone", "sidecar"])
def test_a_damaged_conversion_is_made_again(q4: Path, damage: str) -> None:
    folder = stored_model(q4).folders[0]
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "a bit":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "half":
        weights.write_bytes(whole[: len(whole) // 2])
    elif damage == "gone":
        (folder / "config.json").unlink()
    else:
        (folder / "gguf.json").write_text('{"quantisation": "F16"')
    with pytest.warns(UserWarning, match="is damaged"):
        model = load_model(q4, device="cpu")
    assert weights.read_bytes() == whole and describe(model).quantisation == "Q4_1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored_model(q4)


def test_other_versions_do_not_share_a_conversion(q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stored_model(q4).folders
    monkeypatch.setattr(gguf_conversion, "version", lambda name: "0.0")
    assert stored_model(q4).folders != first


def test_old_conversions_make_room(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(kind: str) -> Path:
        return stored_model(files / f"tiny-{kind}.gguf").folders[0]

    old, recent = loaded("F32"), loaded("F16")
    monkeypatch.setenv("P0CIRCUIT_CACHE_LIMIT", str(list_converted_models()[0]["bytes"] * 3 // 2))
    os.utime(old, (time.time() - 7200,) * 2)
    newest = loaded("Q8_0")
    # What was used within the hour may be about to be read.
    assert not old.exists() and recent.exists() and newest.exists()


def test_what_a_killed_conversion_left_is_removed(q4: Path) -> None:
    folder = stored_model(q4).folders[0]
    leftover = folder.with_name(f".0123456789ab.tmp.{folder.name}")
    folder.rename(leftover)
    # Of other models: one of a process at work, and one that was left long ago.
    recent, old = (folder.with_name(f".{digit * 12}.tmp.{digit * 32}") for digit in "ab")
    recent.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    assert stored_model(q4).folders == (folder,) and folder.is_dir() and not leftover.exists()
    assert recent.is_dir() and not old.exists()


# Refusals


def test_a_truncated_file_is_refused_wherever_it_ends(q4: Path) -> None:
    whole = q4.read_bytes()
    for end in (0, 3, 4, 20, 100, len(whole) // 4, len(whole) // 2, len(whole) - 64):
        q4.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="not a complete GGUF file"):
            load_model(q4, device="cpu")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ModelError, match="not a complete GGUF file"):
        load_model(path, device="cpu")
    other = tmp_path / "weights.bin"
    other.write_bytes(bytes(100))
    with pytest.raises(ModelError, match=r"or a GGUF file, found a file"):
        load_model(other, device="cpu")


@pytest.mark.parametrize("name", ["nowhere.gguf", "org/nowhere.gguf"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=r"or a GGUF file, found nothing"):
        load_model(name, device="cpu")


def test_an_absurd_count_is_no_endless_loop(q4: Path) -> None:
    whole = q4.read_bytes()
    for position in (8, 16):
        q4.write_bytes(whole[:position] + struct.pack("<Q", 2**62) + whole[position + 8 :])
        with pytest.raises(ModelError, match="not a complete GGUF file"):
            read_header(q4)


def header_only(
    path: Path, architecture: str, fill: Callable[[GGUFWriter], None] | None = None, kind: Any = None
) -> Path:
    """A file of one small tensor, whose header says what `fill` adds to it."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    if fill is not None:
        fill(writer)
    if kind is None:
        writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    else:
        from gguf import GGML_QUANT_SIZES

        elements, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor("token_embd.weight", np.zeros((elements // elements, size), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = header_only(tmp_path / "model.gguf", "rwkv9")
    with pytest.raises(ModelError, match=r"cannot de-quantise the architecture 'rwkv9'.*gemma3.*llama.*qwen3"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("spelled", ["llama", "qwen2moe", "qwen3moe", "gpt-oss", "gemma3", "phi3", "gpt2"])
def test_known_architectures_are_known_in_the_spelling_of_gguf(tmp_path: Path, spelled: str) -> None:
    assert read_header(header_only(tmp_path / "model.gguf", spelled)).architecture == spelled


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert", "modern-bert", "t5", "t5encoder"])
def test_an_encoder_is_refused(tmp_path: Path, architecture: str) -> None:
    path = header_only(tmp_path / "model.gguf", architecture)
    with pytest.raises(ModelError, match=rf"is an encoder \({architecture}\).*no position is first"):
        load_model(path, device="cpu")


def test_a_model_that_says_it_is_not_causal_is_refused(tmp_path: Path) -> None:
    path = header_only(tmp_path / "model.gguf", "llama", lambda writer: writer.add_causal_attention(False))
    with pytest.raises(ModelError, match="is an encoder"):
        load_model(path, device="cpu")


def test_weights_that_only_run_packed_are_refused(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    path = header_only(tmp_path / "model.gguf", "llama", kind=GGMLQuantizationType.Q1_0)
    with pytest.raises(ModelError, match=r"type Q1_0, which gguf .* cannot de-quantise"):
        load_model(path, device="cpu")


def test_an_architecture_that_stays_packed_is_refused(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    check_dense("tiny", model)
    blocks = torch.zeros(4, 20, dtype=torch.uint8)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(blocks, requires_grad=False)
    with pytest.raises(ModelError, match=r"run it with packed weights only.*layers.1.mlp.up_proj"):
        check_dense("tiny", model)


def test_a_file_without_a_tokenizer_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "F16", tokenizer=False)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_model(path, device="cpu")


def test_a_part_of_a_split_file_is_refused(q4: Path, tmp_path: Path) -> None:
    part = q4.rename(q4.with_name("tiny-00001-of-00003.gguf"))
    for given in (part, tmp_path):
        with pytest.raises(ModelError, match=r"split GGUF file; join them first"):
            load_model(given, device="cpu")
    shutil.copy(part, q4.with_name("tiny-00002-of-00003.gguf"))
    with pytest.raises(ModelError, match=r"one of 2 parts of a split GGUF file"):
        load_model(tmp_path, device="cpu")


def test_a_part_is_known_by_its_header_too(tmp_path: Path) -> None:
    def split(writer: GGUFWriter) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 3)

    path = header_only(tmp_path / "model.gguf", "llama", split)
    with pytest.raises(ModelError, match=r"part 2 of 3 of a split GGUF file"):
        load_model(path, device="cpu")


def test_two_files_in_a_directory_are_a_question(files: Path) -> None:
    with pytest.raises(ModelError, match=r"holds 4 GGUF files \(tiny-F16.gguf, .*\); name one of them"):
        load_model(files, device="cpu")


def test_missing_weights_are_refused(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_tensor
    monkeypatch.setattr(
        GGUFWriter,
        "add_tensor",
        lambda self, name, *rest, **more: name == "blk.1.ffn_up.weight" or add(self, name, *rest, **more),
    )
    path = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "F16")
    with pytest.raises(ModelError, match=r"lacks the weights model.layers.1.mlp.up_proj.weight"):
        load_model(path, device="cpu")


def test_rotary_factors_that_are_not_read_are_reported(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    header = GGUFWriter.write_header_to_file

    def with_factors(self: GGUFWriter, *given: Any) -> None:
        self.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
        header(self, *given)

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", with_factors)
    path = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "F16")
    with pytest.warns(UserWarning, match=r"does not read rope_freqs.weight"):
        load_model(path, device="cpu")


def test_what_does_not_fit_is_refused_before_it_is_read(q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(q4.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ModelError, match="set P0CIRCUIT_CACHE to a folder with more room"):
            load_model(q4, device="cpu")
    monkeypatch.setattr(gguf_conversion, "free_memory", lambda device: 1000)
    with pytest.raises(ModelError, match="of memory to be converted"):
        load_model(q4, device="cpu")


# A real model


@pytest.mark.real
def test_smollm2_is_what_transformers_makes_of_the_file(smollm2: Any, smollm2_file: Path) -> None:
    info = describe(smollm2)
    assert (info.name, info.title) == ("smollm2-135m", "smollm2-135m (Q4_1)")
    assert (info.n_layers, info.n_heads, info.n_kv_heads, info.d_model) == (30, 9, 3, 576)
    assert info.backend == ("hooked" if has_hooked_transformer() else "bridge")
    expected = AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent,
        gguf_file=smollm2_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    text = "The attention of a language model gathers on the first token of its text."
    ids = smollm2.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert smollm2.tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        logits, reference = smollm2(ids), expected(ids).logits
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4 * float(reference.abs().max()))
    # It is a language model: English is likelier than noise.
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert float(losses) < 6 < float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:].flip(0)))


@pytest.mark.real
@pytest.mark.slow
def test_gemma_is_what_transformers_makes_of_the_file(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from p0circuit.models import CATALOG
    from p0circuit.models.download import fetched_file, is_fetched

    monkeypatch.setenv("P0CIRCUIT_CACHE", str(own_cache))
    entry = CATALOG["gemma3-270m"]
    if not is_fetched(entry):
        pytest.skip("238 MB: it is tested once it is there (p0circuit fetch gemma3-270m)")
    path, model = fetched_file(entry), load_model(entry.name, device="cpu")
    info = describe(model)
    assert (info.title, info.backend, info.n_layers) == ("gemma3-270m (Q4_K_M)", "bridge", 18)
    assert [layer for layer, window in enumerate(info.window) if window is None] == [5, 11, 17]
    assert set(info.window) == {512, None}
    header = read_header(path)
    assert (header.architecture, header.quantisation, header.parameters) == ("gemma3", "Q4_K_M", entry.parameters)
    expected = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    ids = model.tokenizer("The attention of a language model gathers on BOS.", return_tensors="pt").input_ids
    assert ids[0, 0] == model.tokenizer.bos_token_id == 2
    with torch.no_grad():
        logits, reference = model(ids), expected(ids).logits
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4 * float(reference.abs().max()))


# Two processes


def test_two_processes_convert_it_once(q4: Path) -> None:
    import subprocess
    import sys

    code = (
        "from p0circuit.log import show_messages; from p0circuit.models import stored_model; show_messages(); "
        f"print(stored_model({str(q4)!r}).folders[0])"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] and Path(ended[0][0].strip(), "model.safetensors").is_file()
    assert sum("converting tiny" in errors for _, errors in ended) == 1
