"""Compare a hooked model with the `transformers` model that it was made of, on a short batch of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models.errors import ModelError
from p0circuit.models.forward import forward
from p0circuit.models.hooks import hook_point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MENDING = "try the other backend or another version of TransformerLens"


def reference_logits(name: str, hf: PreTrainedModel, device: torch.device) -> Float[Tensor, "batch pos vocab"]:
    """Run a `transformers` model on a short batch, and check that its attention is causal.

    Args:
        name: what error messages call the model.
        hf: the model.
        device: the device that takes its token ids.

    Returns:
        Logits in float32, [2, 5, vocab].

    Raises:
        ModelError: the model cannot be run, or its last token changes the logits before it.
    """
    try:
        with torch.no_grad():
            logits = hf(_sample_ids(hf.config.get_text_config().vocab_size, device)).logits.float()
    except Exception as error:
        raise ModelError(f"{name}: transformers cannot run it, its config.json may be wrong: {error}") from error
    if not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=0, atol=1e-3 * float(logits.abs().max())):
        raise ModelError(f"{name} has no causal mask: a later token changes the logits before it")
    return logits


def checked(model: HookedModel, reference: Float[Tensor, "batch pos vocab"]) -> HookedModel:
    """Return a hooked model if it gives the reference logits.

    Args:
        model: a hooked model.
        reference: what `reference_logits` returned for the same weights, [2, 5, vocab].

    Raises:
        ModelError: the model cannot be run, or gives other logits.
    """
    title = f"{model.cfg.model_name}: {type(model).__name__}"
    try:
        with torch.no_grad():
            # Looks up the hook points, and repairs a bridge's, before the logits are compared.
            hook_point(model, "blocks.0.hook_resid_pre")
            logits = forward(model, _sample_ids(model.cfg.d_vocab, model.cfg.device)).float()
    except Exception as error:
        raise ModelError(f"{title} cannot run it ({error}); {_MENDING}") from error
    tolerance = 1e-3 if model.cfg.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((logits - reference).abs().max())
    if not difference <= tolerance * float(reference.abs().max()):
        raise ModelError(f"{title} gives other logits than transformers (difference {difference:.2g}); {_MENDING}")
    return model


def _sample_ids(vocab_size: int, device: torch.device | str) -> Int[Tensor, "batch pos"]:
    """Two rows of five ids that differ in the last id alone."""
    ids = torch.arange(5, device=device).repeat(2, 1) * 7 % vocab_size
    ids[1, -1] = (ids[1, -1] + 1) % vocab_size
    return ids
