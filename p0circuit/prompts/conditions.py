"""Conditions: what a prompt begins with, by the names that results use."""

from __future__ import annotations

from p0circuit.prompts.prompt_set import PromptSet
from p0circuit.prompts.vocabulary import bos_id

WITHOUT_BOS, WITH_BOS, RANDOM_FIRST = "without BOS", "with BOS", "random first"
RANDOM_TOKENS, REPEATED_TOKEN = "random tokens", "repeated token"
TWO_BOS, SOME_BOS = "with two BOS or more", "with BOS in some rows only"


def condition_of(model: object, prompts: PromptSet) -> str:
    """Return what the prompts begin with: WITHOUT_BOS, WITH_BOS, TWO_BOS or SOME_BOS.

    Args:
        model: the model whose tokenizer defines BOS.
        prompts: the prompts.
    """
    bos = bos_id(model)
    if bos is None:
        return WITHOUT_BOS
    counts = prompts.count_leading(bos)
    if not bool(counts.any()):
        return WITHOUT_BOS
    if not bool(counts.all()):
        return SOME_BOS
    return WITH_BOS if bool((counts == 1).all()) else TWO_BOS
