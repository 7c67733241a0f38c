"""First or BOS: does the sink belong to the position or to the token?

The same text in four forms: without BOS, with BOS at P0, with two BOS, and with BOS at position m while another token
stands at P0. In each, the excess scores of P0 and of position m.

- *Position-bound*: with BOS at m, P0 still gets at least half of what it gets without BOS.
- *Token-bound*: with BOS at m, that position gets at least half of what BOS gets at P0.
- A model can be both. Each is said from the interval: yes or no where it lies on one side of one half, else open.

Source: ours; on BOS as a sink, Gu et al., arXiv 2410.10781.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from p0circuit.experiments.base import ORDINARY, Experiment, NotApplicable, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import text_as_it_is, with_and_without_bos
from p0circuit.experiments.sink_under_study import excess_by_head, mean_over_heads, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, bos_id
from p0circuit.results import Result
from p0circuit.sink import CONTROL, least_excess
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TWO, _AT_M = "two BOS", "BOS at m"
HALF = 0.5


@dataclass(frozen=True)
class FirstOrBosConfig:
    """Where BOS is put.

    Attributes:
        position: the position m of BOS, counted from P0.
    """

    position: int = 16


class FirstOrBos(Experiment[FirstOrBosConfig]):
    """Where attention goes with BOS at P0, twice, at a later position, and without it."""

    id = "first-or-bos"
    title = "First or BOS"
    config_type = FirstOrBosConfig
    claim = Claim(
        id="C24",
        title="First or BOS",
        source="ours; Gu et al., arXiv 2410.10781, on BOS",
        statement="The sink belongs to the first position: with BOS at a later one, the first keeps it.",
        measure="The excess score of P0 with BOS at position 16 and another token at P0, over that without BOS.",
        criteria=(Criterion("p0_with_bos_later_over_without_bos", ">=", HALF),),
        control="Untrained weights, shuffled neurons; the score of position 16 without BOS.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the forms that the clean recording lacks: two of four, or all if it lacks scores of position m."""
        if bos_id(model) is None:
            return 0.0
        forms = 2 if self.config.position in (*ORDINARY, CONTROL) else 4
        return forms * second_half(prompts) / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure the excess scores of P0 and of position m in the four forms.

        Args:
            model: the model to measure.
            prompts: natural text, with or without BOS.

        Raises:
            NotApplicable: there is no BOS token, rows are padded or too short, or there is no sink.
        """
        import pandas as pd

        bos, m = bos_id(model), self.config.position
        if bos is None:
            raise NotApplicable("this model has no BOS token to put elsewhere")
        text = text_as_it_is(model, prompts)
        if not bool(text.attention_mask.all()) or text.length <= m + 8:
            raise NotApplicable(f"needs rows without padding of more than {m + 8} tokens, got {text.length}")
        sink = studied_sink(model, prompts)
        rows = text_as_it_is(model, sink.prompts)
        forms = forms_of(model, rows, bos, m)
        lines, excess = [], {}
        for name, form in forms.items():
            scores = excess_by_head(model, form, offsets=(0, m))
            for offset in (0, m):
                excess[name, offset] = mean_over_heads(scores[offset], sink.heads)
                lines.append({"form": name, "position": offset, **bootstrap(excess[name, offset]).to_json()})
        metrics: dict[str, Interval] = {
            f"excess_of_p0_{key}": bootstrap(excess[name, 0])
            for name, key in (
                (WITHOUT_BOS, "without_bos"),
                (WITH_BOS, "with_bos"),
                (_TWO, "with_two_bos"),
                (_AT_M, "with_bos_later"),
            )
        }
        metrics["excess_of_position_m_with_bos_there"] = bootstrap(excess[_AT_M, m])
        needed, bound = least_excess(rows.length), {}
        if metrics["excess_of_p0_without_bos"].low > needed:
            bound["position-bound"] = ratio_interval(excess[_AT_M, 0], excess[WITHOUT_BOS, 0])
            metrics["p0_with_bos_later_over_without_bos"] = bound["position-bound"]
        if metrics["excess_of_p0_with_bos"].low > needed:
            bound["token-bound"] = ratio_interval(excess[_AT_M, m], excess[WITH_BOS, 0])
            metrics["bos_later_over_bos_at_p0"] = bound["token-bound"]
        if "position-bound" not in bound:
            # A ratio to nothing: what P0 gets without BOS is no sink, so there is none for it to keep.
            metrics["p0_with_bos_later_over_without_bos"] = Interval(0.0, 0.0, 0.0, rows.n)
        notes = [sink.note, *(f"{kind}: {_in_words(share)}" for kind, share in bound.items())]
        if "position-bound" not in bound:
            notes.append("without BOS there is no sink at P0, so there is none for the position to keep: counted as 0")
        return Result(self.id, self.title, metrics, {"forms": pd.DataFrame(lines)}, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the excess scores of P0 and of position m in the four forms."""
        from p0circuit.figures.intervals import intervals

        panels = {}
        for offset, lines in result.tables["forms"].groupby("position"):
            panels[f"Excess score of {'P0' if offset == 0 else f'position {offset}'}"] = {
                str(line["form"]): Interval(line["value"], line["low"], line["high"], line["n"])
                for line in lines.to_dict("records")
            }
        n, m = int(result.tables["forms"]["n"].min()), int(result.tables["forms"]["position"].max())
        title = f"{result.model_title}: first or BOS (m = {m}, n = {n}, 95 % intervals)"
        return {"forms": intervals(panels, title, ["excess score", "excess score"])}


def forms_of(model: HookedModel, text: PromptSet, bos: int, m: int) -> dict[str, PromptSet]:
    """Return the text without BOS, with one at P0, with two, and with BOS instead of the token at position m.

    Args:
        model: the model.
        text: the text without BOS.
        bos: id of the BOS token.
        m: position of BOS in the last form.
    """
    sets = with_and_without_bos(model, text)
    ids = text.ids.clone()
    ids[:, m] = bos
    later = replace(text, ids=ids, description=text.description | {"bos_at": m}, overflow=None)
    return {WITHOUT_BOS: text, WITH_BOS: sets[WITH_BOS], _TWO: sets[WITH_BOS].prepend(bos), _AT_M: later}


def _in_words(share: Interval) -> str:
    verdict = "yes" if share.low >= HALF else "no" if share.high < HALF else "open"
    return f"{verdict} ({share} is left)"
