"""The schedule: which trials are done, which are to be run next, here or by an executor, and when it is enough."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import pandas as pd

from bnn_utils.campaign.results import COLUMNS, Results, Row
from bnn_utils.campaign.trial import Trial
from bnn_utils.campaign.workers import Parcel, work
from bnn_utils.statistics import bounded_interval
from bnn_utils.system import progress_bar

TASK_SECONDS, MOST_TASKS = 1.0, 1000  # how long a task should take; how many a probability has at most, between looks
WRITE_SECONDS = 0.2  # how much finished work a process that is killed may lose, here: writing takes its time too


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


class Sweep:
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
        file: Results | None,
    ):
        self.trials, self.repairs, self.until, self.file = trials, repairs, until, file
        self.goals = {p: trials if until is None else min(least, trials) for p in sorted(set(probabilities))}
        self.done: dict[float, dict[int, list[Row]]] = {p: {} for p in self.goals}
        self._unwritten: list[Row] = []
        self._halves: dict[float, float] = {}
        self._told = -math.inf
        for row in file.rows if file else ():
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
            if self.until is not None and not all(0 <= row["accuracy"] <= 1 for row in rows):
                raise ValueError(f"until wants numbers in [0, 1], got {[row['accuracy'] for row in rows]}")
            self.done[rows[0]["probability"]][rows[0]["trial"]] = rows
            self._unwritten += rows
            self.bar.update()

    def write(self) -> None:
        """Write what is not written yet, whole trials."""
        if self.file is not None and self._unwritten:
            self.file.append(self._unwritten)
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


def run_here(trial: Trial, sweep: Sweep) -> None:
    written = time.perf_counter()
    while planned := {p: numbers for p in sweep.goals if (numbers := sweep.planned(p))}:
        for p, numbers in planned.items():
            for number in numbers:
                sweep.add([trial(p, number)])
                sweep.tell(p)
                if time.perf_counter() - written > WRITE_SECONDS:
                    sweep.write()
                    written = time.perf_counter()


def run_there(executor: Executor, parcel: Parcel, sweep: Sweep) -> None:
    finished: SimpleQueue[Future[Any]] = SimpleQueue()
    running: dict[Future[Any], float] = {}
    tasks = dict.fromkeys(sweep.goals, 0)  # that are running or waiting, of each probability

    def submit(p: float, numbers: Sequence[int], size: int) -> None:
        for start in range(0, len(numbers), size):
            future = executor.submit(work, parcel, p, tuple(numbers[start : start + size]))
            running[future] = p
            tasks[p] += 1
            future.add_done_callback(finished.put)

    try:
        # One trial of each probability first, to see how long it takes. Tasks of about TASK_SECONDS then hide what a
        # task costs by itself (some milliseconds on a cluster), and are short beside a campaign: workers end together,
        # and what a killed one loses is little. See C. Polychronopoulos and D. Kuck, Guided Self-Scheduling, IEEE
        # Transactions on Computers 36(12), 1987.
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
