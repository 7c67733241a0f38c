"""Traces of training runs as tables: what is shipped can be read, and what is not a trace is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from p0circuit.sink import least_excess
from p0circuit.training.runs import LENGTH, Run, as_trained, of_variant, save_run, seeds_in_common, shipped_runs
from p0circuit.training.variants import VARIANTS

STEPS = np.array([0, 10, 100, 1000])


def table(excess, **columns):
    values = {"step": STEPS, "tokens": STEPS * 1024, "loss": 4.0 - 0.001 * STEPS, "excess": excess}
    values |= {"norm_ratio": 2.0, "concentration_causal": np.nan, "induction_score": 0.1}
    return pd.DataFrame(values | columns)


def run_of(excess, variant="bos", seed=0, first="bos"):
    return Run(variant, seed, first, table(excess))


def test_formation_is_counted_in_tokens():
    run = run_of([0.0, 0.1, 0.3, 0.5])
    assert (run.name, run.formation, run.formation_share) == ("bos-0", 2, 0.1)
    # Half of the final value is not above half.
    assert run_of([0.0, 0.1, 0.25, 0.5]).formation == 3
    none = run_of([0.0, 0.1, 0.1, least_excess(LENGTH)])
    assert (none.formation, none.formation_share) == (None, 1.0)


def test_without_tokens_it_is_counted_in_steps():
    run = Run("mine", 0, "bos", table([0.0, 0.1, 0.3, 0.5], tokens=[0.0, np.nan, np.nan, np.nan]))
    assert run.share.tolist() == (STEPS / 1000).tolist() and run.formation_share == 0.1


def test_a_trace_is_put_into_the_table_of_its_run(tmp_path):
    path = tmp_path / "runs" / "mine-3.csv"
    text, bos = (table(np.full(4, score)).assign(first=first) for score, first in ((0.01, "text"), (0.5, "bos")))
    for lines in (text, bos, text.assign(excess=0.02)):
        assert save_run(path, lines) == path
    runs = {run.first: run for run in shipped_runs(tmp_path / "runs")}
    assert runs["bos"].name == "mine-3" and runs["bos"]["excess"].tolist() == [0.5] * 4
    assert runs["text"]["excess"].tolist() == [0.02] * 4
    for wrong in ("mine.csv", "mine-3.json"):
        with pytest.raises(ValueError, match="not named"):
            save_run(tmp_path / wrong, bos)


def test_runs_are_seen_as_they_were_trained(tmp_path):
    both = pd.concat([table(np.ones(4)).assign(first="text"), table(np.ones(4)).assign(first="bos")])
    for name in ("bos-0", "baseline-1", "mine-2"):
        both.to_csv(tmp_path / f"{name}.csv", index=False)
    runs = shipped_runs(tmp_path)
    assert len(runs) == 6
    chosen = {run.name: run.first for run in as_trained(runs)}
    assert chosen == {"bos-0": "bos", "baseline-1": "text", "mine-2": "bos"}


def test_seeds_are_paired():
    many = [run_of(np.ones(4), variant, seed) for variant, seed in (("a", 2), ("a", 0), ("b", 2), ("b", 1), ("a", 1))]
    assert [run.seed for run in of_variant(many, "a")] == [0, 1, 2]
    pairs = seeds_in_common(of_variant(many, "a"), of_variant(many, "b"))
    assert [(one.name, other.name) for one, other in pairs] == [("a-1", "b-1"), ("a-2", "b-2")]


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no traces in"):
        shipped_runs(tmp_path)
    table(np.ones(4)).drop(columns="loss").to_csv(tmp_path / "bos-0.csv", index=False)
    with pytest.raises(ValueError, match="lacks first, loss"):
        shipped_runs(tmp_path)
    (tmp_path / "bos-0.csv").unlink()
    table(np.ones(4)).assign(first="bos").to_csv(tmp_path / "bos.csv", index=False)
    with pytest.raises(ValueError, match="not named"):
        shipped_runs(tmp_path)


def test_the_shipped_traces_are_whole():
    runs = shipped_runs()
    assert {"bos", "tnlm", "force-sink"} <= {run.variant for run in runs} & set(VARIANTS)
    for run in runs:
        assert (np.diff(run["step"]) > 0).all() and run["step"][0] == 0
        assert run["excess"][0] < least_excess(LENGTH), "untrained, and with a sink"
        assert run["loss"][-1] < run["loss"][0] - 2
