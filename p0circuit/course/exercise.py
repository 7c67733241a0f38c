"""How an answer to an exercise is checked, and what is printed about it.

A checker tries an answer on its own test cases and prints one line: right, not answered yet, or what is wrong. It
compares the answer with those of likely mistakes, so that it can name the mistake. It never prints the right answer.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from p0circuit.course.page import PRINT_WIDTH


class Wrong(Exception):
    """The answer is wrong; the message says why."""


class Unanswered(Exception):
    """There is no answer yet."""


def exercise(title: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a checker from a function that raises `Wrong` for a wrong answer; the checker prints one line instead.

    Args:
        title: number and name of the exercise.
    """

    def decorate(judge: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(judge)
        def check(answer: object, *arguments: object, **options: object) -> None:
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


def ask(function: object, *arguments: object, may_edit: bool = False, nothing: str = "") -> object:
    """Call the learner's function with copies of the arguments.

    Args:
        function: the learner's function.
        *arguments: its arguments.
        may_edit: whether it may change its arguments in place.
        nothing: message for a function that returns nothing; without one, that counts as no answer yet.

    Returns:
        What the function returned.

    Raises:
        Wrong: it is no function, raised an error, or changed its arguments.
        Unanswered: it returned nothing.
    """
    if not callable(function):
        raise Wrong(f"expected a function, got {_short_repr(function)}.")
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
            if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before, after):
                raise Wrong("your function changes what it was given; work on a copy (`.clone()`).")
    return answer


def as_tensor(answer: object, shape: Sequence[int]) -> Tensor:
    """Convert an answer to a tensor in float64.

    Args:
        answer: numbers.
        shape: the expected shape.

    Raises:
        Wrong: the answer does not consist of finite numbers of this shape.
    """
    try:
        values = torch.as_tensor(answer).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"expected numbers of shape {list(shape)}, got {_short_repr(answer)}.") from None
    if list(values.shape) != list(shape):
        raise Wrong(f"expected shape {list(shape)}, got {list(values.shape)}.")
    if not bool(torch.isfinite(values).all()):
        raise Wrong("the answer holds values that are not finite.")
    return values


def as_number(answer: object) -> float:
    """Convert an answer to one number.

    Args:
        answer: a number, or a tensor with one element.

    Raises:
        Wrong: the answer is not one number.
    """
    try:
        return float(torch.as_tensor(answer, dtype=torch.float64))
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"expected one number, got {_short_repr(answer)}.") from None


def compare(
    result: Tensor | float,
    right: Tensor | float,
    mistakes: Sequence[tuple[Tensor | float, str]],
    otherwise: str,
    tolerance: float = 1e-4,
) -> None:
    """Compare an answer with the right one and with likely mistakes.

    Args:
        result: the answer.
        right: the right answer.
        mistakes: wrong answers, each with the message that explains it.
        otherwise: message for any other wrong answer.
        tolerance: absolute and relative tolerance.

    Raises:
        Wrong: the answer differs from the right one.
    """

    def same(one: Tensor | float) -> bool:
        one, other = torch.as_tensor(one).double(), torch.as_tensor(result).double()
        return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)

    if same(right):
        return
    raise Wrong(next((message for wrong, message in mistakes if same(wrong)), otherwise))


def _short_repr(value: object) -> str:
    return textwrap.shorten(f"{type(value).__name__} {value!r}", 60)
