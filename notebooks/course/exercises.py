"""The exercises' checks: each says whether an answer is right, or what is wrong with it."""

from collections.abc import Callable
from typing import Any

import numpy as np
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


# ---------------------------------------------------------------- 01 Binarization


def _signs_after_relu(answer: Any) -> str:
    return _number(answer, 0, 1e-6, {0.5: "that is the share before the ReLU, which cuts these values to 0."})


def _rate_of_small_weights(answer: Any) -> str:
    typical = {
        0.01: "128 times smaller weights cross zero with 128 times smaller steps.",
        1.28: "smaller weights need smaller steps to cross zero at the same moment, not larger ones.",
    }
    return _number(answer, 0.01 / 128, 1e-7, typical)


def _masked_dot(answer: Any) -> str:
    a, b, inside = np.random.default_rng(0).integers(0, 2**63, (3, 20, 2), dtype=np.uint64)
    counted, differing = np.bitwise_count(inside).sum(-1, dtype=int), np.bitwise_count((a ^ b) & inside)
    right = counted - 2 * differing.sum(-1, dtype=int)
    given = np.asarray(answer(a, b, inside))
    if given.shape != right.shape:
        return f"for words of shape (20, 2) it gives shape {given.shape}, (20,) is right: one dot product a row."
    if (given == right).all():
        return ""
    if (given == counted - 2 * np.bitwise_count(a ^ b).sum(-1, dtype=int)).all():
        return "differences outside the image still count; mask them."
    if len(np.unique(given + 2 * differing.sum(-1, dtype=int))) == 1:
        return "n must be the number of taps inside, which differs from place to place."
    return "it differs from the sum of the products of the signs inside."


CHECKS: dict[str, Check] = {
    "01-1": _signs_after_relu,
    "01-2": _rate_of_small_weights,
    "01-3": _masked_dot,
}


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
