"""Attention patterns to click through: CircuitsVis without the network, its script once per page.

1. The visualisation is CircuitsVis's `AttentionPatterns`: a picture per head, and the tokens, which answer to a click.
2. CircuitsVis's own output asks an outside host whether there is a network, and then loads its script from one, or
   repeats all of it with every view. Here the installed package's script goes on the page once (`SCRIPT`), and each
   view is a box and its data, which waits for that script.
3. Tokens are text: that component inserts them as HTML, inside a `<script>`, so they are escaped for both.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from p0circuit.errors import P0Error
from p0circuit.io import write_atomically

_DIGITS = 3
_BLANKS = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": "\u00a0"}
_BOX = "background:#fff;color:#111;color-scheme:light;padding:0 .75rem .75rem;overflow-x:auto;border-radius:4px"
_WAITING = (
    "This view of attention patterns draws itself with a script. In a notebook: trust the notebook, and run again the "
    "cell of its first view, which holds the script for all of them."
)


@dataclass(frozen=True)
class AttentionView:
    """Attention patterns of some heads on one prompt; shows itself in a notebook. Made by `attention_view`.

    Attributes:
        tokens: the prompt's tokens as text.
        attention: [head, query, key], shares of attention, rounded to 3 decimals.
        labels: what each head is called.
        title: one line above the view.
    """

    tokens: tuple[str, ...]
    attention: tuple[tuple[tuple[float, ...], ...], ...] = field(repr=False)
    labels: tuple[str, ...]
    title: str = ""

    def html(self, identity: str) -> str:
        """The view for a page that holds `script()`; views of one `identity` on a page have to be the same."""
        properties = {
            "tokens": [html.escape(visible(token)) for token in self.tokens],
            "attention": self.attention,
            "headLabels": self.labels,
        }
        title = f"<p><strong>{html.escape(self.title)}</strong></p>" if self.title else ""
        place = f'<div data-view="{html.escape(identity)}">{_WAITING}</div>'
        return (
            f'<div class="attention-view" style="{_BOX}">{title}{place}</div>\n'
            "<script>(function show(view, properties) {\n"
            "  if (!window.CircuitsVis) return void setTimeout(show, 200, view, properties);\n"
            "  const place = document.querySelector(`[data-view=${JSON.stringify(view)}]:not([id])`);\n"
            "  if (!place) return;\n"
            "  place.id = `${view}-${Math.random().toString(36).slice(2)}`;\n"
            "  CircuitsVis.render(place.id, CircuitsVis.AttentionPatterns, properties);\n"
            f"}})({_for_script(identity)}, {_for_script(properties)});</script>\n"
        )

    def _repr_html_(self) -> str:
        """For notebooks: offline, in exported ones too."""
        # Whenever the notebook is run, the same view is the same text: its script tells it from others on the page.
        identity = sha256(repr((self.tokens, self.attention, self.labels, self.title)).encode()).hexdigest()[:12]
        return (script() if _this_output_carries_the_script() else "") + self.html(f"attention-{identity}")


def attention_view(
    tokens: Sequence[str], attention: Any, labels: Sequence[str] | None = None, title: str = ""
) -> AttentionView:
    """A view of attention patterns.

    Args:
        tokens: the prompt's tokens as text, at least one.
        attention: a tensor, array or nested list [head, query, key], or [query, key] for one head.
        labels: a name for each head, such as `2.1`; "Head 0" and so on if not given.
        title: one line above the view.

    Raises:
        P0Error: the shapes do not fit, or a value is not a share of attention.
    """
    if hasattr(attention, "detach"):
        attention = attention.detach().float().cpu()
    values = np.asarray(attention, dtype=np.float64)
    if values.ndim == 2:
        values = values[None]
    if not len(tokens) or values.ndim != 3 or not len(values) or values.shape[1:] != (len(tokens), len(tokens)):
        raise P0Error(
            f"attention has shape {tuple(values.shape)} for {len(tokens)} tokens; expected [head, query, key] with as "
            "many queries and keys as tokens, and at least one"
        )
    # Half precision leaves sums a little above one.
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1.01):
        raise P0Error(
            f"attention runs from {values.min():g} to {values.max():g}; expected shares between 0 and 1, as "
            "hook_pattern gives them (hook_attn_scores are not yet shares)"
        )
    names = [f"Head {head}" for head in range(len(values))] if labels is None else labels
    if len(names) != len(values):
        raise P0Error(f"got {len(names)} labels for {len(values)} heads; give one for each")
    patterns = tuple(tuple(tuple(row) for row in head) for head in values.round(_DIGITS).tolist())
    return AttentionView(tuple(tokens), patterns, tuple(names), title)


def save_view(directory: Path, experiment: str, view: AttentionView) -> Path:
    """Write the view of an experiment for the report: `<directory>/attention/<experiment>.json`."""
    value = {"title": view.title, "tokens": view.tokens, "labels": view.labels, "attention": view.attention}
    text = json.dumps(value, separators=(",", ":")) + "\n"
    path = directory / "attention" / f"{experiment}.json"
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_view(directory: Path, experiment: str) -> AttentionView | None:
    """The view that `save_view` wrote for an experiment; None if there is none.

    Raises:
        P0Error: the file is not such a view.
    """
    path = directory / "attention" / f"{experiment}.json"
    if not path.is_file():
        return None
    try:
        return attention_view(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise P0Error(f"{path} is no attention view: {error}; run {experiment} again") from None


def visible(token: str) -> str:
    """A token with its blanks, line ends and unprintable characters to be seen."""
    shown = "".join(_BLANKS.get(sign) or (sign if sign.isprintable() else ascii(sign)[1:-1]) for sign in token)
    return shown or "∅"


@cache
def script() -> str:
    """The `<script>` element with CircuitsVis as installed; a page needs it once, before or after its views.

    Raises:
        P0Error: the installed CircuitsVis has no bundled script.
    """
    # Importing the package would import torch.
    package = find_spec("circuitsvis")
    path = Path(package.origin or "").parent / "dist" / "cdn" / "iife.js" if package else Path("circuitsvis")
    if not path.is_file():
        raise P0Error(f"no script of CircuitsVis at {str(path)!r}; install it as pinned: pip install circuitsvis")
    code = re.sub(r"^//# sourceMappingURL=.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    # These would end the element, or change how its end is found; in string literals the escape means the same.
    code = re.sub(r"<(?=/script|!--)", r"\\x3C", code, flags=re.IGNORECASE)
    # tfjs, inside, would compile WebGL programs first: half a minute without a graphics card, for some small means.
    start = f'{code}\nglobalThis._tfengine?.setBackend("cpu");\nreturn CircuitsVis;'
    return f"<script>window.CircuitsVis ??= (() => {{\n{start}\n}})();</script>\n"


def _for_script(value: Any) -> str:
    """JSON that can stand inside a `<script>` element, whatever its strings hold."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


_carrier: tuple[Any, Any] | None = None


def _this_output_carries_the_script() -> bool:
    """True for a notebook's first view, and again when its cell is run again: that output replaces the one before."""
    global _carrier
    # Colab gives every output a page of its own.
    if "google.colab" in sys.modules:
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # What JupyterLab and VS Code say about the cell that runs; a terminal has no cells.
    parent = shell.get_parent() if shell is not None and hasattr(shell, "get_parent") else {}
    cell, run = parent.get("metadata", {}).get("cellId"), getattr(shell, "execution_count", None)
    if _carrier is None or (cell is not None and cell == _carrier[0] and run != _carrier[1]):
        _carrier = (cell, run)
        return True
    return False
