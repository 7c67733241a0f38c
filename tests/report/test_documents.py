"""Documents are filled from runs: what stands between the marks is what claims.json and the manifest hold."""

from __future__ import annotations

import json

import pytest

from p0circuit.experiments import Depth, NormDirection, SinkMap
from p0circuit.models import load_model
from p0circuit.prompts import random_tokens
from p0circuit.report.documents import fill_documents
from p0circuit.reproduction import reproduce_model

TEXT = """# Title
<!-- claims: wired, wired-decoy -->
old
<!-- end -->
between
<!-- misses: wired-decoy --><!-- end -->
<!-- verdicts: wired, wired-decoy -->
<!-- end -->
<!-- depth: wired -->
<!-- end -->
<!-- misses: wired-decoy -->
<!-- end -->
<!-- misses: wired, wired-decoy -->
<!-- end -->
<!-- controls: wired -->
<!-- end -->
<!-- passes: wired -->
<!-- end -->
after
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    for name in ("wired", "wired-decoy"):
        model = load_model(name)
        prompts = random_tokens(model.cfg.d_vocab, n=12, length=16)
        reproduce_model(model, prompts, folder / name, [SinkMap(), NormDirection(), Depth()], controls=name == "wired")
    return folder


def test_marked_parts_are_filled_and_the_rest_stays(out, tmp_path):
    document = tmp_path / "README.md"
    document.write_text(TEXT)
    assert fill_documents(out, [document]) == [document]
    text = document.read_text()
    assert "old" not in text and "between\n<!-- misses: wired-decoy --><!-- end -->\n" in text
    assert text.startswith("# Title\n") and text.endswith("after\n")
    claims = {claim["id"]: claim for claim in json.loads((out / "wired" / "claims.json").read_text())}
    rate = claims["C1"]["measured"]["sink_rate_from_layer_2"]
    assert f"| C1 The sink | ✓ reproduced<br>{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" in text
    assert f"| C1 The sink | ✓ {rate['value']:.2f} | ✗ 0.00 |" in text
    depth = claims["C21"]["measured"]["circuit_depth"]["value"]
    assert f"**wired**, without BOS: circuit depth {depth:.0f}" in text and "| 1 | writer | `mlp." in text
    assert "- C1 The sink, not reproduced: sink rate from layer 2 is 0.000" in text
    assert "- wired-decoy, C1 The sink, not reproduced: sink rate from layer 2 is 0.000" in text
    assert "| wired | 0 | 3 | 3 |" in text
    passes = json.loads((out / "wired" / "manifest.json").read_text())["passes"]
    assert f"| sink-map | {passes['sink-map']['full']:.1f} | {passes['sink-map']['declared']:.1f} |" in text
    # A second time there is nothing to do.
    assert fill_documents(out, [document]) == []


def test_what_cannot_be_filled_is_said_and_nothing_is_written(out, tmp_path):
    document = tmp_path / "a.md"
    document.write_text("<!-- claims: wired, gemma -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"a\.md names gemma, of which there is no run; there are wired, wired-decoy"):
        fill_documents(out, [document])
    assert document.read_text() == "<!-- claims: wired, gemma -->\n<!-- end -->\n"
    document.write_text("nothing")
    with pytest.raises(ValueError, match="has no part to fill"):
        fill_documents(out, [document])
