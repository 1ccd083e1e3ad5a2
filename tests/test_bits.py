"""Bits of floats, packed signs and sampled positions, against struct, numpy and exact distributions."""

import math
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, geom

from bnn_utils.bits import (
    bits_to_float,
    check_probability,
    float_to_bits,
    pack_signs,
    sample_positions,
    sample_runs,
    unpack_signs,
)

FALSE_ALARM = 1e-6
PATTERNS = st.integers(0, 2**32 - 1)


def positions(total, probability, seed, **options):
    """All positions of one draw, in one array."""
    return np.concatenate([[], *sample_positions(total, probability, np.random.default_rng(seed), **options)])


# ---------------------------------------------------------------- floats as bits


@settings(deadline=None, max_examples=100)
@given(pattern=PATTERNS)
@example(0x7F800001)  # a signalling NaN
@example(0xFFFFFFFF)
@example(0x80000000)
def test_float_bits_roundtrip_and_match_struct(pattern):
    raw = struct.pack("<I", pattern)
    stored = torch.tensor(struct.unpack("<i", raw), dtype=torch.int32)
    values = bits_to_float(stored)
    assert np.array_equal(values.numpy().view(np.uint32), [pattern])
    assert float_to_bits(values).tolist() == stored.tolist()
    number = struct.unpack("<f", raw)[0]
    if not math.isnan(number):
        assert values.item() == number


def test_float_bits_of_known_numbers():
    x = torch.tensor([[1.0, -1.0], [-0.0, math.inf]])
    assert [[word & 0xFFFFFFFF for word in row] for row in float_to_bits(x).tolist()] == [
        [0x3F800000, 0xBF800000],
        [0x80000000, 0x7F800000],
    ]


def test_float_bits_are_the_same_memory():
    x = torch.ones(3)
    float_to_bits(x)[1] ^= -(2**31)  # the sign bit
    assert x.tolist() == [1, -1, 1]


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        float_to_bits(torch.ones(1, dtype=torch.float64))
    with pytest.raises(TypeError, match="int64"):
        bits_to_float(torch.ones(1, dtype=torch.int64))


# ---------------------------------------------------------------- packed signs


@pytest.mark.parametrize("n", [*range(0, 131), 4096, 4097])
def test_pack_roundtrip_and_word_count(n):
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n))
    words = pack_signs(x)
    assert words.dtype == np.uint64 and words.shape == (2, 3, (n + 63) // 64)
    back = unpack_signs(words, n)
    assert back.dtype == torch.float32
    assert np.array_equal(back.numpy(), np.where(x.numpy() >= 0, 1, -1))


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=150))
def test_element_i_is_bit_i_and_unused_bits_are_zero(values):
    words = pack_signs(torch.tensor(values))
    expected = sum(1 << i for i, value in enumerate(values) if value >= 0)  # NaN is a 0, -0.0 a 1
    assert sum(int(word) << (64 * i) for i, word in enumerate(words)) == expected


def test_memory_order_does_not_matter():
    x = torch.randn(70, 5, generator=torch.Generator().manual_seed(0)).T
    words = pack_signs(x)
    assert np.array_equal(words, pack_signs(x.contiguous()))
    assert torch.equal(unpack_signs(np.asfortranarray(words), 70), (x >= 0) * 2.0 - 1)


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 1e-300, 0.5, np.float32(0.25)])
def test_probabilities_are_kept(value):
    assert check_probability(value) == value


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf, -math.inf])
def test_bad_probabilities(value):
    with pytest.raises(ValueError, match="probability must lie in"):
        check_probability(value)
    with pytest.raises(ValueError, match="probability must lie in"):
        list(sample_positions(10, value, np.random.default_rng(0)))


def test_negative_total():
    with pytest.raises(ValueError, match="total"):
        list(sample_positions(-1, 0.5, np.random.default_rng(0)))


# ---------------------------------------------------------------- sampled positions


@pytest.mark.parametrize("total", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_ends_are_none_and_all(total, chunk):
    assert len(positions(total, 0, 0, chunk=chunk)) == 0
    assert positions(total, 1, 0, chunk=chunk).tolist() == list(range(total))


@settings(deadline=None, max_examples=100)
@given(
    total=st.integers(0, 3000),
    probability=st.floats(0, 1),
    chunk=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_positions_are_sorted_distinct_in_range_and_chunked(total, probability, chunk, seed):
    arrays = list(sample_positions(total, probability, np.random.default_rng(seed), chunk))
    assert all(array.dtype == np.int64 and 1 <= len(array) <= chunk for array in arrays)
    drawn = np.concatenate([np.zeros(0, np.int64), *arrays])
    assert (np.diff(drawn) > 0).all()
    assert len(drawn) == 0 or (drawn[0] >= 0 and drawn[-1] < total)


def test_the_seed_decides():
    assert positions(10_000, 0.1, 1).tolist() == positions(10_000, 0.1, 1).tolist()
    assert positions(10_000, 0.1, 1).tolist() != positions(10_000, 0.1, 2).tolist()


@pytest.mark.parametrize(
    ("total", "probability", "chunk"),
    [
        (5, 0.5, 1 << 20),
        (1000, 0.5, 1 << 20),
        (1000, 0.5, 11),
        (1000, 0.9, 64),
        (10_000, 1e-2, 1 << 20),
        (10_000, 1e-4, 1 << 20),
        (10**9, 1e-6, 100),
        (10**12, 1e-10, 1 << 20),
    ],
)
def test_count_is_binomial(total, probability, chunk):
    trials = 300
    counts = np.array([len(positions(total, probability, seed, chunk=chunk)) for seed in range(trials)])
    # The sum of all trials is binomial too; then each trial by itself, with the alarm shared among them.
    low, high = binom.interval(1 - FALSE_ALARM, trials * total, probability)
    assert low <= counts.sum() <= high
    low, high = binom.interval(1 - FALSE_ALARM / trials, total, probability)
    assert low <= counts.min() and counts.max() <= high
    # And their spread: the counts above the median number are binomial as well.
    middle = binom.median(total, probability)
    low, high = binom.interval(1 - FALSE_ALARM, trials, binom.sf(middle, total, probability))
    assert low <= (counts > middle).sum() <= high
    # Half the mass lies between the quartiles (exactly: what the distribution says).
    quartiles = binom.ppf([0.25, 0.75], total, probability)
    inside = binom.cdf(quartiles[1], total, probability) - binom.cdf(quartiles[0] - 1, total, probability)
    low, high = binom.interval(1 - FALSE_ALARM, trials, inside)
    assert low <= ((counts >= quartiles[0]) & (counts <= quartiles[1])).sum() <= high


@pytest.mark.parametrize(("probability", "chunk"), [(0.5, 1 << 20), (0.3, 9), (0.02, 1 << 20)])
def test_every_position_is_equally_likely(probability, chunk):
    total, trials = 50, 6000
    generator = np.random.default_rng(0)
    hits = np.zeros(total)
    for _ in range(trials):
        for array in sample_positions(total, probability, generator, chunk):
            hits[array] += 1
    low, high = binom.interval(1 - FALSE_ALARM / total, trials, probability)
    assert low <= hits.min() and hits.max() <= high
    # Positions are independent, so the hits are too: their chi-square against trials * p has `total` degrees.
    expected = np.array([trials * probability, trials * (1 - probability)])
    observed = np.concatenate([hits, trials - hits])
    assert chisquare(observed, expected.repeat(total), ddof=total - 1).pvalue > 1e-6


@pytest.mark.parametrize(
    ("probability", "chunk"),
    [(0.99, 1 << 20), (0.5, 1 << 20), (0.25, 1 << 20), (0.2, 10), (0.01, 1 << 20), (1e-3, 1 << 20), (1e-6, 1 << 20)],
)
def test_distances_are_geometric(probability, chunk):
    drawn = positions(int(20_000 / probability), probability, 0, chunk=chunk)
    distances = np.diff(drawn)
    edges = np.unique(geom.ppf(np.linspace(0, 1, 11)[1:-1], probability))
    observed = np.bincount(np.searchsorted(edges, distances), minlength=len(edges) + 1)
    share = np.diff([0, *geom.cdf(edges, probability), 1])
    assert chisquare(observed, share * len(distances)).pvalue > 1e-6
    # A distance says nothing about the next one.
    short = distances <= geom.ppf(0.5, probability) if probability < 0.5 else distances == 1
    table = np.histogram2d(short[:-1], short[1:], bins=2)[0]
    rows, columns = short[:-1].mean(), short[1:].mean()
    both = len(short[1:]) * np.outer([1 - rows, rows], [1 - columns, columns])
    assert chisquare(table.ravel(), both.ravel(), ddof=2).pvalue > 1e-6


def test_positions_beyond_31_bits():
    total = 2**40
    drawn = np.concatenate([positions(total, 1e-9, seed) for seed in range(20)])
    upper = (drawn >= total / 2).sum()
    low, high = binom.interval(1 - FALSE_ALARM, len(drawn), 0.5)
    assert drawn.max() > 2**39 and low <= upper <= high


def test_work_follows_the_flips_not_the_bits():
    start = time.perf_counter()
    tracemalloc.start()
    counts = [len(positions(10**15, 1e-13, seed)) for seed in range(100)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - start < 5 and peak < 5_000_000
    low, high = binom.interval(1 - FALSE_ALARM, 100 * 10**15, 1e-13)
    assert low <= sum(counts) <= high


def test_a_chunk_bounds_the_memory():
    positions(10_000, 0.5, 0, chunk=1000)  # what is made once for all draws is made here
    tracemalloc.start()
    count = sum(map(len, sample_positions(3_000_000, 0.5, np.random.default_rng(0), chunk=1000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    low, high = binom.interval(1 - FALSE_ALARM, 3_000_000, 0.5)
    assert low <= count <= high
    assert peak < 500_000  # all positions together are 12 MB


@pytest.mark.parametrize("count", [400, 4000])
@pytest.mark.parametrize("probability", [0.9, 0.5, 0.25, 0.01, 2e-3, 1e-5])
def test_a_distance_follows_from_what_the_generator_gives(probability, count):
    """From a known E the distance is 1 + floor(E / -log(1 - p)), where E may be given as -log of known bits."""

    class Known:
        def integers(self, high, size, dtype):
            return np.random.default_rng(0).integers(high, size=size, dtype=dtype)

        def random(self, size):
            return np.full(size, 0.375)

        def standard_exponential(self, size):
            lanes = self.integers(1 << 64, size // 4 + 1, np.uint64).view(np.uint16)[:size]
            return np.array([-math.log((lane + 0.625) / 65536) for lane in lanes.tolist()])

    exact = [1 + math.floor(e / -math.log1p(-probability)) for e in Known().standard_exponential(count)]
    drawn = next(sample_positions(10**12, probability, Known(), chunk=count))
    assert np.diff(drawn, prepend=-1).tolist() == exact


@pytest.mark.parametrize("probability", [1e-18, 1e-300, 5e-324])
def test_the_smallest_probabilities_flip_nothing(probability):
    assert len(positions(10**9, probability, 0)) == 0


# ---------------------------------------------------------------- runs


def covered(total, probability, length, generator, **options):
    """All positions that one draw of runs covers, in one array."""
    return np.concatenate([np.zeros(0, np.int64), *sample_runs(total, probability, length, generator, **options)])


@settings(deadline=None, max_examples=100)
@given(
    total=st.integers(0, 500),
    probability=st.floats(0, 1),
    length=st.integers(1, 40),
    chunk=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_are_sorted_distinct_and_whole(total, probability, length, chunk, seed):
    arrays = list(sample_runs(total, probability, length, np.random.default_rng(seed), chunk))
    assert all(array.dtype == np.int64 and 1 <= len(array) <= max(chunk, length) for array in arrays)
    drawn = np.concatenate([np.zeros(0, np.int64), *arrays])
    assert (np.diff(drawn) > 0).all()
    assert len(drawn) == 0 or (drawn[0] >= 0 and drawn[-1] < total)
    for run in np.split(drawn, np.flatnonzero(np.diff(drawn) > 1) + 1):  # only one that sticks out may be short
        assert len(run) == 0 or len(run) >= length or run[0] == 0 or run[-1] == total - 1


def test_runs_of_one_are_positions():
    drawn = covered(10_000, 0.1, 1, np.random.default_rng(3))
    assert drawn.tolist() == positions(10_000, 0.1, 3).tolist()


@pytest.mark.parametrize("length", [2, 5, 40])
def test_ends_of_runs_are_none_and_all(length):
    assert len(covered(30, 0, length, np.random.default_rng(0))) == 0
    assert covered(30, 1, length, np.random.default_rng(0)).tolist() == list(range(30))


@pytest.mark.parametrize(("total", "length", "chunk"), [(4, 2, 1000), (4, 3, 3), (3, 2, 1), (2, 5, 1000)])
def test_every_pattern_of_runs_has_its_probability(total, length, chunk):
    """Against the sum over all 2^n sets of starts, each start independent with q."""
    p, trials = 0.35, 6000
    q = 1 - (1 - p) ** (1 / length)
    starts = range(1 - length, total)
    exact = np.zeros(2**total)
    for chosen in range(2 ** len(starts)):
        pattern = 0
        for i, start in enumerate(starts):
            if chosen >> i & 1:
                pattern |= sum(1 << at for at in range(start, start + length) if 0 <= at < total)
        ones = chosen.bit_count()
        exact[pattern] += q**ones * (1 - q) ** (len(starts) - ones)
    for bit in range(total):  # what the formula for q promises
        assert exact[[pattern >> bit & 1 == 1 for pattern in range(2**total)]].sum() == pytest.approx(p)
    generator = np.random.default_rng(1)
    seen = np.zeros(2**total)
    for _ in range(trials):
        seen[np.sum(1 << covered(total, p, length, generator, chunk=chunk))] += 1
    assert (seen[exact == 0] == 0).all()
    assert chisquare(seen[exact > 0], trials * exact[exact > 0]).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("length", "probability"), [(4, 0.01), (4, 0.3), (7, 1e-4)])
def test_many_bits_are_covered_with_the_probability(length, probability):
    total, trials = 100_000, 40
    generator = np.random.default_rng(2)
    # Bits `length` apart are covered independently: no run reaches both.
    counts = np.zeros(length, int)
    for _ in range(trials):
        counts += np.bincount(covered(total, probability, length, generator) % length, minlength=length)
    n = trials * np.bincount(np.arange(total) % length, minlength=length)
    assert (binom.ppf(FALSE_ALARM / 2 / length, n, probability) <= counts).all()
    assert (counts <= binom.isf(FALSE_ALARM / 2 / length, n, probability)).all()


def test_rare_runs_stand_alone():
    drawn = covered(10**9, 1e-5, 6, np.random.default_rng(0))
    sizes = [len(run) for run in np.split(drawn, np.flatnonzero(np.diff(drawn) > 1) + 1)]
    assert len(sizes) > 1000
    # Two runs meet in a place with probability about 1e-5, so nearly all have their length.
    assert np.mean(np.array(sizes) == 6) > 0.99


@pytest.mark.parametrize("arguments", [(-1, 0.5, 3), (10, 1.5, 3), (10, 0.5, 0), (10, 0.5, -2)])
def test_wrong_arguments_of_runs(arguments):
    with pytest.raises(ValueError):
        list(sample_runs(*arguments, np.random.default_rng(0)))
