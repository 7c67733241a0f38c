"""The sink of real language models, against a plain pass of `transformers` with eager attention on the same rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from p0circuit.advice.facts import sinks_by_condition
from p0circuit.advice.statement import YES
from p0circuit.experiments.conditions import default_text
from p0circuit.experiments.sink_condition import find_condition
from p0circuit.experiments.sink_summary import after_bos, sink_summary
from p0circuit.models import CATALOG, load_model
from p0circuit.models.download import is_fetched
from p0circuit.models.source import resolve
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, bos_id, condition_of, natural_text
from tests.conftest import OWN_CACHE


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """What is fetched and converted, not the empty cache of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P0CIRCUIT_CACHE", str(OWN_CACHE))
        yield


@pytest.fixture(scope="module")
def gemma3() -> Any:
    """Gemma 3 270M, where the user has it: its download is too large for a test."""
    with own_cache():
        if not is_fetched(CATALOG["gemma3-270m"]):
            pytest.skip("gemma3-270m is not in the cache; fetch it once with: p0circuit fetch gemma3-270m")
        return load_model("gemma3-270m", device="cpu")


@torch.no_grad()
def eager_scores(folder: Path, prompts: PromptSet) -> np.ndarray:
    """The mean attention to position zero by [row, layer, head], from the attentions that `transformers` returns."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    attentions = model(prompts.ids, output_attentions=True).attentions
    return np.stack([layer[..., 0].mean(-1).double().numpy() for layer in attentions], axis=1)


@pytest.mark.parametrize(
    ("name", "first", "low", "high"), [("smollm2-135m", "text", 0.7, 0.9), ("gemma3-270m", "bos", 0.65, 0.9)]
)
def test_the_sink_rate_is_that_of_a_plain_eager_pass(
    request: pytest.FixtureRequest, name: str, first: str, low: float, high: float
) -> None:
    model = request.getfixturevalue({"smollm2-135m": "smollm2", "gemma3-270m": "gemma3"}[name])
    assert default_text(model) == "docs"
    prompts = natural_text(model, "docs", n=16, length=64, first_token=first)
    assert condition_of(model, prompts) == (WITH_BOS if first == "bos" else WITHOUT_BOS)
    found = sink_summary(model, prompts, bos=first == "bos")
    with own_cache():
        folder = resolve(name, None).folder
    expected = eager_scores(folder, prompts)
    np.testing.assert_allclose(found["sink_score"], expected.mean(0), atol=1e-4)
    assert found["sink_rate"] == pytest.approx((expected > 0.3).mean(), abs=1e-4)
    assert found["sink_rate_from_layer_2"] == pytest.approx((expected[:, 2:] > 0.3).mean(), abs=1e-4)
    assert low < found["sink_rate_from_layer_2"] < high


def test_smollm2_has_its_sink_in_text_as_it_is(smollm2: Any) -> None:
    text = natural_text(smollm2, "docs", n=16, length=48)
    condition = find_condition(smollm2, text)
    assert condition.name == WITHOUT_BOS and condition.excess[WITHOUT_BOS].low > 0.3
    assert after_bos(smollm2, text) is None


def test_the_sink_of_gemma_depends_on_bos(gemma3: Any) -> None:
    text = natural_text(gemma3, "docs", n=16, length=48)
    condition = find_condition(gemma3, text)
    assert condition.name == WITH_BOS and condition.prompts.count_leading(bos_id(gemma3) or -1).tolist() == [1] * 16
    bare, after = (sink_summary(gemma3, rows, bos) for rows, bos in ((text, False), (condition.prompts, True)))
    assert bare["sink_rate_from_layer_2"] == 0 and after["sink_rate_from_layer_2"] > 0.65
    assert 24 < after["norm_ratio"][1] < 30 and max(bare["norm_ratio"]) < 2
    told = after_bos(gemma3, text)
    assert told is not None and told["sink_rate"] == pytest.approx(after["sink_rate"], abs=1e-6)


def test_text_that_spells_bos_has_none(gemma3: Any, tmp_path: Path) -> None:
    (tmp_path / "spelt.txt").write_text("<bos> is a word like any other here. " * 20)
    prompts = natural_text(gemma3, tmp_path / "spelt.txt", n=4, length=16)
    assert condition_of(gemma3, prompts) == WITHOUT_BOS
    assert not bool((prompts.ids == bos_id(gemma3)).any())


def test_the_advice_names_a_few_of_many_heads(smollm2: Any) -> None:
    text = natural_text(smollm2, "docs", n=16, length=48)
    bare, after = sinks_by_condition(smollm2, text)
    assert (bare.verdict, after.verdict) == (YES, YES)
    assert len(bare.heads) > 150 and bare.names.startswith(f"{len(bare.heads)} heads (attn.") and len(bare.names) < 120
