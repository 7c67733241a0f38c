"""Write a Llama as a GGUF file, to measure what a type of quantisation changes in a model whose weights are known.

1. Names and shapes become those of GGUF; the rows of query and key projections are put into the order in
   which llama.cpp rotates them.
2. Matrices are rounded to the given type, or to F16 where their rows do not fill its blocks, and vectors stay F32, as
   in llama.cpp.
3. The tokenizer, a byte-level BPE, is stored as its list of tokens and merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from p0circuit.io import write_atomically
from p0circuit.models.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PretrainedConfig

KINDS = ("F32", "F16", "Q8_0", "Q4_1", "Q4_0", "Q5_0", "Q5_1")
"""The types that the `gguf` package can write."""


def write_gguf(folder: Path, path: Path, kind: str, tokenizer: bool = True) -> Path:
    """Write the Llama in a Hugging Face directory to a GGUF file.

    Args:
        folder: config.json, model.safetensors and tokenizer.json of a Llama with a byte-level BPE.
        path: the file to write.
        kind: the type of its matrices, one of `KINDS`.
        tokenizer: whether to store the tokenizer.

    Returns:
        `path`.

    Raises:
        ModelError: the model is not a plain Llama, or the type is not known.

    Example:
        ```python
        path = write_gguf(Path("data/models/p0-nano"), Path("p0-nano.gguf"), "Q4_1")
        model = load_model(path)
        ```
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from transformers import AutoConfig

    if kind not in KINDS:
        raise ModelError(f"GGUF kind {kind!r} cannot be written; expected one of {', '.join(KINDS)}")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type != "llama" or getattr(config, "p0circuit", None):
        raise ModelError(f"{folder} is not a plain Llama ({config.model_type}), and only those can be written as GGUF")
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


def gguf_weights(folder: Path, config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Return the weights of a Llama in float32, under GGUF's names and in its order of rows.

    Args:
        folder: a Hugging Face directory.
        config: of the model.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors.torch import load_file

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            weight = interleave_rotary_rows(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = interleave_rotary_rows(weight, config.num_key_value_heads)
        weights[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = weight
    return weights


def interleave_rotary_rows(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection: row pairs of a rotation become neighbours, as in GGUF.

    In `transformers` the pairs are at the same place of the two halves of a head.

    Args:
        weight: [n_heads * d_head, d_model].
        n_heads: heads of the projection.
    """
    half = weight.shape[0] // n_heads // 2
    return weight.reshape(n_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def _add_config(writer: GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"rotary scaling {rope['rope_type']!r} cannot be written as GGUF")
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


def _add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    from gguf import TokenType

    stored = json.loads((folder / "tokenizer.json").read_text())
    tokens = {index: token for token, index in stored["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in stored["added_tokens"]}
    tokens |= special
    token_list = [tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(token_list)
    writer.add_token_types([TokenType.CONTROL if index in special else TokenType.NORMAL for index in range(vocab_size)])
    merges = stored["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token: index for index, token in enumerate(token_list)}
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if (token := settings.get(f"{name}_token")) is not None:
            add(ids[token])


def _add_tensor(
    writer: GGUFWriter, name: str, weight: np.ndarray, types: dict[str, GGMLQuantizationType], kind: str
) -> None:
    from gguf import GGML_QUANT_SIZES, quantize

    if weight.ndim == 1:
        kind = "F32"
    elif weight.shape[-1] % GGML_QUANT_SIZES[types[kind]][0]:
        kind = "F16"
    writer.add_tensor(name, quantize(weight, types[kind]), raw_dtype=types[kind])
