"""Training on two processes that torchrun starts: the same training as on one, one writer, and an end when one ends.

Run by torchrun, this file is also what the processes of the tests do: see `main`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bnn_utils import __main__ as cli
from bnn_utils import checkpoints, data, parallel
from bnn_utils.models import build
from bnn_utils.training import Recipe, train

pytestmark = pytest.mark.posix
ROOT = Path(__file__).parents[1]
TRAIN = ["train", "--model", "vgg_cifar10_binary", "--dataset", "digits", "--width", "0.02"]
# Without Adam, which makes whole steps of gradients that are zero but for rounding: those of biases before BatchNorm.
RECIPE = Recipe(epochs=3, batch_size=32, lr=2e-2, optimizer="sgd", damage_rate=0.1, damage_below=100.0)
RECIPES = {
    "vgg_cifar10_binary": RECIPE,
    "resnet_binary": replace(
        RECIPE, damage_spare=0.01, damage_statistics="running", label_smoothing=0.1, teacher_share=0.5, temperature=2.0
    ),
}
LAYERS = {
    "images": (nn.BatchNorm2d(3), (8, 3, 4, 5), torch.float64),
    "rows": (nn.BatchNorm1d(3), (8, 3), torch.float64),
    "not affine": (nn.BatchNorm1d(3, affine=False), (8, 3), torch.float64),
    "bfloat16": (nn.BatchNorm2d(3), (8, 3, 4, 5), torch.bfloat16),
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def started(*arguments):
    """Start two processes of `python ARGUMENTS`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, arguments)], env=ENVIRONMENT, cwd=ROOT, **pipes)


def finished(process):
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.terminate()  # of torchrun, which ends the others; nothing where it has ended
    return out, err


def history_of(folder):
    return pd.read_csv(folder / "history.csv", float_precision="round_trip")


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def trained(name):
    """Train a network in double precision; return its history and its state."""
    digits = data.digits()
    few = replace(
        digits, train=digits.train.limit(160), validation=digits.validation.limit(80), padding=1, flip=True
    )  # with crops and mirror images, so that augmentation's randomness counts too
    torch.manual_seed(0)
    model = nn.Sequential(Double(), build(name, width=0.02, in_channels=1, input_size=8)).double()
    for (
        module
    ) in model.modules():  # a sum of signs may equal its mean, and rounding would be the sign of their difference
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    kinds = [type(module) for module in model.modules()]
    teacher = None
    if RECIPES[name].teacher_share:
        teacher = nn.Sequential(Double(), build(name, width=0.02, in_channels=1, input_size=8, binary=False)).double()
    history = train(model, few, RECIPES[name], teacher=teacher, progress=False)
    assert [type(module) for module in model.modules()] == kinds
    return history.drop(columns="seconds").to_dict("list"), model.state_dict()


def normalized(name):
    """Normalize this process's share twice; return outputs, gradients and running statistics."""
    layer, shape, dtype = LAYERS[name]
    if dtype == torch.float64:
        layer = layer.double()
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = parallel.share((3 * x + 5).to(dtype)).requires_grad_()
    with parallel.whole_batch_norm(layer):
        first = layer(x)
        layer(2 * x.detach())
    (first * parallel.share(c)).sum().backward()
    gradients = {key: parallel.total(value.grad) for key, value in layer.named_parameters()}
    return dict(output=first.detach(), slope=x.grad), dict(gradients=gradients, state=layer.state_dict())


def main(out):
    with parallel.group(torch.device("cpu")):
        found = {name: trained(name) for name in RECIPES} | {name: normalized(name) for name in LAYERS}
    torch.save(found, Path(out) / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("two")
    process = started(__file__, folder)
    _, err = finished(process)
    assert process.returncode == 0, err
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(two, name):
    history, state = trained(name)
    for found_history, found_state in (found[name] for found in two):
        for column, values in history.items():
            np.testing.assert_allclose(found_history[column], values, rtol=1e-6, err_msg=column)
        torch.testing.assert_close(found_state, state, rtol=1e-6, atol=1e-6)
    (_, first), (_, second) = (found[name] for found in two)
    assert all(torch.equal(first[key], second[key]) for key in state)


@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_is_that_of_the_whole_batch(two, name):
    shares, common = normalized(name)  # alone: torch's own
    close = dict(rtol=2e-2, atol=2e-2) if LAYERS[name][2] == torch.bfloat16 else dict(rtol=1e-6, atol=1e-9)
    for key, whole in shares.items():
        torch.testing.assert_close(torch.cat([found[name][0][key] for found in two]), whole, **close)
    for _, found in (found[name] for found in two):
        torch.testing.assert_close(found, common, **close)


def test_one_process_writes_and_prints(tmp_path, capsys):
    # One step an epoch: the first loss is of the network as it was built, before rounding can grow.
    options = [*TRAIN, "--epochs", 2, "--batch-size", 1076, "--results-dir", tmp_path, "--save"]
    process = started("-m", "bnn_utils", *options, "two")
    out, err = finished(process)
    assert process.returncode == 0 and "Warning" not in err, err
    assert cli.main([*map(str, options), "one"]) == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    ]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"best.safetensors", "last.pt", "history.csv"}
    one, shared = (history_of(tmp_path / name) for name in ("one", "two"))
    assert list(shared) == list(one) and list(shared["epoch"]) == [1, 2]
    assert shared["train_loss"][0] == pytest.approx(one["train_loss"][0], rel=1e-4)
    (model, facts), (alone, expected) = (
        checkpoints.load(tmp_path / name / "best.safetensors") for name in ("two", "one")
    )
    assert list(model.state_dict()) == list(alone.state_dict())
    assert facts.keys() == expected.keys() and facts["recipe"] == expected["recipe"]
    assert facts["validation_accuracy"] == shared["validation_accuracy"].max()


def workers(launcher):
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return sorted(int(pid) for pid, parent, command in rows if int(parent) == launcher and "bnn_utils" in command)


def test_a_killed_process_ends_the_run_which_goes_on(tmp_path):
    epochs = 40
    options = [*TRAIN, "--epochs", epochs, "--batch-size", 256, "--results-dir", tmp_path]
    process = started("-m", "bnn_utils", *options, "--save", "run")
    deadline = time.monotonic() + 600
    while not (tmp_path / "run/last.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, finished(process)
        time.sleep(0.02)
    _, second = workers(process.pid)
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    _, err = finished(process)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("python -m bnn_utils train: error: ")]
    assert len(told) == 1 and "another process of this run has ended" in told[0] and "--resume" in told[0]
    assert "File" not in err.split("python -m bnn_utils train")[0]  # no traceback before it

    before = torch.load(tmp_path / "run/last.pt", weights_only=True)["rows"]
    assert 1 <= len(before) < epochs
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    process = started("-m", "bnn_utils", *options, "--resume", tmp_path / "run")
    _, err = finished(process)
    assert process.returncode == 0, err
    assert cli.main([*map(str, options), "--resume", str(tmp_path / "alone")]) == 0
    for name in ("run", "alone"):
        history = history_of(tmp_path / name)
        assert list(history["epoch"]) == list(range(1, epochs + 1))
        assert list(history["train_loss"][: len(before)]) == [row["train_loss"] for row in before]
        assert (tmp_path / name / "best.safetensors").is_file()


def test_a_batch_without_equal_shares_is_told_once(tmp_path):
    process = started("-m", "bnn_utils", *TRAIN, "--batch-size", 65, "--results-dir", tmp_path, "--save", "run")
    _, err = finished(process)
    assert process.returncode != 0
    assert err.count("error: a batch of 65 images has no equal shares for 2 processes\n") == 1
    assert set(re.findall(r"exitcode +: (-?\d+)", err)) == {"2"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [["--epochs", "x"], ["--epochs", "0"], ["--device", "cuda:0"]])
def test_what_is_wrong_everywhere_is_told_by_the_first(monkeypatch, capsys, wrong):
    waits = []

    def wait(seconds):
        waits.append((seconds, capsys.readouterr().err))

    def status():
        try:
            return cli.main([*TRAIN, *wrong])
        except SystemExit as stopped:
            return stopped.code

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(parallel.time, "sleep", wait)
    for name, value in dict(WORLD_SIZE=2, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    try:
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            assert status() == 2
            assert wrong[0][2:] in capsys.readouterr().err
            assert waits == [(parallel.WAIT_SECONDS, "")] * rank  # for the signal, before a word
        with pytest.raises(SystemExit) as stopped:
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        assert stopped.value.code == 2
    finally:
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    main(sys.argv[1])
