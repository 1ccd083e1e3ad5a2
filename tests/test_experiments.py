"""Many trainings at once give what each gives alone."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from bnn_utils import data
from bnn_utils.layers import binarized_weights
from bnn_utils.models import build
from bnn_utils.recipe import Recipe
from bnn_utils.system import one_thread
from bnn_utils.training import train
from course.experiments import Job, train_many

workers = pytest.mark.parametrize("workers", [1, 2])


@pytest.fixture(scope="module")
def few():
    digits = data.digits()
    return replace(digits, train=digits.train.limit(160), validation=digits.validation.limit(80))


def network(seed):
    torch.manual_seed(seed)
    return build("vgg_cifar10_binary", width=0.02, in_channels=1, input_size=8)


def jobs(**more):
    recipe = Recipe(epochs=2, batch_size=32, lr=1e-2)
    return [Job(dict(kind="a", trial=seed), network(seed), replace(recipe, seed=seed), **more) for seed in range(2)]


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@workers
def test_many_trainings_are_the_trainings_one_by_one(few, workers, capfd):
    todo, models = jobs(), []
    table = train_many(todo, few, workers=workers, models=models)
    assert capfd.readouterr().out == ""
    assert list(table)[:3] == ["kind", "trial", "epoch"]
    assert list(table.trial) == [0, 0, 1, 1] and list(table.epoch) == [1, 2] * 2
    with one_thread():
        histories = [train(job.model, few, job.recipe) for job in jobs()]
    alone = pd.concat(histories, ignore_index=True)
    pd.testing.assert_frame_equal(table[list(alone)].drop(columns="seconds"), alone.drop(columns="seconds"))
    for seed, (job, model) in enumerate(zip(todo, models, strict=True)):
        assert same_state(job.model, network(seed)) and job.model.training and not model.training
        with one_thread():
            train(job.model, few, job.recipe)
        assert same_state(model, job.model)


@workers
def test_a_function_is_called_after_every_step(few, workers):
    def freeze(model):
        with torch.no_grad():
            for weight in binarized_weights(model).values():
                weight.fill_(0.5)

    models = []
    train_many(jobs(after_step=freeze), few, workers=workers, models=models)
    assert all((weight == 0.5).all() for model in models for weight in binarized_weights(model).values())


def test_what_is_wrong_is_named(few):
    with pytest.raises(ValueError, match="jobs"):
        train_many([], few)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        train_many(jobs(), few, workers=0)
