"""The exercises' checks: each says whether an answer is right, or what is wrong with it."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from bnn_utils import checkpoints

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


# 05 One bit per weight


def _words(answer: Any) -> str:
    for filters, inputs, kernel in ((96, 96, 3), (96, 3, 3), (10, 128, 1), (7, 65, 5), (1, 64, 1)):
        right, given = filters * kernel**2 * math.ceil(inputs / 64), answer(filters, inputs, kernel)
        if given != right:
            packed = math.ceil(filters * inputs * kernel**2 / 64)
            why = (
                "That is what fits if words run on from tap to tap; each tap starts a new one."
                if given == packed
                else ""
            )
            return f"{filters} filters of {kernel}x{kernel} over {inputs} channels give {given}, not {right}. {why}"
    return ""


def _falling_line(answer: Any) -> str:
    typical = {
        32.0: "at 32 the line is below zero already: a line that falls is cut off by rounding down.",
        -7.0: "the scale is negative: the bit is 1 *below* the crossing.",
    }
    return _number(answer, 31, 0, typical)


def _vgg_others(width: float) -> float:
    """Return the share of a packed VGG's bits that are not weights, counted from the published layer list."""
    channels = [round(width * n) for n in (384, 384, 768, 768, 1536, 512)]
    hidden = round(width * 1024)
    weights = sum(9 * before * after for before, after in pairwise([3, *channels]))
    weights += 16 * channels[-1] * hidden + hidden**2 + 10 * hidden
    others = 17 * (sum(channels[1:]) + 2 * hidden) + 96 * (channels[0] + 10)
    return others / (weights + others)


def _wider(answer: Any) -> str:
    typical = {
        2.0: "the other way round: weights grow faster than the rest.",
        0.25: "weights grow four times, but the rest grows too.",
    }
    return _number(answer, _vgg_others(0.5) / _vgg_others(0.25), 0.004, typical)


# 06 Damage


def _flips_that_show(answer: Any) -> str:
    typical = {
        14.0: "the sign counts too.",
        9.0: "some bits of the mantissa count too.",
        32.0: "the low bits of the mantissa move the number by far less than 1%.",
        8.0: "sign and mantissa have bits that count too.",
    }
    return _number(answer, 15, 0, typical)


def _wrong_weights(answer: Any) -> str:
    every = "that would be so if each of the 32 bits could turn the weight; only the sign can."
    typical = {0.32: every, round(1 - 0.99**32, 4): every}
    if isinstance(answer, float | int) and 0.5 < answer < 5:
        return "a share is asked for, not percent."
    return _number(answer, 0.011, 0.0015, typical)


def _trials_for_a_point(answer: Any) -> str:
    table = pd.read_csv(checkpoints.PRETRAINED / "vgg_cifar10" / "damage-float32.csv")
    spread = table.query("repair == 'none' and probability == 0.01")["accuracy"].std()
    right = (1.96 * spread / 0.01) ** 2
    typical = {
        1.96 * spread / 0.01: "the half-width shrinks with the *square root* of the number of trials.",
        right / 1.96**2: "that makes the standard error 1 point; half the 95% interval is 1.96 of it.",
        right / 4: "±1 point is an interval of 2 points.",
    }
    return _number(answer, right, 0.03 * right, typical)


# 07 Anatomy of damage


def _explosion(answer: Any) -> str:
    typical = {
        0.1: "close, but probabilities of events that can happen together do not add up.",
        0.01: "that is the probability for one of them.",
        round(1 - 0.99**320, 3): "that counts all 32 bits of each; only bit 30 is meant.",
        round(0.99**10, 3): "that is the probability that none flips.",
    }
    return _number(answer, 1 - 0.99**10, 0.002, typical)


def _escapes(answer: Any) -> str:
    for threshold, products in ((71, 864), (-73, 864), (800, 864), (0, 1728), (-1600, 1728), (5, 27)):
        stored = np.array(threshold, np.int16)
        flipped = [int(stored ^ np.uint16(1 << bit).astype(np.int16)) for bit in range(16)]
        right, given = sum(abs(read) > products for read in flipped), answer(threshold, products)
        if given != right:
            added = sum(abs(threshold + (1 << bit)) > products for bit in range(16))
            why = (
                "A flip adds a power of two where the bit is 0, and takes it away where it is 1."
                if given == added
                else ""
            )
            return f"threshold {threshold} of {products:,} products gives {given}, not {right}. {why}"
    return ""


def _fits(answer: Any) -> str:
    for scale, shift in ((0.5, -0.3), (2.0, 0.5), (1.5, -3.0), (-2.5, 1.0), (1.0, 1.0)):
        one, other = (float(x) for x in answer(scale, shift))
        if max(abs(one), abs(other)) > 1 + 1e-6:
            return f"({scale:g}, {shift:g}) becomes ({one:g}, {other:g}), which is not within [-1, 1]."
        if not math.isclose(other * scale, shift * one, abs_tol=1e-6) or one * scale <= 0:
            return f"({scale:g}, {shift:g}) becomes ({one:g}, {other:g}): another ratio, so another threshold."
        if max(abs(scale), abs(shift)) <= 1 and one != scale:
            return f"({scale:g}, {shift:g}) fits already and should stay."
    return ""


CHECKS: dict[str, Check] = {
    "05-1": _words,
    "05-2": _falling_line,
    "05-3": _wider,
    "06-1": _flips_that_show,
    "06-2": _wrong_weights,
    "06-3": _trials_for_a_point,
    "07-1": _explosion,
    "07-2": _escapes,
    "07-3": _fits,
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
