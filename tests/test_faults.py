"""Bit errors against independent counts on the stored bits: exact numbers, exact undo, the same from any machine."""

import hashlib
import subprocess
import sys
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

from bnn_utils import faults
from bnn_utils.faults import PARAMETERS, Flips, float32_storage, inject, stored_tensors, targeted
from bnn_utils.layers import BinarizeConv2d, BinarizeLinear, binarize
from bnn_utils.models import resnet_binary, vgg_cifar10_binary

FALSE_ALARM = 1e-6  # of a whole statistical test
SPECIAL = (0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0x00000001, 0x807FFFFF)
PATTERNS = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))


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
        name: np.ascontiguousarray(x).view({4: np.uint32, 8: np.uint64}[x.itemsize]).reshape(-1).copy()
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

    def positions(total, probability, generator):
        seen.append(total)
        yield np.arange(40)
        assert len(seen) < 4 or not same(before, bits_of(model))
        if len(seen) == 4:
            raise KeyboardInterrupt
        yield np.arange(40, 64)

    monkeypatch.setattr(faults, "sample_positions", positions)
    with pytest.raises(KeyboardInterrupt), inject(model, 0.5, seed=0):
        pytest.fail("the injection went on")
    assert same(before, bits_of(model))


def test_two_chunks_that_share_a_word_are_undone(monkeypatch):
    model = small()
    before, stored = bits_of(model), stored_bits(model)
    monkeypatch.setattr(faults, "sample_positions", lambda *_: iter([np.array([0, 5, 31]), np.array([32 - 1 - 7, 33])]))
    after, flips = damaged_bits(model, 0.5, seed=0, targets="3.weight")
    expected = stored["3.weight"].copy()
    expected[0] ^= (1 << 0) + (1 << 5) + (1 << 31) + (1 << 24)
    expected[1] ^= 1 << 1
    assert np.array_equal(after["3.weight"], expected)
    assert flips.total == 5
    assert same(before, bits_of(model))


def test_a_parameter_without_dimensions():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    model = Scaled()
    with inject(model, 1.0, seed=0, targets="scale") as flips:
        assert model.scale.detach().numpy().reshape(1).view(np.uint32)[0] == 0xFFFFFFFF ^ 0x40000000
        assert flips.total == 32
    assert model.scale.item() == 2.0


# The same flips from anywhere


def digest(model, **arguments):
    after, _ = damaged_bits(model, 0.01, seed=9, **arguments)
    return hashlib.sha256(b"".join(name.encode() + after[name].tobytes() for name in sorted(after))).hexdigest()


def test_same_seed_same_flips():
    assert digest(vgg()) == digest(vgg())
    one, other = (damaged_bits(vgg(), 0.01, seed=seed)[0] for seed in (9, 10))
    assert not same(one, other)


def test_threads_and_processes_do_not_matter():
    code = (
        "import sys, torch; sys.path.insert(0, 'tests'); import test_faults as t\n"
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
    assert {kind for kind, _ in stored_tensors(model).values()} == set(faults.KINDS)


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


# Float32 storage


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
        monkeypatch.setattr(faults, "sample_positions", lambda *_, at=word: iter([np.array([32 * at + 31])]))
        with torch.no_grad(), inject(layer, 0.5, seed=0):
            acting = layer(torch.eye(6)).T.flatten()
        assert torch.nonzero(acting != plain).flatten().tolist() == [word]
