"""Prompts from text that people wrote.

1. A text is cut into prompts of exactly `length` tokens, spread evenly over its files: without overlap while there is
   enough text, else with as little overlap as possible, and never from one file into the next.
2. If a first token is asked for, it is prepended and the last token is dropped. With the same seed the text of the
   prompts is the same whatever their first token, so that prompts with and without BOS make pairs. The tokenizer adds
   no special tokens: only `first_token` decides whether a prompt begins with BOS.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.io import data_dir
from p0circuit.prompts.prompt_set import PromptSet, require_size, unpadded
from p0circuit.prompts.vocabulary import HasTokenizer, sampleable_tokens, special_ids
from p0circuit.text import SourceFile, TextInMemory, standard_library_files, text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED_TEXTS = ("english", "code")
"""Texts that come with this package."""
PYTHON_TEXTS = ("docs", "stdlib")
"""Texts that come with Python itself, and differ between its versions."""
NAMED_TEXTS = (*SHIPPED_TEXTS, *PYTHON_TEXTS)
MAX_CHARACTERS = 16_000_000
"""Number of characters that are read of a text: more than any experiment needs, but a bound on time and memory."""


def natural_text(
    model: HasTokenizer,
    source: str | Path = "english",
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    first_token: str | int = "text",
) -> PromptSet:
    """Cut prompts from text that people wrote.

    Args:
        model: anything with a `tokenizer`, such as what `load_model` returns.
        source: "english" or "code" (shipped), "docs" (the language reference that comes with Python, English prose),
            "stdlib" (modules of the standard library that the shipped models were not trained on, without tables of
            character codes), a text file, or a directory of .txt, .md and .py files.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the random choice of prompts.
        first_token: the token at position 0: "text" (the text as it is), "bos", "random" (drawn uniformly from all
            tokens that are not special) or a token id.

    Returns:
        The prompts, without padding. They overlap only if the text is too short for `n` separate ones.

    Raises:
        P0Error: there is no tokenizer, no such text or too little of it, no BOS, or `n` or `length` is too small.

    Example:
        model = p0circuit.load_model("p0-nano")
        prompts = p0circuit.natural_text(model, "english", n=8, length=32)
        prompts.ids.shape  # [8, 32]
    """
    if model.tokenizer is None:
        raise P0Error("text needs a tokenizer and this model has none; give token ids instead: prompts.from_ids(ids)")
    return tokenized_text(model.tokenizer, source, n, length, seed, first_token)


def tokenized_text(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path = "english",
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    first_token: str | int = "text",
) -> PromptSet:
    """Cut prompts from text as `natural_text` does, given only a tokenizer.

    Args:
        tokenizer: a tokenizer of `transformers`.
        source: name of a text, a text file or a directory.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the random choice of prompts.
        first_token: the token at position 0.

    Returns:
        The prompts, without padding.

    Raises:
        P0Error: as `natural_text`.
    """
    require_size(n, length)
    rng = np.random.default_rng(seed)
    files = _source_files(source)
    documents = [document for document in _documents(tokenizer, files, rng) if len(document)]
    text_tokens = sum(map(len, documents))
    stride = _largest_stride([len(document) for document in documents], n, length)
    if not stride:
        raise P0Error(
            f"too little text in {str(source)!r}: {text_tokens} tokens in {len(files)} files, the longest of "
            f"{max(map(len, documents), default=0)}; {n} crops of {length} need {n * length} tokens in files of at "
            f"least {length}, or {n + length - 1} in one file if they may overlap; give more text, or ask for less"
        )
    crops = np.array([crop for document in documents for crop in _crops(document, length, stride, rng)])
    description = {
        "builder": "natural_text",
        "source": str(source),
        "first_token": first_token,
        "n": n,
        "length": length,
        "text_files": len(documents),
        "text_tokens": text_tokens,
        "new_tokens_per_crop": stride,
    }
    if source in PYTHON_TEXTS:
        description["python"] = platform.python_version()
    prompts = unpadded(rng.permutation(crops)[:n], description, seed)
    if first_token == "text":
        return prompts
    # `first_token` is in the description already; "behind" is for tokens that are prepended later.
    return replace(prompts.prepend(_first_tokens(tokenizer, first_token, n, rng)), description=description)


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, first_token: str | int, n: int, rng: np.random.Generator
) -> int | Int[Tensor, " batch"]:
    vocab_size = len(tokenizer)
    if first_token == "random":
        return torch.from_numpy(rng.choice(sampleable_tokens(vocab_size, None, special_ids(tokenizer)), n))
    if first_token == "bos":
        bos = tokenizer.bos_token_id
        if not isinstance(bos, int):
            raise P0Error("this tokenizer has no BOS token; give the id of the token to use: first_token=<id>")
        return bos
    if isinstance(first_token, int) and 0 <= first_token < vocab_size:
        return first_token
    raise P0Error(f"first_token must be 'text', 'bos', 'random' or a token id below {vocab_size}, got {first_token!r}")


def _source_files(source: str | Path) -> list[SourceFile]:
    if source == "stdlib":
        # Tables of character codes would be two fifths of it.
        return [file for file in standard_library_files() if file.held_out and "/encodings/" not in file.name]
    if source == "docs":
        return _language_reference()
    if source in SHIPPED_TEXTS:
        return [SourceFile(path.name, path) for path in sorted((data_dir() / "prompts" / source).iterdir())]
    if not Path(source).exists():
        raise P0Error(
            f"no text at {str(source)!r}: expected a text file, a directory, or one of "
            + ", ".join(map(repr, NAMED_TEXTS))
        )
    return text_files(Path(source))


def _language_reference() -> list[SourceFile]:
    """The text of `help("topics")`, one document per topic; every complete installation of Python has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise P0Error(
            "this Python comes without its language reference (the module pydoc_data), which the text 'docs' is; "
            "use 'english', or a text file"
        ) from None
    return [TextInMemory(f"docs/{name}", Path(name), topics[name]) for name in sorted(topics)]


def _documents(
    tokenizer: PreTrainedTokenizerBase, files: list[SourceFile], rng: np.random.Generator
) -> Iterator[list[int]]:
    """The tokens of each file; in random order, so that the limit on characters favours no file."""
    allowance = MAX_CHARACTERS
    for number in rng.permutation(len(files)):
        text = files[number].text(allowance)
        allowance -= len(text)
        # Text that looks like a special token is read as text.
        yield tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if not allowance:
            return


def _largest_stride(lengths: list[int], n: int, length: int) -> int:
    """The largest step from crop to crop, at most `length`, that gives `n` crops; 0 if a step of 1 gives fewer."""
    rooms = [tokens - length for tokens in lengths if tokens >= length]
    return next((step for step in range(length, 0, -1) if sum(room // step + 1 for room in rooms) >= n), 0)


def _crops(document: list[int], length: int, stride: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """As many crops as fit, `stride` tokens apart; the position of the first one is random."""
    room = len(document) - length
    if room >= 0:
        for start in range(rng.integers(room % stride, endpoint=True), room + 1, stride):
            yield document[start : start + length]
