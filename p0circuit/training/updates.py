"""One training step: its batch, its learning rate, its loss and its update.

1. A batch is a function of (seed, step) alone. Each row is a first token (BOS, or one drawn uniformly) and then a crop
   of the token stream, or a crop alone.
2. AdamW with warm-up and cosine decay. With the TNLM loss (arXiv 2603.06591 v2, section on training methods) the
   prediction made at position 0 is not trained, so that position is free to become a register.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from p0circuit.text import BOS_ID
from p0circuit.training.config import TrainConfig

LogRow = dict[str, float | None]
"""One line of a run's log: step, tokens, train_loss (None at step 0) and validation_loss."""


@dataclass
class TrainState:
    """What a run needs to be resumed with the same result.

    Attributes:
        model: the model in training.
        optimizer: its optimizer.
        step: number of updates made.
        log: losses at the checkpoints so far.
    """

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    step: int = 0
    log: list[LogRow] = field(default_factory=list)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to a share of the peak.

    Args:
        config: `learning_rate`, `warmup`, `final_learning_rate` and `steps` decide.
        step: number of updates made before this one.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(config: TrainConfig, stream: np.ndarray, step: int, bos: int) -> Int[Tensor, "batch pos"]:
    """Make the rows of one step from (seed, step) alone, so that a resumed run sees the same data.

    Args:
        config: shape of the batch, and what its rows begin with.
        stream: token ids of the corpus [token].
        step: number of updates made before this one.
        bos: id of the BOS token.

    Returns:
        Token ids [batch, pos].
    """
    rng = np.random.default_rng([config.seed, step])
    starts = rng.integers(0, len(stream) - config.length, config.batch)
    rows = np.stack([stream[start : start + config.length] for start in starts]).astype(np.int64)
    with_bos = rng.random(config.batch) < config.bos_share
    random_tokens = rng.integers(0, config.vocab_size, config.batch)
    # A first token is placed *before* the text of the crop; the row keeps its length and loses its last token.
    prepended = with_bos | config.random_first
    first = np.where(with_bos, bos, random_tokens)
    rows[prepended] = np.concatenate([first[prepended, None], rows[prepended, :-1]], axis=1)
    return torch.from_numpy(rows)


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"], loss_at_p0: bool = True
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the next token, in nats.

    Args:
        logits: predictions of the model.
        ids: the token ids it read.
        loss_at_p0: whether the prediction made at position 0 counts; False gives the TNLM loss.
    """
    start = 0 if loss_at_p0 else 1
    predictions, targets = logits[:, start:-1], ids[:, start + 1 :]
    return torch.nn.functional.cross_entropy(predictions.flatten(0, 1).float(), targets.flatten())


def build_optimizer(config: TrainConfig, model: PreTrainedModel) -> torch.optim.AdamW:
    """Make an AdamW optimizer of all trainable parameters, with weight decay on matrices only.

    Args:
        config: configuration of the training run.
        model: the model to train.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def train_step(config: TrainConfig, state: TrainState, ids: Int[Tensor, "batch pos"]) -> float:
    """Make one update of `state`, in place.

    Args:
        config: recipe of the run.
        state: model and optimizer; its step goes up by one.
        ids: token ids of the batch.

    Returns:
        The training loss before the update, in nats per token.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(config, state.step)
    output = state.model(input_ids=ids, **({"output_router_logits": True} if config.experts else {}))
    loss = objective = next_token_loss(output.logits, ids, config.loss_at_p0)
    if config.experts:
        # Without this term a few experts would do all the work. It is no part of the loss that is returned.
        objective = loss + config.router_loss * output.aux_loss
    state.optimizer.zero_grad(set_to_none=True)
    objective.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    state.optimizer.step()
    state.step += 1
    return loss.item()


@torch.no_grad()
def validation_loss(config: TrainConfig, model: PreTrainedModel, held_out: np.ndarray, batches: int = 8) -> float:
    """Return the mean loss on fixed crops of the held-out files, in nats per token.

    The prediction made at position 0 is left out for every recipe, so that recipes with and without the TNLM loss can
    be compared.

    Args:
        config: shape of the batches; the rows are made as in training.
        model: the model in training; left in training mode.
        held_out: token ids of the held-out files [token].
        batches: number of batches.
    """
    fixed = replace(config, seed=1_000_003)
    model.eval()
    losses = []
    for number in range(batches):
        ids = batch_at(fixed, held_out, number, BOS_ID)
        losses.append(next_token_loss(model(input_ids=ids).logits, ids, loss_at_p0=False).item())
    model.train()
    return float(np.mean(losses))
