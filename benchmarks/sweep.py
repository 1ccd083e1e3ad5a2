"""Seconds of a sweep at the published size: each damaged network packed and evaluated, or evaluated in floats."""

import time
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks import common
from bnn_utils import faults
from bnn_utils.evaluation import evaluate, predict
from bnn_utils.packed import pack
from bnn_utils.plotting import label
from bnn_utils.repair import REPAIRS

NETWORK = "vgg_cifar10_binary"
PROBABILITIES = (1e-2, 1e-4, 1e-6, 1e-8)
REPAIRED = ("none", "clip")
TEST_SET = 10_000  # images of the published experiment
STAGES = ("damage_seconds", "repair_seconds", "pack_seconds", "evaluate_seconds")
COLUMNS = [
    "network",
    "width",
    "probability",
    "repair",
    "engine",
    "threads",
    "images",
    *STAGES,
    "proportional_seconds_10000_images",
    "same_class",
]  # fmt: skip


class Clock:
    """Seconds since it was made, or since it was last read."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def read(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


def measure(width: float, images: int, float_images: int, threads: int, size: int) -> pd.DataFrame:
    """Return a row a probability, repair and engine, one trial each; both engines see the same damaged network.

    A trial's damage, and its undoing, serve all its repairs, so each evaluation bears its part of their time.
    """
    network = common.random_network(NETWORK, width, input_size=size)
    data = {"packed": common.random_images(images, size), "float32": common.random_images(float_images, size)}
    common_images = data["float32"].limit(min(images, float_images))
    for engine in (pack(network), network):  # the first evaluation also compiles, and asks for memory
        evaluate(engine, common_images.limit(2))
    rows = []
    with faults.float32_storage(network):
        plans = {repair: REPAIRS[repair](network) for repair in REPAIRED}  # none of them stores anything
        for probability in PROBABILITIES:
            own: list[dict[str, Any]] = []
            clock = Clock()
            with faults.inject(network, probability, seed=0):
                damage = clock.read()
                for repair in REPAIRED:
                    clock.read()
                    with plans[repair].read():
                        repairing = clock.read()
                        packed = pack(network)
                        packing = clock.read()
                        evaluate(packed, data["packed"])
                        packed_time = clock.read()
                        evaluate(network, data["float32"])
                        float_time = clock.read()
                        classes = [predict(engine, common_images).argmax(1) for engine in (packed, network)]
                        clock.read()
                    repairing += clock.read()
                    same = (classes[0] == classes[1]).double().mean().item()
                    setting = dict(network=NETWORK, width=width, probability=probability, repair=repair)
                    shared = setting | dict(threads=threads, repair_seconds=repairing, same_class=same)
                    own.append(shared | dict(engine="packed", pack_seconds=packing, evaluate_seconds=packed_time))
                    own.append(shared | dict(engine="float32", pack_seconds=0.0, evaluate_seconds=float_time))
                clock.read()
            damage = (damage + clock.read()) / len(REPAIRED)
            for row in own:
                row["damage_seconds"], row["images"] = damage, len(data[row["engine"]])
                fixed = damage + row["repair_seconds"] + row["pack_seconds"]
                row["proportional_seconds_10000_images"] = fixed + row["evaluate_seconds"] * TEST_SET / row["images"]
                print("p={probability:.0e} {repair:5} {engine:8}".format(**row), end="")
                print(*("{} {:.3f} s,".format(stage.split("_")[0], row[stage]) for stage in STAGES), end=" ")
                print("{proportional_seconds_10000_images:.1f} s in proportion".format(**row))
            rows += own
    return pd.DataFrame(rows, columns=COLUMNS)


def draw(table: pd.DataFrame) -> Figure:
    """Draw seconds an evaluation of the whole test set, in proportion to the images measured, by engine."""
    seconds = "proportional_seconds_10000_images"
    figure, axes = plt.subplots(1, table["repair"].nunique(), sharey=True)
    for axis, (repair, panel) in zip(axes, table.groupby("repair", sort=False), strict=True):
        for index, (engine, group) in enumerate(panel.groupby("engine", sort=False)):
            at = np.arange(len(group)) + 0.4 * index - 0.2
            bars = axis.bar(at, group[seconds], width=0.38, color=("C0", "0.6")[index], label=engine)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axis.set_xticks(range(len(group)), [f"{probability:.0e}" for probability in group["probability"]])
        axis.set(yscale="log", ylim=(table[seconds].min() / 3, None), title=label(repair))
        axis.set_xlabel("bit error probability")
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("seconds for 10,000 images\n(in proportion to those measured)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("sweep", __doc__)
    parser.add_argument("--images", type=int, default=500, help="images of a packed evaluation (default 500)")
    parser.add_argument("--float-images", type=int, default=100, help="images of a float one (default 100)")
    options = common.parse(parser, arguments)
    with common.torch_threads(options.threads):
        if options.quick:
            table = measure(0.05, 16, 8, options.threads, size=16)
        else:
            table = measure(1.0, options.images, options.float_images, options.threads, size=32)
    totals = table.groupby("engine")["proportional_seconds_10000_images"].sum()
    print(f"\nThe sweep at {TEST_SET} images, in proportion: {totals['float32']:.1f} s in floats, ", end="")
    print(f"{totals['packed']:.1f} s packed, {totals['float32'] / totals['packed']:.2f} times as fast")
    common.publish("sweep", table, draw, options.out)


if __name__ == "__main__":
    main()
