"""What `record` keeps, against the same numbers worked out in plain loops from everything a model computes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p0circuit.models import forward, load_model
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.models.hooks import hook_point
from p0circuit.prompts import PromptSet, from_ids, random_tokens
from p0circuit.recording import fingerprint, quantities
from p0circuit.recording.cache import Cache
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.recording.quantities import Batch, Quantity, score_at
from p0circuit.recording.record import record
from tests.families import LAYERS, VOCAB, write
from tests.literal import cosine, loss, norm, over_others, run_with_cache, score

LENGTH = 9
ROOT = Path(__file__).resolve().parents[2]
# Grouped-query attention with rotation, a window, and learned positions with biases.
CASES = [(family, backend) for family in ("llama-grouped", "mistral", "gpt2") for backend in ("hooked", "bridge")]


@pytest.fixture(params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest, family_model: Callable[[str, str], Any]) -> Any:
    return family_model(*request.param)


@pytest.fixture
def llama(family_model: Callable[[str, str], Any]) -> Any:
    """A model to change: of its own, since those of `family_model` are shared."""
    return family_model("llama-grouped", "hooked" if has_hooked_transformer() else "bridge")


@pytest.fixture
def prompts() -> PromptSet:
    return random_tokens(VOCAB, n=4, length=LENGTH, seed=1)


def literal(model: Any, ids: Tensor) -> dict[str, Any]:
    """Every quantity of one row, by name."""
    logits, cache = run_with_cache(model, ids)
    layers = range(LAYERS)
    of = {
        name: [cache[f"blocks.{layer}.{name}"][0] for layer in layers]
        for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern", "attn.hook_v")
    }
    stream = [*of["hook_resid_pre"], cache[f"blocks.{LAYERS - 1}.hook_resid_post"][0]]
    rotated = "rot_" if "blocks.0.attn.hook_rot_q" in cache else ""
    queries, keys = ([cache[f"blocks.{layer}.attn.hook_{rotated}{x}"][0] for layer in layers] for x in "qk")
    return {
        "sink_score": [score(pattern, 0) for pattern in of["attn.hook_pattern"]],
        "score_at_3": [score(pattern, 3) for pattern in of["attn.hook_pattern"]],
        "norm_ratio": [over_others(residual) for residual in stream],
        "residual_norms": [[norm(vector) for vector in residual] for residual in stream],
        "attention_out_norms": [[norm(vector) for vector in out] for out in of["hook_attn_out"]],
        "mlp_out_norms": [[norm(vector) for vector in out] for out in of["hook_mlp_out"]],
        "value_norm_ratio": [[over_others(v[:, head]) for head in range(v.shape[1])] for v in of["attn.hook_v"]],
        "token_losses": loss(logits[0], ids),
        "residual_at_0": [residual[0].tolist() for residual in stream],
        "residual_at_2": [residual[2].tolist() for residual in stream],
        "hook_attn_out_at_0": [out[0].tolist() for out in of["hook_attn_out"]],
        "hook_mlp_out_at_1": [out[1].tolist() for out in of["hook_mlp_out"]],
        "embedding_at_1": stream[0][1].tolist(),
        "key_query_cosine_at_0": [cosine(*pair, 0) for pair in zip(queries, keys, strict=True)],
        "key_query_cosine_at_2": [cosine(*pair, 2) for pair in zip(queries, keys, strict=True)],
    }


def all_quantities(model: Any) -> list[Quantity]:
    return [
        quantities.SINK_SCORE,
        quantities.NORM_RATIO,
        quantities.RESIDUAL_NORMS,
        quantities.ATTENTION_OUT_NORMS,
        quantities.MLP_OUT_NORMS,
        quantities.VALUE_NORM_RATIO,
        quantities.TOKEN_LOSSES,
        quantities.score_at(3),
        quantities.residual_at(),
        quantities.residual_at(2),
        quantities.component_at("hook_attn_out"),
        quantities.component_at("hook_mlp_out", 1),
        quantities.embedding_at(1),
        quantities.key_query_cosine_at(model),
        quantities.key_query_cosine_at(model, 2),
    ]


def agree(recorded: Tensor, expected: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(recorded.double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance)


# what is recorded


def test_every_quantity_equals_its_literal_computation(model: Any, prompts: PromptSet) -> None:
    what = all_quantities(model)
    recording = record(model, prompts, what, cache=None)
    assert recording.values.keys() == {quantity.name for quantity in what} == literal(model, prompts.ids[0]).keys()
    for row, ids in enumerate(prompts.ids):
        for name, expected in literal(model, ids).items():
            agree(recording.values[name][row], expected)


def test_left_padding_changes_no_quantity(model: Any, prompts: PromptSet) -> None:
    lengths = [LENGTH, 7, 5, 6]
    padded = prompts.pad_left(lengths, pad_token=7)
    what = all_quantities(model)
    recording = record(model, padded, what, cache=None)
    for row, length in enumerate(lengths):
        for name, expected in literal(model, prompts.ids[row, :length]).items():
            value = recording.values[name][row]
            if name == "token_losses":
                assert value[: LENGTH - length].isnan().all()
            by_position = name == "token_losses" or name.endswith("_norms")
            agree(value[..., LENGTH - length :] if by_position else value, expected)


def test_the_batch_size_changes_no_value(llama: Any, prompts: PromptSet) -> None:
    what = all_quantities(llama)
    whole = record(llama, prompts, what, cache=None)
    for size in (1, 3):
        parts = record(llama, prompts, what, batch_size=size, cache=None)
        for name, value in whole.values.items():
            torch.testing.assert_close(parts.values[name], value, rtol=1e-5, atol=1e-5)


def test_all_quantities_together_take_one_pass_over_the_rows(llama: Any, prompts: PromptSet) -> None:
    rows = []
    point = hook_point(llama, "blocks.0.hook_resid_pre")
    point.add_hook(lambda activation, hook: rows.append(len(activation)))
    try:
        record(llama, prompts, all_quantities(llama), batch_size=3)
    finally:
        point.remove_hooks()
    assert rows == [3, 1]


def test_half_precision_is_recorded_in_single(family_folder: Callable[[str], Path], prompts: PromptSet) -> None:
    folder = family_folder("llama-grouped")
    exact, half = (load_model(folder, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    what = [quantities.SINK_SCORE, quantities.NORM_RATIO, quantities.TOKEN_LOSSES]
    expected, recording = record(exact, prompts, what), record(half, prompts, what)
    assert expected[quantities.SINK_SCORE].dtype == torch.float64
    assert not recording.cached
    for quantity in what:
        assert recording[quantity].dtype == torch.float32
        torch.testing.assert_close(recording[quantity].double(), expected[quantity].double(), rtol=0.1, atol=0.05)


# hooks and interventions


def halve(activation: Tensor, hook: Any) -> Tensor:
    return activation / 2


@pytest.mark.parametrize("permanent", [False, True])
def test_a_hooked_model_is_recorded_as_it_is_and_the_cache_left_alone(
    model: Any, prompts: PromptSet, permanent: bool
) -> None:
    clean = record(model, prompts, [quantities.NORM_RATIO])
    before = Cache().entries()
    point = hook_point(model, "blocks.1.hook_mlp_out")
    point.add_hook(halve, is_permanent=permanent)
    try:
        assert fingerprint.has_hooks(model)
        edited = record(model, prompts, [quantities.NORM_RATIO])
        _, cache = run_with_cache(model, prompts.ids[0])
    finally:
        point.remove_hooks(including_permanent=True)
    assert not fingerprint.has_hooks(model)
    assert not edited.cached and Cache().entries() == before
    agree(edited[quantities.NORM_RATIO][0, -1], over_others(cache[f"blocks.{LAYERS - 1}.hook_resid_post"][0]))
    same, other = edited[quantities.NORM_RATIO][:, :2], edited[quantities.NORM_RATIO][:, 2:]
    assert torch.equal(same, clean[quantities.NORM_RATIO][:, :2])
    assert (other - clean[quantities.NORM_RATIO][:, 2:]).abs().min() > 1e-4
    again = record(model, prompts, [quantities.NORM_RATIO])
    assert again.cached and torch.equal(again[quantities.NORM_RATIO], clean[quantities.NORM_RATIO])


class Scale:
    """An intervention that scales each row's attention output by a factor of its own."""

    def __init__(self, prompts: PromptSet, factors: Tensor) -> None:
        self.prompts, self.factors = prompts, factors

    def hooks(self, rows: slice) -> list[Any]:
        factors = self.factors[rows, None, None]
        return [("blocks.0.hook_attn_out", lambda activation, hook: activation * factors)]


def test_an_intervention_meets_its_own_rows_before_they_are_recorded(llama: Any, prompts: PromptSet) -> None:
    factors = torch.tensor([1.0, 2.0, 0.5, 3.0])
    quantity = quantities.ATTENTION_OUT_NORMS
    clean = record(llama, prompts, quantity)[:, 0]
    for size in (1, 3, 4):
        edited = record(llama, prompts, [quantity], batch_size=size, interventions=[Scale(prompts, factors)])
        assert not edited.cached
        torch.testing.assert_close(edited[quantity][:, 0], clean * factors[:, None])
    with pytest.raises(ValueError, match="made for other prompts"):
        record(llama, prompts.subset([0, 1]), quantity, interventions=[Scale(prompts, factors)])


def test_no_hook_outlives_an_error(model: Any, prompts: PromptSet) -> None:
    def fail(activation: Tensor, batch: Batch) -> Tensor:
        raise RuntimeError("inside the hook")

    with pytest.raises(RuntimeError, match="inside the hook"):
        record(model, prompts, [quantities.SINK_SCORE, Quantity("fails", ("hook_mlp_out",), fail)], cache=None)
    assert not fingerprint.has_hooks(model)
    assert not any(name for name, module in model.named_modules() if getattr(module, "fwd_hooks", None))


# refusals


def test_positions_and_ids_that_do_not_exist_are_refused(llama: Any, prompts: PromptSet) -> None:
    with pytest.raises(ValueError, match=r"position 9 lies outside .* expected 0 to 8"):
        record(llama, prompts, score_at(LENGTH))
    with pytest.raises(ValueError, match=r"position 5 lies outside .* expected 0 to 4"):
        record(llama, prompts.pad_left([9, 9, 5, 9]), score_at(5))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.95"):
        record(llama, from_ids([[1, VOCAB]]), quantities.SINK_SCORE)


def test_values_that_are_no_numbers_are_refused_by_name(
    family_folder: Callable[[str], Path], prompts: PromptSet
) -> None:
    model = load_model(family_folder("llama-grouped"))
    named = torch.nn.Module.named_parameters(model)
    weight = next(weight for name, weight in named if "mlp" in name and "blocks.1." in name)
    with torch.no_grad():
        weight.fill_(torch.nan)
    for quantity in (quantities.NORM_RATIO, quantities.TOKEN_LOSSES):
        with pytest.raises(FloatingPointError, match=quantity.name):
            record(model, prompts.pad_left([9, 5, 5, 5]), quantity)
    assert not Cache().entries()


# fingerprints


def fixed(activation: Tensor, batch: Batch) -> Tensor:
    return activation.sum((1, 2))


def scaled(activation: Tensor, batch: Batch, factor: Any) -> Tensor:
    return (activation * factor).sum((1, 2))


def scaled_by(factor: Any) -> Callable[[Tensor, Batch], Tensor]:
    def reduce(activation: Tensor, batch: Batch) -> Tensor:
        return (activation * factor).sum((1, 2))

    return reduce


def test_what_defines_a_quantity_is_in_its_fingerprint() -> None:
    plain = Quantity("q", ("hook_mlp_out",), fixed)
    # Two large tensors that print alike.
    ones = torch.ones(5000)
    other = ones.index_fill(0, torch.tensor([2500]), 2.0)
    different = [
        plain,
        Quantity("p", ("hook_mlp_out",), fixed),
        Quantity("q", ("hook_attn_out",), fixed),
        Quantity("q", ("hook_mlp_out",), fixed, "model"),
        *(Quantity("q", ("hook_mlp_out",), functools.partial(scaled, factor=f)) for f in (1.0, 2.0, ones, other)),
        *(Quantity("q", ("hook_mlp_out",), scaled_by(f)) for f in (1.0, 2.0, ones, other)),
    ]
    assert len({quantity.fingerprint() for quantity in different}) == len(different)
    assert plain.fingerprint() == Quantity("q", ("hook_mlp_out",), fixed).fingerprint()
    assert score_at(3).fingerprint() == score_at(3).fingerprint() != score_at(4).fingerprint()


def test_a_reduction_without_source_is_refused_unless_nothing_is_cached(llama: Any, prompts: PromptSet) -> None:
    quantity = Quantity("sum", ("hook_mlp_out",), eval("lambda activation, batch: activation.sum((1, 2))"))
    with pytest.raises(ValueError, match=r"'sum' cannot be told from another.*cache=None"):
        record(llama, prompts, quantity)
    assert record(llama, prompts, quantity, cache=None).shape == (4, LAYERS)


@pytest.mark.parametrize(
    ("family", "backend"),
    [("llama-grouped", "hooked"), ("llama-grouped", "bridge"), ("mixtral", "hooked"), ("olmoe", "bridge")],
)
def test_every_weight_that_matters_is_in_the_fingerprint(
    family: str, backend: str, family_folder: Callable[[str], Path]
) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("HookedTransformer left TransformerLens with version 4")
    model = load_model(family_folder(family), backend=backend)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits, before = forward(model, ids), weights_fingerprint(model)
        mattered = 0
        for name, weight in torch.nn.Module.named_parameters(model):
            kept = weight.clone()
            weight.mul_(1.2).add_(0.01)
            if not torch.equal(forward(model, ids), logits):
                mattered += 1
                assert weights_fingerprint(model) != before, name
            weight.copy_(kept)
        assert mattered > 20
        assert weights_fingerprint(model) == before


def test_weights_are_hashed_once_and_again_when_any_of_them_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[int] = []
    full = fingerprint._weights_fingerprint
    monkeypatch.setattr(fingerprint, "_weights_fingerprint", lambda model: hashed.append(1) or full(model))
    model = load_model("p0-nano")
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before and len(hashed) == 1
    weight = model.embed.W_E if has_hooked_transformer() else next(w for w in model.parameters() if w.numel() > 2**17)
    bias = next(w for w in model.parameters() if w.ndim < 2)
    assert weight.nbytes > fingerprint._SMALL_BYTES

    def one_number() -> None:
        weight.data.view(-1)[-1] += 1e-3

    def two_change_places() -> None:
        weight.data[[6, 7]] = weight.data[[7, 6]]

    def order_of_a_vector() -> None:
        bias.data[:] = torch.arange(len(bias)).flip(0)

    def under_no_grad() -> None:
        with torch.no_grad():
            weight[0].mul_(2)

    # Through `.data` torch counts no change.
    for number, change in enumerate((one_number, two_change_places, order_of_a_vector, under_no_grad), 2):
        change()
        after = weights_fingerprint(model)
        assert after != before and after == full(model) and len(hashed) == number, change
        before = after


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_settings_count_and_names_do_not(backend: str, tmp_path: Path) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("HookedTransformer left TransformerLens with version 4")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    changes = [{}, {"rms_norm_eps": 0.1}, rope, {"hidden_act": "relu"}]
    folders = [write("llama", tmp_path / f"model-{number}", **change) for number, change in enumerate(changes)]
    found = [weights_fingerprint(load_model(folder, backend=backend)) for folder in folders]
    assert len(set(found)) == len(changes)
    assert weights_fingerprint(load_model(write("llama", tmp_path / "other"), backend=backend)) == found[0]


# memory

MEASURE = """
import sys
import torch
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.models import load_model
from p0circuit.prompts import random_tokens
from p0circuit.results import peak_memory_mb

torch.set_num_threads(1)
models = [load_model(folder, backend=backend) for backend in sys.argv[1].split() for folder in sys.argv[2:]]
for rows, length in ((4, 512), (1, 2048)):
    for model in models:
        record(model, random_tokens(96, n=rows, length=length), SINK_SCORE, cache=None)
        print(int(peak_memory_mb() * 2**20))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell the peak memory")
def test_a_sink_map_holds_the_attention_of_one_layer_only(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "max_position_embeddings": 2048}
    folders = [write("llama", tmp_path / str(layers), num_hidden_layers=layers, **shape) for layers in (2, 12)]
    backends = ["bridge", *["hooked"] * has_hooked_transformer()]
    # Large blocks go back to the system as soon as they are freed, so that the peak is that of live memory.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", MEASURE, " ".join(backends), *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # By length, backend and number of layers; the peak so far never falls.
    peaks = torch.tensor([int(line) for line in done.stdout.split()]).view(2, len(backends), 2)
    short, long = 4 * 2 * 512**2 * 4, 2 * 2048**2 * 4
    for length, one_layer in enumerate((short, long)):
        two, twelve = peaks[length].unbind(1)
        assert (twelve - two).max() < one_layer, peaks
    # The measurement sees attention: the longer rows need more than the shorter ones.
    assert peaks[1, 0, 0] - peaks[0, -1, 1] > long - short
