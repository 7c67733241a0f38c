"""Attention views: refused when wrong, the same after a round trip, one script for a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from p0circuit.figures import attention_view as module
from p0circuit.figures.attention_view import attention_view, load_view, save_view, script, visible
from tests.report.made_up import HOSTILE, view


def test_takes_tensors_arrays_and_lists_of_one_or_several_heads() -> None:
    values = torch.tensor([[1.0, 0.0], [0.12345, 0.87655]], requires_grad=True)
    expected = (((1.0, 0.0), (0.123, 0.877)),)
    for given in (values, values.detach().numpy(), values.tolist(), values[None], values.bfloat16()):
        found = attention_view(["a", "b"], given)
        assert np.allclose(found.attention, expected, atol=2e-3)
        assert found.labels == ("Head 0",)
    assert attention_view(["a", "b"], values).attention == expected


@pytest.mark.parametrize(
    ("tokens", "attention", "labels", "message"),
    [
        (["a"], np.ones((2, 2)), None, r"shape \(1, 2, 2\) for 1 tokens"),
        ([], np.ones((1, 0, 0)), None, "for 0 tokens"),
        (["a"], np.ones((0, 1, 1)), None, "for 1 tokens"),
        (["a"], [[np.nan]], None, "nan"),
        (["a"], [[-3.0]], None, "hook_pattern"),
        (["a"], [[1.0]], ["0", "1"], "2 labels for 1 heads"),
    ],
)
def test_refuses_what_does_not_fit(
    tokens: list[str], attention: object, labels: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention_view(tokens, attention, labels)


def test_saved_and_read_back_it_is_the_same(tmp_path: Path) -> None:
    save_view(tmp_path, "sink-map", view())
    assert load_view(tmp_path, "sink-map") == view() and load_view(tmp_path, "other") is None


def test_a_file_that_is_no_view_is_named(tmp_path: Path) -> None:
    path = save_view(tmp_path, "sink-map", view())
    path.write_text(json.dumps({"tokens": ["a"]}))
    with pytest.raises(ValueError, match=r"sink-map\.json is no attention view"):
        load_view(tmp_path, "sink-map")


def test_hostile_tokens_end_no_script() -> None:
    page = view().html("one")
    code = page.split("<script>", 1)[1]
    assert code.count("<") == 1 and code.rstrip().endswith("</script>")
    given = json.loads(re.findall(r'\("one", (.*)\);</script>', page)[0])
    assert given["tokens"][:2] == ["&lt;script&gt;", "&lt;/script&gt;"]
    assert len(given["tokens"]) == len(HOSTILE) and given["headLabels"][2] == "</script>"


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", "\u00a0a"), ("\n\n", "↵↵"), ("", "∅"), ("\x00", "\\x00"), ("\u202e", "\\u202e"), ("é", "é")],
)
def test_blanks_and_unprintable_signs_can_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_the_script_is_one_element() -> None:
    assert len(re.findall(r"</script", script(), re.IGNORECASE)) == 1
    assert "<!--" not in script() and "sourceMappingURL" not in script()


def test_a_notebook_gets_the_script_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_carrier", None)
    first, second = view()._repr_html_(), view()._repr_html_()
    assert script() in first and script() not in second
    assert len(second) < 10_000
    # The same view is the same text; on a page each of them finds its own place (tests/browser).
    assert first == script() + second


def test_the_report_needs_no_model_code() -> None:
    code = "import sys, p0circuit.report.html; print({'torch', 'transformer_lens', 'circuitsvis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
