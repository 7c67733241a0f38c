"""How time and memory of the fast forms grow with length, layers, heads and vocabulary.

    python -m benchmarks.growth docs/performance.md

Random weights of GPT-2 small's width, two rows. One dimension is doubled at a time. Memory is the peak beyond the
weights; one forward over the same rows stands first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.activation_patching import SHIFT
from benchmarks.memory import peak_mb
from benchmarks.models import gpt2_shape
from benchmarks.tables import write_between
from p0circuit.interventions.activation_patching import patch
from p0circuit.interventions.closed_form import key_edges
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import components
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.interventions.vocabulary import vocabulary_sweep
from p0circuit.models import describe, forward
from p0circuit.prompts import random_tokens

NEURONS = 64
"""Number of neurons patched, one by one."""


@dataclass(frozen=True)
class Shape:
    """What is doubled, one at a time; the width stays 768, so twice the heads are half as wide."""

    layers: int = 6
    heads: int = 6
    length: int = 64
    vocab_size: int = 12_288


BASE = Shape()


def doubled(base: Shape) -> dict[str, Shape]:
    """The base, and the base with one dimension doubled at a time, by what is doubled."""
    dimensions = {"layers": "layers", "heads": "heads", "tokens in a row": "length", "vocabulary": "vocab_size"}
    return {
        "base": base,
        **{what: replace(base, **{field: 2 * getattr(base, field)}) for what, field in dimensions.items()},
    }


@torch.no_grad()
def measure(base: Shape = BASE, neurons: int = NEURONS) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds, MB and number of patches, by what is doubled and by way."""
    return {what: _measure(shape, neurons) for what, shape in doubled(base).items()}


def _measure(shape: Shape, neurons: int) -> dict[str, dict[str, float]]:
    model = gpt2_shape(shape.layers, shape.vocab_size, shape.heads)
    info = describe(model)
    metric = sink_score_of([shape.layers // 2])
    pair = shift_prompts(random_tokens(info.vocab_size, n=2, length=shape.length), SHIFT, info.vocab_size)
    senders = components(model, [0, 1], heads=True)
    values = patch_values(model, pair, senders)
    ids = torch.arange(info.vocab_size)
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "one forward": (1, lambda: forward(model, pair.clean.ids)),
        "grid of components": (5 * shape.layers, lambda: patch(model, pair, metric, "components")),
        "single neurons of one MLP": (
            neurons,
            lambda: patch(model, pair, metric, [f"neuron.0.{number}" for number in range(neurons)]),
        ),
        "closed form": (
            len(senders) * (shape.layers - 2) * info.n_heads,
            lambda: key_edges(model, pair.clean, senders, values),
        ),
        "vocabulary sweep": (info.vocab_size, lambda: vocabulary_sweep(model, ids)),
    }
    lines = {}
    for way, (number, run) in ways.items():
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        lines[way] = {"number": number, "seconds": seconds, "mb": peak_mb(run)}
    return lines


def markdown(results: Mapping[str, Mapping[str, Mapping[str, float]]], base: Shape = BASE) -> str:
    """The table of the documentation: a row for each way, a column for the base and for each doubled dimension."""
    cases = list(results)
    heading = [f"{base.layers} layers, {base.heads} heads, {base.length} tokens, vocabulary {base.vocab_size:,}"]
    heading += [f"twice the {what}" for what in cases[1:]]
    lines = [f"| | {' | '.join(heading)} |", f"| --- |{' --- |' * len(cases)}"]
    for way in results["base"]:
        lines.append(f"| {way} | " + " | ".join(_cell(results, case, way) for case in cases) + " |")
    lines += ["", "Each cell: number of patches, edges or tokens; time, memory."]
    return "\n".join(lines)


def _cell(results: Mapping[str, Mapping[str, Mapping[str, float]]], case: str, way: str) -> str:
    line = results[case][way]
    return f"{line['number']:,}: {line['seconds']:.2g} s, {line['mb']:.0f} MB"


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table, and write it into the files named."""
    table = markdown(measure())
    print(table)
    for name in arguments:
        write_between(Path(name), "growth", table)


if __name__ == "__main__":
    main(sys.argv[1:])
