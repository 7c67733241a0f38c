"""Models larger than one device: weights on GPUs, in CPU memory and on disk, copied to where they are used.

1. `transformers` reads each weight to its device. Weights on disk, or in CPU memory beside a GPU, are *offloaded*: a
   hook of `accelerate` copies a module's weights to the device that computes for the module's own forward pass, and
   removes the copy afterwards.
2. A TransformerBridge reads weights outside these forward passes (those of its norms) and adds some of its own.
   `to_placed_bridge` therefore onloads the weights of a whole block while the block runs, and those of any other
   component while that component runs: never more than one block at a time. They are offloaded again however the block
   is left, also by an exception.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import uuid
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from p0circuit.hooked_model import HookedModel
from p0circuit.io import cache_directory
from p0circuit.models.bridge import to_bridge
from p0circuit.models.device_map import CPU, Placement, block_names
from p0circuit.models.errors import ModelError

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FOLDER = "p0circuit-offload"


def offload_root(folder: str | Path | None) -> Path:
    """Return the directory in which folders for offloaded weights are made.

    Args:
        folder: as the user gives it; None for the cache folder.
    """
    return cache_directory() if folder is None else Path(folder)


@contextlib.contextmanager
def new_offload_folder(root: Path) -> Iterator[Path]:
    """Make a folder for weights on disk; it is removed if the block inside the `with` fails.

    Folders that processes of this host left there before they died are removed first.

    Args:
        root: the directory in which the folder is made.
    """
    host = socket.gethostname()
    for leftover in root.glob(f"{_FOLDER}.{host}.*.*"):
        if not _is_alive(leftover.name.rsplit(".", 2)[1]):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = root / f"{_FOLDER}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_alive(process: str) -> bool:
    import psutil

    return not process.isdecimal() or psutil.pid_exists(int(process))


@contextlib.contextmanager
def without_warnings(*names: str) -> Iterator[None]:
    """Silence the warnings of loggers inside a `with`, such as those of `accelerate` about offloaded weights.

    Args:
        *names: of loggers.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def offload_to_cpu(hf: PreTrainedModel, placement: Placement) -> None:
    """Offload the weights of a model to CPU memory if its placement has all of them there, offloaded.

    Args:
        hf: a loaded model, which is changed in place.
        placement: of the model.
    """
    from accelerate import cpu_offload

    if set(placement.offloaded_bytes) == set(placement.weight_bytes) == {CPU}:
        cpu_offload(hf, execution_device=placement.device)


def to_placed_bridge(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, placement: Placement, folder: Path | None
) -> HookedModel:
    """Wrap a `transformers` model whose weights are on several devices in a TransformerBridge.

    Args:
        hf: a model that was loaded by a device map.
        tokenizer: of the model; None for a model that is given token ids only.
        placement: of the model.
        folder: of weights on disk, which is removed together with the bridge; None if there are none.

    Raises:
        ModelError: TransformerLens splits weights that are offloaded (those of fused queries, keys and values) into
            weights of its own.
    """
    tied_weights = _tied_weights(hf)
    blocks = block_names(hf, placement.name)
    outside = [
        module for name, module in hf.named_modules() if not any(f"{name}.".startswith(f"{block}.") for block in blocks)
    ]
    with onloaded(outside):
        hooks = {module: hook for module in outside if (hook := _offload_hook(module)) is not None}
        bridge: Any = to_bridge(hf, placement.name, tokenizer, placement.device)
        for module, hook in hooks.items():
            # What the bridge has added to a module (a bias of zeros) is not among its offloaded weights.
            offloaded: Any = hook.weights_map
            added = {
                name: weight.detach().cpu()
                for name, weight in module.named_parameters(recurse=False)
                if name not in offloaded
            }
            if added:
                hook.weights_map = ChainMap(added, offloaded)
    lost = [name for name, owner, leaf, weight in _owned(bridge) if weight.is_meta and _offload_hook(owner) is None]
    if lost:
        raise ModelError(
            f"{placement.name}: TransformerLens splits weights of {type(hf).__name__} ({lost[0]} …) when it wraps "
            "them, so they cannot be offloaded to disk or CPU memory; put every block on a GPU, or load fewer layers"
        )
    for unit in [*bridge.blocks, *(part for name, part in bridge.named_children() if name != "blocks")]:
        modules = [module for module in unit.modules() if _offload_hook(module) is not None]
        if modules:
            # Into the instance's dict: a bridge component passes attribute writes on to the module it wraps.
            unit.__dict__["forward"] = partial(_forward_onloaded, unit.forward, modules)
    bridge.__dict__["placement"] = placement
    bridge.__dict__["tied_weights"] = tied_weights
    if folder is not None:
        weakref.finalize(bridge, shutil.rmtree, folder, ignore_errors=True)
    return bridge


def _tied_weights(hf: PreTrainedModel) -> tuple[tuple[nn.Module, str], ...]:
    """The weights that are also those of another module; `accelerate` makes separate tensors of them."""
    names = [name.rpartition(".") for name in getattr(hf, "all_tied_weights_keys", {})]
    return tuple((hf.get_submodule(module), leaf) for module, _, leaf in names)


def _forward_onloaded(
    forward: Callable[..., object], modules: Sequence[nn.Module], *args: object, **kwargs: object
) -> object:
    with onloaded(modules):
        return forward(*args, **kwargs)


@contextlib.contextmanager
def onloaded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Copy the offloaded weights of modules to the device that computes, inside a `with`.

    Args:
        modules: weights that are on that device already stay there.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if (hook := _offload_hook(module)) is not None and hook.offload:
                hook.pre_forward(module)
                # The module's own forward pass must not offload them meanwhile.
                hook.offload = False
                stack.callback(_offload_again, module, hook)
        yield


def _offload_again(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of `accelerate` that onloads a module's weights, None where they are not offloaded."""
    # Past a bridge component's look-up, which hands on what belongs to the module it wraps.
    hook = module.__dict__.get("_hf_hook")
    return next(
        (each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "weights_map", None) is not None), None
    )


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer once: its name, its module, its name there, and the tensor."""
    # Past a bridge's own lists, which leave out the experts of a mixture.
    for tensors in (nn.Module.named_parameters(model), nn.Module.named_buffers(model)):
        modules = dict(nn.Module.named_modules(model))
        for name, tensor in tensors:
            module, _, leaf = name.rpartition(".")
            yield name, modules[module], leaf, tensor


def weights_of(model: HookedModel | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over every parameter and buffer of a model, once; offloaded ones are read from where they are stored.

    Args:
        model: a hooked model or a `transformers` model.

    Yields:
        The name and the tensor.
    """
    module: Any = model
    tied_weights = {(id(owner), leaf) for owner, leaf in module.__dict__.get("tied_weights", ())}
    for name, owner, leaf, tensor in _owned(module):
        hook = _offload_hook(owner)
        if hook is not None and (id(owner), leaf) in tied_weights:
            continue
        if tensor.is_meta and hook is not None and hook.weights_map is not None:
            yield name, hook.weights_map[leaf]
        else:
            yield name, tensor
