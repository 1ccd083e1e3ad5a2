"""Campaigns against a loop written out by hand, and intervals against exact statistics."""

import copy
import math
import os
import pickle
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import product
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnn_utils
from bnn_utils import campaign
from bnn_utils.campaign import ResultsError, WorkerError, aggregate, mean_interval, run, trial_seed
from bnn_utils.data import Images
from bnn_utils.evaluation import Evaluation, evaluate
from bnn_utils.faults import ErrorModel, inject, inject_tensors, stored_tensors
from bnn_utils.layers import BinarizeConv2d
from bnn_utils.models import resnet_binary, vgg_cifar10_binary
from bnn_utils.packed import PackedModel, deployed, pack
from bnn_utils.repair import REPAIRS, clip

ROOT = Path(bnn_utils.__file__).parents[1]
COLUMNS = ["network", "dataset", "storage", "repair", "probability", "trial", "seed", "flips", "loss", "accuracy"]


def with_statistics(model):
    """Give BatchNorm statistics of its own: fresh ones, all 0 and 1, put whole numbers right on the threshold, where
    the order in which torch adds a bias decides."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 50)
    return model.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return with_statistics(vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8))


def noise():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (40,), generator=generator)
    return Images(pixels, labels, (0.5,), (0.25,), "noise", tuple("0123456789"))


@pytest.fixture(scope="module")
def images():
    return noise()


def bits_of(model):
    return {name: x.numpy().tobytes() for name, x in model.state_dict().items()}


def by_hand(model, images):
    """Return (loss, accuracy) from the definition, in double precision."""
    x = (images.pixels.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        logits = model(x).double().numpy()
    with np.errstate(all="ignore"):
        top = logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        loss = np.mean(log_sum - logits[np.arange(len(x)), images.labels.numpy()])
    predicted = [max(range(10), key=lambda c: (math.isnan(row[c]), row[c], -c)) for row in logits.tolist()]
    return loss, np.mean(np.array(predicted) == images.labels.numpy())


# The table


def test_columns_rows_and_order(model, images):
    table = run(model, images, [1e-2, 0.0, 1e-4], 3, repairs=("clip", "none"))
    assert list(table.columns) == COLUMNS
    expected = list(product([0.0, 1e-4, 1e-2], range(3), ["clip", "none"]))
    assert list(table[["probability", "trial", "repair"]].itertuples(index=False, name=None)) == expected
    assert set(table["network"]) == {"vgg_cifar10_binary"}
    assert set(table["dataset"]) == {"noise"}
    assert set(table["storage"]) == {"float32"}
    assert table["accuracy"].between(0, 1).all()
    assert table.groupby(["probability", "trial"])["seed"].nunique().eq(1).all()
    assert table["seed"].nunique() == 9


def test_equals_a_loop_by_hand(model, images):
    table = run(model, images, [1e-4, 1e-2], 4, repairs=("none", "clip"), seed=3)
    for row in table.to_dict("records"):
        with inject(model, row["probability"], seed=row["seed"]) as flips:
            if row["repair"] == "clip":
                with clip(model):
                    loss, accuracy = by_hand(model, images)
            else:
                loss, accuracy = by_hand(model, images)
        assert row["flips"] == flips.total > 0
        assert row["accuracy"] == accuracy
        assert row["loss"] == pytest.approx(loss, rel=1e-6, nan_ok=True) or not math.isfinite(row["loss"])
        assert math.isfinite(row["loss"]) == math.isfinite(loss)


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_repairs_see_the_same_damage(model, images, storage):
    campaign_of = dict(probabilities=[1e-2], trials=3, storage=storage)
    together = run(model, images, **campaign_of, repairs=tuple(REPAIRS))
    flips = together.pivot(index="trial", columns="repair", values="flips")
    assert set(flips) == set(REPAIRS)
    assert flips.eq(flips["none"], axis=0).all(axis=None)
    for repair in REPAIRS:
        alone = run(model, images, **campaign_of, repairs=(repair,))
        pd.testing.assert_frame_equal(alone, together[together["repair"] == repair].reset_index(drop=True))


@pytest.mark.parametrize("storage", ["float32", "packed"])
@pytest.mark.parametrize("repair", [name for name in REPAIRS if name not in ("none", "clip")])
def test_what_a_repair_stores_errs_too(model, images, storage, repair):
    table = run(model, images, [3e-3, 3e-2], 3, storage=storage, repairs=("clip", repair), error="asymmetric", seed=4)
    held = pack(model) if storage == "packed" else model
    plan = REPAIRS[repair](held)
    beside = {f"{repair}: {name}": tensor for name, tensor in plan.stored.items()}
    for row in table[table["repair"] == repair].to_dict("records"):
        damage = dict(probability=row["probability"], seed=row["seed"], error="asymmetric")
        with inject(held, **damage) as flips, inject_tensors(beside, **damage), plan.read():
            loss, accuracy = by_hand(held, images)
        assert row["flips"] == flips.total > 0
        assert row["accuracy"] == accuracy
        assert row["loss"] == pytest.approx(loss, rel=1e-6, nan_ok=True) or not math.isfinite(loss)


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_the_vote_outlasts_what_the_network_alone_does_not(model, images, storage):
    clean = run(model, images, [0.0], 1, storage=storage)["loss"].item()
    table = run(model, images, [3e-4], 10, storage=storage, repairs=("none", "vote")).set_index("repair")
    assert (table.loc["none", "loss"] != clean).sum() >= 5
    assert (table.loc["vote", "loss"] != clean).sum() <= 1


def test_results_without_flips_are_used_again_unless_what_a_repair_stores_was_hit(model, images, monkeypatch):
    calls = []
    for name in ("evaluate", "score"):
        own = getattr(campaign.trial, name)
        monkeypatch.setattr(campaign.trial, name, lambda *arguments, own=own: calls.append(1) or own(*arguments))
    for probability, evaluated in [(0.0, 2), (1e-5, 1 + 4)]:
        calls.clear()
        table = run(model, images, [probability], 4, repairs=("none", "vote"), targets="features.3.bias")
        assert (table["flips"] == 0).all()
        assert len(calls) == evaluated


def test_a_trial_does_not_depend_on_the_rest_of_the_campaign(model, images):
    reference = run(model, images, [1e-2], 3).set_index(["probability", "trial"])
    for probabilities, trials in [([1e-4, 1e-2], 3), ([1e-2, 1e-4, 1e-2], 5)]:
        table = run(model, images, probabilities, trials).set_index(["probability", "trial"])
        pd.testing.assert_frame_equal(table.loc[reference.index], reference)
    other = run(model, images, [1e-2], 3, seed=1)
    assert not set(other["seed"]) & set(reference["seed"])


def test_targets(model, images):
    table = run(model, images, [1.0], 1, targets=("features.3.bias", "classifier.0.bias"))
    sizes = model.features[3].bias.numel() + model.classifier[0].bias.numel()
    assert table["flips"].tolist() == [32 * sizes]
    named = run(model, images, [1.0], 1, targets="features.3.bias")
    assert named["flips"].tolist() == [32 * model.features[3].bias.numel()]


def test_no_flips_gives_the_undamaged_result(model, images):
    loss, accuracy = by_hand(model, images)
    table = run(model, images, [0.0, 1e-9], 5)
    assert table["flips"].eq(0).all()
    assert table["accuracy"].eq(accuracy).all()
    assert table["loss"].nunique() == 1
    assert table["loss"].iloc[0] == pytest.approx(loss, rel=1e-6)


# Packed storage, and the packed form of a float network


def test_packed_storage_equals_a_loop_by_hand(model, images):
    table = run(model, images, [1e-2, 1e-1], 3, storage="packed", repairs=("none", "clip"), seed=3)
    assert set(table["storage"]) == {"packed"}
    packed = pack(model)
    for row in table.to_dict("records"):
        with inject(packed, row["probability"], seed=row["seed"]) as flips:
            if row["repair"] == "clip":
                with clip(packed):
                    loss, accuracy = by_hand(packed, images)
            else:
                loss, accuracy = by_hand(packed, images)
        assert row["flips"] == flips.total > 0
        assert row["accuracy"] == accuracy
        assert row["loss"] == pytest.approx(loss, rel=1e-6, nan_ok=True) or not math.isfinite(loss)
    assert table["flips"].mean() < run(model, images, [1e-2, 1e-1], 3)["flips"].mean() / 20  # 1 bit a weight, not 32


def test_targets_of_packed_storage(model, images):
    table = run(model, images, [1.0], 1, storage="packed", targets=("features.3.threshold", "biases"))
    channels, first, last = 8, 8, 10
    assert table["flips"].tolist() == [16 * channels + 32 * (first + last)]


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_error_models(model, images, storage):
    stuck = run(model, images, [1.0], 1, storage=storage, error="stuck-at-0")
    other = run(model, images, [1.0], 1, storage=storage, error="stuck-at-1")
    every = run(model, images, [1.0], 1, storage=storage)
    assert stuck["flips"].item() + other["flips"].item() == every["flips"].item()
    same = run(model, images, [1e-2], 2, storage=storage, error=ErrorModel("", "", zero_to_one=0.0))
    pd.testing.assert_frame_equal(same, run(model, images, [1e-2], 2, storage=storage, error="stuck-at-0"))


@pytest.mark.parametrize("build", [vgg_cifar10_binary, resnet_binary])
def test_the_packed_form_gives_what_the_floats_give(build, images, monkeypatch):
    torch.manual_seed(1)
    model = with_statistics(build(width=0.06, in_channels=1, input_size=8))
    campaign_of = dict(probabilities=[1e-3, 1e-2, 1e-1], trials=5, repairs=("none", "clip"), seed=5)
    fast = run(model, images, **campaign_of)
    monkeypatch.setattr(campaign.trial, "deployed", lambda network: network)
    slow = run(model, images, **campaign_of)
    assert (fast["accuracy"] == slow["accuracy"]).all()
    finite = np.isfinite(slow["loss"])
    assert (finite == np.isfinite(fast["loss"])).all() and finite.any()
    np.testing.assert_allclose(fast.loc[finite, "loss"], slow.loc[finite, "loss"], rtol=1e-6)


def test_a_network_that_cannot_be_packed_keeps_its_floats(images):
    torch.manual_seed(0)
    model = vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8)
    model.classifier[7] = torch.nn.Identity()
    for targets in ("features.0.weight", "classifier.6.*"):
        assert run(model.eval(), images, [1e-3], 2, targets=targets)["accuracy"].between(0, 1).all()
    with pytest.raises(TypeError, match="Identity"):
        run(model, images, [1e-3], 2, storage="packed")


# Any network, on a loader or a function instead of images


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 10)

    def forward(self, x):
        return self.last(self.lstm(x.squeeze(1))[0][:, -1])


def loader_of(images, **how):
    return DataLoader(TensorDataset(*images[:]), batch_size=7, **how)


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_a_loader_gives_what_its_images_give(model, images, storage):
    campaign_of = dict(probabilities=[1e-3, 1e-2], trials=3, storage=storage, repairs=("none", "clip"))
    expected = run(model, images, **campaign_of)
    table = run(model, loader_of(images), **campaign_of)
    pd.testing.assert_frame_equal(table, expected.assign(dataset="TensorDataset"))


def test_a_network_of_ones_own_on_a_loader_and_on_a_function(images, tmp_path):
    torch.manual_seed(0)
    model = Recurrent()
    model.lstm.eval()
    modes = [module.training for module in model.modules()]
    expected = run(model, images, [1e-3, 1e-2], 4)
    assert set(expected["network"]) == {"Recurrent"} and expected["accuracy"].nunique() > 1
    own = expected[["seed", "flips", "accuracy"]]
    shuffled = run(model, loader_of(images, shuffle=True), [1e-3, 1e-2], 4)
    pd.testing.assert_frame_equal(shuffled[own.columns], own)

    def right(network):
        assert not network.training and not network(images[:2][0]).requires_grad
        return evaluate(network, images).accuracy

    table = run(model, right, [1e-3, 1e-2], 4, out=tmp_path / "t.sqlite")
    pd.testing.assert_frame_equal(table[own.columns], own)
    assert set(table["dataset"]) == {"right"} and table["loss"].isna().all()
    with processes(2) as pool:  # the function is defined here, where no worker can import it
        pytest.importorskip("cloudpickle")
        pd.testing.assert_frame_equal(run(model, right, [1e-3, 1e-2], 4, executor=pool), table)
    pd.testing.assert_frame_equal(run(model, right, [1e-3, 1e-2], 4, out=tmp_path / "t.sqlite", resume=True), table)
    with pytest.raises(ResultsError, match="function's number, undamaged: "):
        run(model, lambda network: 0.5, [1e-3], 4, out=tmp_path / "t.sqlite", resume=True)
    assert [module.training for module in model.modules()] == modes


def test_a_function_sees_the_network_as_its_storage_holds_it(model, images):
    table = run(model, lambda network: isinstance(network, PackedModel), [1e-2], 1, storage="packed")
    assert table["accuracy"].tolist() == [1]
    biggest = run(model, lambda network: network.features[3].weight.abs().max(), [0.0], 1)
    assert biggest["accuracy"].tolist() == [1]
    unlike = run(model, lambda network: math.nan, [0.0], 1)
    assert unlike["accuracy"].isna().all() and aggregate(unlike)["not_finite"].tolist() == [1]
    with pytest.raises(ValueError, match=r"until wants numbers in \[0, 1\], got \[3\.0\]"):
        run(model, lambda network: 3, [0.0], 5, until=0.1, least=2)


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (3, TypeError, "Images, batches of .* or a function, got int"),
        ([], ValueError, "at least one batch"),
        ([torch.zeros(2, 1, 8, 8)], TypeError, "inputs, labels"),
        ([(torch.zeros(2, 8), torch.zeros(2)), (torch.zeros(2, 9), torch.zeros(2))], TypeError, "one shape"),
        ([(torch.zeros(2, 8), torch.zeros(2, 10))], TypeError, r"whole numbers .*float32 \(10,\) each"),
    ],
)
def test_data_that_cannot_be_used(model, data, kind, said):
    with pytest.raises(kind, match=said):
        run(model, data, [1e-2], 1)


# What is computed once


def small(build):
    torch.manual_seed(2)
    return with_statistics(build(width=0.05, in_channels=1, input_size=8))


def loop(model, data, probability, trials, storage, repair, targets):
    """Return (flips, loss, accuracy) a trial, each of the whole network packed and evaluated anew."""
    held = pack(model) if storage == "packed" else model
    plan, rows = REPAIRS[repair](held), []
    beside = {f"{repair}: {name}": tensor for name, tensor in plan.stored.items()}
    for trial in range(trials):
        damage = dict(probability=probability, seed=trial_seed(0, probability, trial))
        with inject(held, **damage, targets=targets) as flips, inject_tensors(beside, **damage), plan.read():
            rows.append((flips.total, *evaluate(deployed(held), data)))
    return np.array(rows)


@pytest.mark.parametrize("repair", ["none", "clip", "range", "secded"])
@pytest.mark.parametrize("storage", ["float32", "packed"])
@pytest.mark.parametrize("build", [vgg_cifar10_binary, resnet_binary])
def test_errors_in_any_one_module_give_what_the_whole_network_gives(build, storage, repair, images):
    model = small(build)
    names = stored_tensors(pack(model) if storage == "packed" else model)
    modules = {name.rpartition(".")[0] for name in names}
    assert len(modules) >= 11
    losses = set()
    for module in modules:
        table = run(model, images, [3e-2], 3, storage=storage, repairs=[repair], targets=f"{module}.*")
        expected = loop(model, images, 3e-2, 3, storage, repair, f"{module}.*")
        assert np.array_equal(table[["flips", "loss", "accuracy"]], expected, equal_nan=True)
        losses |= set(table["loss"])
    assert len(losses) > 10


def test_errors_in_several_modules_and_in_none(images):
    model = small(resnet_binary)
    for targets in (["layer2.1.*", "layer3.0.bn1.*", "fc.weight"], ["biases"], ["running_var"], []):
        table = run(model, images, [3e-2], 3, repairs=["none", "clip"], targets=targets)
        for repair in ("none", "clip"):
            own = table.loc[table["repair"] == repair, ["flips", "loss", "accuracy"]]
            assert np.array_equal(own, loop(model, images, 3e-2, 3, "float32", repair, targets), equal_nan=True)


@pytest.fixture
def started(monkeypatch):
    """Return a list of the stages that evaluations start from, 0 where the whole network is run."""
    stages = []
    whole, after = PackedModel.forward, PackedModel.after
    monkeypatch.setattr(PackedModel, "forward", lambda self, x: stages.append(0) or whole(self, x))
    monkeypatch.setattr(PackedModel, "after", lambda self, stage, x: stages.append(stage) or after(self, stage, x))
    return stages


@pytest.mark.parametrize(
    ("build", "targets", "stage"),
    [
        (vgg_cifar10_binary, "features.0.weight", 0),
        (vgg_cifar10_binary, "features.3.bias", 1),
        (vgg_cifar10_binary, "features.17.*", 5),
        (resnet_binary, ["layer3.*", "biases"], 5),
        (resnet_binary, "biases", 7),
        (resnet_binary, "weights", 0),
    ],
)
def test_evaluations_start_from_the_first_stage_with_errors(build, targets, stage, images, started):
    run(small(build), images, [0.1], 3, repairs=["none", "secded", "clip"], targets=targets)
    assert started == 3 * [stage, 0, stage]  # what a repair stores errs too


def test_no_more_is_kept_than_fits(images, started, monkeypatch):
    model = small(resnet_binary)
    campaign_of = dict(probabilities=[0.1], trials=2, repairs=["none", "clip"], targets="layer2.1.*")
    table = run(model, images, **campaign_of)
    here = len(images) * 4 * 4 * (8 + 8 * 4)  # a word and 8 float32 numbers at each place of the map
    earlier = len(images) * 8 * 8 * 8  # words alone, since the first block of a layer reads no numbers
    for room, stages in [
        (2 * here, [4, 4]),
        (2 * here - 1, [4, 3]),
        (here + earlier - 1, [4, 0]),
        (here - 1, [3, 0]),
        (earlier - 1, [0, 0]),
    ]:
        started.clear()
        monkeypatch.setattr(campaign.trial, "KEPT_BYTES", room)
        pd.testing.assert_frame_equal(run(model, images, **campaign_of), table)
        assert started == 2 * stages, room


def test_more_images_than_a_batch():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1100, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (1100,), generator=generator)
    many = Images(pixels, labels, (0.5,), (0.25,), "noise", tuple("0123456789"))
    for build, targets in ((vgg_cifar10_binary, "features.7.*"), (resnet_binary, "layer3.1.*")):
        table = run(small(build), many, [3e-2], 3, targets=targets)
        expected = loop(small(build), many, 3e-2, 3, "float32", "none", targets)
        assert np.array_equal(table[["flips", "loss", "accuracy"]], expected, equal_nan=True)


# Executors


class Shuffled(Executor):
    """Runs tasks here, each time in another order, and delivers them later."""

    def __init__(self, seed):
        self.rng, self.tasks, self.sizes = random.Random(seed), [], []

    def submit(self, function, *arguments):
        self.tasks.append((Future(), function, arguments))
        self.sizes.append(len(arguments[-1]))
        if len(self.tasks) == 1:
            threading.Timer(0.05, self.work).start()
        return self.tasks[-1][0]

    def work(self):
        tasks, self.tasks = self.tasks, []
        self.rng.shuffle(tasks)
        for future, function, arguments in tasks:
            if future.set_running_or_notify_cancel():
                future.set_result(function(*arguments))


def processes(workers, method="forkserver"):
    context = get_context(method if method in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["bnn_utils.campaign"])
    return ProcessPoolExecutor(workers, mp_context=context)


@pytest.fixture(scope="module")
def dask():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


SWEEP = dict(probabilities=[1e-2, 3e-2, 0.0], trials=7, repairs=("none", "clip", "vote-floats"))


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_an_executor_gives_the_same_table(model, images, tmp_path, storage, monkeypatch, dask):
    before = bits_of(model)
    here = run(model, images, **SWEEP, storage=storage)
    pools = [Shuffled(0), processes(2), Shuffled(1)]
    if storage == "packed":
        pools += [processes(1, "spawn"), ThreadPoolExecutor(2)]
    for index, pool in enumerate([*pools, dask.get_executor()]):
        monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", [1, 1e-4, 0.02][index % 3])  # other cuts into tasks
        out = tmp_path / f"{index}{['.sqlite', '.csv'][index % 2]}"
        there = run(model, images, **SWEEP, storage=storage, executor=pool, out=out)
        pd.testing.assert_frame_equal(here, there)
        if out.suffix == ".csv":
            there = pd.read_csv(out)
        else:
            there = run(model, images, **SWEEP, storage=storage, out=out, resume=True)
        pd.testing.assert_frame_equal(here, there)
        pool.shutdown()
    assert bits_of(model) == before


def test_tasks_hold_several_trials_and_scratch_is_left_empty(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 1e3)  # longer than they all take, on however slow a machine
    pool = Shuffled(0)
    run(model, images, [1e-2, 1e-3], 40, executor=pool, scratch=tmp_path)
    assert pool.sizes == [1, 1, 39, 39]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(campaign.schedule, "MOST_TASKS", 5)
    monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 1e-9)
    pool = Shuffled(0)
    run(model, images, [1e-2], 101, executor=pool)
    assert pool.sizes == [1] + [20] * 5


def test_network_and_images_are_loaded_once_a_worker(model, images, monkeypatch):
    loads = []
    load = torch.load
    weigh = lambda stream: loads.append(len(stream.getvalue()))  # noqa: E731
    monkeypatch.setattr(torch, "load", lambda stream, **how: weigh(stream) or load(stream, **how))
    monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 1e-9)
    with ThreadPoolExecutor(2) as pool:
        run(model, images, [1e-2, 1e-3], 30, executor=pool)
        assert 1 <= len(loads) <= 2 and min(loads) > images.pixels.numel()
        run(model, images, [1e-2, 1e-3], 2, executor=pool)  # another campaign
    assert len(loads) <= 4


def test_a_task_is_small(images):
    class Weighs(Shuffled):
        def submit(self, function, *arguments):
            weights.append(len(pickle.dumps(arguments)))
            return super().submit(function, *arguments)

    weights = []
    model = vgg_cifar10_binary(width=0.25, in_channels=1, input_size=8).eval()
    run(model, images, [1e-3], 1, executor=Weighs(0))
    assert max(weights) < 20_000 < 4 * sum(x.numel() for x in model.parameters())


def test_a_network_of_ones_own_with_shared_weights_travels_too(images):
    torch.manual_seed(0)
    first, shared = BinarizeConv2d(1, 4, 3, padding=1, binarize_input=False), BinarizeConv2d(4, 4, 3, padding=1)
    twice = BinarizeConv2d(4, 4, 3, padding=1)
    twice.weight = shared.weight
    model = torch.nn.Sequential(
        first, shared, torch.nn.BatchNorm2d(4), twice, torch.nn.Flatten(), torch.nn.LazyLinear(10)
    )
    model(images[:2][0])
    model = with_statistics(model.to(memory_format=torch.channels_last))
    here = run(model, images, [1e-2, 0.1], 6)
    assert here["accuracy"].nunique() > 2
    with processes(2) as pool:
        pd.testing.assert_frame_equal(run(model, images, [1e-2, 0.1], 6, executor=pool), here)


def test_a_worker_that_cannot_read_scratch_says_so(model, images, tmp_path):
    class Elsewhere(Shuffled):
        def submit(self, function, *arguments):
            for path in tmp_path.glob("*/*"):
                path.write_bytes(self.content) if self.content else path.unlink()
            return super().submit(function, *arguments)

    for content, said in [(b"", "cannot read"), (b"other", "other bytes")]:
        pool = Elsewhere(0)
        pool.content = content
        pool.work = lambda pool=pool: [
            future.set_exception(failure_of(function, arguments)) for future, function, arguments in pool.tasks
        ]
        with pytest.raises(OSError, match=f"{said}.*scratch"):
            run(model, images, [1e-2], 2, executor=pool, scratch=tmp_path)
    with pytest.raises(FileNotFoundError, match="scratch"):
        run(model, images, [1e-2], 2, executor=pool, scratch=tmp_path / "nowhere")


def failure_of(function, arguments):
    try:
        function(*arguments)
    except Exception as error:
        return error


class Kills(Executor):
    """Passes tasks on, and kills a worker process before some of them."""

    def __init__(self, pool, victims, moments):
        self.pool, self.victims, self.moments, self.count = pool, victims, moments, 0

    def submit(self, function, *arguments):
        future = self.pool.submit(function, *arguments)
        self.count += 1
        if self.count in self.moments:
            threading.Timer(0.1, lambda: os.kill(self.victims()[0], signal.SIGKILL)).start()
        return future


LONG = dict(probabilities=[1e-3, 3e-3, 1e-2], trials=60, repairs=("none", "clip"))


@pytest.fixture(scope="module")
def whole(images):
    torch.manual_seed(0)
    model = with_statistics(vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8))
    return run(model, images, **LONG)


def check_part(path, whole):
    """Return how many trials a results file holds, after seeing that each is whole, there once, and as it should."""
    with closing(sqlite3.connect(path)) as connection:
        rows = pd.read_sql("SELECT * FROM trials", connection).drop(columns="checksum")
    keys = ["probability", "trial", "repair"]
    assert not rows.duplicated(keys).any()
    assert len(rows) == 2 * len(rows[["probability", "trial"]].drop_duplicates())
    expected = whole.set_index(keys).loc[list(rows[keys].itertuples(index=False, name=None))].reset_index()
    pd.testing.assert_frame_equal(rows, expected[rows.columns], check_dtype=False)
    return len(rows) // 2


@pytest.mark.posix
def test_a_killed_worker_of_a_pool_is_told_and_nothing_finished_is_lost(model, images, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 0.01)
    out = tmp_path / "t.sqlite"
    pool = processes(2)
    killing = Kills(pool, lambda: list(pool._processes), {5})
    with pytest.raises(WorkerError, match=rf"{out}; go on with resume"):
        run(model, images, **LONG | dict(trials=100_000), executor=killing, out=out)
    pool.shutdown()
    with closing(sqlite3.connect(out)) as connection, connection:
        beyond = connection.execute("SELECT COUNT(*) FROM trials WHERE trial >= 60").fetchone()[0]
    with processes(1) as pool:
        pd.testing.assert_frame_equal(run(model, images, **LONG, executor=pool, out=out, resume=True), whole)
    if not beyond:
        assert check_part(out, whole) == 180


@pytest.mark.posix
def test_a_killed_worker_of_a_cluster_does_not_show(model, images, monkeypatch, dask, whole):
    monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 0.01)

    def victims():
        return list(dask.run(os.getpid).values())

    pids = victims()
    killing = Kills(dask.get_executor(), lambda: pids, {20})
    pd.testing.assert_frame_equal(run(model, images, **LONG, executor=killing), whole)
    dask.wait_for_workers(2, timeout=30)
    assert set(victims()) != set(pids)


def test_a_task_that_fails_leaves_the_finished_ones(model, images, tmp_path):
    class FailsLater(Executor):
        def submit(self, function, *arguments):
            future = Future()
            future.set_exception(KeyboardInterrupt()) if self.done else future.set_result(function(*arguments))
            self.done = True
            return future

        done = False

    with pytest.raises(KeyboardInterrupt):
        run(model, images, [1e-2, 1e-3], 2, executor=FailsLater(), out=tmp_path / "t.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), run(model, images, [1e-3], 1))


# What it leaves behind


def test_csv_holds_the_table(model, images, tmp_path):
    table = run(model, images, [1e-2, 0.3], 3, repairs=("none", "clip"), out=tmp_path / "t.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), table)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_network_is_given_back(model, images):
    with torch.no_grad():
        model.features[1].bias[0] = math.nan
    model.train()
    before = bits_of(model)
    run(model, images, [0.5, 1e-3], 2, repairs=("none", "clip"))
    assert bits_of(model) == before
    assert model.training


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_interrupted_half_way(model, images, tmp_path, monkeypatch, raised):
    before = bits_of(model)
    whole = run(model, images, [1e-2, 1e-3], 3, repairs=("none", "clip"))
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 8:  # in the second half of the fourth trial
            raise raised
        return evaluate(*arguments)

    evaluate = campaign.trial.evaluate
    monkeypatch.setattr(campaign.trial, "evaluate", interrupted)
    with pytest.raises(raised):
        run(model, images, [1e-2, 1e-3], 3, repairs=("none", "clip"), out=tmp_path / "t.csv")
    assert bits_of(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), whole.iloc[:6])


def test_rows_are_there_as_trials_finish(model, images, tmp_path, monkeypatch):
    lengths = []

    def watched(*arguments):
        with closing(sqlite3.connect(tmp_path / "t.sqlite")) as connection:
            lengths.append(len(pd.read_sql("SELECT * FROM trials", connection)))
        return Evaluation(1.0, 0.5)

    monkeypatch.setattr(campaign.trial, "evaluate", watched)
    monkeypatch.setattr(campaign.schedule, "WRITE_SECONDS", 0)
    run(model, images, [1e-2, 1e-3], 2, out=tmp_path / "t.sqlite")
    assert lengths == [0, 1, 2, 3]


def test_failing_to_write_leaves_the_network_as_it_was(model, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    before = bits_of(model)
    monkeypatch.setattr(campaign, "write_beside", full)
    with pytest.raises(OSError, match="disk full"):
        run(model, images, [1e-2], 2, out=tmp_path / "t.csv")
    assert bits_of(model) == before


def test_existing_file_is_left_alone(model, images, tmp_path):
    out = tmp_path / "t.csv"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match=r"t\.csv"):
        run(model, images, [1e-2], 1, out=out)
    assert out.read_text() == "precious"
    with pytest.raises(FileExistsError):
        run(model, images, [1e-2], 1, out=tmp_path)


def test_missing_folder_is_not_made(model, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(model, images, [1e-2], 1, out=tmp_path / "nowhere" / "t.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        dict(trials=0),
        dict(trials=-1),
        dict(probabilities=[]),
        dict(probabilities=[0.1, math.nan]),
        dict(probabilities=[0.1, 1.5]),
        dict(probabilities=[-1e-9]),
        dict(storage="float16"),
        dict(repairs=("none", "pray")),
        dict(targets=("weights", "nothing")),
        dict(seed=-1),
        dict(repairs=("none", "none")),
        dict(until=0.0),
        dict(until=1.0),
        dict(until=math.nan),
        dict(until=0.1, least=1),
    ],
)
def test_wrong_arguments(model, images, tmp_path, arguments):
    arguments = dict(probabilities=[0.1], trials=1) | arguments
    before = bits_of(model)
    with pytest.raises(ValueError):
        run(model, images, **arguments, out=tmp_path / "t.csv")
    assert list(tmp_path.iterdir()) == []
    assert bits_of(model) == before


# Resumed


def killed_main(out, trials):
    torch.manual_seed(0)
    model = with_statistics(vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8))
    run(model, noise(), **LONG | dict(trials=trials), out=out, resume=True)


def killed_again_and_again(out, whole, kills, seed):
    """Start the sweep in processes that are killed, check the file after each; return how many trials it had each time.

    Half of the processes are killed anywhere, in their first second, the others once they have added to the file.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["bnn_utils.campaign"])
    rng = random.Random(seed)
    reached = [0]
    for _ in range(kills):
        changed = out.stat().st_mtime_ns if out.exists() else 0
        process = context.Process(target=killed_main, args=(out, whole["trial"].nunique()))
        process.start()
        if rng.random() < 0.5:
            process.join(rng.random())
        else:
            while process.is_alive() and (not out.exists() or out.stat().st_mtime_ns == changed):
                time.sleep(0.002)
            process.join(rng.expovariate(5))
        process.kill()
        process.join()
        if out.exists():
            reached.append(check_part(out, whole))
    assert reached == sorted(reached)
    return reached


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(model, images, tmp_path, whole):
    out = tmp_path / "t.sqlite"
    assert killed_again_and_again(out, whole, 3, seed=0)[-1] > 0
    pd.testing.assert_frame_equal(run(model, images, **LONG, out=out, resume=True), whole)
    assert check_part(out, whole) == 180


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_killed_twenty_times_and_resumed_equals_uninterrupted(model, images, tmp_path, seed):
    out, sweep = tmp_path / "t.sqlite", LONG | dict(trials=300)
    whole = run(model, images, **sweep)
    assert len(set(killed_again_and_again(out, whole, 20, seed))) > 5
    pd.testing.assert_frame_equal(run(model, images, **sweep, out=out, resume=True), whole)
    assert check_part(out, whole) == 900


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_twenty_killed_workers(model, images, tmp_path, monkeypatch, whole, seed):
    monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 0.01)
    out = tmp_path / "t.sqlite"
    with processes(2) as pool:
        killing = Kills(pool, lambda: list(pool._processes) or [2**22 + 1], {random.Random(seed).randrange(1, 12)})
        try:
            run(model, images, **LONG, executor=killing, out=out)
        except WorkerError:
            check_part(out, whole)
    pd.testing.assert_frame_equal(run(model, images, **LONG, out=out, resume=True), whole)


def counted(monkeypatch):
    calls = []
    evaluate = campaign.trial.evaluate
    monkeypatch.setattr(campaign.trial, "evaluate", lambda *arguments: calls.append(1) or evaluate(*arguments))
    return calls


def test_a_resumed_campaign_runs_only_what_is_missing(model, images, tmp_path, monkeypatch):
    out = tmp_path / "t.sqlite"
    calls = counted(monkeypatch)
    small = run(model, images, [1e-2], 3, repairs=("none", "clip"), out=out, resume=True)
    assert len(calls) == 6
    whole = run(model, images, [3e-2, 1e-2], 5, repairs=("none", "clip"))
    calls.clear()
    more = run(model, images, [3e-2, 1e-2], 5, repairs=("none", "clip"), out=out, resume=True)
    assert len(calls) == 2 * (2 + 5)
    pd.testing.assert_frame_equal(more, whole)
    again = run(model, images, [1e-2], 3, repairs=("none", "clip"), out=out, resume=True)
    pd.testing.assert_frame_equal(again, small)
    assert len(calls) == 2 * (2 + 5)
    assert check_part(out, whole) == 10


def test_only_results_files_are_resumed(model, images, tmp_path):
    out = tmp_path / "t.sqlite"
    run(model, images, [1e-2], 1, out=out)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="resume"):
        run(model, images, [1e-2], 1, out=out)
    for other in (None, tmp_path / "t.csv"):
        with pytest.raises(ValueError, match="resume"):
            run(model, images, [1e-2], 1, out=other, resume=True)
    with pytest.raises(ValueError, match=r"\.csv, \.sqlite or \.db"):
        run(model, images, [1e-2], 1, out=tmp_path / "t.xlsx")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(seed=1), "seed: 0 there, 1 here"),
        (dict(storage="packed"), "storage: float32 there, packed here"),
        (dict(repairs=("none",)), "repairs: none, clip there, none here"),
        (dict(repairs=("clip", "none")), "repairs: none, clip there, clip, none here"),
        (dict(targets=("weights",)), "targets: weights, float_weights, biases, .* there, weights here"),
        (dict(error="stuck-at-0"), "error: zero_to_one 1.0, .* there, zero_to_one 0.0, .* here; injection: "),
        (dict(error=ErrorModel("", "", length=2)), "error: .*length 1.* there, .*length 2.* here; injection: "),
        ("weight", "network's SHA-256: .* here$"),
        ("network", "network: vgg_cifar10_binary there, resnet_binary here; config: .*; network's SHA-256"),
        ("pixel", "images' SHA-256: .* here$"),
        ("label", "images' SHA-256: .* here$"),
        ("mean", "images' SHA-256: .* here$"),
        ("fewer", "images: 40 there, 39 here; images' SHA-256"),
        ("name", "dataset: noise there, other here$"),
        ("floats", "arithmetic: packed integers there, torch.float32 on cpu here$"),
        ("streams", "injection: .* here$"),
    ],
)
def test_another_campaign_is_told_line_by_line(model, images, tmp_path, monkeypatch, change, said):
    out = tmp_path / "t.sqlite"
    setting = dict(repairs=("none", "clip"))
    run(model, images, [1e-2], 1, **setting, out=out)
    other, data = copy.deepcopy(model), images
    if change == "weight":
        with torch.no_grad():
            other.features[3].weight[0, 0, 0, 0].neg_()
    elif change == "network":
        other = resnet_binary(width=0.02, in_channels=1, input_size=8).eval()
    elif change == "pixel":
        data = replace(images, pixels=images.pixels.clone())
        data.pixels[7, 0, 3, 2] ^= 1
    elif change == "label":
        data = replace(images, labels=images.labels.roll(1))
    elif change == "mean":
        data = replace(images, mean=(0.50001,))
    elif change == "fewer":
        data = images.limit(39)
    elif change == "name":
        data = replace(images, dataset="other")
    elif change == "floats":
        monkeypatch.setattr(campaign.identity, "deployed", lambda network: network)
    elif change == "streams":
        seed = campaign.trial_seed
        monkeypatch.setattr(campaign.identity, "trial_seed", lambda *arguments: seed(*arguments) + 1)
    else:
        setting |= change
    before = out.read_bytes()
    with pytest.raises(ResultsError, match=f"^{out}: is of another campaign: {said}"):
        run(other, data, [1e-2], 1, **setting, out=out, resume=True)
    assert out.read_bytes() == before


def test_latent_weights_are_not_stored_and_do_not_matter(model, images, tmp_path):
    table = run(model, images, [1e-2], 2, out=tmp_path / "t.sqlite")
    with torch.no_grad():
        model.features[3].weight.mul_(0.5)
    pd.testing.assert_frame_equal(run(model, images, [1e-2], 2, out=tmp_path / "t.sqlite", resume=True), table)


def test_a_full_disk_is_told_and_the_network_is_as_it_was(model, images, tmp_path, monkeypatch):
    out, before, written = tmp_path / "t.sqlite", bits_of(model), []
    append = campaign.results.Results.append

    def full(kept, rows):
        if written:
            kept._connection.execute("PRAGMA max_page_count = 1")
        written.append(len(rows))
        append(kept, rows)

    monkeypatch.setattr(campaign.results.Results, "append", full)
    monkeypatch.setattr(campaign.schedule, "WRITE_SECONDS", 0.05)
    with pytest.raises(OSError, match=rf"{out}: cannot be written \(database or disk is full\)"):
        run(model, images, [1e-2], 3000, out=out)
    assert bits_of(model) == before
    monkeypatch.undo()
    few = run(model, images, [1e-2], 5)
    pd.testing.assert_frame_equal(run(model, images, [1e-2], 5, out=out, resume=True), few)


# Until the interval is narrow enough


def looks_by_hand(table, until, least, most, repairs):
    """Return the trials after which a probability stops, from a table of `most` trials of it."""
    n = min(least, most)
    while True:
        own = table[table["trial"] < n]
        half = max(
            campaign.schedule.bounded_interval(own[own["repair"] == repair]["accuracy"])[1] for repair in repairs
        )
        if half <= until or n == most:
            return n
        n = min(max(math.ceil(1.1 * n * (half / until) ** 2), n + 1), 2 * n, most)


def test_until_stops_at_the_planned_looks_whoever_runs_it(model, images, tmp_path, monkeypatch):
    # Whatever the interval is: this one has another width at each of the probabilities, after few trials.
    monkeypatch.setattr(campaign.schedule, "bounded_interval", mean_interval)
    repairs, ps, most = ("none", "clip"), [0.0, 1e-3, 1e-2], 50
    sweep = dict(probabilities=ps, trials=most, repairs=repairs, until=0.015, least=6)
    here = run(model, images, **sweep, out=tmp_path / "t.sqlite")
    counts = here.groupby("probability")["trial"].nunique()
    full = run(model, images, ps, most, repairs=repairs)
    by_hand = [looks_by_hand(full[full["probability"] == p], 0.015, 6, most, repairs) for p in ps]
    assert counts.tolist() == by_hand
    assert counts[0.0] == 6 and counts.max() <= most and counts.nunique() > 2
    kept = full[full["trial"] < full["probability"].map(counts)].reset_index(drop=True)
    pd.testing.assert_frame_equal(here, kept)
    for pool in (Shuffled(0), ThreadPoolExecutor(2)):
        monkeypatch.setattr(campaign.schedule, "TASK_SECONDS", 0.01)
        out = tmp_path / "other.db"
        pd.testing.assert_frame_equal(run(model, images, **sweep, executor=pool, out=out), here)
        assert check_part(out, full) == counts.sum()  # none was run in vain
        out.unlink()

    calls = counted(monkeypatch)
    pd.testing.assert_frame_equal(run(model, images, **sweep, out=tmp_path / "t.sqlite", resume=True), here)
    assert not calls
    run(model, images, ps, most, repairs=repairs, out=tmp_path / "t.sqlite", resume=True)
    calls.clear()  # with more in the file than the looks ask for, they are the same looks
    pd.testing.assert_frame_equal(run(model, images, **sweep, out=tmp_path / "t.sqlite", resume=True), here)
    assert not calls

    spent, fixed, share = campaign.saved(here)
    assert (spent, fixed) == (counts.sum(), 3 * counts.max())
    assert share == pytest.approx(1 - spent / fixed)


def test_aggregate_of_a_campaign(model, images):
    table = run(model, images, [1e-2, 1e-4], 3, repairs=("none", "clip"))
    means = aggregate(table)
    assert list(means["probability"]) == [1e-4, 1e-4, 1e-2, 1e-2]
    assert list(means["repair"]) == ["none", "clip"] * 2
    assert means["trials"].eq(3).all()


def test_aggregate_of_campaigns_put_together(model, images):
    first, more = (run(model, images, [1e-2], 4, seed=seed) for seed in (0, 1))
    both = aggregate(pd.concat([first, more]))  # of other seeds, so these are eight trials
    values = pd.concat([first, more])["accuracy"]
    half = stats.t.ppf(0.975, 7) * stats.sem(values)
    assert both["trials"].tolist() == [8]
    assert both[["accuracy", "accuracy_half"]].to_numpy()[0] == pytest.approx((values.mean(), half))
    other = first.assign(network="another")
    assert aggregate(pd.concat([first, other]))["trials"].tolist() == [4, 4]

    with pytest.raises(ValueError, match=rf"1 of 5 rows .*network {model.name}, .*trial 2, seed \d+\); drop_"):
        aggregate(pd.concat([first, first[2:3]]))
    wider = vgg_cifar10_binary(width=0.04, in_channels=1, input_size=8).eval()  # of the same name
    named = pd.concat([first.assign(file="a"), run(wider, images, [1e-2], 4).assign(file="b")])
    with pytest.raises(ValueError, match=r'4 of 8 rows .*by=\["column"\]'):
        aggregate(named)
    means = aggregate(named, by=["file"])
    assert means["trials"].tolist() == [4, 4]
    assert means["accuracy"].tolist() == pytest.approx(named.groupby("file")["accuracy"].mean().tolist())


# When to stop


def _played(sample, mean, interval, until, replicates=1500):
    """Return in which share of simulated campaigns the interval at which they stopped holds the true mean."""
    held = 0
    for generator in np.random.default_rng(5).spawn(replicates):
        values, goal = np.empty(0), 30
        while len(values) < goal:
            values = np.append(values, sample(goal - len(values), generator))
            goal = campaign.total_after_look([values], until, 20_000, interval)
        centre, half = interval(values)
        assert half <= until
        held += abs(centre - mean) <= half
    return held / replicates


@pytest.mark.parametrize("network", ["vgg_cifar10_binary", "resnet_binary"])
def test_intervals_of_real_trials_hold_what_they_promise(network):
    # Accuracies of trained networks at p = 1e-2 (notebook 06 on digits), most high and some as low as guessing.
    table = pd.read_csv(ROOT / "tests/trials-on-digits.csv")
    real = table.loc[table["network"] == network, "accuracy"].to_numpy()
    assert len(real) > 100 and stats.skew(real) < -1
    sample = lambda size, generator: generator.choice(real, size)  # noqa: E731
    assert 0.93 <= _played(sample, real.mean(), campaign.bounded_interval, 0.02) <= 0.97


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_intervals_hold_where_failures_are_rare(share):
    def sample(size, generator):
        return np.where(generator.random(size) < share, 0.1, 0.97) + 0.01 * generator.uniform(-1, 1, size)

    mean = share * 0.1 + (1 - share) * 0.97
    assert _played(sample, mean, campaign.bounded_interval, 0.02) >= 0.93
    if share < 0.1:  # where Student's own stops before it has seen a failure
        assert _played(sample, mean, campaign.mean_interval, 0.02) < 0.7
