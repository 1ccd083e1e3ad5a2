"""The command line: python -m bnn_utils train | evaluate | damage | pack."""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from bnn_utils import campaign, checkpoints, data, faults, parallel
from bnn_utils.campaign.executors import cluster, processes
from bnn_utils.evaluation import evaluate
from bnn_utils.layers import binarized_weights
from bnn_utils.models import MODELS, Network, build
from bnn_utils.packed import pack
from bnn_utils.recipe import Recipe
from bnn_utils.repair import REPAIRS
from bnn_utils.report import check_picture, described, draw, print_epoch, published_form, stopping
from bnn_utils.runs import BEST_FILE, check_run, only_run, started
from bnn_utils.system import fastest_precision, keep_freed_memory
from bnn_utils.training import STATE_FILE, state_facts, train

UNREAD = 141  # 128 and the number of SIGPIPE
FIXED_TRIALS, MOST_TRIALS = 20, 10_000  # by default: without --until, with it
_PATH = os.path.expanduser  # shells leave the ~ of --option=~/folder as it is
SHORTCUTS = {"published": True, "none": False}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())  # an argument may hold line breaks
        parallel.tell(f"{self.prog}: error: {message} (--help lists the arguments)")
        self.exit(2)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of a recipe."""
    for setting in dataclasses.fields(Recipe):
        told, kind = setting.metadata, type(setting.default)
        choices = (*told["choices"], told["also"]) if "also" in told else told["choices"]
        how: dict[str, Any] = dict(type=kind, choices=choices, metavar=told.get("metavar"))
        flag = told.get("flag", "--" + setting.name.replace("_", "-"))
        how = {"action": "store_true"} if kind is bool else how
        parser.add_argument(flag, dest=setting.name, default=setting.default, help=told["help"], **how)


def _parser() -> argparse.ArgumentParser:
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
    _add_settings(sub)
    sub.add_argument("--width", type=float, default=1.0, help="factor on every layer's size; 1.0 is as published")
    sub.add_argument("--shortcut", choices=SHORTCUTS, help="of the published ResNet, or none")
    other = "train the float network of the same shape, such as a teacher"
    sub.add_argument("--float", dest="binary", action="store_false", help=other)
    sub.add_argument("--teacher", metavar="CHECKPOINT", type=_PATH, help="follow this network's outputs (distillation)")
    sub.add_argument("--start", metavar="CHECKPOINT", type=_PATH, help="start from these weights, not from random ones")
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


def _load_data(arguments: argparse.Namespace) -> data.Dataset:
    if arguments.data_path == "":
        raise data.DataError("--data-path is empty, expected a folder")
    dataset = data.load(arguments.dataset, arguments.data_path)
    if dataset.passed_over:
        parallel.say(f"{dataset.name}: {dataset.passed_over} hidden or system files and folders passed over")
    height, width = dataset.test.pixels.shape[2:]
    if height != width:
        raise data.DataError(f"{dataset.name}: its pictures are {width}x{height} pixels, the networks want squares")
    return dataset


def _load(path: str) -> tuple[Network, dict[str, Any]]:
    """Load a checkpoint; of a training run's state, say which network is taken."""
    model, facts = checkpoints.load(path)
    if "epochs_trained" in facts:
        so_far = f"{facts['epochs_trained']} of {facts['recipe']['epochs']} epochs"
        parallel.say(f"{path}: a run after {so_far}; its best network so far, of epoch {facts['epoch']}, is taken")
    return model, facts


def _load_trained(arguments: argparse.Namespace, packed: bool = False) -> tuple[Network, data.Images]:
    """Return the network and the test images, normalized as it was trained with; `packed`: it shall be packed."""
    model, facts = _load(arguments.checkpoint)
    if packed:
        _check_binarized(arguments.checkpoint, model)
    dataset = _fitted(arguments.checkpoint, _load_data(arguments).as_trained, facts)
    device = parallel.device(arguments.device)
    return model.to(device), dataset.test.limit(arguments.limit).to(device)


def _fitted(path: str | Path, fit: Callable[[dict[str, Any]], Any], facts: dict[str, Any]) -> Any:
    """Return `fit(facts)`; say in what goes wrong with images which file's network they were to fit."""
    try:
        return fit(facts)
    except data.DataError as error:
        raise data.DataError(f"{path}: {error}") from None


def _check_binarized(path: str, model: nn.Module) -> None:
    if not binarized_weights(model):
        raise ValueError(f"{path}: is a float network, which cannot be packed")


def _train(arguments: argparse.Namespace) -> None:
    settings = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)}
    if settings["precision"] == "auto":
        settings["precision"] = fastest_precision(arguments.device)
        print(f"precision: {settings['precision']}")
    recipe = Recipe(**settings)
    folder = Path(arguments.results_dir) / (arguments.save or arguments.model)
    resume = arguments.resume is not None
    if arguments.resume:
        folder = Path(arguments.resume)
        folder = folder.parent if folder.name == STATE_FILE else folder
    if resume and not (folder / STATE_FILE).is_file():
        raise ValueError(f"{folder}: holds no {STATE_FILE}, so there is nothing to resume")
    free = resume or arguments.overwrite
    check_run(folder, free)
    if arguments.shortcut and arguments.model != "resnet_binary":
        raise ValueError(f"--shortcut is of resnet_binary, {arguments.model} has none")
    if parallel.launched() and arguments.device.startswith("cuda:"):
        raise ValueError(
            f"--device {arguments.device}: each process takes a GPU of its own, expected auto, cuda or cpu"
        )
    device = parallel.device(arguments.device)
    keep_freed_memory()

    dataset = _load_data(arguments)
    teacher, start, extended = None, None, []
    if arguments.teacher:
        teacher, taught = _load(arguments.teacher)
        dataset = _fitted(arguments.teacher, dataset.as_trained, taught)
    if resume:  # an interrupted run has weights and a normalization of its own
        before = state_facts(folder)
        dataset = _fitted(folder / STATE_FILE, dataset.as_trained, before)
        extended, begun_with = before.get("extended", []), before["recipe"]["epochs"]
        if recipe.epochs > begun_with:
            extended = [*extended, begun_with]
            parallel.say(
                f"--epochs {recipe.epochs}, begun with {begun_with}: from the next epoch on, the learning rate follows "
                f"the cosine of {recipe.epochs}; a run that begins with {recipe.epochs} would differ"
            )
    elif arguments.start:
        start, begun = _load(arguments.start)
        dataset = _fitted(arguments.start, dataset.as_trained, begun)
    if teacher is not None:
        _fitted(arguments.teacher, dataset.train.check_trained, taught)
    _, in_channels, _, size = dataset.train.pixels.shape
    torch.manual_seed(recipe.seed)
    config: dict[str, Any] = {"shortcut": SHORTCUTS[arguments.shortcut]} if arguments.shortcut else {}
    config |= dict(width=arguments.width, in_channels=in_channels, input_size=size, binary=arguments.binary)
    model = build(arguments.model, num_classes=len(dataset.classes), **config)
    if start is not None:
        model = started(arguments.start, start, begun, model)
    model = model.to(device).to(memory_format=torch.channels_last)
    if teacher is not None:
        teacher = teacher.to(device).to(memory_format=torch.channels_last)
    facts: dict[str, Any] = dict(dataset=dataset.name, **dataset.train.facts)
    facts |= dict(recipe=dataclasses.asdict(recipe), device=str(device))
    if extended:
        facts["extended"] = extended  # the numbers of epochs that it was begun and gone on with
    if device.type == "cpu":
        facts["threads"] = torch.get_num_threads()  # sums depend on how they are split
    networks = {"start": arguments.start, "teacher": arguments.teacher}
    facts |= {name: Path(path).name for name, path in networks.items() if path}

    def keep(network: nn.Module, row: dict[str, Any]) -> None:
        facts.update(epoch=row["epoch"], validation_accuracy=row["validation_accuracy"])
        checkpoints.save(folder / BEST_FILE, network, **facts)

    what = arguments.model if arguments.binary else f"the float form of {arguments.model}"
    parallel.say(f"training {what} at width {arguments.width:g} on {dataset.name}, into {folder}")
    with only_run(folder, free):
        with parallel.group(device):
            history = train(
                model,
                dataset.to(device),
                recipe,
                folder=folder,
                resume=resume,
                on_best=keep,
                on_epoch=print_epoch,
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
    print(f"test: {described(tested)} on {len(dataset.test)} images of {dataset.name}")
    print(f"kept: {folder / BEST_FILE}")


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
    print(f"{described(evaluate(model, images))} on {len(images)} test images of {images.dataset}")


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


def _executor(arguments: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    if arguments.workers is not None:
        return processes(arguments.workers)
    return nullcontext() if arguments.cluster is None else cluster(arguments.cluster)


def _damage(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.storage == "packed":
        _on_the_cpu(arguments, "packed networks compute")
    if arguments.workers is not None or arguments.cluster is not None:
        _on_the_cpu(arguments, "workers compute")
    if arguments.plot is not None:
        check_picture(arguments.plot, arguments.probabilities, arguments.resume)
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
        print(stopping(table, arguments.until))
    if arguments.plot is not None:
        draw(table, original, arguments.plot)


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
            parallel.tell(message)
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
