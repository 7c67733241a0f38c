"""The control that every claim has to stand: on weights that were never trained, none may come out `reproduced`."""

from __future__ import annotations

import pytest

from p0circuit.experiments import EXPERIMENTS, NotApplicable
from p0circuit.models import load_model
from p0circuit.models.controls import untrained_weights
from p0circuit.prompts import natural_text

CLAIMS = {make.claim.id: make for make in EXPERIMENTS.values() if make.claim is not None}


@pytest.fixture(scope="module", params=["step 0", "new weights"])
def beginner(request):
    if request.param == "step 0":
        yield load_model("p0-nano", checkpoint=0)
    else:
        with untrained_weights(load_model("p0-nano"), seed=1) as model:
            yield model


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_claim_is_reproduced_on_untrained_weights(claim, beginner):
    prompts = natural_text(beginner, "stdlib", n=48, length=64)
    try:
        result = CLAIMS[claim]().run(beginner, prompts)
    except NotApplicable as reason:
        assert "no sink to explain" in str(reason)
    else:
        assert result.judgement is not None and result.judgement.verdict != "reproduced"
