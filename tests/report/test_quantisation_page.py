"""The page that puts kinds of quantisation side by side says what the runs say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from p0circuit.io import data_dir
from p0circuit.models import load_model
from p0circuit.models.gguf_writer import write_gguf
from p0circuit.report.contents import find_reproductions, number
from p0circuit.results import Result
from tests.report.made_up import write_run

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantisation_page", DOCS / "quantisation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verdicts_and_metrics_stand_side_by_side(script: ModuleType, tmp_path: Path) -> None:
    for kind in ("F16", "Q4_1"):
        folder = tmp_path / kind
        write_run(folder, f"made-up-{kind}")
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"quantisation": kind}))
    changed = tmp_path / "Q4_1" / "claims.json"
    entries = json.loads(changed.read_text())
    next(entry for entry in entries if entry["id"] == "C2")["verdict"] = "not reproduced"
    changed.write_text(json.dumps(entries))
    path = tmp_path / "Q4_1" / "lost.json"
    found = json.loads(path.read_text())
    found["metrics"]["share"] |= {"value": 0.9, "low": 0.8, "high": 0.95}
    path.write_text(json.dumps(found))
    runs = [find_reproductions(tmp_path / kind)[0] for kind in ("F16", "Q4_1")]
    text = script.page(runs, {"made-up-F16": 2000, "made-up-Q4_1": 1000})
    assert "F16 2,000 bytes, Q4_1 1,000 bytes" in text
    assert "| C2 What is kept | reproduced | not reproduced |" in text
    assert "the verdicts of C2 differ from F16; of 6 metrics 1 have intervals that do not overlap" in text
    shares = [Result.load(tmp_path / kind / "lost.json").metrics["share"] for kind in ("F16", "Q4_1")]
    cells = [f"{number(share.value)} [{number(share.low)}, {number(share.high)}]" for share in shares]
    assert f"| `share` | {cells[0]} | {cells[1]} |" in text and cells[0] != cells[1]


def test_the_first_kind_holds_the_shipped_weights(script: ModuleType, tmp_path: Path) -> None:
    path = write_gguf(data_dir() / "models" / script.MODEL, tmp_path / "model.gguf", script.KINDS[0])
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, got = (load_model(source, device="cpu")(ids) for source in (script.MODEL, path))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_page_is_whole(script: ModuleType) -> None:
    from p0circuit.experiments import EXPERIMENTS

    text = (DOCS / "quantisation.md").read_text(encoding="utf-8")
    claims = [make().claim for make in EXPERIMENTS.values()]
    for claim in claims:
        if claim is not None:
            assert len(re.findall(rf"^\| {claim.id} [^|]*\|(?: [^|]+ \|){{{len(script.KINDS)}}}$", text, re.M)) == 1
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows} == {len(script.KINDS)}
