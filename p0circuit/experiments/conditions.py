"""The prompts an experiment compares: the same text with and without BOS, whichever of the two it is given.

1. *BOS* is the token that the model's tokenizer names, whatever its id: 0 is an id like any other.
2. Rows are distinguished by their first tokens: no BOS, one, two or more, or BOS in some rows only.
3. *Text as it is* is the row without the BOS tokens at its beginning; *after BOS* is that text with one BOS before it.
   `PromptSet.prepend` moves the last token of each row into `overflow`, from which `without_first` restores it. So both
   conditions are the same whichever of them an experiment is given.
"""

from __future__ import annotations

from dataclasses import replace

from p0circuit.experiments.base import NotApplicable
from p0circuit.hooked_model import HookedModel
from p0circuit.models import StoredModel, describe
from p0circuit.models.catalog import named_model
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import (
    RANDOM_FIRST,
    RANDOM_TOKENS,
    REPEATED_TOKEN,
    WITH_BOS,
    WITHOUT_BOS,
    PromptSet,
    bos_id,
    condition_of,
    natural_text,
    pool,
    random_tokens,
    repeated_token,
)
from p0circuit.text import BOS_ID, BOS_TOKEN


def text_as_it_is(model: HookedModel, prompts: PromptSet) -> PromptSet:
    """Return the text without BOS at its beginning; the prompts themselves if they have none.

    Args:
        model: the model, for its BOS token.
        prompts: the text, with or without BOS.

    Raises:
        NotApplicable: not all rows begin with the same number of BOS.
        P0Error: rows are padded and begin with BOS.
    """
    bos = bos_id(model)
    while bos is not None and bool((counts := prompts.count_leading(bos)).any()):
        if not bool((counts == counts[0]).all()):
            raise NotApplicable(
                f"{int((counts > 0).sum())} of {prompts.n} rows begin with BOS, and not all with the same number of "
                "them; give rows that all begin with one BOS, or none that does"
            )
        prompts = prompts.without_first()
    return prompts


def with_and_without_bos(model: HookedModel, prompts: PromptSet) -> dict[str, PromptSet]:
    """Return the same text as it is and, if there is a BOS token and no padding, after one BOS.

    Args:
        model: the model, for its BOS token.
        prompts: the text, with or without BOS.

    Raises:
        NotApplicable: not all rows begin with the same number of BOS.
    """
    text, bos = text_as_it_is(model, prompts), bos_id(model)
    pair = {WITHOUT_BOS: text}
    if bos is not None and bool(text.attention_mask.all()):
        # Rows that begin with one BOS are used as they are: they need not come from `prepend`.
        pair[WITH_BOS] = prompts if condition_of(model, prompts) == WITH_BOS else text.prepend(bos)
    return pair


def conditions(model: HookedModel, prompts: PromptSet) -> dict[str, PromptSet]:
    """Return the same text as it is, after BOS and after a random token; random tokens; one repeated token.

    A model without a BOS token has no condition "with BOS". All have the number of rows and the length of `prompts`.

    Args:
        model: the model, for its tokenizer and vocabulary.
        prompts: the text, with or without BOS.

    Raises:
        NotApplicable: not all rows begin with the same number of BOS.
    """
    made = with_and_without_bos(model, prompts)
    text = made[WITHOUT_BOS]
    size, special = sampleable_vocabulary(model)
    # Another seed than that of the prompts, which may be random tokens themselves.
    seed = prompts.seed + 1
    random_rows = random_tokens(size, prompts.n, prompts.length, seed, special=special)
    made[RANDOM_FIRST] = text.prepend(random_rows.ids[:, 0])
    made[RANDOM_TOKENS] = random_rows
    made[REPEATED_TOKEN] = repeated_token(size, prompts.n, prompts.length, seed, special=special)
    return made


def default_text(model: HookedModel | StoredModel) -> str:
    """Return the name of the text that is used for a model if none is given.

    1. A named model of the catalog: the text that its entry names.
    2. A model with a tokenizer made by `p0circuit train`, as the shipped ones have: "stdlib", Python source.
    3. Any other: "docs", English prose.
    """
    name, tokenizer = model.name if isinstance(model, StoredModel) else describe(model).name, model.tokenizer
    if (entry := named_model(name)) is not None:
        return entry.text
    trained_here = tokenizer is not None and tokenizer.bos_token == BOS_TOKEN and tokenizer.bos_token_id == BOS_ID
    return "stdlib" if trained_here else "docs"


def prompts_for(
    model: HookedModel | StoredModel,
    text: str | None,
    n: int,
    length: int,
    seed: int = 0,
    first_token: str | int = "text",
) -> PromptSet:
    """Return crops of a text, or random tokens for a model without a tokenizer.

    Args:
        model: a model, or a stored model whose weights are not loaded: only tokenizer and vocabulary are used.
        text: the text, as `natural_text` names it; `default_text` of the model if None.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the crops, or of the random tokens.
        first_token: first token of each row, as in `natural_text`.
    """
    if model.tokenizer is None:
        size = model.vocab_size if isinstance(model, StoredModel) else describe(model).vocab_size
        return random_tokens(size, n=n, length=length, seed=seed)
    source = default_text(model) if text is None else text
    prompts = natural_text(model, source, n=n, length=length, seed=seed, first_token=first_token)
    chosen_by = "the model" if text is None else "the caller"
    return replace(prompts, description=prompts.description | {"text_chosen_by": chosen_by})


def pooled_prompts_for(model: HookedModel, text: str | None, n: int, length: int, seed: int = 0) -> PromptSet:
    """Return the prompts of a reproduction: those of `prompts_for`, in equal parts from three seeds.

    Args:
        model: the model.
        text: the text, as in `prompts_for`.
        n: number of prompts.
        length: tokens per prompt.
        seed: the first seed; the others follow it.
    """
    shares = [share for share in (n - 2 * (n // 3), n // 3, n // 3) if share]
    return pool([prompts_for(model, text, share, length, seed + i) for i, share in enumerate(shares)])


def text_like(model: HookedModel, prompts: PromptSet, length: int, count: int) -> PromptSet:
    """Return new text of another length from the source of the prompts, after the same first token; else random tokens.

    Args:
        model: the model.
        prompts: the prompts; their description names the source.
        length: tokens per row.
        count: number of rows.

    Raises:
        P0Error: there is too little text of this length.
    """
    about = prompts.description
    if about.get("builder") == "natural_text" and model.tokenizer is not None:
        first = about.get("first_token", "text")
        text = natural_text(model, about["source"], count, length, prompts.seed, first)
    else:
        size, special = sampleable_vocabulary(model)
        text = random_tokens(size, count, length, prompts.seed, special=special)
    before = about.get("behind", [])
    for token in reversed(before if isinstance(before, list) else [before]):
        text = text.prepend(token) if isinstance(token, int) else text
    return text
