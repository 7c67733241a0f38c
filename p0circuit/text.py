"""Sources of text: Python files, text files, and data sets."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from p0circuit.errors import P0Error

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
"""Distributions whose Python files, together with the standard library, are the corpus of the shipped models."""
BOS_TOKEN, EOS_TOKEN = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
"""Ids of the two tokens, in the order in which `train_tokenizer` adds them."""
HELD_OUT_SHARE = 1 / 32
"""Share of the files that are not used for training."""
MAX_ROWS = 100_000
"""Number of rows that are read from a data set."""
MAX_FILE_BYTES = 200_000
"""Size limit of a corpus file; longer files are tables and generated code rather than text that a person wrote."""
# These directories differ from one build of Python to the next, or are missing.
_SKIPPED_DIRECTORIES = {
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
    """A text file with a name that is the same on every machine.

    Attributes:
        name: name of the file, independent of where it is installed.
        path: path of the file on this machine.
    """

    name: str
    path: Path

    @property
    def held_out(self) -> bool:
        """Whether the file is not used for training, decided by a hash of its name: about one file in 32."""
        return hashlib.sha256(self.name.encode()).digest()[0] < 256 * HELD_OUT_SHARE

    def text(self, max_characters: int = -1) -> str:
        """Read the text.

        Args:
            max_characters: number of characters to read; -1 for all.
        """
        with self.path.open(encoding="utf-8", errors="ignore") as file:
            return file.read(max_characters)


def standard_library_files() -> list[SourceFile]:
    """List the modules of the standard library of this Python, without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        # Changed in place, so that os.walk skips them: site-packages may hold many times as many files.
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    return [SourceFile(f"stdlib/{path.relative_to(root).as_posix()}", path) for path in sorted(files)]


def distribution_files(distribution: str) -> list[SourceFile]:
    """List the Python modules of an installed distribution, without its tests, in a fixed order.

    Args:
        distribution: name of the distribution, as in `pip install NAME`.

    Raises:
        P0Error: the distribution is not installed.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise P0Error(
            f"the corpus needs the source of {distribution!r}, which is not installed; "
            "install this package with its pinned dependencies (pip install -c constraints.txt -e .)"
        ) from None
    modules = [file for file in files if file.suffix == ".py" and not _SKIPPED_DIRECTORIES & set(file.parts[:-1])]
    return [SourceFile(str(file), Path(str(file.locate()))) for file in sorted(modules)]


def corpus_files() -> list[SourceFile]:
    """List every file of the corpus, for training and held out; files with the same content are listed once."""
    files = standard_library_files()
    for distribution in CORPUS_DISTRIBUTIONS:
        files += distribution_files(distribution)
    seen: set[bytes] = set()
    unique = []
    for file in files:
        if not 0 < file.path.stat().st_size <= MAX_FILE_BYTES:
            continue
        digest = hashlib.sha256(file.path.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            unique.append(file)
    return unique


def text_files(path: Path) -> list[SourceFile]:
    """List the text files of a path: the file itself, or every `.txt`, `.md` and `.py` file below a directory.

    Args:
        path: a text file or a directory.

    Raises:
        P0Error: there is no such file.
    """
    if path.is_file():
        return [SourceFile(path.name, path)]
    files = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md", ".py"})
    if not files:
        raise P0Error(f"no text at {str(path)!r}: expected a text file, or a directory holding .txt, .md or .py files")
    return [SourceFile(file.relative_to(path).as_posix(), file) for file in files]


@dataclass(frozen=True)
class TextInMemory(SourceFile):
    """A text without a file of its own, such as a row of a data set.

    Attributes:
        name: name of the text.
        path: the name of its source, as a path.
        content: the text.
    """

    content: str

    def text(self, max_characters: int = -1) -> str:
        """Return the text.

        Args:
            max_characters: number of characters to return; -1 for all.
        """
        return self.content if max_characters < 0 else self.content[:max_characters]


def dataset_rows(name: str, max_rows: int = MAX_ROWS) -> list[SourceFile]:
    """Read the first texts of the training split of a Hugging Face data set.

    Args:
        name: name of the data set on the hub, or a local directory.
        max_rows: number of rows to read.

    Returns:
        One text per row.

    Raises:
        P0Error: there is no such data set, or it has no column "text".
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise P0Error(f"no data set {name!r} on the hub, in its local cache or as a directory: {error}") from error
    texts: list[SourceFile] = []
    for number, row in enumerate(rows):
        if number == max_rows:
            break
        if "text" not in row:
            raise P0Error(f"the data set {name!r} has the columns {sorted(row)}; expected one named 'text'")
        texts.append(TextInMemory(f"{name}/{number}", Path(name), row["text"]))
    return texts
