"""Multiply-accumulates a second of the packed convolution, and its share of what popcount alone could do."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from llvmlite import ir
from matplotlib.figure import Figure
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from benchmarks import common
from bnn_utils import kernels
from bnn_utils.bits import WORD

# The hidden convolutions of the full VGG, 3x3 with a padding of 1: inputs, channels, height and width.
LAYERS = ((384, 384, 32), (384, 768, 16), (768, 768, 16), (768, 1536, 8), (1536, 512, 8))
KERNEL, PADDING = 3, 1
LANES = kernels.LANES
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


def register_loop(chains: int, adds: bool) -> Callable[[int], int]:
    """Return a compiled loop that counts the bits of `chains` independent vectors, n times, without any memory.

    Each turn replaces a vector x by popcount(x), or by x + popcount(x) if `adds`, so that no turn can be left out.
    """

    @intrinsic
    def loop(context: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = ir.IntType(64)
            vector = ir.VectorType(word, LANES)
            kind = ir.FunctionType(vector, [vector])
            count = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{LANES}i64")
            before, body, done = builder.block, builder.append_basic_block("body"), builder.append_basic_block("done")
            builder.branch(body)
            builder.position_at_end(body)
            turn, *registers = builder.phi(word), *(builder.phi(vector) for _ in range(chains))
            counted = [builder.call(count, [register]) for register in registers]
            if adds:
                counted = [builder.add(*pair) for pair in zip(registers, counted, strict=True)]
            after = builder.add(turn, word(1))
            starts = [ir.Constant(vector, [97 * c + 13 * lane + 5 for lane in range(LANES)]) for c in range(chains)]
            for phi, start, end in zip([turn, *registers], [word(0), *starts], [after, *counted], strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(end, body)
            builder.cbranch(builder.icmp_signed("<", after, arguments[0]), body, done)
            builder.position_at_end(done)
            total = counted[0]
            for other in counted[1:]:
                total = builder.add(total, other)
            return builder.extract_element(total, ir.IntType(32)(0))

        return types.int64(types.int64), generate

    run: Any = loop
    return njit(nogil=True)(lambda n: run(n))


def limit_calls(threads: int, turns: int, pool: ThreadPoolExecutor) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the register loops by name, each as a call on all threads at once, and the bits that a call counts."""
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, chains, adds in (("count", 16, False), ("count and add", 12, True)):
        loop = register_loop(chains, adds)
        loop(1)  # compiles

        def call(loop: Callable[[int], int] = loop) -> None:
            list(pool.map(loop, [turns] * threads))

        calls[name] = call, threads * turns * chains * LANES * WORD
    return calls


def layer_call(inputs: int, channels: int, side: int, images: int, threads: int) -> tuple[Callable[[], Any], int]:
    """Return one packed convolution of random bits as a call, and the multiply-accumulates that it stands for.

    Taps of the padding count as work, as is usual for convolutions.
    """
    generator = np.random.default_rng(0)
    words, panels = inputs // WORD, channels // kernels.TILE_FILTERS
    x = generator.integers(0, 1 << 64, (images, side, side, words), np.uint64)
    filters = generator.integers(0, 1 << 64, (panels, KERNEL**2 * words, kernels.TILE_FILTERS), np.uint64)
    out = np.empty((images, side, side, channels), np.int32)

    def call() -> None:
        kernels.dots(x, filters, inputs=inputs, kernel=KERNEL, stride=1, padding=PADDING, out=out, threads=threads)

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
        "popcount in registers alone", (0, table["limit_per_second"][0] / 1e9), (0, 3), "data", "offset points"
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
