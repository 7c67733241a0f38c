"""The vocabulary of a model: its special tokens, and the tokens that random prompts are drawn from."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from p0circuit.errors import P0Error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class HasTokenizer(Protocol):
    """A model as far as natural text needs it: anything with a tokenizer of `transformers`, or None in its place."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that made the text the model was trained on."""
        ...


@runtime_checkable
class HasVocabularySize(Protocol):
    """TransformerLens's configuration as far as random tokens need it."""

    @property
    def d_vocab(self) -> int:
        """Number of embeddings."""
        ...


@runtime_checkable
class HasVocabulary(HasTokenizer, Protocol):
    """A model as far as random tokens need it: a tokenizer, and a configuration with the size of the embedding."""

    @property
    def cfg(self) -> HasVocabularySize:
        """TransformerLens's configuration."""
        ...


def bos_id(model: object) -> int | None:
    """Return the id of BOS in the model's tokenizer; None if there is no tokenizer or it has no BOS.

    Args:
        model: anything that may have a `tokenizer`.
    """
    return getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of tokens that are not text: BOS, EOS, padding, and whatever else the tokenizer marks as special.

    Args:
        tokenizer: a tokenizer of `transformers`.
    """
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def sampleable_vocabulary_of(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> tuple[int, Collection[int]]:
    """Return which tokens random prompts may be drawn from, as `models.info.sampleable_vocabulary` does for a model.

    Args:
        tokenizer: the model's tokenizer, if it has one.
        vocab_size: number of embeddings.

    Returns:
        The number of tokens, and the ids of special tokens that must not be drawn.
    """
    if tokenizer is None:
        return vocab_size, ()
    # Many models have more embeddings than their tokenizer has tokens.
    return min(vocab_size, len(tokenizer)), special_ids(tokenizer)


def sampleable_tokens(vocab_size: int, bos: int | None, special: Collection[int]) -> Int[np.ndarray, " tokens"]:
    """List the token ids of a vocabulary that are neither special nor BOS.

    Args:
        vocab_size: number of tokens.
        bos: id of BOS; None if there is none.
        special: ids of special tokens.

    Raises:
        P0Error: BOS is outside the vocabulary, or no token is left.
    """
    if bos is not None and not 0 <= bos < vocab_size:
        raise P0Error(f"BOS {bos} is outside the vocabulary of {vocab_size} tokens")
    tokens = np.setdiff1d(np.arange(vocab_size), [*special, *([] if bos is None else [bos])])
    if not len(tokens):
        raise P0Error(f"no token is left to draw from a vocabulary of {vocab_size} without the special tokens")
    return tokens
