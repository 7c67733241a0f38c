"""`make bench`: the measured ratios, printed, and held against what the README promises of them."""

from __future__ import annotations

import json

from tests.benchmarks import bench_activation_patching, bench_closed_form, bench_monitor, bench_vocabulary
from tests.benchmarks.bench_activation_patching import gpt2_small_shape


def test_benchmarks():
    model = gpt2_small_shape()
    figures = bench_closed_form.measure(model) | bench_activation_patching.measure(model)
    figures |= bench_vocabulary.measure(model)
    figures |= bench_monitor.measure()
    print(json.dumps(figures, indent=2))
    assert figures["closed_form_speedup"] >= 100
    assert figures["closed_form_max_abs_diff"] <= 1e-5
    assert figures["grid_speedup"] >= 5
    assert figures["grid_max_abs_diff"] <= 1e-5
    assert figures["vocab_sweep_over_matmul"] <= 1.3
    assert figures["vocab_sweep_extra_mb"] <= 2000
    assert figures["monitor_overhead_larger"] < figures["monitor_overhead"] <= 0.02
    assert all(row["ratio"] <= 1.5 for row in figures["grid_memory"])
