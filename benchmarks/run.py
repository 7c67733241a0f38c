"""All benchmarks on one model, what must hold of their numbers, and the table of the documentation made from them.

`p0circuit bench --json` prints what `measure` gives; `p0circuit bench --into docs/performance.md` writes the table into
a file, between two marks, and the numbers beside it (`docs/performance.json`). Nobody copies a number by hand.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import activation_patching, closed_form, path_patching, transformer_lens4, vocabulary
from benchmarks.models import SHAPES
from benchmarks.tables import write_between
from p0circuit.interventions.pairs import shift_prompts
from p0circuit.models import describe
from p0circuit.prompts import random_tokens

ABSOLUTE, RELATIVE = 1e-5, 1e-4
"""The largest difference between two ways of computing the same in float32."""


class Size(NamedTuple):
    """How much is measured.

    Rows, tokens in each, edges timed the usual way, tokens of the vocabulary (None: all), and whether memory is.
    """

    rows: int = 2
    length: int = 64
    edges: int = 12
    tokens: int | None = None
    memory: bool = True


FULL = Size()


def measure(model: Any, size: Size = FULL, say: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Every benchmark on a hooked model: a flat dictionary of figures.

    Raises:
        ValueError: two ways of computing the same do not agree.
    """
    info = describe(model)
    figures: dict[str, Any] = {
        "layers": info.n_layers,
        "heads": info.n_heads,
        "rows": size.rows,
        "length": size.length,
        "device": str(model.cfg.device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    prompts = random_tokens(info.vocab_size, n=size.rows, length=size.length)
    pair = shift_prompts(prompts, path_patching.SHIFT, info.vocab_size)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "edges into K at P0": lambda: closed_form.measure(model, size.rows, size.length, size.edges),
        "activation-patching grid": lambda: activation_patching.measure(model, size.rows, size.length, size.memory),
        "vocabulary sweep": lambda: vocabulary.measure(model, size.tokens, size.length),
        "path patching": lambda: path_patching.general(model, prompts, pair, size.edges),
        "edge search": lambda: path_patching.search(model, prompts, pair, size.edges),
    }
    for name, part in parts.items():
        say(f"measuring: {name}")
        figures |= part()
    check(figures)
    return figures


def measure_all(
    names: Sequence[str],
    load: Callable[[str], Any],
    size: Size = FULL,
    say: Callable[[str], None] = print,
    done: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """The benchmarks on models and shapes by name, and beside TransformerLens 4 where that is installed.

    `done` gets what has been measured so far, after each of them.
    """
    found: dict[str, Any] = {}
    for name in names:
        say(f"benchmarks on {name}")
        found[name] = measure(SHAPES[name]() if name in SHAPES else load(name), size, say)
        done(found)
    python = transformer_lens4.interpreter()
    if python is not None:
        say("measuring: direct path patching of TransformerLens 4")
        command = [str(python), "-m", "benchmarks.transformer_lens4"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        found["TransformerLens 4, gpt2-shape"] = json.loads(run.stdout[run.stdout.index("{") :])
        check(found["TransformerLens 4, gpt2-shape"])
        done(found)
    return found


def check(figures: Mapping[str, Any]) -> None:
    """Make sure that both ways of every comparison gave the same numbers.

    Raises:
        ValueError: they did not; no ratio of this run means anything.
    """
    for name, value in figures.items():
        if (name.endswith("_max_abs_diff") and not value <= ABSOLUTE) or (
            name.endswith("_relative_difference") and not value <= RELATIVE
        ):
            raise ValueError(f"{name} is {value:.2g}: the two ways of computing the same do not agree")


# What is compared; what a ratio is called; its name; the difference of the results.
_LINES: tuple[tuple[str, str, str, str], ...] = (
    ("{edges:,} edges into K at P0: closed form, over a loop of hooked passes", "{:,.0f} times faster",
     "closed_form_speedup", "closed_form_max_abs_diff"),
    ("{grid_cells}-cell activation-patching grid, over TransformerLens's `generic_activation_patch`",
     "{:.1f} times faster", "grid_speedup", "grid_max_abs_diff"),
    ("vocabulary sweep of {vocab_sweep_tokens:,} tokens, over its bare matrix products", "{:.2f} times their time",
     "vocab_sweep_over_matmul", "vocab_sweep_relative_difference"),
    ("the same, over full prompts of {length} tokens", "{:.0f} times faster",
     "vocab_sweep_speedup_over_full_prompts", ""),
    ("{path_sink_edges} edges into Q, V and MLPs, sink metric: `patch_edges`, over one edge at a time",
     "{:.1f} times faster", "path_sink_speedup", "path_sink_max_abs_diff"),
    ("{path_loss_edges} edges into Q, V and MLPs, loss: `patch_edges`, over one edge at a time", "{:.1f} times faster",
     "path_loss_speedup", "path_loss_max_abs_diff"),
    ("`search_edges` among {search_edges:,} edges ({search_found} reach 5 %; {search_beyond_the_budget} weaker "
     "estimates beyond the budget), over one edge at a time", "{:,.0f} times faster",
     "search_speedup", "search_max_abs_diff"),
    ("the same in passes ({search_passes:.0f}), over one pass per edge", "{:,.0f} times fewer", "search_fewer_passes",
     ""),
    ("{direct_path_edges} edges into Q, K and V of heads: `patch_edges`, over TransformerLens {transformer_lens}'s "
     "`get_act_patch_direct_path`", "{:.1f} times faster", "direct_path_speedup", "direct_path_max_abs_diff"),
)  # fmt: skip


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the documentation: a line for every comparison on every model."""
    lines = ["| model | what, over what | ratio | largest difference |", "| --- | --- | --- | --- |"]
    for model, figures in results.items():
        for what, ratio, name, difference in _LINES:
            if name in figures:
                largest = f"{figures[difference]:.0e}" if difference in figures else ""
                lines.append(f"| {model} | {what.format(**figures)} | {ratio.format(figures[name])} | {largest} |")
    about = next(iter(results.values()))
    lines += [
        "",
        f"One run of `p0circuit bench`: {about['rows']} rows of {about['length']} tokens, {about['threads']} thread(s) "
        f"on {about['device']}. Loops are timed on a few edges drawn at random and multiplied up; results are compared "
        "on these.",
    ]
    return "\n".join(lines)


def write_into(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table between the marks `bench` of a file, and its numbers into a JSON file of the same name beside it.

    Raises:
        ValueError: the file lacks the marks.
    """
    write_between(path, "bench", markdown(results))
    path.with_suffix(".json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
