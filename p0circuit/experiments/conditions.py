"""The prompts an experiment compares, all made from one set of natural text without BOS."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from p0circuit.models import StoredModel, describe
from p0circuit.prompts import PromptSet, natural_text, pooled, random_tokens, repeated_token, special_ids

WITHOUT_BOS, WITH_BOS, RANDOM_FIRST = "without BOS", "with BOS", "random first"
RANDOM_TOKENS, REPEATED_TOKEN = "random tokens", "repeated token"


def bos_id(model: Any) -> int | None:
    """The BOS token of the model's tokenizer; None where there is no tokenizer or it has none."""
    return getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def drawable(model: Any) -> tuple[int, Collection[int]]:
    """What random tokens are drawn from: the size of the vocabulary, and the special tokens to leave out."""
    return drawable_with(getattr(model, "tokenizer", None), describe(model).vocab_size)


def drawable_with(tokenizer: Any, vocab_size: int) -> tuple[int, Collection[int]]:
    """`drawable` for a tokenizer, None where there is none, and the size of the embedding."""
    if tokenizer is None:
        return vocab_size, ()
    # Many models have embeddings that no token of theirs leads to.
    return min(vocab_size, len(tokenizer)), special_ids(tokenizer)


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
    """Crops of a text (as `natural_text` names it), or random tokens for a model without a tokenizer.

    Tokenizer and size are all it takes: `model` may be one as it is stored, its weights unread.
    """
    if model.tokenizer is None:
        size = model.vocab_size if isinstance(model, StoredModel) else describe(model).vocab_size
        return random_tokens(size, n=n, length=length, seed=seed)
    return natural_text(model.tokenizer, text, n=n, length=length, seed=seed, first_token=first_token)


def readable_by_seeds(model: Any, text: str, n: int, length: int, seed: int = 0) -> PromptSet:
    """What a reproduction reads: as `readable`, drawn in equal parts by three seeds, the first of them `seed`."""
    shares = [share for share in (n - 2 * (n // 3), n // 3, n // 3) if share]
    return pooled([readable(model, text, share, length, seed + i) for i, share in enumerate(shares)])


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
