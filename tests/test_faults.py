"""Bit errors against independent counts on the stored bits: exact numbers, exact undo, the same from any machine."""

import copy
import hashlib
import subprocess
import sys
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binom, chi2
from torch import nn
from torch.nn.utils import prune

from bnn_utils import faults, flipping, repair
from bnn_utils.bits import sample_positions
from bnn_utils.faults import (
    ERRORS,
    PARAMETERS,
    ErrorModel,
    Flips,
    float32_storage,
    inject,
    inject_tensors,
    stored_tensors,
    targeted,
)
from bnn_utils.layers import BinarizeConv2d, BinarizeLinear, PReLU, Shift, binarize, binarized_weights
from bnn_utils.losses import flipped_weights
from bnn_utils.models import BiRealUnit, resnet_binary, resnet_bireal, vgg_cifar10_binary

FALSE_ALARM = 1e-6  # of a whole statistical test
SPECIAL = (0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0x00000001, 0x807FFFFF)
PATTERNS = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))


WAYS = pytest.mark.parametrize("compiled", [True, False], ids=["memory", "indexed"])


def one_way(monkeypatch, compiled):
    """Reach bits through compiled code, or through torch's indexing as on a GPU."""
    if not compiled:
        monkeypatch.setattr(faults, "bits_of", flipping.IndexedBits)


def vgg():
    torch.manual_seed(1)
    return vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8).eval()


def small():
    torch.manual_seed(2)
    return nn.Sequential(
        BinarizeConv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        BinarizeLinear(8, 3),
        nn.BatchNorm1d(3, affine=False),
    ).eval()


def bits_of(model):
    """Return every tensor's bits as numpy has them, in logical order, by state_dict name."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return {
        name: np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.itemsize]).reshape(-1).copy()
        for name, x in state.items()
    }


def stored_bits(model):
    """Return `bits_of` what float32 storage holds: weights of convolutions and linear layers as +1.0 or -1.0."""
    bits = bits_of(model)
    for name, tensor in model.state_dict().items():
        if name.endswith("weight") and tensor.dim() > 1:
            signs = np.where(tensor.numpy() >= 0, np.float32(1), np.float32(-1))
            bits[name] = signs.view(np.uint32).reshape(-1)
    return bits


def same(before, after):
    assert before.keys() == after.keys()
    return all(np.array_equal(before[name], after[name]) for name in before)


def in_order(words):
    """Return the bits of `words` in memory order, a bool each."""
    return np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)


def damaged_bits(model, probability, **arguments):
    with inject(model, probability, **arguments) as flips:
        return bits_of(model), flips


def parameters_of(model):
    return [name for name, _ in model.named_parameters()]


# How many bits flip, and which


def test_counts_are_binomial_in_every_tensor_and_bit_plane():
    model, p, seeds = vgg(), 1e-3, 150
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    per_tensor = dict.fromkeys(sizes, 0)
    per_plane = np.zeros(32, int)
    totals = []
    for seed in range(seeds):
        with inject(model, p, seed=seed) as flips:
            for name, count in flips.tensors.items():
                per_tensor[name] += count
            per_plane += flips.bits
            totals.append(flips.total)
    words = sum(sizes.values())
    seen = [(count, 32 * sizes[name] * seeds) for name, count in per_tensor.items()]
    seen += [(count, words * seeds) for count in per_plane]
    seen += [(count, 32 * words) for count in totals]
    alarm = FALSE_ALARM / len(seen)
    for count, n in seen:
        assert binom.ppf(alarm / 2, n, p) <= count <= binom.isf(alarm / 2, n, p)
    spread = np.sum((np.array(totals) - 32 * words * p) ** 2) / (32 * words * p * (1 - p))
    assert chi2.ppf(FALSE_ALARM / 2, seeds) < spread < chi2.isf(FALSE_ALARM / 2, seeds)  # not the same in every trial


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_many_flips_are_binomial_and_spread_evenly(p):
    model = vgg()
    before = stored_bits(model)
    after, flips = damaged_bits(model, p, seed=3)
    name = "features.14.weight"
    changed = np.unpackbits((before[name] ^ after[name]).view(np.uint8)).astype(int)
    parts = [part.sum() for part in np.array_split(changed, 8)]
    seen = [(flips.tensors[name], changed.size)] + [(n, changed.size // 8) for n in parts]
    assert changed.size % 8 == 0
    for count, n in seen:
        assert binom.ppf(FALSE_ALARM / 18, n, p) <= count <= binom.isf(FALSE_ALARM / 18, n, p)


def test_neighbouring_bits_flip_independently():
    model, p = vgg(), 0.2
    before = stored_bits(model)["features.14.weight"]
    after, _ = damaged_bits(model, p, seed=4, targets="features.14.weight")
    flipped = np.unpackbits((before ^ after["features.14.weight"]).view(np.uint8), bitorder="little").astype(bool)
    for distance in (1, 2, 32):
        pairs = np.stack([flipped[:-distance], flipped[distance:]])
        disjoint = pairs[:, : 2 * distance * (pairs.shape[1] // (2 * distance))].reshape(2, -1, 2 * distance)
        both = disjoint[:, :, :distance].all(0)  # pairs that share no bit
        assert binom.ppf(FALSE_ALARM / 6, both.size, p**2) <= both.sum() <= binom.isf(FALSE_ALARM / 6, both.size, p**2)


@pytest.mark.parametrize("build", [vgg, small, lambda: resnet_binary(width=0.02, in_channels=1, input_size=8, depth=8)])
def test_probability_zero_changes_nothing(build):
    model = build()
    after, flips = damaged_bits(model, 0.0, seed=0, targets="*")
    assert same(stored_bits(model), after)
    assert flips.total == 0
    assert flips.tensors == {}


@pytest.mark.parametrize("targets", [PARAMETERS, ("*",)])
def test_probability_one_inverts_every_targeted_bit(targets):
    model = vgg()
    before = stored_bits(model)
    hit = [name for name in before if "num_batches" not in name]
    if targets == PARAMETERS:
        hit = parameters_of(model)
    after, flips = damaged_bits(model, 1.0, seed=0, targets=targets)
    for name in before:
        assert np.array_equal(after[name], ~before[name] if name in hit else before[name]), name
    assert flips.total == 32 * sum(before[name].size for name in hit)


@pytest.mark.parametrize("p", [1e-4, 1e-2, 0.5])
def test_what_is_yielded_is_what_changed(p):
    model = vgg()
    before = stored_bits(model)
    after, flips = damaged_bits(model, p, seed=5, targets=(*PARAMETERS, "running_mean"))
    changed = {name: before[name] ^ after[name] for name in before}
    counts = {name: int(np.unpackbits(x.view(np.uint8)).sum()) for name, x in changed.items()}
    assert flips.tensors == {name: count for name, count in counts.items() if count}
    words = np.concatenate([x for x in changed.values() if x.dtype == np.uint32])
    planes = [int(np.sum(words >> bit & 1)) for bit in range(32)]
    assert flips.bits.tolist() == planes
    assert flips.total == sum(counts.values()) > 0


def test_weights_of_a_float_network_err_as_the_floats_that_they_are():
    model = vgg_cifar10_binary(width=0.02, in_channels=1, input_size=8, binary=False)
    layers = ("features.3.weight", "classifier.3.weight")
    assert {stored_tensors(model)[name].kind for name in layers} == {"float_weights"}
    before = bits_of(model)
    after, flips = damaged_bits(model, 0.1, seed=6, targets="float_weights")
    changed = {name: int(np.unpackbits((before[name] ^ after[name]).view(np.uint8)).sum()) for name in before}
    assert flips.tensors == {name: count for name, count in changed.items() if count}
    assert set(layers) < set(flips.tensors) and flips.bits.min() > 0
    assert same(before, bits_of(model))


def test_flips_without_any():
    assert Flips().total == 0
    assert Flips().bits.shape == (32,)


# Undo


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([1e-3, 0.1, 1.0]), st.sampled_from([None, ValueError, KeyboardInterrupt]))
def test_undo_is_exact_on_any_bits(data, p, raised):
    model = small()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            pattern = data.draw(hnp.arrays(np.uint32, tuple(tensor.shape), elements=PATTERNS))
            tensor.detach().view(torch.int32).copy_(torch.from_numpy(pattern.view(np.int32)))
    before = bits_of(model)
    try:
        with inject(model, p, seed=6, targets="*"):
            if raised is not None:
                raise raised
    except (ValueError, KeyboardInterrupt) as error:
        assert type(error) is raised
    assert same(before, bits_of(model))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_undo_after_many_flips_and_inside_another_injection(layout):
    model = vgg().to(memory_format=layout)
    plain = bits_of(model)
    with inject(model, 0.3, seed=7):
        outer = bits_of(model)
        with pytest.raises(RuntimeError), inject(model, 0.4, seed=8, targets="*"):
            raise RuntimeError
        assert same(outer, bits_of(model))
    assert same(plain, bits_of(model))


def test_interrupted_while_flipping(monkeypatch):
    model = vgg()
    before = bits_of(model)
    seen = []

    def runs(total, probability, length, generator):
        seen.append(total)
        yield np.arange(40)
        assert len(seen) < 4 or not same(before, bits_of(model))
        if len(seen) == 4:
            raise KeyboardInterrupt
        yield np.arange(40, 64)

    monkeypatch.setattr(faults, "sample_runs", runs)
    with pytest.raises(KeyboardInterrupt), inject(model, 0.5, seed=0):
        pytest.fail("the injection went on")
    assert same(before, bits_of(model))


@WAYS
@pytest.mark.parametrize("p", [0.01, 0.5])  # a list of flips, and a copy
def test_two_chunks_that_share_a_word_are_undone(monkeypatch, compiled, p):
    one_way(monkeypatch, compiled)
    model = small()
    stored = stored_bits(model)
    monkeypatch.setattr(faults, "sample_runs", lambda *_: iter([np.array([0, 5, 31]), np.array([32 - 1 - 7, 33])]))
    with float32_storage(model):  # so that it is not the latent weights that come back
        after, flips = damaged_bits(model, p, seed=0, targets="3.weight")
        assert same(stored, bits_of(model))
    expected = stored["3.weight"].copy()
    expected[0] ^= (1 << 0) + (1 << 5) + (1 << 31) + (1 << 24)
    expected[1] ^= 1 << 1
    assert np.array_equal(after["3.weight"], expected)
    assert flips.total == 5


@WAYS
def test_positions_beyond_32_bits(monkeypatch, compiled):
    one_way(monkeypatch, compiled)
    monkeypatch.setattr(faults, "sample_runs", lambda *_: iter([np.array([5, 31, 2**32 + 5, 2**32 + 33])]))
    large = nn.Module()
    large.register_buffer("weight", torch.empty(2**27 + 2))  # memory that is not touched is not taken
    ends = torch.tensor([0, 1, 2**27, 2**27 + 1])
    large.weight[ends] = 1.0
    with inject(large, 1e-9, seed=0) as flips:
        changed = large.weight[ends].view(torch.int32) ^ torch.ones(4).view(torch.int32)
        assert changed.tolist() == [(1 << 5) - (1 << 31), 0, 1 << 5, 1 << 1]
        assert np.flatnonzero(flips.bits).tolist() == [1, 5, 31]
    assert large.weight[ends].tolist() == [1.0] * 4


@WAYS
def test_a_parameter_without_dimensions(monkeypatch, compiled):
    one_way(monkeypatch, compiled)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    model = Scaled()
    with inject(model, 1.0, seed=0, targets="scale") as flips:
        assert model.scale.detach().numpy().reshape(1).view(np.uint32)[0] == 0xFFFFFFFF ^ 0x40000000
        assert flips.total == 32
    assert model.scale.item() == 2.0
    monkeypatch.setattr(faults, "sample_runs", lambda *_: iter([np.array([3, 31])]))
    with inject(model, 0.01, seed=0, targets="scale", error="asymmetric") as flips:
        assert model.scale.detach().numpy().reshape(1).view(np.uint32)[0] & 0x7FFFFFF7 == 0x40000000
        assert flips.total > 0
    assert model.scale.item() == 2.0


# The same flips from anywhere


def digest(model, **arguments):
    after, _ = damaged_bits(model, 0.01, seed=9, **arguments)
    return hashlib.sha256(b"".join(name.encode() + after[name].tobytes() for name in sorted(after))).hexdigest()


def test_same_seed_same_flips():
    assert digest(vgg()) == digest(vgg())
    one, other = (damaged_bits(vgg(), 0.01, seed=seed)[0] for seed in (9, 10))
    assert not same(one, other)


def test_the_stream_of_a_tensor_follows_from_seed_and_name():
    model = vgg()
    before = stored_bits(model)
    after, _ = damaged_bits(model, 0.01, seed=9)
    for name in parameters_of(model):
        generator = np.random.Generator(np.random.SFC64([9, zlib.crc32(name.encode())]))
        positions = [*sample_positions(32 * len(before[name]), 0.01, generator)]
        flipped = np.flatnonzero(in_order(before[name] ^ after[name]))
        assert flipped.tolist() == [at for own in positions for at in own], name


def test_threads_processes_and_the_way_to_bits_do_not_matter():
    code = (
        "import sys, torch; sys.path.insert(0, 'tests')\n"
        "import test_faults as t\n"
        "t.faults.bits_of = t.flipping.IndexedBits\n"
        "for threads in (1, 2):\n"
        "    torch.set_num_threads(threads)\n"
        "    print(t.digest(t.vgg()))\n"
    )
    root = Path(faults.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [digest(vgg())] * 2


def test_order_of_targets_does_not_matter():
    assert digest(vgg(), targets=PARAMETERS) == digest(vgg(), targets=PARAMETERS[::-1])
    assert digest(vgg(), targets=PARAMETERS) == digest(vgg(), targets=parameters_of(vgg())[::-1])


def test_memory_layout_does_not_matter():
    model = vgg().to(memory_format=torch.channels_last)
    assert not model.features[3].weight.is_contiguous()
    assert digest(model) == digest(vgg())


def test_flips_of_a_tensor_do_not_depend_on_the_other_targets():
    model = vgg()
    everything, _ = damaged_bits(model, 0.01, seed=11, targets="*")
    stored = stored_bits(model)
    for name in ("features.3.weight", "features.3.bias", "features.5.running_var"):
        alone, flips = damaged_bits(model, 0.01, seed=11, targets=(name,))
        assert np.array_equal(alone[name], everything[name])
        assert set(flips.tensors) <= {name}
        assert all(np.array_equal(alone[other], stored[other]) for other in stored if other != name)


def test_tensors_of_one_size_flip_in_different_places():
    model = vgg()
    before = stored_bits(model)
    after, _ = damaged_bits(model, 0.5, seed=12)
    bias, shift = (before[name] ^ after[name] for name in ("classifier.0.bias", "classifier.3.bias"))
    assert bias.shape == shift.shape
    assert not np.array_equal(bias, shift)


# Targets


def test_targets_by_kind_name_and_pattern():
    model = vgg()
    names = set(model.state_dict())
    weights = {name for name in names if name.endswith("weight") and model.state_dict()[name].dim() > 1}
    scales = {name for name in names if name.endswith("weight")} - weights
    assert set(targeted(model, ("weights",))) == weights
    assert set(targeted(model, "weights")) == weights
    assert set(targeted(model, ("bn_scale",))) == scales
    assert set(targeted(model, ("biases",))) == {name.replace("weight", "bias") for name in weights}
    assert set(targeted(model, ("bn_shift",))) == {name.replace("weight", "bias") for name in scales}
    assert set(targeted(model, ("running_var",))) == {name for name in names if name.endswith("running_var")}
    assert set(targeted(model)) == set(parameters_of(model))
    assert set(targeted(model, ("classifier.0.bias",))) == {"classifier.0.bias"}
    assert set(targeted(model, ("classifier.*",))) == {
        name for name in names if name.startswith("classifier.") and "num_batches" not in name
    }
    assert set(targeted(model, ("bn_scale", "*.0.weight"))) == scales | {"features.0.weight", "classifier.0.weight"}
    kinds = {"weights", "biases", "bn_scale", "bn_shift", "running_mean", "running_var"}
    assert {stored.kind for stored in stored_tensors(model).values()} == kinds < set(faults.KINDS)
    assert all(stored.mask is None for stored in stored_tensors(model).values())


def test_running_statistics_are_hit_only_when_named():
    model = vgg()
    before = bits_of(model)
    after, _ = damaged_bits(model, 1.0, seed=0)
    buffers = [name for name, _ in model.named_buffers()]
    assert all(np.array_equal(after[name], before[name]) for name in buffers)
    after, flips = damaged_bits(model, 1.0, seed=0, targets=("running_mean", "features.5.running_var"))
    for name in buffers:
        hit = name.endswith("running_mean") or name == "features.5.running_var"
        assert np.array_equal(after[name], ~before[name] if hit else before[name]), name
        assert (name in flips.tensors) == hit


def test_default_targets_suit_a_network_without_batchnorm():
    model = nn.Sequential(BinarizeLinear(3, 2, bias=False))
    assert set(targeted(model)) == {"0.weight"}
    _, flips = damaged_bits(model, 1.0, seed=0)
    assert flips.tensors == {"0.weight": 192}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(probability=-0.1),
        dict(probability=1.0000001),
        dict(probability=float("nan")),
        dict(probability=float("inf")),
        dict(seed=-1),
        dict(error="stuck"),
        dict(error=""),
        dict(targets=("weights", "nothing")),
        dict(targets="features.99.weight"),
        dict(targets=("features.1.num_batches_tracked",)),
    ],
)
def test_wrong_arguments(arguments):
    model = vgg()
    before = bits_of(model)
    arguments = dict(probability=0.5, seed=0) | arguments
    with pytest.raises(ValueError), inject(model, **arguments):
        pytest.fail("the injection went on")
    assert same(before, bits_of(model))


def test_other_precisions_are_refused_and_nothing_changes():
    model = vgg()
    model.classifier[3].double()  # what comes before it in memory is damaged by then
    before = bits_of(model)
    with pytest.raises(TypeError, match="float32"), inject(model, 0.5, seed=0):
        pytest.fail("the injection went on")
    assert same(before, bits_of(model))


class EveryName(nn.Module):
    """Parameters of many names, and buffers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4))
        self.recurrent = nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3)
        self.norm, self.embedding = nn.LayerNorm(4), nn.Embedding(3, 4)
        self.slope, self.own_slope, self.shift = nn.PReLU(4), PReLU(4), Shift(4)
        self.listed = nn.ParameterList([torch.randn(2), torch.randn(())])
        self.convolution = nn.utils.parametrizations.weight_norm(BinarizeConv2d(2, 3, 3))
        self.pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
        self.scaled = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.randn(4))
        self.register_buffer("index", torch.zeros(3, 3, dtype=torch.int64))
        self.register_buffer("allowed", torch.ones(3, 3, dtype=torch.bool))


@WAYS
def test_every_parameter_of_any_name_is_damaged_and_no_buffer(monkeypatch, compiled):
    one_way(monkeypatch, compiled)
    for model in (EveryName(), resnet_bireal(width=0.05, input_size=8)):
        parameters = dict(model.named_parameters())
        binarized = {name for name, module in model.named_modules() if isinstance(module, BinarizeConv2d)}
        before = {name: x.detach().clone() for name, x in model.state_dict().items()}
        assert list(targeted(model)) == list(parameters)
        with inject(model, 1.0, seed=0) as flips:
            assert flips.tensors == {name: 32 * x.numel() for name, x in parameters.items()}
            for name, x in model.state_dict().items():
                old = before[name]
                if name.removesuffix(".weight") in binarized:
                    old = binarize(old)
                if name in parameters:
                    assert torch.equal(x.view(torch.int32), ~old.view(torch.int32)), name
                else:
                    assert torch.equal(x, old), name
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_kinds_of_parameters_and_buffers_of_any_name():
    model, modern = EveryName(), resnet_bireal(width=0.05, input_size=8)
    of_kind = {
        kind: {name for name, held in stored_tensors(model).items() if held.kind == kind} for kind in faults.KINDS
    }
    assert of_kind["slopes"] == {"slope.weight", "own_slope.weight"}
    assert of_kind["shifts"] == {"shift.shift"}
    assert of_kind["weights"] == set()
    assert of_kind["float_weights"] == {"norm.weight", "embedding.weight", "attention.out_proj.weight"}
    assert of_kind["bn_scale"] == {"scaled.weight"}
    assert of_kind["buffers"] == {"table", "pruned.weight_mask"}
    recurrent = {name for name, _ in model.named_parameters() if name.startswith("recurrent.")}
    assert {"token", "attention.in_proj_bias", "listed.0", "pruned.weight_orig"} | recurrent < of_kind["others"]
    assert not {name for name in stored_tensors(model) if "index" in name or "allowed" in name}
    units = {name for name, module in modern.named_modules() if isinstance(module, BiRealUnit)}
    assert set(targeted(modern, "shifts")) == {f"{unit}.shift.shift" for unit in units}
    assert set(targeted(modern, "slopes")) == {f"{unit}.act.weight" for unit in units}
    with inject(model, 1.0, seed=0, targets=["buffers", "listed.1"]) as flips:
        assert flips.tensors == {"table": 128, "pruned.weight_mask": 16 * 32, "listed.1": 32}


# Shared memory


class Tied(nn.Module):
    """A language model's way to share: what embeds a word also tells it; and two binarized layers with one weight."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = first or nn.Embedding(64, 64)
        self.second = second or nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.again = self.second

    def forward(self, x):
        return self.again(self.second(x))


def binarized_pair():
    return Tied(BinarizeLinear(64, 64, bias=False), BinarizeLinear(64, 64, bias=False))


@WAYS
@pytest.mark.parametrize("build", [Tied, binarized_pair])
@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_what_is_shared_is_stored_once_and_damaged_once(monkeypatch, compiled, build, p):
    one_way(monkeypatch, compiled)
    model = build()
    names = [name for name, _ in model.named_parameters()]
    assert list(targeted(model)) == names and "second.weight" not in names
    before = bits_of(model)
    with float32_storage(model):
        stored = bits_of(model)
        after, flips = damaged_bits(model, p, seed=1)
    for name in names:
        count, n = int(in_order(stored[name] ^ after[name]).sum()), 32 * stored[name].size
        assert flips.tensors[name] == count
        assert binom.ppf(FALSE_ALARM / 24, n, p) <= count <= binom.isf(FALSE_ALARM / 24, n, p)
    assert flips.total == sum(flips.tensors.values())
    assert same(before, bits_of(model))
    assert repair.stored_bits(model) == 32 * sum(x.numel() for x in model.parameters())


def test_shared_binarized_weights_are_held_and_given_back():
    model = binarized_pair()
    before, x = bits_of(model), torch.randn(3, 64)
    expected = model(x)
    with float32_storage(model):
        assert model.first.weight.abs().eq(1).all() and torch.equal(model(x), expected)
    assert same(before, bits_of(model))
    assert list(binarized_weights(model)) == ["first.weight"]
    with flipped_weights(model, 1.0, np.random.default_rng(0)) as count:
        assert count == 64 * 64
        assert np.array_equal(model.first.weight.detach().flatten() >= 0, (before["first.weight"] >> 31) == 1)
    assert same(before, bits_of(model))


def test_a_weight_that_a_float_layer_reads_too_is_stored_as_trained():
    model = Tied(BinarizeLinear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    before, x = bits_of(model), torch.randn(3, 64)
    expected = model.first(model(x))
    with inject(model, 0.0, seed=0):
        assert torch.equal(model.first(model(x)), expected)
    after, flips = damaged_bits(model, 1.0, seed=0)
    assert np.array_equal(after["first.weight"], ~before["first.weight"])
    assert flips.total == 32 * 64 * 64


def test_tensors_in_one_memory_are_refused_and_neighbours_are_not():
    flat = torch.randn(100)
    model = nn.Sequential(nn.Linear(5, 10, bias=False), nn.Linear(5, 10, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(flat[:50].view(10, 5)), nn.Parameter(flat[50:].view(10, 5))
    with inject(model, 1.0, seed=0) as flips:  # as a GPU's LSTM keeps its weights
        assert flips.total == 3200
    before = flat.clone()
    for start in (0, 1, 49):
        model[1].weight = nn.Parameter(flat[start : start + 50].view(5, 10).T)
        with pytest.raises(TypeError, match=r"0\.weight and 1\.weight .*same memory.*second\.weight = first\.weight"):
            inject(model, 1.0, seed=0).__enter__()
        with pytest.raises(TypeError, match="same memory"):
            repair.stored_bits(model)
        assert torch.equal(flat, before)
        with inject(model, 1.0, seed=0, targets="0.weight") as flips:
            assert flips.total == 1600
    with pytest.raises(TypeError, match=r"x and y .*same memory"), inject_tensors({"x": flat, "y": flat}, 1, seed=0):
        pytest.fail("it damaged")


# Networks that are refused


def quantized(network):
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear, nn.LSTM}, dtype=torch.qint8)


def holding(tensor, parameter=True):
    layer = nn.Linear(3, 3)
    layer.scale = nn.Parameter(tensor, requires_grad=False) if parameter else None
    if not parameter:
        layer.register_buffer("words", tensor)
    return nn.Sequential(layer, nn.BatchNorm1d(3))


REFUSED = {
    "quantized Linear": (lambda: quantized(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), "0._packed.*quantized"),
    "quantized LSTM": (lambda: quantized(nn.Sequential(nn.BatchNorm1d(3), nn.LSTM(3, 3))), "1..*quantized"),
    "script": (lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 3))), "network .*TorchScript"),
    "traced": (lambda: torch.jit.trace(BinarizeLinear(3, 3), torch.ones(1, 3)), "network .*TorchScript"),
    "exported": (lambda: torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),)).module(), "network .*graph"),
    "bytes": (lambda: holding(torch.ones(9, dtype=torch.int8)), "0.scale .*torch.int8.*float network"),
    "words": (lambda: holding(torch.ones(3, 3, dtype=torch.int32), False), "0.words .*torch.int32.*float network"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight .*run the network"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "weight .*meta"),
    "sparse": (lambda: holding(torch.eye(3).to_sparse()), "0.scale .*sparse"),
    "complex": (lambda: holding(torch.ones(3, dtype=torch.complex64)), "0.scale .*float32.*complex64"),
    "half": (lambda: holding(torch.ones(3).half()), "0.scale .*float32.*float16"),
    "expanded": (lambda: holding(torch.ones(1).expand(3)), r"0.scale .*share a place.*contiguous\(\)"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it will drop
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_damaged_is_refused_by_name(case):
    build, message = REFUSED[case]
    model = build()
    for p in (0.0, 1.0):
        with pytest.raises(TypeError, match=message), inject(model, p, seed=0):
            pytest.fail("it damaged")


def test_a_network_that_stores_nothing_is_refused():
    for model, targets in ((nn.Sequential(nn.ReLU()), PARAMETERS), (vgg(), "slopes")):
        with (
            pytest.raises(ValueError, match="name nothing that this network"),
            inject(model, 1, seed=0, targets=targets),
        ):
            pytest.fail("it damaged")
    with inject(vgg(), 1.0, seed=0, targets=()) as flips:
        assert flips.total == 0


# Float32 storage


def test_a_held_network_is_left_as_it_is(monkeypatch):
    model = vgg()
    latent, stored = bits_of(model), stored_bits(model)
    with float32_storage(model):
        with monkeypatch.context() as patch:
            patch.setattr(faults, "binarize", lambda _: pytest.fail("passes over the weights again"))
            with inject(model, 0.3, seed=0):
                damaged = bits_of(model)
                with float32_storage(model), inject(model, 0.0, seed=0):
                    assert same(damaged, bits_of(model))
                assert same(damaged, bits_of(model))
        assert same(stored, bits_of(model))
    assert same(latent, bits_of(model))


def test_exceptions_end_the_hold_and_the_next_one_works():
    model = vgg()
    latent, stored = bits_of(model), stored_bits(model)
    for _ in range(2):
        with pytest.raises(RuntimeError), float32_storage(model):
            with pytest.raises(KeyError), float32_storage(model), inject(model, 0.3, seed=0):
                raise KeyError
            assert same(stored, bits_of(model))
            raise RuntimeError
        assert same(latent, bits_of(model))


def test_two_networks_are_held_apart():
    one, other = vgg(), vgg()
    with float32_storage(one):
        with float32_storage(other):
            assert same(stored_bits(one), bits_of(other))
        assert not same(stored_bits(one), bits_of(other))
        assert same(stored_bits(one), bits_of(one))


def test_weights_are_stored_as_signs_and_given_back():
    model = vgg()
    latent, stored = bits_of(model), stored_bits(model)
    assert not same(latent, stored)
    with float32_storage(model):
        assert same(stored, bits_of(model))
        with float32_storage(model):
            assert same(stored, bits_of(model))
        assert same(stored, bits_of(model))
    assert same(latent, bits_of(model))


def test_undamaged_network_computes_the_same():
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for model in (vgg(), resnet_binary(width=0.02, in_channels=1, input_size=8).eval()):
        with torch.no_grad():
            plain = model(x)
            with inject(model, 0.0, seed=0):
                assert torch.equal(model(x), plain)
            with inject(model, 0.5, seed=0):
                assert not torch.equal(model(x), plain)
            assert torch.equal(model(x), plain)


def acts_as(pattern):
    """Return the sign a stored number acts with, from the IEEE 754 fields alone."""
    exponent, fraction = pattern >> 23 & 0xFF, pattern & 0x7FFFFF
    if exponent == 0xFF and fraction:
        return -1.0  # NaN
    if exponent == 0 and fraction == 0:
        return 1.0  # both zeros
    return -1.0 if pattern >> 31 else 1.0


@pytest.mark.parametrize(("value", "pattern"), [(1.0, 0x3F800000), (-1.0, 0xBF800000)])
def test_one_and_two_flips_of_a_stored_weight(value, pattern):
    masks = [1 << bit for bit in range(32)]
    masks += [(1 << one) ^ (1 << other) for one, other in combinations(range(32), 2)]
    damaged = np.array([pattern ^ mask for mask in masks], np.uint32)
    acting = binarize(torch.from_numpy(damaged.view(np.float32)))
    assert acting.tolist() == [acts_as(int(x)) for x in damaged]
    changed = acting.numpy() != value
    by_sign = np.array([mask >> 31 == 1 for mask in masks])
    nan = np.isnan(damaged.view(np.float32))
    assert changed[:32].tolist() == [False] * 31 + [True]  # alone, only the sign bit matters
    assert np.array_equal(changed[~nan], by_sign[~nan])
    assert nan.sum() == 23  # bit 30 and one bit of the fraction


def test_damaged_layer_acts_by_the_signs_of_its_bits():
    torch.manual_seed(3)
    layer = BinarizeLinear(40, 30, bias=False, binarize_input=False)
    with torch.no_grad(), inject(layer, 0.1, seed=1):
        acting = layer(torch.eye(40)).T
        expected = [acts_as(int(x)) for x in bits_of(layer)["weight"]]
    assert acting.flatten().tolist() == expected


def test_a_flipped_sign_bit_changes_exactly_its_weight(monkeypatch):
    torch.manual_seed(4)
    layer = BinarizeLinear(6, 5, bias=False, binarize_input=False)
    plain = layer(torch.eye(6)).T.detach().flatten()
    for word in range(30):
        monkeypatch.setattr(faults, "sample_runs", lambda *_, at=word: iter([np.array([32 * at + 31])]))
        with torch.no_grad(), inject(layer, 0.5, seed=0):
            acting = layer(torch.eye(6)).T.flatten()
        assert torch.nonzero(acting != plain).flatten().tolist() == [word]


# Packed storage, on a network that has nothing but buffers


class PackedLayer(nn.Module):
    """Buffers as a packed layer has them, of random bits."""

    def __init__(self, threshold, masked, seed):
        super().__init__()
        generator = np.random.default_rng(seed)
        sizes = {
            "weight": (torch.int64, (40, 3)),
            "threshold": (threshold, (70,)),
            "direction": (torch.int64, (2,)),
            "bias": (torch.float32, (11,)),
            "scale": (torch.float32, (3,)),
            "shift": (torch.float32, (3,)),
        }
        for name, (dtype, shape) in sizes.items():
            raw = bytearray(generator.bytes(int(np.prod(shape)) * dtype.itemsize))
            self.register_buffer(name, torch.frombuffer(raw, dtype=dtype).view(shape))
        self.masks = {}
        if masked:  # 130 inputs, so two bits of the third word, and 70 directions
            self.masks["weight"] = torch.tensor([-1, -1, 3]).expand(40, 3)
            self.masks["direction"] = torch.tensor([-1, 63])


def packed():
    return nn.Sequential(PackedLayer(torch.int16, True, 0), nn.Identity(), PackedLayer(torch.int32, False, 1))


def used_bits(model):
    """Return, by name, which bits hold something."""
    used = {name: np.ones(8 * tensor.nbytes, bool) for name, tensor in model.state_dict().items()}
    used["0.weight"] = np.tile(np.arange(192) < 130, 40)
    used["0.direction"] = np.arange(128) < 70
    return used


MODELS = [*ERRORS, ErrorModel("", "", zero_to_one=0.3, one_to_zero=0.7), ErrorModel("", "", 0.9, 0.4, length=3)]


def test_kinds_and_masks_of_a_packed_network():
    model = packed()
    stored = stored_tensors(model)
    assert list(stored) == list(model.state_dict())
    assert [kind for kind, _, _ in stored.values()] == 2 * [
        "weights",
        "thresholds",
        "directions",
        "biases",
        "bn_scale",
        "bn_shift",
    ]
    assert {name for name, held in stored.items() if held.mask is not None} == {"0.weight", "0.direction"}
    assert stored["0.weight"].mask is model[0].masks["weight"]
    assert set(targeted(model)) == set(stored)
    assert set(targeted(model, "thresholds")) == {"0.threshold", "2.threshold"}
    assert set(targeted(model, ("directions", "0.*"))) == {name for name in stored if name < "1"} | {"2.direction"}
    assert targeted(model, "thresholds")["0.threshold"] is model[0].threshold
    model[0].register_buffer("offset", torch.ones(3))
    model[0].register_buffer("slope", torch.ones(3))
    model[0].register_buffer("table", torch.ones(3, dtype=torch.uint8))
    kinds = {name: held.kind for name, held in stored_tensors(model).items()}
    assert [kinds[f"0.{key}"] for key in ("offset", "slope", "table")] == ["shifts", "slopes", "others"]
    assert list(targeted(model)) == list(model.state_dict())


def test_integers_of_an_ordinary_layer_are_not_stored():
    layer = nn.Linear(2, 2)
    layer.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    assert list(stored_tensors(layer)) == ["weight", "bias"]


@WAYS
def test_every_used_bit_inverts_at_probability_one_and_no_other(monkeypatch, compiled):
    one_way(monkeypatch, compiled)
    model = packed()
    before, used = bits_of(model), used_bits(model)
    after, flips = damaged_bits(model, 1.0, seed=0)
    for name in before:
        assert np.array_equal(in_order(before[name] ^ after[name]), used[name]), name
    assert flips.tensors == {name: int(bits.sum()) for name, bits in used.items()}
    assert flips.bits.shape == (64,)


@WAYS
@pytest.mark.parametrize("p", [0.003, 0.2])
def test_used_bits_flip_with_the_probability_and_unused_ones_never(monkeypatch, compiled, p):
    one_way(monkeypatch, compiled)
    model, seeds = packed(), 60
    before, used = bits_of(model), used_bits(model)
    changed = dict.fromkeys(used, 0)
    for seed in range(seeds):
        after, _ = damaged_bits(model, p, seed=seed)
        for name in before:
            flipped = in_order(before[name] ^ after[name])
            assert not (flipped & ~used[name]).any(), name
            changed[name] += flipped
    alarm = FALSE_ALARM / 2 / (64 * len(used))
    for name, counts in changed.items():
        size = 8 * before[name].itemsize
        for bit in range(size):  # each position in the element by itself
            n = seeds * used[name][bit::size].sum()
            count = counts[bit::size].sum()
            assert binom.ppf(alarm, n, p) <= count <= binom.isf(alarm, n, p), (name, bit)


# Models of errors


@pytest.mark.parametrize("name", ERRORS)
def test_error_models_say_what_they_are(name):
    error = ERRORS[name]
    assert error.meaning.endswith(".") and ". " not in error.meaning
    assert error.source.endswith(".")


def test_error_models_by_name():
    rates = {name: (error.zero_to_one, error.one_to_zero) for name, error in ERRORS.items()}
    assert rates["flip"] == rates["burst"] == (1, 1)
    assert rates["stuck-at-0"] == (0, 1)
    assert rates["stuck-at-1"] == (1, 0)
    assert rates["asymmetric"][0] > rates["asymmetric"][1] > 0  # high resistance, 0, is the weaker state
    assert {name for name, error in ERRORS.items() if error.length > 1} == {"burst"}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(zero_to_one=-0.1),
        dict(one_to_zero=1.1),
        dict(zero_to_one=float("nan")),
        dict(zero_to_one=0.0, one_to_zero=0.0),
        dict(length=0),
        dict(positions=(3, 64)),
        dict(positions=(-1,)),
    ],
)
def test_wrong_error_models(arguments):
    with pytest.raises(ValueError, match="|".join(arguments)):
        ErrorModel("", "", **arguments)


def test_an_unknown_error_model_is_told_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(ERRORS)), inject(small(), 0.5, seed=0, error="flop"):
        pass


def test_positions_confine_errors_to_some_bits_of_each_element():
    """The bits that may err do so as in the trial where all may; no other bit does."""
    model = packed()
    before, used, size = bits_of(model), used_bits(model), {}
    chosen = (0, 5, 15, 31)
    every, _ = damaged_bits(model, 0.2, seed=3)
    some, flips = damaged_bits(model, 0.2, seed=3, error=ErrorModel("", "", positions=chosen))
    for name in before:
        size = 8 * before[name].itemsize
        may = np.isin(np.arange(used[name].size) % size, chosen)
        assert np.array_equal(in_order(before[name] ^ some[name]), in_order(before[name] ^ every[name]) & may), name
    assert flips.total > 0 and {position for position in range(64) if flips.bits[position]} <= set(chosen)


@pytest.mark.parametrize("error", MODELS)
@pytest.mark.parametrize("p", [0.02, 0.5])
def test_bits_err_at_the_rate_of_what_they_store(error, p):
    model, seeds = packed(), 25
    rates = ERRORS[error] if isinstance(error, str) else error
    before, used = bits_of(model), used_bits(model)
    names = [name for name in before if before[name].size > 10]
    # Bits `length` apart share no run, so among them errors are independent and their number binomial.
    seen = np.zeros((2, rates.length), int)
    total = np.zeros((2, rates.length), int)
    for seed in range(seeds):
        after, _ = damaged_bits(model, p, seed=seed, error=error)
        for name in names:
            stored, changed = in_order(before[name]), in_order(before[name] ^ after[name])
            assert not (changed & ~used[name]).any()
            for part in range(rates.length):
                for value in (0, 1):
                    own = (used[name] & (stored == value))[part :: rates.length]
                    seen[value, part] += (changed[part :: rates.length] & own).sum()
                    total[value, part] += own.sum()
    alarm = FALSE_ALARM / 2 / seen.size
    for value, rate in ((0, rates.zero_to_one), (1, rates.one_to_zero)):
        assert (binom.ppf(alarm, total[value], p * rate) <= seen[value]).all()
        assert (seen[value] <= binom.isf(alarm, total[value], p * rate)).all()
        assert rate > 0 or not seen[value].any()


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_stuck_cells_all_read_one_value_where_they_are(p):
    """The same cells are stuck whatever they store: two networks with opposite bits tell which."""
    one, other = nn.Linear(50, 40, bias=False), nn.Linear(50, 40, bias=False)
    other.weight.data = (~one.weight.data.view(torch.int32)).view(torch.float32)
    for error, value in (("stuck-at-0", 0), ("stuck-at-1", 1)):
        changed = []
        for model in (one, other):
            before = bits_of(model)["weight"]
            after = damaged_bits(model, p, seed=3, error=error)[0]["weight"]
            assert (in_order(after)[in_order(before ^ after)] == value).all()
            changed.append(in_order(before ^ after))
        assert not (changed[0] & changed[1]).any()
        n, count = changed[0].size, (changed[0] | changed[1]).sum()
        assert binom.ppf(FALSE_ALARM / 12, n, p) <= count <= binom.isf(FALSE_ALARM / 12, n, p)


@WAYS
@pytest.mark.parametrize("error", MODELS)
@pytest.mark.parametrize("p", [1e-3, 0.02, 0.3])
def test_flips_are_what_really_changed(monkeypatch, compiled, error, p):
    one_way(monkeypatch, compiled)
    for model in (packed(), small()):
        before = stored_bits(model) if any(True for _ in model.parameters()) else bits_of(model)
        after, flips = damaged_bits(model, p, seed=1, error=error)
        changed = {name: before[name] ^ after[name] for name in before}
        counts = {name: int(in_order(x).sum()) for name, x in changed.items()}
        assert flips.tensors == {name: count for name, count in counts.items() if count}
        planes = np.zeros(len(flips.bits), int)
        for x in changed.values():
            planes[: 8 * x.itemsize] += in_order(x).reshape(-1, 8 * x.itemsize).sum(0)[: len(planes)]
        assert flips.bits.tolist() == planes.tolist()


@WAYS
@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("error", MODELS)
@pytest.mark.parametrize("p", [0.02, 0.3])
def test_every_error_model_is_undone(monkeypatch, compiled, raised, error, p):
    one_way(monkeypatch, compiled)
    for model in (packed(), small()):
        before = bits_of(model)
        try:
            with inject(model, p, seed=2, targets="*", error=error) as flips:
                assert flips.total > 0
                assert not same(before, bits_of(model))
                with inject(model, p, seed=3, error=error):
                    pass
                if raised is not None:
                    raise raised
        except (ValueError, KeyboardInterrupt) as caught:
            assert type(caught) is raised
        assert same(before, bits_of(model))


@pytest.mark.parametrize("p", [1e-3, 0.3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_on_either_side_of_compiled_code_is_undone(monkeypatch, when, p):
    model = vgg()
    before = bits_of(model)
    flip, calls = flipping._flip, []

    def interrupted(*arguments):
        calls.append(arguments)
        if when == "before" and len(calls) == 5:
            raise KeyboardInterrupt
        flip(*arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(flipping, "_flip", interrupted)
    with pytest.raises(KeyboardInterrupt), inject(model, p, seed=0):
        pytest.fail("the injection went on")
    assert same(before, bits_of(model))


@pytest.mark.parametrize("error", MODELS)
@pytest.mark.parametrize("build", [packed, vgg])
@pytest.mark.parametrize("p", [1e-3, 0.3])
def test_both_ways_to_the_bits_give_the_same(monkeypatch, error, build, p):
    after, flips = damaged_bits(build(), p, seed=4, error=error)
    one_way(monkeypatch, False)
    again, counted = damaged_bits(build(), p, seed=4, error=error)
    assert same(after, again)
    assert flips.tensors == counted.tensors
    assert flips.bits.tolist() == counted.bits.tolist()


@pytest.mark.parametrize("error", MODELS)
def test_layout_and_other_targets_do_not_matter_to_any_error_model(error):
    after, _ = damaged_bits(vgg(), 0.02, seed=5, targets="*", error=error)
    name = "features.3.weight"
    scattered = vgg().to(memory_format=torch.channels_last)
    assert not scattered.features[3].weight.is_contiguous()
    for model in (vgg(), scattered):
        alone, flips = damaged_bits(model, 0.02, seed=5, targets=name, error=error)
        assert set(flips.tensors) == {name}
        assert np.array_equal(alone[name], after[name])


# Tensors of no network


@pytest.mark.parametrize("error", MODELS)
@pytest.mark.parametrize("p", [1e-3, 0.3])
def test_tensors_err_as_those_of_a_network_do(error, p):
    model = vgg()
    with float32_storage(model):
        tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        with inject(model, p, seed=3, error=error) as flips, inject_tensors(tensors, p, seed=3, error=error) as same:
            assert flips.total > 0
            assert (same.tensors, same.bits.tolist()) == (flips.tensors, flips.bits.tolist())
            for name, parameter in model.named_parameters():
                assert tensors[name].numpy().tobytes() == parameter.detach().numpy().tobytes()
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_tensors_of_any_width_are_damaged_and_given_back(dtype, raised):
    tensor = torch.arange(60).to(dtype)
    before = tensor.clone()
    with pytest.raises(raised), inject_tensors({"x": tensor}, 1.0, seed=0) as flips:
        changed = np.bitwise_xor(tensor.numpy().view(np.uint8), before.numpy().view(np.uint8))
        assert (changed == 255).all()
        assert flips.tensors == {"x": 8 * tensor.nbytes}
        assert len(flips.bits) == max(32, 8 * tensor.element_size())
        assert flips.bits.tolist()[: 8 * tensor.element_size()] == [60] * (8 * tensor.element_size())
        raise raised
    assert torch.equal(tensor, before)


def test_wrong_arguments_for_tensors_change_nothing():
    tensor = torch.ones(3)
    for wrong in (dict(probability=1.1), dict(seed=-1), dict(error="gremlin")):
        with pytest.raises(ValueError), inject_tensors({"x": tensor}, **(dict(probability=0.1, seed=0) | wrong)):
            pytest.fail("it damaged")
    with (
        pytest.raises(TypeError, match="y must be float32"),
        inject_tensors({"x": tensor, "y": tensor.half()}, 1, seed=0),
    ):
        pytest.fail("it damaged")
    assert tensor.tolist() == [1, 1, 1]
    with inject_tensors({}, 1.0, seed=0) as flips:
        assert flips.total == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("error", MODELS)
def test_a_gpu_gives_the_same(error):
    model, moved = vgg(), vgg().cuda()
    expected, flips = damaged_bits(model, 0.02, seed=6, error=error)
    with inject(moved, 0.02, seed=6, error=error) as counted:
        assert same(expected, bits_of(copy.deepcopy(moved).cpu()))
        assert counted.tensors == flips.tensors
        assert counted.bits.tolist() == flips.bits.tolist()
    assert same(bits_of(model), bits_of(moved.cpu()))


# Bursts


def test_every_bit_of_a_small_tensor_is_in_a_burst_with_the_probability():
    """The ends too: the first and the last bit, one element and its neighbour."""
    layer, p, seeds = nn.Linear(2, 1, bias=False), 0.2, 4000
    before = bits_of(layer)["weight"]
    counts = np.zeros(64)
    for seed in range(seeds):
        counts += in_order(before ^ damaged_bits(layer, p, seed=seed, error="burst")[0]["weight"])
    low, high = binom.interval(1 - FALSE_ALARM / 64, seeds, p)
    assert low <= counts.min() and counts.max() <= high


def test_bursts_are_runs_along_the_memory():
    model = vgg()
    name = "features.14.weight"
    before = stored_bits(model)[name]
    after, flips = damaged_bits(model, 1e-3, seed=7, targets=name, error="burst")
    at = np.flatnonzero(in_order(before ^ after[name]))
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    assert flips.total == len(at)
    inner = [len(run) for run in runs if run[0] > 0 and run[-1] < 32 * before.size - 1]
    assert len(inner) > 10 and min(inner) == ERRORS["burst"].length
    assert any(run[0] // 32 != run[-1] // 32 for run in runs)  # a run does not stop where an element ends
