"""Files: written whole or not at all, and where those of the package and of the cache are."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p0circuit.errors import P0Error


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file or directory beside `path`, then move it into place; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: some writers choose their format by it.
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


def write_json(path: Path, value: Any) -> Path:
    """Write JSON, whole or not at all."""
    return write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


DEFAULT_LIMIT = 2 * 2**30


def cache_directory() -> Path:
    """`$P0CIRCUIT_CACHE`, else `p0circuit` in the user's cache folder."""
    if named := os.environ.get("P0CIRCUIT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "p0circuit"


def cache_limit() -> int:
    """`$P0CIRCUIT_CACHE_LIMIT` in bytes, else 2 GiB.

    Raises:
        P0Error: the variable is not a whole number.
    """
    named = os.environ.get("P0CIRCUIT_CACHE_LIMIT", str(DEFAULT_LIMIT))
    if not named.isdecimal():
        raise P0Error(f"P0CIRCUIT_CACHE_LIMIT={named!r} is not a whole number of bytes, as in {DEFAULT_LIMIT}")
    return int(named)


def data_dir() -> Path:
    """The folder of shipped data: `p0circuit/data` in an installed wheel, else the repository's `data/`."""
    package = Path(__file__).resolve().parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "data"


def repository() -> Path:
    """The checkout this package is run from.

    Raises:
        P0Error: the package is installed without one.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks").is_dir():
        raise P0Error(f"this needs a checkout of the repository, and there is none around {root}")
    return root


@functools.cache
def code_fingerprint() -> str:
    """A hash of the package's own source: part of every cache key, so results of another version of the code are never
    reused."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        # An installed package carries its data inside, among them Python files as prompts.
        if name.parts[0] != "data":
            digest.update(f"{name.as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()
