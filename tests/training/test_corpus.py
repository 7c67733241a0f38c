"""The corpus: files every installation has, a split that never moves, a tokenizer that loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from p0circuit import text
from p0circuit.io import data_dir
from p0circuit.text import BOS_TOKEN, EOS_TOKEN, SourceFile
from p0circuit.training import corpus

ENGLISH = data_dir() / "prompts" / "english"


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    return text.corpus_files()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return corpus.train_tokenizer((file.text() for file in text.text_files(ENGLISH)), vocab_size=400)


def test_the_split_depends_on_the_name_alone_and_stays_as_it_is(tmp_path: Path) -> None:
    # If one of these changes, shipped models were trained on what is now called held out.
    held_out = ["stdlib/asyncio/format_helpers.py", "numpy/ma/extras.py", "torch/_compile.py"]
    training = ["stdlib/argparse.py", "stdlib/json/decoder.py", "numpy/__init__.py"]
    assert [SourceFile(name, tmp_path).held_out for name in held_out] == [True] * 3
    assert [SourceFile(name, tmp_path / "elsewhere").held_out for name in training] == [False] * 3


def test_about_one_file_in_32_is_held_out(files: list[SourceFile]) -> None:
    share = np.mean([file.held_out for file in files])
    assert abs(share - 1 / 32) < 3 * (1 / 32 / len(files)) ** 0.5


def test_training_and_held_out_files_share_neither_name_nor_content(files: list[SourceFile]) -> None:
    held_out = [file for file in files if file.held_out]
    training = [file for file in files if not file.held_out]
    assert len(training) > 1000 and len(held_out) > 30
    assert not {file.name for file in held_out} & {file.name for file in training}
    assert not {file.path.read_bytes() for file in held_out} & {file.path.read_bytes() for file in training}


def test_names_are_the_same_on_every_machine_and_no_tests_are_in(files: list[SourceFile]) -> None:
    names = [file.name for file in files]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("/") or ".." in name or "\\" in name for name in names)
    assert not any({"tests", "test", "__pycache__", "site-packages"} & set(name.split("/")[:-1]) for name in names)
    assert {"stdlib/argparse.py", "numpy/__init__.py", "transformer_lens/__init__.py"} <= set(names)
    assert all(0 < file.path.stat().st_size <= text.MAX_FILE_BYTES for file in files)


def test_the_list_of_files_is_the_same_each_time(files: list[SourceFile]) -> None:
    assert text.standard_library_files() == text.standard_library_files()
    assert text.distribution_files("rich") == text.distribution_files("rich")
    again = {file.name for file in [*text.standard_library_files(), *text.distribution_files("rich")]}
    assert {file.name for file in files if file.name.startswith(("stdlib/", "rich/"))} <= again


def test_a_distribution_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"'no-such-thing', which is not installed.*constraints\.txt"):
        text.distribution_files("no-such-thing")


def test_text_files_are_one_file_or_all_below_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.txt", "b/a.md", "b/c/d.py", "b/image.png"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in text.text_files(tmp_path)] == ["b/a.md", "b/c/d.py", "z.txt"]
    assert [file.text() for file in text.text_files(tmp_path / "z.txt")] == ["z.txt"]
    with pytest.raises(ValueError, match="no text at"):
        text.text_files(tmp_path / "b" / "image")


@pytest.mark.parametrize(
    "text", [*(path.read_text() for path in sorted(ENGLISH.iterdir())[:3]), "naïve\t\n  ∀x∈ℝ 🙂\r\n"]
)
def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < 400


def test_the_tokenizer_has_the_size_asked_for_and_its_special_tokens_come_first(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert len(tokenizer) == 400
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (BOS_TOKEN, 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS_TOKEN, 1)
    english = sorted(ENGLISH.iterdir())[-1].read_text()
    assert len(tokenizer.encode(english)) < len(english.encode()) / 1.5


def test_the_same_texts_give_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    again = corpus.train_tokenizer((file.text() for file in text.text_files(ENGLISH)), vocab_size=400)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    english = sorted(ENGLISH.iterdir())[0].read_text()
    assert loaded.encode(english) == tokenizer.encode(english)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 1)


def test_the_stream_is_every_file_in_order_with_an_end_after_each(tokenizer: PreTrainedTokenizerFast) -> None:
    files = text.text_files(ENGLISH)[:4]
    stream = corpus.token_stream(files, tokenizer)
    assert stream.dtype == np.uint16
    expected: list[int] = []
    for file in files:
        expected += [*tokenizer.encode(file.text(), add_special_tokens=False), 1]
    assert stream.tolist() == expected
    assert corpus.token_stream([], tokenizer).tolist() == []


def test_the_tokenizer_is_trained_on_every_sixteenth_file() -> None:
    files = text.text_files(ENGLISH)
    assert list(corpus.tokenizer_sample(files)) == [files[0].text(), files[16].text()]
    assert len(list(corpus.tokenizer_sample(files, every=7))) == 5


def test_a_data_set_gives_its_texts(tmp_path):
    rows = [json.dumps({"text": f"row {number}"}) for number in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    found = text.dataset_rows(str(tmp_path), max_rows=3)
    assert [row.text() for row in found] == ["row 0", "row 1", "row 2"]
    assert len({row.name for row in found}) == 3


def test_a_data_set_without_texts_or_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"body": "row"}))
    with pytest.raises(ValueError, match=r"columns \['body'\]"):
        text.dataset_rows(str(tmp_path))
    with pytest.raises(ValueError, match="no data set"):
        text.dataset_rows("nobody/no-such-data-set")
