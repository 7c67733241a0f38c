"""What the notebooks share: models, prompts, and how a page shows results.

A `Page` shows figures, tables and attention views where there is a notebook to show them in. It saves figures in a
directory if it is given one, and ends with its key figures as JSON, for people and for tests.
"""

from __future__ import annotations

import functools
import html
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.conditions import prompts_for
from p0circuit.experiments.sink_under_study import StudiedSink, studied_sink
from p0circuit.figures.attention_view import AttentionView
from p0circuit.hooked_model import HookedModel
from p0circuit.io import write_atomically, write_json
from p0circuit.log import in_notebook
from p0circuit.models import load_model, one_thread_if_small
from p0circuit.prompts import PromptSet
from p0circuit.report.contents import Reproduction, shown_verdict
from p0circuit.results import FIGURE_DPI, Result, figure_bytes
from p0circuit.sink import CIRCUIT_BLOCKS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from p0circuit.advice import Advice


TEXT = "code"
"""The text notebooks read: it comes with the package, so that everyone gets the same figures."""
_CSS_PIXELS = 105
"""Of an inch of a figure, as it stands in a notebook."""
_LONGEST_NAME = 60
PRINT_WIDTH = 92
"""Of what is printed, in characters."""
_HEADING = re.compile(r'<text style="font-size: (9|9\.5)px[^>]*>([^<]+)</text>')
"""In the SVG of a figure of ours: nothing but the titles of panels (9) and of the whole (9.5) has these sizes."""
WITH_A_SINK = ("p0-nano", "force-sink-0", "wired")
"""Shipped models that have what the notebooks take apart: a sink on text without BOS, in heads above block 1."""


def open_model(name: str | Path, checkpoint: int | str | None = None) -> Any:
    """`load_model`, on one thread where more would be slower; OMP_NUM_THREADS, if set, has the last word."""
    model = load_model(name, checkpoint=checkpoint)
    one_thread_if_small(model)
    return model


def read_prompts(model: HookedModel, samples: int, seed: int = 0, length: int = 64) -> PromptSet:
    """Crops of the shipped code, without BOS; random tokens for a model that has no tokenizer to read text with."""
    return prompts_for(model, TEXT, samples, length, seed)


def sink_of(model: HookedModel, prompts: PromptSet) -> StudiedSink:
    """`studied_sink` above block 1, for a notebook; where there is none, the error names models that have one.

    Raises:
        NotApplicable: there is no sink, or none above block 1.
    """
    try:
        return studied_sink(model, prompts, above_block=CIRCUIT_BLOCKS[-1])
    except NotApplicable as reason:
        *others, last = WITH_A_SINK
        shipped = f"{', '.join(others)} and {last}"
        raise NotApplicable(
            f"{reason}. This notebook takes a sink apart that needs no BOS; of the shipped models {shipped} have one "
            f"(-p model {WITH_A_SINK[0]})"
        ) from None


@dataclass(frozen=True)
class Page:
    """One notebook: what it shows, and where it leaves figures and key figures if `out` names a directory."""

    out: str | Path | None = None

    def show(self, thing: Figure | Path | pd.DataFrame | AttentionView, title: str = "") -> None:
        """Show a figure, a table or an attention view; a figure needs a title: what it shows, for those who cannot see.

        The path of a PNG is a figure that a run has left on disk. A script has no place for pictures: it prints tables,
        and of the others that they are there.

        Raises:
            P0Error: it is none of these, or a figure has no title.
        """
        if isinstance(thing, Path) or hasattr(thing, "savefig"):
            if not title:
                raise P0Error("a figure needs a title, as in page.show(figure, 'sink scores of all heads')")
            if not isinstance(thing, Path):
                self._save(thing, title)
            _display({"text/plain": f"[figure: {title}]"}, functools.partial(_picture, thing, title))
        elif hasattr(thing, "to_html"):
            _display({"text/plain": _plain(thing), "text/html": _table(thing)})
        elif isinstance(thing, AttentionView):
            _display({"text/plain": f"[attention view: {thing.title}]"}, lambda: {"text/html": thing._repr_html_()})
        else:
            raise P0Error(f"a page shows figures, tables and attention views, not {type(thing).__name__}; print it")

    def key_figures(self, **values: float) -> None:
        """Print the page's key figures as one JSON object: the last output of every notebook.

        Raises:
            P0Error: one of them is not a finite number.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise P0Error(f"{name} is {value}; key figures are finite numbers")
        rounded = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if self.out is not None:
            write_json(Path(self.out) / "key-figures.json", rounded)
        print(json.dumps(rounded, indent=2))

    def _save(self, figure: Any, title: str) -> None:
        if self.out is not None:
            name = re.sub(r"\W+", "-", title.lower()).strip("-")[:_LONGEST_NAME]
            for kind in ("png", "svg"):
                content, path = figure_bytes(figure, kind), Path(self.out) / "figures" / f"{name}.{kind}"
                write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))


def print_verdict(result: Result) -> None:
    """Print the claim that a result tests: what was required, what was measured, how it ended, and what to know of it.

    Raises:
        P0Error: the experiment tests no claim.
    """
    if (entry := result.claim_entry()) is None:
        raise P0Error(f"{result.experiment} tests no claim: print its metrics")
    _print_claim(entry, result.notes)


def try_claim(experiment: Experiment, model: HookedModel, prompts: PromptSet) -> Result | None:
    """Run an experiment that tests a claim, and print the verdict; None where it does not apply: the reason is printed.

    Raises:
        P0Error: the experiment tests no claim.
    """
    try:
        result = experiment.run(model, prompts)
    except NotApplicable as reason:
        about = experiment.claim
        print(f"{about.id} {about.title}: NOT APPLICABLE" if about else f"{experiment.id}: NOT APPLICABLE")
        _print_below(str(reason))
        return None
    print_verdict(result)
    return result


def _print_claim(about: Mapping[str, Any], notes: Sequence[str]) -> None:
    print(f"{about['id']} {about['title']}: {shown_verdict(about).upper()}")
    for name in ("statement", "threshold", "why"):
        _print_below(f"{name}: {about[name]}")
    _print_notes(notes)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _print_below(f"note: {note}")


def _print_below(told: str) -> None:
    """A paragraph that belongs to the line above it."""
    print(textwrap.fill(told, PRINT_WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))


def show_evidence(page: Page, run: Reproduction, experiment: str) -> None:
    """What a run's report holds of one experiment: the claim with its verdict, all figures, or why there are none."""
    claim = next((claim for claim in run.claims if claim["experiment"] == experiment), None)
    result = run.results.get(experiment)
    missing = run.manifest.get("left_out", {}) | run.manifest.get("broken", {}) | run.unreadable
    if claim is not None:
        _print_claim(claim, claim.get("notes", ()))
    elif result is not None:
        print(f"{result.title}: measured; no claim hangs on it.")
        _print_notes(result.notes)
    if result is None and (claim is None or experiment in run.unreadable):
        told = f"{experiment}: no figures: {missing.get(experiment, 'this run has not come to it')}"
        print(textwrap.fill(told, PRINT_WIDTH, subsequent_indent="  "))
    if result is not None:
        for name, figure in result.figures.items():
            page.show(figure, f"{experiment}, {name}: {_headings(figure) or result.title}")


def _headings(figure: Any) -> str:
    """What stands above a figure that a run has left, and above its panels: in the SVG beside it text is still text."""
    if not isinstance(figure, Path) or not (drawing := figure.with_suffix(".svg")).is_file():
        return ""
    found = _HEADING.findall(drawing.read_text(encoding="utf-8"))
    whole, panels = ([html.unescape(text) for size, text in found if size == one] for one in ("9.5", "9"))
    return "; ".join(filter(None, [" ".join(whole), *dict.fromkeys(panels)]))


def print_advice(advice: Advice) -> None:
    """Print what `advise` says of a model: each question with its answer, the values behind it, and what to do."""
    print(f"{advice.title}: what the first token does, and what to do about it")
    for one in advice.statements:
        print(f"\n{one.topic} {one.verdict.upper()}")
        for line in (one.text, one.advice and f"-> {one.advice}"):
            if line:
                print(textwrap.fill(line, PRINT_WIDTH, initial_indent="  ", subsequent_indent="  "))


def metrics_table(result: Result, names: Sequence[str] = ()) -> pd.DataFrame:
    """Some metrics of a result (all if none are named) as a table: value and 95 % interval."""
    import pandas as pd

    chosen = names or list(result.metrics)
    rows = [(name.replace("_", " "), *result.metrics[name].to_json().values()) for name in chosen]
    return pd.DataFrame(rows, columns=["quantity", "value", "low", "high", "n"])


def _display(plain: dict[str, str], rich: Callable[[], dict[str, Any]] | None = None) -> None:
    """Show something in a notebook; elsewhere print its plain text. What takes time is made in a notebook only."""
    if not in_notebook():
        print(plain["text/plain"])
        return
    from IPython.display import display

    bundle = plain | (rich() if rich else {})
    metadata = bundle.pop("metadata", {})
    display(bundle, raw=True, metadata=metadata)


def _picture(figure: Any, title: str) -> dict[str, Any]:
    import base64

    if isinstance(figure, Path):
        image, inches = _few_colours(figure)
    else:
        image, inches = figure_bytes(figure, "png"), figure.get_figwidth()
    shown = {"alt": title, "width": round(inches * _CSS_PIXELS)}
    return {"image/png": base64.b64encode(image).decode(), "metadata": {"image/png": shown}}


def _few_colours(png: Path) -> tuple[bytes, float]:
    """A figure from disk at a third of its size, for a page of many, and its width in inches."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(png) as image:
        image.convert("RGB").quantize(256).save(buffer, "png", optimize=True)
        return buffer.getvalue(), image.width / FIGURE_DPI


def _plain(table: Any) -> str:
    return table.to_string(index=False, float_format=_number)


def _table(table: Any) -> str:
    return table.to_html(index=False, float_format=_number, border=0, justify="left")


def _number(value: float) -> str:
    return f"{value:.3f}"
