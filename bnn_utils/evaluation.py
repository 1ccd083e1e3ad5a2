"""What a network makes of images: its logits, loss and accuracy."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils.data import Images
from bnn_utils.models import trained_on as trained_on


class Evaluation(NamedTuple):
    """Mean cross-entropy in nats, and the share of images whose highest logit is their class (0..1)."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Inputs:
    """What a network reads, as it reads it, with labels: of data that comes prepared, such as a DataLoader's.

    It stands wherever Images do; nothing can tell whether it is normalized as the network was trained.

    Attributes:
        inputs: (n, ...), of any type.
        labels: int64 (n,).
        dataset: the name that tables give.
    """

    inputs: Tensor
    labels: Tensor
    dataset: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return (network input, labels) of what a slice or an index tensor names."""
        return self.inputs[index], self.labels[index]

    def to(self, device: torch.device | str) -> "Inputs":
        """Return the same on `device`."""
        return Inputs(self.inputs.to(device), self.labels.to(device), self.dataset)

    def check_trained(self, facts: Mapping[str, Any]) -> None:
        """Do nothing: see above."""


def read(loader: Iterable[Any]) -> Inputs:
    """Return all that a DataLoader, or another iterable of batches (inputs, labels), gives in one pass, in its order.

    Args:
        loader: of tensors (batch, ...) and (batch,), the inputs of all batches of one shape.

    Raises:
        TypeError: what it gives is no pairs of such tensors.
        ValueError: it gives nothing.
    """
    pairs = [tuple(batch) if isinstance(batch, tuple | list) else (batch,) for batch in loader]
    if not pairs:
        raise ValueError("data must hold at least one batch of (inputs, labels), got none")
    try:
        inputs, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"data must give batches of tensors (inputs, labels), all of one shape ({error})") from None
    if labels.dim() != 1 or labels.is_floating_point():
        raise TypeError(f"labels must be whole numbers (batch,), got {labels.dtype} {tuple(labels.shape[1:])} each")
    return Inputs(inputs, labels.long(), type(getattr(loader, "dataset", loader)).__name__)


Data = Images | Inputs


@dataclass(frozen=True)
class Measure:
    """A function of a network that returns a number, in the place of images; the number is called its accuracy."""

    function: Callable[[nn.Module], float]

    @property
    def dataset(self) -> str:
        """The name that tables give: the function's."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Evaluation:
        """Return the number as accuracy, and NaN as loss, of `model` in evaluation mode."""
        with evaluating(model):
            return Evaluation(math.nan, float(self.function(model)))


def device_type(model: nn.Module) -> str:
    """Return where the numbers of a network lie, "cpu" if it has none."""
    return next((x.device.type for x in chain(model.parameters(), model.buffers())), "cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode until the context ends; then each of its modules is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batches(images: Data, batch_size: int = 500) -> Iterator[Tensor]:
    """Yield the inputs in order, as a network takes them: images (batch, channels, height, width) channels last."""
    for start in range(0, len(images), batch_size):
        x, _ = images[start : start + batch_size]
        yield x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@torch.no_grad()
def predict(model: nn.Module, images: Data, batch_size: int = 500) -> Tensor:
    """Return the logits (n, classes) of `model` in evaluation mode; model and images lie on one device.

    Raises:
        bnn_utils.data.DataError: the model comes from a file, and the images are not as it was trained on.
    """
    images.check_trained(trained_on(model))
    with evaluating(model):
        return torch.cat([model(x) for x in batches(images, batch_size)])


def evaluate(model: nn.Module, images: Data, batch_size: int = 500) -> Evaluation:
    """Return the loss and the accuracy of `model` on `images`, both on one device; see `score`."""
    return score(predict(model, images, batch_size), images.labels)


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Return the loss and the accuracy of logits (n, classes), given the images' classes (n,), 0..classes-1.

    A damaged network may put out NaN. The predicted class is torch's argmax, to which NaN is the highest logit (as
    in the published experiment); the loss becomes NaN or infinite, and is returned as that.
    """
    logits = logits.double()
    loss = functional.cross_entropy(logits, labels).item()
    return Evaluation(loss, (logits.argmax(1) == labels).double().mean().item())
