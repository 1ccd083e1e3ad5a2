"""Bits of a tensor where they are stored: read, flip and count them by position, and put every one back."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnn_utils.bits import WORD
from bnn_utils.compiling import compiled

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@compiled
def _flip(memory, positions, last, counts):
    for position in positions:
        memory[position >> 3] ^= np.uint8(1 << (position & 7))
        counts[position & last] += 1


@compiled
def _flip_back(memory, positions):
    for position in positions:
        memory[position >> 3] ^= np.uint8(1 << (position & 7))


class MemoryBits:
    """The bits of a contiguous tensor on a little-endian CPU: bit i is bit i % 8 of byte i // 8 of its memory.

    Args:
        tensor: elements of 1, 2, 4 or 8 bytes.
        copy: keep a copy for `restore`, which many flips make shorter than their list.

    Attributes:
        counts: how many bits were flipped at each position in their element, int64 (64,).
    """

    def __init__(self, tensor: Tensor, copy: bool = False):
        self.memory: NDArray[np.uint8] = tensor.detach().numpy().reshape(-1).view(np.uint8)
        self.last = 8 * tensor.element_size() - 1
        self.counts = np.zeros(WORD, np.int64)
        self._before = self.memory.copy() if copy else None
        self._flipped: list[NDArray] = []
        self._position = np.uint32 if tensor.nbytes <= 1 << 29 else np.int64  # half the list, where it is enough

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bits at `positions`, each 0 or 1."""
        return self.memory[positions >> 3] >> (positions & 7) & 1

    def flip(self, positions: NDArray[np.int64]) -> None:
        """Invert the bits at `positions`, sorted and distinct."""
        positions = positions.astype(self._position)
        if self._before is None:
            self._flipped.append(positions)
        _flip(self.memory, positions, self.last, self.counts)

    def restore(self) -> None:
        """Give every bit the value that it had at first."""
        if self._before is not None:
            np.copyto(self.memory, self._before)
        # An interrupt comes before or after compiled code, never inside: `counts` tells if the last array was flipped.
        done = int(self.counts.sum())
        for positions in self._flipped:
            if done > 0:
                _flip_back(self.memory, positions)
            done -= len(positions)


class IndexedBits:
    """The bits of any tensor, on its device, by logical index: bit i is bit i % size of element i // size.

    Arguments, attributes and methods as in `MemoryBits`, and the same results.
    """

    def __init__(self, tensor: Tensor, copy: bool = False):
        self.stored = tensor.detach().view(_INTEGERS[tensor.element_size()])
        self.size = 8 * tensor.element_size()
        self.counts = np.zeros(WORD, np.int64)
        self._copied = copy
        self._before: list[tuple[tuple, Tensor]] = [((...,), self.stored.clone())] if copy else []

    def _index(self, elements: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return torch.unravel_index(torch.from_numpy(elements).to(self.stored.device), self.stored.shape)

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        elements = self.stored[self._index(positions // self.size)].cpu().numpy()
        return elements >> positions % self.size & 1

    def flip(self, positions: NDArray[np.int64]) -> None:
        elements, first = np.unique(positions // self.size, return_index=True)
        masks = np.add.reduceat(np.int64(1) << positions % self.size, first).astype(f"i{self.size // 8}")
        index = self._index(elements)
        before = self.stored[index].clone()  # of a tensor without dimensions, indexing gives a view
        if not self._copied:
            self._before.append((index, before))
        self.stored[index] = before ^ torch.from_numpy(masks).to(self.stored.device)
        self.counts += np.bincount(positions % self.size, minlength=WORD)

    def restore(self) -> None:
        for index, before in reversed(self._before):  # an element that two arrays share gets its first value last
            self.stored[index] = before


def bits_of(tensor: Tensor, copy: bool = False) -> MemoryBits | IndexedBits:
    """Return the bits of `tensor` in the fastest way there is for it; see `MemoryBits`."""
    in_memory = sys.byteorder == "little" and tensor.device.type == "cpu" and tensor.is_contiguous()
    return MemoryBits(tensor, copy) if in_memory else IndexedBits(tensor, copy)
