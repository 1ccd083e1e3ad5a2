"""Images a second of whole networks: packed, and as PyTorch, ONNX Runtime and OpenVINO run them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks import common, runtimes
from bnn_utils.plotting import label

NETWORKS = (
    ("vgg_cifar10_binary", 1.0),
    ("vgg_cifar10_binary", 0.25),
    ("resnet_binary", 1.0),
    ("resnet_bireal", 1.0),
)
QUICK_NETWORKS = (("vgg_cifar10_binary", 0.05), ("resnet_binary", 0.2), ("resnet_bireal", 0.1))
COLUMNS = [
    "network",
    "width",
    "batch",
    "runtime",
    "threads",
    "images_per_second",
    "best_images_per_second",
    "rounds",
    "packed_speedup",
    "same_class",
]  # fmt: skip


@torch.no_grad()
def measure(
    name: str, width: float, batches: Sequence[int], names: Sequence[str], threads: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Return a row a batch size and runtime for one network; a runtime that is missing is named and left out.

    Raises:
        RuntimeError: packed and torch's float32 network predict different classes.
    """
    network = common.random_network(name, width)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))
            expected = network(images).argmax(1).numpy()
            contenders, same = {}, {}
            for runtime in names:
                try:
                    contender = runtimes.RUNTIMES[runtime](network, images, threads, Path(folder))
                except runtimes.Missing as error:
                    print(f"{name} {width} batch {batch}: {runtime} skipped: {error}")
                    continue
                contenders[runtime] = contender
                same[runtime] = float((contender.call().argmax(1) == expected).mean())
            for runtime in ("packed", "torch float32"):
                if same[runtime] < 1:
                    raise RuntimeError(f"{name} {width}: {runtime} predicts other classes than the float network")
            calls = {runtime: contender.call for runtime, contender in contenders.items()}
            times = common.round_robin(calls, rounds, seconds)
            per_image = {r: np.array(times[r]) / contenders[r].batches / batch for r in contenders}
            for runtime, own in per_image.items():
                rows.append(
                    dict(
                        network=name,
                        width=width,
                        batch=batch,
                        runtime=runtime,
                        threads=threads,
                        images_per_second=1 / np.median(own),
                        best_images_per_second=1 / own.min(),
                        rounds=rounds,
                        packed_speedup=np.median(own / per_image["packed"]),
                        same_class=same[runtime],
                    )
                )
                print("{network} {width} batch {batch}: {runtime:25}".format(**rows[-1]), end="")
                print("{images_per_second:10.1f} images/s, packed is {packed_speedup:6.2f} times".format(**rows[-1]))
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each network and batch, how many times as fast packed is as torch float32 and the fastest int8."""
    rows = []
    for key, group in table.groupby(["network", "width", "batch"], sort=False):
        speedups = group.set_index("runtime")["packed_speedup"]
        int8 = speedups[[name for name in speedups.index if "int8" in name]]
        row = dict(zip(("network", "width", "batch"), key, strict=True))
        row["over_torch_float32"] = speedups["torch float32"]
        row["over_fastest_int8"] = int8.min() if len(int8) else float("nan")
        row["fastest_int8"] = int8.idxmin() if len(int8) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def draw(table: pd.DataFrame) -> Figure:
    """Draw images a second, a panel for each network and batch, on one axis."""
    networks = list(dict.fromkeys(zip(table["network"], table["width"], strict=True)))
    batches = list(dict.fromkeys(table["batch"]))
    names = list(dict.fromkeys(table["runtime"]))[::-1]
    size = (2.3 * len(networks) + 2, 0.28 * len(names) * len(batches) + 1)
    figure, axes = plt.subplots(len(batches), len(networks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, batch in enumerate(batches):
        for column, (network, width) in enumerate(networks):
            axis = axes[row, column]
            chosen = (table["network"] == network) & (table["width"] == width) & (table["batch"] == batch)
            own = table[chosen].set_index("runtime")["images_per_second"].reindex(names)
            bars = axis.barh(names, own, color=["C0" if name == "packed" else "0.6" for name in names])
            axis.bar_label(bars, [_rounded(value) for value in own], padding=2, fontsize=7)
            axis.set(xscale="log", title=f"{label(network)} {width:g}, batch {batch}")
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.3)
            if row == len(batches) - 1:
                axis.set_xlabel("images per second")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("inference", __doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every runtime (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a turn (default 1)")
    parser.add_argument("--runtimes", nargs="+", choices=runtimes.RUNTIMES, help="these, packed and torch float32")
    options = common.parse(parser, arguments)
    networks, batches = (QUICK_NETWORKS, (1, 8)) if options.quick else (NETWORKS, (1, 64))
    rounds, seconds = (2, 0.01) if options.quick else (options.rounds, options.seconds)
    always = ("packed", "torch float32")
    names = [name for name in runtimes.RUNTIMES if name in always or name in (options.runtimes or runtimes.RUNTIMES)]
    if options.quick and not options.runtimes:
        names.remove("torch.compile float32")  # compiling alone takes longer than all the rest
    rows = []
    with common.torch_threads(options.threads):
        for name, width in networks:
            rows += measure(name, width, batches, names, options.threads, rounds, seconds)
    table = pd.DataFrame(rows, columns=COLUMNS)
    print("\nPacked is so many times as fast as\n" + summary(table).to_string(index=False, float_format="%.2f"))
    common.publish("inference", table, draw, options.out)


if __name__ == "__main__":
    main()
