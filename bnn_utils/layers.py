"""Binarization and the layers built on it: the whole idea of a binarized network, in one file."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Sign(torch.autograd.Function):
    """sign(x) forward; backward, the gradient passes where |x| <= 1 (straight-through)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone().ge_(0).mul_(2).sub_(1)  # in place: half the time of a comparison that makes booleans

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.abs().le_(1) * gradient


class _PolynomialSign(_Sign):
    """sign(x) forward; backward, the gradient is multiplied by 2 - 2 |x| where |x| <= 1, by 0 elsewhere."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 - 2 * x.abs()).clamp(min=0) * gradient


GRADIENTS = {"straight-through": _Sign, "polynomial": _PolynomialSign}


def binarize(x: Tensor, stochastic: bool = False, gradient: str = "straight-through") -> Tensor:
    """Return +1 or -1 for every element of `x`, with a gradient although the sign has none.

    Deterministic: +1 where x >= 0, else -1; never 0, and NaN reads as -1.
    Stochastic: +1 with probability clip((x + 1) / 2, 0, 1), the "hard sigmoid" of x, drawn from torch's
    global generator; NaN again reads as -1.
    Backward, both pass the gradient where `|x| <= 1` and stop it elsewhere ("straight-through"), or multiply it by the
    slope of a curve that is closer to the sign, `2 - 2 |x|` where `|x| <= 1` and 0 elsewhere ("polynomial").

    Args:
        x: floating-point tensor of any shape.
        stochastic: draw instead of taking the sign.
        gradient: "straight-through" or "polynomial".

    Returns:
        Tensor of the shape, dtype and device of `x`, holding only +1 and -1.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: an unknown gradient.

    Source: Hubara et al., Binarized Neural Networks, NeurIPS 2016, section 1.1 and equation 4; the polynomial: Liu et
    al., Bi-Real Net, ECCV 2018 (arXiv:1808.00278), section 3.3.
    """
    if not x.is_floating_point():
        raise TypeError(f"binarize: x must be floating point, got {x.dtype}")
    if gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient {gradient!r}, expected one of {', '.join(GRADIENTS)}")
    sign = GRADIENTS[gradient].apply(x)
    if not stochastic:
        return sign
    drawn = (torch.rand_like(x) < (x + 1) / 2).to(x.dtype) * 2 - 1
    return sign + (drawn - sign).detach()  # the value drawn, the gradient of the sign


class BinarizeLinear(nn.Linear):
    """A linear layer that multiplies by binarized weights: y = sign(x) sign(W)^T + b.

    `weight` holds the real-valued ("latent") weights that training moves; the bias stays real-valued.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        binarize_input: False leaves x as it is (a first layer, whose input is data).

    Shapes: x (..., in_features) -> (..., out_features), in the dtype of x.
    Source: Hubara et al., 2016, algorithm 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, binarize_input: bool = True):
        super().__init__(in_features, out_features, bias)
        self.binarize_input = binarize_input

    def forward(self, x: Tensor) -> Tensor:
        x = binarize(x) if self.binarize_input else x
        return functional.linear(x, binarize(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, binarize_input={self.binarize_input}"


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, with right gradients where a 1x1 kernel moves in strides, as in a ResNet's shortcuts.

    There the pixels that the kernel visits are picked first, and convolved with stride 1: the same sums, by another way
    through oneDNN, torch's library for CPUs.

    Source: uxlfoundation/oneDNN, issue 6035: with a stride, few input channels and channels_last memory, the weights'
    gradient of a 1x1 convolution overruns a buffer. It comes out wrong, or the process dies.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel_size != (1, 1) or self.stride == (1, 1) or self.padding not in ((0, 0), "valid"):
            return super()._conv_forward(input, weight, bias)
        picked = functional.avg_pool2d(input, 1, self.stride)  # a slice of odd maps would lose channels_last memory
        return functional.conv2d(picked, weight, bias, groups=self.groups)


class BinarizeConv2d(Conv2d):
    """A 2-d convolution with binarized weights; zero padding, so a tap outside the image contributes nothing.

    `weight` holds the latent weights, shape (out_channels, in_channels, kernel, kernel); the bias stays real-valued.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in `torch.nn.Conv2d`.
        binarize_input: False leaves x as it is (a first layer, whose input is an image). Its sums are then computed
            in the order of channels_last memory whatever the layout of x, so that the layout changes no rounding.
        gradient: of the activations' sign, see `binarize`; that of the weights is always straight-through.

    Shapes: x (batch, in_channels, height, width) -> (batch, out_channels, height', width').
    Source: Hubara et al., 2016, algorithm 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        *,
        binarize_input: bool = True,
        gradient: str = "straight-through",
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.binarize_input, self.gradient = binarize_input, gradient

    def forward(self, x: Tensor) -> Tensor:
        if self.binarize_input:
            x = binarize(x, gradient=self.gradient)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(x, binarize(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, binarize_input={self.binarize_input}, gradient={self.gradient}"


class Shift(nn.Module):
    """Add a learned number to each channel: y = x + shift. Before a sign it is the threshold that x is held against.

    Shapes: x (batch, channels, height, width), y alike, in the dtype of x.
    Source: Liu et al., ReActNet, ECCV 2020 (arXiv:2003.03488), section 4.2 (RSign).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.to(x.dtype).view(-1, 1, 1)


class PReLU(nn.PReLU):
    """x where it is positive, slope * x elsewhere, with a learned slope a channel; in the dtype of x.

    Shapes: x (batch, channels, height, width), y alike.
    Source: He et al., Delving Deep into Rectifiers, ICCV 2015 (arXiv:1502.01852), section 2.1.
    """

    def forward(self, x: Tensor) -> Tensor:  # torch's own would widen a bfloat16 stream to float32
        return torch.where(x > 0, x, x * self.weight.to(x.dtype).view(-1, 1, 1))


BINARIZED = (BinarizeLinear, BinarizeConv2d)


def binarized_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the latent weights of every binarized layer of `model`, by their state_dict names, in order.

    A weight that several layers share comes once, by its first name.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, BINARIZED) and all(module.weight is not known for known in found.values()):
            found[f"{name}.weight" if name else "weight"] = module.weight
    return found


@torch.no_grad()
def clamp_latent_weights(model: nn.Module) -> None:
    """Clamp the latent weights to [-1, 1] in place, as training does after each optimizer step.

    Outside [-1, 1] the straight-through gradient is zero, so a weight that left could never come back.
    """
    for weight in binarized_weights(model).values():
        weight.clamp_(-1, 1)
