"""Pages show what they are given, and checkers know right answers from wrong ones, and say what is wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from p0circuit.advice import Advice, Statement
from p0circuit.course import checks, page as course_page
from p0circuit.course.page import Page, read_prompts
from p0circuit.experiments.base import NotApplicable
from p0circuit.figures.maps import heat_maps
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.metrics import measure, sink_score_of
from p0circuit.interventions.own_scores import edges_into_keys
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.path_patching import patch_edges
from p0circuit.models import load_model
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.report.contents import find_reproductions
from p0circuit.stats import Interval
from tests.report.made_up import claim, result, view, write_run

UNIFORM = sum(1 / (t + 1) for t in range(64)) / 64


def row_alone(pattern: torch.Tensor, t: int) -> torch.Tensor:
    changed = pattern.clone()
    changed[:, :, t] = 0
    changed[:, :, t, t] = 1
    return changed


def column_alone(pattern: torch.Tensor, t: int) -> torch.Tensor:
    changed = pattern.clone()
    changed[:, :, :, t] = 0
    changed[:, :, t, t] = 1
    return changed


def not_emptied(pattern: torch.Tensor, t: int) -> torch.Tensor:
    changed = pattern.clone()
    changed[:, :, t, t] = 1
    return changed


def in_place(pattern: torch.Tensor, t: int) -> torch.Tensor:
    pattern[:, :, t] = 0
    pattern[:, :, t, t] = 1
    return pattern


def one_head(pattern: torch.Tensor, t: int) -> torch.Tensor:
    changed = pattern.clone()
    changed[:, 0] = row_alone(pattern, t)[:, 0]
    return changed


def to_p0(pattern: torch.Tensor, t: int) -> torch.Tensor:
    changed = pattern.clone()
    changed[:, :, t] = 0
    changed[:, :, t, 0] = 1
    return changed


def scaled(stream: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    changed = stream.clone()
    changed[:, 0] *= factor[:, None]
    return changed


def factor_as_norm(stream: torch.Tensor) -> torch.Tensor:
    norms = stream.norm(dim=-1)
    return scaled(stream, norms[:, 1:].median(1).values / norms[:, 0].square())


def norm_cut(stream: torch.Tensor) -> torch.Tensor:
    norms = stream.norm(dim=-1)
    return scaled(stream, norms[:, 1:].median(1).values / norms[:, 0])


def mean_cut(stream: torch.Tensor) -> torch.Tensor:
    norms = stream.norm(dim=-1)
    return scaled(stream, norms[:, 1:].mean(1) / norms[:, 0])


def among_the_others(stream: torch.Tensor) -> torch.Tensor:
    norms = stream.norm(dim=-1)
    return scaled(stream, norms.median(1).values / norms[:, 0])


def upside_down(stream: torch.Tensor) -> torch.Tensor:
    norms = stream.norm(dim=-1)
    return scaled(stream, norms[:, 0] / norms[:, 1:].median(1).values)


def all_positions(stream: torch.Tensor) -> torch.Tensor:
    return stream / stream.norm(dim=-1, keepdim=True)


def turned(stream: torch.Tensor) -> torch.Tensor:
    changed = stream.clone()
    changed[:, 0] = stream[:, 1]
    return changed


def patch(activation: torch.Tensor, hook: Any, values: torch.Tensor) -> torch.Tensor:
    activation[:, 0] = values
    return activation


def patch_everywhere(activation: torch.Tensor, hook: Any, values: torch.Tensor) -> torch.Tensor:
    return activation * 0 + values[:, None]


def patch_next(activation: torch.Tensor, hook: Any, values: torch.Tensor) -> torch.Tensor:
    activation[:, 1] = values
    return activation


def patch_added(activation: torch.Tensor, hook: Any, values: torch.Tensor) -> torch.Tensor:
    activation[:, 0] += values
    return activation


def patch_forgotten(activation: torch.Tensor, hook: Any, values: torch.Tensor) -> None:
    activation[:, 0] = values


def strength(s: float, length: int) -> float:
    return sum(math.exp(s) / (math.exp(s) + t) for t in range(length)) / length


def detector(threshold: float, at_p0: float) -> tuple[float, float]:
    gain = -1 / (threshold - at_p0)
    return gain, -gain * threshold


CASES: list[tuple[str, Any, str]] = [
    ("sink_score", lambda pattern: pattern[:, :, 0].mean(-1), "✓"),
    ("sink_score", lambda pattern: pattern[:, :, 0].mean(-1).tolist(), "✓"),
    ("sink_score", lambda pattern: pattern[:, 0].mean(-1), "about one key"),
    ("sink_score", lambda pattern: pattern[:, :, 0].sum(-1), "sum over queries"),
    ("sink_score", lambda pattern: pattern[:, 1:, 0].mean(-1), "left out"),
    ("sink_score", lambda pattern: pattern[:, -1, 0], "last query alone"),
    ("sink_score", lambda pattern: pattern.mean((1, 2)), "for any pattern"),
    ("sink_score", lambda pattern: pattern[:, :, 0].mean(), r"expected shape \[3\], got \[\]"),
    ("sink_score", lambda pattern: pattern[:, :, 0].square().mean(-1), "differ from head to head"),
    ("sink_score", lambda pattern: pattern[:, :, 99], r"raised IndexError.*shapes: \[3, 6, 6\]"),
    ("sink_score", lambda pattern: "no", "expected numbers"),
    ("sink_score", 0.5, "expected a function, got float"),
    ("sink_score", None, "○ 1.1"),
    ("sink_score", lambda pattern: None, "○ 1.1"),
    ("uniform_score", UNIFORM, "✓"),
    ("uniform_score", round(UNIFORM, 3), "✓"),
    ("uniform_score", 1 / 64, "which does the first one see"),
    ("uniform_score", 64 * UNIFORM, "sum over queries"),
    ("uniform_score", sum(1 / t for t in range(1, 64)) / 64, "sees its own position"),
    ("uniform_score", 0.5, "one by one"),
    ("uniform_score", "0,07", "expected one number"),
    ("uniform_score", ..., "○ 1.2"),
    ("sink_rate", lambda scores, eps: (scores > eps).float().mean(), "✓"),
    ("sink_rate", lambda scores, eps: (scores.mean(0) > eps).float().mean(), "sinks on average"),
    ("sink_rate", lambda scores, eps: (scores > eps).sum(), "a count"),
    ("sink_rate", lambda scores, eps: (scores > 0.3).float().mean(), "whatever eps"),
    ("sink_rate", lambda scores, eps: scores.mean(), "where is the threshold"),
    ("sink_rate", lambda scores, eps: (scores > eps).float().mean((1, 2)), "expected one number"),
    ("cone", lambda cosine, weights: cosine**2 + (1 - cosine**2) * weights.square().sum(-1), "✓"),
    ("cone", lambda cosine, weights: cosine + (1 - cosine) * weights.square().sum(-1), "square of the other"),
    ("cone", lambda cosine, weights: (cosine**2 + (1 - cosine**2) * weights.square().sum(-1)).sqrt(), "its square"),
    ("cone", lambda cosine, weights: weights.square().sum(-1), "share nothing"),
    ("cone", lambda cosine, weights: weights.sum(-1), "does not show how mixed"),
    ("cone", lambda cosine, weights: cosine**2 * weights.square().sum(-1), "is one unit vector; yours has 0.160"),
    ("cone", lambda cosine, weights: cosine**2 * weights.square().sum(-1) + 1 - cosine**2, "reduces what the values"),
    ("cone", lambda cosine, weights: weights.max(-1).values, "fall from 1"),
    ("alone", row_alone, "✓"),
    ("alone", column_alone, "rows are queries"),
    ("alone", not_emptied, "adds up to 1."),
    ("alone", in_place, "work on a copy"),
    ("alone", one_head, "in the other heads"),
    ("alone", to_p0, "not itself"),
    ("alone", lambda pattern, t: pattern, "nothing has changed"),
    ("contribution", lambda fires, w_out, u: fires * (w_out @ (u / u.norm())), "✓"),
    ("contribution", lambda fires, w_out, u: fires * (w_out @ u), "length of the direction"),
    ("contribution", lambda fires, w_out, u: w_out @ u / u.norm(), "how large is its activation"),
    ("contribution", lambda fires, w_out, u: (fires * (w_out @ u / u.norm())).abs(), "sign is lost"),
    ("contribution", lambda fires, w_out, u: fires @ w_out, r"expected shape \[5\], got \[8\]"),
    ("contribution", lambda fires, w_out, u: fires, "the first neuron"),
    ("norm_cut", norm_cut, "✓"),
    ("norm_cut", mean_cut, "mean of the others"),
    ("norm_cut", among_the_others, "counted among the others"),
    ("norm_cut", upside_down, "factor is inverted"),
    ("norm_cut", factor_as_norm, "ratio of two norms"),
    ("norm_cut", lambda stream: scaled(stream, 1 / stream[:, 0].norm(dim=-1)), "is 1 now"),
    ("norm_cut", all_positions, "positions other than 0"),
    ("norm_cut", turned, "direction of position 0 has changed"),
    ("norm_cut", lambda stream: stream.clone(), "position 0 has not changed"),
    ("norm_cut", lambda stream: stream.norm(dim=-1), "expected shape"),
    ("patch_hook", patch, "✓"),
    ("patch_hook", patch_everywhere, "at every position"),
    ("patch_hook", patch_next, r"positions \[1\] have changed"),
    ("patch_hook", patch_added, "a patch replaces it"),
    ("patch_hook", patch_forgotten, "returns nothing"),
    ("patch_hook", lambda activation, hook, values: activation * 0, "of the 12 given values 0 are at P0"),
    ("patch_hook", lambda activation, hook, values: checks.put(0, values)(activation, hook), "✓"),
    ("patch_hook", lambda activation, hook, values: activation, "nothing has changed"),
    ("closed_form", lambda score, others: torch.sigmoid(score - others.logsumexp(-1)), "✓"),
    ("closed_form", lambda score, others: torch.cat([score[:, None], others], 1).softmax(-1)[:, 0], "✓"),
    ("closed_form", lambda score, others: torch.sigmoid(score), "competes with no other key"),
    ("closed_form", lambda score, others: torch.sigmoid(score - others.max(-1).values), "best of the others"),
    ("closed_form", lambda score, others: torch.sigmoid(others.logsumexp(-1) - score), "goes to the others"),
    ("closed_form", lambda score, others: score.exp() / others.exp().sum(-1), "not finite"),
    ("closed_form", lambda score, others: score.exp() / (score.exp() + others.exp().mean(-1)), "softmax gives P0"),
    ("detector", detector, "✓"),
    ("detector", checks.ramp, "✓"),
    ("detector", lambda threshold, at_p0: tuple(-part for part in detector(threshold, at_p0)), "at P0 it is small"),
    ("detector", lambda threshold, at_p0: (-1.0, 1.0), "at the threshold already"),
    ("detector", lambda threshold, at_p0: (-1.0, at_p0), "does not fire at P0"),
    ("detector", lambda threshold, at_p0: (-1.0, threshold), "expected 1"),
    ("detector", lambda threshold, at_p0: (-1 / 0.036, 0.338 / 0.036), "with a threshold of 0.5"),
    ("detector", lambda threshold, at_p0: -1.0, r"expected shape \[2\]"),
    ("strength", strength, "✓"),
    ("strength", lambda s, length: math.exp(s) / (math.exp(s) + length - 1), "last query"),
    ("strength", lambda s, length: math.exp(s) / (math.exp(s) + length), "saw all tokens"),
    ("strength", lambda s, length: strength(s, length) * length, "sum over queries"),
    ("strength", lambda s, length: sum(s / (s + t) if s + t else 0 for t in range(length)) / length, "as it is"),
    (
        "strength",
        lambda s, length: sum(math.exp(s) / (math.exp(s) + t + 1) for t in range(length)) / length,
        "one key too many besides P0",
    ),
    ("strength", lambda s, length: s / length, "what does query t give"),
]


@pytest.mark.parametrize(("name", "answer", "told"), CASES, ids=[f"{name}-{told[:20]}" for name, _, told in CASES])
def test_checkers(capsys: pytest.CaptureFixture[str], name: str, answer: Any, told: str) -> None:
    getattr(checks, f"check_{name}")(answer)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(told, said), said
    assert said.startswith(told[0] if told[0] in "✓○" else "✗")


def test_every_checker_is_tried_with_right_and_several_wrong_answers() -> None:
    checkers = {name.removeprefix("check_") for name in dir(checks) if name.startswith("check_")}
    for name in checkers - {"edge"}:
        told = [told for one, _, told in CASES if one == name]
        assert "✓" in told and len([one for one in told if one[0] not in "✓○"]) >= 3, name


@pytest.mark.parametrize(
    ("name", "samples", "sender", "head"), [("p0-nano", 8, "mlp.1", (3, 2)), ("wired", 6, "mlp.0", (2, 2))]
)
def test_the_edge_checker_knows_the_neighbours_of_the_right_answer(
    capsys: pytest.CaptureFixture[str], name: str, samples: int, sender: str, head: tuple[int, int]
) -> None:
    """In `p0-nano` most of the effect goes another way than by the edge; in `wired` all of it does."""
    model = load_model(name)
    prompts = read_prompts(model, samples, length=16)
    vocabulary, special = sampleable_vocabulary(model)
    pair = shift_prompts(prompts, 4, vocabulary, 0, tuple(special))
    values = patch_values(model, pair, [sender])
    metric, layer = sink_score_of([head]), head[0]
    into_keys = edges_into_keys(model, prompts, [sender], values).effect[0, :, layer].mean(0).tolist()
    right, elsewhere = into_keys[head[1]], into_keys[1]
    clean = float(measure(model, prompts, metric).mean())
    with ablate(model, prompts, [sender], values):
        followed = float(measure(model, prompts, metric).mean()) - clean
    through = patch_edges(model, prompts, [sender], [f"attn.{layer}.{head[1]}.k"], values, metric, through="mlps")
    assert abs(right) < abs(followed) / 5
    tried = [
        (right, "✓"),
        (right + 5e-6, "✓"),
        (-right, "sign is reversed"),
        (clean + right, "patched score itself"),
        (clean, "nothing patched"),
        (followed, "along all paths"),
        (0.1, "Which key"),
        (None, "○ 4.2"),
    ]
    if name == "p0-nano":
        tried += [(float(through.effect.mean()), ": the MLPs between"), (elsewhere, "the edge into head 3.1")]
    for answer, told in tried:
        checks.check_edge(answer, model, prompts, values, sender, head)
        assert told in " ".join(capsys.readouterr().out.split()), answer


# Pages


def test_a_page_prints_tables_and_names_pictures_where_there_is_no_notebook(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = Page(tmp_path / "out")
    page.show(pd.DataFrame({"head": ["3.1"], "score": [0.56789]}))
    page.show(view())
    page.show(heat_maps({"text": torch.eye(2).numpy()}, "made up", "share"), "Shares, made up")
    page.key_figures(score=0.123456789, count=3)
    shown = capsys.readouterr().out
    assert "3.1  0.568" in shown and "[attention view: A <b>view</b>]" in shown and "[figure: Shares, made up]" in shown
    assert json.loads(shown[shown.index("{") :]) == {"score": 0.123457, "count": 3.0}
    assert json.loads((tmp_path / "out" / "key-figures.json").read_text()) == {"score": 0.123457, "count": 3.0}
    assert (tmp_path / "out" / "figures" / "shares-made-up.png").is_file()


def test_statements_are_printed_with_their_answer_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    told = [("Is it?", "It is, " + "very " * 30, "cannot tell", "Wait."), ("Measured on", "Text.", "text", "")]
    lost = Interval(0.25, 0.2, 0.3, 8)
    made = Advice("mine", True, None, 3, 1, lost, "high", (), tuple(Statement(*one) for one in told))
    course_page.print_advice(made)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "mine: what the first token does, and what to do about it"
    assert shown[2] == "Is it? CANNOT TELL" and shown[3].startswith("  It is, very") and "  -> Wait." in shown
    assert max(map(len, shown)) <= 92
    assert shown[-2:] == ["Measured on TEXT", "  Text."]


def test_a_verdict_comes_with_what_is_to_know_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = result("kept", 0.6, claim("C2", "What is kept"))
    found.notes = ["a note that needs more room than there is " * 4, "another"]
    course_page.print_verdict(found)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "C2 What is kept: REPRODUCED" and max(map(len, shown)) <= 92
    assert sum(line.startswith("  note: a note") for line in shown) == 1 and shown[-1] == "  note: another"
    with pytest.raises(ValueError, match="kept tests no claim"):
        course_page.print_verdict(result("kept", 0.6, None))


def test_evidence_names_figures_by_what_stands_above_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(tmp_path)
    (run,) = find_reproductions(tmp_path)
    for experiment in ("kept", "circuit", "broken", "nowhere"):
        course_page.show_evidence(Page(), run, experiment)
    shown = capsys.readouterr().out
    assert "C2 What is kept: REPRODUCED" in shown and "C12 What broke: BROKE OFF" in shown
    assert shown.count("  note: A note on <b>nothing</b>.") == 2
    assert "[figure: kept, map: made up; text]" in shown and "[figure: circuit, map: made up; text]" in shown
    assert "About circuit: measured; it tests no claim." in shown
    assert "nowhere: no figures: this run has not reached it" in shown
    # Without its drawing a figure is named by its experiment.
    (tmp_path / "figures" / "kept-map.svg").unlink()
    course_page.show_evidence(Page(), run, "kept")
    assert "[figure: kept, map: About kept]" in capsys.readouterr().out


def test_models_without_a_sink_are_told_which_have_one() -> None:
    for name in course_page.WITH_A_SINK:
        model = load_model(name)
        assert course_page.sink_of(model, read_prompts(model, 32)).heads
    model = load_model("bos-0")
    with pytest.raises(NotApplicable, match=r"no sink to explain: .*p0-nano, force-sink-0 and wired have one"):
        course_page.sink_of(model, read_prompts(model, 32))


def test_a_page_refuses_what_it_cannot_show() -> None:
    page = Page()
    with pytest.raises(ValueError, match="needs a title"):
        page.show(heat_maps({"text": torch.eye(2).numpy()}, "made up", "share"))
    with pytest.raises(ValueError, match="not str"):
        page.show("text")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="score is nan"):
        page.key_figures(score=math.nan)


def test_a_model_without_tokenizer_reads_random_tokens() -> None:
    assert read_prompts(load_model("wired"), 3, 1, 8).description["builder"] == "random_tokens"
    assert read_prompts(load_model("p0-nano"), 3, 1, 8).description["source"] == "code"
