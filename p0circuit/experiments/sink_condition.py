"""In which condition a model has its sink: text as it is, or text after BOS.

1. *Rows to choose on*: up to 32 rows of the same text by another seed, of which none shares 8 tokens in a row with the
   prompts that are measured on. Where the text has too few of those, the first prompts themselves; that is said.
2. *Rule*, fixed before any model was measured and the same as everywhere (`heads.studied_sink`): sink heads are
   chosen on one half of these rows; on the other the lower end of their excess score is above twice that of uniform
   attention.
3. *Choice*: text as it is where the model has a sink there; else after BOS where it has one there; else text as it is.
   Prompts that begin with BOS already are left as they are.

A model without a tokenizer, or one without a BOS token, has one condition only: nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p0circuit.errors import P0Error
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, bos_id, condition_of, natural_text
from p0circuit.stats import Interval

ROWS = 32
"""The most rows that the condition is chosen on: it has to cost little."""
FEWEST = 16
"""Fewer unused rows than this choose nothing; then the prompts themselves do."""
SHARED = 8
"""Rows with this many tokens in a row in common are rows of the same piece of text."""

IN_WORDS = {WITHOUT_BOS: "text as it is", WITH_BOS: "text after BOS"}


@dataclass(frozen=True)
class SinkCondition:
    """The condition that a model is measured in.

    Attributes:
        name: WITHOUT_BOS, WITH_BOS or another of `conditions`, for prompts that were given in that.
        prompts: the prompts in that condition.
        excess: by condition, the excess score of its sink heads; of none where there is no sink, or nothing was chosen.
        summary: the choice and its reason in one line.
    """

    name: str
    prompts: PromptSet
    excess: dict[str, Interval]
    summary: str

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "excess": {name: interval.to_json() for name, interval in self.excess.items()},
            "summary": self.summary,
        }


def find_condition(model: HookedModel, prompts: PromptSet, rows: PromptSet | None = None) -> SinkCondition:
    """Choose the condition that the claims about a model are tested in, and put the prompts into it.

    `rows`: text to choose on; drawn from the text of the prompts if not given.
    """
    model_name, given = describe(model).title, condition_of(model, prompts)
    if given != WITHOUT_BOS:
        return SinkCondition(given, prompts, {}, f"{model_name}: the prompts are given {given}, and left so")
    sets = with_and_without_bos(model, prompts)
    if WITH_BOS not in sets:
        why = "its tokenizer has no BOS token" if bos_id(model) is None else "padded rows cannot be put after BOS"
        why = "it has no tokenizer" if getattr(model, "tokenizer", None) is None else why
        return SinkCondition(WITHOUT_BOS, prompts, {}, f"{model_name} is measured on its prompts as they are: {why}")
    rows, where = (rows, "the rows given") if rows is not None else rows_to_choose_on(model, prompts)
    excess: dict[str, Interval] = {}
    for name, condition in with_and_without_bos(model, rows).items():
        try:
            excess[name] = studied_sink(model, condition).excess
            break
        except NotApplicable:
            continue
    if not excess:
        summary = f"{model_name} has no sink on {where}, neither in text as it is nor after BOS"
        return SinkCondition(WITHOUT_BOS, prompts, {}, f"{summary}: its claims are tested on text as it is")
    ((chosen, interval),) = excess.items()
    summary = f"{model_name} has its sink in {IN_WORDS[chosen]} (excess score {interval} on {where})"
    if chosen == WITH_BOS:
        summary += ", and none in text as it is: its claims are tested after BOS"
    return SinkCondition(chosen, sets[chosen], excess, summary)


def rows_to_choose_on(model: HookedModel, prompts: PromptSet) -> tuple[PromptSet, str]:
    """Rows of the same text that the prompts have no part of, and what they are in words; else the first prompts."""
    about = prompts.description
    if about.get("builder") == "natural_text" and about.get("first_token", "text") == "text":
        seed = max(about.get("seeds", [prompts.seed])) + 1
        # Of a text that is mostly in use, few rows are left.
        for count in (8 * ROWS, ROWS):
            try:
                drawn = natural_text(model, about["source"], count, prompts.length, seed)
            except P0Error:
                continue
            unused = unused_rows(drawn, prompts)[:ROWS]
            if len(unused) >= FEWEST:
                return drawn.subset(unused), f"{len(unused)} rows of the text that are not measured on"
    some = prompts.subset(slice(0, ROWS))
    return some, f"{some.n} rows that are measured on, too: there are no others"


def unused_rows(drawn: PromptSet, prompts: PromptSet) -> list[int]:
    """The rows of `drawn` that have no stretch of `SHARED` tokens in common with the prompts."""
    size = min(SHARED, drawn.length, prompts.length)
    used = {tuple(stretch) for stretch in prompts.ids.unfold(1, size, 1).flatten(0, 1).tolist()}
    stretches = drawn.ids.unfold(1, size, 1).tolist()
    return [row for row, own in enumerate(stretches) if not any(tuple(stretch) in used for stretch in own)]
