"""Files: atomic writes, and the directories of the cache, of shipped data and of the repository."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from p0circuit.errors import P0Error


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file or directory under a temporary name, then rename it: other processes see all of it or nothing.

    Args:
        path: the final path; an existing file or directory is replaced.
        write: writes the content to the path it is given.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name has the same suffix, because some writers choose their format by it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp.{path.name}")
    try:
        write(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: object) -> Path:
    """Write JSON atomically.

    Args:
        path: the path of the file.
        value: what to write; it must be JSON.

    Returns:
        `path`.
    """
    return write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


DEFAULT_LIMIT = 2 * 2**30
"""Size limit of the cache in bytes."""


def cache_directory() -> Path:
    """Return the directory of the cache: `$P0CIRCUIT_CACHE`, else `p0circuit` in the user's cache directory.

    The path is absolute: pip, which downloads models into it, runs in another working directory.
    """
    if directory := os.environ.get("P0CIRCUIT_CACHE"):
        return Path(directory).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "p0circuit"


def cache_limit() -> int:
    """Return the size limit of the cache in bytes: `$P0CIRCUIT_CACHE_LIMIT`, else 2 GiB.

    Raises:
        P0Error: the variable is not a whole number.
    """
    limit = os.environ.get("P0CIRCUIT_CACHE_LIMIT", str(DEFAULT_LIMIT))
    if not limit.isdecimal():
        raise P0Error(f"P0CIRCUIT_CACHE_LIMIT={limit!r} is not a whole number of bytes, as in {DEFAULT_LIMIT}")
    return int(limit)


def data_dir() -> Path:
    """Return the directory of shipped data: `p0circuit/data` in an installed wheel, else the repository's `data/`."""
    package = Path(__file__).resolve().parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "data"


def repository() -> Path:
    """Return the root of the repository that this package is imported from.

    Raises:
        P0Error: the package is installed without its repository.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks").is_dir():
        raise P0Error(f"this needs a checkout of the repository, and there is none around {root}")
    return root


@functools.cache
def code_fingerprint() -> str:
    """Hash the source of the package, as a part of cache keys: results of other code are never reused."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        # In an installed package the shipped data, with Python files among the prompts, are in this directory too.
        if name.parts[0] != "data":
            digest.update(f"{name.as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()
