"""Compiled code without a cache, or with a broken one: the same results, and one warning."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import bnn_utils
from bnn_utils.faults import inject_tensors

FLIPS = """
import sys
import torch
from bnn_utils import flipping
from bnn_utils.faults import inject_tensors

exec(sys.argv[1])
words = torch.arange(10)
with inject_tensors({"words": words}, 0.3, seed=0):
    print(int(words.sum()), flipping.__file__)
"""


def expected(package):
    words = torch.arange(10)
    with inject_tensors({"words": words}, 0.3, seed=0):
        return [str(int(words.sum())), str(package / "flipping.py")]


def flips(package, environment, before=""):
    """Return what a process says, and what it is warned of."""
    environment = {**os.environ, "PYTHONPATH": "", **{name: str(value) for name, value in environment.items()}}
    ran = subprocess.run(
        [sys.executable, "-c", FLIPS, before], cwd=package.parent, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(), ran.stderr


def told(text, trouble):
    told_once = text.count("Warning") == 1 and "NUMBA_CACHE_DIR" in text
    return told_once and f"Numba's cache of compiled code {trouble}" in text


def test_where_no_folder_can_be_written_code_is_compiled_without_a_cache(tmp_path):
    package = tmp_path / "bnn_utils"
    shutil.copytree(Path(bnn_utils.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").touch()  # a file where the folder would be, since root may write everywhere
    nowhere = tmp_path / "file"
    nowhere.touch()
    folders = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "NUMBA_CACHE_DIR"), nowhere)
    said, warned = flips(package, folders)
    assert said == expected(package)
    assert told(warned, "has no folder that can be written"), warned


def test_emptied_and_shortened_files_of_the_cache_are_made_anew(tmp_path):
    package = Path(bnn_utils.__file__).parent
    for ending, share in ((None, 1), ("nbi", 0), ("nbc", 0.5), (None, 1)):  # Numba's index, and its data
        for file in tmp_path.rglob(f"*.{ending}"):
            file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        said, warned = flips(package, {"NUMBA_CACHE_DIR": tmp_path})
        assert said == expected(package)
        if ending is None:
            assert warned == ""
        else:
            assert told(warned, "in ") and "cannot be read" in warned, warned


def test_a_cache_that_goes_while_a_process_runs_is_no_failure(tmp_path):
    package, cache = Path(bnn_utils.__file__).parent, tmp_path / "cache"
    gone = f"import shutil; shutil.rmtree({str(cache)!r}); open({str(cache)!r}, 'w').close()"
    said, warned = flips(package, {"NUMBA_CACHE_DIR": cache}, gone)
    assert said == expected(package)
    assert told(warned, "in "), warned
