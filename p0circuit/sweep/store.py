"""The directory of a sweep's results, on any file system that fsspec knows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p0circuit.errors import P0Error
from p0circuit.io import write_atomically
from p0circuit.sweep.tasks import Task


@dataclass(frozen=True)
class StoredOutcome:
    """What an earlier sweep has stored of a task.

    Attributes:
        key: hash of everything that decided the result (`reproduction.result_key`).
        reason: why the experiment was not applicable; None for a result.
    """

    key: str
    reason: str | None = None

    def to_bytes(self) -> bytes:
        """Return the content of its file, where the reason is named "why"."""
        return (json.dumps({"key": self.key, "why": self.reason}, indent=2) + "\n").encode()


def left_out_path(task: Task) -> str:
    """Return the path, below the task's folder, of the file that says why it was not applicable.

    Args:
        task: a task of the sweep.
    """
    return f"left-out/{task.experiment.id}.json"


class ResultStore:
    """The directory of a sweep's results."""

    def __init__(self, out: str | Path) -> None:
        """Open a directory.

        Args:
            out: a directory, or a path with a protocol such as s3://bucket/sweep.

        Raises:
            P0Error: the package for this protocol is not installed.
        """
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        try:
            self.system, self.root = url_to_fs(str(out))
        except ImportError as error:
            raise P0Error(f"results cannot go to {str(out)!r}: {error}") from None
        self.local = isinstance(self.system, LocalFileSystem)

    def read(self, task: Task) -> StoredOutcome | None:
        """Return what is stored of a task; None if nothing is, or not all of its files are there.

        Args:
            task: a task of the sweep.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = self._read_json(f"{task.folder}/{task.experiment.id}.json")
            files = [f"tables/{task.experiment.id}-{name}.csv" for name in summary["tables"]]
            files += [f"figures/{task.experiment.id}-{name}.png" for name in summary["figures"]]
            if all(self.system.exists(f"{self.root}/{task.folder}/{path}") for path in files):
                return StoredOutcome(summary["provenance"]["key"])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            left_out = self._read_json(f"{task.folder}/{left_out_path(task)}")
            return StoredOutcome(left_out["key"], left_out["why"])
        return None

    def write(self, task: Task, files: Mapping[str, bytes]) -> None:
        """Write the files of a task; the summary, which declares them complete, is written last.

        Args:
            task: the task.
            files: contents by path below the task's folder.
        """
        last = f"{task.experiment.id}.json"
        # The summary of an earlier sweep would declare files complete that are still being written.
        for path in (last, left_out_path(task)):
            with contextlib.suppress(FileNotFoundError):
                self.system.rm_file(f"{self.root}/{task.folder}/{path}")
        for path in sorted(files, key=lambda path: (path == last, path)):
            self.write_file(f"{task.folder}/{path}", files[path])

    def write_file(self, path: str, content: bytes) -> None:
        """Write one file, as a whole or not at all.

        Args:
            path: path below the directory.
            content: content of the file.
        """
        full_path = f"{self.root}/{path}"
        if self.local:
            write_atomically(Path(full_path), lambda temporary: temporary.write_bytes(content))
        else:
            # Object stores show a file only when it is complete.
            self.system.makedirs(full_path.rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(full_path, content)

    def _read_json(self, path: str) -> dict[str, Any]:
        return json.loads(self.system.cat_file(f"{self.root}/{path}"))
