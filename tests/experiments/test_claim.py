"""Verdict logic on made-up values, and thresholds that are those of the plan."""

from __future__ import annotations

import math

import pytest

from p0circuit.experiments import EXPERIMENTS, RUN_EXPERIMENTS
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.results import claim_entry
from p0circuit.stats import Interval

TENTH = Interval(0.1, 0.05, 0.15, 20)


def claim(*criteria: Criterion) -> Claim:
    return Claim("C0", "A claim", "nowhere", "It is so.", "By looking.", criteria, "Not looking.")


@pytest.mark.parametrize(
    ("sense", "bound", "end", "holds"),
    [
        (">", 0.1, "value", False),
        (">=", 0.1, "value", True),
        (">", 0.05, "low", False),
        (">", 0.049, "low", True),
        ("<", 0.1, "value", False),
        ("<=", 0.1, "value", True),
        ("<", 0.15, "high", False),
        ("<=", 0.15, "high", True),
    ],
)
def test_a_clause_compares_the_value_or_an_end(sense, bound, end, holds):
    assert Criterion("rate", sense, bound, end).holds({"rate": TENTH}) is holds


def test_every_clause_must_hold_and_the_reason_shows_those_that_do_not():
    both = claim(Criterion("rate", ">", 0.02), Criterion("rate", ">", 0.02, "low"), Criterion("loss", "<", 1))
    judged = both.judge({"rate": TENTH, "loss": Interval(0.5, 0.4, 0.6, 20)})
    assert judged.verdict == "reproduced"
    assert judged.reason == "rate is 0.100 [0.050, 0.150]; loss is 0.500 [0.400, 0.600]"
    judged = both.judge({"rate": TENTH, "loss": Interval(2.0, 1.9, 2.1, 20)})
    assert judged.verdict == "not reproduced"
    assert judged.reason == "loss is 2.000 [1.900, 2.100]; needed loss < 1"


def test_there_is_no_verdict_on_what_is_no_number():
    one = claim(Criterion("share", "<=", 0.2), Criterion("rate", ">", 0.2, "low"))
    nothing = Interval(math.nan, math.nan, math.nan, 3)
    judged = one.judge({"share": nothing, "rate": TENTH})
    assert judged.verdict == "not applicable" and judged.reason.startswith("share is nan [nan, nan]: not a number")
    # Only what is compared counts.
    assert one.judge({"share": TENTH, "rate": Interval(0.5, 0.4, math.inf, 3)}).verdict == "reproduced"
    assert one.judge({"share": TENTH, "rate": Interval(0.5, -math.inf, 0.6, 3)}).verdict == "not applicable"


def test_a_clause_about_other_models_does_not_count():
    some = claim(Criterion("rotary", "<=", 0.25, if_measured=True), Criterion("learned", ">=", 0.5, if_measured=True))
    assert some.judge({"learned": TENTH}).verdict == "not reproduced"
    assert some.judge({"rotary": TENTH}).verdict == "reproduced"
    assert some.judge({"other": TENTH}).verdict == "not applicable"
    with pytest.raises(KeyError, match="rate"):
        claim(Criterion("rate", ">", 0)).judge({"other": TENTH})


def test_the_entry_of_claims_json():
    one = claim(Criterion("rate", ">", 0.02, "low"))
    entry = claim_entry(one.to_json(), {"rate": TENTH}, one.judge({"rate": TENTH}))
    assert entry["id"] == "C0" and entry["verdict"] == "reproduced"
    assert entry["threshold"] == "rate, lower end of the interval, > 0.02"
    assert entry["measured"] == {"rate": {"value": 0.1, "low": 0.05, "high": 0.15, "n": 20}}


def test_claims_are_numbered_without_gaps_and_say_what_they_rest_on():
    made = (*EXPERIMENTS.values(), *RUN_EXPERIMENTS.values())
    claims = [make.claim for make in made if make.claim is not None]
    assert [one.id for one in sorted(claims, key=lambda one: int(one.id[1:]))] == [
        f"C{number}" for number in range(1, len(claims) + 1)
    ]
    for one in claims:
        assert all((one.title, one.source, one.statement, one.measure, one.criteria, one.control)), one.id
