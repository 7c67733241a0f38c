"""The reproduction of a model: resumed where it was, not stopped by what breaks off, controls in every entry."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from p0circuit.experiments import BosAblation, KeySide, NormDirection, SinkMap, SinkMapConfig
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import pooled_prompts_for
from p0circuit.models import load_model
from p0circuit.models.gguf_writer import write_gguf
from p0circuit.prompts import pool, random_tokens
from p0circuit.report.contents import find_reproductions
from p0circuit.report.html import write_report
from p0circuit.reproduction import (
    failed_claims,
    quick_samples,
    reproduce_model,
    reproduce_training,
    result_key,
    run_or_read,
)
from p0circuit.results import Result
from p0circuit.stats import Interval
from p0circuit.training.runs import as_trained, shipped_runs

CLAIM = Claim("C99", "Broken", "nowhere", "It breaks.", "By breaking.", (Criterion("x", ">", 0),), "None.")


@dataclass(frozen=True)
class Times:
    """How often it has been measured, on which model."""

    seen: list[str]


@dataclass(frozen=True)
class NoSettings:
    """The configuration of an experiment that has nothing to configure."""


class Breaks(Experiment[NoSettings]):
    """An experiment whose arithmetic fails."""

    id, title, claim, config_type = "breaks", "Breaks", CLAIM, NoSettings

    def passes(self, model, prompts):
        return 0.0

    def measure(self, model, prompts):
        raise RuntimeError("a matrix is singular")


class Counts(Experiment[Times]):
    """An experiment that tells how often it ran, and that a decoy is nothing for it."""

    id, title, claim = "counts", "Counts", CLAIM

    def passes(self, model, prompts):
        return 0.0

    def measure(self, model, prompts):
        self.config.seen.append(model.cfg.model_name)
        if "decoy" in model.cfg.model_name:
            raise NotApplicable("a decoy")
        return Result(self.id, self.title, {"x": Interval(1.0, 0.5, 1.5, prompts.n)}, {})


@pytest.fixture(scope="module")
def wired():
    model = load_model("wired")
    return model, random_tokens(model.cfg.d_vocab, n=12, length=16)


def test_entries_controls_and_files(wired, tmp_path):
    model, prompts = wired
    entries = reproduce_model(model, prompts, tmp_path, [SinkMap(), NormDirection(), BosAblation()])
    assert [entry["id"] for entry in entries] == ["C1", "C2"]
    assert json.loads((tmp_path / "claims.json").read_text()) == entries
    sink, bos = entries
    assert sink["verdict"] == "reproduced" and sink["experiment"] == "sink-map" and sink["model"] == "wired"
    # The circuit is gone with the weights, and with the neurons' places; the decoy never had a sink.
    assert {control["control"]: control["verdict"] for control in sink["controls"]} == dict.fromkeys(
        ("untrained", "shuffled neurons", "decoy"), "not reproduced"
    )
    assert bos["verdict"] == "not applicable" and "no BOS token" in bos["why"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["experiments"] == ["sink-map", "norm-direction"] and list(manifest["left_out"]) == ["bos-ablation"]
    assert (tmp_path / "controls" / "untrained" / "sink-map.json").is_file()
    assert failed_claims(entries) == []


def test_claims_are_tested_in_the_condition_of_the_sink(tmp_path):
    names = {"p0-nano": "without BOS", "bos-0": "with BOS"}
    for name, condition in names.items():
        model = load_model(name)
        prompts = pooled_prompts_for(model, None, 24, 40)
        entries = reproduce_model(
            model, prompts, tmp_path / name, [SinkMap(), BosAblation(), KeySide()], controls=False
        )
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["condition"]["name"] == condition and manifest["text"] == "stdlib"
        assert f"{name} has its sink in" in manifest["condition"]["summary"]
        # Without the choice there is no sink to explain in bos-0.
        assert entries[2]["verdict"] != "not applicable", entries[2]["why"]
        kept = Result.load(tmp_path / name / "key-side.json").provenance["prompts"]
        assert kept.get("behind") == (0 if condition == "with BOS" else None)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "text as it is</td>" in page and "text after BOS</td>" in page and "24 of stdlib</td>" in page


def test_rows_that_lost_another_token_to_bos_are_another_run():
    model = load_model("bos-0")
    text = random_tokens(64, n=4, length=12)
    changed = replace(text, ids=torch.cat([text.ids[:, :-1], text.ids[:, -1:] + 1], dim=1))
    after, other = text.prepend(0), changed.prepend(0)
    assert after.fingerprint() == other.fingerprint()
    keys = {result_key(BosAblation(), model, prompts) for prompts in (after, other)}
    assert len(keys) == 2


@pytest.mark.parametrize(("parameters", "samples"), [(900_000, 128), (20_000_000, 128), (20_000_001, 32)])
def test_the_size_of_a_model_decides_the_prompts_of_a_quick_run(parameters, samples):
    assert quick_samples(parameters) == samples


def test_a_claim_that_breaks_off_loses_none_of_the_others(wired, tmp_path):
    model, prompts = wired
    entries = reproduce_model(model, prompts, tmp_path, [Breaks(), SinkMap()])
    assert entries[0]["verdict"] == "not applicable" and "a matrix is singular" in entries[0]["why"]
    assert entries[0]["error"] == "RuntimeError: a matrix is singular"
    trace = (tmp_path / "breaks.traceback.txt").read_text()
    assert trace.startswith("Traceback") and trace.endswith("RuntimeError: a matrix is singular\n")
    assert entries[1]["verdict"] == "reproduced" and failed_claims(entries) == ["C99"]
    assert json.loads((tmp_path / "manifest.json").read_text())["broken"] == {
        "breaks": "RuntimeError: a matrix is singular"
    }


def test_a_claim_about_training_that_breaks_off_loses_none_of_the_others(tmp_path):
    runs = [run for run in as_trained(shipped_runs()) if run.variant in ("bos", "tnlm", "force-sink")]
    runs = [replace(run, table=run.table.drop(columns="largest_norm_ratio")) for run in runs]
    (tmp_path / "methods.json").write_text("of an earlier run")
    entries = reproduce_training(runs, tmp_path)
    assert [entry["id"] for entry in entries] == ["C13", "C14", "C15", "C16"] and failed_claims(entries) == ["C16"]
    assert all(entry["error"] is None and entry["measured"] for entry in entries[:3])
    assert entries[3]["error"] == "KeyError: 'largest_norm_ratio'" and entries[3]["verdict"] == "not applicable"
    assert json.loads((tmp_path / "claims.json").read_text()) == entries
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["experiments"] == ["early", "concentration", "convergence"] and not manifest["left_out"]
    assert manifest["broken"] == {"methods": "KeyError: 'largest_norm_ratio'"}
    assert not (tmp_path / "methods.json").exists() and (tmp_path / "early.json").is_file()


def test_what_is_there_is_not_measured_again(wired, tmp_path):
    model, prompts = wired
    seen: list[str] = []
    first = reproduce_model(model, prompts, tmp_path, [Counts(Times(seen))])
    # The model, itself untrained, itself shuffled, the decoy.
    assert len(seen) == 4
    seen.clear()
    assert reproduce_model(model, prompts, tmp_path, [Counts(Times([]))]) == first
    assert seen == []


def test_other_settings_prompts_weights_or_claims_are_measured_anew(wired, tmp_path, monkeypatch):
    model, prompts = wired
    kept = run_or_read(SinkMap(), model, prompts, tmp_path)
    written = (tmp_path / "sink-map.json").stat().st_mtime_ns
    assert run_or_read(SinkMap(), model, prompts, tmp_path).metrics == kept.metrics
    assert (tmp_path / "sink-map.json").stat().st_mtime_ns == written
    keys = {kept.provenance["key"]}
    keys.add(run_or_read(SinkMap(SinkMapConfig(eps=0.4)), model, prompts, tmp_path).provenance["key"])
    keys.add(run_or_read(SinkMap(), model, prompts.subset(slice(0, 6)), tmp_path).provenance["key"])
    keys.add(run_or_read(SinkMap(), load_model("wired-learned"), prompts, tmp_path).provenance["key"])
    monkeypatch.setattr(SinkMap, "claim", CLAIM)
    with pytest.raises(KeyError):
        run_or_read(SinkMap(), model, prompts, tmp_path)
    assert len(keys) == 4


def test_a_damaged_result_is_measured_anew(wired, tmp_path):
    model, prompts = wired
    run_or_read(SinkMap(), model, prompts, tmp_path)
    path: Path = tmp_path / "sink-map.json"
    path.write_text(path.read_text()[:100])
    assert run_or_read(SinkMap(), model, prompts, tmp_path).judgement.verdict == "reproduced"
    assert json.loads(path.read_text())["experiment"] == "sink-map"


def test_pooled_prompts():
    parts = [random_tokens(40, n=4 + seed, length=12, seed=seed) for seed in range(3)]
    whole = pool(parts)
    assert whole.n == 15 and whole.description["seeds"] == [0, 1, 2] and whole.description["n"] == 15
    assert bool((whole.ids[4:9] == parts[1].ids).all())
    with pytest.raises(ValueError, match=r"lengths \[12, 13\]"):
        pool([parts[0], random_tokens(40, n=2, length=13)])


def test_a_rounded_model_says_so_in_every_entry_manifest_and_report(tiny_model_dir, tmp_path):
    path = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "Q8_0")
    model = load_model(path, device="cpu")
    prompts = random_tokens(model.cfg.d_vocab, n=8, length=16)
    out = tmp_path / "out" / "tiny"
    entries = reproduce_model(model, prompts, out, [SinkMap()], controls=False)
    assert {(entry["model"], entry["quantisation"]) for entry in entries} == {("tiny", "Q8_0")}
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["model"], manifest["quantisation"]) == ("tiny", "Q8_0")
    for page in write_report(out.parent):
        text = page.read_text()
        assert "tiny (Q8_0)" in text
        # No heading is without it.
        heading = r"<(title|h1|th|a)[^>]*>(The P0 sink circuit in )?|^# "
        assert re.search(rf"({heading})tiny", text, re.M)
        assert not re.search(rf"({heading})tiny\b(?! \(Q8_0\))", text, re.M)
    # A run that has not come to its end has no manifest yet.
    (out / "manifest.json").unlink()
    assert find_reproductions(out)[0].title == "tiny (Q8_0)"
