"""How an answer to an exercise is checked, and what is printed about it.

A checker tries an answer on cases of its own and prints one line: right; not answered yet; or what is wrong. It tries
the likely mistakes on the same cases, so that it can name what the answer does. It never shows the right answer.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass
from p0circuit.course.page import PRINT_WIDTH


class Wrong(Exception):
    """An answer that is not right, and why."""


class Unanswered(Exception):
    """There is no answer yet."""


def exercise(title: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a checker of a function that raises `Wrong` for a wrong answer: it prints one line instead."""

    def decorate(judge: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(judge)
        def check(answer: Any, *arguments: Any, **options: Any) -> None:
            try:
                if answer is None or answer is ...:
                    raise Unanswered
                judge(answer, *arguments, **options)
            except Unanswered:
                print(f"○ {title}: no answer yet; write one and run this cell again.")
            except Wrong as wrong:
                print(textwrap.fill(f"✗ {title}: {wrong}", PRINT_WIDTH, subsequent_indent="  "))
            else:
                print(f"✓ {title}: right.")

        return check

    return decorate


def ask(function: Any, *arguments: Any, may_edit: bool = False, nothing: str = "") -> Any:
    """What the learner's function answers, given arguments of its own to spoil.

    If it returns nothing there is no answer yet, unless `nothing` says what that means.
    """
    if not callable(function):
        raise Wrong(f"expected a function, got {_shown(function)}.")
    given = [one.clone() if isinstance(one, Tensor) else one for one in arguments]
    try:
        answer = function(*given)
    except NotImplementedError:
        raise Unanswered from None
    except Exception as error:
        shapes = ", ".join(str(list(one.shape)) for one in arguments if isinstance(one, Tensor))
        raise Wrong(
            f"your function raised {type(error).__name__}: {error}" + (f" (shapes: {shapes})." if shapes else ".")
        ) from error
    if answer is None or answer is ...:
        raise Wrong(nothing) if nothing else Unanswered
    if not may_edit:
        for before, after in zip(arguments, given, strict=True):
            if isinstance(before, Tensor) and not torch.equal(before, after):
                raise Wrong("your function changes what it was given; work on a copy (`.clone()`).")
    return answer


def as_tensor(answer: Any, shape: Sequence[int]) -> Tensor:
    """The answer as a tensor of this shape."""
    try:
        found = torch.as_tensor(answer).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"expected numbers of shape {list(shape)}, got {_shown(answer)}.") from None
    if list(found.shape) != list(shape):
        raise Wrong(f"expected shape {list(shape)}, got {list(found.shape)}.")
    if not bool(torch.isfinite(found).all()):
        raise Wrong("the answer holds values that are not finite.")
    return found


def as_number(answer: Any) -> float:
    """The answer as one number."""
    try:
        return float(answer)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"expected one number, got {_shown(answer)}.") from None


def compare(
    found: Any, right: Any, mistakes: Sequence[tuple[Any, str]], otherwise: str, tolerance: float = 1e-4
) -> None:
    """Accept what is close to `right`; else say what is wrong: `mistakes` are wrong results and what they mean."""

    def same(one: Any) -> bool:
        one, other = torch.as_tensor(one).double(), torch.as_tensor(found).double()
        return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)

    if same(right):
        return
    raise Wrong(next((told for wrong, told in mistakes if same(wrong)), otherwise))


def _shown(value: Any) -> str:
    return textwrap.shorten(f"{type(value).__name__} {value!r}", 60)
