"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
