"""The exercises' checks: each says whether an answer is right, or what is wrong with it."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from scipy.stats import binom

from bnn_utils import campaign, checkpoints, data
from bnn_utils.models import BiRealUnit

Check = Callable[[Any], str]  # from an answer to what is wrong with it, in a sentence; empty if it is right


def _number(
    answer: Any, right: float, within: float, typical: dict[float, str] | None = None, large: str = "", small: str = ""
) -> str:
    """Compare a number with the right one.

    `typical` are wrong ones with what to say to them; `large` and `small` are said to others that are that.
    """
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return f"a number is asked for, this is {type(answer).__name__}."
    if abs(value - right) <= within:
        return ""
    for wrong, remark in (typical or {}).items():
        if abs(value - wrong) <= within:
            return remark
    said = f"{value:g} is too large. {large}" if value > right else f"{value:g} is too small. {small}"
    return said.rstrip()


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


# ---------------------------------------------------------------- 02 Training a binarized VGG


def _points_of_sizes(answer: Any) -> str:
    why = "The forward pass reads only the signs, and these stay."
    return _number(answer, 0, 1e-6, large=why, small=why)


def _floor_of_100_classes(answer: Any) -> str:
    high = np.sqrt(99)
    typical = {
        0.278: "that is the floor for 10 classes.",
        np.log(100): "that is the loss of guessing among 100 classes.",
    }
    return _number(answer, np.log1p(99 * np.exp(-high - 1 / high)), 5e-4, typical)


def _flips_of_small_steps(answer: Any) -> str:
    why = "Was the learning rate 100 times smaller, and is this a share rather than a percentage?"
    return _number(answer, 0.025, 0.0249, large=why)


# ---------------------------------------------------------------- 03 ResNets


def _share_of_a_wide_network(answer: Any) -> str:
    typical = {
        1.41: "is this narrow over wide? The share in the wide network comes first.",
        1.0: "the sums have more terms in a wide network, and the shortcut does not grow with them.",
        0.5: "twice the terms, but of both signs: their sum grows less than twofold.",
    }
    return _number(answer, 0.71, 0.1, typical)


def _shortcut_without_weights(answer: Any) -> str:
    x = torch.arange(96, dtype=torch.float32).view(2, 3, 4, 4) ** 2
    right, given = BiRealUnit(3, stride=2).shortcut(x), answer(x)
    if given.shape != right.shape:
        return f"of {tuple(x.shape)} it makes {tuple(given.shape)}, {tuple(right.shape)} is right."
    if torch.allclose(given, right):
        return ""
    if torch.allclose(given, right.view(2, 2, 3, 2, 2).transpose(1, 2).reshape(right.shape)):
        return "each channel stands beside its own copy; the copies come after all channels."
    return "its values are not the means of 2x2 pixels, or the two copies are not alike."


def _gradient_through_depth(answer: Any) -> str:
    why = "A part gets lost in each block, and there are more than twice as many as at depth 18."
    return _number(answer, 0.011, 0.009, large=why)


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


# ---------------------------------------------------------------- 05 One bit per weight


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


# ---------------------------------------------------------------- 06 Damage


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


# ---------------------------------------------------------------- 07 Anatomy of damage


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
    "01-1": _signs_after_relu,
    "01-2": _rate_of_small_weights,
    "01-3": _masked_dot,
    "02-1": _points_of_sizes,
    "02-2": _floor_of_100_classes,
    "02-3": _flips_of_small_steps,
    "03-1": _share_of_a_wide_network,
    "03-2": _shortcut_without_weights,
    "03-3": _gradient_through_depth,
    "04-1": _start_of_the_scale,
    "04-2": _pull_of_decay,
    "04-3": _steps_to_flip,
    "05-1": _words,
    "05-2": _falling_line,
    "05-3": _wider,
    "06-1": _flips_that_show,
    "06-2": _wrong_weights,
    "06-3": _trials_for_a_point,
    "07-1": _explosion,
    "07-2": _escapes,
    "07-3": _fits,
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
