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

PAGES = [
    repository() / "README.md",
    repository() / "CONTRIBUTING.md",
    *sorted((repository() / "docs").rglob("*.md")),
]
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def blocks(language: str) -> list[tuple[str, str, str | None]]:
    """The blocks of a language on all pages: the page, the block, and the output that is shown below it, if any."""
    fenced = re.compile(
        rf"^```{language}\n(?P<block>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL
    )
    return [
        (page.relative_to(repository()).as_posix(), match["block"], match["output"])
        for page in PAGES
        for match in fenced.finditer(page.read_text(encoding="utf-8"))
    ]


EXAMPLES = blocks("python")


@pytest.mark.parametrize(("page", "example", "output"), EXAMPLES, ids=[page for page, _, _ in EXAMPLES])
def test_an_example_runs_alone_and_prints_what_is_shown(
    page: str, example: str, output: str | None, tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository())},
    )
    assert run.returncode == 0, run.stderr
    if output is not None:
        assert _NUMBER.sub("#", run.stdout).split() == _NUMBER.sub("#", output).split(), run.stdout
        numbers = [float(one) for one in _NUMBER.findall(run.stdout)]
        assert numbers == pytest.approx([float(one) for one in _NUMBER.findall(output)], rel=2e-3, abs=1e-3)
    if page == "docs/guides/training.md":
        assert len((tmp_path / "p0.csv").read_text().splitlines()) == 1 + 4


def test_there_are_examples_of_the_model_its_patching_and_its_training() -> None:
    shown = {page: output for page, _, output in EXAMPLES}
    assert shown.keys() >= {"README.md", "docs/guides/training.md", "docs/guides/patching.md"}
    assert shown["README.md"] is not None


def test_the_readme_is_short() -> None:
    assert len((repository() / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_every_link_and_picture_is_there() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
        missing = [one for one in targets if "://" not in one and one and not (page.parent / one).exists()]
        assert missing == [], page.name


LINES = [line.partition("  #")[0] for _, block, _ in blocks("shell") for line in block.splitlines()]


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
