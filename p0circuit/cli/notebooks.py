"""`p0circuit notebooks`: list, run, build and export the course."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from p0circuit.cli.options import JsonOption
from p0circuit.cli.show import print_json
from p0circuit.course.build import NotebookFailed, build, find, folder, names, run, title
from p0circuit.errors import P0Error
from p0circuit.log import logger, report_progress

app = typer.Typer(
    help="The paper as a course: list, run, build and export the notebooks of the repository.", no_args_is_help=True
)


class _PairsCommand(TyperCommand):
    """A command that takes `-p NAME VALUE`, as papermill does, and `-p NAME=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer has a private copy of click
        """Join the name and value of every `-p` into one argument.

        Args:
            ctx: context of click.
            args: the arguments as given.
        """
        remaining, joined = iter(args), []
        for arg in remaining:
            joined.append(arg)
            if arg in ("-p", "--parameter") and (name := next(remaining, None)) is not None:
                joined.append(name if "=" in name else f"{name}={next(remaining, '')}")
        return super().parse_args(ctx, joined)


NamesArgument = Annotated[
    list[str] | None, typer.Argument(help="Numbers or names, as in 04 or patching.", show_default=False)
]
AllOption = Annotated[bool, typer.Option("--all", help="Every notebook, in the order of the course.")]


@app.command("list")
def list_notebooks(as_json: JsonOption = False) -> None:
    """List the notebooks in the order of the course."""
    titles = {name: title(name) for name in names()}
    if as_json:
        print_json(titles)
        return
    for name, heading in titles.items():
        typer.echo(f"{name:24} {heading}")


@app.command("run", cls=_PairsCommand)
def run_notebooks(
    notebooks: NamesArgument = None,
    all_notebooks: AllOption = False,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME VALUE", help="As in -p model wired -p samples 32."),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for executed notebooks.")] = Path("out/notebooks"),
) -> None:
    """Execute notebooks with papermill; if one fails, name its cell, go on, and exit with 1."""
    require_modules("papermill", "ipykernel")
    selected = _selected(notebooks, all_notebooks)
    parameters = dict(_parameter(pair) for pair in parameter or [])
    failures = 0
    for number, name in enumerate(selected, start=1):
        report_progress(f"{number}/{len(selected)} {name}: {title(name)}")
        try:
            report_progress(f"{name}: executed, in {run(name, out, parameters)}")
        except NotebookFailed as failure:
            failures += 1
            logger.error("error: %s", failure)
    if failures:
        raise typer.Exit(1)


@app.command("build")
def build_notebooks(notebooks: NamesArgument = None, all_notebooks: AllOption = False) -> None:
    """Build the shipped notebooks, with outputs, from their Python sources (for those who edit them)."""
    require_modules("papermill", "ipykernel", "jupytext")
    for name in _selected(notebooks, all_notebooks):
        report_progress(f"building {name}")
        try:
            report_progress(f"{name}: {build(name).stat().st_size / 2**20:.1f} MiB")
        except NotebookFailed as failure:
            logger.error("error: %s", failure)
            raise typer.Exit(1) from None


@app.command("export")
def export_notebooks(
    notebooks: NamesArgument = None,
    all_notebooks: AllOption = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the pages.")] = Path("out/notebooks"),
) -> None:
    """Export the shipped notebooks as HTML pages that open offline, with formulas and attention views."""
    require_modules("nbconvert", "latex2mathml")
    from p0circuit.course.export import notebook_page
    from p0circuit.io import write_atomically

    for name in _selected(notebooks, all_notebooks):
        page = notebook_page(folder() / f"{name}.ipynb")
        path = write_atomically(out / f"{name}.html", lambda file, page=page: file.write_text(page, encoding="utf-8"))
        report_progress(f"{name}: {path}")


def require_modules(*modules: str) -> None:
    """Check that the packages that notebooks need are installed.

    Args:
        *modules: names of modules.

    Raises:
        P0Error: one is missing.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise P0Error(f"{', '.join(missing)} missing: pip install 'p0circuit[notebooks]'")


def _selected(given: Sequence[str] | None, all_notebooks: bool) -> list[str]:
    if bool(given) == all_notebooks:
        raise P0Error(f"name one or more notebooks, or give --all; there are: {', '.join(names())}")
    return names() if all_notebooks else [find(name) for name in given or []]


def _parameter(pair: str) -> tuple[str, Any]:
    """Split a parameter into its name and its value, which is read as JSON if it is JSON, and is text otherwise."""
    name, sign, value = pair.partition("=")
    if not (name and sign and value):
        raise P0Error(f"-p {name}: expected a name and a value, as in -p samples 32")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
