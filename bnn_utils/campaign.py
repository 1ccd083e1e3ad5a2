"""Monte-Carlo sweeps: probabilities x trials x repairs of one network become one tidy table."""

import copy
import hashlib
import json
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor, nn

from bnn_utils import results
from bnn_utils.bits import check_probability
from bnn_utils.checkpoints import checksum
from bnn_utils.data import Images
from bnn_utils.faults import (
    ERRORS,
    PARAMETERS,
    STORAGES,
    ErrorModel,
    float32_storage,
    inject,
    inject_tensors,
    targeted,
)
from bnn_utils.packed import PackedModel, State, deployed, pack
from bnn_utils.repair import REPAIRS, Plan
from bnn_utils.results import Results, Row
from bnn_utils.statistics import aggregate as aggregate
from bnn_utils.statistics import bounded_interval as bounded_interval
from bnn_utils.statistics import intervals as intervals
from bnn_utils.statistics import mean_interval as mean_interval
from bnn_utils.statistics import median_interval as median_interval
from bnn_utils.system import progress_bar, write_beside
from bnn_utils.training import Evaluation, batches, evaluate, score, trained_on

COLUMNS = list(results.COLUMNS)
TASK_SECONDS, MOST_TASKS = 1.0, 1000  # how long a task should take; how many a probability has at most, between looks
KEPT_BYTES = 512 << 20  # at most, of what a network's first stages put out, in a campaign, its repairs together
WRITE_SECONDS = 0.2  # how much finished work a process that is killed may lose, here: writing takes its time too


class WorkerError(RuntimeError):
    """The executor has lost a worker, or all of them; what was finished before is kept."""


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


@dataclass(frozen=True)
class _Terms:
    """What a trial's rows depend on, besides the network, the images, the probability and the number of the trial."""

    storage: str
    repairs: tuple[str, ...]
    seed: int
    targets: tuple[str, ...]
    error: ErrorModel


_Trial = Callable[[float, int], list[Row]]


@contextmanager
def _prepared(model: nn.Module, data: Images, terms: _Terms) -> Iterator[_Trial]:
    """Hold `model` as its storage does, and yield what makes a trial's rows of its probability and number.

    A trial has one row a repair, all of them on the same damage of the network.
    """
    network: nn.Module = pack(model) if terms.storage == "packed" else model
    name = getattr(model, "name", type(model).__name__)
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
                            # NaN has many forms and zero has two, of which files keep one.
                            loss=math.nan if math.isnan(result.loss) else result.loss + 0.0,
                            accuracy=result.accuracy,
                        )
                    )
            return rows

        yield trial


def _injection(error: ErrorModel) -> str:
    """Return a digest of what damage does, which changes if random streams or injection ever draw otherwise."""
    digest = hashlib.sha256(str(trial_seed(1, 1e-3, 2)).encode())
    for probability in (1e-4, 1e-2, 0.3):
        probe = {"numbers": torch.linspace(-2, 2, 3000), "words": torch.arange(1500) - 700}
        with inject_tensors(probe, probability, seed=3, error=error):
            digest.update(checksum("", probe).encode())
    return digest.hexdigest()


def _fingerprint(model: nn.Module, data: Images, terms: _Terms) -> dict[str, str]:
    """Return what identifies a campaign: rows of two campaigns that agree in these lines may stand in one file."""
    with float32_storage(model):
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        stored = checksum("", state)
        packed = terms.storage == "packed" or isinstance(deployed(model), PackedModel)
    kinds = sorted({str(x.dtype) for x in state.values() if x.is_floating_point()})
    config = getattr(model, "config", None)
    rates = {name: value for name, value in asdict(terms.error).items() if name not in ("meaning", "source")}
    return {
        "network": getattr(model, "name", type(model).__name__),
        "config": " ".join(str(model).split()) if config is None else json.dumps(config),
        "network's SHA-256": stored,
        "dataset": data.dataset,
        "images": str(len(data)),
        "images' SHA-256": checksum(
            json.dumps([data.mean, data.std]), {"pixels": data.pixels.cpu(), "labels": data.labels.cpu()}
        ),
        "storage": terms.storage,
        "repairs": ", ".join(terms.repairs),
        "targets": ", ".join(terms.targets),
        "error": ", ".join(f"{name} {value}" for name, value in rates.items()),
        "seed": str(terms.seed),
        "arithmetic": "packed integers" if packed else f"{', '.join(kinds)} on {data.labels.device.type}",
        "injection": _injection(terms.error),
    }


# What travels to a worker: the tensors in a file, once; the rest with every task, since nobody knows the workers.


@dataclass(eq=False)
class _Place:
    """What stands in a travelling network where a tensor was."""

    name: str
    stride: tuple[int, ...]
    trained: bool | None  # whether a parameter requires gradients; None for a buffer


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def _emptied(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with a _Place for every parameter and buffer; ones that are shared stay shared."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    places = {
        id(x): _Place(name, x.stride(), x.requires_grad if isinstance(x, nn.Parameter) else None) for name, x in named
    }
    return copy.deepcopy(model, places)


def _filled(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Undo `_emptied`."""
    memo: dict[int, Any] = {}
    named: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for _, place in named:
        held = tensors[place.name]
        # Memory laid out as it was, since that can decide how sums are rounded.
        x = torch.empty_strided(held.shape, place.stride, dtype=held.dtype).copy_(held)
        memo[id(place)] = x if place.trained is None else nn.Parameter(x, place.trained)
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class _Parcel:
    """A campaign on its way to a worker: where its tensors are, and all that is not a tensor.

    Attributes:
        path, digest: of the safetensors file, and its SHA-256.
        network: what `_emptied` makes of it.
        images: the fields of Images besides pixels and labels.
    """

    path: str
    digest: str
    network: nn.Module
    images: dict[str, Any]
    terms: _Terms

    def unpacked(self) -> tuple[nn.Module, Images]:
        """Return the network and the images."""
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise OSError(
                f"a worker cannot read {self.path} ({error.strerror}); scratch must be a folder that all workers see"
            ) from None
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise OSError(f"{self.path}: a worker reads other bytes than were written; scratch must be a sound folder")
        tensors = safetensors.torch.load(content)
        pixels, labels = tensors.pop("images pixels"), tensors.pop("images labels")
        return _filled(self.network, tensors), Images(pixels, labels, **self.images)


@contextmanager
def _parcel(model: nn.Module, data: Images, terms: _Terms, scratch: str | os.PathLike[str] | None) -> Iterator[_Parcel]:
    """Write the tensors into a new folder in `scratch`, which goes when the context ends."""
    tensors = {**_tensors(model), "images pixels": data.pixels, "images labels": data.labels}
    content = safetensors.torch.save(
        {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    )
    images = {
        field.name: getattr(data, field.name) for field in fields(Images) if field.name not in ("pixels", "labels")
    }
    with tempfile.TemporaryDirectory(prefix="bnn_utils-", dir=scratch) as folder:
        path = Path(folder).absolute() / "campaign.safetensors"
        try:
            path.write_bytes(content)
        except OSError as error:
            raise OSError(f"{folder}: cannot be written ({error.strerror}); scratch names another folder") from None
        yield _Parcel(str(path), hashlib.sha256(content).hexdigest(), _emptied(model), images, terms)


class _Kept(threading.local):
    """The campaign that a worker has ready: its own in every thread, since trials damage the network in place."""

    parcel: tuple[str, str] | None = None
    trial: _Trial
    context = ExitStack()


_kept = _Kept()


@cache
def _end_with_parent() -> None:
    """Have a process of a pool end when the process that started it is killed; else it would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None and threading.current_thread() is threading.main_thread():

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _ready(parcel: _Parcel) -> _Trial:
    """Return what makes a trial's rows; the network and the images are loaded and prepared for the first task only."""
    _end_with_parent()
    if _kept.parcel != (parcel.path, parcel.digest):
        _kept.parcel = None
        _kept.context.close()
        _kept.context = ExitStack()
        _kept.trial = _kept.context.enter_context(_prepared(*parcel.unpacked(), parcel.terms))
        _kept.parcel = parcel.path, parcel.digest
    return _kept.trial


def _work(parcel: _Parcel, probability: float, numbers: Sequence[int]) -> tuple[list[list[Row]], float]:
    """Return the rows of trials, trial by trial, and the seconds that one of them took."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there are other workers for the other cores
    try:
        trial = _ready(parcel)
        started = time.perf_counter()
        rows = [trial(probability, number) for number in numbers]
        return rows, (time.perf_counter() - started) / len(numbers)
    finally:
        torch.set_num_threads(threads)


class _Sweep:
    """Which trials are done, and which are to be run next.

    Attributes:
        goals: for each probability, the trials to have before the next look at it; at the end, those to report.
        done: for each probability, the rows of finished trials by their number.
    """

    def __init__(
        self,
        probabilities: Sequence[float],
        trials: int,
        repairs: Sequence[str],
        until: float | None,
        least: int,
        kept: Results | None,
    ):
        self.trials, self.repairs, self.until, self.kept = trials, repairs, until, kept
        self.goals = {p: trials if until is None else min(least, trials) for p in sorted(set(probabilities))}
        self.done: dict[float, dict[int, list[Row]]] = {p: {} for p in self.goals}
        self._unwritten: list[Row] = []
        self._halves: dict[float, float] = {}
        self._told = -math.inf
        for row in kept.rows if kept else ():
            if row["probability"] in self.done:
                self.done[row["probability"]].setdefault(row["trial"], []).append(row)
        self.bar = progress_bar(total=sum(self.goals.values()), initial=self._reached(), desc="trials", unit="trial")

    def _reached(self) -> int:
        return sum(sum(number < self.goals[p] for number in done) for p, done in self.done.items())

    def accuracies(self, probability: float) -> list[list[float]]:
        """Return those of each repair, in the order of the trials, up to the goal."""
        done = self.done[probability]
        rows = [row for number in range(self.goals[probability]) for row in done.get(number, ())]
        return [[row["accuracy"] for row in rows if row["repair"] == repair] for repair in self.repairs]

    def planned(self, probability: float) -> list[int]:
        """Return the trials to run before the next look, none if enough is known; all before them must be done."""
        done = self.done[probability]
        while True:
            goal = self.goals[probability]
            missing = [number for number in range(goal) if number not in done]
            if missing or self.until is None:
                return missing
            self.goals[probability] = total_after_look(
                self.accuracies(probability), self.until, self.trials, bounded_interval
            )
            if self.goals[probability] == goal:
                return []
            self.bar.total = sum(self.goals.values())
            self.bar.update(self._reached() - self.bar.n)

    def add(self, trials: Iterable[list[Row]]) -> None:
        """Take the rows of finished trials; `write` puts them into the file."""
        for rows in trials:
            self.done[rows[0]["probability"]][rows[0]["trial"]] = rows
            self._unwritten += rows
            self.bar.update()

    def write(self) -> None:
        """Write what is not written yet, whole trials."""
        if self.kept is not None and self._unwritten:
            self.kept.append(self._unwritten)
        self._unwritten = []

    def tell(self, probability: float) -> None:
        """Show the widest interval, as it was when its probability was last told; at most once a second."""
        if self.bar.disable or time.perf_counter() - self._told < 1:
            return
        self._told = time.perf_counter()
        half = max(bounded_interval(values)[1] for values in self.accuracies(probability))
        if math.isnan(half):  # of a single trial
            return
        self._halves[probability] = half
        worst = max(self._halves, key=lambda p: self._halves[p])
        self.bar.set_postfix_str(f"±{self._halves[worst]:.2g} at p = {worst:g}")

    def table(self) -> pd.DataFrame:
        """Return the rows of the trials up to the goals that are done."""
        order = {repair: index for index, repair in enumerate(self.repairs)}
        trials = (self.done[p][n] for p, goal in self.goals.items() for n in sorted(self.done[p]) if n < goal)
        rows = [row for trial in trials for row in sorted(trial, key=lambda row: order[row["repair"]])]
        return pd.DataFrame(rows, columns=COLUMNS)


def _run_here(trial: _Trial, sweep: _Sweep) -> None:
    written = time.perf_counter()
    while planned := {p: numbers for p in sweep.goals if (numbers := sweep.planned(p))}:
        for p, numbers in planned.items():
            for number in numbers:
                sweep.add([trial(p, number)])
                sweep.tell(p)
                if time.perf_counter() - written > WRITE_SECONDS:
                    sweep.write()
                    written = time.perf_counter()


def _run_there(executor: Executor, parcel: _Parcel, sweep: _Sweep) -> None:
    finished: SimpleQueue[Future[Any]] = SimpleQueue()
    running: dict[Future[Any], float] = {}
    tasks = dict.fromkeys(sweep.goals, 0)  # that are running or waiting, of each probability

    def submit(p: float, numbers: Sequence[int], size: int) -> None:
        for start in range(0, len(numbers), size):
            future = executor.submit(_work, parcel, p, tuple(numbers[start : start + size]))
            running[future] = p
            tasks[p] += 1
            future.add_done_callback(finished.put)

    try:
        # One trial of each probability first, to see how long it takes.
        rest = {p: sweep.planned(p) for p in sweep.goals}
        slowest = 0.0
        for p, numbers in rest.items():
            submit(p, numbers[:1], 1)
            rest[p] = numbers[1:]
        while running:
            batch = [finished.get()]
            while not finished.empty():
                batch.append(finished.get())
            failures = []
            for future in batch:
                p = running.pop(future)
                tasks[p] -= 1
                failure = CancelledError() if future.cancelled() else future.exception()
                if failure is not None:
                    failures.append(failure)
                    continue
                trials, seconds = future.result()
                slowest = max(slowest, seconds)
                sweep.add(trials)
                sweep.tell(p)
            sweep.write()
            if failures:
                raise failures[0]
            for p in sweep.goals:
                if not tasks[p] and not rest[p]:
                    rest[p] = sweep.planned(p)
                if rest[p]:
                    size = max(1, int(TASK_SECONDS / max(slowest, 1e-6)), -(-len(rest[p]) // MOST_TASKS))
                    submit(p, rest[p], size)
                    rest[p] = []
    finally:
        for future in running:
            future.cancel()


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
            raise ValueError(f"resume needs out, a results file to go on with ({' or '.join(results.ENDINGS)})")
        return
    lasting = out.suffix in results.ENDINGS
    if resume and not lasting:
        raise ValueError(f"{out}: cannot be resumed, only results files can ({' or '.join(results.ENDINGS)})")
    if out.exists() and not (resume and out.is_file()):
        hint = "name another file, or go on with it (resume)" if lasting and out.is_file() else "name another file"
        raise FileExistsError(f"{out}: is there already; {hint}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} in")
    if not lasting and out.suffix != ".csv":
        raise ValueError(f"{out}: out must end in .csv, {' or '.join(results.ENDINGS)}")


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
    resume: bool = False,
    until: float | None = None,
    least: int = 30,
    scratch: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Damage `model` again and again, evaluate it each time, and return one row a trial and repair.

    The rows are the same whatever the executor, its number of workers, and interruptions in between. (A network that
    cannot be packed computes in floats, whose sums may round otherwise with another number of threads.)

    Args:
        model: a network on the device of `data`; it is given back unharmed. On the CPU a network of
            `bnn_utils.models` computes in its packed form, whose predictions are the same.
        data: the images to evaluate on; for a network from a file, `images.as_trained(facts)`. On the CPU, what the
            layers before the first target make of them is computed once and kept, up to KEPT_BYTES.
        probabilities: bit error probabilities, each in [0, 1].
        trials: independent draws of errors at each probability, at least 1; with `until`, the most.
        storage: "float32" damages the floats, "packed" what `bnn_utils.packed.pack(model)` stores (on the CPU).
        repairs: names in `bnn_utils.repair.REPAIRS`; all see the same damage of the network. What a repair stores
            errs with the same probability and error model, whatever the targets.
        seed: of the campaign; a trial's seed follows from it, the probability and the trial's number.
        targets: what is hit, see `bnn_utils.faults.inject`.
        error: a name of `bnn_utils.faults.ERRORS`, or an ErrorModel.
        out: a file that does not exist yet. One that ends in .sqlite or .db is a results file, see
            `bnn_utils.results`, into which trials are written as they finish: choose it for long campaigns. One that
            ends in .csv is written when the campaign ends or is interrupted.
        executor: runs tasks of some trials each, in threads, processes or on a cluster: a ProcessPoolExecutor,
            `dask.distributed.Client().get_executor()`, an MPIPoolExecutor. A worker computes on the CPU with one
            thread. None runs here, with torch's number of threads, on a GPU if the network is there.
        resume: go on with the results file `out`, if it is there; only trials that it lacks are run. It may hold
            more than is asked for, which stays there and is not returned.
        until: the half-width of the 95% interval of accuracy, see `bounded_interval`, at which a probability has
            enough trials, for every repair; None runs `trials` of each.
        least: with `until`, trials before the first look at the interval, at least 2.
        scratch: a folder that all workers see, where the network and the images lie meanwhile, in a folder
            bnn_utils-…, which a process that is killed leaves behind; None is the system's for temporary files.

    Returns:
        Table with the columns of COLUMNS, sorted by probability, trial and the order of `repairs`; flips of the
        network alone, accuracy in 0..1, loss in nats (NaN or infinite where the damaged network puts out such logits).

    Raises:
        ValueError: an argument outside its range, an unknown storage, repair, target or error model, an executor
            for a network on a GPU, or images that are not as the network was trained on.
        TypeError: storage "packed" of a network that cannot be packed.
        FileExistsError: `out` is there already.
        FileNotFoundError: the folder of `out`, or scratch, is not there.
        OSError: `out` cannot be written, or a worker cannot read what lies in scratch.
        ResultsError: `out` is damaged, is of another campaign, or another process writes it.
        WorkerError: a worker has died. Of this and every other error, what was finished is in `out`.
    """
    probabilities = [check_probability(probability) + 0.0 for probability in probabilities]  # one form of zero
    repairs = tuple(repairs)
    _check(probabilities, trials, storage, repairs, seed, until, least)
    data.check_trained(trained_on(model))
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    with inject(pack(model) if storage == "packed" else model, 0, seed=0, targets=targets, error=error):
        pass  # what is wrong with targets or error is told before anything is written
    device = data.labels.device.type
    if executor is not None and device != "cpu":
        raise ValueError(f"an executor's workers compute on the CPU, move the network and the data there from {device}")
    if scratch is not None and not Path(scratch).is_dir():
        raise FileNotFoundError(f"{scratch}: no such folder for scratch")
    out = None if out is None else Path(out)
    _check_out(out, resume)
    terms = _Terms(storage, repairs, seed, targets, error if isinstance(error, ErrorModel) else ERRORS[error])

    with ExitStack() as stack:
        kept = None
        if out is not None and out.suffix in results.ENDINGS:
            kept = stack.enter_context(results.opened(out, _fingerprint(model, data, terms)))
        sweep = _Sweep(probabilities, trials, repairs, until, least, kept)
        stack.enter_context(sweep.bar)
        try:
            if executor is None:
                _run_here(stack.enter_context(_prepared(model, data, terms)), sweep)
            else:
                _run_there(executor, stack.enter_context(_parcel(model, data, terms, scratch)), sweep)
        except (BrokenExecutor, CancelledError) as error_of_workers:
            where = (
                f"kept in {out}; go on with resume"
                if kept
                else f"kept in {out}"
                if out
                else "lost, since out names no file"
            )
            raise WorkerError(
                f"the executor lost a worker (killed, or out of memory); what was finished is {where}"
            ) from error_of_workers
        finally:
            sweep.write()
            table = sweep.table()
            if out is not None and kept is None and len(table):
                write_beside(out, lambda path: table.to_csv(path, index=False))
    return table


def total_after_look(
    accuracies: Iterable[Sequence[float]],
    until: float,
    most: int,
    interval: Callable[[Sequence[float]], tuple[float, float]],
) -> int:
    """Return how many trials to have before the next look at a probability; as many as now if they are enough.

    Half-widths fall with the square root of the number, so that tells how many are needed, and a tenth more; at most
    twice as many as now. A look at ever more trials would stop at a lucky moment sooner or later; looks that follow
    from the trials before, in their order, are few, and the same whoever ran the trials.

    Args:
        accuracies: of each repair, in the order of the trials.
        until: the half-width that is enough.
        most: trials at most.
        interval: gives (centre, half-width) of trials; `run` uses `bounded_interval`.
    """
    accuracies = list(accuracies)
    n = len(accuracies[0])
    half = max((interval(values)[1] for values in accuracies), key=lambda x: (math.isnan(x), x))
    if half <= until or n >= most:
        return n
    ratio = 4.0 if math.isnan(half) else min((half / until) ** 2, 4.0)
    return min(max(math.ceil(1.1 * ratio * n), n + 1), 2 * n, most)


class Saving(NamedTuple):
    """What stopping at an interval saved: trials spent, those that a fixed number would have cost, share saved."""

    spent: int
    fixed: int
    share: float


def saved(table: pd.DataFrame) -> Saving:
    """Return what `until` saved in a campaign, against the same number of trials at every probability.

    That number is the one that the probability with the most trials needed.
    """
    trials = table.groupby("probability")["trial"].nunique()
    spent, fixed = int(trials.sum()), int(trials.max()) * len(trials)
    return Saving(spent, fixed, 1 - spent / fixed)
