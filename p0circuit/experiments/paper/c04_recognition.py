"""Recognition: P0's attention output is never mixed, and so it is longer (paper, section on recognition).

1. By position, the squared norm and the variance over channels of what the attention of blocks 0 and 1 writes; P0's
   squared norm over the mean of positions from 8 on.
2. The cone model's prediction, with nothing fitted to it. If the value vectors of a head have norm `v` and share a
   direction with cosine `a`, being isotropic around it, attention weights `p_i` mix them to

       E|z|^2 = v^2 (a^2 + (1 - a^2) E[sum p_i^2]).

   `v^2` is the mean squared norm of the head's values, `a` the length of the mean of their unit vectors, and the mean
   of `sum p_i^2` is taken position by position.
3. How much of the variance over positions the prediction explains: `1 - sum (z - prediction)^2 / sum (z - mean)^2`.
4. The model's assumptions, one by one: equal norms, equal cosines, isotropy, weights that do not depend on the values.

Decided before measuring:

- *Both blocks* must pass both thresholds, each by itself.
- *P0's norm* is that of the attention output as it is written into the stream (`attn_out`, its bias included). *The
  cone model* speaks of one head, so what it must predict is the squared norm of the heads' own outputs `z`, summed over
  the heads of the block. Between the two lies the output matrix, where heads may add up or cancel; `attn_out` stands
  beside it in the table.
- *The profile* is the mean over samples at each position, P0 included. Values are those of all positions.
- *The control* is a position drawn at random from 8 on, in each sample, in P0's place.

The signal is a consequence of the causal mask alone, and any model with such attention has it, trained or not. So the
claim is tested only where there is a sink for it to be the first step of.

Source: the cone model, Peng et al., arXiv 2603.06591; participation ratio, Litwin-Kumar et al. 2017.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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

_BESIDE = " (resamples, noisier than the samples, vary more over positions: the interval lies beside the value)"
_HEAD_HOOKS = ("attn.hook_v", "attn.hook_pattern", "attn.hook_z")


@dataclass(frozen=True)
class RecognitionConfig:
    """`others`: from which position (after P0) on the others count; `values`: positions whose values are kept whole."""

    others: int = CONTROL
    values: int = 8


@dataclass(frozen=True)
class Cone:
    """What the cone model is made of and held against in one block, for each sample or in the mean over samples.

    Attributes:
        squared: of each head's output.
        purity: `sum p_i^2`.
        norms: `(sum p_i |v_i|)^2`, and `norms_squared` `sum p_i^2 |v_i|^2`: with them values may differ in norm.
        units: `|sum p_i v_i / |v_i||^2`: with it they may differ in their cosines.
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
        """The mean over samples."""
        return Cone(*(getattr(self, field.name).mean(0) for field in fields(self)))

    @property
    def cosine_squared(self) -> Float[np.ndarray, "*draw head"]:
        """`a^2`, if the fields are means over samples."""
        return np.square(self.direction).sum(-1)

    def predictions(self) -> dict[str, Float[np.ndarray, "*draw pos head"]]:
        """The mean squared norm of each head's output as the cone model has it, and with one assumption lifted.

        If the fields are means over samples.
        """
        shared, size = self.cosine_squared[..., None, :], self.size[..., None, :]
        return {
            "cone": cone(shared, self.purity) * size,
            "measured_norms": self.norms_squared + shared * (self.norms - self.norms_squared),
            "measured_cosines": self.units * size,
        }


class Recognition(Experiment[RecognitionConfig]):
    """Attention output of blocks 0 and 1 by position: norm, variance, and the cone model's prediction."""

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
                Criterion(f"squared_norm_over_others_block_{block}", ">", 1, "low"),
                Criterion(f"variance_explained_by_the_cone_block_{block}", ">=", 0.8),
            )
        ),
        control="A random position from 8 on in P0's place.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        blocks = sum(block + 1 for block in CIRCUIT_BLOCKS)
        return blocks / describe(model).n_layers * second_half(prompts) / prompts.n

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink, no block 1, padding, or attention that cannot be read."""
        import pandas as pd

        from p0circuit.figures.lines import trajectories
        from p0circuit.figures.style import Series

        info, start = describe(model), self.config.others
        if info.n_layers <= max(CIRCUIT_BLOCKS):
            raise NotApplicable(f"{info.title} has {info.n_layers} block: there are no blocks 0 and 1")
        if not bool(prompts.attention_mask.all()):
            raise NotApplicable("these prompts are padded, and a profile over positions needs rows of one length")
        found = studied_sink(model, prompts)
        metrics, profiles, isotropy, panels, notes = {}, [], [], {}, [found.note]
        drawn = np.random.default_rng(prompts.seed).integers(start, prompts.length, found.prompts.n)
        for block in CIRCUIT_BLOCKS:
            outputs, cone_of, values = self._record(model, found.prompts, block)
            squared, variance = outputs[..., 0], outputs[..., 1]
            others = squared[:, start:].mean(1)
            at_random = squared[np.arange(len(drawn)), drawn]
            mean = cone_of.mean()
            predictions = mean.predictions()
            fits = {name: _fit_interval(cone_of, name) for name in predictions}
            metrics |= {
                f"squared_norm_over_others_block_{block}": ratio_interval(squared[:, 0], others),
                f"variance_explained_by_the_cone_block_{block}": fits["cone"],
                f"variance_over_others_block_{block}": ratio_interval(variance[:, 0], variance[:, start:].mean(1)),
                f"random_position_over_others_block_{block}": ratio_interval(at_random, others),
                f"variance_explained_with_measured_norms_block_{block}": fits["measured_norms"],
                f"variance_explained_with_measured_cosines_block_{block}": fits["measured_cosines"],
            }
            unit = float(mean.size.sum())
            predicted = {name: value.sum(1) / unit for name, value in predictions.items()}
            columns = {
                "squared_norm": squared.mean(0),
                "variance": variance.mean(0),
                "heads": mean.squared.sum(1) / unit,
                **predicted,
            }
            profiles.append(pd.DataFrame({"block": block, "position": range(prompts.length), **columns}))
            isotropy.append(_isotropy(cone_of, values, block))
            panels[f"Block {block}"] = [
                Series("measured", columns["heads"].tolist()),
                Series("cone model", columns["cone"].tolist()),
                Series("with measured norms", columns["measured_norms"].tolist()),
            ]
            notes.append(
                f"block {block}: the cone model explains {fits['cone']} of the variance over positions; with measured "
                f"norms of the values {fits['measured_norms'].value:.3f}, with measured cosines "
                f"{fits['measured_cosines'].value:.3f}"
                + ("" if fits["cone"].low <= fits["cone"].value <= fits["cone"].high else _BESIDE)
            )
        figure = trajectories(
            panels,
            [str(position) for position in range(prompts.length)],
            f"{info.title}: what heads put out by position, and what the cone model predicts",
            "position",
            ["squared norm (values: 1)"] * len(panels),
        )
        tables = {"profiles": pd.concat(profiles), "isotropy": pd.concat(isotropy)}
        return Result(self.id, self.title, metrics, tables, {"profiles": figure}, notes=notes)

    def _record(
        self, model: HookedModel, prompts: PromptSet, block: int
    ) -> tuple[Float[np.ndarray, "sample pos 2"], Cone, Float[Tensor, "sample kept head d_head"]]:
        """Squared norm and variance of the output, what the cone model needs, and some of the values."""
        outputs = Quantity(f"attention_out_{block}", (f"blocks.{block}.hook_attn_out",), norm_and_variance, "model")
        hooks = tuple(f"blocks.{block}.{hook}" for hook in _HEAD_HOOKS)
        places = np.unique(np.linspace(0, prompts.length - 1, self.config.values).astype(int)).tolist()
        mixing = Quantity(f"mixing_{block}", hooks, mixed_values, "model")
        about = Quantity(f"values_{block}", hooks[:1], value_summary, "model")
        some = Quantity(f"some_values_{block}", hooks[:1], functools.partial(values_at_places, places=places), "model")
        try:
            for quantity in (outputs, mixing):
                for hook in quantity.hooks:
                    hook_point(model, hook)
        except ModelError as error:
            raise NotApplicable(f"the attention of {describe(model).title} cannot be read: {error}") from error
        recording = record(model, prompts, [outputs, mixing, about, some], condition="measured on")
        parts = recording[mixing].double().numpy()
        group = parts.shape[2] // recording[about].shape[1]
        values = recording[about].double().repeat_interleave(group, dim=1).numpy()
        cone_of = Cone(*(parts[..., part] for part in range(5)), size=values[..., 0], direction=values[..., 1:])
        return recording[outputs].double().numpy(), cone_of, recording[some].repeat_interleave(group, dim=2)


def cone(
    cosine_squared: Float[np.ndarray, "*#draw head"], purity: Float[np.ndarray, "*#draw head"]
) -> Float[np.ndarray, "*draw head"]:
    """The cone model's squared norm of a mix, in units of that of a value: `a^2 + (1 - a^2) sum p_i^2`."""
    return cosine_squared + (1 - cosine_squared) * purity


def variance_explained(
    measured: Float[np.ndarray, "*draw pos"], predicted: Float[np.ndarray, "*draw pos"]
) -> Float[np.ndarray, "*draw"] | np.floating:
    """`R^2` of a prediction as it stands: 1 if it is right, 0 if it is no better than the mean, less if worse."""
    about_mean = measured - measured.mean(-1, keepdims=True)
    return 1 - np.square(measured - predicted).sum(-1) / np.square(about_mean).sum(-1)


def norm_and_variance(output: Float[Tensor, "batch pos d_model"], batch: Batch) -> Float[Tensor, "batch pos 2"]:
    """Squared norm, and variance over channels."""
    wide = output.float()
    return torch.stack([wide.square().sum(-1), wide.var(-1, correction=0)], dim=-1)


def mixed_values(
    values: Float[Tensor, "batch key kv_head d_head"],
    pattern: Float[Tensor, "batch head query key"],
    z: Float[Tensor, "batch query head d_head"],
    batch: Batch,
) -> Float[Tensor, "batch query head 5"]:
    """The first five fields of a `Cone`, from what one block's heads compute."""
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
    """The mean squared norm over positions, and before it nothing but behind it the mean unit vector."""
    wide = values.float()
    return torch.cat([wide.square().sum(-1).mean(1)[..., None], normalize(wide, dim=-1).mean(1)], dim=-1)


def values_at_places(
    values: Float[Tensor, "batch key kv_head d_head"], batch: Batch, places: Sequence[int]
) -> Float[Tensor, "batch kept kv_head d_head"]:
    """The values of some positions."""
    return values[:, list(places)].float()


def _fit_interval(cone_of: Cone, name: str) -> Interval:
    """How much of the variance over positions a prediction explains, everything in it drawn again with the samples.

    A resample is noisier than the samples, and noise cannot be explained: where samples are few or the profile is flat,
    the interval may lie beside the value.
    """
    parts = [getattr(cone_of, field.name) for field in fields(cone_of)]
    rows = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    ends = np.cumsum([part[0].size for part in parts])[:-1]

    def explained(means: Float[np.ndarray, "draw quantity"]) -> Float[np.ndarray, " draw"] | np.floating:
        split = zip(np.split(means, ends, axis=1), parts, strict=True)
        drawn = Cone(*(mean.reshape(-1, *part.shape[1:]) for mean, part in split))
        return variance_explained(drawn.squared.sum(-1), drawn.predictions()[name].sum(-1))

    return bootstrap(rows, explained)


def _isotropy(cone_of: Cone, values: Float[Tensor, "sample kept head d_head"], block: int) -> pd.DataFrame:
    """What the cone model assumes of each head, and how it is."""
    import pandas as pd

    rows = []
    mean = cone_of.mean()
    shared, predictions = mean.cosine_squared, mean.predictions()
    for head in range(values.shape[2]):
        sizes = values[:, :, head].norm(dim=-1).double().flatten()
        units = normalize(values[:, :, head].double(), dim=-1).flatten(0, 1)
        around = units - units.mean(0)
        spread = torch.linalg.eigvalsh(around.T @ around / len(around)).clamp(min=0)
        purity, mixed = cone_of.purity[..., head], cone_of.units[..., head]
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
                # Equal norms: 0. Where weights go to short values, below 1.
                "norm_spread": float(sizes.std() / sizes.mean()),
                "attended_over_mean_squared_norm": float(
                    cone_of.norms_squared[..., head].mean() / purity.mean() / cone_of.size[:, head].mean()
                ),
                # Isotropic: 1, every direction around the common one being used alike.
                "participation_ratio": float(spread.sum().square() / spread.square().sum()),
                "share_of_dimensions": float(spread.sum().square() / spread.square().sum() / (values.shape[3] - 1)),
                # Weights that do not depend on the values: equal to the squared cosine.
                "cosine_squared": float(shared[head]),
                "attended_cosine_squared": float((mixed - purity)[:, 1:].mean() / apart) if apart > 0 else np.nan,
            }
        )
    return pd.DataFrame(rows)
