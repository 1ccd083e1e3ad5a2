"""The deployed form of a binarized network: 1 bit a weight, integer thresholds, XNOR and popcount on the CPU."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils.bits import WORD, pack_signs, unpack_signs
from bnn_utils.layers import BINARIZED, BinarizeConv2d
from bnn_utils.models import BasicBlock, BinarizedResNet, BinarizedVGG, build

try:
    from bnn_utils import kernels
except ImportError:  # a machine without Numba
    kernels = None  # type: ignore[assignment]

ENGINES = ("numba", "torch") if kernels else ("torch",)
PANEL = 32  # filters that lie side by side in memory, as the compiled kernel reads them


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Let torch compute with one thread, in this Python thread and in those that are started meanwhile."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


@lru_cache(maxsize=4)
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads to compute with, for the process of this number: of its parent's, a forked one has none.

    They are kept, since memory that new threads ask for comes slowly.
    """
    return ThreadPoolExecutor(threads)


def _words(n: int) -> int:
    return -(-n // WORD)


def _array(x: Tensor) -> NDArray[Any]:
    """Return the memory of a tensor of words as uint64 words; other tensors as they are."""
    return x.numpy().view(np.uint64) if x.dtype == torch.int64 else x.numpy()


def _pack(positive: Tensor) -> Tensor:
    return torch.from_numpy(pack_signs(positive.float() - 0.5).view(np.int64))


class PackedLayer(nn.Module):
    """A binarized convolution, or linear layer, of which memory holds one bit a weight.

    A linear layer is a convolution whose kernel covers its whole input. Calling the layer gives the integers of the
    convolution, without bias. Its buffers are what is stored:

    - weight: int64 words (panels, kernel * kernel * words, PANEL): bit i of word k is 1 where the weight of input
      channel 64 k + i is +1; the filters of a panel lie side by side;
    - after `fold`, threshold, int16 or int32 (channels,), and direction, int64 words with a bit a channel: the
      activation is +1 where integer >= threshold, inverted where the channel's direction is 1;
    - bias, float32 (channels,), where the float layer has one that is not folded.

    `masks` holds, by name, what is used of buffers whose words have bits to spare: 1 for each bit that means something.

    Source: Hubara et al., Binarized Neural Networks, NeurIPS 2016 (XNOR and popcount); Umuroglu et al., FINN: A
    Framework for Fast, Scalable Binarized Neural Network Inference, FPGA 2017 (BatchNorm and sign as a threshold).
    """

    weight: Tensor
    threshold: Tensor
    direction: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module, side: int = 1, keep_bias: bool = False):
        """Pack `layer`; the input of a linear layer is a flattened map of side x side."""
        super().__init__()
        if not isinstance(layer, BINARIZED):
            raise TypeError(f"only binarized layers can be packed, got {type(layer).__name__}")
        signs = layer.weight.detach()
        self.stride, self.padding = 1, 0
        if isinstance(layer, BinarizeConv2d):
            self.stride, self.padding = int(layer.stride[0]), int(layer.padding[0])
        else:
            signs = signs.view(len(signs), -1, side, side)
        self.channels, self.inputs, self.kernel = signs.shape[:3]
        self.engine = ENGINES[0]
        words = pack_signs(signs.permute(2, 3, 0, 1)).reshape(self.kernel**2, self.channels, -1)
        self.register_buffer("weight", self._panels(words))
        if keep_bias and layer.bias is not None:
            self.register_buffer("bias", layer.bias.detach().clone())
        self.masks: dict[str, Tensor] = {}
        if self.inputs % WORD or self.channels % PANEL:
            used = pack_signs(torch.ones(self.inputs))
            self.masks["weight"] = self._panels(np.broadcast_to(used, words.shape))

    def _panels(self, words: NDArray[np.uint64]) -> Tensor:
        """Lay words (taps, channels, words) out as the kernel reads them."""
        taps, _, count = words.shape
        padded = np.zeros((-(-self.channels // PANEL) * PANEL, taps, count), np.uint64)
        padded[: self.channels] = words.transpose(1, 0, 2)
        panels = padded.reshape(-1, PANEL, taps * count).transpose(0, 2, 1)
        return torch.from_numpy(np.ascontiguousarray(panels).view(np.int64))

    def signs(self) -> Tensor:
        """Return the weights as float32 +1 and -1, (channels, inputs, kernel, kernel)."""
        filters = _array(self.weight).transpose(0, 2, 1).reshape(-1, self.kernel, self.kernel, _words(self.inputs))
        signs = unpack_signs(filters[: self.channels], self.inputs).permute(0, 3, 1, 2)
        return signs.clone(memory_format=torch.contiguous_format)  # as the float layer has them

    def fold(self, norm: nn.Module, bias: Tensor | None) -> "PackedLayer":
        """Turn bias, BatchNorm and the sign after it into an integer threshold and a direction per channel.

        Along the integers that the layer can give, that sign changes at most once (NaN reads as -1). Bisection finds
        the place with torch's own BatchNorm, so that rounding, and a damaged network's zero, infinite and NaN numbers,
        decide as they do in the float network.
        """
        largest = self.inputs * self.kernel**2
        mean, variance, scale, shift, eps = _statistics(norm)

        def positive(integers: Tensor) -> Tensor:
            sums = integers.float() if bias is None else integers.float() + bias.detach()
            return functional.batch_norm(sums[None], mean, variance, scale, shift, False, 0.0, eps)[0] >= 0

        low, high = torch.full((self.channels,), -largest), torch.full((self.channels,), largest)
        at_high = positive(high)
        # `high` has the sign of the largest integer, what is below `low` has not.
        for _ in range(largest.bit_length() + 1):
            middle = (low + high) >> 1
            reached = positive(middle) == at_high
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        short = largest <= torch.iinfo(torch.int16).max
        self.register_buffer("threshold", high.to(torch.int16 if short else torch.int32))
        self.register_buffer("direction", _pack(~at_high))
        if self.channels % WORD:
            self.masks["direction"] = _pack(torch.ones(self.channels, dtype=torch.bool))
        return self

    def image(self, x: Tensor) -> Tensor:
        """Convolve a float image (images, inputs, height, width), with bias, to (images, height', width', channels)."""
        x = x.contiguous(memory_format=torch.channels_last)  # as in the float layer, where it decides how sums round
        with _one_torch_thread():  # more of them would go on spinning after their work, in the way of the kernel's
            y = functional.conv2d(x, self.signs(), getattr(self, "bias", None), self.stride, self.padding)
        return y.permute(0, 2, 3, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Return the integers of the convolution: int32 (images, height', width', channels).

        Args:
            x: activations, int64 words (images, height, width, words).
        """
        if x.shape[3] != _words(self.inputs):
            raise ValueError(f"this layer reads {_words(self.inputs)} words a position, got {x.shape[3]}")
        if self.engine == "torch":
            signs = unpack_signs(_array(x), self.inputs).permute(0, 3, 1, 2)
            y = functional.conv2d(signs, self.signs(), None, self.stride, self.padding)
            return y.round().to(torch.int32).permute(0, 2, 3, 1).contiguous()
        height, width = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in x.shape[1:3])
        out = torch.empty((len(x), height, width, self.channels), dtype=torch.int32)
        kernels.dots(
            _array(x),
            _array(self.weight),
            inputs=self.inputs,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            out=out.numpy(),
            threads=torch.get_num_threads(),
        )
        return out

    def bits(self, x: Tensor, pool: int = 1) -> Tensor:
        """Return the folded layer's activations after max-pooling, as words (images, height', width', words)."""
        dots = self(x)
        if self.engine == "torch":
            pooled = functional.max_pool2d(dots.permute(0, 3, 1, 2).float(), pool).permute(0, 2, 3, 1)
            inverted = unpack_signs(_array(self.direction), self.channels) > 0
            return _pack((pooled >= self.threshold) != inverted)
        shape = (len(dots), dots.shape[1] // pool, dots.shape[2] // pool, _words(self.channels))
        out = torch.empty(shape, dtype=torch.int64)
        kernels.threshold_bits(
            dots.numpy(),
            self.threshold.numpy(),
            _array(self.direction),
            pool=pool,
            out=_array(out),
            threads=torch.get_num_threads(),
        )
        return out


class Affine(nn.Module):
    """BatchNorm in evaluation mode, as the two numbers a channel that it comes down to: y = x * scale + shift.

    They are rounded as torch rounds them, and computed with by a fused multiply-add, as there. Buffers: scale and
    shift, float32 (channels,).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.Module):
        super().__init__()
        mean, variance, weight, bias, eps = _statistics(norm)
        scale = torch.rsqrt(variance + eps) * weight
        shift = (bias.double() - mean.double() * scale.double()).float()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.masks: dict[str, Tensor] = {}
        self.engine = ENGINES[0]

    def bits(self, x: Tensor) -> Tensor:
        """Return the signs of x * scale + shift alone, as words."""
        return _affine(x, None, self.scale, self.shift, False, self.engine, keep=False)[1]

    def forward(self, x: Tensor, shortcut: Tensor | None = None, clamp: bool = False) -> tuple[Tensor, Tensor]:
        """Return (x + shortcut) * scale + shift, clamped to [-1, 1] if `clamp`, and its signs as words.

        Args:
            x: int32 or float32 (images, height, width, channels).
            shortcut: float32 of that shape, or None.
        """
        return _affine(x, shortcut, self.scale, self.shift, clamp, self.engine)


def _affine(
    x: Tensor, shortcut: Tensor | None, scale: Tensor, shift: Tensor, clamp: bool, engine: str, keep: bool = True
) -> tuple[Tensor, Tensor]:
    if engine == "torch":
        y = x.float() if shortcut is None else x.float() + shortcut
        y = (y.double() * scale.double() + shift.double()).float()
        y = functional.hardtanh(y) if clamp else y
        return y, _pack(y >= 0)
    none = torch.empty((0, 1, 1, 1))
    values = torch.empty(x.shape) if keep else none
    out = torch.empty((*x.shape[:3], _words(x.shape[3])), dtype=torch.int64)
    kernels.affine(
        x.numpy(),
        (none if shortcut is None else shortcut).numpy(),
        scale.numpy(),
        shift.numpy(),
        clamp=clamp,
        values=values.numpy(),
        out=_array(out),
        threads=torch.get_num_threads(),
    )
    return values, out


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return a BatchNorm's running mean and variance, scale, shift and epsilon."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise TypeError(f"only BatchNorm with running statistics can be packed, got {norm}")
    ones = torch.ones(norm.num_features)
    weight = ones if norm.weight is None else norm.weight.detach()
    bias = 0 * ones if norm.bias is None else norm.bias.detach()
    return norm.running_mean, norm.running_var, weight, bias, norm.eps


class PackedModel(nn.Module):
    """A packed network, made by `pack`: from images (batch, channels, height, width) to logits (batch, classes).

    It computes on the CPU, with torch's number of threads. Its layers bear the names of the float network's.
    """

    # How many images go through together: as many as keep what the first layer puts out, in numbers, within the
    # caches, but at least so many that the calls themselves do not show.
    images, numbers = 16, 3 << 16

    def __init__(self, model: BinarizedVGG | BinarizedResNet):
        super().__init__()
        self.name, self.config = model.name, dict(model.config)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of one chunk of images."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4:
            raise ValueError(
                "a packed network wants float32 images (batch, channels, height, width) on the CPU, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        channels = next(module.channels for module in self.modules() if isinstance(module, PackedLayer))
        together = max(self.images, self.numbers // (channels * max(1, x[:1, 0].numel())))
        chunks = max(1, -(-len(x) // together))
        parts = x.detach().tensor_split(chunks)
        threads = min(torch.get_num_threads(), chunks)
        if threads == 1:
            return torch.cat([self.logits(part) for part in parts])
        # A thread a chunk: they never wait for each other, so another program's work slows them no more than it must.
        with _one_torch_thread():
            return torch.cat(list(_workers(threads, os.getpid()).map(self.logits, parts)))


class PackedVGG(PackedModel):
    """`BinarizedVGG`, packed: an image layer in floats, then integers and bits alone up to the last BatchNorm."""

    features: nn.ModuleDict
    classifier: nn.ModuleDict

    def __init__(self, model: BinarizedVGG):
        super().__init__(model)
        self.pools: list[int] = []  # of the hidden layers
        for part in ("features", "classifier"):
            layers = getattr(model, part)
            packed = nn.ModuleDict()
            for index, layer in enumerate(layers):
                if not isinstance(layer, BINARIZED):
                    continue
                pooled = isinstance(layers[index + 1], nn.MaxPool2d)
                norm = layers[index + 1 + pooled]
                first, last = part == "features" and not index, part == "classifier" and layer is layers[-2]
                side = int(model.config["input_size"]) // 8 if part == "classifier" and not index else 1
                packed[str(index)] = own = PackedLayer(layer, side, keep_bias=first or last)
                if first or last:
                    packed[str(index + 1)] = Affine(norm)
                else:
                    own.fold(norm, layer.bias)
                    self.pools.append(2 if pooled else 1)
            self.add_module(part, packed)

    def logits(self, x: Tensor) -> Tensor:
        size = self.config["input_size"]
        if x.shape[2:] != (size, size):
            raise ValueError(f"this network wants images of {size} x {size} pixels, got {tuple(x.shape)}")
        layers: list[Any] = [*self.features.values(), *self.classifier.values()]
        first, norm, *hidden, last, last_norm = layers
        words = norm.bits(first.image(x))
        for layer, pool in zip(hidden, self.pools, strict=True):
            words = layer.bits(words, pool)
        return last_norm(last(words) + last.bias)[0].flatten(1)


class PackedBlock(nn.Module):
    """`BasicBlock`, packed: the shortcut stays in floats, the convolution inside becomes bits by a threshold."""

    def __init__(self, block: BasicBlock):
        super().__init__()
        self.conv1 = PackedLayer(block.conv1).fold(block.bn1, None)
        self.conv2 = PackedLayer(block.conv2)
        self.bn2 = None if block.bn2 is None else Affine(block.bn2)
        self.downsample: nn.ModuleList | None = None
        if block.downsample is not None:
            convolution, norm = block.downsample.children()
            self.downsample = nn.ModuleList([PackedLayer(convolution), Affine(norm)])
        self.shortcut = block.shortcut

    def forward(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's values and their signs, from those of the block before."""
        dots = self.conv2(self.conv1.bits(words))
        if self.downsample is not None:
            convolution, norm = self.downsample
            x, _ = norm(convolution(words))
        shortcut = x if self.shortcut else None
        if self.bn2 is None:
            return (dots.float() if shortcut is None else dots + shortcut), words
        return self.bn2(dots, shortcut, clamp=True)


class PackedResNet(PackedModel):
    """`BinarizedResNet`, packed: floats along the shortcuts, bits inside the blocks."""

    layer1: nn.ModuleList
    layer2: nn.ModuleList
    layer3: nn.ModuleList

    def __init__(self, model: BinarizedResNet):
        super().__init__(model)
        self.conv1, self.bn1 = PackedLayer(model.conv1), Affine(model.bn1)
        for stage in ("layer1", "layer2", "layer3"):
            self.add_module(stage, nn.ModuleList(PackedBlock(block) for block in getattr(model, stage)))
        self.bn2, self.fc, self.bn3 = Affine(model.bn2), PackedLayer(model.fc, keep_bias=True), Affine(model.bn3)

    def logits(self, x: Tensor) -> Tensor:
        values, words = self.bn1(self.conv1.image(x), clamp=True)
        for block in [*self.layer1, *self.layer2, *self.layer3]:
            values, words = block(values, words)
        # Sums round in the order of memory, which is that of the image layer; one channel is laid out either way.
        layout = torch.contiguous_format if x.shape[1] == 1 else torch.channels_last
        means = values.permute(0, 3, 1, 2).contiguous(memory_format=layout).mean((2, 3))
        words = self.bn2.bits(means[:, None, None])
        return self.bn3(self.fc(words) + self.fc.bias)[0].flatten(1)


@lru_cache(maxsize=8)
def _as_built(name: str, *config: tuple[str, Any]) -> str:
    """Return what a network's layers print when nobody has replaced any."""
    with torch.random.fork_rng(devices=[]):  # building draws weights
        return str(build(name, **dict(config)))


def pack(model: nn.Module, engine: str = ENGINES[0]) -> PackedModel:
    """Return the deployed form of a trained VGG or ResNet; the integers of its layers are the float network's.

    BatchNorm and sign become one integer threshold and a direction per channel where only the sign goes on (hidden
    layers of the VGG, the convolution inside a block of the ResNet). They stay a scale and a shift in floats after the
    image layer, along the ResNet's shortcuts, and after the last layer. Numbers of a damaged network, NaN and infinity
    too, are taken as they are. The packed network holds copies; it does not follow later changes of `model`.

    Args:
        model: a network of `bnn_utils.models`, float32, on the CPU.
        engine: "numba", the compiled kernel, or "torch", the same integers by float convolutions of +1 and -1.

    Returns:
        A module from float32 images (batch, channels, height, width) to logits (batch, classes), whose buffers are
        what a device stores; see `PackedLayer` and `Affine`.

    Raises:
        TypeError: another kind of network, one whose layers were replaced by others, or one that is not float32 on
            the CPU.
        ValueError: an unknown engine, or one that this machine lacks.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown or missing engine {engine!r}, expected one of {', '.join(ENGINES)}")
    kind: Any = {BinarizedVGG: PackedVGG, BinarizedResNet: PackedResNet}.get(type(model))  # no subclass: it may differ
    if kind is None:
        raise TypeError(f"only networks of bnn_utils.models can be packed, got {type(model).__name__}")
    known = _as_built(model.name, *model.config.items())  # type: ignore[operator, union-attr]
    for own, line in zip_longest(str(model).splitlines(), known.splitlines(), fillvalue="nothing"):
        if own != line:
            raise TypeError(f"only networks as bnn_utils.models builds them can be packed, got {own.strip()}")
    if any(parameter.dtype != torch.float32 or parameter.device.type != "cpu" for parameter in model.parameters()):
        raise TypeError("only float32 networks on the CPU can be packed")
    packed: PackedModel = kind(model)
    for module in packed.modules():
        if isinstance(module, PackedLayer | Affine):
            module.engine = engine
    return packed.eval()


def deployed(model: nn.Module) -> nn.Module:
    """Return `model` packed where it can be and Numba makes that faster; else `model` itself.

    The predictions are the same up to coincidences of rounding: torch adds a bias and the pixels of an image in an
    order of its own, which can decide a sign only where BatchNorm gives zero up to the last digits.
    """
    try:
        return pack(model) if ENGINES[0] == "numba" else model
    except TypeError:
        return model
