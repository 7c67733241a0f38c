"""The tokens of a model that random prompts may use."""

from __future__ import annotations

from collections.abc import Collection

from p0circuit.hooked_model import HookedModel
from p0circuit.models.info import describe
from p0circuit.prompts import sampleable_vocabulary_of


def sampleable_vocabulary(model: HookedModel) -> tuple[int, Collection[int]]:
    """Return the vocabulary that random tokens are sampled from.

    Args:
        model: with or without a tokenizer.

    Returns:
        The number of token ids, and the ids of special tokens, which are left out.
    """
    return sampleable_vocabulary_of(getattr(model, "tokenizer", None), describe(model).vocab_size)
