"""Make the common hook names of a TransformerBridge mean what they say.

TransformerBridge has the hook names of HookedTransformer, but in some families a hook point only sees a copy of the
tensor, or never fires, so that an edit there changes nothing. `bridge_hook_points` runs three tokens and repairs:

1. `hook_resid_mid`: the bridge places it at the MLP's input; here an edit also reaches the skip connection.
2. `hook_rot_q`, `hook_rot_k` of fused query-key-value projections (GPT-NeoX): they fire after the rotation.
3. `hook_attn_scores`, `hook_pattern` of attention that `transformers` computes (OPT): they fire where the tensors are
   used.
4. What cannot be repaired is removed, so that asking for it is an error: `mlp.hook_pre` and `mlp.hook_post` of a
   mixture of experts (the bridge places them at the MLP's input and output), names that do not fire, and scores that
   are not scores. Where a family's own code computes the attention, `hook_pattern` can be read but not edited.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from p0circuit.hooked_model import HookedModel
from p0circuit.models.hook_names import BLOCK_HOOKS

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

_ATTENTION = "p0circuit"
_LOGITS = "logits"


class HookPoints(NamedTuple):
    """The hook points of a model.

    Attributes:
        by_name: hook point by name.
        read_only: names whose activations can be read but not edited.
        blocks_return_tuples: whether a block returns a tuple and not the stream itself.
    """

    by_name: dict[str, HookPoint]
    read_only: frozenset[str]
    blocks_return_tuples: bool


def bridge_hook_points(bridge: HookedModel) -> HookPoints:
    """Find the hook points of a bridge, and repair them; called once per bridge.

    Args:
        bridge: a TransformerBridge, which is changed in place.
    """
    layers = range(len(bridge.blocks))
    points = dict(bridge.hook_dict)
    common = {name for hook in BLOCK_HOOKS for name in _in_all_layers(layers, hook)} & points.keys()
    tuples: list[bool] = []
    handle = bridge.blocks[0].register_forward_hook(lambda *call: tuples.append(isinstance(call[-1], tuple)))
    original = _activations(bridge, {name: points[name] for name in common})
    handle.remove()
    mids = _add_resid_mid(bridge, points)
    _hook_rotation(bridge, common - original.keys())
    hooked = _hook_delegated_attention(bridge, original[_LOGITS])
    without_scores = set() if hooked else set(_in_all_layers(layers, "attn.hook_attn_scores"))
    read_only = frozenset() if hooked else frozenset(_in_all_layers(layers, "attn.hook_pattern"))

    points |= mids
    repaired = _activations(bridge, {name: points[name] for name in common})
    # A block that scales or norms what it adds has no such sum: no hook point is better than a wrong one.
    right = {name for name in mids if name in repaired and _close(original[name], repaired[name])}
    wrong = set(_in_all_layers(layers, "hook_resid_mid")) - right
    of_experts = {
        name for name in common if ".mlp." in name and points[name].name.endswith(("mlp.hook_in", "mlp.hook_out"))
    }
    removed = (common - repaired.keys()) | wrong | of_experts | without_scores
    by_name = {name: point for name, point in points.items() if name not in removed}
    return HookPoints(by_name, read_only, tuples[0])


def _in_all_layers(layers: range, hook: str) -> list[str]:
    return [f"blocks.{layer}.{hook}" for layer in layers]


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))


def _activations(bridge: HookedModel, points: dict[str, HookPoint]) -> dict[str, Tensor]:
    """The activations at those hook points that fire in a pass over three tokens, and the logits."""
    activations: dict[str, Tensor] = {}

    def store(activation: Tensor, hook: HookPoint, name: str) -> None:
        activations[name] = activation.detach().clone()

    try:
        for name, point in points.items():
            point.add_hook(cast(Any, partial(store, name=name)), level=-1)
        with torch.no_grad():
            activations[_LOGITS] = bridge(torch.tensor([[0, 1, 1]], device=bridge.cfg.device), use_cache=False)
    finally:
        for point in points.values():
            point.remove_hooks(level=-1)
    return activations


def _add_resid_mid(bridge: HookedModel, points: dict[str, HookPoint]) -> dict[str, HookPoint]:
    """New hook points on the stream between attention and MLP, whose edits stay in the stream."""
    from transformer_lens.hook_points import HookPoint

    module: Any = bridge
    mids = {}
    for layer, block in enumerate(bridge.blocks):
        name = f"blocks.{layer}.hook_resid_mid"
        out = points.get(f"blocks.{layer}.hook_attn_out")
        if name in points and out is not None and out.name is not None and out.name.endswith(".hook_out"):
            mids[name] = HookPoint()
            mids[name].name = name
            block_input: list[Tensor] = []
            store, add = (
                partial(_store_block_input, mids[name], block_input),
                partial(_hook_sum, mids[name], block_input),
            )
            block.original_component.register_forward_pre_hook(store, with_kwargs=True)
            module.get_submodule(out.name.removesuffix(".hook_out")).register_forward_hook(add)
    return mids


def _store_block_input(
    mid: HookPoint, block_input: list[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Store the stream that a block reads if the hook point is used; overwrites what an interrupted pass left."""
    block_input[:] = [args[0] if args else kwargs["hidden_states"]] if mid.has_hooks() else []


def _hook_sum(
    mid: HookPoint,
    block_input: list[Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor | tuple[Any, ...],
) -> object:
    """Hook the sum of block input and attention output, and return the attention output that gives the hooked sum."""
    if not block_input:
        return None
    before = block_input.pop()
    added = output[0] if isinstance(output, tuple) else output
    stream = before + added
    # The rounding error of the subtraction is added again: an edit that changes nothing then changes no bit.
    rounding = (added - (stream - before)).detach()
    added = mid(stream) - before + rounding
    return (added, *output[1:]) if isinstance(output, tuple) else added


def _hook_rotation(bridge: HookedModel, silent: set[str]) -> None:
    """Make silent `hook_rot_q` and `hook_rot_k` fire on what the bridge's own rotation returns."""
    for layer, block in enumerate(bridge.blocks):
        rotate = getattr(getattr(block, "attn", None), "_apply_rotary_pos_emb", None)
        if rotate is not None and f"blocks.{layer}.attn.hook_rot_k" in silent:
            hooked = partial(_rotate_and_hook, rotate, block.attn.hook_rot_q, block.attn.hook_rot_k)
            block.attn.__dict__["_apply_rotary_pos_emb"] = hooked


def _rotate_and_hook(
    rotate: Callable[..., tuple[Tensor, Tensor]], hook_rot_q: HookPoint, hook_rot_k: HookPoint, *args: object
) -> tuple[Tensor, Tensor]:
    query, key = rotate(*args)
    return hook_rot_q(query), hook_rot_k(key)


def _hook_delegated_attention(bridge: HookedModel, logits: Tensor) -> bool:
    """Make attention that `transformers` computes run through `_attention`; return False where that is not possible."""
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
    wrapper: Any = bridge
    wrapper.original_model.set_attn_implementation(_ATTENTION)
    points = {str(number): attention.hook_attn_scores for number, attention in enumerate(delegated)}
    scores = _activations(bridge, points)
    # Only true scores are far below zero at masked keys; the bridge's own hook point sees the pattern again.
    hooked = all(number in scores and float(scores[number].min()) < -1e3 for number in points)
    if hooked and _close(logits, scores[_LOGITS]):
        return True
    wrapper.original_model.set_attn_implementation("eager")
    return False


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads pos d_head"],
    key: Float[Tensor, "batch n_kv_heads pos d_head"],
    value: Float[Tensor, "batch n_kv_heads pos d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Float[Tensor, "batch pos heads d_head"], None]:
    """Eager attention as `transformers` computes it, with the hooks of the bridge around it."""
    attention = getattr(module, "hooks_around", None)

    def hook(name: str, tensor: Tensor) -> Tensor:
        return getattr(attention, name)(tensor) if hasattr(attention, name) else tensor

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
    # No pattern is returned: the bridge would fire its hooks on it a second time, to no effect.
    return (pattern @ value).transpose(1, 2).contiguous(), None
