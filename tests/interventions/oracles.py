"""Path patching the slow, obvious way: the oracle of every fast form."""

from __future__ import annotations

import functools
from typing import Any

import torch

from p0circuit.interventions.nodes import Node
from p0circuit.models import describe, forward
from p0circuit.sink import sink_score


def component_outputs(model: Any, prompts: Any) -> dict[str, torch.Tensor]:
    """What every attention and MLP writes on the clean prompts, by hook name."""
    names = [f"blocks.{layer}.hook_{part}_out" for layer in range(describe(model).n_layers) for part in ("attn", "mlp")]
    cache: dict[str, torch.Tensor] = {}

    def keep(activation, hook, name):
        cache[name] = activation.clone()

    forward(
        model, prompts.ids, prompts.attention_mask, hooks=[(name, functools.partial(keep, name=name)) for name in names]
    )
    return cache


def literal_key_edge(
    model: Any, prompts: Any, sender: Node, value: torch.Tensor, layer: int, through: str = "direct"
) -> torch.Tensor:
    """Sink scores [batch, head] of one layer whose keys of P0 have heard the sender's new value, and nothing else has.

    1. Run with the sender's value replaced at P0 and everything computed later frozen at its clean value (MLPs free
       with through="mlps"), and keep the layer's key of P0.
    2. Run the clean prompts with that key in the place of the clean one, and read the pattern.
    """
    clean = component_outputs(model, prompts)
    rows, p0 = torch.arange(prompts.n), prompts.p0

    def send(activation, hook):
        activation = activation.clone()
        if sender.index is None:
            activation[rows, p0] = value
        else:
            activation[rows, p0, sender.index] = value
        return activation

    def freeze(activation, hook, name):
        return clean[name]

    hooks = [(sender.hook, send)]
    for later in range(describe(model).n_layers):
        for part, stage in (("attn", 1), ("mlp", 3)):
            if sender.depth < (later, stage) and (part == "attn" or through == "direct"):
                name = f"blocks.{later}.hook_{part}_out"
                hooks.append((name, functools.partial(freeze, name=name)))
    rotated = "rot_" if describe(model).positions == "rotary" else ""
    key_name = f"blocks.{layer}.attn.hook_{rotated}k"
    heard = {}

    def hear(key, hook):
        heard["key"] = key[rows, p0].clone()

    forward(model, prompts.ids, prompts.attention_mask, hooks=[*hooks, (key_name, hear)])

    def replace(key, hook):
        key = key.clone()
        key[rows, p0] = heard["key"]
        return key

    def read(pattern, hook):
        heard["score"] = sink_score(pattern, p0, prompts.attention_mask)

    pattern_name = f"blocks.{layer}.attn.hook_pattern"
    forward(model, prompts.ids, prompts.attention_mask, hooks=[(key_name, replace), (pattern_name, read)])
    return heard["score"]
