"""The compiled loops of the packed network: XNOR and popcount, thresholds, scale and shift; `packed_layers` calls them.

Activations and weights are words of 64 bits along the input channels, 1 for +1 and 0 for -1. The product of two signs
is +1 where their bits agree (XNOR), so over n inputs of which d differ, the sum of products is n - 2 d, and d is the
number of ones in the XOR of the words (popcount).

All that is compiled is in this file, since Numba's cache on disk looks at the file of a loop alone: it would not see
that what the loop calls, in another file, has changed.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_process_triple
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from bnn_utils.compiling import compiled

BLOCK = 32  # positions that a thread takes at a time
PANEL = 32  # filters that lie side by side in memory


class Tile(NamedTuple):
    """How bits are counted: what one tile computes, and how.

    Attributes:
        positions, filters: what it computes, divisors of BLOCK and PANEL.
        lanes: words of 64 bits in a vector.
        levels: of carry-save adders; a popcount for every 2**levels words.
        ternary: whether adders are made of AVX-512's three-input logic, which takes 8 lanes.
    """

    positions: int
    filters: int
    lanes: int
    levels: int
    ternary: bool


def target_has(feature: str) -> bool:
    """Return whether the processor that Numba compiles for has a feature, by LLVM's name.

    It is the host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name another; where these say nothing of a feature, it
    counts as missing, which is safe.
    """
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    return f"+{feature}" in (get_host_cpu_features() if chosen is None else chosen).split(",")


# Where few instructions count a vector's ones. AVX-512 VPOPCNTDQ: XOR, popcount and sum, 3 operations a vector of 8
# words; the 16 sums stay in registers. ARM: the same 3 a vector of 2 words with SVE, 5 with NEON (XOR, CNT, pairwise
# sums). The adders below would take 8 * 1 + 7 * 3 + 5 = 34 operations for 8 vectors of NEON, which selects bits in one
# operation: 15% fewer, not measured, so not done.
POPCOUNT = Tile(positions=4, filters=32, lanes=8, levels=0, ternary=False)

# Elsewhere LLVM counts ones by looking up nibbles: with XOR and sum 9 operations a vector. Carry-save adders (a
# Harley-Seal counter) turn eight vectors into one to look up. There are 7 adders of three bits a place, each 2
# operations of three-input logic, or 5 of two-input logic. Four of them take in the XOR of activations and weights:
# they are 3 operations each, or 7. So eight vectors take 4 * 3 + 3 * 2 + 8 = 26 operations on AVX-512, and
# 4 * 7 + 3 * 5 + 8 = 51 on AVX2, where to look each up takes 72. A sum holds four registers, hence fewer sums; of the
# sizes that fit into 32 registers of 512 bits, or 16 of 256, these were the fastest.
# Source: Muła, Kurz and Lemire, Faster Population Counts Using AVX2 Instructions, The Computer Journal 61 (2018),
# arXiv:1611.07612.
THREE_INPUT = Tile(positions=4, filters=8, lanes=8, levels=3, ternary=True)
TWO_INPUT = Tile(positions=2, filters=4, lanes=4, levels=3, ternary=False)
CARRY_SAVE = THREE_INPUT if target_has("avx512f") else TWO_INPUT


def best_tile() -> Tile:
    """Return the faster tile on the processor that Numba compiles for; others than x86 can count a vector's ones."""
    x86 = get_process_triple().startswith("x86_64")
    return CARRY_SAVE if x86 and not target_has("avx512vpopcntdq") else POPCOUNT


XOR, MAJORITY, CARRY = 0b10010110, 0b11101000, 0b01110100  # three-input logic: of a, b, c; CARRY is b ? not c : a


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = arguments[0].type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(arguments)), name)
    return builder.call(function, arguments)


@intrinsic
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of float32 numbers, rounded once, as torch's BatchNorm computes it.

    Rounded twice, the last bit would differ now and then, and near 0 that bit decides a sign of the next layer.

    Source: IEEE 754-2008, section 5.4.1, fusedMultiplyAdd.
    """

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
    """Return the uint64 word whose bit i is whether byte i of the 64 bytes at address `flags` is not 0.

    A vector of 64 one-bit integers is a 64-bit integer to LLVM, whose lowest bit is the first of them on little-endian
    machines. Processors have an instruction for that, PMOVMSKB or a mask register, where a loop would take 64 shifts.

    Source: LLVM Language Reference, bitcast and icmp.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ir.VectorType(ir.IntType(8), 64)
        loaded = builder.load(builder.inttoptr(arguments[0], flags.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", loaded, ir.Constant(flags, [0] * 64)), ir.IntType(64))

    return types.uint64(types.intp), generate


def _ternary(builder: Any, table: int, a: Any, b: Any, c: Any) -> Any:
    """Return AVX-512's three-input logic: bit 4 a + 2 b + c of `table`, for the bits of each place.

    LLVM makes it from two-input logic too, but not of an adder's carry in one operation.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPTERNLOGD/VPTERNLOGQ.
    """
    kind, number = a.type, ir.IntType(32)
    function_type = ir.FunctionType(kind, [kind] * 3 + [number])
    name = "llvm.x86.avx512.pternlog.q.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [a, b, c, number(table)])


def add_bits(builder: Any, kept: Any, a: Any, b: Any, ternary: bool) -> tuple[Any, Any]:
    """Add three bits at every place; return the low bits of the sums, and the high bits, of twice the weight."""
    if ternary:
        return _ternary(builder, XOR, kept, a, b), _ternary(builder, MAJORITY, kept, a, b)
    either = builder.xor(kept, a)
    return builder.xor(either, b), builder.or_(builder.and_(kept, a), builder.and_(either, b))


def _add_products(builder: Any, kept: Any, a: tuple[Any, Any], b: tuple[Any, Any], ternary: bool) -> tuple[Any, Any]:
    """Add the bits `kept`, a[0] ^ a[1] and b[0] ^ b[1] likewise."""
    if not ternary:
        return add_bits(builder, kept, builder.xor(*a), builder.xor(*b), ternary)
    first = _ternary(builder, XOR, kept, *a)
    low = _ternary(builder, XOR, first, *b)
    return low, _ternary(builder, CARRY, kept, first, low)


def counter(tile: Tile) -> Any:
    """Return the loop of a tile, for compiled functions: count differing bits of patches of activations with filters.

    A patch is `rows` words, at the same offsets from where it starts:
    counts[p, f] = sum over k of popcount(patch[p][offsets[k]] ^ filters[k, f]).

    Arguments of the loop are the addresses of intp addresses of patches (positions,), of intp offsets in bytes (rows,),
    the positive number of rows, and the addresses of uint64 filters (rows, PANEL) and of int32 counts
    (positions, stride). Written in LLVM's own terms, since no loop in Python makes the compiler keep all sums in
    registers; LLVM turns ctpop into what the processor has.
    """

    @intrinsic
    def count(context: Any, starts: Any, offsets: Any, rows: Any, filters: Any, counts: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            starts, offsets, rows, filters, counts, stride = arguments
            word, lane = ir.IntType(64), ir.IntType(32)
            vector, short = ir.VectorType(word, tile.lanes), ir.VectorType(lane, tile.lanes)
            zeros, undefined = ir.Constant(vector, [0] * tile.lanes), ir.Constant(vector, ir.Undefined)
            one, first_lane = ir.Constant(vector, [1] * tile.lanes), ir.Constant(short, [0] * tile.lanes)
            positions, vectors = range(tile.positions), range(tile.filters // tile.lanes)
            sums = range(len(positions) * len(vectors))

            def address(start: Any, *steps: tuple[Any, int]) -> Any:
                for number, size in steps:
                    start = builder.add(start, builder.mul(number, word(size)))
                return start

            def load(kind: Any, start: Any) -> Any:
                return builder.load(builder.inttoptr(start, kind.as_pointer()), align=8)

            def variables() -> list[Any]:  # which LLVM puts into registers
                return [cgutils.alloca_once_value(builder, zeros) for _ in sums]

            def pairs(k: Any) -> list[tuple[Any, Any]]:
                """Load word k: for each sum its activation, in all lanes, and its filters' weights."""
                weights = [load(vector, address(filters, (k, 8 * PANEL), (word(v), 8 * tile.lanes))) for v in vectors]
                offset = load(word, address(offsets, (k, 8)))
                single = [load(word, builder.add(patch, offset)) for patch in patches]
                vectors_of_one = [builder.insert_element(undefined, x, lane(0)) for x in single]
                spread = [builder.shuffle_vector(x, undefined, first_lane) for x in vectors_of_one]
                return [(x, w) for x in spread for w in weights]

            def carries(level: int, k: Any) -> list[Any]:
                """Add 2**level words from word k on to what is kept; return the bits of that weight that come out."""
                if level == 0:
                    return [builder.xor(*pair) for pair in pairs(k)]
                halves = (k, builder.add(k, word(1 << level - 1)))
                add = _add_products if level == 1 else add_bits
                inputs = [pairs(start) if level == 1 else carries(level - 1, start) for start in halves]
                out = []
                for variable, a, b in zip(kept[level - 1], *inputs):
                    low, high = add(builder, builder.load(variable), a, b, tile.ternary)
                    builder.store(low, variable)
                    out.append(high)
                return out

            def add_popcounts(bits: list[Any], times: Any) -> None:
                for total, b in zip(totals, bits):
                    ones = _call(builder, f"llvm.ctpop.v{tile.lanes}i64", b)
                    builder.store(builder.add(builder.shl(builder.load(total), times), ones), total)

            patches = [load(word, address(starts, (word(p), 8))) for p in positions]
            totals, kept = variables(), [variables() for _ in range(tile.levels)]
            # Words that make no full group come first: what is kept of each weight is still zero, and becomes theirs.
            for level in range(tile.levels):
                with builder.if_then(builder.trunc(builder.lshr(rows, word(level)), ir.IntType(1))):
                    for variable, bits in zip(kept[level], carries(level, builder.and_(rows, word((1 << level) - 1)))):
                        builder.store(bits, variable)
            begin = builder.and_(rows, word((1 << tile.levels) - 1))
            with cgutils.for_range(builder, builder.lshr(rows, word(tile.levels)), intp=word) as loop:
                k = builder.add(begin, builder.shl(loop.index, word(tile.levels)))
                add_popcounts(carries(tile.levels, k), zeros)
            for level in reversed(range(tile.levels)):
                add_popcounts([builder.load(variable) for variable in kept[level]], one)

            for index, total in enumerate(totals):
                p, v = divmod(index, len(vectors))
                place = address(counts, (builder.mul(stride, word(p)), 4), (word(v), 4 * tile.lanes))
                narrow = builder.trunc(builder.load(total), short)
                builder.store(narrow, builder.inttoptr(place, short.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return count


_count_by_popcount, _count_by_carry_save = counter(POPCOUNT), counter(CARRY_SAVE)


@compiled
def largest_sums(filters, words, down, across, inputs):
    """Return what each filter gives where no bit differs, int32 (kinds down * kinds across, filters).

    A tap outside the image reads words of zeros. The kernel counts them as differing from the filter's ones, which
    this makes good, so that the tap adds nothing.
    """
    panels, rows = filters.shape[:2]
    kernel = down.shape[1]
    sums = np.zeros((len(down) * len(across), panels * PANEL), np.int32)
    ones = np.empty((rows // words, panels * PANEL), np.int32)
    outside = down.size + across.size > down.sum() + across.sum()
    if outside:
        ones[:] = 0
        for panel in range(panels):
            for k in range(rows):
                for c in range(PANEL):
                    ones[k // words, panel * PANEL + c] += np.int32(_popcount(filters[panel, k, c]))
    for kind in range(len(sums)):
        for tap in range(kernel * kernel):
            if down[kind // len(across), tap // kernel] and across[kind % len(across), tap % kernel]:
                sums[kind] += inputs
            else:
                sums[kind] += 2 * ones[tap]
    return sums


@compiled
def _dots_block(block, carry_save, x, filters, largest, row_kind, column_kind, kernel, stride, out):
    """Compute one block of BLOCK neighbouring positions of a convolution, from padded activations `x`.

    `x` and `filters` are words as in `PackedLayer`; unused bits are 0 in both.
    """
    height, width, words = x.shape[1:]
    out_height, out_width, channels = out.shape[1:]
    padded = len(filters) * PANEL
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
    rows, line = filters.shape[1], kernel * words
    offsets = np.empty(rows, np.intp)  # of the words of a patch, which is a line of neighbouring words a kernel's row
    for row in range(kernel):
        for k in range(line):
            offsets[row * line + k] = 8 * (row * width * words + k)
    for panel in range(len(filters)):
        weights, sums = filters.ctypes.data + 8 * panel * rows * PANEL, counts.ctypes.data + 4 * panel * PANEL
        if carry_save:
            for j in range(0, positions, CARRY_SAVE.positions):
                place = starts.ctypes.data + 8 * j
                for c in range(0, PANEL, CARRY_SAVE.filters):
                    goal = sums + 4 * (j * padded + c)
                    _count_by_carry_save(place, offsets.ctypes.data, rows, weights + 8 * c, goal, padded)
        else:
            for j in range(0, positions, POPCOUNT.positions):
                goal = sums + 4 * j * padded
                _count_by_popcount(starts.ctypes.data + 8 * j, offsets.ctypes.data, rows, weights, goal, padded)
    results = out.reshape(-1, channels)
    for j in range(positions):
        result, most = results[first + j], largest[kinds[j]]
        for c in range(channels):
            result[c] = most[c] - 2 * counts[j, c]


@compiled
def dots_blocks(first, last, carry_save, x, filters, largest, row_kind, column_kind, kernel, stride, out):
    for block in range(first, last):
        _dots_block(block, carry_save, x, filters, largest, row_kind, column_kind, kernel, stride, out)


@compiled
def threshold_images(first, last, dots, threshold, direction, pool, out):
    """Max-pool `dots` of some images, in windows of pool x pool, and turn each largest into a bit of `out`.

    It is largest >= threshold, inverted where the direction's bit is 1.
    """
    channels, words = dots.shape[3], out.shape[3]
    largest, limits = np.empty(channels, np.int32), threshold.astype(np.int32)
    reached = np.zeros(64 * words, np.bool_)
    for image in range(first, last):
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


@compiled
def affine_images(first, last, x, shortcut, scale, shift, clamp, values, out):
    """Compute (x + shortcut) * scale + shift of some images: numbers into `values`, clamped if asked, signs into `out`.

    A shortcut without images adds nothing; without images in `values` only the signs are wanted.
    """
    channels, words = x.shape[3], out.shape[3]
    kept = values.shape[0] > 0
    added = shortcut.shape[0] > 0
    result, positive = np.empty(channels, np.float32), np.zeros(64 * words, np.bool_)
    for image in range(first, last):
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                for c in range(channels):
                    value = np.float32(x[image, row, column, c])
                    if added:
                        value += shortcut[image, row, column, c]
                    result[c] = _fma(value, scale[c], shift[c])
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


@compiled
def rectified_images(first, last, x, shortcut, scale, shift, slope, out):
    """Compute y = x * scale + shift + shortcut of some images, and slope * y where it is not positive."""
    for image in range(first, last):
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                for c in range(x.shape[3]):
                    y = _fma(np.float32(x[image, row, column, c]), scale[c], shift[c]) + shortcut[image, row, column, c]
                    out[image, row, column, c] = y if y > 0 else y * slope[c]
