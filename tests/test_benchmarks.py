"""The benchmarks measure what they say: the same networks, work counted as it is, files written where they belong."""

import contextlib
import copy
import sys
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import common, inference, injection, popcount, runtimes, sweep
from benchmarks import training as training_benchmark
from bnn_utils import data, loops, models, training
from bnn_utils.layers import BINARIZED


def quick(benchmark, out, *more):
    """Run a benchmark with --quick and return its table."""
    benchmark.main(["--quick", "--threads", "1", "--out", str(out), *more])
    name = benchmark.__name__.rsplit(".", 1)[1]
    for kind in ("png", "svg"):
        assert (out / f"{name}.{kind}").stat().st_size > 1000
    table = pd.read_csv(out / f"{name}.csv")
    assert list(table.columns) == ["machine", *benchmark.COLUMNS]
    assert table["machine"].str.contains(f"torch {torch.__version__.split('+')[0]}", regex=False).all()
    assert (table["threads"] == 1).all()
    return table


@pytest.fixture(scope="module")
def inference_table(tmp_path_factory):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    return quick(inference, tmp_path_factory.mktemp("results"))


def test_inference_times_every_runtime_on_every_network(inference_table):
    expected = set(runtimes.RUNTIMES) - {"torch.compile float32"}
    for _, group in inference_table.groupby(["network", "width", "batch"]):
        assert set(group["runtime"]) == expected and len(group) == len(expected)
    assert set(inference_table["network"]) == set(models.MODELS)
    assert (inference_table["images_per_second"] > 0).all()
    assert (inference_table["best_images_per_second"] >= inference_table["images_per_second"]).all()
    assert (inference_table["packed_speedup"] > 0).all()


def test_inference_compares_the_same_network(inference_table):
    exact = inference_table[inference_table["runtime"].isin(["packed", "torch float32"])]
    assert len(exact) == 12
    assert (exact["same_class"] == 1).all()
    assert (exact[exact["runtime"] == "packed"]["packed_speedup"] == 1).all()


def test_inference_summary_takes_the_fastest_int8(inference_table):
    summary = inference.summary(inference_table)
    keys = ["network", "width", "batch"]
    int8 = inference_table[inference_table["runtime"].str.contains("int8")]
    assert summary["over_fastest_int8"].tolist() == int8.groupby(keys, sort=False)["packed_speedup"].min().tolist()


def test_inference_leaves_out_a_runtime_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    table = quick(inference, tmp_path, "--runtimes", "OpenVINO int8 latency")
    assert set(table["runtime"]) == {"packed", "torch float32"}
    assert "OpenVINO int8 latency skipped: openvino is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "width"), inference.QUICK_NETWORKS)
def test_deployable_is_the_same_network_with_constant_weights(name, width):
    network = common.random_network(name, width, seed=5)
    deployable = runtimes.deployable(network)
    x = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        torch.testing.assert_close(deployable(x), network(x), rtol=0, atol=1e-4)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = [layer.weight for layer in deployable.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(weight.abs(), torch.ones_like(weight)) == isinstance(layer, BINARIZED)


def test_int8_of_a_trained_network_keeps_most_of_its_classes(tmp_path):
    """With random weights nearly every class may change; of a trained network int8 keeps far more than chance."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    digits = data.digits()
    torch.manual_seed(0)
    network = models.vgg_cifar10_binary(width=0.06, in_channels=1, input_size=8)
    training.train(network, digits, training.Recipe(epochs=4, batch_size=64), progress=False)
    images, _ = digits.test[:]
    with torch.no_grad():
        classes = network(images).argmax(1).numpy()
        float32 = runtimes.onnxruntime_float32(network, images, 1, tmp_path).call().argmax(1)
        int8 = runtimes.onnxruntime_int8(network, images, 1, tmp_path).call().argmax(1)
    assert (float32 == classes).mean() > 0.99
    assert (int8 == classes).mean() > 0.4


def test_random_network_has_statistics_and_scales_of_both_signs():
    network, again = (common.random_network("vgg_cifar10_binary", 0.05) for _ in range(2))
    assert not network.training
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert all((norm.running_mean != 0).any() and (norm.running_var != 1).any() for norm in norms)
    assert all((norm.weight < 0).any() and (norm.weight > 0).any() for norm in norms if norm.affine)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())


def test_popcount_counts_the_work_of_the_full_vgg():
    table = models.summary(models.vgg_cifar10_binary())
    hidden = table[table["type"] == "BinarizeConv2d"]["macs"].tolist()[1:]
    assert [popcount.layer_call(*layer, images=1, threads=1)[1] for layer in popcount.LAYERS] == hidden


def test_popcount(tmp_path):
    table = quick(popcount, tmp_path)
    assert len(table) == len(popcount.LAYERS)
    for column in ("macs_per_second", "limit_per_second", "share_of_limit"):
        assert (table[column] > 0).all()


def test_popcount_loops_count_bits():
    for turn, adds in ((popcount.count, False), (popcount.count_and_add, True)):
        loop = popcount.register_loop(turn, chains=2, vectors=1, lanes=8)
        words = [5, 97 + 5]  # the first lanes
        for _ in range(3):
            words = [x.bit_count() + adds * x for x in words]
        assert loop(3) == sum(words)


def weighted(kept):
    """Return the ones in words of weights 1, 2 and 4."""
    return sum(word.bit_count() << level for level, word in enumerate(kept))


def test_the_carry_save_loop_counts_the_bits_of_eight_words():
    loop = popcount.register_loop(popcount.carry_save, chains=2, vectors=12, lanes=loops.CARRY_SAVE.lanes)
    chains = [[97 * vector + 5 for vector in range(first, first + 12)] for first in (0, 12)]  # the first lanes
    for turns in range(4):
        assert loop(turns) == sum(map(sum, chains))
        for chain in chains:
            (total, *kept), bits, replaced = chain[:4], chain[4:], []
            before = weighted(kept) + sum(word.bit_count() for word in bits)
            for level in range(3):
                carries = []
                for a, b in zip(bits[::2], bits[1::2], strict=True):
                    carries.append(a & b | kept[level] & (a | b))
                    kept[level] ^= a ^ b
                    replaced += [kept[level], carries[-1]]
                bits = carries
            assert weighted(kept) + 8 * bits[0].bit_count() == before
            chain[:] = [total + bits[0].bit_count(), *kept, *replaced[:8]]


def test_injection(tmp_path):
    table = quick(injection, tmp_path)
    assert set(table["storage"]) == {"float32", "packed", injection.DENSE}
    for column in ("seconds", "copy_seconds", "copies", "fresh_copy_seconds", "fresh_copies"):
        assert (table[column] > 0).all()
    flips = table.set_index(["storage", "probability"])["flips"]
    assert flips["float32", 1e-2] > flips["packed", 1e-2] > 0


def test_dense_injection_flips_the_right_share_and_undoes_it():
    parameters = [torch.randn(70, 90), torch.randn(11)]
    before = [parameter.clone() for parameter in parameters]
    flips = injection.dense_inject(parameters, 0.01, chunk=1000)
    assert all(map(torch.equal, parameters, before))
    bits = 32 * (70 * 90 + 11)
    assert abs(flips - 0.01 * bits) < 6 * np.sqrt(bits * 0.01 * 0.99)  # six standard deviations: one in 5e8


def test_sweep(tmp_path):
    table = quick(sweep, tmp_path)
    assert len(table) == len(sweep.PROBABILITIES) * len(sweep.REPAIRED) * 2
    assert (table["same_class"] == 1).all()
    assert (table[["damage_seconds", "evaluate_seconds"]] > 0).all(axis=None)
    once = table["damage_seconds"] + table["repair_seconds"] + table["pack_seconds"]
    total = once + table["evaluate_seconds"] / table["images"] * 10_000
    np.testing.assert_allclose(table["proportional_seconds_10000_images"], total)
    assert (table[table["engine"] == "packed"]["pack_seconds"] > 0).all()


def test_training(tmp_path):
    table = quick(training_benchmark, tmp_path, "--device", "cpu", "--workers", "1")
    contenders = list(zip(table["loop"], table["precision"], table["compiled"], strict=True))
    assert contenders == [own for own in training_benchmark.CONTENDERS.values() if not own.compiled]
    assert (table["device"] == "cpu").all()
    assert (table[["images_per_second", "first_seconds", "speedup"]] > 0).all(axis=None)
    assert (table["best_images_per_second"] >= table["images_per_second"]).all()
    assert (table[table["loop"] == "plain"]["speedup"] == 1).all()


def test_training_compares_within_rounds():
    setting = training_benchmark.Setting("resnet_binary", 0.1, "cpu", threads=1, workers=2, batch=10, steps=3)
    times = {"plain loop": [2.0, 3.0, 10.0], "library float32 compiled": [1.0, 2.0, 2.0]}
    plain, library = training_benchmark.rows(setting, times, dict.fromkeys(times, 7.0))
    assert (plain["images_per_second"], plain["best_images_per_second"], plain["speedup"]) == (10, 15, 1)
    assert (library["images_per_second"], library["best_images_per_second"], library["speedup"]) == (15, 30, 2)
    assert set(library) == set(training_benchmark.COLUMNS)
    assert library["rounds"] == 3 and library["compiled"] and library["first_seconds"] == 7


@pytest.mark.parametrize("name", models.MODELS)
def test_training_loops_take_the_same_step(name, monkeypatch):
    """On the same images in the same order, without crops and flips, from the same weights."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))
    images = common.random_images(16, size=32)
    dataset = data.Dataset(images, images, images, padding=0, flip=False)
    torch.manual_seed(0)
    start = models.build(name, width=0.1)
    recipe = training.Recipe(batch_size=16)
    plain, library = copy.deepcopy(start), copy.deepcopy(start)
    plain_result = training_benchmark.plain_loop(plain, dataset, recipe, workers=0)(1)
    library_result = training_benchmark.library_loop(library, dataset, recipe)(1)
    assert plain_result == pytest.approx(library_result, abs=1e-5)
    before = start.state_dict()
    for key, value in library.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value, rtol=0, atol=1e-5)
        assert not torch.equal(value, before[key])


def test_training_pictures_are_cropped_and_mirrored():
    pixels = torch.arange(1, 65, dtype=torch.uint8).repeat(1, 3, 64, 1)  # of every column a value of its own
    images = data.Images(pixels, torch.tensor([3]), (0.0,) * 3, (1.0,) * 3, "ramp", ("a",))
    pictures = training_benchmark.Pictures(data.Dataset(images, images, images, padding=4, flip=True))
    seen = set()
    for _ in range(200):
        picture, label = pictures[0]
        assert picture.shape == (3, 64, 64) and label == 3
        row = (picture[0, 32] * 255).round().int().tolist()
        mirrored = row[30] > row[34]
        seen.add((mirrored, (row[::-1] if mirrored else row)[32] - 33))
    assert seen == {(mirrored, shift) for mirrored in (False, True) for shift in range(-4, 5)}


def test_training_shuffles_without_end():
    drawn = list(islice(training_benchmark.shuffled(5), 15))
    assert all(sorted(drawn[start : start + 5]) == list(range(5)) for start in (0, 5, 10))


def test_training_leaves_out_what_cannot_be_compiled(monkeypatch, capsys):
    def prepare(contender, setting, cache):
        if contender.compiled:
            raise ValueError("torch.compile does not work here")
        return 1.0

    class Here:
        """Runs at once, in this process."""

        def submit(self, function, *arguments):
            self.value = function(*arguments)
            return self

        def result(self):
            return self.value

    monkeypatch.setattr(training_benchmark, "prepare", prepare)
    monkeypatch.setattr(training_benchmark, "take_turn", lambda steps: None)
    monkeypatch.setattr(training_benchmark, "_process", lambda: contextlib.nullcontext(Here()))
    setting = training_benchmark.Setting("resnet_binary", 0.1, "cpu", threads=1, workers=2, batch=10, steps=3)
    table = training_benchmark.measure(setting, list(training_benchmark.CONTENDERS), rounds=1, seconds=0)
    assert len(table) == 3 and not any(row["compiled"] for row in table)
    assert "library bfloat16 compiled skipped: torch.compile does not work here" in capsys.readouterr().out


def test_round_robin_takes_turns():
    order = []
    times = common.round_robin({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, seconds=0)
    assert "".join(order) == 2 * "aabb"  # each once untimed and once timed
    assert all(len(own) == 2 and min(own) > 0 for own in times.values())


@pytest.mark.parametrize("benchmark", [inference, popcount, injection, sweep, training_benchmark])
def test_quick_never_replaces_results(benchmark, capsys):
    for arguments in (["--quick"], ["--quick", "--out", str(common.RESULTS)]):
        with pytest.raises(SystemExit) as raised:
            benchmark.main(arguments)
        assert raised.value.code == 2
        assert "--quick needs --out with another folder" in capsys.readouterr().err


def test_threads_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        popcount.main(["--threads", "0"])
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err
