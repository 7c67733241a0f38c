"""What the notebooks share: models, prompts, and the display of results.

A `Page` displays figures, tables and attention views in a notebook. With a directory it also saves figures. The last
cell of every notebook prints its key figures as JSON, for readers and for tests.
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
"""The text of the prompts. It is shipped, so every reader gets the same figures."""
_CSS_PIXELS = 105
"""Pixels of a notebook page per inch of a figure."""
_LONGEST_NAME = 60
PRINT_WIDTH = 92
"""Width of printed text, in characters."""
_HEADING = re.compile(r'<text style="font-size: (9|9\.5)px[^>]*>([^<]+)</text>')
"""Titles in the SVG of a figure, by font size: 9 for a panel and 9.5 for the figure. No other text has these sizes."""
WITH_A_SINK = ("p0-nano", "force-sink-0", "wired")
"""Shipped models with a sink on text without BOS in heads above block 1, which the notebooks study."""


def open_model(name: str | Path, checkpoint: int | str | None = None) -> HookedModel:
    """Load a model, and use one thread if it is so small that more threads are slower.

    OMP_NUM_THREADS takes precedence if it is set.

    Args:
        name: as in `load_model`.
        checkpoint: as in `load_model`.
    """
    model = load_model(name, checkpoint=checkpoint)
    one_thread_if_small(model)
    return model


def read_prompts(model: HookedModel, samples: int, seed: int = 0, length: int = 64) -> PromptSet:
    """Draw prompts of the shipped code without BOS; prompts of random tokens for a model without a tokenizer.

    Args:
        model: a hooked model.
        samples: number of prompts.
        seed: of the random draw.
        length: tokens per prompt.
    """
    return prompts_for(model, TEXT, samples, length, seed)


def sink_of(model: HookedModel, prompts: PromptSet) -> StudiedSink:
    """Select the sink under study above block 1; if there is none, the error names models that have one.

    Args:
        model: a hooked model.
        prompts: of which one half selects the sink heads and the other half is measured.

    Raises:
        NotApplicable: there is no sink, or none above block 1.
    """
    try:
        return studied_sink(model, prompts, above_block=CIRCUIT_BLOCKS[-1])
    except NotApplicable as reason:
        *others, last = WITH_A_SINK
        shipped = f"{', '.join(others)} and {last}"
        raise NotApplicable(
            f"{reason}. This notebook studies a sink that does not depend on BOS; of the shipped models {shipped} have "
            f"one (-p model {WITH_A_SINK[0]})"
        ) from None


@dataclass(frozen=True)
class Page:
    """The output of one notebook.

    Attributes:
        out: directory for figures and key figures; None to save nothing.
    """

    out: str | Path | None = None

    def show(self, thing: Figure | Path | pd.DataFrame | AttentionView, title: str = "") -> None:
        """Display a figure, a table or an attention view.

        A script cannot display pictures: it prints tables, and one line for any other thing.

        Args:
            thing: a figure, the path of a PNG file, a table, or an attention view.
            title: what a figure shows, for readers who cannot see it; needed for a figure.

        Raises:
            P0Error: it is none of these, or a figure has no title.
        """
        import pandas as pd
        from matplotlib.figure import Figure

        if isinstance(thing, Path | Figure):
            if not title:
                raise P0Error("a figure needs a title, as in page.show(figure, 'sink scores of all heads')")
            if not isinstance(thing, Path):
                self._save(thing, title)
            _display({"text/plain": f"[figure: {title}]"}, functools.partial(_picture, thing, title))
        elif isinstance(thing, pd.DataFrame):
            _display({"text/plain": _plain(thing), "text/html": _table(thing)})
        elif isinstance(thing, AttentionView):
            _display({"text/plain": f"[attention view: {thing.title}]"}, lambda: {"text/html": thing._repr_html_()})
        else:
            raise P0Error(f"a page shows figures, tables and attention views, not {type(thing).__name__}; print it")

    def key_figures(self, **values: float) -> None:
        """Print the key figures of the page as one JSON object; this is the last output of every notebook.

        Args:
            **values: key figures by name.

        Raises:
            P0Error: a key figure is not a finite number.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise P0Error(f"{name} is {value}; key figures are finite numbers")
        rounded = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if self.out is not None:
            write_json(Path(self.out) / "key-figures.json", rounded)
        print(json.dumps(rounded, indent=2))

    def _save(self, figure: Figure, title: str) -> None:
        if self.out is not None:
            name = re.sub(r"\W+", "-", title.lower()).strip("-")[:_LONGEST_NAME]
            for kind in ("png", "svg"):
                content, path = figure_bytes(figure, kind), Path(self.out) / "figures" / f"{name}.{kind}"
                write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))


def print_verdict(result: Result) -> None:
    """Print the claim that a result tests: threshold, measurement, verdict and notes.

    Args:
        result: result of an experiment that tests a claim.

    Raises:
        P0Error: the experiment tests no claim.
    """
    if (entry := result.claim_entry()) is None:
        raise P0Error(f"{result.experiment} tests no claim: print its metrics")
    _print_claim(entry, result.notes)


def try_claim(experiment: Experiment, model: HookedModel, prompts: PromptSet) -> Result | None:
    """Run an experiment that tests a claim and print the verdict.

    Args:
        experiment: the experiment.
        model: a hooked model.
        prompts: the prompts to run it on.

    Returns:
        The result; None if the experiment is not applicable, and then the reason is printed.

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


def _print_below(text: str) -> None:
    """Print a paragraph that is indented below the line before it."""
    print(textwrap.fill(text, PRINT_WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))


def show_evidence(page: Page, run: Reproduction, experiment: str) -> None:
    """Show what a run contains of one experiment: the claim with its verdict and all figures, or why there are none.

    Args:
        page: where to show it.
        run: a run of `p0circuit reproduce`.
        experiment: id of the experiment.
    """
    claim = next((claim for claim in run.claims if claim["experiment"] == experiment), None)
    result = run.results.get(experiment)
    missing = run.manifest.get("left_out", {}) | run.manifest.get("broken", {}) | run.unreadable
    if claim is not None:
        _print_claim(claim, claim.get("notes", ()))
    elif result is not None:
        print(f"{result.title}: measured; it tests no claim.")
        _print_notes(result.notes)
    if result is None and (claim is None or experiment in run.unreadable):
        message = f"{experiment}: no figures: {missing.get(experiment, 'this run has not reached it')}"
        print(textwrap.fill(message, PRINT_WIDTH, subsequent_indent="  "))
    if result is not None:
        for name, figure in result.figures.items():
            page.show(figure, f"{experiment}, {name}: {_headings(figure) or result.title}")


def _headings(figure: Figure | Path) -> str:
    """Return the titles of a figure on disk and of its panels, read from the SVG next to the PNG."""
    if not isinstance(figure, Path) or not (drawing := figure.with_suffix(".svg")).is_file():
        return ""
    headings = _HEADING.findall(drawing.read_text(encoding="utf-8"))
    title, panels = ([html.unescape(text) for size, text in headings if size == one] for one in ("9.5", "9"))
    return "; ".join(filter(None, [" ".join(title), *dict.fromkeys(panels)]))


def print_advice(advice: Advice) -> None:
    """Print the advice for a model: each question with its answer, the measured values and what to do.

    Args:
        advice: result of `advise`.
    """
    print(f"{advice.title}: what the first token does, and what to do about it")
    for one in advice.statements:
        print(f"\n{one.topic} {one.verdict.upper()}")
        for line in (one.text, one.advice and f"-> {one.advice}"):
            if line:
                print(textwrap.fill(line, PRINT_WIDTH, initial_indent="  ", subsequent_indent="  "))


def metrics_table(result: Result, names: Sequence[str] = ()) -> pd.DataFrame:
    """Make a table of metrics with their 95 % intervals.

    Args:
        result: result of an experiment.
        names: names of metrics; all if none are named.
    """
    import pandas as pd

    metrics = names or list(result.metrics)
    rows = [(name.replace("_", " "), *result.metrics[name].to_json().values()) for name in metrics]
    return pd.DataFrame(rows, columns=["quantity", "value", "low", "high", "n"])


def _display(plain: dict[str, str], rich: Callable[[], dict[str, Any]] | None = None) -> None:
    """Display something in a notebook; elsewhere print its plain text. `rich` is called only in a notebook."""
    if not in_notebook():
        print(plain["text/plain"])
        return
    from IPython.display import display

    bundle = plain | (rich() if rich else {})
    metadata = bundle.pop("metadata", {})
    display(bundle, raw=True, metadata=metadata)


def _picture(figure: Figure | Path, title: str) -> dict[str, Any]:
    import base64

    if isinstance(figure, Path):
        image, inches = _few_colours(figure)
    else:
        image, inches = figure_bytes(figure, "png"), figure.get_figwidth()
    attributes = {"alt": title, "width": round(inches * _CSS_PIXELS)}
    return {"image/png": base64.b64encode(image).decode(), "metadata": {"image/png": attributes}}


def _few_colours(png: Path) -> tuple[bytes, float]:
    """Return a figure from disk with 256 colours, a third of the size, and its width in inches."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(png) as image:
        image.convert("RGB").quantize(256).save(buffer, "png", optimize=True)
        return buffer.getvalue(), image.width / FIGURE_DPI


def _plain(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=_number)


def _table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, float_format=_number, border=0, justify="left")


def _number(value: float) -> str:
    return f"{value:.3f}"
