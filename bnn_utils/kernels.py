"""Operations of the packed network on arrays, by the compiled loops, in several threads if asked for.

Importing this module needs Numba; `bnn_utils.packed_layers` has another way where it is missing.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnn_utils.loops import (
    BLOCK,
    CARRY_SAVE,
    affine_images,
    best_tile,
    dots_blocks,
    largest_sums,
    rectified_images,
    shifted_images,
    threshold_images,
)

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
    _run(dots_blocks, threads, blocks, *arguments)


def threshold_bits(
    sums: NDArray[np.int32],
    threshold: NDArray[Any],
    direction: NDArray[np.uint64],
    *,
    pool: int,
    out: NDArray[np.uint64],
    threads: int | None = None,
) -> None:
    """Max-pool integers, and turn each into a bit: (largest >= threshold), inverted where the direction's bit is 1.

    Args:
        sums: int32 (images, height, width, channels).
        threshold: int16 or int32 (channels,).
        direction: uint64 words (words,), a bit a channel.
        pool: height and width of a pooling window, 1 for none.
        out: where to, uint64 words (images, height // pool, width // pool, words).
        threads: to use; None is torch's number.
    """
    _run(threshold_images, threads, len(sums), sums, threshold, direction, pool, out)


def affine(
    x: NDArray[Any],
    shortcut: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    *,
    clamp: bool,
    values: NDArray[np.float32],
    out: NDArray[np.uint64],
    threads: int | None = None,
) -> None:
    """Compute (x + shortcut) * scale + shift, clamped to [-1, 1] if asked for, and its signs as words.

    Args:
        x: int32 or float32 (images, height, width, channels).
        shortcut: float32 of that shape, or without images for none.
        scale, shift: float32 (channels,).
        clamp: whether to clamp.
        values: where the numbers go, float32 of the shape of `x`, or without images if only their signs are wanted.
        out: where their signs go, uint64 words (images, height, width, words).
        threads: to use; None is torch's number.
    """
    _run(affine_images, threads, len(x), x, shortcut, scale, shift, clamp, values, out)


def shifted_bits(
    x: NDArray[np.float32], offset: NDArray[np.float32], *, out: NDArray[np.uint64], threads: int | None = None
) -> None:
    """Turn each number into a bit: x + offset >= 0.

    Args:
        x: float32 (images, height, width, channels).
        offset: float32 (channels,).
        out: where to, uint64 words (images, height, width, words).
        threads: to use; None is torch's number.
    """
    _run(shifted_images, threads, len(x), x, offset, out)


def rectify(
    x: NDArray[np.int32],
    shortcut: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    slope: NDArray[np.float32],
    *,
    out: NDArray[np.float32],
    threads: int | None = None,
) -> None:
    """Compute y = x * scale + shift + shortcut, and from it y where it is positive, slope * y elsewhere.

    Args:
        x: int32 (images, height, width, channels).
        shortcut: float32 of that shape.
        scale, shift, slope: float32 (channels,).
        out: where to, float32 of that shape.
        threads: to use; None is torch's number.
    """
    _run(rectified_images, threads, len(x), x, shortcut, scale, shift, slope, out)


@lru_cache(maxsize=4)
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads to compute with, for the process of this number: of its parent's, a forked one has none."""
    return ThreadPoolExecutor(threads)


def _run(loop: Any, threads: int | None, count: int, *arguments: Any) -> None:
    """Call `loop(first, last, *arguments)` for shares of 0..count, one a thread: compiled, they hold no lock."""
    threads = min(torch.get_num_threads() if threads is None else threads, count)
    if threads <= 1:
        loop(0, count, *arguments)
    else:
        cuts = [count * share // threads for share in range(threads + 1)]
        list(_workers(threads, os.getpid()).map(lambda first, last: loop(first, last, *arguments), cuts, cuts[1:]))
