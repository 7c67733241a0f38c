"""Convert a GGUF file once to a Hugging Face directory of float32 weights, in the cache folder.

1. `transformers` de-quantises every weight to float32, and makes the tokenizer from the file.
2. Weights, config and tokenizer are saved in one step. `gguf.json` next to them holds a hash of every file and the
   quantisation.
3. Later loads read that directory. Its name is a hash of the GGUF file's content, of the versions of `transformers` and
   `gguf` and of this module. A directory whose files do not have their hashes is reported and made again.

    <cache>/converted/<key>/config.json, model.safetensors, tokenizer.json, …, gguf.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from p0circuit.io import cache_directory, cache_limit, write_atomically, write_json
from p0circuit.log import progress_bar, report_progress
from p0circuit.models.download import locked, sha256_of
from p0circuit.models.errors import ModelError
from p0circuit.models.gguf import GgufHeader, read_header
from p0circuit.models.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDECAR = "gguf.json"
"""The file in a converted directory that states what it was made from."""
# A converted model used this recently may be about to be read by another process.
_IN_USE_SECONDS = 3600


@dataclass(frozen=True)
class ConvertedModel:
    """A converted model: its directory, and what its `gguf.json` states.

    Attributes:
        folder: a Hugging Face directory of float32 weights.
        quantisation: of the GGUF file.
        file: the name of the GGUF file.
        sha256: the hash of the GGUF file.
        files: the hash of every file of the directory, by name.
    """

    folder: Path
    quantisation: str
    file: str
    sha256: str
    files: dict[str, str]


class ConvertedModelEntry(TypedDict):
    """A converted model in the cache folder.

    Attributes:
        key: the name of its directory.
        file: the name of its GGUF file; None where `gguf.json` cannot be read.
        quantisation: of its GGUF file; None where `gguf.json` cannot be read.
        bytes: size of the directory.
        used: when it was last loaded, in seconds since 1970.
    """

    key: str
    file: str | None
    quantisation: str | None
    bytes: int
    used: float


def converted_model(name: str, sha256: str, source: Callable[[], Path]) -> ConvertedModel:
    """Return the converted model of a GGUF file; the file is converted unless the cache folder holds the result.

    Args:
        name: what messages call the model.
        sha256: the hash of the file.
        source: returns the path of the file; called only if it has to be converted.

    Raises:
        ModelError: the file cannot be converted.
    """
    folder = _conversions() / _key(sha256)
    # Read without the lock first: a folder that may only be read can hold it too.
    if (result := _complete(folder)) is not None:
        return result
    path = source()
    try:
        with locked(folder.with_suffix(".lock"), f"{name} is being converted by another process: waiting for it"):
            if (result := _complete(folder)) is None:
                _convert(name, path, sha256, folder)
                result = _complete(folder)
    except OSError as error:
        raise ModelError(f"{name} cannot be converted: {folder} cannot be written ({error})") from error
    if result is None:
        raise ModelError(f"{name}: the converted model cannot be read back from {folder}; check the disk")
    return result


def _conversions() -> Path:
    return cache_directory() / "converted"


def _key(sha256: str) -> str:
    """The name of the directory: a hash of everything that decides its content."""
    libraries = [f"{name} {version(name)}" for name in ("transformers", "gguf")]
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([sha256, libraries, code]).encode()).hexdigest()[:32]


def read_sidecar(folder: Path) -> ConvertedModel | None:
    """Read what a directory was converted from; the hashes of its files are not checked.

    Args:
        folder: any directory.

    Returns:
        The converted model; None for a directory without a readable `gguf.json`.
    """
    try:
        return ConvertedModel(folder, **json.loads((folder / SIDECAR).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _complete(folder: Path) -> ConvertedModel | None:
    """The converted model in a folder if all of its files have their hashes; a damaged one is reported."""
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
    """Write the converted directory in one step."""
    header = read_header(path)
    _check_room(name, header, folder.parent)
    if header.unread:
        warnings.warn(
            f"{name}: transformers does not read {', '.join(header.unread)}, which scale the rotation of long "
            "contexts; the model is computed without this scaling",
            stacklevel=2,
        )
    report_progress(
        f"converting {name} ({header.quantisation}) to float32, once: {header.parameters / 1e6:.0f} M parameters"
    )
    _remove_leftovers(folder)

    def write(temporary: Path) -> None:
        _save(name, path, temporary)
        files = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
        sidecar = asdict(ConvertedModel(folder, header.quantisation, path.name, sha256, files))
        del sidecar["folder"]
        write_json(temporary / SIDECAR, sidecar)

    write_atomically(folder, write)
    _evict(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed conversions left behind, of this model or long ago; the caller holds the model's lock."""
    for leftover in folder.parent.glob(".*.tmp.*"):
        with contextlib.suppress(FileNotFoundError):
            if leftover.name.endswith(folder.name) or time.time() - leftover.stat().st_mtime > _IN_USE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _check_room(name: str, header: GgufHeader, folder: Path) -> None:
    """Refuse a model that does not fit into memory or on the disk."""
    import torch

    free = free_memory(torch.device("cpu"))
    # The de-quantised tensors, and the model that they are copied into, in float32.
    needed = 2 * 4 * header.parameters
    if free is not None and needed > free:
        raise ModelError(
            f"{name} needs about {needed / 2**30:.1f} GB of memory to be converted and {free / 2**30:.1f} are free"
        )
    space = shutil.disk_usage(folder).free
    if 4 * header.parameters > space:
        raise ModelError(
            f"{name} takes {4 * header.parameters / 2**30:.1f} GB in float32 and {space / 2**30:.1f} are free in "
            f"{folder}; set P0CIRCUIT_CACHE to a folder with more room"
        )


def _save(name: str, path: Path, folder: Path) -> None:
    """De-quantise with `transformers`, and save weights, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    quantisation: dict[str, Any] = {}
    # Versions without this class always de-quantise; later ones leave the weights packed where they can run them.
    with contextlib.suppress(ImportError):
        from transformers import GgufConfig

        quantisation["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with _progress_bar_of_dequantising():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
                **quantisation,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except Exception as error:
        raise ModelError(f"{name}: transformers cannot read {path} ({type(error).__name__}: {error})") from error
    hf, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: {path} lacks the weights {', '.join(missing[:6])}; they would be random")
    check_dense(name, hf)
    for config in (hf.config, hf.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    with _progress_bar_of_dequantising():
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _drop_foreign_tokens(folder, hf.config.get_text_config().vocab_size)


def _drop_foreign_tokens(folder: Path, size: int) -> None:
    """Remove from a saved tokenizer the tokens that its class has added beyond the model's vocabulary."""
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


def check_dense(name: str, hf: PreTrainedModel) -> None:
    """Refuse a model whose weights `transformers` has left in packed blocks.

    Args:
        name: what the error message calls the model.
        hf: the loaded model.

    Raises:
        ModelError: a weight is no array of floating-point numbers.
    """
    packed = [weight for weight, value in hf.state_dict().items() if not value.is_floating_point()]
    if packed:
        raise ModelError(
            f"{name} ({type(hf).__name__}): transformers can run it with packed weights only, and cannot de-quantise "
            f"them ({', '.join(packed[:3])}, …); get the model as safetensors"
        )


@contextlib.contextmanager
def _progress_bar_of_dequantising() -> Iterator[None]:
    """Hide the progress bars of `transformers`, except that of the longest step, which is shown in our style."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    bar, enabled = reading.__dict__["tqdm"], logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    reading.__dict__["tqdm"] = lambda items, **_: progress_bar(items, "de-quantising")
    try:
        yield
    finally:
        reading.__dict__["tqdm"] = bar
        if enabled:
            logging.enable_progress_bar()


def list_converted_models() -> list[ConvertedModelEntry]:
    """Return the converted models in the cache folder, sorted by key."""
    entries: list[ConvertedModelEntry] = []
    for folder in sorted(path for path in _conversions().glob("[!.]*") if path.is_dir()):
        # Another process may have removed it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            sidecar = read_sidecar(folder)
            entries.append(
                {
                    "key": folder.name,
                    "file": sidecar.file if sidecar else None,
                    "quantisation": sidecar.quantisation if sidecar else None,
                    "bytes": sum(path.stat().st_size for path in folder.iterdir()),
                    "used": folder.stat().st_mtime,
                }
            )
    return entries


def clear_converted_models() -> int:
    """Remove every converted model.

    Returns:
        The number of bytes that this freed.
    """
    entries = list_converted_models()
    for entry in entries:
        shutil.rmtree(_conversions() / entry["key"], ignore_errors=True)
    return sum(entry["bytes"] for entry in entries)


def _evict(newest: Path) -> None:
    """Remove the least recently used conversions until they are within the cache's limit; the newest always stays."""
    entries = sorted(list_converted_models(), key=lambda entry: entry["used"])
    total, limit = sum(entry["bytes"] for entry in entries), cache_limit()
    for entry in entries:
        if total > limit and entry["key"] != newest.name and time.time() - entry["used"] > _IN_USE_SECONDS:
            shutil.rmtree(newest.parent / entry["key"], ignore_errors=True)
            total -= entry["bytes"]
