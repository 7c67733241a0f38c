"""C4: how P0 is recognised: its attention output is not mixed, and so it is longer (paper, section on recognition).

1. By position, the squared norm and the variance over channels of the attention output of blocks 0 and 1; P0's squared
   norm over the mean of positions from 8 on.
2. The prediction of the cone model, with nothing fitted. If the value vectors of a head have norm `v` and share a
   direction with cosine `a`, and are isotropic around it, attention weights `p_i` mix them to

       E|z|^2 = v^2 (a^2 + (1 - a^2) E[sum p_i^2]).

   `v^2` is the mean squared norm of the head's values, `a` the length of the mean of their unit vectors, and the mean
   of `sum p_i^2` is taken position by position.
3. The share of the variance over positions that it explains: `1 - sum (z - prediction)^2 / sum (z - mean)^2`.
4. The assumptions of the model, one by one: equal norms, equal cosines, isotropy, weights that do not depend on values.

Decided before measuring:

- *Both blocks* must pass both thresholds, each block by itself.
- *P0's norm* is that of the attention output as it is written into the stream (`attn_out`, with its bias). *The cone
  model* is about one head, so it must predict the squared norm of the heads' own outputs `z`, summed over the heads of
  the block. Between the two is the output matrix, where heads may add up or cancel; the table has both.
- *The profile* is the mean over samples at each position, P0 included. Values are those of all positions.
- *The control* is a position drawn at random from 8 on, in each sample, in P0's place.

The signal follows from the causal mask alone, and any model with causal attention has it, trained or not. So the claim
is tested only where there is a sink that it can be the first step of.

Source: the cone model, Peng et al., arXiv 2603.06591; participation ratio, Litwin-Kumar et al. 2017.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from p0circuit.experiments.base import Experiment, NotApplicable, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelError, describe
from p0circuit.models.hooks import hook_point
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import Batch, Quantity
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS, CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_OUTSIDE = " (resamples are noisier than the samples, so the value may be outside its interval)"
_HEAD_HOOKS = ("attn.hook_v", "attn.hook_pattern", "attn.hook_z")
_SQUARED_NORM, _EXPLAINED = "squared_norm_over_others_block_{}", "variance_explained_by_the_cone_block_{}"
"""The metrics that decide, by block."""
_SERIES = {"heads": "measured", "cone": "cone model", "measured_norms": "with measured norms"}


@dataclass(frozen=True)
class RecognitionConfig:
    """Settings of `Recognition`.

    Attributes:
        others: first position, counted from P0, of those that P0 is compared with.
        values: number of positions whose value vectors are recorded to test the assumptions.
        blocks: where the circuit is: the first two blocks, as the paper says, or those that `depth` finds.
    """

    others: int = CONTROL
    values: int = 8
    blocks: tuple[int, ...] = CIRCUIT_BLOCKS


@dataclass(frozen=True)
class Cone:
    """The terms of the cone model and what it predicts, in one block, for each sample or in the mean over samples.

    Attributes:
        squared: squared norm of each head's output.
        purity: `sum p_i^2`.
        norms: `(sum p_i |v_i|)^2`.
        norms_squared: `sum p_i^2 |v_i|^2`; with `norms`, the values may differ in norm.
        units: `|sum p_i v_i / |v_i||^2`; with it, the values may differ in their cosines.
        size: mean squared norm of the values.
        direction: mean of the unit vectors of the values.
    """

    squared: Float[np.ndarray, "*sample pos head"]
    purity: Float[np.ndarray, "*sample pos head"]
    norms: Float[np.ndarray, "*sample pos head"]
    norms_squared: Float[np.ndarray, "*sample pos head"]
    units: Float[np.ndarray, "*sample pos head"]
    size: Float[np.ndarray, "*sample head"]
    direction: Float[np.ndarray, "*sample head d_head"]

    def mean(self) -> Cone:
        """Return the mean over samples."""
        return Cone(*(getattr(self, field.name).mean(0) for field in fields(self)))

    @property
    def cosine_squared(self) -> Float[np.ndarray, "*draw head"]:
        """`a^2` of each head, if the fields are means over samples."""
        return np.square(self.direction).sum(-1)

    def predictions(self) -> dict[str, Float[np.ndarray, "*draw pos head"]]:
        """Predict the mean squared norm of each head's output, if the fields are means over samples.

        Returns:
            "cone": the cone model's prediction; "measured_norms" and "measured_cosines": without the assumption of
            equal norms or of equal cosines.
        """
        shared, size = self.cosine_squared[..., None, :], self.size[..., None, :]
        return {
            "cone": cone(shared, self.purity) * size,
            "measured_norms": self.norms_squared + shared * (self.norms - self.norms_squared),
            "measured_cosines": self.units * size,
        }


class Recognition(Experiment[RecognitionConfig]):
    """Norm and variance of the attention output of blocks 0 and 1 by position, and the cone model's prediction."""

    id = "recognition"
    title = "How P0 is recognised"
    config_type = RecognitionConfig
    claim = Claim(
        id="C4",
        title="Recognition",
        source="Peng et al., arXiv 2603.06591, section on recognition",
        statement="P0 attends to itself alone, so its attention output is not mixed and longer than all others, as "
        "much as a cone of value vectors says.",
        measure="In blocks 0 and 1 each: the squared norm of P0's attention output over the mean of positions from 8 "
        "on; the share of its variance over positions that the cone model predicts from cosine and attention weights.",
        criteria=tuple(
            criterion
            for block in CIRCUIT_BLOCKS
            for criterion in (
                Criterion(_SQUARED_NORM.format(block), ">", 1, "low"),
                Criterion(_EXPLAINED.format(block), ">=", 0.8),
            )
        ),
        control="A random position from 8 on in P0's place.",
    )

    @property
    def deciding_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the configured blocks that correspond to the claim's."""
        return tuple(name.format(block) for block in self.blocks for name in (_SQUARED_NORM, _EXPLAINED))

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare one run up to each of the blocks."""
        blocks = sum(block + 1 for block in self.config.blocks)
        return blocks / describe(model).n_layers * second_half(prompts) / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Record the attention of both blocks, and compare it with the cone model.

        Raises:
            NotApplicable: there is no sink or no block 1, rows are padded, or the attention cannot be read.
        """
        import pandas as pd

        info, start = describe(model), self.config.others
        if info.n_layers <= (last := max(self.config.blocks)):
            raise NotApplicable(f"the last block of {info.title} is {info.n_layers - 1}: there is no block {last}")
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("these prompts are padded, and a profile over positions needs rows of one length")
        sink = studied_sink(model, prompts)
        metrics, profiles, isotropy, notes = {}, [], [], [sink.note]
        random_positions = np.random.default_rng(prompts.seed).integers(start, prompts.length, sink.prompts.n)
        for block in self.config.blocks:
            outputs, terms, values = self._record(model, sink.prompts, block)
            squared, variance = outputs[..., 0], outputs[..., 1]
            others = squared[:, start:].mean(1)
            at_random = squared[np.arange(len(random_positions)), random_positions]
            fits = {name: _fit_interval(terms, name) for name in terms.mean().predictions()}
            metrics |= {
                _SQUARED_NORM.format(block): ratio_interval(squared[:, 0], others),
                _EXPLAINED.format(block): fits["cone"],
                f"variance_over_others_block_{block}": ratio_interval(variance[:, 0], variance[:, start:].mean(1)),
                f"random_position_over_others_block_{block}": ratio_interval(at_random, others),
                f"variance_explained_with_measured_norms_block_{block}": fits["measured_norms"],
                f"variance_explained_with_measured_cosines_block_{block}": fits["measured_cosines"],
            }
            profiles.append(_profile(outputs, terms, block))
            isotropy.append(_isotropy(terms, values, block))
            notes.append(_fit_note(fits, block))
        tables = {"profiles": pd.concat(profiles), "isotropy": pd.concat(isotropy)}
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the profile over positions and the predictions, a panel for each block."""
        from p0circuit.figures.lines import trajectories
        from p0circuit.figures.style import Series

        profiles = result.tables["profiles"]
        panels = {
            f"Block {block}": [Series(label, part[column].tolist()) for column, label in _SERIES.items()]
            for block, part in profiles.groupby("block")
        }
        figure = trajectories(
            panels,
            [str(position) for position in profiles["position"].unique()],
            f"{result.model_title}: norm of the heads' outputs by position, and the cone model's prediction",
            "position",
            ["squared norm (values: 1)"] * len(panels),
        )
        return {"profiles": figure}

    def _record(
        self, model: HookedModel, prompts: PromptSet, block: int
    ) -> tuple[Float[np.ndarray, "sample pos 2"], Cone, Float[Tensor, "sample value head d_head"]]:
        """Squared norm and variance of the output, the terms of the cone model, and values at a few positions."""
        outputs = Quantity(f"attention_out_{block}", (f"blocks.{block}.hook_attn_out",), norm_and_variance, "model")
        hooks = tuple(f"blocks.{block}.{hook}" for hook in _HEAD_HOOKS)
        positions = np.unique(np.linspace(0, prompts.length - 1, self.config.values).astype(int)).tolist()
        mixing = Quantity(f"mixing_{block}", hooks, mixed_values, "model")
        summary = Quantity(f"values_{block}", hooks[:1], value_summary, "model")
        at_positions = functools.partial(values_at_positions, positions=positions)
        sampled = Quantity(f"some_values_{block}", hooks[:1], at_positions, "model")
        try:
            for quantity in (outputs, mixing):
                for hook in quantity.hooks:
                    hook_point(model, hook)
        except ModelError as error:
            raise NotApplicable(f"the attention of {describe(model).title} cannot be read: {error}") from error
        recording = record(model, prompts, [outputs, mixing, summary, sampled], condition="measured on")
        parts = recording[mixing].double().numpy()
        group = parts.shape[2] // recording[summary].shape[1]
        values = recording[summary].double().repeat_interleave(group, dim=1).numpy()
        terms = Cone(*(parts[..., part] for part in range(5)), size=values[..., 0], direction=values[..., 1:])
        return recording[outputs].double().numpy(), terms, recording[sampled].repeat_interleave(group, dim=2)


def cone(
    cosine_squared: Float[np.ndarray, "*#draw head"], purity: Float[np.ndarray, "*#draw head"]
) -> Float[np.ndarray, "*draw head"]:
    """Return the cone model's squared norm of a mix, in units of that of a value: `a^2 + (1 - a^2) sum p_i^2`.

    Args:
        cosine_squared: `a^2` of each head.
        purity: `sum p_i^2` of each head.
    """
    return cosine_squared + (1 - cosine_squared) * purity


def variance_explained(
    measured: Float[np.ndarray, "*draw pos"], predicted: Float[np.ndarray, "*draw pos"]
) -> Float[np.ndarray, "*draw"] | np.floating:
    """Return `R^2` of a prediction that is not fitted: 1 if it is right, 0 if it is no better than the mean.

    Args:
        measured: values by position.
        predicted: their prediction.
    """
    about_mean = measured - measured.mean(-1, keepdims=True)
    return 1 - np.square(measured - predicted).sum(-1) / np.square(about_mean).sum(-1)


def norm_and_variance(output: Float[Tensor, "batch pos d_model"], batch: Batch) -> Float[Tensor, "batch pos 2"]:
    """Reduce an attention output to its squared norm and its variance over channels.

    Args:
        output: what the attention of a block writes into the stream.
        batch: the rows.
    """
    wide = output.float()
    return torch.stack([wide.square().sum(-1), wide.var(-1, correction=0)], dim=-1)


def mixed_values(
    values: Float[Tensor, "batch key kv_head d_head"],
    pattern: Float[Tensor, "batch head query key"],
    z: Float[Tensor, "batch query head d_head"],
    batch: Batch,
) -> Float[Tensor, "batch query head 5"]:
    """Compute the first five fields of a `Cone` from the activations of one block's heads.

    Args:
        values: value vectors.
        pattern: attention weights.
        z: the heads' outputs.
        batch: the rows.
    """
    values = values.float().repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
    weights, sizes = pattern.float(), values.norm(dim=-1)
    units = torch.einsum("bhqk,bkhd->bqhd", weights, normalize(values, dim=-1))
    parts = [
        z.float().square().sum(-1),
        weights.square().sum(-1).transpose(1, 2),
        torch.einsum("bhqk,bkh->bqh", weights, sizes).square(),
        torch.einsum("bhqk,bkh->bqh", weights.square(), sizes.square()),
        units.square().sum(-1),
    ]
    return torch.stack(parts, dim=-1)


def value_summary(
    values: Float[Tensor, "batch key kv_head d_head"], batch: Batch
) -> Float[Tensor, "batch kv_head 1+d_head"]:
    """Compute the mean squared norm of values over positions (first entry) and their mean unit vector (the others).

    Args:
        values: value vectors.
        batch: the rows.
    """
    wide = values.float()
    return torch.cat([wide.square().sum(-1).mean(1)[..., None], normalize(wide, dim=-1).mean(1)], dim=-1)


def values_at_positions(
    values: Float[Tensor, "batch key kv_head d_head"], batch: Batch, positions: Sequence[int]
) -> Float[Tensor, "batch value kv_head d_head"]:
    """Return the values at some positions.

    Args:
        values: value vectors.
        batch: the rows.
        positions: indices of the keys.
    """
    return values[:, list(positions)].float()


def _profile(outputs: Float[np.ndarray, "sample pos 2"], terms: Cone, block: int) -> pd.DataFrame:
    """Means over samples at every position: measured, and as the cone model predicts them."""
    import pandas as pd

    mean = terms.mean()
    unit = float(mean.size.sum())
    columns = {
        "squared_norm": outputs[..., 0].mean(0),
        "variance": outputs[..., 1].mean(0),
        "heads": mean.squared.sum(1) / unit,
        **{name: value.sum(1) / unit for name, value in mean.predictions().items()},
    }
    return pd.DataFrame({"block": block, "position": range(outputs.shape[1]), **columns})


def _fit_note(fits: Mapping[str, Interval], block: int) -> str:
    cone_fit = fits["cone"]
    return (
        f"block {block}: the cone model explains {cone_fit} of the variance over positions; with measured norms of the "
        f"values {fits['measured_norms'].value:.3f}, with measured cosines {fits['measured_cosines'].value:.3f}"
        + ("" if cone_fit.low <= cone_fit.value <= cone_fit.high else _OUTSIDE)
    )


def _fit_interval(terms: Cone, name: str) -> Interval:
    """The share of the variance over positions that a prediction explains, with all terms resampled together.

    A resample is noisier than the samples, and noise cannot be explained. With few samples or a flat profile, the value
    may be outside its interval.
    """
    parts = [getattr(terms, field.name) for field in fields(terms)]
    rows = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    ends = np.cumsum([part[0].size for part in parts])[:-1]

    def explained(means: Float[np.ndarray, "draw quantity"]) -> Float[np.ndarray, " draw"] | np.floating:
        split = zip(np.split(means, ends, axis=1), parts, strict=True)
        means_of = Cone(*(mean.reshape(-1, *part.shape[1:]) for mean, part in split))
        return variance_explained(means_of.squared.sum(-1), means_of.predictions()[name].sum(-1))

    return bootstrap(rows, explained)


def _isotropy(terms: Cone, values: Float[Tensor, "sample value head d_head"], block: int) -> pd.DataFrame:
    """For each head, measures of what the cone model assumes."""
    import pandas as pd

    rows = []
    mean = terms.mean()
    shared, predictions = mean.cosine_squared, mean.predictions()
    for head in range(values.shape[2]):
        sizes = values[:, :, head].norm(dim=-1).double().flatten()
        units = normalize(values[:, :, head].double(), dim=-1).flatten(0, 1)
        around = units - units.mean(0)
        spread = torch.linalg.eigvalsh(around.T @ around / len(around)).clamp(min=0)
        purity, mixed = terms.purity[..., head], terms.units[..., head]
        apart = (1 - purity[:, 1:]).mean()
        measured = mean.squared[:, head]
        rows.append(
            {
                "block": block,
                "head": head,
                "cosine": float(np.sqrt(shared[head])),
                "variance_explained_by_the_cone": float(variance_explained(measured, predictions["cone"][:, head]))
                if measured.std() > 0
                else np.nan,
                # 0 if all norms are equal; the next is below 1 if attention goes to short values.
                "norm_spread": float(sizes.std() / sizes.mean()),
                "attended_over_mean_squared_norm": float(
                    terms.norms_squared[..., head].mean() / purity.mean() / terms.size[:, head].mean()
                ),
                # The share is 1 if the values are isotropic around the common direction.
                "participation_ratio": float(spread.sum().square() / spread.square().sum()),
                "share_of_dimensions": float(spread.sum().square() / spread.square().sum() / (values.shape[3] - 1)),
                # These two are equal if weights do not depend on the values.
                "cosine_squared": float(shared[head]),
                "attended_cosine_squared": float((mixed - purity)[:, 1:].mean() / apart) if apart > 0 else np.nan,
            }
        )
    return pd.DataFrame(rows)
