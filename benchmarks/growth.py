"""How time and memory of the fast forms grow with length, layers and patches.

Run it with `python -m benchmarks.growth`. Random weights of GPT-2 small's width, two rows. Memory is the
peak beyond the weights; one forward over the same rows stands beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.activation_patching import SHIFT
from benchmarks.memory import peak_mb
from benchmarks.models import gpt2_shape
from p0circuit.interventions.activation_patching import patch
from p0circuit.interventions.closed_form import key_edges
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import components
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.models import describe, forward
from p0circuit.prompts import random_tokens


@torch.no_grad()
def measure(layers: Sequence[int] = (6, 12), lengths: Sequence[int] = (64, 128)) -> list[dict[str, Any]]:
    """One line for each way, number of layers and length: patches or edges, seconds and MB."""
    lines = []
    for count in layers:
        model = gpt2_shape(count)
        info = describe(model)
        metric = sink_score_of([count // 2])
        for length in lengths:
            pair = shift_prompts(random_tokens(info.vocab_size, n=2, length=length), SHIFT, info.vocab_size)
            senders = components(model, [0, 1], heads=True)
            values = patch_values(model, pair, senders)

            def neurons(number: int, model: Any = model, pair: Any = pair, metric: Any = metric) -> Any:
                return lambda: patch(model, pair, metric, [f"neuron.0.{index}" for index in range(number)])

            ways: dict[str, tuple[int, Callable[[], Any]]] = {
                "forward": (0, lambda model=model, pair=pair: forward(model, pair.clean.ids)),
                "components": (
                    5 * count,
                    lambda model=model, pair=pair, metric=metric: patch(model, pair, metric, "components"),
                ),
                "64 neurons": (64, neurons(64)),
                "256 neurons": (256, neurons(256)),
                "closed form": (
                    len(senders) * (count - 2) * info.n_heads,
                    lambda model=model, pair=pair, some=senders, values=values: key_edges(
                        model, pair.clean, some, values
                    ),
                ),
            }
            for way, (patches, run) in ways.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                line = {"way": way, "layers": count, "length": length, "patches": patches, "seconds": seconds}
                lines.append(line | {"mb": peak_mb(run)})
    return lines


if __name__ == "__main__":
    for line in measure():
        print(json.dumps(line))
