"""Workers: what travels to them, once, and what each of them keeps ready between its tasks."""

import hashlib
import io
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from bnn_utils.campaign.results import Row
from bnn_utils.campaign.trial import Terms, Trial, prepared
from bnn_utils.evaluation import Data, Measure
from bnn_utils.system import one_thread

try:
    import cloudpickle  # comes with Dask
except ImportError:
    import pickle as cloudpickle


class WorkerError(RuntimeError):
    """The executor has lost a worker, or all of them; what was finished before is kept."""


@dataclass(frozen=True)
class Parcel:
    """A campaign on its way to a worker: the path of the file that holds it, and the SHA-256 of that file.

    Nobody knows the workers of an executor, so every task carries what a worker needs; a path and a digest are small.
    """

    path: str
    digest: str

    def unpacked(self) -> tuple[nn.Module, Data | Measure, Terms]:
        """Return the network, the data and the terms."""
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise OSError(
                f"a worker cannot read {self.path} ({error.strerror}); scratch must be a folder that all workers see"
            ) from None
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise OSError(f"{self.path}: a worker reads other bytes than were written; scratch must be a sound folder")
        return torch.load(io.BytesIO(content), weights_only=False)  # no more code than the task itself could run


@contextmanager
def parcel(
    model: nn.Module, data: Data | Measure, terms: Terms, scratch: str | os.PathLike[str] | None
) -> Iterator[Parcel]:
    """Write a campaign into a new folder in `scratch`, which goes when the context ends.

    torch.save keeps what a table to the last bit needs: strides, which can decide how sums are rounded, and tensors
    that several modules share. cloudpickle takes along what no worker could import, a class or a function that a
    notebook defines; the rest goes by name, and so does all without it.
    """
    stream = io.BytesIO()
    torch.save((model, data, terms), stream, pickle_module=cloudpickle, pickle_protocol=5)
    content = stream.getvalue()
    with tempfile.TemporaryDirectory(prefix="bnn_utils-", dir=scratch) as folder:
        path = Path(folder).absolute() / "campaign.pt"
        try:
            path.write_bytes(content)
        except OSError as error:
            raise OSError(f"{folder}: cannot be written ({error.strerror}); scratch names another folder") from None
        yield Parcel(str(path), hashlib.sha256(content).hexdigest())


class _Kept(threading.local):
    """The campaign that a worker has ready: its own in every thread, since trials damage the network in place.

    Tasks are functions and know no worker, so what lasts from one to the next has to be global. The path in the parcel
    tells campaigns apart: each has a folder of its own.
    """

    parcel: Parcel | None = None
    trial: Trial
    context = ExitStack()


_kept = _Kept()


@cache
def _end_with_parent() -> None:
    """Have a process of a pool end when the process that started it is killed; else it would wait for ever.

    A pool's processes read tasks from a pipe whose other end they hold open too, so no end of file ever tells them that
    nobody is left to write. The main thread reads; hence a second one, which waits for the parent.

    Source: Python's documentation, multiprocessing.parent_process.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and threading.current_thread() is threading.main_thread():

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def work(parcel: Parcel, probability: float, numbers: Sequence[int]) -> tuple[list[list[Row]], float]:
    """Return the rows of trials, trial by trial, and the seconds that one of them took.

    The network and the images are loaded and prepared for the first task only.
    """
    _end_with_parent()
    with one_thread():  # there are other workers for the other cores
        if _kept.parcel != parcel:
            _kept.parcel = None
            _kept.context.close()
            _kept.context = ExitStack()
            _kept.trial = _kept.context.enter_context(prepared(*parcel.unpacked()))
            _kept.parcel = parcel
        started = time.perf_counter()
        rows = [_kept.trial(probability, number) for number in numbers]
        return rows, (time.perf_counter() - started) / len(numbers)
