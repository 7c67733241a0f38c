"""One clean recording for all experiments of a run.

Most of what experiments read of clean runs is recorded here once: sink scores and streams at P0 and at the ordinary
positions, norms, and losses, on the text with BOS before it and without. Inside `remember_rows()` every experiment then
finds it there, whatever part of the prompts it looks at.
"""

from __future__ import annotations

from p0circuit.experiments.base import ORDINARY
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import (
    ATTENTION_OUT_NORMS,
    MLP_OUT_NORMS,
    NORM_RATIO,
    TOKEN_LOSSES,
    component_at,
    residual_at,
    score_at,
)
from p0circuit.recording.record import record
from p0circuit.sink import CONTROL

CLEAN_PASSES = 2
"""What it takes: a pass with BOS before the text and one without; one pass where there is no BOS."""


def record_clean(model: HookedModel, prompts: PromptSet) -> None:
    """Record the prompts as they are, then in the other condition (after BOS, or without it) what is read of that."""
    positions = [offset for offset in (0, *ORDINARY, CONTROL) if offset < int(prompts.attention_mask.sum(1).min())]
    scores = [score_at(offset) for offset in positions]
    what = [*scores, TOKEN_LOSSES, NORM_RATIO, ATTENTION_OUT_NORMS, MLP_OUT_NORMS]
    what += [residual_at(offset) for offset in positions]
    what += [component_at(name, offset) for name in ("hook_attn_out", "hook_mlp_out") for offset in positions]
    record(model, prompts, what)
    # Nothing is recorded twice: one of the two conditions is that of the prompts.
    for condition in with_and_without_bos(model, prompts).values():
        record(model, condition, [*scores, TOKEN_LOSSES, NORM_RATIO, residual_at()])
