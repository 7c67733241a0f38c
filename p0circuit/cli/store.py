"""`p0circuit models`, `fetch` and `cache`: models with names, and what this package has stored on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from p0circuit.cli.options import JsonOption
from p0circuit.cli.show import print_json, print_table
from p0circuit.errors import P0Error
from p0circuit.log import report_progress

MIB = 2**20


def fetch(
    names: Annotated[list[str], typer.Argument(help="Named models, as 'p0circuit models' lists them.")],
) -> None:
    """Download named models into the cache folder and check their hashes; complete files are not downloaded again."""
    from p0circuit.models import CATALOG, fetch as fetch_model

    if unknown := [name for name in names if name not in CATALOG]:
        raise P0Error(f"no named model {unknown[0]!r}; there are: {', '.join(CATALOG)}")
    for name in names:
        report_progress(f"{name}: {fetch_model(CATALOG[name])}")


def models(as_json: JsonOption = False) -> None:
    """List the models that have a name: shipped with the package, constructed, fetched, or fetchable."""
    from dataclasses import asdict

    from p0circuit.models import known_models

    known = known_models()
    if as_json:
        print_json([asdict(entry) for entry in known])
        return
    rows = []
    for entry in known:
        details = [entry.description]
        if entry.quantisation:
            details.append(f"weights stored as {entry.quantisation}")
        if entry.checkpoints:
            details.append(f"{len(entry.checkpoints)} checkpoints")
        if entry.licence != "MIT":
            details.append(f"licence {entry.licence}")
        rows.append((entry.name, entry.status, f"{entry.parameters / 1e6:.1f} M", "; ".join(details)))
    print_table(("name", "status", "parameters", "description"), rows)


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every file.")] = False,
    list_all: Annotated[bool, typer.Option("--all", help="List every recording.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the size of the cache by model and kind, or clear it; fetched models are not part of it.

    The cache holds recordings, and models converted from GGUF.
    """
    from p0circuit.models.gguf_conversion import clear_converted_models, list_converted_models
    from p0circuit.recording.cache import Cache

    store = Cache()
    if clear:
        freed = store.clear() + clear_converted_models()
        report_progress(f"freed {freed / MIB:.1f} MiB in {store.directory}")
    recordings = [entry | store.about(entry["key"]) for entry in store.entries()]
    converted = list_converted_models()
    total = sum(entry["bytes"] for entry in recordings)
    if as_json:
        contents = {"directory": str(store.directory), "limit": store.limit, "bytes": total, "entries": recordings}
        print_json(contents | {"converted": converted})
        return
    title = str(store.directory)
    if list_all:
        rows = [
            (entry.get("model"), entry.get("quantity"), entry.get("samples"), f"{entry['bytes'] / 1024:.0f}")
            for entry in recordings
        ]
        rows += [(model["file"], "converted weights", None, f"{model['bytes'] / 1024:.0f}") for model in converted]
        print_table(("model", "quantity", "samples", "KiB"), rows, title)
    else:
        print_table(("model", "kind", "files", "MiB"), _summary(recordings, converted), title)
    typer.echo(f"Recordings take {total / MIB:.1f} of {store.limit / MIB:.0f} MiB.")
    if converted:
        typer.echo(f"Converted models take {sum(model['bytes'] for model in converted) / MIB:.1f} MiB.")


def _summary(
    recordings: Iterable[Mapping[str, Any]], converted: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str, int, str]]:
    """Number and size of the files by model and kind: the quantity of a recording without its layer and position."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for entry in recordings:
        kind = re.sub(r"(_at)?(_-?\d+)+", "", str(entry.get("quantity")))
        sizes.setdefault((str(entry.get("model")), kind), []).append(entry["bytes"])
    for model in converted:
        sizes.setdefault((str(model["file"]), "converted weights"), []).append(model["bytes"])
    return [(*key, len(values), f"{sum(values) / MIB:.1f}") for key, values in sorted(sizes.items())]
