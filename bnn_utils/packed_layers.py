"""What a packed network stores, and how it computes: 1 bit a weight, integer thresholds, scales and shifts."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils import kernels
from bnn_utils.bits import WORD, pack_signs, unpack_signs
from bnn_utils.layers import BINARIZED, BinarizeConv2d
from bnn_utils.loops import (
    BLOCK,
    CARRY_SAVE,
    PANEL,
    affine_images,
    dots_blocks,
    largest_sums,
    rectified_images,
    threshold_images,
)
from bnn_utils.system import one_thread


def _words(n: int) -> int:
    return -(-n // WORD)


def _array(x: Tensor) -> NDArray[Any]:
    """Return the memory of a tensor of words as uint64 words; other tensors as they are."""
    return x.numpy().view(np.uint64) if x.dtype == torch.int64 else x.numpy()


def _empty_words(places: tuple[int, ...], channels: int) -> Tensor:
    return torch.empty((*places, _words(channels)), dtype=torch.int64)


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

        # An inverse in closed form would be mean - shift * sqrt(variance + eps) / scale, rounded: one integer off where
        # torch rounds otherwise, and nothing at all for the scale 0, infinity or NaN of a damaged network.
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
        with one_thread():  # more of them would go on spinning after their work, in the way of the kernel's
            y = functional.conv2d(x, self.signs(), getattr(self, "bias", None), self.stride, self.padding)
        return y.permute(0, 2, 3, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Return the integers of the convolution: int32 (images, height', width', channels).

        Args:
            x: activations, int64 words (images, height, width, words).
        """
        if x.shape[3] != _words(self.inputs):
            raise ValueError(f"this layer reads {_words(self.inputs)} words a position, got {x.shape[3]}")
        images, height, width, words = x.shape
        down, row_kind = kernels.geometry(height, self.kernel, self.stride, self.padding)
        across, column_kind = kernels.geometry(width, self.kernel, self.stride, self.padding)
        activations, filters, pad = np.ascontiguousarray(_array(x)), _array(self.weight), self.padding
        if pad:
            activations = np.zeros((images, height + 2 * pad, width + 2 * pad, words), np.uint64)
            activations[:, pad:-pad, pad:-pad] = _array(x)
        largest = largest_sums(filters, words, down, across, self.inputs)
        out = torch.empty((images, len(row_kind), len(column_kind), self.channels), dtype=torch.int32)
        blocks = -(-images * len(row_kind) * len(column_kind) // BLOCK)
        shape = (largest, row_kind * len(across), column_kind, self.kernel, self.stride)
        kernels.run(dots_blocks, blocks, kernels.TILE is CARRY_SAVE, activations, filters, *shape, out.numpy())
        return out

    def bits(self, x: Tensor, pool: int = 1) -> Tensor:
        """Return the folded layer's activations after max-pooling, as words (images, height', width', words)."""
        dots = self(x)
        out = _empty_words((len(dots), dots.shape[1] // pool, dots.shape[2] // pool), self.channels)
        threshold, direction = self.threshold.numpy(), _array(self.direction)
        kernels.run(threshold_images, len(dots), dots.numpy(), threshold, direction, pool, _array(out))
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

    def bits(self, x: Tensor) -> Tensor:
        """Return the signs of x * scale + shift alone, as words."""
        return self(x, keep=False)[1]

    def forward(
        self, x: Tensor, shortcut: Tensor | None = None, clamp: bool = False, keep: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return (x + shortcut) * scale + shift, clamped to [-1, 1] if `clamp`, and its signs as words.

        Args:
            x: int32 or float32 (images, height, width, channels).
            shortcut: float32 of that shape, or None.
            clamp: whether to clamp.
            keep: False returns no numbers, but signs alone.
        """
        return _affine(x, shortcut, self.scale, self.shift, clamp, keep)

    def rectified(self, x: Tensor, shortcut: Tensor, slope: Tensor) -> Tensor:
        """Return y = x * scale + shift + shortcut where y is positive, slope * y elsewhere.

        Args:
            x: int32 (images, height, width, channels).
            shortcut: float32 of that shape.
            slope: float32 (channels,).
        """
        out = torch.empty(x.shape)
        arrays = (each.numpy() for each in (x, shortcut, self.scale, self.shift, slope, out))
        kernels.run(rectified_images, len(x), *arrays)
        return out


class Numbers(nn.Module):
    """Numbers that are stored as they are, float32: the buffers that it is given, by name."""

    weight: Tensor
    bias: Tensor
    offset: Tensor
    slope: Tensor

    def __init__(self, **numbers: Tensor):
        super().__init__()
        for name, value in numbers.items():
            self.register_buffer(name, value.detach().clone())
        self.masks: dict[str, Tensor] = {}


def _affine(
    x: Tensor, shortcut: Tensor | None, scale: Tensor, shift: Tensor, clamp: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    none = torch.empty((0, 1, 1, 1))
    values, signs = torch.empty(x.shape) if keep else none, _empty_words(x.shape[:3], x.shape[3])
    arrays = (each.numpy() for each in (x, none if shortcut is None else shortcut, scale, shift))
    kernels.run(affine_images, len(x), *arrays, clamp, values.numpy(), _array(signs))
    return values, signs


def shifted_signs(x: Tensor, offset: Tensor) -> Tensor:
    """Return the signs of x + offset as words, for x float32 (images, height, width, channels)."""
    scale = torch.ones_like(offset)  # with which a fused multiply-add rounds once, as a sum does
    return _affine(x, None, scale, offset, clamp=False, keep=False)[1]


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return a BatchNorm's running mean and variance, scale, shift and epsilon."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise TypeError(f"only BatchNorm with running statistics can be packed, got {norm}")
    ones = torch.ones(norm.num_features)
    weight = ones if norm.weight is None else norm.weight.detach()
    bias = 0 * ones if norm.bias is None else norm.bias.detach()
    return norm.running_mean, norm.running_var, weight, bias, norm.eps
