"""A run on disk with made-up numbers: what the report is tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.figures.attention_view import AttentionView, attention_view, save_view
from p0circuit.figures.maps import heat_maps
from p0circuit.results import Result
from p0circuit.stats import Interval

HOSTILE = ["<script>", "</script>", "<!--", "<img src=x onerror=alert(1)>", "&amp;", " the", "\n", "`|*_", "</ScRiPt >"]
ROWS = 50


def claim(identity: str, title: str, bound: float = 0.3) -> Claim:
    return Claim(
        identity,
        title,
        source="Somebody et al., section 3",
        statement=f"{title}: what is claimed.",
        measure="The share of something.",
        criteria=(Criterion("share", ">=", bound, "low"),),
        control="The same share elsewhere.",
    )


def result(experiment: str, share: float, tested: Claim | None) -> Result:
    metrics = {"share": Interval(share, share - 0.1, share + 0.1, 64), "share_of_others": Interval(0.01, 0.0, 0.02, 64)}
    tokens = [HOSTILE[row % len(HOSTILE)] for row in range(ROWS)]
    found = Result(
        experiment,
        f"About {experiment}",
        metrics,
        {"tokens": pd.DataFrame({"token": tokens, "layer": range(ROWS), "score": np.linspace(0, 1, ROWS)})},
        {"map": heat_maps({"text": np.full((3, 4), share)}, "made up", "share")},
        {
            "prompts": {"source": "my texts/a.txt", "seed": 3},
            "samples": 64,
            "length": 16,
            "config": {"eps": 0.3},
        },
        ["A note on <b>nothing</b>."],
    )
    if tested is not None:
        found.claim, found.judgement = tested.to_json(), tested.judge(metrics)
    return found


def view() -> AttentionView:
    size = len(HOSTILE)
    attention = np.tril(np.ones((3, size, size)))
    return attention_view(
        HOSTILE, attention / attention.sum(-1, keepdims=True), ["1.0", "1.1", "</script>"], "A <b>view</b>"
    )


def write_run(directory: Path, model: str = "made-up") -> list[dict[str, Any]]:
    """C2 is reproduced, C10 not, nor C11 of the same experiment; C12 broke off; one measurement has no claim."""
    tested = {"kept": (claim("C2", "What is kept"), 0.6), "lost": (claim("C10", "What is lost"), 0.35)}
    entries = []
    for experiment, (one, share) in tested.items():
        found = result(experiment, share, one)
        found.save(directory)
        about = {"experiment": experiment, "model": model, "notes": found.notes, "error": None}
        entries.append((found.claim_entry() or {}) | about)
    entries.append(entries[1] | {"id": "C11", "title": "Also lost"})
    entries.append(
        entries[0]
        | {"id": "C12", "title": "What broke", "experiment": "broken", "measured": {}, "verdict": "not applicable"}
        | {"why": "its measurement broke off", "error": "ValueError: too <large>", "notes": []}
    )
    for entry in entries:
        entry["controls"] = [{"control": "untrained", "verdict": "not reproduced", "why": "share is 0", "error": None}]
    entries[0]["controls"].append({"control": "decoy", "verdict": "not applicable", "why": "no <P0>", "error": None})
    result("circuit", 0.5, None).save(directory)
    save_view(directory, "kept", view())
    (directory / "claims.json").write_text(json.dumps(entries[::-1]))
    (directory / "manifest.json").write_text(
        json.dumps({"model": model, "command": ["reproduce", model], "seconds": 1.5})
    )
    return entries
