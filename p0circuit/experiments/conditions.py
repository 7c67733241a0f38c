"""The prompts an experiment compares, all made from one set of natural text without BOS."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from p0circuit.models import describe
from p0circuit.prompts import PromptSet, natural_text, random_tokens, repeated_token, special_ids

WITHOUT_BOS, WITH_BOS, RANDOM_FIRST = "without BOS", "with BOS", "random first"
RANDOM_TOKENS, REPEATED_TOKEN = "random tokens", "repeated token"


def bos_id(model: Any) -> int | None:
    """The BOS token of the model's tokenizer; None where there is no tokenizer or it has none."""
    return getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def drawable(model: Any) -> tuple[int, Collection[int]]:
    """What random tokens are drawn from: the size of the vocabulary, and the special tokens to leave out."""
    tokenizer, size = getattr(model, "tokenizer", None), describe(model).vocab_size
    if tokenizer is None:
        return size, ()
    # Many models have embeddings that no token of theirs leads to.
    return min(size, len(tokenizer)), special_ids(tokenizer)


def conditions(model: Any, prompts: PromptSet) -> dict[str, PromptSet]:
    """The same text as it is, behind BOS and behind a random token; random tokens; one repeated token.

    A model without a BOS token has no condition "with BOS". All have the number of rows and the length of `prompts`.
    """
    size, special = drawable(model)
    # Another seed than that of the prompts, which may be random tokens themselves.
    seed = prompts.seed + 1
    drawn = random_tokens(size, prompts.n, prompts.length, seed, special=special)
    made = {WITHOUT_BOS: prompts}
    if (bos := bos_id(model)) is not None:
        made[WITH_BOS] = prompts.behind(bos)
    made[RANDOM_FIRST] = prompts.behind(drawn.ids[:, 0])
    made[RANDOM_TOKENS] = drawn
    made[REPEATED_TOKEN] = repeated_token(size, prompts.n, prompts.length, seed, special=special)
    return made


def readable(model: Any, text: str, n: int, length: int, seed: int = 0, first_token: str | int = "text") -> PromptSet:
    """Crops of a text (as `natural_text` names it), or random tokens for a model without a tokenizer."""
    if model.tokenizer is None:
        return random_tokens(describe(model).vocab_size, n=n, length=length, seed=seed)
    return natural_text(model.tokenizer, text, n=n, length=length, seed=seed, first_token=first_token)


def text_like(model: Any, prompts: PromptSet, length: int, count: int) -> PromptSet:
    """New text of another length from the source of the prompts, behind the same first token; else random tokens.

    Raises:
        ValueError: there is too little text of this length.
    """
    about = prompts.description
    if about.get("builder") == "natural_text" and model.tokenizer is not None:
        first = about.get("first_token", "text")
        text = natural_text(model.tokenizer, about["source"], count, length, prompts.seed, first)
    else:
        size, special = drawable(model)
        text = random_tokens(size, count, length, prompts.seed, special=special)
    return text.behind(about["behind"]) if isinstance(about.get("behind"), int) else text
