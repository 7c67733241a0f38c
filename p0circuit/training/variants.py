"""Named training configurations.

All variants share corpus, tokenizer, number of tokens, optimizer and size, and differ in what they are named after:
from plain text (`baseline`), from text that begins with BOS (`bos`), or from text with a first token that is BOS in one
half of the rows and random in the other (`first`). The random first tokens encourage a sink at position 0; `baseline`
and `bos` do not.
"""

from __future__ import annotations

from dataclasses import replace

from p0circuit.training.config import TrainConfig

BASELINE = TrainConfig(batch=8, steps=9_000, bos_share=0.0, random_first=False, loss_at_p0=True)
"""Plain text and the plain loss, on 9 million tokens: nothing encourages a sink."""

BOS = replace(BASELINE, bos_share=1.0)
"""Every row begins with BOS, as in the paper's own training; the training methods are compared with it."""

FIRST = replace(BASELINE, bos_share=0.5, random_first=True)
"""Half of the rows begin with BOS and the others with a random token, which encourages a sink."""

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
    "first": FIRST,
    "first-tnlm": replace(FIRST, loss_at_p0=False),
    "first-force": replace(FIRST, force_sink=8),
    "first-moe": replace(FIRST, architecture="qwen3_moe", experts=8, d_mlp=168),
}
"""The named configurations; use `dataclasses.replace` to change the seed or size of one."""

ABOUT = {
    "baseline": "A Llama trained on plain text, with nothing that encourages a sink.",
    "learned": "A GPT-2, with learned positions, trained on plain text: position zero has an embedding of its own.",
    "tnlm-plain": "A Llama trained on plain text with the TNLM loss: the prediction made at position zero is not "
    "trained.",
    "bos": "A Llama trained on text that always begins with BOS.",
    "tnlm": "A Llama trained on text that always begins with BOS, with the TNLM loss: the prediction made there is not "
    "trained.",
    "force-sink": "A Llama trained on text that always begins with BOS, with Force-sink: before every norm position "
    "zero keeps 8 channels and all others the other 120.",
    "gated": "A Llama trained on text that always begins with BOS, with a sigmoid gate on the output of every head.",
    "window": "A Mistral trained on text that always begins with BOS. A query sees the last 32 keys, so most do not "
    "see position zero: in rows of 64 tokens no head can have a sink score much above 0.5.",
    "moe": "A Qwen3-MoE of 8 experts, 2 of them active, trained on text that always begins with BOS.",
    "first": "A Llama trained on text with a first token that is BOS in half of the rows and random in the others, "
    "which encourages a sink.",
    "first-tnlm": "A Llama trained on text with a first token that is BOS in half of the rows and random in the "
    "others, with the TNLM loss: the prediction made at position zero is not trained.",
    "first-force": "A Llama trained on text with a first token that is BOS in half of the rows and random in the "
    "others, with Force-sink: before every norm position zero keeps 8 channels and all others the other 120.",
    "first-moe": "A Qwen3-MoE of 8 experts, 2 of them active, trained on text with a first token that is BOS in half "
    "of the rows and random in the others.",
}
"""One sentence about each variant, for its card."""
