"""The monitor: its numbers are the package's own, training goes on bit by bit as without it, and every way in works."""

from __future__ import annotations

import copy
import csv
import importlib
import itertools
import math
import random
import subprocess
import sys
import weakref
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from p0circuit import sink
from p0circuit.interventions.pairs import shift_prompts, values_at
from p0circuit.io import data_dir
from p0circuit.models import ModelError, forward, load_model
from p0circuit.models.architecture_edits import edit_hf_model, gates_of
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import from_ids, random_tokens, tokenized_text
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE, residual_at, score_at
from p0circuit.recording.record import record
from p0circuit.sink import CONTROL, TIMES_UNIFORM, sink_heads, uniform_excess
from p0circuit.training.build import build_model
from p0circuit.training.callbacks import P0TrainerCallback
from p0circuit.training.checkpoint_measurement import measure_checkpoint
from p0circuit.training.decoder import decoder_of
from p0circuit.training.live_measurement import SHIFT, Measurement
from p0circuit.training.model_state import preserve_model_state
from p0circuit.training.monitor import P0Monitor
from p0circuit.training.readings import COLUMNS, formation_stage, read_readings
from p0circuit.training.run_files import save_model
from p0circuit.training.variants import VARIANTS

VOCAB = 64
SIZE = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {**SIZE, "vocab_size": VOCAB, "max_position_embeddings": 64, "attention_dropout": 0.2}
PROMPTS = random_tokens(VOCAB, n=6, length=20, seed=3)
SHORT = random_tokens(VOCAB, n=12, length=10, seed=4)
"""So short that heads without a preference are about at the threshold, some above it."""
SMALL = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_mlp": 48, "vocab_size": VOCAB, "length": 64}


def sharp(model: nn.Module) -> nn.Module:
    """The model with weights large enough for its heads to attend unevenly, to P0 among others."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = 0.6 if any(part in name for part in ("q_proj", "k_proj", "c_attn")) else 0.2
                weight.copy_((scale * torch.randn(weight.shape, generator=generator)).half().float())
    return model


def llama(**fields: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | fields)))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=8))


def variant(name: str) -> nn.Module:
    config = replace(VARIANTS[name], **SMALL)
    model = sharp(build_model(config))
    if config.architecture_edits:
        edit_hf_model(model, config.architecture_edits, gates_of(model))
    return model


# --- The numbers


def by_the_package(model, prompts):
    """A reading's numbers from `record`, the pair and the sink functions, on a hooked model."""
    scores = record(model, prompts, SINK_SCORE, cache=None)
    recording = record(model, prompts, [NORM_RATIO, residual_at(), score_at(CONTROL)], cache=None)
    at_p0, ratios = recording[residual_at()].float(), recording[NORM_RATIO]
    vocabulary, special = sampleable_vocabulary(model)
    pair = shift_prompts(prompts, SHIFT, vocabulary, prompts.seed, tuple(special))
    (shifted,) = values_at(model, pair.shifted, ["resid_post.1"], pair.position).values()

    def replace_p0(residual, hook):
        residual = residual.clone()
        residual[:, 0] = shifted
        return residual

    def keep(pattern, hook):
        without.append(sink.sink_score(pattern, prompts.p0))

    without = []
    hooks = [("blocks.1.hook_resid_post", replace_p0)]
    hooks += [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(scores.shape[1])]
    with torch.no_grad():
        forward(model, prompts.ids, hooks=hooks)
    later, kept = (float(sink.sink_rate(s, from_layer=2).mean()) for s in (scores, torch.stack(without, dim=1)))
    heads = sink_heads(scores[::2])
    excess = (scores - recording[score_at(CONTROL)])[1::2]
    log_norms = at_p0.norm(dim=-1).log().mean(0)
    gain = float(log_norms.max() - log_norms[0])
    return {
        "sink_rate": float(sink.sink_rate(scores).mean()),
        "sink_rate_from_layer_2": later,
        "norm_ratio": float(ratios[:, 2].mean()),
        "largest_norm_ratio": float(ratios.mean(0).max()),
        "direction_consistency": float(sink.direction_cosines(at_p0[:, 2]).mean()),
        "concentration_observed": float(log_norms[2] - log_norms[0]) / gain if gain > math.log(1.1) else None,
        "concentration_causal": 1 - kept / later if later > 1e-3 else None,
        "excess": float(np.mean([float(excess[:, layer, head].mean()) for layer, head in heads])),
    }


def same_numbers(reading, expected):
    for name, value in expected.items():
        assert getattr(reading, name) == (None if value is None else pytest.approx(value, abs=1e-4)), name


@pytest.mark.parametrize("make", [gpt2, mistral, lambda: llama(num_key_value_heads=1, attn_implementation="eager")])
def test_the_numbers_are_those_of_the_package(make, tmp_path):
    model = sharp(make())
    model.save_pretrained(tmp_path / "m")
    reading = P0Monitor(SHORT).read(model.train(), 0)
    same_numbers(reading, by_the_package(load_model(tmp_path / "m"), SHORT))
    assert 0 < reading.sink_rate_from_layer_2 < 1 and reading.concentration_causal != 0


def test_the_numbers_of_p0_nano_are_those_of_the_package():
    folder = data_dir() / "models" / "p0-nano"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monitor = P0Monitor(tokenizer=tokenizer, seed=5)
    reading = monitor.read(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(), 0)
    prompts = tokenized_text(tokenizer, "english", n=32, length=64, seed=5)
    same_numbers(reading, by_the_package(load_model("p0-nano"), prompts))
    assert reading.sink_rate_from_layer_2 > 0.2 and reading.concentration_causal > 0.8
    assert reading.prompts_fingerprint == prompts.fingerprint()[:12]


@pytest.mark.parametrize("step", [4339, 20000])
def test_a_reading_is_the_row_of_a_trace(step):
    folder = data_dir() / "models" / "p0-nano"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "trace" / f"step-{step:06d}", dtype=torch.float32)
    reading = asdict(P0Monitor(tokenizer=tokenizer, n=8, seed=5).read(model, step))
    prompts = tokenized_text(tokenizer, "english", n=8, length=64, seed=5)
    row = measure_checkpoint(load_model("p0-nano", checkpoint=step), prompts)
    both = reading.keys() & row.keys()
    assert both == {field.name for field in fields(Measurement)} - {"excess"}
    assert {name: reading[name] for name in both} == pytest.approx({name: row[name] for name in both}, rel=1e-5)


@pytest.mark.parametrize("name", ["force-sink", "gated", "window", "moe"])
def test_the_numbers_of_the_variants_are_those_of_the_package(name, tmp_path):
    model = variant(name)
    save_model(tmp_path / "m", model, None)
    reading = P0Monitor(SHORT).read(model.train(), 0)
    same_numbers(reading, by_the_package(load_model(tmp_path / "m"), SHORT))
    assert reading.concentration_causal is not None


def test_no_gain_and_no_later_layers_are_no_number():
    reading = P0Monitor(PROMPTS).read(sharp(llama(num_hidden_layers=1)), 0)
    assert reading.sink_rate_from_layer_2 is None and reading.concentration_causal is None
    model = llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    reading = P0Monitor(PROMPTS).read(model, 0)
    assert reading.concentration_observed is None
    assert reading.sink_rate_from_layer_2 == 0 and reading.concentration_causal is None
    assert "p0/concentration_causal" not in reading.numbers()


class Block(nn.Module):
    """A decoder layer that is nobody's library: attention straight from torch, a norm before it."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.norm, self.grouped = nn.LayerNorm(32), grouped
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 16 if grouped else 32)
        self.v, self.o = nn.Linear(32, 16 if grouped else 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return x + self.o(out.transpose(1, 2).flatten(2))


class Plain(nn.Module):
    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        parts = {"embed": nn.Embedding(VOCAB, 32), "blocks": nn.ModuleList(Block(grouped) for _ in range(3))}
        self.parts, self.head = nn.ModuleDict(parts), nn.Linear(32, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.parts["embed"](ids)
        for block in self.parts["blocks"]:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_model_of_ones_own_is_read_through_torchs_attention(grouped):
    model = sharp(Plain(grouped))
    reading = P0Monitor(PROMPTS).read(model, 0)
    scores, x = [], model.parts["embed"](PROMPTS.ids)
    for block in model.parts["blocks"]:
        y = block.norm(x)
        q, k = (f(y).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (block.q, block.k))
        k = torch.stack([k[:, head // (2 if grouped else 1)] for head in range(4)], dim=1)
        raw = (q @ k.mT / 8**0.5).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
        scores.append(raw.softmax(-1)[..., 0].mean(-1))
        x = block(x)
    expected = sink.sink_rate(torch.stack(scores, dim=1))
    assert reading.sink_rate == pytest.approx(float(expected.mean()), abs=1e-6)
    assert 0 < reading.sink_rate < 1


# --- Formation


def test_formation_is_three_readings_in_a_row_above_the_threshold():
    assert formation_stage([], 0.1) == ("none", None)
    assert formation_stage([(0, 0.0), (100, 0.1)], 0.1) == ("none", None)
    assert formation_stage([(0, 0.0), (100, 0.2)], 0.1) == ("forming", None)
    rising = [(0, 0.0), (100, 0.2), (200, 0.3), (300, 0.3)]
    assert formation_stage(rising[:3], 0.1) == ("forming", None)
    assert formation_stage(rising, 0.1) == ("formed", 100)
    assert formation_stage([*rising, (400, 0.05)], 0.1) == ("none", None)
    assert formation_stage([*rising, (400, 0.05), (500, 0.2), (600, 0.2), (700, 0.2)], 0.1) == ("formed", 500)
    assert formation_stage([(0, 0.2), (100, float("nan"))], 0.1) == ("none", None)


def test_p0_nano_counts_as_formed_and_an_untrained_model_does_not():
    trained = AutoModelForCausalLM.from_pretrained(data_dir() / "models" / "p0-nano", dtype=torch.float32)
    for model, status in ((trained, "emerged at step 0"), (build_model(replace(VARIANTS["baseline"])), "none")):
        monitor = P0Monitor()
        for step in (0, 100, 200):
            monitor.step(model, step)
        assert monitor.status == status
        excess = [reading.excess for reading in monitor.readings]
        assert (min(excess) > TIMES_UNIFORM * uniform_excess(64)) == (status != "none")
        assert monitor.readings[-1].numbers()["p0/formation"] == (2 if status != "none" else 0)


# --- Training is not changed


def batches(steps: int, length: int = 20):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB, (4, length), generator=generator) for _ in range(steps)]


def train(model, monitor=None, steps=50, every_module=()):
    """Train a model for some steps, and return everything of the process that a measurement could have changed."""
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for module in every_module:
        module.eval()
    losses, draws = [], []
    for step, ids in enumerate(batches(steps)):
        if monitor is not None:
            monitor.step(model, step)
        optimizer.zero_grad(set_to_none=True)
        logits = model(ids)
        logits = getattr(logits, "logits", logits)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        if monitor is not None and step % 10 == 5:
            monitor.read(model, step)  # gradients are there
        optimizer.step()
        losses.append(loss.detach())
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    weights = [value.clone() for value in model.state_dict().values()]
    modes = [module.training for module in model.modules()]
    rng = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    assert len(gradients) > 4 and not any(torch.equal(a, b) for a, b in itertools.pairwise(losses))
    return {"gradients": gradients, "moments": moments, "weights": weights, "buffers": buffers} | {
        "modes": modes,
        "rng": rng,
        "draws": draws,
        "losses": losses,
    }


def identical(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert len(left[name]) == len(right[name]), name
        for a, b in zip(left[name], right[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def checkpointed() -> nn.Module:
    model = llama()
    model.gradient_checkpointing_enable()
    return model


def wrapped_in(backend: str):
    def make() -> nn.Module:
        return torch.compile(llama(), backend=backend)

    return make


class Counting(Plain):
    """Draws at random and counts its passes in a buffer, in eval mode too; one part stays in eval mode."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        noise = random.random() + np.random.rand() + torch.rand(())
        return super().forward(ids) + noise.item() * self.passes


CASES = {
    "sdpa": llama,
    "eager": lambda: llama(attn_implementation="eager"),
    "gpt2": gpt2,
    "mistral": mistral,
    "checkpointing": checkpointed,
    "bf16": lambda: llama().to(torch.bfloat16),
    "force-sink": lambda: variant("force-sink"),
    "gated": lambda: variant("gated"),
    "moe": lambda: variant("moe"),
    "compile": wrapped_in("eager"),
    "own": Counting,
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical_with_and_without(name, caplog):
    monitor = P0Monitor(PROMPTS, every=10)
    model = CASES[name]()
    watched = train(model, monitor, every_module=list(decoder_of(model).layers[1:2]))
    model = CASES[name]()
    alone = train(model, every_module=list(decoder_of(model).layers[1:2]))
    identical(watched, alone)
    assert len(set(watched["modes"])) == 2
    assert len(monitor.readings) == 10
    assert not [entry for entry in caplog.records if entry.name.startswith("p0circuit")]


def test_probing_does_not_compile_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = torch.compile(llama(), backend=backend)
    monitor = P0Monitor(PROMPTS, every=2)
    ids = batches(1)[0]
    model(ids).logits.sum().backward()
    first = len(compiled)
    for step in range(6):
        assert (monitor.step(model, step) is not None) == (step % 2 == 0)
        model(ids).logits.sum().backward()
    assert first >= 1 and len(compiled) == first


def test_layers_compiled_one_by_one_and_in_place_are_read():
    plain = sharp(llama())
    expected = P0Monitor(PROMPTS).read(plain, 0)
    parts = copy.deepcopy(plain)
    for number, layer in enumerate(parts.model.layers):
        parts.model.layers[number] = torch.compile(layer, backend="eager")
    whole = copy.deepcopy(plain)
    whole.compile(backend="eager")
    for model in (parts, whole):
        model(batches(1)[0])
        assert P0Monitor(PROMPTS).read(model, 0) == expected


def test_everything_is_restored_when_a_measurement_is_interrupted():
    model = llama()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    state = torch.get_rng_state()

    def interrupt(module, args):
        assert not module.training and model.config._attn_implementation == "eager" and not torch.is_grad_enabled()
        torch.rand(3)
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    monitor = P0Monitor(PROMPTS)
    with pytest.raises(KeyboardInterrupt):
        monitor.step(model, 0)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert model.config._attn_implementation == "sdpa" and not monitor.readings


def test_at_most_one_layers_attention_is_held():
    held, alive = [], []
    model = llama(attn_implementation="eager")
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output[1])))
        layer.register_forward_hook(lambda *call: alive.append(sum(reference() is not None for reference in held)))
    P0Monitor(PROMPTS).read(model, 0)
    assert len(held) >= 3 and max(alive) <= 1


def test_autocast_around_a_measurement_does_not_leave_weights_without_gradients():
    model, ids = llama(), batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reading = P0Monitor(PROMPTS).read(model, 0)
        model(ids).logits.float().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert reading == P0Monitor(PROMPTS).read(model, 0)


def test_undisturbed_keeps_what_replaced_a_buffer():
    module = nn.Module()
    module.register_buffer("table", torch.arange(3.0))
    table = module.table
    with preserve_model_state(module):
        module.table += 1
        module.table = torch.ones(5)
    assert module.table is table and torch.equal(table, torch.arange(3.0))


# --- Errors


@pytest.mark.parametrize("fails", ["the weights", "the log", "the file"])
def test_what_fails_is_told_and_costs_nothing_else(fails, tmp_path, caplog):
    model, path, logged = llama(), tmp_path / "logs" / "p0.csv", []
    monitor = P0Monitor(PROMPTS, every=1, csv=path)
    embedding = model.model.embed_tokens.weight.data.clone()

    def log(numbers):
        if fails == "the log" and monitor.readings[-1].step == 1:
            raise ConnectionError("the logger is away")
        logged.append(monitor.readings[-1].step)

    assert monitor.step(model, 0, log).step == 0
    if fails == "the weights":
        model.model.embed_tokens.weight.data.fill_(torch.nan)
    if fails == "the file":
        path.parent.rename(tmp_path / "away")
        path.parent.write_text("")
    reading = monitor.step(model, 1, log)
    model.model.embed_tokens.weight.data.copy_(embedding)
    if fails == "the file":
        path.parent.unlink()
        (tmp_path / "away").rename(path.parent)
        # Half a line is what a full disk leaves.
        path.write_text(path.read_text() + "1,0.")
    assert monitor.step(model, 2, log).step == 2
    message, error = {
        "the weights": ("P0 at step 1: no reading", "not finite"),
        "the log": ("P0 at step 1: its reading was not logged", "the logger is away"),
        "the file": ("P0 at step 1: its reading was not logged, or not written", "Not a directory"),
    }[fails]
    assert message in caplog.text and error in caplog.text and caplog.text.count("training goes on") == 1
    kept = [0, 2] if fails == "the weights" else [0, 1, 2]
    assert (reading is None) == (fails == "the weights")
    assert [reading.step for reading in monitor.readings] == kept and read_readings(path) == monitor.readings
    assert logged == ([0, 1, 2] if fails == "the file" else [0, 2])


def test_reading_at_once_raises_what_fails(tmp_path):
    model = llama()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        P0Monitor(PROMPTS, csv=tmp_path / "file" / "p0.csv").read(model, 0)
    model.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        P0Monitor(PROMPTS).read(model, 0)


def test_what_is_no_causal_language_model_is_refused():
    bert = BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **SIZE))
    with pytest.raises(ModelError, match=r"BertForMaskedLM attends to later positions.*not an encoder"):
        P0Monitor(PROMPTS).read(bert, 0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart = BartConfig(
        vocab_size=VOCAB, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0, eos_token_id=1, **sizes
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        P0Monitor(PROMPTS).read(BartForConditionalGeneration(bart), 0)
    with pytest.raises(
        ModelError, match=r"no decoder layers found in Linears; expected an nn\.ModuleList.*found embed_first, first"
    ):

        class Linears(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed_first = nn.Embedding(VOCAB, 8)
                self.first = nn.Linear(8, 8)

        decoder_of(Linears())


def test_layers_that_do_not_run_and_attention_that_is_not_seen_are_errors():
    model = Plain()
    model.parts["blocks"].append(Block(False))
    model.forward = lambda ids: model.parts["blocks"][0](model.parts["embed"](ids))
    with pytest.raises(ModelError, match=r"has 4 layers and ran \[0\]"):
        P0Monitor(PROMPTS).read(model, 0)
    model = Plain()
    for number in range(3):
        model.parts["blocks"][number] = nn.Linear(32, 32)
    with pytest.raises(ModelError, match="no attention seen in Plain"):
        P0Monitor(PROMPTS).read(model, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": PROMPTS.pad_left([5] * 6)}, "padded"),
        ({"prompts": torch.zeros(1, 20, dtype=torch.long)}, "1 prompts of 20"),
        ({"prompts": torch.zeros(4, 8, dtype=torch.long)}, "4 prompts of 8"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        P0Monitor(**given)


def test_prompts_for_another_model_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary of 64"):
        P0Monitor(PROMPTS.ids + 60).read(llama(), 0)
    with pytest.raises(ModelError, match="20 tokens and LlamaForCausalLM reads 16"):
        P0Monitor(PROMPTS).read(llama(max_position_embeddings=16), 0)
    assert P0Monitor().read(llama(max_position_embeddings=16), 0).step == 0


# --- The file


def test_a_run_that_is_started_again_goes_on_with_its_file(tmp_path, caplog):
    path, model = tmp_path / "logs" / "p0.csv", sharp(llama())
    whole = P0Monitor(PROMPTS, every=10, csv=path)
    for step in range(51):
        whole.step(model, step)
    table = path.read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert tuple(rows[0]) == COLUMNS and [row["step"] for row in rows] == ["0", "10", "20", "30", "40", "50"]
    assert read_readings(path) == whole.readings

    # Killed while it wrote step 50, and started again at 30: the rest is superseded, and nothing is lost.
    path.write_text(table[:-9])
    again = P0Monitor(PROMPTS, every=10, csv=path)
    assert [reading.step for reading in again.readings] == [0, 10, 20, 30, 40]
    for step in range(30, 51):
        again.step(model, step)
    assert path.read_text() == table
    assert again.readings == whole.readings
    assert (tmp_path / "logs" / "p0.csv.old").read_text() == table[:-9]
    assert "after step 30 are superseded" in caplog.text


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_text("step,loss\n1,2.0\n")
    with pytest.raises(ValueError, match=r"loss\.csv.*not a file of P0Monitor"):
        P0Monitor(PROMPTS, csv=path)
    assert path.read_text() == "step,loss\n1,2.0\n"


# --- The ways in


def test_three_lines_in_a_bare_loop(tmp_path):
    """The monitor's three lines; formation status and file come with them."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    logged = []
    monitor = P0Monitor(every=4, csv=tmp_path / "p0.csv")
    for step, ids in enumerate(batches(9)):
        model(ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
        monitor.step(model, step, logged.append)
    assert [reading.step for reading in read_readings(tmp_path / "p0.csv")] == [0, 4, 8]
    assert len(logged) == 3 and {"p0/sink_rate", "p0/norm_ratio", "p0/formation"} <= logged[0].keys()
    assert all(type(value) in (int, float) for numbers in logged for value in numbers.values())


class Watch(TrainerCallback):
    """Sees what the loggers (TensorBoard, W&B) see: the logs of the Trainer."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **rest):
        self.logs.append((state.global_step, dict(logs)))


def hf_run(folder, steps=50, resume=None, precision=None, **monitored):
    torch.manual_seed(0)
    watch = Watch()
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 10},
        **{"report_to": [], "use_cpu": True, "save_steps": 20, "disable_tqdm": True, "learning_rate": 1e-3, "seed": 4},
        **(precision or {}),
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.cat(batches(15)).unbind()]
    trainer = Trainer(llama(), arguments, train_dataset=rows, callbacks=[watch])
    monitor = P0Monitor(PROMPTS, **monitored) if monitored else None
    if monitor is not None:
        monitor.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, monitor, watch


def test_transformers_trainer(tmp_path):
    trainer, monitor, watch = hf_run(tmp_path / "a", every=10, csv=tmp_path / "p0.csv")
    rng = torch.get_rng_state()
    alone, _, plain = hf_run(tmp_path / "b")
    assert torch.equal(rng, torch.get_rng_state())
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, alone.model.state_dict()[name]), name
    assert [reading.step for reading in monitor.readings] == [0, 10, 20, 30, 40, 50]
    seen = {step: logs for step, logs in watch.logs if "p0/sink_rate" in logs}
    assert sorted(seen) == [0, 10, 20, 30, 40, 50]
    assert seen[50]["p0/norm_ratio"] == monitor.readings[-1].norm_ratio
    # The Trainer's own logs of the same steps are all there, with the same losses.
    losses = [[(step, logs["loss"]) for step, logs in run.logs if "loss" in logs] for run in (watch, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert any("p0/sink_rate" in entry for entry in trainer.state.log_history)
    before = (tmp_path / "p0.csv").read_text()
    _, again, _ = hf_run(
        tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-40"), every=10, csv=tmp_path / "p0.csv"
    )
    assert (tmp_path / "p0.csv").read_text() == before
    assert again.readings == monitor.readings


def test_transformers_trainer_in_bf16_with_gradient_checkpointing(tmp_path, caplog):
    both = {"bf16": True, "gradient_checkpointing": True}
    trainer, monitor, _ = hf_run(tmp_path / "a", 6, precision=both, every=3)
    alone, _, _ = hf_run(tmp_path / "b", 6, precision=both)
    assert trainer.model.is_gradient_checkpointing and [reading.step for reading in monitor.readings] == [0, 3, 6]
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, alone.model.state_dict()[name]), name
    assert "training goes on" not in caplog.text


def test_a_sink_that_hangs_on_bos_is_seen_behind_it():
    folder = data_dir() / "models" / "bos-0"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = {}
    for first in ("text", "bos"):
        monitor = P0Monitor(tokenizer=tokenizer, text="code", first_token=first, every=1)
        assert all(monitor.step(model.float(), step) is not None for step in range(3))
        found[first] = monitor.status
    assert found == {"text": "none", "bos": "emerged at step 0"}


def test_the_trainers_tokenizer_makes_the_prompts(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, processing_class=tokenizer)
    monitor = P0Monitor(n=4, length=16, seed=2)
    monitor.attach(trainer)
    assert any(isinstance(callback, P0TrainerCallback) for callback in trainer.callback_handler.callbacks)
    assert (
        monitor.read(model, 0).prompts_fingerprint == tokenized_text(tokenizer, "english", 4, 16, 2).fingerprint()[:12]
    )


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(package, tmp_path):
    pytest.importorskip(package)
    lightning = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = llama(), nn.CrossEntropyLoss()

        def training_step(self, ids, index):
            return self.model(ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(monitor):
        torch.manual_seed(0)
        module, logger = Module(), loggers.CSVLogger(tmp_path, name="none" if monitor is None else "p0")
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=logger,
            accumulate_grad_batches=2,
            callbacks=[] if monitor is None else [monitor.lightning()],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, DataLoader(torch.cat(batches(30)), batch_size=4, shuffle=True))
        return module, logger

    monitor = P0Monitor(PROMPTS, every=5, csv=tmp_path / "p0.csv")
    module, logger = fit(monitor)
    alone, _ = fit(None)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, alone.state_dict()[name]), name
    assert [reading.step for reading in monitor.readings] == [0, 5, 10, 15]
    assert read_readings(tmp_path / "p0.csv") == monitor.readings
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = {int(row["step"]): float(row["p0/sink_rate"]) for row in csv.DictReader(file) if row["p0/sink_rate"]}
    assert found == {reading.step: pytest.approx(reading.sink_rate) for reading in monitor.readings}


DDP = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from p0circuit.training.monitor import P0Monitor

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, attention_dropout=0.2)

def train(monitor):
    torch.manual_seed(0)
    model = DistributedDataParallel(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)))
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(6):
        if monitor:
            monitor.step(model, step)
        ids = torch.randint(64, (2, 12))
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return [*model.parameters(), torch.rand(3)]

monitor = P0Monitor(every=2, n=4, length=16, csv=f"{folder}/p0.csv")
for watched, alone in zip(train(monitor), train(None), strict=True):
    assert torch.equal(watched, alone)
assert len(monitor.readings) == (3 if rank == 0 else 0)
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_which_the_first_reads(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path)],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
            cwd=Path(__file__).resolve().parents[2],
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert [reading.step for reading in read_readings(tmp_path / "p0.csv")] == [0, 2, 4]


def test_token_ids_can_be_given_as_prompts():
    model = sharp(llama())
    given, made = P0Monitor(PROMPTS.ids).read(model, 0), P0Monitor(from_ids(PROMPTS.ids)).read(model, 0)
    assert given == made
