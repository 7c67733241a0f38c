"""Find the hook points of a model by their common names, and put hooks on them for a while."""

from __future__ import annotations

import contextlib
import difflib
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models.bridge_hooks import HookPoints, bridge_hook_points
from p0circuit.models.errors import ModelError
from p0circuit.models.hook_names import BLOCK_HOOKS, layer_of
from p0circuit.models.info import backend_of, describe

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

Hook = tuple[str, Callable[..., Any]]
"""The name of a hook point and a function `f(activation, hook)`; what it returns, unless None, replaces the activation.
"""

_POINTS: weakref.WeakKeyDictionary[HookedModel, HookPoints] = weakref.WeakKeyDictionary()

# Hook points that TransformerLens computes only on request -> the flag that requests them.
_SWITCHED = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


@contextlib.contextmanager
def hooked(model: HookedModel, hooks: Sequence[Hook]) -> Iterator[None]:
    """Put hooks on a model inside a `with`; on leaving, exactly these are removed, also after an exception.

    Args:
        model: a hooked model.
        hooks: pairs of a hook point's name and a function.

    Raises:
        ModelError: the model has no hook point of that name.

    Example:
        ```python
        with hooked(model, [("blocks.0.attn.hook_z", lambda z, hook: 0 * z)]):
            logits = forward(model, prompts.ids)
        ```
    """
    pairs = [(hook_point(model, name), _guarded(model, name, function)) for name, function in hooks]
    added = []
    try:
        for point, function in pairs:
            point.add_hook(function)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def hook_point(model: HookedModel, name: str) -> HookPoint:
    """Return the hook point of a name.

    Args:
        model: a hooked model.
        name: one of the common names (see `p0circuit.models`), or any name that the backend itself knows.

    Raises:
        ModelError: the model has no such hook point, or it would not fire; the message gives the reason.
    """
    points = hook_points(model).by_name
    if name not in points:
        raise ModelError(f"{describe(model).name} has no hook point {name!r}{_why_missing(model, name)}")
    flag = _SWITCHED.get(name.split(".")[-1])
    if flag and not getattr(model.cfg, flag, False):
        raise ModelError(f"the hook point {name!r} is off; call model.set_{flag}(True) first")
    return points[name]


def hook_points(model: HookedModel) -> HookPoints:
    """Return the hook points of a model, which are looked up once per model.

    Args:
        model: a hooked model; a bridge's hook points are repaired on first use (`bridge_hooks`).
    """
    if model not in _POINTS:
        hooked = backend_of(model) == "hooked"
        _POINTS[model] = HookPoints(dict(model.hook_dict), frozenset(), False) if hooked else bridge_hook_points(model)
    return _POINTS[model]


def _guarded(model: HookedModel, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for a plain hook name; at a hook point that can only be read, an edit is refused."""
    read_only = name in hook_points(model).read_only

    # TransformerLens takes a hook's repr for its name, and that of a partial prints every tensor bound to it.
    def guarded(activation: Tensor, hook: HookPoint) -> object:
        edited = function(activation, hook=hook)
        if read_only and edited is not None:
            raise ModelError(
                f"{name!r} can be read but not edited: {describe(model).architecture} computes its attention itself"
            )
        return edited

    return guarded


def _why_missing(model: HookedModel, name: str) -> str:
    info = describe(model)
    hook = re.sub(r"^blocks\.\d+\.", "", name)
    if hook != name and layer_of(name, info.n_layers) >= info.n_layers:
        return f": it has blocks 0 to {info.n_layers - 1}"
    if hook == "hook_resid_mid" and info.parallel_blocks:
        return ": attention and MLP of its blocks read the same input, so there is no stream between them"
    if hook in ("mlp.hook_pre", "mlp.hook_post") and info.experts:
        return f": each of its {info.experts} experts has a hidden layer of its own"
    if "hook_rot_" in hook and info.positions != "rotary":
        return f": its positions are {info.positions}, not rotary; read hook_q and hook_k"
    if hook in BLOCK_HOOKS:
        return f": TransformerLens does not reach it in {info.architecture}"
    near = difflib.get_close_matches(name, hook_points(model).by_name, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""
