"""How much memory tensors take while something runs: counted, not sampled, so that a test can rest on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Under `with`: the bytes of all tensors made inside the block, at present and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return output

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@torch.no_grad()
def peak_mb(run: Callable[[], Any]) -> float:
    """The peak of the tensors that `run` makes, in megabytes."""
    with PeakMemory() as memory:
        run()
    return memory.peak / 1e6


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    # Tensors without numbers take no memory, whatever they say of themselves.
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
