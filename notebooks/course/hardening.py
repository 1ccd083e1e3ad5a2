"""The trainings with errors of notebook 08: which of them there are, and the tables of all, at ten seeds.

cd notebooks && python -m course.hardening      makes hardening-*.csv anew (50 small trainings)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from bnn_utils import campaign, faults
from bnn_utils.system import write_beside
from course.ablation import SEEDS, network
from course.experiments import Job, train_many
from course.tutorial import start

HISTORIES = Path(__file__).with_name("hardening-histories.csv")  # a row an epoch of a training
DAMAGE = Path(__file__).with_name("hardening-damage.csv")  # a row a network and probability, the mean over trials
PROBABILITIES = (0.0, 1e-2, 4e-2, 1e-1)
TRIALS = 10
UNDONE = {"without errors": 0.0, "p = 0.01": 0.01, "p = 0.04": 0.04}  # what is flipped in a step, and flipped back
KINDS = {"never undone, weights": ("weights",), "never undone, all but weights": ("biases", "bn_scale", "bn_shift")}
RATE = 1e-3  # of signs that flip in a step and stay


def never_undone(kinds: tuple[str, ...], rate: float, seed: int) -> Callable[[nn.Module], None]:
    """Return what flips signs of parameters of these kinds after every step of a training, for good."""
    generator = np.random.default_rng(seed)

    def flip_signs(model: nn.Module) -> None:
        for stored in faults.stored_tensors(model).values():
            if stored.kind in kinds:
                hit = torch.from_numpy(generator.random(stored.tensor.shape) < rate).to(stored.tensor.device)
                stored.tensor.data[hit] *= -1

    return flip_signs


def main() -> None:
    """Write both tables, on digits; a network is tested on the validation part, its weights alone damaged."""
    settings = start()
    dataset, base = settings.dataset(), settings.sizes.small_recipe
    jobs = [
        Job(dict(training=name, seed=seed), network(settings, dataset, seed), replace(base, seed=seed, damage_rate=p))
        for seed in SEEDS
        for name, p in UNDONE.items()
    ]
    jobs += [
        Job(
            dict(training=name, seed=seed),
            network(settings, dataset, seed),
            replace(base, seed=seed),
            never_undone(kinds, RATE, seed),
        )
        for seed in SEEDS
        for name, kinds in KINDS.items()
    ]
    models: list[nn.Module] = []
    columns = ["training", "seed", "epoch", "lr", "validation_accuracy", "sign_flips"]
    histories = train_many(jobs, dataset, models=models)[columns]
    parts = []
    for job, model in zip(jobs, models):
        if job.columns["training"] in UNDONE:
            how: dict[str, Any] = dict(storage="packed", targets=["weights"], seed=settings.seed)
            run = campaign.run(model.cpu(), dataset.to("cpu").validation, PROBABILITIES, TRIALS, **how)
            parts.append(run.groupby("probability")["accuracy"].mean().reset_index().assign(**job.columns))
    damage = pd.concat(parts)[["training", "seed", "probability", "accuracy"]]
    write_beside(HISTORIES, partial(histories.to_csv, index=False, float_format="%.6g"))
    write_beside(DAMAGE, partial(damage.to_csv, index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
