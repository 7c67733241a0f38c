"""The corpus of a training run: from text files to a tokenizer and to streams of token ids.

1. Files: by default the Python source of the standard library and of the packages in `text.CORPUS_DISTRIBUTIONS`, all
   of them pinned in constraints.txt.
2. Split: a hash of a file's path decides whether the file is held out, so no list is needed and no file is in both
   parts.
3. Tokenizer: byte-level BPE, trained on a sample of the training files.
4. Token stream: the files one after another, tokenized, with an end-of-text token after each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from p0circuit.errors import P0Error
from p0circuit.io import write_atomically
from p0circuit.text import BOS_TOKEN, EOS_TOKEN, SourceFile, corpus_files, dataset_rows, text_files
from p0circuit.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: the texts to train on.
        vocab_size: number of tokens, special ones included.

    Returns:
        The tokenizer; id 0 is BOS and id 1 separates documents.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN)


def tokenizer_sample(files: Sequence[SourceFile], every: int = 16) -> Iterator[str]:
    """Return the text of every `every`-th file: enough for a small vocabulary, and fast.

    Args:
        files: source files of the corpus.
        every: distance between two files of the sample.
    """
    return (file.text() for file in files[::every])


def token_stream(files: Iterable[SourceFile], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Tokenize files into one array, with an end-of-text token after each file.

    Args:
        files: the files, in the order of the stream.
        tokenizer: a tokenizer with an end-of-text token.

    Returns:
        Token ids [token], uint16, or uint32 for a vocabulary of more than 65,536 tokens.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces = []
    for file in files:
        ids = tokenizer.backend_tokenizer.encode(file.text(), add_special_tokens=False).ids
        pieces.append(np.array([*ids, tokenizer.eos_token_id], dtype=dtype))
    return np.concatenate(pieces) if pieces else np.array([], dtype=dtype)


def prepare_corpus(config: TrainConfig, out: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Make the tokenizer and the token streams of a run, or read them if an earlier call has made them.

    Args:
        config: names the corpus and the size of the vocabulary.
        out: directory of the run; tokenizer and streams are stored in its folder `work`.

    Returns:
        The tokenizer, the training stream [token] and the held-out stream [token]. Where no file, or every file, is
        held out, both streams are of all files.

    Raises:
        P0Error: the corpus has no files, or too few tokens for one row.
    """
    from transformers import PreTrainedTokenizerFast

    work = out / "work"
    kind, _, dataset = config.corpus.partition("hub:")
    if config.corpus == "python":
        files = corpus_files()
    elif dataset and not kind:
        files = dataset_rows(dataset)
    else:
        files = text_files(Path(config.corpus))
    training = [file for file in files if not file.held_out] or files
    held_out = [file for file in files if file.held_out] or files
    if not (work / "tokenizer").exists():
        tokenizer = train_tokenizer(tokenizer_sample(training), config.vocab_size)
        write_atomically(work / "tokenizer", lambda path: tokenizer.save_pretrained(path) and None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    streams = []
    for name, part in (("training", training), ("held_out", held_out)):
        path = work / f"{name}.npy"
        if not path.exists():
            _write_array(path, token_stream(part, tokenizer))
        streams.append(np.load(path, mmap_mode="r"))
        if len(streams[-1]) <= config.length:
            raise P0Error(
                f"the {name} files of corpus {config.corpus!r} hold {len(streams[-1])} tokens; "
                f"expected more than one row of {config.length}"
            )
    return tokenizer, streams[0], streams[1]


def _write_array(path: Path, values: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, values)

    write_atomically(path, write)
