"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class First(str, Enum):
    """What stands at position zero of natural text."""

    text = "text"
    bos = "bos"
    random = "random"


class Backend(str, Enum):
    """Which TransformerLens class holds the model."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


FIRST_IN_WORDS = {
    First.text: "the text's own first token",
    First.bos: "BOS, before the text",
    First.random: "a random token",
}


MODEL_HELP = (
    "A name that 'p0circuit models' lists, a local Hugging Face directory, a GGUF file, a hub id, or 'wired', whose "
    "weights are constructed."
)


ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]


BackendOption = Annotated[Backend, typer.Option(help="Which TransformerLens class holds the model.")]


CheckpointOption = Annotated[str | None, typer.Option(help="A step, revision or label of the training trace.")]


DeviceOption = Annotated[str | None, typer.Option(help="As in torch: cpu, cuda, cuda:1, mps.")]


DtypeOption = Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or float64.")]


LayersOption = Annotated[int | None, typer.Option(min=1, help="Load the first blocks alone, for what is too large.")]


DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        help="For what is larger than one device: auto (GPUs, then CPU memory, then disk); cpu or disk, where its "
        "blocks wait; or JSON, or a file of it, with the place of each module."
    ),
]


OffloadOption = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Where weights that wait on disk are written, if they must be; removed again."),
]


TextOption = Annotated[
    str | None,
    typer.Option(
        help="docs (Python's language reference), english, code, stdlib, or a text file or directory. Chosen by the "
        "model if not given; random tokens if it has no tokenizer."
    ),
]


FirstOption = Annotated[
    First, typer.Option(help="What stands at position zero: the text's own first token, BOS, or a random token.")
]


SamplesOption = Annotated[int, typer.Option(min=1, help="Number of prompts.")]


LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per prompt.")]


SeedOption = Annotated[int, typer.Option(help="Seed of the prompts.")]


OutOption = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Where the results go.")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
