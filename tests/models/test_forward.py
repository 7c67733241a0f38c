"""`forward` and `resume`: checks, hooks, layers to start from and stop at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from p0circuit.models import ModelError, describe, forward, load_model, resume
from p0circuit.models.forward import _check_ids, _checked_mask
from p0circuit.models.hooks import hook_point, hooked
from tests.families import CASES, LAYERS, VOCAB, Family, write

cases = pytest.mark.parametrize(("family", "backend"), CASES, ids=[f"{name}-{backend}" for name, backend in CASES])
backends = pytest.mark.parametrize("backend", ["hooked", "bridge"])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, 12))


@cases
@torch.no_grad()
def test_stopping_and_resuming_gives_the_same_bits(family: str, backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model(family, backend)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    for attention_mask in (None, mask):
        logits, streams = streams_of(model, ids, attention_mask)
        for layer in range(LAYERS + 1):
            residual = forward(model, ids, attention_mask, stop_at_layer=layer)
            assert torch.equal(residual, streams[layer])
            assert torch.equal(resume(model, residual, layer, attention_mask), logits)
            for stop in range(layer, LAYERS + 1):
                assert torch.equal(resume(model, residual, layer, attention_mask, stop_at_layer=stop), streams[stop])


def streams_of(model: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the stream before every block and after the last."""
    streams: list[Tensor] = []
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)), f"blocks.{LAYERS - 1}.hook_resid_post"]
    hooks = [(name, lambda activation, hook: streams.append(activation.clone())) for name in names]
    return forward(model, ids, mask, hooks=hooks), streams


@cases
@torch.no_grad()
def test_resuming_from_an_edited_stream_is_editing_it(
    family: str, backend: str, family_model: Any, ids: Tensor
) -> None:
    model = family_model(family, backend)
    noise = torch.randn(2, 12, 32)
    for layer in range(LAYERS):
        name = f"blocks.{layer}.hook_resid_pre"
        edited = forward(model, ids, hooks=[(name, lambda activation, hook: activation + noise)])
        residual = forward(model, ids, stop_at_layer=layer)
        assert torch.equal(resume(model, residual + noise, layer), edited)
        through_hook = resume(model, residual, layer, hooks=[(name, lambda activation, hook: activation + noise)])
        assert torch.equal(through_hook, edited)


@backends
@torch.no_grad()
def test_hooks_fire_only_on_what_runs(backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model("llama", backend)
    fired: list[str] = []
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_{end}" for layer in range(LAYERS) for end in ("pre", "post"))]
    names.append("ln_final.hook_normalized")
    hooks = [(name, lambda activation, hook, name=name: fired.append(name)) for name in names]
    forward(model, ids, hooks=hooks, stop_at_layer=1)
    assert fired == names[:3]
    fired.clear()
    resume(model, torch.randn(2, 12, 32), 1, hooks=hooks)
    assert fired == names[3:]
    fired.clear()
    resume(model, torch.randn(2, 12, 32), 1, hooks=hooks, stop_at_layer=2)
    assert fired == names[3:5]
    fired.clear()
    forward(model, ids, hooks=hooks)
    assert fired == names


@backends
@torch.no_grad()
def test_several_hooks_on_one_point_run_in_order(backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model("llama", backend)
    name = "blocks.1.hook_resid_mid"
    seen: list[Tensor] = []
    forward(
        model,
        ids,
        hooks=[
            (name, lambda activation, hook: torch.zeros_like(activation)),
            (name, lambda activation, hook: seen.append(activation)),
        ],
    )
    assert bool((seen[0] == 0).all())


@cases
@torch.no_grad()
def test_an_exception_in_a_hook_leaves_nothing_behind(
    family: str, backend: str, family_model: Any, ids: Tensor
) -> None:
    model = family_model(family, backend)
    logits = forward(model, ids)
    theirs = []
    point = hook_point(model, "blocks.0.hook_resid_pre")
    point.add_hook(lambda activation, hook: theirs.append(hook.name))

    def fail(activation: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    try:
        before = counts(model)
        for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_k", "blocks.1.attn.hook_pattern"):
            hooks = [("blocks.0.attn.hook_v", lambda activation, hook: activation * 0), (name, fail)]
            for run in (forward, lambda *args, **kwargs: resume(model, torch.randn(2, 12, 32), 1, **kwargs)):
                with pytest.raises(ZeroDivisionError):
                    run(model, ids, hooks=hooks)
                assert counts(model) == before
        with pytest.raises(ModelError):
            forward(model, ids, hooks=[("blocks.0.attn.hook_v", fail), ("blocks.0.no_such_hook", fail)])
        assert counts(model) == before
        assert not any("forward" in block.__dict__ for block in model.blocks)
        assert theirs
    finally:
        point.remove_hooks()
    assert torch.equal(forward(model, ids), logits)


def counts(model: Any) -> dict[str, int]:
    return {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}


@backends
@torch.no_grad()
def test_hooks_of_a_with_end_with_it(backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model("gpt2", backend)
    logits = forward(model, ids)
    with hooked(model, [("blocks.0.hook_attn_out", lambda activation, hook: activation * 0)]):
        assert not torch.equal(forward(model, ids), logits)
    assert torch.equal(forward(model, ids), logits)


@pytest.mark.parametrize(
    ("family", "backend"), [case for case in CASES if case[0] in ("gpt2", "llama", "olmo2", "bloom", "gemma2")]
)
def test_gradients_run_through_the_stream_between_attention_and_mlp(
    family: str, backend: str, family_model: Any, ids: Tensor
) -> None:
    """Adding to the attention output is adding to that stream: the slopes agree, read off an edit or off a gradient."""
    model = family_model(family, backend)
    weights, direction = torch.randn(12, VOCAB), torch.randn(2, 12, 32)

    def slope(name: str) -> float:
        step = torch.zeros((), requires_grad=True)
        logits = forward(model, ids, hooks=[(name, lambda activation, hook: activation + step * direction)])
        return float(torch.autograd.grad((logits * weights).sum(), step)[0])

    kept: list[Tensor] = []
    logits = forward(model, ids, hooks=[("blocks.1.hook_resid_mid", lambda activation, hook: kept.append(activation))])
    (gradient,) = torch.autograd.grad((logits * weights).sum(), kept)
    expected = pytest.approx(slope("blocks.1.hook_attn_out"), rel=1e-4)
    assert slope("blocks.1.hook_resid_mid") == expected
    assert float((gradient * direction).sum()) == expected


@backends
def test_what_cannot_be_run(backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model("gpt2", backend)
    mask = torch.ones_like(ids)
    with pytest.raises(ModelError, match=r"0\.\.95 \(gpt2\), got 0\.\.96"):
        forward(model, torch.tensor([[0, VOCAB]]))
    with pytest.raises(ModelError, match=r"got -1\.\.3"):
        forward(model, torch.tensor([[-1, 3]]))
    for wrong in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ModelError, match=r"integer token ids of shape \[batch, pos\], got"):
            _check_ids(wrong, describe(model))
    for run in (
        lambda: forward(model, torch.zeros(1, 65, dtype=torch.long)),
        lambda: resume(model, torch.zeros(1, 65, 32), 1),
    ):
        with pytest.raises(ModelError, match="65 tokens, but gpt2 has learned positions for 64"):
            run()
    with pytest.raises(ModelError, match="row 1 of the attention mask has no real token"):
        forward(model, ids, mask * torch.tensor([[1], [0]]))
    with pytest.raises(ModelError, match="must hold 1"):
        forward(model, ids, mask * 2)
    with pytest.raises(ModelError, match=r"attention mask has shape \[2, 3\], the input"):
        _checked_mask(mask[:, :3], (2, 12), model)
    with pytest.raises(ModelError, match=r"residual of shape \[batch, pos, 32\], got \[2, 12, 31\]"):
        resume(model, torch.randn(2, 12, 31), 0)
    for stop in (-1, 4):
        with pytest.raises(ModelError, match=rf"stop_at_layer must lie in 0\.\.3, got {stop}"):
            forward(model, ids, stop_at_layer=stop)
    with pytest.raises(ModelError, match=r"start_at_layer must lie in 0\.\.3, got 4"):
        resume(model, torch.randn(2, 12, 32), 4)
    with pytest.raises(ModelError, match=r"stop_at_layer must lie in 2\.\.3, got 1"):
        resume(model, torch.randn(2, 12, 32), 2, stop_at_layer=1)


@backends
def test_hooks_that_are_not_there(backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model("gpt2", backend)
    for name, reason in (
        ("blocks.1.attn.hook_keys", "did you mean blocks.1.attn.hook_"),
        ("blocks.3.attn.hook_k", "blocks 0 to 2"),
        ("blocks.x.attn.hook_k", "did you mean"),
        ("blocks.1.attn.hook_rot_k", "positions are learned, not rotary"),
        ("blocks.1.attn.hook_result", r"call model.set_use_attn_result\(True\)"),
    ):
        for stop in (None, 1):
            with pytest.raises(ModelError, match=reason):
                forward(model, ids, hooks=[(name, lambda activation, hook: None)], stop_at_layer=stop)


@backends
def test_training_mode(backend: str, family_model: Any, ids: Tensor) -> None:
    model = family_model("gpt2", backend)
    model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            forward(model, ids)
        with pytest.raises(ModelError, match="training mode"):
            resume(model, torch.randn(2, 12, 32), 0)
    finally:
        model.eval()
    forward(model, ids)


@torch.no_grad()
def test_a_tokenizer_that_pads_on_the_left_masks_nothing(family_model: Any, ids: Tensor) -> None:
    """HookedTransformer would take leading pad ids for padding, mask or no mask."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = family_model("llama", "hooked")
    ids[:, :2] = 0
    logits = forward(model, ids)
    words = Tokenizer(models.WordLevel({str(word): word for word in range(VOCAB)}, unk_token="1"))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", padding_side="left")
    try:
        assert torch.equal(forward(model, ids), logits)
    finally:
        model.tokenizer = None


@torch.no_grad()
def test_attention_that_its_family_hides_can_only_be_read(tmp_path: Any, ids: Tensor) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    family = Family(
        "GPTNeoConfig", {**shape, "attention_types": [[["global"], 2]], "bos_token_id": 0, "eos_token_id": 0}
    )
    model = load_model(write(family, tmp_path / "neo"), device="cpu")
    patterns: list[Tensor] = []
    forward(model, ids, hooks=[("blocks.0.attn.hook_pattern", lambda activation, hook: patterns.append(activation))])
    assert torch.allclose(patterns[0].sum(-1), torch.ones(2, 4, 12))
    with pytest.raises(ModelError, match="can be read but not edited: GPTNeoForCausalLM"):
        forward(model, ids, hooks=[("blocks.0.attn.hook_pattern", lambda activation, hook: activation)])
    with pytest.raises(ModelError, match="does not reach it in GPTNeoForCausalLM"):
        forward(model, ids, hooks=[("blocks.0.attn.hook_attn_scores", lambda activation, hook: None)])
