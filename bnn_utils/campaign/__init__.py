"""Monte-Carlo sweeps: probabilities x trials x repairs of one network become one tidy table.

`run` is here, with its checks. One trial is in `trial`, which trials there are in `schedule`, what travels to other
processes in `workers`, what tells a campaign from others in `identity`, and its file in `results`.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from bnn_utils.bits import check_probability
from bnn_utils.campaign.identity import fingerprint
from bnn_utils.campaign.results import COLUMNS, ENDINGS, ResultsError, opened
from bnn_utils.campaign.schedule import Sweep, run_here, run_there, saved, total_after_look
from bnn_utils.campaign.trial import Terms, prepared, trial_seed
from bnn_utils.campaign.workers import WorkerError, parcel
from bnn_utils.data import Images
from bnn_utils.evaluation import Data, Inputs, Measure, device_type, read
from bnn_utils.faults import ERRORS, PARAMETERS, STORAGES, ErrorModel, inject
from bnn_utils.models import trained_on
from bnn_utils.packed import pack
from bnn_utils.repair import REPAIRS
from bnn_utils.statistics import aggregate, bounded_interval, intervals, mean_interval, median_interval
from bnn_utils.system import write_beside

__all__ = [
    "COLUMNS",
    "ResultsError",
    "WorkerError",
    "aggregate",
    "bounded_interval",
    "intervals",
    "mean_interval",
    "median_interval",
    "run",
    "saved",
    "total_after_look",
    "trial_seed",
]


def _check(
    probabilities: Sequence[float],
    trials: int,
    storage: str,
    repairs: Sequence[str],
    seed: int,
    until: float | None,
    least: int,
) -> None:
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
    if len(set(repairs)) < len(repairs):
        raise ValueError(f"repairs must differ, got {', '.join(repairs)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if until is not None and not 0 < until < 1:
        raise ValueError(f"until must lie in (0, 1), got {until}")
    if until is not None and least < 2:
        raise ValueError(f"least must be at least 2, since one trial has no interval, got {least}")


def _check_out(out: Path | None, resume: bool) -> None:
    if out is None:
        if resume:
            raise ValueError(f"resume needs out, a results file to go on with ({' or '.join(ENDINGS)})")
        return
    lasting = out.suffix in ENDINGS
    if resume and not lasting:
        raise ValueError(f"{out}: cannot be resumed, only results files can ({' or '.join(ENDINGS)})")
    if out.exists() and not (resume and out.is_file()):
        hint = "name another file, or go on with it (resume)" if lasting and out.is_file() else "name another file"
        raise FileExistsError(f"{out}: is there already; {hint}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} in")
    if not lasting and out.suffix != ".csv":
        raise ValueError(f"{out}: out must end in .csv, {' or '.join(ENDINGS)}")


def _measured(data: Any, model: nn.Module) -> Data | Measure:
    """Return what tells the accuracy of a network, from what `run` is given."""
    if isinstance(data, Images | Inputs):
        return data
    if isinstance(data, Iterable):
        return read(data).to(device_type(model))
    if callable(data):
        return Measure(data)
    raise TypeError(f"data must be Images, batches of (inputs, labels) or a function, got {type(data).__name__}")


def run(
    model: nn.Module,
    data: Images | Iterable[Any] | Callable[[nn.Module], float],
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
    resume: bool = False,
    until: float | None = None,
    least: int = 30,
    scratch: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Damage `model` again and again, evaluate it each time, and return one row a trial and repair.

    The rows are the same whatever the executor, its number of workers, and interruptions in between. (A network that
    cannot be packed computes in floats, whose sums may round otherwise with another number of threads.)

    Args:
        model: any network, on the device of `data`; it is given back unharmed. On the CPU a network of
            `bnn_utils.models` computes in its packed form, whose predictions are the same.
        data: what to evaluate on, one of three. Images; for a network from a file, `images.as_trained(facts)`. A
            DataLoader, or another iterable of batches (inputs, labels), which is read once, so that all trials see the
            same; it has to normalize by itself as the network was trained. Or a function of the network that returns a
            number, the same for the same network: it is called with the damaged network, in evaluation mode and without
            gradients; its number becomes the accuracy, whatever it is, and the loss is NaN. On the CPU, what the layers
            before the first target make of images is computed once and kept, up to `trial.KEPT_BYTES`.
        probabilities: bit error probabilities, each in [0, 1].
        trials: independent draws of errors at each probability, at least 1; with `until`, the most.
        storage: "float32" damages the floats, "packed" what `bnn_utils.packed.pack(model)` stores (on the CPU).
        repairs: names in `bnn_utils.repair.REPAIRS`; all see the same damage of the network. What a repair stores
            errs with the same probability and error model, whatever the targets.
        seed: of the campaign; a trial's seed follows from it, the probability and the trial's number.
        targets: what is hit, see `bnn_utils.faults.inject`.
        error: a name of `bnn_utils.faults.ERRORS`, or an ErrorModel.
        out: a file that does not exist yet. One that ends in .sqlite or .db is a results file, see `results`, into
            which trials are written as they finish: choose it for long campaigns. One that ends in .csv is written
            when the campaign ends or is interrupted.
        executor: runs tasks of some trials each, in threads, processes or on a cluster: a ProcessPoolExecutor,
            `dask.distributed.Client().get_executor()`, an MPIPoolExecutor. A worker computes on the CPU with one
            thread. None runs here, with torch's number of threads, on a GPU if the network is there.
        resume: go on with the results file `out`, if it is there; only trials that it lacks are run. It may hold
            more than is asked for, which stays there and is not returned.
        until: the half-width of the 95% interval of accuracy, see `bounded_interval`, at which a probability has
            enough trials, for every repair; None runs `trials` of each. A function has to give numbers in [0, 1] then.
        least: with `until`, trials before the first look at the interval, at least 2.
        scratch: a folder that all workers see, where the network and the images lie meanwhile, in a folder
            bnn_utils-…, which a process that is killed leaves behind; None is the system's for temporary files.

    Returns:
        Table with the columns COLUMNS, sorted by probability, trial and the order of `repairs`; flips of the network
        alone, accuracy in 0..1, loss in nats (NaN or infinite where the damaged network puts out such logits).

    Raises:
        ValueError: an argument outside its range, an unknown storage, repair, target or error model, an executor
            for a network on a GPU, or images that are not as the network was trained on.
        TypeError: storage "packed" of a network that cannot be packed, or data of another kind.
        FileExistsError: `out` is there already.
        FileNotFoundError: the folder of `out`, or scratch, is not there.
        OSError: `out` cannot be written, or a worker cannot read what lies in scratch.
        ResultsError: `out` is damaged, is of another campaign, or another process writes it.
        WorkerError: a worker has died. Of this and every other error, what was finished is in `out`.
    """
    probabilities = [check_probability(probability) + 0.0 for probability in probabilities]  # one form of zero
    repairs = tuple(repairs)
    _check(probabilities, trials, storage, repairs, seed, until, least)
    device = device_type(model)
    measured = _measured(data, model)
    if not isinstance(measured, Measure):
        measured.check_trained(trained_on(model))
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    with inject(pack(model) if storage == "packed" else model, 0, seed=0, targets=targets, error=error):
        pass  # what is wrong with targets or error is told before anything is written
    if executor is not None and device != "cpu":
        raise ValueError(f"an executor's workers compute on the CPU, move the network and the data there from {device}")
    if scratch is not None and not Path(scratch).is_dir():
        raise FileNotFoundError(f"{scratch}: no such folder for scratch")
    out = None if out is None else Path(out)
    _check_out(out, resume)
    terms = Terms(storage, repairs, seed, targets, error if isinstance(error, ErrorModel) else ERRORS[error])

    with ExitStack() as stack:
        file = None
        if out is not None and out.suffix in ENDINGS:
            file = stack.enter_context(opened(out, fingerprint(model, measured, terms)))
        sweep = Sweep(probabilities, trials, repairs, until, least, file)
        stack.enter_context(sweep.bar)
        try:
            if executor is None:
                run_here(stack.enter_context(prepared(model, measured, terms)), sweep)
            else:
                run_there(executor, stack.enter_context(parcel(model, measured, terms, scratch)), sweep)
        except (BrokenExecutor, CancelledError) as error_of_workers:
            kept = f"kept in {out}{'; go on with resume' if file else ''}"
            where = kept if out else "lost, since out names no file"
            raise WorkerError(
                f"the executor lost a worker (killed, or out of memory); what was finished is {where}"
            ) from error_of_workers
        finally:
            sweep.write()
            table = sweep.table()
            if out is not None and file is None and len(table):
                write_beside(out, lambda path: table.to_csv(path, index=False))
    return table
