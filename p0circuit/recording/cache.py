"""Tensors on disk, addressed by what they were computed from.

1. The key is a hash of everything that decides the value; the file is `<key>.safetensors`, with a checksum inside.
2. Writing goes to a temporary file that is renamed into place: another process sees all of it or nothing.
3. Reading marks the file as used; when the folder outgrows its limit, the files unused for longest go first.
4. A file that does not read back or whose checksum is wrong is reported, removed and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.io import cache_directory, cache_limit, write_atomically

# A temporary file this old was left by a process that died.
_STALE_SECONDS = 3600


def key_of(parts: dict[str, Any]) -> str:
    """The address of a value computed from `parts` (which must be JSON)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def checksum(tensor: Tensor) -> str:
    """A hash of the values of a tensor, its dtype and its shape."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    # A view as bytes, since numpy knows no bfloat16.
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of tensors with a size limit in bytes; safe to share between processes."""

    directory: Path = field(default_factory=cache_directory)
    limit: int = field(default_factory=cache_limit)

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """The tensor under `key`; None where there is none, or where the file was damaged (said in a warning)."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        try:
            # In one piece: a reader that opens the file twice may find it gone, or another one, the second time.
            content = path.read_bytes()
            tensor, header = load(content)["value"], content[8 : 8 + int.from_bytes(content[:8], "little")]
            if checksum(tensor) != json.loads(header)["__metadata__"]["checksum"]:
                raise P0Error("the checksum does not match")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            warnings.warn(f"the cached file {path.name} is damaged ({error}); it is computed again", stacklevel=2)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        # Evicted meanwhile, or a folder that may only be read: the value is right all the same.
        with contextlib.suppress(OSError):
            os.utime(path)
        return tensor

    def write(self, key: str, tensor: Tensor, about: dict[str, Any]) -> None:
        """Keep `tensor` under `key`; `about` is shown by `p0circuit cache` and decides nothing.

        Where the folder cannot be written to, that is said in a warning: the work goes on without it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        metadata = {"checksum": checksum(tensor), "about": json.dumps(about, sort_keys=True)}
        value = {"value": tensor.detach().cpu().contiguous()}
        try:
            write_atomically(self.path(key), lambda path: save_file(value, path, metadata=metadata))
            self.evict()
        except (SafetensorError, OSError) as error:
            warnings.warn(f"nothing is kept in the cache {str(self.directory)!r}: {error}", stacklevel=2)

    def evict(self) -> None:
        """Remove the least recently used files until the folder is within its limit."""
        entries = self.entries()
        total = sum(entry["bytes"] for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry["used"]):
            if total <= self.limit:
                break
            self.path(entry["key"]).unlink(missing_ok=True)
            total -= entry["bytes"]
        for leftover in self.directory.glob(".*.tmp.*"):
            # Another process may be faster.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    leftover.unlink()

    def entries(self) -> list[dict[str, Any]]:
        """Every finished file: key, size in bytes and when it was last used (seconds since the epoch)."""
        found = []
        for path in sorted(self.directory.glob("[!.]*.safetensors")):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicted it meanwhile
                continue
            found.append({"key": path.stem, "bytes": status.st_size, "used": status.st_mtime})
        return found

    def about(self, key: str) -> dict[str, Any]:
        """What `write` was told of the file under `key`; empty where it cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                return json.loads((file.metadata() or {}).get("about", "{}"))
        # What is gone by the time it is opened is a RuntimeError to its reader.
        except (SafetensorError, OSError, RuntimeError, ValueError):
            return {}

    def clear(self) -> int:
        """Remove every file; returns how many bytes that freed."""
        entries = self.entries()
        for entry in entries:
            self.path(entry["key"]).unlink(missing_ok=True)
        return sum(entry["bytes"] for entry in entries)
