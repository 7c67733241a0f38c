"""Where the files that come with the package lie."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def data_dir() -> Path:
    """The folder of shipped data: `p0circuit/data` in an installed wheel, else the repository's `data/`."""
    package = Path(__file__).resolve().parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "data"


def repository() -> Path:
    """The checkout this package is run from.

    Raises:
        ValueError: the package is installed without one.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks").is_dir():
        raise ValueError(f"this needs a checkout of the repository, and there is none around {root}")
    return root


@functools.cache
def code_fingerprint() -> str:
    """A hash of the package's own source: what was kept by other code is not taken for what this code would give."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        # An installed package carries its data inside, among them Python files as prompts.
        if name.parts[0] != "data":
            digest.update(f"{name.as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()
