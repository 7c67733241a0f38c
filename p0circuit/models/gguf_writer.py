"""Write a Llama's directory as a GGUF file: to see what a kind of quantisation does to a model whose weights are known.

1. Names and shapes become GGUF's; the rows of query and key projections are put into the order that llama.cpp rotates.
2. Matrices are rounded to the kind asked for, those whose rows do not fill its blocks to F16, vectors are left as F32:
   as llama.cpp does it.
3. The tokenizer, a byte-level BPE, goes in as its list of tokens and merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from p0circuit.io import write_atomically
from p0circuit.models.info import ModelError

KINDS = ("F32", "F16", "Q8_0", "Q4_1", "Q4_0", "Q5_0", "Q5_1")
"""The types that the `gguf` package can write."""


def write_gguf(folder: Path, path: Path, kind: str, tokenizer: bool = True) -> Path:
    """Write the Llama in a Hugging Face directory to a GGUF file.

    Args:
        folder: config.json, model.safetensors and tokenizer.json of a Llama with a byte-level BPE.
        path: the file to write.
        kind: the type of its matrices, one of `KINDS`.
        tokenizer: whether the tokenizer goes in.

    Returns:
        `path`.

    Raises:
        ModelError: the model is no Llama, or the kind is not known.

    Example:
        >>> write_gguf(Path("data/models/p0-nano"), Path("p0-nano.gguf"), "Q4_1")  # doctest: +SKIP
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from transformers import AutoConfig

    if kind not in KINDS:
        raise ModelError(f"GGUF kind {kind!r} cannot be written; expected one of {', '.join(KINDS)}")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type != "llama" or getattr(config, "p0circuit", None):
        raise ModelError(f"{folder} is no plain Llama ({config.model_type}): only those are written as GGUF here")
    types = {name: GGMLQuantizationType[name] for name in KINDS}
    file_type = LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, "llama")
        _add_config(writer, config)
        writer.add_file_type(file_type)
        if tokenizer:
            _add_tokenizer(writer, folder, config.vocab_size)
        for name, weight in gguf_weights(folder, config).items():
            _add_tensor(writer, name, weight, types, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write_atomically(path, write)


def gguf_weights(folder: Path, config: Any) -> dict[str, np.ndarray]:
    """The weights of a Llama's directory in float32, under GGUF's names and in its order of rows."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors.torch import load_file

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = interleaved(weight, config.num_key_value_heads)
        weights[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = weight
    return weights


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, of each head, from halves that rotate together to neighbours that do."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def _add_config(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"rotary scaling {rope['rope_type']!r} is not written as GGUF here")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    from gguf import TokenType

    stored = json.loads((folder / "tokenizer.json").read_text())
    tokens = {index: token for token, index in stored["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in stored["added_tokens"]}
    tokens |= special
    listed = [tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(listed)
    writer.add_token_types([TokenType.CONTROL if index in special else TokenType.NORMAL for index in range(vocab_size)])
    merges = stored["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token: index for index, token in enumerate(listed)}
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if (token := settings.get(f"{name}_token")) is not None:
            add(ids[token])


def _add_tensor(writer: Any, name: str, weight: np.ndarray, types: dict[str, Any], kind: str) -> None:
    from gguf import GGML_QUANT_SIZES, quantize

    chosen = "F32" if weight.ndim == 1 else kind
    if weight.shape[-1] % GGML_QUANT_SIZES[types[chosen]][0]:
        chosen = "F16"
    writer.add_tensor(name, quantize(weight, types[chosen]), raw_dtype=types[chosen])
