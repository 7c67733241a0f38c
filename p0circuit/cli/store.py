"""`p0circuit models`, `fetch` and `cache`: what is on this machine, and what can be fetched."""

from __future__ import annotations

from typing import Annotated

import typer

from p0circuit.cli.options import JsonOption
from p0circuit.cli.show import print_json
from p0circuit.errors import P0Error
from p0circuit.log import report_progress


def fetch(
    names: Annotated[list[str], typer.Argument(help="Named models, as 'p0circuit models' lists them.")],
) -> None:
    """Download named models into the cache folder, checked by hash; what is there already is not downloaded again."""
    from p0circuit.models import CATALOG, fetch as fetch_model

    if unknown := [name for name in names if name not in CATALOG]:
        raise P0Error(f"no named model {unknown[0]!r}; there are: {', '.join(CATALOG)}")
    for name in names:
        report_progress(f"{name}: {fetch_model(CATALOG[name])}")


def models(as_json: JsonOption = False) -> None:
    """List the models with names: shipped with the package, fetched, and those that can be fetched."""
    from dataclasses import asdict

    from p0circuit.models import known_models

    known = known_models()
    if as_json:
        print_json([asdict(entry) for entry in known], True)
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("name", "status", "weights", "parameters"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is")
    for entry in known:
        steps = f"; {len(entry.checkpoints)} checkpoints" if entry.checkpoints else ""
        licence = "" if entry.status == "shipped" else f"; {entry.licence}"
        parameters = f"{entry.parameters / 1e6:.1f} M"
        columns = (entry.name, entry.status, entry.quantisation or "plain", parameters)
        table.add_row(*map(escape, (*columns, f"{entry.description}{steps}{licence}")))
    Console().print(table)


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the cache holds, recordings and models converted from GGUF, or clear it (fetched files stay)."""
    from p0circuit.models.gguf_conversion import clear_converted_models, list_converted_models
    from p0circuit.recording.cache import Cache

    store = Cache()
    if clear:
        freed = store.clear() + clear_converted_models()
        report_progress(f"freed {freed / 2**20:.1f} MiB in {store.directory}")
    entries = [entry | store.about(entry["key"]) for entry in store.entries()]
    total = sum(entry["bytes"] for entry in entries)
    models = list_converted_models()
    if as_json:
        held = {"directory": str(store.directory), "limit": store.limit, "bytes": total, "entries": entries}
        print_json(held | {"converted": models}, True)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "quantity", "samples", "KiB", title=str(store.directory))
    for entry in entries:
        table.add_row(
            str(entry.get("model")),
            str(entry.get("quantity")),
            str(entry.get("samples")),
            f"{entry['bytes'] / 1024:.0f}",
        )
    for model in models:
        table.add_row(escape(str(model["file"])), "plain weights", "", f"{model['bytes'] / 1024:.0f}")
    console = Console()
    console.print(table)
    console.print(f"{total / 2**20:.1f} of {store.limit / 2**20:.0f} MiB in use by recordings")
    if models:
        console.print(f"{sum(model['bytes'] for model in models) / 2**20:.1f} MiB in use by converted models")
