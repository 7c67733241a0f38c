"""Prompts: token ids, which of them are real, and how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from p0circuit.errors import P0Error


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts of one length, padded on the left where they are shorter.

    Attributes:
        ids: token ids; those of the padding have no meaning.
        attention_mask: true where the token is real.
        description: how the prompts were made, as JSON; part of a result's provenance.
        seed: seed of everything random in them.
        overflow: tokens that `prepend` pushed off the end of each prompt, in the order of the text; None if there are
            none.

    Raises:
        P0Error: shapes differ, there is no prompt, ids are not whole numbers from 0 on, padding follows a real token,
            or a prompt has fewer than 2 real tokens.
    """

    ids: Int[Tensor, "batch pos"] = field(repr=False)
    attention_mask: Bool[Tensor, "batch pos"] = field(repr=False)
    description: dict[str, Any]
    seed: int = 0
    overflow: Int[Tensor, "_ overflow"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check shapes, ids and padding."""
        _check_prompts(self.ids, self.attention_mask)
        if self.overflow is not None and len(self.overflow) != len(self.ids):
            raise P0Error(
                f"expected the overflow of each of {len(self.ids)} prompts, got that of {len(self.overflow)}: give new "
                "ids without overflow, as in replace(prompts, ids=..., overflow=None)"
            )

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per prompt, including padding."""
        return self.ids.shape[1]

    @property
    def p0(self) -> Int[Tensor, " batch"]:
        """Index of P0 in each prompt: its first real token."""
        return self.attention_mask.int().argmax(dim=1)

    def fingerprint(self) -> str:
        """Hash the token ids and the mask: equal for equal prompts, however they were made."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.attention_mask.cpu().numpy().tobytes())
        return digest.hexdigest()

    def row_fingerprints(self) -> list[str]:
        """Hash each prompt by itself: equal for a prompt that is also part of another set."""
        rows = zip(self.ids.cpu().numpy().astype("<i8"), self.attention_mask.cpu().numpy(), strict=True)
        return [hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest() for ids, mask in rows]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model can read these prompts.

        Args:
            vocab_size: number of tokens of the model.

        Raises:
            P0Error: a token id is outside the vocabulary.
        """
        for row, position in (self.ids >= vocab_size).nonzero()[:1]:
            raise P0Error(
                f"token id {int(self.ids[row, position])} (row {int(row)}, position {int(position)}) is outside the "
                f"vocabulary of {vocab_size} tokens: were these prompts made with another model's tokenizer?"
            )

    def subset(self, rows: slice | Sequence[int] | Tensor) -> PromptSet:
        """Select prompts.

        Args:
            rows: which prompts, as an index of the first axis.
        """
        index = torch.arange(self.n)[rows]
        description = {**self.description, "n": len(index), "subset_of": self.fingerprint()}
        overflow = None if self.overflow is None else self.overflow[index]
        return replace(
            self,
            ids=self.ids[index],
            attention_mask=self.attention_mask[index],
            description=description,
            overflow=overflow,
        )

    def split(self, fractions: Sequence[float] = (0.5, 0.5)) -> tuple[PromptSet, ...]:
        """Split the prompts into random disjoint parts, such as one to choose heads on and one to measure them on.

        The seed of the set decides the parts.

        Args:
            fractions: size of each part, as a share of the set.

        Returns:
            One set per fraction.

        Raises:
            P0Error: fractions are not positive, exceed 1 together, or leave a part without a prompt.
        """
        if min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise P0Error(f"fractions must be positive and at most 1 together, got {tuple(fractions)}")
        order = np.random.default_rng(self.seed).permutation(self.n)
        *parts, _ = np.split(order, np.rint(np.cumsum(fractions) * self.n).astype(int))
        if not all(map(len, parts)):
            raise P0Error(f"{self.n} prompts are too few to split into {tuple(fractions)}: a part would be empty")
        return tuple(self.subset(sorted(part.tolist())) for part in parts)

    def prepend(self, first: int | Int[Tensor, " batch"]) -> PromptSet:
        """Put a token before every prompt and drop the last token, so that the length stays. `without_first` undoes it.

        Args:
            first: a token id for all prompts, or one for each.

        Raises:
            P0Error: prompts are padded, or `first` is not one token id per prompt.

        Example:
            with_bos = prompts.prepend(model.tokenizer.bos_token_id)
        """
        if not bool(self.attention_mask.all()):
            raise P0Error("these prompts are padded: prepend the first token before padding them")
        tokens = first if isinstance(first, Tensor) else torch.full((self.n,), first)
        if tokens.shape != (self.n,):
            raise P0Error(f"expected one first token for each of {self.n} prompts, got shape {list(tokens.shape)}")
        ids = torch.cat([tokens[:, None], self.ids[:, :-1]], dim=1)
        # In the description, "behind" lists the tokens before the text, the first one first.
        new = int(tokens[0]) if len(tokens.unique()) == 1 else "one per row"
        old = self.description.get("behind")
        prefix = new if old is None else [new, *(old if isinstance(old, list) else [old])]
        ends = [self.ids[:, -1:]] if self.overflow is None else [self.ids[:, -1:], self.overflow]
        description = {**self.description, "behind": prefix}
        return replace(self, ids=ids, description=description, overflow=torch.cat(ends, dim=1))

    def without_first(self) -> PromptSet:
        """Remove the first token of every prompt.

        If `prepend` put it there, the prompts get back the last token that they lost; others become one token shorter.

        Raises:
            P0Error: prompts are padded, or fewer than 2 tokens would be left.
        """
        if not bool(self.attention_mask.all()):
            raise P0Error("these prompts are padded: remove the first token before padding them")
        ids, overflow = self.ids[:, 1:], self.overflow
        if overflow is not None:
            ids, overflow = torch.cat([ids, overflow[:, :1]], dim=1), overflow[:, 1:]
        if overflow is not None and not overflow.shape[1]:
            overflow = None
        prefix = self.description.get("behind")
        description = {name: value for name, value in self.description.items() if name != "behind"}
        if isinstance(prefix, list):
            description["behind"] = prefix[1] if len(prefix) == 2 else prefix[1:]
        elif prefix is None:
            description |= {"length": ids.shape[1], "without_first": True}
        return replace(
            self,
            ids=ids,
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            description=description,
            overflow=overflow,
        )

    def count_leading(self, token: int) -> Int[Tensor, " batch"]:
        """Count how many times a token, such as BOS, is repeated at the beginning of each prompt, after the padding.

        Args:
            token: a token id.
        """
        real = torch.arange(self.length) - self.p0[:, None]
        matches = (self.ids == token) | (real < 0)
        return (matches.cumprod(dim=1) * (real >= 0)).sum(dim=1)

    def pad_left(self, lengths: Sequence[int] | None = None, pad_token: int = 0, seed: int = 0) -> PromptSet:
        """Shorten each prompt to its beginning, and pad it on the left to the length of the set.

        Args:
            lengths: number of tokens that each prompt keeps; random, at least 2, if None.
            pad_token: token id of the padding.
            seed: seed of random lengths.

        Raises:
            P0Error: a length is below 2 or above the number of real tokens of its prompt.
        """
        available = self.attention_mask.sum(dim=1).tolist()
        rng = np.random.default_rng(seed)
        if lengths is None:
            lengths = [int(rng.integers(2, most, endpoint=True)) for most in available]
        if len(lengths) != self.n or any(not 2 <= new <= old for new, old in zip(lengths, available, strict=True)):
            raise P0Error(
                f"expected {self.n} lengths from 2 to the number of real tokens of each prompt, got {list(lengths)}"
            )
        ids, mask = torch.full_like(self.ids, pad_token), torch.zeros_like(self.attention_mask)
        for row, (start, length) in enumerate(zip(self.p0.tolist(), lengths, strict=True)):
            ids[row, -length:] = self.ids[row, start : start + length]
            mask[row, -length:] = True
        return PromptSet(ids, mask, {**self.description, "left_padded_from": self.fingerprint()}, self.seed)


def from_ids(
    ids: Tensor | np.ndarray | Sequence[Sequence[int]],
    attention_mask: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    vocab_size: int | None = None,
) -> PromptSet:
    """Make prompts of token ids.

    Args:
        ids: token ids [batch, pos].
        attention_mask: true where a token is real [batch, pos]; all if None.
        vocab_size: number of tokens of the model, to check the ids against; no check if None.

    Raises:
        P0Error: as `PromptSet`, or an id is outside the vocabulary.

    Example:
        p0circuit.from_ids([[1, 15, 7], [1, 3, 3]])
    """
    ids = torch.as_tensor(ids)
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else torch.as_tensor(attention_mask).bool()
    _check_prompts(ids, mask)
    prompts = PromptSet(ids, mask, {"builder": "from_ids", "n": len(ids), "length": ids.shape[-1]})
    if vocab_size is not None:
        prompts.check_vocabulary(vocab_size)
    return prompts


def unpadded(ids: Int[np.ndarray, "batch pos"], description: dict[str, Any], seed: int) -> PromptSet:
    """Make prompts without padding of an array of token ids.

    Args:
        ids: token ids.
        description: how they were made.
        seed: seed of everything random in them.
    """
    tokens = torch.from_numpy(ids.astype(np.int64))
    return PromptSet(tokens, torch.ones_like(tokens, dtype=torch.bool), description, seed)


def pool(parts: Sequence[PromptSet]) -> PromptSet:
    """Join sets of one length, such as prompts of several seeds, into one.

    Args:
        parts: the sets.

    Raises:
        P0Error: there is no set, or lengths differ.
    """
    if len({part.length for part in parts}) != 1:
        raise P0Error(f"expected sets of one length, got lengths {[part.length for part in parts]}")
    ids = torch.cat([part.ids for part in parts])
    description = parts[0].description | {"n": len(ids), "seeds": [part.seed for part in parts]}
    ends = [part.overflow for part in parts if part.overflow is not None]
    overflow = torch.cat(ends) if len(ends) == len(parts) else None
    return PromptSet(ids, torch.cat([part.attention_mask for part in parts]), description, parts[0].seed, overflow)


def require_size(n: int, length: int) -> None:
    """Check that prompts have P0 and at least one token that attends to it.

    Args:
        n: number of prompts.
        length: tokens per prompt.

    Raises:
        P0Error: there is no prompt, or they have fewer than 2 tokens.
    """
    if n < 1:
        raise P0Error(f"expected at least 1 prompt, got n = {n}")
    if length < 2:
        raise P0Error(f"prompts need at least 2 tokens, P0 and one that attends to it; got length = {length}")


def _check_prompts(ids: Tensor, mask: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise P0Error(f"token ids must be whole numbers [batch, pos], got {ids.dtype} {list(ids.shape)}")
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise P0Error(
            f"the attention mask must be true or false for each of the {list(ids.shape)} token ids, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    require_size(*ids.shape)
    if ids.min() < 0:
        raise P0Error(f"token ids start at 0, got {int(ids.min())}")
    for row in (mask[:, :-1] & ~mask[:, 1:]).any(dim=1).nonzero()[:1]:
        raise P0Error(f"row {int(row)} has padding after a real token; padding must be on the left")
    for row in (mask.sum(dim=1) < 2).nonzero()[:1]:
        raise P0Error(f"row {int(row)} has {int(mask[row].sum())} real tokens; at least 2 are needed")
