"""Bits, without any network: floats seen as bits, signs packed into words, random bit positions drawn exactly."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD = 64


def float_to_bits(x: Tensor) -> Tensor:
    """Return the bits of a float32 tensor as int32, same shape and memory (IEEE 754, bit 31 the sign).

    Raises:
        TypeError: `x` is not float32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"float_to_bits: x must be float32, got {x.dtype}")
    return x.view(torch.int32)


def bits_to_float(bits: Tensor) -> Tensor:
    """Return the float32 tensor whose bits are the int32 tensor `bits`, same shape and memory."""
    if bits.dtype != torch.int32:
        raise TypeError(f"bits_to_float: bits must be int32, got {bits.dtype}")
    return bits.view(torch.float32)


def pack_signs(x: Tensor) -> NDArray[np.uint64]:
    """Pack the signs of `x` along its last axis, one bit each: 1 where x >= 0, else 0.

    Args:
        x: tensor (..., n).

    Returns:
        uint64 words (..., ceil(n / 64)); element i is bit i % 64 of word i // 64, unused bits are 0.
    """
    ones = (x >= 0).cpu().numpy()
    unused = -ones.shape[-1] % WORD
    padded = np.pad(ones, [(0, 0)] * (ones.ndim - 1) + [(0, unused)])
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").astype(np.uint64, copy=False)


def unpack_signs(words: NDArray[np.uint64], n: int) -> Tensor:
    """Return the +1/-1 float32 tensor (..., n) that `pack_signs` made `words` from."""
    ones = np.unpackbits(np.ascontiguousarray(words, "<u8").view(np.uint8), axis=-1, bitorder="little")[..., :n]
    return torch.from_numpy(ones.astype(np.float32) * 2 - 1)


def check_probability(probability: float) -> float:
    """Return `probability` as a float.

    Raises:
        ValueError: it is not a number in [0, 1].
    """
    value = float(probability)
    if not 0 <= value <= 1:  # NaN fails both comparisons
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    return value


def sample_positions(
    total: int, probability: float, generator: np.random.Generator, chunk: int = 1 << 20
) -> Iterator[NDArray[np.int64]]:
    """Draw which of `total` bits flip when each flips independently with `probability`, exactly.

    The distances between neighbouring flips of such a process are geometric, so drawing distances visits the
    flipped bits alone: work and memory follow the number of flips, and the positions come out distinct and sorted.
    Their number is binomial(total, probability), and given their number every set of positions is equally likely.

    Args:
        total: how many bits there are.
        probability: of each to flip, in [0, 1].
        generator: where the randomness comes from.
        chunk: the most positions in one array.

    Yields:
        Sorted int64 arrays of distinct positions in 0..total-1, at most `chunk` long, each after the one before.

    Raises:
        ValueError: `probability` is not in [0, 1], or `total` is negative.

    Source: L. Devroye, Non-Uniform Random Variate Generation, 1986, chapter X.2 (waiting times of a binomial).
    """
    probability = check_probability(probability)
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    if probability == 0 or total == 0:
        return
    at = -1
    while at < total - 1:
        expected = (total - 1 - at) * probability
        draw = min(chunk, math.ceil(expected + 4 * math.sqrt(expected) + 4))
        # A distance beyond `total` ends the process whatever its length; cutting it there keeps the sum in range.
        distances = np.minimum(generator.geometric(probability, size=draw), total + 1)
        positions = at + np.cumsum(distances)
        at = int(positions[-1])
        positions = positions[: np.searchsorted(positions, total)]
        if len(positions):
            yield positions
