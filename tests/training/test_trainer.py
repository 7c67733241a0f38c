"""The trainer: an interrupted run ends where an uninterrupted one does, and formulas are what they are said to be."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from p0circuit.errors import P0Error
from p0circuit.io import data_dir
from p0circuit.models import list_checkpoints
from p0circuit.training import run_files
from p0circuit.training.build import build_model
from p0circuit.training.config import TrainConfig
from p0circuit.training.run_files import load_state, save_model
from p0circuit.training.trainer import checkpoint_steps, train
from p0circuit.training.updates import (
    TrainState,
    batch_at,
    build_optimizer,
    learning_rate_at,
    next_token_loss,
    train_step,
)

TINY = TrainConfig(
    n_layers=2,
    d_model=32,
    n_heads=2,
    d_mlp=48,
    vocab_size=300,
    length=16,
    batch=4,
    steps=30,
    warmup=5,
    checkpoints=5,
    corpus=str(data_dir() / "prompts" / "english"),
)


class Stop(Exception):
    """What a user's Ctrl-C stands for here."""


def stop_at(step: int) -> Callable[[int, float], None]:
    def on_step(now: int, loss: float) -> None:
        if now == step:
            raise Stop

    return on_step


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder; of safetensors the header is parsed, since its entries come in any order.

    The card, which begins with the folder's own name, is taken without it.
    """

    def content(path: Path) -> object:
        data = path.read_bytes()
        if path.name == "README.md":
            return data.replace(f"# {folder.name}\n".encode(), b"# \n")
        if path.suffix != ".safetensors":
            return data
        header = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + header]), data[8 + header :]

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TINY, tmp_path_factory.mktemp("run"), save_every=7)


# schedules and batches


def test_checkpoints_are_log_spaced_from_zero_to_the_last_step() -> None:
    steps = checkpoint_steps(20_000, 16)
    assert steps[0] == 0 and steps[-1] == 20_000 and len(steps) == 16
    ratios = [b / a for a, b in itertools.pairwise(steps[1:])]
    assert max(ratios) / min(ratios) < 1.05
    assert ratios[-1] == pytest.approx((20_000 / 16) ** (1 / 14), rel=0.01)


@pytest.mark.parametrize(("steps", "count"), [(1, 16), (5, 3), (16, 16), (30, 5), (40, 16), (7, 1), (9, 2)])
def test_checkpoints_of_short_runs_are_different_steps_and_end_at_the_last(steps: int, count: int) -> None:
    kept = checkpoint_steps(steps, count)
    assert kept == sorted(set(kept)) and len(kept) <= count
    assert kept[-1] == steps and all(0 <= step <= steps for step in kept)
    assert kept[0] == (0 if count > 1 else steps)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 3e-3 / 200),
        (99, 3e-3 * 100 / 200),
        (199, 3e-3),
        (200, 3e-3),
        (1200, 3e-4 + (3e-3 - 3e-4) * (1 + math.cos(math.pi / 4)) / 2),
        (2200, 3e-4 + (3e-3 - 3e-4) / 2),
        (4200, 3e-4),
    ],
)
def test_the_learning_rate_warms_up_and_follows_a_cosine(step: int, expected: float) -> None:
    config = TrainConfig(steps=4200, warmup=200, learning_rate=3e-3, final_learning_rate=0.1)
    assert learning_rate_at(config, step) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_learning_rate_begins_at_its_peak() -> None:
    assert learning_rate_at(replace(TINY, warmup=0), 0) == TINY.learning_rate


def test_the_optimizer_is_told_the_learning_rate_of_each_step() -> None:
    model = build_model(TINY)
    state = TrainState(model, build_optimizer(TINY, model))
    stream = np.arange(400, dtype=np.uint16) % 300
    for step in range(7):
        train_step(TINY, state, batch_at(TINY, stream, step, bos=0))
        assert {group["lr"] for group in state.optimizer.param_groups} == {learning_rate_at(TINY, step)}
    assert state.step == 7


def test_weight_decay_is_for_matrices_only() -> None:
    model = build_model(TINY)
    decayed, others = build_optimizer(TINY, model).param_groups
    assert decayed["weight_decay"] == 0.1 and {p.ndim for p in decayed["params"]} == {2}
    assert others["weight_decay"] == 0.0 and {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


STREAM = np.random.default_rng(0).integers(2, 300, 5000).astype(np.uint16)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first = batch_at(TINY, STREAM, 11, bos=0)
    for step in (3, 7, 12):
        batch_at(TINY, STREAM, step, bos=0)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, batch_at(TINY, STREAM, 11, bos=0))
    assert torch.equal(first, batch_at(replace(TINY, learning_rate=1.0, steps=99), STREAM, 11, bos=0))
    assert not torch.equal(first, batch_at(TINY, STREAM, 12, bos=0))
    assert not torch.equal(first, batch_at(replace(TINY, seed=1), STREAM, 11, bos=0))


def test_rows_are_a_first_token_and_then_a_stretch_of_the_stream() -> None:
    config = replace(TINY, batch=400)
    rows = batch_at(config, STREAM, 0, bos=0).numpy()
    windows = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(STREAM, config.length - 1).tolist()}
    assert rows.shape == (400, config.length)
    assert all(tuple(row[1:]) in windows for row in rows.tolist())
    with_bos = (rows[:, 0] == 0).mean()
    assert abs(with_bos - 0.5) < 4 * 0.5 / 400**0.5
    assert len(set(rows[:, 0].tolist())) > 100


def test_without_a_first_token_rows_are_plain_text() -> None:
    config = replace(TINY, batch=50, bos_share=0.0, random_first=False)
    windows = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(STREAM, config.length).tolist()}
    assert all(tuple(row) in windows for row in batch_at(config, STREAM, 0, bos=0).tolist())
    always = batch_at(replace(config, bos_share=1.0), STREAM, 0, bos=0)
    assert (always[:, 0] == 0).all()


# the loss


def test_the_tnlm_loss_is_the_cross_entropy_of_every_prediction_but_the_first() -> None:
    logits, ids = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    terms = [
        [
            -(
                logits[row, position, ids[row, position + 1]].item()
                - math.log(sum(map(math.exp, logits[row, position])))
            )
            for position in range(5)
        ]
        for row in range(3)
    ]
    usual = sum(sum(row) for row in terms) / 15
    tnlm = sum(sum(row[1:]) for row in terms) / 12
    assert next_token_loss(logits, ids, loss_at_p0=True).item() == pytest.approx(usual, rel=1e-6)
    assert next_token_loss(logits, ids, loss_at_p0=False).item() == pytest.approx(tnlm, rel=1e-6)
    labels = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(15, 11), ids[:, 1:].reshape(15))
    assert next_token_loss(logits, ids).item() == pytest.approx(labels.item(), rel=1e-6)


def test_with_the_tnlm_loss_the_prediction_at_p0_has_no_gradient() -> None:
    logits, ids = torch.randn(3, 6, 11, requires_grad=True), torch.randint(0, 11, (3, 6))
    next_token_loss(logits, ids, loss_at_p0=False).backward()
    touched = logits.grad.abs().sum(dim=(0, 2)) > 0
    assert touched.tolist() == [False, True, True, True, True, False]


# whole runs


@pytest.mark.parametrize("stops", [(1,), (13,), (14,), (29,), (30,), (5, 13, 14, 22)])
def test_an_interrupted_run_leaves_the_same_files_as_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for step in stops:
        with pytest.raises(Stop):
            train(TINY, tmp_path, save_every=7, on_step=stop_at(step))
        torch.rand(step)  # A new process would not be in the old one's random state either.
    train(TINY, tmp_path, save_every=7)
    assert contents(tmp_path) == contents(uninterrupted)


@pytest.mark.parametrize("save_every", [7, 4])
def test_an_interruption_leaves_nothing_half_written(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    with pytest.raises(Stop):
        train(TINY, tmp_path, save_every=save_every, on_step=stop_at(20))
    before = contents(tmp_path)
    assert not any(".tmp" in name for name in before)
    for name in before:
        if name.endswith(".safetensors"):
            load_file(tmp_path / name)

    def torn(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half a file")
        raise Stop

    # The checkpoint of step 20 is due, and its writing is cut short.
    monkeypatch.setattr(run_files, "save_file", torn)
    with pytest.raises(Stop):
        train(TINY, tmp_path, save_every=save_every)
    assert contents(tmp_path) == before
    assert list_checkpoints(tmp_path) == [0, 16]
    monkeypatch.undo()
    train(TINY, tmp_path, save_every=save_every)
    assert contents(tmp_path) == contents(uninterrupted)


def test_the_card_tells_how_it_was_made(uninterrupted: Path) -> None:
    text = (uninterrupted / "README.md").read_text()
    assert "steps=30" in text and f"`{TINY.corpus}`" in text and f"vocabulary of\n{TINY.vocab_size}." in text


def test_the_trace_holds_the_checkpoints_and_the_log_their_losses(uninterrupted: Path) -> None:
    steps = checkpoint_steps(30, 5)
    assert sorted(path.name for path in (uninterrupted / "trace").iterdir()) == [f"step-{step:06d}" for step in steps]
    rows = [line.split(",") for line in (uninterrupted / "trace.csv").read_text().split()]
    assert rows[0] == ["step", "tokens", "train_loss", "validation_loss"]
    assert [int(row[0]) for row in rows[1:]] == steps
    assert [int(row[1]) for row in rows[1:]] == [step * 4 * 16 for step in steps]
    first, last = float(rows[1][3]), float(rows[-1][3])
    assert first == pytest.approx(math.log(300), abs=0.1)
    assert last < first - 0.3


def test_step_zero_is_the_untrained_model_and_the_last_step_the_result(uninterrupted: Path) -> None:
    untrained = build_model(TINY).state_dict()
    saved = load_file(uninterrupted / "trace" / "step-000000" / "model.safetensors")
    assert saved and all(torch.equal(tensor, untrained[name].half()) for name, tensor in saved.items())
    trained = load_file(uninterrupted / "model.safetensors")
    final = load_file(uninterrupted / "trace" / "step-000030" / "model.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in trained.items())
    assert not any(torch.equal(tensor, saved[name]) for name, tensor in trained.items())


def test_the_result_loads_in_transformers_and_computes_the_same(uninterrupted: Path) -> None:
    model = build_model(TINY)
    state = TrainState(model, build_optimizer(TINY, model))
    load_state(uninterrupted / "work" / "state.safetensors", state)
    assert state.step == 30
    loaded = AutoModelForCausalLM.from_pretrained(uninterrupted, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted)
    assert (tokenizer.bos_token_id, len(tokenizer)) == (0, 300)
    ids = torch.tensor([tokenizer.encode("The mill at the mouth of the creek", add_special_tokens=False)])
    with torch.no_grad():
        exact, half = model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
    # float16 keeps 11 bits of each weight.
    assert (exact - half).abs().max() < 2**-9 * exact.abs().max()
    rounded = build_model(TINY).eval()
    rounded.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(rounded(input_ids=ids).logits, half, atol=1e-6, rtol=0)


def test_saving_leaves_the_model_in_float32(tmp_path: Path) -> None:
    model = build_model(TINY)
    save_model(tmp_path / "saved", model, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float16"


def test_another_configuration_in_the_same_directory_is_refused(uninterrupted: Path) -> None:
    before = contents(uninterrupted)
    with pytest.raises(ValueError, match=r"holds a run of another configuration.*choose an empty directory"):
        train(replace(TINY, learning_rate=1e-3), uninterrupted)
    assert contents(uninterrupted) == before


@pytest.mark.parametrize("names", [["config.json"], ["README.md", "notes/a.txt"], [".hidden"]])
def test_a_directory_with_other_files_is_refused_and_left_as_it_is(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(P0Error, match=r"is not empty and holds no training run.*choose an empty directory"):
        train(TINY, tmp_path)
    assert contents(tmp_path) == before


def test_a_file_and_a_directory_with_a_foreign_configuration_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_text("mine")
    with pytest.raises(P0Error, match=r"model' is a file; choose an empty directory"):
        train(TINY, file)
    for text, message in (
        ("[]", "is not the configuration of a training run"),
        ('{"layers": 4, "betas": [0.9, 0.95]}', "fields that this version does not know: layers"),
    ):
        (tmp_path / "train_config.json").write_text(text)
        with pytest.raises(P0Error, match=message):
            train(TINY, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "train_config.json"]


def test_a_finished_run_is_left_as_it_is(uninterrupted: Path) -> None:
    before = contents(uninterrupted)
    steps: list[int] = []
    train(TINY, uninterrupted, save_every=7, on_step=lambda step, loss: steps.append(step))
    assert steps == []
    assert contents(uninterrupted) == before


def test_a_finished_run_is_left_as_it_is_without_what_it_worked_with(uninterrupted: Path, tmp_path: Path) -> None:
    """As models are shipped; its card may say more than the trainer knows."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, ignore=shutil.ignore_patterns("work", "trace"))
    (run / "README.md").write_text("measured")
    before = contents(run)
    assert train(TINY, run, on_step=lambda step, loss: pytest.fail("trained again")) == run
    assert contents(run) == before


def test_a_corpus_without_text_or_with_too_little_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match="no text at"):
        train(replace(TINY, corpus=str(tmp_path / "corpus")), tmp_path / "none")
    (tmp_path / "corpus" / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=r"hold \d+ tokens; expected more than one row of 16"):
        train(replace(TINY, corpus=str(tmp_path / "corpus")), tmp_path / "short")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss became .* at step \d+; lower the learning rate \(1e\+30\)"):
        train(replace(TINY, learning_rate=1e30, warmup=0), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_heads", 3, "d_model 32 must be a multiple of n_heads 3"),
        ("bos_share", 1.5, "between 0 and 1, got 1.5"),
        ("n_layers", 0, "n_layers must be at least 1, got 0"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("length", 1, "at least 2 tokens, got 1"),
    ],
)
def test_impossible_configurations_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **{field: value})
