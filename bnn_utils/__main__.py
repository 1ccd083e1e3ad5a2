"""The command line: python -m bnn_utils train | evaluate | damage | pack."""

import argparse
import asyncio
import dataclasses
import io
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from torch import nn

from bnn_utils import campaign, checkpoints, data, faults, parallel
from bnn_utils.layers import binarized_weights
from bnn_utils.models import MODELS, build
from bnn_utils.packed import pack
from bnn_utils.repair import REPAIRS
from bnn_utils.system import keep_freed_memory, only_one
from bnn_utils.training import (
    LOSSES,
    OPTIMIZERS,
    PRECISIONS,
    STATE_FILE,
    STATISTICS,
    Evaluation,
    Recipe,
    evaluate,
    state_facts,
    train,
)

BEST_FILE, LOCK_FILE = "best.safetensors", ".lock"
UNREAD = 141  # 128 and the number of SIGPIPE
CONNECT_SECONDS = 5
WAIT_SECONDS = 30  # as long as processes that start together may be apart
FIXED_TRIALS, MOST_TRIALS = 20, 10_000  # by default: without --until, with it
_PATH = os.path.expanduser  # shells leave the ~ of --option=~/folder as it is
SHORTCUTS = {"published": True, "none": False}
PICTURES = (".png", ".svg", ".pdf")
PUBLISHED_WORDS = {"none": "damaged", "clip": "clipped"}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())  # an argument may hold line breaks
        _tell(f"{self.prog}: error: {message} (--help lists the arguments)")
        self.exit(2)


def _tell(message: str) -> None:
    """Print what is wrong, once where torchrun has started several processes, in which the same is wrong.

    torchrun ends the others as soon as it sees one end, so they wait until the first has told. Where they wait in
    vain, nothing is wrong there, and they tell themselves.
    """
    if not parallel.first():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(WAIT_SECONDS)
    print(message, file=sys.stderr, flush=True)


def _say(message: str) -> None:
    """Print what is good to know, once."""
    if parallel.first():
        print(message, flush=True)


def _parser() -> argparse.ArgumentParser:
    defaults = Recipe()
    parser = _Parser(prog="python -m bnn_utils", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,evaluate,damage,pack}")

    common = _Parser(add_help=False)
    common.add_argument("--dataset", choices=data.DATASETS, required=True)
    common.add_argument(
        "--data-path", metavar="DIR", type=_PATH, help="torchvision's layout, or train/<class>/ and test/<class>/"
    )
    common.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")

    checkpoint = _Parser(add_help=False)
    checkpoint.add_argument("-e", "--checkpoint", metavar="CHECKPOINT", type=_PATH, required=True)

    trained = _Parser(add_help=False, parents=[checkpoint])
    trained.add_argument("--limit", type=int, metavar="N", help="use the first N test images only")

    sub = commands.add_parser("train", parents=[common], help="train a network by the published recipe")
    sub.add_argument("--model", choices=MODELS, required=True)
    sub.add_argument("--results-dir", default="results", metavar="DIR", type=_PATH)
    sub.add_argument("--save", metavar="NAME", help="the run's folder in --results-dir (the model's name by default)")
    sub.add_argument("--epochs", type=int, default=defaults.epochs)
    sub.add_argument("--batch-size", type=int, default=defaults.batch_size)
    sub.add_argument("--lr", type=float, default=defaults.lr, help="falls to 1e-5 along a cosine")
    sub.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    sub.add_argument("--optimizer", choices=OPTIMIZERS, default=defaults.optimizer)
    sub.add_argument("--precision", choices=PRECISIONS, default=defaults.precision, help="of training's arithmetic")
    sub.add_argument("--compile", action="store_true", help="train with torch.compile, which needs a C++ compiler")
    sub.add_argument("--width", type=float, default=1.0, help="factor on every layer's size; 1.0 is as published")
    sub.add_argument(
        "--shortcut",
        choices=SHORTCUTS,
        help="of the published ResNet, or none",
    )
    sub.add_argument(
        "--float",
        dest="binary",
        action="store_false",
        help="train the float network of the same shape, such as a teacher",
    )
    sub.add_argument("--seed", type=int, default=defaults.seed)
    sub.add_argument(
        "--damage-train-rate",
        dest="damage_rate",
        type=float,
        default=defaults.damage_rate,
        metavar="P",
        help="train for errors: flip each binarized weight with this probability, anew every step",
    )
    sub.add_argument(
        "--damage-spare",
        type=float,
        default=defaults.damage_spare,
        metavar="S",
        help="spare layers with less than this share of all weights, which a repair guards",
    )
    sub.add_argument(
        "--damage-statistics",
        choices=STATISTICS,
        default=defaults.damage_statistics,
        help="by which BatchNorm normalizes the damaged network in training",
    )
    sub.add_argument(
        "--damage-below",
        type=float,
        default=defaults.damage_below,
        metavar="L",
        help=f"the cross-entropy in nats below which errors start ({defaults.damage_below})",
    )
    sub.add_argument("--loss", choices=LOSSES, default=defaults.loss, help="what is trained")
    sub.add_argument(
        "--margin", type=float, default=defaults.margin, metavar="B", help=f"of the margin loss ({defaults.margin})"
    )
    sub.add_argument(
        "--label-smoothing",
        type=float,
        default=defaults.label_smoothing,
        metavar="S",
        help="the share of the cross-entropy's target that all classes get alike",
    )
    sub.add_argument(
        "--teacher", metavar="CHECKPOINT", type=_PATH, help="train to follow this network's outputs too (distillation)"
    )
    sub.add_argument(
        "--teacher-share",
        type=float,
        default=defaults.teacher_share,
        metavar="A",
        help="the share of the loss that follows the teacher; the rest is cross-entropy",
    )
    sub.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help=f"of the teacher's and the network's softmax in that share ({defaults.temperature:g})",
    )
    sub.add_argument(
        "--start", metavar="CHECKPOINT", type=_PATH, help="start from these weights instead of random ones"
    )
    sub.add_argument("--resume", nargs="?", const="", metavar="PATH", type=_PATH, help="go on with an interrupted run")
    sub.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder")
    sub.set_defaults(run=_train)

    sub = commands.add_parser("evaluate", parents=[common, trained], help="loss and accuracy on the test images")
    sub.add_argument("--packed", action="store_true", help="compute in the packed form, on the CPU")
    sub.set_defaults(run=_evaluate)

    sub = commands.add_parser("damage", parents=[common, trained], help="the same after random bit errors")
    sub.add_argument("--probabilities", type=float, nargs="+", default=[1e-2, 1e-4, 1e-6, 1e-8], metavar="P")
    sub.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"draws of errors at each probability ({FIXED_TRIALS}; with --until at most so many, {MOST_TRIALS})",
    )
    sub.add_argument(
        "--until",
        type=float,
        metavar="H",
        help="stop at a probability when the 95%% interval of accuracy is ± H or less, for every repair",
    )
    sub.add_argument("--storage", choices=faults.STORAGES, default="float32")
    sub.add_argument("--error", choices=faults.ERRORS, default="flip", help="what happens to a bit")
    sub.add_argument("--repair", choices=REPAIRS, nargs="+", default=["none", "clip"])
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--out",
        metavar="FILE",
        type=_PATH,
        help="a new file for every trial: FILE.sqlite is written as they finish, FILE.csv at the end",
    )
    sub.add_argument("--resume", action="store_true", help="go on with --out FILE.sqlite, if it is there")
    sub.add_argument("--plot", metavar="FILE", help="a new picture of accuracy against probability: .png, .svg or .pdf")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="run trials in N processes")
    where.add_argument("--cluster", metavar="ADDRESS", help="run trials on the cluster of this Dask scheduler")
    sub.add_argument(
        "--scratch", metavar="DIR", type=_PATH, help="a folder that all workers see, for the network and the images"
    )
    sub.set_defaults(run=_damage)

    sub = commands.add_parser("pack", parents=[checkpoint], help="write a checkpoint with one bit a weight")
    sub.add_argument("-o", "--output", metavar="FILE", type=_PATH, required=True, help="a new file")
    sub.set_defaults(run=_pack)
    return parser


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and parallel.launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def _load_data(arguments: argparse.Namespace) -> data.Dataset:
    if arguments.data_path == "":
        raise data.DataError("--data-path is empty, expected a folder")
    dataset = data.load(arguments.dataset, arguments.data_path)
    if dataset.passed_over:
        _say(f"{dataset.name}: {dataset.passed_over} hidden or system files and folders passed over")
    height, width = dataset.test.pixels.shape[2:]
    if height != width:
        raise data.DataError(f"{dataset.name}: its pictures are {width}x{height} pixels, the networks want squares")
    return dataset


def _load(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a checkpoint; of a training run's state, say which network is taken."""
    model, facts = checkpoints.load(path)
    if "epochs_trained" in facts:
        so_far = f"{facts['epochs_trained']} of {facts['recipe']['epochs']} epochs"
        _say(f"{path}: a run after {so_far}; its best network so far, of epoch {facts['epoch']}, is taken")
    return model, facts


def _load_trained(arguments: argparse.Namespace, packed: bool = False) -> tuple[nn.Module, data.Images]:
    """Return the network and the test images, normalized as it was trained with; `packed`: it shall be packed."""
    model, facts = _load(arguments.checkpoint)
    if packed:
        _check_binarized(arguments.checkpoint, model)
    dataset = _load_data(arguments)
    with _named(arguments.checkpoint):
        dataset = dataset.as_trained(facts)
    device = _device(arguments.device)
    return model.to(device), dataset.test.limit(arguments.limit).to(device)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Say in what goes wrong with images which file's network they were to fit."""
    try:
        yield
    except data.DataError as error:
        raise data.DataError(f"{path}: {error}") from None


def _check_binarized(path: str, model: nn.Module) -> None:
    if not binarized_weights(model):
        raise ValueError(f"{path}: is a float network, which cannot be packed")


def _train(arguments: argparse.Namespace) -> None:
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})
    folder = Path(arguments.results_dir) / (arguments.save or arguments.model)
    resume = arguments.resume is not None
    if arguments.resume:
        folder = Path(arguments.resume)
        folder = folder.parent if folder.name == STATE_FILE else folder
    if resume and not (folder / STATE_FILE).is_file():
        raise ValueError(f"{folder}: holds no {STATE_FILE}, so there is nothing to resume")
    free = resume or arguments.overwrite
    _check_run(folder, free)
    if arguments.shortcut and arguments.model != "resnet_binary":
        raise ValueError(f"--shortcut is of resnet_binary, {arguments.model} has none")
    if parallel.launched() and arguments.device.startswith("cuda:"):
        raise ValueError(
            f"--device {arguments.device}: each process takes a GPU of its own, expected auto, cuda or cpu"
        )
    device = _device(arguments.device)
    keep_freed_memory()

    dataset = _load_data(arguments)
    teacher, start, extended = None, None, []
    if arguments.teacher:
        teacher, taught = _load(arguments.teacher)
        with _named(arguments.teacher):
            dataset = dataset.as_trained(taught)
    if resume:  # an interrupted run has weights and a normalization of its own
        before = state_facts(folder)
        with _named(folder / STATE_FILE):
            dataset = dataset.as_trained(before)
        extended, begun_with = before.get("extended", []), before["recipe"]["epochs"]
        if recipe.epochs > begun_with:
            extended = [*extended, begun_with]
            _say(
                f"--epochs {recipe.epochs}, begun with {begun_with}: from the next epoch on, the learning rate follows "
                f"the cosine of {recipe.epochs}; a run that begins with {recipe.epochs} would differ"
            )
    elif arguments.start:
        start, begun = _load(arguments.start)
        with _named(arguments.start):
            dataset = dataset.as_trained(begun)
    if teacher is not None:
        with _named(arguments.teacher):
            dataset.train.check_trained(taught)
    _, in_channels, _, size = dataset.train.pixels.shape
    torch.manual_seed(recipe.seed)
    config: dict[str, Any] = dict(num_classes=len(dataset.classes), width=arguments.width, in_channels=in_channels)
    if arguments.shortcut:
        config["shortcut"] = SHORTCUTS[arguments.shortcut]
    if not arguments.binary:
        config["binary"] = False
    model = build(arguments.model, input_size=size, **config)
    if start is not None:
        model = _started(arguments.start, start, begun, model)
    model = model.to(device).to(memory_format=torch.channels_last)
    if teacher is not None:
        teacher = teacher.to(device).to(memory_format=torch.channels_last)
    facts: dict[str, Any] = dict(
        dataset=dataset.name,
        **dataset.train.facts,
        recipe=dataclasses.asdict(recipe),
        device=str(device),
    )
    if extended:
        facts["extended"] = extended  # the numbers of epochs that it was begun and gone on with
    if device.type == "cpu":
        facts["threads"] = torch.get_num_threads()  # sums depend on how they are split
    if arguments.start:
        facts["start"] = Path(arguments.start).name
    if arguments.teacher:
        facts["teacher"] = Path(arguments.teacher).name

    def keep(network: nn.Module, row: dict[str, Any]) -> None:
        facts.update(epoch=row["epoch"], validation_accuracy=row["validation_accuracy"])
        checkpoints.save(folder / BEST_FILE, network, **facts)

    what = arguments.model if arguments.binary else f"the float form of {arguments.model}"
    _say(f"training {what} at width {arguments.width:g} on {dataset.name}, into {folder}")
    with _only_run(folder, free):
        with parallel.group(device):
            history = train(
                model,
                dataset.to(device),
                recipe,
                folder=folder,
                resume=resume,
                on_best=keep,
                on_epoch=_print_epoch,
                teacher=teacher,
            )
        if not parallel.first():
            return
        best = history.loc[history.attrs["best_epoch"] - 1]
        tested = evaluate(model, dataset.test.to(device))
        facts.update(epoch=int(best["epoch"]), validation_accuracy=float(best["validation_accuracy"]))
        facts.update(test_loss=tested.loss, test_accuracy=tested.accuracy, seconds=float(history["seconds"].sum()))
        checkpoints.save(folder / BEST_FILE, model, **facts)
    print(f"best epoch {best['epoch']:.0f}: validation acc {best['validation_accuracy']:.4f}")
    print(f"test: {_described(tested)} on {len(dataset.test)} images of {dataset.name}")
    print(f"kept: {folder / BEST_FILE}")


def _check_run(folder: Path, free: bool) -> None:
    """Raise FileExistsError where a run is in a folder, unless that is free to be gone on with or replaced."""
    if folder.exists() and not free and (not folder.is_dir() or {x.name for x in folder.iterdir()} - {LOCK_FILE}):
        raise FileExistsError(f"{folder}: is there already; go on with --resume, replace with --overwrite, or --save")


@contextmanager
def _only_run(folder: Path, free: bool) -> Iterator[None]:
    """Be the only run that trains into a folder, until the context ends; of several processes of a run, the first."""
    if not parallel.first():
        yield
        return
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = BlockingIOError(f"{folder}: another process is training into this folder; wait for it, or --save elsewhere")
    try:
        with only_one(folder / LOCK_FILE, held):
            _check_run(folder, free)  # since it was checked, another run may have begun and ended
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps a file that is open
                    (folder / LOCK_FILE).unlink()
    finally:
        for path in absent:  # nothing is left where nothing was written
            with suppress(OSError):
                path.rmdir()


def _started(path: str, model: nn.Module, facts: dict[str, Any], wanted: nn.Module) -> nn.Module:
    """Return the network `model` of a checkpoint, which must be of the name and the shape that is wanted.

    A file of one bit a weight tells signs alone. Its latent weights get the sizes of those in `wanted`, a network not
    trained yet: of size 1, no step of a small learning rate would turn a sign.
    """
    before, here = ({"network": network.name, "binary": True, **network.config} for network in (model, wanted))  # type: ignore[dict-item]
    differing = [f"{key} {before.get(key)!r} there, {here[key]!r} here" for key in here if before.get(key) != here[key]]
    if differing:
        raise ValueError(f"{path}: is of another network: {'; '.join(differing)}")
    if facts.get("packed"):
        with torch.no_grad():
            for signs, fresh in zip(binarized_weights(model).values(), binarized_weights(wanted).values(), strict=True):
                least = torch.finfo(fresh.dtype).tiny  # 0 has no sign to give
                signs.copy_(fresh.abs().clamp(min=least).copysign(signs))
    return model


def _print_epoch(row: dict[str, Any]) -> None:
    parts = [
        f"epoch {row['epoch']:3d}",
        f"lr {row['lr']:.1e}",
        f"train loss {row['train_loss']:.3f} acc {row['train_accuracy']:.3f}",
        f"validation loss {row['validation_loss']:.3f} acc {row['validation_accuracy']:.3f}",
        f"sign flips {row['sign_flips']:.2%}",
        f"{row['seconds']:.0f} s",
    ]
    print("  ".join(parts), flush=True)


def _described(result: Evaluation) -> str:
    return f"loss {result.loss:.4f}, acc {result.accuracy:.4f}"


def _on_the_cpu(arguments: argparse.Namespace, what: str) -> None:
    """Turn the device "auto" into the CPU, where `what` happens; refuse others."""
    if arguments.device not in ("auto", "cpu"):
        raise ValueError(f"{what} on the CPU, got --device {arguments.device}")
    arguments.device = "cpu"


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.packed:
        _on_the_cpu(arguments, "packed networks compute")
    model, images = _load_trained(arguments, arguments.packed)
    if arguments.packed:
        model = pack(model)
    print(f"{_described(evaluate(model, images))} on {len(images)} test images of {images.dataset}")


def _pack(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.exists():
        raise FileExistsError(f"{output}: is there already; name another file")
    model, facts = _load(arguments.checkpoint)
    _check_binarized(arguments.checkpoint, model)
    pack(model)  # what cannot be packed is told before anything is written
    checkpoints.save_packed(output, model, **{key: facts[key] for key in facts if key != "versions"})
    before, after = Path(arguments.checkpoint).stat().st_size, output.stat().st_size
    print(f"kept: {output}, {after:,} bytes, {before / after:.1f} times smaller than {arguments.checkpoint}")


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    # A copy of this process (fork) would hold locks of threads that it does not have.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["bnn_utils.campaign"])
    # Ctrl-C reaches every process in a terminal; the one that keeps what was finished answers it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore)
    try:
        handler = signal.signal(*ignore)  # an interruption between two halves of a start would be told at length
        try:
            for _ in range(workers):
                pool.submit(abs, 0)  # starts a process
        finally:
            signal.signal(signal.SIGINT, handler)
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():  # what they are at would be for nothing
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _client(distributed: Any, address: str) -> Any:
    async def reach() -> None:  # a client that cannot be made would not end quietly
        security = distributed.Security().get_connection_args("client")
        await (await distributed.core.connect(address, timeout=CONNECT_SECONDS, **security)).close()

    try:
        asyncio.run(asyncio.wait_for(reach(), CONNECT_SECONDS + 1))  # something else may listen and never answer
        return distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except Exception as error:  # of many kinds: sockets, the address, another version
        raise OSError(
            f"--cluster {address}: no scheduler answers there ({str(error) or type(error).__name__})"
        ) from None


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        import distributed
    except ImportError:
        raise ValueError("--cluster needs the package distributed: pip install 'bnn_utils[cluster]'") from None
    if not address:
        raise ValueError("--cluster is empty, expected the address of a scheduler, such as tcp://10.0.0.1:8786")
    logging.disable()  # what goes wrong is told in one line
    try:
        with _client(distributed, address) as client:
            yield client.get_executor()
    except (ValueError, OSError, campaign.WorkerError):
        raise
    except Exception as error:  # what a scheduler raises, for example of a task that killed several workers
        raise campaign.WorkerError(f"the cluster failed ({type(error).__name__}: {error}); --resume goes on") from None
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _executor(arguments: argparse.Namespace) -> Iterator[Executor | None]:
    if arguments.workers is not None:
        with _processes(arguments.workers) as executor:
            yield executor
    elif arguments.cluster is not None:
        with _cluster(arguments.cluster) as executor:
            yield executor
    else:
        yield None


def _damage(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.storage == "packed":
        _on_the_cpu(arguments, "packed networks compute")
    if arguments.workers is not None or arguments.cluster is not None:
        _on_the_cpu(arguments, "workers compute")
    if arguments.plot is not None:
        _check_plot(arguments)
    model, images = _load_trained(arguments, arguments.storage == "packed")
    repairs = list(dict.fromkeys(arguments.repair))
    trials = arguments.trials
    if trials is None:
        trials = FIXED_TRIALS if arguments.until is None else MOST_TRIALS
    original = evaluate(model, images)
    with _executor(arguments) as executor:
        table = campaign.run(
            model,
            images,
            arguments.probabilities,
            trials,
            storage=arguments.storage,
            repairs=repairs,
            seed=arguments.seed,
            error=arguments.error,
            out=arguments.out,
            executor=executor,
            resume=arguments.resume,
            until=arguments.until,
            scratch=arguments.scratch,
        )
    if arguments.error != "flip":
        print(f"error model {arguments.error}: {faults.ERRORS[arguments.error].meaning}")
    print(published_form(table, original))
    if arguments.until is not None:
        print(_stopping(table, arguments.until))
    if arguments.plot is not None:
        _plot(table, original, arguments.plot)


def _check_plot(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError, before anything is computed, where the picture could not be drawn."""
    path = Path(arguments.plot)
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path}: expected a name that ends in one of {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} in")
    if path.exists() and not arguments.resume:
        raise FileExistsError(f"{path}: is there already; name another file")
    if not any(arguments.probabilities):
        raise ValueError("--plot: its axis is logarithmic, so a probability above 0 is needed")


def _plot(table: pd.DataFrame, original: Evaluation, path: str) -> None:
    """Draw the accuracy of a campaign of one network into a file."""
    from matplotlib.pyplot import style  # only those who want a picture wait for what draws it

    from bnn_utils import plotting

    clean = pd.DataFrame({"network": table["network"].unique(), "accuracy": original.accuracy})
    with style.context(plotting.STYLE):
        plotting.save(plotting.damage_curves(table, clean=clean), path)


def _stopping(table: pd.DataFrame, until: float) -> str:
    """Return in words where a campaign with `until` stopped, and what that saved."""
    settings = table.groupby(["probability", "repair"])["accuracy"]
    half = max(campaign.bounded_interval(accuracy)[1] for _, accuracy in settings)
    end = f"stopped at ± {until:g}" if half <= until else f"± {until:g} not reached, but ± {half:.2g}"
    spent, fixed, share = campaign.saved(table)
    return (
        f"{end}: {spent} trials, {share:.0%} fewer than {fixed}, as many everywhere (this interval allows for "
        "failures that no trial has shown; those above are Student's and do not)"
    )


def published_form(table: pd.DataFrame, original: Evaluation) -> str:
    """Return a campaign's table of one network in the words of the published experiment, with intervals.

    Every figure is the mean over the trials, ± the half-width of its 95% interval; rates are damaged over original.
    Where single trials make the mean loss meaningless, its median is given too.
    """
    means = campaign.aggregate(table)
    first = means.iloc[0]
    fewest, most = means["trials"].min(), means["trials"].max()
    trials = f"{most}" if fewest == most else f"{fewest} to {most}"
    lines = [
        f"{first['network']} on {first['dataset']}, {first['storage']} storage, {trials} trials a "
        "probability, mean ± half-width of the 95% interval",
        f"original model ==> loss:{{{original.loss:.3f}}}, acc:{{{original.accuracy:.3f}}}",
        "damaged model ==>",
    ]
    for probability in sorted(means["probability"].unique(), reverse=True):
        rows = means[means["probability"] == probability]
        lines.append(f"damage probability:  {probability:g}  ({rows['flips'].iloc[0]:.4g} flips a trial)")
        for row in rows.to_dict("records"):
            word = PUBLISHED_WORDS.get(row["repair"], row["repair"])
            parts = {
                f"{word} loss": (row["loss"], row["loss_half"]),
                f"{word} acc": (row["accuracy"], row["accuracy_half"]),
                "loss rate": (_rate(row["loss"], original.loss), _rate(row["loss_half"], original.loss)),
                "acc rate": (_rate(row["accuracy"], original.accuracy), _rate(row["accuracy_half"], original.accuracy)),
            }
            line = ", ".join(f"{name}:{{{_number(mean)} ± {_number(half)}}}" for name, (mean, half) in parts.items())
            if not row["loss"] < 100:  # no mean of such losses says what a usual trial is like
                own = table[(table["probability"] == probability) & (table["repair"] == row["repair"])]
                median, low, high = campaign.median_interval(own["loss"])
                line += f"  (median loss {_number(median)}, 95% interval {_number(low)} to {_number(high)}"
                line += f"; not finite in {row['not_finite']} of {row['trials']} trials)"
            lines.append(line)
    return "\n".join(lines)


def _rate(damaged: float, original: float) -> float:
    return damaged / original if original else float("nan")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"


def _run(arguments: Sequence[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        if parallel.first():
            print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, OSError, campaign.WorkerError, parallel.ProcessError) as error:
        message = f"python -m bnn_utils {parsed.command}: error: {' '.join(str(error).split())}"
        if isinstance(error, parallel.ProcessError):  # the first may be the one that has ended
            print(message, file=sys.stderr, flush=True)
        else:
            _tell(message)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 when interrupted.

    Where the reader of a pipe has gone, as in `| head`, it ends without a word and returns 141, as shells tell it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a ± that a terminal cannot show is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # at the end of the process it would be too late to answer
    except OSError as error:  # of printing: all else is told above
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python flushes as it ends
        if isinstance(error, BrokenPipeError):
            return UNREAD
        print(f"python -m bnn_utils: error: cannot print ({error.strerror})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
