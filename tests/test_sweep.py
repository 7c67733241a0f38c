"""Sweeps on Ray: the numbers of a serial run, whatever dies on the way, and nothing measured twice.

Ray is real. The first test starts it as the command does; the others share a cluster of one node, and add to it.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import p0circuit
from p0circuit.experiments import SinkMap, SinkMapConfig, find_experiment
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.models import load_model
from p0circuit.models.constructed.build import wired_model
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.results import Result
from p0circuit.stats import Interval
from p0circuit.sweep import Sweep, memory_of, sweep
from p0circuit.sweep.cluster import missing_resources
from p0circuit.sweep.tasks import WORKER_OVERHEAD_BYTES

ray = pytest.importorskip("ray")

PATIENCE = 180.0


def few_tokens(model: Any, n: int = 8) -> PromptSet:
    return random_tokens(model.cfg.d_vocab, n=n, length=16)


@dataclass(frozen=True)
class Story:
    """What an experiment does: where it writes down that it began, how it ends, and for which file it waits.

    "{node}" in the name of that file stands for the node that it runs on.
    """

    diary: str
    name: str = "works"
    ends: str = "well"
    waits_for: str = ""


class Tells(Experiment[Story]):
    """An experiment that tells how often it was begun."""

    id, title = "tells", "Tells"

    def __init__(self, config: Story) -> None:
        super().__init__(config)
        self.id = config.name

    def passes(self, model: Any, prompts: PromptSet) -> float:
        return 0.0

    def measure(self, model: Any, prompts: PromptSet) -> Result:
        began = begun(self.config.diary).count(self.id)
        with open(self.config.diary, "a") as file:
            file.write(f"{self.id}\n")
        if self.config.waits_for:
            node = ray.get_runtime_context().get_node_id()
            wait_for(Path(self.config.waits_for.replace("{node}", node)).exists)
        if self.config.ends == "killed once" and not began:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.config.ends == "raises":
            raise ArithmeticError("a matrix is singular")
        if self.config.ends == "not applicable":
            raise NotApplicable("nothing to measure here")
        value = float(model.W_E.detach().double().sum())
        metrics, tables = {"x": Interval(value, value, value, 1)}, {"t": pd.DataFrame({"x": [value]})}
        return Result(self.id, self.title, metrics, tables, notes=[p0circuit.__file__])


def begun(diary: str | Path) -> list[str]:
    return Path(diary).read_text().split() if Path(diary).exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.02)


def told(result: Sweep) -> dict[str, str]:
    return {task.experiment: task.status for task in result.tasks}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).resolve().parent.parent)
    with pytest.MonkeyPatch.context() as patch:
        # Its workers are to find the experiments of this file.
        patch.setenv("PYTHONPATH", root)
        node = {"num_cpus": 1, "memory": 4 * WORKER_OVERHEAD_BYTES, "object_store_memory": 100 * 2**20}
        started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        started.another = functools.partial(started.add_node, **node)
        ray.init(started.address, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.mark.slow
def test_ray_started_here_gives_the_numbers_of_a_serial_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_dir.parent)
    out, diary = tmp_path / "out", str(tmp_path / "diary")
    ends = [Tells(Story(diary, end.split()[0], end)) for end in ("raises", "not applicable")]
    # One worker: what takes its time is that each imports everything. The lost node below has tasks side by side.
    found = sweep(["wired", "./tiny"], [], ["C1", *ends], out, few_tokens, workers=1)
    assert not ray.is_initialized()
    assert [(Path(task.model).name, task.experiment, task.status, task.reason) for task in found.tasks] == [
        (model, *rest)
        for model in ("wired", "tiny")
        for rest in (
            ("sink-map", "done", ""),
            ("raises", "failed", "ArithmeticError: a matrix is singular"),
            ("not", "not applicable", "nothing to measure here"),
        )
    ]
    assert json.loads((out / "sweep.json").read_text()) == found.to_json()
    for name, given in (("wired", "wired"), ("tiny", tiny_model_dir)):
        model = load_model(given)
        serial = SinkMap().run(model, few_tokens(model))
        serial.save(tmp_path / "serial" / name)
        kept = Result.load(out / name / "sink-map.json")
        assert kept.metrics == serial.metrics and kept.view == serial.view
        for table in (tmp_path / "serial" / name / "tables").glob("*.csv"):
            assert (out / name / "tables" / table.name).read_bytes() == table.read_bytes()


@pytest.mark.slow
def test_what_is_there_is_kept_by_its_content(cluster, tmp_path):
    out, diary = f"file://{tmp_path}/out", str(tmp_path / "diary")
    works, left_out = Tells(Story(diary)), Tells(Story(diary, "left", "not applicable"))

    def again(*experiments: Experiment, n: int = 8) -> dict[str, str]:
        return told(sweep(["wired"], [], experiments, out, functools.partial(few_tokens, n=n)))

    assert again(works, left_out, works) == {"works": "done", "left": "not applicable"}
    whole = tmp_path / "out" / "wired" / "works.json"
    written = whole.stat().st_mtime_ns
    assert again(works, left_out) == {"works": "kept", "left": "not applicable"}
    assert begun(diary) == ["works", "left"] and whole.stat().st_mtime_ns == written
    # Other prompts, other settings, a file that is gone: each is another result.
    assert again(works, n=9) == {"works": "done"}
    assert again(Tells(replace(works.config, waits_for=diary)), n=9) == {"works": "done"}
    (tmp_path / "out" / "wired" / "tables" / "works-t.csv").unlink()
    assert again(Tells(replace(works.config, waits_for=diary)), n=9) == {"works": "done"}
    assert begun(diary).count("works") == 4


def test_results_go_to_any_file_system(cluster, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    story = Tells(Story(str(tmp_path / "diary")))
    for status in ("done", "kept"):
        assert told(sweep(["wired"], [], [story], "memory://sweep", few_tokens)) == {"works": status}
    value = float(wired_model().W_E.detach().double().sum())
    assert json.loads(memory.cat_file("/sweep/wired/works.json"))["metrics"]["x"]["value"] == value
    assert memory.cat_file("/sweep/wired/tables/works-t.csv") == f"x\n{value:.6g}\n".encode()
    assert memory.exists("/sweep/sweep.json")


def test_checkpoints_are_tasks_of_their_own(cluster, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for step in (0, 20):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **sizes))
        model.save_pretrained(tmp_path / "run" / "trace" / f"step-{step:06d}")
    model.save_pretrained(tmp_path / "run")
    model.save_pretrained(tmp_path / "run" / "trace" / "step-000025")
    (tmp_path / "run" / "trace" / "step-000025" / "model.safetensors").write_bytes(b"cut off")
    story = Tells(Story(str(tmp_path / "diary")))
    run = str(tmp_path / "run")
    found = sweep([run, "wired"], [0, 20, 25, 30], [story], tmp_path / "out", few_tokens)
    assert [(task.checkpoint, task.status) for task in found.tasks] == [
        (0, "done"), (20, "done"), (25, "failed"), (30, "failed"), (None, "done"),
    ]  # fmt: skip
    damaged, missing = (task.reason for task in found.failed)
    assert "ModelError: run@25: a weight file" in damaged and "is damaged" in damaged
    assert missing == "ModelError: run has no checkpoint 30; it has those of steps 0, 20, 25"
    values = {
        name: Result.load(tmp_path / "out" / name / "works.json").metrics["x"].value for name in ("run@0", "run@20")
    }
    assert values["run@20"] == float(model.model.embed_tokens.weight.detach().double().sum()) != values["run@0"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert memory_of(run, 20) == WORKER_OVERHEAD_BYTES + 8 * parameters
    assert memory_of(run, 20, torch.bfloat16) == WORKER_OVERHEAD_BYTES + 4 * parameters
    assert memory_of("wired", None) == WORKER_OVERHEAD_BYTES


@pytest.mark.usefixtures("shown_messages")
def test_a_result_that_cannot_be_written_is_that_of_its_task_alone(cluster, tmp_path, capsys):
    story, out = Tells(Story(str(tmp_path / "diary"))), tmp_path / "out"
    out.mkdir()
    (out / "wired").write_text("a file where a directory is needed")
    found = sweep(["wired", "wired-decoy"], [], [story], out, few_tokens, "ray://elsewhere:10001")
    assert [(task.model, task.status) for task in found.tasks] == [("wired", "failed"), ("wired-decoy", "done")]
    assert "FileExistsError" in found.failed[0].reason or "NotADirectoryError" in found.failed[0].reason
    assert json.loads((out / "sweep.json").read_text()) == found.to_json()
    assert "already: 'ray://elsewhere:10001' is not used" in capsys.readouterr().err
    (out / "wired").unlink()
    assert [task.status for task in sweep(["wired", "wired-decoy"], [], [story], out, few_tokens).tasks] == [
        "done",
        "kept",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("shown_messages")
def test_a_task_larger_than_any_node_waits_for_one_that_has_room(cluster, tmp_path, capsys):
    assert missing_resources(ray, {"CPU": 1, "GPU": 0, "memory": WORKER_OVERHEAD_BYTES}) is None
    missing = missing_resources(ray, {"CPU": 1, "GPU": 0.5, "memory": 2**50})
    assert missing == "it needs 1 CPU, 0.5 GPU and 1048576.0 GB of memory, more than any one machine here has"
    story, found = Tells(Story(str(tmp_path / "diary"))), []
    waiting = threading.Thread(
        target=lambda: found.append(sweep(["wired"], [], [story], tmp_path / "out", few_tokens, cpus=2)), daemon=True
    )
    waiting.start()
    wait_for(lambda: "more than any one machine here has; it waits for one that has" in capsys.readouterr().err)
    node = cluster.add_node(num_cpus=2, memory=4 * WORKER_OVERHEAD_BYTES, object_store_memory=100 * 2**20)
    waiting.join(PATIENCE)
    assert [told(one) for one in found] == [{"works": "done"}]
    cluster.remove_node(node)


@pytest.mark.slow
def test_a_worker_killed_mid_task_is_replaced(cluster, tmp_path):
    diary = str(tmp_path / "diary")
    stories = [Tells(Story(diary)), Tells(Story(diary, "killed", "killed once")), Tells(Story(diary, "later"))]
    found = sweep(["wired"], [], stories, tmp_path / "out", few_tokens)
    assert set(told(found).values()) == {"done"}
    assert sorted(begun(diary)) == ["killed", "killed", "later", "works"]
    assert {Result.load(path).metrics["x"] for path in (tmp_path / "out" / "wired").glob("*.json")} == {
        Result.load(tmp_path / "out" / "wired" / "works.json").metrics["x"]
    }


@pytest.mark.slow
def test_a_lost_node_is_made_up_for(cluster, tmp_path):
    diary, go = tmp_path / "diary", str(tmp_path / "go-{node}")
    node = cluster.another()
    stories = [Tells(Story(str(diary), name, waits_for=go)) for name in ("one", "two")]

    def lose_it() -> None:
        # Both nodes have one CPU: the two tasks are one on each.
        wait_for(lambda: len(begun(diary)) == 2)
        cluster.remove_node(node, allow_graceful=False)
        Path(go.replace("{node}", cluster.head_node.node_id)).touch()

    loser = threading.Thread(target=lose_it)
    loser.start()
    found = sweep(["wired"], [], stories, tmp_path / "out", few_tokens)
    loser.join()
    assert told(found) == {"one": "done", "two": "done"}
    assert len(begun(diary)) == 3 and set(begun(diary)) == {"one", "two"}


DRIVER = """
import sys
from tests.test_sweep import Story, Tells, few_tokens
from p0circuit.sweep import sweep
address, out, diary, go = sys.argv[1:]
stories = [Tells(Story(diary, "first")), Tells(Story(diary, "second", waits_for=go))]
sweep(["p0-nano"], [0], stories, out, few_tokens, address)
"""


@pytest.mark.slow
def test_a_driver_killed_and_restarted_goes_on(cluster, tmp_path):
    diary, out, go = tmp_path / "diary", tmp_path / "out", tmp_path / "go"
    root = Path(__file__).resolve().parent.parent
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, out, diary, go],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    first = out / "p0-nano@0" / "first.json"
    try:
        wait_for(lambda: first.exists() and begun(diary)[-1] == "second")
    finally:
        driver.kill()
        driver.wait()
    # The package has travelled to the cluster, and the shipped model with it.
    assert not Path(Result.load(first).notes[0]).is_relative_to(root)
    go.touch()
    stories = [Tells(Story(str(diary), "first")), Tells(Story(str(diary), "second", waits_for=str(go)))]
    found = sweep(["p0-nano"], [0], stories, out, few_tokens)
    assert told(found) == {"first": "kept", "second": "done"}
    # The unfinished one alone was begun again.
    assert begun(diary) == ["first", "second", "second"]


def test_wrong_use_is_told_before_ray_starts(tmp_path):
    def refused(*arguments: Any) -> str:
        with pytest.raises(ValueError) as refusal:
            sweep(*arguments, few_tokens)
        return str(refusal.value)

    assert "no experiment 'sink-mop'; there are: sink-map" in refused(["wired"], [], ["sink-mop"], tmp_path)
    assert "Protocol not known: nowhere" in refused(["wired"], [], ["C1"], "nowhere://x")
    for name in ("a/run", "b/run"):
        (tmp_path / name).mkdir(parents=True)
    assert "both called 'run'" in refused([str(tmp_path / "a/run"), str(tmp_path / "b/run")], [], ["C1"], tmp_path)
    assert find_experiment("c1").id == "sink-map" and find_experiment("sink-map").config == SinkMapConfig()
