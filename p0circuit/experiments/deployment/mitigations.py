"""Mitigations side by side: loss, sink and outlier under interventions on P0.

1. *The sink* is measured in the text as it is or, if there is none, after BOS; the interventions are made there, too.
   Its heads are chosen on one half of the prompts (on which the register is trained). Everything is measured on the
   other half, on the same rows for all mitigations.
2. *Before the text*: BOS, or a learned register (C20). The text lacks its last token, which leaves room.
3. *In the sink heads*: P0's key masked; P0's value set to zero, its key unchanged; one more logit of 0 in the softmax,
   so that a head may attend to nothing (also in all heads).
4. *In the cache*: a window of a quarter of the row, alone and with the first four tokens (C17).
5. *Measured for each*: the loss; the excess score of the sink heads; P0's norm over the median of the others, in the
   block where it is largest; the int8 error of the inputs of matrix products with one scale per row, P0 included
   (`interventions.int8`); and the spread of the loss over first tokens of the text. Losses are of the predictions made
   8 or more tokens into the text, which are the same in all conditions.

The weights are frozen: the model was not trained with any mitigation. For models trained with another loss, mask or
gate, `p0circuit run remedies tnlm-0` (or bos-0, force-sink-0, gated-0, learned-0) measures the same.

Sources: Xiao et al. 2023, arXiv 2309.17453 (kept tokens); Darcet et al. 2023, arXiv 2309.16588
(registers); Gu et al. 2025, arXiv 2410.10781 (keys with a zero value).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.conditions import text_as_it_is
from p0circuit.experiments.deployment.c17_streaming import FIRST, WINDOWS_PER_ROW
from p0circuit.experiments.deployment.c20_first_token import (
    FAR,
    NO_REGISTER,
    REGISTER,
    SHORTEST,
    FirstTokenConfig,
    Prefix,
    prefixes_of,
    sampled_tokens,
    spread,
)
from p0circuit.experiments.sink_under_study import Heads, mean_over_heads, studied_sink
from p0circuit.experiments.surgery import require_attention
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.attention_edits import mask_key, zero_logit, zero_value
from p0circuit.interventions.int8 import Site, largest_in_row, on_inputs, rounded
from p0circuit.interventions.intervention import Intervention
from p0circuit.interventions.sliding_window import streamed, why_not_streamed
from p0circuit.models import ModelInfo, describe, forward
from p0circuit.models.device_map import placement_of
from p0circuit.models.passes import WITH_GRADIENT
from p0circuit.prompts import WITH_BOS, PromptSet, bos_id, from_ids
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.recording.quantities import NORM_RATIO, TOKEN_LOSSES, score_at
from p0circuit.recording.record import record
from p0circuit.results import Result, metric_name
from p0circuit.sink import CONTROL
from p0circuit.stats import Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

AS_IS, AFTER_BOS, AFTER_REGISTER = "text as it is", "BOS before it", "register before it"
KEY_HIDDEN, VALUE_ZEROED = "P0's key hidden", "P0's value zeroed"
ZERO_LOGIT, ZERO_LOGIT_ALL = "extra zero logit", "the same in all heads"
WINDOW, WINDOW_KEPT = "window alone", f"window, first {FIRST} kept"

QUANTITIES = {
    "loss": ("Loss added", "nats per token"),
    "excess": ("Sink", "excess score"),
    "norm_ratio": ("Norm of P0", "over median of others"),
    "int8_error": ("Int8 error", "relative, a grid per row"),
    "spread": ("Spread", "nats, over first tokens"),
}
"""The measured quantities: title and unit of each in the figure."""

Change = Callable[[PromptSet], Intervention]


@dataclass(frozen=True)
class Mitigation:
    """A prefix of the text, an intervention on the model, or both.

    Attributes:
        prefix: what is put before the text.
        change: makes the intervention for a set of prompts; None without one.
    """

    prefix: Prefix = None
    change: Change | None = None

    def applied(self, model: HookedModel, text: Int[Tensor, "row pos"]) -> tuple[PromptSet, list[Intervention]]:
        """Return the prompts with the prefix, and the interventions for them.

        Args:
            model: the model.
            text: rows of text.
        """
        if self.prefix is None:
            rows = from_ids(text)
        else:
            # A vector replaces the embedding of token 0.
            token = 0 if isinstance(self.prefix, Tensor) else self.prefix
            rows = from_ids(torch.cat([torch.full((len(text), 1), token), text], dim=1))
        changes = [ablate(model, rows, ["embed"], self.prefix)] if isinstance(self.prefix, Tensor) else []
        return rows, changes + ([self.change(rows)] if self.change else [])


@dataclass(frozen=True)
class MitigationsConfig:
    """Settings of `Mitigations`.

    Attributes:
        samples: maximum number of prompts.
        int8_samples: maximum number of prompts for the int8 error.
        spread_samples: maximum number of prompts for the spread.
        tokens: number of first tokens for the spread.
        register_steps: training steps of the register; 0 for none.
    """

    samples: int = 128
    int8_samples: int = 32
    spread_samples: int = 32
    tokens: int = 4
    register_steps: int = 40


class Mitigations(Experiment[MitigationsConfig]):
    """Mitigations of the sink without training, measured on the same rows."""

    id = "remedies"
    title = "Mitigations side by side"
    config_type = MitigationsConfig

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the runs with each mitigation: loss, sink, norms and int8 error."""
        config, half = self.config, second_half(prompts)
        rows, int8, spread_over = (
            min(most, config.samples, half) for most in (half, config.int8_samples, config.spread_samples)
        )
        register = bool(config.register_steps) and placement_of(model) is None
        mitigations = 1 + (bos_id(model) is not None) + register + 4 + 2 * (not why_not_streamed(model, prompts))
        trained = config.register_steps * FirstTokenConfig.batch * WITH_GRADIENT if register else 0
        return (mitigations * (rows + int8 + spread_over * config.tokens) + trained) / prompts.n

    def quick(self, info: ModelInfo) -> Mitigations:
        """Return a version for large models with fewer samples."""
        if not is_large(info):
            return self
        return Mitigations(MitigationsConfig(samples=8, int8_samples=8, spread_samples=4, tokens=3, register_steps=0))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure every quantity with every mitigation.

        Args:
            model: the model to measure.
            prompts: natural text without padding.

        Raises:
            NotApplicable: there is no sink, attention cannot be edited, or rows are padded or too short.
        """
        sink = studied_sink(model, prompts, in_either_condition=True)
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("needs rows without padding: something has to be put before them")
        if prompts.length < SHORTEST:
            raise NotApplicable(f"needs rows of at least {SHORTEST} tokens, got {prompts.length}")
        require_attention(model)
        config = self.config
        # The halves of `studied_sink`, without BOS before them.
        others, measured_on = text_as_it_is(model, prompts).split()
        rows = measured_on.subset(slice(0, config.samples))
        register = prefixes_of(model, others, FirstTokenConfig(steps=config.register_steps)).get(REGISTER)
        notes = [sink.note, f"that sink is in text {sink.condition}; measured on {rows.n} rows"]
        base, mitigations = mitigations_for(model, rows, sink.names, sink.condition, register, notes)
        if model.tokenizer is None:
            notes.append("the prompts are random tokens: their losses tell little about text")
        measured = {
            each: measured_with(model, rows, mitigation, sink.heads, config) for each, mitigation in mitigations.items()
        }
        metrics = {
            f"{quantity}_with_{metric_name(each)}": bootstrap(values)
            for each, of in measured.items()
            for quantity, values in of.items()
        }
        added = {each: bootstrap(of["loss"] - measured[base]["loss"]) for each, of in measured.items()}
        metrics |= {f"loss_added_by_{metric_name(each)}": interval for each, interval in added.items() if each != base}
        table = _table(measured, added)
        notes.append(f"losses added are against {base!r}, where the sink is")
        return Result(self.id, self.title, metrics, {"remedies": table}, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw every quantity with every mitigation, side by side."""
        return {"side-by-side": _draw(result)}


def mitigations_for(
    model: HookedModel, prompts: PromptSet, sink_heads: list[str], condition: str, register: Prefix, notes: list[str]
) -> tuple[str, dict[str, Mitigation]]:
    """Return the name of the condition to compare with, and the mitigations that this model allows, by name.

    The condition is the text as it is, or text after BOS if the sink is only there; interventions are made in it.

    Args:
        model: the model.
        prompts: prompts to measure on, without BOS.
        sink_heads: names of the sink heads.
        condition: the condition of the sink, as in `StudiedSink.condition`.
        register: the learned register; None without one.
        notes: notes of the result; gets a note for each mitigation that is left out.
    """
    bos = bos_id(model)
    mitigations = {AS_IS: Mitigation()}
    if bos is not None:
        mitigations[AFTER_BOS] = Mitigation(bos)
    else:
        notes.append("there is no BOS token to put before the text")
    if register is not None:
        mitigations[AFTER_REGISTER] = Mitigation(register)
    else:
        notes.append(NO_REGISTER)
    base, prefix = (AFTER_BOS, bos) if condition == WITH_BOS else (AS_IS, None)
    everywhere = [f"attn.{layer}" for layer in range(describe(model).n_layers)]
    length = prompts.length if prefix is not None else prompts.length - 1
    window = length // WINDOWS_PER_ROW
    edits: dict[str, Change] = {
        KEY_HIDDEN: lambda rows: mask_key(model, rows, sink_heads),
        VALUE_ZEROED: lambda rows: zero_value(model, rows, sink_heads),
        ZERO_LOGIT: lambda rows: zero_logit(model, rows, sink_heads),
        ZERO_LOGIT_ALL: lambda rows: zero_logit(model, rows, everywhere),
    }
    if reason := why_not_streamed(model, prompts):
        notes.append(f"no window: {reason}")
    else:
        edits |= {
            WINDOW: lambda rows: streamed(model, rows, (), window),
            WINDOW_KEPT: lambda rows: streamed(model, rows, range(FIRST), window),
        }
    return base, mitigations | {name: Mitigation(prefix, change) for name, change in edits.items()}


def measured_with(
    model: HookedModel,
    prompts: PromptSet,
    mitigation: Mitigation,
    heads: Heads,
    config: MitigationsConfig = MitigationsConfig(),
) -> dict[str, Float[np.ndarray, " sample"]]:
    """Measure every quantity of `QUANTITIES` with a mitigation, for each sample.

    Args:
        model: the model.
        prompts: prompts to measure on, without BOS.
        mitigation: the mitigation.
        heads: the sink heads.
        config: numbers of samples.
    """
    text = prompts.ids[:, :-1]
    rows, changes = mitigation.applied(model, text)
    recording = record(model, rows, [TOKEN_LOSSES, NORM_RATIO, score_at(0), score_at(CONTROL)], interventions=changes)
    excess = recording[score_at(0)].double() - recording[score_at(CONTROL)].double()
    return {
        "loss": _of_text(recording[TOKEN_LOSSES].double().numpy(), text).mean(1),
        "excess": mean_over_heads(excess, heads),
        "norm_ratio": recording[NORM_RATIO].double().amax(1).numpy(),
        "int8_error": int8_errors(model, text[: config.int8_samples], mitigation),
        "spread": _spread(model, prompts.subset(slice(0, config.spread_samples)), mitigation, config.tokens),
    }


def text_losses(
    model: HookedModel, text: Int[Tensor, "row pos"], mitigation: Mitigation
) -> Float[np.ndarray, "row prediction"]:
    """Measure the losses of the predictions made 8 or more tokens into the text.

    Args:
        model: the model.
        text: rows of text.
        mitigation: the mitigation.
    """
    rows, changes = mitigation.applied(model, text)
    return _of_text(record(model, rows, TOKEN_LOSSES, interventions=changes).double().numpy(), text)


def _of_text(
    losses: Float[np.ndarray, "row position"], text: Int[Tensor, "row pos"]
) -> Float[np.ndarray, "row prediction"]:
    """The losses of the predictions made 8 or more tokens into the text, with or without a prefix before it."""
    return losses[:, losses.shape[1] + 1 - text.shape[1] + FAR :]


@torch.no_grad()
def int8_errors(model: HookedModel, text: Int[Tensor, "row pos"], mitigation: Mitigation) -> Float[np.ndarray, " row"]:
    """Measure the int8 error of the inputs of matrix products, with one scale per row and P0 included.

    Args:
        model: the model.
        text: rows of text.
        mitigation: the mitigation.

    Returns:
        The relative error at positions after P0, mean over the inputs.
    """
    # An intervention in a `with` block needs all its rows in one batch.
    size = batch_size_for(model, text.shape[1] + 1, with_logits=True)
    errors = []
    for part in text.split(size):
        rows, changes = mitigation.applied(model, part)
        seen: dict[Site, Tensor] = {}

        def look(site: Site, x: Tensor, rows: PromptSet = rows, seen: dict[Site, Tensor] = seen) -> None:
            int8 = rounded(x, largest_in_row(x, rows.attention_mask))
            after, new = (each.float().flatten(2)[:, 1:] for each in (x, int8))
            sizes = (values.square().sum((1, 2)).sqrt() for values in (new - after, after))
            seen.setdefault(site, torch.div(*sizes).nan_to_num().cpu())

        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            # After the interventions, so that their results are rounded.
            stack.enter_context(on_inputs(model, look))
            forward(model, rows.ids)
        errors.append(torch.stack(list(seen.values())).mean(0).double().numpy())
    return np.concatenate(errors)


def _spread(
    model: HookedModel, prompts: PromptSet, mitigation: Mitigation, tokens: int
) -> Float[np.ndarray, " sample"]:
    """The standard deviation of the loss over first tokens of the text, as in C20."""
    sampled = sampled_tokens(model, prompts, tokens, torch.Generator().manual_seed(prompts.seed + 1))
    text = prompts.ids[:, None, :-1].repeat(1, tokens, 1)
    text[:, :, 0] = sampled
    losses = text_losses(model, text.flatten(0, 1), mitigation)
    return spread(losses.reshape(prompts.n, tokens, -1))


def _table(measured: Mapping[str, Mapping[str, np.ndarray]], added: Mapping[str, Interval]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name, of in measured.items():
        rows += [
            {"remedy": name, "measured": quantity, **bootstrap(values).to_json()} for quantity, values in of.items()
        ]
        rows.append({"remedy": name, "measured": "loss_added", **added[name].to_json()})
    return pd.DataFrame(rows)


def _draw(result: Result) -> Figure:
    from p0circuit.figures.intervals import intervals_by, side_by_side

    table = result.tables["remedies"]
    # Losses are drawn as differences: their spread over rows is the same for all mitigations.
    measured = {quantity: "loss_added" if quantity == "loss" else quantity for quantity in QUANTITIES}
    panels = {
        title: intervals_by(table.loc[table["measured"] == measured[quantity]], "remedy")
        for quantity, (title, _) in QUANTITIES.items()
    }
    names = table["remedy"].unique().tolist()
    base = next(name for name in names if f"loss_added_by_{metric_name(name)}" not in result.metrics)
    title = f"{result.model_title}: what can be done about the sink (dashed: {base})"
    return side_by_side(panels, title, [unit for _, unit in QUANTITIES.values()], base)
