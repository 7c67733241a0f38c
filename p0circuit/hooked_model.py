"""The type of a model: what this package uses of TransformerLens's `HookedTransformer` and `TransformerBridge`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class HookedModel(Protocol):
    """A hooked model, as `load_model` returns it.

    A protocol, because the two classes of TransformerLens share no base and TransformerLens 4 has one of them only.

    Attributes:
        cfg: TransformerLens's configuration.
        tokenizer: that of `transformers`; None for a model without one.
        blocks: the transformer blocks, in order.
        embed, unembed: the embedding and the unembedding.
        hook_dict: hook points by name.
        training: whether the model is in training mode.
    """

    cfg: Any
    tokenizer: Any
    blocks: Any
    embed: Any
    unembed: Any
    hook_dict: dict[str, Any]
    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """All weights."""
        ...

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All weights with their names."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Enter or leave training mode."""
        ...

    def eval(self) -> Any:
        """Leave training mode."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass and all its activations."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        ...
