"""The folder of one training run of the command line, and the checkpoint that a run starts from."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from bnn_utils import parallel
from bnn_utils.layers import binarized_weights
from bnn_utils.models import Network
from bnn_utils.system import only_one

BEST_FILE, LOCK_FILE = "best.safetensors", ".lock"


def check_run(folder: Path, free: bool) -> None:
    """Raise FileExistsError where a run is in a folder, unless that is free to be gone on with or replaced."""
    if folder.exists() and not free and (not folder.is_dir() or {x.name for x in folder.iterdir()} - {LOCK_FILE}):
        raise FileExistsError(f"{folder}: is there already; go on with --resume, replace with --overwrite, or --save")


@contextmanager
def only_run(folder: Path, free: bool) -> Iterator[None]:
    """Be the only run that trains into a folder, until the context ends; of several processes of a run, the first."""
    if not parallel.first():
        yield
        return
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = BlockingIOError(f"{folder}: another process is training into this folder; wait for it, or --save elsewhere")
    try:
        with only_one(folder / LOCK_FILE, held):
            check_run(folder, free)  # since it was checked, another run may have begun and ended
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps a file that is open
                    (folder / LOCK_FILE).unlink()
    finally:
        for path in absent:  # nothing is left where nothing was written
            with suppress(OSError):
                path.rmdir()


def started(path: str, model: Network, facts: dict[str, Any], wanted: Network) -> Network:
    """Return the network `model` of a checkpoint, which must be of the name and the shape that is wanted.

    A file of one bit a weight tells signs alone. Its latent weights get the sizes of those in `wanted`, a network not
    trained yet: of size 1, no step of a small learning rate would turn a sign.
    """
    before, here = ({"network": network.name, "binary": True, **network.config} for network in (model, wanted))
    differing = [f"{key} {before.get(key)!r} there, {here[key]!r} here" for key in here if before.get(key) != here[key]]
    if differing:
        raise ValueError(f"{path}: is of another network: {'; '.join(differing)}")
    if facts.get("packed"):
        with torch.no_grad():
            for signs, fresh in zip(binarized_weights(model).values(), binarized_weights(wanted).values(), strict=True):
                least = torch.finfo(fresh.dtype).tiny  # 0 has no sign to give
                signs.copy_(fresh.abs().clamp(min=least).copysign(signs))
    return model
