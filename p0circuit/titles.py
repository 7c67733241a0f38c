"""How a model is called where people read it."""

from __future__ import annotations


def titled(name: str, quantisation: str | None) -> str:
    """A model's name with the quantisation of its weights, as in "smollm2-135m (Q4_1)"."""
    return f"{name} ({quantisation})" if quantisation else name
