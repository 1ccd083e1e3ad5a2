"""The checks of exercises: nothing yet, a typical wrong answer, an answer of another kind."""

import numpy as np
import pytest
from torch.nn.functional import avg_pool2d

from course.exercises import CHECKS, check

# Answers that a reader may well give first. That the solutions pass is seen when the course runs.
WRONG: dict[str, list[object]] = {
    "01-1": [0.5, 1.0],
    "01-2": [0.01, 1.28],
    "01-3": [
        lambda a, b, inside: 9 - 2 * np.bitwise_count((a ^ b) & inside).sum(-1, dtype=int),
        lambda a, b, inside: (
            np.bitwise_count(inside).sum(-1, dtype=int) - 2 * np.bitwise_count(a ^ b).sum(-1, dtype=int)
        ),
        lambda a, b, inside: 0,
    ],
    "02-1": [5.0, -1.4],
    "02-2": [0.278, 4.605, 0.5],
    "02-3": [0.27, 0.3, 0.0],
    "03-1": [1.41, 1.0, 0.5, 2.0],
    "03-2": [
        lambda x: x,
        lambda x: avg_pool2d(x, 2).repeat_interleave(2, 1),
        lambda x: x[:, :, ::2, ::2].repeat(1, 2, 1, 1),
    ],
    "03-3": [0.18, 0.08, 1.0, 0.0],
    "04-1": [1 / 1024, 1],
    "04-2": [5e-4],
    "04-3": [lambda latent, lr: latent / lr],
    "05-1": [lambda filters, inputs, kernel: -(-filters * inputs * kernel**2 // 64)],
    "05-2": [32, -7, 31.2],
    "05-3": [2.0, 0.25],
    "06-1": [14, 9, 32],
    "06-2": [0.32, 1.1, 0.01 * 0.01],
    "06-3": [24.24, 153, 147],
    "07-1": [0.1, 0.01, 0.96, 0.904],
    "07-2": [
        lambda threshold, products: sum(abs(threshold + (1 << bit)) > products for bit in range(16)),
        lambda threshold, products: 6,
    ],
    "07-3": [
        lambda scale, shift: (min(max(scale, -1), 1), min(max(shift, -1), 1)),
        lambda scale, shift: (scale, shift),
        lambda scale, shift: (scale / 3, shift / 3),
    ],
    "08-1": [1 - (1 - 0.04) ** 72, 0.04],
    "08-2": [10 * 0.04**3],
    "08-3": ["secded", "vote"],
    "09-1": [30, 240],
    "09-2": [1 / 200],
    "09-3": ["file not found", 3],
}


def test_every_exercise_has_a_wrong_answer():
    assert WRONG.keys() == CHECKS.keys()


@pytest.mark.parametrize(("exercise", "answer"), [(name, answer) for name in WRONG for answer in WRONG[name]])
def test_a_wrong_answer_is_told_why(exercise, answer):
    said = check(exercise, answer).data
    assert said.startswith("**Not yet:** ") and len(said) > 25


@pytest.mark.parametrize("exercise", CHECKS)
def test_no_answer_and_nonsense(exercise):
    assert "put your answer" in check(exercise, ...).data
    assert check(exercise, "nonsense").data.startswith("**Not yet:** ")
