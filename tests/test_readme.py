"""The examples of README and docs run as they are printed, and their commands are those of the command line."""

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
from p0circuit.io import repository
from p0circuit.report.contents import find_reproductions
from p0circuit.report.documents import claims_table
from p0circuit.reproduction import reproduce_training
from p0circuit.training.runs import as_trained, shipped_runs

PAGES = [repository() / "README.md", *sorted((repository() / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """The blocks of a language on all pages, each with the name of its page."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page.stem, block) for page in PAGES for block in pattern.findall(page.read_text(encoding="utf-8"))]


EXAMPLES = blocks("python")


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_an_example_runs_alone_as_printed(page: str, example: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository())},
    )
    assert run.returncode == 0, run.stderr
    printed = run.stdout
    if page == "README":
        assert "sink_rate_from_layer_2 " in printed and (tmp_path / "sink-map.png").stat().st_size > 10_000
    if page == "training":
        assert printed.split()[0] in ("none", "forming", "formed") and 0 <= float(printed.split()[-1]) <= 1
        assert len((tmp_path / "p0.csv").read_text().splitlines()) == 1 + 4
    if page == "patching":
        assert "sender" in printed


def test_there_are_examples_of_the_model_its_patching_and_its_training() -> None:
    assert {"README", "training", "patching"} <= {page for page, _ in EXAMPLES}


def test_every_link_and_picture_is_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
        missing = [one for one in targets if "://" not in one and one and not (page.parent / one).exists()]
        assert missing == [], page.name


LINES = [line.partition("  #")[0] for _, block in blocks("shell") for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("p0circuit ")])
def test_a_printed_command_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context(name, arguments).params


def test_the_claims_about_training_are_as_measured(tmp_path: Path) -> None:
    reproduce_training(as_trained(shipped_runs()), tmp_path / "training")
    results = (repository() / "docs" / "results.md").read_text(encoding="utf-8")
    table = claims_table(find_reproductions(tmp_path / "training"))
    assert len(table) > 5 and [line for line in table if line not in results] == []
