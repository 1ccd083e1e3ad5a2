"""What the library asks of the system around it: files that are there whole, one thread, a progress bar."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from llvmlite import binding  # it comes with Numba
from tqdm.auto import tqdm


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call `write` with a path beside `path`, then rename it: `path` is there whole, or stays as it was."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def only_one(path: Path, held: Exception) -> Iterator[None]:
    """Lock the file `path`, made if it is not there, until the context ends or the process is killed.

    Raises:
        held: what to raise where another process has locked it.
        OSError: it cannot be made or locked.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise held from None
    except (OSError, NotImplementedError) as error:
        raise OSError(f"{path}: cannot be locked for writing ({error})") from None
    try:
        yield
    finally:
        lock.release()


def fastest_precision(device: str) -> str:
    """Return in which precision training is fastest: "bfloat16" where the processor multiplies such numbers.

    Args:
        device: "cpu", "cuda", "cuda:1", ..., or "auto", a GPU if there is one.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = binding.get_host_cpu_features()
    return "bfloat16" if any(features.get(name) for name in ("amx-bf16", "avx512bf16", "bf16")) else "float32"


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, in this Python thread and in those that are started meanwhile."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Have the C library keep the memory that this process frees, for the rest of its life; glibc only, else nothing.

    By default glibc gives large blocks back to the system at once, and the next tensor of the same size pays for
    every page anew: a quarter of the time of a training step on a CPU. The process stays as large as it once was.

    Source: mallopt(3), of the Linux man-pages.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # the names' numbers in malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, -1)  # never trim
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def progress_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> tqdm:
    """Return a tqdm bar that vanishes when done; TQDM_DISABLE=1 in the environment turns it off, in notebooks too.

    Args:
        iterable: what to walk through; None for a bar that is updated by hand.
        arguments: tqdm's total, desc and unit.
    """
    disabled = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(iterable, leave=False, disable=disabled, **arguments)
