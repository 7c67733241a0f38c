"""Prompts: the text is real, the draws are fair and repeatable, P0 is where it should be."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from p0circuit.io import data_dir
from p0circuit.models import forward
from p0circuit.models.constructed.build import wired_model
from p0circuit.prompts import (
    PromptSet,
    from_ids,
    natural_text,
    pool,
    random_tokens,
    repeated_token,
    special_ids,
    text_prompts,
    tokenized_text,
)
from p0circuit.sink import sink_score
from p0circuit.text import standard_library_files
from p0circuit.training.corpus import train_tokenizer

ENGLISH = data_dir() / "prompts" / "english"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((path.read_text() for path in sorted(ENGLISH.iterdir())), vocab_size=600)


def tokens_of(tokenizer: PreTrainedTokenizerFast, path: Path) -> list[int]:
    return tokenizer.backend_tokenizer.encode(path.read_text(), add_special_tokens=False).ids


def places(ids: Tensor, documents: list[list[int]]) -> list[tuple[int, int]]:
    """Where each row stands: (document, start), found by comparing it with every stretch of every document."""
    length = ids.shape[1]
    stretches = {
        tuple(document[start : start + length]): (number, start)
        for number, document in enumerate(documents)
        for start in range(len(document) - length + 1)
    }
    return [stretches[tuple(row)] for row in ids.tolist()]


# natural text


def test_crops_are_stretches_of_single_files_that_do_not_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [tokens_of(tokenizer, path) for path in sorted(ENGLISH.iterdir())]
    most = sum(len(document) // 24 for document in documents)
    prompts = tokenized_text(tokenizer, "english", n=most, length=24, seed=3)
    found = sorted(places(prompts.ids, documents))
    assert len(found) == most
    for (document, start), (following, next_start) in itertools.pairwise(found):
        assert document != following or next_start - start >= 24
    assert prompts.description["text_tokens"] == sum(map(len, documents))
    assert prompts.description["text_files"] == 30
    assert prompts.description["new_tokens_per_crop"] == 24


def test_more_crops_than_fit_overlap_as_little_as_possible(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [tokens_of(tokenizer, path) for path in sorted(ENGLISH.iterdir())]
    n = 2 * sum(len(document) // 24 for document in documents)
    prompts = tokenized_text(tokenizer, "english", n=n, length=24)
    stride = prompts.description["new_tokens_per_crop"]
    found = sorted(places(prompts.ids, documents))
    gaps = [b - a for (x, a), (y, b) in itertools.pairwise(found) if x == y]
    assert min(gaps) == stride < 24

    def fitting(step: int) -> int:
        return sum(len(range(0, len(document) - 24 + 1, step)) for document in documents)

    assert fitting(stride) >= n > fitting(stride + 1)


def test_every_start_is_reachable_and_none_is_preferred(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A lock lifts boats. Its gates meet at an angle, like hands, against the water.")
    document = tokens_of(tokenizer, tmp_path / "one.txt")
    last = len(document) - len(document) // 2 - 1
    sets = [
        tokenized_text(tokenizer, tmp_path, n=1, length=len(document) // 2 + 1, seed=seed) for seed in range(60 * last)
    ]
    counts = np.bincount([places(prompts.ids, [document])[0][1] for prompts in sets], minlength=last + 1)
    assert counts.min() > 30 and counts.max() < 100


def test_the_same_seed_gives_the_same_prompts_and_another_others(tokenizer: PreTrainedTokenizerFast) -> None:
    def made(seed: int) -> list[str]:
        return [
            tokenized_text(tokenizer, "code", n=8, length=16, seed=seed, first_token="random").fingerprint(),
            random_tokens(50, n=8, length=16, seed=seed).fingerprint(),
            repeated_token(50, n=8, length=16, seed=seed).fingerprint(),
        ]

    assert made(1) == made(1)
    assert not set(made(1)) & set(made(2))


@pytest.mark.parametrize("first_token", ["bos", "random", 7])
def test_a_first_token_stands_before_the_same_crop(tokenizer: PreTrainedTokenizerFast, first_token: str | int) -> None:
    plain = tokenized_text(tokenizer, "english", n=200, length=16, seed=5)
    prompts = tokenized_text(tokenizer, "english", n=200, length=16, seed=5, first_token=first_token)
    assert torch.equal(prompts.ids[:, 1:], plain.ids[:, :-1])
    first = prompts.ids[:, 0]
    if first_token == "random":
        assert len(first.unique()) > 100
        assert not set(first.tolist()) & special_ids(tokenizer)
    else:
        assert set(first.tolist()) == {tokenizer.bos_token_id if first_token == "bos" else 7}
    assert prompts.description["first_token"] == first_token


def test_the_standard_library_source_is_the_held_out_part(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = tokenized_text(tokenizer, "stdlib", n=12, length=48)
    held_out = [
        tokens_of(tokenizer, file.path)
        for file in standard_library_files()
        if file.held_out and not file.name.startswith("stdlib/encodings/")
    ]
    assert len(places(prompts.ids, held_out)) == 12
    assert prompts.description["text_tokens"] == sum(map(len, held_out))


def test_the_language_reference_is_a_text_of_many_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = tokenized_text(tokenizer, "docs", n=1024, length=64)
    # Every row is new text, and a stretch of one topic.
    assert prompts.description["new_tokens_per_crop"] == 64
    assert prompts.description["python"] == platform.python_version()
    documents = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in topics.values()]
    assert prompts.description["text_files"] == len(documents) > 50
    assert len(places(prompts.subset(slice(0, 32)).ids, documents)) == 32


def test_a_tokenizer_that_puts_bos_before_text_is_not_let(tokenizer: PreTrainedTokenizerFast) -> None:
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    eager = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|eos|>")
    assert eager("A lock")["input_ids"][0] == eager.bos_token_id == 0
    plain, after = (tokenized_text(eager, "english", n=20, length=16, first_token=first) for first in ("text", "bos"))
    assert plain.fingerprint() == tokenized_text(tokenizer, "english", n=20, length=16).fingerprint()
    assert not bool((plain.ids == 0).any())
    assert after.count_leading(0).tolist() == [1] * 20


def test_a_file_and_a_directory_are_sources(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text((ENGLISH / "10-compost.txt").read_text())
    (tmp_path / "b.md").write_text((ENGLISH / "12-market-day.txt").read_text())
    (tmp_path / "c.bin").write_bytes(bytes(range(256)))
    one = tokenized_text(tokenizer, tmp_path / "b.md", n=4, length=16)
    both = tokenized_text(tokenizer, str(tmp_path), n=4, length=16)
    assert one.description["text_files"] == 1
    assert both.description["text_files"] == 2
    assert both.description["text_tokens"] > one.description["text_tokens"]


def test_what_looks_like_a_special_token_in_the_text_is_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "sly.txt").write_text("before <|bos|> after <|eos|> " * 20)
    prompts = tokenized_text(tokenizer, tmp_path, n=8, length=32)
    assert not set(prompts.ids.flatten().tolist()) & special_ids(tokenizer)
    assert "<|bos|>" in tokenizer.decode(prompts.ids[0])


def test_reading_stops_at_the_limit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("all work and no play " * 10)
    monkeypatch.setattr(text_prompts, "MAX_CHARACTERS", 300)
    prompts = tokenized_text(tokenizer, tmp_path, n=2, length=8)
    assert prompts.description["text_files"] == 2
    whole = len(tokens_of(tokenizer, tmp_path / "0.txt"))
    assert whole < prompts.description["text_tokens"] < 2 * whole


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Hello, world.")
    available = len(tokens_of(tokenizer, tmp_path / "short.txt"))
    with pytest.raises(
        ValueError, match=rf"{available} tokens in 1 files.*5 crops of 64 need 320 tokens.*or 68 in one"
    ):
        tokenized_text(tokenizer, tmp_path, n=5, length=64)
    assert tokenized_text(tokenizer, tmp_path, n=2, length=available - 1).description["new_tokens_per_crop"] == 1
    with pytest.raises(ValueError, match="too little text"):
        tokenized_text(tokenizer, tmp_path, n=3, length=available - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "at least 1 prompt, got n = 0"),
        ({"length": 1}, "at least 2 tokens.*length = 1"),
        ({"source": "no/such/place"}, "no text at 'no/such/place'.*'docs', 'stdlib'"),
        ({"first_token": "BOS"}, "first_token must be.*got 'BOS'"),
        ({"first_token": 600}, "token id below 600, got 600"),
        ({"first_token": -1}, "token id below 600, got -1"),
    ],
)
def test_wrong_arguments_are_refused(
    tokenizer: PreTrainedTokenizerFast, arguments: dict[str, int | str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenized_text(tokenizer, **({"n": 4, "length": 16} | arguments))


def test_an_empty_directory_a_missing_tokenizer_and_a_missing_bos_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"expected a text file, or a directory holding \.txt"):
        tokenized_text(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"needs a tokenizer.*from_ids"):
        natural_text(SimpleNamespace(tokenizer=None), "english")
    without_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"no BOS token; give the id"):
        tokenized_text(without_bos, "english", first_token="bos")
    assert tokenized_text(without_bos, "english", first_token=3).ids[0, 0] == 3


def test_a_model_gives_its_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = natural_text(SimpleNamespace(tokenizer=tokenizer), "code", n=4, length=16, seed=3, first_token="bos")
    again = tokenized_text(tokenizer, "code", n=4, length=16, seed=3, first_token="bos")
    assert prompts.fingerprint() == again.fingerprint() and prompts.description == again.description


# random and repeated tokens


def test_random_tokens_of_a_model_leave_out_its_special_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=len(tokenizer) + 50))
    for draw in (random_tokens, repeated_token):
        prompts = draw(model, n=300, length=16)
        again = draw(len(tokenizer), n=300, length=16, special=special_ids(tokenizer))
        assert prompts.fingerprint() == again.fingerprint() and prompts.description == again.description
        assert not special_ids(tokenizer) & set(prompts.ids.flatten().tolist())


def test_random_tokens_are_uniform_over_all_but_the_special_ones() -> None:
    prompts = random_tokens(20, n=400, length=50, special=(2, 11))
    counts = torch.bincount(prompts.ids.flatten(), minlength=20)
    expected = 400 * 50 / 18
    drawn = [token for token in range(20) if token not in (2, 11)]
    assert counts[2] == counts[11] == 0
    assert (counts[drawn] - expected).abs().max() < 5 * expected**0.5
    # Neighbours are independent: each ordered pair comes about equally often.
    pairs = torch.bincount(prompts.ids[:, :-1].flatten() * 20 + prompts.ids[:, 1:].flatten(), minlength=400)
    assert pairs.max() < 2 * 400 * 49 / 18**2


def test_bos_stands_before_random_tokens_and_is_not_drawn() -> None:
    plain, with_bos = random_tokens(6, n=300, length=9, bos=None), random_tokens(6, n=300, length=9, bos=0)
    assert 0 in plain.ids
    assert (with_bos.ids[:, 0] == 0).all()
    assert set(with_bos.ids[:, 1:].flatten().tolist()) == {1, 2, 3, 4, 5}
    assert with_bos.length == plain.length == 9


def test_a_repeated_token_fills_its_row() -> None:
    plain = repeated_token(40, n=64, length=12, special=(0, 1))
    assert (plain.ids == plain.ids[:, :1]).all()
    assert len(plain.ids[:, 0].unique()) > 20
    assert plain.ids.min() >= 2
    with_bos = repeated_token(40, n=64, length=12, bos=0)
    assert (with_bos.ids[:, 0] == 0).all()
    assert (with_bos.ids[:, 1:] == with_bos.ids[:, 1:2]).all() and with_bos.ids[:, 1:].min() > 0


@pytest.mark.parametrize("build", [random_tokens, repeated_token])
def test_impossible_draws_are_refused(build) -> None:
    with pytest.raises(ValueError, match="BOS 9 is outside the vocabulary of 9 tokens"):
        build(9, bos=9)
    with pytest.raises(ValueError, match="no token is left to draw"):
        build(3, bos=0, special=(1, 2))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        build(9, length=1)
    with pytest.raises(ValueError, match="at least 1 prompt"):
        build(9, n=0)


# the set itself


def test_from_ids_takes_lists_arrays_and_tensors() -> None:
    rows = [[5, 6, 7], [8, 9, 10]]
    sets = [from_ids(rows), from_ids(np.array(rows)), from_ids(torch.tensor(rows, dtype=torch.int32))]
    assert all(prompts.ids.tolist() == rows and prompts.attention_mask.all() for prompts in sets)
    assert len({prompts.fingerprint() for prompts in sets}) == 1


def test_the_fingerprint_is_a_hash_of_shape_ids_and_mask() -> None:
    prompts = from_ids([[0, 5, 6], [7, 8, 9]], [[0, 1, 1], [1, 1, 1]])
    content = b"(2, 3)" + np.array([0, 5, 6, 7, 8, 9], dtype="<i8").tobytes() + bytes([0, 1, 1, 1, 1, 1])
    assert prompts.fingerprint() == hashlib.sha256(content).hexdigest()
    assert prompts.fingerprint() != from_ids([[0, 5, 6], [7, 8, 9]]).fingerprint()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.arange(3), None, r"whole numbers \[batch, pos\], got torch.int64 \[3\]"),
        (torch.ones(1, 2), None, r"whole numbers .* got torch.float32"),
        ([[5, 6]], [[1, 1, 1]], r"\[1, 2\] token ids, got torch.bool \[1, 3\]"),
        ([[5]], None, "at least 2 tokens"),
        (torch.zeros(0, 4, dtype=torch.long), None, "at least 1 prompt"),
        ([[5, -6]], None, "start at 0, got -6"),
        ([[5, 6, 7], [5, 6, 7]], [[0, 1, 1], [1, 0, 1]], "row 1 has padding after a real token"),
        ([[5, 6, 7], [5, 6, 7]], [[1, 1, 0], [1, 1, 1]], "row 0 has padding after a real token"),
        ([[5, 6, 7], [5, 6, 7]], [[1, 1, 1], [0, 0, 1]], "row 1 has 1 real tokens"),
    ],
)
def test_malformed_prompts_are_refused(ids, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_ids(ids, mask)


def test_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(ValueError, match=r"token id 12 \(row 1, position 2\).*vocabulary of 12 tokens"):
        from_ids([[5, 6, 7], [5, 6, 12]], vocab_size=12)
    from_ids([[5, 6, 7], [5, 6, 11]], vocab_size=12)


@given(st.data())
def test_padding_moves_the_beginning_of_each_row_to_the_right_end(data: st.DataObject) -> None:
    prompts = random_tokens(30, n=data.draw(st.integers(1, 5)), length=data.draw(st.integers(2, 9)))
    lengths = data.draw(st.lists(st.integers(2, prompts.length), min_size=prompts.n, max_size=prompts.n))
    padded = prompts.pad_left(lengths, pad_token=29)
    assert padded.ids.shape == prompts.ids.shape
    assert padded.p0.tolist() == [prompts.length - kept for kept in lengths]
    for row, kept in enumerate(lengths):
        assert padded.ids[row][padded.attention_mask[row]].tolist() == prompts.ids[row, :kept].tolist()
        assert (padded.ids[row][~padded.attention_mask[row]] == 29).all()
    again = padded.pad_left([2] * prompts.n)
    assert torch.equal(again.ids[:, -2:], prompts.ids[:, :2])


def test_padding_is_drawn_by_the_seed_and_bounded_by_the_row() -> None:
    prompts = random_tokens(30, n=40, length=6)
    padded = prompts.pad_left(seed=1)
    assert set(padded.p0.tolist()) == {0, 1, 2, 3, 4}
    assert padded.fingerprint() == prompts.pad_left(seed=1).fingerprint() != prompts.pad_left(seed=2).fingerprint()
    for wrong in ([6] * 39, [6] * 39 + [7], [6] * 39 + [1]):
        with pytest.raises(ValueError, match="expected 40 lengths from 2 to"):
            prompts.pad_left(wrong)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padded_rows_have_the_sink_scores_of_unpadded_ones(positions: str) -> None:
    model = wired_model(positions, dtype=torch.float64)
    prompts = random_tokens(model.cfg.d_vocab, n=5, length=12)
    lengths = [12, 2, 7, 11, 4]
    padded = prompts.pad_left(lengths, pad_token=3)

    def scores(part: PromptSet) -> Tensor:
        kept = []
        hooks = [
            (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: kept.append(pattern))
            for layer in range(model.cfg.n_layers)
        ]
        forward(model, part.ids, part.attention_mask, hooks=hooks)
        return torch.stack([sink_score(pattern, part.p0, part.attention_mask) for pattern in kept])

    together = scores(padded)
    for row, kept in enumerate(lengths):
        alone = scores(from_ids(prompts.ids[row : row + 1, :kept]))
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-10, rtol=0)


def test_another_token_before_the_rows() -> None:
    prompts = random_tokens(30, n=3, length=5)
    assert prompts.prepend(7).ids.tolist() == [[7, *row[:-1]] for row in prompts.ids.tolist()]
    firsts = torch.tensor([1, 2, 3])
    assert prompts.prepend(firsts).ids[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="one first token for each of 3 prompts"):
        prompts.prepend(firsts[:2])
    with pytest.raises(ValueError, match="prompts are padded"):
        prompts.pad_left([2, 3, 4]).prepend(7)


def test_taking_the_first_token_away_undoes_putting_one_there() -> None:
    prompts = random_tokens(30, n=4, length=6)
    after = prompts.prepend(0)
    assert after.without_first().fingerprint() == prompts.fingerprint()
    assert after.without_first().description == prompts.description
    twice = after.prepend(torch.tensor([3, 4, 5, 6]))
    assert twice.description["behind"] == ["one per row", 0]
    assert twice.without_first().fingerprint() == after.fingerprint()
    assert twice.without_first().description == after.description
    assert twice.without_first().without_first().fingerprint() == prompts.fingerprint()
    # Parts and pools of the rows carry what was cut off with them.
    part = pool([after.subset([2, 0]), after.split()[1]])
    rows = [2, 0, *prompts.subset(range(4)).split()[1].ids.tolist()]
    assert part.without_first().ids[:2].tolist() == prompts.ids[rows[:2]].tolist()
    assert part.without_first().ids[2:].tolist() == rows[2:]


def test_a_row_that_was_given_with_its_first_token_becomes_shorter_without_it() -> None:
    prompts = from_ids([[0, 5, 6, 7], [0, 8, 9, 1]])
    bare = prompts.without_first()
    assert bare.ids.tolist() == [[5, 6, 7], [8, 9, 1]] and bare.description["length"] == 3
    with pytest.raises(ValueError, match="prompts are padded"):
        prompts.pad_left([2, 3]).without_first()
    with pytest.raises(ValueError, match="at least 2 tokens"):
        from_ids([[0, 5]]).without_first()
    with pytest.raises(ValueError, match=r"overflow of each of 3 prompts, got that of 2"):
        replace(prompts.prepend(0), ids=prompts.ids[[0, 0, 1]], attention_mask=prompts.attention_mask[[0, 0, 1]])


@given(st.data())
def test_leading_tokens_are_counted_from_the_first_real_one(data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 2), min_size=4, max_size=4)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    padding = [data.draw(st.integers(0, 2)) for _ in rows]
    mask = [[position >= start for position in range(4)] for start in padding]
    prompts = from_ids(rows, mask)
    for token in (0, 1):
        expected = []
        for ids, start in zip(rows, padding, strict=True):
            count = 0
            while start + count < 4 and ids[start + count] == token:
                count += 1
            expected.append(count)
        assert prompts.count_leading(token).tolist() == expected


def test_a_subset_keeps_its_rows_and_says_where_it_comes_from() -> None:
    prompts = random_tokens(30, n=6, length=5).pad_left([5, 4, 3, 2, 5, 4])
    for rows in ([4, 1], torch.tensor([4, 1])):
        part = prompts.subset(rows)
        assert torch.equal(part.ids, prompts.ids[[4, 1]]) and part.p0.tolist() == [0, 1]
        assert part.description["subset_of"] == prompts.fingerprint() and part.description["n"] == 2
    assert torch.equal(prompts.subset(slice(2, 4)).ids, prompts.ids[2:4])
    with pytest.raises(ValueError, match="at least 1 prompt"):
        prompts.subset(slice(6, 9))


@given(st.data(), st.integers(2, 40), st.integers(0, 5))
def test_a_split_divides_the_rows_without_overlap(data: st.DataObject, n: int, seed: int) -> None:
    ids = torch.arange(2 * n).reshape(n, 2)
    prompts = PromptSet(ids, torch.ones_like(ids, dtype=torch.bool), {}, seed)
    size = data.draw(st.integers(1, n - 1))
    first, second = prompts.split((size / n, 1 - size / n))
    assert (first.n, second.n) == (size, n - size)
    assert sorted(first.ids.tolist() + second.ids.tolist()) == ids.tolist()
    assert first.fingerprint() == prompts.split((size / n,))[0].fingerprint()


def test_impossible_splits_are_refused_and_halves_are_not_the_order_of_the_rows() -> None:
    prompts = random_tokens(1000, n=40, length=3)
    assert prompts.split()[0].fingerprint() != prompts.subset(slice(0, 20)).fingerprint()
    for wrong in ((0.5, 0.6), (0.5, 0.0), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="positive and at most 1"):
            prompts.split(wrong)
    with pytest.raises(ValueError, match="too few to split"):
        prompts.split((0.99, 0.001))


def test_descriptions_go_to_json(tokenizer: PreTrainedTokenizerFast) -> None:
    natural = tokenized_text(tokenizer, Path(ENGLISH), n=6, length=8, first_token="random")
    several = (natural.split()[0], natural.pad_left(), random_tokens(9, bos=1), natural.prepend(1).prepend(2))
    for prompts in (natural, *several, from_ids([[1, 2]])):
        assert json.loads(json.dumps(prompts.description)) == prompts.description
        assert "tensor" not in repr(prompts)


# what is shipped


def test_shipped_texts_are_as_the_readme_says() -> None:
    english = sorted(ENGLISH.iterdir())
    assert len(english) == 30
    assert all(180 <= len(path.read_text().split()) <= 260 for path in english)
    code = sorted((data_dir() / "prompts" / "code").iterdir())
    assert len(code) == 12
    assert all(40 <= len(path.read_text().splitlines()) <= 90 for path in code)
