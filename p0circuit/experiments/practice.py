"""What the experiments on practice (C17 to C20) share: where a model's sink is to be looked for."""

from __future__ import annotations

from typing import Any

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import WITH_BOS, WITHOUT_BOS, bos_id
from p0circuit.experiments.heads import SinkHeads, find_sink_heads
from p0circuit.prompts import PromptSet


def find_used_sink(model: Any, prompts: PromptSet) -> tuple[SinkHeads, str]:
    """The sink heads on the text as it is; where there is no sink, on the text behind BOS. With the condition's name.

    A sink that hangs on BOS is of use to whoever gives the model its BOS.

    Raises:
        NotApplicable: there is no sink in either, or none in the text and it cannot be put behind a BOS.
    """
    try:
        return find_sink_heads(model, prompts), WITHOUT_BOS
    except NotApplicable as reason:
        bos = bos_id(model)
        if bos is None or not bool(prompts.attention_mask.all()):
            raise
        try:
            return find_sink_heads(model, prompts.behind(bos)), WITH_BOS
        except NotApplicable as other:
            raise NotApplicable(f"{reason}; behind BOS: {other}") from None


def under(model: Any, prompts: PromptSet, condition: str) -> PromptSet:
    """The prompts in the condition that `find_used_sink` names: as they are, or behind BOS."""
    if condition == WITHOUT_BOS:
        return prompts
    bos = bos_id(model)
    assert bos is not None, "a sink was found behind BOS"
    return prompts.behind(bos)
