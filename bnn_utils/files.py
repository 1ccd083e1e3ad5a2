"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call `write` with a path beside `path`, then rename it: `path` is there whole, or stays as it was."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
