"""Images a second of training: a plain loop, as tutorials write it, and the steps of `bnn_utils.training`."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from benchmarks import common
from bnn_utils import parallel
from bnn_utils.data import Dataset
from bnn_utils.layers import clamp_latent_weights
from bnn_utils.models import MODELS, build
from bnn_utils.plotting import label
from bnn_utils.system import keep_freed_memory
from bnn_utils.training import Evaluation, Recipe, Trainer

Turn = Callable[[int], Evaluation]  # trains for so many steps


class Contender(NamedTuple):
    loop: str
    precision: str = "float32"
    compiled: bool = False


PLAIN = "plain loop"
CONTENDERS = {
    PLAIN: Contender("plain"),
    "library float32": Contender("library"),
    "library bfloat16": Contender("library", "bfloat16"),
    "library float32 compiled": Contender("library", compiled=True),
    "library bfloat16 compiled": Contender("library", "bfloat16", compiled=True),
}
COLUMNS = [
    *("network", "width", "loop", "precision", "compiled", "device", "threads", "workers", "batch", "steps"),
    *("images_per_second", "best_images_per_second", "rounds", "first_seconds", "speedup"),
]


@dataclass(frozen=True)
class Setting:
    """What all contenders share; `workers` are the plain loop's processes that make its images."""

    network: str
    width: float
    device: str
    threads: int
    workers: int
    batch: int
    steps: int


class Pictures(TorchDataset):
    """The training images as torchvision's sets give them: one at a time, through PIL and a list of transforms."""

    def __init__(self, data: Dataset):
        train = data.train
        self.pixels = train.pixels.permute(0, 2, 3, 1).contiguous().numpy()  # as torchvision's CIFAR10 keeps them
        self.labels = train.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(train.pixels.shape[2:], padding=data.padding),
                transforms.RandomHorizontalFlip(0.5 if data.flip else 0.0),
                transforms.ToTensor(),
                transforms.Normalize(train.mean, train.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def shuffled(n: int) -> Iterator[int]:
    """Yield all of 0..n-1 in random order, again and again: an epoch without end, so workers start only once."""
    while True:
        yield from torch.randperm(n).tolist()


def plain_loop(model: nn.Module, data: Dataset, recipe: Recipe, workers: int) -> Turn:
    """Return the loop of a tutorial; `data` lies on the CPU, `model` on the device that trains.

    Nothing is slowed on purpose: the layers are the library's, with all that is fast in them, and workers prepare
    images while the network computes.
    """
    device = next(model.parameters()).device
    loader = DataLoader(
        Pictures(data),
        recipe.batch_size,
        sampler=shuffled(len(data.train)),
        num_workers=workers,
        multiprocessing_context=get_all_start_methods()[0] if workers else None,  # as in a process of one's own
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    model.train()

    def turn(steps: int) -> Evaluation:
        loss_sum, accuracy_sum = 0.0, 0.0
        for x, labels in islice(batches, steps):
            x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            logits = model(x)
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            clamp_latent_weights(model)
            loss_sum += loss.item()
            accuracy_sum += (logits.argmax(1) == labels).float().mean().item()
        return Evaluation(loss_sum / steps, accuracy_sum / steps)

    return turn


def library_loop(model: nn.Module, data: Dataset, recipe: Recipe) -> Turn:
    """Return the steps that `bnn_utils.training.train` takes; `model` and `data` lie on the device that trains."""
    model.to(memory_format=torch.channels_last)
    trainer = Trainer(model, recipe)

    def turn(steps: int) -> Evaluation:
        own = replace(data, train=data.train.limit(steps * recipe.batch_size))
        return trainer.epoch(own, 0, damaging=False, progress=False)[0]

    return turn


_turn: Turn  # of the contender whose process this is


def prepare(contender: Contender, setting: Setting, cache: str) -> float:
    """Make this process the contender's; return the seconds of its first step, and of all that goes before it."""
    global _turn
    torch.set_num_threads(setting.threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, or compiling would take no time the second time
    if contender.loop == "library":
        keep_freed_memory()
    images = common.random_images(setting.steps * setting.batch, size=32)
    data = Dataset(images, images, images, padding=4, flip=True)
    torch.manual_seed(0)
    model = build(setting.network, width=setting.width).to(setting.device)
    recipe = Recipe(batch_size=setting.batch, precision=contender.precision, compile=contender.compiled)
    started = time.perf_counter()
    if contender.loop == "plain":
        _turn = plain_loop(model, data, recipe, setting.workers)
    else:
        _turn = library_loop(model, data.to(setting.device), recipe)
    take_turn(1)
    return time.perf_counter() - started


def take_turn(steps: int) -> None:
    _turn(steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _process() -> Executor:
    """Return a process, forked where that can be from one that has only imported this module; Ctrl-C is not for it."""
    fork = "forkserver" in get_all_start_methods()
    context: Any = get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(["benchmarks.training"])
    return ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _turn_in(pool: Executor, steps: int) -> None:
    pool.submit(take_turn, steps).result()


def rows(setting: Setting, times: dict[str, list[float]], first: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each contender, given the seconds of its turns and of its first step."""
    shared = vars(setting)
    if setting.device != "cpu":
        shared = shared | dict(device=torch.cuda.get_device_name(setting.device))
    table = []
    for name, own in times.items():
        rates = setting.steps * setting.batch / np.array(own)
        speedup = np.median(np.array(times[PLAIN]) / own)
        row = shared | CONTENDERS[name]._asdict() | dict(rounds=len(own), first_seconds=first[name], speedup=speedup)
        table.append(row | dict(images_per_second=np.median(rates), best_images_per_second=rates.max()))
    return table


def measure(setting: Setting, names: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row for each contender; compiled ones are named and left out where torch.compile does not work.

    Each has a process of its own, since memory once kept is kept for all that a process does; one trains at a time.
    """
    calls: dict[str, Callable[[], Any]] = {}
    first = {}
    with ExitStack() as stack:
        for name in names:
            cache = stack.enter_context(TemporaryDirectory())
            pool = stack.enter_context(_process())
            try:
                first[name] = pool.submit(prepare, CONTENDERS[name], setting, cache).result()
            except ValueError as error:
                if not CONTENDERS[name].compiled:
                    raise
                print(f"{setting.network} {setting.width:g}: {name} skipped: {error}")
                continue
            calls[name] = partial(_turn_in, pool, setting.steps)
        # The untimed turn before each timed one also fills, or drains, the queue of the plain loop's workers.
        table = rows(setting, common.round_robin(calls, rounds, seconds), first)
    for name, row in zip(calls, table, strict=True):
        print("{network} {width:g}: ".format(**row) + f"{name:25}", end="")
        print("{images_per_second:9.1f} images/s, first step {first_seconds:5.1f} s, ".format(**row), end="")
        print("{speedup:6.2f} times the plain loop".format(**row), flush=True)
    return table


def draw(table: pd.DataFrame) -> Figure:
    """Draw images a second, a panel for each network."""
    names = {contender: name for name, contender in CONTENDERS.items()}
    panels = table.groupby(["network", "width", "batch", "device"], sort=False)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels) + 1.5, 2.4), sharey=True, squeeze=False)
    for axis, ((network, width, batch, device), panel) in zip(axes[0], panels, strict=True):
        own = [names[Contender(*key)] for key in zip(panel["loop"], panel["precision"], panel["compiled"], strict=True)]
        colors = ["0.6" if name == PLAIN else "C0" for name in own]
        bars = axis.barh(own, panel["images_per_second"], color=colors)
        says = [f"{row.images_per_second:,.0f} (×{row.speedup:.2f})" for row in panel.itertuples()]
        axis.bar_label(bars, says, padding=2, fontsize=7)
        axis.set(title=f"{label(network)} {width:g}, batch {batch}, {device}", xlabel="images per second")
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.3)
    axes[0, 0].invert_yaxis()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("training", __doc__)
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    parser.add_argument("--width", type=float, help="of the networks (default 0.25 on a CPU, else 1)")
    parser.add_argument("--steps", type=int, help="of a turn (default 6 on a CPU, else 50)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender (default 5)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that load the plain loop's images (default 2)"
    )
    options = common.parse(parser, arguments)
    try:
        device = parallel.device(options.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    width, steps = (0.25, 6) if device.type == "cpu" else (1.0, 50)
    names, batch, rounds, seconds = list(CONTENDERS), Recipe().batch_size, options.rounds, common.PAUSE
    networks = list(MODELS)
    if options.quick:
        networks = networks[:1]
        width, steps, batch, rounds, seconds = 0.02, 2, 16, 2, 0.0
        names = [name for name in names if not CONTENDERS[name].compiled]  # compiling takes longer than all the rest
    width, steps = options.width or width, options.steps or steps
    table: list[dict[str, Any]] = []
    for network in networks:
        setting = Setting(network, width, str(device), options.threads, options.workers, batch, steps)
        table += measure(setting, names, rounds, seconds)
    frame = pd.DataFrame(table, columns=COLUMNS)
    ratios = frame[frame["loop"] == "library"].set_index(["precision", "compiled", "network"])["speedup"].unstack()
    print(
        "\nThe library's steps are so many times as fast as the plain loop's\n" + ratios.to_string(float_format="%.2f")
    )
    common.publish("training", frame, draw, options.out)


if __name__ == "__main__":
    main()
