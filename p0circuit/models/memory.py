"""Memory: how much weights take, how much is free, and returning what is no longer used."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from typing import Any


def bytes_while_loading(parameters: int, dtype: Any) -> int:
    """Bytes that weights take at most: HookedTransformer has its own, made beside those of `transformers`."""
    import torch

    return 2 * parameters * torch.finfo(dtype).bits // 8


def free_memory(device: Any) -> int | None:
    """Bytes that can still be had on a device; None where the system does not say."""
    import torch

    if device.type == "cuda":
        # What torch holds without using it can be had too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def return_freed_memory() -> None:
    """Give memory that Python has freed back to the system, where the C library keeps it (glibc on Linux).

    An experiment leaves many freed tensors of different sizes behind. Without this the process keeps their pages, and
    the next experiment's peak is added to them.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
