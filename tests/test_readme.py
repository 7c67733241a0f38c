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
from p0circuit.experiments import RUN_EXPERIMENTS
from p0circuit.experiments.over_runs import REFERENCE
from p0circuit.paths import repository
from p0circuit.training.runs import as_trained, of_variant, shipped_runs

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


_NOT_TOLD = ("tnlm_sink_rate_difference", "tnlm_norm_ratio_difference")


def test_the_claims_about_training_are_told_as_they_are_measured() -> None:
    runs = as_trained(shipped_runs())
    early, concentration, convergence, methods = (make().run(runs).metrics for make in RUN_EXPERIMENTS.values())
    shares = [run.formation_share for run in of_variant(runs, REFERENCE)]
    told = [
        f"by {100 * min(shares):.0f} to {100 * max(shares):.0f} %",
        *(str(concentration["causal_final"]), str(convergence["error_difference"])),
        str(convergence["partial_correlation"]),
        *(str(value) for name, value in methods.items() if "loss" not in name and name not in _NOT_TOLD),
    ]
    assert early["latest_formation_share"].value == max(shares)
    assert [one for one in told if one not in README] == []
