"""Memory: how much weights need, how much is free, and how to return what is no longer used."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch


def bytes_while_loading(parameters: int, dtype: torch.dtype) -> int:
    """Return the bytes that weights need at most while a model is loaded.

    HookedTransformer copies the weights of `transformers`, so there are two of each for a while.

    Args:
        parameters: the number of weights.
        dtype: of the weights.
    """
    return 2 * parameters * torch.finfo(dtype).bits // 8


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device; None where the system does not state them.

    Args:
        device: a GPU or the CPU.
    """
    if device.type == "cuda":
        # Memory that torch holds without using it is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def return_freed_memory() -> None:
    """Return memory that Python has freed to the system, where the C library holds it (glibc on Linux).

    An experiment frees many tensors of different sizes. Without this the process holds their pages, and the peak of the
    next experiment is added to them.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
