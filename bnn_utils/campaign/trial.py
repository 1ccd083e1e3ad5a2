"""One trial: the bits that its seed flips, and what each repair makes of the network that they leave."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bnn_utils.campaign.results import Row
from bnn_utils.evaluation import Data, Evaluation, Measure, batches, evaluate, score
from bnn_utils.faults import ErrorModel, float32_storage, inject, inject_tensors, targeted
from bnn_utils.models import name_of
from bnn_utils.packed import PackedModel, State, deployed, pack
from bnn_utils.repair import REPAIRS, Plan

KEPT_BYTES = 512 << 20  # at most, of what a network's first stages put out, in a campaign, its repairs together


def trial_seed(seed: int, probability: float, trial: int) -> int:
    """Return the seed of one trial: a function of these three alone, so order, workers and repairs do not matter."""
    words = np.array([probability], np.float64).view(np.uint32)
    sequence = np.random.SeedSequence([seed, *words.tolist(), trial])
    return int(sequence.generate_state(1, np.uint32)[0])


@dataclass(frozen=True)
class Terms:
    """What a trial's rows depend on, besides the network, the images, the probability and the number of the trial."""

    storage: str
    repairs: tuple[str, ...]
    seed: int
    targets: tuple[str, ...]
    error: ErrorModel


class _Evaluator:
    """Evaluates one network again and again, of which nothing but the targets changes.

    In its packed form only the stages that hold targets are packed anew, and what the stages before them make of the
    images is kept; of fewer stages where that would take more than KEPT_BYTES. All results are the same to the last
    bit. A repair that stores something has no part in it: what it stores errs too, and with it any stage.
    """

    def __init__(self, model: nn.Module, data: Data | Measure, targets: Sequence[str]):
        self.model, self.data, self.names = model, data, list(targeted(model, targets))
        self.room: float = KEPT_BYTES
        # By repair: the network, its stages with targets, the stage to go on from, and what is kept, batch by batch.
        self.known: dict[str, tuple[Any, set[int], int, list[list[State]]]] = {}

    def __call__(self, repair: str, plan: Plan) -> Evaluation:
        """Return the loss and the accuracy of the network as it is now, inside `plan.read()`."""
        if isinstance(self.data, Measure):
            return self.data(self.model)
        if plan.stored:
            return evaluate(deployed(self.model), self.data)
        known = repair in self.known
        if not known:
            self.known[repair] = self._keep(deployed(self.model), self.data)
        network, stages, start, kept = self.known[repair]
        if known and network is not self.model:
            network.repack(self.model, stages)
        if start == 0:
            return evaluate(network, self.data)
        return score(torch.cat([network.after(start, states) for states in kept]), self.data.labels)

    def _keep(self, network: nn.Module, data: Data) -> tuple[nn.Module, set[int], int, list[list[State]]]:
        if not isinstance(network, PackedModel):
            return network, set(), 0, []
        stages = {network.stage_of(name) for name in self.names}
        inputs = batches(data)
        x = next(inputs)
        for start in range(min(stages, default=0), 0, -1):
            states = network.before(start, x)
            size = len(data) / len(x) * sum(part.nbytes for state in states for part in state)
            if size <= self.room:
                self.room -= size
                return network, stages, start, [states, *(network.before(start, x) for x in inputs)]
        return network, stages, 0, []


def _one_form(value: float) -> float:
    """Return a number as files keep it: NaN has many forms and zero has two."""
    return math.nan if math.isnan(value) else value + 0.0


Trial = Callable[[float, int], list[Row]]


@contextmanager
def prepared(model: nn.Module, data: Data | Measure, terms: Terms) -> Iterator[Trial]:
    """Hold `model` as its storage does, and yield what makes a trial's rows of its probability and number.

    A trial has one row a repair, all of them on the same damage of the network.
    """
    network: nn.Module = pack(model) if terms.storage == "packed" else model
    name = name_of(model)
    unharmed: dict[str, Evaluation] = {}
    with nullcontext() if terms.storage == "packed" else float32_storage(network):
        plans = {repair: REPAIRS[repair](network) for repair in terms.repairs}
        # Streams of their own, so that no two repairs, and no tensor of the network, err in the same places.
        beside = {
            repair: {f"{repair}: {name}": tensor for name, tensor in plan.stored.items()}
            for repair, plan in plans.items()
        }
        evaluator = _Evaluator(network, data, terms.targets)

        def trial(probability: float, number: int) -> list[Row]:
            seed = trial_seed(terms.seed, probability, number)
            rows = []
            with inject(network, probability, seed=seed, targets=terms.targets, error=terms.error) as flips:
                for repair in terms.repairs:
                    with inject_tensors(beside[repair], probability, seed=seed, error=terms.error) as others:
                        unhit = flips.total == others.total == 0
                        result = unharmed.get(repair) if unhit else None
                        if result is None:
                            with plans[repair].read():
                                result = evaluator(repair, plans[repair])
                            if unhit:  # a trial without a flip gives what every such trial gives
                                unharmed[repair] = result
                    rows.append(
                        dict(
                            network=name,
                            dataset=data.dataset,
                            storage=terms.storage,
                            repair=repair,
                            probability=probability,
                            trial=number,
                            seed=seed,
                            flips=flips.total,
                            loss=_one_form(result.loss),
                            accuracy=_one_form(result.accuracy),
                        )
                    )
            return rows

        yield trial
