"""The cache: a value comes back bit for bit or not at all, and never for something else than it was computed from."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from p0circuit.cli import app
from p0circuit.io import DEFAULT_LIMIT, cache_directory
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording import quantities
from p0circuit.recording.cache import Cache, key_of
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE, score_at
from p0circuit.recording.record import record

ABOUT = {"model": "m", "quantity": "q", "samples": 3}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def prompts() -> PromptSet:
    return random_tokens(64, n=3, length=8)


@pytest.fixture
def model() -> Any:
    return wired_model()


def temporaries(cache: Cache) -> list[Path]:
    return [path for path in cache.directory.iterdir() if path.name.startswith(".")]


def fresh(model: Any, prompts: PromptSet, what: Any) -> bool:
    """Whether recording computes, and what it gives is what a run without a cache gives."""
    recording = record(model, prompts, [what])
    assert torch.equal(recording[what], record(model, prompts, what, cache=None))
    return not recording.cached


# one file


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4, dtype=torch.float64)[:, ::2],
        torch.randn(5).to(torch.bfloat16),
        torch.tensor([[1, 2], [3, 4]]).T,
        torch.tensor([True, False]),
        torch.tensor([torch.nan, torch.inf, -0.0]),
        torch.tensor(2.5),
        torch.empty(0, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
@pytest.mark.filterwarnings("error")
def test_a_tensor_comes_back_bit_for_bit(cache: Cache, tensor: Tensor) -> None:
    cache.write("key", tensor, ABOUT)
    back = cache.read("key")
    assert back is not None and back.dtype == tensor.dtype and back.shape == tensor.shape
    assert back.view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)) if back.ndim else back.equal(tensor)
    assert cache.about("key") == ABOUT
    assert not temporaries(cache)


@pytest.mark.filterwarnings("error")
def test_what_is_not_there_is_none_and_no_warning(cache: Cache) -> None:
    assert cache.read("key") is None
    assert cache.about("key") == {} and cache.entries() == [] and cache.clear() == 0


def test_a_flipped_byte_anywhere_is_noticed(cache: Cache) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    cache.write("key", tensor, ABOUT)
    path = cache.path("key")
    whole = path.read_bytes()
    harmless = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            back = cache.read("key")
        if back is None:
            assert "is damaged" in str(said[0].message) and path.name in str(said[0].message)
            assert not path.exists()
        else:
            # What `about` says and how the header is padded decides nothing.
            harmless += 1
            assert torch.equal(back, tensor) and back.dtype == tensor.dtype and not said
    assert harmless < len(json.dumps(ABOUT)) + 16


def test_a_flipped_bit_in_the_shape_or_type_is_noticed(cache: Cache) -> None:
    cache.write("key", torch.arange(12.0).reshape(3, 4), ABOUT)
    path = cache.path("key")
    whole = path.read_bytes()
    for right, wrong in ((b"[3,4]", b"[4,3]"), (b'"F32"', b'"I32"')):
        assert right in whole
        path.write_bytes(whole.replace(right, wrong))
        with pytest.warns(UserWarning, match="is damaged"):
            assert cache.read("key") is None


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_noticed(cache: Cache, kept: int) -> None:
    cache.write("key", torch.arange(12.0), ABOUT)
    path = cache.path("key")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged .*computed again"):
        assert cache.read("key") is None
    assert not path.exists()


def test_a_damaged_recording_is_computed_again(model: Any, prompts: PromptSet) -> None:
    expected = record(model, prompts, SINK_SCORE)
    (path,) = cache_directory().glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.warns(UserWarning, match="is damaged"):
        again = record(model, prompts, [SINK_SCORE])
    assert not again.cached and torch.equal(again[SINK_SCORE], expected)
    assert record(model, prompts, [SINK_SCORE]).cached == {"sink_score"}


def test_a_folder_that_cannot_be_written_to_stops_nothing(
    model: Any, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("P0CIRCUIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="nothing is kept in the cache"):
        recorded = record(model, prompts, SINK_SCORE)
    assert recorded.shape == (3, 3, 5)


def test_where_it_lies_and_how_large_it_may_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("P0CIRCUIT_CACHE_LIMIT", "1000")
    assert Cache() == Cache(cache_directory(), 1000)
    monkeypatch.delenv("P0CIRCUIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("P0CIRCUIT_CACHE_LIMIT")
    assert Cache() == Cache(tmp_path / "p0circuit", DEFAULT_LIMIT)
    monkeypatch.setenv("P0CIRCUIT_CACHE_LIMIT", "2 GB")
    with pytest.raises(ValueError, match=r"'2 GB' is not a whole number of bytes"):
        Cache()


@pytest.mark.parametrize("variable", ["P0CIRCUIT_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["", "relative"])
def test_it_is_never_in_a_relative_place(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model is downloaded into it from another working directory; an empty variable is one that is not set."""
    monkeypatch.chdir(tmp_path)
    for name in ("P0CIRCUIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, value)
    default = tmp_path / "home" / ".cache" / "p0circuit"
    chosen = {"P0CIRCUIT_CACHE": tmp_path / "relative", "XDG_CACHE_HOME": tmp_path / "relative" / "p0circuit"}
    assert cache_directory() == (chosen[variable] if value else default)


# what decides the address


def test_the_address_does_not_depend_on_the_order_of_the_parts() -> None:
    assert key_of({"a": "1", "b": "2"}) == key_of({"b": "2", "a": "1"}) != key_of({"a": "2", "b": "1"})


def test_the_second_time_is_read(model: Any, prompts: PromptSet) -> None:
    first = record(model, prompts, [SINK_SCORE, NORM_RATIO])
    again = record(model, prompts, [NORM_RATIO, SINK_SCORE, score_at(1)])
    assert first.cached == frozenset() and again.cached == {"sink_score", "norm_ratio"}
    for quantity in (SINK_SCORE, NORM_RATIO):
        assert torch.equal(first[quantity], again[quantity])
    assert record(wired_model(), prompts, [SINK_SCORE]).cached


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_changed_weights_never_read_stale_entries(backend: str, prompts: PromptSet) -> None:
    model = wired_model(backend=backend)
    assert fresh(model, prompts, NORM_RATIO)
    weight = next(w for name, w in torch.nn.Module.named_parameters(model) if "mlp" in name and w.ndim == 2)
    for change in (lambda: weight.mul_(1.01), lambda: weight.data.view(-1)[5].add_(0.5)):
        with torch.no_grad():
            change()
        assert fresh(model, prompts, NORM_RATIO)
        assert not fresh(model, prompts, NORM_RATIO)


def test_other_models_prompts_and_parameters_are_other_entries(model: Any, prompts: PromptSet) -> None:
    assert fresh(model, prompts, SINK_SCORE)
    assert fresh(wired_model(seed=1), prompts, SINK_SCORE)
    assert fresh(wired_model("learned"), prompts, SINK_SCORE)
    assert fresh(decoy_model(), prompts, SINK_SCORE)
    assert fresh(wired_model(dtype=torch.float64), prompts, SINK_SCORE)
    assert fresh(model, random_tokens(64, n=3, length=8, seed=1), SINK_SCORE)
    assert fresh(model, prompts.subset([2, 1, 0]), SINK_SCORE)
    assert fresh(model, prompts.pad_left([8, 8, 7]), SINK_SCORE)
    assert fresh(model, prompts, score_at(1))
    assert fresh(model, prompts, score_at(2))
    assert fresh(model, prompts, quantities.residual_at(1))
    assert fresh(model, prompts, quantities.residual_at(2))
    assert not fresh(model, prompts, SINK_SCORE)
    assert not fresh(model, prompts, score_at(2))


def test_backends_and_precisions_do_not_share(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("llama-grouped")
    prompts = random_tokens(96, n=2, length=6)
    models = [load_model(folder), load_model(folder, dtype=torch.float16)]
    if models[0].__class__.__name__ == "HookedTransformer":
        models.append(load_model(folder, backend="bridge"))
    assert all([fresh(model, prompts, NORM_RATIO) for model in models])
    assert not any([fresh(model, prompts, NORM_RATIO) for model in models])


# the limit


def fill(cache: Cache, keys: str) -> int:
    """Write files of one size, each used a second after the one before it; returns that size."""
    for number, key in enumerate(keys):
        cache.write(key, torch.zeros(1000), ABOUT)
        os.utime(cache.path(key), (0, 1000 + number))
    return cache.path(keys[0]).stat().st_size


def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    size = fill(Cache(tmp_path), "abcd")
    cache = Cache(tmp_path, limit=4 * size)
    assert cache.read("a") is not None
    cache.write("e", torch.zeros(1000), ABOUT)
    assert {entry["key"] for entry in cache.entries()} == {"a", "c", "d", "e"}
    Cache(tmp_path, limit=2 * size).write("f", torch.zeros(1000), ABOUT)
    assert {entry["key"] for entry in cache.entries()} == {"e", "f"}
    Cache(tmp_path, limit=size // 2).evict()
    assert cache.entries() == []


def test_only_abandoned_temporaries_are_swept_and_none_is_counted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old, new = (tmp_path / f".{name}.tmp.key.safetensors" for name in ("old", "new"))
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.write("key", torch.zeros(3), ABOUT)
    assert [entry["key"] for entry in cache.entries()] == ["key"]
    assert temporaries(cache) == [new]
    cache.clear()
    assert new.exists(), "another process is writing it"


# several processes


def values(number: int) -> Tensor:
    # Large enough that a file is seen half written if it can be.
    return torch.full((200_000 + number,), float(number))


def hammer(directory: Path, seed: int, limit: int, failures: Any) -> None:
    """Write and read the same few keys again and again; whatever is read must be what belongs under its key."""
    warnings.simplefilter("error")
    cache, draw = Cache(directory, limit), random.Random(seed)
    try:
        read = 0
        for turn in range(150):
            number = draw.randrange(5)
            found = cache.read(str(number))
            if found is None:
                cache.write(str(number), values(number), ABOUT)
            else:
                read += 1
                assert torch.equal(found, values(number))
            if turn % 10 == seed:
                cache.write(str(number), values(number), ABOUT)
            if turn == 60 + seed:
                cache.clear()
        assert read > 20
    except BaseException as error:
        failures.put(repr(error))
        raise


@pytest.mark.parametrize("limit", [DEFAULT_LIMIT, 2_500_000])
def test_processes_share_a_folder(tmp_path: Path, limit: int) -> None:
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    failures = context.SimpleQueue()
    workers = [context.Process(target=hammer, args=(tmp_path, seed, limit, failures)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0], None if failures.empty() else failures.get()
    cache = Cache(tmp_path)
    assert temporaries(cache) == []
    assert 0 < len(cache.entries()) <= 5
    assert limit == DEFAULT_LIMIT or sum(entry["bytes"] for entry in cache.entries()) <= limit


# the command


def test_the_command_lists_and_clears(model: Any, prompts: PromptSet) -> None:
    record(model, prompts, [SINK_SCORE, NORM_RATIO])
    shown = json.loads(CliRunner().invoke(app, ["cache", "--json"]).stdout)
    assert shown["directory"] == str(cache_directory()) and shown["limit"] == DEFAULT_LIMIT
    assert {(entry["model"], entry["quantity"], entry["samples"]) for entry in shown["entries"]} == {
        ("wired", "sink_score", 3),
        ("wired", "norm_ratio", 3),
    }
    assert shown["bytes"] == sum(path.stat().st_size for path in cache_directory().iterdir())
    listed = CliRunner().invoke(app, ["cache"])
    assert listed.exit_code == 0 and "sink_score" in listed.stdout and "of 2048 MiB" in listed.stdout
    every = CliRunner().invoke(app, ["cache", "--all"])
    assert every.exit_code == 0 and "norm_ratio" in every.stdout and "KiB" in every.stdout
    cleared = CliRunner().invoke(app, ["cache", "--clear", "--json"])
    assert json.loads(cleared.stdout)["entries"] == [] and "freed" in cleared.stderr
    assert list(cache_directory().iterdir()) == []
