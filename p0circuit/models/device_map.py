"""Models larger than one device: weights spread over GPUs, CPU memory and disk by a device map of `accelerate`.

1. `plan` builds the model without its weights, finds a place for every module, adds up what that takes, and refuses
   what fits nowhere.
2. `transformers` reads each weight to its place. Those on disk, or in CPU memory beside a GPU, *wait*: a hook of
   `accelerate` brings a module's weights to where it computes for its own forward pass, and takes them away after it.
3. A TransformerBridge reads weights past these hooks (those of its norms) and adds some of its own. `to_placed_bridge`
   therefore brings the weights of a whole block while the block runs, and those of any other component while that one
   does: never more than one layer at a time. They are taken away again however the block is left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import uuid
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p0circuit.io import cache_directory
from p0circuit.models.bridge import to_bridge
from p0circuit.models.info import ModelError, experts
from p0circuit.models.memory import free_memory
from p0circuit.models.source import stored_shapes

DeviceMap = str | Mapping[str, int | str]
"""`auto`, `cpu`, `disk`, or the place of each module: the number of a GPU, `cpu` or `disk`."""
ACTIVATION_BYTES = 4 * 2**30
"""At most kept free for activations on a device that computes: half of it is what a batch is cut to."""
_CPU, _DISK = "cpu", "disk"
_FOLDER = "p0circuit-offload"


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model are put, and how many bytes that takes.

    Attributes:
        name: of the model.
        module_devices: the device of each module, as `accelerate` has it: the number of a GPU, "cpu" or "disk".
        device: the device that takes token ids, and to which offloaded weights are copied when they are used.
        weight_bytes: bytes of weights by device ("cuda:0", "cpu", "disk").
        offloaded_bytes: those of them that are copied to `device` in every forward pass, by device.
        block_bytes: offloaded bytes of the largest block; 0 where nothing is offloaded.
        activation_bytes: bytes kept free for activations on every device that computes.
        duplicate_bytes: bytes of weights that exist twice while a model is loaded without a device map, since
            HookedTransformer copies those of `transformers`.
        rewritten_bytes: bytes that are written to the offload folder because the model's files hold them in another
            form.
        parameters: the number of weights.
        active_parameters: the number of weights that one token uses; lower than `parameters` in a mixture of experts.
        n_heads: attention heads per layer.
        vocab_size: size of the vocabulary.
        dtype: of the loaded weights.
        folder: the directory of the model's files; None where there are none yet.
    """

    name: str
    module_devices: dict[str, int | str] = field(repr=False)
    device: torch.device
    weight_bytes: dict[str, int]
    offloaded_bytes: dict[str, int]
    block_bytes: int
    activation_bytes: int
    duplicate_bytes: int
    rewritten_bytes: int
    parameters: int
    active_parameters: int
    n_heads: int
    vocab_size: int
    dtype: torch.dtype
    folder: Path | None = None

    @property
    def required_bytes(self) -> dict[str, int]:
        """Bytes that must be free, by device: weights and, where something is computed, a block and its activations."""
        main = str(self.device)
        required = {device: size for device, size in self.weight_bytes.items() if device != _DISK}
        computing = {main} | {device for device in required if device.startswith("cuda")}
        for device in sorted(computing):
            required[device] = required.get(device, 0) + self.activation_bytes + self.duplicate_bytes
            required[device] += self.block_bytes if device == main else 0
        return required | ({_DISK: self.rewritten_bytes} if self.rewritten_bytes else {})


def placement_of(model: Any) -> Placement | None:
    """How a hooked model was placed, None for one loaded without a device map."""
    return model.__dict__.get("placement")


def parse_device_map(text: str) -> DeviceMap:
    """Read a device map as given on a command line: a word, JSON, or the name of a file with JSON in it.

    Raises:
        ModelError: it is neither.
    """
    if text in ("auto", _CPU, _DISK):
        return text
    try:
        found = json.loads(Path(text).read_text() if Path(text).is_file() else text)
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(
            f"device map {text!r} is neither auto, cpu, disk nor JSON such as {_EXAMPLE}: {error}"
        ) from None
    return _checked(found)


_EXAMPLE = '{"model.embed_tokens": 0, "model.layers": "cpu", ...}'


def _checked(device_map: Any) -> dict[str, int | str]:
    """A mapping with places as `accelerate` has them."""
    if not isinstance(device_map, Mapping) or not device_map:
        raise ModelError(
            f"device map {device_map!r}: expected auto, cpu, disk or the places of modules, as in {_EXAMPLE}"
        )
    found: dict[str, int | str] = {}
    for module, place in device_map.items():
        number = str(place).removeprefix("cuda:")
        if not number.isdecimal() and place not in (_CPU, _DISK):
            raise ModelError(f"device map: {module!r} cannot be put on {place!r}; expected a GPU's number, cpu or disk")
        found[module] = int(number) if number.isdecimal() else place
    return found


def plan_placement(
    config: Any,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    device: torch.device,
    free: Mapping[str, int],
    name: str = "model",
    folder: Path | None = None,
) -> Placement:
    """Find a place for every module of the model that a `transformers` config describes; nothing is loaded.

    `auto` fills GPUs first, then CPU memory, then the disk. `cpu` and `disk` put the blocks there and the rest on
    `device`; None puts everything there. `free` are the bytes to be had by place; `folder` holds the model's files.

    Raises:
        ModelError: a module has no place, or a place is too small for what it is to hold.
    """
    skeleton = _skeleton(config, dtype)
    blocks = _blocks(skeleton, name)
    computes = [size for place, size in free.items() if place.startswith("cuda" if device.type == "cuda" else _CPU)]
    activations = min([ACTIVATION_BYTES, *(size // 4 for size in computes)])
    places = _places(skeleton, blocks, device_map, device, free, activations, name)
    sizes = {weight: tensor.numel() * tensor.element_size() for weight, tensor in _tensors(skeleton)}
    where = {weight: _place(weight, places) for weight in sizes}
    gpus = [place for place in places.values() if isinstance(place, int)]
    # `accelerate` lets weights in CPU memory wait where a GPU computes; where none does, `offload_to_cpu` asks for it.
    forced = device_map not in ("auto", None) and set(places.values()) == {_CPU}
    waits = {_DISK} | ({_CPU} if gpus or forced else set())
    converted = set() if folder is None else set(sizes) - set(stored_shapes(folder))
    parameters, active = _parameters(skeleton, config)

    def total(chosen: Callable[[str], bool]) -> int:
        return sum(size for weight, size in sizes.items() if chosen(weight))

    weights = {
        place: total(lambda weight, place=place: where[weight] == place) for place in dict.fromkeys(where.values())
    }
    placement = Placement(
        name=name,
        module_devices=places,
        device=torch.device("cuda", gpus[0]) if gpus else torch.device(_CPU) if device.type == "cuda" else device,
        weight_bytes=weights,
        offloaded_bytes={place: size for place, size in weights.items() if place in waits},
        block_bytes=max(
            total(lambda weight, block=block: weight.startswith(f"{block}.") and where[weight] in waits)
            for block in blocks
        ),
        activation_bytes=activations,
        duplicate_bytes=0 if device_map is not None else sum(weights.values()),
        rewritten_bytes=total(lambda weight: weight in converted and where[weight] == _DISK),
        parameters=parameters,
        active_parameters=active,
        n_heads=config.get_text_config().num_attention_heads,
        vocab_size=config.get_text_config().vocab_size,
        dtype=dtype,
        folder=folder,
    )
    if device_map is not None:
        # Without one `load_model` refuses what has no room.
        _check_room(placement, free)
    return placement


def _places(
    skeleton: Any,
    blocks: Sequence[str],
    device_map: DeviceMap | None,
    device: torch.device,
    free: Mapping[str, int],
    activations: int,
    name: str,
) -> dict[str, int | str]:
    """The place of every module."""
    from accelerate.utils import check_device_map

    home = device.index or 0 if device.type == "cuda" else str(device)
    if device_map == "auto":
        places = _spread(skeleton, device, free, activations)
    elif device_map is None:
        places = {"": home}
    elif device_map in (_CPU, _DISK):
        places = dict.fromkeys(_outside(skeleton, blocks), home) | dict.fromkeys(blocks, str(device_map))
    else:
        places = _checked(device_map)
    if unknown := set(places) - {module for module, _ in skeleton.named_modules()}:
        raise ModelError(
            f"device map: {name} has no {', '.join(sorted(unknown))}; its blocks are {blocks[0]} and so on"
        )
    try:
        check_device_map(skeleton, {**places})
    except ValueError as error:
        raise ModelError(f"device map: {error}") from None
    for one, other in getattr(skeleton, "all_tied_weights_keys", {}).items():
        if _place(one, places) != _place(other, places):
            raise ModelError(f"device map: {one} and {other} of {name} are the same weights: put them in one place")
    return places


def _parameters(skeleton: Any, config: Any) -> tuple[int, int]:
    """How many parameters there are, and how many of them a token meets."""
    text = config.get_text_config()
    total = sum(weight.numel() for weight in skeleton.parameters())
    routed = sum(weight.numel() for name, weight in skeleton.named_parameters() if ".experts." in name)
    count = experts(text)
    return total, total - (routed - routed * text.num_experts_per_tok // count if count else 0)


def _check_room(found: Placement, free: Mapping[str, int]) -> None:
    for place, needed in found.required_bytes.items():
        if needed > free.get(place, needed):
            raise ModelError(
                f"{found.name}: this device map needs {needed / 2**30:.1f} GB on {place} and {free[place] / 2**30:.1f} "
                "are free; spread it (device map auto), or load it with a smaller dtype (bfloat16) or fewer layers"
                + ("; an offload folder on a larger disk helps too" if place == _DISK else "")
            )


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The `transformers` model of a config, with shapes and no numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _names(model: nn.Module) -> list[str]:
    """The names of parameters and buffers, tied ones by each of theirs."""
    lists = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return [name for names in lists for name, _ in names]


def _blocks(skeleton: Any, name: str) -> list[str]:
    kinds = set(skeleton._no_split_modules or ())
    found = [module for module, kind in skeleton.named_modules() if type(kind).__name__ in kinds]
    if not found:
        raise ModelError(f"{name}: transformers does not say what the blocks of {type(skeleton).__name__} are")
    return found


def _outside(skeleton: Any, blocks: Sequence[str]) -> list[str]:
    """The modules outside the blocks that have weights or buffers of their own."""
    owners = dict.fromkeys(weight.rpartition(".")[0] for weight in _names(skeleton))
    return [owner for owner in owners if not any(f"{owner}.".startswith(f"{block}.") for block in blocks)]


def _spread(skeleton: Any, device: torch.device, free: Mapping[str, int], activations: int) -> dict[str, int | str]:
    """GPUs first, then CPU memory, then the disk, no block in two places."""
    from accelerate import infer_auto_device_map

    room: dict[int | str, int | str] = {}
    for place, size in free.items():
        if place.startswith("cuda:") and device.type == "cuda":
            room[int(place.removeprefix("cuda:"))] = size - activations
        elif place == _CPU:
            room[place] = size - (activations if device.type != "cuda" else 0)
    found: dict[str, Any] = infer_auto_device_map(skeleton, room, list(skeleton._no_split_modules))
    return found


def _place(weight: str, places: Mapping[str, int | str]) -> str:
    """The place of a weight: that of the innermost module that has one."""
    inside = [module for module in places if not module or f"{weight}.".startswith(f"{module}.")]
    place = places[max(inside, key=len)]
    return f"cuda:{place}" if isinstance(place, int) else place


def free_bytes_by_device(gpus: Sequence[torch.device], folder: Path) -> dict[str, int]:
    """Bytes to be had: on the GPUs, in CPU memory, and on the disk that `folder` is on."""
    found = {str(place): free_memory(place) for place in [*gpus, torch.device(_CPU)]}
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return {place: size for place, size in found.items() if size is not None} | {
        _DISK: shutil.disk_usage(existing).free
    }


def offload_root(folder: str | Path | None) -> Path:
    """Where folders for weights that wait on disk are made: the cache folder if none is given."""
    return cache_directory() if folder is None else Path(folder)


@contextlib.contextmanager
def new_offload_folder(parent: Path) -> Iterator[Path]:
    """A folder for weights that wait on disk, gone again if the block inside the `with` fails.

    What a process that died has left beside it goes first.
    """
    host = socket.gethostname()
    for left in parent.glob(f"{_FOLDER}.{host}.*.*"):
        if not _alive(left.name.rsplit(".", 2)[1]):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{_FOLDER}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _alive(process: str) -> bool:
    import psutil

    return not process.isdecimal() or psutil.pid_exists(int(process))


@contextlib.contextmanager
def without_warnings(*names: str) -> Iterator[None]:
    """Libraries warn of what was asked for, such as `accelerate` of weights that are elsewhere; `names` of loggers."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def offload_to_cpu(hf: Any, found: Placement) -> None:
    """Where all of a model is in CPU memory, let its weights wait there too."""
    from accelerate import cpu_offload

    if set(found.offloaded_bytes) == set(found.weight_bytes) == {_CPU}:
        cpu_offload(hf, execution_device=found.device)


def to_placed_bridge(hf: Any, tokenizer: Any, found: Placement, folder: Path | None) -> Any:
    """Wrap a `transformers` model whose weights are where a plan has them in a TransformerBridge.

    `folder` is removed together with the bridge.

    Raises:
        ModelError: TransformerLens splits weights that wait (those of fused queries, keys and values) into its own.
    """
    tied = _tied(hf)
    blocks = _blocks(hf, found.name)
    outside = [
        module for name, module in hf.named_modules() if not any(f"{name}.".startswith(f"{block}.") for block in blocks)
    ]
    with onloaded(outside):
        hooks = {module: hook for module in outside if (hook := _hook(module)) is not None}
        bridge = to_bridge(hf, found.name, tokenizer, found.device)
        for module, hook in hooks.items():
            # What the bridge has added to a module (a bias of zeros) is not where its other weights wait.
            added = {
                name: weight.detach().cpu()
                for name, weight in module.named_parameters(recurse=False)
                if name not in hook.weights_map
            }
            if added:
                hook.weights_map = ChainMap(added, hook.weights_map)
    lost = [name for name, owner, leaf, weight in _owned(bridge) if weight.is_meta and _hook(owner) is None]
    if lost:
        raise ModelError(
            f"{found.name}: TransformerLens splits weights of {type(hf).__name__} ({lost[0]} …) when it wraps them, so "
            "they cannot wait on disk or in CPU memory; put every block on a GPU, or load fewer layers"
        )
    for unit in [*bridge.blocks, *(part for name, part in bridge.named_children() if name != "blocks")]:
        waiting = [module for module in unit.modules() if _hook(module) is not None]
        if waiting:
            # Into the instance's dict: a bridge component passes attribute writes on to the module it wraps.
            unit.__dict__["forward"] = partial(_with_weights, unit.forward, waiting)
    bridge.__dict__["placement"] = found
    bridge.__dict__["tied_weights"] = tied
    if folder is not None:
        weakref.finalize(bridge, shutil.rmtree, folder, ignore_errors=True)
    return bridge


def _tied(hf: Any) -> tuple[tuple[nn.Module, str], ...]:
    """The weights that are those of another module; `accelerate` makes tensors of their own of them."""
    names = [name.rpartition(".") for name in getattr(hf, "all_tied_weights_keys", {})]
    return tuple((hf.get_submodule(module), leaf) for module, _, leaf in names)


def _with_weights(forward: Callable[..., Any], modules: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
    with onloaded(modules):
        return forward(*args, **kwargs)


@contextlib.contextmanager
def onloaded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have the weights of these modules where they compute inside a `with`; those that are there already stay there."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if (hook := _hook(module)) is not None and hook.offload:
                hook.pre_forward(module)
                # The module's own forward pass must not take them away meanwhile.
                hook.offload = False
                stack.callback(_offload_again, module, hook)
        yield


def _offload_again(module: nn.Module, hook: Any) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _hook(module: nn.Module) -> Any:
    """The hook that brings a module's weights, None where they do not wait."""
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


def weights_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model by name, once, read from where it waits if it is not at hand."""
    tied = {(id(module), leaf) for module, leaf in model.__dict__.get("tied_weights", ())}
    for name, owner, leaf, tensor in _owned(model):
        hook = _hook(owner)
        if hook is not None and (id(owner), leaf) in tied:
            continue
        yield name, hook.weights_map[leaf] if tensor.is_meta and hook is not None else tensor
