"""What the library asks of the system around it: files that are there whole, and a progress bar."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call `write` with a path beside `path`, then rename it: `path` is there whole, or stays as it was."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def progress_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> tqdm:
    """Return a tqdm bar that vanishes when done; TQDM_DISABLE=1 in the environment turns it off, in notebooks too.

    Args:
        iterable: what to walk through; None for a bar that is updated by hand.
        arguments: tqdm's total, desc and unit.
    """
    disabled = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(iterable, leave=False, disable=disabled, **arguments)
