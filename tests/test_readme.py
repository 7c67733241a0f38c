"""The README's examples run as they are printed, and its commands are those of the command line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from p0circuit.cli import app
from p0circuit.paths import repository

README = (repository() / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What the Python examples print, run one after the other in a new interpreter and an empty folder."""
    folder = tmp_path_factory.mktemp("readme")
    script = "\nprint('---')\n".join(blocks("python"))
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository())},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split("---\n"), folder


def test_the_examples_run_as_printed(printed: tuple[list[str], Path]) -> None:
    (ten_lines, monitor, patch), folder = printed
    assert "sink_rate_from_layer_2 " in ten_lines and (folder / "sink-map.png").stat().st_size > 10_000
    assert monitor.split()[0] in ("none", "forming", "formed") and 0 <= float(monitor.split()[-1]) <= 1
    assert len((folder / "p0.csv").read_text().splitlines()) == 1 + 4
    assert "sender" in patch


LINES = [line.partition("  #")[0] for block in blocks("shell") for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("p0circuit ")])
def test_a_printed_command_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context(name, arguments).params
