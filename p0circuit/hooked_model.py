"""The type of a model: what this package uses of TransformerLens's `HookedTransformer` and `TransformerBridge`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class HookedModel(Protocol):
    """A hooked model, as `load_model` returns it.

    A protocol, because the two classes of TransformerLens share no base class and TransformerLens 4 has only one of
    them.

    Attributes:
        cfg: configuration, of TransformerLens.
        tokenizer: tokenizer, of `transformers`; None for a model without one.
        blocks: transformer blocks, in order.
        hook_dict: hook points by name.
        training: whether the model is in training mode.
    """

    cfg: Any
    tokenizer: Any
    blocks: Any
    hook_dict: dict[str, Any]
    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Iterate over all weights.

        Args:
            recurse: whether to include those of submodules.
        """
        ...

    def eval(self) -> object:
        """Leave training mode."""
        ...

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Run a forward pass."""
        ...
