"""What training minimizes besides the cross-entropy, and the bit errors that it can train for."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils.bits import sample_positions
from bnn_utils.layers import binarized_weights


def margin_loss(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the modified hinge loss: the mean over images and classes of max(0, margin - y f).

    f is the logit of a class; y is +1 where it is the image's class, else -1. A logit beyond the margin, on its side
    of zero, asks for nothing more, so training turns to those that few flipped bits could carry across.

    Args:
        logits: (n, classes), floating point.
        labels: (n,), the classes of the images, 0..classes-1.
        margin: in units of a logit; see `bnn_utils.recipe.Recipe`.

    Source: S. Buschjäger et al., Margin-Maximization in Binarized Neural Networks for Optimizing Bit Error Tolerance,
    DATE 2021.
    """
    y = 2 * functional.one_hot(labels, logits.shape[1]) - 1
    return functional.relu(margin - y * logits).mean()


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(p || q), the mean over images, for p = softmax(teacher / T) and q = softmax(logits / T).

    KL(p || q) = sum over classes of p log(p / q). The gradients of a softened distribution shrink as 1 / T^2; the
    factor T^2 keeps their size, so that T leaves the balance with another loss as it is.

    Args:
        logits: (n, classes), floating point, of the network that is trained.
        teacher: (n, classes), of its teacher for the same images.
        temperature: T; above 1 it softens both distributions.

    Source: G. Hinton, O. Vinyals and J. Dean, Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531),
    section 2.
    """
    q, p = (functional.log_softmax(each / temperature, 1) for each in (logits, teacher))
    return temperature**2 * functional.kl_div(q, p, reduction="batchmean", log_target=True)


@contextmanager
def flipped_weights(
    model: nn.Module, probability: float, generator: np.random.Generator, spare: float = 0.0
) -> Iterator[int]:
    """Flip the sign of each binarized weight of `model` with `probability`, until the context ends.

    A flipped latent weight w becomes -w, and 0, which reads +1, a tiny negative number: the layer's weight
    changes its sign, and the straight-through gradient passes where it did before. Errors are independent, their
    number is binomial, as in `bnn_utils.bits.sample_positions`. On leaving, an exception too, every latent weight is
    back, bit for bit. Gradients with respect to the flipped weights must be computed inside the context.

    Args:
        model: any network with binarized layers, on any device.
        probability: of each weight to be flipped, in [0, 1].
        generator: where the randomness comes from.
        spare: `damage_spare` of `bnn_utils.recipe.Recipe`.

    Yields:
        The number of flipped weights.

    Raises:
        ValueError: `probability` is not in [0, 1].
    """
    latent: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []
    weights = binarized_weights(model).values()
    least = spare * sum(weight.numel() for weight in weights)
    try:
        with torch.no_grad():
            for weight in weights:
                if weight.numel() < least:
                    continue
                drawn = sample_positions(weight.numel(), probability, generator)
                positions = np.concatenate([np.empty(0, np.int64), *drawn])
                index = torch.unravel_index(torch.from_numpy(positions).to(weight.device), weight.shape)
                before = weight[index]
                latent.append((weight, index, before))
                weight[index] = torch.where(before == 0, -torch.finfo(before.dtype).tiny, -before)
        yield sum(len(before) for _, _, before in latent)
    finally:
        with torch.no_grad():
            for weight, index, before in reversed(latent):  # of a weight that two layers share, the first value last
                weight[index] = before
