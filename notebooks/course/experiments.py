"""Many small trainings at a time, whose histories are one table."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import pandas as pd
from torch import nn

from bnn_utils.data import Dataset
from bnn_utils.recipe import Recipe
from bnn_utils.system import one_thread, progress_bar
from bnn_utils.training import train


@dataclass(frozen=True)
class Job:
    """One training of an experiment of many.

    Attributes:
        columns: what tells it from the others, as the table's columns: {"last": "none", "seed": 0}.
        model: the network, untrained, on the device of the data.
        recipe: how it is trained.
        after_step: see `train`; it travels to the worker as it is.
    """

    columns: dict[str, Any]
    model: nn.Module
    recipe: Recipe
    after_step: Callable[[nn.Module], None] | None = None


def _train_job(job: Job, data: Dataset) -> tuple[nn.Module, pd.DataFrame]:
    model = copy.deepcopy(job.model)
    with one_thread():  # sums depend on how they are split, so here and in a worker alike
        history = train(model, data, job.recipe, after_step=job.after_step, progress=False)
    for position, (name, value) in enumerate(job.columns.items()):
        history.insert(position, name, value)
    return model, history


def train_many(
    jobs: Sequence[Job], data: Dataset, workers: int = 2, models: list[nn.Module] | None = None
) -> pd.DataFrame:
    """Train many small networks, several at a time, and return all their histories as one table.

    Each training computes with one thread, so that the result does not depend on the number of workers. The
    networks of the jobs stay as they are.

    Args:
        jobs: the trainings; networks, columns and data travel to the workers, so keep them small.
        data: for all of them; on a GPU they run one after another, whatever `workers` says.
        workers: processes, at least 1; 1 trains in this one.
        models: a list to which the trained networks are added, in the order of `jobs`; None drops them.

    Returns:
        The job's columns, then those of `train`; a row a job and epoch, in the order of `jobs`.

    Raises:
        ValueError: no jobs, no workers, or a column that the history of `train` has already.
    """
    if not jobs:
        raise ValueError("jobs must hold at least one training")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if data.train.labels.device.type != "cpu":
        workers = 1
    pool = joblib.Parallel(n_jobs=min(workers, len(jobs)), return_as="generator")
    trained = pool(joblib.delayed(_train_job)(job, data) for job in jobs)
    histories = []
    for model, history in progress_bar(trained, total=len(jobs), desc="trainings"):
        histories.append(history)
        if models is not None:
            models.append(model)
    return pd.concat(histories, ignore_index=True)
