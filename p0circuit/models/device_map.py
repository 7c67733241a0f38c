"""Place the weights of a model on GPUs, CPU memory and disk by a device map of `accelerate`, before anything is loaded.

`plan_placement` builds the model without its weights, assigns every module to a device, adds up the bytes that this
takes, and refuses what does not fit. offload.py loads models that way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from p0circuit.hooked_model import HookedModel
from p0circuit.models.errors import ModelError
from p0circuit.models.hf_config import n_experts
from p0circuit.models.memory import free_memory
from p0circuit.models.model_files import stored_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DeviceMap = str | Mapping[str, int | str]
"""`auto`, `cpu`, `disk`, or the device of each module: the number of a GPU, `cpu` or `disk`."""
ACTIVATION_BYTES = 4 * 2**30
"""At most this is kept free for activations on a device that computes; half of it limits the size of a batch."""
CPU, DISK = "cpu", "disk"
_EXAMPLE = '{"model.embed_tokens": 0, "model.layers": "cpu", ...}'


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
        required = {device: size for device, size in self.weight_bytes.items() if device != DISK}
        computing = {main} | {device for device in required if device.startswith("cuda")}
        for device in sorted(computing):
            required[device] = required.get(device, 0) + self.activation_bytes + self.duplicate_bytes
            required[device] += self.block_bytes if device == main else 0
        return required | ({DISK: self.rewritten_bytes} if self.rewritten_bytes else {})


def placement_of(model: HookedModel) -> Placement | None:
    """Return the placement of a hooked model; None for a model that was loaded without a device map.

    Args:
        model: a hooked model.
    """
    return model.__dict__.get("placement")


def parse_device_map(text: str) -> DeviceMap:
    """Read a device map from the command line.

    Args:
        text: "auto", "cpu", "disk", a JSON object, or the path of a file that holds one.

    Raises:
        ModelError: the text is none of these.

    Example:
        ```python
        assert parse_device_map('{"model": "cuda:1", "lm_head": "cpu"}') == {"model": 1, "lm_head": "cpu"}
        ```
    """
    if text in ("auto", CPU, DISK):
        return text
    try:
        device_map = json.loads(Path(text).read_text() if Path(text).is_file() else text)
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(
            f"device map {text!r} is neither auto, cpu, disk nor JSON such as {_EXAMPLE}: {error}"
        ) from None
    return _checked(device_map)


def _checked(device_map: object) -> dict[str, int | str]:
    """A mapping with devices as `accelerate` names them."""
    if not isinstance(device_map, Mapping) or not device_map:
        raise ModelError(
            f"device map {device_map!r}: expected auto, cpu, disk or the devices of modules, as in {_EXAMPLE}"
        )
    devices: dict[str, int | str] = {}
    for module, device in device_map.items():
        number = str(device).removeprefix("cuda:")
        if not number.isdecimal() and device not in (CPU, DISK):
            raise ModelError(
                f"device map: {module!r} cannot be put on {device!r}; expected a GPU's number, cpu or disk"
            )
        devices[module] = int(number) if number.isdecimal() else device
    return devices


def plan_placement(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    device: torch.device,
    free_bytes: Mapping[str, int],
    name: str = "model",
    folder: Path | None = None,
) -> Placement:
    """Assign every module of a model to a device; nothing is loaded.

    Args:
        config: describes the model.
        dtype: of the loaded weights.
        device_map: "auto" fills GPUs first, then CPU memory, then the disk; "cpu" and "disk" put the blocks there and
            all other modules on `device`; a mapping gives the device of each module; None puts everything on `device`.
        device: the device that computes.
        free_bytes: free bytes by device ("cuda:0", "cpu", "disk").
        name: what error messages call the model.
        folder: of the model's files; None where there are none yet.

    Raises:
        ModelError: a module has no device, or a device is too small for what it has to hold.
    """
    skeleton = _skeleton(config, dtype)
    blocks = block_names(skeleton, name)
    computing = [
        size for target, size in free_bytes.items() if target.startswith("cuda" if device.type == "cuda" else CPU)
    ]
    activation_bytes = min([ACTIVATION_BYTES, *(size // 4 for size in computing)])
    module_devices = _module_devices(skeleton, blocks, device_map, device, free_bytes, activation_bytes, name)
    sizes = {weight: tensor.numel() * tensor.element_size() for weight, tensor in _tensors(skeleton)}
    devices = {weight: _device_of_weight(weight, module_devices) for weight in sizes}
    gpus = [number for number in module_devices.values() if isinstance(number, int)]
    # `accelerate` offloads weights in CPU memory where a GPU computes; where none does, `offload_to_cpu` does it.
    cpu_only = device_map not in ("auto", None) and set(module_devices.values()) == {CPU}
    offload_devices = {DISK} | ({CPU} if gpus or cpu_only else set())
    rewritten = set() if folder is None else set(sizes) - set(stored_shapes(folder))
    parameters, active_parameters = _count_parameters(skeleton, config)

    def total(selected: Callable[[str], bool]) -> int:
        return sum(size for weight, size in sizes.items() if selected(weight))

    weight_bytes = {
        target: total(lambda weight, target=target: devices[weight] == target)
        for target in dict.fromkeys(devices.values())
    }
    placement = Placement(
        name=name,
        module_devices=module_devices,
        device=torch.device("cuda", gpus[0]) if gpus else torch.device(CPU) if device.type == "cuda" else device,
        weight_bytes=weight_bytes,
        offloaded_bytes={target: size for target, size in weight_bytes.items() if target in offload_devices},
        block_bytes=max(
            total(lambda weight, block=block: weight.startswith(f"{block}.") and devices[weight] in offload_devices)
            for block in blocks
        ),
        activation_bytes=activation_bytes,
        duplicate_bytes=0 if device_map is not None else sum(weight_bytes.values()),
        rewritten_bytes=total(lambda weight: weight in rewritten and devices[weight] == DISK),
        parameters=parameters,
        active_parameters=active_parameters,
        n_heads=config.get_text_config().num_attention_heads,
        vocab_size=config.get_text_config().vocab_size,
        dtype=dtype,
        folder=folder,
    )
    if device_map is not None:
        # Without a device map `load_model` checks the memory itself.
        _check_room(placement, free_bytes)
    return placement


def _module_devices(
    skeleton: PreTrainedModel,
    blocks: Sequence[str],
    device_map: DeviceMap | None,
    device: torch.device,
    free_bytes: Mapping[str, int],
    activation_bytes: int,
    name: str,
) -> dict[str, int | str]:
    """The device of every module."""
    from accelerate.utils import check_device_map

    main = device.index or 0 if device.type == "cuda" else str(device)
    if device_map == "auto":
        devices = _spread(skeleton, device, free_bytes, activation_bytes)
    elif device_map is None:
        devices = {"": main}
    elif device_map in (CPU, DISK):
        devices = dict.fromkeys(_modules_outside(skeleton, blocks), main) | dict.fromkeys(blocks, str(device_map))
    else:
        devices = _checked(device_map)
    if unknown := set(devices) - {module for module, _ in skeleton.named_modules()}:
        raise ModelError(
            f"device map: {name} has no {', '.join(sorted(unknown))}; its blocks are {blocks[0]} and so on"
        )
    try:
        check_device_map(skeleton, {**devices})
    except ValueError as error:
        raise ModelError(f"device map: {error}") from None
    for one, other in getattr(skeleton, "all_tied_weights_keys", {}).items():
        if _device_of_weight(one, devices) != _device_of_weight(other, devices):
            raise ModelError(
                f"device map: {one} and {other} of {name} are the same weights; put them on the same device"
            )
    return devices


def _count_parameters(skeleton: PreTrainedModel, config: PretrainedConfig) -> tuple[int, int]:
    """The number of parameters, and how many of them one token uses."""
    text = config.get_text_config()
    total = sum(weight.numel() for weight in skeleton.parameters())
    routed = sum(weight.numel() for name, weight in skeleton.named_parameters() if ".experts." in name)
    experts = n_experts(text)
    return total, total - (routed - routed * text.num_experts_per_tok // experts if experts else 0)


def _check_room(placement: Placement, free_bytes: Mapping[str, int]) -> None:
    for device, required in placement.required_bytes.items():
        if required > free_bytes.get(device, required):
            raise ModelError(
                f"{placement.name}: this device map needs {required / 2**30:.1f} GB on {device} and "
                f"{free_bytes[device] / 2**30:.1f} are free; spread it (device map auto), or load it with a smaller "
                "dtype (bfloat16) or fewer layers"
                + ("; an offload folder on a larger disk helps too" if device == DISK else "")
            )


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The `transformers` model of a config, with shapes and without numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _weight_names(model: nn.Module) -> list[str]:
    """The names of parameters and buffers; tied weights by each of their names."""
    lists = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return [name for names in lists for name, _ in names]


def block_names(hf: PreTrainedModel, name: str) -> list[str]:
    """Return the names of the modules that `transformers` takes for blocks.

    Args:
        hf: a model, with or without weights.
        name: what the error message calls the model.

    Raises:
        ModelError: the class of the model does not state its blocks.
    """
    kinds = set(hf._no_split_modules or ())
    blocks = [module for module, kind in hf.named_modules() if type(kind).__name__ in kinds]
    if not blocks:
        raise ModelError(f"{name}: transformers does not say what the blocks of {type(hf).__name__} are")
    return blocks


def _modules_outside(skeleton: PreTrainedModel, blocks: Sequence[str]) -> list[str]:
    """The modules outside the blocks that have weights or buffers of their own."""
    owners = dict.fromkeys(weight.rpartition(".")[0] for weight in _weight_names(skeleton))
    return [owner for owner in owners if not any(f"{owner}.".startswith(f"{block}.") for block in blocks)]


def _spread(
    skeleton: PreTrainedModel, device: torch.device, free_bytes: Mapping[str, int], activation_bytes: int
) -> dict[str, int | str]:
    """GPUs first, then CPU memory, then the disk; no block is split over devices."""
    from accelerate import infer_auto_device_map

    room: dict[int | str, int | str] = {}
    for target, size in free_bytes.items():
        if target.startswith("cuda:") and device.type == "cuda":
            room[int(target.removeprefix("cuda:"))] = size - activation_bytes
        elif target == CPU:
            room[target] = size - (activation_bytes if device.type != "cuda" else 0)
    devices: Any = infer_auto_device_map(skeleton, room, list(skeleton._no_split_modules or ()))
    return devices


def _device_of_weight(weight: str, devices: Mapping[str, int | str]) -> str:
    """The device of a weight: that of the innermost module that has one."""
    inside = [module for module in devices if not module or f"{weight}.".startswith(f"{module}.")]
    device = devices[max(inside, key=len)]
    return f"cuda:{device}" if isinstance(device, int) else device


def free_bytes_by_device(gpus: Sequence[torch.device], folder: Path) -> dict[str, int]:
    """Return the free bytes of GPUs, of CPU memory and of the disk.

    Args:
        gpus: the GPUs that may be used.
        folder: a path on the disk; it need not exist yet.
    """
    memory = {str(device): free_memory(device) for device in [*gpus, torch.device(CPU)]}
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return {device: size for device, size in memory.items() if size is not None} | {
        DISK: shutil.disk_usage(existing).free
    }
