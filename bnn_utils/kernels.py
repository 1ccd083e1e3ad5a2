"""The compiled loops of the packed network: XNOR and popcount, thresholds, scale and shift.

Activations and weights are words of 64 bits along the input channels, 1 for +1 and 0 for -1. The product of two signs
is +1 where their bits agree (XNOR), so over n inputs of which d differ, the sum of products is n - 2 d, and d is the
number of ones in the XOR of the words (popcount).

Importing this module needs Numba; `bnn_utils.packed` has another way where it is missing.
"""

from functools import lru_cache
from threading import Lock
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from bnn_utils.compiling import njit

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
def _word(context: Any, flags: Any) -> Any:
    """Return the uint64 word whose bit i is whether byte i of the 64 bytes at address `flags` is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ir.VectorType(ir.IntType(8), 64)
        loaded = builder.load(builder.inttoptr(arguments[0], flags.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", loaded, ir.Constant(flags, [0] * 64)), ir.IntType(64))

    return types.uint64(types.intp), generate


@intrinsic
def _tile(context: Any, starts: Any, jump: Any, lines: Any, length: Any, filters: Any, counts: Any, stride: Any) -> Any:
    """Count differing bits of TILE_POSITIONS patches of activations with TILE_FILTERS filters, all sums in registers.

    A patch is as many lines as the kernel has rows, each of `length` words, `jump` words after the one before:
    counts[p, f] = sum over l, k of popcount(patch[p][l * jump + k] ^ filters[l * length + k, f]).

    Arguments are the addresses of TILE_POSITIONS addresses of patches, of uint64 filters (lines * length,
    TILE_FILTERS) and of int32 counts (TILE_POSITIONS, stride); lines and length are positive. Written in LLVM's own
    terms, since no loop in Python makes the compiler keep all sums in registers; LLVM turns ctpop into what the
    processor has (VPOPCNTDQ, CNT, look-ups).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        starts, jump, lines, length, filters, counts, stride = arguments
        word, lane = ir.IntType(64), ir.IntType(32)
        vector, short = ir.VectorType(word, LANES), ir.VectorType(lane, LANES)
        zeros, undefined = ir.Constant(vector, [0] * LANES), ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
        positions, vectors = range(TILE_POSITIONS), range(TILE_FILTERS // LANES)

        def address(start: Any, *offsets: tuple[Any, int]) -> Any:
            for count, size in offsets:
                start = builder.add(start, builder.mul(count, word(size)))
            return start

        def load(kind: Any, start: Any) -> Any:
            return builder.load(builder.inttoptr(start, kind.as_pointer()), align=8)

        def sums() -> list[Any]:
            return [builder.phi(vector) for _ in positions for _ in vectors]

        patches = [load(word, address(starts, (word(p), 8))) for p in positions]
        before, outer, inner, after, done = (
            builder.block,
            *(builder.append_basic_block(name) for name in ("line", "word", "next_line", "counted")),
        )
        builder.branch(outer)

        builder.position_at_end(outer)
        line, outer_sums = builder.phi(word), sums()
        skipped = builder.mul(line, jump)
        column = address(filters, (builder.mul(line, length), 8 * TILE_FILTERS))
        builder.branch(inner)

        builder.position_at_end(inner)
        k, inner_sums = builder.phi(word), sums()
        weights = [load(vector, address(column, (k, 8 * TILE_FILTERS), (word(v), 8 * LANES))) for v in vectors]
        added: list[Any] = []
        for p in positions:
            activation = load(word, address(patches[p], (skipped, 8), (k, 8)))
            spread = builder.insert_element(undefined, activation, lane(0))
            spread = builder.shuffle_vector(spread, undefined, first_lane)
            for v in vectors:
                differing = _call(builder, f"llvm.ctpop.v{LANES}i64", builder.xor(weights[v], spread))
                added.append(builder.add(inner_sums[len(added)], differing))
        next_k = builder.add(k, word(1))
        builder.cbranch(builder.icmp_signed("<", next_k, length), inner, after)

        builder.position_at_end(after)
        next_line = builder.add(line, word(1))
        builder.cbranch(builder.icmp_signed("<", next_line, lines), outer, done)

        for phi, start, end in [(line, word(0), next_line), *((phi, zeros, s) for phi, s in zip(outer_sums, added))]:
            phi.add_incoming(start, before)
            phi.add_incoming(end, after)
        for phi, start, end in [(k, word(0), next_k), *zip(inner_sums, outer_sums, added)]:
            phi.add_incoming(start, outer)
            phi.add_incoming(end, inner)

        builder.position_at_end(done)
        for index, total in enumerate(added):
            p, v = divmod(index, len(vectors))
            place = address(counts, (builder.mul(stride, word(p)), 4), (word(v), 4 * LANES))
            builder.store(builder.trunc(total, short), builder.inttoptr(place, short.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@lru_cache(maxsize=256)
def _geometry(size: int, kernel: int, stride: int, padding: int) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Return, for one axis, which taps can lie inside the image, bool (kinds, kernel), and the kind of every place."""
    places = np.arange((size + 2 * padding - kernel) // stride + 1)
    at = places[:, None] * stride - padding + np.arange(kernel)
    kinds, kind_of = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
    return kinds, kind_of.reshape(-1)


@njit(nogil=True, cache=True)
def _largest_sums(filters, words, down, across, inputs):
    """Return what each filter gives where no bit differs, int32 (kinds down * kinds across, filters).

    A tap outside the image reads words of zeros. The kernel counts them as differing from the filter's ones, which
    this makes good, so that the tap adds nothing.
    """
    panels, rows = filters.shape[:2]
    kernel = down.shape[1]
    sums = np.zeros((len(down) * len(across), panels * TILE_FILTERS), np.int32)
    ones = np.empty((rows // words, panels * TILE_FILTERS), np.int32)
    outside = down.size + across.size > down.sum() + across.sum()
    if outside:
        ones[:] = 0
        for panel in range(panels):
            for k in range(rows):
                for c in range(TILE_FILTERS):
                    ones[k // words, panel * TILE_FILTERS + c] += np.int32(_popcount(filters[panel, k, c]))
    for kind in range(len(sums)):
        for tap in range(kernel * kernel):
            if down[kind // len(across), tap // kernel] and across[kind % len(across), tap % kernel]:
                sums[kind] += inputs
            else:
                sums[kind] += 2 * ones[tap]
    return sums


@njit(nogil=True, cache=True)
def _dots_block(block, x, filters, largest, row_kind, column_kind, kernel, stride, out):
    """Compute one block of BLOCK neighbouring positions of `dots`, from padded activations `x`."""
    height, width, words = x.shape[1:]
    out_height, out_width, channels = out.shape[1:]
    padded = len(filters) * TILE_FILTERS
    first = block * BLOCK
    positions = min(BLOCK, out.shape[0] * out_height * out_width - first)
    starts = np.full(BLOCK, x.ctypes.data, np.intp)  # what fills up the last tile reads the first patch
    counts = np.empty((BLOCK, padded), np.int32)
    kinds = np.empty(BLOCK, np.intp)
    image, place = divmod(first, out_height * out_width)
    row, column = divmod(place, out_width)
    for j in range(positions):
        starts[j] += 8 * words * ((image * height + row * stride) * width + column * stride)
        kinds[j] = row_kind[row] + column_kind[column]
        column += 1
        if column == out_width:
            row, column = row + 1, 0
            if row == out_height:
                image, row = image + 1, 0
    for panel in range(len(filters)):
        for j in range(0, positions, TILE_POSITIONS):
            _tile(
                starts.ctypes.data + 8 * j,
                width * words,
                kernel,
                kernel * words,
                filters.ctypes.data + 8 * panel * filters.shape[1] * TILE_FILTERS,
                counts.ctypes.data + 4 * (j * padded + panel * TILE_FILTERS),
                padded,
            )
    results = out.reshape(-1, channels)
    for j in range(positions):
        result, most = results[first + j], largest[kinds[j]]
        for c in range(channels):
            result[c] = most[c] - 2 * counts[j, c]


@njit(nogil=True, cache=True)
def _threshold_image(image, dots, threshold, direction, pool, out):
    """Compute one image of `threshold_bits`."""
    channels, words = dots.shape[3], out.shape[3]
    largest, limits = np.empty(channels, np.int32), threshold.astype(np.int32)
    reached = np.zeros(64 * words, np.bool_)
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            largest[:] = dots[image, row * pool, column * pool]
            for member in range(1, pool * pool):
                other = dots[image, row * pool + member // pool, column * pool + member % pool]
                for c in range(channels):
                    largest[c] = max(largest[c], other[c])
            for c in range(channels):
                reached[c] = largest[c] >= limits[c]
            for k in range(words):
                out[image, row, column, k] = _word(reached.ctypes.data + 64 * k) ^ direction[k]


@njit(nogil=True, cache=True)
def _affine_image(image, x, shortcut, after, scale, shift, clamp, values, out):
    """Compute one image of `affine`."""
    channels, words = x.shape[3], out.shape[3]
    kept = values.shape[0] > 0
    before, after = shortcut.shape[0] > 0 and not after, shortcut.shape[0] > 0 and after
    result, positive = np.empty(channels, np.float32), np.zeros(64 * words, np.bool_)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            for c in range(channels):
                value = np.float32(x[image, row, column, c])
                if before:
                    value += shortcut[image, row, column, c]
                result[c] = _fma(value, scale[c], shift[c])
                if after:
                    result[c] += shortcut[image, row, column, c]
                positive[c] = result[c] >= 0
            for k in range(words):
                out[image, row, column, k] = _word(positive.ctypes.data + 64 * k)
            if kept:
                for c in range(channels):
                    value = result[c]
                    if clamp:  # written so that NaN stays NaN
                        value = np.float32(-1) if value < -1 else value
                        value = np.float32(1) if value > 1 else value
                    values[image, row, column, c] = value


@njit(nogil=True, cache=True)
def _dots_serial(blocks, x, filters, largest, row_kind, column_kind, kernel, stride, out):
    for block in range(blocks):
        _dots_block(block, x, filters, largest, row_kind, column_kind, kernel, stride, out)


@njit(nogil=True, cache=True, parallel=True)
def _dots_parallel(blocks, x, filters, largest, row_kind, column_kind, kernel, stride, out):
    for block in prange(blocks):
        _dots_block(block, x, filters, largest, row_kind, column_kind, kernel, stride, out)


@njit(nogil=True, cache=True)
def _threshold_serial(images, dots, threshold, direction, pool, out):
    for image in range(images):
        _threshold_image(image, dots, threshold, direction, pool, out)


@njit(nogil=True, cache=True, parallel=True)
def _threshold_parallel(images, dots, threshold, direction, pool, out):
    for image in prange(images):
        _threshold_image(image, dots, threshold, direction, pool, out)


@njit(nogil=True, cache=True)
def _affine_serial(images, x, shortcut, after, scale, shift, clamp, values, out):
    for image in range(images):
        _affine_image(image, x, shortcut, after, scale, shift, clamp, values, out)


@njit(nogil=True, cache=True, parallel=True)
def _affine_parallel(images, x, shortcut, after, scale, shift, clamp, values, out):
    for image in prange(images):
        _affine_image(image, x, shortcut, after, scale, shift, clamp, values, out)


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
    images, height, width, words = x.shape
    down, row_kind = _geometry(height, kernel, stride, padding)
    across, column_kind = _geometry(width, kernel, stride, padding)
    largest = _largest_sums(filters, words, down, across, inputs)
    if padding:
        padded = np.zeros((images, height + 2 * padding, width + 2 * padding, words), np.uint64)
        padded[:, padding:-padding, padding:-padding] = x
        x = padded
    x = np.ascontiguousarray(x)
    blocks = -(-out.shape[0] * out.shape[1] * out.shape[2] // BLOCK)
    arguments = (x, filters, largest, row_kind * len(across), column_kind, kernel, stride, out)
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
    after: bool,
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
        after: add the shortcut after scale and shift: x * scale + shift + shortcut.
        clamp: whether to clamp.
        values: where the numbers go, float32 of the shape of `x`, or without images if only their signs are wanted.
        out: where their signs go, uint64 words (images, height, width, words).
        threads: to use.
    """
    _run(_affine_serial, _affine_parallel, threads, len(x), x, shortcut, after, scale, shift, clamp, values, out)


def _run(serial: Any, parallel: Any, threads: int, *arguments: Any) -> None:
    # One thread needs no thread pool, whose presence would forbid this process to fork later.
    if threads == 1:
        serial(*arguments)
    else:
        with _pool:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            parallel(*arguments)
