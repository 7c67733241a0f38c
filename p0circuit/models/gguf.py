"""GGUF files: read what one says of itself, and convert it once to a directory of plain weights that any loader reads.

1. Read the header with the `gguf` package, and refuse at once what cannot become a causal language model.
2. `transformers` de-quantises every weight to float32, and makes the tokenizer out of the file.
3. Weights, config and tokenizer are saved as a Hugging Face directory in the cache folder, in one step, with a hash of
   every file and the kind of quantisation in `gguf.json` beside them.
4. Later loads read that directory. Its name is a hash of the GGUF file's content, of the versions of `transformers` and
   `gguf` and of this module; one whose files do not have their hashes is reported and made again.

    <cache>/converted/<key>/config.json, model.safetensors, tokenizer.json, …, gguf.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from p0circuit.io import write_atomically, write_json
from p0circuit.log import progress_bar, report_progress
from p0circuit.models.download import locked, sha256_of
from p0circuit.models.info import ModelError
from p0circuit.models.memory import free_memory

SIDECAR = "gguf.json"
"""The file in a converted directory that says what it was made of."""
_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# What GGUF calls models whose attention sees what comes later, beside those with "bert" in their names.
_ENCODERS = ("t5", "t5encoder", "gemma-embedding")
# Tensors by which llama.cpp scales the rotation, and which `transformers` does not read.
_ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# A converted model used this recently may be about to be read by another process.
_IN_USE_SECONDS = 3600


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        architecture: in GGUF's words, as in `llama`.
        quantisation: of most of its weights, in GGUF's words, as in `Q4_K_M`; `F32`, `F16` and `BF16` are not rounded
            any further than these types.
        parameters: the number of weights.
        unread: names of tensors that decide the forward pass and that `transformers` does not read.
    """

    architecture: str
    quantisation: str
    parameters: int
    unread: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """A converted model: its directory, and what `gguf.json` says in it.

    Attributes:
        folder: a Hugging Face directory of float32 weights.
        quantisation: of the GGUF file it was made of.
        file: the name of that file.
        sha256: the hash of that file.
        files: the hash of every file of the directory, by its name.
    """

    folder: Path
    quantisation: str
    file: str
    sha256: str
    files: dict[str, str]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF files do, or at least has their suffix."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(len(_MAGIC)) == _MAGIC


def gguf_file_in(folder: Path) -> Path | None:
    """The GGUF file of a directory that holds one and no other weights; None where there is none.

    Raises:
        ModelError: there are several, and any one would be a guess.
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
    """Read a GGUF file's header, and refuse what cannot become a causal language model.

    Raises:
        ModelError: the file is damaged, one of several parts, an encoder's, of an architecture that `transformers` does
            not know, of a kind of quantisation that `gguf` cannot take back, or without a tokenizer.
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
            "with its tokenizer, or save it as a Hugging Face directory, which needs none"
        )
    return GgufHeader(
        architecture,
        _quantisation(fields.get("general.file_type"), tensors),
        sum(count for _, _, count in tensors),
        tuple(name for name, _, _ in tensors if name in _ROTARY_TENSORS),
    )


Tensors = list[tuple[str, str, int]]
"""Name, type and number of elements of every tensor in a file."""


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The fields of a header, long lists as their lengths, and its tensors."""
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
        fields = {
            name: len(field.data) if field.types[0] is GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
        tensors = [(tensor.name, tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors]
    # The reader indexes into a map of the file: what it meets beyond the end, or in the wrong place, is any error.
    except Exception as error:
        raise ModelError(
            f"{path} is no whole GGUF file ({type(error).__name__}: {error}): truncated or damaged; get it again"
        ) from error
    if not tensors:
        raise ModelError(f"{path} holds no weights, only a header; expected a GGUF file of a whole model")
    return fields, tensors


def _refuse_split(path: Path, what: str) -> None:
    raise ModelError(
        f"{path} is {what} of a split GGUF file; join them first (llama.cpp: llama-gguf-split --merge FIRST.gguf "
        "WHOLE.gguf) and load the whole"
    )


def _check_architecture(path: Path, architecture: str, fields: dict[str, Any]) -> None:
    encoder = "bert" in architecture or architecture in _ENCODERS
    if encoder or fields.get(f"{architecture}.attention.causal", True) is False:
        raise ModelError(
            f"{path} is an encoder ({architecture}), not a causal language model: without a causal mask no position is "
            "first"
        )
    known = _architectures()
    if _bare(architecture) not in {_bare(name) for name in known}:
        raise ModelError(
            f"{path}: transformers {version('transformers')} cannot de-quantise the architecture {architecture!r}; it "
            f"can: {', '.join(sorted(known))}"
        )


def _bare(architecture: str) -> str:
    """An architecture's name without what GGUF and `transformers` spell differently (qwen2moe, qwen2_moe)."""
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
    """Refuse types that the `gguf` package has no code to turn back into numbers."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for name in sorted(kinds - {"F32", "F16", "F64"}):
        kind = GGMLQuantizationType[name]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise ModelError(
                f"{path} holds weights of type {name}, which can only be run as they are packed: gguf "
                f"{version('gguf')} cannot turn them back into numbers; get another quantisation of the model"
            ) from None


def _quantisation(file_type: int | None, tensors: Tensors) -> str:
    """What the file's own label says, else the type of most of its weights."""
    from gguf import LlamaFileType

    with contextlib.suppress(ValueError):
        if file_type is not None and (kind := LlamaFileType(file_type)) is not LlamaFileType.GUESSED:
            return kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    weights = Counter[str]()
    for _, kind, count in tensors:
        weights[kind] += count
    return weights.most_common(1)[0][0]


def converted(name: str, sha256: str, source: Callable[[], Path]) -> Converted:
    """The directory of plain weights of a GGUF file, made now unless the cache holds it whole.

    Args:
        name: what messages call the model.
        sha256: the hash of the file.
        source: gives the path of the file; called only if it has to be converted.

    Raises:
        ModelError: the file cannot be converted.
    """
    folder = _conversions() / _key(sha256)
    # Read without the lock first: a folder that may only be read can hold it too.
    if (result := _whole(folder)) is not None:
        return result
    path = source()
    try:
        with locked(folder.with_suffix(".lock"), f"{name} is being converted by another process: waiting for it"):
            if (result := _whole(folder)) is None:
                _convert(name, path, sha256, folder)
                result = _whole(folder)
    except OSError as error:
        raise ModelError(f"{name} cannot be converted: {folder} cannot be written ({error})") from error
    if result is None:
        raise ModelError(f"{name}: what was converted does not read back from {folder}; is the disk sound?")
    return result


def _conversions() -> Path:
    from p0circuit.io import cache_directory

    return cache_directory() / "converted"


def _key(sha256: str) -> str:
    """The name of the directory: a hash of all that decides what is in it."""
    libraries = [f"{name} {version(name)}" for name in ("transformers", "gguf")]
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([sha256, libraries, code]).encode()).hexdigest()[:32]


def read_sidecar(folder: Path) -> Converted | None:
    """What a directory was converted from, None for one that was not; its files are not looked at."""
    try:
        return Converted(folder, **json.loads((folder / SIDECAR).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _whole(folder: Path) -> Converted | None:
    """The conversion in a folder if all of its files have their hashes; a damaged one is reported."""
    if not folder.is_dir():
        return None
    result = read_sidecar(folder)
    wrong = SIDECAR if result is None else None
    for file, sha256 in result.files.items() if result else ():
        try:
            wrong = wrong or (None if sha256_of(folder / file) == sha256 else file)
        except OSError:
            wrong = file
    if wrong:
        warnings.warn(f"the converted model in {folder} is damaged ({wrong}); it is made again", stacklevel=2)
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return result


def _convert(name: str, path: Path, sha256: str, folder: Path) -> None:
    """Write the directory of plain weights, whole or not at all."""
    header = read_header(path)
    _check_room(name, header, folder.parent)
    if header.unread:
        warnings.warn(
            f"{name}: transformers does not read {', '.join(header.unread)}, which scale the rotation of long "
            "contexts; the model is computed without this scaling",
            stacklevel=2,
        )
    report_progress(
        f"converting {name} ({header.quantisation}) to plain weights, once: {header.parameters / 1e6:.0f} M parameters"
    )
    _remove_leftovers(folder)

    def write(temporary: Path) -> None:
        _save(name, path, temporary)
        files = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
        about = asdict(Converted(folder, header.quantisation, path.name, sha256, files))
        del about["folder"]
        write_json(temporary / SIDECAR, about)

    write_atomically(folder, write)
    _evict(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed conversions left, of this model or long ago; the caller holds the model's lock."""
    for leftover in folder.parent.glob(".*.tmp.*"):
        with contextlib.suppress(FileNotFoundError):
            if leftover.name.endswith(folder.name) or time.time() - leftover.stat().st_mtime > _IN_USE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _check_room(name: str, header: GgufHeader, folder: Path) -> None:
    """Refuse what would fill the memory or the disk."""
    import torch

    free = free_memory(torch.device("cpu"))
    # De-quantised tensors, and the model that they are copied into.
    needed = 2 * 4 * header.parameters
    if free is not None and needed > free:
        raise ModelError(
            f"{name} needs about {needed / 2**30:.1f} GB of memory to be converted and {free / 2**30:.1f} are free"
        )
    space = shutil.disk_usage(folder).free
    if 4 * header.parameters > space:
        raise ModelError(
            f"{name} takes {4 * header.parameters / 2**30:.1f} GB of plain weights and {space / 2**30:.1f} are free in "
            f"{folder}; set P0CIRCUIT_CACHE to a folder with more room"
        )


def _save(name: str, path: Path, folder: Path) -> None:
    """De-quantise with `transformers`, and save weights, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    dense: dict[str, Any] = {}
    # Versions without this class de-quantise always; later ones would leave the weights packed where they can.
    with contextlib.suppress(ImportError):
        from transformers import GgufConfig

        dense["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with _own_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=torch.float32,
                output_loading_info=True,
                **given,
                **dense,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
    except Exception as error:
        raise ModelError(f"{name}: transformers cannot read {path} ({type(error).__name__}: {error})") from error
    hf, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: {path} lacks the weights {', '.join(absent[:6])}; they would be random")
    check_dense(name, hf)
    for config in (hf.config, hf.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    with _own_progress_bars():
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _drop_foreign_tokens(folder, hf.config.get_text_config().vocab_size)


def _drop_foreign_tokens(folder: Path, size: int) -> None:
    """Take out of a saved tokenizer what its class has added beyond the model's vocabulary: a token without a row."""
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    foreign = [token["content"] for token in stored["added_tokens"] if token["id"] >= size]
    if not foreign:
        return
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < size]
    path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if value is not None and value not in foreign}
    # The class would add them again.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def check_dense(name: str, hf: Any) -> None:
    """Refuse a model whose weights `transformers` has left in packed blocks.

    Raises:
        ModelError: a weight is no array of floating-point numbers.
    """
    packed = [weight for weight, value in hf.state_dict().items() if not value.is_floating_point()]
    if packed:
        raise ModelError(
            f"{name} ({type(hf).__name__}): transformers can only run it with its weights packed, not turn them back "
            f"into numbers ({', '.join(packed[:3])}, …); get the model as safetensors"
        )


@contextlib.contextmanager
def _own_progress_bars() -> Iterator[None]:
    """Show the bar of the long step alone, and only where someone is there to see it."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    bar, shown = reading.__dict__["tqdm"], logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    reading.__dict__["tqdm"] = lambda items, **_: progress_bar(items, "de-quantising")
    try:
        yield
    finally:
        reading.__dict__["tqdm"] = bar
        if shown:
            logging.enable_progress_bar()


def list_converted_models() -> list[dict[str, Any]]:
    """Every converted model: its key, the file it was made of, its quantisation, bytes, and when it was last used."""
    entries = []
    for folder in sorted(path for path in _conversions().glob("[!.]*") if path.is_dir()):
        # Another process may be faster.
        with contextlib.suppress(FileNotFoundError):
            about = read_sidecar(folder)
            entries.append(
                {
                    "key": folder.name,
                    "file": about.file if about else None,
                    "quantisation": about.quantisation if about else None,
                    "bytes": sum(path.stat().st_size for path in folder.iterdir()),
                    "used": folder.stat().st_mtime,
                }
            )
    return entries


def clear_converted_models() -> int:
    """Remove every converted model; returns how many bytes that freed."""
    entries = list_converted_models()
    for entry in entries:
        shutil.rmtree(_conversions() / entry["key"], ignore_errors=True)
    return sum(entry["bytes"] for entry in entries)


def _evict(newest: Path) -> None:
    """Remove the least recently used conversions until they are within the cache's limit; the newest always stays."""
    from p0circuit.io import cache_limit

    entries = sorted(list_converted_models(), key=lambda entry: entry["used"])
    total, limit = sum(entry["bytes"] for entry in entries), cache_limit()
    for entry in entries:
        if total > limit and entry["key"] != newest.name and time.time() - entry["used"] > _IN_USE_SECONDS:
            shutil.rmtree(newest.parent / entry["key"], ignore_errors=True)
            total -= entry["bytes"]
