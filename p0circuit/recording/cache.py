"""Tensors on disk, addressed by what they were computed from.

1. The key is a hash of everything that decides the value. The file is `<key>.safetensors`, with a checksum inside.
2. A file is written under a temporary name and then renamed: another process sees all of it or nothing.
3. Reading marks a file as used. If the directory exceeds its limit, the least recently used files are removed first.
4. A file that cannot be read, or has a wrong checksum, is removed with a warning and computed again.
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

# A temporary file of this age belongs to a process that was killed.
_STALE_SECONDS = 3600


def key_of(parts: dict[str, Any]) -> str:
    """Hash everything that decides a value to the key it is stored under.

    Args:
        parts: what decides the value; it must be JSON.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def checksum(tensor: Tensor) -> str:
    """Hash the values, dtype and shape of a tensor.

    Args:
        tensor: any tensor, on any device.
    """
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    # A view as bytes, since numpy knows no bfloat16.
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """A directory of tensors with a size limit; processes may share it.

    Attributes:
        directory: the directory; it is created when something is written.
        limit: size limit in bytes.
    """

    directory: Path = field(default_factory=cache_directory)
    limit: int = field(default_factory=cache_limit)

    def path(self, key: str) -> Path:
        """Return the path of the file of a key.

        Args:
            key: as `key_of` returns it.
        """
        return self.directory / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """Read a tensor.

        Args:
            key: as `key_of` returns it.

        Returns:
            The tensor; None if there is none, or if its file was damaged, which gives a warning.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        try:
            # Read at once: between two opens another process may remove or replace the file.
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
        # The file may have been removed meanwhile, or the directory may be read-only; the value is correct anyway.
        with contextlib.suppress(OSError):
            os.utime(path)
        return tensor

    def write(self, key: str, tensor: Tensor, about: dict[str, Any]) -> None:
        """Store a tensor. If the directory cannot be written to, this only gives a warning.

        Args:
            key: as `key_of` returns it.
            tensor: what to store.
            about: description that `p0circuit cache` shows; not part of the key.
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
        """Remove the least recently used files until the directory is within its limit."""
        entries = self.entries()
        total = sum(entry["bytes"] for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry["used"]):
            if total <= self.limit:
                break
            self.path(entry["key"]).unlink(missing_ok=True)
            total -= entry["bytes"]
        for leftover in self.directory.glob(".*.tmp.*"):
            # Another process may have removed it.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    leftover.unlink()

    def entries(self) -> list[dict[str, Any]]:
        """List the stored tensors: "key", "bytes" and "used", the time of the last use in seconds since the epoch."""
        entries = []
        for path in sorted(self.directory.glob("[!.]*.safetensors")):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it meanwhile
                continue
            entries.append({"key": path.stem, "bytes": status.st_size, "used": status.st_mtime})
        return entries

    def about(self, key: str) -> dict[str, Any]:
        """Return the description that `write` stored with a tensor; empty if it cannot be read.

        Args:
            key: as `key_of` returns it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                return json.loads((file.metadata() or {}).get("about", "{}"))
        # safetensors raises RuntimeError if the file is removed before it is opened.
        except (SafetensorError, OSError, RuntimeError, ValueError):
            return {}

    def clear(self) -> int:
        """Remove all tensors.

        Returns:
            The number of bytes freed.
        """
        entries = self.entries()
        for entry in entries:
            self.path(entry["key"]).unlink(missing_ok=True)
        return sum(entry["bytes"] for entry in entries)
