"""Which stored bits flip: float32 storage, its targets, and an injection that undoes itself."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnn_utils.bits import check_probability, float_to_bits, sample_positions
from bnn_utils.layers import BINARIZED, binarize

BITS = 32  # of a stored number in float32 storage
STORAGES = ("float32",)
ERRORS = ("flip",)
PARAMETERS = ("weights", "biases", "bn_scale", "bn_shift")
KINDS = (*PARAMETERS, "running_mean", "running_var")
_BATCHNORM_KINDS = {
    "weight": "bn_scale",
    "bias": "bn_shift",
    "running_mean": "running_mean",
    "running_var": "running_var",
}


@dataclass
class Flips:
    """What an injection flipped: `tensors` counts by tensor name, `bits` counts by bit position (index 31: sign)."""

    tensors: dict[str, int] = field(default_factory=dict)
    bits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BITS, np.int64))

    @property
    def total(self) -> int:
        """Number of flipped bits."""
        return int(self.bits.sum())


def stored_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return every tensor that the memory of `model` holds: state_dict name -> (kind, tensor), in order.

    The kind is one of KINDS: weights and biases of layers, scale and shift of BatchNorm, its running statistics.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            if not tensor.is_floating_point():
                continue  # BatchNorm's batch counter takes no part in inference
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                kind = _BATCHNORM_KINDS[key]
            else:
                kind = {"weight": "weights", "bias": "biases"}.get(key, key)
            found[f"{name}.{key}" if name else key] = (kind, tensor)
    return found


def targeted(model: nn.Module, targets: Sequence[str] = PARAMETERS) -> dict[str, Tensor]:
    """Return the stored tensors that `targets` name, by state_dict name, in memory order.

    Args:
        targets: kinds (see KINDS) and names or shell patterns of tensors ("features.0.weight", "layer1.*").

    Raises:
        ValueError: a target names nothing that the network stores.
    """
    if isinstance(targets, str):
        targets = (targets,)
    stored = stored_tensors(model)
    for target in targets:
        if target not in KINDS and not any(
            target == kind or fnmatchcase(name, target) for name, (kind, _) in stored.items()
        ):
            raise ValueError(
                f"target {target!r} names nothing in this network, expected {', '.join(KINDS)} or a tensor's name"
            )
    return {
        name: tensor
        for name, (kind, tensor) in stored.items()
        if any(target == kind or fnmatchcase(name, target) for target in targets)
    }


@contextmanager
def float32_storage(model: nn.Module) -> Iterator[None]:
    """Hold the network as float32 storage does: every binarized weight is +1.0 or -1.0, until the context ends.

    The network computes the same, since its layers binarize what they read. On leaving, an exception too, the
    latent weights are back, bit for bit.
    """
    latent: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, BINARIZED):
                    weight = module.weight
                    stored = binarize(weight)
                    if not torch.equal(stored, weight):
                        latent.append((weight, weight.detach().clone()))
                        weight.copy_(stored)
        yield
    finally:
        with torch.no_grad():
            for weight, before in latent:
                weight.copy_(before)


@contextmanager
def _flip(name: str, tensor: Tensor, probability: float, seed: int, flips: Flips) -> Iterator[None]:
    stored = float_to_bits(tensor.detach())
    # A stream of its own for every tensor: its flips do not depend on which other tensors are targets.
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    undo: list[tuple[tuple[Tensor, ...], Tensor]] = []
    try:
        for positions in sample_positions(tensor.numel() * BITS, probability, generator):
            words, first = np.unique(positions // BITS, return_index=True)
            masks = np.add.reduceat(np.int64(1) << positions % BITS, first).astype(np.uint32).view(np.int32)
            index = torch.unravel_index(torch.from_numpy(words).to(tensor.device), tensor.shape)
            before = stored[index].clone()  # of a tensor without dimensions, indexing gives a view
            undo.append((index, before))
            stored[index] = before ^ torch.from_numpy(masks).to(tensor.device)
            flips.tensors[name] = flips.tensors.get(name, 0) + len(positions)
            flips.bits += np.bincount(positions % BITS, minlength=BITS)
        yield
    finally:
        for index, before in reversed(undo):  # a word that two chunks share gets its first value last
            stored[index] = before


@contextmanager
def inject(
    model: nn.Module,
    probability: float,
    *,
    seed: int,
    targets: Sequence[str] = PARAMETERS,
    error: str = "flip",
) -> Iterator[Flips]:
    """Damage the memory of `model` in place; on leaving, an exception too, every bit is back.

    Memory is float32 storage: every parameter a 32-bit float, binarized weights as +1.0 and -1.0, biases and
    BatchNorm scale and shift as trained; running statistics are error-free unless targeted. Every bit of the
    targeted tensors flips independently with the same probability, exactly: the number of flips is binomial, their
    positions distinct and uniform. Work follows the number of flips. The flips of a tensor depend on `seed`,
    `probability`, its name and its size alone, not on the device, the threads or the other targets.

    A damaged weight still acts as one bit, since its layer binarizes it: only its sign matters, and NaN reads as -1.

    Args:
        model: a network with float32 parameters, on any device.
        probability: of each stored bit to flip, in [0, 1].
        seed: of this trial, a non-negative integer.
        targets: what is hit: kinds of KINDS, tensor names, or shell patterns of them.
        error: "flip", each bit inverts.

    Yields:
        Flips, how many bits flipped in each tensor and at each bit position.

    Raises:
        ValueError: a probability outside [0, 1], a negative seed, an unknown error model or target.
        TypeError: a targeted tensor is not float32.

    Source: the storage and error model of the published damage experiment; see README.md.
    """
    probability = check_probability(probability)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if error not in ERRORS:
        raise ValueError(f"unknown error model {error!r}, expected one of {', '.join(ERRORS)}")
    tensors = targeted(model, targets)
    flips = Flips()
    with ExitStack() as stack:
        stack.enter_context(float32_storage(model))
        for name, tensor in tensors.items():
            stack.enter_context(_flip(name, tensor, probability, seed, flips))
        yield flips
