"""Results on disk: what is saved comes back, whole or not at all, and equal results make equal files."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from p0circuit import __version__
from p0circuit.figures.intervals import bars
from p0circuit.figures.lines import trajectories
from p0circuit.figures.maps import heat_maps
from p0circuit.figures.style import Series
from p0circuit.io import write_atomically, write_json
from p0circuit.results import Result, library_versions, write_manifest
from p0circuit.stats import Interval

ROOT = Path(__file__).resolve().parents[1]
HALF = Interval(0.5, 0.4, 0.6, 12)


def draw(name: str, value: float) -> Figure:
    if name == "map":
        return heat_maps({"text": np.full((3, 4), value)}, "scores", "sink score")
    if name == "bars":
        panel = {"with BOS": HALF, "without BOS": Interval(value, 0.0, value, 3)}
        return bars({"rate": panel}, "rates", ["share"])
    lines = [Series("P0", [1.0, 2.0, 4.0], [0.9, 1.8, 3.0], [1.1, 2.2, 5.0]), Series("others", [1.0, 1.0, 1.0])]
    return trajectories({"Norm": lines}, ["emb", "0", "1"], "norms", "after block", ["ratio"], log=True)


def example(value: float = 0.5, drawn: tuple[str, ...] = ("map",)) -> Result:
    table = pd.DataFrame({"layer": [0, 1, 2], "score": [value, 1 / 3, 1e-9], "name": ["a", "b, c", "ü"]})
    return Result(
        "example",
        "An example",
        {"rate": HALF, "other": Interval(value, 0.1, 0.9, 3)},
        {"layers": table, "more": table[:1]},
        {name: draw(name, value) for name in drawn},
        {"model": {"name": "tiny"}, "seconds": 1.5},
        ["something to know"],
    )


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def broken_figure() -> Figure:
    """A figure that fails when it is drawn, as one with a mistake in its mathematics does."""
    figure = Figure()
    figure.subplots().set_title("$\\frac{1}{$")
    return figure


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    result = example(drawn=("map", "bars"))
    path = result.save(tmp_path)
    assert path == tmp_path / "example.json"
    loaded = Result.load(path)
    for name in ("experiment", "title", "metrics", "provenance", "notes"):
        assert getattr(loaded, name) == getattr(result, name)
    assert loaded.tables.keys() == result.tables.keys()
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table, rtol=1e-5)
    assert loaded.figures == {name: tmp_path / "figures" / f"example-{name}.png" for name in result.figures}
    assert set(files(tmp_path)) == {
        "example.json",
        "tables/example-layers.csv",
        "tables/example-more.csv",
        *(f"figures/example-{name}.{end}" for name in ("map", "bars") for end in ("png", "svg")),
    }


def test_a_loaded_result_can_be_saved_elsewhere(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    Result.load(example().save(first)).save(second)
    assert files(second) == files(first)


def test_equal_results_make_equal_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        example(drawn=("map", "bars", "lines")).save(tmp_path / name)
        time.sleep(1.1 if name == "first" else 0)  # Dates in files are in seconds.
    assert files(tmp_path / "first") == files(tmp_path / "second")
    example(0.6, ("map", "lines")).save(tmp_path / "other")
    changed = {
        name for name, content in files(tmp_path / "other").items() if content != files(tmp_path / "first")[name]
    }
    assert changed >= {
        "example.json",
        "tables/example-layers.csv",
        "figures/example-map.png",
        "figures/example-map.svg",
    }
    assert "figures/example-lines.svg" not in changed


def test_text_in_an_svg_is_text(tmp_path: Path) -> None:
    example(drawn=("lines",)).save(tmp_path)
    svg = (tmp_path / "figures" / "example-lines.svg").read_text()
    assert "after block" in svg and "others" in svg


@pytest.mark.parametrize("earlier", [False, True])
def test_a_figure_that_fails_leaves_the_directory_as_it_was(tmp_path: Path, earlier: bool) -> None:
    if earlier:
        example(0.1).save(tmp_path)
    before = files(tmp_path)
    result = example()
    result.figures = {**result.figures, "broken": broken_figure()}
    with pytest.raises(ValueError, match="frac"):
        result.save(tmp_path)
    assert files(tmp_path) == before


def test_a_write_that_fails_leaves_no_summary_that_vouches_for_it(tmp_path: Path) -> None:
    example(0.1).save(tmp_path)
    shutil.rmtree(tmp_path / "tables")
    (tmp_path / "tables").touch()
    with pytest.raises(OSError, match="tables"):
        example().save(tmp_path)
    assert not (tmp_path / "example.json").exists()


def test_loading_what_is_not_there_names_what_is(tmp_path: Path) -> None:
    example().save(tmp_path)
    with pytest.raises(ValueError, match=r"no result at .*sink-map\.json'; this directory holds: example"):
        Result.load(tmp_path / "sink-map.json")
    (tmp_path / "figures" / "example-map.png").unlink()
    with pytest.raises(ValueError, match=r"example-map\.png, which is missing; run the experiment again"):
        Result.load(tmp_path / "example.json")


def test_the_manifest_says_where_the_numbers_come_from(tmp_path: Path) -> None:
    started = time.time() - 5
    path = write_manifest(tmp_path / "run", ["run", "sink-map"], started, model="tiny", seed=3)
    manifest = json.loads(path.read_text())
    assert path == tmp_path / "run" / "manifest.json"
    assert manifest["command"] == ["run", "sink-map"]
    assert (manifest["model"], manifest["seed"]) == ("tiny", 3)
    assert 5 <= manifest["seconds"] < 6
    assert abs(time.mktime(time.strptime(manifest["finished"], "%Y-%m-%dT%H:%M:%SZ")) - time.mktime(time.gmtime())) < 5
    assert manifest["platform"] == platform.platform()
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["versions"] == library_versions()
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["python"] == platform.python_version()
    assert {"transformer-lens", "transformers", "numpy"} <= manifest["versions"].keys()


def test_peak_memory_is_in_mebibytes_and_sees_what_was_freed() -> None:
    code = """
from p0circuit.results import peak_memory_mb
before = peak_memory_mb()
block = b"x" * 200 * 2**20
del block
print(before, peak_memory_mb())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    if "None" in done.stdout:
        pytest.skip("the system does not tell")
    before, after = map(float, done.stdout.split())
    assert 5 < before < 400
    assert before + 150 < after < before + 250


def test_a_version_is_the_package_s_own() -> None:
    assert library_versions().get("p0circuit", __version__) == __version__


# whole or not there


def fail(path: Path) -> Any:
    path.write_text("half")
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "file.json", {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert files(tmp_path) == {"deep/file.json": b'{\n  "a": 1\n}\n'}
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new.json", fail)
    assert set(files(tmp_path)) == {"deep/file.json"}


def test_a_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    def fill(name: str) -> Any:
        def write(path: Path) -> None:
            path.mkdir()
            (path / name).touch()

        return write

    def fail_inside(path: Path) -> None:
        fill("third")(path)
        raise OSError("disk full")

    write_atomically(tmp_path / "run", fill("first"))
    write_atomically(tmp_path / "run", fill("second"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "run", fail_inside)
    assert set(files(tmp_path)) == {"run/second"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
