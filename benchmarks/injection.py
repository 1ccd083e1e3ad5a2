"""Seconds to damage the full VGG and undo it, and in copies of its parameters, at probabilities from 1e-8 to 1e-1."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import common
from bnn_utils import faults
from bnn_utils.packed import pack

NETWORK = "vgg_cifar10_binary"
PROBABILITIES = tuple(10.0**-decade for decade in range(8, 0, -1))
DENSE, DENSE_PROBABILITY = "float32, a draw for every bit", 1e-4
COLUMNS = [
    "network",
    "width",
    "storage",
    "probability",
    "threads",
    "flips",
    "seconds",
    "copy_seconds",
    "copies",
    "fresh_copy_seconds",
    "fresh_copies",
    "rounds",
]  # fmt: skip


def copy_calls(network: nn.Module) -> dict[str, Callable[[], None]]:
    """Return one copy of the float parameters, into tensors that are there already, and into new ones ("fresh")."""
    parameters = [parameter.detach() for parameter in network.parameters()]
    targets = [parameter.clone() for parameter in parameters]

    def copy() -> None:
        for target, parameter in zip(targets, parameters, strict=True):
            target.copy_(parameter)

    def fresh() -> None:
        _ = [parameter.clone() for parameter in parameters]

    return {"copy": copy, "fresh": fresh}


def inject_call(network: nn.Module, probability: float) -> tuple[Callable[[], None], Callable[[], int]]:
    """Return one injection with its undoing, and a function that tells how many bits the last one flipped."""
    last = [0]

    def call() -> None:
        with faults.inject(network, probability, seed=0) as flips:
            last[0] = flips.total

    return call, lambda: last[0]


def dense_inject(parameters: Sequence[Tensor], probability: float, chunk: int = 1 << 20) -> int:
    """Damage and undo by the plain way, a random number for every stored bit; return how many bits flipped."""
    generator = torch.Generator().manual_seed(0)
    flips, masks = 0, []
    for parameter in parameters:
        words = parameter.detach().view(-1).view(torch.int32)
        for part in words.split(chunk):
            mask = torch.zeros_like(part)
            for bit in range(32):
                hit = torch.rand(part.shape, generator=generator) < probability
                flips += int(hit.sum())
                mask |= hit.to(torch.int32) << bit
            part ^= mask
            masks.append((part, mask))
    for part, mask in masks:
        part ^= mask
    return flips


@torch.no_grad()
def measure(
    width: float, probabilities: Sequence[float], threads: int, rounds: int, seconds: float, size: int
) -> pd.DataFrame:
    """Return a row a storage and probability, and one for the draw of every bit, all timed beside the copy."""
    network = common.random_network(NETWORK, width, input_size=size)
    rows: list[dict[str, Any]] = []

    def row(storage: str, probability: float, flips: int, times: dict[str, list[float]]) -> None:
        own, copy, fresh = (np.array(times[name]) for name in ("inject", "copy", "fresh"))
        rows.append(
            dict(
                network=NETWORK,
                width=width,
                storage=storage,
                probability=probability,
                threads=threads,
                flips=flips,
                seconds=np.median(own),
                copy_seconds=np.median(copy),
                copies=np.median(own / copy),
                fresh_copy_seconds=np.median(fresh),
                fresh_copies=np.median(own / fresh),
                rounds=len(own),
            )
        )
        print("{storage:30} p={probability:.0e} {flips:10d} flips {seconds:10.6f} s, ".format(**rows[-1]), end="")
        print("{copies:9.3f} copies into place, {fresh_copies:9.3f} fresh ones".format(**rows[-1]))

    copies = copy_calls(network)
    for storage in ("float32", "packed"):
        memory = network if storage == "float32" else pack(network)
        with faults.float32_storage(memory) if storage == "float32" else nullcontext():
            for probability in probabilities:
                call, flipped = inject_call(memory, probability)
                times = common.round_robin({"inject": call, **copies}, rounds, seconds)
                row(storage, probability, flipped(), times)
    times = common.round_robin(copies, 1, seconds)
    with faults.float32_storage(network):
        started = time.perf_counter()
        flips = dense_inject(list(network.parameters()), DENSE_PROBABILITY)
        row(DENSE, DENSE_PROBABILITY, flips, {"inject": [time.perf_counter() - started], **times})
    return pd.DataFrame(rows, columns=COLUMNS)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the time of an injection against the probability, a line a storage, and the copies to hold it against."""
    figure, axis = plt.subplots()
    for storage, group in table.groupby("storage", sort=False):
        style: Any = dict(color="0.4", marker="D", linestyle="") if storage == DENSE else dict(marker="o")
        axis.plot(group["probability"], 1e3 * group["seconds"], label=storage, **style)
    line = axis.get_yaxis_transform()  # x as a share of the axis, y as data
    for column, says in (
        ("copy_seconds", "one copy of the float parameters"),
        ("fresh_copy_seconds", "one into new memory"),
    ):
        level = 1e3 * table[column].median()
        axis.axhline(level, color="0.3", linestyle="--", linewidth=1)
        axis.text(0.01, level, says, transform=line, va="bottom", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="bit error probability", ylabel="time of an injection (ms)")
    axis.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("injection", __doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns at every probability (default 9)")
    parser.add_argument("--seconds", type=float, default=0.1, help="least time of a turn (default 0.1)")
    options = common.parse(parser, arguments)
    with common.torch_threads(options.threads):
        if options.quick:
            table = measure(0.1, (1e-4, 1e-2), options.threads, rounds=2, seconds=0.0, size=8)
        else:
            table = measure(1.0, PROBABILITIES, options.threads, options.rounds, options.seconds, size=32)
    common.publish("injection", table, draw, options.out)


if __name__ == "__main__":
    main()
