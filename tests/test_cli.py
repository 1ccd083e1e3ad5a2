"""The command line as a user meets it: what it prints, what it keeps, and one line for every mistake."""

import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from bnn_utils import __main__ as cli
from bnn_utils import campaign, checkpoints, data, faults
from bnn_utils.campaign import executors
from bnn_utils.evaluation import Evaluation, evaluate
from bnn_utils.layers import binarized_weights
from bnn_utils.models import build, resnet_binary, vgg_cifar10_binary
from bnn_utils.packed import pack
from bnn_utils.repair import REPAIRS
from bnn_utils.report import published_form
from bnn_utils.system import fastest_precision
from bnn_utils.training import Recipe, train

ROOT = Path(cli.__file__).parents[1]
DIGITS = "train --model vgg_cifar10_binary --dataset digits"
TRAIN = f"{DIGITS} --width 0.05 --batch-size 128 --seed 3".split()


def run(arguments):
    """Return the exit status of the command line, whichever way it ends."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return stopped.code


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def pictures(folder, classes, per_class=3, size=(8, 8)):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make a folder with a trained run and with everything that can be wrong."""
    world = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.chdir(world)
    assert run([*TRAIN, "--epochs", 2, "--results-dir", world / "results", "--save", "run"]) == 0
    best = world / "results/run/best.safetensors"

    (world / "empty").mkdir()
    (world / "a-file").write_text("no folder")
    (world / "trials.csv").write_text("precious")
    (world / "trials.sqlite").write_text("precious")
    (world / "trials.sqlite.lock").touch()
    pictures(world / "pictures/train", "ab")
    pictures(world / "pictures/test", "ab")
    pictures(world / "differing/train", "ab")
    pictures(world / "differing/test", "ac")
    pictures(world / "broken/train", "ab")
    pictures(world / "broken/test", "ab")
    (world / "broken/test/b/1.png").write_text("not a picture")
    pictures(world / "halved/train", "ab")
    pictures(world / "halved/test", "ab")
    whole = (world / "halved/train/a/2.png").read_bytes()
    (world / "halved/train/a/2.png").write_bytes(whole[: len(whole) // 2])
    pictures(world / "oblong/train", "ab", size=(16, 8))
    pictures(world / "oblong/test", "ab", size=(16, 8))
    pictures(world / "odd/train", "ab", size=(9, 9))
    pictures(world / "odd/test", "ab", size=(9, 9))
    (world / "no-test/train/a").mkdir(parents=True)

    (world / "zero.safetensors").touch()
    whole = best.read_bytes()
    (world / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (world / "lying.safetensors").write_bytes(whole.replace(b"0.05", b"0.06"))  # tells another width than it has
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, world / "linear.pth.tar")
    torch.save({"state_dict": {"features.0.weight": Marks(world / "marker")}}, world / "code.pth.tar")
    for name, model in {
        "colour": vgg_cifar10_binary(width=0.02, in_channels=3, input_size=8),
        "larger": vgg_cifar10_binary(width=0.02, in_channels=1, input_size=16),
        "three": resnet_binary(width=0.02, in_channels=1, input_size=8, num_classes=3),
        "float": vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8, binary=False),
    }.items():
        checkpoints.save(world / f"{name}.safetensors", model)
    model, _ = checkpoints.load(world / "float.safetensors")
    checkpoints.save(world / "scaled.safetensors", model, mean=[0.5], std=[0.5])
    checkpoints.save(world / "named.safetensors", model, classes=["zero", *"123456789"])
    (world / "results/broken-state").mkdir()
    state = (world / "results/run/last.pt").read_bytes()
    (world / "results/broken-state/last.pt").write_bytes(state[: len(state) // 2])
    (world / "results/foreign-state").mkdir()
    torch.save({"identity": {}}, world / "results/foreign-state/last.pt")
    yield world
    patch.undo()


class Marks:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def best(world):
    return world / "results/run/best.safetensors"


# What the commands do


def test_train_keeps_what_it_says(tmp_path, capsys):
    assert run([*TRAIN, "--epochs", 2, "--results-dir", tmp_path / "r", "--save", "mine"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "r/mine"
    assert {path.name for path in folder.iterdir()} == {"best.safetensors", "last.pt", "history.csv"}
    model, facts = checkpoints.load(folder / "best.safetensors")
    assert model.config == dict(num_classes=10, width=0.05, in_channels=1, input_size=8)
    history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
    assert list(history["epoch"]) == [1, 2]
    assert len(re.findall(r"^epoch +\d+ ", printed, re.M)) == 2

    test = data.digits().test
    result = evaluate(model, test)
    assert facts["test_accuracy"] == result.accuracy
    assert facts["test_loss"] == pytest.approx(result.loss)
    assert f"test: loss {result.loss:.4f}, acc {result.accuracy:.4f} on 360 images of digits" in printed
    assert facts["validation_accuracy"] == history["validation_accuracy"].max()
    assert history["validation_accuracy"].iloc[facts["epoch"] - 1] == facts["validation_accuracy"]
    assert facts["recipe"]["epochs"] == 2
    assert facts["recipe"]["seed"] == 3
    assert (facts["device"], facts["threads"]) == ("cpu", torch.get_num_threads())
    assert (facts["mean"], facts["std"]) == (list(test.mean), list(test.std))


def test_train_for_errors_and_margins(tmp_path, capsys):
    chosen = dict(damage_rate=0.1, damage_below=50.0, damage_spare=0.02, damage_statistics="running")
    chosen |= dict(loss="margin", margin=1.5)
    options = ["--damage-train-rate", 0.1, "--damage-below", 50, "--loss", "margin", "--margin", 1.5]
    options += ["--damage-spare", 0.02, "--damage-statistics", "running"]
    assert run([*TRAIN, "--epochs", 3, "--results-dir", tmp_path, "--save", "run", *options]) == 0
    recipe = Recipe(epochs=3, batch_size=128, seed=3, **chosen)
    torch.manual_seed(3)
    model = vgg_cifar10_binary(width=0.05, in_channels=1, input_size=8).to(memory_format=torch.channels_last)
    expected = train(model, data.digits(), recipe)
    history = pd.read_csv(tmp_path / "run/history.csv")
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"))
    kept, facts = checkpoints.load(tmp_path / "run/best.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.state_dict().items())
    assert facts["recipe"] == vars(recipe)
    assert facts["epoch"] == expected.attrs["best_epoch"] > 1  # the first is trained without errors
    assert facts["validation_accuracy"] == expected["validation_accuracy"][facts["epoch"] - 1]
    assert f"best epoch {facts['epoch']}: " in capsys.readouterr().out


def test_train_from_a_float_teacher(tmp_path, capsys):
    options = [*TRAIN, "--results-dir", tmp_path, "--save"]
    assert run([*options, "float", "--float", "--epochs", 2]) == 0
    assert "training the float form of vgg_cifar10_binary at width 0.05 on digits" in capsys.readouterr().out
    kept = tmp_path / "float/best.safetensors"
    teacher, facts = checkpoints.load(kept)
    assert not binarized_weights(teacher) and facts["config"]["binary"] is False
    test = data.digits().test
    assert facts["test_accuracy"] == evaluate(teacher, test).accuracy
    assert run(["evaluate", "-e", kept, "--dataset", "digits"]) == 0
    assert run(["damage", "-e", kept, "--dataset", "digits", "--trials", 1, "--limit", 20]) == 0
    assert f"acc {facts['test_accuracy']:.4f} on 360" in capsys.readouterr().out

    chosen = dict(label_smoothing=0.1, teacher_share=0.4, temperature=2.0)
    told = ["--label-smoothing", 0.1, "--teacher", kept, "--teacher-share", 0.4, "--temperature", 2]
    assert run([*options, "taught", "--epochs", 2, *told]) == 0
    recipe = Recipe(epochs=2, batch_size=128, seed=3, **chosen)
    torch.manual_seed(3)
    model = vgg_cifar10_binary(width=0.05, in_channels=1, input_size=8).to(memory_format=torch.channels_last)
    expected = train(model, data.digits(), recipe, teacher=teacher.to(memory_format=torch.channels_last))
    history = pd.read_csv(tmp_path / "taught/history.csv")
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"))
    facts = checkpoints.load(tmp_path / "taught/best.safetensors")[1]
    assert facts["recipe"] == vars(recipe) and facts["teacher"] == "best.safetensors"


@pytest.mark.parametrize(("word", "meant"), [("published", True), ("none", False), (None, True)])
def test_train_with_shortcuts_of_each_kind(tmp_path, capsys, word, meant):
    arguments = ["train", "--model", "resnet_binary", "--dataset", "digits", "--width", 0.02, "--epochs", 1]
    options = ["--batch-size", 512, "--results-dir", tmp_path, "--save", "run", *(["--shortcut", word] if word else [])]
    assert run([*arguments, *options]) == 0
    model, facts = checkpoints.load(tmp_path / "run/best.safetensors")
    assert model.config["shortcut"] == facts["config"]["shortcut"] == meant


def test_train_in_the_fastest_precision_tells_which_it_is(tmp_path, capsys):
    options = dict(model="resnet_bireal", dataset="digits", width=0.02, epochs=1, precision="auto", save="run")
    arguments = ["train", *(f"--{name}={value}" for name, value in options.items())]
    assert run([*arguments, "--device", "cpu", "--batch-size", 512, "--results-dir", tmp_path]) == 0
    chosen = fastest_precision("cpu")
    assert capsys.readouterr().out.splitlines()[0] == f"precision: {chosen}"
    assert checkpoints.load(tmp_path / "run/best.safetensors")[1]["recipe"]["precision"] == chosen


def test_name_of_the_model_is_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = dict(model="resnet_binary", dataset="digits", width=0.02, epochs=1) | {"batch-size": 512}
    arguments = ["train", *(f"--{name}={value}" for name, value in options.items())]
    assert run(arguments) == 0
    assert (tmp_path / "results/resnet_binary/best.safetensors").is_file()


def test_evaluate(best, capsys):
    model, _ = checkpoints.load(best)
    test = data.digits().test
    for limit in (None, 25):
        images = test.limit(limit)
        result = evaluate(model, images)
        assert run(["evaluate", "-e", best, "--dataset", "digits", *(["--limit", limit] if limit else [])]) == 0
        expected = f"loss {result.loss:.4f}, acc {result.accuracy:.4f} on {len(images)} test images of digits\n"
        assert capsys.readouterr().out == expected


def test_evaluate_a_published_checkpoint_on_pictures(world, tmp_path, capsys):
    torch.manual_seed(0)
    model = vgg_cifar10_binary(width=8 / 384, num_classes=2, input_size=8).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model_best.pth.tar")
    folder = world / "pictures"
    assert run(["evaluate", "-e", tmp_path / "model_best.pth.tar", "--dataset", "images", "--data-path", folder]) == 0
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("test/*/*.png"))]) / np.float32(255)
    x = torch.from_numpy((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 0, 0, 1, 1, 1])).item()
    assert f"loss {loss:.4f}" in capsys.readouterr().out


def normalized_by(path, mean, std):
    """Whether a file tells this normalization, and its network has the accuracy that the file says with it."""
    network, facts = checkpoints.load(path)
    test = data.digits().test
    with torch.no_grad():
        right = network(((test.pixels.double() / 255 - mean) / std).float()).argmax(1) == test.labels
    accuracy = right.double().mean().item()
    return (facts["mean"], facts["std"]) == ([mean], [std]) and accuracy == pytest.approx(facts["test_accuracy"])


def test_images_are_prepared_as_the_network_was_trained(tmp_path, capsys):
    other = dict(mean=[0.6], std=[2.0])
    for name, binary in (("begun", True), ("taught", False)):
        torch.manual_seed(0)
        network = vgg_cifar10_binary(width=0.05, in_channels=1, input_size=8, binary=binary)
        test = data.digits().as_trained(other)
        train(network, test, Recipe(epochs=2, batch_size=128), progress=False)
        checkpoints.save(tmp_path / f"{name}.safetensors", network, **other)
    begun = checkpoints.load(tmp_path / "begun.safetensors")[0]
    with torch.no_grad():
        logits = begun(((test.test.pixels.double() / 255 - 0.6) / 2).float())
    loss = nn.functional.cross_entropy(logits, test.test.labels).item()
    accuracy = (logits.argmax(1) == test.test.labels).double().mean().item()
    for command in ("evaluate", "damage --probabilities 0 --trials 1 --repair none", "evaluate --packed"):
        assert run([*command.split(), "-e", tmp_path / "begun.safetensors", "--dataset", "digits"]) == 0
        said = re.search(r"loss\W+([\d.]+)\W+acc\W+([\d.]+)", capsys.readouterr().out)
        assert [float(number) for number in said.groups()] == pytest.approx([loss, accuracy], rel=0, abs=6e-4)

    go = [*TRAIN, "--epochs", 2, "--results-dir", tmp_path, "--save"]
    assert run([*go, "further", "--start", tmp_path / "begun.safetensors"]) == 0
    assert normalized_by(tmp_path / "further/best.safetensors", 0.6, 2.0)
    assert run([*go, "pupil", "--teacher", tmp_path / "taught.safetensors", "--teacher-share", 0.5]) == 0
    assert normalized_by(tmp_path / "pupil/best.safetensors", 0.6, 2.0)
    (tmp_path / "further/best.safetensors").unlink()
    assert run([*go, "further", "--resume"]) == 0  # which does not name the start again
    assert normalized_by(tmp_path / "further/best.safetensors", 0.6, 2.0)


def test_what_is_passed_over_is_told_with_the_name_of_the_data(world, tmp_path, capsys):
    checkpoints.save(tmp_path / "two.safetensors", vgg_cifar10_binary(width=0.02, num_classes=2, input_size=8))
    for part in ("train", "test"):
        pictures(tmp_path / "zoo" / part, "ab")
    command = ["evaluate", "-e", tmp_path / "two.safetensors", "--dataset", "images", "--data-path", tmp_path / "zoo"]
    assert run(command) == 0
    clean = capsys.readouterr().out
    pictures(tmp_path / "zoo/train", [".ipynb_checkpoints"])
    pictures(tmp_path / "zoo/test", [".ipynb_checkpoints"])
    assert run(command) == 0
    assert capsys.readouterr().out == f"zoo (PNG): 2 hidden or system files and folders passed over\n{clean}"


PAIR = r"\{(\S+) ± (\S+)\}"


def test_damage_prints_the_published_form(best, tmp_path, capsys):
    out = tmp_path / "t.csv"
    chosen = ["--probabilities", "1e-4", "1e-2", "--trials", 5, "--limit", 60, "--seed", 2, "--out", out]
    assert run(["damage", "-e", best, "--dataset", "digits", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()

    model, _ = checkpoints.load(best)
    images = data.digits().test.limit(60)
    original = evaluate(model, images)
    table = campaign.run(model, images, [1e-2, 1e-4], 5, repairs=("none", "clip"), seed=2)
    pd.testing.assert_frame_equal(pd.read_csv(out), table)

    assert lines[1] == f"original model ==> loss:{{{original.loss:.3f}}}, acc:{{{original.accuracy:.3f}}}"
    assert lines[2] == "damaged model ==>"
    at = 3
    for probability, text in [(1e-2, "0.01"), (1e-4, "0.0001")]:
        assert re.match(rf"damage probability:  {text}(\s|$)", lines[at])
        for repair, word in [("none", "damaged"), ("clip", "clipped")]:
            at += 1
            form = rf"{word} loss:{PAIR}, {word} acc:{PAIR}, loss rate:{PAIR}, acc rate:{PAIR}"
            numbers = [float(x) for x in re.match(form, lines[at]).groups()]
            rows = table[(table["probability"] == probability) & (table["repair"] == repair)]
            expected = []
            for values in (rows["loss"], rows["accuracy"]):
                expected += [values.mean(), stats.t.ppf(0.975, 4) * stats.sem(values)]
            expected += [x / original.loss for x in expected[:2]] + [x / original.accuracy for x in expected[2:4]]
            np.testing.assert_allclose(numbers, expected, atol=5.001e-4, rtol=5e-3)
        at += 1
    assert at == len(lines)


def test_damage_of_one_trial_has_no_interval(best, capsys):
    chosen = ["--limit", 20, "--trials", 1, "--probabilities", "0.01", "0.01", "--repair", "none", "none"]
    assert run(["damage", "-e", best, "--dataset", "digits", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert re.match(r"damaged loss:\{\S+ ± nan\}, damaged acc:\{0\.\d{3} ± nan\}", lines[4])


def test_damage_with_every_repair(best, capsys):
    chosen = ["--limit", 20, "--trials", 2, "--probabilities", "0.01", "--storage", "packed", "--repair", *REPAIRS]
    assert run(["damage", "-e", best, "--dataset", "digits", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()[4:]
    words = ["damaged", "clipped", *(name for name in REPAIRS if name not in ("none", "clip"))]
    assert [line.split(" loss:")[0] for line in lines] == words


@pytest.mark.parametrize("form", ["png", "svg"])
def test_damage_draws_its_table(best, tmp_path, form):
    plots = [tmp_path / f"{word}.{form}" for word in ("a", "b")]
    for plot in plots:
        assert damage(best, "--trials", 2, "--plot", plot) == 0
    assert plots[0].read_bytes() == plots[1].read_bytes()
    if form == "png":
        with Image.open(plots[0]) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 5
    else:
        assert "<svg" in plots[0].read_text()
    before = tree(tmp_path)
    assert damage(best, "--trials", 2, "--plot", plots[0]) == 2  # is there already
    assert tree(tmp_path) == before


def damage(best, *options):
    chosen = ["--probabilities", "1e-3", "1e-2", "--limit", 20, *options]
    return run(["damage", "-e", best, "--dataset", "digits", *chosen])


def test_damage_goes_on_with_a_results_file_and_with_workers(best, tmp_path, capsys):
    assert damage(best, "--trials", 12) == 0
    whole = capsys.readouterr().out
    out = tmp_path / "t.sqlite"
    for options in (["--trials", 5], ["--trials", 9, "--resume", "--workers", 2], ["--trials", 12, "--resume"]):
        assert damage(best, *options, "--out", out, "--scratch", tmp_path) == 0
    assert capsys.readouterr().out.endswith(whole)
    assert rows_in(out) == 2 * 2 * 12
    assert {path.name for path in tmp_path.iterdir()} <= {"t.sqlite", "t.sqlite.lock"}
    assert damage(best, "--trials", 12, "--seed", 1, "--out", out, "--resume") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{out}: is of another campaign: seed: 0 there, 1 here")


@pytest.mark.parametrize(("until", "end"), [(0.1, "stopped at ± 0.1"), (0.04, "± 0.04 not reached, but ± ")])
def test_damage_until_an_interval(until, end, best, capsys):
    assert damage(best, "--until", until, "--trials", 40) == 0
    printed = capsys.readouterr().out.splitlines()
    model, _ = checkpoints.load(best)
    images = data.digits().test.limit(20)
    table = campaign.run(model, images, [1e-3, 1e-2], 40, repairs=("none", "clip"), until=until)
    assert printed[:-1] == published_form(table, evaluate(model, images)).splitlines()
    trials = table.groupby("probability")["trial"].nunique()
    assert printed[-1].startswith(end)
    assert re.search(rf": {trials.sum()} trials, \d+% fewer than {2 * trials.max()}", printed[-1])


def test_damage_on_a_cluster(best, capsys):
    distributed = pytest.importorskip("distributed")
    assert damage(best, "--trials", 3) == 0
    here = capsys.readouterr().out
    with distributed.LocalCluster(
        1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp"
    ) as c:
        assert damage(best, "--trials", 3, "--cluster", c.scheduler_address) == 0
    assert capsys.readouterr().out == here


def test_a_missing_package_for_clusters_is_told(best, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert damage(best, "--cluster", "tcp://127.0.0.1:1") == 2
    assert "bnn_utils[cluster]" in capsys.readouterr().err


def test_a_killed_worker_is_told_in_one_line_and_the_sweep_goes_on(best, tmp_path, capfd):
    def kill():
        while not rows_in(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        multiprocessing.active_children()[0].kill()

    out, deadline = tmp_path / "t.sqlite", time.monotonic() + 60
    killer = threading.Thread(target=kill)
    killer.start()
    assert damage(best, "--trials", 10**6, "--out", out, "--workers", 1) == 2
    killer.join()
    last = capfd.readouterr().err.replace("\r", "\n").rstrip().splitlines()[-1]
    assert last.strip().startswith("python -m bnn_utils damage: error: ")
    assert last.endswith(f"what was finished is kept in {out}; go on with resume")
    assert damage(best, "--trials", 2, "--out", out, "--resume") == 0


def test_nothing_right_has_no_rate():
    table = pd.DataFrame(
        [
            dict(network="n", dataset="d", storage="float32", repair="none", probability=0.1, trial=trial, seed=trial)
            | dict(flips=3, loss=loss, accuracy=0.0)
            for trial, loss in enumerate([1.0, np.inf, np.nan])
        ]
    )
    text = published_form(table, Evaluation(2.0, 0.0))
    assert "acc rate:{nan ± nan}" in text
    assert "not finite in 2 of 3 trials" in text


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_damage_by_another_error_model(best, tmp_path, capsys, storage):
    chosen = ["--storage", storage, "--error", "stuck-at-1", "--probabilities", "1", "--trials", 2, "--limit", 20]
    assert run(["damage", "-e", best, "--dataset", "digits", *chosen, "--out", tmp_path / "t.csv"]) == 0
    printed = capsys.readouterr().out
    assert faults.ERRORS["stuck-at-1"].meaning in printed
    assert f"{storage} storage" in printed
    model, _ = checkpoints.load(best)
    table = campaign.run(
        model, data.digits().test.limit(20), [1.0], 2, storage=storage, repairs=("none", "clip"), error="stuck-at-1"
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), table)
    held = pack(model) if storage == "packed" else model
    with faults.inject(held, 1.0, seed=0, error="stuck-at-1") as flips:
        assert set(table["flips"]) == {flips.total}  # every stored 0 reads 1


def test_pack_and_evaluate_packed(best, tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    assert run(["pack", "-e", best, "-o", small]) == 0
    printed = capsys.readouterr().out
    assert f"{small.stat().st_size:,} bytes" in printed
    latent, facts = checkpoints.load(best)
    packed, kept = checkpoints.load(small)
    assert kept == facts | {"packed": True}
    weights = sum(weight.numel() for weight in binarized_weights(latent).values())
    assert best.stat().st_size - small.stat().st_size > 3.8 * weights  # from 32 bits a weight to 1
    images = data.digits().test.limit(50)
    expected = evaluate(pack(latent), images)
    assert evaluate(packed, images) == expected == evaluate(pack(packed), images)
    for checkpoint in (best, small):
        for options in ([], ["--packed"]):
            assert run(["evaluate", "-e", checkpoint, "--dataset", "digits", "--limit", 50, *options]) == 0
            assert f"loss {expected.loss:.4f}, acc {expected.accuracy:.4f} on 50" in capsys.readouterr().out


def test_help(capsys):
    assert run(["--help"]) == 0
    assert "{train,evaluate,damage,pack}" in capsys.readouterr().out
    for command, option in [
        ("train", "--resume"),
        ("train", "--damage-train-rate"),
        ("evaluate", "--limit"),
        ("damage", "--probabilities"),
        ("pack", "-o"),
    ]:
        assert run([command, "--help"]) == 0
        assert option in capsys.readouterr().out


# Interrupted and resumed


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    def interrupted(row):
        print_epoch(row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    train = [*TRAIN, "--epochs", 4, "--results-dir", tmp_path]
    assert run([*train, "--save", "whole"]) == 0
    whole = capsys.readouterr().out
    print_epoch = cli.print_epoch
    monkeypatch.setattr(cli, "print_epoch", interrupted)
    assert run([*train, "--save", "parts"]) == 130
    kept = capsys.readouterr()
    assert "Traceback" not in kept.err
    assert list(pd.read_csv(tmp_path / "parts/history.csv")["epoch"]) == [1, 2]
    checkpoints.load(tmp_path / "parts/best.safetensors")

    monkeypatch.setattr(cli, "print_epoch", print_epoch)
    assert run([*train, "--resume", tmp_path / "parts"]) == 0
    resumed = capsys.readouterr().out
    assert len(re.findall(r"^epoch +\d+ ", resumed, re.M)) == 2
    assert re.findall(r"^test: .*", resumed, re.M) == re.findall(r"^test: .*", whole, re.M) != []
    one, other = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    histories = [pd.read_csv(tmp_path / name / "history.csv").drop(columns="seconds") for name in ("whole", "parts")]
    pd.testing.assert_frame_equal(*histories)

    before = tree(tmp_path / "whole")  # a finished run has nothing left to do
    assert run([*train, "--save", "whole", "--resume"]) == 0
    after = tree(tmp_path / "whole")
    assert (before["last.pt"], before["history.csv"]) == (after["last.pt"], after["history.csv"])


def test_overwrite(tmp_path, capsys):
    train = [*TRAIN, "--results-dir", tmp_path, "--save", "run"]
    assert run([*train, "--epochs", 2]) == 0
    assert run([*train, "--epochs", 1, "--overwrite"]) == 0
    assert len(pd.read_csv(tmp_path / "run/history.csv")) == 1
    assert checkpoints.load(tmp_path / "run/best.safetensors")[1]["recipe"]["epochs"] == 1


def test_training_starts_from_a_checkpoint(best, tmp_path, capsys):
    options = ["--results-dir", tmp_path, "--save", "further", "--epochs", 1, "--lr", 1e-9]
    assert run([*TRAIN, *options, "--start", best]) == 0
    latent, _ = checkpoints.load(best)
    further, facts = checkpoints.load(tmp_path / "further/best.safetensors")
    assert facts["start"] == "best.safetensors"
    for before, after in zip(latent.parameters(), further.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # so small a rate changes next to nothing
    capsys.readouterr()

    # Of one bit a weight: the signs of the file, the sizes of an untrained network of the run's seed.
    small = tmp_path / "small.safetensors"
    assert run(["pack", "-e", best, "-o", small]) == 0
    again = [*TRAIN, "--results-dir", tmp_path, "--save", "again", "--epochs", 1, "--lr", 1e-9]
    assert run([*again, "--start", small]) == 0
    torch.manual_seed(3)
    fresh = build(latent.name, **latent.config)
    after, _ = checkpoints.load(tmp_path / "again/best.safetensors")
    for name, weight in binarized_weights(after).items():
        torch.testing.assert_close(weight.abs(), fresh.get_parameter(name).abs(), rtol=0, atol=1e-6)
        sized = weight.abs() > 1e-6
        assert sized.sum() > 0.99 * weight.numel()
        assert torch.equal(weight[sized] > 0, latent.get_parameter(name)[sized] >= 0)
    capsys.readouterr()

    kept = tree(tmp_path)
    for other, said in (("0.1", "width 0.05 there, 0.1 here"), ("0.05", "network 'vgg_cifar10_binary' there")):
        wrong = [*DIGITS.replace("vgg_cifar10", "resnet" if other == "0.05" else "vgg_cifar10").split()]
        assert run([*wrong, "--width", other, "--results-dir", tmp_path, "--save", "new", "--start", best]) == 2
        printed = capsys.readouterr().err
        assert said in printed and len(printed.splitlines()) == 1
    assert tree(tmp_path) == kept


def test_the_state_of_a_run_is_a_checkpoint_of_its_best_network(best, tmp_path, capsys):
    state = best.with_name("last.pt")
    kept = torch.load(state, weights_only=True)["best"]
    told = f"{state}: a run after 2 of 2 epochs; its best network so far, of epoch {kept['epoch']}, is taken\n"
    network, facts = checkpoints.load(state)
    assert all(torch.equal(value, kept["state"][name]) for name, value in network.state_dict().items())
    assert (facts["network"], facts["config"]["width"], facts["dataset"]) == ("vgg_cifar10_binary", 0.05, "digits")
    assert facts["validation_accuracy"] == evaluate(network, data.digits().validation).accuracy
    for command in ("evaluate", "damage --trials 2 --probabilities 1e-3 --limit 20"):
        printed = []
        for path in (best, state):
            assert run([*command.split(), "-e", path, "--dataset", "digits"]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[1] == told + printed[0]
    train = [*TRAIN, "--epochs", 1, "--results-dir", tmp_path, "--lr", 1e-9]
    assert run([*train, "--save", "a", "--start", state, "--teacher", state, "--teacher-share", 0.5]) == 0
    further, facts = checkpoints.load(tmp_path / "a/best.safetensors")
    assert facts["start"] == facts["teacher"] == "last.pt"
    for before, after in zip(network.parameters(), further.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert run(["pack", "-e", state, "-o", tmp_path / "packed.safetensors"]) == 0


def test_a_run_is_resumed_for_more_epochs(tmp_path, capsys):
    train = [*TRAIN, "--results-dir", tmp_path, "--save", "run"]
    assert run([*train, "--epochs", 2]) == 0
    capsys.readouterr()
    assert run([*train, "--epochs", 4, "--resume"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("--epochs 4, begun with 2: from the next epoch on") for line in lines) == 1
    history = pd.read_csv(tmp_path / "run/history.csv", float_precision="round_trip")
    cosine = [1e-5 + (5e-3 - 1e-5) * (1 + np.cos(np.pi * share)) / 2 for share in (1 / 2, 1, 3 / 4, 1)]
    assert history["lr"].tolist() == pytest.approx(cosine)
    facts = checkpoints.load(tmp_path / "run/best.safetensors")[1]
    assert (facts["recipe"]["epochs"], facts["extended"]) == (4, [2])
    assert facts["validation_accuracy"] == history["validation_accuracy"].max()
    assert run([*train, "--epochs", 5, "--resume"]) == 0
    assert checkpoints.load(tmp_path / "run/best.safetensors")[1]["extended"] == [2, 4]
    capsys.readouterr()
    assert run([*train, "--epochs", 5, "--resume"]) == 0  # a finished run, and what it was is kept
    assert "begun with" not in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "run/best.safetensors")[1]["extended"] == [2, 4]
    assert run([*train, "--epochs", 4, "--resume"]) == 2
    assert "epochs 5 there, 4 here" in capsys.readouterr().err


def started(arguments, folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "bnn_utils", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )


def stopped(process):
    """Press Ctrl-C and return (exit status, stderr)."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_while_training(tmp_path):
    process = started([*TRAIN, "--epochs", 500, "--results-dir", tmp_path, "--save", "run"], tmp_path)
    for line in process.stdout:
        if line.startswith("epoch   1"):
            break
    status, err = stopped(process)
    assert status == 130
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best.safetensors", "last.pt", "history.csv"}
    checkpoints.load(tmp_path / "run/best.safetensors")
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert 1 <= len(history) < 500
    assert len(torch.load(tmp_path / "run/last.pt", weights_only=True)["rows"]) - len(history) in (0, 1)


def rows_in(path):
    """Return how many rows a results file holds, 0 for one that is not there."""
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0]


@pytest.mark.parametrize("options", [[], ["--workers", 2]], ids=["here", "workers"])
def test_ctrl_c_during_a_sweep(best, tmp_path, options):
    out = tmp_path / "t.sqlite"
    chosen = ["--probabilities", "1e-3", "--trials", 100000, "--limit", 5, "--out", out, *options]
    process = started(["damage", "-e", best, "--dataset", "digits", *chosen], tmp_path)
    while process.poll() is None and not rows_in(out):
        time.sleep(0.02)
    status, err = stopped(process)
    assert status == 130
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"t.sqlite", "t.sqlite.lock"}
    with closing(sqlite3.connect(out)) as connection:
        table = pd.read_sql("SELECT * FROM trials ORDER BY trial, repair DESC", connection).drop(columns="checksum")
    model, _ = checkpoints.load(best)
    assert len(table) == 2 * table["trial"].nunique()
    images = data.digits().test.limit(5)
    few = campaign.run(model, images, [1e-3], 3, repairs=("none", "clip"))
    table = table[table["trial"] < 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, few[few["trial"].isin(table["trial"])].reset_index(drop=True))
    assert 0 in set(table["trial"])


# Bad input: one line, exit status 2, nothing written


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    train = [*TRAIN, "--epochs", 1000, "--results-dir", tmp_path, "--save", "run"]
    first = started(train, tmp_path, TQDM_DISABLE="1")
    try:
        for line in first.stdout:
            if line.startswith("epoch"):
                break
        for option in ("--overwrite", "--resume"):
            assert run([*train, option]) == 2
            told = capsys.readouterr().err
            assert "another process is training into this folder" in told and told.count("\n") == 1
        assert run([*train[:-1], "other", "--epochs", 1]) == 0
        status, _ = stopped(first)
    finally:
        first.kill()
        first.communicate()
    assert status == 130
    epochs = list(pd.read_csv(tmp_path / "run/history.csv")["epoch"])
    assert epochs == list(range(1, len(epochs) + 1))
    checkpoints.load(tmp_path / "run/best.safetensors")
    assert run([*train[:-1], "other", "--epochs", 1, "--overwrite"]) == 0


def test_runs_that_start_together(tmp_path):
    train = [*TRAIN, "--epochs", 2, "--results-dir", tmp_path / "new", "--save", "run"]
    runs = [started(train, tmp_path, TQDM_DISABLE="1") for _ in range(2)]
    told = [process.communicate(timeout=300) for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2]
    (error,) = (err for (_, err), process in zip(told, runs, strict=True) if process.returncode == 2)
    assert error.count("\n") == 1 and f"{tmp_path / 'new/run'}: " in error
    (out,) = (out for (out, _), process in zip(told, runs, strict=True) if process.returncode == 0)
    accuracy = checkpoints.load(tmp_path / "new/run/best.safetensors")[1]["test_accuracy"]
    assert f"acc {accuracy:.4f} on 360" in out


# Where output goes, and what paths mean


def finished(arguments, folder, **environment):
    process = started(arguments, folder, TQDM_DISABLE="1", **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_output_that_a_terminal_cannot_show_is_replaced(best, tmp_path):
    chosen = ["--probabilities", "1e-2", "--trials", 3, "--limit", 20, "--out", tmp_path / "t.csv"]
    damage = ["damage", "-e", best, "--dataset", "digits", *chosen]
    status, out, err = finished(damage, tmp_path, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "")
    assert len(pd.read_csv(tmp_path / "t.csv")) == 6
    (tmp_path / "t.csv").unlink()
    assert finished(damage, tmp_path, PYTHONIOENCODING="utf-8") == (0, out.replace("?", "±"), "")
    status, out, err = finished(["damage", "--help"], tmp_path, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "") and "is ? H or less" in out


@pytest.mark.parametrize("command", ["evaluate", "train --model vgg_cifar10_binary --width 0.05 --epochs 3"])
def test_a_pipe_that_closes_is_no_error(best, tmp_path, command):
    checkpoint = ["-e", best] if command == "evaluate" else []
    process = started([*command.split(), *checkpoint, "--dataset", "digits"], tmp_path, TQDM_DISABLE="1")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(120) == 141


def test_a_tilde_is_the_home_folder(best, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert run(["pack", f"--checkpoint={best}", "--output=~/packed.safetensors"]) == 0
    few = ["--dataset=digits", "--limit=5", "--checkpoint=~/packed.safetensors"]
    assert run(["damage", *few, "--trials=1", "--out=~/t.csv", "--scratch=~"]) == 0
    start = ["--teacher=~/packed.safetensors", "--teacher-share=0.5", "--start=~/packed.safetensors"]
    assert run([*TRAIN, "--epochs=1", "--results-dir=~/runs", "--save=a", *start]) == 0
    assert run([*TRAIN, "--epochs=1", "--resume=~/runs/a", *start]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"packed.safetensors", "t.csv", "runs"}
    for part in ("train", "test"):
        pictures(tmp_path / "zoo" / part, "ab")
    assert data.load("images", "~/zoo").name == "zoo (PNG)"
    checkpoints.save(tmp_path / "two.safetensors", vgg_cifar10_binary(width=0.02, num_classes=2, input_size=8))
    assert run(["evaluate", "-e", "~/two.safetensors", "--dataset=images", "--data-path=~/zoo"]) == 0


def bad(arguments, said, **marks):
    return pytest.param(arguments, said, id=arguments.replace("/", "-"), **marks)


IMAGES = "train --model vgg_cifar10_binary --dataset images --data-path"
STARTED = f"{DIGITS} --width 0.05 --start results/run/best.safetensors"
EVALUATE = "evaluate --dataset digits -e"
DAMAGE = "damage --dataset digits -e results/run/best.safetensors --limit 5"
RESUME = f"{' '.join(TRAIN)} --epochs 2 --save run --resume"
BAD = [
    bad("", "{train,evaluate,damage,pack}"),
    bad("dance", "dance"),
    pytest.param(["evaluate", "-e", "x", "--dataset", "digits", "dance\nnow\x1e"], "dance now", id="line breaks"),
    bad("train --dataset digits", "--model"),
    bad("train --model alexnet --dataset digits", "alexnet"),
    bad("train --model resnet_binary --dataset imagenet", "imagenet"),
    bad(f"{DIGITS} --epochs 0", "epochs"),
    bad(f"{DIGITS} --epochs many", "epochs"),
    bad(f"{DIGITS} --batch-size 1", "batch_size"),
    bad(f"{DIGITS} --lr 0", "lr"),
    bad(f"{DIGITS} --lr nan", "lr"),
    bad(f"{DIGITS} --weight-decay -1", "weight_decay"),
    bad(f"{DIGITS} --weight-decay nan", "weight_decay"),
    bad(f"{DIGITS} --optimizer lion", "lion"),
    bad(f"{DIGITS} --precision int3", "int3"),
    bad(f"{DIGITS} --damage-train-rate 1", "damage_rate must lie in [0, 1), got 1.0"),
    bad(f"{DIGITS} --damage-train-rate -0.1", "damage_rate"),
    bad(f"{DIGITS} --damage-train-rate nan", "damage_rate"),
    bad(f"{DIGITS} --damage-train-rate often", "--damage-train-rate"),
    bad(f"{DIGITS} --damage-spare 2", "damage_spare"),
    bad(f"{DIGITS} --damage-below 0", "damage_below"),
    bad(f"{DIGITS} --damage-below inf", "damage_below"),
    bad(f"{DIGITS} --loss hinge", "hinge"),
    bad(f"{DIGITS} --margin 0", "margin"),
    bad(f"{DIGITS} --margin nan", "margin"),
    bad(f"{DIGITS} --label-smoothing 1", "label_smoothing must lie in [0, 1), got 1.0"),
    bad(f"{DIGITS} --label-smoothing 0.1 --loss margin", "label_smoothing goes with the loss cross-entropy"),
    bad(f"{DIGITS} --teacher-share 1.5", "teacher_share must lie in [0, 1], got 1.5"),
    bad(f"{DIGITS} --teacher-share 0.5", "teacher_share 0.5 needs a teacher"),
    bad(f"{DIGITS} --teacher float.safetensors", "a teacher needs a teacher_share"),
    bad(f"{DIGITS} --temperature 0", "temperature"),
    bad(f"{DIGITS} --teacher-share 0.5 --teacher missing.safetensors", "missing.safetensors"),
    bad(f"{DIGITS} --teacher-share 0.5 --teacher three.safetensors", "wants 1 channels, 8 pixels a side, 3 classes"),
    bad(
        f"{DIGITS} --teacher-share 0.5 --teacher colour.safetensors", "colour.safetensors: the network wants 3 channels"
    ),
    bad(f"{STARTED} --teacher-share 0.5 --teacher scaled.safetensors", "scaled.safetensors: digits is normalized by"),
    bad(f"{DIGITS} --width 0.02 --start named.safetensors", "named.safetensors: digits has the classes 0, 1, 2,"),
    bad(f"{DIGITS} --teacher-share 0.5 --teacher named.safetensors", "trained on zero, 1, 2, 3"),
    bad(f"{DIGITS} --float --damage-train-rate 0.1", "this network has none"),
    bad(f"{DIGITS} --width 0.02 --start float.safetensors", "binary False there, True here"),
    bad(f"{DIGITS} --width 0", "width"),
    bad(f"{DIGITS} --width nan", "width"),
    bad(f"{DIGITS} --width 1e9", "width"),
    bad(f"{DIGITS} --seed -1", "seed must lie in [0, 2**64), got -1"),
    bad(f"{DIGITS} --seed {2**64}", "seed must lie in [0, 2**64), got 18446744073709551616"),
    bad(f"{DIGITS} --device abacus", "abacus"),
    bad(f"{DIGITS} --device meta", "meta"),
    bad(f"{DIGITS} --device cuda:x", "cuda:x"),
    bad(f"{DIGITS} --device cuda:99", "cuda:99"),
    bad("train --model vgg_cifar10_binary --dataset cifar10", "--data-path"),
    bad("train --model vgg_cifar10_binary --dataset cifar10 --data-path=", "--data-path"),
    bad("train --model vgg_cifar10_binary --dataset cifar10 --data-path empty", "empty"),
    bad("train --model vgg_cifar10_binary --dataset cifar10 --data-path not/there/yet", "not/there/yet"),
    bad("train --model vgg_cifar10_binary --dataset mnist --data-path not/there/yet", "download"),
    bad("train --model vgg_cifar10_binary --dataset cifar10 --data-path a-file", "a-file"),
    bad("train --model vgg_cifar10_binary --dataset cifar10 --data-path differing", "(b, c)"),
    bad("train --model vgg_cifar10_binary --dataset cifar10 --data-path pictures", "not the 10 classes of CIFAR-10"),
    bad("train --model vgg_cifar10_binary --dataset images", "--data-path"),
    bad(f"{IMAGES} missing", "missing"),
    bad(f"{IMAGES} empty", "train/"),
    bad(f"{IMAGES} a-file", "a-file"),
    bad(f"{IMAGES} no-test", "test/"),
    bad(f"{IMAGES} differing", "(b, c)"),
    bad(f"{IMAGES} broken", "broken/test/b/1.png"),
    bad(f"{IMAGES} halved", "halved/train/a/2.png"),
    bad(f"{IMAGES} oblong", "16x8"),
    bad(f"{IMAGES} odd", "input_size"),
    bad(f"{DIGITS} --shortcut none", "--shortcut is of resnet_binary, vgg_cifar10_binary has none"),
    bad(f"{DIGITS} --shortcut long", "long"),
    bad(f"{DIGITS} --epochs 1 --save run", "results/run"),
    bad(f"{DIGITS} --epochs 1 --results-dir . --save a-file", "a-file"),
    bad(f"{RESUME} --epochs 1", "epochs 2 there, 1 here"),
    bad(f"{RESUME} --lr 0.1", "lr"),
    bad(f"{RESUME} --seed 4", "seed"),
    bad(f"{RESUME} --damage-train-rate 0.1", "damage_rate 0.0 there, 0.1 here"),
    bad(f"{RESUME} --loss margin", "loss 'cross-entropy' there, 'margin' here"),
    bad(f"{RESUME} --width 0.1", "width"),
    bad(f"{RESUME} --float", "binary True there, False here"),
    bad(f"{RESUME} --label-smoothing 0.1", "label_smoothing 0.0 there, 0.1 here"),
    bad(f"{RESUME} --model resnet_binary", "network"),
    bad(f"{RESUME} results/nothing", "results/nothing"),
    bad(f"{RESUME} results/broken-state", "broken-state"),
    bad(f"{RESUME} results/foreign-state/last.pt", "foreign-state"),
    bad("evaluate --dataset digits", "-e"),
    bad(f"{EVALUATE} missing.safetensors", "missing.safetensors"),
    bad(f"{EVALUATE} results/run", "results/run"),
    bad(f"{EVALUATE} zero.safetensors", "zero.safetensors"),
    bad(f"{EVALUATE} cut.safetensors", "cut.safetensors"),
    bad(f"{EVALUATE} a-file", "a-file"),
    bad(f"{EVALUATE} lying.safetensors", "lying.safetensors"),
    bad(f"{EVALUATE} linear.pth.tar", "linear.pth.tar"),
    bad(f"{EVALUATE} code.pth.tar", "code"),
    bad(f"{EVALUATE} results/foreign-state/last.pt", "does not tell its network; take best.safetensors"),
    bad(f"{EVALUATE} results/broken-state/last.pt", "last.pt: is broken"),
    bad(f"{EVALUATE} colour.safetensors", "3 channels"),
    bad(f"{EVALUATE} larger.safetensors", "16 pixels"),
    bad(f"{EVALUATE} three.safetensors", "3 classes"),
    bad(f"{EVALUATE} named.safetensors", "give them the names that the network knows"),
    bad("damage --dataset digits -e named.safetensors --out new.csv", "named.safetensors: digits has the classes"),
    bad("evaluate --dataset images --data-path pictures -e results/run/best.safetensors", "2 classes"),
    bad("evaluate --dataset images -e results/run/best.safetensors", "--data-path"),
    bad("evaluate --dataset nothing -e results/run/best.safetensors", "nothing"),
    bad("evaluate --dataset digits --limit 0 -e results/run/best.safetensors", "limit"),
    bad("evaluate --dataset digits --limit -3 -e results/run/best.safetensors", "limit"),
    bad("evaluate --dataset digits --device abacus -e results/run/best.safetensors", "abacus"),
    bad("evaluate --dataset digits --packed --device cuda -e results/run/best.safetensors", "cuda"),
    bad("pack -e results/run/best.safetensors", "-o"),
    bad("pack -o new.safetensors", "-e"),
    bad("pack -e cut.safetensors -o new.safetensors", "cut.safetensors"),
    bad(
        "pack -e float.safetensors -o new.safetensors", "float.safetensors: is a float network, which cannot be packed"
    ),
    bad("evaluate --dataset digits --packed -e float.safetensors", "float network, which cannot be packed"),
    bad("damage --dataset digits --storage packed -e float.safetensors", "float network, which cannot be packed"),
    bad("pack -e missing.safetensors -o new.safetensors", "missing.safetensors"),
    bad("pack -e results/run/best.safetensors -o cut.safetensors", "cut.safetensors"),
    bad("pack -e results/run/best.safetensors -o results", "results"),
    bad("pack -e results/run/best.safetensors -o nowhere/new.safetensors", "nowhere"),
    bad(f"{DAMAGE} --probabilities 1e-3 1.5", "1.5"),
    bad(f"{DAMAGE} --probabilities -0.1", "-0.1"),
    bad(f"{DAMAGE} --probabilities nan --out new.csv", "nan"),
    bad(f"{DAMAGE} --probabilities inf", "inf"),
    bad(f"{DAMAGE} --probabilities few", "few"),
    bad(f"{DAMAGE} --probabilities", "--probabilities"),
    bad(f"{DAMAGE} --trials 0 --out new.csv", "trials"),
    bad(f"{DAMAGE} --trials -5", "trials"),
    bad(f"{DAMAGE} --trials 1.5", "--trials"),
    bad(f"{DAMAGE} --limit 0", "limit"),
    bad(f"{DAMAGE} --seed -1", "seed"),
    bad(f"{DAMAGE} --storage paper --out new.csv", "paper"),
    bad(f"{DAMAGE} --storage packed --device cuda --out new.csv", "cuda"),
    bad(f"{DAMAGE} --error rust --out new.csv", "rust"),
    bad(f"{DAMAGE} --repair none pray --out new.csv", "pray"),
    bad(f"{DAMAGE} --device abacus --out new.csv", "abacus"),
    bad(f"{DAMAGE} --trials 1 --out trials.csv", "trials.csv"),
    bad(f"{DAMAGE} --trials 1 --out empty", "empty"),
    bad(f"{DAMAGE} --trials 1 --out nowhere/new.csv", "nowhere"),
    bad(f"{DAMAGE} --trials 1 --out new.txt", ".csv, .sqlite or .db"),
    bad(f"{DAMAGE} --trials 1 --out trials.sqlite", "trials.sqlite"),
    bad(f"{DAMAGE} --trials 1 --out trials.sqlite --resume", "trials.sqlite: is damaged or not a results file"),
    bad(f"{DAMAGE} --trials 1 --out trials.csv --resume", "trials.csv"),
    bad(f"{DAMAGE} --trials 1 --out empty --resume", "empty"),
    bad(f"{DAMAGE} --trials 1 --resume", "resume needs out"),
    bad(f"{DAMAGE} --workers 0", "--workers must be at least 1, got 0"),
    bad(f"{DAMAGE} --workers -1", "--workers"),
    bad(f"{DAMAGE} --workers two", "--workers"),
    bad(f"{DAMAGE} --workers 2 --cluster tcp://127.0.0.1:1", "not allowed with"),
    bad(f"{DAMAGE} --workers 2 --device cuda", "workers compute on the CPU, got --device cuda"),
    bad(f"{DAMAGE} --cluster=", "--cluster is empty"),
    bad(f"{DAMAGE} --cluster abc:de", "--cluster abc:de: no scheduler answers there"),
    bad(f"{DAMAGE} --cluster tls://127.0.0.1:1", "--cluster tls://127.0.0.1:1: no scheduler answers there"),
    bad(f"{DAMAGE} --cluster tcp://127.0.0.1:1 --out new.sqlite", "no scheduler answers there"),
    bad(f"{DAMAGE} --until 0", "until"),
    bad(f"{DAMAGE} --until 1", "until"),
    bad(f"{DAMAGE} --until nan", "until"),
    bad(f"{DAMAGE} --until soon", "--until"),
    bad(f"{DAMAGE} --scratch nowhere --out new.sqlite", "nowhere"),
    bad(f"{DAMAGE} --plot curve.txt", ".png, .svg, .pdf"),
    bad(f"{DAMAGE} --plot nowhere/curve.png", "nowhere: no such folder"),
    bad(f"{DAMAGE} --probabilities 0 --plot curve.png", "above 0"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input(world, monkeypatch, capsys, arguments, said):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    before = tree(world)
    assert run(arguments.split() if isinstance(arguments, str) else arguments) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert said in err
    assert tree(world) == before


def test_bad_input_in_a_process_of_its_own(world):
    before = tree(world)
    process = started(["damage", "-e", "cut.safetensors", "--dataset", "digits"], world)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "cut.safetensors" in err
    assert tree(world) == before


# Anything at all: exit status 0 or 2, one line, never a traceback


def ends_well(arguments, capsys):
    """Run the command line in this process; an exception would come out of it."""
    capsys.readouterr()
    status = run(arguments)
    err = capsys.readouterr().err
    assert status in (0, 2), (arguments, err)
    if status == 2:
        assert err.replace("\r", "\n").rstrip().splitlines()[-1].startswith("python -m bnn_utils"), err
    return status


SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(data=st.data())
def test_a_damaged_checkpoint_is_told_or_does_no_harm(best, capsys, data):
    content = bytearray(best.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):  # most in the header, the smaller part
        most = data.draw(st.sampled_from([16, header, len(content)])) - 1
        content[data.draw(st.integers(0, most))] ^= 1 << data.draw(st.integers(0, 7))
    length = data.draw(st.one_of(st.just(len(content)), st.integers(0, header + 9), st.integers(0, len(content))))
    broken = best.parent.parent.parent / "broken.safetensors"
    broken.write_bytes(content[:length])
    try:
        status = ends_well(["evaluate", "-e", broken, "--dataset", "digits", "--limit", 2], capsys)
    finally:
        broken.unlink()
    assert (status == 0) <= (length == len(content))


WORDS = st.one_of(
    st.sampled_from(["digits", "images", "nan", "inf", "-1", "0", "1", "2", "1e-3", "1e400", "", ".", "/", "\0", "é"]),
    st.sampled_from(["flip", "burst", "none", "clip", "packed", "float32", "cpu", "a-file", "empty", "broken.sqlite"]),
    st.text(max_size=5),
)
OPTIONS = [
    "--probabilities",
    "--trials",
    "--storage",
    "--error",
    "--repair",
    "--seed",
    "--limit",
    "--until",
    "--device",
]
OPTIONS += ["--scratch", "--out", "--resume", "--data-path", "--dataset", "--workers", "--cluster", "-e", "--help"]


@SLOW
@given(
    command=st.sampled_from(["damage", "damage", "evaluate", "pack"]),
    drawn=st.lists(st.tuples(st.sampled_from(OPTIONS), st.lists(WORDS, max_size=2)), max_size=4),
)
def test_any_arguments(best, world, tmp_path, monkeypatch, capsys, command, drawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.1)
    arguments = [command, "-e", best]
    if command == "pack":
        arguments += ["-o", "x.safetensors"]
    else:
        arguments += ["--dataset", "digits", "--limit", 2]
    if command == "damage":
        arguments += ["--trials", 2, "--probabilities", "1e-2"]
    for option, values in drawn:
        if option == "--workers":  # processes take seconds to start
            values = [value for value in values if not value.isdigit()]
        arguments += [option, *values]
    with suppress(FileNotFoundError):
        Path("x.safetensors").unlink()
    ends_well(arguments, capsys)
