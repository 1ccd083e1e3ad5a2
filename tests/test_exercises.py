"""The checks of exercises: nothing yet, a typical wrong answer, an answer of another kind."""

import pytest

from course.exercises import CHECKS, check

# Answers that a reader may well give first. That the solutions pass is seen when the course runs.
WRONG: dict[str, list[object]] = {
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
