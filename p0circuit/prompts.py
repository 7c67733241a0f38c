"""What the models read: token ids, which of them are real, and how they were made.

1. Text becomes crops of exactly T tokens, spread over the files evenly: without overlap while the text lasts, with as
   little overlap as possible after that, never from one file into the next.
2. A first token, where one is asked for, stands before the crop, which then loses its last token. With the same seed
   the crops are the same whatever stands before them: with and without BOS make pairs. The tokenizer itself adds
   nothing: whether a row begins with BOS is decided here alone.
3. Every set of prompts carries its description and seed, and has a fingerprint by which results are filed.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.io import data_dir
from p0circuit.text import SourceFile, TextInMemory, standard_library_files, text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED_TEXTS = ("english", "code")
PYTHON_TEXTS = ("docs", "stdlib")
"""Texts that come with Python itself, and differ from one version of it to another."""
NAMED_TEXTS = (*SHIPPED_TEXTS, *PYTHON_TEXTS)
# More than any experiment needs; it bounds the time and memory that a large text file or directory can take.
LONGEST_TEXT = 16_000_000


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Token sequences of one length, padded on the left where shorter.

    Attributes:
        ids: token ids; what stands in the padding has no meaning.
        attention_mask: true where the token is real.
        description: how the set was made; goes into the results as JSON.
        seed: of everything that was drawn to make it.
        cut_off: the tokens that `behind` pushed off the end of each row, in the order of the text; None for none.

    Raises:
        P0Error: shapes differ, there is no row, ids are not whole numbers from 0 on, padding stands after a real
            token, or a row has fewer than 2 real tokens.
    """

    ids: Int[Tensor, "batch pos"] = field(repr=False)
    attention_mask: Bool[Tensor, "batch pos"] = field(repr=False)
    description: dict[str, Any]
    seed: int = 0
    cut_off: Int[Tensor, "rows cut"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_rows(self.ids, self.attention_mask)
        if self.cut_off is not None and len(self.cut_off) != len(self.ids):
            raise P0Error(
                f"expected the tokens cut off each of {len(self.ids)} rows, got those of {len(self.cut_off)}: "
                "replace(prompts, ids=..., cut_off=None) makes rows whose end is not known"
            )

    @property
    def n(self) -> int:
        """How many sequences there are."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a row, padding included."""
        return self.ids.shape[1]

    @property
    def p0(self) -> Int[Tensor, " batch"]:
        """Where P0 is in each row: the index of the first real token."""
        return self.attention_mask.int().argmax(dim=1)

    def fingerprint(self) -> str:
        """A hash of the token ids and the mask: equal for equal prompts, however they were made."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.attention_mask.cpu().numpy().tobytes())
        return digest.hexdigest()

    def row_fingerprints(self) -> list[str]:
        """A hash of each row's token ids and mask: equal for a row that is also part of another set."""
        rows = zip(self.ids.cpu().numpy().astype("<i8"), self.attention_mask.cpu().numpy(), strict=True)
        return [hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest() for ids, mask in rows]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Make sure that a model of `vocab_size` tokens can read these prompts.

        Raises:
            P0Error: a token id is outside the vocabulary.
        """
        for row, position in (self.ids >= vocab_size).nonzero()[:1]:
            raise P0Error(
                f"token id {int(self.ids[row, position])} (row {int(row)}, position {int(position)}) is outside the "
                f"vocabulary of {vocab_size} tokens: were these prompts made with another model's tokenizer?"
            )

    def subset(self, rows: slice | Sequence[int] | Tensor) -> PromptSet:
        """Some of the rows, given as for indexing."""
        index = torch.arange(self.n)[rows]
        description = {**self.description, "n": len(index), "subset_of": self.fingerprint()}
        cut_off = None if self.cut_off is None else self.cut_off[index]
        return replace(
            self,
            ids=self.ids[index],
            attention_mask=self.attention_mask[index],
            description=description,
            cut_off=cut_off,
        )

    def split(self, fractions: Sequence[float] = (0.5, 0.5)) -> tuple[PromptSet, ...]:
        """Disjoint parts drawn by the set's seed, such as one to choose heads on and another to measure them on.

        Raises:
            P0Error: fractions are not positive, exceed 1 together, or leave a part without a row.
        """
        if min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise P0Error(f"fractions must be positive and at most 1 together, got {tuple(fractions)}")
        order = np.random.default_rng(self.seed).permutation(self.n)
        *parts, _ = np.split(order, np.rint(np.cumsum(fractions) * self.n).astype(int))
        if not all(map(len, parts)):
            raise P0Error(f"{self.n} rows are too few to split into {tuple(fractions)}: a part would be empty")
        return tuple(self.subset(sorted(part.tolist())) for part in parts)

    def prepend(self, first: int | Int[Tensor, " batch"]) -> PromptSet:
        """The same rows with another token (one for all, or one for each) before them and their last token left out.

        `without_first` undoes it.

        Raises:
            P0Error: rows are padded, or `first` is not one token id per row.
        """
        if not bool(self.attention_mask.all()):
            raise P0Error("these rows are padded: put the first token before them before padding them")
        tokens = first if isinstance(first, Tensor) else torch.full((self.n,), first)
        if tokens.shape != (self.n,):
            raise P0Error(f"expected one first token for each of {self.n} rows, got shape {list(tokens.shape)}")
        ids = torch.cat([tokens[:, None], self.ids[:, :-1]], dim=1)
        one = int(tokens[0]) if len(tokens.unique()) == 1 else "one per row"
        before = self.description.get("behind")
        told = one if before is None else [one, *(before if isinstance(before, list) else [before])]
        ends = [self.ids[:, -1:]] if self.cut_off is None else [self.ids[:, -1:], self.cut_off]
        return replace(self, ids=ids, description={**self.description, "behind": told}, cut_off=torch.cat(ends, dim=1))

    def without_first(self) -> PromptSet:
        """The same rows without their first token.

        Where `behind` put it there, the rows get back the token that they lost for it; others become one token shorter.

        Raises:
            P0Error: rows are padded, or nothing would be left to attend to P0.
        """
        if not bool(self.attention_mask.all()):
            raise P0Error("these rows are padded: take the first token away before padding them")
        ids, cut_off = self.ids[:, 1:], self.cut_off
        if cut_off is not None:
            ids, cut_off = torch.cat([ids, cut_off[:, :1]], dim=1), cut_off[:, 1:]
        if cut_off is not None and not cut_off.shape[1]:
            cut_off = None
        before = self.description.get("behind")
        description = {name: value for name, value in self.description.items() if name != "behind"}
        if isinstance(before, list):
            description["behind"] = before[1] if len(before) == 2 else before[1:]
        elif before is None:
            description |= {"length": ids.shape[1], "without_first": True}
        return replace(
            self,
            ids=ids,
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            description=description,
            cut_off=cut_off,
        )

    def leading(self, token: int) -> Int[Tensor, " batch"]:
        """How many times a token, such as BOS, stands at the beginning of each row, padding aside."""
        real = torch.arange(self.length) - self.p0[:, None]
        stands = (self.ids == token) | (real < 0)
        return (stands.cumprod(dim=1) * (real >= 0)).sum(dim=1)

    def left_padded(self, lengths: Sequence[int] | None = None, pad_token: int = 0, seed: int = 0) -> PromptSet:
        """The beginning of each row, `lengths` tokens of it (drawn from 2 to all if not given), moved to the right end.

        Raises:
            P0Error: a length is below 2 or above what the row has.
        """
        available = self.attention_mask.sum(dim=1).tolist()
        rng = np.random.default_rng(seed)
        keep = [int(rng.integers(2, have, endpoint=True)) for have in available] if lengths is None else list(lengths)
        if len(keep) != self.n or any(not 2 <= kept <= have for kept, have in zip(keep, available, strict=True)):
            raise P0Error(f"expected {self.n} lengths from 2 to the real tokens of their rows, got {keep}")
        ids, mask = torch.full_like(self.ids, pad_token), torch.zeros_like(self.attention_mask)
        for row, (start, kept) in enumerate(zip(self.p0.tolist(), keep, strict=True)):
            ids[row, -kept:] = self.ids[row, start : start + kept]
            mask[row, -kept:] = True
        return PromptSet(ids, mask, {**self.description, "left_padded_from": self.fingerprint()}, self.seed)


def from_ids(
    ids: Tensor | np.ndarray | Sequence[Sequence[int]],
    attention_mask: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    vocab_size: int | None = None,
) -> PromptSet:
    """Prompts from token ids at hand, [batch, pos]; without a mask every token is real.

    Raises:
        P0Error: as `PromptSet`, or an id is outside a vocabulary of `vocab_size` tokens.
    """
    ids = torch.as_tensor(ids)
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else torch.as_tensor(attention_mask).bool()
    _check_rows(ids, mask)
    prompts = PromptSet(ids, mask, {"builder": "from_ids", "n": len(ids), "length": ids.shape[-1]})
    if vocab_size is not None:
        prompts.check_vocabulary(vocab_size)
    return prompts


def pooled(parts: Sequence[PromptSet]) -> PromptSet:
    """The rows of several sets of one length, such as draws by different seeds, as one set.

    Raises:
        P0Error: there is none, or lengths differ.
    """
    if len({part.length for part in parts}) != 1:
        raise P0Error(f"expected sets of one length, got lengths {[part.length for part in parts]}")
    ids = torch.cat([part.ids for part in parts])
    description = parts[0].description | {"n": len(ids), "seeds": [part.seed for part in parts]}
    ends = [part.cut_off for part in parts if part.cut_off is not None]
    cut_off = torch.cat(ends) if len(ends) == len(parts) else None
    return PromptSet(ids, torch.cat([part.attention_mask for part in parts]), description, parts[0].seed, cut_off)


@runtime_checkable
class HasTokenizer(Protocol):
    """A model as far as prompts need it: anything with a tokenizer of `transformers`, or None in its place."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that made the text the model was trained on."""
        ...


@runtime_checkable
class HasVocabulary(HasTokenizer, Protocol):
    """A model as far as random tokens need it: a tokenizer, and a configuration with the size of the embedding."""

    @property
    def cfg(self) -> Any:
        """TransformerLens's configuration; `d_vocab` is read."""
        ...


def natural_text(
    model: HasTokenizer,
    source: str | Path = "english",
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    first_token: str | int = "text",
) -> PromptSet:
    """Cut `n` prompts of `length` tokens from text that people wrote.

    Args:
        model: anything with a `tokenizer`, such as what `load_model` returns.
        source: "english" or "code" (shipped), "docs" (the language reference that comes with Python, English prose),
            "stdlib" (modules of the standard library that our models were not trained on, without tables of character
            codes), a text file, or a directory of .txt, .md and .py files.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the random choice of prompts.
        first_token: the token at position 0: "text" (the prompt as it is), "bos", "random" (drawn uniformly from all
            tokens that are not special) or a token id.

    Returns:
        The prompts, without padding. They overlap only if the text is too short for `n` separate ones.

    Raises:
        P0Error: there is no tokenizer, no such text or too little of it, no BOS, or `n` or `length` is too small.

    Example:
        model = p0circuit.load_model("p0-nano")
        prompts = p0circuit.natural_text(model, "english", n=8, length=32)
        prompts.ids.shape  # [8, 32]
    """
    if model.tokenizer is None:
        raise P0Error("text needs a tokenizer and this model has none; give token ids instead: prompts.from_ids(ids)")
    return tokenized_text(model.tokenizer, source, n, length, seed, first_token)


def tokenized_text(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path = "english",
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    first_token: str | int = "text",
) -> PromptSet:
    """Cut prompts from text as `natural_text` does, given a tokenizer alone.

    Args:
        tokenizer: a tokenizer of `transformers`.
        source: as in `natural_text`, likewise all other arguments.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the random choice of prompts.
        first_token: the token at position 0.

    Returns:
        The prompts, without padding.

    Raises:
        P0Error: as `natural_text`.
    """
    _require_size(n, length)
    rng = np.random.default_rng(seed)
    files = _source_files(source)
    documents = [document for document in _documents(tokenizer, files, rng) if len(document)]
    text_tokens = sum(map(len, documents))
    stride = _widest_stride([len(document) for document in documents], n, length)
    if not stride:
        raise P0Error(
            f"too little text in {str(source)!r}: {text_tokens} tokens in {len(files)} files, the longest of "
            f"{max(map(len, documents), default=0)}; {n} crops of {length} need {n * length} tokens in files of at "
            f"least {length}, or {n + length - 1} in one file if they may overlap; give more text, or ask for less"
        )
    crops = np.array([crop for document in documents for crop in _crops(document, length, stride, rng)])
    description = {
        "builder": "natural_text",
        "source": str(source),
        "first_token": first_token,
        "n": n,
        "length": length,
        "text_files": len(documents),
        "text_tokens": text_tokens,
        "new_tokens_per_crop": stride,
    }
    if source in PYTHON_TEXTS:
        description["python"] = platform.python_version()
    prompts = _unpadded(rng.permutation(crops)[:n], description, seed)
    if first_token == "text":
        return prompts
    # The description has `first_token`; "behind" tells of what is put before the rows later.
    return replace(prompts.prepend(_first_tokens(tokenizer, first_token, n, rng)), description=description)


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
        bos: a token id to prepend to every prompt; None for none.
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
    """Draw prompts that repeat one token, another one in each prompt.

    Args:
        vocabulary: a model, whose special tokens are never drawn, or a vocabulary size.
        n: number of prompts.
        length: tokens per prompt.
        seed: seed of the draw.
        bos: a token id to prepend to every prompt; None for none.
        special: token ids that are never drawn, besides those of the model.

    Returns:
        The prompts, without padding.

    Raises:
        P0Error: as `random_tokens`.
    """
    return _random_prompts("repeated_token", vocabulary, (n, 1), length, seed, bos, special)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that stand for no text: BOS, EOS, padding, and whatever else the tokenizer sets apart."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _check_rows(ids: Tensor, mask: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise P0Error(f"token ids must be whole numbers [batch, pos], got {ids.dtype} {list(ids.shape)}")
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise P0Error(
            f"the attention mask must be true or false for each of the {list(ids.shape)} token ids, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    _require_size(*ids.shape)
    if ids.min() < 0:
        raise P0Error(f"token ids start at 0, got {int(ids.min())}")
    for row in (mask[:, :-1] & ~mask[:, 1:]).any(dim=1).nonzero()[:1]:
        raise P0Error(f"row {int(row)} has padding after a real token; padding must stand on the left")
    for row in (mask.sum(dim=1) < 2).nonzero()[:1]:
        raise P0Error(f"row {int(row)} has {int(mask[row].sum())} real tokens; at least 2 are needed")


def _require_size(n: int, length: int) -> None:
    if n < 1:
        raise P0Error(f"prompts need at least 1 row, got n = {n}")
    if length < 2:
        raise P0Error(f"prompts need at least 2 tokens, P0 and one that attends to it; got length = {length}")


def _unpadded(rows: Int[np.ndarray, "batch pos"], description: dict[str, Any], seed: int) -> PromptSet:
    ids = torch.from_numpy(rows.astype(np.int64))
    return PromptSet(ids, torch.ones_like(ids, dtype=torch.bool), description, seed)


def _random_prompts(
    builder: str,
    vocabulary: int | HasVocabulary,
    shape: tuple[int, int],
    length: int,
    seed: int,
    bos: int | None,
    special: Collection[int],
) -> PromptSet:
    """Tokens of this shape, drawn uniformly, then repeated along each row up to `length`."""
    _require_size(shape[0], length)
    if isinstance(vocabulary, int):
        vocab_size = vocabulary
    else:
        vocab_size, own = sampleable_vocabulary_of(vocabulary.tokenizer, vocabulary.cfg.d_vocab)
        special = {*special, *own}
    tokens = np.random.default_rng(seed).choice(_sampleable_tokens(vocab_size, bos, special), shape)
    rows = np.broadcast_to(tokens, (shape[0], length))
    description = {"builder": builder, "vocab_size": vocab_size, "n": len(rows), "length": length}
    prompts = _unpadded(rows, description, seed)
    return prompts if bos is None else prompts.prepend(bos)


def _sampleable_tokens(vocab_size: int, bos: int | None, special: Collection[int]) -> Int[np.ndarray, " tokens"]:
    if bos is not None and not 0 <= bos < vocab_size:
        raise P0Error(f"BOS {bos} is outside the vocabulary of {vocab_size} tokens")
    tokens = np.setdiff1d(np.arange(vocab_size), [*special, *([] if bos is None else [bos])])
    if not len(tokens):
        raise P0Error(f"no token is left to draw from a vocabulary of {vocab_size} without the special tokens")
    return tokens


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, first_token: str | int, n: int, rng: np.random.Generator
) -> int | Int[Tensor, " batch"]:
    vocab_size = len(tokenizer)
    if first_token == "random":
        return torch.from_numpy(rng.choice(_sampleable_tokens(vocab_size, None, special_ids(tokenizer)), n))
    if first_token == "bos":
        bos = tokenizer.bos_token_id
        if not isinstance(bos, int):
            raise P0Error("this tokenizer has no BOS token; give the id of the token to use: first_token=<id>")
        return bos
    if isinstance(first_token, int) and 0 <= first_token < vocab_size:
        return first_token
    raise P0Error(f"first_token must be 'text', 'bos', 'random' or a token id below {vocab_size}, got {first_token!r}")


def _source_files(source: str | Path) -> list[SourceFile]:
    if source == "stdlib":
        # Tables of character codes would be two fifths of it.
        return [file for file in standard_library_files() if file.held_out and "/encodings/" not in file.name]
    if source == "docs":
        return _language_reference()
    if source in SHIPPED_TEXTS:
        return [SourceFile(path.name, path) for path in sorted((data_dir() / "prompts" / source).iterdir())]
    if not Path(source).exists():
        raise P0Error(
            f"no text at {str(source)!r}: expected a text file, a directory, or one of "
            + ", ".join(map(repr, NAMED_TEXTS))
        )
    return text_files(Path(source))


def _language_reference() -> list[SourceFile]:
    """What `help("topics")` shows, a document for each topic: part of every full installation of Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise P0Error(
            "this Python comes without its language reference (the module pydoc_data), which the text 'docs' is; "
            "use 'english', or a text file"
        ) from None
    return [TextInMemory(f"docs/{name}", Path(name), topics[name]) for name in sorted(topics)]


def _documents(
    tokenizer: PreTrainedTokenizerBase, files: list[SourceFile], rng: np.random.Generator
) -> Iterator[list[int]]:
    """The tokens of each file, in random order so that the limit on the whole favours none."""
    allowance = LONGEST_TEXT
    for number in rng.permutation(len(files)):
        text = files[number].text(allowance)
        allowance -= len(text)
        # What looks like a special token in the text is text.
        yield tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if not allowance:
            return


def _widest_stride(lengths: list[int], n: int, length: int) -> int:
    """The largest step from crop to crop, at most `length`, that gives `n` crops; 0 if even a step of 1 does not."""
    rooms = [tokens - length for tokens in lengths if tokens >= length]
    return next((step for step in range(length, 0, -1) if sum(room // step + 1 for room in rooms) >= n), 0)


def _crops(document: list[int], length: int, stride: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """As many crops as fit, `stride` apart; what is left over goes to both ends by chance."""
    room = len(document) - length
    if room >= 0:
        for start in range(rng.integers(room % stride, endpoint=True), room + 1, stride):
            yield document[start : start + length]


WITHOUT_BOS, WITH_BOS, RANDOM_FIRST = "without BOS", "with BOS", "random first"
RANDOM_TOKENS, REPEATED_TOKEN = "random tokens", "repeated token"
TWO_BOS, SOME_BOS = "with two BOS or more", "with BOS in some rows only"


def bos_id(model: Any) -> int | None:
    """The BOS token of the model's tokenizer; None where there is no tokenizer or it has none."""
    return getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def condition_of(model: Any, prompts: PromptSet) -> str:
    """What the rows begin with: WITHOUT_BOS, WITH_BOS, TWO_BOS or SOME_BOS."""
    bos = bos_id(model)
    if bos is None:
        return WITHOUT_BOS
    counts = prompts.leading(bos)
    if not bool(counts.any()):
        return WITHOUT_BOS
    if not bool(counts.all()):
        return SOME_BOS
    return WITH_BOS if bool((counts == 1).all()) else TWO_BOS


def sampleable_vocabulary_of(tokenizer: Any, vocab_size: int) -> tuple[int, Collection[int]]:
    """`sampleable_vocabulary` for a tokenizer, None where there is none, and the size of the embedding."""
    if tokenizer is None:
        return vocab_size, ()
    # Many models have embeddings that no token of theirs leads to.
    return min(vocab_size, len(tokenizer)), special_ids(tokenizer)
