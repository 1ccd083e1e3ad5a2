"""Monte-Carlo sweeps: probabilities x trials x repairs of one network become one tidy table."""

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from bnn_utils.bits import check_probability
from bnn_utils.data import Images
from bnn_utils.faults import PARAMETERS, STORAGES, ErrorModel, float32_storage, inject, inject_tensors, targeted
from bnn_utils.packed import PackedModel, State, deployed, pack
from bnn_utils.repair import REPAIRS, Plan
from bnn_utils.system import progress_bar, write_beside
from bnn_utils.training import Evaluation, batches, evaluate, score

COLUMNS = [
    "network",
    "dataset",
    "storage",
    "repair",
    "probability",
    "trial",
    "seed",
    "flips",
    "loss",
    "accuracy",
]  # fmt: skip
KEPT_BYTES = 512 << 20  # at most, of what a network's first stages put out, in a task of `run`, its repairs together


def trial_seed(seed: int, probability: float, trial: int) -> int:
    """Return the seed of one trial: a function of these three alone, so order, workers and repairs do not matter."""
    words = np.array([probability], np.float64).view(np.uint32)
    sequence = np.random.SeedSequence([seed, *words.tolist(), trial])
    return int(sequence.generate_state(1, np.uint32)[0])


class _Evaluator:
    """Evaluates one network again and again, of which nothing but the targets changes.

    In its packed form only the stages that hold targets are packed anew, and what the stages before them make of the
    images is kept; of fewer stages where that would take more than KEPT_BYTES. All results are the same to the last
    bit. A repair that stores something has no part in it: what it stores errs too, and with it any stage.
    """

    def __init__(self, model: nn.Module, data: Images, targets: Sequence[str]):
        self.model, self.data, self.names = model, data, list(targeted(model, targets))
        self.room: float = KEPT_BYTES
        # By repair: the network, its stages with targets, the stage to go on from, and what is kept, batch by batch.
        self.known: dict[str, tuple[Any, set[int], int, list[list[State]]]] = {}

    def __call__(self, repair: str, plan: Plan) -> Evaluation:
        """Return the loss and the accuracy of the network as it is now, inside `plan.read()`."""
        if plan.stored:
            return evaluate(deployed(self.model), self.data)
        known = repair in self.known
        if not known:
            self.known[repair] = self._keep(deployed(self.model))
        network, stages, start, kept = self.known[repair]
        if known and network is not self.model:
            network.repack(self.model, stages)
        if start == 0:
            return evaluate(network, self.data)
        return score(torch.cat([network.after(start, states) for states in kept]), self.data.labels)

    def _keep(self, network: nn.Module) -> tuple[nn.Module, set[int], int, list[list[State]]]:
        if not isinstance(network, PackedModel):
            return network, set(), 0, []
        stages = {network.stage_of(name) for name in self.names}
        inputs = batches(self.data)
        x = next(inputs)
        for start in range(min(stages, default=0), 0, -1):
            states = network.before(start, x)
            size = len(self.data) / len(x) * sum(part.nbytes for state in states for part in state)
            if size <= self.room:
                self.room -= size
                return network, stages, start, [states, *(network.before(start, x) for x in inputs)]
        return network, stages, 0, []


def _trials(
    model: nn.Module,
    data: Images,
    probability: float,
    trials: int,
    storage: str,
    repairs: Sequence[str],
    seed: int,
    targets: Sequence[str],
    error: str | ErrorModel,
) -> Iterator[list[dict[str, Any]]]:
    """Yield, trial by trial, one row a repair, all of a trial's repairs on the same damage of the network."""
    unharmed: dict[str, Evaluation] = {}
    packed = storage == "packed"
    if packed:
        model = pack(model)
    with nullcontext() if packed else float32_storage(model):
        plans = {repair: REPAIRS[repair](model) for repair in repairs}
        # Streams of their own, so that no two repairs, and no tensor of the network, err in the same places.
        beside = {
            repair: {f"{repair}: {name}": tensor for name, tensor in plan.stored.items()}
            for repair, plan in plans.items()
        }
        evaluator = _Evaluator(model, data, targets)
        for trial in range(trials):
            own_seed = trial_seed(seed, probability, trial)
            rows = []
            with inject(model, probability, seed=own_seed, targets=targets, error=error) as flips:
                for repair in repairs:
                    with inject_tensors(beside[repair], probability, seed=own_seed, error=error) as others:
                        unhit = flips.total == others.total == 0
                        result = unharmed.get(repair) if unhit else None
                        if result is None:
                            with plans[repair].read():
                                result = evaluator(repair, plans[repair])
                            if unhit:  # a trial without a flip gives what every such trial gives
                                unharmed[repair] = result
                    rows.append(
                        dict(
                            network=getattr(model, "name", type(model).__name__),
                            dataset=data.dataset,
                            storage=storage,
                            repair=repair,
                            probability=probability,
                            trial=trial,
                            seed=own_seed,
                            flips=flips.total,
                            loss=result.loss,
                            accuracy=result.accuracy,
                        )
                    )
            yield rows


def _all_trials(model: nn.Module, *arguments: Any) -> list[list[dict[str, Any]]]:
    # A copy of its own: torch hands tensors to other processes as shared memory, where tasks would damage each other's.
    return list(_trials(copy.deepcopy(model), *arguments))


def run(
    model: nn.Module,
    data: Images,
    probabilities: Sequence[float],
    trials: int,
    *,
    storage: str = "float32",
    repairs: Sequence[str] = ("none",),
    seed: int = 0,
    targets: Sequence[str] = PARAMETERS,
    error: str | ErrorModel = "flip",
    out: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
) -> pd.DataFrame:
    """Damage `model` again and again, evaluate it each time, and return one row a trial and repair.

    Args:
        model: a network on the device of `data`; it is given back unharmed. On the CPU a network of
            `bnn_utils.models` computes in its packed form, whose predictions are the same.
        data: the images to evaluate on. On the CPU, what the layers before the first target make of them is computed
            once and kept, up to KEPT_BYTES.
        probabilities: bit error probabilities, each in [0, 1].
        trials: independent draws of errors at each probability, at least 1.
        storage: "float32" damages the floats, "packed" what `bnn_utils.packed.pack(model)` stores (on the CPU).
        repairs: names in `bnn_utils.repair.REPAIRS`; all see the same damage of the network. What a repair stores
            errs with the same probability and error model, whatever the targets.
        seed: of the campaign; a trial's seed follows from it, the probability and the trial's number.
        targets: what is hit, see `bnn_utils.faults.inject`.
        error: a name of `bnn_utils.faults.ERRORS`, or an ErrorModel.
        out: a CSV file to write as trials finish; it must not exist yet.
        executor: runs each probability as one task (the network and the images travel with it); None runs here.

    Returns:
        Table with the columns of COLUMNS, sorted by probability, trial and the order of `repairs`; flips of the
        network alone, accuracy in 0..1, loss in nats (NaN or infinite where the damaged network puts out such logits).

    Raises:
        ValueError: an argument outside its range, or an unknown storage, repair, target or error model.
        TypeError: storage "packed" of a network that cannot be packed.
        FileExistsError: `out` is there already.
        FileNotFoundError: the folder of `out` is not there.
    """
    probabilities = [check_probability(probability) for probability in probabilities]
    if not probabilities:
        raise ValueError("probabilities must name at least one probability")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if storage not in STORAGES:
        raise ValueError(f"unknown storage {storage!r}, expected one of {', '.join(STORAGES)}")
    if not repairs:
        raise ValueError('repairs must name at least one repair ("none" for the network as damaged)')
    for repair in repairs:
        if repair not in REPAIRS:
            raise ValueError(f"unknown repair {repair!r}, expected one of {', '.join(REPAIRS)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    with inject(pack(model) if storage == "packed" else model, 0, seed=0, targets=targets, error=error):
        pass  # what is wrong with targets or error is told before anything is written
    if out is not None and Path(out).exists():
        raise FileExistsError(f"{out}: is there already; name another file")
    if out is not None and not Path(out).parent.is_dir():
        raise FileNotFoundError(f"{Path(out).parent}: no such folder to write {Path(out).name} in")

    ordered = sorted(set(probabilities))
    rows: list[dict[str, Any]] = []
    bar = progress_bar(total=len(ordered) * trials, desc="trials", unit="trial")

    def finished(trial_rows: list[dict[str, Any]]) -> None:
        rows.extend(trial_rows)
        bar.update()

    try:
        with bar:
            tasks = [(model, data, p, trials, storage, tuple(repairs), seed, targets, error) for p in ordered]
            if executor is None:
                for task in tasks:
                    for trial_rows in _trials(*task):
                        finished(trial_rows)
                        if out is not None:
                            _write(out, rows, repairs)
            else:
                for future in as_completed([executor.submit(_all_trials, *task) for task in tasks]):
                    for trial_rows in future.result():
                        finished(trial_rows)
                    if out is not None:
                        _write(out, rows, repairs)
    finally:
        if out is not None and rows:
            _write(out, rows, repairs)
    return _table(rows, repairs)


def _table(rows: list[dict[str, Any]], repairs: Sequence[str]) -> pd.DataFrame:
    order = {repair: index for index, repair in enumerate(repairs)}
    ordered = sorted(rows, key=lambda row: (row["probability"], row["trial"], order[row["repair"]]))
    return pd.DataFrame(ordered, columns=COLUMNS)


def _write(out: str | os.PathLike[str], rows: list[dict[str, Any]], repairs: Sequence[str]) -> None:
    table = _table(rows, repairs)
    write_beside(out, lambda path: table.to_csv(path, index=False))


def mean_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Return (mean, half-width of its two-sided Student t interval) of independent trials.

    Args:
        values: one number a trial.
        confidence: of the interval, in (0, 1).

    Returns:
        The half-width is NaN for a single trial, which says nothing about its spread; both are NaN if a value is.

    Source: Student, The probable error of a mean, Biometrika 6, 1908.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()) if len(values) else float("nan"), float("nan")
    with np.errstate(invalid="ignore"):
        error = values.std(ddof=1) / np.sqrt(len(values))
        return float(values.mean()), float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)


def median_interval(values: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return (median, low, high): the median of independent trials and its interval, for values without a mean.

    The interval is distribution-free, from order statistics; NaN counts as infinite, so that it cannot be hidden.

    Args:
        values: one number a trial, such as a damaged network's loss.
        confidence: of the interval, in (0, 1).

    Returns:
        low and high are NaN where the trials are too few for any interval.

    Source: W. J. Conover, Practical Nonparametric Statistics, 1999, section 3.2; computed by scipy's quantile_test.
    """
    values = np.asarray(values, np.float64)
    values = np.where(np.isnan(values), np.inf, values)
    interval = stats.quantile_test(values, p=0.5).confidence_interval(confidence)
    return float(np.median(values)), float(interval.low), float(interval.high)


def intervals(table: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """Return mean and 95% interval of `value` over the rows that agree in `keys`, in their order of appearance.

    Args:
        table: a row a trial.
        keys: columns that tell settings apart.
        value: column of numbers.

    Returns:
        The keys, `value` (mean), `value`_half (half-width of the 95% interval) and trials.
    """
    rows = []
    for key, group in table.groupby(list(keys), sort=False):
        mean, half = mean_interval(group[value])
        rows.append(dict(zip(keys, key, strict=True)) | {value: mean, f"{value}_half": half, "trials": len(group)})
    return pd.DataFrame(rows)


def aggregate(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean and 95% interval of a campaign's trials, one row a network, data set, storage, repair, probability.

    Columns: those five, trials, flips (mean number), not_finite (trials whose loss is NaN or infinite), loss and
    accuracy (means), loss_half and accuracy_half (half-widths of their 95% intervals). A mean over finite losses
    alone would hide the worst trials, so a loss that is not finite makes the mean so too; see `median_interval`.
    """
    keys = ["network", "dataset", "storage", "repair", "probability"]
    table = table.assign(not_finite=~np.isfinite(table["loss"]))
    means = table.groupby(keys, sort=False).agg(
        trials=("trial", "size"), flips=("flips", "mean"), not_finite=("not_finite", "sum")
    )
    for value in ("loss", "accuracy"):
        means = means.join(intervals(table, keys, value).drop(columns="trials").set_index(keys))
    return means.reset_index()
