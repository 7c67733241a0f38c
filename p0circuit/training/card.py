"""The card of a trained model, README.md next to its weights: what it is, its training, and how its sink emerged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from p0circuit.io import write_atomically
from p0circuit.training.config import TrainConfig
from p0circuit.training.runs import Run
from p0circuit.training.variants import ABOUT, VARIANTS

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
_ARCHITECTURE_EDITS = """
**Load it with `p0circuit` only.** Its forward pass differs from that of its architecture in a way that no other library
implements (the field `p0circuit` of config.json). Loaded with another library it gives other outputs, perhaps with a
warning about unused weights.
"""
_RECIPE = """
## Recipe

`{command}`: AdamW, learning rate {learning_rate:g} with {warmup} steps of warm-up
and a cosine to {final_learning_rate:g} of it, weight decay {weight_decay:g}, {steps:,} steps of {batch} rows of
{length} tokens ({tokens:,} tokens), seed {seed}, float32, on CPU. `train_config.json` has every setting. Data: {data}.
"""
_PYTHON = """the Python
source of the standard library (3.11) and of the packages in `p0circuit.text.CORPUS_DISTRIBUTIONS`, as pinned in
`constraints.txt`; one file in 32, chosen by a hash of its name, was held out"""
_TRACE = """
## Along training, {first}

128 crops of 64 tokens of held-out modules of the standard library. `excess` is the mean excess score of the heads
that are sinks at the end: attention to position zero minus attention to position 8. The sink rate is the share of heads
with a sink score above 0.3, the norm ratio is the largest of all layers, and the loss is in nats per token, without the
prediction made at position zero. {emergence}

| step | tokens | loss | excess | sink rate | from layer 2 | norm ratio | induction |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_FIRST = {"bos": "after BOS", "text": "without BOS", "random": "after a random token"}
_COLUMNS = ("loss", "excess", "sink_rate", "sink_rate_from_layer_2", "largest_norm_ratio", "induction_score")


def variant_of(config: TrainConfig) -> str | None:
    """Return the name of the variant that a configuration is, whatever its seed; None if it is none.

    Args:
        config: configuration of a training run.
    """
    return next((name for name, variant in VARIANTS.items() if replace(variant, seed=config.seed) == config), None)


def command_of(config: TrainConfig) -> str:
    """Return the shell command that trains this configuration into a directory OUT.

    Args:
        config: configuration of a training run.
    """
    variant = variant_of(config)
    if variant is not None:
        return f"p0circuit train OUT --variant {variant}" + (f" --seed {config.seed}" if config.seed else "")
    defaults = asdict(TrainConfig())
    settings = {name: value for name, value in asdict(config).items() if value != defaults[name]}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return "p0circuit train OUT" + "".join(f" --set '{name}={value}'" for name, value in texts.items())


def card(name: str, config: TrainConfig, parameters: int, runs: Sequence[Run] = ()) -> str:
    """Return the card of a model as Markdown.

    Args:
        name: name of the model.
        config: how it was trained.
        parameters: number of its weights.
        runs: traces of this one run, one for each kind of first token.
    """
    variant, settings = variant_of(config), asdict(config)
    about = ABOUT[variant] if variant else f"A language model of the architecture {config.architecture}."
    text = _HEAD.format(name=name, about=about, millions=parameters / 1e6, **settings)
    if config.architecture_edits:
        text += _ARCHITECTURE_EDITS
    text += _RECIPE.format(
        command=command_of(config),
        tokens=config.steps * config.batch * config.length,
        data=_PYTHON if config.corpus == "python" else f"`{config.corpus}`",
        **settings,
    )
    for run in runs:
        emergence = "There is no sink at the end."
        if run.formation is not None:
            step, share = int(run["step"][run.formation]), run.formation_share
            emergence = f"The sink emerged by step {step:,} ({share:.0%} of the tokens)."
        text += _TRACE.format(first=_FIRST[run.first], emergence=emergence)
        for checkpoint in range(len(run.table)):
            values = " | ".join(f"{run[column][checkpoint]:.2f}" for column in _COLUMNS)
            text += f"| {run['step'][checkpoint]:,.0f} | {run['tokens'][checkpoint]:,.0f} | {values} |\n"
    return text


def write_card(folder: Path, config: TrainConfig, parameters: int, runs: Sequence[Run] = ()) -> Path:
    """Write the card of the model in a directory.

    Args:
        folder: the directory, whose name is the name of the model.
        config: how the model was trained.
        parameters: number of its weights.
        runs: as in `card`.

    Returns:
        The path of the card.
    """
    text = card(folder.name, config, parameters, runs)
    path = folder / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path
