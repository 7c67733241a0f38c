"""Sources of text: Python files, folders of text, and data sets."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p0circuit.errors import P0Error

if TYPE_CHECKING:
    pass


CORPUS_DISTRIBUTIONS = (
    "huggingface_hub",
    "Jinja2",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "Pygments",
    "rich",
    "sympy",
    "torch",
    "transformer-lens",
    "transformers",
)
BOS_TOKEN, EOS_TOKEN = "<|bos|>", "<|eos|>"
# The order in which `train_tokenizer` is given them.
BOS_ID, EOS_ID = 0, 1
HELD_OUT_SHARE = 1 / 32
MOST_ROWS = 100_000
# Longer files are tables and generated code rather than something a person wrote.
LONGEST_FILE = 200_000
# Where present at all, these folders differ from one build of Python to the next.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


@dataclass(frozen=True)
class SourceFile:
    """A text file with a name that is the same on every machine."""

    name: str
    path: Path

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training: decided by a hash of its name, about one file in 32."""
        return hashlib.sha256(self.name.encode()).digest()[0] < 256 * HELD_OUT_SHARE

    def text(self, most: int = -1) -> str:
        """The text, or its first `most` characters."""
        with self.path.open(encoding="utf-8", errors="ignore") as file:
            return file.read(most)


def standard_library_files() -> list[SourceFile]:
    """The modules of the running Python's standard library, tests left out, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, below, names in os.walk(root):
        # In place, so that they are not walked: below site-packages there may be many times as much.
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return [SourceFile(f"stdlib/{path.relative_to(root).as_posix()}", path) for path in sorted(files)]


def distribution_files(distribution: str) -> list[SourceFile]:
    """The Python modules of an installed distribution, tests left out, in a fixed order.

    Raises:
        P0Error: the distribution is not installed.
    """
    try:
        listed = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise P0Error(
            f"the corpus needs the source of {distribution!r}, which is not installed; "
            "install this package with its pinned dependencies (pip install -c constraints.txt -e .)"
        ) from None
    found = [file for file in listed if file.suffix == ".py" and not _SKIPPED_FOLDERS & set(file.parts[:-1])]
    return [SourceFile(str(file), Path(str(file.locate()))) for file in sorted(found)]


def corpus_files() -> list[SourceFile]:
    """Every file of the corpus, training and held-out alike; files of the same content appear once."""
    files = standard_library_files()
    for distribution in CORPUS_DISTRIBUTIONS:
        files += distribution_files(distribution)
    seen: set[bytes] = set()
    unique = []
    for file in files:
        if not 0 < file.path.stat().st_size <= LONGEST_FILE:
            continue
        digest = hashlib.sha256(file.path.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            unique.append(file)
    return unique


def text_files(path: Path) -> list[SourceFile]:
    """A corpus of the user's own: one text file, or every `.txt`, `.md` and `.py` file below a directory.

    Raises:
        P0Error: nothing is there.
    """
    if path.is_file():
        return [SourceFile(path.name, path)]
    found = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md", ".py"})
    if not found:
        raise P0Error(f"no text at {str(path)!r}: expected a text file, or a directory holding .txt, .md or .py files")
    return [SourceFile(file.relative_to(path).as_posix(), file) for file in found]


@dataclass(frozen=True)
class TextInMemory(SourceFile):
    """A text that has no file of its own, such as a row of a data set."""

    content: str

    def text(self, most: int = -1) -> str:
        return self.content if most < 0 else self.content[:most]


def dataset_rows(name: str, most: int = MOST_ROWS) -> list[SourceFile]:
    """The texts of a Hugging Face data set, on the hub or in a local folder: the first rows of its training split.

    Raises:
        P0Error: there is no such data set, or it has no column "text".
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise P0Error(f"no data set {name!r} on the hub, in its local cache or as a folder: {error}") from error
    found: list[SourceFile] = []
    for number, row in enumerate(rows):
        if number == most:
            break
        if "text" not in row:
            raise P0Error(f"the data set {name!r} has the columns {sorted(row)}; expected one named 'text'")
        found.append(TextInMemory(f"{name}/{number}", Path(name), row["text"]))
    return found
