"""Streaming in one pass, against decoding token by token with a cache whose places are counted anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p0circuit.interventions.nodes import InterventionError
from p0circuit.interventions.sliding_window import _check_form, _rotation, cache_of, rotations, streamed
from p0circuit.models import forward, load_model
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording.quantities import TOKEN_LOSSES
from p0circuit.recording.record import record
from tests.families import VOCAB, build

T, WINDOW = 18, 6
KEPT = [(), (0,), (0, 1, 2, 3), (1, 2, 3), (5,), (9, 2)]
THETA = 500.0


def rotate(vector: Tensor, place: int, frequencies: Tensor) -> Tensor:
    """Pairs of channels `half` apart, turned by their angle at a place; channels beyond stay."""
    half, angle = len(frequencies), place * frequencies
    x, y, rest = vector[..., :half], vector[..., half : 2 * half], vector[..., 2 * half :]
    return torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos(), rest], dim=-1)


def norm(module: Any, x: Tensor) -> Tensor:
    """A norm in the precision of `x`: those of `transformers` compute in float32."""
    if hasattr(module, "variance_epsilon"):
        return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module(x)


class Decoder:
    """A `transformers` model read module by module: what a layer makes of one token, and where its heads write."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.kind = hf, type(hf).__name__
        config = hf.config
        self.heads = config.num_attention_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers = {
            "GPT2LMHeadModel": lambda: hf.transformer.h,
            "GPTNeoXForCausalLM": lambda: hf.gpt_neox.layers,
        }.get(self.kind, lambda: hf.model.layers)()
        rope = getattr(config, "rope_parameters", None) or {}
        turned = int(self.size * rope.get("partial_rotary_factor", 1))
        self.frequencies = (
            None if self.kind == "GPT2LMHeadModel" else THETA ** -(torch.arange(0, turned, 2).double() / turned)
        )
        if rope.get("rope_type") == "llama3":
            self.frequencies = hf.model.rotary_emb.inv_freq.double()

    def embed(self, token: Tensor, t: int) -> Tensor:
        if self.kind == "GPT2LMHeadModel":
            return self.hf.transformer.wte(token) + self.hf.transformer.wpe(torch.tensor(t))
        return self.hf.get_input_embeddings()(token)

    def project(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of one token, [head, size], before any rotation."""
        if self.kind == "GPT2LMHeadModel":
            q, k, v = layer.attn.c_attn(layer.ln_1(x)[None])[0].view(3, self.heads, self.size)
            return q, k, v
        if self.kind == "GPTNeoXForCausalLM":
            parts = layer.attention.query_key_value(layer.input_layernorm(x)).view(self.heads, 3, self.size)
            return parts[:, 0], parts[:, 1], parts[:, 2]
        attention, read = layer.self_attn, norm(layer.input_layernorm, x)
        q, k, v = (getattr(attention, f"{name}_proj")(read).view(-1, self.size) for name in "qkv")
        return (norm(attention.q_norm, q), norm(attention.k_norm, k), v) if hasattr(attention, "q_norm") else (q, k, v)

    def finish(self, layer: Any, x: Tensor, z: Tensor) -> Tensor:
        """The stream after a block whose heads have read `z`, [head, size]."""
        z = z.flatten()
        if self.kind == "GPT2LMHeadModel":
            x = x + layer.attn.c_proj(z[None])[0]
            return x + layer.mlp(layer.ln_2(x)[None])[0]
        if self.kind == "GPTNeoXForCausalLM":
            return x + layer.attention.dense(z) + layer.mlp(layer.post_attention_layernorm(x))
        x = x + layer.self_attn.o_proj(z)
        return x + layer.mlp(norm(layer.post_attention_layernorm, x))

    def logits(self, x: Tensor) -> Tensor:
        norms = {"GPT2LMHeadModel": "transformer.ln_f", "GPTNeoXForCausalLM": "gpt_neox.final_layer_norm"}
        return self.hf.get_output_embeddings()(norm(self.hf.get_submodule(norms.get(self.kind, "model.norm")), x))


@torch.no_grad()
def decode(hf: Any, ids: Tensor, kept: tuple[int, ...], window: int) -> Tensor:
    """The logits of every token, made one after the other with a cache in each layer."""
    model, found = Decoder(hf), []
    caches: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in model.layers]
    for t, token in enumerate(ids):
        x = model.embed(token, t)
        for layer, cache in zip(model.layers, caches, strict=True):
            query, key, value = model.project(layer, x)
            cache.append((t, key, value))
            cache[:] = [entry for entry in cache if entry[0] > t - window or entry[0] in kept]
            keys, values = torch.stack([k for _, k, _ in cache]), torch.stack([v for *_, v in cache])
            if model.frequencies is not None:
                query = rotate(query, len(cache) - 1, model.frequencies)
                keys = torch.stack([rotate(k, place, model.frequencies) for place, k in enumerate(keys)])
            z = torch.zeros_like(query)
            for head in range(model.heads):
                group = head * len(key) // model.heads
                scores = keys[:, group] @ query[head] / model.size**0.5
                z[head] = scores.softmax(0) @ values[:, group]
            x = model.finish(layer, x, z)
        found.append(model.logits(x))
    return torch.stack(found)


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return random_tokens(VOCAB, 2, T, seed=4)


def in_one_pass(model: Any, prompts: PromptSet, kept: tuple[int, ...], window: int = WINDOW) -> Tensor:
    with torch.no_grad(), streamed(model, prompts, kept, window):
        return forward(model, prompts.ids)


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox", "gpt2"])
def test_token_by_token_to_the_last_digit(name: str, family_folder: Callable[[str], Path], prompts: PromptSet) -> None:
    if not has_hooked_transformer():
        pytest.skip("HookedTransformer left TransformerLens with version 4")
    model, hf = load_model(family_folder(name), backend="hooked", dtype=torch.float64), build(name).double()
    for kept in ((), (0, 1, 2, 3), (9, 2)):
        expected = decode(hf, prompts.ids[0], kept, WINDOW)
        torch.testing.assert_close(in_one_pass(model, prompts, kept)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "case", [("llama-grouped", "hooked"), ("llama-grouped", "bridge"), ("qwen3", "bridge"), ("neox", "bridge")]
)
def test_token_by_token_in_single_precision(
    case: tuple[str, str], family_model: Callable[[str, str], Any], prompts: PromptSet
) -> None:
    model, hf = family_model(*case), build(case[0]).double()
    for kept in ((0,), (1, 2, 3)):
        expected = decode(hf, prompts.ids[1], kept, WINDOW)
        torch.testing.assert_close(in_one_pass(model, prompts, kept)[1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [("opt", "bridge"), ("olmoe", "bridge"), ("smollm3-nope", "bridge"), ("gpt2", "bridge")]
)
def test_other_families_forget_what_fell_out(
    case: tuple[str, str], family_model: Callable[[str, str], Any], prompts: PromptSet
) -> None:
    """With three layers a token reaches three windows on; kept, it reaches everything."""
    model, layers = family_model(*case), 3
    other = random_tokens(VOCAB, 2, T, seed=5)
    changed = PromptSet(torch.cat([other.ids[:, :1], prompts.ids[:, 1:]], 1), prompts.attention_mask, {})
    reach = layers * (3 - 1) + 1
    forgotten = in_one_pass(model, changed, (), 3) - in_one_pass(model, prompts, (), 3)
    assert float(forgotten[:, 0].abs().max()) > 1e-2 and float(forgotten[:, reach:].abs().max()) == 0
    remembered = in_one_pass(model, changed, (0,), 3) - in_one_pass(model, prompts, (0,), 3)
    assert float(remembered[:, reach:].abs().amax(-1).min()) > 1e-5


def test_a_window_over_the_whole_row_changes_nothing(
    family_model: Callable[[str, str], Any], prompts: PromptSet
) -> None:
    model = family_model("llama-grouped", "bridge")
    clean = forward(model, prompts.ids)
    for kept in ((), (0,), (7,)):
        assert torch.equal(in_one_pass(model, prompts, kept, T), clean)
    # What is nearer by nothing is where it was: at this query the cache has dropped nobody yet.
    almost = in_one_pass(model, prompts, (0,), T - 1)
    torch.testing.assert_close(almost, clean, rtol=1e-5, atol=1e-5)


def test_batches_of_any_size(family_model: Callable[[str, str], Any], prompts: PromptSet) -> None:
    model = family_model("qwen3", "bridge")
    change = streamed(model, prompts, (0, 1), WINDOW)
    one, all_of_them = (record(model, prompts, TOKEN_LOSSES, size, interventions=[change]) for size in (1, 2))
    torch.testing.assert_close(one, all_of_them, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", KEPT)
def test_the_cache_by_simulation(kept: tuple[int, ...]) -> None:
    cache = cache_of(T, WINDOW, kept)
    held: list[int] = []
    for query in range(T):
        held = [key for key in [*held, query] if key > query - WINDOW or key in kept]
        assert [key for key in range(query + 1) if cache.visible[query, key]] == held
        assert cache.query_position[query] == len(held) - 1
        for rank, key in enumerate(cache.sinks):
            assert bool(cache.outside[query, rank]) == (key <= query - WINDOW)
            if cache.outside[query, rank]:
                assert held.index(key) == rank


@pytest.mark.parametrize(
    ("case", "turned"), [(("llama", "bridge"), 8), (("neox", "bridge"), 4), (("qwen3", "bridge"), 12)]
)
def test_measured_rotations(case: tuple[str, str], turned: int, family_model: Callable[[str, str], Any]) -> None:
    found = rotations(family_model(*case), T)
    assert len(found) == 3
    frequencies = THETA ** -(torch.arange(0, turned, 2) / turned)
    angles = torch.arange(T)[:, None] * frequencies
    for rotation in found:
        assert rotation.first.tolist() == list(range(turned // 2))
        assert rotation.second.tolist() == list(range(turned // 2, turned))
        torch.testing.assert_close(rotation.cos, angles.cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(rotation.sin, angles.sin(), rtol=0, atol=1e-5)


def test_neighbouring_pairs_are_found_and_turned_back() -> None:
    """GPT-J's way: channels 0 and 1, 2 and 3; the last two of six are not turned."""
    vectors = torch.randn(3, 1, 6, dtype=torch.float64)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3])
    turned = vectors.repeat(1, 5, 1)
    x, y = vectors[..., 0:4:2], vectors[..., 1:4:2]
    turned[..., 0:4:2], turned[..., 1:4:2] = x * angles.cos() - y * angles.sin(), x * angles.sin() + y * angles.cos()
    rotation = _rotation(turned, "here")
    back = rotation.rotate_back(turned[:, :, None], torch.arange(5))[:, :, 0]
    torch.testing.assert_close(back, vectors.expand_as(back), rtol=0, atol=1e-12)


def test_a_pair_of_channels_that_is_always_zero_turns_nothing() -> None:
    """As in Gemma 3, some of whose norms before the rotation have gains of zero."""
    vectors = torch.randn(3, 1, 6, dtype=torch.float64)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    vectors[..., [1, 4]] = 0
    x, y = vectors[..., :3], vectors[..., 3:]
    turned = torch.cat([x * angles.cos() - y * angles.sin(), x * angles.sin() + y * angles.cos()], dim=-1)
    rotation = _rotation(turned, "here")
    assert bool(rotation.cos.isfinite().all()) and bool(rotation.sin.isfinite().all())
    back = rotation.rotate_back(turned[:, :, None], torch.arange(5))[:, :, 0]
    torch.testing.assert_close(back, vectors.expand_as(back), rtol=0, atol=1e-12)


def test_what_does_not_turn_by_pairs_is_refused() -> None:
    with pytest.raises(InterventionError, match="block 7 does not turn its keys by pairs of channels"):
        _rotation(torch.randn(4, 5, 6), "block 7")
    with pytest.raises(InterventionError, match="scores of block 2 are not those of its queries and keys"):
        _check_form(torch.ones(3), torch.tensor([1.0, 1.0, 1.1]), 2)


def test_refusals_say_why(family_model: Callable[[str, str], Any], prompts: PromptSet) -> None:
    llama = family_model("llama", "bridge")
    for name, words in {
        "bloom": "ALiBi",
        "mistral": "windows of its own, of 6 tokens",
        "gemma2": "of 5 tokens",
    }.items():
        with pytest.raises(InterventionError, match=words):
            streamed(family_model(name, "bridge"), prompts, (0,), WINDOW)
    with pytest.raises(InterventionError, match="padded"):
        streamed(llama, prompts.pad_left(seed=1), (0,), WINDOW)
    with pytest.raises(InterventionError, match="window = 0"):
        streamed(llama, prompts, (0,), 0)
    for kept in ((0, 0), (-1,), (T,)):
        with pytest.raises(InterventionError, match=f"0 to {T - 1}, got"):
            streamed(llama, prompts, kept, WINDOW)
