"""The notebooks of the course: find, run and build them.

1. A notebook is written as plain Python, `notebooks/NN_name.py` (jupytext's percent format), and that is its source.
2. `build` runs it in a fresh kernel and writes `notebooks/NN_name.ipynb` with its outputs, without anything that would
   differ from build to build but the outputs themselves; a picture of it goes to `docs/notebooks/`.
3. `run` executes the shipped notebooks with other parameters by papermill. They live in the repository and are no part
   of the installed package.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from p0circuit.errors import P0Error

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
COVER = "cover"
"""The tag of the cell whose figure is the notebook's picture."""
_COVER_WIDTH, _COVER_COLOURS = 720, 256


class NotebookFailed(RuntimeError):
    """A cell did not run to its end; the message names it."""


def folder() -> Path:
    """The repository's folder of notebooks.

    Raises:
        P0Error: the package is installed without the repository.
    """
    found = Path(__file__).resolve().parents[2] / "notebooks"
    if not any(found.glob("*.ipynb")) and not any(found.glob("*.py")):
        raise P0Error(
            f"there are no notebooks at {found}: they come with the repository of p0circuit and are no part of the "
            "installed package; clone the repository and run this there"
        )
    return found


def names() -> list[str]:
    """The notebooks in the order of the course, by the names of their sources."""
    return sorted(path.stem for path in folder().glob("[0-9]*.py"))


def find(name: str) -> str:
    """The notebook of a name, its number, or any part of the name that no other has.

    Raises:
        P0Error: there is none, or more than one.
    """
    wanted, every = Path(name).stem, names()
    found = [one for one in every if one == wanted] or [one for one in every if one.startswith(f"{wanted}_")]
    found = found or [one for one in every if wanted in one]
    if len(found) != 1:
        raise P0Error(f"{name!r} names {len(found) or 'no'} notebooks; there are: {', '.join(every)}")
    return found[0]


def title(name: str) -> str:
    """The first heading of a notebook."""
    text = (folder() / f"{name}.py").read_text(encoding="utf-8")
    found = re.search(r"^# # (.+)$", text, re.MULTILINE)
    return found.group(1) if found else name


def run(name: str, out: Path, parameters: Mapping[str, Any] = {}) -> Path:
    """Execute a notebook with some of its parameters set anew; returns the executed one, `out`/NAME.ipynb.

    Its figures and key figures go to `out`/NAME, unless its parameter `out` says otherwise.

    Raises:
        P0Error: it has no such parameter.
        NotebookFailed: a cell failed; what ran before it is in the executed notebook.
    """
    source = folder() / f"{name}.ipynb"
    if not source.is_file():
        raise P0Error(f"{source.name} has not been built; run: p0circuit notebooks build {name}")
    known = _parameters_of(source)
    if unknown := sorted(parameters.keys() - known.keys()):
        raise P0Error(f"{name} has no parameter {unknown[0]!r}; it has: {', '.join(known)}")
    given = {"out": str(out.resolve() / name)} | dict(parameters)
    return _execute(source, out / f"{name}.ipynb", given)


def build(name: str) -> Path:
    """Run a notebook from its source in a fresh kernel, and write it with its outputs, and its picture.

    Raises:
        P0Error: it wrote to standard error, or has no picture.
        NotebookFailed: a cell failed.
    """
    import jupytext
    import nbformat

    source = folder() / f"{name}.py"
    with tempfile.TemporaryDirectory() as scratch, _environment(P0CIRCUIT_CACHE=scratch, OMP_NUM_THREADS="1"):
        bare = Path(scratch) / f"{name}.ipynb"
        nbformat.write(jupytext.read(source), bare)
        notebook = nbformat.read(_execute(bare, Path(scratch) / "done.ipynb", {}), as_version=4)
    tidy(notebook, name)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise P0Error(f"{name}: {first_line(cell.source)!r} wrote to standard error:\n{output.text}")
    picture = folder().parent / "docs" / "notebooks" / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(_small(_cover(notebook, name)))
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return source.with_suffix(".ipynb")


def tidy(notebook: Any, name: str) -> None:
    """Take off a notebook all that would differ from one run to the next: times, versions, random identities."""
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name.replace('_', '-')}-{number:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def key_figures(notebook: Path) -> dict[str, float]:
    """The key figures of an executed notebook: the JSON that its last cell printed.

    Raises:
        P0Error: it printed none.
    """
    import nbformat

    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for output in cells[-1].outputs)
    try:
        return json.loads(printed)
    except json.JSONDecodeError:
        raise P0Error(f"the last cell of {notebook.name} printed no JSON: {printed[:80]!r}") from None


def _execute(source: Path, target: Path, parameters: Mapping[str, Any]) -> Path:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The kernel of this environment before any other of the same name.
        with _environment(JUPYTER_PREFER_ENV_PATH="1"):
            papermill.execute_notebook(
                str(source),
                str(target),
                dict(parameters),
                kernel_name=KERNEL["name"],
                cwd=str(folder()),
                progress_bar=_progress(source.stem),
                # It would say every time that it talks over TCP, and now and then that it was told to end.
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"{source.stem}: cell {error.exec_count} ({first_line(error.source)}) failed: {error.ename}: "
            f"{error.evalue}; the notebook up to there is {target}"
        ) from None
    except DeadKernelError as error:
        raise NotebookFailed(f"{source.stem}: its kernel died ({error}); was there enough memory?") from None
    return target


def _progress(name: str) -> Any:
    """What papermill is to show: a bar, where someone is there to see it."""
    from rich.console import Console

    return {"desc": name, "leave": False} if Console(stderr=True).is_terminal else False


def _parameters_of(source: Path) -> dict[str, Any]:
    import papermill

    return papermill.inspect_notebook(str(source))


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Some variables in this process's environment, which kernels get as it is."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """The outputs of a cell, what was printed in a row as one: where it was cut is a matter of chance."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _cover(notebook: Any, name: str) -> bytes:
    import base64

    for cell in notebook.cells:
        if COVER in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if image := output.get("data", {}).get("image/png"):
                    return base64.b64decode(image)
    raise P0Error(f"{name} has no picture: give the tag {COVER!r} to a cell that shows a figure")


def _small(png: bytes) -> bytes:
    """A picture small enough for the README: few pixels, few colours."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((_COVER_WIDTH, _COVER_WIDTH))
    buffer = io.BytesIO()
    image.quantize(_COVER_COLOURS).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def first_line(source: str) -> str:
    return source.strip().partition("\n")[0]
