"""Every family on every backend computes what `transformers` computes, and its hooks are where their names say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p0circuit.models import ModelError, describe, forward
from p0circuit.models.hook_names import BLOCK_HOOKS
from p0circuit.models.hooks import hook_point
from tests.families import CASES, CONTEXT, FAMILIES, LAYERS, VOCAB

LENGTH = 20
ROTATED = ("attn.hook_rot_q", "attn.hook_rot_k")
HIDDEN = ("mlp.hook_pre", "mlp.hook_post")
NORMED_KEYS = ("qwen3", "olmo2", "qwen3-moe", "olmoe")

cases = pytest.mark.parametrize(("family", "backend"), CASES, ids=[f"{name}-{backend}" for name, backend in CASES])
both = pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.hooked])


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference(family_folder: Callable[[str], Path], ids: Tensor) -> Callable[[str], Any]:
    """What `transformers` itself gives for the ids: logits, streams, attention weights, cached keys and values."""
    from transformers import AutoModelForCausalLM

    outputs: dict[str, Any] = {}

    def output(name: str) -> Any:
        if name not in outputs:
            model = AutoModelForCausalLM.from_pretrained(family_folder(name), attn_implementation="eager")
            projected: list[Tensor] = []
            if name in NORMED_KEYS:
                key_projection = model.get_submodule("model.layers.1.self_attn.k_proj")
                key_projection.register_forward_hook(lambda module, args, output: projected.append(output))
            with torch.no_grad():
                outputs[name] = model(ids, use_cache=True, output_hidden_states=True, output_attentions=True)
            outputs[name].projected_key = projected[0] if projected else None
        return outputs[name]

    return output


@torch.no_grad()
def record(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Every common hook of every block, and the logits."""
    seen: dict[str, Tensor] = {}
    names = [f"blocks.{layer}.{hook}" for layer in range(LAYERS) for hook in BLOCK_HOOKS if has(model, layer, hook)]
    hooks = [(name, lambda activation, hook, name=name: seen.update({name: activation.clone()})) for name in names]
    seen["logits"] = forward(model, ids, mask, hooks=hooks)
    return seen


def has(model: Any, layer: int, hook: str) -> bool:
    try:
        hook_point(model, f"blocks.{layer}.{hook}")
    except ModelError:
        return False
    return True


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance


@cases
def test_logits_are_those_of_transformers(
    family: str, backend: str, family_model: Any, ids: Tensor, reference: Any
) -> None:
    with torch.no_grad():
        logits = forward(family_model(family, backend), ids)
    assert float(reference(family).logits.std()) > 0.5
    assert close(logits, reference(family).logits)


@cases
def test_hooks_show_what_transformers_has(
    family: str, backend: str, family_model: Any, ids: Tensor, reference: Any
) -> None:
    model = family_model(family, backend)
    seen, expected = record(model, ids), reference(family)
    key = "hook_rot_k" if describe(model).positions == "rotary" else "hook_k"
    for layer in range(LAYERS):
        assert close(seen[f"blocks.{layer}.hook_resid_pre"], expected.hidden_states[layer])
        assert close(seen[f"blocks.{layer}.attn.hook_pattern"], expected.attentions[layer])
        # Layers with a window keep only the last keys and values.
        cached = expected.past_key_values.layers[layer]
        kept = cached.keys.shape[2]
        assert kept > 3
        assert close(seen[f"blocks.{layer}.attn.{key}"][:, -kept:], cached.keys.transpose(1, 2))
        assert close(seen[f"blocks.{layer}.attn.hook_v"][:, -kept:], cached.values.transpose(1, 2))


@pytest.mark.parametrize(("family", "backend"), [case for case in CASES if case[0] in NORMED_KEYS])
def test_keys_are_hooked_before_their_norm(
    family: str, backend: str, family_model: Any, ids: Tensor, reference: Any
) -> None:
    seen = record(family_model(family, backend), ids)["blocks.1.attn.hook_k"]
    assert close(seen.flatten(2), reference(family).projected_key)


@cases
def test_the_parts_add_up(family: str, backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model(family, backend)
    info = describe(model)
    seen = record(model, ids)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for layer in range(LAYERS):
        at = {hook: seen.get(f"blocks.{layer}.{hook}") for hook in BLOCK_HOOKS}
        before = at["hook_resid_pre"] + at["hook_attn_out"]
        assert at["hook_resid_mid"] is None or close(at["hook_resid_mid"], before, 1e-5)
        assert close(at["hook_resid_post"], before + at["hook_mlp_out"], 1e-5)
        if layer:
            assert torch.equal(at["hook_resid_pre"], seen[f"blocks.{layer - 1}.hook_resid_post"])

        window = info.window[layer] or LENGTH
        masked = future | torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-window)
        pattern, scores = at["attn.hook_pattern"], at["attn.hook_attn_scores"]
        assert bool((pattern[..., masked] == 0).all()) and bool((pattern[..., ~masked] > 0).all())
        assert bool((scores[..., masked] < -1e30).all())
        assert close(scores.softmax(-1), pattern, 1e-5)
        per_head = info.n_heads // info.n_kv_heads
        values = at["attn.hook_v"].repeat_interleave(per_head, dim=2)
        assert close(torch.einsum("bhqk,bkhd->bqhd", pattern, values), at["attn.hook_z"], 1e-5)
        if info.positions != "alibi":
            rot = "rot_" if info.positions == "rotary" else ""
            keys = at[f"attn.hook_{rot}k"].repeat_interleave(per_head, dim=2)
            products = torch.einsum("bqhd,bkhd->bhqk", at[f"attn.hook_{rot}q"], keys) / info.d_head**0.5
            cap = 3.0 if family == "gemma2" else None
            expected = products if cap is None else cap * (products / cap).tanh()
            assert close(scores[..., ~masked], expected[..., ~masked])


@cases
def test_shapes(family: str, backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model(family, backend)
    info = describe(model)
    seen = record(model, ids)
    of_heads = (2, LENGTH, info.n_heads, info.d_head)
    of_keys = (2, LENGTH, info.n_kv_heads, info.d_head)
    expected = {hook: (2, LENGTH, info.d_model) for hook in BLOCK_HOOKS if "resid" in hook or "_out" in hook}
    expected |= {"attn.hook_q": of_heads, "attn.hook_z": of_heads, "attn.hook_k": of_keys, "attn.hook_v": of_keys}
    expected |= {"attn.hook_rot_q": of_heads, "attn.hook_rot_k": of_keys}
    expected |= {hook: (2, info.n_heads, LENGTH, LENGTH) for hook in ("attn.hook_attn_scores", "attn.hook_pattern")}
    expected |= {hook: (2, LENGTH, info.d_mlp) for hook in HIDDEN}
    for name, activation in seen.items():
        if name != "logits":
            assert tuple(activation.shape) == expected[name.split(".", 2)[2]], name
    assert seen["logits"].shape == (2, LENGTH, VOCAB)


@cases
def test_only_what_a_family_has_not_is_missing(family: str, backend: str, family_model: Any) -> None:
    model = family_model(family, backend)
    info = describe(model)
    missing = {hook for hook in BLOCK_HOOKS if not has(model, 1, hook)}
    expected = set(HIDDEN) if info.experts else set()
    expected |= {"hook_resid_mid"} if info.parallel_blocks else set()
    # SmolLM 3 has the names where it leaves the rotation out: they show what has not been turned.
    turned = info.positions == "rotary" or info.architecture == "SmolLM3ForCausalLM"
    expected |= set() if turned else set(ROTATED)
    assert missing == expected
    for hook, reason in (
        ("hook_resid_mid", "same input"),
        ("attn.hook_rot_k", "not rotary"),
        ("mlp.hook_pre", "experts"),
    ):
        if hook in missing:
            with pytest.raises(ModelError, match=reason):
                forward(model, torch.zeros(1, 2, dtype=torch.long), hooks=[(f"blocks.1.{hook}", lambda a, hook: None)])


@cases
@torch.no_grad()
def test_every_edit_changes_the_output_and_no_edit_changes_nothing(
    family: str, backend: str, family_model: Any, ids: Tensor
) -> None:
    model = family_model(family, backend)
    logits = forward(model, ids)
    names = ["hook_embed", *(f"blocks.1.{hook}" for hook in BLOCK_HOOKS if has(model, 1, hook))]
    for name in names:
        same = forward(model, ids, hooks=[(name, lambda activation, hook: activation.clone())])
        assert torch.equal(same, logits), name
        edited = forward(model, ids, hooks=[(name, nudge)])
        assert float((edited - logits).abs().max()) > 0.02, name
    assert torch.equal(forward(model, ids), logits)


def nudge(activation: Tensor, hook: Any) -> Tensor:
    """Another direction at every place, so that no norm and no softmax cancels it."""
    noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(2))
    return activation + 0.5 * noise


@both
@torch.no_grad()
def test_values_and_edits_mean_the_same_on_both_backends(family: str, family_model: Any, ids: Tensor) -> None:
    hooked, bridge = family_model(family, "hooked"), family_model(family, "bridge")
    ours, theirs = record(hooked, ids), record(bridge, ids)
    assert ours.keys() == theirs.keys()
    for name, activation in ours.items():
        finite = activation.isfinite()
        assert close(activation[finite], theirs[name][finite]), name
        if name != "logits":
            a, b = (forward(model, ids, hooks=[(name, nudge)]) for model in (hooked, bridge))
            assert close(a, b, 3e-4), name


@cases
@torch.no_grad()
def test_a_whole_stream_can_be_put_together_from_its_parts_in_one_token_rows(
    family: str, backend: str, family_model: Any
) -> None:
    """Rows of one token: replace what enters the stream by another token's, and every key becomes that token's."""
    model = family_model(family, backend)
    key = f"attn.hook_{'rot_' if describe(model).positions == 'rotary' else ''}k"
    tokens = torch.arange(VOCAB)[:, None]
    reads = [f"blocks.{layer}.{key}" for layer in range(LAYERS)]
    writes = {
        "attention outputs": ["hook_attn_out", "hook_mlp_out"],
        "heads": ["attn.hook_z", "hook_mlp_out"],
    }

    def keep(store: dict[str, Tensor], names: list[str]) -> list[Any]:
        return [(name, lambda activation, hook, name=name: store.update({name: activation.clone()})) for name in names]

    for parts in writes.values():
        names = ["hook_embed", *(f"blocks.{layer}.{part}" for layer in range(LAYERS) for part in parts)]
        clean: dict[str, Tensor] = {}
        forward(model, tokens, hooks=keep(clean, names + reads), stop_at_layer=LAYERS)
        other = tokens.roll(1, 0)
        hooks = [(name, lambda activation, hook, value=clean[name]: value.roll(1, 0)) for name in names]
        patched: dict[str, Tensor] = {}
        residual = forward(model, tokens, hooks=hooks + keep(patched, reads), stop_at_layer=LAYERS)
        assert close(residual, forward(model, other, stop_at_layer=LAYERS), 1e-5)
        for name in reads:
            assert close(patched[name], clean[name].roll(1, 0), 1e-5), name


@cases
@torch.no_grad()
def test_the_first_position_is_a_row_of_one_token(family: str, backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model(family, backend)
    alone, together = record(model, ids[:, :1]), record(model, ids)
    for layer in range(LAYERS):
        for hook in ("hook_resid_post", "attn.hook_k", "attn.hook_z"):
            name = f"blocks.{layer}.{hook}"
            assert close(alone[name], together[name][:, :1], 1e-5), name


@cases
@torch.no_grad()
def test_a_padded_row_is_the_row_without_padding(family: str, backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model(family, backend)
    pad = 4
    rows = torch.cat([ids.new_zeros(1, pad), ids[:1]], dim=1)
    rows = torch.cat([rows, torch.cat([ids[1:], ids[1:, :pad]], dim=1)])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[0, :pad] = False
    padded, first, second = record(model, rows, mask), record(model, ids[:1]), record(model, rows[1:])
    for name, activation in padded.items():
        assert not bool(activation.isnan().any()), name
        real = activation[:1, ..., pad:, pad:] if "pattern" in name else activation[:1, pad:]
        if "scores" not in name:
            assert close(real, first[name], 1e-5), name
            assert close(activation[1:], second[name], 1e-5), name
    assert bool((padded["blocks.1.attn.hook_pattern"][0, :, pad:, :pad] == 0).all())


@pytest.mark.parametrize(("family", "backend"), [case for case in CASES if case[0] in ("gpt2", "opt")])
def test_a_learned_table_ends(family: str, backend: str, family_model: Any) -> None:
    model = family_model(family, backend)
    assert forward(model, torch.zeros(1, CONTEXT, dtype=torch.long)).shape == (1, CONTEXT, VOCAB)
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens.*learned positions for {CONTEXT}"):
        forward(model, torch.zeros(1, CONTEXT + 1, dtype=torch.long))
