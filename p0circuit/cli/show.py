"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from p0circuit.advice import Advice


def show_claims(name: str, claims: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("claim", "verdict", "why"):
        table.add_column(column, overflow="fold")
    for claim in claims:
        table.add_row(f"{claim['id']} {claim['title']}", claim["verdict"], claim["why"])
    Console(stderr=True).print(table)


def show_advice(advice: Advice) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    # Names and text may hold what rich would take for markup.
    console.print(Text(f"{advice.title}: what the first token does, and what to do about it", style="bold"))
    for statement in advice.statements:
        console.print(Text.assemble("\n", (statement.topic, "bold"), "  ", (statement.verdict, "reverse")))
        console.print(Padding(Text(statement.text), (0, 0, 0, 2)))
        if statement.advice:
            console.print(Padding(Text(f"→ {statement.advice}"), (0, 0, 0, 2)))


def print_json(value: Any, wanted: bool) -> None:
    if wanted:
        typer.echo(json.dumps(value, indent=2))
