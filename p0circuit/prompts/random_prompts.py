"""Prompts of random tokens, without meaning: independent ones, or one token repeated."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from p0circuit.prompts.prompt_set import PromptSet, require_size, unpadded
from p0circuit.prompts.vocabulary import HasVocabulary, sampleable_tokens, sampleable_vocabulary_of


def random_tokens(
    vocabulary: int | HasVocabulary,
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    bos: int | None = None,
    special: Collection[int] = (),
) -> PromptSet:
    """Draw prompts of random tokens, uniformly and independently.

    Args:
        vocabulary: a model, whose special tokens are never drawn, or a vocabulary size.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the draw.
        bos: token id to prepend to every prompt; None for none.
        special: token ids that are never drawn, besides those of the model.

    Returns:
        The prompts, without padding.

    Raises:
        P0Error: `n` or `length` is too small, `bos` is outside the vocabulary, or no token is left to draw.
    """
    return _random_prompts("random_tokens", vocabulary, (n, length), length, seed, bos, special)


def repeated_token(
    vocabulary: int | HasVocabulary,
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    bos: int | None = None,
    special: Collection[int] = (),
) -> PromptSet:
    """Draw prompts that repeat one random token, each prompt its own.

    Args:
        vocabulary: a model, whose special tokens are never drawn, or a vocabulary size.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the draw.
        bos: token id to prepend to every prompt; None for none.
        special: token ids that are never drawn, besides those of the model.

    Returns:
        The prompts, without padding.

    Raises:
        P0Error: as `random_tokens`.
    """
    return _random_prompts("repeated_token", vocabulary, (n, 1), length, seed, bos, special)


def _random_prompts(
    builder: str,
    vocabulary: int | HasVocabulary,
    shape: tuple[int, int],
    length: int,
    seed: int,
    bos: int | None,
    special: Collection[int],
) -> PromptSet:
    """Tokens of this shape, drawn uniformly, then repeated along each prompt up to `length`."""
    require_size(shape[0], length)
    if isinstance(vocabulary, int):
        vocab_size = vocabulary
    else:
        vocab_size, own = sampleable_vocabulary_of(vocabulary.tokenizer, vocabulary.cfg.d_vocab)
        special = {*special, *own}
    tokens = np.random.default_rng(seed).choice(sampleable_tokens(vocab_size, bos, special), shape)
    ids = np.broadcast_to(tokens, (shape[0], length))
    description = {"builder": builder, "vocab_size": vocab_size, "n": len(ids), "length": length}
    prompts = unpadded(ids, description, seed)
    return prompts if bos is None else prompts.prepend(bos)
