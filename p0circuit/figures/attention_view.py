"""Interactive attention patterns, drawn by CircuitsVis without a network connection.

1. The visualisation is CircuitsVis's `AttentionPatterns`: a picture of each head, and tokens that can be clicked.
2. CircuitsVis's own output either loads its script from an outside host or repeats the whole script in every view.
   Here the script of the installed package is written once per page (`script`). Each view is an empty box with its
   data, and is drawn as soon as the script has loaded.
3. CircuitsVis inserts tokens as HTML inside a `<script>`, so tokens are escaped for both.
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
    "This view of attention patterns is drawn by a script. In a notebook: trust the notebook, then rerun the cell of "
    "the first view, which holds the script for all views."
)


@dataclass(frozen=True)
class AttentionView:
    """Attention patterns of heads on one prompt, made by `attention_view`; a notebook displays it.

    Attributes:
        tokens: the tokens of the prompt as text.
        attention: shares of attention, rounded to 3 decimals, [head, query, key].
        labels: name of each head.
        title: one line above the view.
    """

    tokens: tuple[str, ...]
    attention: tuple[tuple[tuple[float, ...], ...], ...] = field(repr=False)
    labels: tuple[str, ...]
    title: str = ""

    def html(self, identity: str) -> str:
        """Return the HTML of the view, for a page that contains `script()`.

        Args:
            identity: id of the view; on one page, views with the same id must be equal.
        """
        properties = {
            "tokens": [html.escape(visible(token)) for token in self.tokens],
            "attention": self.attention,
            "headLabels": self.labels,
        }
        title = f"<p><strong>{html.escape(self.title)}</strong></p>" if self.title else ""
        box = f'<div data-view="{html.escape(identity)}">{_WAITING}</div>'
        return (
            f'<div class="attention-view" style="{_BOX}">{title}{box}</div>\n'
            "<script>(function show(view, properties) {\n"
            "  if (!window.CircuitsVis) return void setTimeout(show, 200, view, properties);\n"
            "  const box = document.querySelector(`[data-view=${JSON.stringify(view)}]:not([id])`);\n"
            "  if (!box) return;\n"
            "  box.id = `${view}-${Math.random().toString(36).slice(2)}`;\n"
            "  CircuitsVis.render(box.id, CircuitsVis.AttentionPatterns, properties);\n"
            f"}})({_for_script(identity)}, {_for_script(properties)});</script>\n"
        )

    def _repr_html_(self) -> str:
        """Return the HTML for a notebook; it needs no network connection."""
        # The identity is a hash of the content, so the output is the same in every run of the notebook.
        identity = sha256(repr((self.tokens, self.attention, self.labels, self.title)).encode()).hexdigest()[:12]
        return (script() if _this_output_carries_the_script() else "") + self.html(f"attention-{identity}")


def attention_view(
    tokens: Sequence[str], attention: object, labels: Sequence[str] | None = None, title: str = ""
) -> AttentionView:
    """Make an interactive view of attention patterns.

    Args:
        tokens: the tokens of the prompt as text, at least one.
        attention: shares of attention as a tensor, array or nested list, [head, query, key], or [query, key] for one
            head.
        labels: name of each head, such as `2.1`; "Head 0" and so on by default.
        title: one line above the view.

    Raises:
        P0Error: the shapes do not fit, or a value is not a share of attention.
    """
    # Recognise a tensor without importing torch.
    detach = getattr(attention, "detach", None)
    values = np.asarray(detach().float().cpu() if detach else attention, dtype=np.float64)
    if values.ndim == 2:
        values = values[None]
    if not len(tokens) or values.ndim != 3 or not len(values) or values.shape[1:] != (len(tokens), len(tokens)):
        raise P0Error(
            f"attention has shape {tuple(values.shape)} for {len(tokens)} tokens; expected [head, query, key] with as "
            "many queries and keys as tokens, and at least one"
        )
    # In half precision the sums can be slightly above 1.
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
    """Write the view of an experiment as `attention/<experiment>.json`, for the report.

    Args:
        directory: directory of the run.
        experiment: id of the experiment.
        view: the view to write.

    Returns:
        The path of the file.
    """
    value = {"title": view.title, "tokens": view.tokens, "labels": view.labels, "attention": view.attention}
    text = json.dumps(value, separators=(",", ":")) + "\n"
    path = directory / "attention" / f"{experiment}.json"
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_view(directory: Path, experiment: str) -> AttentionView | None:
    """Read the view of an experiment.

    Args:
        directory: directory of the run.
        experiment: id of the experiment.

    Returns:
        The view that `save_view` wrote; None if there is none.

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
    """Return a token with visible symbols for its blanks, line ends and unprintable characters.

    Args:
        token: text of the token.
    """
    text = "".join(_BLANKS.get(sign) or (sign if sign.isprintable() else ascii(sign)[1:-1]) for sign in token)
    return text or "∅"


@cache
def script() -> str:
    """Return the `<script>` element of the installed CircuitsVis; a page with views needs it once, anywhere.

    Raises:
        P0Error: the installed CircuitsVis has no bundled script.
    """
    # Importing the package would import torch.
    package = find_spec("circuitsvis")
    path = Path(package.origin or "").parent / "dist" / "cdn" / "iife.js" if package else Path("circuitsvis")
    if not path.is_file():
        raise P0Error(f"no script of CircuitsVis at {str(path)!r}; install it as pinned: pip install circuitsvis")
    code = re.sub(r"^//# sourceMappingURL=.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    # `</script` and `<!--` would end the element early. Inside string literals the escaped form means the same.
    code = re.sub(r"<(?=/script|!--)", r"\\x3C", code, flags=re.IGNORECASE)
    # The bundled tfjs would otherwise compile WebGL programs first, which takes half a minute without a GPU.
    start = f'{code}\nglobalThis._tfengine?.setBackend("cpu");\nreturn CircuitsVis;'
    return f"<script>window.CircuitsVis ??= (() => {{\n{start}\n}})();</script>\n"


def _for_script(value: object) -> str:
    """Return JSON that is safe inside a `<script>` element, whatever its strings contain."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


_carrier: tuple[Any, Any] | None = None


def _this_output_carries_the_script() -> bool:
    """Tell whether the script goes into this output: the first view of a notebook, or a rerun of that cell."""
    global _carrier
    # On Colab every output is a page of its own.
    if "google.colab" in sys.modules:
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # JupyterLab and VS Code name the running cell in the metadata; a terminal has no cells.
    parent = shell.get_parent() if shell is not None and hasattr(shell, "get_parent") else {}
    cell, run = parent.get("metadata", {}).get("cellId"), getattr(shell, "execution_count", None)
    if _carrier is None or (cell is not None and cell == _carrier[0] and run != _carrier[1]):
        _carrier = (cell, run)
        return True
    return False
