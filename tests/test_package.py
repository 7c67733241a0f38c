"""The package as a whole: quick to import, safe to load with, completely pinned."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "p0circuit").rglob("*.py"))
HEAVY = {"torch", "transformers", "transformer_lens", "matplotlib", "pandas"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_under_300_milliseconds() -> None:
    code = "import time; begin = time.perf_counter(); import p0circuit; print(time.perf_counter() - begin)"
    assert min(float(run(code)) for _ in range(5)) < 0.3


def test_help_takes_under_a_second() -> None:
    def seconds() -> float:
        """Processor time of the children so far: unlike the clock it does not count the machine's other work."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    taken = []
    for _ in range(3):
        begin = seconds()
        shown = run("import sys; sys.argv = ['p0circuit', '--help']; from p0circuit.cli import main; main()")
        taken.append(seconds() - begin)
    assert "reproduce" in shown
    assert 0.05 < min(taken) < 1.0


@pytest.mark.parametrize("module", ["p0circuit", "p0circuit.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    loaded = set(run(f"import sys, {module}; print(*sys.modules, sep='\\n')").split())
    assert module in loaded
    assert not HEAVY & loaded


def unsafe_calls(source: str) -> list[str]:
    """What in a piece of source would run code that came with somebody's weights."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in {"pickle", "dill", "joblib"}]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in {"pickle", "dill", "joblib"} else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in {"torch.load", "torch.save"} else []
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                found += [keyword.arg] if keyword.arg in {"trust_remote_code", "allow_pickle"} and not off else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "f(x, trust_remote_code=True)",
        "f(trust_remote_code=chosen)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(source: str) -> None:
    assert unsafe_calls(source)
    assert not unsafe_calls("f(x, trust_remote_code=False)")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_neither_read_pickles_nor_trust_remote_code(path: Path) -> None:
    assert not unsafe_calls(path.read_text())


def test_shipped_data_holds_no_pickles() -> None:
    suffixes = {path.suffix for path in (ROOT / "data").rglob("*") if path.is_file()}
    assert ".txt" in suffixes
    assert not suffixes & {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz"}


@pytest.mark.parametrize(
    ("file", "pins", "extras"),
    [
        ("constraints.txt", {"torch": "2.13.0", "transformer-lens": "3.9.0"}, ["notebooks", "ray", "docs", "dev"]),
        ("constraints-tl4.txt", {"torch": "2.13.0", "transformer-lens": "4.3.0"}, ["docs", "dev"]),
    ],
)
def test_constraints_pin_every_dependency_within_its_bounds(file: str, pins: dict[str, str], extras: list[str]) -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line) for line in pin_lines(file))
    pinned = {}
    for requirement in map(Requirement, pin_lines(file)):
        if requirement.marker is None or requirement.marker.evaluate():
            pinned[requirement.name] = Version(str(requirement.specifier).removeprefix("=="))
    assert {name: str(pinned[name]) for name in pins} == pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def pin_lines(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]


def test_uv_lock_pins_the_versions_of_the_constraints() -> None:
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    versions = {(package["name"], package["version"]) for package in locked if package["name"] != "p0circuit"}
    assert versions == {tuple(line.partition(" ;")[0].split("==")) for line in pin_lines("constraints.txt")}


def test_the_version_stands_in_one_place_and_is_cited() -> None:
    version = run("import p0circuit; print(p0circuit.__version__)").strip()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_readme_and_citation_cite_the_paper_alike() -> None:
    citation, readme = (ROOT / "CITATION.cff").read_text(), " ".join((ROOT / "README.md").read_text().split())
    titles = re.findall(r'^ +title: "(.+)"$', citation, re.MULTILINE)
    assert len(titles) == 1 and titles[0] in readme
    assert "arXiv:2603.06591" in citation and "2603.06591" in readme
