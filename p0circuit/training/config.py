"""The configuration of a training run: every setting that decides its outcome, checked when it is made."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from p0circuit.errors import P0Error
from p0circuit.models.architecture_edits import ArchitectureEdits

ARCHITECTURES = ("llama", "mistral", "gpt2", "qwen3_moe")
"""Architectures that can be trained, by their names in `transformers`."""


@dataclass(frozen=True)
class TrainConfig:
    """Every setting that decides the outcome of a training run.

    The defaults are the recipe of `p0-nano`. Two runs with equal configurations on the same machine give the same
    weights.

    Attributes:
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: number of attention heads in each block; divides `d_model`.
        d_mlp: width of the MLP; of one expert in a mixture of experts.
        vocab_size: number of tokens of the tokenizer that is trained on the corpus.
        length: tokens in a training row.
        batch: rows in a step.
        steps: number of updates.
        learning_rate: peak of the learning rate.
        warmup: steps of linear warm-up to the peak.
        final_learning_rate: learning rate at the last step, as a share of the peak.
        betas: decay rates of the two moments of AdamW.
        weight_decay: weight decay of AdamW, on matrices only.
        clip: largest norm of the gradient; longer gradients are scaled down.
        bos_share: share of the rows that begin with BOS, from 0 to 1.
        random_first: whether the other rows begin with a token drawn uniformly from the vocabulary; if not, they are
            plain text.
        loss_at_p0: whether the prediction made at position 0 is trained; False is the TNLM loss (arXiv 2603.06591 v2).
        seed: seed of the initial weights and of the batches.
        checkpoints: number of log-spaced checkpoints, the first and the last step included.
        corpus: "python" (the installed Python source), the path of a text file or directory, or "hub:NAME" for a data
            set of the Hugging Face hub.
        architecture: one of `ARCHITECTURES`.
        window: number of keys that a query sees; above 0 for "mistral" and 0 for all others.
        experts: experts in each block; above 0 for "qwen3_moe" and 0 for all others.
        experts_per_token: experts that each token is routed to.
        router_loss: weight of the loss that balances the load of the experts.
        force_sink: channels reserved for position 0 by Force-sink (`ArchitectureEdits`); 0 for none.
        gated_attention: whether the output of every head goes through a sigmoid gate (`ArchitectureEdits`).
    """

    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 336
    vocab_size: int = 1024
    length: int = 128
    batch: int = 16
    steps: int = 20_000
    learning_rate: float = 3e-3
    warmup: int = 200
    final_learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    bos_share: float = 0.5
    random_first: bool = True
    loss_at_p0: bool = False
    seed: int = 0
    checkpoints: int = 16
    corpus: str = "python"
    architecture: str = "llama"
    window: int = 0
    experts: int = 0
    experts_per_token: int = 2
    router_loss: float = 0.01
    force_sink: int = 0
    gated_attention: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if self.d_model % self.n_heads:
            raise P0Error(f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}")
        if not 0 <= self.bos_share <= 1:
            raise P0Error(f"bos_share must lie between 0 and 1, got {self.bos_share}")
        for name in ("n_layers", "steps", "batch", "checkpoints"):
            if getattr(self, name) < 1:
                raise P0Error(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise P0Error(f"length must be at least 2 tokens, got {self.length}")
        if self.architecture not in ARCHITECTURES:
            raise P0Error(f"unknown architecture {self.architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
        for name, architecture in (("window", "mistral"), ("experts", "qwen3_moe")):
            if (getattr(self, name) > 0) != (self.architecture == architecture):
                raise P0Error(
                    f"{name}={getattr(self, name)} with architecture {self.architecture!r}: "
                    f"{architecture!r} needs {name} above 0, and no other takes it"
                )
        if not 0 <= self.force_sink < self.d_model:
            raise P0Error(f"force_sink must lie between 0 and d_model {self.d_model}, got {self.force_sink}")

    @property
    def architecture_edits(self) -> ArchitectureEdits:
        """How the forward pass differs from that of the architecture."""
        return ArchitectureEdits(self.force_sink, self.gated_attention)


def read_config(path: Path) -> TrainConfig:
    """Read the configuration of a run; fields that the file lacks have their defaults.

    Args:
        path: a `train_config.json`.

    Raises:
        P0Error: the file is not a configuration, or has fields that `TrainConfig` does not have.
    """
    try:
        settings = json.loads(path.read_text())
        settings["betas"] = tuple(settings["betas"])
    except (ValueError, KeyError, TypeError):
        raise P0Error(f"{str(path)!r} is not the configuration of a training run") from None
    if unknown := sorted(set(settings) - {field.name for field in fields(TrainConfig)}):
        raise P0Error(f"{str(path)!r} has fields that this version does not know: {', '.join(unknown)}")
    return TrainConfig(**settings)
