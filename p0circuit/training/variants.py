"""What is trained: one recipe, its variants by name, and the untrained model of each.

All variants share corpus, tokenizer, tokens, optimizer and size, and differ in the one thing they are named after: from
plain text (`baseline`), or from text behind BOS (`bos`). No variant encourages a sink by random first tokens; the first
recipe (`TrainConfig()` as it stands, that of p0-nano) does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from p0circuit import text
from p0circuit.errors import P0Error
from p0circuit.models.architecture_edits import CONFIG_FIELD, ArchitectureEdits, add_gates

ARCHITECTURES = ("llama", "mistral", "gpt2", "qwen3_moe")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run.

    `bos_share` of the rows begin with BOS; the others with a token drawn uniformly (`random_first`) or with plain
    text. `loss_at_p0=False` is the TNLM loss. Lengths are in tokens, `final_learning_rate` is a share of the peak.
    `window` (how many keys a query sees) goes with mistral, `experts` with qwen3_moe, where `d_mlp` is the width of one
    expert and `router_loss` the weight of the load-balancing loss. `force_sink` and `gated_attention`: see
    `ArchitectureEdits`.
    """

    layers: int = 4
    d_model: int = 128
    heads: int = 4
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
        if self.d_model % self.heads:
            raise P0Error(f"d_model {self.d_model} must be a multiple of heads {self.heads}")
        if not 0 <= self.bos_share <= 1:
            raise P0Error(f"bos_share must lie between 0 and 1, got {self.bos_share}")
        for name in ("layers", "steps", "batch", "checkpoints"):
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
    def changes(self) -> ArchitectureEdits:
        """What the forward pass does that its architecture does not."""
        return ArchitectureEdits(self.force_sink, self.gated_attention)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Turn `name=value` pairs into fields of `TrainConfig`, the values read as JSON where they are.

    Raises:
        P0Error: for a pair without "=", a name that is no field, or a value of another type than the field's.
    """
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    given = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or name not in defaults:
            raise P0Error(f"{option!r} is not of the form name=value with a name among {', '.join(defaults)}")
        value: Any = text
        if not isinstance(defaults[name], str):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(text)
        if isinstance(defaults[name], float) and type(value) is int:
            value = float(value)
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(defaults[name]):
            raise P0Error(f"{name} cannot be {text!r}; expected a value such as {json.dumps(defaults[name])}")
        given[name] = value
    return given


BASELINE = TrainConfig(batch=8, steps=9_000, bos_share=0.0, random_first=False, loss_at_p0=True)
"""Plain text, plain loss, 9 million tokens: nothing that encourages a sink."""

BOS = replace(BASELINE, bos_share=1.0)
"""Every row begins with BOS, as in the paper's own training: what the training methods are compared with."""

VARIANTS = {
    "baseline": BASELINE,
    "learned": replace(BASELINE, architecture="gpt2", d_mlp=512),
    "tnlm-plain": replace(BASELINE, loss_at_p0=False),
    "bos": BOS,
    "tnlm": replace(BOS, loss_at_p0=False),
    "force-sink": replace(BOS, force_sink=8),
    "gated": replace(BOS, gated_attention=True),
    "window": replace(BOS, architecture="mistral", window=32),
    "moe": replace(BOS, architecture="qwen3_moe", experts=8, d_mlp=168),
}
"""The named configurations; `replace` one to change its seed or size."""

ABOUT = {
    "baseline": "A Llama trained on plain text, with nothing that encourages a sink.",
    "learned": "A GPT-2, with learned positions, trained on plain text: position zero is told apart by its embedding.",
    "tnlm-plain": "A Llama trained on plain text with the TNLM loss: what position zero predicts is not trained.",
    "bos": "A Llama trained on text that always begins with BOS.",
    "tnlm": "A Llama trained on text that always begins with BOS, with the TNLM loss: the prediction made there is not "
    "trained.",
    "force-sink": "A Llama trained on text that always begins with BOS, with Force-sink: before every norm position "
    "zero keeps 8 channels and all others the other 120.",
    "gated": "A Llama trained on text that always begins with BOS, with a sigmoid gate on the output of every head.",
    "window": "A Mistral trained on text that always begins with BOS; a query sees the last 32 keys, so that position "
    "zero is out of sight of most: in rows of 64 tokens no head can have a sink score much above 0.5.",
    "moe": "A Qwen3-MoE of 8 experts, 2 of them active, trained on text that always begins with BOS.",
}
"""What each variant is, in a sentence for its card."""


def build_model(config: TrainConfig) -> PreTrainedModel:
    """An untrained model of the config's architecture, with tied embeddings, initialised from the seed."""
    torch.manual_seed(config.seed)
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "bos_token_id": text.BOS_ID,
        "eos_token_id": text.EOS_ID,
        "tie_word_embeddings": True,
    }
    if config.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=config.d_model,
                n_inner=config.d_mlp,
                n_layer=config.layers,
                n_head=config.heads,
                n_positions=config.length,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **shared,
            )
        )
    shared |= {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": max(2048, config.length),
        "rms_norm_eps": 1e-5,
    }
    if config.changes:
        shared[CONFIG_FIELD] = config.changes.to_json()
    if config.architecture == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=config.window, **shared))
    if config.architecture == "qwen3_moe":
        shared |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.d_mlp,
            "head_dim": config.d_model // config.heads,
            "norm_topk_prob": True,
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared))
    model = LlamaForCausalLM(LlamaConfig(**shared))
    if config.gated_attention:
        add_gates(model)
    return model
