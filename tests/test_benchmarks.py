"""Every benchmark in a tiny configuration: both ways give the same numbers, and the documentation shows them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import growth, monitor, run, transformer_lens4
from benchmarks.models import tiny_shape
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.training.config import TrainConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
TINY = run.Size(rows=2, length=16, edges=6, memory=False)


@pytest.fixture(scope="module")
def figures():
    if not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    return run.measure(tiny_shape(), TINY)


def test_both_ways_of_every_comparison_give_the_same_numbers(figures):
    compared = [name for name in figures if name.endswith(("_max_abs_diff", "_relative_difference"))]
    assert len(compared) == 6
    assert all(figures[name] <= 1e-5 for name in compared)
    for name in ("closed_form", "grid", "path_sink", "path_loss"):
        assert figures[f"{name}_largest_effect"] > 1e-3, "nothing moved, so that any two ways would agree"
    assert figures["search_found"] >= 1 and figures["search_edges"] == 322
    assert all(figures[name] > 0 for name in figures if name.endswith("_speedup"))


def test_numbers_that_do_not_agree_are_refused(figures):
    with pytest.raises(ValueError, match=r"grid_max_abs_diff is 0\.2"):
        run.check(figures | {"grid_max_abs_diff": 0.2})
    with pytest.raises(ValueError, match="do not agree"):
        run.check(figures | {"search_max_abs_diff": float("nan")})


def test_the_table_has_a_line_for_every_comparison_and_goes_between_its_marks(figures, tmp_path):
    table = run.markdown({"tiny-shape": figures})
    assert table.count("| tiny-shape |") == 8
    assert f"{figures['grid_speedup']:.1f} times faster" in table
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run.write_into(page, {"tiny-shape": figures})
    assert page.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    assert json.loads((tmp_path / "page.json").read_text())["tiny-shape"]["grid_cells"] == figures["grid_cells"]
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        run.write_into(page, {"tiny-shape": figures})


def test_the_documentation_shows_what_was_measured_and_nothing_else():
    results = json.loads(DOCUMENT.with_suffix(".json").read_text())
    text = DOCUMENT.read_text()
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == run.markdown(results)
    for figures in results.values():
        run.check(figures)
        if "search_edges" in figures:
            assert figures["search_fewer_passes"] >= 20 and figures["search_speedup"] >= 20
    assert "gpt2-shape" in results


def test_direct_path_patching_of_transformer_lens_4_gives_the_same_numbers():
    python = transformer_lens4.interpreter()
    if python is None:
        pytest.skip("TransformerLens 4 is not installed beside this one: make .venv-tl4/.dev")
    command = [str(python), "-m", "benchmarks.transformer_lens4", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DOCUMENT.parents[1])
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["direct_path_edges"] == 24
    assert figures["direct_path_max_abs_diff"] <= 1e-6 < figures["direct_path_largest_effect"]


def test_the_monitor_is_timed_in_turns_with_training_steps():
    config = replace(TrainConfig(), n_layers=2, d_model=32, n_heads=2, d_mlp=48, vocab_size=97, length=64)
    overhead, step, reading = monitor.compare(config, rounds=1)
    assert overhead == pytest.approx(reading / (monitor.EVERY * step)) and step > 0 and reading > 0


def test_growth_is_measured_with_each_dimension_doubled_and_goes_into_the_page(tmp_path, monkeypatch):
    base = growth.Shape(layers=3, heads=2, length=16, vocab_size=32)
    results = growth.measure(base, neurons=4)
    assert list(results) == ["base", "layers", "heads", "tokens in a row", "vocabulary"]
    numbers = {what: [int(line["number"]) for line in lines.values()] for what, lines in results.items()}
    assert numbers["base"] == [1, 15, 4, 14, 32] and numbers["layers"] == [1, 30, 4, 56, 32]
    assert numbers["vocabulary"][-1] == 64
    memory = {what: lines["one forward"]["mb"] for what, lines in results.items()}
    assert memory["tokens in a row"] > 1.2 * memory["base"] and memory["layers"] < 1.1 * memory["base"]
    page = tmp_path / "page.md"
    page.write_text("<!-- growth: begin -->\n<!-- growth: end -->\n")
    monkeypatch.setattr(growth, "measure", lambda: results)
    growth.main([str(page)])
    assert f"\n{growth.markdown(results)}\n" in page.read_text()
