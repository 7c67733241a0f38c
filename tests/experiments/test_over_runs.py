"""The claims about training, on made-up runs whose truth is known, and on the shipped traces."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from p0circuit.experiments import (
    RUN_EXPERIMENTS,
    Concentration,
    Convergence,
    Early,
    Methods,
    find_experiment,
    over_runs,
)
from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.training.c14_concentration import permuted_trend, spearman
from p0circuit.experiments.training.c15_convergence import held_out_errors, lead_and_lag
from p0circuit.results import Result
from p0circuit.stats import over_seeds
from p0circuit.training.runs import Run, as_trained, shipped_runs

STEPS = np.array([0, *np.geomspace(16, 9000, 15).round()])


def made_up(variant, seed, at=0.1, final=0.5, causal=None, loss=0.0, ratio=0.0):
    """A run whose sink forms at a share of its tokens; `loss` and `ratio` move its curves."""
    share = STEPS / STEPS[-1]
    excess = np.where(share >= at, final, 0.01)
    count = len(STEPS)
    table = pd.DataFrame(
        {
            "step": STEPS,
            "tokens": STEPS * 1024,
            "loss": 2 + 5 * np.exp(-STEPS / 500) + loss,
            "sink_rate": np.where(share >= at, 0.3, 0.0),
            "sink_rate_from_layer_2": np.where(share >= at, 0.4, 0.0),
            "norm_ratio": np.exp(0.2 * share + ratio),
            "largest_norm_ratio": np.exp(0.5 * share) + 1,
            "concentration_observed": np.linspace(0.2, 0.9, count),
            "concentration_causal": np.where(
                share >= at, np.linspace(0.2, 0.9, count) if causal is None else causal, np.nan
            ),
            "induction_score": np.where(share >= 0.3, 0.6, 0.02),
            "excess": excess,
        }
    )
    return Run(variant, seed, "bos", table)


def verdict(experiment, runs, reference="bos"):
    return experiment.run(runs, reference).judgement.verdict


def test_early_is_judged_by_the_latest_seed():
    runs = [made_up("bos", seed, at) for seed, at in enumerate((0.02, 0.05, 0.15))]
    result = Early().run(runs)
    # The checkpoint at or after 0.15 of 9,000 steps; the half of it that the excess has to pass comes with it.
    first = STEPS[np.argmax(STEPS / 9000 >= 0.15)] / 9000
    assert result.metrics["latest_formation_share"].value == pytest.approx(first)
    assert result.judgement.verdict == "reproduced"
    assert verdict(Early(), [*runs, made_up("bos", 3, 0.5)]) == "not reproduced"
    assert verdict(Early(), [*runs, made_up("bos", 3, final=0.02)]) == "not reproduced", "one without a sink"
    with pytest.raises(NotApplicable, match="0 of 0 runs of 'baseline'"):
        Early().run(runs, "baseline")


def test_concentration_needs_a_trend_and_a_high_end():
    runs = [made_up("bos", seed, 0.05) for seed in range(3)]
    result = Concentration().run(runs)
    assert result.metrics["causal_spearman"].value == pytest.approx(1)
    assert result.metrics["causal_final"].value == pytest.approx(0.9)
    assert result.judgement.verdict == "reproduced"
    assert verdict(Concentration(), [made_up("bos", seed, 0.05, causal=0.9) for seed in range(3)]) == "not reproduced"
    low = [made_up("bos", seed, 0.05, causal=np.linspace(0.1, 0.5, len(STEPS))) for seed in range(3)]
    assert verdict(Concentration(), low) == "not reproduced"
    assert set(result.tables["stages"]["run"]) == {"bos-0", "bos-1", "bos-2"}


def test_the_trend_is_spearmans_and_its_p_counts_all_orders():
    rng = np.random.default_rng(0)
    series = [rng.random(4), rng.random(3)]
    for values in (*series, np.array([1.0, 1.0, 2.0, 0.0])):
        assert spearman(values) == pytest.approx(stats.spearmanr(np.arange(len(values)), values)[0])
    assert spearman(np.ones(4)) == 0
    observed, p = permuted_trend(series)
    orders = itertools.product(itertools.permutations(series[0]), itertools.permutations(series[1]))
    means = [np.mean([stats.spearmanr(np.arange(len(part)), part)[0] for part in order]) for order in orders]
    assert observed == pytest.approx(np.mean([spearman(values) for values in series]))
    assert p == pytest.approx(np.mean(np.array(means) >= observed - 1e-9))
    # Too many orders to count: drawn ones agree with the exact answer for a single long series.
    long = np.array([1.0, 0, 2, 3, 5, 4, 7, 6, 8.0])
    assert permuted_trend([long])[1] == pytest.approx(
        stats.spearmanr(np.arange(9), long, alternative="greater")[1], abs=2e-3
    )


def test_the_circuit_tells_more_than_the_step_only_where_it_does():
    rng = np.random.default_rng(1)

    def runs(tells):
        for variant, seed in itertools.product(("bos", "tnlm"), range(3)):
            moved = rng.normal(0, 0.2, len(STEPS))
            noise = rng.normal(0, 0.2, len(STEPS))
            moved[-1] = noise[-1] = 0
            yield made_up(variant, seed, 0.05, ratio=moved, loss=moved if tells else noise)

    told, silent = Convergence().run(list(runs(True))), Convergence().run(list(runs(False)))
    assert told.judgement.verdict == "reproduced" and told.metrics["error_step_and_circuit"].value < 1e-6
    assert told.metrics["error_difference_shuffled"].low > told.metrics["error_difference"].high
    assert silent.judgement.verdict == "not reproduced"
    with pytest.raises(NotApplicable, match="this needs 3"):
        Convergence().run([made_up("bos", seed, 0.05) for seed in range(2)])


def test_it_is_judged_over_seeds_and_on_what_is_known_at_the_time():
    rng = np.random.default_rng(3)
    runs = []
    for seed in range(3):
        moved = rng.normal(0, 0.2, len(STEPS)) * (STEPS < 9000)
        for variant in ("bos", "tnlm"):
            noise = rng.normal(0, 0.05, len(STEPS))
            runs.append(made_up(variant, seed, 0.05, ratio=moved, loss=moved + noise))
    result = Convergence().run(runs)
    table = result.tables["held-out"]
    by_run = (table["step_and_circuit"] - table["step_alone"]).groupby(table["run"]).mean()
    expected = over_seeds(by_run.groupby(by_run.index.str[-1]).mean().to_numpy())
    found = result.metrics["error_difference"]
    assert (found.low, found.high, found.n) == pytest.approx((expected.low, expected.high, 3))
    assert result.metrics["error_difference_over_runs"].n == 6
    # The excess score is that of the heads that are sinks at the end, which nobody knows before.
    late = np.where(STEPS > 100, 0.5, 0.02)
    others = [replace(run, table=run.table.assign(excess=late)) for run in runs]
    assert Convergence().run(others).metrics == result.metrics


def test_runs_measured_at_other_steps_are_named():
    runs = [made_up(variant, seed, 0.05) for variant in ("bos", "tnlm") for seed in range(3)]
    runs[-1] = replace(runs[-1], table=runs[-1].table[1:].reset_index(drop=True))
    with pytest.raises(NotApplicable, match=r"bos-0, bos-1, bos-2, tnlm-0, tnlm-1: 0, 16, .*; tnlm-2: 16, "):
        Convergence().run(runs)


def test_a_run_without_tokens_is_judged_by_its_steps():
    runs = [made_up("bos", seed, at) for seed, at in enumerate((0.02, 0.05, 0.15))]
    without = [replace(run, table=run.table.assign(tokens=np.nan)) for run in runs]
    assert Early().run(without).metrics == Early().run(runs).metrics


def test_the_correlation_is_within_seeds_and_its_interval_over_them():
    rng = np.random.default_rng(5)
    runs = []
    for seed in range(3):
        for variant in ("bos", "tnlm"):
            moved = rng.normal(0, 0.1, len(STEPS)) * (STEPS < 9000)
            run = made_up(variant, seed, 0.05, loss=moved)
            runs.append(replace(run, table=run.table.assign(sink_rate_from_layer_2=0.4 - 0.5 * moved)))
    found = Convergence().run(runs).metrics["partial_correlation"]
    assert found.n == 3 and found.high < -0.9


def test_an_induction_head_is_more_than_chance():
    runs = [made_up("bos", seed, 0.05) for seed in range(2)]
    for run in runs:
        run.table["induction_score"] = 0.02
    table = Early().run(runs).tables["formation"]
    assert (table["induction_share"] == 1).all()


def test_a_held_out_seed_is_predicted_from_the_others_alone():
    runs = [made_up("bos", seed, 0.05, loss=0.1 * seed * (STEPS < 9000)) for seed in range(3)]
    table = held_out_errors(runs).groupby("run")["step_alone"].mean()
    # Remaining losses are 0, 0.1 and 0.2 above the common curve: each is off by its distance to the others' mean.
    assert table.to_dict() == pytest.approx({"bos-0": 0.15, "bos-1": 0.0, "bos-2": 0.15}, abs=1e-12)


def test_lead_and_lag_find_what_comes_first():
    rng = np.random.default_rng(2)
    circuit = rng.normal(size=(6, 12))
    later = np.concatenate([rng.normal(size=(6, 2)), circuit[:, :-2]], axis=1)
    table = lead_and_lag(circuit, later).set_index("lag")["correlation"]
    assert table[2] == pytest.approx(1) and table.drop(2).abs().max() < 0.5


def test_methods_are_compared_by_pairs_of_seeds():
    baseline = [made_up("bos", seed, 0.3, 0.4 + 0.01 * seed) for seed in range(3)]
    better = [made_up(name, seed, 0.05, 0.6 + 0.01 * seed) for name in ("tnlm", "force-sink") for seed in range(3)]
    result = Methods().run([*baseline, *better])
    assert result.judgement.verdict == "reproduced"
    assert result.metrics["tnlm_excess_difference"].value == pytest.approx(0.2)
    # Equal seeds, equal differences: the spread of the seeds themselves is no part of the interval.
    assert result.metrics["tnlm_excess_difference"].low == pytest.approx(0.2)
    same = [made_up("tnlm", seed, 0.3, 0.4 + 0.01 * seed) for seed in range(3)]
    assert verdict(Methods(), [*baseline, *same, *better[3:]]) == "not reproduced"
    with pytest.raises(NotApplicable, match="0 seeds in common"):
        Methods().run(baseline)
    plain = [replace(run, variant="baseline", first="text") for run in baseline]
    with pytest.raises(NotApplicable, match=r"tnlm-0 begin with bos and those of baseline-0 with text.*the method"):
        Methods().run([*plain, *better], "baseline")


def test_the_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.2]
    interval = over_seeds(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high, interval.n) == pytest.approx((expected.low, expected.high, 3))
    with pytest.raises(ValueError, match="at least two runs"):
        over_seeds([1.0])


def test_experiments_over_runs_are_found_by_name_and_told_apart():
    assert isinstance(over_runs("c13"), Early) and isinstance(over_runs("methods"), Methods) and over_runs("C1") is None
    with pytest.raises(ValueError, match="about training runs"):
        find_experiment("C15")


@pytest.mark.parametrize("name", list(RUN_EXPERIMENTS))
def test_on_the_shipped_traces_each_has_a_verdict_and_is_kept(name, tmp_path):
    runs = as_trained(shipped_runs())
    result = RUN_EXPERIMENTS[name]().run(runs)
    assert result.judgement.verdict in ("reproduced", "not reproduced")
    assert Result.load(result.save(tmp_path)).metrics == result.metrics
