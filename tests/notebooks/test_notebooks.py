"""The shipped notebooks: what they were made from, what they hold, and what they must not hold."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
import torch

from p0circuit.cli.notebooks import require_modules
from p0circuit.course import build as notebooks, checks
from p0circuit.course.page import read_prompts
from p0circuit.interventions.closed_form import key_hook
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.models import load_model
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.training.runs import as_trained, of_variant, shipped_runs
from tests.notebooks.command import ROOT, p0circuit

NAMES = notebooks.names()
PARAMETERS = {"model", "samples", "seed", "out"}
ABSOLUTE = re.compile(r"(?<![\w./:>=-])(/(home|root|tmp|usr|work|opt|var|content)/|[A-Za-z]:\\\\Users)")


def shipped(name: str) -> Any:
    return nbformat.read(notebooks.folder() / f"{name}.ipynb", as_version=4)


def printed(notebook: Any) -> str:
    """Everything a notebook shows, pictures and the script of attention views left out."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown += [output.get("text", ""), data.get("text/plain", "")]
            shown.append(
                re.sub(r"<script>window\.CircuitsVis.*?</script>", "", data.get("text/html", ""), flags=re.DOTALL)
            )
    return "\n".join(shown)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_source_are_in_step(name: str) -> None:
    source = jupytext.read(notebooks.folder() / f"{name}.py")
    made = shipped(name)

    def content(notebook: Any) -> list[tuple[str, str, list[str]]]:
        return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]

    assert content(made) == content(source), f"run: p0circuit notebooks build {name}"
    notebooks.tidy(source, name)
    assert [cell.id for cell in made.cells] == [cell.id for cell in source.cells]
    assert made.metadata == source.metadata


@pytest.mark.parametrize("name", NAMES)
def test_shipped_from_a_clean_run(name: str) -> None:
    path = notebooks.folder() / f"{name}.ipynb"
    assert path.stat().st_size < 5e6
    made = shipped(name)
    nbformat.validate(made)
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
    assert not ABSOLUTE.search(printed(made)) and not ABSOLUTE.search(path.with_suffix(".py").read_text())
    assert "Warning" not in printed(made)
    assert notebooks.key_figures(path)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_setup_and_links(name: str) -> None:
    path = notebooks.folder() / f"{name}.py"
    tagged = [cell for cell in shipped(name).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values: dict[str, Any] = {}
    exec(tagged[0].source, values)
    assert values.keys() >= PARAMETERS and values["out"] is None
    assert setup(name) == setup(NAMES[0]), "the set-up cell is the same everywhere"
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    picture = ROOT / "docs" / "notebooks" / f"{name}.png"
    assert picture.stat().st_size < 60_000
    page = (ROOT / "docs" / "course.md").read_text()
    assert f"(notebooks/{name}.png)" in page and f"(../notebooks/{name}.ipynb)" in page


def setup(name: str) -> str:
    """The cell that finds the package."""
    begins = "# Where p0circuit is not installed"
    text = (notebooks.folder() / f"{name}.py").read_text().split(f"# %%\n{begins}", 1)[1]
    return begins + text.split("\n# %%", 1)[0].rstrip()


def test_the_setup_cell_finds_the_checkout_or_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="Clone its repository and open this notebook inside the clone"):
        exec(setup(NAMES[0]), {})
    monkeypatch.chdir(notebooks.folder())
    exec(setup(NAMES[0]), {})
    assert sys.path[0] == str(ROOT)


# Exercises

EXERCISE = re.compile(r"### Exercise (\d\.\d)")
SOLUTION = re.compile(r"<details>\n<summary>Solution (\d\.\d)</summary>\n\n```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r"^(check_\w+)\((\w+)", re.MULTILINE)


def solutions(name: str) -> dict[str, tuple[str, str, str]]:
    """By number: the folded solution, the checker, and the name of what it checks."""
    made = shipped(name)
    folded = {number: code for cell in made.cells for number, code in SOLUTION.findall(cell.source)}
    tasks = [number for cell in made.cells for number in EXERCISE.findall(cell.source)]
    checked = [found for cell in made.cells if cell.cell_type == "code" for found in CHECK.findall(cell.source)]
    assert sorted(tasks) == sorted(folded) and len(tasks) == len(checked), name
    return {number: (folded[number], *check) for number, check in zip(tasks, checked, strict=True)}


def test_there_are_exercises_in_all_but_the_tour() -> None:
    counts = {name: len(solutions(name)) for name in NAMES if name < "06"}
    assert counts.pop(NAMES[0]) == 0
    assert counts and all(1 <= count <= 3 for count in counts.values())


@pytest.mark.parametrize("name", [name for name in NAMES if "00" < name < "06"])
def test_folded_solutions_pass_their_checkers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (code, checker, answer) in solutions(name).items():
        room: dict[str, Any] = {"torch": torch, "math": __import__("math")}
        arguments: list[Any] = []
        if checker == "check_edge":
            arguments = edge_room(room)
        exec(code, room)
        getattr(checks, checker)(room[answer], *arguments)
        assert capsys.readouterr().out.startswith(f"✓ {number}"), number


def edge_room(room: dict[str, Any]) -> list[Any]:
    """What notebook 04 has at hand at its second exercise, and what the checker gets beside the answer."""
    lm, m, other, sender = load_model("p0-nano"), 8, (3, 2), "mlp.1"
    prompts = read_prompts(lm, 4, length=24)
    vocabulary, special = sampleable_vocabulary(lm)
    pair = shift_prompts(prompts, m, vocabulary, 0, tuple(special))
    caches = (lm.run_with_cache(one.ids)[1] for one in (pair.clean, pair.shifted))
    room |= dict(zip(("clean_cache", "shifted_cache"), caches, strict=True))
    room |= {"lm": lm, "m": m, "other": other, "clean_ids": pair.clean.ids, "key_hook": key_hook, "put": checks.put}
    return [lm, pair.clean, patch_values(lm, pair, [sender]), sender, other]


QUESTION = re.compile(r"### Question (\d\.\d)")
ANSWER = re.compile(r"<details>\n<summary>Answer (\d\.\d)</summary>\n\n```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_questions_have_answers(name: str) -> None:
    text = "\n".join(cell.source for cell in shipped(name).cells)
    answers = dict(ANSWER.findall(text))
    assert QUESTION.findall(text) == list(answers)
    for number, code in answers.items():
        compile(code, number, "exec")


def test_folded_answers_about_training_run(capsys: pytest.CaptureFixture[str]) -> None:
    room: dict[str, Any] = {"traces": as_trained(shipped_runs()), "of_variant": of_variant}
    for cell in shipped("06_emergence").cells:
        for _, code in ANSWER.findall(cell.source):
            exec(code, room)
    shown = capsys.readouterr().out
    assert "bos-0: emerged after 2,372,608 tokens, a fifth of 11,863,040" in shown
    assert "standard deviation below 0.040" in shown


# The command


def test_list_names_all_with_their_titles(tmp_path: Path) -> None:
    done = p0circuit("list", cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES
    assert "The sink in five cells" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run",), "name one or more notebooks, or give --all"),
        (("run", "00", "--all"), "name one or more notebooks, or give --all"),
        (("run", "0"), f"'0' names {len(NAMES)} notebooks"),
        (("run", "nothing"), "'nothing' names no notebooks; there are: 00_tour"),
        (("run", "00", "-p", "sample", "3"), "has no parameter 'sample'; it has: model, samples, seed, out"),
        (("run", "00", "-p", "samples"), "-p samples: expected a name and a value"),
        (("export", "nothing"), "'nothing' names no notebooks"),
    ],
)
def test_wrong_use_is_refused(
    arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from p0circuit.cli import main

    monkeypatch.setattr(sys, "argv", ["p0circuit", "notebooks", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"no_such_module missing: pip install 'p0circuit\[notebooks\]'"):
        require_modules("papermill", "no_such_module")


def test_a_failing_cell_is_named(tmp_path: Path) -> None:
    done = p0circuit("run", "tour", "-p", "samples", "0", "--out", "here", cwd=tmp_path)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "error: 00_tour: cell 4 (from p0circuit.course.page import Page, open_model, read_prompts) failed" in said
    assert "P0Error: expected at least 1 prompt, got n = 0" in said
    assert (tmp_path / "here" / "00_tour.ipynb").is_file()


def test_without_the_repository_that_is_said(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "p0circuit", tmp_path / "site" / "p0circuit", ignore=shutil.ignore_patterns("__pycache__"))
    done = p0circuit("list", cwd=tmp_path, path=tmp_path / "site")
    assert done.returncode == 2
    assert "they come with the repository of p0circuit" in " ".join(done.stderr.split())
