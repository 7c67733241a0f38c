"""What `advise` says of models whose truth is known, of every shipped one, and how it says it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p0circuit.advice import Advice, Statement, advise, draw_costs, passes, write_advice
from p0circuit.advice.facts import MIN_PROMPTS, ConditionSink, tokens_to_keep
from p0circuit.advice.statement import HIGH, LOW, NO, UNKNOWN, YES
from p0circuit.advice.use_sentences import int8_risk
from p0circuit.cli import main
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.deployment.int8_effects import P0_IN, P0_KEPT, PER_TOKEN, Int8Effects
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.interventions.attention_edits import remove_heads
from p0circuit.interventions.int8 import Site
from p0circuit.models import describe, list_models, load_model
from p0circuit.models.passes import count_passes
from p0circuit.prompts import WITH_BOS, PromptSet, natural_text, random_tokens
from p0circuit.recording.quantities import TOKEN_LOSSES
from p0circuit.recording.record import record
from p0circuit.stats import ratio_interval
from tests.report.test_figures import assert_legible

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
    "quantisation",
]
SHIPPED = [entry.name for entry in list_models()]
KNOWN: dict[str, tuple[bool, bool | None]] = {
    # Half of its rows began with BOS, half with any token: a sink on every first token.
    "p0-nano": (True, False),
    # "No sink at the end", on plain text, all that it was trained on; close to the limit, with 0.07 of 0.076.
    "baseline-0": (False, None),
    # A sink after BOS, with which all of its rows began, and in the text as it is "no sink at the end".
    "bos-0": (True, True),
    "tnlm-0": (True, True),
    "moe-0": (True, True),
    # As these, but for a gate; its card has the sink after BOS alone.
    "gated-0": (True, True),
    # P0 has channels of its own, whatever stands there.
    "force-sink-0": (True, False),
    # The sink has emerged in plain text: P0 is recognised by its position.
    "learned-0": (True, False),
    # A weak one, as most queries cannot see P0.
    "window-0": (True, True),
}
"""Of every shipped model, from its card: whether there is a sink, and whether it depends on BOS (None without one)."""


def text_for(model: Any, n: int = 32, length: int = 48, source: str = "code") -> PromptSet:
    if model.tokenizer is None:
        return random_tokens(describe(model).vocab_size, n, length)
    return natural_text(model, source, n, length)


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
    advised = " ".join(statement["advice"] for statement in found["statements"])
    if found["has_sink"] is False:
        assert "Keep the first" not in advised and "osition zero in high precision" not in advised
    # What breaks is what has to be kept, and nobody has to guess.
    breaks, keep = (statement["verdict"] for statement in found["statements"][4:6])
    assert (breaks == "nothing") == (keep == "0") and breaks not in (YES, NO)
    assert keep == (UNKNOWN if found["sink_tokens_to_keep"] is None else str(found["sink_tokens_to_keep"]))
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model(name: str) -> None:
    assert name in KNOWN, f"{name} is shipped, and nothing is expected of it: write into KNOWN what its card says"
    model = load_model(name)
    # Text like that of the cards.
    prompts = text_for(model, 48, 64, "stdlib")
    advice = advise(model, prompts)
    found = checked(advice)
    assert (found["has_sink"], found["bos_dependent"]) == KNOWN[name]
    try:
        used_sink = studied_sink(model, prompts, in_either_condition=True)
    except NotApplicable:
        assert not found["has_sink"]
    else:
        if found["has_sink"]:
            assert found["first_sink_layer"] in {layer for layer, _ in used_sink.heads}
        else:
            # After a BOS that the model was not trained with there may be one.
            assert used_sink.condition == WITH_BOS and advice.statements[1].measured["loss added by BOS"].low > 0
    if found["has_sink"]:
        # A sink is something to keep, and one that depends on BOS comes with a BOS that lowers the loss.
        assert found["sink_tokens_to_keep"] in (None, 1, 2, 4)
        if any(describe(model).window):
            assert found["loss_without_sink"] is None and "trained with" in found["statements"][4]["advice"]
        else:
            assert found["loss_without_sink"]["low"] > 0
        assert (advice.statements[2].measured["loss added by BOS"].high < 0) >= bool(found["bos_dependent"])
    if found["dormant_heads"]:
        used = prompts if "without BOS" in advice.statements[1].text else prompts.prepend(model.tokenizer.bos_token_id)
        other = used.split()[1]
        without = remove_heads(model, other, found["dormant_heads"])
        losses = [record(model, other, TOKEN_LOSSES, interventions=changes).mean() for changes in ([], [without])]
        assert losses[1] <= 1.01 * losses[0]


@pytest.mark.parametrize(("name", "risk"), [("p0-nano", HIGH), ("moe-0", LOW)])
def test_the_loss_decides_on_int8(name: str, risk: str) -> None:
    """p0-nano's outlier costs 1.6 % of the loss, and next to nothing with a scale per token."""
    model = load_model(name)
    advice = advise(model, text_for(model, 128, 64, "stdlib"))
    said = advice.statements[6]
    assert advice.quantisation_risk == said.verdict == risk
    shares = [said.measured[f"loss added with int8, {scheme}, as a share"] for scheme in (P0_IN, P0_KEPT, PER_TOKEN)]
    if risk == HIGH:
        assert shares[0].low > 0.01 > shares[2].high and shares[1].value < shares[0].value
        # Which of the two helps more depends on the Python whose standard library is read.
        assert "se one scale per token" in said.advice and "osition zero in high precision" in said.advice
        assert "8" in advice.statements[4].verdict and advice.statements[4].verdict.endswith("more loss")
    else:
        assert shares[0].high < 0.01 and "high precision" not in said.advice


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
    assert len(untold) == 2 + has_sink and all("andom tokens" in statement["text"] for statement in untold)


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
    for prompts in (text_for(model, MIN_PROMPTS - 1), text_for(model, 32, 9)):
        found = checked(advise(model, prompts))
        assert found["has_sink"] is None and found["loss_without_sink"] is None
        assert "too few" in found["statements"][1]["text"]
        assert [statement["verdict"] for statement in found["statements"][1:6]] == [UNKNOWN] * 5
    # One text that is hardly longer than a row: rows overlap, and that is said.
    (tmp_path / "short.txt").write_text("to be read by nobody, and " * 12)
    short = natural_text(model, tmp_path / "short.txt", MIN_PROMPTS, 24)
    assert "overlap" in advise(model, short).statements[0].text


def test_padded_rows_cannot_be_streamed_or_put_after_bos() -> None:
    model = load_model("p0-nano")
    found = checked(advise(model, text_for(model, 32, 40).pad_left([36] * 32)))
    assert found["has_sink"] is True and found["sink_tokens_to_keep"] is found["bos_dependent"] is None
    assert all("padded" in found["statements"][place]["text"].lower() for place in (2, 4, 5))


def test_how_many_tokens_to_keep() -> None:
    rng = np.random.default_rng(0)
    base = 3 + 0.1 * rng.normal(size=40)

    def keep(*added: float, noise: float = 1e-3) -> int | None:
        by_chance = noise * rng.normal(size=(3, 40))
        differences = [more + chance - chance.mean() for more, chance in zip(added, by_chance, strict=True)]
        return tokens_to_keep({count: ratio_interval(each, base) for count, each in enumerate(differences)})

    # One hundredth of 3 is 0.03.
    assert [keep(0.5, 0.4, 0.3), keep(0.5, 0.4, 0.02), keep(0.5, 0.02, 0.5), keep(0.02, 0.5, 0.5)] == [4, 2, 1, 0]
    # With noise nothing is enough that might be too few, and nothing too few that might be enough.
    assert keep(0.02, 0.02, 0.02, noise=0.2) is keep(0.5, 0.02, 0.02, noise=0.2) is None
    assert keep(0.5, 0.4, 0.3, noise=0.2) == 4
    assert keep(0.5, 0.04, 0.0, noise=0.05) == 2


def test_bos_before_the_text_is_taken_away_first() -> None:
    model = load_model("bos-0")
    prompts = text_for(model)
    plain, after = (advise(model, rows) for rows in (prompts, prompts.prepend(model.tokenizer.bos_token_id)))
    assert plain.to_json() == after.to_json() and plain.bos_dependent is True
    assert "BOS lowers the loss of the text by 0." in plain.statements[2].text


@pytest.mark.parametrize("name", ["p0-nano", "bos-0", "wired"])
def test_it_takes_no_more_passes_than_it_says(name: str) -> None:
    model = load_model(name)
    prompts = text_for(model, 32, 40)
    with count_passes() as count:
        advise(model, prompts)
    used = count.passes(prompts.n, prompts.length, describe(model).n_layers)
    # Rows of one token, as for the P0 direction, are a few thousandths of a pass.
    assert 0.3 * passes(model, prompts) < used <= passes(model, prompts) + 0.01


def test_many_heads_are_counted_and_some_named() -> None:
    model = load_model("p0-nano")
    heads = [(layer, head) for layer in range(4) for head in range(4)]
    text = text_for(model)
    few, many = (
        ConditionSink("without BOS", text, some, torch.zeros(2, 4, 4), YES).names for some in (heads[:8], heads)
    )
    assert few == ", ".join(f"attn.{layer}.{head}" for layer, head in heads[:8])
    assert many == f"16 heads ({few} and others)"


def test_little_text_is_no_reason_to_keep_nothing() -> None:
    for name in ("p0-nano", "bos-0"):
        model = load_model(name)
        for seed in range(3):
            prompts = natural_text(model, "stdlib", MIN_PROMPTS, 36, seed)
            found = checked(advise(model, prompts))
            assert found["sink_tokens_to_keep"] != 0
            if found["sink_tokens_to_keep"] is None:
                assert "first 4, to be safe" in found["statements"][5]["advice"]


def made_up(kept: float, per_token: float, loss: float = 0.1, noise: float = 0.0) -> Int8Effects:
    """Losses and errors with P0 in, with P0 kept and with a scale per token, the latter two as shares of the first."""
    rng = np.random.default_rng(0)
    shares = {P0_IN: 1.0, P0_KEPT: kept, PER_TOKEN: per_token}
    losses = {name: share * loss + noise * rng.normal(size=40) for name, share in shares.items()}
    errors = {name: 0.1 * share * np.ones((40, 1)) for name, share in shares.items()}
    return Int8Effects((Site(0, "up"),), errors, np.ones((40, 1)), {}, losses, np.full(40, 3.0))


def test_keeping_p0_is_advised_where_it_helps() -> None:
    def said(effects: Int8Effects, sink: str = YES, reads: bool = True) -> Statement:
        return int8_risk(effects, sink, reads)

    unhelpful = "Keeping position zero in high precision has no measurable benefit. "
    # A loss of 3, of which 0.03 counts.
    cases = {
        (0.2, 0.2): "Keep position zero in high precision, or use one scale per token.",
        (0.2, 1.5): "Keep position zero in high precision.",
        (0.5, 0.1): "Use one scale per token; where that is not available, keep position zero in high precision.",
        (1.0, 0.1): unhelpful + "Use one scale per token.",
        (1.0, 1.0): unhelpful + "Leave activations in higher precision.",
    }
    for (kept, per_token), advice in cases.items():
        found = said(made_up(kept, per_token))
        assert (found.verdict, found.advice) == (HIGH, advice)
    # Half of the error may be P0's: what costs nothing is no risk.
    assert said(made_up(0.2, 0.1, loss=0.001)).verdict == LOW
    unsure = said(made_up(0.2, 0.1, loss=0.03, noise=0.02))
    assert unsure.verdict == UNKNOWN and "Give more text" in unsure.advice
    # Where no loss can be read the error decides.
    assert [said(made_up(kept, 0.1, loss=0.001), reads=False).verdict for kept in (0.2, 0.8)] == [HIGH, LOW]
    assert "position zero" not in said(made_up(0.2, 0.2), sink=NO).advice


def test_the_figure_of_the_page(tmp_path: Path) -> None:
    advice = advise(model := load_model("p0-nano"), text_for(model))
    figure = draw_costs(advice)
    assert figure is not None and [axis.get_title() for axis in figure.axes] == [
        advice.statements[place].topic for place in (5, 6, 7)
    ]
    assert_legible(figure)
    html = write_advice(advice, tmp_path)[1].read_text(encoding="utf-8")
    assert html.count("<img") == 1 and 'src="data:image/svg+xml;base64,' in html and 'alt="Loss added to' in html


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
    assert "http" not in html.replace("http-equiv", "") and draw_costs(changed) is None
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
