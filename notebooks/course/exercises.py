"""The exercises' checks: each says whether an answer is right, or what is wrong with it."""

from collections.abc import Callable
from typing import Any

from IPython.display import Markdown
from scipy.stats import binom

from bnn_utils import campaign, checkpoints, data

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
        moved, steps = 0.0, 0
        while round(latent - moved, 9) >= 0:  # 0 reads as +1
            steps, moved = steps + 1, (steps + 1) * lr
        if (given := answer(latent, lr)) != steps:
            said = f"from {latent:g} in steps of {lr:g} it reads as -1 after {steps} steps, yours says {given}"
            return f"{said}; a weight of exactly 0 still reads as +1."
    return ""


# ---------------------------------------------------------------- 08 Surviving damage


def _words_with_two_errors(answer: Any) -> str:
    right, any_error = binom.sf(1, 72, 0.04), binom.sf(0, 72, 0.04)
    return _number(answer, right, 5e-3, {any_error: "that is the share with at least one; SECDED corrects one."})


def _vote_of_seven(answer: Any) -> str:
    right, five = binom.sf(3, 7, 0.04), binom.sf(2, 5, 0.04)
    remarks = {five: "that is a vote of five.", binom.sf(4, 7, 0.04): "four wrong copies of seven win already."}
    return _number(answer, right, 1e-6, remarks)


def _cheapest_repair(answer: Any) -> str:
    repairs = ("none", "range", "secded", "vote5-upper-range", "vote")
    if answer not in repairs:
        return f"the name of a repair is asked for, one of {', '.join(repairs)}."
    if answer == "vote":
        return "it holds, but another one does so with far fewer bits."
    return "" if answer == "vote5-upper-range" else "it loses more than two points."


# ---------------------------------------------------------------- 09 Scaling campaigns


def _wider_interval(answer: Any) -> str:
    network, facts = checkpoints.pretrained("vgg_cifar10")
    images = data.load("cifar10-sample").test.as_trained(facts).limit(100)
    how: dict[str, Any] = dict(storage="packed", seed=0)
    if _number(answer, 30, 5) == "":
        return "no campaign stops before 30, but this one goes on longer."
    return _number(answer, len(campaign.run(network, images, [1e-2], 5000, until=0.04, **how)), 0.5)


def _rule_of_three(answer: Any) -> str:
    right = 1 - 0.05 ** (1 / 200)
    return _number(answer, right, 5e-4, {1 / 200: "with one in 200, the chance to see none is still 37%."})


def _broken_file(answer: Any) -> str:
    if not isinstance(answer, str):
        return f"the message is asked for, a string; this is {type(answer).__name__}."
    return "" if "damaged or not a results file" in answer else "this is not what it says to a damaged file."


CHECKS: dict[str, Check] = {
    "04-1": _start_of_the_scale,
    "04-2": _pull_of_decay,
    "04-3": _steps_to_flip,
    "08-1": _words_with_two_errors,
    "08-2": _vote_of_seven,
    "08-3": _cheapest_repair,
    "09-1": _wider_interval,
    "09-2": _rule_of_three,
    "09-3": _broken_file,
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
