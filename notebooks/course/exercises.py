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


# ---------------------------------------------------------------- 04 What makes BNNs train


def _start_of_the_scale(answer: Any) -> str:
    return _number(
        answer, 1 / 32, 1e-4, {1 / 1024: "variances add up, not standard deviations: take the square root of 1,024."}
    )


def _pull_of_decay(answer: Any) -> str:
    return _number(answer, 5e-3, 5e-4, {5e-4: "that is the share without momentum, which builds the pull up."})


def _steps_to_flip(answer: Any) -> str:
    for latent, lr in ((0.05, 0.01), (0.05, 0.02), (0.3, 0.125), (0.25, 0.125)):
        moved = steps = 0
        while round(latent - moved, 9) >= 0:  # 0 reads as +1
            steps, moved = steps + 1, (steps + 1) * lr
        if (given := answer(latent, lr)) != steps:
            said = f"from {latent:g} in steps of {lr:g} it reads as -1 after {steps} steps, yours says {given}"
            return f"{said}; a weight of exactly 0 still reads as +1."
    return ""


CHECKS: dict[str, Check] = {
    "04-1": _start_of_the_scale,
    "04-2": _pull_of_decay,
    "04-3": _steps_to_flip,
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
