"""The compiled loops on arrays, in several threads if asked for."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnn_utils.loops import BLOCK, CARRY_SAVE, best_tile, dots_blocks, largest_sums

TILE = best_tile()  # POPCOUNT or CARRY_SAVE: what `dots` computes with, the same sums with either


@lru_cache(maxsize=256)
def _geometry(size: int, kernel: int, stride: int, padding: int) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Return, for one axis, which taps can lie inside the image, bool (kinds, kernel), and the kind of every place."""
    places = np.arange((size + 2 * padding - kernel) // stride + 1)
    at = places[:, None] * stride - padding + np.arange(kernel)
    kinds, kind_of = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
    return kinds, kind_of.reshape(-1)


def dots(
    x: NDArray[np.uint64],
    filters: NDArray[np.uint64],
    *,
    inputs: int,
    kernel: int,
    stride: int,
    padding: int,
    out: NDArray[np.int32],
    threads: int | None = None,
) -> None:
    """Convolve signs with signs: the sum over the taps inside the image and the inputs of activation times weight.

    Args:
        x: activations, uint64 words (images, height, width, words).
        filters: weights, uint64 words (panels, kernel * kernel * words, PANEL), row by row of the kernel.
        inputs: channels that the words hold; their unused bits are 0 in `x` and in `filters`.
        kernel, stride, padding: as in a convolution with a square kernel.
        out: where to, int32 (images, height', width', channels).
        threads: to use; None is torch's number.
    """
    images, height, width, words = x.shape
    down, row_kind = _geometry(height, kernel, stride, padding)
    across, column_kind = _geometry(width, kernel, stride, padding)
    largest = largest_sums(filters, words, down, across, inputs)
    if padding:
        padded = np.zeros((images, height + 2 * padding, width + 2 * padding, words), np.uint64)
        padded[:, padding:-padding, padding:-padding] = x
        x = padded
    x = np.ascontiguousarray(x)
    blocks = -(-out.shape[0] * out.shape[1] * out.shape[2] // BLOCK)
    arguments = (TILE is CARRY_SAVE, x, filters, largest, row_kind * len(across), column_kind, kernel, stride, out)
    run(dots_blocks, blocks, *arguments, threads=threads)


@lru_cache(maxsize=8)
def _workers(user: str, threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def workers(user: str, threads: int) -> ThreadPoolExecutor:
    """Return threads to compute with, for those who call themselves `user` alone: who waits for himself waits for ever.

    They are kept, since memory that new threads ask for comes slowly. A forked process has none of its parent's.
    """
    return _workers(user, threads, os.getpid())


def run(loop: Callable[..., None], count: int, *arguments: Any, threads: int | None = None) -> None:
    """Call `loop(first, last, *arguments)` for shares of 0..count, one a thread: compiled, they hold no lock."""
    threads = min(torch.get_num_threads() if threads is None else threads, count)
    if threads <= 1:
        loop(0, count, *arguments)
    else:
        cuts = [count * share // threads for share in range(threads + 1)]
        list(workers("loops", threads).map(lambda first, last: loop(first, last, *arguments), cuts, cuts[1:]))
