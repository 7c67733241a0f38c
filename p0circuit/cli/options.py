"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class First(str, Enum):
    """The token at position zero of natural text."""

    text = "text"
    bos = "bos"
    random = "random"


class Backend(str, Enum):
    """The TransformerLens class that holds the model."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


FIRST_TOKEN_DESCRIPTIONS = {
    First.text: "the text's own first token",
    First.bos: "BOS, before the text",
    First.random: "a random token",
}
MODEL_HELP = (
    "A name that 'p0circuit models' lists, a local Hugging Face directory, a GGUF file, or the id of a model on the "
    "Hugging Face hub."
)

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
BackendOption = Annotated[Backend, typer.Option(help="TransformerLens class that holds the model.")]
CheckpointOption = Annotated[str | None, typer.Option(help="Step, revision or label of a training checkpoint.")]
DeviceOption = Annotated[str | None, typer.Option(help="As in torch: cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or float64.")]
LayersOption = Annotated[
    int | None, typer.Option(min=1, help="Load only the first blocks, if the model is too large to load all.")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        help="For a model larger than one device: auto (GPUs, then CPU memory, then disk); cpu or disk, to offload "
        "the blocks there; or JSON, or a JSON file, with the device of each module."
    ),
]
OffloadOption = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Folder for weights offloaded to disk; they are removed at the end."),
]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="docs (Python's language reference), english, code, stdlib, or a text file or directory. Default: a text "
        "that suits the model; random tokens if it has no tokenizer."
    ),
]
FirstOption = Annotated[
    First, typer.Option(help="Token at position zero: the text's own first token, BOS, or a random token.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Number of prompts.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per prompt.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the prompts.")]
OutOption = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Directory for results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
