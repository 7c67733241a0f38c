"""The face of the package: one script of a stranger runs as it stands, and every name in it has a type."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import p0circuit

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """\
import p0circuit as p0

model   = p0.load_model("p0-nano")
prompts = p0.natural_text(model, "english", n=8, length=24)
scores  = p0.record(model, prompts, p0.SINK_SCORE)
metric  = p0.sink_score_of(p0.sink_heads(scores))
with p0.ablate(model, prompts, ["mlp.0", "attn.1.3"], to="resample"):
    ablated = p0.record(model, prompts, p0.SINK_SCORE)
pair    = p0.shifted_pair(model, prompts, shift=8)
grid    = p0.patch(model, pair, metric, nodes="heads")
edges   = p0.path_patch(model, pair, metric, receivers=["attn.3.k", "mlp.1"])
graph   = edges.circuit(threshold=0.05)
grid.plot(); edges.plot(); graph.plot()
result  = p0.CausalPath().run(model, prompts)
print(result.judgement.verdict, result.metrics)
p0.reproduce("p0-nano", claims=["C1", "C7"], out="out")
"""


def run(script: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(script, "face.py", "exec"), names)
    return names


def test_the_script_runs_up_to_the_claims(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(SCRIPT.partition("result ")[0])
    scores, ablated = names["scores"], names["ablated"]
    assert scores.shape == ablated.shape == (8, 4, 4) and (scores - ablated).abs().max() > 0.01
    # Noising the later heads, and the edges from the first MLPs into the sink heads' keys, takes of the sink.
    grid, edges, graph = names["grid"], names["edges"], names["graph"]
    assert grid.effect.shape == (16, 8) and float(grid.relative_effect.mean(1).max()) > 0.05
    for effects in (grid, edges, graph):
        assert {"effect", "low", "high", "n"} <= {*effects.to_dataframe().columns}
        assert len(effects.interval()) == len(effects.effect) and effects.relative_effect.shape == effects.effect.shape
    assert edges.closed_form and {*graph.edges} <= {*edges.edges} and "attn.3" in graph.graph
    # As a library the package writes nothing.
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(SCRIPT)
    claims = json.loads((tmp_path / "out" / "p0-nano" / "claims.json").read_text())
    assert [entry["id"] for entry in claims] == ["C1", "C7"]
    # Nothing but what the script prints.
    output = capsys.readouterr()
    assert output.err == "" and output.out.startswith(f"{names['result'].judgement.verdict} {{")


def test_no_name_in_the_script_is_of_an_unknown_type(tmp_path: Path) -> None:
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    if pyright is None:
        pytest.skip("pyright is not installed here")
    assigned = [node.id for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.Name)]
    variables = sorted({name for name in assigned if name != "p0"})
    lines = SCRIPT + "".join(f"reveal_type({name})\n" for name in variables)
    (tmp_path / "face.py").write_text(lines)
    unknown = ("Variable", "Member", "Argument", "Parameter", "Lambda")
    config = {
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "standard",
        **{f"reportUnknown{kind}Type": "error" for kind in unknown},
        # The judgement of an experiment without a claim is None.
        "reportOptionalMemberAccess": "none",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [pyright, "--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert not [entry["message"] for entry in found if entry["severity"] == "error"]
    types = {entry["message"] for entry in found if entry["severity"] == "information"}
    assert len(types) == len(variables)
    assert not {text for text in types if "Any" in text or "Unknown" in text}


# the lists of names


def typed_names() -> dict[str, str]:
    """Names by the module they are imported from, as type checkers read them."""
    tree = ast.parse((ROOT / "p0circuit" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {
        alias.asname or alias.name: str(statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_editors_and_the_interpreter_find_the_same_names() -> None:
    assert len(p0circuit.__all__) == len(set(p0circuit.__all__))
    assert list(typed_names()) == p0circuit.__all__[1:]
    for name, module in typed_names().items():
        assert getattr(p0circuit, name) is getattr(sys.modules[module], name), name
    assert sorted(p0circuit.__all__) == dir(p0circuit)
    with pytest.raises(AttributeError, match="no attribute 'sink_scores'"):
        p0circuit.__getattr__("sink_scores")
