"""The trainings of notebook 04: which of them there are, and the table of all, at ten seeds.

cd notebooks && python -m course.ablation      makes ablation.csv anew (300 small trainings)
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bnn_utils.data import Dataset
from bnn_utils.recipe import Recipe
from bnn_utils.system import write_beside
from course.experiments import Job, train_many
from course.tutorial import Settings, start

TABLE = Path(__file__).with_suffix(".csv")
SEEDS = range(10)
DECAYS = (0.0, 1e-4, 5e-4)
FACTORS = (1 / 20, 1 / 5, 1, 5)  # on the reference learning rate
SGD = 100  # its reference is so many times Adam's
Change = Callable[[nn.Module, Dataset], nn.Module]


class Scale(nn.Module):
    """One learned number for all logits."""

    def __init__(self, start: float):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class ScaleShift(nn.Module):
    """A learned scale and shift a channel, which start where a BatchNorm's statistics would put them."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        shape = (1, -1, 1, 1) if isinstance(norm, nn.BatchNorm2d) else (1, -1)
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.reshape(shape) + norm.eps).rsqrt()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(-scale * norm.running_mean.reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


def batchnorms(model: nn.Module) -> list[tuple[nn.Sequential, int]]:
    """Return the places of a VGG's BatchNorm layers: what holds them, and at which index."""
    parts: tuple[nn.Sequential, ...] = (model.features, model.classifier)  # type: ignore[assignment]
    return [(part, i) for part in parts for i, m in enumerate(part) if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def ending_in(make: Callable[[int], nn.Module]) -> Change:
    """Return what puts a module in the place of a VGG's last BatchNorm; `make` gets the number of terms of a logit."""

    def change(model: nn.Module, dataset: Dataset) -> nn.Module:
        classifier: Any = model.classifier
        classifier[-1] = make(classifier[-2].in_features)
        return model

    return change


def without_batchnorm(model: nn.Module, dataset: Dataset) -> nn.Module:
    """Put nothing in the place of every BatchNorm."""
    for part, index in batchnorms(model):
        part[index] = nn.Identity()
    return model


def normalized_once(model: nn.Module, dataset: Dataset) -> nn.Module:
    """Put scales and shifts in the place of every BatchNorm, which normalize one batch of 256 images at the start."""
    for part, index in batchnorms(model):
        part[index].momentum = None  # type: ignore[assignment]  # the statistics become those of the one batch
    with torch.no_grad():
        model.train()(dataset.train[:256][0])
    for part, index in batchnorms(model):
        part[index] = ScaleShift(part[index])  # type: ignore[arg-type]
    return model


VARIANTS: dict[str, Change] = {
    "BatchNorm, as published": lambda model, dataset: model,
    "BatchNorm with scale and shift": ending_in(lambda terms: nn.BatchNorm1d(10)),
    "one learned number": ending_in(lambda terms: Scale(terms**-0.5)),
    "nothing": ending_in(lambda terms: nn.Identity()),
    "scale and shift, set once": normalized_once,
    "no BatchNorm anywhere": without_batchnorm,
}


def network(settings: Settings, dataset: Dataset, seed: int) -> nn.Module:
    """Return the narrow VGG that all these trainings start from, untrained, on the CPU or GPU of the settings."""
    return replace(settings, seed=seed).network("vgg_cifar10_binary", dataset, settings.sizes.small_width)


def rates(base: Recipe, optimizer: str) -> list[float]:
    """Return the learning rates of an optimizer."""
    return [base.lr * factor * (SGD if optimizer == "sgd" else 1) for factor in FACTORS]


def train_variants(settings: Settings, dataset: Dataset, seeds: Iterable[int], names: Iterable[str]) -> pd.DataFrame:
    """Train networks that end in different ways; a row a training, as in TABLE."""
    base = settings.sizes.small_recipe
    jobs = [
        Job(
            dict(variant=name, seed=seed),
            VARIANTS[name](network(settings, dataset, seed), dataset).to(settings.device),
            replace(base, seed=seed),
        )
        for name in names
        for seed in seeds
    ]
    return _ends(train_many(jobs, dataset), ["variant", "seed"])


def train_grid(
    settings: Settings, dataset: Dataset, seeds: Iterable[int], optimizers: Iterable[str], decays: Iterable[float]
) -> pd.DataFrame:
    """Train at every learning rate, with these weight decays; a row a training, as in TABLE."""
    base = settings.sizes.small_recipe
    jobs = [
        Job(
            dict(optimizer=optimizer, weight_decay=decay, learning_rate=rate, seed=seed),
            network(settings, dataset, seed),
            replace(base, optimizer=optimizer, weight_decay=decay, lr=rate, seed=seed),
        )
        for optimizer in optimizers
        for decay in decays
        for rate in rates(base, optimizer)
        for seed in seeds
    ]
    return _ends(train_many(jobs, dataset), ["optimizer", "weight_decay", "learning_rate", "seed"])


def _ends(history: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a row a training: accuracy on the validation part after the last epoch, and all flips of a weight."""
    each = history.groupby(keys, sort=False)
    ends = each.agg(validation_accuracy=("validation_accuracy", "last"), flips=("sign_flips", "sum"))
    return ends.reset_index()


def main() -> None:
    """Write TABLE: all variants and the whole grid, on digits."""
    settings = start()
    dataset = settings.dataset()
    ends = pd.concat(
        [
            train_variants(settings, dataset, SEEDS, VARIANTS),
            train_grid(settings, dataset, SEEDS, ("adam", "sgd"), DECAYS),
        ],
        ignore_index=True,
    )
    write_beside(TABLE, partial(ends.to_csv, index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
