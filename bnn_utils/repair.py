"""What a system can do about errors that it did not see happen, and how many bits it stores for that."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnn_utils.faults import PARAMETERS, Stored, float32_storage, replaced, selected

FLOATS = tuple(kind for kind in PARAMETERS if kind != "weights")  # of a binarized network few bits, integers too
NUMBERS = tuple(kind for kind in FLOATS if kind != "directions")


class Plan(NamedTuple):
    """A repair of one network, planned while the network was undamaged.

    Attributes:
        stored: what memory holds besides the network, by name. It suffers the errors that the network's bits suffer.
        read: returns a context manager; inside, the network, damaged or not, is what the repair makes of it and of
            `stored`: of each tensor by itself where `stored` is empty. On leaving, an exception too, it is as damaged
            as before, bit for bit.
    """

    stored: dict[str, Tensor]
    read: Callable[[], AbstractContextManager[None]]


def none(model: nn.Module) -> Plan:
    """Do nothing: the network is used as damaged as it is."""
    return Plan({}, nullcontext)


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
    with replaced((x, x.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(low, high)) for x in parameters):
        yield


def range_check(model: nn.Module) -> Plan:
    """Plan to replace numbers that training never gave: outside their tensor's range, or NaN, they become its mean.

    The range reaches from the lowest to the highest trained number of the tensor; the mean of integers is rounded.
    Range and mean are constants of the program that checks, not in the damaged memory, so nothing is stored. Weights
    and directions are bits and have no range; of a damaged float32 weight only the sign matters. Tensors with a
    trained number that is not finite are not checked. An undamaged network stays as it is, bit for bit.
    """
    ranges: list[tuple[Tensor, float, float, float]] = []
    for _, tensor, _ in selected(model, NUMBERS).values():
        numbers = tensor.detach()
        if len(numbers.reshape(-1)) and torch.isfinite(numbers).all():
            mean = numbers.double().mean().item()
            mean = mean if numbers.is_floating_point() else round(mean)
            ranges.append((tensor, numbers.min().item(), numbers.max().item(), mean))

    def checked() -> Iterator[tuple[Tensor, Tensor]]:
        for tensor, low, high, mean in ranges:
            yield tensor, torch.where((tensor >= low) & (tensor <= high), tensor, mean)

    return Plan({}, lambda: replaced(checked()))


# Every code of 64 data bits and 8 check bits whose columns are different and odd corrects one error and detects two.
# The fewest ones, spread evenly over the check bits: all 56 columns with three of them, and 8 with five.
_COLUMNS = [column for column in range(256) if column.bit_count() == 3]
_COLUMNS += [(0b11111 << turn | 0b11111 >> (8 - turn)) & 255 for turn in range(8)]
_ROWS = [np.uint64(sum(1 << i for i, column in enumerate(_COLUMNS) if column >> bit & 1)) for bit in range(8)]
_ERRORS = np.zeros(256, np.uint64)  # the data bit that a syndrome accuses: none if a check bit, or several, are wrong
_ERRORS[_COLUMNS] = np.uint64(1) << np.arange(64, dtype=np.uint64)


def encode(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the 8 check bits of each word in a SECDED (72, 64) code: single errors corrected, double ones detected.

    Check bit j is the parity of the data bits whose column has bit j.

    Args:
        words: uint64, any shape.

    Returns:
        uint8 of that shape.

    Source: M. Y. Hsiao, A Class of Optimal Minimum Odd-weight-column SEC-DED Codes, IBM Journal of Research and
    Development 14(4), 1970; which five-bit columns, and their order, are our choice.
    """
    check = np.zeros(words.shape, np.uint8)
    for bit, row in enumerate(_ROWS):
        check |= (np.bitwise_count(words & row) & 1) << bit
    return check


def correct(words: NDArray[np.uint64], check: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return `words` with single errors corrected, in data or check bits; a detected double error is left as read.

    Three errors or more in a word and its check bits may be taken for a single one, and then another bit is inverted.

    Args:
        words, check: uint64 and uint8 of one shape, damaged or not, as given to and by `encode`.
    """
    return words ^ _ERRORS[encode(words) ^ check]


def majority(*reads: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return, bit by bit, what most of an odd number of arrays of one shape say."""
    if len(reads) == 3:
        a, b, c = reads
        return a & b | a & c | b & c
    ones = sum(np.unpackbits(read).astype(np.uint8) for read in reads)
    return np.packbits(ones > len(reads) // 2)


def _memory(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor in logical order."""
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)


def _bits(tensor: Tensor) -> NDArray[np.uint8]:
    return np.unpackbits(_memory(tensor), bitorder="little")


def _used(held: Stored) -> NDArray[np.uint8]:
    """Return the bits of a tensor that hold something, in order, as bytes; zeros fill the last byte up."""
    if held.mask is None:
        return _memory(held.tensor)
    return np.packbits(_bits(held.tensor)[_bits(held.mask) == 1], bitorder="little")


def _used_bits(held: Stored) -> int:
    return 8 * held.tensor.nbytes if held.mask is None else int(_bits(held.mask).sum(dtype=np.int64))


def _with_used(held: Stored, used: NDArray[np.uint8]) -> Tensor:
    """Return a tensor like the one held, in which the bits that hold something are those of `used`."""
    if held.mask is not None:
        bits, at = _bits(held.tensor), _bits(held.mask) == 1
        bits[at] = np.unpackbits(used, count=int(at.sum()), bitorder="little")
        used = np.packbits(bits, bitorder="little")
    return torch.from_numpy(used).view(held.tensor.dtype).reshape(held.tensor.shape)


def _guarded(
    model: nn.Module,
    targets: Sequence[str],
    store: Callable[[NDArray[np.uint8]], dict[str, NDArray[np.uint8]]],
    read: Callable[..., NDArray[np.uint8]],
    upper: bool = False,
) -> Plan:
    """Plan a repair of each target by itself.

    Args:
        store: makes what is stored from the bytes of `_used`.
        read: makes the bytes of `_used` from those in memory and what is stored.
        upper: guard of each 32-bit float the upper half alone, as if only that had a meaning: a bfloat16.
    """
    guarded = selected(model, targets)
    for name, held in guarded.items() if upper else ():
        if held.tensor.dtype == torch.float32:
            mask = torch.full(held.tensor.shape, -1 << 16, dtype=torch.int32).view(torch.float32)
            guarded[name] = held._replace(mask=mask)
    with float32_storage(model):  # memory holds signs, whatever the network was given as
        kept = {
            name: {part: torch.from_numpy(array) for part, array in store(_used(held)).items()}
            for name, held in guarded.items()
        }

    def repaired() -> Iterator[tuple[Tensor, Tensor]]:
        for name, held in guarded.items():
            yield held.tensor, _with_used(held, read(_used(held), *map(_memory, kept[name].values())))

    @contextmanager
    def reading() -> Iterator[None]:
        with float32_storage(model), replaced(repaired()):
            yield

    return Plan({f"{name}.{part}": x for name, parts in kept.items() for part, x in parts.items()}, reading)


def _words(used: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.pad(used, (0, -len(used) % 8)).view(np.uint64)


def secded(model: nn.Module, targets: Sequence[str] = PARAMETERS) -> Plan:
    """Plan to guard each word of 64 bits by 8 check bits, see `encode`; a detected double error is left as read.

    A word is 64 neighbours among the used bits of one tensor. The last one of a tensor may be shorter: the zeros that
    fill it up are not stored, but its 8 check bits are. For targets, and what is wrong with them, see `vote`.
    """

    def read(used: NDArray[np.uint8], check: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # Where several errors accuse a zero that is not stored, cutting it off leaves the word as read.
        return correct(_words(used), check).view(np.uint8)[: len(used)]

    return _guarded(model, targets, lambda used: {"check": encode(_words(used))}, read)


def vote(model: nn.Module, targets: Sequence[str] = PARAMETERS, reads: int = 3, upper: bool = False) -> Plan:
    """Plan to store more copies, in whole bytes, and to read each bit as most of them say.

    Where each read is wrong with probability p, independently, most of three are with 3 p^2 - 2 p^3, most of five with
    10 p^3 - 15 p^4 + 6 p^5, most of seven with about 35 p^4.

    Args:
        targets: what is copied, in the words of `bnn_utils.faults.inject`.
        reads: how often each bit is stored, its own place included: an odd number, at least 3.
        upper: copy, of each 32-bit float, its upper half alone: sign, exponent and 7 bits of the mantissa. An error in
            what is left changes the number by less than a hundredth.

    Raises:
        ValueError: a target names nothing that the network stores, or `reads` is another number.

    Source: R. E. Lyons and W. Vanderkulk, The Use of Triple-Modular Redundancy to Improve Computer Reliability, IBM
    Journal of Research and Development 6(2), 1962.
    """
    if reads < 3 or reads % 2 == 0:
        raise ValueError(f"reads must be an odd number of at least 3, got {reads}")
    copies = [f"copy {number}" for number in range(1, reads)]
    return _guarded(model, targets, lambda used: {copy: used.copy() for copy in copies}, majority, upper)


def both(first: Plan, second: Plan) -> Plan:
    """Return the plan of one repair after the other: `second` reads what `first` has made of the network.

    Args:
        first, second: plans of one network, made while it was undamaged.

    Raises:
        ValueError: both store something under one name.
    """
    shared = first.stored.keys() & second.stored.keys()
    if shared:
        raise ValueError(f"both repairs store {', '.join(sorted(shared))}")

    @contextmanager
    def read() -> Iterator[None]:
        with first.read(), second.read():
            yield

    return Plan(first.stored | second.stored, read)


def few_bits(model: nn.Module, share: float = 0.01) -> list[str]:
    """Return the names of stored tensors that a repair can guard at little cost.

    They are all parameters that belong to a kind of few bits, and those weights, and parameters of other names, that
    fill less than `share` of memory. Beside binarized weights, those that stay floats are few, whatever they fill.

    The smallest layers (of the image, of shortcuts, of the classes) have the fewest weights to average errors away,
    and guarding them costs next to nothing.

    Raises:
        ValueError: share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    parameters = selected(model)
    bits = {name: _used_bits(held) for name, held in parameters.items()}
    least = share * sum(bits.values())
    binarized = any(held.kind == "weights" for held in parameters.values())
    few = set(FLOATS) - ({"others"} if binarized else {"others", "float_weights"})
    return [name for name, held in parameters.items() if held.kind in few or bits[name] < least]


REPAIRS: dict[str, Callable[[nn.Module], Plan]] = {
    "none": none,
    "clip": lambda model: Plan({}, partial(clip, model)),
    "range": range_check,
    "secded-floats": partial(secded, targets=FLOATS),
    "secded": secded,
    "vote-floats": partial(vote, targets=FLOATS),
    "vote-range": lambda model: both(vote(model, FLOATS), range_check(model)),
    "vote5-range": lambda model: both(vote(model, FLOATS, reads=5), range_check(model)),
    "vote5-few-range": lambda model: both(vote(model, few_bits(model), reads=5), range_check(model)),
    "vote5-upper-range": lambda model: both(vote(model, few_bits(model), 5, upper=True), range_check(model)),
    "vote7-small-range": lambda model: both(vote(model, few_bits(model, 0.03), reads=7), range_check(model)),
    "vote": vote,
}


def stored_bits(model: nn.Module, repair: str = "none") -> int:
    """Return how many bits memory holds: those used by the network's parameters, and all that the repair stores.

    Raises:
        ValueError: an unknown repair.
    """
    if repair not in REPAIRS:
        raise ValueError(f"unknown repair {repair!r}, expected one of {', '.join(REPAIRS)}")
    own = sum(_used_bits(held) for held in selected(model).values())
    return own + sum(8 * x.nbytes for x in REPAIRS[repair](model).stored.values())
