"""The card of a trained model, README.md beside its weights: what it is, how it was made, what became of its sink."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from p0circuit.io import write_atomically
from p0circuit.training.runs import Run
from p0circuit.training.variants import ABOUT, VARIANTS, TrainConfig

_HEAD = """---
license: mit
library_name: transformers
tags: [attention-sink, interpretability]
---
# {name}

{about}

{millions:.1f} million parameters; {n_layers} layers of {n_heads} heads, width {d_model}, a byte-level BPE vocabulary of
{vocab_size}. Made for experiments on the attention sink: it writes text like its corpus and nothing else.
Weights are float16.
"""
_CHANGED = """
**It runs right only through `p0circuit`.** Its forward pass has a change that no library knows (the field `p0circuit`
of config.json). Loaded elsewhere it becomes another model, with other outputs and perhaps a warning about weights that
were not used.
"""
_RECIPE = """
## Recipe

`{command}`: AdamW, learning rate {learning_rate:g} with {warmup} steps of warm-up
and a cosine to {final_learning_rate:g} of it, weight decay {weight_decay:g}, {steps:,} steps of {batch} rows of
{length} tokens ({tokens:,} tokens), seed {seed}, float32, on CPU. `train_config.json` has every setting. Data: {data}.
"""
_PYTHON = """the Python
source of the standard library (3.11) and of the packages in `p0circuit.training.corpus`, as pinned in
`constraints.txt`; one file in 32, chosen by a hash of its name, was held out"""
_MEASURED = """
## Along training, {first}

128 crops of 64 tokens of held-out modules of the standard library. `excess` is the mean excess score of the heads
that are sinks at the end (attention to position zero beyond that to position 8), the sink rate counts heads above 0.3,
the norm ratio is the largest along the layers; the loss is in nats per token, without the prediction made at position
zero. {formed}

| step | tokens | loss | excess | sink rate | from layer 2 | norm ratio | induction |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_FIRST = {"bos": "behind BOS", "text": "text as it is", "random": "behind a random token"}
_COLUMNS = ("loss", "excess", "sink_rate", "sink_rate_from_layer_2", "largest_norm_ratio", "induction_score")


def variant_of(config: TrainConfig) -> str | None:
    """The named configuration that this is, but for the seed; None if it is none of them."""
    return next((name for name, named in VARIANTS.items() if replace(named, seed=config.seed) == config), None)


def command_of(config: TrainConfig) -> str:
    """The command that trains this configuration into a directory OUT."""
    variant = variant_of(config)
    if variant is not None:
        return f"p0circuit train OUT --variant {variant}" + (f" --seed {config.seed}" if config.seed else "")
    plain = asdict(TrainConfig())
    options = {name: value for name, value in asdict(config).items() if value != plain[name]}
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return "p0circuit train OUT" + "".join(f" --set '{name}={value}'" for name, value in told.items())


def card(name: str, config: TrainConfig, parameters: int, runs: Sequence[Run] = ()) -> str:
    """The card as Markdown; `runs` are the traces of this one run, on each kind of prompts."""
    variant, settings = variant_of(config), asdict(config)
    about = ABOUT[variant] if variant else f"A language model of the architecture {config.architecture}."
    text = _HEAD.format(name=name, about=about, millions=parameters / 1e6, **settings)
    if config.architecture_edits:
        text += _CHANGED
    text += _RECIPE.format(
        command=command_of(config),
        tokens=config.steps * config.batch * config.length,
        data=_PYTHON if config.corpus == "python" else f"`{config.corpus}`",
        **settings,
    )
    for run in runs:
        formed = "No sink at the end."
        if run.formation is not None:
            step, share = int(run["step"][run.formation]), run.formation_share
            formed = f"The sink has formed by step {step:,} ({share:.0%} of the tokens)."
        text += _MEASURED.format(first=_FIRST[run.first], formed=formed)
        for at in range(len(run.table)):
            values = " | ".join(f"{run[column][at]:.2f}" for column in _COLUMNS)
            text += f"| {run['step'][at]:,.0f} | {run['tokens'][at]:,.0f} | {values} |\n"
    return text


def write_card(folder: Path, config: TrainConfig, parameters: int, runs: Sequence[Run] = ()) -> Path:
    """Write the card of the model in `folder`; returns its path."""
    text = card(folder.name, config, parameters, runs)
    path = folder / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path
