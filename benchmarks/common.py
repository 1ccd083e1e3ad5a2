"""What the benchmarks share: arguments, random networks, fair timing, and the files that they write."""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from bnn_utils import plotting
from bnn_utils.data import Images
from bnn_utils.models import build
from bnn_utils.system import write_beside

PAUSE = 0.2  # seconds before a turn, if a turn lasts that long
RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "numpy", "numba", "onnxruntime", "openvino")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the arguments that every benchmark takes; `parse` reads them."""
    arguments = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    arguments.add_argument("--threads", type=int, default=2, help="threads for everything measured (default 2)")
    arguments.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; needs --out")
    arguments.add_argument("--out", type=Path, help="folder for CSV and figure (default benchmarks/results)")
    return arguments


def parse(arguments: argparse.ArgumentParser, values: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what --quick measures means nothing, so it never replaces real results."""
    parsed = arguments.parse_args(values)
    if parsed.threads < 1:
        arguments.error(f"--threads must be at least 1, got {parsed.threads}")
    if parsed.quick and (parsed.out is None or parsed.out.resolve() == RESULTS):
        arguments.error("--quick needs --out with another folder than benchmarks/results")
    parsed.out = parsed.out or RESULTS
    return parsed


def machine() -> str:
    """Return what ran: processor, number of CPUs, system, and the versions of what computes."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = [f"python {platform.python_version()}"]
    for package in VERSIONS:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()}; {', '.join(versions)}"


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch, and with it the packed network, compute with `threads` threads until the context ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def random_network(name: str, width: float, seed: int = 0, **config: Any) -> nn.Module:
    """Return a network of `bnn_utils.models` with random weights, in evaluation mode.

    BatchNorm has scales of both signs, shifts, and the statistics of a batch of random images, so that signs of
    activations fall both ways and a channel's threshold is as good as any.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(name, width=width, **config)
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        momentum = norms[0].momentum
        for norm in norms:
            norm.momentum = 1.0  # the statistics of the one batch below, alone
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias, std=0.3)
        size: Any = network.config
        network.train()(torch.randn(16, size["in_channels"], size["input_size"], size["input_size"]))
        for norm in norms:
            norm.momentum = momentum
    return network.eval()


def random_images(n: int, size: int) -> Images:
    """Return `n` images of random pixels and labels, in ten classes."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,), generator=generator)
    names = tuple(str(number) for number in range(10))
    return Images(pixels, labels, (0.5,) * 3, (0.25,) * 3, "random images", names)


def round_robin(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time each call once a round, all in turn, so that whatever else the machine does hits all alike.

    Before a turn there is a pause, in which the thread pools of the one before it stop waiting for more work, and an
    untimed call, which fills the caches.

    Args:
        calls: what to time, by name.
        rounds: how many, at least 1.
        seconds: for which a call is repeated within a round; it runs at least once.

    Returns:
        Seconds a call, the mean within a round, an entry a round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(min(PAUSE, seconds))
            call()
            count, started, elapsed = 0, time.perf_counter(), 0.0
            while elapsed < seconds or not count:
                call()
                count += 1
                elapsed = time.perf_counter() - started
            times[name].append(elapsed / count)
    return times


def publish(name: str, table: pd.DataFrame, draw: Callable[[pd.DataFrame], Figure], out: Path) -> None:
    """Write `table` as out/name.csv, with a first column that says what ran, and what `draw` makes of that file."""
    out.mkdir(parents=True, exist_ok=True)
    table = table.copy()
    table.insert(0, "machine", machine())
    source = out / f"{name}.csv"
    write_beside(source, partial(table.to_csv, index=False))
    table = pd.read_csv(source)
    with plt.style.context(plotting.STYLE):
        figure = draw(table)
        says = f"{table['machine'][0].split(';')[0]}, threads: {table['threads'][0]}"
        figure.text(1, -0.01, says, ha="right", va="top", fontsize=7, color="0.4")
        for kind in ("png", "svg"):
            plotting.save(figure, out / f"{name}.{kind}")
        plt.close(figure)
    print(f"\nwrote {source}, {name}.png and {name}.svg")
