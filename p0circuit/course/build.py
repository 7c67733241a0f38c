"""Find, run and build the notebooks of the course.

1. The source of a notebook is plain Python, `notebooks/NN_name.py`, in jupytext's percent format.
2. `build` runs a source in a fresh kernel and writes `notebooks/NN_name.ipynb` with the outputs. Times, versions and
   random ids are removed, so that two builds differ only if outputs differ. It also writes a picture of the notebook
   to `docs/notebooks/`.
3. `run` executes a built notebook with other parameters, by papermill. The notebooks belong to the repository, not to
   the installed package.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p0circuit.errors import P0Error

if TYPE_CHECKING:
    from nbformat import NotebookNode

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
COVER = "cover"
"""Tag of the cell whose figure is the picture of the notebook."""
_COVER_WIDTH, _COVER_COLOURS = 720, 256


class NotebookFailed(RuntimeError):
    """A cell raised an error or the kernel died; the message names the cell."""


def folder() -> Path:
    """Return the folder of the notebooks in the repository.

    Raises:
        P0Error: the package is installed without the repository.
    """
    path = Path(__file__).resolve().parents[2] / "notebooks"
    if not any(path.glob("*.ipynb")) and not any(path.glob("*.py")):
        raise P0Error(
            f"there are no notebooks at {path}: they come with the repository of p0circuit and are no part of the "
            "installed package; clone the repository and run this there"
        )
    return path


def names() -> list[str]:
    """Return the names of all notebooks, in the order of the course."""
    return sorted(path.stem for path in folder().glob("[0-9]*.py"))


def find(name: str) -> str:
    """Return the notebook with a name, a number, or a part of the name that no other notebook has.

    Args:
        name: as in `04_patching_the_circuit`, `04` or `patching`.

    Raises:
        P0Error: no notebook matches, or more than one.
    """
    query, notebooks = Path(name).stem, names()
    matches = [one for one in notebooks if one == query] or [one for one in notebooks if one.startswith(f"{query}_")]
    matches = matches or [one for one in notebooks if query in one]
    if len(matches) != 1:
        raise P0Error(f"{name!r} names {len(matches) or 'no'} notebooks; there are: {', '.join(notebooks)}")
    return matches[0]


def title(name: str) -> str:
    """Return the first heading of a notebook; its name if it has none.

    Args:
        name: name of the notebook.
    """
    text = (folder() / f"{name}.py").read_text(encoding="utf-8")
    heading = re.search(r"^# # (.+)$", text, re.MULTILINE)
    return heading.group(1) if heading else name


def run(name: str, out: Path, parameters: Mapping[str, Any] = {}) -> Path:
    """Execute a built notebook with other parameters.

    Its figures and key figures go to `out`/NAME, unless its parameter `out` is given.

    Args:
        name: name of the notebook.
        out: directory of the executed notebook.
        parameters: new values of parameters by name.

    Returns:
        The path of the executed notebook, `out`/NAME.ipynb.

    Raises:
        P0Error: the notebook has not been built, or has no such parameter.
        NotebookFailed: a cell failed; the executed notebook holds the outputs of the cells before it.
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
    """Run a notebook's source in a fresh kernel, and write the notebook with its outputs, and its picture.

    Args:
        name: name of the notebook.

    Returns:
        The path of the notebook.

    Raises:
        P0Error: a cell wrote to standard error, or no cell shows the picture.
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


def tidy(notebook: NotebookNode, name: str) -> None:
    """Remove from a notebook what differs between runs: times, versions, random ids.

    Args:
        notebook: which is changed in place.
        name: name of the notebook.
    """
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
    """Return the key figures of an executed notebook: the JSON that its last cell printed.

    Args:
        notebook: path of the notebook.

    Raises:
        P0Error: its last cell printed no JSON.
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
        # Prefer the kernel of this environment to others of the same name.
        with _environment(JUPYTER_PREFER_ENV_PATH="1"):
            papermill.execute_notebook(
                str(source),
                str(target),
                dict(parameters),
                kernel_name=KERNEL["name"],
                cwd=str(folder()),
                progress_bar=_progress(source.stem),
                # The kernel would otherwise print that it uses TCP, and sometimes that it was stopped.
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"{source.stem}: cell {error.exec_count} ({first_line(error.source)}) failed: {error.ename}: "
            f"{error.evalue}; the notebook up to this cell is {target}"
        ) from None
    except DeadKernelError as error:
        raise NotebookFailed(f"{source.stem}: its kernel died ({error}); was there enough memory?") from None
    return target


def _progress(name: str) -> Any:  # noqa: ANN401 - papermill accepts a dictionary, but declares a bool
    """Return the progress bar for papermill, or False if nobody sees it."""
    from rich.console import Console

    return {"desc": name, "leave": False} if Console(stderr=True).is_terminal else False


def _parameters_of(source: Path) -> dict[str, Any]:
    import papermill

    return papermill.inspect_notebook(str(source))


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables of this process, which its kernels inherit, and restore them afterwards."""
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
    """Join consecutive outputs of the same stream; where they are split depends on timing."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _cover(notebook: NotebookNode, name: str) -> bytes:
    import base64

    for cell in notebook.cells:
        if COVER in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if image := output.get("data", {}).get("image/png"):
                    return base64.b64decode(image)
    raise P0Error(f"{name} has no picture: give the tag {COVER!r} to a cell that shows a figure")


def _small(png: bytes) -> bytes:
    """Shrink a picture for the README: fewer pixels and fewer colours."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((_COVER_WIDTH, _COVER_WIDTH))
    buffer = io.BytesIO()
    image.quantize(_COVER_COLOURS).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def first_line(source: str) -> str:
    """Return the first line of a cell.

    Args:
        source: source of the cell.
    """
    return source.strip().partition("\n")[0]
