"""Multiply-accumulates a second of the packed convolution, and its share of what counting bits alone could do."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from llvmlite import ir
from matplotlib.figure import Figure
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from benchmarks import common
from bnn_utils import loops
from bnn_utils.bits import WORD
from bnn_utils.layers import BinarizeConv2d
from bnn_utils.packed_layers import PackedLayer

# The hidden convolutions of the full VGG, 3x3 with a padding of 1: inputs, channels, height and width.
LAYERS = ((384, 384, 32), (384, 768, 16), (768, 768, 16), (768, 1536, 8), (1536, 512, 8))
KERNEL, PADDING = 3, 1
COLUMNS = [
    "layer",
    "inputs",
    "channels",
    "side",
    "images",
    "threads",
    "macs_per_second",
    "best_macs_per_second",
    "rounds",
    "limit_per_second",
    "share_of_limit",
]  # fmt: skip


Turn = Callable[[Any, list[Any]], list[Any]]


def popcount(builder: Any, vector: Any) -> Any:
    """Return how many bits of each word are 1, as LLVM does it for the processor."""
    kind = ir.FunctionType(vector.type, [vector.type])
    name = f"llvm.ctpop.v{vector.type.count}i64"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])


def count(builder: Any, registers: list[Any]) -> list[Any]:
    """Replace each vector x by popcount(x)."""
    return [popcount(builder, register) for register in registers]


def count_and_add(builder: Any, registers: list[Any]) -> list[Any]:
    """Replace each vector x by x + popcount(x)."""
    return [builder.add(register, popcount(builder, register)) for register in registers]


def carry_save(builder: Any, registers: list[Any]) -> list[Any]:
    """Add eight vectors on to a total and three that are kept, of weights 1, 2 and 4, by adders as in the kernel.

    Of the 12 vectors the last eight are added; then they are replaced by what the first four adders give.
    """
    total, *kept, bits = *registers[:4], registers[4:]
    replaced = []
    for level in range(3):
        carries = []
        for a, b in zip(bits[::2], bits[1::2], strict=True):
            kept[level], high = loops.add_bits(builder, kept[level], a, b, loops.CARRY_SAVE.ternary)
            carries.append(high)
            replaced += [kept[level], high]
        bits = carries
    return [builder.add(total, popcount(builder, bits[0])), *kept, *replaced[:8]]


def register_loop(turn: Turn, chains: int, vectors: int, lanes: int) -> Callable[[int], int]:
    """Return a compiled loop that takes n turns in each of several independent chains, without any memory.

    A turn replaces the `vectors` vectors of a chain, so that none can be left out; the loop returns the sum of the
    first words of all.
    """

    @intrinsic
    def loop(context: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(ir.IntType(64), lanes)
            numbers = range(chains * vectors)
            starts = [ir.Constant(vector, [97 * c + 13 * lane + 5 for lane in range(lanes)]) for c in numbers]
            variables = [cgutils.alloca_once_value(builder, start) for start in starts]  # LLVM makes them registers
            with cgutils.for_range(builder, arguments[0]):
                for first in range(0, len(variables), vectors):
                    chain = variables[first : first + vectors]
                    for variable, value in zip(chain, turn(builder, [builder.load(v) for v in chain]), strict=True):
                        builder.store(value, variable)
            total = builder.load(variables[0])
            for variable in variables[1:]:
                total = builder.add(total, builder.load(variable))
            return builder.extract_element(total, ir.IntType(32)(0))

        return types.int64(types.int64), generate

    run: Any = loop
    return njit(nogil=True)(lambda n: run(n))


def limit_calls(threads: int, turns: int, pool: ThreadPoolExecutor) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the register loops by name, each as a call on all threads at once, and the bits that a call counts."""
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, (turn, chains, vectors, lanes, counted) in LOOPS.items():
        loop = register_loop(turn, chains, vectors, lanes)
        loop(1)  # compiles

        def call(loop: Callable[[int], int] = loop) -> None:
            list(pool.map(loop, [turns] * threads))

        calls[name] = call, threads * turns * chains * counted * lanes * WORD
    return calls


# By name: what a turn does, chains, vectors of a chain, words of a vector, vectors of a chain that a turn counts; as
# many as registers hold.
LOOPS: dict[str, tuple[Turn, int, int, int, int]] = {
    "popcount": (count, 16, 1, 8, 1),
    "popcount and add": (count_and_add, 12, 1, 8, 1),
    "carry-save": (carry_save, 2 if loops.CARRY_SAVE.ternary else 1, 12, loops.CARRY_SAVE.lanes, 8),
}


def layer_call(inputs: int, channels: int, side: int, images: int, threads: int) -> tuple[Callable[[], Any], int]:
    """Return one packed convolution of random bits as a call, and the multiply-accumulates that it stands for.

    Taps of the padding count as work, as is usual for convolutions.
    """
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.integers(-1 << 63, 1 << 63, (images, side, side, inputs // WORD)))
    layer = PackedLayer(BinarizeConv2d(inputs, channels, KERNEL, padding=PADDING))

    def call() -> None:
        with common.torch_threads(threads):
            layer(x)

    return call, images * side * side * KERNEL**2 * inputs * channels


def measure(images: int, threads: int, turns: int, rounds: int, seconds: float) -> pd.DataFrame:
    """Return a row a layer; layers and register loops take turns, so that the share is of the limit at that time."""
    with ThreadPoolExecutor(threads) as pool:
        work = limit_calls(threads, turns, pool)
        limits = list(work)
        work |= {
            f"{inputs} to {channels}, {side} x {side}": layer_call(inputs, channels, side, images, threads)
            for inputs, channels, side in LAYERS
        }
        times = common.round_robin({name: call for name, (call, _) in work.items()}, rounds, seconds)
    rates = {name: amount / np.array(times[name]) for name, (_, amount) in work.items()}
    for name in limits:
        print(f"{name + ' in registers':24}{np.median(rates[name]) / 1e9:10.1f} G bits/s")
    limit = np.maximum.reduce([rates[name] for name in limits])
    rows = []
    for (inputs, channels, side), name in zip(LAYERS, [name for name in rates if name not in limits], strict=True):
        own = rates[name]
        rows.append(
            dict(
                layer=name,
                inputs=inputs,
                channels=channels,
                side=side,
                images=images,
                threads=threads,
                macs_per_second=np.median(own),
                best_macs_per_second=own.max(),
                rounds=rounds,
                limit_per_second=np.median(limit),
                share_of_limit=np.median(own / limit),
            )
        )
        print(f"{name:24}{np.median(own) / 1e9:10.1f} G MAC/s, {np.median(own / limit):.0%} of the limit")
    return pd.DataFrame(rows, columns=COLUMNS)


def draw(table: pd.DataFrame) -> Figure:
    """Draw multiply-accumulates a second, a bar a layer, and the limit as a line."""
    figure, axis = plt.subplots()
    bars = axis.bar(table["layer"], table["macs_per_second"] / 1e9, color="C0", width=0.6)
    axis.bar_label(bars, [f"{share:.0%}" for share in table["share_of_limit"]], padding=2)
    axis.axhline(table["limit_per_second"][0] / 1e9, color="0.3", linestyle="--")
    axis.annotate(
        "counting bits in registers alone", (0, table["limit_per_second"][0] / 1e9), (0, 3), "data", "offset points"
    )
    axis.set(xlabel="convolution of the full VGG (channels, map)", ylabel="10⁹ multiply-accumulates a second")
    axis.set_xticks(range(len(table)), [name.replace(", ", "\n") for name in table["layer"]])
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.15)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("popcount", __doc__)
    parser.add_argument("--images", type=int, default=16, help="images in a convolution (default 16)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every layer (default 15)")
    parser.add_argument("--seconds", type=float, default=0.2, help="least time of a turn (default 0.2)")
    options = common.parse(parser, arguments)
    sizes = (1, 10_000, 2, 0.0) if options.quick else (options.images, 3_000_000, options.rounds, options.seconds)
    images, turns, rounds, seconds = sizes
    common.publish("popcount", measure(images, options.threads, turns, rounds, seconds), draw, options.out)


if __name__ == "__main__":
    main()
