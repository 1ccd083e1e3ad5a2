"""The trainings of notebook 03: ResNets with their shortcuts and without, and the table of all, at ten seeds.

cd notebooks && python -m course.shortcuts      makes shortcuts.csv anew (40 small trainings)
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from bnn_utils.data import Dataset
from bnn_utils.models import BasicBlock, BiRealUnit
from bnn_utils.system import write_beside
from course.ablation import SEEDS
from course.experiments import Job, train_many
from course.tutorial import Settings, start

TABLE = Path(__file__).with_suffix(".csv")
KINDS = ("published", "published, without", "modern", "modern, without")
EPOCHS = 10


def _nothing(x: Tensor) -> int:
    return 0


def cut(network: nn.Module) -> nn.Module:
    """Have every block of a network add nothing to what its convolutions make; return the network."""
    for part in network.modules():
        if isinstance(part, BasicBlock):
            part.shortcut = False
        elif isinstance(part, BiRealUnit):
            part.shortcut = _nothing  # type: ignore[method-assign,assignment]
    return network


def make(settings: Settings, dataset: Dataset, kind: str, seed: int, **config: Any) -> nn.Module:
    """Return an untrained ResNet of one of KINDS, at half the profile's width unless `config` tells another.

    A seed gives the same first weights with shortcuts and without.
    """
    name = "resnet_binary" if kind.startswith("published") else "resnet_bireal"
    config = dict(width=settings.sizes.resnet_width / 2) | config
    network = replace(settings, seed=seed).network(name, dataset, **config)
    return cut(network) if kind.endswith("without") else network


def train_kinds(
    settings: Settings, dataset: Dataset, seeds: Iterable[int], models: list[nn.Module] | None = None
) -> pd.DataFrame:
    """Train all KINDS from these seeds; return their histories, and add the networks to `models`, kind by kind."""
    recipe = replace(settings.sizes.recipe, epochs=EPOCHS)
    seeds = list(seeds)
    jobs = [
        Job(dict(network=kind, seed=seed), make(settings, dataset, kind, seed), replace(recipe, seed=seed))
        for kind in KINDS
        for seed in seeds
    ]
    return train_many(jobs, dataset, models=models)


def main() -> None:
    """Write TABLE, on digits."""
    settings = start()
    histories = train_kinds(settings, settings.dataset(), SEEDS)
    shown = histories[["network", "seed", "epoch", "validation_accuracy"]]
    write_beside(TABLE, partial(shown.to_csv, index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
