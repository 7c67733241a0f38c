"""The one type of error that is the user's to mend."""

from __future__ import annotations


class P0Error(ValueError):
    """An input that p0circuit refuses; the message says what is wrong and how to mend it.

    The command line prints its message after "error:". Every other exception is a bug and shows its traceback.
    """


class NotFiniteError(P0Error, FloatingPointError):
    """A model or a training run computes values that are not numbers: its weights or its dtype are at fault."""
