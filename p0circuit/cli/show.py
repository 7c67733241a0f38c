"""What commands print on standard output: tables and claims for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from p0circuit.advice import Advice
    from p0circuit.results import Result


def print_json(value: object) -> None:
    """Print a value as JSON.

    Args:
        value: anything that `json` can write.
    """
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; its text is shown as it is, without markup.

    Args:
        columns: headings.
        rows: a value for each column; None is an empty cell.
        title: a line above the table.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    Console(highlight=False).print(table)


def print_paragraphs(heading: str, paragraphs: Mapping[str, str]) -> None:
    """Print a heading, and below it paragraphs with a label each.

    Args:
        heading: one line.
        paragraphs: text by label; empty text is left out.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(heading, style="bold"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in paragraphs.items():
        if text:
            grid.add_row(Text(label), Text(text))
    console.print(Padding(grid, (0, 0, 0, 2)))


def print_result(result: Result, subject: str) -> None:
    """Print a result: the claim it tests with its verdict, its metrics, and what a reader has to know.

    Args:
        result: the result of an experiment.
        subject: title of the model, or "training".
    """
    claim, judgement = result.claim, result.judgement
    if claim is not None and judgement is not None:
        print_paragraphs(
            f"{claim['id']} {claim['title']}: {judgement.verdict.upper()} in {subject}",
            {"claim": claim["statement"], "threshold": claim["threshold"], "measured": judgement.reason},
        )
    rows = [(name, str(interval)) for name, interval in result.metrics.items()]
    print_table(("quantity", "value [95 % interval]"), rows, f"{subject}: {result.experiment}")
    for note in result.notes:
        typer.echo(f"Note: {note}")


def print_claims(title: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the verdicts of a run.

    Args:
        title: title of the model.
        entries: entries of claims.json.
    """
    rows = [(f"{entry['id']} {entry['title']}", entry["verdict"], entry["why"]) for entry in entries]
    print_table(("claim", "verdict", "reason"), rows, title)


def print_advice(advice: Advice) -> None:
    """Print the answers of `p0circuit advise`.

    Args:
        advice: the advice on one model.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"{advice.title}: what the first token does, and what to do about it", style="bold"))
    for statement in advice.statements:
        console.print(Text.assemble("\n", (statement.topic, "bold"), "  ", (statement.verdict, "reverse")))
        console.print(Padding(Text(statement.text), (0, 0, 0, 2)))
        if statement.advice:
            console.print(Padding(Text(f"→ {statement.advice}"), (0, 0, 0, 2)))
