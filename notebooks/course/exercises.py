"""The exercises' checks: each says whether an answer is right, or what is wrong with it."""

from collections.abc import Callable
from typing import Any

from IPython.display import Markdown

Check = Callable[[Any], str]  # from an answer to what is wrong with it, in a sentence; empty if it is right


def _number(answer: Any, right: float, within: float, typical: dict[float, str] | None = None) -> str:
    """Compare a number with the right one; `typical` are wrong ones with what to say to them."""
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return f"a number is asked for, this is {type(answer).__name__}."
    if abs(value - right) <= within:
        return ""
    for wrong, remark in (typical or {}).items():
        if abs(value - wrong) <= within:
            return remark
    return f"{value:g} is too {'large' if value > right else 'small'}."


CHECKS: dict[str, Check] = {}


def check(exercise: str, answer: Any) -> Markdown:
    """Return, for the reader, whether an answer is right.

    Args:
        exercise: its number, "06-1".
        answer: a value or a function, as the exercise asks; `...` is none yet.
    """
    if answer is ...:
        return Markdown(f"**Exercise {exercise}:** put your answer in the place of `...`, and run the cell.")
    try:
        problem = CHECKS[exercise](answer)
    except Exception as error:  # whatever a reader's function does
        problem = f"checking it raised {type(error).__name__}: {error}"
    return Markdown(f"**Not yet:** {problem}" if problem else "**Right.**")
