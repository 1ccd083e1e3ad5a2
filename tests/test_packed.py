"""The packed network against the float network it came from, and against sums written out in NumPy.

The image layer is a convolution in floats, whose last digit depends on the order of additions. Where exact equality
of what follows is asked for, pixels and biases are multiples of small powers of two, so that every order gives the
same sum.
"""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bnn_utils import kernels, loops
from bnn_utils.bits import pack_signs, unpack_signs
from bnn_utils.faults import KINDS, PARAMETERS, inject, stored_tensors
from bnn_utils.layers import BINARIZED, BinarizeConv2d, BinarizeLinear, PReLU, Shift, binarize
from bnn_utils.models import BinarizedVGG, resnet_binary, resnet_bireal, vgg_cifar10_binary
from bnn_utils.packed import Affine, PackedLayer, PackedModel, deployed, pack

ROOT = Path(__file__).resolve().parents[1]
NAN, INF = math.nan, math.inf
LOGITS = dict(rtol=1e-5, atol=1e-4)  # rounding of one scale and shift of integers below a few thousand
tiles = pytest.mark.usefixtures("tile")


@pytest.fixture(params=["POPCOUNT", "CARRY_SAVE"])
def tile(request, monkeypatch):
    """Compute with each tile that there is, whatever would be chosen on this machine."""
    monkeypatch.setattr(kernels, "TILE", getattr(loops, request.param))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def dyadic(*shape, seed, largest=256, unit=128):
    """Draw multiples of 1 / unit between -largest / unit and largest / unit."""
    return torch.randint(-largest, largest + 1, shape, generator=seeded(seed)) / unit


def randomized(model, seed):
    """Give a network random signs, biases that are multiples of 1/64, and BatchNorm with scales of every sign."""
    g = seeded(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BINARIZED):
                module.weight.normal_(generator=g)
                if module.bias is not None:
                    module.bias.copy_(torch.randint(-128, 129, module.bias.shape, generator=g) / 64)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 3, generator=g)
                module.running_var.uniform_(0.5, 20, generator=g)
                if module.affine:
                    kept = torch.rand(module.weight.shape, generator=g) > 0.15  # the others are scaled by zero
                    module.weight.normal_(generator=g).mul_(kept)
                    module.bias.normal_(generator=g)
            elif isinstance(module, nn.Conv2d):
                module.weight.copy_(torch.randint(-16, 17, module.weight.shape, generator=g) / 16)
            elif isinstance(module, Shift | PReLU | nn.Linear):
                for parameter in module.parameters():
                    parameter.normal_(generator=g)
    return model.eval()


def vgg(seed=0, **config):
    return randomized(vgg_cifar10_binary(**{"width": 0.04, "in_channels": 1, "input_size": 8, **config}), seed)


def resnet(seed=0, **config):
    config = {"width": 0.05, "depth": 8, "in_channels": 1, "input_size": 8, **config}
    return randomized(resnet_binary(**config), seed)


def bireal(seed=0, **config):
    config = {"width": 0.05, "depth": 8, "in_channels": 1, "input_size": 8, **config}
    return randomized(resnet_bireal(**config), seed)


def images_for(model, count, seed=0):
    c, size = model.config["in_channels"], model.config["input_size"]
    return dyadic(count, c, size, size, seed=seed)


def words_of(x):
    """Pack signs (images, channels, height, width) as a packed layer reads them."""
    return torch.from_numpy(pack_signs(x.permute(0, 2, 3, 1)).view(np.int64))


def signs_of(words, channels):
    """Unpack words (images, height, width, words) to float signs (images, channels, height, width)."""
    return unpack_signs(words.numpy().view(np.uint64), channels).permute(0, 3, 1, 2)


def batchnorm(norm, **values):
    """Set numbers of a BatchNorm, by name, and return it in evaluation mode."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(norm, name).copy_(torch.as_tensor(value))
    return norm.eval()


def ones_in(words):
    return int(np.bitwise_count(words.numpy().view(np.uint64)).sum())


# ---------------------------------------------------------------- whole networks


def recorded(model, packed, x):
    """Run both networks; return the integers of each layer behind the first, (images, height, width, channels)."""
    floats, integers, hooks = {}, {}, []

    def exact(name):
        def hook(layer, inputs, _):
            signs, weight = binarize(inputs[0]).double(), binarize(layer.weight.detach()).double()
            if isinstance(layer, nn.Linear):
                floats[name] = (signs @ weight.T)[:, None, None]
            else:
                floats[name] = functional.conv2d(signs, weight, None, layer.stride, layer.padding).permute(0, 2, 3, 1)

        return hook

    def stored(name):
        return lambda _, inputs, output: integers.setdefault(name, []).append(output)  # chunk by chunk

    for name, module in model.named_modules():
        if isinstance(module, BINARIZED) and module.binarize_input:
            hooks.append(module.register_forward_hook(exact(name)))
    for name, module in packed.named_modules():
        if isinstance(module, PackedLayer):
            hooks.append(module.register_forward_hook(stored(name)))
    with torch.no_grad():
        logits = model(x), packed(x)
    for hook in hooks:
        hook.remove()
    return floats, {name: torch.cat(parts) for name, parts in integers.items()}, *logits


NETWORKS = {
    "vgg 8": lambda: vgg(1, width=0.3, num_classes=2),
    "vgg 16": lambda: vgg(2, width=0.17, in_channels=3, input_size=16, num_classes=12),
    "vgg 24": lambda: vgg(3, width=0.08, in_channels=3, input_size=24, num_classes=5),
    "vgg 40": lambda: vgg(4, width=0.04, input_size=40, num_classes=7),
    "resnet-8 4": lambda: resnet(5, width=0.3, in_channels=3, input_size=4, num_classes=2),
    "resnet-8 plain": lambda: resnet(6, width=0.22, input_size=12, num_classes=4, shortcut=False),
    "resnet-14 12": lambda: resnet(7, width=0.3, depth=14, in_channels=3, input_size=12, num_classes=12),
    "resnet-18 plain": lambda: resnet(8, width=0.1, depth=18, in_channels=3, input_size=20, shortcut=False),
    "resnet-20 28": lambda: resnet(9, width=0.04, depth=20, input_size=28, num_classes=3),
    "bireal-8 8": lambda: bireal(10, width=0.9, in_channels=3, num_classes=2),
    "bireal-14 12": lambda: bireal(11, width=0.3, depth=14, input_size=12, num_classes=7),
    "bireal-18 28": lambda: bireal(12, width=0.06, depth=18, in_channels=3, input_size=28),
}


def in_chunks_of(images, packed):
    packed.images, packed.numbers = images, 0


@tiles
@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_is_the_float_networks(name):
    model = NETWORKS[name]()
    x = images_for(model, 5)
    packed = pack(model)
    in_chunks_of(2, packed)  # smaller than the batch
    floats, integers, expected, logits = recorded(model, packed, x)
    assert floats.keys() == integers.keys()
    for layer, exact in floats.items():
        assert integers[layer].dtype == torch.int32
        assert len(exact.unique()) > 2, layer  # not a dead network
        assert torch.equal(integers[layer].double(), exact), layer
    assert logits.shape == (5, model.config["num_classes"])
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    torch.testing.assert_close(logits, expected, **LOGITS)


@tiles
@pytest.mark.parametrize("build", [vgg, resnet])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_image_layer_is_the_float_convolution_to_the_last_bit(build, in_channels):
    model = build(10, width=0.15, in_channels=in_channels, input_size=16)
    convolution = model.features[0] if build is vgg else model.conv1
    layer = PackedLayer(convolution, keep_bias=True)
    for count in (1, 2, 17):  # torch has its own ways for a single image
        x = torch.randn(count, in_channels, 16, 16, generator=seeded(count))
        with torch.no_grad():
            assert torch.equal(layer.image(x), convolution(x).permute(0, 2, 3, 1))


@tiles
def test_the_last_chunk_is_rounded_as_the_batch_is():
    model = vgg(11, in_channels=3)
    packed = pack(model)
    in_chunks_of(4, packed)
    first, seen = packed.features["0"], []
    image = first.image
    first.image = lambda x: seen.append(image(x)) or seen[-1]
    x = torch.randn(5, 3, 8, 8, generator=seeded(0))
    packed(x)
    assert len(seen) > 1
    with torch.no_grad():
        assert torch.equal(torch.cat(seen), model.features[0](x).permute(0, 2, 3, 1))


@tiles
def test_the_mean_of_a_map_is_the_float_networks_to_the_last_bit():
    model = resnet(12, width=0.3, input_size=28)
    _, norm = model.layer3[0].downsample
    # Scale 1 and any shift: the shortcut's values have one rounding on every machine, their mean has many.
    batchnorm(norm, weight=1.0, running_mean=0.0, running_var=1 - norm.eps, bias=torch.randn(96, generator=seeded(1)))
    batchnorm(model.bn2, weight=1.0, bias=0.0, running_var=1 - model.bn2.eps)
    assert torch.rsqrt(norm.running_var + norm.eps).eq(1).all()
    means, words = [], []
    hook = model.bn2.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0][0]))
    for image in images_for(model, 4).split(1):
        with torch.no_grad():
            model(image)
        for mean in (means[-1], torch.nextafter(means[-1], torch.tensor(INF))):  # the sign changes between the two
            batchnorm(model.bn2, running_mean=mean)
            packed = pack(model)
            packed.fc.register_forward_pre_hook(lambda _, inputs: words.append(inputs[0]))
            packed(image)
    hook.remove()
    assert [ones_in(word) for word in words] == [96, 0] * 4


@tiles
@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_ordinary_floats_give_the_same_predictions(build):
    for seed in range(6):
        model = build(20 + seed, in_channels=3, width=0.1)
        for module in model.modules():
            if isinstance(module, BINARIZED) and module.bias is not None:
                nn.init.normal_(module.bias, generator=seeded(seed))
        x = torch.randn(9, 3, 8, 8, generator=seeded(seed))
        with torch.no_grad():
            expected, logits = model(x), pack(model)(x)
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        torch.testing.assert_close(logits, expected, **LOGITS)


@tiles
@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_batches_of_any_size_and_memory_format(build):
    model = build(30, in_channels=3)
    packed = pack(model)
    in_chunks_of(5, packed)
    x = images_for(model, 11)
    with torch.no_grad():
        expected = model(x)
    for count in (1, 4, 5, 6, 10, 11):
        torch.testing.assert_close(packed(x[:count]), expected[:count], **LOGITS)
    assert packed(x[:0]).shape == (0, 10)
    logits = packed(x)
    assert torch.equal(packed(x.contiguous(memory_format=torch.channels_last)), logits)
    assert torch.equal(packed(x.transpose(2, 3).contiguous().transpose(2, 3)), logits)


# ---------------------------------------------------------------- one layer


def convolve(x, weight, stride, padding):
    """Convolve int64 arrays tap by tap, leaving out taps outside the image: (images, height', width', channels)."""
    (images, _, height, width), (channels, _, kernel, _) = x.shape, weight.shape
    shape = [(size + 2 * padding - kernel) // stride + 1 for size in (height, width)]
    out = np.zeros((images, *shape, channels), np.int64)
    for row, column, i, j in itertools.product(*map(range, shape), range(kernel), range(kernel)):
        top, left = row * stride + i - padding, column * stride + j - padding
        if 0 <= top < height and 0 <= left < width:
            out[:, row, column] += x[:, :, top, left] @ weight[:, :, i, j].T
    return out


def random_signs(*shape, seed):
    return np.random.default_rng(seed).choice(np.array([-1, 1]), shape)


def binarized(layer, signs):
    """Give a layer latent weights with these signs, zero among those that read as +1."""
    sizes = np.random.default_rng(0).integers(0, 3, signs.shape) + (signs < 0)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(sizes * signs))
    return layer


@tiles
@pytest.mark.parametrize("inputs", [1, 63, 64, 65, 130])
def test_a_convolution_leaves_out_taps_outside_the_image(inputs):
    cases = itertools.product((1, 3), (1, 2), (0, 1), ((1, 1), (1, 5), (2, 3), (7, 6)), (1, 33))
    seen = 0
    for kernel, stride, padding, (height, width), channels in cases:
        if min(height, width) + 2 * padding < kernel:
            continue
        seen += 1
        weight = random_signs(channels, inputs, kernel, kernel, seed=seen)
        x = random_signs(3, inputs, height, width, seed=seen + 100)
        convolution = binarized(BinarizeConv2d(inputs, channels, kernel, stride, padding), weight)
        layer = PackedLayer(convolution)
        y = layer(words_of(torch.from_numpy(x)))
        assert y.dtype == torch.int32
        case = (kernel, stride, padding, height, width, channels)
        assert np.array_equal(y.numpy(), convolve(x, weight, stride, padding)), case
        assert np.array_equal(layer.signs().numpy(), weight), case
    assert seen == 52


@tiles
@pytest.mark.parametrize(("inputs", "side", "channels"), [(1, 1, 1), (64, 1, 32), (7, 3, 31), (65, 2, 65), (130, 5, 3)])
def test_a_linear_layer_reads_a_flattened_map(inputs, side, channels):
    weight = random_signs(channels, inputs * side**2, seed=inputs)
    x = random_signs(35, inputs, side, side, seed=side)
    layer = PackedLayer(binarized(BinarizeLinear(inputs * side**2, channels), weight), side)
    assert layer(words_of(torch.from_numpy(x)))[:, 0, 0].tolist() == (x.reshape(35, -1) @ weight.T).tolist()
    assert np.array_equal(layer.signs().reshape(channels, -1).numpy(), weight)


def test_signs_are_those_that_the_float_layer_computes_with():
    layer = BinarizeLinear(130, 2, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=seeded(0))
        layer.weight[0, :8] = torch.tensor([NAN, -NAN, 0.0, -0.0, INF, -INF, 1e-45, -1e-45])
    signs = PackedLayer(layer).signs()[:, :, 0, 0]
    assert signs[0, :8].tolist() == [-1, -1, 1, 1, 1, -1, 1, -1]
    assert torch.equal(signs, binarize(layer.weight.detach()))


def test_what_is_no_binarized_layer_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        PackedLayer(nn.Linear(3, 3))
    for norm in (nn.Identity(), nn.GroupNorm(1, 3), nn.BatchNorm1d(3, track_running_stats=False)):
        with pytest.raises(TypeError, match=type(norm).__name__):
            Affine(norm)
        with pytest.raises(TypeError, match=type(norm).__name__):
            PackedLayer(BinarizeLinear(3, 3)).fold(norm, None)


# ---------------------------------------------------------------- thresholds

EVERY_CASE = list(
    itertools.product(
        (1.0, -0.37, 0.0, -0.0, 1e-30, -3e38, NAN, INF, -INF),  # scale
        (0.0, -0.0, 1.5, -1.5, 3e38, NAN, INF, -INF),  # shift
        (0.0, 3.0, -2.5, 1e30, NAN, INF, -INF),  # running mean: 3 and -2.5 lie on integers and between them
        (1.0, 0.0, 1e-38, 3e38, -1.0, NAN, INF),  # running variance
        (0.0, 0.25, 1e8, -1e30, NAN, INF, -INF),  # bias of the layer
    )
)


def folded_layer(n, norm, bias=None):
    """Return a packed layer of n weights +1, whose integers run from -n to n with what its input is."""
    linear = binarized(BinarizeLinear(n, norm.num_features), np.ones((norm.num_features, n), int))
    return PackedLayer(linear).fold(norm, bias)


def stored_bits(layer, integers):
    """Return what the stored threshold and direction make of each integer, bool (integers, channels)."""
    words = layer.direction.numpy().view(np.uint64)
    place = np.arange(layer.channels)
    inverted = (words[place // 64] >> (place % 64).astype(np.uint64) & np.uint64(1)).astype(bool)
    return (integers[:, None].numpy() >= layer.threshold.numpy()) ^ inverted


def float_bits(norm, bias, integers):
    """Return the sign that the float network gives each integer, NaN as -1, bool (integers, channels)."""
    sums = integers[:, None].float().expand(-1, norm.num_features)
    with torch.no_grad():
        return (norm(sums if bias is None else sums + bias) >= 0).numpy()


def computed_bits(layer, n):
    """Return what the layer makes of inputs with 0..n times +1, whose integers are -n, -n + 2 ... n."""
    x = (torch.arange(n + 1)[:, None] > torch.arange(n)).float() * 2 - 1
    return signs_of(layer.bits(words_of(x[:, :, None, None])), layer.channels)[:, :, 0, 0].numpy() > 0


def test_a_threshold_stands_for_every_number_that_batchnorm_can_hold():
    weight, shift, mean, variance, bias = torch.tensor(EVERY_CASE).T
    norm = nn.BatchNorm1d(len(EVERY_CASE))
    norm = batchnorm(norm, weight=weight, bias=shift, running_mean=mean, running_var=variance)
    n = 9
    layer = folded_layer(n, norm, bias)
    integers = torch.arange(-n, n + 1)
    expected = float_bits(norm, bias, integers)
    wrong = (stored_bits(layer, integers) != expected).any(0)
    assert not wrong.any(), EVERY_CASE[int(wrong.argmax())]
    assert 0 < expected.all(0).sum() < expected.any(0).sum() < len(EVERY_CASE)  # some constant, some not
    assert np.array_equal(computed_bits(layer, n), expected[::2])


@tiles
def test_a_threshold_of_an_ordinary_channel():
    n, channels, g = 301, 70, seeded(3)
    norm = batchnorm(
        nn.BatchNorm1d(channels),
        weight=torch.randn(channels, generator=g),
        bias=torch.randn(channels, generator=g),
        running_mean=torch.randn(channels, generator=g) * 100,
        running_var=torch.rand(channels, generator=g) * 1e4,
    )
    integers = torch.arange(-n, n + 1)
    for bias in (None, torch.randn(channels, generator=g)):
        layer = folded_layer(n, norm, bias)
        expected = float_bits(norm, bias, integers)
        assert (expected[0] != expected[-1]).sum() > 30 and (~expected[-1] & expected[0]).sum() > 10
        assert np.array_equal(stored_bits(layer, integers), expected)
        assert np.array_equal(computed_bits(layer, n), expected[::2])


def test_a_value_on_the_threshold_is_positive():
    mean = torch.tensor([3.0, 3.0, -9.0, -9.0, 9.0, 9.0])
    norm = nn.BatchNorm1d(6, eps=0.0)
    norm = batchnorm(norm, weight=[2, -2] * 3, running_mean=mean, running_var=1.0)
    layer = folded_layer(9, norm)
    integers = torch.arange(-9, 10)
    expected = np.stack([integers >= 3, integers <= 3, integers > -10, integers <= -9, integers >= 9, integers < 10], 1)
    assert np.array_equal(stored_bits(layer, integers), expected)
    assert np.array_equal(computed_bits(layer, 9), expected[::2])


@tiles
@pytest.mark.parametrize(("n", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_thresholds_are_16_bits_long_where_those_suffice(n, dtype):
    mean = torch.tensor([n - 0.5, n - 0.5, 0.5 - n, 0.5 - n, 2.0 * n, 2.0 * n, -2.0 * n, -2.0 * n])
    norm = batchnorm(nn.BatchNorm1d(8), weight=[1, -1] * 4, running_mean=mean)
    layer = folded_layer(n, norm)
    assert layer.threshold.dtype == dtype
    integers = torch.arange(-n, n + 1)
    expected = float_bits(norm, None, integers)
    assert expected.sum(0).tolist() == [1, 2 * n, 2 * n, 1, 0, 2 * n + 1, 2 * n + 1, 0]
    assert np.array_equal(stored_bits(layer, integers), expected)
    x = torch.ones(3, n)
    x[1, 0], x[2] = -1, -1
    bits = signs_of(layer.bits(words_of(x[:, :, None, None])), 8)[:, :, 0, 0].numpy() > 0
    assert np.array_equal(bits, expected[[-1, -3, 0]])


@tiles
@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (7, 7), (8, 3)])
def test_max_pooling_comes_before_a_threshold_of_either_direction(height, width):
    convolution = binarized(BinarizeConv2d(67, 70, 3, padding=1), random_signs(70, 67, 3, 3, seed=0))
    g = seeded(height)
    norm = batchnorm(
        nn.BatchNorm2d(70),
        weight=torch.randn(70, generator=g).index_fill_(0, torch.arange(0, 70, 9), 0),
        bias=torch.randn(70, generator=g),
        running_mean=20 + 10 * torch.randn(70, generator=g),
        running_var=400.0,
    )
    x = torch.from_numpy(random_signs(4, 67, height, width, seed=width)).float()
    layer = PackedLayer(convolution).fold(norm, convolution.bias)
    with torch.no_grad():
        expected = binarize(norm(functional.max_pool2d(convolution(x), 2)))
    words = layer.bits(words_of(x), pool=2)
    assert words.shape == (4, height // 2, width // 2, 2)
    assert torch.equal(signs_of(words, 70), expected)
    assert torch.equal(words, words_of(expected))  # unused bits are 0, on which the next layer's count relies


# ---------------------------------------------------------------- scale and shift


def affine_by_definition(norm, x, shortcut, clamp):
    """Compute BatchNorm as scale and shift, each rounded to float32, and one rounding of x * scale + shift."""
    with np.errstate(all="ignore"):
        weight, bias, mean, variance = (
            getattr(norm, name).detach().numpy() for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = np.float32(1) / np.sqrt(variance + np.float32(norm.eps)) * weight
        shift = (bias.astype(np.float64) - mean.astype(np.float64) * scale).astype(np.float32)
        y = x.numpy().astype(np.float32)
        y = y if shortcut is None else y + shortcut.numpy()
        y = (y.astype(np.float64) * scale + shift).astype(np.float32)
        return np.clip(y, -1, 1) if clamp else y


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_affine_is_batchnorm(dtype, added, clamp):
    g, channels = seeded(5), 67
    norm = batchnorm(
        nn.BatchNorm2d(channels),
        weight=torch.randn(channels, generator=g).index_fill_(0, torch.arange(0, 67, 9), 0),
        bias=torch.randn(channels, generator=g),
        running_mean=torch.randn(channels, generator=g) * 10,
        running_var=torch.rand(channels, generator=g) * 100,
    )
    x = torch.randint(-30, 31, (3, 5, 4, channels), generator=g).to(dtype)
    shortcut = torch.randn(x.shape, generator=g) if added else None
    affine = Affine(norm)
    values, words = affine(x, shortcut, clamp)
    definition = affine_by_definition(norm, x, shortcut, clamp)
    np.testing.assert_allclose(values.numpy(), definition, rtol=1e-6, atol=1e-30)
    assert torch.equal(words, words_of(values.permute(0, 3, 1, 2)))
    with torch.no_grad():
        summed = (x + shortcut if added else x).float()
        expected = norm(summed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(values, expected.clamp(-1, 1) if clamp else expected, rtol=1e-5, atol=1e-5)
    if not added:
        assert torch.equal(affine.bits(x), words)


@pytest.mark.parametrize("clamp", [False, True])
def test_affine_of_numbers_that_are_not_ordinary(clamp):
    weight, shift, mean, variance, value = torch.tensor(EVERY_CASE).T
    norm = nn.BatchNorm1d(len(EVERY_CASE))
    norm = batchnorm(norm, weight=weight, bias=shift, running_mean=mean, running_var=variance)
    x = torch.stack([value, value.nan_to_num(5, 7, -7) % 3, -value])[:, None, None]
    values, words = Affine(norm)(x, None, clamp)
    np.testing.assert_allclose(values.numpy(), affine_by_definition(norm, x, None, clamp), rtol=1e-6)
    assert torch.equal(words, words_of(values.permute(0, 3, 1, 2)))
    assert 0.1 < values.isnan().float().mean() < 0.9


# ---------------------------------------------------------------- damaged networks


@tiles
@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_a_damaged_network_predicts_the_same_packed(build):
    nans = specials = 0
    for seed, targets in itertools.product(range(12), (PARAMETERS, KINDS)):
        shortcut = seed % 2 == 0
        model = build(40 + seed, shortcut=shortcut) if build is resnet else build(40 + seed)
        x = images_for(model, 6)
        with inject(model, 1e-2, seed=seed, targets=targets), torch.no_grad():
            expected, packed = model(x), pack(model)
        logits = packed(x)
        assert torch.equal(logits.isnan(), expected.isnan()), (seed, targets)
        assert torch.equal(logits.argmax(1), expected.argmax(1)), (seed, targets)
        torch.testing.assert_close(logits, expected, equal_nan=True, **LOGITS)
        nans += int(expected.isnan().any())
        specials += any(not tensor.isfinite().all() for tensor in packed.buffers())
    assert nans and specials


@tiles
@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_numbers_of_any_size_predict_the_same_packed(build):
    specials = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-45])
    for seed in range(6):
        model, g = build(60 + seed), seeded(seed)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    hit = torch.rand(tensor.shape, generator=g) < 0.03
                    chosen = specials[torch.randint(len(specials), tensor.shape, generator=g)]
                    tensor.copy_(torch.where(hit, chosen, tensor))
            x = images_for(model, 6)
            expected, logits = model(x), pack(model)(x)
        torch.testing.assert_close(logits, expected, equal_nan=True, **LOGITS)
        assert torch.equal(logits.argmax(1), expected.argmax(1)), seed


# ---------------------------------------------------------------- what is stored

LAYER = {"weight": torch.int64, "threshold": torch.int16, "direction": torch.int64}
OPEN = {"weight": torch.int64, "bias": torch.float32}
FLOATS = {"scale": torch.float32, "shift": torch.float32}


def buffers_of(packed):
    """Return the dtypes of the buffers by module."""
    found = {}
    for name, tensor in packed.named_buffers():
        module, _, key = name.rpartition(".")
        found.setdefault(module, {})[key] = tensor.dtype
    return found


def test_a_packed_vgg_stores_words_thresholds_and_few_floats():
    packed = pack(vgg())
    hidden = [f"features.{i}" for i in (3, 7, 10, 14, 17)] + ["classifier.0", "classifier.3"]
    expected = {"features.0": OPEN, "features.1": FLOATS, "classifier.6": OPEN, "classifier.7": FLOATS}
    assert buffers_of(packed) == {**dict.fromkeys(hidden, LAYER), **expected}
    assert not list(packed.parameters())


def test_a_packed_resnet_stores_words_thresholds_and_few_floats():
    weight = {"weight": torch.int64}
    expected = {"conv1": weight, "bn1": FLOATS, "bn2": FLOATS, "fc": OPEN, "bn3": FLOATS}
    for stage in ("layer1.0", "layer2.0", "layer3.0"):
        expected |= {f"{stage}.conv1": LAYER, f"{stage}.conv2": weight, f"{stage}.bn2": FLOATS}
    for stage in ("layer2.0", "layer3.0"):
        expected |= {f"{stage}.downsample.0": weight, f"{stage}.downsample.1": FLOATS}
    del expected["layer3.0.bn2"]  # the last block ends without
    packed = pack(resnet())
    assert buffers_of(packed) == expected
    assert not list(packed.parameters())


@pytest.mark.parametrize("model", [vgg(), vgg(width=0.3, input_size=16), resnet(width=0.3), resnet(width=0.8)])
def test_masks_say_which_bits_mean_something(model):
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, BINARIZED)}
    packed, seen, spare = pack(model), set(), 0
    for name, module in packed.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        masks = getattr(module, "masks", {})
        assert masks.keys() <= buffers.keys()
        for key, buffer in buffers.items():
            if buffer.dtype != torch.int64:
                assert key not in masks
                continue
            mask = masks.get(key, torch.full_like(buffer, -1))
            assert (mask.shape, mask.dtype) == (buffer.shape, buffer.dtype)
            assert not (buffer & ~mask).any()
            used = weights[name].numel() if key == "weight" else len(weights[name])
            assert ones_in(mask) == used
            spare += 64 * mask.numel() - used
            if key == "weight":
                seen.add(name)
                assert ones_in(buffer) == int((weights[name] >= 0).sum())
    assert seen == set(weights)
    assert spare


@tiles
@pytest.mark.parametrize(("inputs", "channels"), [(3, 5), (64, 64), (65, 70), (130, 33)])
def test_flipping_every_bit_that_means_something_negates_what_is_computed(inputs, channels):
    convolution = binarized(
        BinarizeConv2d(inputs, channels, 3, padding=1), random_signs(channels, inputs, 3, 3, seed=0)
    )
    norm = batchnorm(nn.BatchNorm2d(channels), weight=torch.randn(channels, generator=seeded(0)))
    layer = PackedLayer(convolution).fold(norm, convolution.bias)
    x = words_of(torch.from_numpy(random_signs(2, inputs, 5, 5, seed=1)))
    integers, bits = layer(x), layer.bits(x)
    for key in ("weight", "direction"):
        buffer = getattr(layer, key)
        buffer ^= layer.masks.get(key, torch.full_like(buffer, -1))
        if key == "weight":
            assert torch.equal(layer(x), -integers)
            buffer ^= layer.masks.get(key, torch.full_like(buffer, -1))
    assert torch.equal(layer(x), integers)
    assert torch.equal(signs_of(layer.bits(x), channels), -signs_of(bits, channels))


@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_a_packed_network_holds_copies(build):
    model = build()
    packed = pack(model)
    x = images_for(model, 3)
    with torch.no_grad():
        before, expected = packed(x), model(x)
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for buffer in packed.buffers():
            buffer.zero_()
        assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x), expected)
        packed = pack(model)
        for tensor in model.state_dict().values():
            tensor.fill_(-1)
    assert torch.equal(packed(x), before)


@tiles
@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_packed_networks_can_be_copied_pickled_and_loaded(build):
    model = build(in_channels=3)
    packed = pack(model)
    x = images_for(model, 3)
    other = pack(build(99, in_channels=3))
    assert not torch.equal(other(x), packed(x))
    other.load_state_dict(packed.state_dict())
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), other):
        assert isinstance(twin, PackedModel) and not twin.training
        assert (twin.name, twin.config) == (model.name, model.config)
        assert torch.equal(twin(x), packed(x))
        for own, of_packed in zip(twin.modules(), packed.modules(), strict=True):
            masks, expected = getattr(own, "masks", {}), getattr(of_packed, "masks", {})
            assert masks.keys() == expected.keys()
            assert all(torch.equal(masks[key], expected[key]) for key in masks)
    twin = copy.deepcopy(packed)
    for buffer in twin.buffers():
        buffer.zero_()
    torch.testing.assert_close(packed(x), model(x).detach(), **LOGITS)


def test_training_mode_does_not_matter():
    model = vgg()
    x = images_for(model, 3)
    expected = pack(model)(x)
    assert torch.equal(pack(model.train())(x), expected)
    assert torch.equal(pack(model).train()(x), expected)
    assert not expected.requires_grad


# ---------------------------------------------------------------- what is refused


class Doubled(BinarizedVGG):
    def forward(self, x):
        return 2 * super().forward(x)


def put(part, index, layer):
    return lambda model: part(model).__setitem__(index, layer(part(model)[index]))


def features(model):
    return model.features


def classifier(model):
    return model.classifier


# Each is another network than the one that packing knows.
REBUILT = {
    "last BatchNorm gone": (vgg, lambda model: model.classifier.__delitem__(7)),
    "last BatchNorm replaced": (vgg, put(classifier, 7, lambda _: nn.Identity())),
    "a BatchNorm replaced": (vgg, put(features, 8, lambda _: nn.Identity())),
    "ReLU in features": (vgg, put(features, 2, lambda _: nn.ReLU())),
    "ReLU in hidden features": (vgg, put(features, 6, lambda _: nn.ReLU())),
    "ReLU in classifier": (vgg, put(classifier, 2, lambda _: nn.ReLU())),
    "layer appended": (vgg, lambda model: model.classifier.append(nn.LogSoftmax(1))),
    "float first layer": (vgg, put(features, 0, lambda old: nn.Conv2d(1, old.out_channels, 3, padding=1))),
    "float convolution": (
        vgg,
        put(features, 10, lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)),
    ),
    "float linear layer": (vgg, put(classifier, 3, lambda old: nn.Linear(41, 41))),
    "float last layer": (vgg, put(classifier, 6, lambda old: nn.Linear(41, 10))),
    "no bias in the last layer": (vgg, put(classifier, 6, lambda old: BinarizeLinear(41, 10, bias=False))),
    "other pooling": (vgg, put(features, 4, lambda _: nn.MaxPool2d(3, 2, 1))),
    "average pooling": (vgg, put(features, 4, lambda _: nn.AvgPool2d(2))),
    "binarized image": (vgg, lambda model: setattr(model.features[0], "binarize_input", True)),
    "activations not binarized": (vgg, lambda model: setattr(model.features[7], "binarize_input", False)),
    "ResNet's last BatchNorm replaced": (resnet, lambda model: setattr(model, "bn3", nn.Identity())),
    "ResNet with ReLU in front": (resnet, lambda model: setattr(model, "tanh1", nn.ReLU())),
    "ResNet with ReLU behind": (resnet, lambda model: setattr(model, "tanh2", nn.ReLU())),
    "ResNet with ReLU inside": (resnet, lambda model: setattr(model.layer2[0], "tanh1", nn.ReLU())),
    "ResNet without Hardtanh": (resnet, lambda model: setattr(model, "tanh1", nn.Identity())),
    "ResNet's block replaced": (resnet, lambda model: model.layer1.__setitem__(0, nn.Sequential(nn.Identity()))),
    "ResNet with a bias": (resnet, lambda model: setattr(model, "conv1", with_bias(model.conv1))),
    "ResNet without the last bias": (resnet, lambda model: setattr(model, "fc", BinarizeLinear(16, 10, bias=False))),
}


def with_bias(old):
    return BinarizeConv2d(1, old.out_channels, 3, padding=1, binarize_input=False)


@pytest.mark.parametrize("name", REBUILT)
def test_a_rebuilt_network_is_refused_or_computed_as_it_is(name):
    build, change = REBUILT[name]
    model = build(50)
    x = images_for(model, 9)
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(x)
        change(model)
        expected = model.eval()(x)
        assert not torch.equal(before, expected)
        try:
            logits = pack(model)(x)
        except TypeError as error:
            assert "\n" not in str(error)
        else:
            torch.testing.assert_close(logits, expected, **LOGITS)
        torch.testing.assert_close(deployed(model)(x), expected, **LOGITS)


def test_a_network_of_another_kind_is_refused():
    networks = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)),
        nn.Sequential(vgg()),
        Doubled(10, 0.04, 1, 8).eval(),
        pack(vgg()),
    ]
    for network in networks:
        assert deployed(network) is network
        with pytest.raises(TypeError, match=type(network).__name__) as error:
            pack(network)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_a_float_network_is_refused(build):
    network = build(binary=False)
    with pytest.raises(TypeError, match=f"only binarized networks can be packed, got the float form of {network.name}"):
        pack(network)
    assert deployed(network) is network


@pytest.mark.parametrize("name", ["last BatchNorm replaced", "ResNet's last BatchNorm replaced"])
def test_a_network_without_its_last_batchnorm_is_refused_in_one_line(name):
    build, change = REBUILT[name]
    model = build()
    change(model)
    with pytest.raises(TypeError, match="Identity") as error:
        pack(model)
    assert "\n" not in str(error.value)
    assert deployed(model) is model


@tiles
@pytest.mark.parametrize("build", [vgg, resnet, bireal])
def test_images_of_another_kind_are_refused(build):
    packed = pack(build())
    x = dyadic(2, 1, 8, 8, seed=0)
    for dtype in (torch.float64, torch.float16, torch.uint8, torch.int64):
        with pytest.raises(ValueError, match=str(dtype)):
            packed(x.to(dtype))
    with pytest.raises(ValueError, match="meta"):
        packed(x.to("meta"))
    with pytest.raises((ValueError, RuntimeError)):
        packed(x.expand(2, 3, 8, 8))


@tiles
@pytest.mark.parametrize("size", [4, 16, 24])
def test_a_vgg_refuses_images_of_another_size(size):
    with pytest.raises((ValueError, RuntimeError)):
        pack(vgg())(dyadic(2, 1, size, size, seed=0))


@tiles
def test_a_resnet_takes_images_of_any_size_as_the_float_network_does():
    model = resnet()
    packed = pack(model)
    for height, width in ((4, 4), (5, 9), (1, 1), (16, 2)):
        x = dyadic(3, 1, height, width, seed=height)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), model(x), **LOGITS)


# ---------------------------------------------------------------- stages

STAGED = {
    "vgg": vgg,
    "vgg of larger images": lambda: vgg(1, in_channels=3, input_size=16, width=0.1),
    "resnet": resnet,
    "resnet of larger images": lambda: resnet(1, in_channels=3, input_size=16, width=0.2, depth=14),
    "resnet without shortcuts": lambda: resnet(2, shortcut=False),
    "bireal": lambda: bireal(4, depth=14),
}
staged = pytest.mark.parametrize("name", STAGED)


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def states_of(packed, x):
    """Return what each stage puts out, as bytes of all chunks of images together; the last are logits."""
    outputs = [packed.before(stage, x) for stage in range(1, len(packed.stages))]
    return [[part.numpy().tobytes() for state in states for part in state] for states in outputs] + [
        packed(x).numpy().tobytes()
    ]


@tiles
@staged
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_going_on_from_any_stage_gives_the_same_logits(name, chunk):
    model = STAGED[name]()
    packed = pack(model)
    if chunk:
        in_chunks_of(chunk, packed)
    for count in (7, 300) if chunk is None else (7,):
        x = torch.randn(count, *images_for(model, 1).shape[1:], generator=seeded(count))
        for stage in range(len(packed.stages)):
            assert same_bits(packed.after(stage, packed.before(stage, x)), packed(x))


@staged
def test_another_network_goes_on_from_the_states_of_one_with_the_same_first_stages(name):
    model = STAGED[name]()
    x, clean = images_for(model, 40), pack(model)
    for stage in range(len(clean.stages)):
        names = [own for own in model.state_dict() if clean.stage_of(own) >= stage and "num_batches" not in own]
        kept = clean.before(stage, x)
        with inject(model, 0.1, seed=stage, targets=names):
            damaged = pack(model)
            logits = damaged(x)
            assert same_bits(damaged.after(stage, kept), logits)
        assert not same_bits(logits, clean(x))


def changed(name, tensor, mask):
    """Change a tensor, in place, so that what is computed from it changes for sure."""
    if tensor.dtype == torch.int64:
        tensor ^= ~torch.zeros_like(tensor) if mask is None else mask
    elif not tensor.is_floating_point():
        tensor.fill_(torch.iinfo(tensor.dtype).min)
    elif name.rpartition(".")[2] in ("weight", "scale") and tensor.dim() > 1:
        tensor.neg_()
    elif name.endswith("running_var"):
        tensor.mul_(1e6)
    else:
        tensor.sub_(torch.linspace(-90, 100, tensor.numel()))


@staged
@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_a_tensor_belongs_to_the_first_stage_whose_output_it_changes(name, storage):
    model = STAGED[name]()
    x, held = images_for(model, 20), pack(model) if storage == "packed" else model
    clean, found = states_of(pack(model), x), {}
    for own, stored in stored_tensors(held).items():
        twin = copy.deepcopy(held)
        with torch.no_grad():
            changed(own, stored_tensors(twin)[own].tensor, stored.mask)
        other = states_of(twin if storage == "packed" else pack(twin), x)
        found[own] = min(stage for stage, output in enumerate(other) if output != clean[stage])
    packed = pack(model)
    assert found == {own: packed.stage_of(own) for own in found}
    assert set(found.values()) == set(range(len(packed.stages)))


@tiles
@staged
def test_repacked_stages_are_as_packed_and_the_others_as_before(name):
    model = STAGED[name]()
    before, order = copy.deepcopy(pack(model).state_dict()), list(pack(model).state_dict())
    other = STAGED[name]()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.neg_().add_(0.1)
    after = pack(other).state_dict()
    for chosen in ([0], [2], [1, 3], range(len(pack(model).stages)), []):
        packed = pack(model)
        packed.repack(other, chosen)
        for own, tensor in packed.state_dict().items():
            assert torch.equal(tensor, (after if packed.stage_of(own) in chosen else before)[own])
        assert list(packed.state_dict()) == order
    packed.repack(other, range(len(packed.stages)))
    x = images_for(model, 5)
    assert same_bits(packed(x), pack(other)(x))


def test_states_are_bits_but_for_the_numbers_on_shortcuts():
    packed = pack(resnet(depth=14))  # two blocks a layer, of 4, 8 and 16 channels on maps of 8, 4 and 2 pixels
    x = images_for(resnet(), 10)
    sizes = [sum(part.nbytes for state in packed.before(stage, x) for part in state) for stage in range(1, 8)]
    word, number = 8, 4
    on_shortcuts = [64 * (word + 4 * number), 16 * (word + 8 * number), 4 * (word + 16 * number)]
    bits = [64 * word, 16 * word]  # before the first block of a layer, where a convolution is the shortcut
    means = 16 * number
    expected = [on_shortcuts[0], on_shortcuts[0], bits[0], on_shortcuts[1], bits[1], on_shortcuts[2], means]
    assert sizes == [10 * size for size in expected]
    packed = pack(vgg())
    states = [state for stage in range(1, len(packed.stages)) for state in packed.before(stage, images_for(vgg(), 10))]
    assert {part.dtype for state in states for part in state} == {torch.int64}


def test_stages_and_networks_that_do_not_fit_are_refused():
    model = vgg()
    packed = pack(model)
    x = images_for(model, 2)
    for stage in (-1, 9):
        with pytest.raises(ValueError, match=rf"0\.\.8, got {stage}"):
            packed.before(stage, x)
        with pytest.raises(ValueError, match=rf"0\.\.8, got {stage}"):
            packed.after(stage, [])
    with pytest.raises(ValueError, match="float64"):
        packed.before(3, x.double())
    for name in ("features.2.weight", "features", "weight", "layer1.0.conv1.weight", "features.10"):
        with pytest.raises(ValueError, match=name):
            packed.stage_of(name)
    with pytest.raises(ValueError, match="resnet_binary"):
        packed.repack(resnet(), [0])
    with pytest.raises(ValueError, match=r"0\.08"):
        packed.repack(vgg(width=0.08), [0])
    with pytest.raises(TypeError, match="Linear"):
        packed.repack(nn.Linear(2, 2), [0])
    for stage in (-1, 9):
        with pytest.raises(ValueError, match=rf"0\.\.8, got {stage}"):
            packed.repack(model, [0, stage])


# ---------------------------------------------------------------- threads, processes


def run(code):
    """Run `code` in a fresh interpreter; return its output."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# One process for all of it, since it takes seconds to start: with one thread, in a forked process, with two threads,
# from two Python threads at once.
THREADS = """
import multiprocessing, torch
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(1)
from bnn_utils.models import resnet_binary, vgg_cifar10_binary
from bnn_utils.packed import pack
torch.manual_seed(0)
vgg = vgg_cifar10_binary(width=0.05, input_size=8).eval()
resnet = resnet_binary(width=0.05, depth=8, input_size=8).eval()
x = torch.randint(-256, 257, (7, 3, 8, 8)) / 128
networks = [pack(model) for model in (vgg, resnet)]

def logits(_=None):
    return torch.stack([network(x) for network in networks])

def same(_=None):
    raise SystemExit(0 if torch.equal(logits(), once) else 1)

once = logits()
child = multiprocessing.get_context("fork").Process(target=same)
child.start()
child.join(60)
if child.is_alive():
    child.kill()
print("forked", child.exitcode)
torch.set_num_threads(2)
print("threads", torch.equal(logits(), once))
for network in networks:
    network.images, network.numbers = 2, 0
resumed = [network.after(3, network.before(3, x)) for network in networks]
print("resumed", torch.equal(torch.stack(resumed), once))
with ThreadPoolExecutor(2) as pool:
    print("at-once", all(torch.equal(other, once) for other in pool.map(logits, range(8))))
"""


@pytest.mark.posix
def test_threads_and_forked_processes_compute_the_same():
    assert run(THREADS) == ["forked", "0", "threads", "True", "resumed", "True", "at-once", "True"]
