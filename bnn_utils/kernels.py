"""What the compiled loops need around them: where taps lie inside an image, which tile, and threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnn_utils.loops import best_tile

TILE = best_tile()  # POPCOUNT or CARRY_SAVE: what convolutions count by, the same sums with either


@lru_cache(maxsize=256)
def geometry(size: int, kernel: int, stride: int, padding: int) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Return, for one axis, which taps can lie inside the image, bool (kinds, kernel), and the kind of every place."""
    places = np.arange((size + 2 * padding - kernel) // stride + 1)
    at = places[:, None] * stride - padding + np.arange(kernel)
    kinds, kind_of = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
    return kinds, kind_of.reshape(-1)


@lru_cache(maxsize=8)
def _workers(user: str, threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def workers(user: str, threads: int) -> ThreadPoolExecutor:
    """Return threads to compute with, for those who call themselves `user` alone: who waits for himself waits for ever.

    They are kept, since memory that new threads ask for comes slowly. A forked process has none of its parent's.
    """
    return _workers(user, threads, os.getpid())


def run(loop: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call `loop(first, last, *arguments)` for shares of 0..count, one a thread: compiled, they hold no lock."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        loop(0, count, *arguments)
    else:
        cuts = [count * share // threads for share in range(threads + 1)]
        list(workers("loops", threads).map(lambda first, last: loop(first, last, *arguments), cuts, cuts[1:]))
