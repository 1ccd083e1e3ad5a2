"""What the library asks of the system: memory that is kept, and the fastest precision."""

import platform
import subprocess
import sys

import pytest
import torch
from llvmlite import binding

from bnn_utils.system import fastest_precision

COUNT = """
import resource, sys
import torch
from bnn_utils.system import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    """A tensor of 64 MiB takes new pages each time, unless they are kept (after some first gaps in the heap)."""
    left, kept = (
        int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, check=True).stdout)
        for how in ("leave", "keep")
    )
    assert kept < left / 2


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        ({"avx512f": True, "avx512bf16": False, "amx-bf16": False}, "float32"),
        ({"avx512bf16": True}, "bfloat16"),
        ({"amx-bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_the_fastest_precision_is_what_the_processor_multiplies(features, precision, monkeypatch):
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastest_precision("cpu") == fastest_precision("auto") == precision
