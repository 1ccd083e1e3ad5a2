"""Bits, without any network: floats seen as bits, signs packed into words, random bit positions drawn exactly."""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnn_utils.compiling import compiled

WORD = 64
CHUNK = 1 << 18  # positions at a time: their memory stays in cache, and the cost of a step does not show
_LANES = 1 << 16


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
    packed = np.packbits((x >= 0).cpu().numpy(), axis=-1, bitorder="little")
    padded = np.zeros((*packed.shape[:-1], -(-x.shape[-1] // WORD) * WORD // 8), np.uint8)
    padded[..., : packed.shape[-1]] = packed
    return padded.view("<u8").astype(np.uint64, copy=False)


def unpack_signs(words: NDArray[np.uint64], n: int) -> Tensor:
    """Return the +1/-1 float32 tensor (..., n) that `pack_signs` made `words` from."""
    used = np.ascontiguousarray(words, "<u8").view(np.uint8)[..., : -(-n // 8)]
    ones = np.unpackbits(used, axis=-1, bitorder="little")[..., :n]
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


@lru_cache(maxsize=8)
def _distance_table(rate: float) -> NDArray[np.uint16]:
    """Return floor(-log(U) / rate) + 1 for U in (lane / 65536, (lane + 1) / 65536], and 0 where a lane alone is unsure.

    Unsure are the lanes that hold several distances, lane 0 (which has no longest) and distances over 65535.
    """
    steps = -np.log(np.arange(1, _LANES + 1) / _LANES) / rate
    # Machines may round these by a last digit; a lane so close to an edge is unsure on each of them alike.
    longest, shortest = np.floor(steps[:-1] * (1 + 1e-12)), np.floor(steps[1:] * (1 - 1e-12))
    sure = (longest == shortest) & (longest < _LANES - 1)
    return np.append(0, np.where(sure, longest + 1, 0)).astype(np.uint16)


@compiled
def _look_up(table, lanes, distances, unsure):
    count = 0
    for i in range(len(lanes)):
        distance = table[lanes[i]]
        distances[i] = distance
        if distance == 0:
            unsure[count] = i
            count += 1
    return count


def _distance(exponential: NDArray[np.float64], rate: float, longest: float) -> NDArray[np.int64]:
    return 1 + (np.minimum(exponential, 2 * longest * rate) / rate).astype(np.int64)


def _distances(rate: float, longest: float, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return `count` distances 1 + floor(E / rate), E exponential with mean 1; one over `longest` stays over it.

    Where many bits flip, E is -log(U) of a uniform U, because the leading 16 bits of U, the lane, are then nearly
    always enough to know the distance: a table gives it. Only where they are not, the other bits are drawn and the
    logarithm taken.

    Source: L. Devroye, Non-Uniform Random Variate Generation, 1986, chapter III.2.4 (inversion by guide tables).
    """
    if count < 512 or rate < 1e-3:  # a table would be looked up too seldom, or leave too much unsure
        return _distance(generator.standard_exponential(count), rate, longest)
    table = _distance_table(rate)
    lanes = generator.integers(1 << 64, size=count // 4 + 1, dtype=np.uint64).view(np.uint16)[:count]
    distances, unsure = np.empty(count, np.int64), np.empty(count, np.int64)
    unsure = unsure[: _look_up(table, lanes, distances, unsure)]
    uniform = (lanes[unsure] + (1 - generator.random(len(unsure)))) / _LANES
    distances[unsure] = _distance(-np.log(uniform), rate, longest)
    return distances


def _rate(probability: float) -> float:
    """Return -log(1 - probability): a bit flips if a Poisson process with this rate a bit hits it at all."""
    return math.inf if probability == 1 else -math.log1p(-probability)


def sample_positions(
    total: int, probability: float, generator: np.random.Generator, chunk: int = CHUNK
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
    rate = _rate(probability)
    at = -1
    while at < total - 1:
        expected = (total - 1 - at) * probability
        draw = min(chunk, math.ceil(expected + 4 * math.sqrt(expected) + 4))
        # A distance beyond `total` ends the process whatever its length; cutting it keeps the sum in range.
        positions = _distances(rate, total, draw, generator)
        positions[0] += at
        np.cumsum(positions, out=positions)
        at = int(positions[-1])
        positions = positions[: np.searchsorted(positions, total)]
        if len(positions):
            yield positions


def sample_runs(
    total: int, probability: float, length: int, generator: np.random.Generator, chunk: int = CHUNK
) -> Iterator[NDArray[np.int64]]:
    """Draw which of `total` bits lie in random runs of `length` neighbours, each bit with `probability`, exactly.

    A run starts at every position from 1 - length to total - 1, independently, with q = 1 - (1 - p)^(1 / length).
    So a bit, at the ends too, escapes the `length` runs that can cover it with probability (1 - q)^length = 1 - p.
    Runs may overlap or touch; of those that stick out, the part inside counts.

    Args:
        total, probability, generator: as in `sample_positions`.
        length: bits in a run, at least 1, which is `sample_positions`.
        chunk: the most positions in one array, if `length` is not larger.

    Yields:
        Sorted int64 arrays of the distinct positions covered, each after the one before.

    Raises:
        ValueError: as `sample_positions` does, or `length` is less than 1.
    """
    probability = check_probability(probability)
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if length == 1:
        yield from sample_positions(total, probability, generator, chunk)
        return
    start = -math.expm1(-_rate(probability) / length)
    end = 0  # of the last run
    for found in sample_positions(total + length - 1, start, generator, max(1, chunk // length)):
        first = found - (length - 1)
        new = np.append(end, first[:-1] + length)  # what lies before is covered already, or outside
        covered = first[:, None] + np.arange(length)
        covered = covered[(covered >= new[:, None]) & (covered < total)]
        end = int(first[-1]) + length
        if len(covered):
            yield covered
