"""Wrap a loaded `transformers` model in a raw TransformerBridge, and make the common hook names mean what they say.

TransformerBridge answers to the names of HookedTransformer, but in some families a name only shows a tensor, or never
fires, so that an edit there changes nothing. `bridge_points` looks at a pass over three tokens and mends:

1. `hook_resid_mid`: the bridge shows the MLP's input; here an edit also reaches the skip connection.
2. `hook_rot_q`, `hook_rot_k` of fused query-key-value projections (GPT-NeoX): they fire after the rotation.
3. `hook_attn_scores`, `hook_pattern` of attention left to `transformers` (OPT): they fire where the tensors are used.
4. What stays broken goes, so that asking for it is an error: `mlp.hook_pre` and `mlp.hook_post` of a mixture of experts
   (the bridge shows the MLP's input and output), names that do not fire, and scores that are none. Where a family's
   own code hides the attention, `hook_pattern` can be read and refuses edits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.models.info import BLOCK_HOOKS, ModelError

_ATTENTION = "p0circuit"
_LOGITS = "logits"


def to_bridge(hf: Any, name: str, tokenizer: Any = None, device: Any = None) -> Any:
    """Wrap a `transformers` model in a TransformerBridge; its weights are shared, not copied.

    `device` is where ids go in, that of the first weight if not given.

    Raises:
        ModelError: for an architecture that TransformerLens has no bridge for, or that has no attention.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(hf).__name__
    try:
        bridge = build_bridge_from_module(
            hf, architecture, hf_config=hf.config, tokenizer=tokenizer, model_name=name, device=device
        )
    except Exception as error:
        raise ModelError(f"TransformerLens cannot bridge {name} ({architecture}): {error!r}") from error
    if not any(hasattr(block, "attn") for block in getattr(bridge, "blocks", ())):
        raise ModelError(f"{name} ({architecture}) has no blocks with attention: there is no sink to look for")
    return bridge.eval()


class HookPoints(NamedTuple):
    """The hook points of a model by name, those that can be read but not edited, and what its blocks return."""

    by_name: dict[str, Any]
    read_only: frozenset[str]
    blocks_return_tuples: bool


def bridge_points(bridge: Any) -> HookPoints:
    """Find the hook points of a bridge, and mend them."""
    layers = range(len(bridge.blocks))
    points = dict(bridge.hook_dict)
    common = {name for hook in BLOCK_HOOKS for name in _of(layers, hook)} & points.keys()
    tuples: list[bool] = []
    handle = bridge.blocks[0].register_forward_hook(lambda *call: tuples.append(isinstance(call[-1], tuple)))
    shown = _look(bridge, {name: points[name] for name in common})
    handle.remove()
    mids = _hook_resid_mid(bridge, points)
    _hook_rotation(bridge, common - shown.keys())
    hidden = set() if _hook_delegated_attention(bridge, shown[_LOGITS]) else set(_of(layers, "attn.hook_attn_scores"))
    read_only = frozenset(_of(layers, "attn.hook_pattern")) if hidden else frozenset()

    points |= mids
    seen = _look(bridge, {name: points[name] for name in common})
    # A block that scales or norms what it adds has no such sum: better no hook than a wrong one.
    right = {name for name in mids if name in seen and _close(shown[name], seen[name])}
    wrong = set(_of(layers, "hook_resid_mid")) - right
    of_experts = {
        name for name in common if ".mlp." in name and points[name].name.endswith(("mlp.hook_in", "mlp.hook_out"))
    }
    gone = (common - seen.keys()) | wrong | of_experts | hidden
    return HookPoints({name: point for name, point in points.items() if name not in gone}, read_only, tuples[0])


def _of(layers: range, hook: str) -> list[str]:
    return [f"blocks.{layer}.{hook}" for layer in layers]


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))


def _look(bridge: Any, points: dict[str, Any]) -> dict[str, Tensor]:
    """What hook points show in a pass over three tokens, for those that fire, and the logits."""
    seen: dict[str, Tensor] = {}

    def note(activation: Tensor, hook: Any, name: str) -> None:
        seen[name] = activation.detach().clone()

    try:
        for name, point in points.items():
            point.add_hook(partial(note, name=name), level=-1)
        with torch.no_grad():
            seen[_LOGITS] = bridge(torch.tensor([[0, 1, 1]], device=bridge.cfg.device), use_cache=False)
    finally:
        for point in points.values():
            point.remove_hooks(level=-1)
    return seen


def _hook_resid_mid(bridge: Any, points: dict[str, Any]) -> dict[str, Any]:
    """New hook points on the stream between attention and MLP whose edits stay in the stream."""
    from transformer_lens.hook_points import HookPoint

    mids = {}
    for layer, block in enumerate(bridge.blocks):
        name = f"blocks.{layer}.hook_resid_mid"
        out = points.get(f"blocks.{layer}.hook_attn_out")
        if name in points and out is not None and out.name.endswith(".hook_out"):
            mids[name] = HookPoint()
            mids[name].name = name
            entered: list[Tensor] = []
            remember, through = partial(_remember, mids[name], entered), partial(_through, mids[name], entered)
            block.original_component.register_forward_pre_hook(remember, with_kwargs=True)
            bridge.get_submodule(out.name.removesuffix(".hook_out")).register_forward_hook(through)
    return mids


def _remember(mid: Any, entered: list[Tensor], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the stream a block starts from, if anyone will ask for it; a pass that broke off leaves nothing behind."""
    entered[:] = [args[0] if args else kwargs["hidden_states"]] if mid.has_hooks() else []


def _through(mid: Any, entered: list[Tensor], module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Send block input + attention output through a hook point, and put what comes back into the attention output."""
    if not entered:
        return None
    before = entered.pop()
    added = output[0] if isinstance(output, tuple) else output
    stream = before + added
    # What the subtraction loses to rounding goes back in: an edit that changes nothing then changes no bit.
    lost = (added - (stream - before)).detach()
    added = mid(stream) - before + lost
    return (added, *output[1:]) if isinstance(output, tuple) else added


def _hook_rotation(bridge: Any, silent: set[str]) -> None:
    """Let silent `hook_rot_q` and `hook_rot_k` fire on what the bridge's own rotation returns."""
    for layer, block in enumerate(bridge.blocks):
        rotate = getattr(getattr(block, "attn", None), "_apply_rotary_pos_emb", None)
        if rotate is not None and f"blocks.{layer}.attn.hook_rot_k" in silent:
            block.attn.__dict__["_apply_rotary_pos_emb"] = partial(_rotate_and_hook, rotate, block.attn)


def _rotate_and_hook(rotate: Any, attention: Any, *args: Any) -> tuple[Tensor, Tensor]:
    query, key = rotate(*args)
    return attention.hook_rot_q(query), attention.hook_rot_k(key)


def _hook_delegated_attention(bridge: Any, logits: Tensor) -> bool:
    """Have attention that the bridge leaves to `transformers` run through `_attention`; False where it will not."""
    from transformer_lens.model_bridge import AttentionBridge
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    attentions = [block.attn for block in bridge.blocks if hasattr(block, "attn")]
    delegated = [attention for attention in attentions if type(attention).forward is AttentionBridge.forward]
    if not delegated:
        return True
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    for attention in delegated:
        for module in attention.original_component.modules():
            # Past nn.Module's bookkeeping: the wrapper must not become a part of what it wraps.
            module.__dict__["hooks_around"] = attention
    bridge.original_model.set_attn_implementation(_ATTENTION)
    scores = {str(place): attention.hook_attn_scores for place, attention in enumerate(delegated)}
    seen = _look(bridge, scores)
    # Only true scores are far below zero at masked keys; the bridge's own are a second look at the pattern.
    reached = all(place in seen and float(seen[place].min()) < -1e3 for place in scores)
    if reached and _close(logits, seen[_LOGITS]):
        return True
    bridge.original_model.set_attn_implementation("eager")
    return False


def _attention(
    module: Any,
    query: Float[Tensor, "batch heads pos d_head"],
    key: Float[Tensor, "batch n_kv_heads pos d_head"],
    value: Float[Tensor, "batch n_kv_heads pos d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos heads d_head"], None]:
    """Eager attention as `transformers` computes it, with the hooks of the bridge around it."""
    around = getattr(module, "hooks_around", None)

    def hook(name: str, tensor: Tensor) -> Tensor:
        return getattr(around, name)(tensor) if hasattr(around, name) else tensor

    query, key = hook("hook_rot_q", query), hook("hook_rot_k", key)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    scores = hook("hook_attn_scores", scores)
    pattern = hook("hook_pattern", torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
    # No weights are handed back: the bridge would fire its hooks on them a second time, to no effect.
    return (pattern @ value).transpose(1, 2).contiguous(), None
