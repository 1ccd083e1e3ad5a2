"""What a system can do about errors that it did not see happen."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def clip(model: nn.Module, low: float = -1.0, high: float = 1.0) -> Iterator[None]:
    """Force every parameter of `model` into [low, high] until the context ends, as the published "clipped" does.

    NaN and infinities become 0, then every parameter is clamped: weights, biases, BatchNorm scale and shift;
    running statistics are left alone. Of a packed network, that is its biases, scales and shifts: bits and integer
    thresholds have nothing to clip. On leaving, an exception too, every parameter is back, bit for bit.

    Args:
        model: any network, damaged or not, packed or not.
        low, high: the bounds, low <= high.

    Raises:
        ValueError: low > high, or a bound is NaN.

    Source: the published damage experiment; see README.md.
    """
    if not low <= high:
        raise ValueError(f"clip needs low <= high, got low={low}, high={high}")
    # A packed network has no parameters; its numbers are buffers.
    parameters: list[Tensor] = [*model.parameters()] or [x for x in model.buffers() if x.is_floating_point()]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(low, high)
        yield
    finally:
        with torch.no_grad():
            for parameter, saved in zip(parameters, before, strict=True):
                parameter.copy_(saved)


def none(model: nn.Module) -> AbstractContextManager[None]:
    """Do nothing: the network is used as damaged as it is."""
    return nullcontext()


REPAIRS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {"none": none, "clip": clip}
