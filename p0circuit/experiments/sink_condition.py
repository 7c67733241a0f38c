"""In which condition a model has its sink: text as it is, or text after BOS.

1. *Rows to choose on*: up to 32 rows of the same text from another seed, none of which shares 8 consecutive tokens with
   the prompts to measure on. If the text has too few such rows, the first prompts themselves; the summary says so.
2. *Rule*, fixed before any model was measured and the same in all experiments (`studied_sink`): sink heads are chosen
   on one half of these rows; on the other half the lower end of their excess score is above twice that of uniform
   attention.
3. *Choice*: text as it is if the model has a sink there; else text after BOS if it has one there; else text as it is.
   Prompts that begin with BOS are not changed.

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
"""Maximum number of rows that the condition is chosen on, so that the choice costs little."""
FEWEST = 16
"""Minimum number of unused rows; with fewer, the condition is chosen on the prompts themselves."""
SHARED = 8
"""Two rows that share so many consecutive tokens count as the same piece of text."""

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
        """Return it as it stands in the manifest."""
        return {
            "name": self.name,
            "excess": {name: interval.to_json() for name, interval in self.excess.items()},
            "summary": self.summary,
        }


def find_condition(model: HookedModel, prompts: PromptSet, rows: PromptSet | None = None) -> SinkCondition:
    """Choose the condition that the claims about a model are tested in, and convert the prompts to it.

    Args:
        model: the model.
        prompts: the prompts to measure on.
        rows: text to choose on; other rows of the text of the prompts if None.
    """
    model_name, given = describe(model).title, condition_of(model, prompts)
    if given != WITHOUT_BOS:
        return SinkCondition(given, prompts, {}, f"{model_name}: the prompts are given {given}, and left so")
    sets = with_and_without_bos(model, prompts)
    if WITH_BOS not in sets:
        reason = "its tokenizer has no BOS token" if bos_id(model) is None else "padded rows cannot be put after BOS"
        reason = "it has no tokenizer" if getattr(model, "tokenizer", None) is None else reason
        return SinkCondition(WITHOUT_BOS, prompts, {}, f"{model_name} is measured on its prompts as they are: {reason}")
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
    ((name, interval),) = excess.items()
    summary = f"{model_name} has its sink in {IN_WORDS[name]} (excess score {interval} on {where})"
    if name == WITH_BOS:
        summary += ", and none in text as it is: its claims are tested after BOS"
    return SinkCondition(name, sets[name], excess, summary)


def rows_to_choose_on(model: HookedModel, prompts: PromptSet) -> tuple[PromptSet, str]:
    """Return rows of the same text that share nothing with the prompts, or else the first prompts; and a description.

    Args:
        model: the model.
        prompts: the prompts to measure on.
    """
    about = prompts.description
    if about.get("builder") == "natural_text" and about.get("first_token", "text") == "text":
        seed = max(about.get("seeds", [prompts.seed])) + 1
        # If most of the text is in the prompts, few of these rows are unused.
        for count in (8 * ROWS, ROWS):
            try:
                candidates = natural_text(model, about["source"], count, prompts.length, seed)
            except P0Error:
                continue
            unused = unused_rows(candidates, prompts)[:ROWS]
            if len(unused) >= FEWEST:
                return candidates.subset(unused), f"{len(unused)} rows of the text that are not measured on"
    first = prompts.subset(slice(0, ROWS))
    return first, f"{first.n} rows that are measured on, too: there are no others"


def unused_rows(candidates: PromptSet, prompts: PromptSet) -> list[int]:
    """Return the numbers of the rows that share no `SHARED` consecutive tokens with the prompts.

    Args:
        candidates: the rows.
        prompts: the prompts to measure on.
    """
    size = min(SHARED, candidates.length, prompts.length)
    used = {tuple(stretch) for stretch in prompts.ids.unfold(1, size, 1).flatten(0, 1).tolist()}
    stretches = candidates.ids.unfold(1, size, 1).tolist()
    return [row for row, own in enumerate(stretches) if not any(tuple(stretch) in used for stretch in own)]
