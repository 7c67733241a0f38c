"""Prompts: what models read. Every set of prompts has a description, a seed and a fingerprint by which it is cached."""

from __future__ import annotations

from p0circuit.prompts.conditions import (
    RANDOM_FIRST,
    RANDOM_TOKENS,
    REPEATED_TOKEN,
    SOME_BOS,
    TWO_BOS,
    WITH_BOS,
    WITHOUT_BOS,
    condition_of,
)
from p0circuit.prompts.prompt_set import PromptSet, from_ids, pool
from p0circuit.prompts.random_prompts import random_tokens, repeated_token
from p0circuit.prompts.text_prompts import NAMED_TEXTS, PYTHON_TEXTS, SHIPPED_TEXTS, natural_text, tokenized_text
from p0circuit.prompts.vocabulary import HasTokenizer, HasVocabulary, bos_id, sampleable_vocabulary_of, special_ids

__all__ = [
    "NAMED_TEXTS",
    "PYTHON_TEXTS",
    "RANDOM_FIRST",
    "RANDOM_TOKENS",
    "REPEATED_TOKEN",
    "SHIPPED_TEXTS",
    "SOME_BOS",
    "TWO_BOS",
    "WITHOUT_BOS",
    "WITH_BOS",
    "HasTokenizer",
    "HasVocabulary",
    "PromptSet",
    "bos_id",
    "condition_of",
    "from_ids",
    "natural_text",
    "pool",
    "random_tokens",
    "repeated_token",
    "sampleable_vocabulary_of",
    "special_ids",
    "tokenized_text",
]
