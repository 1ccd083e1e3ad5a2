"""Numba's compiler, with a cache on disk that may be missing, broken or full: that costs time, and nothing else."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from numba.core.caching import FunctionCache


@cache  # told once
def _tell(trouble: str) -> None:
    warnings.warn(
        f"Numba's cache of compiled code {trouble}, so code is compiled anew, which takes a while; the environment "
        "variable NUMBA_CACHE_DIR may name another folder for it",
        stacklevel=2,
    )


class _Cache(FunctionCache):
    """Numba's cache of one function: a file that cannot be read counts as missing, one that cannot be written is not.

    Numba itself raises what pickle raises on an emptied or shortened file: EOFError, UnpicklingError and others.
    """

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:
            _tell(f"in {self.cache_path} cannot be read")
        try:
            self.flush()
        except OSError:
            self.disable()

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except OSError:
            _tell(f"in {self.cache_path} cannot be written")


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function by Numba, free of Python's lock, and keep the code on disk.

    Where no folder for it can be written, or what lies there cannot be read, the code is compiled anew; a warning says
    so, once in a process.
    """
    dispatcher: Any = numba.njit(nogil=True)(function)
    try:
        dispatcher._cache = _Cache(function)  # as its enable_caching does, with Numba's own class
    except RuntimeError:  # "no locator available"
        _tell("has no folder that can be written")
    return dispatcher
