"""The corpus of the shipped models: Python source that every installation of this package already has.

1. The files: the standard library and the packages in `CORPUS_DISTRIBUTIONS` (all of them pinned in constraints.txt).
2. The split: a file is held out when a hash of its path says so; no list to keep, and no file can be on both sides.
3. The tokenizer: byte-level BPE trained on a sample of the training files.
4. The token stream: every file, tokenized, one after another with an end-of-text token between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
from p0circuit.text import BOS_TOKEN, EOS_TOKEN, SourceFile


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens; id 0 is BOS and id 1 separates documents."""
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


def tokenizer_sample(files: list[SourceFile], every: int = 16) -> Iterator[str]:
    """The text of every 16th file: enough for a small vocabulary, and quick."""
    return (file.text() for file in files[::every])


def token_stream(files: Iterable[SourceFile], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All files as one array of token ids (uint16, or uint32 for large vocabularies), an EOS after each."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces = []
    for file in files:
        ids = tokenizer.backend_tokenizer.encode(file.text(), add_special_tokens=False).ids
        pieces.append(np.array([*ids, tokenizer.eos_token_id], dtype=dtype))
    return np.concatenate(pieces) if pieces else np.array([], dtype=dtype)
