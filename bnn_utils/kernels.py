"""The compiled loops of the packed network: XNOR and popcount, thresholds, scale and shift.

Activations and weights are words of 64 bits along the input channels, 1 for +1 and 0 for -1. The product of two signs
is +1 where their bits agree (XNOR), so over n inputs of which d differ, the sum of products is n - 2 d, and d is the
number of ones in the XOR of the words (popcount).

Importing this module needs Numba; `bnn_utils.packed` has another way where it is missing.
"""

from threading import Lock
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 8  # words in a vector: the 512 bits of AVX-512; LLVM splits it where registers are shorter
TILE_POSITIONS, TILE_FILTERS = 4, 4 * LANES  # what one tile computes, held in registers
BLOCK = 32  # positions that a thread takes at a time
_pool = Lock()  # not every pool of threads that Numba may find can be called from two Python threads at once


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = arguments[0].type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(arguments)), name)
    return builder.call(function, arguments)


@intrinsic
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of float32 numbers, rounded once, as torch's BatchNorm computes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.fma.f32", *arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _popcount(context: Any, word: Any) -> Any:
    """Return the number of ones in a uint64 word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def _tile(context: Any, rows: Any, words: Any, filters: Any, counts: Any, count_stride: Any) -> Any:
    """Count differing bits of TILE_POSITIONS rows of activations with TILE_FILTERS filters, all sums in registers.

    counts[p, f] = sum over k of popcount(rows[p, k] ^ filters[k, f]).

    Arguments are addresses of uint64 rows (TILE_POSITIONS, words), uint64 filters (words, TILE_FILTERS) and int32
    counts (TILE_POSITIONS, count_stride), with words > 0. Written in LLVM's own terms, since no loop in Python makes
    the compiler keep all sums in registers; LLVM turns ctpop into what the processor has (VPOPCNTDQ, CNT, look-ups).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, words, filters, counts, count_stride = arguments
        word, lane = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(word, LANES)
        undefined, first_lane = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
        vectors = range(TILE_FILTERS // LANES)

        def at(address: Any, *offsets: tuple[Any, int]) -> Any:
            for count, size in offsets:
                address = builder.add(address, builder.mul(count, word(size)))
            return address

        before = builder.block
        loop, done = builder.append_basic_block("words"), builder.append_basic_block("counted")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(word)
        sums = [[builder.phi(vector) for _ in vectors] for _ in range(TILE_POSITIONS)]
        column = at(filters, (k, 8 * TILE_FILTERS))
        weights = [
            builder.load(builder.inttoptr(at(column, (word(v), 8 * LANES)), vector.as_pointer()), align=8)
            for v in vectors
        ]
        added = []
        for p in range(TILE_POSITIONS):
            address = at(rows, (builder.mul(words, word(p)), 8), (k, 8))
            activation = builder.load(builder.inttoptr(address, word.as_pointer()), align=8)
            spread = builder.insert_element(undefined, activation, lane(0))
            spread = builder.shuffle_vector(spread, undefined, first_lane)
            differing = [_call(builder, f"llvm.ctpop.v{LANES}i64", builder.xor(w, spread)) for w in weights]
            added.append([builder.add(old, new) for old, new in zip(sums[p], differing)])
        after = builder.add(k, word(1))
        for phi, start, end in [(k, word(0), after)] + [
            (phi, ir.Constant(vector, [0] * LANES), end)
            for olds, news in zip(sums, added)
            for phi, end in zip(olds, news)
        ]:
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_signed("<", after, words), loop, done)
        builder.position_at_end(done)
        short = ir.VectorType(lane, LANES)
        for p in range(TILE_POSITIONS):
            for v in vectors:
                address = at(counts, (builder.mul(count_stride, word(p)), 4), (word(v), 4 * LANES))
                pointer = builder.inttoptr(address, short.as_pointer())
                builder.store(builder.trunc(added[p][v], short), pointer, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@njit(nogil=True, cache=True)
def _ones(filters, words):
    """Return the ones of every tap and filter, int32 (taps, filters): what a tap of zeros would be counted as."""
    panels, rows = filters.shape[:2]
    ones = np.zeros((rows // words, panels * TILE_FILTERS), np.int32)
    for panel in range(panels):
        for k in range(rows):
            for c in range(TILE_FILTERS):
                ones[k // words, panel * TILE_FILTERS + c] += np.int32(_popcount(filters[panel, k, c]))
    return ones


@njit(nogil=True, cache=True)
def _dots_block(block, x, filters, ones, inputs, kernel, stride, padding, out):
    """Compute one block of BLOCK neighbouring positions of `dots`."""
    height, width, words = x.shape[1:]
    out_height, out_width, channels = out.shape[1:]
    taps, panels, padded = kernel * kernel, filters.shape[0], filters.shape[0] * TILE_FILTERS
    first = block * BLOCK
    positions = min(BLOCK, out.shape[0] * out_height * out_width - first)
    rows = np.empty((BLOCK, taps * words), np.uint64)
    counts = np.empty((BLOCK, padded), np.int32)
    inside = np.empty((BLOCK, taps), np.bool_)
    for j in range(positions):
        image, place = divmod(first + j, out_height * out_width)
        top, left = (place // out_width) * stride - padding, (place % out_width) * stride - padding
        for row in range(kernel):
            from_top, start = top + row, row * kernel * words
            if 0 <= from_top < height and left >= 0 and left + kernel <= width:
                line = x[image, from_top, left : left + kernel].reshape(-1)
                for k in range(kernel * words):
                    rows[j, start + k] = line[k]
                inside[j, row * kernel : (row + 1) * kernel] = True
                continue
            for column in range(kernel):
                tap, from_left = row * kernel + column, left + column
                inside[j, tap] = 0 <= from_top < height and 0 <= from_left < width
                for k in range(words):
                    word = x[image, from_top, from_left, k] if inside[j, tap] else np.uint64(0)
                    rows[j, tap * words + k] = word
    for panel in range(panels):
        for j in range(0, positions, TILE_POSITIONS):
            _tile(
                rows.ctypes.data + 8 * j * taps * words,
                taps * words,
                filters.ctypes.data + 8 * panel * taps * words * TILE_FILTERS,
                counts.ctypes.data + 4 * (j * padded + panel * TILE_FILTERS),
                padded,
            )
    for j in range(positions):
        image, place = divmod(first + j, out_height * out_width)
        result = out[image, place // out_width, place % out_width]
        within = inside[j].sum()
        for c in range(channels):
            result[c] = within * inputs - 2 * counts[j, c]
        if within < taps:
            for tap in range(taps):
                if not inside[j, tap]:
                    for c in range(channels):
                        result[c] += 2 * ones[tap, c]


@njit(nogil=True, cache=True)
def _threshold_image(image, dots, threshold, direction, pool, out):
    """Compute one image of `threshold_bits`."""
    channels, words = dots.shape[3], out.shape[3]
    largest = np.empty(channels, np.int32)
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            largest[:] = dots[image, row * pool, column * pool]
            for member in range(1, pool * pool):
                other = dots[image, row * pool + member // pool, column * pool + member % pool]
                for c in range(channels):
                    largest[c] = max(largest[c], other[c])
            for k in range(words):
                word = np.uint64(0)
                for bit in range(min(64, channels - 64 * k)):
                    reached = largest[64 * k + bit] >= threshold[64 * k + bit]
                    word |= np.uint64(reached) << np.uint64(bit)
                out[image, row, column, k] = word ^ direction[k]


@njit(nogil=True, cache=True)
def _affine_image(image, x, shortcut, scale, shift, clamp, values, out):
    """Compute one image of `affine`."""
    channels, words = x.shape[3], out.shape[3]
    added, kept = shortcut.shape[0] > 0, values.shape[0] > 0
    result = np.empty(channels, np.float32)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            for c in range(channels):
                value = np.float32(x[image, row, column, c])
                if added:
                    value += shortcut[image, row, column, c]
                result[c] = _fma(value, scale[c], shift[c])
            for k in range(words):
                word = np.uint64(0)
                for bit in range(min(64, channels - 64 * k)):
                    word |= np.uint64(result[64 * k + bit] >= 0) << np.uint64(bit)
                out[image, row, column, k] = word
            if kept:
                for c in range(channels):
                    value = result[c]
                    if clamp:  # written so that NaN stays NaN
                        value = np.float32(-1) if value < -1 else value
                        value = np.float32(1) if value > 1 else value
                    values[image, row, column, c] = value


@njit(nogil=True, cache=True)
def _dots_serial(blocks, x, filters, ones, inputs, kernel, stride, padding, out):
    for block in range(blocks):
        _dots_block(block, x, filters, ones, inputs, kernel, stride, padding, out)


@njit(nogil=True, cache=True, parallel=True)
def _dots_parallel(blocks, x, filters, ones, inputs, kernel, stride, padding, out):
    for block in prange(blocks):
        _dots_block(block, x, filters, ones, inputs, kernel, stride, padding, out)


@njit(nogil=True, cache=True)
def _threshold_serial(images, dots, threshold, direction, pool, out):
    for image in range(images):
        _threshold_image(image, dots, threshold, direction, pool, out)


@njit(nogil=True, cache=True, parallel=True)
def _threshold_parallel(images, dots, threshold, direction, pool, out):
    for image in prange(images):
        _threshold_image(image, dots, threshold, direction, pool, out)


@njit(nogil=True, cache=True)
def _affine_serial(images, x, shortcut, scale, shift, clamp, values, out):
    for image in range(images):
        _affine_image(image, x, shortcut, scale, shift, clamp, values, out)


@njit(nogil=True, cache=True, parallel=True)
def _affine_parallel(images, x, shortcut, scale, shift, clamp, values, out):
    for image in prange(images):
        _affine_image(image, x, shortcut, scale, shift, clamp, values, out)


def dots(
    x: NDArray[np.uint64],
    filters: NDArray[np.uint64],
    *,
    inputs: int,
    kernel: int,
    stride: int,
    padding: int,
    out: NDArray[np.int32],
    threads: int,
) -> None:
    """Convolve signs with signs: the sum over the taps inside the image and the inputs of activation times weight.

    Args:
        x: activations, uint64 words (images, height, width, words).
        filters: weights, uint64 words (panels, kernel * kernel * words, TILE_FILTERS), row by row of the kernel.
        inputs: channels that the words hold; their unused bits are 0 in `x` and in `filters`.
        kernel, stride, padding: as in a convolution with a square kernel.
        out: where to, int32 (images, height', width', channels).
        threads: to use.
    """
    ones = _ones(filters, x.shape[3]) if padding else np.zeros((1, 1), np.int32)
    blocks = -(-out.shape[0] * out.shape[1] * out.shape[2] // BLOCK)
    arguments = (x, filters, ones, inputs, kernel, stride, padding, out)
    _run(_dots_serial, _dots_parallel, threads, blocks, *arguments)


def threshold_bits(
    dots: NDArray[np.int32],
    threshold: NDArray[Any],
    direction: NDArray[np.uint64],
    *,
    pool: int,
    out: NDArray[np.uint64],
    threads: int,
) -> None:
    """Max-pool integers, and turn each into a bit: (largest >= threshold), inverted where the direction's bit is 1.

    Args:
        dots: int32 (images, height, width, channels).
        threshold: int16 or int32 (channels,).
        direction: uint64 words (words,), a bit a channel.
        pool: height and width of a pooling window, 1 for none.
        out: where to, uint64 words (images, height // pool, width // pool, words).
        threads: to use.
    """
    _run(_threshold_serial, _threshold_parallel, threads, len(dots), dots, threshold, direction, pool, out)


def affine(
    x: NDArray[Any],
    shortcut: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    *,
    clamp: bool,
    values: NDArray[np.float32],
    out: NDArray[np.uint64],
    threads: int,
) -> None:
    """Compute (x + shortcut) * scale + shift, clamped to [-1, 1] if asked for, and its signs as words.

    Args:
        x: int32 or float32 (images, height, width, channels).
        shortcut: float32 of that shape, or without images for none.
        scale, shift: float32 (channels,).
        clamp: whether to clamp.
        values: where the numbers go, float32 of the shape of `x`, or without images if only their signs are wanted.
        out: where their signs go, uint64 words (images, height, width, words).
        threads: to use.
    """
    _run(_affine_serial, _affine_parallel, threads, len(x), x, shortcut, scale, shift, clamp, values, out)


def _run(serial: Any, parallel: Any, threads: int, *arguments: Any) -> None:
    # One thread needs no thread pool, whose presence would forbid this process to fork later.
    if threads == 1:
        serial(*arguments)
    else:
        with _pool:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            parallel(*arguments)
