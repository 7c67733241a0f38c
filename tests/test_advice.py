"""What `advise` says of models whose truth is known, of every shipped one, and how it says it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p0circuit.activations import TOKEN_LOSSES, record
from p0circuit.advice import FEWEST, UNKNOWN, Advice, advise, tokens_to_keep, write_advice
from p0circuit.cli import main
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.practice import find_used_sink
from p0circuit.interventions.ablation import remove_heads
from p0circuit.models import describe, list_models, load_model
from p0circuit.prompts import PromptSet, natural_text, random_tokens

KEYS = [
    "model",
    "has_sink",
    "bos_dependent",
    "first_sink_layer",
    "sink_tokens_to_keep",
    "loss_without_sink",
    "quantisation_risk",
    "dormant_heads",
    "statements",
]
SHIPPED = [entry.name for entry in list_models()]
KNOWN = {"p0-nano": (True, False), "bos-0": (True, True), "tnlm-0": (True, True), "force-sink-0": (True, False)}
"""Of the models that were trained for a sink: whether there is one, and whether it hangs on BOS."""


def text_for(model: Any, n: int = 32, length: int = 48) -> PromptSet:
    if model.tokenizer is None:
        return random_tokens(describe(model).vocab_size, n, length)
    return natural_text(model.tokenizer, "code", n, length)


def checked(advice: Advice) -> dict[str, Any]:
    """The JSON of some advice, after what holds for any."""
    found = json.loads(json.dumps(advice.to_json()))
    assert list(found) == KEYS
    assert found["quantisation_risk"] in ("low", "high", "cannot tell")
    assert found["sink_tokens_to_keep"] in (None, 0, 1, 2, 4)
    assert found["has_sink"] or found["bos_dependent"] is found["first_sink_layer"] is None
    assert len(found["statements"]) == 8
    for statement in found["statements"]:
        assert list(statement) == ["topic", "text", "verdict", "advice", "measured"]
        assert statement["topic"] and statement["text"].endswith(".") and statement["verdict"]
        for interval in statement["measured"].values():
            assert interval["low"] <= interval["value"] <= interval["high"] and interval["n"] > 1
            assert f"{interval['value']:.3f}" in statement["text"] or len(statement["measured"]) > 1
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model(name: str) -> None:
    model = load_model(name)
    prompts = text_for(model)
    advice = advise(model, prompts)
    found = checked(advice)
    if name in KNOWN:
        assert (found["has_sink"], found["bos_dependent"]) == KNOWN[name]
        # A sink is something to keep; and one that hangs on BOS is behind a BOS that is of use.
        assert found["sink_tokens_to_keep"] >= 1 and found["loss_without_sink"]["low"] > 0
        assert (advice.statements[2].measured["loss added by BOS"].high < 0) >= bool(found["bos_dependent"])
    try:
        heads = find_used_sink(model, prompts)[0].heads
    except NotApplicable:
        assert not found["has_sink"]
    else:
        assert found["has_sink"] and found["first_sink_layer"] in {layer for layer, _ in heads}
    if found["dormant_heads"]:
        used = prompts if "without BOS" in advice.statements[1].text else prompts.behind(model.tokenizer.bos_token_id)
        other = used.split()[1]
        without = remove_heads(model, other, found["dormant_heads"])
        losses = [
            record(model, other, TOKEN_LOSSES, interventions=changes)[TOKEN_LOSSES].mean()
            for changes in ([], [without])
        ]
        assert losses[1] <= 1.01 * losses[0]


def test_untrained_weights_have_none() -> None:
    model = load_model("p0-nano", checkpoint=0)
    found = checked(advise(model, text_for(model)))
    assert found["has_sink"] is False and found["dormant_heads"] == []
    assert found["sink_tokens_to_keep"] == 0 and found["quantisation_risk"] == "low"


@pytest.mark.parametrize(("name", "has_sink", "layer"), [("wired", True, 2), ("wired-decoy", False, None)])
def test_models_without_a_tokenizer(name: str, has_sink: bool, layer: int | None) -> None:
    """By construction the sink heads of the wired model are in block 2; what a loss would tell, nothing does."""
    model = load_model(name)
    found = checked(advise(model, text_for(model)))
    assert (found["has_sink"], found["first_sink_layer"]) == (has_sink, layer)
    assert found["bos_dependent"] is (False if has_sink else None)
    assert found["loss_without_sink"] is found["sink_tokens_to_keep"] is None
    untold = [statement for statement in found["statements"] if statement["verdict"] == UNKNOWN]
    assert len(untold) >= 3 and all("andom tokens" in statement["text"] for statement in untold)


def test_both_backends_say_the_same() -> None:
    told = []
    for backend in ("hooked", "bridge"):
        model = load_model("p0-nano", backend=backend)
        told.append(checked(advise(model, text_for(model, 24))))
    one, other = ({key: said[key] for key in KEYS[1:5] + KEYS[6:8]} for said in told)
    assert one == other
    assert told[0]["loss_without_sink"]["value"] == pytest.approx(told[1]["loss_without_sink"]["value"], abs=1e-4)


def test_too_little_text_tells_nothing(tmp_path: Path) -> None:
    model = load_model("p0-nano")
    for prompts in (text_for(model, FEWEST - 1), text_for(model, 32, 9)):
        found = checked(advise(model, prompts))
        assert found["has_sink"] is None and found["loss_without_sink"] is None
        assert "too few" in found["statements"][1]["text"]
        assert [statement["verdict"] for statement in found["statements"][1:6]] == [UNKNOWN] * 5
    # One text that is hardly longer than a row: rows overlap, and that is said.
    (tmp_path / "short.txt").write_text("to be read by nobody, and " * 12)
    short = natural_text(model.tokenizer, tmp_path / "short.txt", FEWEST, 24)
    assert "overlap" in advise(model, short).statements[0].text


def test_padded_rows_cannot_be_streamed() -> None:
    model = load_model("p0-nano")
    found = checked(advise(model, text_for(model, 32, 40).left_padded([36] * 32)))
    assert found["has_sink"] is True and found["sink_tokens_to_keep"] is None
    assert "padded" in found["statements"][4]["text"]


def test_how_many_tokens_to_keep() -> None:
    rng = np.random.default_rng(0)
    base = 3 + rng.normal(size=40)

    def keep(*added: float) -> int:
        noise = [1e-3 * rng.normal(size=40) for _ in added]
        places = [(), (0,), (0, 1), (0, 1, 2, 3)]
        losses = [base + more + by_chance for more, by_chance in zip((*added, 0.0), (*noise, 0.0), strict=True)]
        return tokens_to_keep(dict(zip(places, losses, strict=True)))

    # One hundredth of 3 is 0.03.
    assert [keep(0.5, 0.4, 0.3), keep(0.5, 0.4, 0.02), keep(0.5, 0.02, 0.5), keep(0.02, 0.5, 0.5)] == [4, 2, 1, 0]


def test_the_page_shows_names_as_text(tmp_path: Path) -> None:
    model = load_model("wired")
    prompts = text_for(model, 16, 24)
    advice = advise(model, prompts)
    hostile = "<script>alert(1)</script>[bold]"
    first = replace(advice.statements[0], text=f"{hostile}.", advice="<img src=x onerror=alert(1)>")
    changed = replace(advice, model=hostile, statements=(first, *advice.statements[1:]))
    written, page = write_advice(changed, tmp_path / "deep")
    html = page.read_text(encoding="utf-8")
    assert json.loads(written.read_text()) == json.loads(json.dumps(changed.to_json()))
    assert "<script" not in html and "<img" not in html and html.count("&lt;script&gt;") >= 3
    assert "http" not in html.replace("http-equiv", "")
    assert all(statement.topic in html for statement in changed.statements)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "[red]<b>.py"
    text.write_text(Path(__file__).read_text())

    def run(*arguments: object) -> str:
        command = ["p0circuit", "advise", "p0-nano", "--samples", 16, "--length", 40, "--text", text, "--out", tmp_path]
        monkeypatch.setattr(sys, "argv", [*map(str, command), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    found = json.loads(run("--json"))
    assert list(found) == KEYS and found == json.loads((tmp_path / "p0-nano" / "advice.json").read_text())
    assert found["model"] == "p0-nano" and "[red]" in found["statements"][0]["text"]
    html = (tmp_path / "p0-nano" / "advice.html").read_text(encoding="utf-8")
    assert "[red]&lt;b&gt;.py" in html and "<b>" not in html
    shown = run().replace("\n", "")
    assert "[red]<b>.py" in shown.replace(" ", "")
    assert all(statement["topic"] in shown and statement["verdict"] in shown for statement in found["statements"])
