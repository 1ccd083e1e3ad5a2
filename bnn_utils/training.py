"""The published recipe, training for errors and from a teacher: watch the signs, keep the best epoch."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils import parallel
from bnn_utils.checkpoints import checksum
from bnn_utils.data import Dataset, augment
from bnn_utils.evaluation import Evaluation, evaluate
from bnn_utils.evaluation import predict as predict
from bnn_utils.layers import binarized_weights, clamp_latent_weights
from bnn_utils.losses import distillation_loss, flipped_weights, margin_loss
from bnn_utils.models import config_of, name_of, trained_on
from bnn_utils.recipe import Recipe
from bnn_utils.system import progress_bar, write_beside

FINAL_LR = 1e-5  # where the cosine schedule ends
Forward = Callable[[Tensor], Tensor]  # what computes a model: the model itself, or a faster form of it
STATE_FILE, HISTORY_FILE = "last.pt", "history.csv"
_STATE = ("identity", "facts", "rows", "best", "damaging", "model", "optimizer")
# A run's identity leaves out what came later than the first recipes, where it is as it was then.
_ALWAYS = ("epochs", "batch_size", "lr", "weight_decay", "optimizer", "precision", "seed")
_LATER = {"binary": True} | {field.name: field.default for field in fields(Recipe) if field.name not in _ALWAYS}


def _signs(model: nn.Module) -> list[Tensor]:
    return [weight.detach() >= 0 for weight in binarized_weights(model).values()]


def _learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the learning rate at `progress` (0..1) through training: half a cosine from lr to FINAL_LR."""
    final = min(FINAL_LR, recipe.lr)
    return final + (recipe.lr - final) * (1 + math.cos(math.pi * progress)) / 2


def _compiled(model: nn.Module) -> Forward:
    """Return torch.compile's form of `model`, which shares its parameters, or tell why there is none."""
    try:
        torch.compile(torch.neg)(torch.zeros(1))
    except Exception as error:  # of many kinds, without a compiler or on a platform that has none
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"torch.compile does not work here ({reason[:200]}); train without it") from None
    return torch.compile(model)


@contextmanager
def _statistics_kept(model: nn.Module, statistics: str) -> Iterator[None]:
    """Have BatchNorm in training mode leave its running statistics, and normalize by them or those of the batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    norms = [norm for norm in norms if norm.training]
    try:
        for norm in norms:
            norm.track_running_stats = False
            norm.training = statistics == "batch"
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = norm.training = True


class Trainer:
    """Takes the steps of one training; the arguments are those of `train`."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        teacher: nn.Module | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
    ):
        self.model, self.recipe, self.teacher, self.after_step = model, recipe, teacher, after_step
        averaged = parallel.averaging(model)
        self.network: Forward = _compiled(averaged) if recipe.compile else averaged
        kind: Any = partial(torch.optim.Adam, fused=True)
        if recipe.optimizer == "sgd":
            kind = partial(torch.optim.SGD, momentum=0.9)
        self.optimizer: torch.optim.Optimizer = kind(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)

    def _logits(self, network: Forward, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = network(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # a loss of bfloat16 would be coarse

    def _forward(self, x: Tensor, labels: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the logits and the loss that is trained; `taught` are the teacher's logits."""
        recipe, logits = self.recipe, self._logits(self.network, x)
        if recipe.loss == "margin":
            return logits, margin_loss(logits, labels, recipe.margin)
        loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if taught is None:
            return logits, loss
        distilled = distillation_loss(logits, taught, recipe.temperature)
        return logits, (1 - recipe.teacher_share) * loss + recipe.teacher_share * distilled

    def _backward(self, x: Tensor, labels: Tensor, errors: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """Add a step's gradient: with `errors`, the average of the clean and the damaged one.

        Returns:
            The clean logits, and the loss whose gradient that is.
        """
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self._logits(self.teacher, x)
        logits, loss = self._forward(x, labels, taught)
        if errors is None:
            loss.backward()
            return logits.detach(), loss.detach()
        (loss / 2).backward()
        # Running statistics are those of the clean network: they are error-free in memory, and computed once, before
        # anything fails; a mixture with the statistics of many differently damaged networks would fit none of them.
        flipped = flipped_weights(self.model, self.recipe.damage_rate, errors, self.recipe.damage_spare)
        with flipped, _statistics_kept(self.model, self.recipe.damage_statistics):
            _, damaged = self._forward(x, labels, taught)
            (damaged / 2).backward()
        return logits.detach(), (loss + damaged).detach() / 2

    def epoch(self, data: Dataset, number: int, damaging: bool, progress: bool) -> tuple[Evaluation, float]:
        """Train for one epoch; return its loss and accuracy, and the mean clean cross-entropy.

        Args:
            data: on the device of the model.
            number: of the epoch, from 0: of the learning rate, and of all that is random.
            damaging: whether errors have begun.
            progress: show a bar.
        """
        recipe, train = self.recipe, data.train
        device = train.labels.device
        # All randomness of an epoch follows from the seed and its number, so a resumed run sees the same images.
        (seed,) = np.random.SeedSequence([recipe.seed, number]).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(seed))
        order = torch.randperm(len(train), generator=generator).to(device)
        size = min(recipe.batch_size, len(train))
        steps = len(train) // size
        loss_sum, entropy_sum = torch.zeros((), device=device), torch.zeros((), device=device)
        right = torch.zeros((), device=device, dtype=torch.int64)
        self.model.train()
        batches = range(steps)
        if progress:
            batches = progress_bar(batches, desc=f"epoch {number + 1}/{recipe.epochs}", unit="batch")
        for step in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = _learning_rate(recipe, (number + step / steps) / recipe.epochs)
            chosen = order[step * size : (step + 1) * size]
            pixels = augment(train.pixels[chosen], data.padding, data.flip, generator)
            labels = parallel.share(train.labels[chosen])
            x = train.normalized(parallel.share(pixels)).contiguous(memory_format=torch.channels_last)
            self.optimizer.zero_grad(set_to_none=True)
            # A stream of its own for every step: a resumed run draws the errors of an uninterrupted one.
            stream = np.random.SeedSequence([recipe.seed, number], spawn_key=(step,))
            logits, loss = self._backward(x, labels, np.random.default_rng(stream) if damaging else None)
            self.optimizer.step()
            clamp_latent_weights(self.model)
            if self.after_step is not None:
                self.after_step(self.model)
            loss_sum += loss
            entropy_sum += functional.cross_entropy(logits, labels)
            right += (logits.argmax(1) == labels).sum()
        trained, entropy, correct = (parallel.total(x).item() for x in (loss_sum, entropy_sum, right))
        shares = steps * parallel.processes()
        return Evaluation(trained / shares, correct / (steps * size)), entropy / shares


def _identity(model: nn.Module, data: Dataset, recipe: Recipe, teacher: nn.Module | None) -> dict[str, Any]:
    """Return what must agree before a run may go on from a state file."""
    network = {"network": name_of(model), **(config_of(model) or {})}
    told = {key: value for key, value in asdict(recipe).items() if key not in _LATER or value != _LATER[key]}
    taught = {} if teacher is None else {"teacher": checksum("", teacher.state_dict())[:12]}
    return {**network, "dataset": data.name, "train_images": len(data.train), **told, **taught}


def _state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in _STATE}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, so there is nothing to resume") from None
    except Exception as error:  # torch raises many kinds for a file that is cut short or of another format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not the state of a training run ({reason})") from None


def state_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the facts of the run in `folder` as its last finished epoch left them.

    Raises:
        ValueError: the folder holds no run.
    """
    return _state(Path(folder) / STATE_FILE)["facts"]


def _resume(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    state = _state(path)
    before = state["identity"]
    if identity["epochs"] > before["epochs"]:
        state["facts"]["extended"] = [*state["facts"].get("extended", ()), before["epochs"]]
        before["epochs"] = identity["epochs"]
    differing = [
        f"{key} {before.get(key, _LATER.get(key))!r} there, {identity.get(key, _LATER.get(key))!r} here"
        for key in {**before, **identity}
        if before.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(f"{path}: is of another run: {'; '.join(differing)}")
    return state


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_best: Callable[[nn.Module, dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    teacher: nn.Module | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place and leave it, in evaluation mode, as it was after its best epoch.

    The best epoch has the highest accuracy on the validation part (the lower loss where two are equal); test images
    choose nothing. After every step the latent weights are clamped to [-1, 1]. With `recipe.damage_rate`, an epoch
    trained with errors is better than any without, since errors are what the network is trained for.

    Args:
        model: a binarized network, or a float one, on the device of `data`.
        data: its three parts.
        recipe: see Recipe; None is the published one.
        folder: where to keep last.pt (to resume from; `bnn_utils.checkpoints.load` reads it too) and history.csv after
            every epoch; None keeps nothing.
        resume: go on from the last finished epoch in `folder`. On the CPU, with the same number of threads, the
            result is that of an uninterrupted run; not so if the recipe has more epochs than before: the learning rate
            then follows the cosine of their new number, from the next epoch on.
        on_best: called with (model, history row) after every epoch that is the best so far.
        on_epoch: called with the history row after every epoch.
        after_step: called with the model after every optimizer step and clamp; what it changes stays changed. Where
            several processes train together, see `bnn_utils.parallel`, it is called in each of them; all else that
            writes or tells is done by the first.
        teacher: a trained network for the same images and classes, on the device of `data`, whose logits
            `recipe.teacher_share` of the loss follows. It sees the images of each step as the model does, in
            evaluation mode, in which it is left, and stays as it is. With errors, the damaged loss follows it too.
        progress: show a bar for every epoch.

    Returns:
        The history, one row an epoch: epoch (from 1), lr (at its end), train_loss (what is trained: with errors, the
        mean of the clean and the damaged loss), train_accuracy (of the clean network; both while training),
        validation_loss (cross-entropy in nats, whatever is trained), validation_accuracy, sign_flips (share of the
        binarized weights whose sign at the end of the epoch is not that at its beginning), seconds. Its
        attrs["best_epoch"] is the epoch that was best.

    Raises:
        ValueError: `folder` holds no run that this one could resume, or a batch cannot be shared equally; a teacher
            without a share, or a share without a teacher; errors for a network that has no binarized weights; images
            that are not as those that the model, the teacher or the run was trained on, see `Images.as_trained`.
        bnn_utils.parallel.ProcessError: another of several processes has ended.

    Source: Hubara et al., 2016, algorithm 1; Adam at 5e-3, no weight decay and batch 256 are the published recipe.
    Of errors and the other losses, see `Recipe`, `margin_loss` and `distillation_loss`.
    """
    recipe = recipe or Recipe()
    if teacher is not None and not recipe.teacher_share:
        raise ValueError("a teacher needs a teacher_share above 0, got 0.0")
    if teacher is None and recipe.teacher_share:
        raise ValueError(f"teacher_share {recipe.teacher_share} needs a teacher, got none")
    if recipe.damage_rate and not binarized_weights(model):
        raise ValueError(f"damage_rate {recipe.damage_rate} flips binarized weights, and this network has none")
    if not len(data.train):
        raise ValueError(f"{data.name}: has no training images")
    data.train.check_trained(trained_on(model))
    if teacher is not None:
        data.train.check_trained(trained_on(teacher))
        teacher.eval()
    identity = _identity(model, data, recipe, teacher)
    facts = {"dataset": data.name, **data.train.facts, "recipe": asdict(recipe)}
    if (config := config_of(model)) is not None:  # so that `bnn_utils.checkpoints.load` can build it
        facts |= {"network": name_of(model), "config": dict(config)}
    batch = min(recipe.batch_size, len(data.train))
    if batch % parallel.processes():
        raise ValueError(f"a batch of {batch} images has no equal shares for {parallel.processes()} processes")
    trainer = Trainer(model, recipe, teacher, after_step)
    weights = sum(weight.numel() for weight in binarized_weights(model).values())
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    damaging = False
    folder = None if folder is None else Path(folder)
    if resume:
        if folder is None:
            raise ValueError("resume needs the folder of the run")
        state = _resume(folder / STATE_FILE, identity)
        data.train.check_trained(state["facts"])
        facts |= {key: value for key, value in state["facts"].items() if key == "extended"}
        model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        rows, damaging, best = state["rows"], state["damaging"], state["best"]
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if not parallel.first():  # one writes; not before all have read, since its first epoch takes all of them
        folder = on_best = on_epoch = None
        progress = False

    for epoch in range(len(rows), recipe.epochs):
        started = time.perf_counter()
        signs = _signs(model)
        with parallel.whole_batch_norm(model):
            trained, entropy = trainer.epoch(data, epoch, damaging, progress)
        flipped = sum(int((old != new).sum()) for old, new in zip(signs, _signs(model), strict=True))
        validated = evaluate(model, data.validation)
        row = dict(
            epoch=epoch + 1,
            lr=_learning_rate(recipe, (epoch + 1) / recipe.epochs),
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            validation_loss=validated.loss,
            validation_accuracy=validated.accuracy,
            sign_flips=flipped / weights if weights else 0.0,
            seconds=time.perf_counter() - started,
        )
        row = parallel.of_the_first(row)  # on machines that differ, all choose the same epoch
        rows.append(row)
        score = (row["validation_accuracy"], -row["validation_loss"])
        if not best or (damaging, *score) > (best["damaging"], *best["score"]):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            best = dict(epoch=epoch + 1, damaging=damaging, score=score, state=state)
            if on_best is not None:
                on_best(model, row)
        damaging = damaging or (recipe.damage_rate > 0 and entropy < recipe.damage_below)
        if folder is not None:
            told = (identity, facts, rows, best, damaging, model.state_dict(), trainer.optimizer.state_dict())
            write_beside(folder / STATE_FILE, partial(torch.save, dict(zip(_STATE, told, strict=True))))
            write_beside(folder / HISTORY_FILE, partial(pd.DataFrame(rows).to_csv, index=False))
        if on_epoch is not None:
            on_epoch(row)

    model.load_state_dict(best["state"])
    model.eval()
    history = pd.DataFrame(rows)
    history.attrs["best_epoch"] = best["epoch"]
    return history
