"""What the experiments on practice (C17 to C20) share: where a model's sink is to be looked for."""

from __future__ import annotations

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.experiments.sink_under_study import SinkHeads, find_sink_heads
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, condition_of


def find_used_sink(model: HookedModel, prompts: PromptSet) -> tuple[SinkHeads, str]:
    """The sink heads on the text as it is; where there is no sink, on the text behind BOS. With the condition's name.

    A sink that depends on BOS is of use to whoever gives the model its BOS. Prompts that begin with BOS are taken as
    they are: whoever made them chose the condition.

    Raises:
        NotApplicable: there is no sink in either, or none in the text and it cannot be put behind a BOS.
    """
    if condition_of(model, prompts) == WITH_BOS:
        return find_sink_heads(model, prompts), WITH_BOS
    sets = with_and_without_bos(model, prompts)
    try:
        return find_sink_heads(model, sets[WITHOUT_BOS]), WITHOUT_BOS
    except NotApplicable as reason:
        if WITH_BOS not in sets:
            raise
        try:
            return find_sink_heads(model, sets[WITH_BOS]), WITH_BOS
        except NotApplicable as other:
            raise NotApplicable(f"{reason}; behind BOS: {other}") from None


def under(model: HookedModel, prompts: PromptSet, condition: str) -> PromptSet:
    """The text in the condition that `find_used_sink` names, whichever of the two the prompts are in."""
    return with_and_without_bos(model, prompts)[condition]
