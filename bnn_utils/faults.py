"""Which stored bits go wrong: what a network stores, models of errors, and an injection that undoes itself."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnn_utils.bits import WORD, check_probability, sample_runs
from bnn_utils.flipping import IndexedBits, MemoryBits, bits_of
from bnn_utils.layers import BINARIZED, Shift, binarize

BITS = 32  # of a stored number in float32 storage
STORAGES = ("float32", "packed")
PARAMETERS = (
    *("weights", "float_weights", "biases", "bn_scale", "bn_shift", "shifts", "slopes"),
    *("others", "thresholds", "directions"),  # others: parameters of any other name, such as those of an LSTM
)
KINDS = (*PARAMETERS, "running_mean", "running_var", "buffers")  # buffers: those of any other name
_STATISTICS = {"running_mean": "running_mean", "running_var": "running_var"}
_LAYER_KINDS = {"weight": "weights", "bias": "biases", **_STATISTICS}
_OWN_KINDS: dict[type[nn.Module], dict[str, str]] = {
    nn.modules.batchnorm._BatchNorm: {"weight": "bn_scale", "bias": "bn_shift", **_STATISTICS},
    nn.PReLU: {"weight": "slopes"},
    Shift: {"shift": "shifts"},
}
_PACKED_KINDS = {
    "weight": "weights",
    "bias": "biases",
    "scale": "bn_scale",
    "shift": "bn_shift",
    "offset": "shifts",
    "slope": "slopes",
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

    Its kind is one of KINDS. Weights of layers that are not binarized are "float_weights". Parameters of any name are
    "others" where no kind is known for them: none is left out. A tensor that several modules share is stored once, and
    bears its first name. Buffers of ordinary modules that are not running statistics are "buffers", which nothing
    damages unless it is told to, except that those called weight or bias count as parameters. Integers among them,
    such as BatchNorm's batch counter, and tensors that are neither parameters nor buffers are no part of memory.

    A packed layer is a module with an attribute `masks`, a dict from the names of its buffers to their masks, of the
    same shape and dtype; a buffer without one is used entirely.

    Raises:
        TypeError: a module keeps its numbers where they cannot be reached, or stores them as integers without being
            a packed layer, or has not been given them yet; the message names it.
    """
    found: dict[str, Stored] = {}
    seen: set[tuple[int, bool]] = set()
    for name, module in model.named_modules():
        if reason := _out_of_reach(module):
            raise TypeError(f"{name or 'the network'} ({type(module).__name__}) cannot be damaged: {reason}")
        masks: Any = getattr(module, "masks", None)
        packed = isinstance(masks, dict)
        ordinary = next((own for known, own in _OWN_KINDS.items() if isinstance(module, known)), _LAYER_KINDS)
        kinds = _PACKED_KINDS if packed else ordinary
        own = [(key, x, True) for key, x in module.named_parameters(recurse=False)]
        own += [(key, x, False) for key, x in module.named_buffers(recurse=False)]
        for key, tensor, parameter in own:
            full = f"{name}.{key}" if name else key
            if nn.parameter.is_lazy(tensor):
                raise TypeError(f"{full} cannot be damaged: it has no numbers yet; run the network on a batch first")
            if not packed and not (tensor.is_floating_point() or tensor.is_complex()):
                # Indices and counters are of 64 bits, masks boolean; narrow integers in rows and columns are weights.
                if parameter or (tensor.dim() > 1 and tensor.dtype not in (torch.int64, torch.bool)):
                    raise TypeError(f"{full} cannot be damaged: it holds {tensor.dtype}, not floats; {_INSTEAD}")
                continue
            kind = kinds.get(key, "others" if parameter or packed else "buffers")
            if kind == "weights" and tensor.is_floating_point() and not isinstance(module, BINARIZED):
                kind = "float_weights"
            shared = (id(tensor), kind in PARAMETERS)
            if shared not in seen:
                seen.add(shared)
                found[full] = Stored(kind, tensor, masks.get(key) if packed else None)
    return found


_INSTEAD = "damage the float network that it was made from, or what bnn_utils.packed.pack makes of it"


def _out_of_reach(module: nn.Module) -> str | None:
    """Return why the numbers of a module cannot be found, or not told apart; None if they can."""
    if isinstance(module, torch.jit.ScriptModule):
        return f"TorchScript does not tell what its layers are; {_INSTEAD}"
    if isinstance(module, torch.fx.GraphModule) and any(node.op == "get_attr" for node in module.graph.nodes):
        return f"its graph uses numbers apart from the layers that they belong to; {_INSTEAD}"
    if torch.ScriptObject in map(type, vars(module).values()):
        return f"its numbers are quantized and out of reach; {_INSTEAD}"
    return None


def selected(model: nn.Module, targets: Sequence[str] = PARAMETERS) -> dict[str, Stored]:
    """Return what `targeted` does, with kinds and masks."""
    return _select(stored_tensors(model), targets)


def targeted(model: nn.Module, targets: Sequence[str] = PARAMETERS) -> dict[str, Tensor]:
    """Return the stored tensors that `targets` name, by state_dict name, in memory order.

    Args:
        targets: kinds (see KINDS) and names or shell patterns of tensors ("features.0.weight", "layer1.*").

    Raises:
        ValueError: a target names nothing that the network stores.
        TypeError: as in `stored_tensors`; or a tensor named is not plain memory: it is sparse, on the meta device, or
            wraps others; or some of its numbers lie where others of these tensors do.
    """
    return {name: stored.tensor for name, stored in selected(model, targets).items()}


def _select(stored: dict[str, Stored], targets: Sequence[str]) -> dict[str, Stored]:
    names: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        hit = {name for name, held in stored.items() if held.kind == target}
        if target not in KINDS:
            hit |= {name for name in stored if fnmatchcase(name, target)}
            if not hit:
                raise ValueError(
                    f"target {target!r} names nothing in this network, expected {', '.join(KINDS)} or a tensor's name"
                )
        names |= hit
    chosen = {name: held for name, held in stored.items() if name in names}
    _check_memory({name: held.tensor for name, held in chosen.items()})
    return chosen


def _check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Raise TypeError unless each number has a place of its own in memory."""
    places = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or hasattr(tensor, "__tensor_flatten__"):
            raise TypeError(
                f"{name} cannot be damaged: it is not a plain tensor in memory, but {type(tensor).__name__} of "
                f"{tensor.layout} on {tensor.device}"
            )
        if not (reach := tensor.numel()):
            continue
        spaced = [] if tensor.is_contiguous() else [x for x in sorted(zip(tensor.stride(), tensor.shape)) if x[1] > 1]
        reach = reach if not spaced else 1  # of its numbers in memory, counted in numbers
        for stride, size in spaced:
            if stride < reach:
                raise TypeError(
                    f"{name} cannot be damaged: several of its numbers share a place in memory (shape "
                    f"{tuple(tensor.shape)}, strides {tensor.stride()}); give it memory of its own by contiguous()"
                )
            reach += stride * (size - 1)
        start = tensor.data_ptr()
        places.append((tensor.get_device(), start, start + reach * tensor.element_size(), name))
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(places)):
        if device == other_device and start < end:
            raise TypeError(
                f"{name} and {other} cannot both be damaged: they are two tensors in the same memory; let the modules "
                "that share it hold one tensor, as in second.weight = first.weight"
            )


@contextmanager
def replaced(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give tensors other values until the context ends; `values` is read as they are replaced.

    On leaving, an exception too, each tensor has its own values again, bit for bit.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for tensor, value in values:
                before.append((tensor, tensor.detach().clone()))
                tensor.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in reversed(before):  # of memory that two tensors share, the first value last
                tensor.copy_(saved)


_held: WeakSet[nn.Module] = WeakSet()


@contextmanager
def float32_storage(model: nn.Module) -> Iterator[None]:
    """Hold the network as float32 storage does: every binarized weight is +1.0 or -1.0, until the context ends.

    The network computes the same, since its layers binarize what they read. On leaving, an exception too, the
    latent weights are back, bit for bit. A network that is held already is left as it is, and so is a weight that a
    layer of another kind shares, since that layer reads it as it is.
    """
    # To binarize again would take several passes over every weight, far longer than to flip a few bits, and would
    # turn the damaged weights of an enclosing injection into undamaged ones.
    if model in _held:
        yield
        return
    as_is = {
        id(own)
        for module in model.modules()
        if not isinstance(module, BINARIZED)
        for own in module.parameters(recurse=False)
    }

    def signs() -> Iterator[tuple[Tensor, Tensor]]:
        for module in model.modules():
            if isinstance(module, BINARIZED) and id(weight := module.weight) not in as_is:
                stored = binarize(weight)
                if not torch.equal(stored, weight):
                    yield weight, stored

    try:
        _held.add(model)
        with replaced(signs()):
            yield
    finally:
        _held.discard(model)


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
    stored: dict[str, Stored], chosen: dict[str, Stored], probability: float, seed: int, error: str | ErrorModel
) -> Iterator[Flips]:
    """Check the arguments, damage what is chosen of what is stored, count and yield; on leaving every bit is back."""
    probability = check_probability(probability)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not isinstance(error, ErrorModel):
        if error not in ERRORS:
            raise ValueError(f"unknown error model {error!r}, expected one of {', '.join(ERRORS)}")
        error = ERRORS[error]
    for name, (_, tensor, _) in chosen.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32 to be damaged, got {tensor.dtype}")
    widest = max((8 * held.tensor.element_size() for held in stored.values()), default=BITS)
    flips = Flips(bits=np.zeros(max(BITS, widest), np.int64))
    with ExitStack() as undo:
        for name, held in chosen.items():
            # From p = 1/32 on, a copy of the tensor takes less memory than the list of its flips, 4 bytes each.
            bits = bits_of(held.tensor, copy=32 * probability > 1)
            undo.callback(bits.restore)
            # A stream of its own for every tensor: its errors do not depend on which other tensors are targets.
            generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))  # numpy's fastest
            _damage(held, bits, probability, error, generator)
            count = int(bits.counts.sum())
            if count:
                flips.tensors[name] = count
                flips.bits += bits.counts[: len(flips.bits)]
        yield flips


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

    Memory is float32 storage: every parameter a 32-bit float, binarized weights as +1.0 and -1.0, all others as
    trained; running statistics, and buffers of other names, are error-free unless targeted. A packed network's memory
    is packed storage, its buffers as they are; see `stored_tensors`. Every bit of the targeted tensors errs with the
    probability that the error model gives it, exactly; bits that hold nothing never change. With "flip" errors are
    independent: their number is binomial, their positions distinct and uniform. Work and memory follow the number of
    errors. The errors of a tensor depend on `seed`, `probability`, `error`, its name, size and mask, and, if the rates
    differ, on its bits, not on the device, the threads or the other targets.

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
        ValueError: a probability outside [0, 1], a negative seed, an unknown error model or target, or targets of which
            the network stores none.
        TypeError: a targeted tensor holds floats that are not float32, or as `stored_tensors` and `targeted` do.

    Source: the storage of the published damage experiment, see README.md; of an error model, its `source`.
    """
    network = stored_tensors(model)
    chosen = _select(network, targets)
    if targets and not chosen:
        raise ValueError(f"targets {targets} name nothing that this network ({type(model).__name__}) stores")
    with float32_storage(model), _damaged(network, chosen, probability, seed, error) as flips:
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
        TypeError: a tensor holds floats that are not float32, or is not plain memory of its own, see `targeted`.
    """
    _check_memory(tensors)
    stored = {name: Stored("", tensor) for name, tensor in tensors.items()}
    with _damaged(stored, stored, probability, seed, error) as flips:
        yield flips
