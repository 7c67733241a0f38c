"""`p0circuit notebooks`: list, run, build and export the course."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from p0circuit.course.build import NotebookFailed, build, find, folder, names, run, title
from p0circuit.errors import P0Error
from p0circuit.log import report_progress

app = typer.Typer(
    help="The paper as a course: list, run, build and export the notebooks of the repository.", no_args_is_help=True
)


class _Pairs(TyperCommand):
    """Takes `-p NAME VALUE` as papermill does, and `-p NAME=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest, joined = iter(args), []
        for arg in rest:
            joined.append(arg)
            if arg in ("-p", "--parameter") and (name := next(rest, None)) is not None:
                joined.append(name if "=" in name else f"{name}={next(rest, '')}")
        return super().parse_args(ctx, joined)


NamesArgument = Annotated[
    list[str] | None, typer.Argument(help="Numbers or names, as in 04 or patching.", show_default=False)
]
AllOption = Annotated[bool, typer.Option("--all", help="Every notebook, in the order of the course.")]


@app.command("list")
def list_notebooks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the notebooks in the order of the course."""
    found = {name: title(name) for name in names()}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, heading in found.items():
        typer.echo(f"{name:24} {heading}")


@app.command("run", cls=_Pairs)
def run_notebooks(
    name: NamesArgument = None,
    every: AllOption = False,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME VALUE", help="As in -p model wired -p samples 32."),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where executed notebooks go.")] = Path("out/notebooks"),
) -> None:
    """Execute notebooks by papermill; exits with 1 and names the cell if one fails."""
    _require("papermill", "ipykernel")
    chosen = _chosen(name, every)
    given = dict(_parameter(pair) for pair in parameter or [])
    failed = 0
    for number, one in enumerate(chosen, start=1):
        report_progress(f"{number}/{len(chosen)} {one}: {title(one)}")
        try:
            report_progress(f"{one}: executed, in {run(one, out, given)}")
        except NotebookFailed as failure:
            failed += 1
            report_progress(f"error: {failure}")
    if failed:
        raise typer.Exit(1)


@app.command("build")
def build_notebooks(name: NamesArgument = None, every: AllOption = False) -> None:
    """Make the shipped notebooks anew from their Python sources, with outputs (for those who edit them)."""
    _require("papermill", "ipykernel", "jupytext")
    for one in _chosen(name, every):
        report_progress(f"building {one}")
        try:
            report_progress(f"{one}: {build(one).stat().st_size / 2**20:.1f} MiB")
        except NotebookFailed as failure:
            report_progress(f"error: {failure}")
            raise typer.Exit(1) from None


@app.command("export")
def export_notebooks(
    name: NamesArgument = None,
    every: AllOption = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the pages go.")] = Path("out/notebooks"),
) -> None:
    """Make HTML pages of the shipped notebooks that open offline, formulas and attention views included."""
    _require("nbconvert", "latex2mathml")
    from p0circuit.course.export import notebook_page
    from p0circuit.io import write_atomically

    for one in _chosen(name, every):
        page = notebook_page(folder() / f"{one}.ipynb")
        path = write_atomically(out / f"{one}.html", lambda file, page=page: file.write_text(page, encoding="utf-8"))
        report_progress(f"{one}: {path}")


def _require(*modules: str) -> None:
    """Make sure that what notebooks need beside the package is there.

    Raises:
        P0Error: it is not.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise P0Error(f"{', '.join(missing)} missing: pip install 'p0circuit[notebooks]'")


def _chosen(given: Sequence[str] | None, every: bool) -> list[str]:
    if bool(given) == every:
        raise P0Error(f"name one or more notebooks, or give --all; there are: {', '.join(names())}")
    return names() if every else [find(name) for name in given or []]


def _parameter(pair: str) -> tuple[str, Any]:
    """A parameter and its value: a number, true, false or null as in JSON, or else the text itself."""
    name, sign, value = pair.partition("=")
    if not (name and sign and value):
        raise P0Error(f"-p {name}: expected a name and a value, as in -p samples 32")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
