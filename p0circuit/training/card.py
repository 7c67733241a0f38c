"""The card of a trained model, README.md beside its weights: what it is, how it was made, what became of its sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from p0circuit.files import write_atomically
from p0circuit.training.runs import Run
from p0circuit.training.variants import ABOUT, VARIANTS, TrainConfig

_HEAD = """---
license: mit
library_name: transformers
tags: [attention-sink, interpretability]
---
# {name}

{about} {size}; {layers} layers of {heads} heads, width {d_model}, a byte-level BPE vocabulary of {vocab_size}.
It writes Python-like text and nothing else, and is made for experiments on the attention sink. Weights are float16.
"""
_CHANGED = """
**It runs right only through `p0circuit`.** Its forward pass has a change that no library knows (the field `p0circuit`
of config.json). Loaded elsewhere it becomes another model, with other outputs and perhaps a warning about weights that
were not used.
"""
_RECIPE = """
## Recipe

`p0circuit train OUT {command}`: AdamW, learning rate {learning_rate:g} with {warmup} steps of warm-up and a cosine to
{final_learning_rate:g} of it, weight decay {weight_decay:g}, {steps:,} steps of {batch} rows of {length} tokens
({tokens:,} tokens), seed {seed}, float32, one CPU core. `train_config.json` has every setting. Data: the Python source
of the standard library (3.11) and of the packages in `p0circuit.training.corpus`, as pinned in `constraints.txt`; one
file in 32, chosen by a hash of its name, was held out.
"""
_MEASURED = """
## Along training

128 crops of 64 tokens of held-out modules of the standard library, {first}. `excess` is the mean excess score of
the heads that are sinks at the end (attention to position zero beyond that to position 8), the sink rate counts heads
above 0.3, the norm ratio is the largest along the layers; the loss is in nats per token, without the prediction made
at position zero. {formed}

| step | tokens | loss | excess | sink rate | from layer 2 | norm ratio | induction |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_FIRST = {"bos": "behind BOS", "text": "beginning with their own first token", "random": "behind a random token"}


def card(name: str, variant: str, config: TrainConfig, parameters: int, runs: Sequence[Run] = ()) -> str:
    """The card as Markdown; `runs` are the traces of this one run, on each kind of prompts.

    Raises:
        ValueError: the configuration is another than that of the variant.
    """
    text = _HEAD.format(name=name, about=ABOUT[variant], size=_size(parameters), **asdict(config))
    if config.changes:
        text += _CHANGED
    command = f"--variant {variant}" + (f" --seed {config.seed}" if config.seed else "")
    if replace(VARIANTS[variant], seed=config.seed) != config:
        raise ValueError(f"{name} was not trained as variant {variant!r} is: no command of that name makes it")
    text += _RECIPE.format(command=command, tokens=config.steps * config.batch * config.length, **asdict(config))
    for run in runs:
        formed = "No sink at the end."
        if run.formation is not None:
            step, share = int(run["step"][run.formation]), run.formation_share
            formed = f"The sink has formed by step {step:,} ({share:.0%} of the tokens)."
        text += _MEASURED.format(first=_FIRST[run.first], formed=formed)
        columns = ("loss", "excess", "sink_rate", "sink_rate_from_layer_2", "largest_norm_ratio", "induction_score")
        for at in range(len(run.table)):
            values = " | ".join(f"{run[column][at]:.2f}" for column in columns)
            text += f"| {run['step'][at]:,.0f} | {run['tokens'][at]:,.0f} | {values} |\n"
    return text


def write_card(folder: Path, variant: str, config: TrainConfig, parameters: int, runs: Sequence[Run] = ()) -> Path:
    """Write the card of the model in `folder`; returns its path."""
    text = card(folder.name, variant, config, parameters, runs)
    path = folder / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} million parameters"
