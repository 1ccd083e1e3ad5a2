"""Which stored bits go wrong: what a network stores, models of errors, and an injection that undoes itself."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnn_utils.bits import WORD, check_probability, sample_runs
from bnn_utils.flipping import IndexedBits, MemoryBits, bits_of
from bnn_utils.layers import BINARIZED, binarize

BITS = 32  # of a stored number in float32 storage
STORAGES = ("float32", "packed")
PARAMETERS = ("weights", "biases", "bn_scale", "bn_shift", "thresholds", "directions")
KINDS = (*PARAMETERS, "running_mean", "running_var")
_LAYER_KINDS = {"weight": "weights", "bias": "biases"}
_BATCHNORM_KINDS = {
    "weight": "bn_scale",
    "bias": "bn_shift",
    "running_mean": "running_mean",
    "running_var": "running_var",
}
_PACKED_KINDS = {
    "weight": "weights",
    "bias": "biases",
    "scale": "bn_scale",
    "shift": "bn_shift",
    "threshold": "thresholds",
    "direction": "directions",
}


@dataclass(frozen=True)
class ErrorModel:
    """How stored bits go wrong: what a bit that is hit with probability p then reads.

    A bit that stores 0 reads 1 with probability p * zero_to_one, one that stores 1 reads 0 with probability
    p * one_to_zero. With `length` 1 bits err independently; else errors come in runs of up to `length` neighbours
    in the tensor's memory, see `bnn_utils.bits.sample_runs`, and each bit keeps its probability. With `positions`
    only these bits of each element err, with equal rates the same as if all could.

    Args:
        meaning: the physical cause, one sentence.
        source: where model and numbers are from.
        zero_to_one, one_to_zero: rates in [0, 1], not both 0.
        length: bits in a run, at least 1.
        positions: the bits of an element that can err (31 is the sign of a float32), each in 0..63; None is all.

    Raises:
        ValueError: a rate, length or position outside its range.
    """

    meaning: str
    source: str
    zero_to_one: float = 1.0
    one_to_zero: float = 1.0
    length: int = 1
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("zero_to_one", "one_to_zero"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.zero_to_one == self.one_to_zero == 0:
            raise ValueError("zero_to_one and one_to_zero must not both be 0: no bit would ever err")
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        for position in self.positions or ():
            if not 0 <= position < WORD:
                raise ValueError(f"positions must lie in 0..{WORD - 1}, got {position}")


_STUCK = (
    "C.-Y. Chen et al., RRAM Defect Modeling and Failure Analysis Based on March Test and a Novel Squeeze-Search "
    "Scheme, IEEE Transactions on Computers 64(1), 2015: stuck-at faults in a 4-Mb HfO2 chip."
)
ERRORS = {
    "flip": ErrorModel(
        "A disturbed cell loses its state and reads as the opposite, whatever it stored.",
        "The error model of the published damage experiment; see README.md.",
    ),
    "stuck-at-0": ErrorModel(
        "A share p of the cells always reads 0: a resistive cell that stays in its high-resistance state.",
        _STUCK,
        zero_to_one=0.0,
    ),
    "stuck-at-1": ErrorModel(
        "A share p of the cells always reads 1: a resistive cell that stays in its low-resistance state.",
        _STUCK,
        one_to_zero=0.0,
    ),
    "asymmetric": ErrorModel(
        "A resistive cell in its high-resistance state, which stores 0, is mistaken more often than one in its "
        "low-resistance state, which stores 1.",
        "The ratio 10 to 1 is an illustration, not a measurement. The binary asymmetric channel: Z. Chen and "
        "L. Dolecek, arXiv:1912.02963. The direction: H. Yamazawa et al., 50 nm AlxOy ReRAM Array Retention "
        "Characteristics Before and After Endurance, Silicon Nanoelectronics Workshop, 2014: in a worn array the "
        "errors of the high-resistance state dominate.",
        one_to_zero=0.1,
    ),
    "burst": ErrorModel(
        "One particle upsets neighbouring cells along a word line together.",
        "K. Sakamoto et al., Multiple-Cell Upset Analysis on 16/12-nm Bulk FinFET SRAM Caused by Proton Irradiation, "
        "IEEE Transactions on Nuclear Science, 2025: at most 3 bits upset together in 16/12-nm FinFET SRAM, 7 in "
        "20-nm planar SRAM. The length 4, and that all runs have one length, are a simplification between the two.",
        length=4,
    ),
}


@dataclass
class Flips:
    """What an injection changed: `tensors` counts by tensor name, `bits` counts by bit position in the element.

    `bits` has 32 counts in float32 storage (index 31: sign). In packed storage it has 64: the bits of words count at
    0..63, those of thresholds and floats at their own positions, 0..15 or 0..31.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    bits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BITS, np.int64))

    @property
    def total(self) -> int:
        """Number of changed bits."""
        return int(self.bits.sum())


class Stored(NamedTuple):
    """A tensor in memory: its kind, and where not all of its bits hold something, a mask with 1 where one does."""

    kind: str
    tensor: Tensor
    mask: Tensor | None = None


def stored_tensors(model: nn.Module) -> dict[str, Stored]:
    """Return every tensor that the memory of `model` holds, by state_dict name, in order.

    The kind is one of KINDS: weights and biases of layers, scale and shift of BatchNorm, its running statistics;
    thresholds and directions of packed layers. A packed layer is a module with an attribute `masks`, a dict from
    the names of its buffers to their masks, of the same shape and dtype; a buffer without one is used entirely.
    """
    found: dict[str, Stored] = {}
    for name, module in model.named_modules():
        masks: dict[str, Tensor] | None = getattr(module, "masks", None)
        if masks is not None:
            kinds = _PACKED_KINDS
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            kinds = _BATCHNORM_KINDS
        else:
            kinds = _LAYER_KINDS
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            # In an ordinary layer integers, such as BatchNorm's batch counter, take no part in inference.
            if masks is not None or tensor.is_floating_point():
                mask = (masks or {}).get(key)
                found[f"{name}.{key}" if name else key] = Stored(kinds.get(key, key), tensor, mask)
    return found


def targeted(model: nn.Module, targets: Sequence[str] = PARAMETERS) -> dict[str, Tensor]:
    """Return the stored tensors that `targets` name, by state_dict name, in memory order.

    Args:
        targets: kinds (see KINDS) and names or shell patterns of tensors ("features.0.weight", "layer1.*").

    Raises:
        ValueError: a target names nothing that the network stores.
    """
    return {name: stored.tensor for name, stored in _select(stored_tensors(model), targets).items()}


def _select(stored: dict[str, Stored], targets: Sequence[str]) -> dict[str, Stored]:
    chosen: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        hit = {name for name, held in stored.items() if held.kind == target}
        if target not in KINDS:
            hit |= {name for name in stored if fnmatchcase(name, target)}
            if not hit:
                raise ValueError(
                    f"target {target!r} names nothing in this network, expected {', '.join(KINDS)} or a tensor's name"
                )
        chosen |= hit
    return {name: held for name, held in stored.items() if name in chosen}


_held: WeakSet[nn.Module] = WeakSet()


@contextmanager
def float32_storage(model: nn.Module) -> Iterator[None]:
    """Hold the network as float32 storage does: every binarized weight is +1.0 or -1.0, until the context ends.

    The network computes the same, since its layers binarize what they read. On leaving, an exception too, the
    latent weights are back, bit for bit. A network that is held already is left as it is.
    """
    # To binarize again would take several passes over every weight, far longer than to flip a few bits, and would
    # turn the damaged weights of an enclosing injection into undamaged ones.
    if model in _held:
        yield
        return
    latent: list[tuple[Tensor, Tensor]] = []
    try:
        _held.add(model)
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
        _held.discard(model)
        with torch.no_grad():
            for weight, before in latent:
                weight.copy_(before)


def _damage(
    stored: Stored,
    bits: MemoryBits | IndexedBits,
    probability: float,
    error: ErrorModel,
    generator: np.random.Generator,
) -> None:
    most = max(error.zero_to_one, error.one_to_zero)
    used = None if stored.mask is None else bits_of(stored.mask)
    for positions in sample_runs(8 * stored.tensor.nbytes, probability * most, error.length, generator):
        if used is not None:
            positions = positions[used.read(positions) == 1]
        if error.positions is not None:
            positions = positions[np.isin(positions % (8 * stored.tensor.element_size()), error.positions)]
        if error.zero_to_one != error.one_to_zero:
            share = np.where(bits.read(positions), error.one_to_zero / most, error.zero_to_one / most)
            positions = positions[generator.random(len(positions)) < share]
        if len(positions):
            bits.flip(positions)


@contextmanager
def _damaged(
    chosen: dict[str, Stored], flips: Flips, probability: float, seed: int, error: str | ErrorModel
) -> Iterator[Flips]:
    """Check the arguments, damage what is chosen, count in `flips` and yield it; on leaving every bit is back."""
    probability = check_probability(probability)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not isinstance(error, ErrorModel):
        if error not in ERRORS:
            raise ValueError(f"unknown error model {error!r}, expected one of {', '.join(ERRORS)}")
        error = ERRORS[error]
    for name, (_, tensor, _) in chosen.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32 to be damaged, got {tensor.dtype}")
    with ExitStack() as undo:
        for name, stored in chosen.items():
            # From p = 1/32 on, a copy of the tensor takes less memory than the list of its flips, 4 bytes each.
            bits = bits_of(stored.tensor, copy=32 * probability > 1)
            undo.callback(bits.restore)
            # A stream of its own for every tensor: its errors do not depend on which other tensors are targets.
            generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))  # numpy's fastest
            _damage(stored, bits, probability, error, generator)
            count = int(bits.counts.sum())
            if count:
                flips.tensors[name] = count
                flips.bits += bits.counts[: len(flips.bits)]
        yield flips


def _no_flips(stored: Iterable[Stored]) -> Flips:
    widest = max((8 * held.tensor.element_size() for held in stored), default=BITS)
    return Flips(bits=np.zeros(max(BITS, widest), np.int64))


@contextmanager
def inject(
    model: nn.Module,
    probability: float,
    *,
    seed: int,
    targets: Sequence[str] = PARAMETERS,
    error: str | ErrorModel = "flip",
) -> Iterator[Flips]:
    """Damage the memory of `model` in place; on leaving, an exception too, every bit is back.

    Memory is float32 storage: every parameter a 32-bit float, binarized weights as +1.0 and -1.0, all others (biases,
    BatchNorm scale and shift, the weights of a float network) as trained; running statistics are error-free unless
    targeted. A packed network's memory is packed storage, its buffers as they are. Every bit of the targeted tensors
    errs with the probability that the error model gives it, exactly; bits that hold nothing never change. With "flip"
    errors are independent: their number is binomial, their positions distinct and uniform. Work and memory follow the
    number of errors. The errors of a tensor depend on `seed`, `probability`, `error`, its name, size and mask, and, if
    the rates differ, on its bits, not on the device, the threads or the other targets.

    A damaged float32 weight of a binarized layer still acts as one bit, since the layer binarizes it: only its sign
    matters, and NaN reads as -1.

    Args:
        model: a network with float32 parameters, on any device, or a packed one.
        probability: of each stored bit to be hit, in [0, 1].
        seed: of this trial, a non-negative integer.
        targets: what is hit: kinds of KINDS, tensor names, or shell patterns of them.
        error: what happens to a bit that is hit: a name in ERRORS, or an ErrorModel.

    Yields:
        Flips, how many bits changed in each tensor and at each bit position.

    Raises:
        ValueError: a probability outside [0, 1], a negative seed, an unknown error model or target.
        TypeError: a targeted tensor holds floats that are not float32.

    Source: the storage of the published damage experiment, see README.md; of an error model, its `source`.
    """
    network = stored_tensors(model)
    chosen = _select(network, targets)
    with float32_storage(model), _damaged(chosen, _no_flips(network.values()), probability, seed, error) as flips:
        yield flips


@contextmanager
def inject_tensors(
    tensors: Mapping[str, Tensor], probability: float, *, seed: int, error: str | ErrorModel = "flip"
) -> Iterator[Flips]:
    """Damage tensors of no network by the rules of `inject`, every bit of them; on leaving, every bit is back.

    Args:
        tensors: by name; the errors of a tensor depend on its name as in `inject`.
        probability, seed, error: as in `inject`.

    Yields:
        Flips, with 32 counts in `bits`, or 64 where an element has that many bits.

    Raises:
        ValueError: a probability outside [0, 1], a negative seed or an unknown error model.
        TypeError: a tensor holds floats that are not float32.
    """
    chosen = {name: Stored("", tensor) for name, tensor in tensors.items()}
    with _damaged(chosen, _no_flips(chosen.values()), probability, seed, error) as flips:
        yield flips
