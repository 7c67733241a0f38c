"""Read the header of a GGUF file, and refuse at once what cannot become a causal language model."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from p0circuit.models.errors import ModelError

_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# What GGUF calls models whose attention is not causal, besides those with "bert" in their names.
_ENCODERS = ("t5", "t5encoder", "gemma-embedding")
# Tensors by which llama.cpp scales the rotation, and which `transformers` does not read.
_ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file states.

    Attributes:
        architecture: in GGUF's words, such as `llama`.
        quantisation: of most of its weights, in GGUF's words, such as `Q4_K_M`; `F32`, `F16` and `BF16` are not rounded
            further than these types.
        parameters: the number of weights.
        unread: names of tensors that change the forward pass and that `transformers` does not read.
    """

    architecture: str
    quantisation: str
    parameters: int
    unread: tuple[str, ...]


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file with the suffix or the first bytes of a GGUF file.

    Args:
        path: which need not exist.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(len(_MAGIC)) == _MAGIC


def gguf_file_in(folder: Path) -> Path | None:
    """Return the GGUF file of a directory that holds one and no other weights.

    Args:
        folder: an existing directory.

    Returns:
        The path of the file; None where there is none, or where there are weights as safetensors.

    Raises:
        ModelError: there are several GGUF files, and choosing one would be a guess.
    """
    if any(folder.glob("*.safetensors*")):
        return None
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".gguf" and path.is_file())
    if len(files) > 1:
        if all(_SPLIT.search(path.name) for path in files):
            _refuse_split(files[0], f"one of {len(files)} parts")
        names = ", ".join(path.name for path in files)
        raise ModelError(f"{folder} holds {len(files)} GGUF files ({names}); name one of them: {files[0]}")
    return files[0] if files else None


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, and refuse what cannot become a causal language model.

    Args:
        path: of the file.

    Raises:
        ModelError: the file is damaged, one of several parts, an encoder, of an architecture that `transformers` does
            not know, of a quantisation that `gguf` cannot undo, or without a tokenizer.
    """
    if _SPLIT.search(path.name):
        _refuse_split(path, "one of several parts")
    fields, tensors = _read(path)
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{path}: its header names no architecture; expected 'general.architecture' in it")
    if (fields.get("split.count") or 1) > 1:
        _refuse_split(path, f"part {fields.get('split.no', 0) + 1} of {fields['split.count']}")
    _check_architecture(path, architecture, fields)
    _check_types(path, {kind for _, kind, _ in tensors})
    if not fields.get("tokenizer.ggml.tokens"):
        raise ModelError(
            f"{path} holds no tokenizer, and so not the size of its vocabulary either; convert the model to GGUF again "
            "with its tokenizer, or save it as a Hugging Face directory, where the tokenizer is optional"
        )
    return GgufHeader(
        architecture,
        _quantisation(fields.get("general.file_type"), tensors),
        sum(count for _, _, count in tensors),
        tuple(name for name, _, _ in tensors if name in _ROTARY_TENSORS),
    )


# Name, type and number of elements of every tensor in a file.
_Tensors = list[tuple[str, str, int]]


def _read(path: Path) -> tuple[dict[str, Any], _Tensors]:
    """The fields of a header, long lists as their lengths, and its tensors."""
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
        fields = {
            name: len(field.data) if field.types[0] is GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
        tensors = [(tensor.name, tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors]
    # The reader indexes into a map of the file, so a damaged file can raise an error of any type.
    except Exception as error:
        raise ModelError(
            f"{path} is not a complete GGUF file ({type(error).__name__}: {error}): truncated or damaged; get it again"
        ) from error
    if not tensors:
        raise ModelError(f"{path} holds no weights, only a header; expected a GGUF file of a complete model")
    return fields, tensors


def _refuse_split(path: Path, what: str) -> NoReturn:
    raise ModelError(
        f"{path} is {what} of a split GGUF file; join them first (llama.cpp: llama-gguf-split --merge FIRST.gguf "
        "WHOLE.gguf) and load the joined file"
    )


def _check_architecture(path: Path, architecture: str, fields: Mapping[str, object]) -> None:
    encoder = "bert" in architecture or architecture in _ENCODERS
    if encoder or fields.get(f"{architecture}.attention.causal", True) is False:
        raise ModelError(
            f"{path} is an encoder ({architecture}), not a causal language model: without a causal mask no position is "
            "first"
        )
    known = _architectures()
    if _without_separators(architecture) not in {_without_separators(name) for name in known}:
        raise ModelError(
            f"{path}: transformers {version('transformers')} cannot de-quantise the architecture {architecture!r}; it "
            f"can: {', '.join(sorted(known))}"
        )


def _without_separators(architecture: str) -> str:
    """The name of an architecture as GGUF and `transformers` both spell it (qwen2moe, qwen2_moe)."""
    return re.sub("[-_]", "", architecture)


def _architectures() -> set[str]:
    """The architectures that `transformers` reads, in its own spelling."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    # Newer versions have a second list.
    with contextlib.suppress(ImportError):
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

        names |= set(GGUF_CONFIG_ARCHS)
    return names


def _check_types(path: Path, kinds: set[str]) -> None:
    """Refuse types that the `gguf` package cannot de-quantise."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for name in sorted(kinds - {"F32", "F16", "F64"}):
        kind = GGMLQuantizationType[name]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise ModelError(
                f"{path} holds weights of type {name}, which gguf {version('gguf')} cannot de-quantise; get another "
                "quantisation of the model"
            ) from None


def _quantisation(file_type: int | None, tensors: _Tensors) -> str:
    """The quantisation that the file states, else the type of most of its weights."""
    from gguf import LlamaFileType

    with contextlib.suppress(ValueError):
        if file_type is not None and (kind := LlamaFileType(file_type)) is not LlamaFileType.GUESSED:
            return kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    weights = Counter[str]()
    for _, kind, count in tensors:
        weights[kind] += count
    return weights.most_common(1)[0][0]
