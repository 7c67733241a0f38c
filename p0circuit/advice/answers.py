"""All answers about one model on one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p0circuit.advice.facts import DORMANT_PROMPTS, INT8_PROMPTS, loss_added_by_bos, sink_in_use, sinks_by_condition
from p0circuit.advice.sink_sentences import bos_statement, layer_statement, prompts_statement, sink_statement
from p0circuit.advice.statement import NO, YES, Statement
from p0circuit.advice.use_sentences import dormant_statement, int8_statement, streaming_statements
from p0circuit.experiments.conditions import text_as_it_is
from p0circuit.experiments.deployment.c17_streaming import DROPPED, SINKS
from p0circuit.experiments.deployment.c19_dormant_heads import steps
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.prompts import PromptSet, bos_id
from p0circuit.results import model_title
from p0circuit.stats import Interval


@dataclass(frozen=True)
class Advice:
    """What the first-token bias does to a model on a text; None where it cannot be decided.

    Attributes:
        model: name of the model.
        has_sink: whether there is a P0 sink, in the text as it is or after BOS.
        bos_dependent: whether it depends on BOS; None also without a sink.
        first_sink_layer: the first layer with a sink head; None also without a sink.
        sink_tokens_to_keep: how many first tokens a sliding window should keep in its cache, beyond doubt.
        loss_without_sink: loss added by keeping no first token to that with four kept, in nats per token.
        quantisation_risk: "low", "high" or "cannot tell".
        dormant_heads: heads that can be zeroed at 1 % more loss, beyond doubt.
        statements: the answers in words, in the order of the questions.
        quantisation: how the weights were quantised, as `describe` gives it; None for weights that were not.
    """

    model: str
    has_sink: bool | None
    bos_dependent: bool | None
    first_sink_layer: int | None
    sink_tokens_to_keep: int | None
    loss_without_sink: Interval | None
    quantisation_risk: str
    dormant_heads: tuple[str, ...] | None
    statements: tuple[Statement, ...]
    quantisation: str | None = None

    @property
    def title(self) -> str:
        """The model's name, with the quantisation of its weights."""
        return model_title(self.model, self.quantisation)

    def to_json(self) -> dict[str, Any]:
        """Return it as it stands in advice.json."""
        lost, heads = self.loss_without_sink, self.dormant_heads
        return vars(self) | {
            "loss_without_sink": None if lost is None else lost.to_json(),
            "dormant_heads": None if heads is None else list(heads),
            "statements": [statement.to_json() for statement in self.statements],
        }


def passes(model: HookedModel, prompts: PromptSet) -> float:
    """Return the maximum number of passes over the prompts that `advise` takes.

    Args:
        model: the model.
        prompts: the prompts.

    Returns:
        Passes: 1 is all prompts through all blocks.
    """
    info, half = describe(model), prompts.n / 2
    # The sink; with BOS in two conditions, and the loss in both.
    sink, streaming = 1 if bos_id(model) is None else 4, 1 + len(SINKS) + len(DROPPED)
    # The exact model and three ways to round; then the order of the heads, and growing numbers of them zeroed.
    int8 = 4 * min(INT8_PROMPTS, half)
    dormant = (2 + len(steps(info.n_layers * info.n_heads))) * min(DORMANT_PROMPTS, half)
    if model.tokenizer is None:
        # Losses on random tokens say nothing and are not measured.
        return sink + int8 / prompts.n
    return sink + streaming + (int8 + dormant) / prompts.n


def advise(model: HookedModel, prompts: PromptSet) -> Advice:
    """Measure what the first-token bias does to a model on these prompts, and say what to do about it.

    Args:
        model: the model. Without a tokenizer its prompts are taken for random tokens, whose losses say nothing.
        prompts: text of the kind that the model is used on, at least 16 prompts; BOS before them is removed first.

    Returns:
        The answers with their values. What cannot be decided or measured is None, and its statement has the reason.

    Example:
        advice = advise(model, natural_text(model, "english", n=64))
        for statement in advice.statements:
            print(statement.topic, statement.verdict, statement.advice)
    """
    is_text = model.tokenizer is not None
    prompts = text_as_it_is(model, prompts)
    sinks = sinks_by_condition(model, prompts)
    bos_loss = loss_added_by_bos(model, *(sink.prompts for sink in sinks)) if is_text and len(sinks) > 1 else None
    used = sink_in_use(sinks, bos_loss)
    rows = used.prompts if used else prompts
    sink = sink_statement(sinks, used, prompts, bos_loss)
    bos, depends = bos_statement(sinks, used, sink.verdict, bos_loss, bos_id(model) is not None)
    layer, first_layer = layer_statement(used, sink.verdict)
    dropped, lost, to_keep, number = streaming_statements(model, rows, sink.verdict, is_text)
    risk = int8_statement(model, rows, sink.verdict, is_text)
    dormant, heads = dormant_statement(model, rows, sink.verdict, is_text)
    return Advice(
        model=describe(model).name,
        quantisation=describe(model).quantisation,
        has_sink={YES: True, NO: False}.get(sink.verdict),
        bos_dependent=depends,
        first_sink_layer=first_layer,
        sink_tokens_to_keep=number,
        loss_without_sink=lost,
        quantisation_risk=risk.verdict,
        dormant_heads=heads,
        statements=(prompts_statement(prompts, is_text), sink, bos, layer, dropped, to_keep, risk, dormant),
    )
