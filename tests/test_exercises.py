"""The checks of exercises: nothing yet, a typical wrong answer, an answer of another kind."""

import pytest

from course.exercises import CHECKS, check

# Answers that a reader may well give first. That the solutions pass is seen when the course runs.
WRONG: dict[str, list[object]] = {
    "04-1": [1 / 1024, 1],
    "04-2": [5e-4],
    "04-3": [lambda latent, lr: latent / lr],
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
