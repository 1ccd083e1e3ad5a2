"""Repairs against plain computations on the bits, what they store, and their undo."""

import math
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binom
from torch import nn

from bnn_utils.faults import PARAMETERS, float32_storage, inject, inject_tensors, stored_tensors, targeted
from bnn_utils.layers import BinarizeConv2d, BinarizeLinear, binarized_weights
from bnn_utils.models import resnet_binary, resnet_bireal, vgg_cifar10_binary
from bnn_utils.packed import PackedLayer, pack
from bnn_utils.repair import (
    FLOATS,
    REPAIRS,
    both,
    clip,
    correct,
    encode,
    few_bits,
    majority,
    range_check,
    secded,
    stored_bits,
    vote,
)

FALSE_ALARM = 1e-6  # of a whole statistical test
SPECIAL = (0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0x00000001, 0x807FFFFF)
PATTERNS = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        BinarizeConv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), BinarizeLinear(8, 3), nn.BatchNorm1d(3)
    ).eval()


def fill(model, draw):
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            pattern = draw(hnp.arrays(np.uint32, tuple(tensor.shape), elements=PATTERNS))
            tensor.detach().view(torch.int32).copy_(torch.from_numpy(pattern.view(np.int32)))


def bits_of(model):
    return {name: x.numpy().tobytes() for name, x in model.state_dict().items()}


def clipped(value, low, high):
    """Return one number clipped by the definition, without arrays."""
    value = 0.0 if math.isnan(value) or math.isinf(value) else value
    return min(max(value, low), high)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([(-1.0, 1.0), (-0.5, 0.25), (0.5, 2.0), (-3.0, -2.0), (0.0, 0.0)]))
def test_clip_is_the_plain_computation_on_any_bits(data, bounds):
    low, high = bounds
    model = small()
    fill(model, data.draw)
    before = bits_of(model)
    statistics = {name for name, _ in model.named_buffers()}
    expected = {
        name: [clipped(value, low, high) for value in parameter.flatten().tolist()]
        for name, parameter in model.named_parameters()
    }
    with clip(model, low, high):
        inside = bits_of(model)
        for name, parameter in model.named_parameters():
            assert parameter.flatten().tolist() == expected[name], name
        assert all(inside[name] == before[name] for name in statistics)
    assert bits_of(model) == before


def test_default_bounds_are_those_published():
    layer = BinarizeLinear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.5, -1.5, math.nan, math.inf]]))
        layer.bias.copy_(torch.tensor([-math.inf]))
    with clip(layer):
        assert layer.weight.flatten().tolist() == [1, -1, 0, 0]
        assert layer.bias.item() == 0


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_undone_after_an_exception(raised, layout):
    model = small().to(memory_format=layout)
    with torch.no_grad():
        model[1].weight.mul_(7)
        model[4].bias[0] = math.nan
    before = bits_of(model)
    with pytest.raises(raised), clip(model):
        assert bits_of(model) != before
        raise raised
    assert bits_of(model) == before


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (math.nan, 1.0), (-1.0, math.nan)])
def test_bounds_that_make_no_sense(bounds):
    model = small()
    before = bits_of(model)
    with pytest.raises(ValueError, match="low"), clip(model, *bounds):
        pytest.fail("it clipped")
    assert bits_of(model) == before


def test_inside_an_injection():
    model = small()
    with torch.no_grad():
        model[1].weight.mul_(7)
    before = bits_of(model)
    with inject(model, 0.2, seed=0):
        damaged = bits_of(model)
        with clip(model):
            assert bits_of(model) != damaged
            assert all(parameter.abs().max() <= 1 for parameter in model.parameters())
        assert bits_of(model) == damaged
    assert bits_of(model) == before


def test_an_injection_inside():
    model = small()
    with torch.no_grad():
        model[1].weight.mul_(7)
    before = bits_of(model)
    with clip(model):
        inside = bits_of(model)
        with inject(model, 0.2, seed=0):
            assert bits_of(model) != inside
        assert bits_of(model) == inside
    assert bits_of(model) == before


def test_none_and_clip_by_name():
    model = small()
    with torch.no_grad():
        model[1].weight.mul_(7)
    before = bits_of(model)
    with clip(model):
        forced = bits_of(model)
    for name, expected in [("none", before), ("clip", forced)]:
        plan = REPAIRS[name](model)
        assert plan.stored == {}
        with plan.read():
            assert bits_of(model) == expected
        assert bits_of(model) == before
    assert forced != before


# The code


def random_words(n, seed=0):
    return np.random.default_rng(seed).integers(1 << 64, size=n, dtype=np.uint64)


def single_bits(n, dtype):
    return dtype(1) << np.arange(n, dtype=dtype)


def error_patterns(bits):
    """Return every error of `bits` of the 72 bits of a word: what it inverts in the data, and in the check bits."""
    data = np.append(single_bits(64, np.uint64), np.zeros(8, np.uint64))
    check = np.append(np.zeros(64, np.uint8), single_bits(8, np.uint8))
    wrong = np.array(list(combinations(range(72), bits)))
    return np.bitwise_xor.reduce(data[wrong], axis=1), np.bitwise_xor.reduce(check[wrong], axis=1)


def test_columns_are_different_and_odd_and_the_fewest_ones_lie_evenly():
    columns = encode(single_bits(64, np.uint64)).tolist()
    identity = [1 << bit for bit in range(8)]
    assert len(set(columns) | set(identity)) == 72
    assert all(bin(column).count("1") % 2 == 1 for column in columns)
    assert sum(bin(column).count("1") for column in columns) == 56 * 3 + 8 * 5
    assert [sum(column >> bit & 1 for column in columns) for bit in range(8)] == [26] * 8


def test_check_bits_are_sums_of_columns():
    words = random_words(200)
    columns = encode(single_bits(64, np.uint64))
    for word, check in zip(words.tolist(), encode(words).tolist(), strict=True):
        expected = 0
        for bit in range(64):
            expected ^= int(columns[bit]) if word >> bit & 1 else 0
        assert check == expected
    assert encode(words.reshape(2, 100)).shape == (2, 100)


@pytest.mark.parametrize("word", [0, 2**64 - 1, *random_words(6).tolist()])
def test_every_single_error_is_corrected_and_every_double_one_detected(word):
    word = np.uint64(word)
    check = encode(np.array([word]))
    assert correct(np.array([word]), check).item() == word
    data, checks = error_patterns(1)
    assert len(data) == 72
    assert (correct(word ^ data, check ^ checks) == word).all()
    data, checks = error_patterns(2)
    assert len(data) == 2556
    read = word ^ data
    assert (correct(read, check ^ checks) == read).all()
    syndromes = encode(read) ^ check ^ checks
    assert (syndromes != 0).all() and (np.bitwise_count(syndromes) % 2 == 0).all()  # no single error gives an even one


def test_residual_word_errors_of_the_code_are_those_of_two_errors_or_more():
    n, p = 200_000, 0.01
    words = random_words(n)
    check = encode(words)
    read, read_check = words.copy(), check.copy()
    tensors = {"words": torch.from_numpy(read.view(np.int64)), "check": torch.from_numpy(read_check)}
    with inject_tensors(tensors, p, seed=4):
        errors = np.bitwise_count(read ^ words).astype(int)
        all_errors = errors + np.bitwise_count(read_check ^ check)
        wrong = correct(read, read_check) != words
    assert (wrong == (all_errors >= 2))[errors > 0].all()  # of errors in check bits alone, some leave the data right
    several = binom.sf(1, 72, p)
    assert binom.ppf(FALSE_ALARM / 4, n, several) <= (all_errors >= 2).sum() <= binom.isf(FALSE_ALARM / 4, n, several)
    # Check bits alone mislead when the wrong ones are a column: 56 of the patterns of three, 8 of those of five.
    misled = 56 * p**3 * (1 - p) ** 5 + 8 * p**5 * (1 - p) ** 3
    in_check_alone = (1 - p) ** 64 * (binom.sf(1, 8, p) - misled)
    rate = several - in_check_alone
    assert binom.ppf(FALSE_ALARM / 4, n, rate) <= wrong.sum() <= binom.isf(FALSE_ALARM / 4, n, rate)


# The vote


@pytest.mark.parametrize("reads", [3, 5, 7])
def test_majority_of_every_pattern_of_bits(reads):
    cases = range(1 << reads)
    arrays = [np.packbits([case >> which & 1 for case in cases]) for which in range(reads)]
    expected = np.packbits([2 * case.bit_count() > reads for case in cases])
    assert majority(*arrays).tolist() == expected.tolist()


@pytest.mark.parametrize(("reads", "p"), [(3, 0.01), (5, 0.03)])
def test_residual_bit_errors_of_the_vote(reads, p):
    memory = torch.zeros(100_000, dtype=torch.float32)
    layer = nn.Module()
    layer.register_buffer("weight", memory)
    plan = vote(layer, reads=reads)
    assert len(plan.stored) == reads - 1
    with inject(layer, p, seed=1), inject_tensors(plan.stored, p, seed=1), plan.read():
        wrong = int(np.bitwise_count(memory.numpy().view(np.uint32)).sum())
    bits, rate = 32 * len(memory), binom.sf(reads // 2, reads, p)
    assert binom.ppf(FALSE_ALARM / 2, bits, rate) <= wrong <= binom.isf(FALSE_ALARM / 2, bits, rate)


@pytest.mark.parametrize("reads", [1, 2, 4, -3])
def test_votes_that_nobody_can_win_are_refused(reads):
    with pytest.raises(ValueError, match=f"reads must be an odd number of at least 3, got {reads}"):
        vote(small(), reads=reads)


# Guarded networks


def numbered(build):
    """Return a network whose BatchNorm has numbers of its own, which do not lie in [-1, 1]."""
    torch.manual_seed(1)
    model = build(width=0.06, in_channels=1, input_size=8)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 50)
            if module.affine:
                nn.init.normal_(module.weight, 1, 2)
                nn.init.normal_(module.bias)
    return model.eval()


NETWORKS = {
    "float32": small,
    "channels_last": lambda: numbered(vgg_cifar10_binary).to(memory_format=torch.channels_last),
    "packed VGG": lambda: pack(numbered(vgg_cifar10_binary)),
    "packed ResNet": lambda: pack(numbered(resnet_binary)),
}
EVERY_NETWORK = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture
def held(network):
    model = NETWORKS[network]()
    with float32_storage(model):
        yield model


@contextmanager
def inverted(tensors, positions):
    """Invert bits of tensors, by name and position in memory, until the context ends."""
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, own in positions.items():
            shape, dtype = tensors[name].shape, tensors[name].dtype
            bits = np.unpackbits(saved[name].contiguous().numpy().reshape(-1).view(np.uint8), bitorder="little")
            bits[own] ^= 1
            changed = torch.from_numpy(np.packbits(bits, bitorder="little"))
            tensors[name].copy_(changed.view(dtype).reshape(shape))
        yield
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def used_positions(stored):
    """Return where in memory the used bits of a tensor lie."""
    if stored.mask is None:
        return np.arange(8 * stored.tensor.nbytes)
    bits = np.unpackbits(stored.mask.contiguous().numpy().reshape(-1).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def guarded_by(repair, model):
    kinds = PARAMETERS[1:] if repair.endswith("-floats") else PARAMETERS
    return {name: stored for name, stored in stored_tensors(model).items() if stored.kind in kinds}


@EVERY_NETWORK
@pytest.mark.parametrize("repair", ["secded", "secded-floats"])
def test_one_error_in_every_word_is_corrected(held, repair):
    assert PARAMETERS[0] == "weights"
    before = bits_of(held)
    plan = REPAIRS[repair](held)
    guarded = guarded_by(repair, held)
    assert plan.stored.keys() == {f"{name}.check" for name in guarded}
    tensors = {name: stored.tensor for name, stored in guarded.items()} | plan.stored
    rng = np.random.default_rng(2)
    for _ in range(5):
        positions = {name: [] for name in tensors}
        for name, stored in guarded.items():
            used = used_positions(stored)
            words = -(-len(used) // 64)
            assert plan.stored[f"{name}.check"].nbytes == words
            for word in range(words):
                data = min(64, len(used) - 64 * word)
                bit = rng.integers(data + 8)
                if bit < data:
                    positions[name].append(used[64 * word + bit])
                else:
                    positions[f"{name}.check"].append(8 * word + bit - data)
        with inverted(tensors, positions):
            damaged = bits_of(held)
            assert damaged != before
            with plan.read():
                assert bits_of(held) == before
            assert bits_of(held) == damaged
        assert bits_of(held) == before


@pytest.mark.parametrize("network", ["float32"])
@pytest.mark.parametrize("repair", ["secded", "vote"])
def test_any_one_error_leaves_the_network_as_it_was(held, repair):
    before = bits_of(held)
    plan = REPAIRS[repair](held)
    tensors = {name: stored.tensor for name, stored in guarded_by(repair, held).items()} | plan.stored
    for name, tensor in tensors.items():
        for position in range(0, 8 * tensor.nbytes, 1 if tensor.nbytes < 20 else 5):
            with inverted({name: tensor}, {name: [position]}), plan.read():
                assert bits_of(held) == before, (name, position)


@EVERY_NETWORK
@pytest.mark.parametrize("repair", ["secded", "secded-floats"])
def test_two_errors_in_a_word_are_left_as_read(held, repair):
    plan = REPAIRS[repair](held)
    tensors = {name: stored.tensor for name, stored in guarded_by(repair, held).items()}
    positions = {name: used_positions(stored)[:2] for name, stored in guarded_by(repair, held).items()}
    with inverted(tensors, positions):
        damaged = bits_of(held)
        with plan.read():
            assert bits_of(held) == damaged


@EVERY_NETWORK
@pytest.mark.parametrize("repair", ["vote", "vote-floats"])
def test_the_vote_reads_what_two_of_three_say(held, repair):
    before = bits_of(held)
    plan = REPAIRS[repair](held)
    guarded = guarded_by(repair, held)
    assert plan.stored.keys() == {f"{name}.copy {copy}" for name in guarded for copy in (1, 2)}
    tensors = {name: stored.tensor for name, stored in guarded.items()} | plan.stored
    rng = np.random.default_rng(3)
    once, twice = {}, {}
    for name, stored in guarded.items():
        used = used_positions(stored)
        where = rng.integers(3, size=len(used))  # each bit is wrong in one of the three
        once[name] = used[where == 0]
        once |= {f"{name}.copy {copy}": np.flatnonzero(where == copy) for copy in (1, 2)}
        twice |= {f"{name}.copy {copy}": np.flatnonzero(where == 0) for copy in (1, 2)}
    with inverted(tensors, once), plan.read():
        assert bits_of(held) == before
    with inverted(tensors, {name: once[name] for name in guarded}):
        outvoted = bits_of(held)
    with inverted(tensors, twice), plan.read():
        assert bits_of(held) == outvoted != before


@EVERY_NETWORK
def test_a_vote_on_upper_halves_leaves_lower_halves_as_read(held):
    before = bits_of(held)
    plan = vote(held, reads=5, upper=True)
    floats = {n: x for n, x in stored_tensors(held).items() if x.kind in PARAMETERS and x.tensor.dtype == torch.float32}
    tensors = {name: stored.tensor for name, stored in floats.items()} | plan.stored
    upper = {name: [p for p in range(8 * x.tensor.nbytes) if p % 32 >= 16] for name, x in floats.items()}
    lower = {name: [p for p in range(8 * x.tensor.nbytes) if p % 32 < 16] for name, x in floats.items()}
    for name in floats:
        assert 8 * plan.stored[f"{name}.copy 1"].nbytes == len(upper[name])
    for wrong, repaired in ((1, True), (2, False)):  # beside the network itself: two and three reads of five
        copies = {f"{name}.copy {i + 1}": range(len(upper[name])) for name in floats for i in range(wrong)}
        with inverted(tensors, upper | copies):
            outvoted = bits_of(held)
            with plan.read():
                assert bits_of(held) == (before if repaired else outvoted)
    with inverted(tensors, lower):
        damaged = bits_of(held)
        with plan.read():
            assert bits_of(held) == damaged != before


@EVERY_NETWORK
def test_the_range_check_reads_what_the_vote_has_left(held):
    plan, alone, check = REPAIRS["vote-range"](held), REPAIRS["vote-floats"](held), REPAIRS["range"](held)
    assert plan.stored.keys() == alone.stored.keys()
    before = bits_of(held)
    seen = set()
    for seed in range(20):
        with inject(held, 0.1, seed=seed):
            for mine, its in zip(plan.stored.values(), alone.stored.values(), strict=True):
                mine.view(torch.uint8)[0] ^= 1 + seed  # the copies err as well, in both plans alike
                its.copy_(mine)
            with alone.read():
                voted = bits_of(held)
                with check.read():
                    expected = bits_of(held)
            with plan.read():
                assert bits_of(held) == expected
            seen.add(expected != voted)
    assert True in seen
    assert bits_of(held) == before


def test_two_repairs_that_store_under_one_name_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"both repairs store .*0\.bias\.check"):
        both(secded(model), secded(model, "0.bias"))


@EVERY_NETWORK
@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("repair", REPAIRS)
def test_every_repair_is_undone(held, repair, raised):
    before = bits_of(held)
    plan = REPAIRS[repair](held)
    stored = {name: tensor.clone() for name, tensor in plan.stored.items()}
    with inject(held, 0.05, seed=0), inject_tensors(plan.stored, 0.05, seed=0) as others:
        assert (others.total > 0) == bool(stored)
        damaged, also = bits_of(held), {name: tensor.clone() for name, tensor in plan.stored.items()}
        for _ in range(2):  # reading twice gives the same
            if raised is None:
                with plan.read():
                    assert (bits_of(held) == damaged) == (repair == "none")
            else:
                with pytest.raises(raised), plan.read():
                    raise raised
            assert bits_of(held) == damaged
            assert all(torch.equal(tensor, also[name]) for name, tensor in plan.stored.items())
    assert bits_of(held) == before
    assert all(torch.equal(tensor, stored[name]) for name, tensor in plan.stored.items())


@EVERY_NETWORK
@pytest.mark.parametrize("repair", [repair for repair in REPAIRS if repair != "clip"])
def test_an_undamaged_network_is_read_as_it_is(held, repair):
    before = bits_of(held)
    with REPAIRS[repair](held).read():
        assert bits_of(held) == before


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_network_that_is_not_held_yet_is_planned_as_memory_will_hold_it(repair):
    model = small()
    latent = bits_of(model)
    plan = REPAIRS[repair](model)
    assert bits_of(model) == latent
    with float32_storage(model):
        signs = bits_of(model)
        assert signs != latent
        other = REPAIRS[repair](model)
    assert plan.stored.keys() == other.stored.keys()
    assert all(torch.equal(plan.stored[name], other.stored[name]) for name in plan.stored)
    with inject(model, 0, seed=0), plan.read():
        assert bits_of(model) == signs
    if plan.stored:
        with plan.read():
            assert bits_of(model) == signs
    assert bits_of(model) == latent


def test_running_statistics_are_not_guarded_unless_named():
    model = small()
    names = {name for name, _ in model.named_parameters()}
    assert secded(model).stored.keys() == {f"{name}.check" for name in names}
    assert secded(model, ("running_var", "0.*")).stored.keys() == {
        "0.weight.check",
        "0.bias.check",
        "1.running_var.check",
        "4.running_var.check",
    }
    assert vote(model, "0.bias").stored.keys() == {"0.bias.copy 1", "0.bias.copy 2"}
    for repair in (secded, vote):
        with pytest.raises(ValueError, match="nothing"):
            repair(model, ("nothing",))


# The range check


def test_range_check_of_floats():
    model = small()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, 2.0]))
        model[3].bias.copy_(torch.tensor([-3.0, 0.5, 1.0]))
    plan = range_check(model)
    assert plan.stored == {}
    for wrong in (1e38, -1e38, math.nan, math.inf, -math.inf, 2.0001, 0.4999):
        with torch.no_grad():
            model[1].weight[0] = wrong
        with plan.read():
            assert model[1].weight.tolist() == [1.25, 2.0]
        with torch.no_grad():
            model[1].weight[0] = 0.5
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([math.nan, -2.9, 1.1]))
        model[1].weight[1] = 0.7  # inside
        model[0].weight[0, 0, 0, 0] = math.inf
        model[1].running_var[0] = math.inf
    with plan.read():
        assert model[3].bias.tolist() == [-0.5, np.float32(-2.9), -0.5]
        assert model[1].weight.tolist() == [0.5, np.float32(0.7)]
        assert model[0].weight[0, 0, 0, 0] == model[1].running_var[0] == math.inf


def test_range_check_of_a_packed_network():
    model = pack(numbered(vgg_cifar10_binary))
    layer, norm = model.features["3"], model.features["1"]
    assert layer.threshold.dtype == torch.int16
    trained = layer.threshold.tolist()
    plan = range_check(model)
    layer.threshold[1] = -(2**15)
    layer.threshold[2] = 2**15 - 1
    layer.direction[0] ^= 1
    layer.weight[0, 0, 0] ^= 1
    norm.scale[0] = math.nan
    scale, words = norm.scale.double()[1:], (layer.direction.clone(), layer.weight.clone())
    with plan.read():
        mean = round(sum(trained) / len(trained))
        assert layer.threshold.tolist() == [trained[0], mean, mean, *trained[3:]]
        assert torch.equal(layer.direction, words[0]) and torch.equal(layer.weight, words[1])
        assert norm.scale.isfinite().all() and torch.equal(norm.scale[1:].double(), scale)
    assert layer.threshold.tolist()[1:3] == [-(2**15), 2**15 - 1]
    assert norm.scale[0].isnan()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_range_check_changes_no_undamaged_bits(data):
    model = small()
    fill(model, data.draw)
    before = bits_of(model)
    with range_check(model).read():
        assert bits_of(model) == before


def test_range_check_of_tensors_without_dimensions_or_elements():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    model[0].bias = nn.Parameter(torch.tensor(0.5))
    model[1].bias = nn.Parameter(torch.empty(0))
    plan = range_check(model)
    with torch.no_grad():
        model[0].bias.fill_(3)
    with plan.read():
        assert model[0].bias.item() == 0.5
    assert model[0].bias.item() == 3


# What is stored


@pytest.mark.parametrize("packed", [False, True])
def test_few_bits(packed):
    network = resnet_binary(width=0.25)
    network = pack(network) if packed else network
    names = few_bits(network)
    weights = [name for name in names if stored_tensors(network)[name].kind == "weights"]
    smallest = ["conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"]  # of 540, 800 and 800 weights in 271,380
    assert weights == smallest
    others = [name for name, held in stored_tensors(network).items() if held.kind in FLOATS]
    assert [name for name in names if name not in weights] == others
    assert [name for name in few_bits(network, 0.0)] == others
    assert few_bits(network, 1.0) == list(targeted(network))
    extra = stored_bits(network, "vote5-few-range") - stored_bits(network, "vote5-range")
    assert extra == 4 * (8 * (68 + 100 + 100) if packed else 32 * (540 + 800 + 800))  # packed, in whole bytes
    # Of 3,600 weights each in the first stage, and 7,200 where the second begins: less than 3% of all that is stored.
    few, small = (stored_bits(network, f"{how}-range") - stored_bits(network) for how in ("vote5-few", "vote7-small"))
    narrow = 4 * 3600 + 7200 + 3200  # and of the third stage's shortcut
    assert small == 6 * (few // 4 + (1 if packed else 32) * narrow)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        few_bits(network, 2)


@pytest.mark.parametrize(
    ("repair", "beside"),
    [
        ("none", 0),
        ("clip", 0),
        ("range", 0),
        ("secded", 8 * (9 + 1 + 1 + 1 + 12 + 2 + 2 + 2)),  # words of 18, 2, 2, 2, 24, 3, 3 and 3 floats, two a word
        ("secded-floats", 8 * (1 + 1 + 1 + 2 + 2 + 2)),
        ("vote", 2 * 32 * 57),
        ("vote-floats", 2 * 32 * 15),
        ("vote-range", 2 * 32 * 15),
        ("vote5-range", 4 * 32 * 15),
        ("vote5-few-range", 4 * 32 * 15),  # no weights are few here
        ("vote5-upper-range", 4 * 16 * 15),
        ("vote7-small-range", 6 * 32 * 15),
    ],
)
def test_stored_bits_of_floats(repair, beside):
    model = small()
    assert stored_bits(model, repair) == 32 * 57 + beside
    assert sum(8 * tensor.nbytes for tensor in REPAIRS[repair](model).stored.values()) == beside


@pytest.mark.parametrize(
    ("repair", "beside"),
    [
        ("none", 0),
        ("clip", 0),
        ("range", 0),
        ("secded", 8 * 3),
        ("secded-floats", 8 * 2),
        ("vote", 2 * (56 + 32 + 8)),  # 54 weights and 2 directions in whole bytes
        ("vote-floats", 2 * (32 + 8)),
        ("vote-range", 2 * (32 + 8)),
        ("vote5-range", 4 * (32 + 8)),
        ("vote5-few-range", 4 * (32 + 8)),
        ("vote5-upper-range", 4 * (32 + 8)),  # there are no floats
        ("vote7-small-range", 6 * (32 + 8)),
    ],
)
def test_stored_bits_of_a_packed_layer(repair, beside):
    torch.manual_seed(0)
    layer = PackedLayer(BinarizeConv2d(3, 2, 3)).fold(nn.BatchNorm2d(2).eval(), None)
    assert layer.weight.nbytes > 1000  # of which 54 bits are used
    assert stored_bits(layer, repair) == 2 * 27 + 2 * 16 + 2 + beside


def test_float_weights_beside_binarized_ones_are_few_whatever_they_fill():
    model = resnet_bireal(width=0.05, input_size=8)
    assert model.conv1.weight.nbytes > 0.05 * sum(x.numel() for x in binarized_weights(model).values()) / 8
    for network in (model, pack(model.eval())):
        few, stored = few_bits(network, 0.0), stored_tensors(network)
        expected = {name for name, held in stored.items() if held.kind in PARAMETERS and held.kind != "weights"}
        assert set(few) == expected and {"conv1.weight", "fc.weight"} < expected


def test_few_bits_are_not_the_many_of_a_parameter_of_another_name():
    model = torch.nn.Sequential(torch.nn.LSTM(8, 64), torch.nn.PReLU(4), torch.nn.Linear(64, 64))
    names = [name for name, x in model.named_parameters() if x.numel() < 600]
    assert few_bits(model, 600 / sum(x.numel() for x in model.parameters())) == names
    assert "1.weight" in names and "0.bias_ih_l0" in names and "0.weight_ih_l0" not in names
    assert few_bits(model, 0.0) == ["1.weight", "2.bias"]


def test_stored_bits_by_default_and_of_an_unknown_repair():
    assert stored_bits(small()) == 32 * 57
    with pytest.raises(ValueError, match=r"'pray'.*none, clip, range"):
        stored_bits(small(), "pray")
